from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from streamhouse_query.settings import QuerySettings
from streamhouse_query.wiring import QueryService, build

from services.query.tests.start_query import StartQuery
from tests.platform.coordinator_peer import feeding
from tests.platform.read_world import World


@pytest.fixture
async def platform() -> AsyncIterator[World]:
    world = World()
    async with feeding(world):
        yield world


@pytest.fixture
async def start_query(platform: World, tmp_path: Path) -> AsyncIterator[StartQuery]:
    """Starts query services over the platform; settings as keywords."""
    services: list[QueryService] = []

    async def start(**settings: Any) -> QueryService:
        store = settings.pop("store", platform.store)
        values = {"cache_dir": tmp_path / "cache", "cache_chunk_bytes": 64 * 1024, **settings}
        service = build(QuerySettings(**values), platform.coordinator, store, platform.ingest_at)
        services.append(service)
        await service.start("127.0.0.1:1")
        return service

    yield start
    for service in services:
        await service.stop()
        assert service.tasks.error is None
