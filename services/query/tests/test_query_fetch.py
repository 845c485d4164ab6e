"""Fetch from a real coordinator, store, cache and format, and from agents that a test fills."""

import asyncio

import pytest
from shformat import decode_batch
from shproto.errors import (
    DataLoss,
    InvalidArgument,
    OffsetBelowStart,
    OffsetBeyondEnd,
    Unavailable,
    UnknownPartition,
    UnknownTopic,
)
from shproto.v1 import query_pb2
from streamhouse_query.wiring import QueryService

from services.query.tests.start_query import StartQuery
from tests.platform.read_world import World, values_of


async def fetch(service: QueryService, offset: int, **fields: object) -> query_pb2.FetchResponse:
    request = query_pb2.FetchRequest(topic="orders", offset=offset, **fields)
    return await service.api.fetch(request)


async def read_all(
    service: QueryService, offset: int = 0, *, topic: str = "orders", partition: int = 0, max_bytes: int = 0
) -> dict[int, bytes | None]:
    """offset -> value up to the end; fails when an offset comes twice or out of order."""
    found: dict[int, bytes | None] = {}
    last = -1
    while True:
        request = query_pb2.FetchRequest(topic=topic, partition=partition, offset=offset, max_bytes=max_bytes)
        response = await service.api.fetch(request)
        assert not response.waiting_reason, response.waiting_reason
        for batch in response.batches:
            records = decode_batch(batch)
            for at, value in zip(records.offsets.tolist(), records.values.to_list(), strict=True):
                if at >= offset:
                    assert at > last
                    found[at], last = value, at
        if response.next_offset == offset:
            assert response.high_watermark == offset
            return found
        offset = response.next_offset


async def settle_in(platform: World, service: QueryService) -> None:
    """Until the service has seen every event."""
    while service.engine.reads.index.cluster.position < platform.position:
        await asyncio.sleep(0)


async def one_partition(platform: World) -> None:
    await platform.create_topic()
    await platform.start_agent("a")
    await platform.grant("a")


async def test_reads_segments_and_then_the_tail(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    expected = []
    for turn in range(5):
        values = values_of(300, turn * 300)
        await platform.produce(values[:100])
        await platform.produce(values[100:])
        expected += values
        if turn < 4:
            await platform.register()
    service = await start_query()
    assert await read_all(service) == dict(enumerate(expected))
    assert await read_all(service, 750) == {n: expected[n] for n in range(750, 1500)}
    assert await read_all(service, max_bytes=1) == dict(enumerate(expected))


async def test_what_happens_after_the_start_is_seen(platform: World, start_query: StartQuery) -> None:
    service = await start_query()
    await one_partition(platform)
    expected = values_of(50)
    await platform.produce(expected)
    assert (await fetch(service, 0)).high_watermark == 50
    await platform.register()
    assert await read_all(service) == dict(enumerate(expected))


async def test_errors_of_offsets_are_distinct(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    for turn in range(3):
        await platform.produce(values_of(10, turn * 10))
        await platform.register()
    await platform.retain_from(10)
    service = await start_query()
    with pytest.raises(OffsetBelowStart) as below:
        await fetch(service, 9)
    assert below.value.details["log_start_offset"] == "10"
    with pytest.raises(OffsetBeyondEnd) as beyond:
        await fetch(service, 31)
    assert beyond.value.details["high_watermark"] == "30"
    at_end = await fetch(service, 30)
    assert (at_end.next_offset, at_end.high_watermark, at_end.log_start_offset) == (30, 30, 10)
    assert not at_end.batches and not at_end.waiting_reason


async def test_nobody_is_sent_back_while_no_coordinator_says_where_the_end_is(
    platform: World, start_query: StartQuery
) -> None:
    """OFFSET_BEYOND_END makes consumers start over; an index that may be behind is no reason for that."""
    await one_partition(platform)
    service = await start_query()
    platform.coordinator.down = True
    with pytest.raises(Unavailable):
        await fetch(service, 31)
    platform.coordinator.down = False
    with pytest.raises(OffsetBeyondEnd):
        await fetch(service, 31)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"offset": -1}, "offset"),
        ({"max_bytes": 17 << 20}, "max_bytes"),
        ({"max_bytes": 100, "min_bytes": 101}, "min_bytes"),
        ({"max_wait_ms": 60_001}, "max_wait_ms"),
        ({"format": 7}, "format"),
    ],
)
async def test_bad_requests_name_the_field(
    platform: World, start_query: StartQuery, fields: dict[str, int], field: str
) -> None:
    await one_partition(platform)
    service = await start_query()
    with pytest.raises(InvalidArgument) as error:
        await service.api.fetch(query_pb2.FetchRequest(topic="orders", **fields))
    assert error.value.details["field"] == field


async def test_unknown_topic_and_partition(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    with pytest.raises(UnknownTopic):
        await service.api.fetch(query_pb2.FetchRequest(topic="nowhere"))
    with pytest.raises(UnknownPartition) as error:
        await service.api.fetch(query_pb2.FetchRequest(topic="orders", partition=1))
    assert error.value.details["partitions"] == "1"


async def test_plain_records_begin_at_exactly_the_offset(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10), timestamps_ms=list(range(100, 110)))
    await platform.register()
    await platform.produce([b"tail", None])
    service = await start_query()
    response = await fetch(service, 7, format=query_pb2.FETCH_FORMAT_RECORDS)
    assert not response.batches
    expected = list(zip(range(7, 12), [*values_of(10)[7:], b"tail", None], strict=True))
    assert [(r.offset, r.value if r.HasField("value") else None) for r in response.records] == expected
    assert response.records[0].timestamp_ms == 107 and response.next_offset == 12
    few = await fetch(service, 7, format=query_pb2.FETCH_FORMAT_RECORDS, max_bytes=1)
    assert [record.offset for record in few.records] == [7] and few.next_offset == 8


async def test_a_damaged_tail_is_not_handed_on(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    ((key, batches),) = platform.agents["a"].batches.items()
    batches[0] = batches[0][:-1] + bytes([batches[0][-1] ^ 1])
    service = await start_query()
    with pytest.raises(DataLoss, match="agent a answered") as error:
        await fetch(service, 0)
    assert error.value.details["agent"] == "a" and key[2] == 1


async def test_records_that_are_there_do_not_wait_for_an_agent_that_hangs(
    platform: World, start_query: StartQuery
) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    await platform.register()
    service = await start_query()
    platform.agents["a"].hangs = True
    async with asyncio.timeout(60):
        response = await fetch(service, 0)
    assert response.next_offset == 10
