"""Many calls in flight against a real PostgreSQL: nobody who waits for a lock keeps the connections from the others."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from shproto.errors import AWAY, RENEWED, Overloaded, Unavailable
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService
from streamhouse_embedded.postgres import EmbeddedPostgres

from services.coordinator.tests.declared import declare
from services.coordinator.tests.running import frozen, running, until

pytestmark = pytest.mark.long

Settings = Callable[..., CoordinatorSettings]

CALLS = 40
POOL_MAX = 4
QUIET = {"session_sweep_interval_ms": 150_000, "pg_pool_max": POOL_MAX}
HANGS_S = 60
"""Of a call that must go through: the others wait for as long as the test wants."""


@pytest.fixture
async def quiet(dsn: str, fast: Settings) -> AsyncIterator[CoordinatorService]:
    """A coordinator with few connections, and nothing to do by itself."""
    async with running(fast(dsn, **QUIET)) as service:
        yield service


class Platform:
    """All that must go on whatever clients ask for: an agent, and a member of a group."""

    def __init__(self, service: CoordinatorService, agent: Any, make_segment: Any, member: pb.GroupAssignment) -> None:
        self._service = service
        self._agent = agent
        self._make_segment = make_segment
        self._member = member
        self._at = 0

    async def goes_on(self, *, groups: bool = True) -> None:
        """A heartbeat, a buffer that is announced, claimed and registered, and, unless the groups' tables are locked, a
        member's heartbeat. Raises TimeoutError."""
        api = self._service.api
        async with asyncio.timeout(HANGS_S):
            await self._agent.heartbeat()
            grant = (await self._agent.leads())[0]
            buffer_id = await self._agent.announce((grant, self._at, self._at + 1))
            claimed = await api.claim_buffer(pb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=60_000))
            assert claimed.buffer_id == buffer_id
            await api.renew_claim(pb.RenewClaimRequest(claim_id=claimed.claim_id, claim_ttl_ms=60_000))
            ref = self._make_segment(grant.topic_id, 0, grant.epoch, self._at, self._at + 1)
            await declare(api, [ref.object_key])
            request = pb.RegisterSegmentsRequest(buffer_id=buffer_id, segments=[ref])
            assert (await api.register_segments(request)).results == [pb.REGISTRATION_RESULT_REGISTERED]
            self._at += 1
            if groups:
                member = self._member
                speak = pb.HeartbeatGroupRequest(
                    group="g", member_id=member.member_id, generation=member.generation, owned=member.assigned
                )
                assert (await api.heartbeat_group(speak)).generation == member.generation


@pytest.fixture
async def platform(quiet: CoordinatorService, open_agent: Any, make_segment: Any) -> Platform:
    await quiet.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(quiet.api, "a")
    member = await quiet.api.join_group(pb.JoinGroupRequest(group="g", topics=["orders"]))
    return Platform(quiet, agent, make_segment, member)


