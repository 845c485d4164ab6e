"""The object store port: the promises of every store, independent of the implementation.

Tests run the contract against all stores.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """A stored object, as the store knows it. `etag` is opaque: equal etags of a key mean equal bytes."""

    key: str
    size_bytes: int
    modified_ms: int
    etag: str


class ObjectStore(Protocol):
    """Immutable objects under string keys. Every method raises only `shstore.errors.StoreError` (or is cancelled)."""

    async def put(self, key: str, parts: Sequence[bytes | memoryview], *, if_absent: bool = True) -> ObjectInfo:
        """Stores the concatenation of `parts` and returns its info; the object appears whole and durable, or not at
        all.

        Raises ObjectExists if `if_absent` and the key is taken. After StoreUnavailable or a cancellation the object may
        or may not exist.
        """
        ...

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        """Returns exactly `size_bytes` bytes from byte `at`, or the rest of the object if `size_bytes` is None.

        Raises ObjectMissing, RangeBeyondEnd if the range does not lie inside the object, BodyTruncated.
        """
        ...

    async def head(self, key: str) -> ObjectInfo:
        """Returns size, age and etag. Raises ObjectMissing."""
        ...

    def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """Yields objects whose key starts with `prefix` and is greater than `start_after`, by ascending key.

        Keys ascend by code point (which is UTF-8 byte order). An object put or deleted meanwhile may or may not appear;
        all others appear exactly once. A name in the store that is not a valid key (the mark of an empty folder, say)
        does not appear: no other call takes that name.
        """
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Deletes all of `keys`; missing keys are fine.

        Raises KeysRefused if the store keeps some and has deleted the others; after another error any of them may be
        gone.
        """
        ...

    async def check(self) -> None:
        """Probes the store cheaply at start-up; raises a StoreError that says what to fix (bucket, credentials,
        directory)."""
        ...

    async def close(self) -> None:
        """Releases connections. The store is not used afterwards. Closing twice is fine."""
        ...
