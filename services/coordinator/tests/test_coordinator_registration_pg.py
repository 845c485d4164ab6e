"""Sealed buffers and segments against a real PostgreSQL: claims, compare-and-set, holes, producers' state."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from shproto.errors import Fenced, InvalidArgument, SessionExpired, Unavailable
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.service import sessions
from streamhouse_coordinator.wiring import CoordinatorService

from services.coordinator.tests.declared import declare

pytestmark = pytest.mark.long

MakeSegment = Callable[..., types_pb2.SegmentRef]
ChangeRows = Callable[..., Awaitable[object]]
REGISTERED, COVERED, FENCED, EARLY = 1, 2, 3, 4


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    await coordinator.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=3))
    return coordinator.api


async def claim(api: CoordinatorApi, ttl_ms: int = 60_000) -> pb.ClaimBufferResponse:
    return await api.claim_buffer(pb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=ttl_ms))


async def register(api: CoordinatorApi, buffer_id: str, *segments: types_pb2.SegmentRef) -> list[int]:
    await declare(api, (item.object_key for item in segments))
    request = pb.RegisterSegmentsRequest(buffer_id=buffer_id, segments=segments)
    return list((await api.register_segments(request)).results)


@pytest.mark.smoke
async def test_buffers_are_claimed_oldest_first_and_once(
    api: CoordinatorApi, open_agent: Any, change_rows: ChangeRows
) -> None:
    agent = await open_agent(api, "a", "127.0.0.1:7")
    grant = (await agent.leads())[0]
    first, second = await agent.announce((grant, 0, 10)), await agent.announce((grant, 10, 20))
    claims = [await claim(api), await claim(api), await claim(api)]
    assert [item.buffer_id for item in claims] == [first, second, ""]
    assert (claims[0].attempt, claims[0].agent_id, claims[0].address) == (1, "a", "127.0.0.1:7")
    await change_rows("UPDATE buffer_claims SET free_at_ms = 1 WHERE buffer_id = $1", first)
    again = await claim(api)
    assert (again.buffer_id, again.attempt) == (first, 2), "an expired claim is free"
    with pytest.raises(Fenced):
        await api.renew_claim(pb.RenewClaimRequest(claim_id=claims[0].claim_id, claim_ttl_ms=1000))
    await api.release_claim(pb.ReleaseClaimRequest(claim_id=claims[0].claim_id))  # not ours any more: no effect
    assert not (await claim(api)).found
    await api.release_claim(pb.ReleaseClaimRequest(claim_id=again.claim_id, reason="S3 is away", retry_after_ms=60_000))
    assert not (await claim(api)).found
    (failure,) = (await api.get_status(pb.GetStatusRequest())).buffer_failures
    assert (failure.buffer_id, failure.agent_id, failure.attempt, failure.reason) == (first, "a", 2, "S3 is away")
    assert failure.size_bytes == sum(item.size_bytes for item in again.slices)
    await change_rows("UPDATE buffer_claims SET free_at_ms = 1 WHERE buffer_id = $1", first)
    assert (await claim(api)).attempt == 3


async def test_a_renewed_claim_is_not_free(api: CoordinatorApi, open_agent: Any, change_rows: ChangeRows) -> None:
    agent = await open_agent(api, "a")
    await agent.announce(((await agent.leads())[0], 0, 10))
    claimed = await claim(api, 60_000)
    await api.renew_claim(pb.RenewClaimRequest(claim_id=claimed.claim_id, claim_ttl_ms=600_000))
    await change_rows("UPDATE buffer_claims SET free_at_ms = free_at_ms - 120000")
    assert not (await claim(api)).found


@pytest.mark.smoke
async def test_announcing_again_changes_nothing(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment, all_events: Any
) -> None:
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    buffer_id = await agent.announce((grant, 0, 10))
    request = pb.AnnounceBufferRequest(
        session_token=agent.session.session_token,
        buffer_id=buffer_id,
        slices=[
            pb.BufferSlice(topic_id=grant.topic_id, partition=0, epoch=1, base_offset=0, end_offset=10, record_count=10)
        ],
    )
    await api.announce_buffer(request)
    assert (await api.get_status(pb.GetStatusRequest())).buffers_waiting == 1
    await register(api, buffer_id, make_segment(grant.topic_id, 0, 1, 0, 10))
    await api.announce_buffer(request)
    assert not (await claim(api)).found
    assert (await api.get_status(pb.GetStatusRequest())).buffers_waiting == 0
    request.session_token = "gone"
    with pytest.raises(SessionExpired):
        await api.announce_buffer(request)


def completed(event: pb.Event) -> bool:
    return bool(json.loads(event.payload_json)["completed"])


async def test_a_buffer_is_completed_when_all_its_slices_are(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment, all_events: Any
) -> None:
    agent = await open_agent(api, "a")
    leads = await agent.leads()
    buffer_id = await agent.announce(*((leads[number], 0, 10) for number in range(3)))
    topic_id = leads[0].topic_id
    first = make_segment(topic_id, 0, 1, 0, 10)
    assert await register(api, buffer_id, first, make_segment(topic_id, 1, 1, 10, 20)) == [REGISTERED, EARLY]
    assert [(item.partition, item.base_offset) for item in (await claim(api)).slices] == [(1, 0), (2, 0)]
    assert [completed(event) for event in await all_events(api, "BufferRegistered")] == [False]
    rest = [first, make_segment(topic_id, 1, 1, 0, 10), make_segment(topic_id, 2, 1, 0, 10)]
    assert await register(api, buffer_id, *rest) == [REGISTERED] * 3
    events = await all_events(api)
    assert [completed(event) for event in events if event.type == "BufferRegistered"] == [False, True]
    assert not {event.type for event in events} & {"BufferSealed", "SegmentRegistered", "BufferCompleted"}
    assert await register(api, buffer_id, make_segment(topic_id, 2, 1, 0, 10)) == [COVERED]
    status = await api.get_status(pb.GetStatusRequest())
    assert (status.buffers_waiting, status.buffers_claimed, status.buffers_waiting_bytes) == (0, 0, 0)


@pytest.mark.long
async def test_segments_that_are_early_are_not_in_line_with_what_they_wait_for(
    api: CoordinatorApi, dsn: str, open_agent: Any, make_segment: MakeSegment, all_events: Any
) -> None:
    """They are offered again and again meanwhile: the registration that is in turn would never get the row."""
    agent = await open_agent(api, "a")
    leads = await agent.leads()
    topic_id = leads[0].topic_id
    buffer_id = await agent.announce((leads[0], 10, 20), (leads[1], 0, 10))
    early, in_turn = make_segment(topic_id, 0, 1, 10, 20), make_segment(topic_id, 1, 1, 0, 10)
    async with _held(dsn, f"SELECT 1 FROM ranges WHERE topic_id = '{topic_id.hex()}' AND partition = 0 FOR UPDATE"):
        assert await register(api, buffer_id, early) == [EARLY]
        assert await register(api, buffer_id, early, in_turn) == [EARLY, REGISTERED]
        with pytest.raises(Unavailable):
            await register(api, buffer_id, make_segment(topic_id, 0, 1, 0, 10))
    assert [s.base_offset for s in (await claim(api)).slices] == [10]
    assert await register(api, buffer_id, make_segment(topic_id, 0, 1, 0, 10), early) == [REGISTERED, REGISTERED]
    completed = [json.loads(e.payload_json)["completed"] for e in await all_events(api, "BufferRegistered")]
    assert completed == [False, True]


async def test_a_segment_behind_a_hole_that_is_in_turn_is_not_early(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment, change_rows: ChangeRows
) -> None:
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    buffer_id = await agent.announce((grant, 5, 10))
    hole = "INSERT INTO lost_spans (topic_id, partition, epoch, base_offset, end_offset, reason) "
    await change_rows(hole + "VALUES ($1, 0, 1, 0, 5, 'bad CRC')", grant.topic_id.hex())
    assert await register(api, buffer_id, make_segment(grant.topic_id, 0, 1, 5, 10)) == [REGISTERED]


@asynccontextmanager
async def _held(dsn: str, statement: str) -> AsyncIterator[None]:
    """Somebody else's transaction has done `statement`, and is open."""
    outsider = await asyncpg.connect(dsn)
    try:
        await outsider.execute(f"BEGIN; {statement}")
        yield
    finally:
        await outsider.close()


