"""The query service as a process of its own, over gRPC to a coordinator and an agent in this one."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc.aio import insecure_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shformat import decode_batch
from shproto.errors import OffsetBeyondEnd, StreamHouseError
from shproto.rpc import Connection
from shproto.services import QueryClient
from shproto.v1 import coordinator_pb2, ingest_pb2, query_pb2
from shruntime.server import RpcServer
from shruntime.settings import SettingsError
from shstore import LocalStore, StoreOptions
from streamhouse_query.settings import QuerySettings
from streamhouse_query.wiring import build

from tests.platform.coordinator_peer import feeding
from tests.platform.read_world import World, values_of

RUN = "import asyncio; from streamhouse_query.wiring import run; from streamhouse_query.settings import QuerySettings; "
RUN += "asyncio.run(run(QuerySettings.load()))"


class Remote:
    """An API of which only what the query service calls is there."""

    def __init__(self, api: Any) -> None:
        self._api = api

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name, self._unexpected)

    async def _unexpected(self, request: Any) -> Any:
        raise StreamHouseError(f"unexpected call: {request}")


async def serve(descriptor: Any, name: str, api: Any, listen: str = "127.0.0.1:0") -> RpcServer:
    server = RpcServer(listen, [(descriptor.services_by_name[name], Remote(api))])
    await server.start()
    return server


async def start_process(environ: dict[str, str]) -> asyncio.subprocess.Process:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("STREAMHOUSE_")}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN, env=inherited | environ, stderr=asyncio.subprocess.PIPE
    )


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[World]:
    world = World(LocalStore(StoreOptions(kind="local", path=tmp_path / "objects")))
    async with feeding(world):
        yield world


async def health(address: str) -> int:
    async with insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True)).status)


async def test_a_process_serves_waits_for_its_coordinator_and_stops_cleanly(platform: World, tmp_path: Path) -> None:
    agent = await platform.start_agent("a")
    ingest = await serve(ingest_pb2.DESCRIPTOR, "Ingest", agent)
    await platform.stop_agent("a")
    agent.address = ingest.address
    await platform.create_topic()
    await platform.start_agent("a")
    await platform.grant("a")
    await platform.produce(values_of(1_000))
    await platform.register()
    await platform.produce(values_of(10, 1_000))
    platform.coordinator.down = True
    coordinator = await serve(coordinator_pb2.DESCRIPTOR, "Coordinator", platform.coordinator)
    process = await start_process(
        {
            "STREAMHOUSE_BOOTSTRAP": coordinator.address,
            "STREAMHOUSE_STORE_DIR": str(tmp_path / "objects"),
            "STREAMHOUSE_CACHE_DIR": str(tmp_path / "cache"),
            "STREAMHOUSE_AGENT_ID": "q1",
        }
    )
    try:
        await asyncio.sleep(0.5)
        assert process.returncode is None, "it waits for the coordinator"
        platform.coordinator.down = False
        async with asyncio.timeout(60):
            while not (found := platform.sessions_of("q1")):
                await asyncio.sleep(0.02)
            while await health(found[0].address) != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.02)
        client = QueryClient(Connection([found[0].address]))
        response = await client.fetch(query_pb2.FetchRequest(topic="orders"))
        values = [value for batch in response.batches for value in decode_batch(batch).values.to_list()]
        assert values == values_of(1_010)
        with pytest.raises(OffsetBeyondEnd) as error:
            await client.fetch(query_pb2.FetchRequest(topic="orders", offset=2_000))
        assert error.value.details["high_watermark"] == "1010"
        waiting = asyncio.create_task(
            client.fetch(query_pb2.FetchRequest(topic="orders", offset=1_010, max_wait_ms=30_000))
        )
        await asyncio.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(StreamHouseError):
            await asyncio.wait_for(waiting, 60)
        await client.close()
        assert await asyncio.wait_for(process.wait(), 60) == 0
        assert not platform.sessions_of("q1")
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await ingest.stop(0)
        await coordinator.stop(0)


async def test_a_stop_is_heard_while_there_is_no_coordinator(tmp_path: Path) -> None:
    process = await start_process(
        {
            "STREAMHOUSE_BOOTSTRAP": "127.0.0.1:1",
            "STREAMHOUSE_STORE_DIR": str(tmp_path / "objects"),
            "STREAMHOUSE_CACHE_DIR": str(tmp_path / "cache"),
        }
    )
    assert process.stderr is not None
    while b"no snapshot" not in await asyncio.wait_for(process.stderr.readline(), 60):
        assert process.returncode is None
    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0


async def test_a_cache_directory_in_use_ends_the_process(tmp_path: Path, platform: World) -> None:
    first = build(QuerySettings(cache_dir=tmp_path), platform.coordinator, platform.store, platform.ingest_at)
    await first.start("127.0.0.1:1")
    second = build(QuerySettings(cache_dir=tmp_path), platform.coordinator, platform.store, platform.ingest_at)
    with pytest.raises(OSError, match="in use by another process"):
        await second.start("127.0.0.1:2")
    await second.stop()
    await first.stop()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"cache_bytes_max": 1}, "cache_bytes_max"),
        ({"cache_bytes_max": 1 << 20, "cache_chunk_bytes": 2 << 20}, "cache_chunk_bytes"),
        ({"fetch_bytes_default": 8 << 20, "fetch_bytes_max": 4 << 20}, "fetch_bytes_max"),
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, int], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        QuerySettings.load({}, **values)


def test_a_redis_url_of_another_kind_is_named_without_its_password() -> None:
    with pytest.raises(SettingsError, match=r"redis_url \(STREAMHOUSE_REDIS_URL\)") as caught:
        QuerySettings.load({}, redis_url="http://me:secret@nowhere")
    assert "secret" not in str(caught.value)


def test_a_redis_url_that_only_its_library_refuses_is_named(platform: World, tmp_path: Path) -> None:
    settings = QuerySettings.load({}, cache_dir=tmp_path, redis_url="redis://me:secret@nowhere?max_connections=many")
    with pytest.raises(SettingsError, match="redis_url") as caught:
        build(settings, platform.coordinator, platform.store, platform.ingest_at)
    assert "secret" not in str(caught.value)
