"""Entries of a cache with a limit: the least recently used go first. Bookkeeping only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class LruLimit(Generic[K]):
    """Keys with a size each (bytes, entries, ...); the sum never exceeds `size_max`."""

    def __init__(self, size_max: int) -> None:
        self.size_max = size_max
        self.size = 0
        self._sizes: OrderedDict[K, int] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[K]:
        """Yields the keys, least recently used first."""
        return iter(self._sizes)

    def size_of(self, key: K) -> int:
        """Returns the size of a key, 0 if not kept."""
        return self._sizes.get(key, 0)

    def touch(self, key: K) -> bool:
        """Marks a key as just used; returns True if kept."""
        if key not in self._sizes:
            return False
        self._sizes.move_to_end(key)
        return True

    def admit(self, key: K, size: int) -> list[K]:
        """Keeps `key` as just used, and returns the keys evicted for it. A key larger than the limit is not kept."""
        # First, or a key that is kept again would evict others for the bytes that it gives up itself.
        self.drop(key)
        # It would evict all others, and still not fit.
        if size > self.size_max:
            return [key]
        gone = []
        while self.size + size > self.size_max:
            oldest, oldest_size = self._sizes.popitem(last=False)
            self.size -= oldest_size
            gone.append(oldest)
        self._sizes[key] = size
        self.size += size
        return gone

    def drop(self, key: K) -> bool:
        """Forgets a key; returns True if kept before."""
        size = self._sizes.pop(key, None)
        self.size -= size or 0
        return size is not None
