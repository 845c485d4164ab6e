"""The store in PostgreSQL (asyncpg): transactions and their repetition.

Owns: deadlines, retries after conflicts, and the translation of errors. Does not own: connections
(postgres_connections.py), statements (postgres_transaction.py, sql.py).
Invariants: every statement has a deadline, here and in the server. A broken or abandoned connection is closed, never
reused. Only StreamHouseErrors leave the store: an absent database becomes Unavailable, with any error that reports
this, so that no loop ends over a single answer.
"""

import asyncio
import contextlib
import copy
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from opentelemetry import metrics
from shproto.errors import AWAY, EventsPruned, Overloaded, StreamHouseError, Unavailable
from shruntime.counters import counter
from shruntime.settings import PREFIX, SettingsError
from shruntime.urls import masked

from streamhouse_coordinator.adapters import projection_check
from streamhouse_coordinator.adapters.migrate import DatabaseRefused, migrate
from streamhouse_coordinator.adapters.postgres_connections import SNAPSHOT_IDLE_MS, Connections, begin, discard
from streamhouse_coordinator.adapters.postgres_errors import (
    CONFLICTS,
    DAMAGED,
    FAILURES,
    UNUSABLE_DSN,
    is_away,
    translated,
)
from streamhouse_coordinator.adapters.postgres_transaction import NOW_MS, PostgresRebuilding, PostgresTransaction
from streamhouse_coordinator.adapters.wait_queues import Call, LockQueues, WaitingCalls, WaitQueue
from streamhouse_coordinator.core.tables import EVENTS, PROJECTIONS, EventRow, lock_rank
from streamhouse_coordinator.ports import Above, ProjectionCheck, Transaction, where
from streamhouse_coordinator.recovery.histories import Head, pruned

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
RowT = TypeVar("RowT")

# Tries of a transaction that meets conflicts, before the caller is asked to retry: with a wait of up to 2, 4, 8 ... ms
# in between, two coordinators that race for the same rows need two or three.
CONFLICT_ATTEMPTS = 10
# Reads of many statements as of a single moment. Commands run in READ COMMITTED instead: a statement that has waited
# for a row sees its newest version, so rows are locked first and decided on then.
SNAPSHOT = "ISOLATION LEVEL REPEATABLE READ READ ONLY"

_meter = metrics.get_meter("streamhouse.coordinator")
_conflicts = counter(
    _meter, "streamhouse_coordinator_conflicts_total", "transactions run again after a conflict with another"
)
_duration = _meter.create_histogram(
    "streamhouse_coordinator_transaction_duration_ms", description="from asking for a connection to commit"
)


