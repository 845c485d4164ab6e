"""Services that start before their object store does, or without permission to use it.

Quotes guarantee G7 (pressure is visible, never fatal): a store that is away or slow is waited for, and said; only what
an operator has to put right ends the start.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.faults.proxy import Direction, FaultProxy
from tests.faults.store_proxy import StoreFault, StoreProxy
from tests.integration.cluster import Cluster
from tests.integration.processes import ServiceProcess, is_serving

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

WAITING = "waiting for the object store: "
WITH_STORE = ("query-1", "segmenter-1")


@pytest.fixture
async def server(storage: dict[str, str]) -> AsyncIterator[StoreProxy]:
    server = StoreProxy(urlsplit(storage["STREAMHOUSE_S3_ENDPOINT"]).netloc)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def proxy(server: StoreProxy) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy("store", server.address)
    await proxy.start()
    yield proxy
    await proxy.stop()


@pytest.fixture
async def cluster(storage: dict[str, str], proxy: FaultProxy, tmp_path: Path) -> AsyncIterator[Cluster]:
    """One service of each kind, of which only the coordinator runs. The store is reached through the proxy, and
    calls to it are given up soon: after that the start must go on waiting."""
    limits = {"S3_READ_TIMEOUT_MS": "500", "S3_CONNECT_TIMEOUT_MS": "500", "S3_ATTEMPTS_DEADLINE_MS": "1000"}
    environ = storage | {"STREAMHOUSE_S3_ENDPOINT": f"http://{proxy.address}"}
    environ |= {f"STREAMHOUSE_{name}": value for name, value in limits.items()}
    cluster = Cluster(environ, tmp_path, dict.fromkeys(("coordinator", "ingest", "query", "segmenter"), 1))
    coordinator = cluster.services["coordinator-1"]
    coordinator.start()
    await coordinator.wait_serving(cluster.addresses["coordinator-1"])
    yield cluster
    cluster.kill_all()


async def says(process: ServiceProcess, text: str, times: int) -> None:
    async with asyncio.timeout(60):
        while process.log_path.read_text().count(text) < times:
            assert process.is_running(), process.log_tail()
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("fault", ["silent", "refusing", "overloaded"])
async def test_a_store_that_is_away_at_the_start_is_waited_for(
    cluster: Cluster, proxy: FaultProxy, server: StoreProxy, fault: str
) -> None:
    match fault:
        case "silent":
            proxy.hold(Direction.UP, Direction.DOWN)
        case "refusing":
            await proxy.refuse()
        case "overloaded":
            server.begin(StoreFault.SLOW_DOWN)
    for name in WITH_STORE:
        cluster.services[name].start()
    for name in WITH_STORE:
        await says(cluster.services[name], WAITING, 4)
        assert not await is_serving(cluster.addresses[name])
    await proxy.heal()
    await proxy.accept()
    server.heal()
    for name in WITH_STORE:
        await cluster.services[name].wait_serving(cluster.addresses[name])
        assert "Traceback" not in cluster.services[name].log_tail()


async def test_a_stop_is_heard_while_the_store_is_away(cluster: Cluster, proxy: FaultProxy) -> None:
    proxy.hold(Direction.DOWN)
    for name in WITH_STORE:
        cluster.services[name].start()
    for name in WITH_STORE:
        await says(cluster.services[name], WAITING, 1)
        assert await cluster.services[name].stop() == 0, cluster.services[name].log_tail()


@pytest.mark.parametrize("wrong", ["credentials", "bucket"])
async def test_what_an_operator_has_to_put_right_ends_the_start(
    cluster: Cluster, server: StoreProxy, wrong: str
) -> None:
    message = "error: bucket 'not-there' does not exist"
    if wrong == "credentials":
        server.begin(StoreFault.DENIED)
        message = "error: S3 list_objects_v2"
    for name in WITH_STORE:
        process = cluster.services[name]
        if wrong == "bucket":
            process.environ["STREAMHOUSE_S3_BUCKET"] = "not-there"
        process.start()
    for name in WITH_STORE:
        process = cluster.services[name]
        async with asyncio.timeout(60):
            while process.is_running():
                await asyncio.sleep(0.05)
        assert message in process.log_tail()
        assert "Traceback" not in process.log_tail()