@pytest.mark.smoke
async def test_one_of_two_racing_segmenters_wins(
    two_coordinators: tuple[CoordinatorService, CoordinatorService], open_agent: Any, make_segment: MakeSegment
) -> None:
    """G4: registration is a compare-and-set; the loser is told to drop its object."""
    apis = [service.api for service in two_coordinators]
    await apis[0].create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(apis[0], "a")
    grant = (await agent.leads())[0]
    for turn in range(5):
        base, end = 10 * turn, 10 * turn + 10
        buffer_id = await agent.announce((grant, base, end))
        tries = [
            register(apis[number % 2], buffer_id, make_segment(grant.topic_id, 0, 1, base, end)) for number in range(6)
        ]
        results = sorted(result for answer in await asyncio.gather(*tries) for result in answer)
        assert results == [REGISTERED] + [COVERED] * 5
    described = await apis[1].describe_topic(pb.DescribeTopicRequest(topic="orders"))
    assert (described.partitions[0].registered_end, described.partitions[0].segment_count) == (50, 5)


async def test_two_workers_never_get_the_same_buffer(
    two_coordinators: tuple[CoordinatorService, CoordinatorService], open_agent: Any
) -> None:
    apis = [service.api for service in two_coordinators]
    await apis[0].create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(apis[0], "a")
    grant = (await agent.leads())[0]
    announced = {await agent.announce((grant, number, number + 1)) for number in range(6)}
    claims = await asyncio.gather(*(claim(apis[number % 2]) for number in range(8)))
    got = [item.buffer_id for item in claims if item.found]
    assert len(got) == len(set(got)) and set(got) <= announced
    while (left := await claim(apis[0])).found:
        got.append(left.buffer_id)
    assert sorted(got) == sorted(announced)


