"""A PostgreSQL with a synchronous standby, and what happens to it when its machine dies: the standby is promoted."""

import os
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
from streamhouse_embedded.postgres import EmbeddedPostgres
from streamhouse_embedded.postgres_system import RunAs, find_bin_dir

from tests.integration.processes import free_ports


class PostgresPair:
    """`start` returns with the standby attached; a transaction is committed when both have it.

    All methods have to be called on a thread that outlives the servers.
    """

    def __init__(self, work_dir: Path) -> None:
        ports = free_ports(2)
        self._dirs = [work_dir / name / "data" for name in ("primary", "standby")]
        self._primary, self._standby = (
            EmbeddedPostgres(path, port=port) for path, port in zip(self._dirs, ports, strict=True)
        )
        self._dsns: list[str] = []

    @property
    def dsn(self) -> str:
        """Names both, and leaves it to the reader to find out which one is the primary."""
        credentials = self._dsns[0].rpartition("@")[0]
        hosts = ",".join(urlsplit(dsn).netloc.rpartition("@")[2] for dsn in self._dsns)
        return f"{credentials}@{hosts}/postgres"

    async def start(self) -> None:
        dsn = await self._primary.start()
        self._copy(dsn)
        self._dsns = [dsn, await self._standby.start()]
        await self._tell(0, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
        # Returns when the standby has it, too.
        await self._tell(0, "CREATE TABLE attached ()", "DROP TABLE attached")

    def kill_primary(self) -> None:
        self._primary.kill()

    async def promote(self) -> None:
        await self._tell(1, "SELECT pg_promote()")

    async def stop(self) -> None:
        await self._standby.stop()
        await self._primary.stop()

    async def _tell(self, which: int, *statements: str) -> None:
        connection = await asyncpg.connect(self._dsns[which])
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    def _copy(self, dsn: str) -> None:
        """The primary's files as they are, and the note that they are a standby's (`pg_basebackup -R`)."""
        parts, bin_dir, path = urlsplit(dsn), find_bin_dir(), self._dirs[1]
        path.parent.mkdir(mode=0o755)
        user = RunAs.choose(bin_dir, path)
        user.give(path.parent)
        subprocess.run(
            user.command(
                bin_dir / "pg_basebackup",
                [f"--host={parts.hostname}", f"--port={parts.port}", "--username=postgres", f"--pgdata={path}",
                 "--write-recovery-conf", "--wal-method=stream"],
            ),
            env={**os.environ, "PGPASSWORD": parts.password or "", "LC_ALL": "C"},
            check=True,
        )  # fmt: skip
