"""Bounded scans: exactly the records of a range, from segments and tails, and no block that is too old."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from shformat import decode_batch
from shproto.errors import DataLoss, OffsetBelowStart, Unavailable, UnknownTopic
from shproto.keys import PartitionKey, RangeKey
from shread.engine import ReadEngine, build_engine
from shread.reads import Reads
from shread.scan import STEP_BYTES, ScanRange, scan
from shread.settings import ReadSettings
from shruntime.clock import SystemClock
from shstore import MemoryStore

from tests.platform.coordinator_peer import feeding
from tests.platform.read_world import World, values_of

pytestmark = pytest.mark.timeout(60)

StartReads = Callable[..., Awaitable[Reads]]
CHUNK = 64 * 1024


class CountingStore(MemoryStore):
    """`read`: bytes that were asked for, by object; `pieces`: (object, position, size) of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        found = await super().get(key, at=at, size_bytes=size_bytes)
        self.read[key] += len(found)
        return found


@pytest.fixture
async def platform() -> AsyncIterator[World]:
    world = World(CountingStore())
    async with feeding(world):
        await world.create_topic("t", 2)
        await world.start_agent("a")
        for number in range(2):
            await world.grant("a", "t", number)
        yield world


@pytest.fixture
async def start_reads(platform: World, tmp_path: Path) -> AsyncIterator[StartReads]:
    engines: list[ReadEngine] = []

    async def start(**values: Any) -> Reads:
        chosen = {"cache_dir": tmp_path / f"cache{len(engines)}", "cache_chunk_bytes": CHUNK, "readahead_chunks": 0}
        engine = build_engine(
            ReadSettings(**(chosen | values)),
            platform.coordinator,
            platform.store,
            platform.ingest_at,
            SystemClock(),
            role="query",
            agent_id="",
        )
        engines.append(engine)
        await engine.start("127.0.0.1:1")
        return engine.reads

    yield start
    for engine in engines:
        await engine.stop()
        assert engine.tasks.error is None


async def settled(platform: World, reads: Reads) -> None:
    """Returns once the index has seen every event."""
    while reads.index.cluster.position < platform.position:
        await asyncio.sleep(0)


def wanted(platform: World, first: int, end: int, oldest_ms: int | None = None, number: int = 0) -> ScanRange:
    key = PartitionKey(platform.topic_id("t"), number)
    return ScanRange(partition=key, topic="t", offset_from=first, offset_to=end, timestamp_min_ms=oldest_ms)


async def scanned(reads: Reads, range_: ScanRange, max_wait_ms: int = 5_000) -> dict[int, bytes | None]:
    """Returns the records of the range, by offset; blocks may bring more. Fails if offsets do not ascend."""
    found: dict[int, bytes | None] = {}
    last = -1
    async with aclosing(scan(reads, range_, max_wait_ms=max_wait_ms)) as runs:
        async for batches in runs:
            assert batches, "a run has a batch"
            for batch in batches:
                records = decode_batch(batch)
                for offset, value in zip(records.offsets.tolist(), records.values.to_list(), strict=True):
                    assert offset > last, "each record once, in order"
                    last = offset
                    if range_.offset_from <= offset < range_.offset_to:
                        found[offset] = value
    return found


async def test_a_range_comes_from_segments_and_then_the_tail(platform: World, start_reads: StartReads) -> None:
    values = values_of(1_000)
    for turn in range(5):
        await platform.produce(values[200 * turn : 200 * turn + 150], "t")
        await platform.produce(values[200 * turn + 150 : 200 * turn + 200], "t")
        if turn < 4:
            await platform.register("t")
    reads = await start_reads()
    for first, end in [(0, 1_000), (0, 1), (999, 1_000), (150, 850), (799, 801), (640, 641), (5, 5), (9, 3)]:
        expected = {offset: values[offset] for offset in range(first, end)}
        assert await scanned(reads, wanted(platform, first, end)) == expected, (first, end)


async def test_the_end_is_the_snapshots_while_a_producer_goes_on(platform: World, start_reads: StartReads) -> None:
    values = values_of(400)
    for turn in range(2):
        await platform.produce(values[50 * turn : 50 * turn + 50], "t")
        await platform.register("t")
    await platform.produce(values[100:120], "t")
    reads = await start_reads()
    found: dict[int, bytes | None] = {}
    async with aclosing(scan(reads, wanted(platform, 0, 120), max_wait_ms=5_000)) as runs:
        async for batches in runs:
            base = 120 + 20 * len(found)
            await platform.produce(values_of(20, base), "t")
            await platform.register("t")
            await settled(platform, reads)
            for batch in batches:
                records = decode_batch(batch)
                found |= dict(zip(records.offsets.tolist(), records.values.to_list(), strict=True))
    assert {offset: value for offset, value in found.items() if offset < 120} == dict(enumerate(values[:120]))


