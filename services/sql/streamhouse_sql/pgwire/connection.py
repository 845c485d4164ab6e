"""One connection of a PostgreSQL client: startup, simple and extended queries, portals.

Owns: the socket, the session, prepared statements and portals. Does not own: how a statement runs (service.py), the
catalogue's answers (catalogue.py), the cancel keys (server.py).
Invariants: messages are answered in their order. A reader task takes messages ahead, `sql_pg_message_bytes_max` bytes
at most, so that a client that goes away is noticed while its statement runs: the statement then ends at once, and gives
its turn back. An error of an extended-query message skips the messages up to Sync. When `run` returns, the socket is
closed and no portal is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from shproto.errors import StreamHouseError
from shruntime.tasks import cancel_and_wait

from streamhouse_sql.pgwire.catalogue import Catalogue
from streamhouse_sql.pgwire.core import protocol
from streamhouse_sql.pgwire.core.errors import PgError, from_ours
from streamhouse_sql.pgwire.core.session import Session
from streamhouse_sql.pgwire.statements import Statements
from streamhouse_sql.service import SqlService
from streamhouse_sql.settings import SqlSettings

if TYPE_CHECKING:
    from streamhouse_sql.pgwire.server import PgServer

log = logging.getLogger(__name__)
T = TypeVar("T")

_READ_BYTES = 64 * 1024
# Nothing is read while messages wait, so that the client's end is not read either. A client that has sent
# more than the sockets hold is only missed at the deadline: its end comes behind its bytes.
LOOK_S = 1.0
# Of answers that wait in this process before the socket takes them.
_SEND_BYTES = 256 * 1024
# Of a message that waits, on top of its own: else millions of the smallest would fit into the limit.
_MESSAGE_COST_BYTES = 512
# A client asks for TLS, then for GSSAPI, and then starts.
_FIRST_MESSAGES_MAX = 4
# Time that a client has to take the last words.
_GOODBYE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Parts that all connections of a server share."""

    service: SqlService
    settings: SqlSettings
    catalogue: Catalogue
    threads: ThreadPoolExecutor
    server: PgServer


