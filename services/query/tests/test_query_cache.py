"""Chunks: one download per miss, the disk limit over restarts, damage in the cache and in the store, full disks."""

import asyncio
import errno
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from shformat import decode_batch
from shproto.errors import DataLoss, Unavailable
from shproto.model import Segment
from shproto.v1 import query_pb2
from shread.chunk_reader import ChunkId
from shread.segment_reader import BlockRun, SegmentReader
from shstore import Fault, FaultKind, FaultyStore, ScriptedFaults
from streamhouse_query.wiring import QueryService

from services.query.tests.start_query import StartQuery
from services.query.tests.test_query_fetch import fetch, one_partition, read_all, settle_in
from tests.platform.read_world import World, values_of
from tests.platform.virtual_time import virtual_time

CHUNK = 64 * 1024


async def segment_of(platform: World, count: int, start: int = 0, *, block_bytes_target: int = 16 * 1024) -> Segment:
    for at in range(start, start + count, 500):
        await platform.produce(values_of(min(500, start + count - at), at, 32))
    return await platform.register(block_bytes_target=block_bytes_target)


def chunk_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*-*") if path.is_file())


async def written(service: QueryService) -> None:
    """Until everything downloaded is on disk."""
    while service.tasks._tasks and any("download" in task.get_name() for task in service.tasks._tasks):
        await asyncio.sleep(0.001)


