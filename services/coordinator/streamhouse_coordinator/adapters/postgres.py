"""The store in PostgreSQL (asyncpg): connections, transactions and their repetition.

Every statement has a deadline; a connection that broke or was given up on is closed, never reused. Conflicts with
other transactions are retried, everything else that is the database's absence becomes Unavailable.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg
from opentelemetry import metrics
from shproto.errors import AWAY, InvalidArgument, Overloaded, StreamHouseError, Unavailable
from shproto.events import event_from_json
from shruntime.settings import PREFIX, SettingsError
from shruntime.urls import masked

from streamhouse_coordinator.adapters.migrate import migrate
from streamhouse_coordinator.adapters.postgres_errors import ABSENT, CONFLICTS, UNUSABLE_DSN, unavailable
from streamhouse_coordinator.adapters.postgres_hosts import Hosts
from streamhouse_coordinator.adapters.postgres_transaction import NOW_MS, PostgresTransaction
from streamhouse_coordinator.core.histories import Head
from streamhouse_coordinator.core.projection import row_ops
from streamhouse_coordinator.core.tables import EVENTS, PROJECTIONS, EventRow, lock_rank
from streamhouse_coordinator.ports import Above, In, Transaction, Where, where

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
RowT = TypeVar("RowT")

# How often a transaction that met another's changes is run again before the caller is told to come back: with a wait of
# up to 2, 4, 8 ... ms in between, two coordinators racing for the same rows need one or two.
CONFLICT_ATTEMPTS = 10
REBUILD_BATCH = 1000

_meter = metrics.get_meter("streamhouse.coordinator")
_conflicts = _meter.create_counter(
    "streamhouse_coordinator_conflicts_total", description="transactions run again after a conflict with another"
)
_duration = _meter.create_histogram(
    "streamhouse_coordinator_transaction_duration_ms", description="from asking for a connection to commit"
)


class PostgresStore:
    """Implements ports.Store. `open` must have succeeded before anything but Unavailable comes back."""

    def __init__(self, dsn: str, *, pool_max: int, timeout_ms: int, migration_timeout_ms: int) -> None:
        self._dsn = dsn
        self._hosts = Hosts(dsn)
        self._pool_max = pool_max
        self._timeout_s = timeout_ms / 1000
        self._migration_timeout_ms = migration_timeout_ms
        self._pool: Any = None
        # Snapshots hold a connection for as long as their reader takes: some must stay for everybody else.
        self._snapshots = asyncio.Semaphore(max(1, pool_max // 4))
        self._rng = random.Random()

    async def open(self) -> None:
        """Connects and migrates. Raises Unavailable when there is no database, DatabaseTooNew when it is not ours,
        SettingsError when no database could ever be reached with this DSN."""
        try:
            await self._migrate(await self._first_connection())
            self._pool = await asyncpg.create_pool(
                min_size=0,
                max_size=self._pool_max,
                command_timeout=self._timeout_s,
                reset=_keep,
                connect=self._open_for_pool,
            )
        except ABSENT as error:
            raise unavailable(error) from error

    async def _migrate(self, connection: Any) -> None:
        """A migration takes longer than a statement, and may have to wait for another coordinator's."""
        limit_ms = self._migration_timeout_ms
        deadline = asyncio.timeout(limit_ms / 1000)
        try:
            async with deadline:
                for name in await migrate(connection):
                    log.info("migrated the database: %s", name)
                await _warn_without_checksums(connection)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise Unavailable(
                f"the database was not migrated within pg_migration_timeout_ms ({limit_ms} ms): it is slow, its tables "
                "are locked, or another coordinator migrates it",
                retry_after_ms=1000,
                database=AWAY,
            ) from error
        finally:
            await self._close_first(connection)

    async def _close_first(self, connection: Any) -> None:
        """Whatever state it is in: a server that does not answer must not hide what went wrong before."""
        try:
            await connection.close(timeout=self._timeout_s)
        except ABSENT as error:
            log.info("closing the connection that migrated: %s", error)
            connection.terminate()

    async def _first_connection(self) -> Any:
        try:
            return await self.connect()
        except UNUSABLE_DSN as error:
            raise self._unusable(str(error)) from error
        except OSError:
            raise  # some of ssl's are ValueErrors as well
        except ValueError as error:  # while parsing: its text may be a part of the password
            raise self._unusable("cannot be parsed") from error

    def _unusable(self, what: str) -> SettingsError:
        return SettingsError(f"pg_dsn ({PREFIX}PG_DSN): {masked(self._dsn)!r}: {what}")

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                await asyncio.wait_for(pool.close(), self._timeout_s)
            except TimeoutError:
                pool.terminate()

    async def connect(self) -> Any:
        """A connection outside the pool, for the caller to close."""
        return await self._hosts.connect(timeout_s=self._timeout_s)

    async def _open_for_pool(self, _dsn: str | None, **options: Any) -> Any:
        return await self._hosts.connect(timeout_s=self._timeout_s, **options)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        """A pooled connection. Whatever leaves it in doubt (cancelled, timed out, broken) closes it."""
        pool = self._pool
        if pool is None:
            raise Unavailable("not connected to PostgreSQL yet", retry_after_ms=1000, database=AWAY)
        connection = await pool.acquire(timeout=self._timeout_s)
        try:
            yield connection
        except asyncpg.DataError as error:  # text with a NUL, a number beyond int8: no command of ours makes these
            raise InvalidArgument(f"a value cannot be stored: {error}", field="request") from error
        except asyncpg.ReadOnlySQLTransactionError:  # behind a proxy's address, another server may be the primary now
            _discard(connection)
            raise
        except (StreamHouseError, asyncpg.PostgresError):
            raise
        except BaseException:
            _discard(connection)
            raise
        finally:
            await pool.release(connection)

    async def _guarded(self, work: Callable[[Any], Awaitable[ResultT]]) -> ResultT:
        """Runs `work` with a connection, and again after conflicts."""
        started = time.perf_counter()
        try:
            for attempt in range(CONFLICT_ATTEMPTS):
                try:
                    async with self._connection() as connection:
                        result = await work(connection)
                    _duration.record((time.perf_counter() - started) * 1000)
                    return result
                except CONFLICTS as error:
                    _conflicts.add(1)
                    log.debug("conflict, attempt %d: %s", attempt, error)
                    await asyncio.sleep(self._rng.uniform(0, 0.002 * 2**attempt))
        except ABSENT as error:
            raise unavailable(error) from error
        raise Overloaded("too many commands at once change the same rows; try again", retry_after_ms=100)

    async def run(self, work: Callable[[Transaction], Awaitable[ResultT]]) -> ResultT:
        async def once(connection: Any) -> ResultT:
            async with _transaction(connection):
                transaction = PostgresTransaction(connection)
                result = await work(transaction)
                await transaction.finish()
                return result

        return await self._guarded(once)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Transaction]:
        try:
            async with (
                self._snapshots,
                self._connection() as connection,
                _transaction(connection, isolation="repeatable_read", readonly=True),
            ):
                yield PostgresTransaction(connection)
        except ABSENT as error:
            raise unavailable(error) from error

    async def renew_session(self, session_id: str, ttl_ms: int) -> int | None:
        text = f"UPDATE session_leases SET expires_ms = {NOW_MS} + $2 WHERE session_id = $1 RETURNING grants_version"
        return await self._guarded(lambda connection: connection.fetchval(text, session_id, ttl_ms))

    async def renew_member(self, group: str, member_id: str, generation: int, owned: str) -> int | None:
        text = f"""UPDATE group_member_state s SET expires_ms = {NOW_MS} + m.session_timeout_ms
            FROM groups g, group_members m
            WHERE s.group_name = $1 AND s.member_id = $2 AND s.complete AND s.owned = $4
            AND g.group_name = s.group_name AND g.generation = $3
            AND m.group_name = s.group_name AND m.member_id = s.member_id
            RETURNING m.session_timeout_ms"""
        return await self._guarded(lambda connection: connection.fetchval(text, group, member_id, generation, owned))

    async def next_producer_id(self) -> int:
        """Never given out again. PostgreSQL writes 32 numbers of a sequence down at once, and who gets one of the other
        31 would not wait until that is flushed, or with a standby: after a crash it would come again. So each call
        writes something of its own, and its commit waits for all that was written before."""
        text = "SELECT nextval('producer_ids') FROM pg_logical_emit_message(true, 'streamhouse', '')"
        number: int = await self._guarded(lambda connection: connection.fetchval(text))
        return number

    async def read_events(self, after_position: int, limit: int, types: Sequence[str] = ()) -> list[EventRow]:
        async def read(connection: Any) -> list[EventRow]:
            equals = {"position": Above(after_position)} | ({"type": In(types)} if types else {})
            return await PostgresTransaction(connection).select(EVENTS, Where(equals), order=("position",), limit=limit)

        return await self._guarded(read)

    async def head(self) -> Head:
        text = """SELECT (SELECT history_id FROM histories ORDER BY nth DESC LIMIT 1),
            (SELECT position FROM event_position), (SELECT coalesce(max(position), 0) FROM forks)"""
        return Head(*await self._guarded(lambda connection: connection.fetchrow(text)))

    async def drain_outbox(self, publish: Callable[[Sequence[EventRow]], Awaitable[None]], limit: int) -> int:
        """Publishes the next events and moves the outbox past them, unless another coordinator is at it. Returns how
        many. What `publish` raises leaves the outbox where it was."""
        try:
            async with self._connection() as connection, _transaction(connection):
                after = await connection.fetchval("SELECT position FROM outbox FOR UPDATE SKIP LOCKED")
                if after is None:
                    return 0
                rows = await PostgresTransaction(connection).select(
                    EVENTS, where(position=Above(after)), order=("position",), limit=limit
                )
                if rows:
                    await publish(rows)
                    await connection.execute("UPDATE outbox SET position = $1", rows[-1].position)
                return len(rows)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            raise unavailable(error) from error

    async def rebuild(self) -> None:
        """Again after a conflict: a sweep holds what it has read while it waits for what is locked here."""
        await self._guarded(_rebuild)


