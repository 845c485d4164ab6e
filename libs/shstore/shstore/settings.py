"""Settings of the object store, which services that read or write it inherit."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from shruntime.memory import MIB
from shruntime.settings import CommonSettings

from shstore.options import StoreOptions


class StoreSettings(CommonSettings):
    """Place of the objects, credentials and limits of the requests, as variables and files give them."""

    service: ClassVar[str] = "store"

    store_dir: str = Field("", description="a local directory as object store; empty: S3")
    s3_endpoint: str = Field("", description="URL of the S3 API; empty: AWS")
    s3_bucket: str = Field("streamhouse", min_length=3, max_length=63, description="bucket, which must exist")
    s3_prefix: str = Field("", max_length=256, description="put before every key, so that clusters can share a bucket")
    s3_region: str = Field("us-east-1", description="region of the bucket")
    s3_access_key: str = Field(
        "", description="access key; empty: the usual AWS chain (variables, profile, instance role)"
    )
    s3_secret_key: str = Field("", repr=False, description="secret key; empty: the usual AWS chain")
    s3_connect_timeout_ms: int = Field(5_000, ge=100, le=60_000, description="ms to connect")
    s3_read_timeout_ms: int = Field(
        30_000, ge=100, le=600_000, description="ms without a byte; S3's p99 for 8 MiB is well below"
    )
    s3_attempts_deadline_ms: int = Field(
        60_000,
        ge=0,
        le=3_600_000,
        description="ms of retries with back-off before a call fails; the work itself is retried after",
    )
    s3_multipart_threshold_bytes: int = Field(
        16 * MIB,
        ge=5 * MIB,
        le=5 * 1024 * MIB,
        description="bytes above which an upload is multipart; parts run in parallel",
    )
    s3_multipart_part_bytes: int = Field(
        8 * MIB, ge=5 * MIB, le=512 * MIB, description="bytes of one part; 5 MiB is S3's least"
    )

    def options(self) -> StoreOptions:
        """Returns the options of the store: a directory if `store_dir` is given, else S3. Raises StoreInvalid."""
        if self.store_dir:
            return StoreOptions(kind="local", path=Path(self.store_dir))
        return StoreOptions(
            kind="s3",
            bucket=self.s3_bucket,
            prefix=self.s3_prefix,
            endpoint=self.s3_endpoint or None,
            region=self.s3_region,
            access_key=self.s3_access_key or None,
            secret_key=self.s3_secret_key or None,
            connect_timeout_ms=self.s3_connect_timeout_ms,
            read_timeout_ms=self.s3_read_timeout_ms,
            multipart_threshold_bytes=self.s3_multipart_threshold_bytes,
            multipart_part_bytes=self.s3_multipart_part_bytes,
        )