async def test_buffers_of_an_agent_that_is_gone_wait_and_are_dropped_when_it_opens_its_log_again(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment
) -> None:
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    kept, dropped = await agent.announce((grant, 0, 10)), await agent.announce((grant, 10, 20))
    assert (await claim(api)).buffer_id == kept
    await agent.close()
    assert not (await claim(api)).found
    assert (await api.get_status(pb.GetStatusRequest())).buffers_waiting == 1
    await agent.open({(grant.topic_id, 0, 1): 25})
    assert not (await claim(api)).found, f"{dropped} is dropped"
    anew = await agent.announce((grant, 0, 25))
    # The segmenter that still worked on the old buffer registers first; what is left of the new one is handed out.
    assert await register(api, kept, make_segment(grant.topic_id, 0, 1, 0, 10)) == [REGISTERED]
    assert await register(api, anew, make_segment(grant.topic_id, 0, 1, 0, 25)) == [FENCED]
    claimed = await claim(api)
    assert claimed.buffer_id == anew
    assert [(s.base_offset, s.end_offset, s.record_count) for s in claimed.slices] == [(10, 25, 15)]


async def test_a_buffer_may_rest_for_longer_than_any_claim(api: CoordinatorApi, open_agent: Any) -> None:
    """A segmenter may be set to give back for an hour what the store refuses, while claims end after ten minutes."""
    agent = await open_agent(api, "a")
    await agent.announce(((await agent.leads())[0], 0, 10))
    claimed = await claim(api)
    request = pb.ReleaseClaimRequest(claim_id=claimed.claim_id, reason="refused: no", retry_after_ms=3_600_001)
    with pytest.raises(InvalidArgument, match=r"retry_after_ms .*3600000"):
        await api.release_claim(request)
    request.retry_after_ms = 3_600_000
    await api.release_claim(request)
    assert not (await claim(api)).found
    assert "refused: no" in str(await api.get_status(pb.GetStatusRequest()))


async def test_holes_in_the_log_are_recorded_in_their_place(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment, all_events: Any
) -> None:
    """G6: a damaged range is an error with its place, never a skipped record."""
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    span = pb.LostSpan(topic_id=grant.topic_id, partition=0, epoch=1, base_offset=10, end_offset=15, reason="bad CRC")
    request = pb.ReportLostRequest(session_token=agent.session.session_token, spans=[span])
    await api.report_lost(request)
    await api.report_lost(request)
    described = (await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))).partitions[0]
    assert not described.lost, "registration has not reached it"
    buffer_id = await agent.announce((grant, 0, 10), (grant, 15, 20))
    segments = [make_segment(grant.topic_id, 0, 1, 0, 10), make_segment(grant.topic_id, 0, 1, 15, 20)]
    assert await register(api, buffer_id, *segments) == [REGISTERED, REGISTERED]
    await api.report_lost(request)
    parts = [part async for part in api.get_snapshot(pb.GetSnapshotRequest())]
    found = [s for part in parts for partition in part.partitions for s in partition.segments]
    assert [(s.base_offset, s.end_offset, s.lost_reason) for s in found] == [
        (0, 10, ""),
        (10, 15, "bad CRC"),
        (15, 20, ""),
    ]
    (event,) = await all_events(api, "BufferRegistered")
    assert len(json.loads(event.payload_json)["segments"]) == 3
    described = (await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))).partitions[0]
    assert (list(described.lost), described.record_count) == ([span], 15)
    other = await open_agent(api, "b")
    request.session_token = other.session.session_token
    with pytest.raises(InvalidArgument):
        await api.report_lost(request)


