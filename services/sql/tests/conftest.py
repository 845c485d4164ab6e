from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from shcluster.peers import Peers
from shread.engine import build_engine
from shruntime.clock import SystemClock
from streamhouse_sql.pg_listener import open_listener
from streamhouse_sql.settings import SqlSettings
from streamhouse_sql.wiring import build

from services.sql.tests.start_sql import Sql, StartSql
from tests.platform.coordinator_peer import feeding
from tests.platform.read_world import World


@pytest.fixture
async def platform() -> AsyncIterator[World]:
    world = World()
    async with feeding(world):
        yield world


@pytest.fixture
async def start_sql(platform: World, tmp_path: Path) -> AsyncIterator[StartSql]:
    """Starts SQL services over the platform; settings as keywords. `store`: another than the platform's."""
    started: list[Sql] = []

    async def start(**values: Any) -> Sql:
        store = values.pop("store", platform.store)
        defaults = {
            "cache_dir": tmp_path / f"cache{len(started)}",
            "cache_chunk_bytes": 64 * 1024,
            "sql_temp_dir": tmp_path / "spill",
            "sql_memory_bytes_max": 1 << 28,
            "sql_pg_listen": "",
        }
        settings = SqlSettings(**(defaults | values))
        engine = build_engine(
            settings, platform.coordinator, store, platform.ingest_at, SystemClock(), role="sql", agent_id=""
        )
        # No test of these runs a job, whose output would go over the network.
        peers = Peers("127.0.0.1:1", 1_000)
        parts = build(settings, platform.coordinator, engine, store, peers, {}, lambda: open_listener(settings))
        sql = Sql(parts, engine)
        started.append(sql)
        await sql.parts.start("127.0.0.1:1")
        return sql

    yield start
    for sql in started:
        await sql.parts.stop()
        assert sql.left() == []
        assert sql.parts.tasks.error is None
