"""A leader that only segmenters and query services cannot reach: coordinators and producers do, so its lease runs, and
nothing that it takes is uploaded or read. Others lead its partitions soon; it keeps what it has until workers reach it.

Quotes guarantees G1 (nothing acknowledged is lost), G2 (an offset never changes its record), G3 (order, without
skipping an acknowledged record) and G4 (one writer per epoch).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from streamhouse import Admin, Consumer, Producer

from tests.faults import shim
from tests.faults.proxy import BOTH, FaultProxy
from tests.integration.cluster import Cluster

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

PATIENCE_S = 120
"""Of every wait; nothing here depends on how long one takes."""

AGENTS = ("ingest-1", "ingest-2")
SETTINGS = {
    "STREAMHOUSE_HEARTBEAT_INTERVAL_MS": "500",
    "STREAMHOUSE_CUT_OFF_AFTER_MS": "2000",
    "STREAMHOUSE_CUT_OFF_HOLD_MS": "2000",
    "STREAMHOUSE_RPC_TIMEOUT_MS": "3000",
    "STREAMHOUSE_PG_TIMEOUT_MS": "2000",
    "STREAMHOUSE_SEAL_AGE_MS": "500",
    "STREAMHOUSE_SCAN_INTERVAL_MS": "500",
}


class Fleet:
    """A cluster in which workers reach the agents by `links`, and everybody else directly."""

    def __init__(self, cluster: Cluster, links: dict[str, FaultProxy]) -> None:
        self.cluster = cluster
        self.links = links
        self.acknowledged: dict[int, bytes] = {}

    async def leader(self, partition: int = 0) -> str:
        async with Admin(self.cluster.bootstrap) as admin:
            return (await admin.describe_topic("orders")).partitions[partition].leader_agent_id

    async def doubted(self) -> dict[str, Any]:
        async with Admin(self.cluster.bootstrap) as admin:
            return {item.agent_id: item for item in (await admin.status()).unreachable_agents}

    async def produce(self, what: str, count: int, acks: Any) -> None:
        values = [f"{what} {n}".encode() for n in range(count)]
        async with Producer(self.cluster.bootstrap, acks=acks, delivery_timeout_ms=PATIENCE_S * 1000) as producer:
            sent = await asyncio.wait_for(await producer.send_many("orders", values, partition=0), PATIENCE_S)
        for offset, value in zip(sent.offsets.tolist(), values, strict=True):
            assert offset not in self.acknowledged, f"offset {offset} was acknowledged twice"
            self.acknowledged[offset] = value


async def until(ask: Callable[[], Awaitable[Any]], met: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while not met(answer := await ask()):
            await asyncio.sleep(0.1)
    return answer


@asynccontextmanager
async def running(storage: dict[str, str], work_dir: Path) -> AsyncIterator[Fleet]:
    library = shim.build(work_dir)
    if library is None:
        pytest.skip("there is no C compiler to build what leads workers to links of their own")
    cluster = Cluster({**storage, **SETTINGS}, work_dir, {"coordinator": 1, "query": 1, "segmenter": 2})
    links = {name: FaultProxy(f"workers>{name}", cluster.addresses[name]) for name in AGENTS}
    try:
        for link in links.values():
            await link.start()
        routes = {cluster.addresses[name]: link.address for name, link in links.items()}
        for name, process in cluster.services.items():
            if name.startswith(("segmenter", "query")):
                process.environ |= shim.Control(work_dir / f"{name}.control").environ(library, routes)
        await cluster.start()
        async with Admin(cluster.bootstrap) as admin:
            await admin.create_topic("orders", partitions=2)
        fleet = Fleet(cluster, links)
        await until(fleet.leader, bool)
        yield fleet
        await cluster.stop()
    finally:
        cluster.kill_all()
        for link in links.values():
            await link.stop()


@pytest.mark.parametrize("how", ["silent", "refused"])
async def test_others_lead_what_an_agent_leads_that_its_workers_cannot_reach(
    storage: dict[str, str], tmp_path: Path, how: str
) -> None:
    async with running(storage, tmp_path) as fleet:
        await fleet.produce("stored", 10, "durable")
        cut = await fleet.leader()
        link = fleet.links[cut]
        if how == "silent":
            link.hold(*BOTH)
        else:
            await link.refuse()
        await fleet.produce("in its log only", 20, "wal")
        other = await until(fleet.leader, lambda name: name not in ("", cut))
        shown = (await fleet.doubted())[cut]
        assert shown.cut_off and len(shown.failing) >= 2
        assert other not in await fleet.doubted()
        await fleet.produce("elsewhere", 5, "durable")  # acknowledged while the first agent is still cut off
        async with Consumer(fleet.cluster.bootstrap, assign=[("orders", 0)], start="earliest") as consumer:
            seen: dict[int, bytes | None] = {}

            async def read() -> None:
                last = -1
                async for record in consumer:
                    assert record.offset > last, f"offset {record.offset} after {last}"
                    last = record.offset
                    seen[record.offset] = record.value
                    if len(seen) == len(fleet.acknowledged):
                        return

            reading = asyncio.create_task(read())
            await until(_waiting(consumer), lambda reasons: any(cut in reason for reason in reasons))
            assert list(seen) == list(range(10)), "G3: readers wait, and skip nothing"
            assert not reading.done()
            await link.heal()
            await link.accept()
            await asyncio.wait_for(reading, PATIENCE_S)
        assert seen == fleet.acknowledged, "G1, G2"
        await until(fleet.doubted, lambda doubted: not doubted)
        leaders = await until(lambda: _leaders(fleet), lambda names: sorted(names) == list(AGENTS))
        assert len(leaders) == 2, "it has its share again"


def _waiting(consumer: Consumer) -> Callable[[], Awaitable[list[str]]]:
    async def reasons() -> list[str]:
        return list(consumer.waiting.values())

    return reasons


async def _leaders(fleet: Fleet) -> list[str]:
    return [await fleet.leader(0), await fleet.leader(1)]


async def test_what_a_single_worker_cannot_reach_stays_where_it_is(storage: dict[str, str], tmp_path: Path) -> None:
    """Its own link is cut, and the others get on."""
    async with running(storage, tmp_path) as fleet:
        await fleet.produce("before", 10, "durable")
        leader = await fleet.leader()
        # Of the three workers one is led to a port where nobody answers.
        alone = fleet.cluster.services["segmenter-1"]
        nowhere = FaultProxy("segmenter-1 alone", fleet.cluster.addresses[leader])
        await nowhere.start()
        await alone.stop()
        routes = dict(item.split("=") for item in alone.environ["FAULT_ROUTES"].split(","))
        routes[fleet.cluster.addresses[leader].rpartition(":")[2]] = nowhere.address.rpartition(":")[2]
        alone.environ["FAULT_ROUTES"] = ",".join(f"{asked}={given}" for asked, given in routes.items())
        nowhere.hold(*BOTH)
        alone.start()
        await alone.wait_serving(fleet.cluster.addresses["segmenter-1"])
        try:
            async with asyncio.timeout(PATIENCE_S):
                while leader not in await fleet.doubted():
                    await fleet.produce("meanwhile", 1, "durable")
            for _ in range(5):
                await fleet.produce("meanwhile", 5, "durable")
                shown = (await fleet.doubted()).get(leader)
                assert shown is None or not shown.cut_off
                assert await fleet.leader() == leader
                await asyncio.sleep(1)
        finally:
            await nowhere.stop()
