"""The store in PostgreSQL (asyncpg): transactions and their repetition.

Every statement has a deadline, here and in the server; a connection that broke or was given up on is closed, never
reused. Conflicts with other transactions are retried. The store raises StreamHouseErrors and nothing else: the
database's absence becomes Unavailable, whatever words it has for it, so that no loop ends over one answer.
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

# How often a transaction that met another's changes is run again before the caller is told to come back: with a wait of
# up to 2, 4, 8 ... ms in between, two coordinators racing for the same rows need one or two.
CONFLICT_ATTEMPTS = 10
SNAPSHOT = "ISOLATION LEVEL REPEATABLE READ READ ONLY"

_meter = metrics.get_meter("streamhouse.coordinator")
_conflicts = counter(
    _meter, "streamhouse_coordinator_conflicts_total", "transactions run again after a conflict with another"
)
_duration = _meter.create_histogram(
    "streamhouse_coordinator_transaction_duration_ms", description="from asking for a connection to commit"
)


class PostgresStore:
    """Implements ports.Store. `open` must have succeeded before anything but Unavailable comes back."""

    def __init__(
        self, connections: Connections, turns: LockQueues, waiters: WaitingCalls, *, migration_timeout_ms: int
    ) -> None:
        self._connections = connections
        self._turns = turns
        self._migration_timeout_ms = migration_timeout_ms
        self._serves_clients = False
        # Snapshots hold a connection for as long as their reader takes: some must stay for everybody else, and of these
        # some for query services, which read nothing before they have one.
        snapshots = max(1, connections.pool_max // 4)
        self._snapshots = WaitQueue(waiters, places=snapshots, client_places=max(1, snapshots // 2))
        self._checks = asyncio.Semaphore(1)  # a check has tables of its own, as large as the projections
        self._rng = random.Random()

    async def open(self) -> None:
        """Connects and migrates. Raises Unavailable when there is no database, DatabaseRefused when it is not ours or
        damaged, SettingsError when no database could ever be reached with this DSN."""
        try:
            await self._migrate(await self._first_connection())
            await self._connections.open()
        except DAMAGED as error:  # waiting for it to go by helps nobody at a start
            raise DatabaseRefused(f"the database cannot be opened, it is damaged: {error}") from error
        except FAILURES as error:
            if not is_away(error):
                raise
            raise translated(error) from error

    async def _migrate(self, connection: Any) -> None:
        """A migration takes longer than a statement, and may have to wait for another coordinator's."""
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
            raise  # some of ssl's are ValueErrors as well
        except ValueError as error:  # while parsing: its text may be a part of the password
            raise self._unusable("cannot be parsed") from error

    def _unusable(self, what: str) -> SettingsError:
        return SettingsError(f"pg_dsn ({PREFIX}PG_DSN): {masked(self._connections.dsn)!r}: {what}")

    async def close(self) -> None:
        await self._connections.close()

    def for_clients(self) -> "PostgresStore":
        """Returns the same store for calls of clients."""
        store = copy.copy(self)
        store._serves_clients = True
        return store

    @property
    def _timeout_s(self) -> float:
        return self._connections.limits.timeout_ms / 1000

    async def _guarded(
        self, work: Callable[[Any], Awaitable[ResultT]], call: Call | None = None, *, until_s: float | None = None
    ) -> ResultT:
        """Runs `work` with a connection, and again after conflicts. Waits for the first connection until `until_s`, a
        time of the event loop, or for pg_timeout_ms, as for those after a conflict."""
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
                    await asyncio.sleep(self._rng.uniform(0, 0.002 * 2**attempt))
                    until_s = loop.time() + self._timeout_s
        except FAILURES as error:
            raise translated(error) from error
        raise Overloaded("too many commands at once change the same rows; try again", retry_after_ms=100)

    async def _single(self, work: Callable[[Any], Awaitable[ResultT]], call: Call | None = None) -> ResultT:
        """Runs one statement, a transaction of its own (which a pooler has to be told). It is answered within
        pg_timeout_ms, the wait for a connection included: agents count on that while PostgreSQL is away. At most half
        of the time is waited for the connection, so that the statement has some left."""

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
                # Both waits together take pg_timeout_ms; a turn that came late still has half of that to be of use.
                return await self._guarded(once, call, until_s=max(until_s, loop.time() + self._timeout_s / 2))
        except TimeoutError as error:
            raise translated(error) from error

    @asynccontextmanager
    async def _turn(self, lock: str, call: Call, until_s: float) -> AsyncIterator[None]:
        """Holds the call's turn with the lock, also while its transaction is run again. Waits until `until_s`. Raises
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
        """Holds a place among the snapshots. Clients wait for pg_timeout_ms, services for as long as it takes: they
        have nothing else to do. Raises Overloaded, TimeoutError."""
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
        text = f"UPDATE session_leases SET expires_ms = {NOW_MS} + $2 WHERE session_id = $1 RETURNING grants_version"
        return await self._single(lambda connection: connection.fetchval(text, session_id, ttl_ms), Call(urgent=True))

    async def renew_member(self, group: str, member_id: str, generation: int, owned: str) -> int | None:
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
        """Never given out again. PostgreSQL writes 32 numbers of a sequence down at once, and who gets one of the other
        31 would not wait until that is flushed, or with a standby: after a crash it would come again. So each call
        writes something of its own, and its commit waits for all that was written before."""
        text = "SELECT nextval('producer_ids') FROM pg_logical_emit_message(true, 'streamhouse', '')"
        number: int = await self._single(lambda connection: connection.fetchval(text))
        return number

    async def read_events(self, after_position: int, limit: int) -> list[EventRow]:
        async def read(connection: Any) -> list[EventRow]:
            after = where(position=Above(after_position))
            rows = await PostgresTransaction(connection).select(EVENTS, after, order=("position",), limit=limit)
            if not (rows and rows[0].position == after_position + 1):
                # Afterwards: what is pruned in between was read.
                pruned_position = await connection.fetchval("SELECT position FROM pruned_position")
                if after_position < pruned_position:
                    raise pruned(after_position, pruned_position)
            return rows

        return await self._single(read)

    async def head(self) -> Head:
        text = """SELECT (SELECT history_id FROM histories ORDER BY nth DESC LIMIT 1) history_id,
            (SELECT position FROM event_position) position,
            (SELECT coalesce(max(position), 0) FROM forks) missing_position,
            (SELECT position FROM pruned_position) pruned_position"""
        return Head(**await self._single(lambda connection: connection.fetchrow(text)))

    async def drain_outbox(
        self, publish: Callable[[Sequence[EventRow]], Awaitable[None]], limit: int, *, claim_ms: int
    ) -> int:
        """Publishes the next events and moves the outbox past them, unless another coordinator is at it. Returns how
        many. What `publish` raises leaves the outbox where it was.

        No transaction is open while a broker is waited for, which may take its time, or never answer. The outbox is
        claimed for `claim_ms` instead: one that takes longer may be overtaken, and its events published twice."""
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
        except BaseException:
            with contextlib.suppress(StreamHouseError):  # the claim runs out
                await self._give_outbox_back(after, until_ms)
            raise
        await self._give_outbox_back(rows[-1].position if rows else after, until_ms)
        return len(rows)

    async def _give_outbox_back(self, position: int, until_ms: int) -> None:
        """Ends the claim, with the outbox at `position`, unless somebody has claimed it since: a later claim ends
        later."""
        text = "UPDATE outbox SET position = $1, claimed_until_ms = 0 WHERE claimed_until_ms = $2"
        await self._single(lambda connection: connection.execute(text, position, until_ms))

    async def rebuild(self) -> None:
        """Builds the projections anew. Writers wait meanwhile; readers see the rows of before."""

        async def once(connection: Any) -> None:
            async with self._connections.transaction(connection):
                await _rebuild(connection)

        await self._guarded(once)

    async def check_projections(self) -> AsyncIterator[ProjectionCheck]:
        """Checks on a connection of its own: its statements take as long as migrations do, and one is made at a
        time."""
        limits = {
            "statement_timeout": str(self._migration_timeout_ms),
            "idle_in_transaction_session_timeout": str(SNAPSHOT_IDLE_MS),
        }
        try:
            async with self._checks:
                connection = await self._first_connection()
                try:
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
    # First what pruning locks: it moves events into the bases, and must not while both are read.
    await connection.execute("SELECT position FROM pruned_position FOR UPDATE")
    # As commands do: the rows first, then the position.
    # A TRUNCATE would wait for readers as well, who take tables in any order: they and this met in a deadlock.
    names = [table.name for table in sorted(PROJECTIONS, key=lock_rank)]
    await connection.execute(f"LOCK TABLE {', '.join(names)} IN EXCLUSIVE MODE")
    for name in names:
        await connection.execute(f"DELETE FROM {name}")
    await connection.execute("LOCK TABLE event_position IN EXCLUSIVE MODE")
    rebuilding = PostgresRebuilding(connection)
    await rebuilding.fill_from_bases()
    async for count in rebuilding.replay():
        log.debug("%d events applied", count)


def _skipped(position: int, error: EventsPruned) -> int:
    """Returns where publishing goes on: nobody published the events before in outbox_retention_ms, and they went."""
    pruned_position = int(error.details["pruned_position"])
    level = logging.ERROR if position else logging.INFO  # 0: RabbitMQ is new here
    log.log(level, "events %d to %d were never published to RabbitMQ and are not kept any more", position + 1,
            pruned_position)  # fmt: skip
    return pruned_position


async def _warn_without_checksums(connection: Any) -> None:
    """A flipped bit on PostgreSQL's disk can hide registered segments: only checksums make that an error."""
    if await connection.fetchval("SELECT current_setting('data_checksums', true)") == "off":
        log.warning(
            "PostgreSQL has no page checksums: damage on its disk may hide acknowledged records and nobody is told. "
            "Stop it and run `pg_checksums --enable`, or make a new one with `initdb --data-checksums`"
        )
