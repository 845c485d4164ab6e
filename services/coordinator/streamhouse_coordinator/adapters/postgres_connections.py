"""Connections to PostgreSQL: how they are made, how many there are, and the limits that the server enforces.

Owns: the pool, and a slot for each statement or transaction that may be running in the server. Does not own: the use of
a connection (postgres.py), the choice of the server (postgres_hosts.py).
Invariants: at most `pool_max` statements and transactions of this process run in the server, including abandoned ones
that the server has not ended yet; at most `client_slots` of them are clients'. Every transaction has a limit that the
server enforces: a coordinator that is cut off or frozen holds its locks for `pg_transaction_idle_ms`, not for as long
as it is away.
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

# PostgreSQL ends a statement before its coordinator abandons it, and a wait for a lock even earlier: then the answer
# names the cause of the wait, and nothing is left running in the server.
STATEMENT_SHARE, LOCK_SHARE = 0.8, 0.6
# A reader that fetches nothing of a snapshot for this long is cut off. A snapshot holds no row, only old versions of
# rows.
SNAPSHOT_IDLE_MS = 60_000
# Interval at which a server that runs a statement checks if the client still exists. A single system call.
CHECK_INTERVAL_MS = 1_000
# A server that waits for its client finds out within 25 s that the machine is gone.
KEEPALIVES = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}

_abandoned = up_down_counter(
    metrics.get_meter("streamhouse.coordinator"),
    "streamhouse_coordinator_postgres_given_up",
    "abandoned statements that PostgreSQL may still run",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that PostgreSQL enforces by itself: of a statement, of a wait for a lock, of a transaction with a silent
    coordinator."""

    timeout_ms: int
    transaction_idle_ms: int

    @property
    def statement_ms(self) -> int:
        """Limit of a statement, in ms."""
        return int(self.timeout_ms * STATEMENT_SHARE)

    @property
    def lock_ms(self) -> int:
        """Limit of a wait for a lock, in ms."""
        return int(self.timeout_ms * LOCK_SHARE)

    def of_transaction(self, idle_ms: int) -> dict[str, str]:
        """Returns the settings of a transaction, by PostgreSQL's names."""
        return {
            "statement_timeout": str(self.statement_ms),
            "lock_timeout": str(self.lock_ms),
            "idle_in_transaction_session_timeout": str(idle_ms),
        }

    def of_session(self) -> dict[str, str]:
        """Returns the settings of a direct connection to the server, by PostgreSQL's names."""
        return {
            **self.of_transaction(self.transaction_idle_ms),
            **KEEPALIVES,
            "tcp_user_timeout": str(self.timeout_ms),
            "client_connection_check_interval": str(CHECK_INTERVAL_MS),
        }


