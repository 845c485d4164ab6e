"""A black hole between a query service and its object store, seen by the SDK's consumer.

Quotes guarantees G3 (a reader is never sent past a record that cannot be had) and G7 (pressure is visible, never
fatal).
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from shproto.rpc import Connection
from shproto.services import QueryClient
from shproto.v1 import query_pb2
from streamhouse import Admin, Consumer, Producer
from streamhouse.records import TopicPartition

from tests.faults.proxy import Direction, FaultProxy
from tests.integration.cluster import Cluster

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

TOPIC = "orders"
RECORDS = 100


@pytest.fixture
async def proxy(storage: dict[str, str]) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy("store", urlsplit(storage["STREAMHOUSE_S3_ENDPOINT"]).netloc)
    await proxy.start()
    yield proxy
    await proxy.stop()


@pytest.fixture
async def cluster(storage: dict[str, str], proxy: FaultProxy, tmp_path: Path) -> AsyncIterator[Cluster]:
    environ = {**storage, "STREAMHOUSE_S3_ENDPOINT": f"http://{proxy.address}"}
    environ["STREAMHOUSE_SUBSCRIBE_HEARTBEAT_MS"] = "500"
    cluster = Cluster(environ, tmp_path, dict.fromkeys(("coordinator", "ingest", "query", "segmenter"), 1))
    await cluster.start()
    yield cluster
    await proxy.heal()
    await cluster.stop()
    cluster.kill_all()


async def test_g7_readers_are_told_of_a_store_that_does_not_answer(cluster: Cluster, proxy: FaultProxy) -> None:
    async with Admin(cluster.bootstrap) as admin:
        await admin.create_topic(TOPIC, partitions=1)
    async with Producer(cluster.bootstrap, acks="durable") as producer:
        for n in range(RECORDS):
            sent = await producer.send(TOPIC, b"%d" % n)
        await sent
        await producer.flush()
    query = QueryClient(Connection([cluster.addresses["query-1"]], timeout_ms=2_000))
    # Before its index has the segment, the query service reads the records from the agent's log.
    async with asyncio.timeout(60):
        while not (await query.describe_query(query_pb2.DescribeQueryRequest())).segments_indexed:
            await asyncio.sleep(0.05)
    proxy.hold(Direction.UP, Direction.DOWN)
    fetched = await query.fetch(query_pb2.FetchRequest(topic=TOPIC))
    assert "object store" in fetched.waiting_reason, "told before the call's deadline"
    await query.close()
    async with Consumer(cluster.bootstrap, [TOPIC], start="earliest") as consumer:
        first = asyncio.create_task(anext(consumer))
        async with asyncio.timeout(30):
            while not consumer.waiting:
                await asyncio.sleep(0.05)
        assert "object store" in consumer.waiting[TopicPartition(TOPIC, 0)]
        assert not first.done()
        await proxy.heal()
        values = [(await first).value] + [(await anext(consumer)).value for _ in range(RECORDS - 1)]
        assert values == [b"%d" % n for n in range(RECORDS)]
        assert not consumer.waiting
