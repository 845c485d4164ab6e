"""Byte ranges of objects through fixed-size chunks: from disk, else from Redis, else from the object store.

Owns: the downloads under way. Does not own: the caches, segments and blocks: a reader checks the bytes and drops
damaged chunks. Invariants: a missing chunk is downloaded once for all readers that wait; a cancelled reader does
not cancel the download; a download holds one of the slots until the chunk is on disk, so that memory is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from shruntime.tasks import Tasks
from shstore import ObjectStore, StoreError, StoreUnavailable

from shread.counters import Counters, download_duration_ms, tracer

# Below this a read from the page cache is quicker than a change of threads and back.
CACHE_INLINE_BYTES_MAX = 64 * 1024


class CacheDirError(OSError):
    """The cache directory cannot be used."""


class ChunkId(NamedTuple):
    object_key: str
    number: int


class Span(NamedTuple):
    """Bytes [at, at + size_bytes) of an object."""

    at: int
    size_bytes: int


class ChunkCache(Protocol):
    """Chunks on the local disk."""

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk; only the last chunk of an object is smaller."""

    @property
    def size_bytes(self) -> int: ...
    @property
    def bytes_max(self) -> int: ...
    def size_of(self, chunk: ChunkId) -> int:
        """Returns the bytes held of the chunk, 0 if absent. Counts as use."""

    def read(self, chunk: ChunkId, at: int, size_bytes: int) -> bytes | None:
        """Returns bytes from `at` in the chunk, None if the cache does not have them. Blocking."""

    async def write(self, chunk: ChunkId, content: bytes) -> None:
        """Keeps the chunk if the disk permits; never fails."""

    async def drop(self, chunk: ChunkId) -> None:
        """Forgets a chunk, e.g. a damaged one."""


class SharedCache(Protocol):
    """Chunks shared with other processes; never raises."""

    async def get(self, chunk: ChunkId) -> bytes | None: ...
    async def put(self, chunk: ChunkId, content: bytes) -> None: ...
    async def drop(self, chunk: ChunkId) -> None: ...


@dataclass(slots=True)
class _Flight:
    """A download under way: `result` is set before the chunk is on disk, `ended` once it has stopped touching any
    cache."""

    end: int
    result: asyncio.Future[bytes]
    ended: asyncio.Event


