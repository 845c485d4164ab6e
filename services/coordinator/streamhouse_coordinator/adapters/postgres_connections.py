"""Connections to PostgreSQL: how they are made, how many there are, and what the server ends by itself.

Owns: the pool, and a slot for each statement or transaction that may be running in the server: a place in a line.
Does not own: what is done with a connection (postgres.py), which server it leads to (postgres_hosts.py).
Invariants: at most `pool_max` statements and transactions of this process run in the server, those included that were
given up and that the server has not ended yet; at most `client_slots` of them are clients'. Every transaction has a
limit that the server keeps: a coordinator that is cut off or frozen holds its locks for `pg_transaction_idle_ms`, not
for as long as it is away.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import asyncpg
from opentelemetry import metrics
from shproto.errors import AWAY, InvalidArgument, StreamHouseError, Unavailable
from shruntime.counters import up_down_counter
from shruntime.tasks import cancel_and_wait

from streamhouse_coordinator.adapters.postgres_errors import FAILURES, cannot_be_stored, is_away, waits_too_long
from streamhouse_coordinator.adapters.postgres_hosts import Hosts
from streamhouse_coordinator.adapters.wait_queues import Call, WaitingCalls, WaitQueue, overloaded

log = logging.getLogger(__name__)

Pooler = Literal["auto", "none", "transaction"]

# PostgreSQL ends a statement before its coordinator gives it up, and a wait for a lock before that: then the answer
# says what was waited for, and nothing is left behind in the server.
STATEMENT_SHARE, LOCK_SHARE = 0.8, 0.6
# A reader that takes no part of a snapshot for so long is cut off. A snapshot holds no row, only old versions of rows.
SNAPSHOT_IDLE_MS = 60_000
# A server that runs a statement looks so often whether there is still somebody to answer. One system call.
CHECK_INTERVAL_MS = 1_000
# A server that waits for its client finds out within 25 s that the machine is gone.
KEEPALIVES = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}

_abandoned = up_down_counter(
    metrics.get_meter("streamhouse.coordinator"),
    "streamhouse_coordinator_postgres_given_up",
    "statements given up that PostgreSQL may still run",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that PostgreSQL keeps by itself: of a statement, a wait for a lock, a transaction whose coordinator says
    nothing."""

    timeout_ms: int
    transaction_idle_ms: int

    @property
    def statement_ms(self) -> int:
        return int(self.timeout_ms * STATEMENT_SHARE)

    @property
    def lock_ms(self) -> int:
        return int(self.timeout_ms * LOCK_SHARE)

    def of_transaction(self, idle_ms: int) -> dict[str, str]:
        """Settings of one transaction, in PostgreSQL's words."""
        return {
            "statement_timeout": str(self.statement_ms),
            "lock_timeout": str(self.lock_ms),
            "idle_in_transaction_session_timeout": str(idle_ms),
        }

    def of_session(self) -> dict[str, str]:
        """Settings of a connection that leads to the server itself."""
        return {
            **self.of_transaction(self.transaction_idle_ms),
            **KEEPALIVES,
            "tcp_user_timeout": str(self.timeout_ms),
            "client_connection_check_interval": str(CHECK_INTERVAL_MS),
        }


