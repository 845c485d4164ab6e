"""PostgreSQL as a child process on a data directory of ours: made at the first start, recovered at every other.
Meant for one machine and one user; production uses a server of its own (pg_dsn)."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO
from urllib.parse import quote

import asyncpg

from streamhouse_embedded.postgres_system import PostgresError, RunAs, find_bin_dir, stop_orphan

__all__ = ["EmbeddedPostgres", "PostgresError"]

log = logging.getLogger(__name__)

SOCKET_PATH_BYTES_MAX = 107
"""Linux: sun_path has 108 bytes, with the closing zero."""

SOCKET_PORT = 5432
"""Only names the socket file: `.s.PGSQL.5432`."""

INITDB_TIMEOUT_S = 120.0
"""It takes 0.3 s, and some seconds where fsync is slow."""

START_TIMEOUT_S = 120.0
"""Ready in 0.1 s; after a crash it first replays up to max_wal_size, 256 MB."""

STOP_TIMEOUT_S = 15.0
"""For a fast shutdown, which writes a checkpoint; then for an immediate one. After that it is killed."""

POLL_INTERVAL_S = 0.01
LOG_BYTES_MAX = 1024 * 1024
"""The log of earlier starts is dropped beyond this."""

LOG_LINES_SHOWN = 15

SETTINGS = {
    "shared_buffers": "64MB",  # the control plane's tables fit many times over
    "max_connections": "60",  # four services with pools of up to 10, and room for psql
    "max_wal_size": "256MB",  # bounds disk use and the replay after a crash
    "max_parallel_workers_per_gather": "0",  # small queries only; spares /dev/shm, which is small in containers
    "unix_socket_permissions": "0700",
    "logging_collector": "off",
}
"""Durability settings (fsync, synchronous_commit, full_page_writes) stay at their defaults: on."""

_LEFT_BY_CRASH = "pre-existing shared memory block"
"""Logged while backends of a killed server still end: some ms later the start works."""


class EmbeddedPostgres:
    """One server. `start` and `stop` may alternate; the thread that calls `start` must outlive the server.

    Listens on a Unix socket inside `data_dir` that only its user may enter; on 127.0.0.1 with a random
    password where `port` says so, or where the path is too long for a socket (then on a free port).
    """

    def __init__(self, data_dir: Path | str, *, bin_dir: Path | str | None = None, port: int | None = None) -> None:
        self.data_dir = Path(data_dir).absolute()
        self.log_path = self._beside(".log")
        self._explicit_bin_dir = Path(bin_dir) if bin_dir else None
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = -1

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    async def start(self) -> str:
        """Start, on first use after creating the database; returns its DSN once it accepts connections.

        Raises PostgresError, with the last lines of the log where there are some.
        """
        assert self._process is None, "started twice"
        self._acquire_lock()
        try:
            bin_dir = find_bin_dir(self._explicit_bin_dir)
            user = RunAs.choose(bin_dir, self.data_dir)
            await asyncio.to_thread(stop_orphan, self.data_dir)
            if not (self.data_dir / "PG_VERSION").exists():
                await self._initialise(bin_dir, user)
            return await self._start_server(bin_dir, user)
        except BaseException:
            await self.stop()
            raise

    def running_dsn(self) -> str:
        """Of the server that another process runs on this directory. Raises PostgresError when there is none."""
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
            port, directory, host = int(lines[3]), lines[4], lines[5]
        except (OSError, IndexError, ValueError):
            raise PostgresError(f"no PostgreSQL runs in {self.data_dir}") from None
        return self._dsn(directory or host, port)

    async def stop(self) -> None:
        """Fast shutdown (open transactions roll back); harder ones if that takes too long. Idempotent."""
        process, self._process = self._process, None
        try:
            if process is not None:
                await _stop_process(process)
        finally:
            self._release_lock()

    def kill(self) -> None:
        """SIGKILL, as a crash would: the next start recovers."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._release_lock()

    def _beside(self, suffix: str) -> Path:
        return self.data_dir.with_name(self.data_dir.name + suffix)

    def _acquire_lock(self) -> None:
        """The lock goes with our process: who has it may take a running server for an orphan."""
        try:
            self.data_dir.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._beside(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise PostgresError(f"cannot use {self.data_dir}: {exc.strerror}") from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise PostgresError(f"PostgreSQL in {self.data_dir} is in use by another process") from None
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def _initialise(self, bin_dir: Path, user: RunAs) -> None:
        """initdb beside the final place, then rename: a crash in between leaves nothing half-made there."""
        fresh = self._beside(".initdb")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        password_path = fresh.with_suffix(".password")
        password_path.unlink(missing_ok=True)
        password_path.touch(mode=0o600)
        password_path.write_text(secrets.token_urlsafe(24))
        user.give(fresh)
        user.give(password_path)
        arguments = ["-D", str(fresh), "-U", "postgres", "-E", "UTF8", "--no-locale", "--auth-local=trust",
                     "--auth-host=scram-sha-256", f"--pwfile={password_path}"]  # fmt: skip
        try:
            await self._run_initdb(user.command(bin_dir / "initdb", arguments))
            password_path.replace(fresh / "streamhouse.password")
            if self.data_dir.exists():
                self.data_dir.rmdir()
            fresh.rename(self.data_dir)
        except OSError as exc:
            raise PostgresError(f"cannot set up {self.data_dir}: {exc.strerror}") from exc
        finally:
            password_path.unlink(missing_ok=True)
            shutil.rmtree(fresh, ignore_errors=True)

    async def _run_initdb(self, command: Sequence[str]) -> None:
        with self._open_log() as output:
            log_at = output.tell()
            process = _spawn(command, output)
        try:
            code = await asyncio.to_thread(process.wait, INITDB_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._error(f"initdb did not end within {INITDB_TIMEOUT_S} s", log_at) from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code:
            raise self._error(f"initdb failed with exit code {code}", log_at)

    async def _start_server(self, bin_dir: Path, user: RunAs) -> str:
        log_at = 0
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    process, dsn, log_at = self._launch(bin_dir, user)
                    if await self._accepts(dsn, process):
                        log.info("PostgreSQL runs in %s, pid %d", self.data_dir, process.pid)
                        return dsn
                    if not self._may_repeat(log_at):
                        message = f"PostgreSQL ended at its start with exit code {process.returncode}"
                        raise self._error(message, log_at)
                    await asyncio.sleep(POLL_INTERVAL_S)
        except TimeoutError:
            message = f"PostgreSQL did not accept connections within {START_TIMEOUT_S} s"
            raise self._error(message, log_at) from None

    def _launch(self, bin_dir: Path, user: RunAs) -> tuple[subprocess.Popen[bytes], str, int]:
        """The new server process, its DSN, and where its lines begin in the log."""
        host, port = self._choose_address()
        with self._open_log() as output:
            log_at = output.tell()
            self._process = _spawn(user.command(bin_dir / "postgres", self._arguments(host, port)), output)
        return self._process, self._dsn(host, port), log_at

    async def _accepts(self, dsn: str, process: subprocess.Popen[bytes]) -> bool:
        """Whether the server accepts a connection (True) or ends first (False)."""
        while process.poll() is None:
            try:
                connection = await asyncpg.connect(dsn)
            except (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError):
                await asyncio.sleep(POLL_INTERVAL_S)
            except asyncpg.PostgresError as exc:
                raise PostgresError(f"PostgreSQL in {self.data_dir} refuses us: {exc}") from exc
            else:
                await connection.close()
                return True
        return False

    def _may_repeat(self, log_at: int) -> bool:
        lines = self._log_lines(log_at)
        port_taken = self._port is None and any("Address already in use" in line for line in lines)
        return port_taken or any(_LEFT_BY_CRASH in line for line in lines)

    def _choose_address(self) -> tuple[str, int]:
        """A socket directory, or an IP address; and the port."""
        if self._port is not None:
            return "127.0.0.1", self._port
        socket_path = self.data_dir / f".s.PGSQL.{SOCKET_PORT}"
        if len(os.fsencode(socket_path)) <= SOCKET_PATH_BYTES_MAX and "," not in str(self.data_dir):
            return str(self.data_dir), SOCKET_PORT
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", probe.getsockname()[1]

    def _arguments(self, host: str, port: int) -> list[str]:
        by_socket = host.startswith("/")
        # PostgreSQL takes the directory as a list, separated by commas and quoted like SQL names.
        directory = f'"{host.replace(chr(34), chr(34) * 2)}"' if by_socket else ""
        addresses = {
            "listen_addresses": "" if by_socket else host,
            "unix_socket_directories": directory,
            "port": str(port),
        }
        options = [option for item in (SETTINGS | addresses).items() for option in ("-c", "=".join(item))]
        return ["-D", str(self.data_dir), *options]

    def _dsn(self, host: str, port: int) -> str:
        if host.startswith("/"):
            return f"postgresql://postgres@/postgres?host={quote(host, safe='')}&port={port}"
        password = (self.data_dir / "streamhouse.password").read_text()
        return f"postgresql://postgres:{password}@{host}:{port}/postgres"

    def _open_log(self) -> IO[bytes]:
        with contextlib.suppress(FileNotFoundError):
            if self.log_path.stat().st_size > LOG_BYTES_MAX:
                self.log_path.unlink()
        output = self.log_path.open("ab")
        output.seek(0, os.SEEK_END)
        return output

    def _log_lines(self, log_at: int) -> list[str]:
        with self.log_path.open("rb") as written:
            written.seek(log_at)
            return written.read(LOG_BYTES_MAX).decode(errors="replace").splitlines()

    def _error(self, message: str, log_at: int) -> PostgresError:
        shown = "\n  ".join(self._log_lines(log_at)[-LOG_LINES_SHOWN:])
        return PostgresError(f"{message} (data directory {self.data_dir}, log {self.log_path}):\n  {shown}")


def _spawn(command: Sequence[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start in a session of its own, so that Ctrl-C in a terminal reaches only us, and we stop it in order."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=ours | {"LC_ALL": "C"},
        start_new_session=True,
    )


async def _stop_process(process: subprocess.Popen[bytes]) -> None:
    try:
        for number in (signal.SIGINT, signal.SIGQUIT):  # fast, then immediate shutdown
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
                return
    finally:
        if process.poll() is None:  # it hangs, or we are being cancelled
            process.kill()
            process.wait()
