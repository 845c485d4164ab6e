"""Fetch over stand-ins of the coordinator and the ingest agents; store, cache and format are the real ones."""

import asyncio

import pytest
from conftest import StartQuery
from query_standins import StandInPlatform, values_of
from shformat import decode_batch
from shproto.errors import (
    InvalidArgument,
    OffsetBelowStart,
    OffsetBeyondEnd,
    UnknownPartition,
    UnknownTopic,
)
from shproto.v1 import query_pb2
from streamhouse_query.wiring import QueryService

pytestmark = pytest.mark.timeout(30)


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


async def settle_in(platform: StandInPlatform, service: QueryService) -> None:
    """Until the service has seen every event."""
    while service._index.cluster.position < len(platform.coordinator.events):
        await asyncio.sleep(0)


async def one_partition(platform: StandInPlatform) -> None:
    await platform.create_topic()
    await platform.start_agent("a")
    await platform.grant("a")


async def test_reads_segments_and_then_the_tail(platform: StandInPlatform, start_query: StartQuery) -> None:
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


async def test_what_happens_after_the_start_is_seen(platform: StandInPlatform, start_query: StartQuery) -> None:
    service = await start_query()
    await one_partition(platform)
    expected = values_of(50)
    await platform.produce(expected)
    assert (await fetch(service, 0)).high_watermark == 50
    await platform.register()
    assert await read_all(service) == dict(enumerate(expected))


async def test_errors_of_offsets_are_distinct(platform: StandInPlatform, start_query: StartQuery) -> None:
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
    platform: StandInPlatform, start_query: StartQuery, fields: dict[str, int], field: str
) -> None:
    await one_partition(platform)
    service = await start_query()
    with pytest.raises(InvalidArgument) as error:
        await service.api.fetch(query_pb2.FetchRequest(topic="orders", **fields))
    assert error.value.details["field"] == field


async def test_unknown_topic_and_partition(platform: StandInPlatform, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    with pytest.raises(UnknownTopic):
        await service.api.fetch(query_pb2.FetchRequest(topic="nowhere"))
    with pytest.raises(UnknownPartition) as error:
        await service.api.fetch(query_pb2.FetchRequest(topic="orders", partition=1))
    assert error.value.details["partitions"] == "1"
