"""PostgreSQL as a child process on a data directory of ours: made at the first start, recovered at every other, and
started again after a crash. Meant for a single machine and user; production uses a server of its own (pg_dsn).

Owns: the server's process, its data directory, and its access rules. Does not own: the tables. Invariants: a data
directory has at most one server, of one process of ours. Only the user that runs this process can connect: over a
socket PostgreSQL asks the kernel for that user (`peer`), over TCP for a random password.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import glob
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import quote

import asyncpg
from shruntime import files
from shruntime.tasks import Backoff, run_to_end

from streamhouse_embedded.children import how_it_ended, wait_for_end
from streamhouse_embedded.postgres_system import PostgresError, RunAs, find_bin_dir, stop_orphans

__all__ = ["EmbeddedPostgres", "PostgresError"]

log = logging.getLogger(__name__)

SOCKET_PATH_BYTES_MAX = 107
"""Linux: sun_path has 108 bytes, with the closing zero."""

SOCKET_PORT = 5432
"""Only names the socket file: `.s.PGSQL.5432`."""

TOOL_TIMEOUT_S = 30.0
"""For `postgres --version`, which takes some ms."""

INITDB_TIMEOUT_S = 120.0
"""It takes 0.3 s, and some seconds where fsync is slow."""

START_TIMEOUT_S = 120.0
"""Ready in 0.1 s; after a crash it first replays up to max_wal_size, 256 MB."""

STOP_TIMEOUT_S = 15.0
"""For a fast shutdown, which writes a checkpoint; then for an immediate one. After that it is killed."""

CHECKSUMS_TIMEOUT_S = 3600.0
"""For adding checksums to an older data directory: it is read and written once, some 100 MB/s on slow disks."""

RESTART_FIRST_MS, RESTART_MS_MAX = 100, 10_000
"""Back-off of restarts. A server that has run for longer than the maximum begins anew: it does not die at its start."""

FIRST_START_BYTES = 48 * 1024 * 1024
"""A new data directory takes 40 MiB, of which one file of the write-ahead log 16; the services want some for theirs."""

RESERVE_BYTES = 1024 * 1024
"""Kept in a file while there is room and given up for a start where there is none: lock files and the end of a recovery
took 8 KiB and less, also after a crash. A platform whose disk is full can then be started, read, and deleted from."""

NO_SPACE_MESSAGES = ("No space left on device", "Disk quota exceeded")
"""By PostgreSQL and its tools, with LC_ALL=C; except of shared memory, which is another file system's."""

POLL_INTERVAL_S = 0.01
LOG_BYTES_MAX = 1024 * 1024
"""The log of earlier starts is dropped beyond this."""

LOG_LINES_SHOWN = 15
PAGE_BYTES = 4096
"""Less than that is left on a file system that is full, for one that counts in pages."""

SHARED_BUFFERS_BYTES = 64 * 1024 * 1024
"""The control plane's tables fit many times over."""

SETTINGS = {
    "max_connections": "60",  # four services with pools of up to 10, and room for psql
    "max_wal_size": "256MB",  # bounds disk use and the replay after a crash
    "max_parallel_workers_per_gather": "0",  # small queries only; spares /dev/shm, which is small in containers
    "unix_socket_permissions": "0700",
    "logging_collector": "off",
}
"""Durability settings (fsync, synchronous_commit, full_page_writes) stay at their defaults: on."""

PASSWORD_FILE, HBA_FILE, IDENT_FILE = "streamhouse.password", "streamhouse_hba.conf", "streamhouse_ident.conf"
HBA = """# Written at every start. StreamHouse's own role: the user that runs it, and root. All others by password.
local all,replication postgres peer map=streamhouse
local all all scram-sha-256
host all,replication all 127.0.0.1/32 scram-sha-256
"""

_LEFT_BY_CRASH = "pre-existing shared memory block"
"""Logged while backends of a killed server still end: some ms later the start works."""


