"""Nemeses of the servers beside the object store: PostgreSQL, RabbitMQ, Redis."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import asyncpg

from tests.faults.fleet import Fleet, in_thread
from tests.faults.nemesis import LONG_HOLD_S, Busy, Deed, NotPossible, all_of, by_turns, nemesis
from tests.faults.postgres_proxy import AT_CONNECT, ERRORS
from tests.integration import small_disk
from tests.integration.standby import PostgresPair

log = logging.getLogger(__name__)

NO_SPACE = "No space left on device"
OUTSIDER_TIMEOUT_S = 5
TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename"


@asynccontextmanager
async def outage(fleet: Fleet, name: str, stop: Callable[[], None], what: str) -> AsyncIterator[Deed]:
    with all_of(fleet, [name]):
        await in_thread(stop)
        try:
            yield Deed(f"{name} {what}")
        finally:
            await in_thread(fleet.servers[name].start)


@nemesis("postgres-kill")
async def postgres_kill(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """PostgreSQL dies at once, and recovers when it is started again."""
    async with outage(fleet, "postgres", fleet.servers["postgres"].kill, "is killed") as deed:
        yield deed


@nemesis("postgres-restart")
async def postgres_restart(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """PostgreSQL is stopped in order, and started again."""
    async with outage(fleet, "postgres", fleet.servers["postgres"].stop, "is stopped") as deed:
        yield deed


@nemesis("postgres-failover")
async def postgres_failover(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """PostgreSQL gets a synchronous standby, and dies; the standby takes its place, at another port.

    The next time it is the other way round.
    """
    server = fleet.servers["postgres"]
    assert isinstance(server, PostgresPair)
    with all_of(fleet, ["postgres"]):
        await in_thread(server.attach_standby)
        server.kill()
        try:
            yield Deed("postgres is killed, to be replaced by its standby")
        finally:
            await in_thread(server.start)


@nemesis("postgres-errors")
async def postgres_errors(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """PostgreSQL answers a part of the statements, or of the connections, with an error, and does nothing."""
    errors = fleet.postgres_errors
    sqlstate = by_turns(fleet, rng, "postgres-errors", sorted(ERRORS))
    share = rng.choice((1.0, rng.uniform(0.05, 0.5)))
    with all_of(fleet, ["postgres-answers"]):
        before = errors.touched[sqlstate]
        errors.begin(sqlstate, share=share, seed=rng.getrandbits(32))
        what = "connections" if sqlstate == AT_CONNECT else "statements"
        deed = Deed(f"postgres answers {share:.0%} of the {what} with {sqlstate}, {ERRORS[sqlstate]}")
        try:
            yield deed
        finally:
            errors.heal()
            deed.effect = f"{errors.touched[sqlstate] - before} {what} hit"


@nemesis("postgres-disk-full", hold_s=(6.0, 18.0))
async def postgres_disk_full(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """PostgreSQL's disk has no byte left; in every other turn PostgreSQL ends by that.

    A table cannot grow then, but the log goes on in the files that it has kept: that has an end in every other turn.
    PostgreSQL is started again once there is room.
    """
    server = fleet.servers["postgres"]
    assert isinstance(server, PostgresPair)
    if server.disk is None:
        raise NotPossible("this machine does not allow to mount a tmpfs; postgres-errors plays 53100 all the same")
    with all_of(fleet, ["postgres"]):
        filler = server.disk / "filler"
        before = server.log_lines(NO_SPACE)
        is_log_full = by_turns(fleet, rng, "postgres-disk-full", (False, True))
        deed = Deed(f"the disk of postgres is full{', and its log at the end of a file' if is_log_full else ''}")
        try:
            await in_thread(small_disk.fill, filler)
            if is_log_full:
                await _switch_log(server.url)
            yield deed
        finally:
            filler.unlink(missing_ok=True)
            deed.effect = f"it said {server.log_lines(NO_SPACE) - before} times: {NO_SPACE}"
            await in_thread(server.start_unless_it_answers)


async def _switch_log(dsn: str) -> None:
    """Until it needs a file that it does not keep in reserve, and ends."""
    try:
        async with asyncio.timeout(OUTSIDER_TIMEOUT_S):
            outsider = await asyncpg.connect(dsn)
            try:
                while True:
                    await outsider.execute("SELECT pg_switch_wal(), pg_logical_emit_message(false, '', '')")
            finally:
                outsider.terminate()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        log.info("PostgreSQL's log is full: %s", error)


LOCKS = (
    "LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE",
    "LOCK TABLE {table} IN SHARE MODE",
    "SELECT 1 FROM {table} FOR UPDATE",
)
"""As a migration holds them, a CREATE INDEX, and somebody who forgot to commit."""


@nemesis("postgres-locks", hold_s=LONG_HOLD_S)
async def postgres_locks(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """Somebody else's transaction holds locks that ours wait for, and is idle."""
    with all_of(fleet, ["postgres"]):
        outsider = await asyncpg.connect(fleet.servers["postgres"].url, timeout=OUTSIDER_TIMEOUT_S)
        try:
            tables = [row["tablename"] for row in await outsider.fetch(TABLES)]
            statement = by_turns(fleet, rng, "postgres-locks", LOCKS).format(table=rng.choice(tables))
            await outsider.execute(f"SET lock_timeout = '{OUTSIDER_TIMEOUT_S} s'; BEGIN; {statement}")
            deed = Deed(f"an outsider's transaction holds {statement}")
            yield deed
            waiting = await outsider.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
            deed.effect = f"{waiting} locks were waited for in the end"
        except asyncpg.LockNotAvailableError as error:
            raise Busy(f"no lock within {OUTSIDER_TIMEOUT_S} s: others were at it all the time") from error
        finally:
            outsider.terminate()


@nemesis("rabbitmq")
async def rabbitmq(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """RabbitMQ is stopped or killed, and started again."""
    server = fleet.servers["rabbitmq"]
    async with outage(fleet, "rabbitmq", rng.choice((server.stop, server.kill)), "is away") as deed:
        yield deed


@nemesis("redis")
async def redis(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """Redis is stopped or killed, and started again."""
    server = fleet.servers["redis"]
    async with outage(fleet, "redis", rng.choice((server.stop, server.kill)), "is away") as deed:
        yield deed
