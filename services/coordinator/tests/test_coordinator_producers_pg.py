"""Named producers in a real PostgreSQL: an epoch for each that takes the name over."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from shproto.errors import InvalidArgument, Overloaded, UnknownProducer
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService

from services.coordinator.tests.running import running

pytestmark = pytest.mark.long


async def take(api: CoordinatorApi, name: str = "sink") -> tuple[int, int]:
    answer = await api.init_producer(pb.InitProducerRequest(name=name))
    return answer.producer_id, answer.producer_epoch


@pytest.mark.smoke
async def test_each_that_takes_a_name_over_gets_the_next_epoch_of_the_same_id(
    coordinator: CoordinatorService, all_events: Any
) -> None:
    api = coordinator.api
    producer_id, epoch = await take(api)
    assert (producer_id > 0, epoch) == (True, 1)
    assert [await take(api) for _ in range(3)] == [(producer_id, 2), (producer_id, 3), (producer_id, 4)]
    other_id, other_epoch = await take(api, "other")
    assert (other_id != producer_id, other_epoch) == (True, 1)
    plain = await api.init_producer(pb.InitProducerRequest())
    assert (plain.producer_id not in (producer_id, other_id), plain.producer_epoch) == (True, 0)
    events = [json.loads(event.payload_json) for event in await all_events(api, "ProducerInitialized")]
    assert [(event["name"], event["producer_id"], event["producer_epoch"]) for event in events] == [
        *(("sink", producer_id, number) for number in range(1, 5)),
        ("other", other_id, 1),
    ]
    parts = [part async for part in api.check_projections(pb.CheckProjectionsRequest())]
    assert not parts[-1].differences


async def test_of_two_that_take_a_name_over_at_once_each_has_its_own_epoch(
    two_coordinators: tuple[CoordinatorService, CoordinatorService],
) -> None:
    taken = await asyncio.gather(*(take(service.api) for service in two_coordinators * 5))
    assert len({producer_id for producer_id, _ in taken}) == 1
    assert sorted(epoch for _, epoch in taken) == list(range(1, 11))


async def test_a_deleted_name_is_free(coordinator: CoordinatorService, all_events: Any) -> None:
    api = coordinator.api
    producer_id, _ = await take(api)
    deleted = await api.delete_producer(pb.DeleteProducerRequest(name="sink"))
    assert deleted.producer_id == producer_id
    with pytest.raises(UnknownProducer) as unknown:
        await api.delete_producer(pb.DeleteProducerRequest(name="sink"))
    assert unknown.value.details == {"name": "sink"}
    again_id, epoch = await take(api)
    assert (again_id != producer_id, epoch) == (True, 1)
    assert len(await all_events(api, "ProducerDeleted")) == 1
    await coordinator.context.store.rebuild()
    assert await take(api) == (again_id, 2)


@pytest.mark.parametrize("name", ["x" * 250, "a\0b", "two\nlines"])
async def test_a_name_is_text_on_a_line(coordinator: CoordinatorService, name: str) -> None:
    for call in (
        coordinator.api.init_producer(pb.InitProducerRequest(name=name)),
        coordinator.api.delete_producer(pb.DeleteProducerRequest(name=name)),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await call
        assert refused.value.details["field"] == "name"


async def test_the_number_of_names_has_a_limit(dsn: str, fast: Callable[..., CoordinatorSettings]) -> None:
    async with running(fast(dsn, named_producers_max=2)) as service:
        api = service.api
        producer_id, _ = await take(api, "a")
        await take(api, "b")
        with pytest.raises(Overloaded, match="named_producers_max is 2"):
            await take(api, "c")
        assert await take(api, "a") == (producer_id, 2)
        await api.delete_producer(pb.DeleteProducerRequest(name="b"))
        await take(api, "c")
