"""The SQL service as a child process: DuckDB and the memory of statements cannot take the log down with them.

Owns: the process, its restarts, the socket of PostgreSQL's clients. Does not own: statements, which the process runs
(streamhouse_sql.__main__), and the gRPC port of the platform, whose calls are forwarded.
Invariants: at most one process runs. It ends with this one, however this one ends: it reads the end of a socket pair.
The socket of PostgreSQL's clients stays open over restarts, so that they wait, and are not refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import NoReturn

from shproto.errors import Unavailable
from shproto.rpc import Connection, Interceptors
from shproto.services import SqlClient
from shproto.v1 import sql_pb2
from shruntime.tasks import Backoff, cancel_and_wait
from streamhouse_sql.pg_listener import address_of, open_listener
from streamhouse_sql.settings import SqlSettings

from streamhouse_embedded.children import how_it_ended, wait_for_end

log = logging.getLogger(__name__)

RESTART_FIRST_MS, RESTART_MS_MAX = 100, 10_000
"""Back-off of restarts. A process that has run for longer than the maximum begins anew."""

READY_TIMEOUT_MS = 30_000
"""For a statement that comes while the process starts, which takes a second or two."""

STOP_TIMEOUT_S = 10.0
"""For the end of the process, beside shutdown_timeout_ms. After that it is killed."""

RETRY_MS = 500


class SqlProcess:
    """Runs the SQL service. `interceptors`: of the calls that are forwarded. The process alone uses `sql_temp_dir`,
    which is emptied before its start."""

    def __init__(self, settings: SqlSettings, interceptors: Interceptors) -> None:
        self._settings = settings
        self._interceptors = interceptors
        self._listener: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._api: asyncio.Future[SqlClient] = asyncio.get_running_loop().create_future()
        self._running: asyncio.Task[NoReturn] | None = None
        self._has_begun = asyncio.Event()
        self.pg_address = ""
        """Address of the PostgreSQL wire protocol; empty where nothing listens."""

    @property
    def pid(self) -> int | None:
        """Process id; None while no process runs."""
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Listens for PostgreSQL's clients, and starts the process, whose imports take a second. Raises ListenError."""
        self._listener = open_listener(self._settings)
        if self._listener is not None:
            self.pg_address = address_of(self._listener, self._settings)
        self._launch()

    async def start(self, *, bootstrap: str, advertise: str, prometheus_listen: str) -> None:
        """Returns once the service serves, or has failed for the first time; it is started again then. `bootstrap`: of
        the coordinator; `advertise`: address at which clients find the service, whose calls are forwarded to it."""
        places = {
            "listen": "127.0.0.1:0",
            "advertise": advertise,
            "bootstrap": bootstrap,
            "prometheus_listen": prometheus_listen,
        }
        self._settings = self._settings.model_copy(update=places)
        self._running = asyncio.create_task(self._keep_running(), name="the process of SQL")
        await self._has_begun.wait()

    def reopen_log_file(self) -> None:
        """Has the process open its log file again."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGHUP)

    async def failed(self) -> NoReturn:
        """Waits for ever: a process that ends is started again. Raises the error of a defect."""
        assert self._running is not None, "start() comes first"
        await asyncio.shield(self._running)

    async def stop(self) -> None:
        """Ends the process: it ends its statements, gives its leases back. Idempotent, and safe after a failed
        start."""
        if self._running is not None:
            await cancel_and_wait(self._running)
        process, self._process = self._process, None
        if process is not None:
            await _end(process, self._settings.shutdown_timeout_ms / 1000 + STOP_TIMEOUT_S)
        # Last: the process has told the clients of its statements why they end.
        await self._disconnect()
        for opened in (self._channel, self._listener):
            if opened is not None:
                opened.close()

    async def execute(self, request: sql_pb2.ExecuteRequest) -> AsyncIterator[sql_pb2.ExecuteResponse]:
        """Yields the responses of the process (shproto.services.SqlApi). Raises its errors; Unavailable where the
        process does not start."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_MS / 1000):
                api = await asyncio.shield(self._api)
        except TimeoutError:
            raise Unavailable(
                f"the process of SQL does not start; its log says why ({READY_TIMEOUT_MS} ms)", retry_after_ms=RETRY_MS
            ) from None
        async for response in api.execute(request):
            yield response

    async def _keep_running(self) -> NoReturn:
        loop = asyncio.get_running_loop()
        backoff = Backoff(RESTART_FIRST_MS, RESTART_MS_MAX)
        while True:
            assert self._process is not None and self._channel is not None, "launch() comes first"
            process, channel = self._process, self._channel
            began_s = loop.time()
            try:
                await self._serve(process, channel)
            finally:
                self._has_begun.set()
            await self._disconnect()
            channel.close()
            if loop.time() - began_s > RESTART_MS_MAX / 1000:
                backoff.reset()
            wait_ms = backoff.next_ms()
            log.error(
                "the process of SQL ended (%s); it is started again in %.1f s", how_it_ended(process), wait_ms / 1000
            )
            await asyncio.sleep(wait_ms / 1000)
            self._launch()

    async def _disconnect(self) -> None:
        if self._api.done():
            api, self._api = self._api.result(), asyncio.get_running_loop().create_future()
            await api.close()

    async def _serve(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        """Hands over the settings, takes the address, and waits for the end of the process."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the process has ended
            await loop.sock_sendall(channel, self._settings.model_dump_json().encode() + b"\n")
            address = b""
            while not address.endswith(b"\n") and (piece := await loop.sock_recv(channel, 4096)):
                address += piece
            if address.endswith(b"\n"):
                self._api.set_result(SqlClient(self._connection(address.decode().strip())))
                self._has_begun.set()
                log.info("SQL runs in process %s", process.pid)
        await wait_for_end(process)

    def _connection(self, address: str) -> Connection:
        return Connection((address,), interceptors=self._interceptors)

    def _launch(self) -> None:
        # A process that was killed has left its spill files, which hold records; nobody else uses the directory.
        shutil.rmtree(self._settings.sql_temp_dir, ignore_errors=True)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        handed = [theirs.fileno(), *([self._listener.fileno()] if self._listener is not None else [])]
        command = [sys.executable, "-m", "streamhouse_sql", *map(str, handed)]
        with theirs:
            # A session of its own: Ctrl-C in a terminal reaches only us, and we stop it in order.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=handed, start_new_session=True
            )
        self._channel, self._process = ours, process


async def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await wait_for_end(process)
    finally:
        if process.poll() is None:  # it hangs, or this task is being cancelled
            log.error("the process of SQL does not stop; it is killed")
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
