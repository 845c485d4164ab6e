"""`kill -9` of the embedded platform at any point of a produce run.

Quotes guarantees G1 (nothing acknowledged is lost), G2 (an offset never changes its record) and G5 (idempotent
producers write once). Each run kills the process at a random moment, starts it again on the same directory and
reads everything back: every acknowledged record at its acknowledged offset, none twice, none that was never sent.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shformat import Codec, ProducerStamp, Records, encode_batch
from shproto.errors import StreamHouseError
from shproto.rpc import Connection
from shproto.services import CoordinatorClient, IngestClient, QueryClient
from shproto.v1 import coordinator_pb2, ingest_pb2, types_pb2
from streamhouse import Producer

from tests.integration.processes import EmbeddedProcess
from tests.integration.reading import assert_ascending, read_partition

TOPIC = "kill"
PARTITIONS = 3
KILL_POINTS = 20
SEED = int(os.environ.get("STREAMHOUSE_TEST_SEED", random.SystemRandom().randrange(2**32)))

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


class History:
    """What was sent and what was acknowledged, over all runs."""

    def __init__(self) -> None:
        self.sent: set[bytes] = set()
        self.acknowledged: dict[tuple[int, int], bytes] = {}

    def acknowledge(self, partition: int, base_offset: int, values: list[bytes]) -> None:
        for n, value in enumerate(values):
            held = self.acknowledged.setdefault((partition, base_offset + n), value)
            assert held == value, f"two values acknowledged at {partition}:{base_offset + n}"

    async def check(self, query: QueryClient) -> int:
        """Compares with everything that can be read; returns how many records there are."""
        total = 0
        seen: set[bytes | None] = set()
        for partition in range(PARTITIONS):
            contents = await read_partition(query, TOPIC, partition)
            assert_ascending(contents.offsets, f"partition {partition}")
            there = contents.at()
            for (owner, offset), value in self.acknowledged.items():
                if owner == partition:
                    assert there.get(offset) == value, f"acknowledged record lost or changed at {partition}:{offset}"
            repeated = [value for value in contents.values if value in seen]
            assert not repeated, f"partition {partition}: {len(repeated)} records twice, the first {repeated[0]!r}"
            seen.update(contents.values)
            never_sent = [value for value in contents.values if value not in self.sent]
            assert not never_sent, f"partition {partition}: never sent: {never_sent[0]!r}"
            total += len(contents.values)
        return total


async def produce_until_cut(address: str, run: int, rng: random.Random, history: History, acks: int) -> None:
    """Pipelined batches over one stream until the connection breaks. A batch is sent once: no retry, no doubt."""
    ingest = IngestClient(Connection([address]))
    in_flight: list[tuple[int, list[bytes]]] = []
    stamp = ProducerStamp(producer_id=1_000_000 + run, producer_epoch=0, base_sequence=0)
    sequences = [0] * PARTITIONS

    async def requests() -> AsyncIterator[ingest_pb2.ProduceRequest]:
        for n in range(10_000):
            partition = rng.randrange(PARTITIONS)
            values = [
                b"%d-%d-%d-%s" % (run, n, k, rng.randbytes(rng.randrange(1, 60)))
                for k in range(rng.choice([1, 20, 300]))
            ]
            producer = ProducerStamp(stamp.producer_id, 0, sequences[partition])
            batch = encode_batch(Records.from_lists(values, timestamps_ms=0), codec=Codec.LZ4, producer=producer)
            sequences[partition] += len(values)
            history.sent.update(values)
            in_flight.append((partition, values))
            yield ingest_pb2.ProduceRequest(topic=TOPIC, partition=partition, batch=batch, acks=acks)
            await asyncio.sleep(rng.choice([0, 0, 0.002]))

    with contextlib.suppress(StreamHouseError):  # the cut is the point; what was acknowledged before it counts
        answered = 0
        async for response in ingest.produce_stream(requests()):
            assert not response.HasField("error"), response.error
            partition, values = in_flight[answered]
            answered += 1
            history.acknowledge(partition, response.base_offset, values)
    await ingest.close()


async def test_kill_at_random_points(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    print(f"\nseed {SEED}: set STREAMHOUSE_TEST_SEED to run these kill points again")
    environ = {"STREAMHOUSE_SEAL_AGE_MS": "300", "STREAMHOUSE_WAL_FILE_BYTES": str(1 << 20)}
    server = EmbeddedProcess(tmp_path / "data", tmp_path, environ)
    history = History()
    await server.start_serving()
    coordinator = CoordinatorClient(Connection([server.address]))
    await coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic=TOPIC, partitions=PARTITIONS))
    try:
        for run in range(KILL_POINTS):
            acks = types_pb2.ACKS_DURABLE if run % 5 == 4 else types_pb2.ACKS_WAL
            producing = asyncio.create_task(produce_until_cut(server.address, run, rng, history, acks))
            after_ms = rng.choice([20, 100, 400, 900]) + rng.randrange(100)
            await asyncio.sleep(after_ms / 1000)
            server.kill()
            await producing
            await server.start_serving()
            query = QueryClient(Connection([server.address]))
            total = await history.check(query)
            await query.close()
            print(f"kill {run + 1} after {after_ms} ms: {len(history.acknowledged)} acknowledged, {total} there")
        assert len(history.acknowledged) > 1000, "the runs acknowledged too little to prove anything"
    finally:
        await coordinator.close()
        await server.stop()


async def test_sdk_producer_rides_over_kills(tmp_path: Path) -> None:
    """The SDK retries over the restart: every record is there exactly once and in order."""
    rng = random.Random(SEED + 1)
    server = EmbeddedProcess(tmp_path / "data", tmp_path, {"STREAMHOUSE_SEAL_AGE_MS": "300"})
    await server.start_serving()
    coordinator = CoordinatorClient(Connection([server.address]))
    await coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic=TOPIC, partitions=PARTITIONS))
    sent: list[list[bytes]] = [[] for _ in range(PARTITIONS)]
    try:
        async with Producer(server.address, acks="wal", linger_ms=2) as producer:
            futures = []
            for burst in range(4):
                killing = asyncio.create_task(_kill_and_restart(server, rng.randrange(50, 400) / 1000))
                for n in range(4000):
                    partition = rng.randrange(PARTITIONS)
                    value = b"%d-%d" % (burst, n)
                    sent[partition].append(value)
                    futures.append(await producer.send(TOPIC, value=value, partition=partition))
                    if n % 100 == 0:
                        await asyncio.sleep(0.005)
                await killing
            await producer.flush()
            offsets = [(await future).offset for future in futures]
        assert len(offsets) == sum(map(len, sent))
        query = QueryClient(Connection([server.address]))
        for partition in range(PARTITIONS):
            contents = await read_partition(query, TOPIC, partition)
            assert contents.values == sent[partition]
        await query.close()
    finally:
        await coordinator.close()
        await server.stop()


async def _kill_and_restart(server: EmbeddedProcess, after_s: float) -> None:
    await asyncio.sleep(after_s)
    server.kill()
    await server.start_serving()
