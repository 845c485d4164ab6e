"""What PostgreSQL ends by itself, and how much of what was given up may be left in it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from shproto.errors import StreamHouseError, Unavailable
from shproto.v1 import coordinator_pb2 as pb
from shruntime.settings import SettingsError
from streamhouse_coordinator.adapters.migrate import MIGRATION_LOCK, available
from streamhouse_coordinator.adapters.postgres_transaction import PostgresTransaction
from streamhouse_coordinator.ports import Transaction
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService, build

from services.coordinator.tests.running import PATIENCE_S, running

pytestmark = pytest.mark.long

Settings = Callable[..., CoordinatorSettings]


@pytest.fixture
async def observer(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A second connection: a transaction sees who is connected as it was at its first look."""
    observer = await asyncpg.connect(dsn)
    yield observer
    await observer.close()


async def setting_in_transaction(service: CoordinatorService, name: str) -> str:
    async def show(tx: Transaction) -> str:
        assert isinstance(tx, PostgresTransaction)
        value: str = await tx._connection.fetchval("SELECT current_setting($1)", name)
        return value

    return await service.context.store.run(show)


@pytest.mark.parametrize("pooler", ["none", "transaction"])
async def test_the_server_has_limits_for_every_transaction(dsn: str, fast: Settings, pooler: str) -> None:
    settings = fast(dsn, pg_timeout_ms=10_000, pg_transaction_idle_ms=2_000, pg_pooler=pooler)
    async with running(settings) as service:
        expected = {
            "statement_timeout": "8s",
            "lock_timeout": "6s",
            "idle_in_transaction_session_timeout": "2s",
        }
        if pooler == "none":
            expected |= {"client_connection_check_interval": "1s"}
        found = {name: await setting_in_transaction(service, name) for name in expected}
        assert found == expected


async def test_a_connection_over_tcp_is_watched_by_the_server(tcp_dsn: str, fast: Settings) -> None:
    async with running(fast(tcp_dsn, pg_timeout_ms=10_000)) as service:
        expected = {
            "tcp_keepalives_idle": "10",
            "tcp_keepalives_interval": "5",
            "tcp_keepalives_count": "3",
            "tcp_user_timeout": "10000",
        }
        found = {name: await setting_in_transaction(service, name) for name in expected}
        assert found == expected


async def test_migrations_have_no_such_limits(dsn: str, fast: Settings, connection: asyncpg.Connection) -> None:
    """Neither ours nor those that an administrator has set for the user or the database."""
    database = await connection.fetchval("SELECT current_database()")
    for name in ("statement_timeout", "lock_timeout"):
        await connection.execute(f"ALTER DATABASE {database} SET {name} = '20ms'")
    await connection.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK)
    service = build(fast(dsn, pg_timeout_ms=1_000))
    starting = asyncio.create_task(service.start())
    waiting = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (first := await connection.fetchval(waiting)) is None:
                await asyncio.sleep(0.05)
        done, _ = await asyncio.wait([starting], timeout=2)  # beyond all these limits
        assert not done, "it waits for the other one's migrations"
        assert await connection.fetchval(waiting) == first, "and has not been ended for that"
        await connection.execute("SELECT pg_advisory_unlock($1)", MIGRATION_LOCK)
        async with asyncio.timeout(PATIENCE_S):
            await starting
        names = [row["name"] for row in await connection.fetch("SELECT name FROM migrations ORDER BY name")]
        assert names == list(available())
    finally:
        await service.stop()


async def test_a_transaction_whose_coordinator_says_nothing_is_ended(
    two_coordinators: tuple[CoordinatorService, CoordinatorService], dsn: str, fast: Settings
) -> None:
    """As one that is frozen between two statements, holding the position that all others wait for."""
    frozen = build(fast(dsn, pg_transaction_idle_ms=2_000))
    await frozen.start()
    holds = asyncio.Event()

    async def hold(tx: Transaction) -> None:
        assert isinstance(tx, PostgresTransaction)
        await tx._connection.execute("UPDATE event_position SET position = position")
        holds.set()
        await asyncio.Event().wait()

    holding = asyncio.create_task(frozen.context.store.run(hold))
    try:
        await holds.wait()
        async with asyncio.timeout(PATIENCE_S):
            await two_coordinators[0].api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
        assert not holding.done(), "it is still frozen"
    finally:
        holding.cancel()
        await asyncio.wait([holding])
        await frozen.stop()


# ---- statements that were given up

GIVEN_UP = 40
POOL_MAX = 3
OTHERS = 3
"""The connection that listens, and the test's own."""
CLOSING = 10
"""Connections that nobody uses any more, and whose processes the server has not ended yet."""


class Backends:
    """The most that were seen at once: connections in all, and those that wait for a lock."""

    def __init__(self, observer: asyncpg.Connection) -> None:
        self._observer = observer
        self.seen = self.waiting = 0

    async def look(self) -> None:
        counted = """SELECT count(*), count(*) FILTER (WHERE wait_event_type = 'Lock') FROM pg_stat_activity
            WHERE datname = current_database()"""
        seen, waiting = await self._observer.fetchrow(counted)
        self.seen, self.waiting = max(self.seen, seen), max(self.waiting, waiting)

    def have_not_piled_up(self) -> bool:
        return self.waiting <= POOL_MAX and self.seen <= POOL_MAX + OTHERS + CLOSING < GIVEN_UP // 2