class Connections:
    """`open` before `connection`; `close` when nobody uses any."""

    def __init__(
        self, dsn: str, *, pool_max: int, client_slots: int, limits: Limits, pooler: Pooler, waiters: WaitingCalls
    ) -> None:
        self.dsn = dsn
        self.pool_max = pool_max
        self.limits = limits
        self._hosts = Hosts(dsn)
        self._timeout_s = limits.timeout_ms / 1000
        self._pooler: Pooler = pooler
        self._pool: Any = None
        self._slots = WaitQueue(waiters, places=pool_max, client_places=client_slots)
        self._answered_s = -math.inf  # when the server last answered, by the event loop's clock
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def through_pooler(self) -> bool:
        """True if every transaction may run on another connection of the server; known once `first` has returned."""
        return self._pooler == "transaction"

    # ---- one connection

    async def first(self) -> Any:
        """Returns a connection outside the pool and without limits, for the caller to close: for migrations, which take
        as long as they take. Finds out whether there is a pooler in between. Raises asyncpg's errors, OSError."""
        connection = await self._hosts.connect(timeout_s=self._timeout_s, statement_cache_size=0)
        try:
            if self._pooler == "auto":
                self._pooler = "transaction" if await _leads_to_pooler(connection) else "none"
                if self.through_pooler:
                    log.info("PostgreSQL is reached through a pooler; it is taken for one that gives out transactions")
            if not self.through_pooler:
                await _set(connection, KEEPALIVES)
        except BaseException:
            discard(connection)
            raise
        return connection

    async def _for_pool(self, _dsn: str | None, **options: Any) -> Any:
        connection = await self._hosts.connect(timeout_s=self._timeout_s, **options)
        try:
            if not self.through_pooler:
                await _limit_session(connection, self.limits)
        except BaseException:
            discard(connection)
            raise
        return connection

    # ---- the pool

    async def open(self) -> None:
        """Makes the pool, without connections. Raises asyncpg's errors."""
        # Behind a pooler the next transaction may run where its statements were never prepared.
        cache = {"statement_cache_size": 0} if self.through_pooler else {}
        self._pool = await asyncpg.create_pool(
            min_size=0,
            max_size=self.pool_max,
            command_timeout=self._timeout_s,
            reset=_keep,
            connect=self._for_pool,
            **cache,
        )

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        await cancel_and_wait(*self._ending)
        if pool is not None:
            try:
                await asyncio.wait_for(pool.close(), self._timeout_s)
            except TimeoutError:
                pool.terminate()

    @asynccontextmanager
    async def connection(self, call: Call, until_s: float) -> AsyncIterator[Any]:
        """Lends a pooled connection; waits for one until `until_s`, a time of the event loop. A connection that was
        given up on, by a deadline or a cancellation, is used again only if the server has ended its statement; the
        caller does not wait for that. Raises InvalidArgument for values that cannot be stored, Unavailable, Overloaded,
        asyncpg's errors."""
        if self._pool is None:
            raise Unavailable("not connected to PostgreSQL yet", retry_after_ms=1000, database=AWAY)
        pool = self._pool
        connection = await self._take(pool, call, until_s)
        try:
            yield connection
        except (TimeoutError, asyncio.CancelledError):
            self._end(pool, connection, call)
            raise
        except BaseException as error:
            self._note_answer(error)
            if not _leaves_sound(error):
                discard(connection)
            await self._give_back(pool, connection, call)
            if cannot_be_stored(error):  # no command of ours makes such values of what it has checked
                raise InvalidArgument(f"a value cannot be stored: {error}", field="request") from error
            raise
        else:
            self._note_answer(None)
            await self._give_back(pool, connection, call)

    async def _take(self, pool: Any, call: Call, until_s: float) -> Any:
        since_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(until_s):
                await self._slots.take(call)
        except TimeoutError as error:
            raise self.timed_out_waiting(
                since_s,
                f"of {self.pool_max} connections (pg_pool_max) none was free in time, {len(self._ending)} are taken by "
                "statements that were given up and may still run",
            ) from error
        try:
            async with asyncio.timeout(self._timeout_s):
                return await pool.acquire()
        except BaseException:
            self._slots.give_back(call)
            raise

    def timed_out_waiting(self, since_s: float, what: str) -> Exception:
        """Returns the error of a call that waited in a line from `since_s`, a time of the event loop, until its time
        was over: Overloaded, or TimeoutError if PostgreSQL has answered nobody meanwhile. Agents go on with their
        leases while it is away, and must not for less."""
        if self._answered_s >= since_s:
            return overloaded(f"too many calls at once: {what}", limit="pg_timeout_ms", value=self.limits.timeout_ms)
        return TimeoutError(what)

    def _note_answer(self, error: BaseException | None) -> None:
        if error is None or isinstance(error, StreamHouseError) or waits_too_long(error) or not is_away(error):
            self._answered_s = asyncio.get_running_loop().time()

    async def _give_back(self, pool: Any, connection: Any, call: Call) -> None:
        try:
            await pool.release(connection)
        finally:
            self._slots.give_back(call)

    def _end(self, pool: Any, connection: Any, call: Call) -> None:
        """Keeps the slot until the server has ended what it was asked, by its answer to the cancellation that asyncpg
        sends, or, where it cannot be heard, by its own limits."""
        task = asyncio.create_task(self._ended(pool, connection), name="end a statement that was given up")
        self._ending.add(task)
        _abandoned.add(1)
        task.add_done_callback(partial(self._has_ended, call))

    async def _ended(self, pool: Any, connection: Any) -> None:
        limit_s = self.limits.statement_ms / 1000
        try:
            async with asyncio.timeout(limit_s):
                if not connection.is_in_transaction():
                    # A BEGIN that was given up may have succeeded all the same: known once the next one is answered.
                    await connection.execute("SELECT 1")
                if connection.is_in_transaction():
                    await connection.execute("ROLLBACK")
                self._note_answer(None)
        except FAILURES as error:
            log.debug("a connection that was given up on is closed: %s", error or type(error).__name__)
            discard(connection)
        except asyncio.CancelledError:
            discard(connection)
            raise
        finally:
            with contextlib.suppress(*FAILURES):  # it is closed then
                await pool.release(connection, timeout=limit_s)

    def _has_ended(self, call: Call, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        _abandoned.add(-1)
        self._slots.give_back(call)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("ending a statement that was given up failed", exc_info=error)

    # ---- transactions

    @asynccontextmanager
    async def transaction(self, connection: Any, how: str = "", *, idle_ms: int | None = None) -> AsyncIterator[None]:
        """Commits, or rolls back after an error of ours or of a statement. After anything else the connection will be
        closed: asking a server that does not answer for a rollback would only take as long again.

        `idle_ms`: how long the server waits for the next statement.
        """
        limits = self.limits.of_transaction(idle_ms or self.limits.transaction_idle_ms)
        if not (self.through_pooler or idle_ms):
            limits = {}  # the session has them
        try:
            await connection.execute(begin(limits, how))
            yield
        except (StreamHouseError, asyncpg.PostgresError):
            if not connection.is_closed():  # else the server has rolled back when it lost us, or ended it
                await connection.execute("ROLLBACK")
            raise
        if (ended := await connection.execute("COMMIT")) != "COMMIT":
            raise asyncpg.InFailedSQLTransactionError(f"the transaction ended with {ended}: a statement had failed")


class Listening:
    """Makes connections that are kept, to a server itself. `past_pooler`: the DSN is there to lead past one."""

    def __init__(self, dsn: str, timeout_ms: int, *, past_pooler: bool) -> None:
        self._hosts = Hosts(dsn)
        self._timeout_ms = timeout_ms
        self._past_pooler = past_pooler
        self._warned = False

    async def connect(self) -> Any:
        """Returns a connection for the caller to close. Raises asyncpg's errors, OSError."""
        connection = await self._hosts.connect(timeout_s=self._timeout_ms / 1000, statement_cache_size=0)
        try:
            if self._past_pooler and not self._warned and await _leads_to_pooler(connection):
                self._warned = True  # told once, not with every connection that breaks
                log.warning(
                    "pg_listen_dsn leads to a pooler, too; if that gives out transactions, nothing is heard through "
                    "it, and events are polled: name the server itself"
                )
            await _set(connection, KEEPALIVES | {"tcp_user_timeout": str(self._timeout_ms)})
        except BaseException:
            discard(connection)
            raise
        return connection


def begin(limits: dict[str, str], how: str = "") -> str:
    """Returns the statements that begin a transaction with these settings, which end with it. They travel together and
    reach one connection of the server, whatever lies in between."""
    return "; ".join([f"BEGIN {how}".rstrip(), *(f"SET LOCAL {name} = '{value}'" for name, value in limits.items())])


async def _limit_session(connection: Any, limits: Limits) -> None:
    """Gives the connection the limits that its server knows (client_connection_check_interval came with 14). Not as
    parameters of the start: a pooler refuses those."""
    settings = limits.of_session()
    try:
        await _set(connection, settings)
    except asyncpg.InvalidParameterValueError:  # an operating system without means to look for a closed connection
        del settings["client_connection_check_interval"]
        await _set(connection, settings)


async def _set(connection: Any, settings: dict[str, str]) -> None:
    text = "SELECT set_config(name, value, false) FROM unnest($1::text[], $2::text[]) given(name, value) "
    text += "JOIN pg_settings USING (name)"
    await connection.execute(text, list(settings), list(settings.values()))


async def _leads_to_pooler(connection: Any) -> bool:
    """True if the process that answers is not the one that let us in: a pooler makes up the number that it tells."""
    async with connection.transaction():
        return bool(await connection.fetchval("SELECT pg_backend_pid()") != connection.get_server_pid())


async def _keep(_: Any) -> None:
    """Leaves a connection that goes back to the pool as it is: nothing here changes a session's state, and the pool
    itself rolls back what is open. Its own reset is a statement more per transaction."""


def _leaves_sound(error: BaseException) -> bool:
    """True if the connection may go on after this error: our own, or one of the statement. Behind a proxy's address
    another server may be the primary now."""
    if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        return False
    return isinstance(error, (StreamHouseError, asyncpg.PostgresError))


def discard(connection: Any) -> None:
    """Closes a connection in doubt. Must not raise: it would take the place of the error, or of a cancellation."""
    with contextlib.suppress(asyncpg.InterfaceError):  # the pool has noticed that it is closed already
        connection.terminate()
