"""A session's token is its holder's alone: nothing that is answered, told or kept gives it away."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from google.protobuf.message import Message
from shproto.errors import InvalidArgument, SessionExpired
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.wiring import CoordinatorService


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    return coordinator.api


async def everything_read(api: CoordinatorApi) -> AsyncIterator[Message]:
    """The answers of all calls that only read, and of those that a segmenter makes without a session."""
    topic = (await api.list_topics(pb.ListTopicsRequest())).topics[0].topic
    yield await api.get_status(pb.GetStatusRequest())
    yield await api.get_head(pb.GetHeadRequest())
    yield await api.get_metadata(pb.GetMetadataRequest(topics=[topic]))
    yield await api.describe_topic(pb.DescribeTopicRequest(topic=topic))
    yield await api.list_groups(pb.ListGroupsRequest())
    yield await api.claim_buffer(pb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=1000))
    yield await api.list_deletions(pb.ListDeletionsRequest(limit=10))
    yield await api.begin_deletion(pb.BeginDeletionRequest(object_keys=["data/x/0/1.seg"]))
    yield await api.complete_restore(pb.CompleteRestoreRequest(dry_run=True))
    async for part in api.get_snapshot(pb.GetSnapshotRequest()):
        yield part
    last = (await api.get_head(pb.GetHeadRequest())).events_position
    async for event in api.follow_events(pb.FollowEventsRequest(after_position=0)):
        yield event
        if event.position == last:
            return


async def test_nothing_that_is_read_has_a_token(api: CoordinatorApi, open_agent: Any, dsn: str) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    one = await open_agent(api, "a")
    two = await open_agent(api, "b")  # takes a partition: a move
    await one.announce(((await one.leads())[0], 0, 10))
    query = await api.open_session(pb.OpenSessionRequest(agent_id="q", role="query", address="127.0.0.1:1"))
    tokens = [one.session.session_token, two.session.session_token, query.session_token]
    assert all(len(token) == 36 for token in tokens)
    await two.close()
    answers = [answer async for answer in everything_read(api)]
    assert {"SessionInfo", "MoveRequested", "SessionClosed"} <= {
        *(event.type for event in answers if isinstance(event, pb.Event)),
        *("SessionInfo" for answer in answers if isinstance(answer, pb.GetStatusResponse) and answer.sessions),
    }
    for token in tokens:
        assert not [answer for answer in answers if token.encode() in answer.SerializeToString()]
    connection = await asyncpg.connect(dsn)
    try:
        for table in (t.EVENTS, *t.PROJECTIONS, *t.STATE):
            rows = await connection.fetch(f"SELECT * FROM {table.name}")
            assert not [row for row in rows if any(token in repr(tuple(row)) for token in tokens)], table.name
    finally:
        await connection.close()


async def test_what_reads_show_of_a_session_opens_nothing(api: CoordinatorApi, open_agent: Any) -> None:
    """One SettleRanges with an id from GetStatus made acknowledged records vanish without an error."""
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    shown = next(item for item in (await api.get_status(pb.GetStatusRequest())).sessions if item.role == "ingest")
    assert shown.session_id == agent.session.session_id
    end = pb.WalEnd(topic_id=grant.topic_id, partition=0, epoch=1, end_offset=0)
    with pytest.raises(SessionExpired):
        await api.settle_ranges(pb.SettleRangesRequest(session_token=shown.session_id, ends=[end]))
    with pytest.raises(SessionExpired):
        await api.get_grants(pb.GetGrantsRequest(session_token=shown.session_id))
    with pytest.raises(SessionExpired):
        await api.heartbeat(pb.HeartbeatRequest(session_token=shown.session_id))
    with pytest.raises(SessionExpired):
        await api.report_lost(pb.ReportLostRequest(session_token=shown.session_id))
    await api.close_session(pb.CloseSessionRequest(session_token=shown.session_id, ends=[end]))
    assert [(g.epoch, g.status) for g in await agent.grants()] == [(1, "open")], "its holder goes on"


@pytest.mark.parametrize("token", ["guessable", "x" * 65, "0" * 20 + "\0"])
async def test_a_token_that_can_be_guessed_is_refused_and_not_repeated_in_the_error(
    api: CoordinatorApi, token: str
) -> None:
    request = pb.OpenSessionRequest(agent_id="a", role="ingest", wal_id=uuid.uuid4().bytes, session_token=token)
    with pytest.raises(InvalidArgument, match="session_token must have 16 to 64 characters") as refused:
        await api.open_session(request)
    assert token not in str(refused.value.details)