async def test_statements_given_up_under_a_held_lock_do_not_pile_up(
    dsn: str, fast: Settings, connection: asyncpg.Connection, observer: asyncpg.Connection
) -> None:
    async with running(fast(dsn)) as patient:
        await patient.api.create_topic(pb.CreateTopicRequest(topic="before", partitions=1))
    settings = fast(dsn, pg_timeout_ms=200, pg_pool_max=POOL_MAX, session_sweep_interval_ms=150_000)
    async with running(settings) as service:
        backends = Backends(observer)
        async with connection.transaction():
            await connection.execute("LOCK TABLE topics IN ACCESS EXCLUSIVE MODE")
            for _ in range(GIVEN_UP):
                with pytest.raises(Unavailable):
                    await service.api.list_topics(pb.ListTopicsRequest())
                await backends.look()
        assert backends.have_not_piled_up(), vars(backends)
        answer = await until(lambda: service.api.list_topics(pb.ListTopicsRequest()))
        assert [topic.topic for topic in answer.topics] == ["before"]


async def test_calls_that_are_cancelled_under_a_held_lock_do_not_pile_up(
    dsn: str, fast: Settings, connection: asyncpg.Connection, observer: asyncpg.Connection
) -> None:
    """By callers that lose patience long before pg_timeout_ms; the connections are used again afterwards."""
    settings = fast(dsn, pg_timeout_ms=20_000, pg_pool_max=POOL_MAX, session_sweep_interval_ms=150_000)
    async with running(settings) as service:
        backends = Backends(observer)
        async with connection.transaction():
            await connection.execute("LOCK TABLE topics IN ACCESS EXCLUSIVE MODE")
            for _ in range(GIVEN_UP):
                call = asyncio.create_task(service.api.list_topics(pb.ListTopicsRequest()))
                await asyncio.wait([call], timeout=0.05)
                call.cancel()
                await asyncio.wait([call])
                await backends.look()
        assert backends.have_not_piled_up(), vars(backends)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(service.api.list_topics(pb.ListTopicsRequest()) for _ in range(2 * POOL_MAX)))


async def test_transactions_that_are_cancelled_at_any_step_leave_nothing_to_complain_of(
    coordinator: CoordinatorService, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncpg says so at ERROR where a connection goes back to the pool in a transaction: one that was cancelled in
    its BEGIN has begun by the time that is known."""

    async def nothing(tx: Transaction) -> None:
        await tx.now_ms()

    for steps in range(40):
        working = asyncio.create_task(coordinator.context.store.run(nothing))
        for _ in range(steps):
            await asyncio.sleep(0)
        working.cancel()
        await asyncio.wait([working])
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(coordinator.context.store.run(nothing) for _ in range(20)))
    assert not [item.getMessage() for item in caplog.records if item.levelno >= logging.ERROR]


async def until(call: Callable[[], Awaitable[Any]]) -> Any:
    """The answer of `call`, as soon as it has one."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await call()
            except StreamHouseError:
                await asyncio.sleep(0.05)


# ---- settings that do not fit together


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"session_ttl_ms": 8_000, "heartbeat_interval_ms": 2_600},
            r"session_ttl_ms \(8000\) is too short for",
        ),
        ({"session_ttl_ms": 20_000}, r"heartbeat_interval_ms = 20000 ms.* make that 26667 at least"),
        (
            {"pg_transaction_idle_ms": 7_000},
            r"session_ttl_ms \(30000\) is too short for pg_transaction_idle_ms \(7000\).*= 24000 ms.* make that 32000",
        ),
        (
            {"pg_timeout_ms": 12_000, "session_ttl_ms": 60_000},
            r"pg_timeout_ms \(12000\) must be below rpc_timeout_ms \(10000\)",
        ),
        ({"probe_timeout_ms": 10_000}, r"probe_timeout_ms \(10000\) must be below rpc_timeout_ms \(10000\)"),
        (
            {"session_sweep_interval_ms": 7_000, "group_session_timeout_ms": 30_000},
            r"session_sweep_interval_ms \(7000\) is too long for session_ttl_ms \(30000\).*= 31000 ms",
        ),
        (
            {"session_sweep_interval_ms": 3_000},
            r"session_sweep_interval_ms \(3000\) is too long for group_session_timeout_ms \(10000\).*= 12000 ms",
        ),
        (
            {"group_session_timeout_ms": 8_000},
            r"group_heartbeat_interval_ms \(3000\) must be at most a third of group_session_timeout_ms \(8000\)",
        ),
    ],
)
def test_settings_that_would_not_work_together_are_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        CoordinatorSettings.load({}, pg_dsn="postgresql://me:secret@host/db", **changes)
    assert "secret" not in str(caught.value)
    short = {"pg_timeout_ms": 1_800, "pg_transaction_idle_ms": 1_800, "heartbeat_interval_ms": 2_400}
    assert CoordinatorSettings.load({}, session_ttl_ms=8_000, **short)
