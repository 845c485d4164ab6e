"""Offsets by position and by timestamp, over segments, tails and takeovers."""

import random

import pytest
from shproto.errors import InvalidArgument, Unavailable, UnknownTopic
from shproto.v1 import query_pb2
from streamhouse_query.wiring import QueryService

from services.query.tests.start_query import StartQuery
from services.query.tests.test_query_fetch import one_partition, settle_in
from tests.platform.read_world import RANGE_WIDTH, World, values_of
from tests.platform.virtual_time import virtual_time


async def look_up(service: QueryService, spec: int, timestamp_ms: int = 0) -> tuple[int, int]:
    lookup = query_pb2.OffsetLookup(topic="orders", spec=spec, timestamp_ms=timestamp_ms)  # type: ignore[arg-type]
    response = await service.api.lookup_offsets(query_pb2.LookupOffsetsRequest(lookups=[lookup]))
    (found,) = response.offsets
    assert (found.topic, found.partition) == ("orders", 0)
    return found.offset, found.timestamp_ms


async def earliest(service: QueryService) -> int:
    return (await look_up(service, query_pb2.OFFSET_SPEC_EARLIEST))[0]


async def latest(service: QueryService) -> int:
    return (await look_up(service, query_pb2.OFFSET_SPEC_LATEST))[0]


async def at(service: QueryService, timestamp_ms: int) -> tuple[int, int]:
    return await look_up(service, query_pb2.OFFSET_SPEC_TIMESTAMP, timestamp_ms)


async def test_earliest_and_latest(platform: World, start_query: StartQuery) -> None:
    await platform.create_topic()
    service = await start_query()
    assert (await earliest(service), await latest(service)) == (0, 0)
    await platform.start_agent("a")
    await platform.grant("a")
    await settle_in(platform, service)
    assert await latest(service) == 0
    await platform.produce(values_of(10))
    assert await latest(service) == 10
    await platform.register()
    await platform.produce(values_of(5, 10))
    await platform.register()
    await platform.retain_from(10)
    await platform.produce(values_of(5, 15))
    await settle_in(platform, service)
    assert (await earliest(service), await latest(service)) == (10, 20)
    platform.agents["a"].down = True
    with pytest.raises(Unavailable, match="agent a"):
        await latest(service)
    platform.agents["a"].down = False
    await platform.stop_agent("a")
    await platform.orphan()
    await settle_in(platform, service)
    with pytest.raises(Unavailable, match="unsettled"):
        await latest(service)
    await platform.settle()
    await settle_in(platform, service)
    assert await latest(service) == 20


async def last(service: QueryService, count: int) -> int:
    lookup = query_pb2.OffsetLookup(topic="orders", spec=query_pb2.OFFSET_SPEC_LAST_RECORDS, record_count=count)
    response = await service.api.lookup_offsets(query_pb2.LookupOffsetsRequest(lookups=[lookup]))
    return response.offsets[0].offset


async def test_the_last_records_are_counted_across_epochs_segments_and_the_tail(
    platform: World, start_query: StartQuery
) -> None:
    """Offsets between epochs hold no records: a distance of offsets would find nothing but the newest epoch."""
    await one_partition(platform)
    service = await start_query()
    assert await last(service, 3) == 0
    await platform.produce(values_of(4))
    await platform.register()
    await platform.produce(values_of(4, 4))
    await platform.register()
    await settle_in(platform, service)
    assert [await last(service, count) for count in (1, 3, 4, 5, 8, 9)] == [7, 5, 4, 3, 0, 0]
    await platform.stop_agent("a")
    await platform.orphan()
    await platform.start_agent("b")
    await platform.grant("b")
    await platform.settle(epoch=1)
    await platform.produce(values_of(2, 8))
    await platform.register()
    await platform.produce(values_of(3, 10))
    await settle_in(platform, service)
    start = await latest(service) - 5
    assert start >= RANGE_WIDTH
    wanted = [start + 4, start + 2, start + 1, start, 7, 6, 3, 0, 0]
    assert [await last(service, count) for count in (1, 3, 4, 5, 6, 7, 10, 13, 2**63 - 1)] == wanted
    await platform.retain_from(4)
    await settle_in(platform, service)
    assert [await last(service, count) for count in (8, 9, 10)] == [5, 4, 4]
    for count in (0, -1):
        with pytest.raises(InvalidArgument, match="record_count"):
            await last(service, count)


