"""PostgreSQL late, away, frozen and back; migrations; projections rebuilt from the events."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from shproto.errors import InvalidArgument, Unavailable
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.adapters.migrate import MIGRATION_LOCK, DatabaseTooNew, available
from streamhouse_coordinator.core.tables import PROJECTIONS
from streamhouse_coordinator.wiring import CoordinatorService, build
from streamhouse_embedded.postgres import EmbeddedPostgres

from services.coordinator.tests.declared import declare
from services.coordinator.tests.running import frozen, running

pytestmark = pytest.mark.long

Settings = Callable[..., Any]

# Until something that must come is given up: no duration is what is tested here, and the machine may be busy.
PATIENCE_S = 120


async def crash(postgres: EmbeddedPostgres) -> None:
    """Of all its processes at once: what was not written down by then is gone. After a kill of the first one the others
    may still finish what they are at."""
    assert postgres.pid is not None
    os.kill(postgres.pid, signal.SIGQUIT)
    while postgres.pid is not None:
        await asyncio.sleep(0.005)
    postgres.kill()


async def until(attempt: Callable[[], Awaitable[Any]], seconds: float = PATIENCE_S) -> Any:
    """The answer, as soon as there is one."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                return await attempt()
            except Unavailable:
                await asyncio.sleep(0.05)


async def dump(dsn: str) -> dict[str, list[tuple[Any, ...]]]:
    connection = await asyncpg.connect(dsn)
    try:
        return {
            table.name: sorted(
                (tuple(row) for row in await connection.fetch(f"SELECT * FROM {table.name}")), key=lambda row: repr(row)
            )
            for table in PROJECTIONS
        }
    finally:
        await connection.close()


async def busy_history(service: CoordinatorService, open_agent: Any) -> None:
    """A bit of everything that makes events."""
    api = service.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=3, retention_bytes=350))
    await api.create_topic(pb.CreateTopicRequest(topic="gone", partitions=2, min_acks=3))
    one = await open_agent(api, "a")
    for partition in range(2):
        grant = [g for g in await one.grants() if g.topic == "orders"][partition]
        for number in range(5):
            await one.write(grant, 10 * number, 10 * number + 10)
    await api.apply_retention(pb.ApplyRetentionRequest())
    ask = pb.ClaimCompactionRequest(
        worker_id="w", claim_ttl_ms=9999, small_bytes_max=101, target_bytes=999, segments_min=2
    )
    claim = await api.claim_compaction(ask)
    new = claim.segments[0]
    new_ids = [item.segment_id for item in claim.segments]
    new.end_offset, new.record_count = claim.segments[-1].end_offset, sum(s.record_count for s in claim.segments)
    new.segment_id = "00000000-0000-0000-0000-000000000001"
    await declare(api, [new.object_key])
    await api.register_compaction(
        pb.RegisterCompactionRequest(claim_id=claim.claim_id, replaced_segment_ids=new_ids, segment=new)
    )
    two = await open_agent(api, "b")
    moving = [g for g in await one.grants() if g.status == "moving"]
    assert moving
    await one.settle(*((grant, grant.registered_end) for grant in moving))
    await one.heartbeat(
        pb.RangeUse(topic_id=grant.topic_id, partition=grant.partition, epoch=grant.epoch, next_offset=1000)
    )
    await one.announce((grant, 50, 60))
    await api.join_group(pb.JoinGroupRequest(group="g", topics=["orders", "gone"]))
    left = await api.join_group(pb.JoinGroupRequest(group="g", topics=["orders"], client_id="x"))
    await api.leave_group(pb.LeaveGroupRequest(group="g", member_id=left.member_id))
    await two.close()
    await one.open()
    grant = next(grant for grant in await one.grants() if grant.topic == "orders")
    await one.announce((grant, grant.registered_end, grant.registered_end + 5))
    await api.delete_topic(pb.DeleteTopicRequest(topic="gone"))