async def test_ranges_of_epochs_may_have_gaps_between_them(platform: World, start_reads: StartReads) -> None:
    first = values_of(30)
    await platform.produce(first, "t")
    await platform.register("t")
    await platform.produce(values_of(10, 30), "t")
    await platform.orphan("t")
    await platform.settle("t")
    await platform.start_agent("b")
    await platform.grant("b", "t", start=1_000)
    later = values_of(20, 1_000)
    await platform.produce(later, "t")
    await platform.register("t", epoch=1)
    reads = await start_reads()
    expected = dict(enumerate(values_of(40))) | {1_000 + i: value for i, value in enumerate(later)}
    assert await scanned(reads, wanted(platform, 0, 1_020)) == expected
    assert await scanned(reads, wanted(platform, 39, 1_001)) == {39: expected[39], 1_000: expected[1_000]}
    assert await scanned(reads, wanted(platform, 50, 900)) == {}


async def test_an_unsettled_end_is_waited_for(platform: World, start_reads: StartReads) -> None:
    await platform.produce(values_of(10), "t")
    await platform.register("t")
    await platform.orphan("t")
    await platform.start_agent("b")
    await platform.grant("b", "t", start=1_000)
    await platform.produce(values_of(5, 1_000), "t")
    reads = await start_reads()
    with pytest.raises(Unavailable, match="t/0: offset 10 cannot be read now"):
        await scanned(reads, wanted(platform, 0, 1_005), max_wait_ms=20)
    task = asyncio.create_task(scanned(reads, wanted(platform, 0, 1_005), max_wait_ms=30_000))
    await asyncio.sleep(0.02)
    await platform.settle("t", epoch=1)
    assert len(await task) == 15


# ---- what is too old


async def blocks_of_a_second(platform: World, segments: int, blocks: int) -> None:
    """Produces segments of blocks of some chunks each, every block a second younger than the one before."""
    for segment in range(segments):
        for block in range(blocks):
            second = segment * blocks + block
            start = second * 100
            values = [random.Random(start + i).randbytes(4_000) for i in range(100)]
            await platform.produce(values, "t", timestamps_ms=[1_000 * second + i for i in range(100)])
        await platform.register("t", block_bytes_target=1)


async def test_segments_and_blocks_that_are_too_old_are_not_read(platform: World, start_reads: StartReads) -> None:
    await blocks_of_a_second(platform, segments=3, blocks=8)
    keys = [segment.object_key for segment in platform.of_partition(platform.topic_id("t"), 0)]
    reads = await start_reads()
    store = platform.store
    size = {key: (await store.head(key)).size_bytes for key in keys}
    store.read.clear()
    found = await scanned(reads, wanted(platform, 0, 2_400, oldest_ms=22_000))
    assert set(range(2_200, 2_400)) <= found.keys() and min(found) >= 2_100
    assert store.read[keys[0]] == store.read[keys[1]] == 0
    assert 0 < store.read[keys[2]] < size[keys[2]] * 0.6, "two of eight blocks, and the index"
    store.read.clear()
    everything = await scanned(await start_reads(), wanted(platform, 0, 2_400))
    assert len(everything) == 2_400 and all(store.read[key] >= size[key] * 0.9 for key in keys)


async def test_batches_of_the_tail_that_are_too_old_are_left_out(platform: World, start_reads: StartReads) -> None:
    for second in range(5):
        await platform.produce(values_of(10, 10 * second), "t", timestamps_ms=1_000 * second)
    reads = await start_reads()
    assert min(await scanned(reads, wanted(platform, 0, 50, oldest_ms=3_000))) == 30
    assert await scanned(reads, wanted(platform, 0, 50, oldest_ms=10_000)) == {}


@pytest.mark.parametrize("seed", range(6))
async def test_no_record_that_is_young_enough_is_left_out(platform: World, start_reads: StartReads, seed: int) -> None:
    """Timestamps do not ascend; segments have blocks of a batch, and the last batches are in the tail."""
    rng = random.Random(seed)
    values, times = values_of(30), [rng.randint(-5, 20) for _ in range(30)]
    for at in range(0, 30, 3):
        await platform.produce(values[at : at + 3], "t", timestamps_ms=times[at : at + 3])
        if at in (9, 18):
            await platform.register("t", block_bytes_target=1)
    reads = await start_reads()
    for _ in range(20):
        first, oldest = rng.randint(0, 30), rng.choice([None, *range(-6, 22)])
        end = rng.randint(first, 30)
        found = await scanned(reads, wanted(platform, first, end, oldest))
        due = {i for i in range(first, end) if oldest is None or times[i] >= oldest}
        assert due <= found.keys(), (first, end, oldest)
        assert all(found[i] == values[i] for i in found)


# ---- what happens meanwhile


async def test_a_compaction_in_the_middle_changes_nothing(platform: World, start_reads: StartReads) -> None:
    """The scan has read the first of three segments when one takes the place of all, and their objects are gone."""
    values = values_of(300)
    segments = []
    for turn in range(3):
        await platform.produce(values[100 * turn : 100 * turn + 100], "t")
        segments.append(await platform.register("t"))
    row = platform._range("t", 0)
    batches = platform.agents["a"].batches[_range_key(row)]
    reads = await start_reads()
    found: dict[int, bytes | None] = {}
    async with aclosing(scan(reads, wanted(platform, 0, 300), max_wait_ms=5_000)) as runs:
        async for run in runs:
            for batch in run:
                records = decode_batch(batch)
                found |= dict(zip(records.offsets.tolist(), records.values.to_list(), strict=True))
            if len(found) == 100:
                merged = await platform.store_segment("t", 0, row.epoch, batches)
                await platform.compact(merged, segments)
                for segment in segments:
                    await platform.store.delete([segment.object_key])
                await settled(platform, reads)
    assert found == dict(enumerate(values))


