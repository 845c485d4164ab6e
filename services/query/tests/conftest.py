import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from query_standins import StandInPlatform
from streamhouse_query.settings import QuerySettings
from streamhouse_query.wiring import QueryService, build

StartQuery = Callable[..., Awaitable[QueryService]]


@pytest.fixture
def platform() -> StandInPlatform:
    return StandInPlatform()


@pytest.fixture
async def start_query(platform: StandInPlatform, tmp_path: Path) -> AsyncIterator[StartQuery]:
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
