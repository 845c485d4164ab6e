"""The object store port: what every store promises, whatever lies behind it.
Knows no implementation. The contract is pinned by tests that run against all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object, as the store knows it. `etag` is opaque: equal etags of one key mean equal bytes."""

    key: str
    size_bytes: int
    modified_ms: int
    etag: str


class ObjectStore(Protocol):
    """Immutable objects under string keys. Every method raises only `shstore.errors.StoreError` (or is cancelled)."""

    async def put(self, key: str, parts: Sequence[bytes | memoryview], *, if_absent: bool = True) -> ObjectInfo:
        """Store the concatenation of `parts`; it appears whole and durable, or not at all.

        Raises ObjectExists if `if_absent` and the key is taken. After StoreUnavailable or a cancellation
        the object may or may not be there.
        """
        ...

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        """Exactly `size_bytes` bytes from byte `at`; the rest of the object if `size_bytes` is None.

        Raises ObjectMissing, RangeBeyondEnd if the range does not lie inside the object, BodyTruncated.
        """
        ...

    async def head(self, key: str) -> ObjectInfo:
        """Size, age and etag. Raises ObjectMissing."""
        ...

    def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """Objects whose key starts with `prefix` and is greater than `start_after`, by ascending key.

        Keys ascend by code point (which is UTF-8 byte order). An object put or deleted meanwhile may
        or may not appear; all others appear exactly once. What lies there under a name that is no key
        (the mark of an empty folder, say) does not appear: no other call takes that name.
        """
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete all of `keys`; missing ones are fine. Raises KeysRefused where the store keeps some and has deleted
        the others; after another error any of them may be gone."""
        ...

    async def check(self) -> None:
        """Cheap start-up probe; raises a StoreError that says what to fix (bucket, credentials, directory)."""
        ...

    async def close(self) -> None:
        """Release connections. The store is not used afterwards. Closing twice is fine."""
        ...
