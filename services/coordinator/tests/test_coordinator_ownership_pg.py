"""Epochs own offset ranges: restart, takeover, moves and expiry against a real PostgreSQL."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from itertools import pairwise
from typing import Any

import asyncpg
import pytest
from shproto.errors import AgentIdTaken, InvalidArgument, SessionExpired, TopicExists, UnknownTopic
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.core import sessions as core_sessions
from streamhouse_coordinator.wiring import CoordinatorService, build

from services.coordinator.tests.running import until

pytestmark = pytest.mark.long

WIDTH = 1024
ChangeRows = Callable[..., Awaitable[object]]
EXPIRE = "UPDATE session_leases SET expires_ms = 1 WHERE session_id = $1"


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    return coordinator.api


async def create(api: CoordinatorApi, partitions: int, name: str = "orders", **options: Any) -> bytes:
    return (await api.create_topic(pb.CreateTopicRequest(topic=name, partitions=partitions, **options))).topic_id


async def all_ranges(api: CoordinatorApi) -> dict[int, list[types_pb2.OffsetRange]]:
    """Of all partitions of all topics, as a reader gets them."""
    found: dict[int, list[types_pb2.OffsetRange]] = {}
    async for part in api.get_snapshot(pb.GetSnapshotRequest()):
        for partition in part.partitions:
            found.setdefault(partition.partition, []).extend(partition.ranges)
    return found


@pytest.mark.smoke
async def test_restart_with_the_same_log_goes_on_without_a_gap(api: CoordinatorApi, open_agent: Any) -> None:
    topic_id = await create(api, 1)
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    assert await agent.write(grant, 0, 10) == pb.REGISTRATION_RESULT_REGISTERED
    first = agent.session.session_token
    await agent.open({(topic_id, 0, 1): 25})  # its log holds 15 records more
    with pytest.raises(SessionExpired):
        await api.heartbeat(pb.HeartbeatRequest(session_token=first))
    resumed = agent.session.resumed
    assert [(r.epoch, r.registered_end, r.end_offset, r.status) for r in resumed] == [(1, 10, 25, "settled")]
    new = (await agent.leads())[0]
    assert (new.epoch, new.start_offset, new.limit_offset) == (2, 25, 25 + WIDTH)
    assert await agent.write(grant, 10, 25) == pb.REGISTRATION_RESULT_REGISTERED, "registration goes on below the end"
    assert await agent.write(grant, 25, 26) == pb.REGISTRATION_RESULT_FENCED
    assert [g.epoch for g in await agent.grants()] == [2], "the first range is complete"


async def test_a_snapshot_has_the_sessions_that_no_event_has_ended(dsn: str, fast: Any, open_agent: Any) -> None:
    """Found by simulation: a query service took its snapshot right after an outage of PostgreSQL, when the leader's
    lease had run out and was not yet extended. No event tells of the extension: the leader stayed unknown to it."""
    service = build(fast(dsn, session_sweep_interval_ms=60_000))
    await service.start()
    connection = await asyncpg.connect(dsn)
    try:
        agent = await open_agent(service.api, "a")
        await connection.execute("UPDATE session_leases SET expires_ms = 1")
        parts = [part async for part in service.api.get_snapshot(pb.GetSnapshotRequest())]
        sessions = [session for part in parts for session in part.sessions if session.role == "ingest"]
        assert [(item.session_id, item.expires_in_ms) for item in sessions] == [(agent.session.session_id, 0)]
    finally:
        await connection.close()
        await service.stop()


@pytest.mark.smoke
async def test_takeover_starts_at_the_limit_and_the_old_range_can_still_be_completed(
    api: CoordinatorApi, open_agent: Any, change_rows: ChangeRows
) -> None:
    topic_id = await create(api, 1)
    one, two = await open_agent(api, "a"), await open_agent(api, "b")
    leader, other = (one, two) if await one.leads() else (two, one)
    old = (await leader.leads())[0]
    assert await leader.write(old, 0, 10) == pb.REGISTRATION_RESULT_REGISTERED

    async def taken_over() -> bool:
        await other.heartbeat()
        return bool(await other.leads())

    await change_rows(EXPIRE, leader.session.session_id)
    await until(taken_over)
    new = (await other.leads())[0]
    assert (new.epoch, new.start_offset) == (2, old.limit_offset)
    assert [(r.epoch, r.status) for r in (await all_ranges(api))[0]] == [(1, "orphaned"), (2, "open")]
    assert await other.write(new, new.start_offset, new.start_offset + 5) == pb.REGISTRATION_RESULT_REGISTERED
    await leader.open({(topic_id, 0, 1): 20})
    assert [(r.epoch, r.end_offset) for r in leader.session.resumed] == [(1, 20)]
    assert await leader.write(old, 10, 20) == pb.REGISTRATION_RESULT_REGISTERED
    ranges = (await all_ranges(api))[0]
    assert [(r.epoch, r.status, r.start_offset, r.registered_end) for r in ranges[:2]] == [
        (1, "settled", 0, 20),
        (2, "open", WIDTH, WIDTH + 5),
    ]


@pytest.mark.smoke
async def test_topics_with_durable_acks_fail_over_without_a_gap(
    api: CoordinatorApi, open_agent: Any, change_rows: ChangeRows
) -> None:
    await create(api, 1, min_acks=types_pb2.ACKS_DURABLE)
    agent = await open_agent(api, "a")
    old = (await agent.leads())[0]
    await agent.write(old, 0, 10)
    await agent.announce((old, 10, 20), snapshot=b"of records that were never acknowledged")

    async def swept() -> bool:
        return (await api.get_status(pb.GetStatusRequest())).leases[0].status == "unassigned"

    await change_rows(EXPIRE, agent.session.session_id)
    await until(swept)
    other = await open_agent(api, "b")
    new = (await other.leads())[0]
    assert (new.epoch, new.start_offset, new.producer_snapshot) == (2, 10, b"")
    assert await agent_write_without_session(api, old, 10, 20) == pb.REGISTRATION_RESULT_FENCED, "a zombie's upload"


async def agent_write_without_session(api: CoordinatorApi, grant: pb.RangeGrant, base: int, end: int) -> int:
    ref = types_pb2.SegmentRef(
        segment_id="00000000-0000-0000-0000-000000000001",
        topic_id=grant.topic_id,
        partition=grant.partition,
        epoch=grant.epoch,
        base_offset=base,
        end_offset=end,
        record_count=end - base,
        object_key="data/zombie",
        size_bytes=1,
    )
    return (await api.register_segments(pb.RegisterSegmentsRequest(segments=[ref]))).results[0]


async def test_a_second_agent_gets_half_by_graceful_moves(api: CoordinatorApi, open_agent: Any) -> None:
    await create(api, 4)
    one = await open_agent(api, "a")
    version = (await one.heartbeat()).grants_version
    assert len(await one.leads()) == 4
    two = await open_agent(api, "b")
    assert (await one.heartbeat()).grants_version > version
    leads = await one.leads()
    moving = [grant for grant in leads.values() if grant.status == "moving"]
    assert [grant.partition for grant in moving] == [2, 3] and await two.leads() == {}
    status = await api.get_status(pb.GetStatusRequest())
    assert [lease.status for lease in status.leases] == ["active", "active", "moving", "moving"]
    await one.write(moving[0], 0, 7)
    await one.settle((moving[0], 7), (moving[1], 0))
    await one.settle((moving[0], 7), (moving[1], 0))  # a repeat changes nothing
    assert {number: grant.start_offset for number, grant in (await two.leads()).items()} == {2: 7, 3: 0}
    assert sorted(await one.leads()) == [0, 1]


async def test_closing_without_settling_orphans(api: CoordinatorApi, open_agent: Any) -> None:
    await create(api, 2)
    agent = await open_agent(api, "a")
    grants = await agent.leads()
    await agent.settle((grants[0], 5))
    assert sorted(await agent.leads()) == [0, 1], "nobody else is there: it leads again, from the end it declared"
    await agent.close()
    await agent.close()
    by_status = {number: [r.status for r in ranges] for number, ranges in (await all_ranges(api)).items()}
    assert by_status == {0: ["settled", "orphaned"], 1: ["orphaned"]}
    metadata = await api.get_metadata(pb.GetMetadataRequest(topics=["orders"]))
    assert [leader.address for leader in metadata.topics[0].leaders] == ["", ""]


async def test_heartbeats_extend_ranges_that_run_out(api: CoordinatorApi, open_agent: Any) -> None:
    topic_id = await create(api, 1)
    agent = await open_agent(api, "a")
    use = pb.RangeUse(topic_id=topic_id, partition=0, epoch=1, next_offset=800)
    for _ in range(2):  # the second one as if the first answer had been lost
        extended = (await agent.heartbeat(use)).extended
        assert [(grant.epoch, grant.limit_offset) for grant in extended] == [(1, 2 * WIDTH)]


async def test_agent_ids_belong_to_one_log(api: CoordinatorApi, open_agent: Any) -> None:
    agent = await open_agent(api, "a")
    with pytest.raises(AgentIdTaken, match=r"give this agent another id \(STREAMHOUSE_AGENT_ID\)"):
        await open_agent(api, "a")
    await agent.close()
    await open_agent(api, "a")


@pytest.mark.parametrize("alive", [False, True])
async def test_a_dead_process_is_replaced_before_its_lease_runs_out(
    coordinator: CoordinatorService, open_agent: Any, alive: bool
) -> None:
    api = coordinator.api
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    agent = await open_agent(api, "a", f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    request = pb.FollowEventsRequest(after_position=0, session_token=agent.session.session_token)
    stream = api.follow_events(request)
    await anext(stream)
    if not alive:
        server.close()
        await server.wait_closed()
    await stream.aclose()

    async def gone() -> bool:
        return not (await api.get_status(pb.GetStatusRequest())).sessions

    if alive:
        await asyncio.sleep(0.3)
        assert not await gone()
        server.close()
    else:
        await until(gone)


@pytest.mark.smoke
async def test_topics_are_made_once(api: CoordinatorApi) -> None:
    await create(api, 1)
    with pytest.raises(TopicExists):
        await create(api, 1)
    with pytest.raises(UnknownTopic):
        await api.describe_topic(pb.DescribeTopicRequest(topic="nope"))
    with pytest.raises(UnknownTopic):
        await api.get_metadata(pb.GetMetadataRequest(topics=["orders", "nope"]))
    with pytest.raises(UnknownTopic):
        await api.delete_topic(pb.DeleteTopicRequest(topic="nope"))


async def test_a_topic_made_again_is_another_topic(api: CoordinatorApi, open_agent: Any) -> None:
    first = await create(api, 1)
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    await agent.write(grant, 0, 10)
    buffer_id = await agent.announce((grant, 10, 20))
    await api.delete_topic(pb.DeleteTopicRequest(topic="orders"))
    assert await agent.grants() == []
    assert not (await api.claim_buffer(pb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=1000))).found
    assert (await api.get_status(pb.GetStatusRequest())).buffers_waiting == 0, f"{buffer_id} is done: fenced"
    second = await create(api, 2)
    assert first != second
    assert {g.partition: (g.epoch, g.start_offset) for g in await agent.grants()} == {0: (1, 0), 1: (1, 0)}
    described = await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))
    assert [p.segment_count for p in described.partitions] == [0, 0]
    assert await agent_write_without_session(api, grant, 10, 20) == pb.REGISTRATION_RESULT_FENCED


@pytest.mark.parametrize(
    "request_",
    [
        pb.OpenSessionRequest(agent_id="", role="ingest", wal_id=b"1" * 16),
        pb.OpenSessionRequest(agent_id="a", role="chef"),
        pb.OpenSessionRequest(agent_id="a", role="ingest", wal_id=b"short"),
        pb.OpenSessionRequest(agent_id="a", role="query", wal_id=b"1" * 16),
        pb.OpenSessionRequest(agent_id="a\0", role="query"),
    ],
)
async def test_sessions_that_make_no_sense(api: CoordinatorApi, request_: pb.OpenSessionRequest) -> None:
    with pytest.raises(InvalidArgument):
        await api.open_session(request_)


async def test_addresses_in_metadata(coordinator: CoordinatorService, api: CoordinatorApi) -> None:
    await coordinator.open_session("127.0.0.1:7070")
    await api.open_session(pb.OpenSessionRequest(agent_id="q", role="query", address="127.0.0.1:7071"))
    metadata = await api.get_metadata(pb.GetMetadataRequest())
    assert list(metadata.query_addresses) == ["127.0.0.1:7071"]
    assert list(metadata.coordinator_addresses) == ["127.0.0.1:7070"]


async def test_producer_ids_are_given_once(two_coordinators: tuple[CoordinatorService, CoordinatorService]) -> None:
    asked = [service.api.init_producer(pb.InitProducerRequest()) for service in two_coordinators * 5]
    ids = [answer.producer_id for answer in await asyncio.gather(*asked)]
    assert len(set(ids)) == 10 and min(ids) > 0


@pytest.mark.long
async def test_ranges_stay_disjoint_when_everything_happens_at_once(
    two_coordinators: tuple[CoordinatorService, CoordinatorService], open_agent: Any
) -> None:
    """G2, G4: offsets are never given to two epochs, whoever decides, however often sessions are opened."""
    apis = [service.api for service in two_coordinators]
    await create(apis[0], 6)
    agents = [await open_agent(apis[number % 2], f"agent-{number}") for number in range(4)]

    async def live(agent: Any, number: int) -> None:
        for turn in range(4):
            for grant in (await agent.leads()).values():
                end = grant.start_offset + 3 + turn
                await agent.write(grant, grant.registered_end, max(end, grant.registered_end + 1))
                if grant.status == "moving":
                    await agent.settle((grant, max(end, grant.registered_end + 1)))
            if (turn + number) % 3 == 0:
                await agent.open()
            if number == 3 and turn == 1:
                await agent.close()
                await agent.open()

    async def topics() -> None:
        for number in range(4):
            await create(apis[number % 2], 2, f"other-{number}")
            await apis[(number + 1) % 2].delete_topic(pb.DeleteTopicRequest(topic=f"other-{number}"))

    await asyncio.gather(topics(), *(live(agent, number) for number, agent in enumerate(agents)))
    described = await apis[0].describe_topic(pb.DescribeTopicRequest(topic="orders"))
    ranges = await all_ranges(apis[1])
    for partition in described.partitions:
        of_partition = sorted(ranges[partition.partition], key=lambda item: item.epoch)
        assert len([item for item in of_partition if item.status == "open"]) <= 1
        for one, other in pairwise(of_partition):
            end = one.end_offset if one.status == "settled" else one.limit_offset
            assert end <= other.start_offset
            assert one.start_offset <= one.registered_end <= end


async def test_a_range_that_was_given_up_is_described(api: CoordinatorApi, open_agent: Any) -> None:
    """Ingest agents look here before they call an old batch of a takeover durable."""
    await create(api, 1)
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    await agent.write(grant, 0, 10)
    await agent.close()
    await open_agent(api, "b")
    await api.declare_lost(pb.DeclareLostRequest(topic="orders", partition=0, epochs=[1]))
    described = (await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))).partitions[0]
    assert [(item.epoch, item.status, item.registered_end, item.end_offset) for item in described.ranges] == [
        (1, "lost", 10, WIDTH),
        (2, "open", WIDTH, 0),
    ]


async def test_g2_after_damage_no_offset_that_may_have_been_used_is_given_out_again(
    api: CoordinatorApi, open_agent: Any
) -> None:
    """Nobody can say what a damaged log held beyond what its replay found."""
    topic_id = await create(api, 2)
    agent = await open_agent(api, "a")
    await agent.open({(topic_id, 1, 1): 7}, ends_unknown=True)
    resumed = {grant.partition: grant for grant in agent.session.resumed}
    assert (resumed[0].end_offset, resumed[1].end_offset) == (WIDTH, 7), "the other one's newest frames are sound"
    assert {n: grant.start_offset for n, grant in (await agent.leads()).items()} == {0: WIDTH, 1: 7}
    lost = pb.LostSpan(topic_id=topic_id, epoch=1, base_offset=0, end_offset=WIDTH, reason="possibly lost")
    await api.report_lost(pb.ReportLostRequest(session_token=agent.session.session_token, spans=[lost]))
    first = (await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))).partitions[0]
    assert (first.record_count, first.segment_count) == (0, 0), "there is nothing that could be read"
    assert [(item.epoch, item.start_offset) for item in first.ranges] == [(2, WIDTH)], "and nothing to wait for"


async def test_g2_after_a_torn_write_the_ends_are_known_but_offsets_go_on_beyond_the_limit(
    api: CoordinatorApi, open_agent: Any
) -> None:
    topic_id = await create(api, 2)
    agent = await open_agent(api, "a")
    await agent.open({(topic_id, 0, 1): 7}, torn=True)
    assert {grant.partition: grant.end_offset for grant in agent.session.resumed} == {0: 7}, "the other was empty"
    assert {n: grant.start_offset for n, grant in (await agent.leads()).items()} == {0: WIDTH, 1: WIDTH}
    ranges = await all_ranges(api)
    assert [(r.epoch, r.status, r.end_offset) for r in ranges[0]] == [(1, "settled", 7), (2, "open", 0)]


async def test_an_agent_may_ask_about_some_of_its_grants(api: CoordinatorApi, open_agent: Any) -> None:
    await create(api, 4)
    one, other = await open_agent(api, "a"), await open_agent(api, "b")
    await one.settle(*((grant, 0) for grant in await one.grants() if grant.status == "moving"))
    mine, theirs = await one.grants(), await other.grants()
    assert [grant.partition for grant in mine] == [0, 1] and [grant.partition for grant in theirs] == [2, 3]

    async def ask(*grants: pb.RangeGrant, epoch: int = 0) -> pb.GetGrantsResponse:
        keys = [
            pb.RangeKey(topic_id=grant.topic_id, partition=grant.partition, epoch=epoch or grant.epoch)
            for grant in grants
        ]
        return await api.get_grants(pb.GetGrantsRequest(session_token=one.session.session_token, only=keys))

    answer = await ask(mine[1], theirs[0])
    assert list(answer.grants) == [mine[1]], "of another log nothing is said"
    everything = await api.get_grants(pb.GetGrantsRequest(session_token=one.session.session_token))
    assert (answer.grants_version, answer.position) == (everything.grants_version, everything.position)
    assert not (await ask(*mine, epoch=9)).grants
    assert not (await ask(theirs[0], epoch=1)).grants, "finished: settled, and empty"
    with pytest.raises(InvalidArgument, match="number of ranges in only"):
        await ask(*[mine[0]] * 10_001)


def key_of(grant: pb.RangeGrant) -> pb.RangeKey:
    return pb.RangeKey(topic_id=grant.topic_id, partition=grant.partition, epoch=grant.epoch)


def told(grants: Iterable[pb.RangeGrant]) -> list[tuple[int, int, bytes, bool]]:
    return [(item.partition, item.epoch, item.producer_snapshot, item.snapshot_omitted) for item in grants]


async def with_producers(api: CoordinatorApi, open_agent: Any) -> Any:
    """An agent that came back: of partitions 0 to 2 epoch 1 is settled, epoch 2 is open; 3 is as it was."""
    topic_id = await create(api, 4)
    agent = await open_agent(api, "a")
    grants = await agent.leads()
    for number, state in enumerate([b"0000", b"1111", b"2222"]):
        await agent.write(grants[number], 0, 10, snapshot=state)
    return await agent.open({(topic_id, number, 1): 20 for number in range(3)})


async def test_what_of_producers_does_not_fit_into_an_answer_is_in_those_that_follow(
    api: CoordinatorApi, open_agent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_sessions, "SNAPSHOTS_BYTES_MAX", 9)
    agent = await with_producers(api, open_agent)
    resumed = list(agent.session.resumed)
    assert told(resumed) == [(0, 1, b"0000", False), (1, 1, b"1111", False), (2, 1, b"", True)]
    rest = [key_of(grant) for grant in resumed if grant.snapshot_omitted]
    request = pb.GetGrantsRequest(session_token=agent.session.session_token, only=rest)
    completed = (await api.get_grants(request)).grants
    assert told(completed) == [(2, 1, b"2222", False)]
    completed[0].producer_snapshot, completed[0].snapshot_omitted = b"", True
    assert list(completed) == resumed[2:], "and else it says the same"
    assert told(await agent.grants()) == [
        (0, 1, b"0000", False),
        (0, 2, b"0000", False),
        (1, 1, b"", True),
        (1, 2, b"", True),
        (2, 1, b"", True),
        (2, 2, b"", True),
        (3, 2, b"", False),
    ]
    low = pb.RangeUse(topic_id=resumed[0].topic_id, partition=0, epoch=2, next_offset=20 + WIDTH - 1)
    assert told((await agent.heartbeat(low)).extended) == [(0, 2, b"", True)]


async def test_asking_for_what_was_omitted_comes_to_an_end(
    api: CoordinatorApi, open_agent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each is larger than what an answer has room for; what was given up takes none."""
    monkeypatch.setattr(core_sessions, "SNAPSHOTS_BYTES_MAX", 1)
    agent = await with_producers(api, open_agent)
    await agent.close()
    await api.declare_lost(pb.DeclareLostRequest(topic="orders", partition=0, epochs=[2], reason="a test"))
    await agent.open()
    grants, answers = await agent.grants(), 1
    found = {(item.partition, item.epoch): item.producer_snapshot for item in grants if not item.snapshot_omitted}
    while rest := [key_of(grant) for grant in grants if grant.snapshot_omitted]:
        request = pb.GetGrantsRequest(session_token=agent.session.session_token, only=rest)
        grants, answers = list((await api.get_grants(request)).grants), answers + 1
        complete = [grant for grant in grants if not grant.snapshot_omitted]
        assert complete == sorted(grants, key=lambda grant: (grant.partition, grant.epoch))[: len(complete)]
        found |= {(grant.partition, grant.epoch): grant.producer_snapshot for grant in complete}
    assert found == {
        (0, 1): b"0000",
        (0, 2): b"",
        (0, 3): b"0000",
        (1, 1): b"1111",
        (1, 3): b"1111",
        (2, 1): b"2222",
        (2, 3): b"2222",
        (3, 3): b"",
    }
    assert answers == 6