async def test_the_next_leader_gets_the_producers_state(api: CoordinatorApi, open_agent: Any) -> None:
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    for end in (10, 20):
        await agent.announce((grant, end - 10, end), snapshot=f"state at {end}".encode())
    ref = {"segment_id": "00000000-0000-0000-0000-000000000001"}
    assert await agent.write(grant, 0, 10, **ref) == REGISTERED
    assert (await agent.leads())[0].producer_snapshot == b"state at 10", "at registered_end, not beyond"
    await agent.settle((grant, 20))
    grants = {item.epoch: item.producer_snapshot for item in await agent.grants() if item.partition == 0}
    assert grants == {1: b"state at 10", 2: b"state at 20"}


@pytest.mark.smoke
async def test_g5_a_registration_while_grants_are_read_takes_no_producers_from_them(
    api: CoordinatorApi, open_agent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each statement sees what is committed by then: the range from before it, the snapshots from after it."""
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    for end in (10, 20):
        await agent.announce((grant, end - 10, end), snapshot=f"state at {end}".encode())
    assert await agent.write(grant, 0, 10) == REGISTERED
    read = sessions._stored_snapshots

    async def read_after_a_registration(*args: Any) -> Any:
        assert await agent.write(grant, 10, 20) == REGISTERED
        return await read(*args)

    monkeypatch.setattr(sessions, "_stored_snapshots", read_after_a_registration)
    assert (await agent.leads())[0].producer_snapshot == b"state at 20"


def count_statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of asyncpg's calls from here on, one for each round trip."""
    calls: list[str] = []
    for name in ("execute", "executemany", "fetch", "fetchrow", "fetchval"):

        def counted(
            *args: Any, _name: str = name, _call: Any = getattr(asyncpg.Connection, name), **kwargs: Any
        ) -> Any:
            calls.append(_name)
            return _call(*args, **kwargs)

        monkeypatch.setattr(asyncpg.Connection, name, counted)
    return calls


@pytest.mark.long
async def test_thousands_of_slices_in_one_object(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="wide", partitions=3000))
    agent = await open_agent(api, "a")
    grants = [grant for grant in await agent.grants() if grant.topic == "wide"]
    buffer_id = await agent.announce(*((grant, 0, 5) for grant in grants), snapshot=b"x")
    assert len((await claim(api)).slices) == 3000
    refs = [make_segment(grant.topic_id, grant.partition, 1, 0, 5) for grant in grants]
    statements = count_statements(monkeypatch)
    assert await register(api, buffer_id, *refs) == [REGISTERED] * 3000
    assert 0 < len(statements) < 1000, "bulk statements (and what else ran meanwhile), not one round trip each"
    assert (await api.get_status(pb.GetStatusRequest())).buffers_claimed == 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"segment_id": "x"}, "segment_id"),
        ({"topic_id": b"short"}, "topic_id"),
        ({"end_offset": 0}, "end_offset"),
        ({"base_offset": -1}, "base_offset"),
        ({"record_count": 11}, "record_count"),
        ({"record_count": 0}, "record_count"),
        ({"object_key": ""}, "object_key"),
        ({"object_key": "k" * 1025}, "object_key"),
        ({"size_bytes": 0}, "size_bytes"),
        ({"object_at": -1}, "object_at"),
    ],
)
async def test_segments_that_make_no_sense(
    api: CoordinatorApi, make_segment: MakeSegment, changes: dict[str, Any], field: str
) -> None:
    ref = make_segment(b"t" * 16, 0, 1, 0, 10)
    for name, value in changes.items():
        setattr(ref, name, value)
    with pytest.raises(InvalidArgument) as caught:
        await register(api, "", ref)
    assert caught.value.details["field"] == field
