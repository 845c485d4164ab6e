"""A PostgreSQL that may get a synchronous standby, which takes its place when its machine dies."""

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from streamhouse_embedded.postgres import EmbeddedPostgres, PostgresError
from streamhouse_embedded.postgres_system import RunAs, find_bin_dir

from tests.integration.processes import free_ports
from tests.integration.servers import Server, new_work_dir, postgres_answers, spawn


class PostgresPairBackend:
    """Two places for a server. At first one runs; `attach_standby` puts a copy of it at the other, and from then on a
    transaction is committed when both have it. If the first is killed, `start` promotes the copy instead of it."""

    def __init__(self) -> None:
        self._work_dir = new_work_dir("postgres-pair")
        self._dirs = [self._work_dir / name / "data" for name in "ab"]
        self._ports = free_ports(2)
        self._postgres = [EmbeddedPostgres(path, port=port) for path, port in zip(self._dirs, self._ports, strict=True)]
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
        shutil.rmtree(self._work_dir)

    def failure(self) -> str:
        return "" if self._postgres[self._primary].pid else "PostgreSQL ended"

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


class PostgresPair(Server):
    """As any other; `attach_standby`, `kill`, `start` is a failover."""

    def __init__(self, backend: PostgresPairBackend, dsn: str) -> None:
        super().__init__(backend, dsn, {"STREAMHOUSE_PG_DSN": dsn}, lambda: postgres_answers(dsn))
        self.attach_standby = backend.attach_standby
        self.leave_standby_behind = backend.leave_standby_behind


def postgres_pair() -> PostgresPair:
    """Started, without a standby. Skips the test if there is no PostgreSQL of our own."""
    try:
        find_bin_dir()
    except PostgresError as error:
        pytest.skip(str(error))
    backend = PostgresPairBackend()
    backend.start()  # makes the password that the DSN holds
    dsn = backend.dsn
    backend.stop()
    pair = PostgresPair(backend, dsn)
    try:
        pair.start()
    except BaseException:
        pair.close()
        raise
    return pair