async def _rebuild(connection: Any) -> None:
    async with _transaction(connection):
        # As commands do: the rows first, then the position.
        await connection.execute("TRUNCATE " + ", ".join(table.name for table in sorted(PROJECTIONS, key=lock_rank)))
        await connection.execute("LOCK TABLE event_position IN EXCLUSIVE MODE")
        transaction = PostgresTransaction(connection)
        after = 0
        while rows := await transaction.select(
            EVENTS, where(position=Above(after)), order=("position",), limit=REBUILD_BATCH
        ):
            events = [event_from_json(row.type, row.payload) for row in rows]
            await transaction.apply([op for event in events if event is not None for op in row_ops(event)])
            after = rows[-1].position


@asynccontextmanager
async def _transaction(connection: Any, **options: Any) -> AsyncIterator[None]:
    """Commits, or rolls back after an error of ours or of a statement. After anything else the connection will be
    closed: asking a server that does not answer for a rollback would only take as long again."""
    transaction = connection.transaction(**options)
    await transaction.start()
    try:
        yield
    except asyncpg.PostgresConnectionError:
        raise  # the server has rolled back when it lost us
    except (StreamHouseError, asyncpg.PostgresError):
        await transaction.rollback()
        raise
    await transaction.commit()


async def _warn_without_checksums(connection: Any) -> None:
    """A flipped bit on PostgreSQL's disk can hide registered segments: only checksums make that an error."""
    if await connection.fetchval("SELECT current_setting('data_checksums', true)") == "off":
        log.warning(
            "PostgreSQL has no page checksums: damage on its disk may hide acknowledged records and nobody is told. "
            "Stop it and run `pg_checksums --enable`, or make a new one with `initdb --data-checksums`"
        )


async def _keep(_: Any) -> None:
    """Back in the pool as it is: nothing here changes a session's state, and the pool itself rolls back what is open.
    Its own reset is a statement more per transaction."""


def _discard(connection: Any) -> None:
    """Closes a connection in doubt. Must not raise: it would take the place of the error, or of a cancellation."""
    with contextlib.suppress(asyncpg.InterfaceError):  # the pool has noticed that it is closed already
        connection.terminate()
