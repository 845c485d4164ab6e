"""A PostgreSQL of its own for these tests, and coordinators on it."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService, build
from streamhouse_embedded.postgres import EmbeddedPostgres


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """Runs; a test may stop it, and has to start it again."""
    server = EmbeddedPostgres(tmp_path_factory.mktemp("pg") / "data")
    asyncio.run(server.start())
    try:
        yield server
    finally:
        asyncio.run(server.stop())


def dsn_of(server: EmbeddedPostgres, database: str) -> str:
    return f"postgresql://postgres@/{database}?host={server.data_dir}&port=5432"


@pytest.fixture
async def dsn(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """A fresh database."""
    name = f"test_{os.urandom(6).hex()}"
    await _execute(postgres, f"CREATE DATABASE {name}")
    yield dsn_of(postgres, name)
    await _execute(postgres, f"DROP DATABASE {name} WITH (FORCE)")


async def _execute(server: EmbeddedPostgres, statement: str) -> None:
    connection = await asyncpg.connect(dsn_of(server, "postgres"))
    try:
        await connection.execute(statement)
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
