"""Options of a store, with units and reasons. Checked at construction: the error names a wrong value."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shstore.errors import StoreInvalid
from shstore.keys import PREFIX_BYTES_MAX, check_prefix

StoreKind = Literal["local", "s3", "memory"]

MIB = 1024 * 1024

S3_PART_BYTES_MIN = 5 * MIB
"""S3 refuses smaller parts, except the last."""

S3_PARTS_MAX = 10_000
"""S3 refuses more parts in one upload."""

_POSITIVE = (
    "connect_timeout_ms",
    "read_timeout_ms",
    "attempt_timeout_ms",
    "max_connections",
    "multipart_concurrency",
    "get_bytes_max",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """Place of the objects, and limits of the requests to it. Raises StoreInvalid for settings that cannot work."""

    kind: StoreKind
    path: Path | None = None
    """Directory of a local store; made when missing."""
    prefix: str = ""
    """A path put before every key (S3), or below `path` (local), so that several clusters share one place."""
    bucket: str = ""
    endpoint: str | None = None
    """URL of an S3 API; None means AWS, found by region."""
    region: str = "us-east-1"
    access_key: str | None = None
    """None means boto's usual chain: environment, files, instance role."""
    secret_key: str | None = field(default=None, repr=False)
    path_style: bool = True
    """Bucket in the path, not in the host name: what MinIO, Ceph and others without wildcard DNS need."""
    request_checksums: bool = True
    """Send a CRC32 with each upload, so that the server refuses damaged bytes. Off for servers that refuse it."""
    multipart_threshold_bytes: int = 16 * MIB
    """Beyond this a put is a multipart upload. One part up to here: a single request is cheaper and atomic."""
    multipart_part_bytes: int = 8 * MIB
    """A 64 MiB segment is 8 parts: enough to upload in parallel, and little to repeat."""
    multipart_concurrency: int = 4
    """Parts under way at once, per put. Each holds one copy of a part: 4 x 8 MiB of memory."""
    connect_timeout_ms: int = 3_000
    """A TCP and TLS handshake across regions takes under 1 s; beyond 3 s another attempt is worth more."""
    read_timeout_ms: int = 15_000
    """Longest silence while waiting for a reply; S3's first byte is there in 0.1-2 s even when slow."""
    attempt_timeout_ms: int = 60_000
    """Longest a single request may take in all: 8 MiB at 140 KB/s. Guards against a trickling server."""
    max_connections: int = 32
    """Pool size: 4 uploads of 4 parts, and as many reads."""
    get_bytes_max: int = 1024 * MIB
    """Largest get: four times the largest segment (256 MiB). More is a damaged index, not a wish."""

    def __post_init__(self) -> None:
        if self.kind not in ("local", "s3", "memory"):
            raise StoreInvalid(f"store kind is {self.kind!r}, but must be one of local, s3, memory")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise StoreInvalid(f"store {name} is {getattr(self, name)}, but must be at least 1")
        self._check_prefix()
        self._check_kind()

    def _check_prefix(self) -> None:
        check_prefix(self.prefix)
        size_bytes = len(self.prefix.encode())
        if size_bytes > PREFIX_BYTES_MAX:
            raise StoreInvalid(
                f"store prefix has {size_bytes} bytes, over the limit of {PREFIX_BYTES_MAX} (STREAMHOUSE_S3_PREFIX)"
            )

    def _check_kind(self) -> None:
        if self.kind == "local" and self.path is None:
            raise StoreInvalid("store path is missing, but a local store needs a directory")
        if self.kind == "memory" and self.prefix:
            raise StoreInvalid("store prefix is set, but a memory store has none")
        if self.kind == "s3":
            self._check_s3()

    def _check_s3(self) -> None:
        if not self.bucket:
            raise StoreInvalid("store bucket is missing, but an S3 store needs one")
        if self.endpoint is not None and not re.match(r"https?://[^/\s]+", self.endpoint):
            raise StoreInvalid(
                f"store endpoint is {self.endpoint!r}, but must be a http:// or https:// URL (STREAMHOUSE_S3_ENDPOINT)"
            )
        if (self.access_key is None) != (self.secret_key is None):
            raise StoreInvalid(
                "store access_key and secret_key (STREAMHOUSE_S3_ACCESS_KEY, STREAMHOUSE_S3_SECRET_KEY) must be given "
                "both or neither"
            )
        if self.multipart_part_bytes < S3_PART_BYTES_MIN:
            raise StoreInvalid(
                f"store multipart_part_bytes is {self.multipart_part_bytes}, below S3's minimum of {S3_PART_BYTES_MIN}"
            )
        if self.multipart_threshold_bytes < self.multipart_part_bytes:
            raise StoreInvalid(
                f"store multipart_threshold_bytes is {self.multipart_threshold_bytes}, "
                f"below multipart_part_bytes = {self.multipart_part_bytes} (STREAMHOUSE_S3_MULTIPART_THRESHOLD_BYTES, "
                "STREAMHOUSE_S3_MULTIPART_PART_BYTES)"
            )