@asynccontextmanager
async def held(dsn: str, statement: str, *values: object) -> AsyncIterator[None]:
    """Holds what the statement locks, as another coordinator would."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute(statement, *values)
            yield
    finally:
        await connection.close()


def lock(dsn: str, name: str) -> Any:
    return held(dsn, "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", name)


async def waiting_in_postgres(connection: asyncpg.Connection) -> int:
    count: int = await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return count


def create(service: CoordinatorService, nth: int) -> asyncio.Task[Any]:
    return asyncio.create_task(service.api.create_topic(pb.CreateTopicRequest(topic=f"t{nth:03}", partitions=1)))


def join(service: CoordinatorService, group: str) -> asyncio.Task[Any]:
    return asyncio.create_task(service.api.join_group(pb.JoinGroupRequest(group=group, topics=["orders"])))


async def blocked(connection: asyncpg.Connection, count: int) -> None:
    """Returns once `count` transactions wait for locks in PostgreSQL."""

    async def are_blocked() -> bool:
        return await waiting_in_postgres(connection) >= count

    await until(are_blocked)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["create", "join"])
async def test_calls_that_wait_for_one_lock_keep_one_connection(
    quiet: CoordinatorService, platform: Platform, connection: asyncpg.Connection, dsn: str, kind: str
) -> None:
    name = "cluster" if kind == "create" else "group/other"
    async with lock(dsn, name):
        calls = [create(quiet, nth) if kind == "create" else join(quiet, "other") for nth in range(CALLS)]
        await blocked(connection, 1)
        await platform.goes_on()
        await platform.goes_on()
        assert await waiting_in_postgres(connection) == 1
        assert not any(call.done() for call in calls)
    async with asyncio.timeout(HANGS_S):
        await asyncio.gather(*calls)


@pytest.mark.long
async def test_calls_that_wait_for_many_locks_keep_to_the_clients_share(
    quiet: CoordinatorService, platform: Platform, connection: asyncpg.Connection, dsn: str
) -> None:
    async with held(dsn, "LOCK TABLE group_members IN ACCESS EXCLUSIVE MODE"):
        calls = [join(quiet, f"g{nth}") for nth in range(CALLS)]
        await blocked(connection, POOL_MAX - 1)
        await platform.goes_on(groups=False)
        assert await waiting_in_postgres(connection) == POOL_MAX - 1
    async with asyncio.timeout(HANGS_S):
        await asyncio.gather(*calls)
        await platform.goes_on()


async def test_readers_keep_to_the_clients_share(
    quiet: CoordinatorService, platform: Platform, connection: asyncpg.Connection, dsn: str
) -> None:
    """Statements that take no lock of ours wait in the pool as well."""
    async with held(dsn, "LOCK TABLE group_offsets IN ACCESS EXCLUSIVE MODE"):
        calls = [
            asyncio.create_task(quiet.api.fetch_offsets(pb.FetchOffsetsRequest(group="nobody"))) for _ in range(CALLS)
        ] + [asyncio.create_task(quiet.api.list_groups(pb.ListGroupsRequest())) for _ in range(CALLS)]
        await blocked(connection, POOL_MAX - 1)
        await platform.goes_on()
    async with asyncio.timeout(HANGS_S):
        await asyncio.wait(calls)


async def test_the_platform_is_the_next_to_have_a_lock_that_clients_wait_for(
    quiet: CoordinatorService, platform: Platform, connection: asyncpg.Connection, dsn: str, open_agent: Any
) -> None:
    async with lock(dsn, "cluster"):
        calls = [create(quiet, nth) for nth in range(10)]
        await blocked(connection, 1)
        opening = asyncio.create_task(open_agent(quiet.api, "b"))
        await platform.goes_on()
    async with asyncio.timeout(HANGS_S):
        await asyncio.gather(opening, *calls)
    created = "SELECT position FROM events WHERE type = 'TopicCreated' AND payload LIKE '%\"t0%' ORDER BY position"
    positions = [row["position"] for row in await connection.fetch(created)]
    opened = await connection.fetchval("SELECT max(position) FROM events WHERE type = 'SessionOpened'")
    assert len(positions) == 10
    assert sum(position < opened for position in positions) == 1, "the one that stood first for the lock already"


async def test_topics_are_created_in_the_order_of_the_calls(
    quiet: CoordinatorService, platform: Platform, connection: asyncpg.Connection, dsn: str
) -> None:
    async with lock(dsn, "cluster"):
        calls = []
        for nth in range(12):
            calls.append(create(quiet, nth))
            await asyncio.sleep(0)
        await blocked(connection, 1)
    async with asyncio.timeout(HANGS_S):
        topics = [info.topic_id.hex() for info in await asyncio.gather(*calls)]
    rows = await connection.fetch("SELECT stream_id FROM events WHERE type = 'TopicCreated' ORDER BY position")
    assert [row["stream_id"].rpartition("/")[2] for row in rows][1:] == topics


async def test_waiters_that_are_cancelled_leave_nothing_behind(
    quiet: CoordinatorService, platform: Platform, connection: asyncpg.Connection, dsn: str
) -> None:
    async with lock(dsn, "cluster"):
        calls = [create(quiet, nth) for nth in range(CALLS)]
        await blocked(connection, 1)
        for call in calls[: CALLS // 2]:  # the first of them has a connection
            call.cancel()
        await asyncio.wait(calls[: CALLS // 2])
        await platform.goes_on()
    async with asyncio.timeout(HANGS_S):
        await asyncio.gather(*calls[CALLS // 2 :])
        await create(quiet, CALLS)
    names = {info.topic for info in (await quiet.api.list_topics(pb.ListTopicsRequest())).topics}
    assert names == {"orders", *(f"t{nth:03}" for nth in range(CALLS // 2, CALLS + 1))}

    async def nothing_is_left() -> bool:
        left = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
        return not await connection.fetchval(left) and not await connection.fetchval(idle)

    await until(nothing_is_left)


async def test_a_storm_is_answered_ok_or_overloaded_and_leases_go_on(
    dsn: str, fast: Settings, connection: asyncpg.Connection, open_agent: Any
) -> None:
    """The lock is held for longer than a call waits: each is told to come back, and none that PostgreSQL is away."""
    settings = fast(dsn, pg_timeout_ms=5_000, **QUIET)
    async with running(settings) as service:
        agent = await open_agent(service.api, "a")
        async with lock(dsn, "cluster"):
            calls = [create(service, nth) for nth in range(CALLS)]
            await blocked(connection, 1)
            full = pb.HeartbeatRequest(session_token=agent.session.session_token, log_full=True)
            with pytest.raises(Overloaded) as caught:
                await service.api.heartbeat(full)
            assert caught.value.details["lease"] == RENEWED
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(answer) for answer in answers} == {Overloaded}, answers
            assert all(isinstance(answer, Overloaded) and answer.retry_after_ms > 0 for answer in answers)
            await agent.heartbeat()
        async with asyncio.timeout(HANGS_S):
            await create(service, 0)  # nothing of it had begun
        assert (await service.api.heartbeat(full)).ttl_ms == settings.session_ttl_ms


@pytest.mark.smoke
async def test_more_than_may_wait_are_refused_at_once(dsn: str, fast: Settings, connection: asyncpg.Connection) -> None:
    async with running(fast(dsn, pg_lock_waiting_max=5, **QUIET)) as service:
        async with lock(dsn, "cluster"):
            calls = [create(service, nth) for nth in range(CALLS)]
            refused, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            assert len(waiting) == 6  # one of them has the turn
            assert {type(call.exception()) for call in refused} == {Overloaded}
        async with asyncio.timeout(HANGS_S):
            await asyncio.gather(*waiting)


async def test_waiters_behind_a_frozen_postgres_are_told_that_it_is_away(
    postgres: EmbeddedPostgres, dsn: str, fast: Settings, open_agent: Any
) -> None:
    """Though they wait in a line: agents go on with their leases only if they are told so."""
    async with running(fast(dsn, pg_timeout_ms=3_000, **QUIET)) as service:
        agent = await open_agent(service.api, "a")
        with frozen(postgres):
            with pytest.raises(Unavailable):
                await agent.heartbeat()  # by its end, whatever the server said before it stood still is read
            calls = [asyncio.create_task(agent.heartbeat()) for _ in range(CALLS)] + [create(service, 0)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(answer) for answer in answers} == {Unavailable}, answers
        assert all(isinstance(answer, Unavailable) and answer.details["database"] == AWAY for answer in answers)
