"""`kill -9` of a segmenter that has claimed buffers: the durable acknowledgements of their partitions go on when it is
back, or when another one is there, and do not wait for the claims to run out.

Claims last for ten minutes here, longer than the test has: nothing but what is tested ends them.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from streamhouse import Admin, Producer

from tests.faults.proxy import BOTH, FaultProxy
from tests.integration.cluster import Cluster

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

CLAIM_TTL_MS = "600000"
PATIENCE_S = 120
"""Of every wait; nothing here depends on how long one takes."""


class Held:
    """A cluster whose segmenter-1 holds a claimed buffer that it cannot upload; segmenter-2 is not started."""

    def __init__(self, cluster: Cluster, s3_link: FaultProxy) -> None:
        self.cluster = cluster
        self.s3_link = s3_link

    async def claim(self) -> asyncio.Task[int]:
        """Produces with durable acks until segmenter-1 has claimed the buffer; the task waits for the acks."""
        self.s3_link.hold(*BOTH)
        sending = asyncio.create_task(self._produce())
        async with asyncio.timeout(PATIENCE_S), Admin(self.cluster.bootstrap) as admin:
            while not (await admin.status()).buffers_claimed:
                assert not sending.done(), "acknowledged without the object store"
                await asyncio.sleep(0.1)
        return sending

    async def _produce(self) -> int:
        async with Producer(self.cluster.bootstrap, acks="durable", delivery_timeout_ms=PATIENCE_S * 1000) as producer:
            sent = await (await producer.send_many("orders", [b"a", b"b"], partition=0))
            return len(sent.offsets)


@asynccontextmanager
async def holding(storage: dict[str, str], work_dir: Path) -> AsyncIterator[Held]:
    endpoint = storage["STREAMHOUSE_S3_ENDPOINT"]
    link = FaultProxy("s3 of segmenter-1", endpoint.removeprefix("http://"))
    await link.start()
    common = {**storage, "STREAMHOUSE_CLAIM_TTL_MS": CLAIM_TTL_MS, "STREAMHOUSE_SESSION_TTL_MS": CLAIM_TTL_MS}
    cluster = Cluster(common, work_dir, {"coordinator": 1, "ingest": 1, "query": 1})
    cluster.services["segmenter-1"].environ["STREAMHOUSE_S3_ENDPOINT"] = f"http://{link.address}"
    try:
        for name, process in cluster.services.items():
            if name != "segmenter-2":
                process.start()
        for name, process in cluster.services.items():
            if name != "segmenter-2":
                await process.wait_serving(cluster.addresses[name])
        async with Admin(cluster.bootstrap) as admin:
            await admin.create_topic("orders", partitions=1)
        yield Held(cluster, link)
    finally:
        cluster.kill_all()
        await link.stop()


async def test_another_worker_goes_on_with_what_a_killed_one_had_claimed(
    storage: dict[str, str], tmp_path: Path
) -> None:
    async with holding(storage, tmp_path) as held:
        sending = await held.claim()
        other = held.cluster.services["segmenter-2"]
        other.start()
        await other.wait_serving(held.cluster.addresses["segmenter-2"])
        held.cluster.services["segmenter-1"].kill()
        assert await asyncio.wait_for(sending, PATIENCE_S) == 2


async def test_a_killed_worker_that_is_back_goes_on_with_what_it_had_claimed(
    storage: dict[str, str], tmp_path: Path
) -> None:
    async with holding(storage, tmp_path) as held:
        sending = await held.claim()
        killed = held.cluster.services["segmenter-1"]
        killed.kill()
        await held.s3_link.heal()
        killed.start()  # at the same address: the first look at it may find it alive already
        assert await asyncio.wait_for(sending, PATIENCE_S) == 2
