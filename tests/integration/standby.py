"""A PostgreSQL that may get a synchronous standby, which takes its place when its machine dies."""

import asyncio
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from streamhouse_embedded.postgres import EmbeddedPostgres, PostgresError
from streamhouse_embedded.postgres_system import RunAs, find_bin_dir

from tests.integration import small_disk
from tests.integration.processes import free_ports
from tests.integration.servers import Server, new_work_dir, postgres_answers, spawn

Variables = Callable[[Path], Mapping[str, str]]
ANSWERS_SOON_S = 10.0
"""After a crash a small server replays its log in less; then it has ended, or hangs."""


class PostgresPairBackend:
    """Two places for a server. At first one runs; `attach_standby` puts a copy of it at the other, and from then on a
    transaction is committed when both have it. If the first is killed, `start` promotes the copy instead of it."""

    def __init__(self, disk_bytes: int = 0, variables: Variables | None = None) -> None:
        """`disk_bytes`: of a disk of their own, where this machine allows to mount one; 0: none. `variables`: makes the
        servers' additional environment, given a directory that they may read."""
        self.work_dir = new_work_dir("postgres-pair")
        self.has_disk = bool(disk_bytes) and small_disk.mount(self.work_dir, disk_bytes)
        self._dirs = [self.work_dir / name / "data" for name in "ab"]
        self._ports = free_ports(2)
        bin_dir = _wrapped(self.work_dir / "bin", variables(self.work_dir)) if variables is not None else None
        self._postgres = [
            EmbeddedPostgres(path, bin_dir=bin_dir, port=port)
            for path, port in zip(self._dirs, self._ports, strict=True)
        ]
        self._primary = 0
        self._dsns = ["", ""]
        self._left_behind = False

    @property
    def dsn(self) -> str:
        """Names both places; known after the first start."""
        parts = urlsplit(self._dsns[self._primary])
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        return f"{parts.scheme}://{parts.username}:{parts.password}@{hosts}/postgres?target_session_attrs=read-write"

    @property
    def _has_standby(self) -> bool:
        return self._postgres[1 - self._primary].pid is not None

    def attach_standby(self) -> None:
        """Returns when it has everything. Transactions go on meanwhile."""
        primary, standby = self._primary, 1 - self._primary
        shutil.rmtree(self._dirs[standby].parent, ignore_errors=True)
        spawn(self._copy, self._dsns[primary], self._dirs[standby])
        self._start_one(standby)
        self._tell(primary, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
        self._tell(primary, "CREATE TABLE attached ()", "DROP TABLE attached")  # returns when the standby has it, too

    def leave_standby_behind(self) -> None:
        """What is committed from now on it does not get. It will take over all the same."""
        self._tell(self._primary, "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")
        self._postgres[1 - self._primary].kill()
        self._left_behind = True

    def start(self) -> None:
        if self._left_behind:
            self._start_one(1 - self._primary)
            self._left_behind = False
        if self._has_standby:
            self._primary = 1 - self._primary
            self._tell(self._primary, "SELECT pg_promote()")
        else:
            self._start_one(self._primary)

    def stop(self) -> None:
        self._must_have_no_standby()
        spawn(asyncio.run, self._postgres[self._primary].stop())

    def kill(self) -> None:
        self._postgres[self._primary].kill()

    def close(self) -> None:
        for postgres in self._postgres:
            postgres.kill()
        if self.has_disk:
            small_disk.unmount(self.work_dir)
        shutil.rmtree(self.work_dir)

    def failure(self) -> str:
        return "" if self._postgres[self._primary].pid else "PostgreSQL ended"

    def log_lines(self, words: str) -> int:
        """How many lines with these words the primary has logged."""
        return self._postgres[self._primary].log_path.read_text(errors="replace").count(words)

    def _must_have_no_standby(self) -> None:
        assert not self._has_standby, "a primary that has a standby can only be killed"

    def _start_one(self, which: int) -> None:
        self._dsns[which] = spawn(asyncio.run, self._postgres[which].start())

    def _tell(self, which: int, *statements: str) -> None:
        async def tell() -> None:
            connection = await asyncpg.connect(self._dsns[which])
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        spawn(asyncio.run, tell())

    def _copy(self, dsn: str, path: Path) -> None:
        """The files of a server that runs, and the note that they are a standby's."""
        path.parent.mkdir(mode=0o755)
        parts, bin_dir = urlsplit(dsn), find_bin_dir()
        user = RunAs.choose(bin_dir, path)
        user.give(path.parent)
        where = [f"--host={parts.hostname}", f"--port={parts.port}", "--username=postgres", f"--pgdata={path}"]
        subprocess.run(
            user.command(
                bin_dir / "pg_basebackup",
                [*where, "--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast"],
            ),
            env={**os.environ, "PGPASSWORD": parts.password or "", "LC_ALL": "C"},
            check=True,
        )


def _wrapped(directory: Path, variables: Mapping[str, str]) -> Path:
    """PostgreSQL's programs, each in an environment with these variables."""
    directory.mkdir(mode=0o755)
    assignments = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    for name in ("initdb", "postgres"):
        script = directory / name
        script.write_text(f'#!/bin/sh\n{assignments} exec {shlex.quote(str(find_bin_dir() / name))} "$@"\n')
        script.chmod(0o755)
    return directory


class PostgresPair(Server):
    """As any other; `attach_standby`, `kill`, `start` is a failover. `disk`: its file system, if it is its own."""

    def __init__(self, backend: PostgresPairBackend, dsn: str) -> None:
        super().__init__(backend, dsn, {"STREAMHOUSE_PG_DSN": dsn}, lambda: postgres_answers(dsn))
        self.attach_standby = backend.attach_standby
        self.leave_standby_behind = backend.leave_standby_behind
        self.disk = backend.work_dir if backend.has_disk else None
        self.log_lines = backend.log_lines

    def start_unless_it_answers(self) -> None:
        """After what may have ended it."""
        deadline = time.monotonic() + ANSWERS_SOON_S
        while not postgres_answers(self.url):
            if time.monotonic() > deadline:
                self.kill()
                self.start()
                return
            time.sleep(0.1)


def postgres_pair(disk_bytes: int = 0, variables: Variables | None = None) -> PostgresPair:
    """Started, without a standby. Skips the test if there is no PostgreSQL of our own."""
    try:
        find_bin_dir()
    except PostgresError as error:
        pytest.skip(str(error))
    backend = PostgresPairBackend(disk_bytes, variables)
    try:
        backend.start()  # makes the password that the DSN holds
        dsn = backend.dsn
        backend.stop()
        pair = PostgresPair(backend, dsn)
        pair.start()
    except BaseException:
        backend.close()
        raise
    return pair
