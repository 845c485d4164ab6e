"""Opens the object store of a service's settings, retries included."""

from pathlib import Path

from shruntime import settings as runtime

from shstore.open import open_store
from shstore.options import StoreOptions
from shstore.retrying import RetryingStore, RetryPolicy


def configured_store(settings: runtime.StoreSettings) -> RetryingStore:
    """Returns a store in the directory `store_dir`, or on S3 without it. Does no I/O. Raises StoreInvalid."""
    policy = RetryPolicy(deadline_ms=max(1, settings.s3_attempts_deadline_ms))
    return RetryingStore(open_store(_store_settings(settings)), policy)


def _store_settings(settings: runtime.StoreSettings) -> StoreOptions:
    if settings.store_dir:
        return StoreOptions(kind="local", path=Path(settings.store_dir))
    return StoreOptions(
        kind="s3",
        bucket=settings.s3_bucket,
        prefix=settings.s3_prefix,
        endpoint=settings.s3_endpoint or None,
        region=settings.s3_region,
        access_key=settings.s3_access_key or None,
        secret_key=settings.s3_secret_key or None,
        connect_timeout_ms=settings.s3_connect_timeout_ms,
        read_timeout_ms=settings.s3_read_timeout_ms,
        multipart_threshold_bytes=settings.s3_multipart_threshold_bytes,
        multipart_part_bytes=settings.s3_multipart_part_bytes,
    )
