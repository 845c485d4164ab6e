"""A chunk cache in memory, instead of on disk. It survives a crash, maybe damaged: nothing in it is ever fsynced."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

from shread.chunk_reader import ChunkId
from shread.core.lru import LruLimit
from shread.counters import Counters


class SimChunkCache:
    """shread.adapters.disk_cache.DiskCache without a disk. `disks`: content by directory; each simulation clears it."""

    disks: ClassVar[dict[str, dict[ChunkId, bytes]]] = {}

    def __init__(self, directory: Path, bytes_max: int, chunk_bytes: int, counters: Counters) -> None:
        self._chunks = self.disks.setdefault(str(directory), {})
        self._limit: LruLimit[ChunkId] = LruLimit(bytes_max)
        self.chunk_bytes = chunk_bytes

    @property
    def size_bytes(self) -> int:
        return self._limit.size

    @property
    def bytes_max(self) -> int:
        return self._limit.size_max

    async def open(self) -> None:
        for chunk, content in self._chunks.items():
            self._forget(self._limit.admit(chunk, len(content)))

    def close(self) -> None:
        """Nothing is held open."""

    def size_of(self, chunk: ChunkId) -> int:
        self._limit.touch(chunk)
        return self._limit.size_of(chunk)

    def read(self, chunk: ChunkId, at: int, size_bytes: int) -> bytes | None:
        found = self._chunks.get(chunk, b"")[at : at + size_bytes]
        return found if len(found) == size_bytes else None

    async def write(self, chunk: ChunkId, content: bytes) -> None:
        self._forget(self._limit.admit(chunk, len(content)))
        if chunk in self._limit:
            self._chunks[chunk] = content

    async def drop(self, chunk: ChunkId) -> None:
        self._limit.drop(chunk)
        self._chunks.pop(chunk, None)

    def _forget(self, chunks: list[ChunkId]) -> None:
        for chunk in chunks:
            self._chunks.pop(chunk, None)


def lose_power(directory: str, rng: random.Random) -> None:
    """Some chunks are gone, some are cut short, some hold zeros."""
    chunks = SimChunkCache.disks.get(directory, {})
    for chunk in list(chunks):
        match rng.randrange(6):
            case 0:
                del chunks[chunk]
            case 1:
                chunks[chunk] = chunks[chunk][: rng.randrange(len(chunks[chunk]) + 1)]
            case 2:
                chunks[chunk] = bytes(len(chunks[chunk]))
