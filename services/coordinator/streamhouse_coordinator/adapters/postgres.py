"""The store in PostgreSQL (asyncpg). The only module that talks to the database; its errors end here.

Every statement has a deadline; a connection that broke or was given up on is closed, never reused. Conflicts with
other transactions are retried, everything else that is the database's absence becomes Unavailable.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg
from opentelemetry import metrics
from shproto.errors import InvalidArgument, Overloaded, StreamHouseError, Unavailable
from shproto.events import Event, event_from_json

from streamhouse_coordinator.adapters import sql
from streamhouse_coordinator.adapters.migrate import migrate
from streamhouse_coordinator.core.projection import RowOp, coalesce, row_ops
from streamhouse_coordinator.core.tables import EVENTS, PROJECTIONS, EventRow, Table
from streamhouse_coordinator.ports import EVERYTHING, Above, In, Lock, Totals, Transaction, Where, where

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
RowT = TypeVar("RowT")

EVENTS_CHANNEL = "streamhouse_events"
GROUPS_CHANNEL = "streamhouse_groups"
NOW_MS = "(extract(epoch from clock_timestamp()) * 1000)::bigint"
# How often a transaction that met another's changes is run again before the caller is told to come back: with a wait of
# up to 2, 4, 8 ... ms in between, two coordinators racing for the same rows need one or two.
CONFLICT_ATTEMPTS = 10
REBUILD_BATCH = 1000

_CONFLICTS = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.UniqueViolationError,  # two transactions inserted the same row; the second finds it when run again
)
_ABSENT = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shut down by an administrator, crashed, or still starting
    asyncpg.InsufficientResourcesError,  # too many connections, out of memory, disk full
    asyncpg.ReadOnlySQLTransactionError,  # a standby, until it is promoted
    asyncpg.InterfaceError,  # the connection was closed under our feet
    asyncpg.InternalClientError,  # the server closed it in the middle of a handshake
)

_meter = metrics.get_meter("streamhouse.coordinator")
_conflicts = _meter.create_counter(
    "streamhouse_coordinator_conflicts_total", description="transactions run again after a conflict with another"
)
_absences = _meter.create_counter(
    "streamhouse_coordinator_postgres_errors_total", description="commands that PostgreSQL did not answer"
)
_events = _meter.create_counter("streamhouse_coordinator_events_total", description="events appended, by type")
_duration = _meter.create_histogram(
    "streamhouse_coordinator_transaction_duration_ms", description="from asking for a connection to commit"
)


class PostgresStore:
    """Implements ports.Store. `open` must have succeeded before anything but Unavailable comes back."""

    def __init__(self, dsn: str, *, pool_max: int, timeout_ms: int) -> None:
        self._dsn = dsn
        self._pool_max = pool_max
        self._timeout_s = timeout_ms / 1000
        self._pool: Any = None
        # Snapshots hold a connection for as long as their reader takes: some must stay for everybody else.
        self._snapshots = asyncio.Semaphore(max(1, pool_max // 4))
        self._rng = random.Random()

    async def open(self) -> None:
        """Connects and migrates. Raises Unavailable when there is no database, DatabaseTooNew when it is not ours."""
        try:
            connection = await self.connect()
            try:
                for name in await migrate(connection):
                    log.info("migrated the database: %s", name)
            finally:
                await connection.close(timeout=self._timeout_s)
            self._pool = await asyncpg.create_pool(
                self._dsn,
                min_size=0,
                max_size=self._pool_max,
                timeout=self._timeout_s,
                command_timeout=self._timeout_s,
            )
        except _ABSENT as error:
            raise _unavailable(error) from error

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                await asyncio.wait_for(pool.close(), self._timeout_s)
            except TimeoutError:
                pool.terminate()

    async def connect(self) -> Any:
        """A connection outside the pool, for the caller to close."""
        return await asyncpg.connect(self._dsn, timeout=self._timeout_s)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        """A pooled connection. Whatever leaves it in doubt (cancelled, timed out, broken) closes it."""
        pool = self._pool
        if pool is None:
            raise Unavailable("not connected to PostgreSQL yet", retry_after_ms=1000)
        connection = await pool.acquire(timeout=self._timeout_s)
        try:
            yield connection
        except asyncpg.DataError as error:  # text with a NUL, a number beyond int8: no command of ours makes these
            raise InvalidArgument(f"a value cannot be stored: {error}", field="request") from error
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
                except _CONFLICTS as error:
                    _conflicts.add(1)
                    log.debug("conflict, attempt %d: %s", attempt, error)
                    await asyncio.sleep(self._rng.uniform(0, 0.002 * 2**attempt))
        except _ABSENT as error:
            raise _unavailable(error) from error
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
        except _ABSENT as error:
            raise _unavailable(error) from error

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
        number: int = await self._guarded(lambda connection: connection.fetchval("SELECT nextval('producer_ids')"))
        return number

    async def read_events(self, after_position: int, limit: int, types: Sequence[str] = ()) -> list[EventRow]:
        async def read(connection: Any) -> list[EventRow]:
            equals = {"position": Above(after_position)} | ({"type": In(types)} if types else {})
            return await PostgresTransaction(connection).select(EVENTS, Where(equals), order=("position",), limit=limit)

        return await self._guarded(read)

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
            raise _unavailable(error) from error

    async def rebuild(self) -> None:
        async with self._connection() as connection, _transaction(connection):
            await connection.execute("LOCK TABLE event_position IN EXCLUSIVE MODE")
            await connection.execute("TRUNCATE " + ", ".join(table.name for table in PROJECTIONS))
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


def _discard(connection: Any) -> None:
    """Closes a connection in doubt. Must not raise: it would take the place of the error, or of a cancellation."""
    with contextlib.suppress(asyncpg.InterfaceError):  # the pool has noticed that it is closed already
        connection.terminate()


def _unavailable(error: BaseException) -> Unavailable:
    _absences.add(1)
    what = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
    return Unavailable(f"PostgreSQL does not answer: {what}", retry_after_ms=1000)


class PostgresTransaction:
    """Implements ports.Transaction on an open transaction of `connection`."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._now_ms: int | None = None
        self._groups: set[str] = set()

    async def now_ms(self) -> int:
        if self._now_ms is None:
            self._now_ms = await self._connection.fetchval(f"SELECT {NOW_MS}")
        assert self._now_ms is not None
        return self._now_ms

    async def lock(self, name: str) -> None:
        await self._connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", name)

    async def select(
        self,
        table: Table[RowT],
        where: Where = EVERYTHING,
        *,
        order: Sequence[str] = (),
        limit: int | None = None,
        lock: Lock = "",
    ) -> list[RowT]:
        text, arguments = sql.select(table, where, order, limit, lock)
        return [table.row(*record) for record in await self._connection.fetch(text, *arguments)]

    async def totals(
        self, table: Table[Any], where: Where, *, by: Sequence[str] = (), sums: Sequence[str] = ()
    ) -> list[Totals]:
        text, arguments = sql.totals(table, where, by, sums)
        cut = len(by)
        rows = [tuple(record) for record in await self._connection.fetch(text, *arguments)]
        return [Totals(row[:cut], row[cut], row[cut + 1 :]) for row in rows]

    async def append(self, events: Sequence[Event], trace_context: str = "") -> int:
        if not events:
            return await self.position()
        # One row, locked until the commit: positions are gapless and in commit order.
        last: int = await self._connection.fetchval(
            "WITH moved AS (UPDATE event_position SET position = position + $1 RETURNING position) "
            "SELECT position FROM moved, LATERAL (SELECT pg_notify($2, moved.position::text)) told",
            len(events),
            EVENTS_CHANNEL,
        )
        await self._connection.execute(
            f"""INSERT INTO events (position, stream_id, version, type, payload, trace_context, created_ms)
            SELECT $1 + u.nth,
                   u.stream_id,
                   u.nth_of_stream + coalesce((SELECT max(version) FROM events e WHERE e.stream_id = u.stream_id), 0),
                   u.type, u.payload, $2, {NOW_MS}
            FROM unnest($3::bigint[], $4::text[], $5::bigint[], $6::text[], $7::text[])
                u(nth, stream_id, nth_of_stream, type, payload)""",
            last - len(events),
            trace_context,
            list(range(1, len(events) + 1)),
            [event.stream_id for event in events],
            nth_of_stream(events),
            [type(event).__name__ for event in events],
            [event.to_json() for event in events],
        )
        await self.apply([op for event in events for op in row_ops(event)])
        for name, count in Counter(type(event).__name__ for event in events).items():
            _events.add(count, {"type": name})
        return last

    async def apply(self, ops: Sequence[RowOp]) -> None:
        for group in coalesce(ops):
            text, arguments = sql.change(group)
            await self._connection.execute(text, *arguments)

    async def position(self) -> int:
        position: int = await self._connection.fetchval("SELECT position FROM event_position")
        return position

    async def outbox_position(self) -> int:
        position: int = await self._connection.fetchval("SELECT position FROM outbox")
        return position

    def wake_group(self, group: str) -> None:
        self._groups.add(group)

    async def finish(self) -> None:
        for group in sorted(self._groups):
            await self._connection.execute("SELECT pg_notify($1, $2)", GROUPS_CHANNEL, group)


def nth_of_stream(events: Sequence[Event]) -> list[int]:
    """For each event, how many of its stream there are up to and with it."""
    counts: dict[str, int] = {}
    numbers = []
    for event in events:
        counts[event.stream_id] = counts.get(event.stream_id, 0) + 1
        numbers.append(counts[event.stream_id])
    return numbers