class PostgresStore:
    """Implements ports.Store. Until `open` has succeeded all calls raise Unavailable."""

    def __init__(
        self, connections: Connections, turns: LockQueues, waiters: WaitingCalls, *, migration_timeout_ms: int
    ) -> None:
        self._connections = connections
        self._turns = turns
        self._migration_timeout_ms = migration_timeout_ms
        self._serves_clients = False
        # Snapshots hold a connection for as long as their reader takes, so some connections stay reserved for other
        # calls; and of the snapshots some for query services, which serve no reads without one.
        snapshots = max(1, connections.pool_max // 4)
        self._snapshots = WaitQueue(waiters, places=snapshots, client_places=max(1, snapshots // 2))
        self._checks = asyncio.Semaphore(1)  # a check has temporary tables, as large as the projections
        self._rng = random.Random()

    async def open(self) -> None:
        """Connects and migrates. Raises Unavailable if there is no database, DatabaseRefused for a foreign or damaged
        database, SettingsError if this DSN can never reach a database."""
        try:
            await self._migrate(await self._first_connection())
            await self._connections.open()
        except DAMAGED as error:  # waiting does not mend damage at a start
            raise DatabaseRefused(f"the database cannot be opened, it is damaged: {error}") from error
        except FAILURES as error:
            if not is_away(error):
                raise
            raise translated(error) from error

    async def _migrate(self, connection: Any) -> None:
        """Migrates without the limits of statements: a migration takes longer, and may wait for that of another
        coordinator."""
        limit_ms = self._migration_timeout_ms
        deadline = asyncio.timeout(limit_ms / 1000)
        try:
            async with deadline:
                for name in await migrate(connection):
                    log.info("migrated the database: %s", name)
                async with connection.transaction():
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
            discard(connection)

    async def _first_connection(self) -> Any:
        try:
            return await self._connections.first()
        except UNUSABLE_DSN as error:
            raise self._unusable(str(error)) from error
        except OSError:
            raise  # some of ssl's errors are ValueErrors as well
        except ValueError as error:  # while parsing: the text may contain a part of the password
            raise self._unusable("cannot be parsed") from error

    def _unusable(self, what: str) -> SettingsError:
        return SettingsError(f"pg_dsn ({PREFIX}PG_DSN): {masked(self._connections.dsn)!r}: {what}")

    async def close(self) -> None:
        await self._connections.close()

    def for_clients(self) -> "PostgresStore":
        """Returns the same store for calls of clients."""
        # Shallow: the connections, queues and limits are shared.
        store = copy.copy(self)
        store._serves_clients = True
        return store

    @property
    def _timeout_s(self) -> float:
        return self._connections.limits.timeout_ms / 1000

    async def _guarded(
        self, work: Callable[[Any], Awaitable[ResultT]], call: Call | None = None, *, until_s: float | None = None
    ) -> ResultT:
        """Runs `work` with a connection, and again after conflicts; returns the result. Waits for the first connection
        until `until_s`, a time of the event loop, or for pg_timeout_ms, as for later connections."""
        started = time.perf_counter()
        call = call or Call(urgent=not self._serves_clients)
        loop = asyncio.get_running_loop()
        if until_s is None:
            until_s = loop.time() + self._timeout_s
        try:
            for attempt in range(CONFLICT_ATTEMPTS):
                try:
                    async with self._connections.connection(call, until_s) as connection:
                        result = await work(connection)
                    _duration.record((time.perf_counter() - started) * 1000)
                    return result
                except CONFLICTS as error:
                    _conflicts.add(1)
                    log.debug("conflict, attempt %d: %s", attempt, error)
                    # A random wait, so that two coordinators do not meet again at the next try.
                    await asyncio.sleep(self._rng.uniform(0, 0.002 * 2**attempt))
                    until_s = loop.time() + self._timeout_s
        except FAILURES as error:
            raise translated(error) from error
        raise Overloaded("too many commands at once change the same rows; try again", retry_after_ms=100)

    async def _single(self, work: Callable[[Any], Awaitable[ResultT]], call: Call | None = None) -> ResultT:
        """Runs a single statement as a separate transaction (explicit behind a pooler); returns the result. Answers
        within pg_timeout_ms, including the wait for a connection: agents rely on that while PostgreSQL is away. At most
        half of the time is spent on the wait, so that the statement has time left."""

        async def once(connection: Any) -> ResultT:
            if not self._connections.through_pooler:
                return await work(connection)
            async with self._connections.transaction(connection):
                return await work(connection)

        try:
            async with asyncio.timeout(self._timeout_s):
                until_s = asyncio.get_running_loop().time() + self._timeout_s / 2
                return await self._guarded(once, call, until_s=until_s)
        except TimeoutError as error:
            raise translated(error) from error

    async def run(self, work: Callable[[Transaction], Awaitable[ResultT]], *, lock: str = "") -> ResultT:
        async def once(connection: Any) -> ResultT:
            async with self._connections.transaction(connection):
                transaction = PostgresTransaction(connection)
                if lock:
                    await transaction.lock(lock)
                result = await work(transaction)
                await transaction.finish()
                return result

        if not lock:
            return await self._guarded(once)
        loop = asyncio.get_running_loop()
        call, until_s = Call(urgent=not self._serves_clients), loop.time() + self._timeout_s
        try:
            async with self._turn(lock, call, until_s):
                # Both waits together take pg_timeout_ms; a late turn still has half of that for the transaction.
                return await self._guarded(once, call, until_s=max(until_s, loop.time() + self._timeout_s / 2))
        except TimeoutError as error:
            raise translated(error) from error

    @asynccontextmanager
    async def _turn(self, lock: str, call: Call, until_s: float) -> AsyncIterator[None]:
        """Holds the call's turn with the lock, also while its transaction runs again. Waits until `until_s`. Raises
        Overloaded, TimeoutError."""
        since_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(until_s):
                await self._turns.take(lock, call)
        except TimeoutError as error:
            raise self._connections.timed_out_waiting(since_s, "others hold, or wait for, the same lock") from error
        try:
            yield
        finally:
            self._turns.give_back(lock, call)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Transaction]:
        call = Call(urgent=not self._serves_clients)
        try:
            async with (
                self._snapshot_place(call),
                self._connections.connection(call, asyncio.get_running_loop().time() + self._timeout_s) as connection,
                self._connections.transaction(connection, SNAPSHOT, idle_ms=SNAPSHOT_IDLE_MS),
            ):
                yield PostgresTransaction(connection)
        except FAILURES as error:
            raise translated(error) from error

    @asynccontextmanager
    async def _snapshot_place(self, call: Call) -> AsyncIterator[None]:
        """Holds a place among the snapshots. Clients wait for pg_timeout_ms, services without limit: they have no other
        work before. Raises Overloaded, TimeoutError."""
        since_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(None if call.urgent else self._timeout_s):
                await self._snapshots.take(call)
        except TimeoutError as error:
            raise self._connections.timed_out_waiting(since_s, "snapshots are read by others") from error
        try:
            yield
        finally:
            self._snapshots.give_back(call)

    async def renew_session(self, session_id: str, ttl_ms: int) -> int | None:
        # A single row and no other lock. Urgent, since a lease that runs out moves partitions, which costs more than
        # any wait.
        text = f"UPDATE session_leases SET expires_ms = {NOW_MS} + $2 WHERE session_id = $1 RETURNING grants_version"
        return await self._single(lambda connection: connection.fetchval(text, session_id, ttl_ms), Call(urgent=True))

    async def renew_member(self, group: str, member_id: str, generation: int, owned: str) -> int | None:
        # Every condition is in the statement: it changes nothing unless the heartbeat has no news, so it needs no lock
        # of the group.
        text = f"""UPDATE group_member_state s SET expires_ms = {NOW_MS} + m.session_timeout_ms
            FROM groups g, group_members m
            WHERE s.group_name = $1 AND s.member_id = $2 AND s.complete AND s.owned = $4
            AND g.group_name = s.group_name AND g.generation = $3
            AND m.group_name = s.group_name AND m.member_id = s.member_id
            RETURNING m.session_timeout_ms"""
        return await self._single(
            lambda connection: connection.fetchval(text, group, member_id, generation, owned), Call(urgent=True)
        )

    async def next_producer_id(self) -> int:
        """Returns an id that is never allocated again. PostgreSQL logs 32 numbers of a sequence at once, and a caller
        that gets one of the other 31 would not wait until that is flushed, or replicated: after a crash the number
        would return. So each call writes a message, and the commit waits for all earlier writes."""
        text = "SELECT nextval('producer_ids') FROM pg_logical_emit_message(true, 'streamhouse', '')"
        number: int = await self._single(lambda connection: connection.fetchval(text))
        return number

    async def read_events(self, after_position: int, limit: int) -> list[EventRow]:
        async def read(connection: Any) -> list[EventRow]:
            after = where(position=Above(after_position))
            rows = await PostgresTransaction(connection).select(EVENTS, after, order=("position",), limit=limit)
            if not (rows and rows[0].position == after_position + 1):
                # The pruned position is read afterwards: events pruned in between have been read.
                pruned_position = await connection.fetchval("SELECT position FROM pruned_position")
                if after_position < pruned_position:
                    raise pruned(after_position, pruned_position)
            return rows

        return await self._single(read)

    async def head(self) -> Head:
        # A single statement, hence a single moment: otherwise a history that is replaced in between would pass for a
        # rollback.
        text = """SELECT (SELECT history_id FROM histories ORDER BY nth DESC LIMIT 1) history_id,
            (SELECT position FROM event_position) position,
            (SELECT coalesce(max(position), 0) FROM forks) missing_position,
            (SELECT position FROM pruned_position) pruned_position"""
        return Head(**await self._single(lambda connection: connection.fetchrow(text)))

    async def drain_outbox(
        self, publish: Callable[[Sequence[EventRow]], Awaitable[None]], limit: int, *, claim_ms: int
    ) -> int:
        """Publishes the next events and moves the outbox past them, unless another coordinator has the claim; returns
        their number. An error of `publish` leaves the outbox unmoved.

        No transaction is open during the wait for a broker, which may take long or never answer. The outbox is claimed
        for `claim_ms` instead; if publishing takes longer, another coordinator may publish the same events again.
        """
        # All times are those of PostgreSQL, so the clocks of coordinators do not matter.
        claim = f"""UPDATE outbox SET claimed_until_ms = {NOW_MS} + $1 FROM event_position last
            WHERE outbox.position < last.position AND claimed_until_ms <= {NOW_MS}
            RETURNING outbox.position, claimed_until_ms"""
        claimed = await self._single(lambda connection: connection.fetchrow(claim, claim_ms))
        if claimed is None:
            return 0
        after, until_ms = claimed
        try:
            try:
                rows = await self.read_events(after, limit)
            except EventsPruned as error:
                after = _skipped(after, error)
                rows = await self.read_events(after, limit)
            if rows:
                await publish(rows)
        # Also after a cancellation: otherwise the outbox would stand still until the claim expires.
        except BaseException:
            with contextlib.suppress(StreamHouseError):  # the claim expires
                await self._give_outbox_back(after, until_ms)
            raise
        await self._give_outbox_back(rows[-1].position if rows else after, until_ms)
        return len(rows)

    async def _give_outbox_back(self, position: int, until_ms: int) -> None:
        """Ends the claim and sets the outbox to `position`, unless another coordinator has claimed the outbox since: a
        later claim has a later end."""
        text = "UPDATE outbox SET position = $1, claimed_until_ms = 0 WHERE claimed_until_ms = $2"
        await self._single(lambda connection: connection.execute(text, position, until_ms))

    async def rebuild(self) -> None:
        """Rebuilds the projections. Writers wait meanwhile; readers see the old rows."""

        async def once(connection: Any) -> None:
            async with self._connections.transaction(connection):
                await _rebuild(connection)

        await self._guarded(once)

    async def check_projections(self) -> AsyncIterator[ProjectionCheck]:
        """Checks on a separate connection, a single check at a time, since the statements may take as long as
        migrations. Yields the progress, then the result."""
        limits = {
            "statement_timeout": str(self._migration_timeout_ms),
            "idle_in_transaction_session_timeout": str(SNAPSHOT_IDLE_MS),
        }
        try:
            async with self._checks:
                connection = await self._first_connection()
                try:
                    # Not READ ONLY, since the check creates temporary tables.
                    await connection.execute(begin(limits, "ISOLATION LEVEL REPEATABLE READ"))
                    async with aclosing(projection_check.check(connection)) as parts:  # type: ignore[type-var]
                        async for part in parts:
                            yield part
                    await connection.execute("ROLLBACK")
                finally:
                    discard(connection)
        except FAILURES as error:
            raise translated(error) from error


async def _rebuild(connection: Any) -> None:
    # Locks the same row as pruning, which moves events into the bases and must not while both are read.
    await connection.execute("SELECT position FROM pruned_position FOR UPDATE")
    # The rows before the position, as commands do. A TRUNCATE would wait for readers as well, which take tables in any
    # order: this led to a deadlock.
    names = [table.name for table in sorted(PROJECTIONS, key=lock_rank)]
    await connection.execute(f"LOCK TABLE {', '.join(names)} IN EXCLUSIVE MODE")
    for name in names:
        await connection.execute(f"DELETE FROM {name}")
    # Last, as in every commit: from here on no event is appended until the projections are complete.
    await connection.execute("LOCK TABLE event_position IN EXCLUSIVE MODE")
    rebuilding = PostgresRebuilding(connection)
    await rebuilding.fill_from_bases()
    async for count in rebuilding.replay():
        log.debug("%d events applied", count)


def _skipped(position: int, error: EventsPruned) -> int:
    """Returns the position at which publishing continues. Events before it were not published within
    outbox_retention_ms and are pruned."""
    pruned_position = int(error.details["pruned_position"])
    level = logging.ERROR if position else logging.INFO  # position 0: RabbitMQ is new here
    log.log(level, "events %d to %d were never published to RabbitMQ and are not kept any more", position + 1,
            pruned_position)  # fmt: skip
    return pruned_position


async def _warn_without_checksums(connection: Any) -> None:
    """Warns if PostgreSQL has no page checksums: a flipped bit on its disk can hide registered segments, and only
    checksums turn that into an error."""
    if await connection.fetchval("SELECT current_setting('data_checksums', true)") == "off":
        log.warning(
            "PostgreSQL has no page checksums: damage on its disk may hide acknowledged records, and readers get no "
            "error. Stop it and run `pg_checksums --enable`, or make a new one with `initdb --data-checksums`"
        )
