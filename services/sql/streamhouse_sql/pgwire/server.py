"""Listens for PostgreSQL's clients, and keeps their connections within limits.

Owns: the listening socket, the connections, the keys by which a client cancels its statement. Does not own: the work
of a connection (connection.py), the statements (service.py).
Invariants: at most `sql_pg_connections_max` sessions are open; the next one is told so and closed. After `stop` no
connection is open, and none of their statements holds a turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shruntime.tasks import cancel_and_wait

from streamhouse_sql import telemetry
from streamhouse_sql.pg_listener import address_of
from streamhouse_sql.pgwire.catalogue import Catalogue, CatalogueEngine
from streamhouse_sql.pgwire.connection import Connection, Context
from streamhouse_sql.pgwire.core.errors import PgError
from streamhouse_sql.service import SqlService
from streamhouse_sql.settings import SqlSettings

log = logging.getLogger(__name__)

# Threads that encode rows and plan statements.
THREADS = 2
# Connections beside the sessions: before their startup message, to cancel, or on their way out.
STARTING_MAX = 100


@dataclass(frozen=True, slots=True)
class _Key:
    secret: bytes
    connection: Connection


class PgServer:
    """The server. `address` is where it listens, once `start` has returned."""

    def __init__(self, service: SqlService, settings: SqlSettings, new_engine: Callable[[], CatalogueEngine]) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(THREADS, "pgwire")
        self._catalogue = Catalogue(service, new_engine, self._threads)
        self._context = Context(
            service=service, settings=settings, catalogue=self._catalogue, threads=self._threads, server=self
        )
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._keys: dict[int, _Key] = {}
        self._next_process_id = 1
        self._is_stopping = False
        self.address = ""

    async def start(self, listener: socket.socket) -> None:
        """Begins to take connections of a socket that listens already; `stop` closes it."""
        self._server = await asyncio.start_server(self._accept, sock=listener, limit=_READ_BYTES)
        self.address = address_of(listener, self._settings)
        log.info("PostgreSQL's clients connect to %s", self.address)

    async def stop(self) -> None:
        """Ends the connections and their statements. Idempotent."""
        self._is_stopping = True
        if self._server is not None:
            self._server.close()
        for key in list(self._keys.values()):
            key.connection.end(PgError("57P01", "terminating connection: the server is stopping", is_fatal=True))
        await cancel_and_wait(*self._tasks)
        await self._catalogue.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= self._settings.sql_pg_connections_max + STARTING_MAX:
            writer.transport.abort()
            return
        connection = Connection(self._context, reader, writer)
        task = asyncio.create_task(self._serve(connection), name="pgwire connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: Connection) -> None:
        with contextlib.suppress(ConnectionError):
            await connection.run()

    # ---- for the connections

    def admit(self, connection: Connection) -> tuple[int, bytes]:
        """Takes a session in. Returns its process id and secret. Raises PgError, fatal, beyond the limit."""
        if self._is_stopping:
            raise PgError("57P03", "the database system is shutting down", is_fatal=True)
        limit = self._settings.sql_pg_connections_max
        if len(self._keys) >= limit:
            raise PgError("53300", f"sorry, too many clients already: sql_pg_connections_max is {limit}", is_fatal=True)
        while self._next_process_id in self._keys:
            self._next_process_id = self._next_process_id % 0x7FFFFFFF + 1
        process_id, secret = self._next_process_id, secrets.token_bytes(4)
        self._next_process_id = process_id % 0x7FFFFFFF + 1
        self._keys[process_id] = _Key(secret, connection)
        telemetry.pg_connections.add(1)
        return process_id, secret

    def leave(self, process_id: int) -> None:
        """Forgets a session."""
        if self._keys.pop(process_id, None) is not None:
            telemetry.pg_connections.add(-1)

    def cancel(self, process_id: int, secret: bytes) -> None:
        """Cancels the statement of the session with this key; a wrong key does nothing."""
        key = self._keys.get(process_id)
        if key is not None and hmac.compare_digest(key.secret, secret):
            key.connection.cancel()


_READ_BYTES = 64 * 1024