class Connections:
    """The connections of a store. Call `open` before `connection`, and `close` when none is in use."""

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

    # ---- single connections

    async def first(self) -> Any:
        """Returns a connection outside the pool and without limits, for the caller to close: migrations may take long.
        Detects a pooler on the way. Raises asyncpg's errors, OSError."""
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
        """Creates the pool, without connections. Raises asyncpg's errors."""
        # Behind a pooler the next transaction may run on a connection that lacks its prepared statements.
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
        """Lends a pooled connection after a wait until `until_s`, a time of the event loop. A connection that a
        deadline or a cancellation has abandoned is reused only after the server has ended the statement, for which the
        caller does not wait. Raises InvalidArgument for values that cannot be stored, Unavailable, Overloaded,
        asyncpg's errors."""
        if self._pool is None:
            raise Unavailable("not connected to PostgreSQL yet", retry_after_ms=1000, database=AWAY)
        pool = self._pool
        connection = await self._take(pool, call, until_s)
        try:
            yield connection
        except (TimeoutError, asyncio.CancelledError):
            # The server may still run the statement, or hold its locks: neither the connection nor the slot is free
            # yet.
            self._end(pool, connection, call)
            raise
        except BaseException as error:
            self._note_answer(error)
            if not _leaves_sound(error):
                discard(connection)
            await self._give_back(pool, connection, call)
            if cannot_be_stored(error):  # commands never derive such values from checked ones
                raise InvalidArgument(f"a value cannot be stored: {error}", field="request") from error
            raise
        else:
            self._note_answer(None)
            await self._give_back(pool, connection, call)

    async def _take(self, pool: Any, call: Call, until_s: float) -> Any:
        since_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(until_s):
                # Before the pool: there are as many slots as connections, so acquire() waits for a new connection at
                # most.
                await self._slots.take(call)
        except TimeoutError as error:
            raise self.timed_out_waiting(
                since_s,
                f"of {self.pool_max} connections (pg_pool_max) none was free in time, {len(self._ending)} are taken by "
                "abandoned statements that may still run",
            ) from error
        try:
            async with asyncio.timeout(self._timeout_s):
                return await pool.acquire()
        except BaseException:
            self._slots.give_back(call)
            raise

    def timed_out_waiting(self, since_s: float, what: str) -> Exception:
        """Returns the error of a call that has waited from `since_s`, a time of the event loop, until its deadline:
        Overloaded, or TimeoutError if PostgreSQL has answered no call meanwhile. Agents extend their leases by
        themselves while PostgreSQL is away, and must not for less."""
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
        """Keeps the slot of an abandoned statement until that has ended in the server: by the answer to the
        cancellation that asyncpg sends, or, if the server is out of reach, by the server's limits."""
        task = asyncio.create_task(self._ended(pool, connection), name="end an abandoned statement")
        self._ending.add(task)
        _abandoned.add(1)
        task.add_done_callback(partial(self._has_ended, call))

    async def _ended(self, pool: Any, connection: Any) -> None:
        limit_s = self.limits.statement_ms / 1000
        try:
            async with asyncio.timeout(limit_s):
                if not connection.is_in_transaction():
                    # An abandoned BEGIN may have succeeded all the same: the next answer shows that.
                    await connection.execute("SELECT 1")
                if connection.is_in_transaction():
                    await connection.execute("ROLLBACK")
                self._note_answer(None)
        except FAILURES as error:
            log.debug("the connection of an abandoned statement is closed: %s", error or type(error).__name__)
            discard(connection)
        except asyncio.CancelledError:
            discard(connection)
            raise
        finally:
            with contextlib.suppress(*FAILURES):  # the connection is closed then
                await pool.release(connection, timeout=limit_s)

    def _has_ended(self, call: Call, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        _abandoned.add(-1)
        self._slots.give_back(call)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("ending an abandoned statement failed", exc_info=error)

    # ---- transactions

    @asynccontextmanager
    async def transaction(self, connection: Any, how: str = "", *, idle_ms: int | None = None) -> AsyncIterator[None]:
        """Begins a transaction; commits at the end, or rolls back after a StreamHouseError or an error of a statement.
        After any other error the connection gets closed: a rollback would wait as long again for a server that does not
        answer.

        `idle_ms`: how long the server waits for the next statement.
        """
        limits = self.limits.of_transaction(idle_ms or self.limits.transaction_idle_ms)
        if not (self.through_pooler or idle_ms):
            limits = {}  # the session has them
        try:
            await connection.execute(begin(limits, how))
            yield
        except (StreamHouseError, asyncpg.PostgresError):
            if not connection.is_closed():  # else the server has rolled back already
                await connection.execute("ROLLBACK")
            raise
        # PostgreSQL answers ROLLBACK, not an error, to the COMMIT of a transaction in which a statement has failed.
        if (ended := await connection.execute("COMMIT")) != "COMMIT":
            raise asyncpg.InFailedSQLTransactionError(f"the transaction ended with {ended}: a statement had failed")


class Listening:
    """Makes long-lived connections to the server itself. `past_pooler`: the DSN was given to bypass a pooler."""

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
                self._warned = True  # reported once, not with every broken connection
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
    """Returns the statements that begin a transaction with settings that end with it. They are sent together, so they
    reach the same connection of the server, also through a pooler."""
    return "; ".join([f"BEGIN {how}".rstrip(), *(f"SET LOCAL {name} = '{value}'" for name, value in limits.items())])


async def _limit_session(connection: Any, limits: Limits) -> None:
    """Gives the connection the limits that the server knows (client_connection_check_interval came with version 14).
    Not as startup parameters: a pooler refuses those."""
    settings = limits.of_session()
    try:
        await _set(connection, settings)
    except asyncpg.InvalidParameterValueError:  # an operating system that cannot detect a closed connection
        del settings["client_connection_check_interval"]
        await _set(connection, settings)


async def _set(connection: Any, settings: dict[str, str]) -> None:
    text = "SELECT set_config(name, value, false) FROM unnest($1::text[], $2::text[]) given(name, value) "
    text += "JOIN pg_settings USING (name)"
    await connection.execute(text, list(settings), list(settings.values()))


async def _leads_to_pooler(connection: Any) -> bool:
    """Returns True if the process that answers is not the process of the login: a pooler invents the reported
    number."""
    async with connection.transaction():
        return bool(await connection.fetchval("SELECT pg_backend_pid()") != connection.get_server_pid())


async def _keep(_: Any) -> None:
    """Keeps the state of a connection that returns to the pool: no statement here changes a session's state, and the
    pool itself rolls back open transactions. The pool's own reset would be a statement more per transaction."""


def _leaves_sound(error: BaseException) -> bool:
    """Returns True if the connection is usable after this error: a StreamHouseError, or an error of the statement.
    After a read-only error, another server may be the primary behind the same address."""
    if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        return False
    return isinstance(error, (StreamHouseError, asyncpg.PostgresError))


def discard(connection: Any) -> None:
    """Closes a doubtful connection. Must not raise, which would replace the error or the cancellation that is in
    flight."""
    with contextlib.suppress(asyncpg.InterfaceError):  # the pool has found the connection closed
        connection.terminate()