async def test_latest_of_a_leader_that_has_not_taken_over_yet(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    agent = platform.agents["a"]
    starts, agent.starts = agent.starts, {}
    service = await start_query()
    with virtual_time(), pytest.raises(Unavailable, match="does not hold"):
        await latest(service)
    agent.starts = starts
    assert await latest(service) == 0


async def test_by_timestamp_agrees_with_a_scan(platform: World, start_query: StartQuery) -> None:
    """Timestamps that go up and down, over blocks, segments and the tail: the first in offset order counts."""
    await one_partition(platform)
    rng = random.Random(3)
    times: list[int] = []
    for turn in range(12):
        batch = [turn * 100 + rng.randint(-150, 150) for _ in range(50)]
        await platform.produce(values_of(50, len(times)), timestamps_ms=batch)
        times += batch
        if turn % 3 == 2 and turn < 9:
            await platform.register(block_bytes_target=1_000)
    service = await start_query()
    for timestamp_ms in (-1_000_000, *range(-200, 1_400, 37), min(times), max(times), max(times) + 1, 1 << 62):
        expected = next(((n, ms) for n, ms in enumerate(times) if ms >= timestamp_ms), (600, -1))
        assert await at(service, timestamp_ms) == expected, timestamp_ms


async def test_by_timestamp_starts_at_the_log_start(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    for turn in range(3):
        await platform.produce(values_of(10), timestamps_ms=[turn * 10 + n for n in range(10)])
        await platform.register()
    await platform.retain_from(15)  # in the middle of a segment
    service = await start_query()
    assert await at(service, 0) == (15, 15)
    assert await at(service, 22) == (22, 22)
    await platform.settle()
    await settle_in(platform, service)
    assert await at(service, 99) == (30, -1)


async def test_by_timestamp_does_not_pass_over_what_cannot_be_searched(
    platform: World, start_query: StartQuery
) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10), timestamps_ms=list(range(10)))
    await platform.register()
    await platform.produce(values_of(10), timestamps_ms=list(range(10, 20)))
    await platform.stop_agent("a")
    await platform.orphan()
    await platform.start_agent("b")
    await platform.grant("b")
    await platform.produce(values_of(10), timestamps_ms=list(range(20, 30)))
    service = await start_query()
    assert await at(service, 5) == (5, 5)
    with pytest.raises(Unavailable, match="unsettled"):
        await at(service, 25)
    await platform.start_agent("a")
    await platform.settle(epoch=1)
    await settle_in(platform, service)
    assert await at(service, 15) == (15, 15)
    assert await at(service, 25) == (RANGE_WIDTH + 5, 25)
    assert await at(service, 30) == (RANGE_WIDTH + 10, -1)


async def test_by_timestamp_steps_over_lost_spans(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10), timestamps_ms=-5)
    await platform.lose_span(10, "gone")
    await platform.produce(values_of(10), timestamps_ms=-3)
    await platform.register()
    service = await start_query()
    assert await at(service, -4) == (10, -3)


async def test_bad_lookups(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query(subscribe_positions_max=2)
    with pytest.raises(InvalidArgument, match="spec"):
        await look_up(service, 0)
    lookup = query_pb2.OffsetLookup(topic="nowhere", spec=query_pb2.OFFSET_SPEC_EARLIEST)
    with pytest.raises(UnknownTopic):
        await service.api.lookup_offsets(query_pb2.LookupOffsetsRequest(lookups=[lookup]))
    with pytest.raises(InvalidArgument, match="lookups"):
        await service.api.lookup_offsets(query_pb2.LookupOffsetsRequest(lookups=[lookup] * 3))