@pytest.mark.smoke
async def test_rebuilding_gives_the_same_rows(dsn: str, coordinator: CoordinatorService, open_agent: Any) -> None:
    """The projections are what the events say, and nothing else."""
    await busy_history(coordinator, open_agent)
    before = await dump(dsn)
    assert all(before[name] for name in ("topics", "partitions", "ranges", "sessions", "segments", "groups"))
    await coordinator.context.store.rebuild()
    assert await dump(dsn) == before


async def test_positions_and_versions_are_gapless(coordinator: CoordinatorService, open_agent: Any, dsn: str) -> None:
    await busy_history(coordinator, open_agent)
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch("SELECT position, stream_id, version FROM events ORDER BY position")
    await connection.close()
    assert [row["position"] for row in rows] == list(range(1, len(rows) + 1))
    versions: dict[str, list[int]] = {}
    for row in rows:
        versions.setdefault(row["stream_id"], []).append(row["version"])
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in versions.values())


async def test_followers_see_every_event_once_in_order_through_any_coordinator(
    two_coordinators: tuple[CoordinatorService, CoordinatorService],
) -> None:
    apis = [service.api for service in two_coordinators]

    async def follow(api: Any) -> list[int]:
        seen = []
        async for event in api.follow_events(pb.FollowEventsRequest(after_position=0, types=["TopicCreated"])):
            seen.append(event.position)
            if len(seen) == 20:
                return seen
        return seen

    followers = [asyncio.create_task(follow(api)) for api in apis]
    requests = [pb.CreateTopicRequest(topic=f"t{number}", partitions=1) for number in range(20)]
    await asyncio.gather(*(apis[number % 2].create_topic(request) for number, request in enumerate(requests)))
    async with asyncio.timeout(PATIENCE_S):
        assert [await follower for follower in followers] == [list(range(1, 21))] * 2
    late = await follow(apis[0])
    assert late == list(range(1, 21))
    with pytest.raises(InvalidArgument):
        await anext(apis[0].follow_events(pb.FollowEventsRequest(after_position=21)))


async def test_followers_behind_the_cache_read_from_the_database(dsn: str, fast: Settings) -> None:
    async with running(fast(dsn, events_cached=5, events_batch=3)) as service:
        for number in range(12):
            await service.api.create_topic(pb.CreateTopicRequest(topic=f"t{number}", partitions=1))
        stream = service.api.follow_events(pb.FollowEventsRequest(after_position=2))
        seen = [(await anext(stream)).position for _ in range(10)]
        await stream.aclose()
        assert seen == list(range(3, 13))