async def test_objects_that_a_compaction_deleted_before_the_index_heard_of_it(
    platform: World, start_reads: StartReads
) -> None:
    values = values_of(200)
    segments = []
    for turn in range(2):
        await platform.produce(values[100 * turn : 100 * turn + 100], "t")
        segments.append(await platform.register("t"))
    row = platform._range("t", 0)
    batches = platform.agents["a"].batches[_range_key(row)]
    reads = await start_reads()
    platform.coordinator.feed_paused = True
    merged = await platform.store_segment("t", 0, row.epoch, batches)
    await platform.compact(merged, segments)
    for segment in segments:
        await platform.store.delete([segment.object_key])
    task = asyncio.create_task(scanned(reads, wanted(platform, 0, 200), max_wait_ms=30_000))
    await asyncio.sleep(0.02)
    platform.coordinator.feed_paused = False
    platform.coordinator.wake()
    assert await task == dict(enumerate(values))


async def test_what_retention_removed_is_an_error(platform: World, start_reads: StartReads) -> None:
    values = values_of(200)
    for turn in range(2):
        await platform.produce(values[100 * turn : 100 * turn + 100], "t")
        await platform.register("t")
    reads = await start_reads()
    await platform.retain_from(100, "t")
    await settled(platform, reads)
    with pytest.raises(OffsetBelowStart):
        await scanned(reads, wanted(platform, 0, 200))
    assert await scanned(reads, wanted(platform, 100, 200)) == {100 + i: value for i, value in enumerate(values[100:])}


async def test_a_lost_range_is_an_error_with_its_place(platform: World, start_reads: StartReads) -> None:
    await platform.produce(values_of(100), "t")
    await platform.register("t")
    await platform.lose_span(150, "a disk", "t")
    reads = await start_reads()
    with pytest.raises(DataLoss, match="t/0") as error:
        await scanned(reads, wanted(platform, 0, 150))
    assert "100" in str(error.value) and "150" in str(error.value)
    assert len(await scanned(reads, wanted(platform, 0, 100))) == 100


async def test_a_damaged_block_is_an_error_with_its_place(platform: World, start_reads: StartReads) -> None:
    await platform.produce(values_of(100), "t")
    segment = await platform.register("t")
    body = bytearray(await platform.store.get(segment.object_key))
    body[len(body) // 3] ^= 0x40
    await platform.store.put(segment.object_key, [bytes(body)], if_absent=False)
    reads = await start_reads()
    with pytest.raises(DataLoss, match="t/0"):
        await scanned(reads, wanted(platform, 0, 100))


async def test_a_missing_object_is_an_error_with_its_place(platform: World, start_reads: StartReads) -> None:
    await platform.produce(values_of(100), "t")
    segment = await platform.register("t")
    await platform.store.delete([segment.object_key])
    reads = await start_reads(catch_up_ms=100)
    with pytest.raises(DataLoss, match="t/0"):
        await scanned(reads, wanted(platform, 0, 100), max_wait_ms=50)


async def test_a_topic_that_was_deleted_is_unknown(platform: World, start_reads: StartReads) -> None:
    await platform.produce(values_of(10), "t")
    reads = await start_reads()
    range_ = wanted(platform, 0, 10)
    await platform.delete_topic("t")
    await settled(platform, reads)
    with pytest.raises(UnknownTopic):
        await scanned(reads, range_)


async def test_an_end_that_does_not_come_is_unavailable(platform: World, start_reads: StartReads) -> None:
    """As of a snapshot from a leader that has lost its tail since."""
    await platform.produce(values_of(10), "t")
    reads = await start_reads()
    with pytest.raises(Unavailable, match="t/0: offset 10 cannot be read now"):
        await scanned(reads, wanted(platform, 0, 11), max_wait_ms=20)


async def test_a_run_is_bounded(platform: World, start_reads: StartReads) -> None:
    values = [bytes([65 + i % 26]) * (1 << 20) for i in range(30)]
    for at in range(0, 30, 3):
        await platform.produce(values[at : at + 3], "t")
        if at == 15:
            await platform.register("t")
    reads = await start_reads()
    runs = []
    async with aclosing(scan(reads, wanted(platform, 0, 30), max_wait_ms=5_000)) as found:
        async for batches in found:
            runs.append(sum(decode_batch(batch).values.data.nbytes for batch in batches))
    assert sum(runs) == 30 << 20 and max(runs) <= STEP_BYTES + (3 << 20) and len(runs) >= 4


def _range_key(row: Any) -> RangeKey:
    return RangeKey(bytes.fromhex(row.topic_id), row.partition, row.epoch)