class EmbeddedPostgres:
    """A PostgreSQL server. `start` and `stop` may alternate; the thread that calls `start` must outlive the server.

    Listens on a Unix socket inside `data_dir` that only its user may enter; on 127.0.0.1 with a random password if
    `port` is set, or if the path is too long for a socket (then on a free port).
    """

    def __init__(
        self,
        data_dir: Path | str,
        *,
        bin_dir: Path | str | None = None,
        port: int | None = None,
        shared_buffers_bytes: int = SHARED_BUFFERS_BYTES,
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self.log_path = self._beside(".log")
        self._explicit_bin_dir = Path(bin_dir) if bin_dir else None
        self._port = port
        self._settings = SETTINGS | {"shared_buffers": f"{shared_buffers_bytes // 1024}kB"}
        self._address: tuple[str, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = -1

    @property
    def pid(self) -> int | None:
        """Process id of the running server; None without a server."""
        return self._process.pid if self._process and self._process.poll() is None else None

    async def start(self) -> str:
        """Starts the server, on first use after creating the database; returns the DSN once connections are accepted.

        Raises PostgresError, with the last lines of the log if there are any.
        """
        assert self._process is None, "started twice"
        self._address = None
        self._acquire_lock()
        try:
            bin_dir = find_bin_dir(self._explicit_bin_dir)
            user = await run_to_end(RunAs.choose, bin_dir, self.data_dir)
            dsn = await self._open(bin_dir, user)
            if await _has_checksums(dsn):
                return dsn
            await self._add_checksums(bin_dir, user)
            return await self._open(bin_dir, user)
        except BaseException:
            await self.stop()
            raise

    async def keep_running(self, on_change: Callable[[bool], Awaitable[None]]) -> None:
        """Starts a server that ended by itself again, with back-off, at the same address. Runs until cancelled, which
        has to come before `stop`. `on_change` is called with False when the server has ended, with True when
        connections are accepted again."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(RESTART_FIRST_MS, RESTART_MS_MAX)
        while True:
            assert self._process is not None, "start() comes first"
            began_s = loop.time()
            await wait_for_end(self._process)
            log.error("PostgreSQL in %s ended (%s); starting it again", self.data_dir, how_it_ended(self._process))
            if loop.time() - began_s > RESTART_MS_MAX / 1000:
                backoff.reset()
            await on_change(False)
            while True:
                await asyncio.sleep(backoff.next_ms() / 1000)
                if await self._restart():
                    break
            await on_change(True)

    async def _restart(self) -> bool:
        """Returns False, with an error in the log, if the server does not start: the disk may be full for a while."""
        try:
            bin_dir = find_bin_dir(self._explicit_bin_dir)
            await self._open(bin_dir, await run_to_end(RunAs.choose, bin_dir, self.data_dir))
        except (PostgresError, OSError) as error:
            log.error("PostgreSQL cannot be started again: %s", error)
            return False
        return True

    def running_dsn(self) -> str:
        """Returns the DSN of the server that another process runs on this directory. Raises PostgresError
        without a server."""
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
            port, directory, host = int(lines[3]), lines[4], lines[5]
        except (OSError, IndexError, ValueError):
            raise PostgresError(f"no PostgreSQL runs in {self.data_dir}") from None
        return self._dsn(directory or host, port)

    async def stop(self) -> None:
        """Shuts the server down fast (open transactions roll back), harder after a timeout. Idempotent."""
        process, self._process = self._process, None
        try:
            if process is not None:
                await _stop_process(process)
        finally:
            self._release_lock()

    def kill(self) -> None:
        """Sends SIGKILL, as a crash would: the next start recovers."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._release_lock()

    def _beside(self, suffix: str) -> Path:
        return self.data_dir.with_name(self.data_dir.name + suffix)

    def _acquire_lock(self) -> None:
        """Takes the lock, which ends with our process. With the lock held, a running server is an orphan."""
        try:
            files.make_directory(self.data_dir.parent)
            # Beside the data directory, which has to be empty for the first start's rename.
            lock = os.open(self._beside(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, files.PRIVATE_FILE)
        except OSError as exc:
            raise PostgresError(f"cannot use {self.data_dir}: {exc.strerror}") from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise PostgresError(f"PostgreSQL in {self.data_dir} is in use by another process") from None
        except OSError as exc:  # a file system without locks
            os.close(lock)
            raise PostgresError(f"cannot use {self.data_dir}: {exc.strerror}") from exc
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock >= 0:
            files.unlock(self._lock)
            self._lock = -1

    async def _open(self, bin_dir: Path, user: RunAs) -> str:
        """Starts the server on the data directory, which is made at the first start; returns the DSN."""
        try:
            if files.free_bytes(self.data_dir) < RESERVE_BYTES:
                self._reserve_path.unlink(missing_ok=True)
            user.admit(self.data_dir.parent)
            await run_to_end(stop_orphans, self.data_dir)
            if (self.data_dir / "PG_VERSION").exists():
                await self._check_version(bin_dir, user)
                await run_to_end(user.adopt, self.data_dir)
                # The process that renamed it into place may have been killed before that was durable.
                files.sync_directory(self.data_dir.parent)
            else:
                await self._initialise(bin_dir, user)
            self._write_access_rules(user)
        except OSError as exc:
            if exc.errno in files.NO_SPACE:
                raise self._no_room(str(exc.strerror)) from exc
            raise PostgresError(f"cannot set up {self.data_dir}: {exc.strerror} ({exc.filename})") from exc
        dsn = await self._start_server(bin_dir, user)
        await run_to_end(self._keep_reserve)
        return dsn

    @property
    def _reserve_path(self) -> Path:
        return self._beside(".reserve")

    def _keep_reserve(self) -> None:
        """Sets RESERVE_BYTES aside for a start on a full disk, unless that would fill the disk."""
        path = self._reserve_path
        if path.exists() or files.free_bytes(self.data_dir) < 2 * RESERVE_BYTES:
            return
        try:
            # The bytes differ with each write: a file system may store zeros, or unwritten blocks, in no space at all.
            files.write_bytes(path, secrets.token_bytes(RESERVE_BYTES))
        except OSError as error:
            log.warning("cannot set bytes aside for a start on a full disk, in %s: %s", path, error)

    def _no_room(self, cause: str, needed_bytes: int = RESERVE_BYTES) -> PostgresError:
        left = files.free_bytes(self.data_dir)
        return PostgresError(
            f"no room for PostgreSQL: the disk of {self.data_dir} has {left:,} bytes left, and a start needs "
            f"{needed_bytes:,}: free some, then start again ({cause})"
        )

    async def _check_version(self, bin_dir: Path, user: RunAs) -> None:
        """Refuses data of another major version than the programs' with PostgresError, as PostgreSQL would."""
        made_by = (self.data_dir / "PG_VERSION").read_bytes()[:32].decode(errors="replace").strip()
        version = await run_to_end(self._output_of, user.command(bin_dir / "postgres", ["--version"]), user)
        match = re.search(r"(\d+)(?:\.|devel|beta|rc|\s|$)", version)
        if match is None or match[1] != made_by:
            raise PostgresError(
                f"the data in {self.data_dir} are of PostgreSQL {made_by}, the programs in {bin_dir} say {version!r}: "
                f"set STREAMHOUSE_PG_BIN_DIR to a directory with those of PostgreSQL {made_by}"
            )

    def _output_of(self, command: Sequence[str], user: RunAs) -> str:
        environ = user.environ(self.data_dir.parent)
        try:
            ended = subprocess.run(command, capture_output=True, env=environ, check=False, timeout=TOOL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"nothing within {TOOL_TIMEOUT_S} s"
        return (ended.stdout or ended.stderr).decode(errors="replace").strip()

    async def _initialise(self, bin_dir: Path, user: RunAs) -> None:
        """Makes a new data directory: initdb beside the final place, then rename.

        A crash in between leaves nothing half-made there. The place differs each time, because an initdb that outlives
        the parent for a moment removes the files.
        """
        for leftover in self.data_dir.parent.glob(f"{glob.escape(self.data_dir.name)}.initdb*"):
            if leftover.is_dir():
                await run_to_end(stop_orphans, leftover)
            _remove(leftover)
        if files.free_bytes(self.data_dir) < FIRST_START_BYTES:
            raise self._no_room("the first one makes the database", FIRST_START_BYTES)
        fresh = self._beside(f".initdb-{secrets.token_hex(4)}")
        password_path = fresh.with_name(f"{fresh.name}.password")
        arguments = ["-D", str(fresh), "-U", "postgres", "-E", "UTF8", "--no-locale", "--data-checksums",
                     "--auth-local=peer", "--auth-host=scram-sha-256", f"--pwfile={password_path}"]  # fmt: skip
        try:
            fresh.mkdir(files.PRIVATE_DIRECTORY)
            files.write_text(password_path, secrets.token_urlsafe(24))
            user.give(fresh)
            user.give(password_path)
            await self._run("initdb", user, user.command(bin_dir / "initdb", arguments), INITDB_TIMEOUT_S)
            files.rename(password_path, fresh / PASSWORD_FILE)
            if self.data_dir.exists():
                self.data_dir.rmdir()
            files.rename(fresh, self.data_dir)
        finally:
            password_path.unlink(missing_ok=True)
            _remove(fresh)

    def _write_access_rules(self, user: RunAs) -> None:
        """Writes the access rules beside PostgreSQL's own files: those of older data directories trust every local
        user."""
        clients = dict.fromkeys((user.client, "root"))
        for path, content in (
            (self.data_dir / HBA_FILE, HBA),
            (self.data_dir / IDENT_FILE, "".join(f'streamhouse "{client}" postgres\n' for client in clients)),
        ):
            if _content_of(path) != content:  # a full disk has no room for a file that is already right
                files.write_text(path, content)
            user.give(path)

    async def _add_checksums(self, bin_dir: Path, user: RunAs) -> None:
        """Turns page checksums on in a data directory that was made without, while its server does not run.

        After a failure the data are as good as before: logs the remedy and returns.
        """
        process, self._process = self._process, None
        assert process is not None
        await _stop_process(process)
        log.info("adding checksums to the pages in %s: once, it may take a minute per 5 GB", self.data_dir)
        command = user.command(bin_dir / "pg_checksums", ["--enable", "-D", str(self.data_dir)])
        try:
            await self._run("pg_checksums", user, command, CHECKSUMS_TIMEOUT_S)
        except PostgresError as error:
            log.warning(
                "the database in %s has no page checksums, a damaged page may hide acknowledged records; stop "
                "StreamHouse and run `pg_checksums --enable -D %s`: %s", self.data_dir, self.data_dir, error,
            )  # fmt: skip

    async def _run(self, name: str, user: RunAs, command: Sequence[str], timeout_s: float) -> None:
        """Runs a program of PostgreSQL's, with the output in the log. Raises PostgresError."""
        with self._open_log() as output:
            log_at = output.tell()
            process = _spawn(command, output, user.environ(self.data_dir.parent))
        try:
            async with asyncio.timeout(timeout_s):
                await wait_for_end(process)
        except TimeoutError:
            raise self._error(f"{name} did not end within {timeout_s} s", log_at) from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            raise self._error(f"{name} failed with exit code {process.returncode}", log_at)

    async def _start_server(self, bin_dir: Path, user: RunAs) -> str:
        log_at = 0
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    address = self._address or self._choose_address()
                    dsn = self._dsn(*address)
                    process, log_at = self._launch(bin_dir, user, address)
                    if await self._accepts(dsn, process):
                        self._address = address
                        log.info("PostgreSQL runs in %s, pid %d", self.data_dir, process.pid)
                        return dsn
                    if not self._may_repeat(log_at):
                        message = f"PostgreSQL ended at its start with exit code {process.returncode}"
                        raise self._error(message, log_at)
                    await asyncio.sleep(POLL_INTERVAL_S)
        except TimeoutError:
            message = f"PostgreSQL did not accept connections within {START_TIMEOUT_S} s"
            raise self._error(message, log_at) from None

    def _launch(self, bin_dir: Path, user: RunAs, address: tuple[str, int]) -> tuple[subprocess.Popen[bytes], int]:
        """Starts the server process; returns the process, and the position in the log at which the process begins to
        write."""
        command = user.command(bin_dir / "postgres", self._arguments(*address))
        with self._open_log() as output:
            log_at = output.tell()
            self._process = _spawn(command, output, user.environ(self.data_dir.parent))
        return self._process, log_at

    async def _accepts(self, dsn: str, process: subprocess.Popen[bytes]) -> bool:
        """Returns True once the server accepts a connection, False if the process ends first."""
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
        may_choose = self._port is None and self._address is None
        # The port was free when it was chosen, and another process may have taken it before PostgreSQL did.
        port_taken = may_choose and any("Address already in use" in line for line in lines)
        return port_taken or any(_LEFT_BY_CRASH in line for line in lines)

    def _choose_address(self) -> tuple[str, int]:
        """Returns a socket directory or an IP address, and the port."""
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
        places = {
            "hba_file": str(self.data_dir / HBA_FILE),
            "ident_file": str(self.data_dir / IDENT_FILE),
            "listen_addresses": "" if by_socket else host,
            "unix_socket_directories": directory,
            "port": str(port),
        }
        options = [option for item in (self._settings | places).items() for option in ("-c", "=".join(item))]
        return ["-D", str(self.data_dir), *options]

    def _dsn(self, host: str, port: int) -> str:
        if host.startswith("/"):
            return f"postgresql://postgres@/postgres?host={quote(host, safe='')}&port={port}"
        password = (self.data_dir / PASSWORD_FILE).read_text()
        return f"postgresql://postgres:{password}@{host}:{port}/postgres"

    def _open_log(self) -> IO[bytes]:
        with contextlib.suppress(FileNotFoundError):
            if self.log_path.stat().st_size > LOG_BYTES_MAX:
                self.log_path.unlink()
        fd = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, files.PRIVATE_FILE)
        output = os.fdopen(fd, "ab")
        files.make_private(self.log_path)
        output.seek(0, os.SEEK_END)
        return output

    def _log_lines(self, log_at: int) -> list[str]:
        with self.log_path.open("rb") as written:
            written.seek(log_at)
            return written.read(LOG_BYTES_MAX).decode(errors="replace").splitlines()

    def _error(self, message: str, log_at: int) -> PostgresError:
        lines = self._log_lines(log_at)
        cause = next((line for line in lines if _is_no_space(line)), None)
        if cause is None and files.free_bytes(self.data_dir) < PAGE_BYTES:
            cause = message  # the log, too, is on that disk
        if cause is not None:
            made = (self.data_dir / "PG_VERSION").exists()
            return self._no_room(cause, RESERVE_BYTES if made else FIRST_START_BYTES)
        shown = "\n  ".join(lines[-LOG_LINES_SHOWN:])
        return PostgresError(f"{message} (data directory {self.data_dir}, log {self.log_path}):\n  {shown}")


def _is_no_space(line: str) -> bool:
    return any(message in line for message in NO_SPACE_MESSAGES) and "shared memory" not in line


def _spawn(command: Sequence[str], output: IO[bytes], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own, so that Ctrl-C in a terminal reaches only us, and we stop it in
    order."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environ, start_new_session=True
    )


def _content_of(path: Path) -> str | None:
    """Returns the text of a small file, or None if missing or not text."""
    try:
        return path.read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _remove(path: Path) -> None:
    """Removes a file or a directory with all contents, as far as they exist."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


async def _has_checksums(dsn: str) -> bool:
    connection = await asyncpg.connect(dsn)
    try:
        return bool(await connection.fetchval("SHOW data_checksums") == "on")
    finally:
        await connection.close()


async def _stop_process(process: subprocess.Popen[bytes]) -> None:
    try:
        for number in (signal.SIGINT, signal.SIGQUIT):  # fast, then immediate shutdown
            process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    return await wait_for_end(process)
    finally:
        if process.poll() is None:  # still there: the server hangs, or this task is being cancelled
            process.kill()
            process.wait()