async def test_a_coordinator_that_starts_while_postgres_is_slow_waits(
    dsn: str, fast: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond pg_timeout_ms, first for its migrations, then for its session."""
    service = build(fast(dsn, pg_timeout_ms=200))
    blocker = await asyncpg.connect(dsn)
    try:
        await blocker.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK)
        starting = asyncio.create_task(service.start())
        assert not (await asyncio.wait([starting], timeout=0.5))[0]
        await blocker.execute("SELECT pg_advisory_unlock($1)", MIGRATION_LOCK)
        async with asyncio.timeout(PATIENCE_S):
            await starting
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE")
            opening = asyncio.create_task(service.open_session("127.0.0.1:1"))
            async with asyncio.timeout(PATIENCE_S):
                while sum("no session: " in line for line in caplog.messages) < 2:
                    await asyncio.sleep(0.02)
            assert not opening.done()
        async with asyncio.timeout(PATIENCE_S):
            await opening
        status = await until(lambda: service.api.get_status(pb.GetStatusRequest()))
        assert [(row.role, row.address) for row in status.sessions] == [("coordinator", "127.0.0.1:1")]
    finally:
        await blocker.close()
        await service.stop()


@pytest.mark.smoke
async def test_postgres_restarts_in_between(
    postgres: EmbeddedPostgres, dsn: str, coordinator: CoordinatorService, open_agent: Any
) -> None:
    api = coordinator.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(api, "a")
    stream = api.follow_events(pb.FollowEventsRequest(after_position=3))
    coming = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.1)  # it is caught up and waits
    postgres.kill()
    with pytest.raises(Unavailable, match="PostgreSQL"):
        await agent.heartbeat()
    with pytest.raises(Unavailable):
        await api.create_topic(pb.CreateTopicRequest(topic="other", partitions=1))
    await postgres.start()
    await until(lambda: api.create_topic(pb.CreateTopicRequest(topic="other", partitions=1)))
    async with asyncio.timeout(PATIENCE_S):
        assert (await coming).type == "TopicCreated", "the follower's stream goes on"
    await stream.aclose()


async def test_no_producer_id_is_given_out_twice_over_a_crash(
    postgres: EmbeddedPostgres, coordinator: CoordinatorService, dsn: str, change_rows: Callable[..., Any]
) -> None:
    """PostgreSQL writes down 32 numbers of a sequence at a time: who gets the second has to wait for that, too."""
    # Each flush takes 100 ms, as on a slow disk.
    database = dsn.split("?")[0].rsplit("/", 1)[1]
    for setting in ("commit_delay = 100000", "commit_siblings = 0"):
        await change_rows(f"ALTER DATABASE {database} SET {setting}")
    await coordinator.context.store.close()
    await coordinator.context.store.open()
    await asyncio.gather(*(coordinator.context.store.head() for _ in range(8)))  # so many connections
    asking = [asyncio.create_task(coordinator.api.init_producer(pb.InitProducerRequest())) for _ in range(8)]
    given, rest = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    await crash(postgres)
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    await postgres.start()
    first = await until(lambda: coordinator.api.init_producer(pb.InitProducerRequest()))
    assert first.producer_id > max(task.result().producer_id for task in given)


async def test_notifications_work_again_after_a_restart(postgres: EmbeddedPostgres, dsn: str, fast: Settings) -> None:
    """With a minute between polls, an event that arrives at all was announced by PostgreSQL."""
    async with running(fast(dsn, events_poll_interval_ms=60_000)) as service:
        api = service.api
        postgres.kill()
        with pytest.raises(Unavailable):
            await api.list_topics(pb.ListTopicsRequest())
        await postgres.start()
        await until(lambda: api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1)))
        async with asyncio.timeout(PATIENCE_S):
            stream = api.follow_events(pb.FollowEventsRequest(after_position=0))
            assert (await anext(stream)).type == "TopicCreated"
            for number in range(3):
                coming = asyncio.create_task(anext(stream))
                await api.create_topic(pb.CreateTopicRequest(topic=f"t{number}", partitions=1))
                assert f'"t{number}"' in (await coming).payload_json
            await stream.aclose()


async def test_leases_do_not_run_out_while_nobody_can_renew_them(
    dsn: str, fast: Settings, open_agent: Any, all_events: Any
) -> None:
    """The rows are put as they are after PostgreSQL was away for longer than any lease lasts: last swept long ago."""
    settings = fast(dsn)
    connection = await asyncpg.connect(dsn)

    async def swept(after_ms: int) -> int:
        async with asyncio.timeout(PATIENCE_S):
            while (last_ms := await connection.fetchval("SELECT max(last_ms) FROM sweeps") or 0) <= after_ms:
                await asyncio.sleep(0.02)
            return int(last_ms)

    async with running(settings) as service:
        api = service.api
        await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
        agent = await open_agent(api, "a")
        member = await api.join_group(pb.JoinGroupRequest(group="g", topics=["orders"]))
        before_ms = await swept(0)
        async with connection.transaction():
            # Between two sweeps: one would have read the first row as it was, and the others as they are then.
            await connection.execute("LOCK TABLE sweeps IN ACCESS EXCLUSIVE MODE")
            await connection.execute("UPDATE sweeps SET last_ms = last_ms - 1200000")
            await connection.execute("UPDATE session_leases SET expires_ms = expires_ms - 1200000")
            await connection.execute("UPDATE group_member_state SET expires_ms = expires_ms - 1200000")
        await swept(before_ms)
        await agent.heartbeat()
        speak = pb.HeartbeatGroupRequest(group="g", member_id=member.member_id, generation=1, owned=member.assigned)
        assert (await api.heartbeat_group(speak)).generation == 1
        assert not await all_events(api, "SessionClosed", "GroupMemberLeft")
        async with connection.transaction():  # swept all the time, and nobody spoke
            await connection.execute("UPDATE session_leases SET expires_ms = 0")
            await connection.execute("UPDATE group_member_state SET expires_ms = 0")
        async with asyncio.timeout(PATIENCE_S):
            while not await all_events(api, "SessionClosed"):
                await asyncio.sleep(0.05)
            while not await all_events(api, "GroupMemberLeft"):
                await asyncio.sleep(0.05)
    await connection.close()


async def test_a_frozen_postgres_answers_unavailable_in_time(
    postgres: EmbeddedPostgres, dsn: str, fast: Settings
) -> None:
    async with running(fast(dsn, pg_timeout_ms=1_000)) as service:
        with frozen(postgres):
            async with asyncio.timeout(PATIENCE_S):  # without a deadline of its own it would wait for ever
                with pytest.raises(Unavailable):
                    await service.api.list_topics(pb.ListTopicsRequest())
        await until(lambda: service.api.list_topics(pb.ListTopicsRequest()))


async def test_it_waits_for_postgres_at_the_start(postgres: EmbeddedPostgres, dsn: str, fast: Settings) -> None:
    await postgres.stop()
    service = build(fast(dsn))
    starting = asyncio.create_task(service.start())
    try:
        with pytest.raises(Unavailable):
            await service.api.list_topics(pb.ListTopicsRequest())
        await asyncio.sleep(0.3)
        assert not starting.done()
    finally:
        await postgres.start()
    await asyncio.wait_for(starting, PATIENCE_S)
    assert list((await service.api.list_topics(pb.ListTopicsRequest())).topics) == []
    await service.stop()


async def test_a_cancelled_command_is_cancelled_and_leaves_nothing_half_done(coordinator: CoordinatorService) -> None:
    store, api = coordinator.context.store, coordinator.api

    async def endless(tx: Any) -> None:
        while True:
            await tx.position()

    for number in range(100):
        commands = [asyncio.create_task(store.run(endless)), asyncio.create_task(_create(api, f"t{number}"))]
        await asyncio.sleep(0.001 * (number % 13))
        for command in commands:
            command.cancel()
        outcomes = await asyncio.gather(*commands, return_exceptions=True)
        assert isinstance(outcomes[0], asyncio.CancelledError), "not turned into another error"
    topics = (await api.list_topics(pb.ListTopicsRequest())).topics
    for topic in topics:
        described = await api.describe_topic(pb.DescribeTopicRequest(topic=topic.topic))
        assert len(described.partitions) == 50


async def _create(api: Any, name: str) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic=name, partitions=50))


async def test_two_coordinators_migrate_an_empty_database_at_once(dsn: str, fast: Settings) -> None:
    async with running(fast(dsn)) as one, running(fast(dsn)) as two:
        await asyncio.gather(*(service.api.list_topics(pb.ListTopicsRequest()) for service in (one, two)))
    connection = await asyncpg.connect(dsn)
    assert [row["name"] for row in await connection.fetch("SELECT name FROM migrations")] == list(available())
    await connection.execute("INSERT INTO migrations (name) VALUES ('9999_future')")
    await connection.close()
    with pytest.raises(DatabaseTooNew):
        await build(fast(dsn)).start()


async def test_migrations_that_cannot_go_on_are_given_up_and_tried_again(
    dsn: str, fast: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else holds the lock and never gives it back."""
    async with running(fast(dsn)):
        """Migrates, which may take longer than the limit on a busy machine."""
    holder = await asyncpg.connect(dsn)
    await holder.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK)
    service = build(fast(dsn, pg_migration_timeout_ms=2_000))
    starting = asyncio.create_task(service.start())
    async with asyncio.timeout(PATIENCE_S):
        while caplog.text.count("was not migrated within pg_migration_timeout_ms (2000 ms)") < 2:
            await asyncio.sleep(0.02)
    with pytest.raises(Unavailable):
        await service.api.list_topics(pb.ListTopicsRequest())
    await holder.close()
    async with asyncio.timeout(PATIENCE_S):
        await starting
    assert not (await service.api.list_topics(pb.ListTopicsRequest())).topics
    await service.stop()