class Connection:
    """A connection. `run` serves it to its end."""

    def __init__(self, context: Context, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._context = context
        self._reader = reader
        self._writer = writer
        self._decoder = protocol.Decoder(context.settings.sql_pg_message_bytes_max)
        self._messages: asyncio.Queue[tuple[protocol.Message, int] | protocol.ProtocolViolation] = asyncio.Queue()
        self._ahead_bytes = 0
        self._has_room = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._cancelled_by: PgError | None = None
        self._skips_to_sync = False
        self._statements: Statements | None = None

    # ---- the whole of it

    async def run(self) -> None:
        """Serves the connection until the client leaves, a limit is passed, or the task is cancelled."""
        main = asyncio.current_task()
        assert main is not None
        reader: asyncio.Task[None] | None = None
        process_id = 0
        try:
            startup = await self._startup()
            if startup is None:
                return
            process_id, secret = self._context.server.admit(self)
            session = Session(startup.parameters)
            self._statements = Statements(self._context, session, process_id)
            self._greet(startup, session, process_id, secret)
            await self._flush()
            reader = asyncio.create_task(self._read(), name="pgwire reader")
            reader.add_done_callback(lambda _: self._client_left())
            await self._serve(session)
        except PgError as error:
            await self._goodbye(error)
        except protocol.ProtocolViolation as error:
            await self._goodbye(PgError("08P01", str(error), is_fatal=True))
        except asyncio.CancelledError:
            if self._cancelled_by is not None:
                await self._goodbye(self._cancelled_by)
            raise
        except (ConnectionError, TimeoutError):
            pass  # the client is gone, or takes nothing
        finally:
            if self._statements is not None:
                await self._statements.close()
            if reader is not None:
                await cancel_and_wait(reader)
            self._context.server.leave(process_id)
            self._writer.transport.abort()

    def cancel(self) -> None:
        """Cancels the statement that the connection runs, if any."""
        if self._work is not None and not self._work.done() and self._cancelled_by is None:
            self._cancelled_by = PgError("57014", "canceling statement due to user request")
            self._work.cancel()

    def end(self, reason: PgError) -> None:
        """Ends the connection with the reason once `run` is cancelled."""
        self._cancelled_by = reason

    # ---- before the session

    async def _startup(self) -> protocol.Startup | None:
        """Returns the startup message; None for a connection that ends before it, or is a request to cancel."""
        try:
            async with asyncio.timeout(self._context.settings.sql_pg_startup_timeout_ms / 1000):
                for _ in range(_FIRST_MESSAGES_MAX):
                    while (first := self._decoder.first()) is None:
                        data = await self._reader.read(_READ_BYTES)
                        if not data:
                            return None
                        self._decoder.feed(data)
                    if isinstance(first, protocol.Startup):
                        return first
                    if isinstance(first, protocol.CancelRequest):
                        self._context.server.cancel(first.process_id, first.secret)
                        return None
                    self._writer.write(protocol.REFUSE_ENCRYPTION)
                    await self._writer.drain()
        except TimeoutError:
            limit_ms = self._context.settings.sql_pg_startup_timeout_ms
            raise PgError(
                "08006", f"no startup packet within {limit_ms} ms (sql_pg_startup_timeout_ms)", is_fatal=True
            ) from None
        raise PgError("08P01", "no startup packet", is_fatal=True)

    def _greet(self, startup: protocol.Startup, session: Session, process_id: int, secret: bytes) -> None:
        unknown = [name for name in startup.parameters if name.startswith("_pq_.")]
        if startup.version > protocol.PROTOCOL_3 or unknown:
            self._writer.write(protocol.negotiate_version(0, unknown))
        self._writer.write(protocol.AUTHENTICATION_OK)
        for name, value in session.reported().items():
            self._writer.write(protocol.parameter_status(name, value))
        self._writer.write(protocol.backend_key(process_id, secret))
        self._writer.write(protocol.ready_for_query(session.status))

    # ---- messages

    async def _read(self) -> None:
        """Takes messages ahead. Returns when the client has left."""
        limit = self._context.settings.sql_pg_message_bytes_max
        try:
            while True:
                for message, size in self._decoder.messages():
                    size += _MESSAGE_COST_BYTES
                    self._ahead_bytes += size
                    self._messages.put_nowait((message, size))
                while self._ahead_bytes > limit:
                    self._has_room.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_S):
                            await self._has_room.wait()
                            continue
                    if _has_left(self._writer.get_extra_info("socket").fileno()):
                        return
                data = await self._reader.read(_READ_BYTES)
                if not data:
                    return
                self._decoder.feed(data)
        except protocol.ProtocolViolation as error:
            self._messages.put_nowait(error)
            # The place of the next message is unknown: all bytes are dropped, and only the end is waited for.
            while await self._reader.read(_READ_BYTES):
                pass
        except ConnectionError:
            return

    def _client_left(self) -> None:
        """Ends the wait for a message, or the statement that runs."""
        self._messages.put_nowait((protocol.Terminate(), 0))
        if self._work is not None and not self._work.done():
            self._cancelled_by = self._cancelled_by or PgError("08006", "the client left", is_fatal=True)
            self._work.cancel()

    async def _serve(self, session: Session) -> None:
        idle_ms = self._context.settings.sql_pg_idle_timeout_ms
        while True:
            try:
                async with asyncio.timeout(idle_ms / 1000 if idle_ms else None):
                    taken = await self._messages.get()
            except TimeoutError:
                raise PgError(
                    "57P05", f"terminating connection: idle for {idle_ms} ms (sql_pg_idle_timeout_ms)", is_fatal=True
                ) from None
            if isinstance(taken, protocol.ProtocolViolation):
                raise taken
            message, size = taken
            self._ahead_bytes -= size
            self._has_room.set()
            if isinstance(message, protocol.Terminate):
                return
            await self._answer(message, session)
            if self._messages.empty() or isinstance(message, protocol.Flush | protocol.Sync | protocol.SimpleQuery):
                await self._flush()

    async def _answer(self, message: protocol.Message, session: Session) -> None:
        assert self._statements is not None
        if isinstance(message, protocol.Sync):
            self._skips_to_sync = False
            await self._statements.sync()
            self._writer.write(protocol.ready_for_query(session.status))
            return
        if isinstance(message, protocol.Flush) or (self._skips_to_sync and not _is_simple(message)):
            return
        is_simple = _is_simple(message)
        try:
            if isinstance(message, protocol.SimpleQuery):
                await self._cancellable(self._statements.simple(message.text, self._send))
            else:
                await self._cancellable(self._extended(message))
        except PgError as error:
            if error.is_fatal:
                raise
            session.fail()
            self._skips_to_sync = not is_simple
            self._writer.write(_response(error, "ERROR"))
        if is_simple:
            await self._statements.sync()
            self._writer.write(protocol.ready_for_query(session.status))

    async def _cancellable(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs the work until it ends, or is cancelled by request. Raises PgError for every error but those of the
        connection."""
        self._work = task = asyncio.create_task(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await cancel_and_wait(task)
            main = asyncio.current_task()
            if self._cancelled_by is None or (main is not None and main.cancelling()):
                raise
            reason, self._cancelled_by = self._cancelled_by, None
            raise reason from None
        except StreamHouseError as error:
            raise from_ours(error, "") from error
        except (PgError, ConnectionError, TimeoutError):
            raise
        except Exception as error:
            log.exception("a statement of a PostgreSQL client failed")
            raise PgError("XX000", "internal error; the server's log has the trace") from error
        finally:
            self._work = None
            if self._cancelled_by is not None and not self._cancelled_by.is_fatal:
                self._cancelled_by = None  # it came too late for this statement, and is not meant for the next

    async def _extended(self, message: protocol.Message) -> None:
        statements = self._statements
        assert statements is not None
        match message:
            case protocol.Parse():
                await statements.parse(message)
                self._writer.write(protocol.PARSE_COMPLETE)
            case protocol.Bind():
                await statements.bind(message)
                self._writer.write(protocol.BIND_COMPLETE)
            case protocol.Describe(kind="S"):
                self._writer.write(await statements.describe_statement(message.name))
            case protocol.Describe():
                self._writer.write(await statements.describe_portal(message.name))
            case protocol.Execute():
                await statements.execute(message.portal, message.rows_max, self._send)
            case protocol.Close():
                await statements.close_named(message.kind, message.name)
                self._writer.write(protocol.CLOSE_COMPLETE)
            case protocol.Unsupported():
                raise PgError("0A000", f"{message.name} messages are not supported")

    # ---- answers

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > _SEND_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        """Waits until the client has taken all answers but a buffer's worth. Raises ConnectionError if it
        takes longer than a statement may."""
        try:
            async with asyncio.timeout(self._context.settings.sql_timeout_ms / 1000):
                await self._writer.drain()
        except TimeoutError:
            raise ConnectionAbortedError("the client does not take the result") from None

    async def _goodbye(self, error: PgError) -> None:
        """Tells the client why the connection ends, if it takes it."""
        self._writer.write(_response(error, "FATAL" if error.is_fatal else "ERROR"))
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                self._writer.close()
                await self._writer.wait_closed()


def _has_left(fileno: int) -> bool:
    """Returns True if the peer of a socket has closed it, also while bytes of the peer wait to be read."""
    poll = select.poll()
    poll.register(fileno, select.POLLRDHUP)
    return bool(poll.poll(0))


def _is_simple(message: protocol.Message) -> bool:
    return isinstance(message, protocol.SimpleQuery)


def _response(error: PgError, severity: str) -> bytes:
    return protocol.error_response(
        severity=severity,
        sqlstate=error.sqlstate,
        message=error.message,
        hint=error.hint,
        detail=error.detail,
        position=error.position,
    )
