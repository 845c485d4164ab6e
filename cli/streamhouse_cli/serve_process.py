"""`streamhouse serve` as a child process: for the demo, benchmarks and tests."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

# initdb on a slow disk takes a few seconds; well beyond that something hangs.
READY_TIMEOUT_S = 60.0
# The time that `serve` has to drain (shutdown_timeout_ms), and some seconds.
STOP_TIMEOUT_S = 45.0


class ServeFailed(Exception):
    """The process ended, or did not get ready or stop in time; the message has the end of its log."""


class ServeProcess:
    """Runs `streamhouse serve` on `data_dir` and a free port, with the log in `log_path`. A context manager: started on
    entry, drained on exit. The process has a session of its own, so that Ctrl-C reaches only the parent, which stops
    it in order."""

    def __init__(self, data_dir: Path, log_path: Path, environ: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self._log_path = log_path
        # Any free port, as for the platform itself: several of these processes run side by side.
        self._environ = {"STREAMHOUSE_SQL_PG_LISTEN": "127.0.0.1:0", **os.environ, **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill_unless_stopped()

    def start(self) -> None:
        """Starts the process; `address` is set once it serves. Raises ServeFailed."""
        command = [sys.executable, "-m", "streamhouse_cli", "serve", "--json"]
        command += ["--data-dir", str(self.data_dir), "--listen", "127.0.0.1:0"]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environ,
                start_new_session=True,
            )
        try:
            self.address = json.loads(self._first_line())["address"]
        except BaseException:
            self.kill_unless_stopped()
            raise

    def _first_line(self) -> bytes:
        """Returns the line that announces the address. Raises ServeFailed if the process ends or takes too long."""
        assert self._process is not None and self._process.stdout is not None
        deadline, line = time.monotonic() + READY_TIMEOUT_S, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    raise ServeFailed(f"streamhouse serve was not ready after {READY_TIMEOUT_S:.0f} s{self.log_end()}")
                # Not readline(): it would wait beyond the deadline for a line that is never completed.
                piece = os.read(self._process.stdout.fileno(), 4096)
                if not piece:
                    raise ServeFailed(f"streamhouse serve ended before it was ready{self.log_end()}")
                line += piece
        return line

    def stop(self) -> None:
        """Sends SIGTERM, and waits for the drain. Raises ServeFailed unless the process ends in time with exit code
        0."""
        assert self._process is not None, "not started"
        # Drains as an operator's stop does: uploads, registers, and gives the leases back.
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            self.kill_unless_stopped()
            raise ServeFailed(f"streamhouse serve did not stop in {STOP_TIMEOUT_S:.0f} s{self.log_end()}") from error
        self._close()
        if code != 0:
            raise ServeFailed(f"streamhouse serve ended with exit code {code}{self.log_end()}")

    def kill(self) -> None:
        """Sends SIGKILL, as a crash would end the process."""
        assert self._process is not None, "not started"
        self._process.kill()
        self._process.wait()
        self._close()

    def kill_unless_stopped(self) -> None:
        """Ends the process: gently, then by SIGKILL. Never raises for a process that has ended."""
        process = self._process
        if process is None or process.poll() is not None:
            self._close()
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._close()

    def _close(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()

    def log_end(self, size_bytes: int = 4096) -> str:
        """Returns the last lines of the log, for an error message."""
        text = self._log_path.read_bytes()[-size_bytes:].decode(errors="replace") if self._log_path.exists() else ""
        return f"; its log ends:\n{text}" if text else ""
