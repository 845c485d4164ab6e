"""Redis between disk and store: shared where it works, forgotten where it does not."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis.asyncio

from services.query.tests.start_query import StartQuery
from services.query.tests.test_query_cache import segment_of, written
from services.query.tests.test_query_fetch import one_partition, read_all
from tests.platform.read_world import World, values_of

PATIENT = {"redis_timeout_ms": 10_000}
"""Of a Redis that answers: on a busy machine the 50 ms of the default are no sign of anything."""


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[fakeredis.FakeServer]:
    """All clients talk to one fake server."""
    server = fakeredis.FakeServer()

    def from_url(url: str, **options: Any) -> Any:
        return fakeredis.FakeAsyncRedis(server=server, **options)

    monkeypatch.setattr(redis.asyncio.Redis, "from_url", staticmethod(from_url))
    yield server


async def test_a_second_service_finds_what_the_first_downloaded(
    platform: World, start_query: StartQuery, server: fakeredis.FakeServer, tmp_path: Path
) -> None:
    await one_partition(platform)
    await segment_of(platform, 20_000)
    expected = dict(enumerate(values_of(20_000, 0, 32)))
    first = await start_query(redis_url="redis://x", redis_ttl_s=100, **PATIENT)
    assert await read_all(first) == expected
    await written(first)
    second = await start_query(redis_url="redis://x", cache_dir=tmp_path / "second", **PATIENT)
    assert await read_all(second) == expected
    assert second.api._counters.downloads == 0 < second.api._counters.shared_hits
    client = fakeredis.FakeAsyncRedis(server=server)
    keys = await client.keys("streamhouse:chunk:*")
    assert keys and all([0 < await client.ttl(key) <= 100 for key in keys])
    for key in keys:  # damage
        await client.setrange(key, 50, b"\xff\xff\xff\xff")
    third = await start_query(redis_url="redis://x", cache_dir=tmp_path / "third", **PATIENT)
    assert await read_all(third) == expected
    assert third.api._counters.shared_errors > 0 < third.api._counters.downloads
    await client.aclose()


async def test_services_with_chunks_of_other_sizes_do_not_share_them(
    platform: World, start_query: StartQuery, server: fakeredis.FakeServer, tmp_path: Path
) -> None:
    """As while the setting is being changed: the second chunk of the one is not that of the other."""
    await one_partition(platform)
    await segment_of(platform, 20_000)
    expected = dict(enumerate(values_of(20_000, 0, 32)))
    first = await start_query(redis_url="redis://x", **PATIENT)
    assert await read_all(first) == expected
    await written(first)
    for factor in (2, 4):
        settings = {"cache_dir": tmp_path / f"of {factor}", "cache_chunk_bytes": factor * 64 * 1024}
        other = await start_query(redis_url="redis://x", **settings, **PATIENT)
        assert await read_all(other) == expected
        await written(other)
        assert other.api._counters.cache_damaged_chunks == 0


async def test_redis_away_costs_a_metric_and_is_left_alone_for_a_while(
    platform: World, start_query: StartQuery, server: fakeredis.FakeServer
) -> None:
    await one_partition(platform)
    await segment_of(platform, 20_000)
    server.connected = False
    service = await start_query(redis_url="redis://x", redis_failures_max=2, redis_pause_ms=60_000)
    assert await read_all(service) == dict(enumerate(values_of(20_000, 0, 32)))
    await written(service)
    assert 2 <= service.api._counters.shared_errors < 8
    assert service.api._counters.downloads > 3


async def test_a_redis_that_hangs_costs_its_timeout(platform: World, start_query: StartQuery) -> None:
    """A port that takes connections and says nothing."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    await one_partition(platform)
    await segment_of(platform, 5_000)
    service = await start_query(redis_url=f"redis://127.0.0.1:{port}", redis_timeout_ms=20, redis_failures_max=2)
    async with asyncio.timeout(60):
        assert await read_all(service) == dict(enumerate(values_of(5_000, 0, 32)))
    assert service.api._counters.shared_errors >= 2
    await written(service)
    await service.stop()
    silent.close()
    await silent.wait_closed()
