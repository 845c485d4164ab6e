"""The object store that a service's settings describe, retries included."""

from pathlib import Path

from shruntime import settings as runtime

from shstore.open import open_store
from shstore.retrying import RetryingStore, RetryPolicy
from shstore.settings import StoreSettings


def configured_store(settings: runtime.StoreSettings) -> RetryingStore:
    """A local directory where `store_dir` is set, else S3. Does no I/O; `check()` does. Raises StoreInvalid."""
    policy = RetryPolicy(deadline_ms=max(1, settings.s3_attempts_deadline_ms))
    return RetryingStore(open_store(_store_settings(settings)), policy)


def _store_settings(settings: runtime.StoreSettings) -> StoreSettings:
    if settings.store_dir:
        return StoreSettings(kind="local", path=Path(settings.store_dir))
    return StoreSettings(
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