class ChunkReader:
    """Reads ranges of objects. `extent` in all calls: bytes of the object that are known to exist; downloads end
    there."""

    def __init__(
        self,
        store: ObjectStore,
        disk: ChunkCache,
        shared: SharedCache | None,
        *,
        downloads_in_flight_max: int,
        tasks: Tasks,
        counters: Counters,
    ) -> None:
        self._store = store
        self._disk = disk
        self._shared = shared
        self._chunk_bytes = disk.chunk_bytes
        self._slots = asyncio.Semaphore(downloads_in_flight_max)
        self._tasks = tasks
        self._counters = counters
        self._flights: dict[ChunkId, _Flight] = {}

    async def read(
        self,
        object_key: str,
        extent: int,
        spans: Sequence[Span],
        check: Callable[[list[bytes]], None] | None = None,
    ) -> list[bytes]:
        """Returns a bytes object per span. `check` runs on them where they are assembled, maybe in another thread.

        Raises StoreError, and any error of `check`.
        """
        loaded: dict[int, bytes] = {}
        wanted = self._ends(spans)
        while True:
            await self._load(object_key, extent, wanted, loaded)
            total = sum(span.size_bytes for span in spans)
            if total <= CACHE_INLINE_BYTES_MAX:
                pieces, wanted = self._assemble(object_key, spans, loaded, check)
            else:
                pieces, wanted = await asyncio.to_thread(self._assemble, object_key, spans, loaded, check)
            if not wanted:
                return pieces
            for number in wanted:  # gone from the disk since the look-up, or never written
                await self._disk.drop(ChunkId(object_key, number))

    def prefetch(self, object_key: str, extent: int, at: int, chunks: int) -> int:
        """Starts downloads of up to `chunks` missing chunks from byte `at` on; returns how many of the chunks lie in
        the object.

        Leaves the last download slot to readers that wait.
        """
        first = at // self._chunk_bytes
        last = min(first + chunks, -(-extent // self._chunk_bytes))
        for number in range(first, last):
            chunk = ChunkId(object_key, number)
            end = min((number + 1) * self._chunk_bytes, extent)
            held = self._disk.size_of(chunk) >= end - number * self._chunk_bytes
            if not held and chunk not in self._flights and not self._slots.locked():
                self._counters.readahead_chunks += 1
                self._start(chunk, end)
        return max(0, last - first)

    async def drop(self, object_key: str, spans: Iterable[Span]) -> None:
        """Forgets the chunks that hold these spans, in all caches, because they are damaged."""
        for number in self._ends(spans):
            self._counters.cache_damaged_chunks += 1
            chunk = ChunkId(object_key, number)
            # Waits for the very end of a download: until then, the damaged bytes may come into the caches and to
            # readers.
            if (flight := self._flights.get(chunk)) is not None:
                await flight.ended.wait()
            await self._disk.drop(chunk)
            if self._shared is not None:
                await self._shared.drop(chunk)

    def _ends(self, spans: Iterable[Span]) -> dict[int, int]:
        """Returns the end of the bytes needed from each chunk, by number."""
        ends: dict[int, int] = {}
        for at, size_bytes in spans:
            for number in range(at // self._chunk_bytes, -(-(at + size_bytes) // self._chunk_bytes)):
                end = min(at + size_bytes, (number + 1) * self._chunk_bytes)
                ends[number] = max(end, ends.get(number, 0))
        return ends

    async def _load(self, object_key: str, extent: int, wanted: dict[int, int], loaded: dict[int, bytes]) -> None:
        """Brings chunks that are not on disk into `loaded`, all downloads at once."""
        waits: dict[int, asyncio.Future[bytes]] = {}
        for number, end in wanted.items():
            chunk = ChunkId(object_key, number)
            flight = self._flights.get(chunk)
            # A download may have begun when less of the object was known to exist: it ends too early for this reader.
            if flight is not None and flight.end >= end:
                if flight.result.done():  # downloaded, only not on disk yet
                    self._counters.cache_hits += 1
                else:
                    self._counters.cache_misses += 1
                waits[number] = flight.result
            elif self._disk.size_of(chunk) >= end - number * self._chunk_bytes:
                self._counters.cache_hits += 1
            else:
                self._counters.cache_misses += 1
                waits[number] = self._start(chunk, min((number + 1) * self._chunk_bytes, max(extent, end))).result
        if waits:
            await asyncio.wait(waits.values())  # waits without cancelling them
            loaded |= {number: result.result() for number, result in waits.items()}

    def _assemble(
        self,
        object_key: str,
        spans: Sequence[Span],
        loaded: dict[int, bytes],
        check: Callable[[list[bytes]], None] | None,
    ) -> tuple[list[bytes], dict[int, int]]:
        """Returns (the pieces, {}), or ([], the chunks that are missing after all). Blocking; touches no state."""
        pieces: list[bytes] = []
        missing: dict[int, int] = {}
        for span in spans:
            parts = []
            for number, end in self._ends([span]).items():
                start = max(span.at, number * self._chunk_bytes)
                part = self._part(ChunkId(object_key, number), start, end, loaded.get(number))
                if part is None:
                    missing[number] = max(end, missing.get(number, 0))
                else:
                    parts.append(part)
            pieces.append(parts[0] if len(parts) == 1 else b"".join(parts))
        if missing:
            return [], missing
        if check is not None:
            check(pieces)
        return pieces, {}

    def _part(self, chunk: ChunkId, start: int, end: int, content: bytes | None) -> bytes | None:
        at = start - chunk.number * self._chunk_bytes
        if content is not None:
            return content[at : at + end - start]
        return self._disk.read(chunk, at, end - start)

    # ---- downloads

    def _start(self, chunk: ChunkId, end: int) -> _Flight:
        flight = _Flight(end, asyncio.get_running_loop().create_future(), asyncio.Event())
        self._flights[chunk] = flight
        task = self._tasks.spawn(f"download {chunk.object_key} {chunk.number}", self._fly(chunk, flight))
        task.add_done_callback(lambda _: self._end(chunk, flight))
        return flight

    def _end(self, chunk: ChunkId, flight: _Flight) -> None:
        """Done-callback of a download: fails the waiters if the task was cancelled, even before the first step, then
        forgets the download."""
        if not flight.result.done():
            flight.result.set_exception(StoreUnavailable("the download was cancelled: the service stops"))
        flight.result.exception()  # retrieved, as no reader may be waiting any more
        # A download that goes further may have taken its place.
        if self._flights.get(chunk) is flight:
            del self._flights[chunk]
        flight.ended.set()

    async def _fly(self, chunk: ChunkId, flight: _Flight) -> None:
        try:
            async with self._slots:  # until the chunk is on disk, so that memory is bounded
                content, shared = await self._obtain(chunk, flight.end)
                flight.result.set_result(content)
                await self._disk.write(chunk, content)
            # Without the slot: a slow Redis holds up no download.
            if self._shared is not None and not shared:
                await self._shared.put(chunk, content)
        except StoreError as error:
            flight.result.set_exception(error)

    async def _obtain(self, chunk: ChunkId, end: int) -> tuple[bytes, bool]:
        """Returns the bytes of the chunk up to `end`, and whether they come from the shared cache."""
        at = chunk.number * self._chunk_bytes
        if self._shared is not None:
            content = await self._shared.get(chunk)
            if content is not None and end - at <= len(content) <= self._chunk_bytes:
                return content, True
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        with tracer.start_as_current_span("query.download") as span:
            span.set_attributes({"object_key": chunk.object_key, "at": at, "size_bytes": end - at})
            content = await self._store.get(chunk.object_key, at=at, size_bytes=end - at)
        download_duration_ms.record((loop.time() - started_s) * 1000)
        self._counters.downloads += 1
        self._counters.download_bytes += len(content)
        return content, False
