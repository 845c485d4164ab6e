"""Metadata that lacks a few of the events that were seen of it, as a promoted standby does that lagged."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from shproto.errors import MetadataWentBack, SessionExpired
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.wiring import CoordinatorService

ChangeRows = Callable[..., Awaitable[object]]

# The last event is gone, and another one is in its place already.
REPLACE_LAST = """UPDATE events SET created_ms = created_ms - 1
    WHERE position = (SELECT position FROM event_position)"""
REMOVE_LAST = """WITH head AS (UPDATE event_position SET position = position - 1 RETURNING position)
    DELETE FROM events WHERE position > (SELECT position FROM head)"""


async def noticed(change_rows: ChangeRows, api: CoordinatorApi) -> None:
    """Everything that happens brings the feed to read."""
    async with asyncio.timeout(60):
        number = 0
        while await change_rows("UPDATE forks SET noticed_ms = noticed_ms") == "UPDATE 0":
            await api.create_topic(pb.CreateTopicRequest(topic=f"t{number}", partitions=1))
            number += 1
            await asyncio.sleep(0.05)


async def read_all(coordinator: CoordinatorService, api: CoordinatorApi) -> None:
    async with asyncio.timeout(60):
        while coordinator.feed.position != (await api.get_head(pb.GetHeadRequest())).events_position:
            await asyncio.sleep(0.01)


def opening(agent_id: str, wal_id: bytes, **seen: Any) -> pb.OpenSessionRequest:
    return pb.OpenSessionRequest(agent_id=agent_id, role="ingest", wal_id=wal_id, **seen)


@pytest.mark.parametrize("change", [REPLACE_LAST, REMOVE_LAST])
async def test_g8_events_that_a_coordinator_has_read_are_missed_whatever_came_after(
    coordinator: CoordinatorService, open_agent: Any, make_segment: Any, change_rows: ChangeRows, change: str
) -> None:
    api = coordinator.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    buffer_id = await agent.announce((grant, 0, 10))
    await read_all(coordinator, api)
    last = coordinator.feed.position
    await change_rows(change)
    await noticed(change_rows, api)
    with pytest.raises(SessionExpired):
        await agent.heartbeat()
    with pytest.raises(MetadataWentBack, match="was seen, and is gone"):
        await api.open_session(opening("a", agent.wal_id))
    segment = make_segment(grant.topic_id, 0, 1, 0, 10)
    with pytest.raises(MetadataWentBack):
        await api.register_segments(pb.RegisterSegmentsRequest(buffer_id=buffer_id, segments=[segment]))
    with pytest.raises(MetadataWentBack):
        await api.begin_deletion(pb.BeginDeletionRequest(object_keys=["data/x"], grace_ms=1, confirm_ms=1))
    assert (await api.get_head(pb.GetHeadRequest())).missing_position == last
    assert (await api.get_status(pb.GetStatusRequest())).missing_position == last
    await api.open_session(pb.OpenSessionRequest(agent_id="q", role="query"))  # readers go on


async def test_g8_nothing_is_deleted_once_an_agent_has_seen_more_than_there_is(
    coordinator: CoordinatorService, open_agent: Any
) -> None:
    """Its note may be damaged, so that nothing else stops; soon there are as many events as it has seen."""
    api = coordinator.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(api, "a")
    head = await api.get_head(pb.GetHeadRequest())
    request = pb.BeginDeletionRequest(object_keys=["data/x"], grace_ms=1, confirm_ms=1)
    await api.begin_deletion(request)
    assert not head.missing_position
    with pytest.raises(MetadataWentBack, match="does not go on"):
        await api.open_session(opening("b", b"b" * 16, history_id="another", seen_position=10**9))
    await api.begin_deletion(request)
    seen = head.events_position + 5
    with pytest.raises(MetadataWentBack, match="older than what was seen"):
        await api.open_session(opening("b", b"b" * 16, history_id=head.history_id, seen_position=seen))
    for number in range(6):
        await api.create_topic(pb.CreateTopicRequest(topic=f"t{number}", partitions=1))
    with pytest.raises(MetadataWentBack, match=f"and {seen} of"):
        await api.begin_deletion(request)
    await agent.heartbeat()
    await open_agent(api, "c")


async def test_another_history_goes_on_from_any_place(
    coordinator: CoordinatorService, open_agent: Any, change_rows: ChangeRows
) -> None:
    """As after a restore of an older backup: it has accounted for what is gone."""
    api = coordinator.api
    await open_agent(api, "a")
    await read_all(coordinator, api)
    await change_rows(f"WITH other AS ({REPLACE_LAST}) INSERT INTO histories SELECT 2, 'other', 0, 0, 0")
    for number in range(5):
        await api.create_topic(pb.CreateTopicRequest(topic=f"t{number}", partitions=1))
    await read_all(coordinator, api)
    assert await change_rows("UPDATE forks SET noticed_ms = 0") == "UPDATE 0"
    await open_agent(api, "b")
