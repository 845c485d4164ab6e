"""The main job on the distributed platform: over a million records through 12 partitions, each checked by content and
offset, while RabbitMQ and then Redis are stopped in the middle.

Quotes the rule: PostgreSQL and the object store hold the truth; losing RabbitMQ or Redis loses nothing and
stops nothing.
"""

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
from shproto.rpc import Connection
from shproto.services import CoordinatorClient
from streamhouse import Admin, Consumer, Producer

from tests.integration.cluster import Cluster
from tests.integration.reading import registered_ends

TOPIC = "flights"
PARTITIONS = 12
ROUNDS = 30
RECORDS_PER_ROUND = 35_000  # 30 rounds: 1,050,000 records

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def round_values(number: int) -> list[bytes]:
    """Reproducible, different for every record, compressible as real events are."""
    rng = random.Random(number)
    return [
        b'{"round":%d,"n":%d,"amount":%d,"country":"%s"}'
        % (number, n, rng.randrange(10**6), rng.choice((b"DE", b"FR", b"US")))
        for n in range(RECORDS_PER_ROUND)
    ]


async def wait_until_registered(coordinator: CoordinatorClient, ends: list[int]) -> None:
    async with asyncio.timeout(120):
        while await registered_ends(coordinator, TOPIC) != ends:
            await asyncio.sleep(0.2)


async def test_a_million_records_through_everything(storage, rabbitmq, redis_server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    common = {
        **storage,
        **rabbitmq.settings,
        **redis_server.settings,
        "STREAMHOUSE_SEAL_AGE_MS": "1000",
        "STREAMHOUSE_SCAN_INTERVAL_MS": "1000",
    }
    cluster = Cluster(common, tmp_path)
    try:
        await cluster.start()
        await move_a_million(cluster, rabbitmq, redis_server)
        codes = await cluster.stop()
        assert set(codes.values()) == {0}, f"exit codes {codes}"
    finally:
        cluster.kill_all()


async def move_a_million(cluster: Cluster, rabbitmq, redis_server) -> None:  # type: ignore[no-untyped-def]
    async with Admin(cluster.bootstrap) as admin:
        await admin.create_topic(TOPIC, partitions=PARTITIONS)
    sent: list[dict[int, bytes]] = [{} for _ in range(PARTITIONS)]
    async with Producer(cluster.bootstrap, acks="wal") as producer:
        for number in range(ROUNDS):
            if number == ROUNDS // 3:
                await asyncio.to_thread(rabbitmq.stop)
            if number == ROUNDS // 2:
                await asyncio.to_thread(redis_server.stop)
            values = round_values(number)
            keys = [b"key-%d" % (n % 997) for n in range(len(values))]
            result = await (await producer.send_many(TOPIC, values, keys=keys))
            for partition, offset, value in zip(
                result.partitions.tolist(), result.offsets.tolist(), values, strict=True
            ):
                assert offset not in sent[partition], f"offset {partition}:{offset} acknowledged twice"
                sent[partition][offset] = value
    coordinator = CoordinatorClient(Connection(cluster.bootstrap.split(",")))
    ends = [max(offsets) + 1 for offsets in sent]
    await wait_until_registered(coordinator, ends)  # with RabbitMQ and Redis both away
    await check_all(cluster, sent)
    await asyncio.to_thread(rabbitmq.start)
    await asyncio.to_thread(redis_server.start)
    await check_all(cluster, sent)
    await coordinator.close()


async def check_all(cluster: Cluster, sent: list[dict[int, bytes]]) -> None:
    """A consumer group reads everything from the start; every record is compared by offset and content."""
    expected = sum(map(len, sent))
    received = 0
    next_offsets = [0] * PARTITIONS
    group = f"check-{random.randrange(10**9)}"
    async with Consumer(cluster.bootstrap, [TOPIC], group=group, start="earliest") as consumer:
        async with asyncio.timeout(180):
            async for batch in consumer.batches():
                offsets = np.asarray(batch.offsets).tolist()
                values = batch.values.to_list()
                there = sent[batch.partition]
                assert offsets[0] == next_offsets[batch.partition], f"partition {batch.partition}: gap or repetition"
                next_offsets[batch.partition] = offsets[-1] + 1
                wrong = [
                    n
                    for n, (offset, value) in enumerate(zip(offsets, values, strict=True))
                    if there.get(offset) != value
                ]
                assert not wrong, f"partition {batch.partition} offset {offsets[wrong[0]]}: {values[wrong[0]]!r}"
                received += len(offsets)
                if received >= expected:
                    break
    assert received == expected
