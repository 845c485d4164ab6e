"""Errors of an object store.

The kind says how the caller should react; the class says which failure it was and carries the numbers. Errors of
botocore, aiohttp and the operating system end at the adapters, which translate them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar


class StoreErrorKind(StrEnum):
    """The caller's reaction to an error."""

    MISSING = "missing"
    """The object is not there: drop it from the index, or report a dangling registration."""
    EXISTS = "exists"
    """Another put won the key: read it, or choose another key."""
    RETRY = "retry"
    """Try again later; nothing is known to be wrong with the request."""
    DENIED = "denied"
    """An operator must fix credentials or permissions."""
    CORRUPT = "corrupt"
    """The bytes are not what was asked for; never use them."""
    INVALID = "invalid"
    """The request or the configuration is wrong; repeating it cannot help."""


class StoreError(Exception):
    """Base of every error that an ObjectStore raises. `kind` names the reaction, `retriable` allows a repetition."""

    kind: ClassVar[StoreErrorKind]
    retriable: ClassVar[bool] = False


class ObjectMissing(StoreError):
    """No object exists under this key."""

    kind = StoreErrorKind.MISSING

    def __init__(self, key: str) -> None:
        super().__init__(f"no object with key {key!r}")
        self.key = key


class ObjectExists(StoreError):
    """A put-if-absent met an existing object; nothing was written."""

    kind = StoreErrorKind.EXISTS

    def __init__(self, key: str) -> None:
        super().__init__(f"an object with key {key!r} already exists")
        self.key = key


class StoreUnavailable(StoreError):
    """Timeout, 5xx, broken connection, full disk: the call may be repeated.

    A put, delete or multipart completion that failed with this error may still have taken effect. `throttled` is set if
    the store asked for less load.
    """

    kind = StoreErrorKind.RETRY
    retriable = True

    def __init__(self, message: str, *, throttled: bool = False) -> None:
        super().__init__(message)
        self.throttled = throttled


class StoreDenied(StoreError):
    """Credentials are missing or wrong, or do not permit the call."""

    kind = StoreErrorKind.DENIED


class KeysRefused(StoreDenied):
    """The store answers a delete and keeps some of its objects, as those under a lock. `keys`: all that were not
    deleted; the other keys of the call are gone."""

    def __init__(self, message: str, keys: Sequence[str]) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class StoreCorrupt(StoreError):
    """The store's answer contradicts the request, or itself."""

    kind = StoreErrorKind.CORRUPT


class BodyTruncated(StoreCorrupt):
    """A body ended before its declared size, as after a cut connection. A new attempt may read it whole."""

    retriable = True

    def __init__(self, key: str, *, expected_bytes: int, got_bytes: int) -> None:
        super().__init__(f"body of {key!r} ended after {got_bytes} of {expected_bytes} bytes")
        self.key = key
        self.expected_bytes = expected_bytes
        self.got_bytes = got_bytes


class WrongRange(StoreCorrupt):
    """The headers of an answer declare other bytes than the requested range, as behind a cache or proxy that cuts
    bodies or ignores ranges. A new attempt may reach the store itself."""

    retriable = True


class RangeBeyondEnd(StoreCorrupt):
    """The requested range does not lie inside the object: the object is shorter than the caller's index says."""

    def __init__(self, key: str, *, at: int, size_bytes: int | None, object_size_bytes: int) -> None:
        wanted = "the rest" if size_bytes is None else f"{size_bytes} bytes"
        super().__init__(f"{key!r} has {object_size_bytes} bytes, but {wanted} at byte {at} were asked for")
        self.key = key
        self.at = at
        self.size_bytes = size_bytes
        self.object_size_bytes = object_size_bytes


class StoreInvalid(StoreError):
    """The request or the store's settings cannot work; the message names the field and the limit."""

    kind = StoreErrorKind.INVALID


REFUSALS = (StoreDenied, StoreInvalid)
"""The store answers, and refuses: repeating the call cannot help before an operator has changed something."""


class KeyInvalid(StoreInvalid):
    """The key (or list prefix) breaks a rule of `shstore.keys`; it never reached the store."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"object key {key[:200]!r} {reason}")
        self.key = key
        self.reason = reason


class BucketMissing(StoreInvalid):
    """The configured bucket does not exist at the endpoint."""

    def __init__(self, bucket: str, endpoint: str | None) -> None:
        super().__init__(f"bucket {bucket!r} does not exist at {endpoint or 'the default S3 endpoint'}")
        self.bucket = bucket
        self.endpoint = endpoint
