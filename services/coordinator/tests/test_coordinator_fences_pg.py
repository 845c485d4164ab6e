"""Fences of producers in a real PostgreSQL: kept under the lock of the leader's range."""

import asyncio
from typing import Any

import pytest
from shproto.errors import Fenced, InvalidArgument, ProducerFenced, SessionExpired
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.wiring import CoordinatorService

pytestmark = pytest.mark.long


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    await coordinator.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    return coordinator.api


def asked(agent: Any, grant: pb.RangeGrant, raised_to: int, /, **fields: Any) -> pb.RegisterFenceRequest:
    values: dict[str, Any] = {
        "session_token": agent.session.session_token,
        "topic_id": grant.topic_id,
        "partition": grant.partition,
        "epoch": grant.epoch,
        "producer_id": 7,
        "producer_epoch": raised_to,
    }
    return pb.RegisterFenceRequest(**(values | fields))


@pytest.mark.smoke
async def test_a_fence_holds_for_the_next_leader_and_brings_what_older_ranges_know(
    api: CoordinatorApi, open_agent: Any
) -> None:
    first = await open_agent(api, "a")
    grant = (await first.leads())[0]
    answer = await api.register_fence(asked(first, grant, 1))
    assert (answer.known_epoch, answer.next_epoch, answer.state) == (1, 1, b"")
    await first.write(grant, 0, 10, snapshot=b"at 10")
    await first.settle((grant, 10))
    leader, later = first, (await first.leads())[0]
    found = await api.register_fence(asked(leader, later, 2))
    with pytest.raises(ProducerFenced):
        await api.register_fence(asked(leader, later, 1))
    assert (found.known_epoch, found.next_epoch) == (1, later.epoch)
    assert [(r.start_offset, r.end_offset, r.producer_snapshot) for r in found.older] == [(0, 10, b"at 10")]
    kept = await api.register_fence(asked(leader, later, 2, known_epoch=later.epoch, state=b"of 7"))
    assert (kept.known_epoch, kept.state, list(kept.older)) == (later.epoch, b"of 7", [])


async def test_who_does_not_lead_does_not_fence(api: CoordinatorApi, open_agent: Any) -> None:
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    other = await open_agent(api, "b")
    with pytest.raises(Fenced):
        await api.register_fence(asked(other, grant, 1))
    with pytest.raises(Fenced):
        await api.register_fence(asked(agent, grant, 1, epoch=99))
    with pytest.raises(SessionExpired):
        await api.register_fence(asked(agent, grant, 1, session_token="x" * 20))
    await agent.settle((grant, 0))
    with pytest.raises(Fenced):
        await api.register_fence(asked(agent, grant, 1))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"producer_id": 0}, "producer_id"),
        ({"producer_epoch": 0}, "producer_epoch"),
        ({"epoch": 0}, "epoch"),
        ({"topic_id": b"x"}, "topic_id"),
        ({"state": bytes(1025)}, "state"),
        ({"known_epoch": 2}, "known_epoch"),
    ],
)
async def test_bad_numbers_are_refused_by_field(
    api: CoordinatorApi, open_agent: Any, fields: dict[str, Any], named: str
) -> None:
    agent = await open_agent(api, "a")
    with pytest.raises(InvalidArgument, match=named):
        await api.register_fence(asked(agent, (await agent.leads())[0], 1, **fields))


@pytest.mark.smoke
async def test_racing_fences_leave_the_newest(api: CoordinatorApi, open_agent: Any) -> None:
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    calls = [api.register_fence(asked(agent, grant, epoch)) for epoch in (3, 1, 5, 2, 4)]
    await asyncio.gather(*calls, return_exceptions=True)
    with pytest.raises(ProducerFenced):
        await api.register_fence(asked(agent, grant, 4))
    await api.register_fence(asked(agent, grant, 5))


async def test_a_topics_fences_go_with_it(coordinator: CoordinatorService, open_agent: Any) -> None:
    api = coordinator.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(api, "a")
    await api.register_fence(asked(agent, (await agent.leads())[0], 5))
    await api.delete_topic(pb.DeleteTopicRequest(topic="orders"))
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    await api.register_fence(asked(agent, (await agent.leads())[0], 1))
