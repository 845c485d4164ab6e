"""An object store in this process's memory: for unit tests and simulation. Nothing survives it.

Owns: the objects. Invariants: every call is atomic, as it does not await between looking and changing.
"""

from __future__ import annotations

import time
import zlib
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Sequence

from shstore.errors import ObjectExists, ObjectMissing
from shstore.keys import check_key, check_prefix
from shstore.options import StoreOptions
from shstore.port import ObjectInfo
from shstore.ranges import byte_views, check_range, resolve_range


def _system_ms() -> int:
    return time.time_ns() // 1_000_000


class MemoryStore:
    """Object store in memory. `now_ms` gives `modified_ms`, so that tests can move time by hand."""

    def __init__(self, settings: StoreOptions | None = None, *, now_ms: Callable[[], int] = _system_ms) -> None:
        self._get_bytes_max = (settings or StoreOptions(kind="memory")).get_bytes_max
        self._now_ms = now_ms
        self._objects: dict[str, tuple[ObjectInfo, bytes]] = {}

    async def put(self, key: str, parts: Sequence[bytes | memoryview], *, if_absent: bool = True) -> ObjectInfo:
        check_key(key)
        views, size_bytes = byte_views(parts)
        if if_absent and key in self._objects:
            raise ObjectExists(key)
        body = b"".join(views)
        etag = f"{zlib.crc32(body):08x}-{size_bytes:x}"
        info = ObjectInfo(key=key, size_bytes=size_bytes, modified_ms=self._now_ms(), etag=etag)
        self._objects[key] = (info, body)
        return info

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        check_key(key)
        check_range(at, size_bytes)
        info, body = self._find(key)
        wanted = resolve_range(
            key,
            at=at,
            size_bytes=size_bytes,
            object_size_bytes=info.size_bytes,
            get_bytes_max=self._get_bytes_max,
        )
        return body[at : at + wanted]

    async def head(self, key: str) -> ObjectInfo:
        return self._find(check_key(key))[0]

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        keys = sorted(key for key in self._objects if key.startswith(prefix))
        for key in keys[bisect_right(keys, start_after) :]:
            # The caller may await between two keys, and delete some of them.
            if found := self._objects.get(key):
                yield found[0]

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        for key in keys:
            self._objects.pop(key, None)

    async def check(self) -> None:
        """Does nothing: memory is always available."""

    async def close(self) -> None:
        """Keeps the objects: a test closes and reopens the user of the store, not the store."""

    def _find(self, key: str) -> tuple[ObjectInfo, bytes]:
        try:
            return self._objects[key]
        except KeyError:
            raise ObjectMissing(key) from None
