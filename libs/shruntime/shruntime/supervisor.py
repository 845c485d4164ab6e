"""Reports to the supervisor of this process by systemd's notify protocol, and handles SIGHUP.

Owns: the handler of SIGHUP while a service runs, the datagrams to NOTIFY_SOCKET, the watchdog's task. Does not own:
SIGINT and SIGTERM (tasks.py), the log file (logs.py), health (server.py). Invariants: SIGHUP never ends a service, and
stays ignored if it was ignored at the start (nohup). READY=1 is first sent when the service is first SERVING.
WATCHDOG=1 is sent by a task of the event loop, so that a blocked loop is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from shruntime.logs import reopen_log_file
from shruntime.signals import let_pass, take_back
from shruntime.tasks import Tasks

log = logging.getLogger(__name__)

# Wait before a datagram is repeated to a supervisor whose queue is full.
RETRY_S = 0.1
# A process has half a dozen states in its life; beyond that the supervisor does not read, and the oldest are dropped.
UNSENT_MAX = 32


class Supervisor:
    """Reports the service's state to systemd, and opens the log file again on SIGHUP, inside `async with`.

    notify_socket: a path, or an abstract socket as "@name"; empty: no reports. watchdog_s: seconds without a sign of
    life after which systemd restarts the service; 0: no watchdog.
    """

    def __init__(self, notify_socket: str = "", watchdog_s: float = 0.0) -> None:
        self._notify_socket = notify_socket
        self._watchdog_s = watchdog_s if notify_socket else 0.0
        self._tasks = Tasks()
        self._unsent: deque[str] = deque(maxlen=UNSENT_MAX)
        self._retry: asyncio.TimerHandle | None = None
        self._is_ready = False
        self._is_stopping = False
        self._handles_hangups = False
        self._on_hangup: list[Callable[[], None]] = []

    @classmethod
    def of_environment(cls) -> Self:
        """Returns the supervisor that this process's variables name, and removes the variables: a child (PostgreSQL
        knows the protocol) must not report for the service."""
        made = cls.of(os.environ)
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            os.environ.pop(name, None)
        return made

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """Returns the supervisor that NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID describe; unusable values are
        logged and left out."""
        notify_socket = environ.get("NOTIFY_SOCKET", "")
        if notify_socket and (notify_socket[0] not in "/@" or len(notify_socket) < 2):
            log.warning("NOTIFY_SOCKET = %r is neither a path nor an abstract socket (@name): not used", notify_socket)
            notify_socket = ""
        return cls(notify_socket, _watchdog_s(environ))

    async def __aenter__(self) -> Self:
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
            self._handles_hangups = True
        self._tell("STATUS=starting")
        if self._watchdog_s:
            self._tasks.spawn("watchdog", self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._tasks.stop()
        if self._handles_hangups:
            take_back(asyncio.get_running_loop(), {signal.SIGHUP: let_pass})
        if self._retry is not None:
            self._retry.cancel()

    # ---- states

    def serving(self, address: str, is_serving: bool) -> None:
        """Reports the health status: READY=1 the first time that the service at `address` is SERVING, and a STATUS
        each time. Does nothing once the service stops."""
        if self._is_stopping or not (is_serving or self._is_ready):
            return
        status = f"serving on {address}" if is_serving else "not serving: waits for what it needs"
        self._tell(f"STATUS={status}" if self._is_ready else f"READY=1\nSTATUS={status}")
        self._is_ready = True

    def stopping(self) -> None:
        """Reports once that the service drains."""
        if not self._is_stopping:
            self._is_stopping = True
            self._tell("STOPPING=1\nSTATUS=draining")

    async def _watch(self) -> None:
        while True:
            if not self._unsent:  # a late sign of life means nothing
                self._tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / 2)  # as sd_watchdog_enabled(3) recommends

    def on_hangup(self, call: Callable[[], None]) -> None:
        """Registers a call for SIGHUP: of a child process, which opens its log file again, too."""
        self._on_hangup.append(call)

    def _reload(self) -> None:
        for call in self._on_hangup:
            call()
        is_notified = self._is_ready and not self._is_stopping
        # With Type=notify-reload systemd waits for READY=1, and takes a reload without the time for a start.
        if is_notified:
            self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000}")
        if (path := reopen_log_file()) is not None:
            log.info("SIGHUP: the log goes on in %s, opened anew", path)
        else:
            log.info(
                "SIGHUP changes nothing here: the log goes to stderr; settings are read at the start. SIGTERM stops"
            )
        if is_notified:
            self._tell("READY=1")

    # ---- datagrams

    def _tell(self, state: str) -> None:
        if self._notify_socket:
            self._unsent.append(state)
            if self._retry is None:
                self._send_unsent()

    def _send_unsent(self) -> None:
        self._retry = None
        while self._unsent:
            try:
                self._send(self._unsent[0])
            except BlockingIOError:
                self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._send_unsent)
                return
            except OSError as error:
                log.warning("%r cannot be sent to NOTIFY_SOCKET %r: %s", self._unsent[0], self._notify_socket, error)
            self._unsent.popleft()

    def _send(self, state: str) -> None:
        # A socket for each: systemd may have been restarted since the last datagram. Connected, since `sendto` of
        # eventlet's sockets waits in a hub.
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
            sender.setblocking(False)
            name = self._notify_socket
            sender.connect(f"\0{name[1:]}" if name.startswith("@") else name)
            sender.send(state.encode())


def _watchdog_s(environ: Mapping[str, str]) -> float:
    """Returns the seconds of WATCHDOG_USEC, or 0.0 if none is meant for this process."""
    given, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not given or (pid and pid != str(os.getpid())):
        return 0.0
    if not given.isascii() or not given.isdigit() or int(given) == 0:
        log.warning("WATCHDOG_USEC = %r is no number of microseconds above 0: no watchdog", given)
        return 0.0
    return int(given) / 1e6