async def test_cold_then_cached_then_after_a_restart(platform: World, start_query: StartQuery, tmp_path: Path) -> None:
    await one_partition(platform)
    segment = await segment_of(platform, 20_000)
    assert segment.size_bytes > 3 * CHUNK
    service = await start_query()
    assert await read_all(service) == dict(enumerate(values_of(20_000, 0, 32)))
    await written(service)
    described = await service.api.describe_query(query_pb2.DescribeQueryRequest())
    assert described.downloads == -(-segment.size_bytes // CHUNK)
    assert described.download_bytes == described.cache_bytes == segment.size_bytes
    await read_all(service)
    assert service.api._counters.downloads == described.downloads
    await service.stop()

    again = await start_query()
    assert await read_all(again) == dict(enumerate(values_of(20_000, 0, 32)))
    assert again.api._counters.downloads == 0
    assert again.api._counters.cache_misses == 0 < again.api._counters.cache_hits


async def test_fifty_readers_of_a_slow_store_cost_one_download(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await segment_of(platform, 1_000)
    slow = FaultyStore(platform.store, ScriptedFaults([Fault(FaultKind.LATENCY, 150)] * 100))
    service = await start_query(store=slow)
    with virtual_time():
        readers = [asyncio.create_task(fetch(service, n * 20, max_bytes=1 << 20)) for n in range(50)]
        await asyncio.sleep(0.02)
        for reader in readers[:20]:
            reader.cancel()  # including the one that started the download
        results = await asyncio.gather(*readers, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results[:20])
    assert all(isinstance(result, query_pb2.FetchResponse) and result.batches for result in results[20:])
    assert service.api._counters.downloads == 1


async def test_a_reader_that_goes_on_has_the_next_chunks_fetched_ahead(
    platform: World, start_query: StartQuery
) -> None:
    await one_partition(platform)
    first = await segment_of(platform, 20_000)
    second = await segment_of(platform, 20_000, 20_000)
    service = await start_query(readahead_chunks=8)
    offset = 0
    while offset < first.end_offset:
        offset = (await fetch(service, offset, max_bytes=CHUNK)).next_offset
    await written(service)
    counters = service.api._counters
    assert counters.readahead_chunks > 0
    before = counters.downloads
    total = -(-first.size_bytes // CHUNK) - (-second.size_bytes // CHUNK)
    await fetch(service, second.base_offset, max_bytes=CHUNK)
    assert counters.downloads <= total, "nothing is fetched twice"
    assert before > -(-first.size_bytes // CHUNK), "into the next segment, too"
    jumper = await start_query(cache_dir=service.api._cache._directory.parent / "other", readahead_chunks=8)  # type: ignore[attr-defined]
    await fetch(jumper, 10_000, max_bytes=1)
    assert jumper.api._counters.readahead_chunks == 0


async def test_the_byte_limit_holds_over_restarts(platform: World, start_query: StartQuery, tmp_path: Path) -> None:
    await one_partition(platform)
    for turn in range(4):
        await segment_of(platform, 20_000, turn * 20_000)
    limit = 1 << 20
    expected = dict(enumerate(values_of(80_000, 0, 32)))
    for _ in range(2):
        service = await start_query(cache_bytes_max=limit)
        assert await read_all(service) == expected
        await written(service)
        on_disk = sum(path.stat().st_size for path in chunk_files(tmp_path / "cache"))
        assert limit - CHUNK < on_disk == service.api._cache.size_bytes <= limit
        await service.stop()
    smaller = await start_query(cache_bytes_max=limit, cache_chunk_bytes=2 * CHUNK)
    assert smaller.api._cache.size_bytes == 0, "chunks of another size are of no use"
    await smaller.stop()
    assert not chunk_files(tmp_path / "cache")


async def test_damage_in_the_cache_is_dropped_and_fetched_again(
    platform: World, start_query: StartQuery, tmp_path: Path
) -> None:
    await one_partition(platform)
    await segment_of(platform, 20_000)
    expected = dict(enumerate(values_of(20_000, 0, 32)))
    service = await start_query()
    await read_all(service)
    await written(service)
    rng = random.Random(5)
    for path in chunk_files(tmp_path / "cache"):
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 0x40
        path.write_bytes(content)
    assert await read_all(service) == expected
    assert service.api._counters.cache_damaged_chunks > 0 == service.api._counters.damaged_spans
    await written(service)
    for path in chunk_files(tmp_path / "cache"):
        path.write_bytes(path.read_bytes()[:100])  # cut short
    assert await read_all(service) == expected
    await written(service)
    for path in chunk_files(tmp_path / "cache"):
        path.unlink()
    assert await read_all(service) == expected


async def test_damage_in_the_cache_is_found_when_the_segment_is_opened(
    platform: World, start_query: StartQuery, tmp_path: Path
) -> None:
    await one_partition(platform)
    await segment_of(platform, 20_000)
    service = await start_query()
    await read_all(service)
    await written(service)
    await service.stop()
    for path in chunk_files(tmp_path / "cache"):
        path.write_bytes(bytes(path.stat().st_size))
    again = await start_query()
    assert await read_all(again) == dict(enumerate(values_of(20_000, 0, 32)))


async def test_a_download_that_came_damaged_is_done_again(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it is still on its way to the disk, where the one that looks again could find it."""
    await one_partition(platform)
    await segment_of(platform, 1_000)
    service = await start_query(store=_DamagedOnce(platform.store))
    write = service.engine.disk.write

    async def write_slowly(chunk: ChunkId, content: bytes) -> None:
        await asyncio.sleep(0.05)
        await write(chunk, content)

    monkeypatch.setattr(service.engine.disk, "write", write_slowly)
    assert await read_all(service) == dict(enumerate(values_of(1_000, 0, 32)))
    await written(service)
    assert service.api._counters.cache_damaged_chunks > 0 == service.api._counters.damaged_spans
    downloads = service.api._counters.downloads
    await read_all(service)
    assert service.api._counters.downloads == downloads, "the good one is kept"


class _DamagedOnce:
    """A store whose first answer to each question has a flipped bit."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._asked: set[tuple[str, int]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        content = bytearray(await self._store.get(key, at=at, size_bytes=size_bytes))
        if (key, at) not in self._asked:
            self._asked.add((key, at))
            content[100] ^= 0x40
        return bytes(content)


@pytest.mark.parametrize("where", ["first block", "a later block", "index", "footer", "header"])
async def test_damage_in_the_store_is_data_loss_with_its_place(
    platform: World, start_query: StartQuery, where: str
) -> None:
    await one_partition(platform)
    await segment_of(platform, 1_000, block_bytes_target=4096)
    segment = await segment_of(platform, 5_000, 1_000, block_bytes_target=4096)
    store: Any = platform.store
    info, body = store._objects[segment.object_key]
    at = {"first block": 100, "a later block": 60_000, "index": len(body) - 100, "footer": len(body) - 20, "header": 9}
    damaged = bytearray(body)
    damaged[at[where]] ^= 0x01
    store._objects[segment.object_key] = (info, bytes(damaged))
    service = await start_query()
    offset = 0
    with pytest.raises(DataLoss) as error:
        while offset < 6_000:
            response = await fetch(service, offset)
            assert response.next_offset > offset
            offset = response.next_offset
    details = error.value.details
    assert (details["topic"], details["partition"]) == ("orders", "0")
    assert details["object_key"] == segment.object_key
    assert int(details["base_offset"]) <= offset < int(details["end_offset"])
    assert int(details["at"]) in range(len(body))
    if where == "a later block":
        assert offset > 1_000, "what is intact before it is served"
        after = int(details["next_offset"])
        assert after == int(details["end_offset"]) < 6_000
        assert decode_batch((await fetch(service, after)).batches[0]).offsets[0] == after
    else:
        assert offset == 1_000
    assert service.api._counters.damaged_spans > 0


async def test_a_truncated_object_is_data_loss(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    segment = await segment_of(platform, 1_000)
    store: Any = platform.store
    info, body = store._objects[segment.object_key]
    store._objects[segment.object_key] = (info, body[:-50])
    service = await start_query()
    with pytest.raises(DataLoss, match="bytes") as error:
        await fetch(service, 0)
    assert error.value.details["object_key"] == segment.object_key


async def test_an_object_of_another_segment_is_data_loss(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    first = await segment_of(platform, 1_000)
    second = await segment_of(platform, 1_000, 1_000)
    store: Any = platform.store
    store._objects[second.object_key] = store._objects[first.object_key]
    service = await start_query()
    with pytest.raises(DataLoss):
        await read_all(service)


async def test_a_missing_object_is_data_loss_naming_it(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    segment = await segment_of(platform, 100)
    await segment_of(platform, 100, 100)
    await platform.store.delete([segment.object_key])
    service = await start_query(catch_up_ms=10_000)
    with pytest.raises(DataLoss, match="not in the object store") as error:
        await fetch(service, 0)
    details = error.value.details
    assert details["object_key"] == segment.object_key and details["next_offset"] == "100"
    assert (await fetch(service, 100)).batches


async def test_an_object_compacted_away_under_a_reader_is_read_where_it_is_now(
    platform: World, start_query: StartQuery
) -> None:
    await one_partition(platform)
    small = [await segment_of(platform, 500, turn * 500) for turn in range(4)]
    service = await start_query()
    batches = platform.agents["a"].batches[platform.topic_id(), 0, 1]
    merged = await platform.store_segment("orders", 0, 1, batches)
    platform.coordinator.feed_paused = True
    await platform.compact(merged, small)
    await platform.store.delete([item.object_key for item in small])
    task = asyncio.create_task(fetch(service, 700))
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    platform.coordinator.feed_paused = False
    platform.coordinator.wake()
    response = await task
    assert response.next_offset == 2_000
    assert await read_all(service) == dict(enumerate(values_of(2_000, 0, 32)))
    assert service.api._index.cluster.segment_count == 1


@pytest.mark.parametrize("cut_off", [False, True])
async def test_a_missing_object_is_no_data_loss_while_the_index_may_be_behind(
    platform: World, start_query: StartQuery, cut_off: bool
) -> None:
    """Compacted away and deleted long ago, as the sweep does minutes later, and the feed has not told of it: a reader
    that skips losses would skip records that are there."""
    await one_partition(platform)
    small = [await segment_of(platform, 500, turn * 500) for turn in range(4)]
    service = await start_query(catch_up_ms=50)
    merged = await platform.store_segment("orders", 0, 1, platform.agents["a"].batches[platform.topic_id(), 0, 1])
    platform.coordinator.feed_paused = True
    await platform.compact(merged, small)
    await platform.store.delete([item.object_key for item in small])
    platform.coordinator.down = cut_off
    platform.coordinator.wake()
    with pytest.raises(Unavailable, match="behind"):
        await fetch(service, 700)
    platform.coordinator.down = platform.coordinator.feed_paused = False
    platform.coordinator.wake()
    await settle_in(platform, service)
    assert await read_all(service) == dict(enumerate(values_of(2_000, 0, 32)))
    assert service.api._counters.damaged_spans == 0


async def test_a_compaction_in_the_middle_of_a_fetch_repeats_nothing(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the fault tests: the merged segment's block began before the second step's offset."""
    await one_partition(platform)
    small = [await segment_of(platform, 500, turn * 500, block_bytes_target=1 << 20) for turn in range(2)]
    service = await start_query()
    batches = platform.agents["a"].batches[platform.topic_id(), 0, 1]
    merged = await platform.store_segment("orders", 0, 1, batches)
    read_from = SegmentReader.read_from

    async def read_and_compact(*args: Any, **kwargs: Any) -> BlockRun:
        run = await read_from(*args, **kwargs)
        if run.next_offset == 500:
            await platform.compact(merged, small)
            await settle_in(platform, service)
        return run

    monkeypatch.setattr(SegmentReader, "read_from", read_and_compact)
    response = await fetch(service, 0)
    assert (len(response.batches), response.next_offset) == (1, 500)
    assert await read_all(service) == dict(enumerate(values_of(1_000, 0, 32)))


async def test_an_object_removed_by_retention_under_a_reader(platform: World, start_query: StartQuery) -> None:
    from shproto.errors import OffsetBelowStart

    await one_partition(platform)
    old = await segment_of(platform, 500)
    await segment_of(platform, 500, 500)
    service = await start_query()
    platform.coordinator.feed_paused = True
    await platform.retain_from(500)
    await platform.store.delete([old.object_key])
    task = asyncio.create_task(fetch(service, 0))
    await asyncio.sleep(0.02)
    platform.coordinator.feed_paused = False
    platform.coordinator.wake()
    with pytest.raises(OffsetBelowStart):
        await task


@pytest.mark.parametrize("kind", [FaultKind.UNAVAILABLE, FaultKind.TRUNCATED_BODY, FaultKind.THROTTLED])
async def test_failed_downloads_are_retriable_and_never_cached(
    platform: World, start_query: StartQuery, kind: FaultKind
) -> None:
    await one_partition(platform)
    await segment_of(platform, 1_000)
    faulty = FaultyStore(platform.store, ScriptedFaults([kind]))
    service = await start_query(store=faulty)
    waiting = await fetch(service, 0)
    assert (waiting.next_offset, list(waiting.batches)) == (0, [])
    assert "cannot be read now" in waiting.waiting_reason
    assert await read_all(service) == dict(enumerate(values_of(1_000, 0, 32)))
    assert faulty.injected


async def test_a_store_that_is_down_stops_only_what_is_not_cached(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await segment_of(platform, 1_000)
    second = await segment_of(platform, 1_000, 1_000)
    faulty = FaultyStore(platform.store)
    service = await start_query(store=faulty)
    await fetch(service, 0, max_bytes=1)
    await written(service)
    faulty.down = True
    first = await fetch(service, 0)
    assert first.next_offset == second.base_offset, "what was got before the failure is given"
    waiting = await fetch(service, second.base_offset)
    assert second.object_key in waiting.waiting_reason
    assert "cannot be read now" in waiting.waiting_reason
    asked = asyncio.create_task(fetch(service, second.base_offset, max_wait_ms=30_000))
    await asyncio.sleep(0)
    faulty.down = False
    assert (await asked).next_offset == 2_000, "a long poll goes on once the store is back"


async def test_a_full_disk_only_costs_the_caching(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await one_partition(platform)
    await segment_of(platform, 20_000)
    service = await start_query()

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    expected = dict(enumerate(values_of(20_000, 0, 32)))
    assert await read_all(service) == expected
    await written(service)
    assert service.api._counters.cache_write_errors > 0
    assert service.api._cache.size_bytes == 0 and not chunk_files(tmp_path / "cache")
    monkeypatch.undo()
    assert await read_all(service) == expected
    await written(service)
    assert service.api._cache.size_bytes > 0


async def test_a_cache_that_is_deleted_under_a_running_service_is_filled_again(
    platform: World, start_query: StartQuery, tmp_path: Path
) -> None:
    await one_partition(platform)
    await segment_of(platform, 20_000)
    service = await start_query()
    expected = await read_all(service)
    await written(service)
    shutil.rmtree(tmp_path / "cache")
    for _ in range(2):
        assert await read_all(service) == expected
        await written(service)
    assert service.api._counters.downloads == 2 * len(chunk_files(tmp_path / "cache"))


async def test_many_segments_of_one_object_share_its_chunks(platform: World, start_query: StartQuery) -> None:
    """Small segments of many partitions lie in one object: one download brings them all."""
    topic_id = await platform.create_topic("orders", 4)
    await platform.start_agent("a")
    parts: list[bytes] = []
    segments: list[Segment] = []
    for number in range(4):
        await platform.grant("a", number=number)
        await platform.produce(values_of(100, number * 100), number=number)
        segment = await platform.store_segment("orders", number, 1, platform.agents["a"].batches[topic_id, number, 1])
        body = await platform.store.get(segment.object_key)
        mixed = {"object_key": "mixed/1", "object_at": sum(map(len, parts))}
        segments.append(Segment(**{name: getattr(segment, name) for name in Segment.__slots__} | mixed))
        parts.append(body)
    await platform.store.put("mixed/1", parts)
    for segment in segments:
        await platform.register_segment(segment)
    service = await start_query()
    for number in range(4):
        found = await read_all(service, partition=number)
        assert found == dict(enumerate(values_of(100, number * 100)))
    assert service.api._counters.downloads == 1
