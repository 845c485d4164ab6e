"""Topics are altered while they are in use, against a real PostgreSQL."""

import json
from typing import Any

import pytest
from shproto.errors import InvalidArgument, UnknownTopic
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.wiring import CoordinatorService


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    return coordinator.api


async def described(api: CoordinatorApi) -> pb.DescribeTopicResponse:
    return await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))


async def check_projections(api: CoordinatorApi) -> None:
    parts = [part async for part in api.check_projections(pb.CheckProjectionsRequest())]
    assert not parts[-1].differences


async def test_new_partitions_get_leaders_and_old_ones_stay_as_they_are(
    api: CoordinatorApi, open_agent: Any, all_events: Any
) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2, retention_ms=5))
    agents = [await open_agent(api, name) for name in "ab"]
    for agent in agents:
        for grant in (await agent.leads()).values():
            await agent.write(grant, 0, 10)
    before = await described(api)
    joined = await api.join_group(pb.JoinGroupRequest(group="g", topics=["orders"]))
    answer = await api.alter_topic(pb.AlterTopicRequest(topic="orders", partitions=5))
    after = await described(api)
    assert answer == after.topic
    assert (after.topic.topic_id, after.topic.partitions, after.topic.retention_ms) == (answer.topic_id, 5, 5)
    assert list(after.partitions)[:2] == list(before.partitions)
    assert [len(await agent.leads()) for agent in agents] in ([2, 3], [3, 2])
    assert [(info.epoch, info.log_start_offset, info.registered_end) for info in after.partitions][2:] == [
        (1, 0, 0)
    ] * 3
    (event,) = await all_events(api, "TopicAltered")
    assert json.loads(event.payload_json) == {
        "topic_id": answer.topic_id.hex(),
        "topic": "orders",
        "partitions_before": 2,
        "partitions": 5,
        "retention_ms": 5,
        "retention_bytes": None,
        "min_acks": types_pb2.ACKS_WAL,
        "unclean_recovery_after_ms": None,
    }
    assignment = await api.heartbeat_group(
        pb.HeartbeatGroupRequest(group="g", member_id=joined.member_id, generation=joined.generation)
    )
    assert {item.partition for item in assignment.assigned} == set(range(5))
    await check_projections(api)


async def test_settings_are_set_and_unset_one_by_one(api: CoordinatorApi, open_agent: Any) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1, retention_ms=5))
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    for number in range(3):
        await agent.write(grant, 10 * number, 10 * number + 10)
    version = (await agent.heartbeat()).grants_version
    info = await api.alter_topic(
        pb.AlterTopicRequest(topic="orders", retention_bytes=100, min_acks=types_pb2.ACKS_NONE, unset=["retention_ms"])
    )
    assert (info.HasField("retention_ms"), info.retention_bytes) == (False, 100)
    assert (await agent.heartbeat()).grants_version != version, "so that leaders ask"
    assert (await agent.leads())[0].min_acks == types_pb2.ACKS_NONE
    done = await api.apply_retention(pb.ApplyRetentionRequest())
    assert done.segments_removed == 2
    await check_projections(api)


async def test_what_is_so_already_leaves_no_event(api: CoordinatorApi, all_events: Any) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2, retention_ms=5))
    same = pb.AlterTopicRequest(topic="orders", partitions=2, retention_ms=5, min_acks=types_pb2.ACKS_WAL)
    assert (await api.alter_topic(same)).partitions == 2
    assert await all_events(api, "TopicAltered") == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "nothing of topic 'orders' is to be altered"),
        ({"partitions": 1}, "has 2 partitions and cannot have fewer, got 1"),
        ({"partitions": 0}, "partitions must be from 1"),
        ({"partitions": 2**31}, "partitions must be from 1"),
        ({"retention_ms": 0}, "retention_ms must be from 1"),
        ({"min_acks": 9}, "min_acks must be none, wal or durable"),
        ({"min_acks": types_pb2.ACKS_DURABLE}, "cannot change to or from durable"),
        ({"unset": ["min_acks"]}, "unset names 'min_acks'"),
        ({"unset": ["retention_ms"], "retention_ms": 1}, "set and unset at once"),
    ],
)
async def test_what_cannot_be_altered_is_refused_and_nothing_of_it_is_done(
    api: CoordinatorApi, wrong: dict[str, Any], said: str
) -> None:
    made = await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    with pytest.raises(InvalidArgument, match=said):
        await api.alter_topic(
            pb.AlterTopicRequest(
                **({"topic": "orders", "retention_bytes": 7} if wrong else {"topic": "orders"}) | wrong
            )
        )
    assert (await described(api)).topic == made


async def test_a_durable_topic_stays_durable(api: CoordinatorApi) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1, min_acks=types_pb2.ACKS_DURABLE))
    with pytest.raises(InvalidArgument, match="to or from durable"):
        await api.alter_topic(pb.AlterTopicRequest(topic="orders", min_acks=types_pb2.ACKS_WAL))
    info = await api.alter_topic(pb.AlterTopicRequest(topic="orders", partitions=3))
    assert (info.partitions, info.min_acks) == (3, types_pb2.ACKS_DURABLE)


async def test_a_topic_that_is_not_there_cannot_be_altered(api: CoordinatorApi) -> None:
    with pytest.raises(UnknownTopic):
        await api.alter_topic(pb.AlterTopicRequest(topic="orders", partitions=1))
