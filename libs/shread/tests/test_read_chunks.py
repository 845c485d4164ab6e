"""Chunks on disk and their reader: the byte limit, restarts, writes side by side, exactly the bytes asked for."""

import asyncio
import os
import random
from pathlib import Path

import pytest
from shread.adapters.disk_cache import DiskCache
from shread.chunk_reader import CacheDirError, ChunkId, ChunkReader, Span
from shread.counters import Counters
from shruntime.tasks import Tasks
from shstore import LocalStore, StoreOptions, StoreUnavailable

pytestmark = pytest.mark.quick

CHUNK = 64 * 1024


def chunk_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*-*") if path.is_file())


async def test_a_smaller_limit_after_a_restart_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1 << 20, CHUNK, Counters())
    await cache.open()
    for number in range(10):
        await cache.write(ChunkId("key", number), bytes([number]) * CHUNK)
    for age, path in enumerate(sorted(chunk_files(tmp_path), key=lambda item: int(item.name.split("-")[1]))):
        os.utime(path, ns=(age, age))
    assert cache.read(ChunkId("key", 0), 0, 10) == bytes(10)  # used now
    cache.close()
    cache = DiskCache(tmp_path, 3 * CHUNK, CHUNK, Counters())
    await cache.open()
    assert [n for n in range(10) if cache.size_of(ChunkId("key", n))] == [0, 8, 9]
    assert len(chunk_files(tmp_path)) == 3
    cache.close()


async def test_two_writes_of_a_chunk_at_once_are_no_error(tmp_path: Path) -> None:
    """One reader has fetched the beginning of a chunk, another all of it."""
    counters = Counters()
    cache = DiskCache(tmp_path, 10 * CHUNK, CHUNK, counters)
    await cache.open()
    for number in range(50):
        chunk = ChunkId("object", number)
        await asyncio.gather(*(cache.write(chunk, bytes(size)) for size in (CHUNK, CHUNK // 2, CHUNK)))
    cache.close()
    assert counters.cache_write_errors == 0
    assert {path.suffix for path in chunk_files(tmp_path)} == {""}, "nothing unfinished is left"


async def test_half_written_files_are_removed_and_foreign_ones_do_not_count(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1 << 20, CHUNK, Counters())
    await cache.open()
    await cache.write(ChunkId("key", 0), b"x" * 100)
    cache.close()
    folder = chunk_files(tmp_path)[0].parent
    (folder / (chunk_files(tmp_path)[0].name + ".tmp")).write_bytes(b"half")
    cache = DiskCache(tmp_path, 1 << 20, CHUNK, Counters())
    await cache.open()
    assert cache.size_bytes == 100 and len(list(folder.iterdir())) == 1
    with pytest.raises(CacheDirError, match="in use by another"):
        await DiskCache(tmp_path, 1 << 20, CHUNK, Counters()).open()
    cache.close()
    not_a_directory = tmp_path / "file"
    not_a_directory.write_bytes(b"")
    with pytest.raises(CacheDirError, match="cannot be used"):
        await DiskCache(not_a_directory, 1 << 20, CHUNK, Counters()).open()


async def test_the_chunk_reader_gives_exactly_the_bytes_asked_for(tmp_path: Path) -> None:
    rng = random.Random(11)
    body = rng.randbytes(10 * CHUNK + 777)
    store = LocalStore(StoreOptions(kind="local", path=tmp_path / "objects"))
    await store.put("k", [body])
    counters, tasks = Counters(), Tasks()
    cache = DiskCache(tmp_path / "cache", 4 * CHUNK, CHUNK, counters)  # too small for all: evicts all the time
    await cache.open()
    reader = ChunkReader(store, cache, None, downloads_in_flight_max=2, tasks=tasks, counters=counters)

    async def read_some(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(20):
            spans = []
            for _ in range(own.randint(1, 4)):
                at = own.randrange(len(body))
                spans.append(Span(at, own.randint(1, min(3 * CHUNK, len(body) - at))))
            pieces = await reader.read("k", len(body), spans)
            assert pieces == [body[span.at : span.at + span.size_bytes] for span in spans]
            assert cache.size_bytes <= cache.bytes_max

    await asyncio.gather(*[read_some(seed) for seed in range(8)])
    await tasks.stop()
    on_disk = sum(path.stat().st_size for path in chunk_files(tmp_path / "cache"))
    assert on_disk <= cache.bytes_max
    cache.close()


async def test_a_download_that_is_cancelled_before_it_began_does_not_leave_its_reader_waiting(tmp_path: Path) -> None:
    store = LocalStore(StoreOptions(kind="local", path=tmp_path / "objects"))
    await store.put("k", [b"x" * 100])
    counters, tasks = Counters(), Tasks()
    cache = DiskCache(tmp_path / "cache", CHUNK, CHUNK, counters)
    await cache.open()
    reader = ChunkReader(store, cache, None, downloads_in_flight_max=2, tasks=tasks, counters=counters)
    reading = asyncio.create_task(reader.read("k", 100, [Span(0, 10)]))
    await asyncio.sleep(0)
    await tasks.stop()
    async with asyncio.timeout(60):
        with pytest.raises(StoreUnavailable, match="the service stops"):
            await reading
    cache.close()
