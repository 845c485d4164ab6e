"""Two writers that both believe they are the one, through `kill -9` of the platform in a loop.

Quotes what a fence promises (docs/guarantees.md): the records of a numbered stream are in the topic once and in order,
whoever writes them and whatever dies. Each epoch's writer makes the same stream; it is replaced while it writes, goes
on as a zombie, and the platform is killed meanwhile.
"""

import asyncio
import os
import random
from pathlib import Path

import pytest
from shformat import BytesColumn
from shproto.acks import Acks
from shproto.errors import ProducerFenced
from shproto.rpc import Connection
from shproto.services import CoordinatorClient, QueryClient
from shproto.v1 import coordinator_pb2
from streamhouse import Admin
from streamhouse.sequenced import SequencedWriter, new_producer_id, sequenced_writer

from tests.integration.cluster import Cluster
from tests.integration.processes import EmbeddedProcess
from tests.integration.reading import PartitionContents, assert_ascending, read_partition

TOPIC = "stream"
ROUNDS = 8
TAKEOVERS = 3
RECORDS_PER_ROUND_MIN = 200
# Small buffers: a replay finds many, and registration stops at any of them.
SMALL = {"STREAMHOUSE_SEAL_BYTES": "65536", "STREAMHOUSE_SEAL_AGE_MS": "300"}
SEED = int(os.environ.get("STREAMHOUSE_TEST_SEED", random.SystemRandom().randrange(2**32)))

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


class Writers:
    """The writers of all epochs so far. `written`: number of records that are acknowledged."""

    def __init__(self, address: str, producer_id: int, acks: Acks, rng: random.Random) -> None:
        self._address = address
        self._producer_id = producer_id
        self._acks = acks
        self._rng = rng
        self.written = 0
        self.fenced: list[int] = []
        self.begun: list[int] = []

    async def write(self, epoch: int) -> None:
        """Writes the stream on from where the fence says, until a newer epoch fences."""
        async with sequenced_writer(
            self._address, TOPIC, 0, producer_id=self._producer_id, producer_epoch=epoch, acks=self._acks
        ) as writer:
            try:
                await self._write(writer)
            except ProducerFenced:
                self.fenced.append(epoch)

    async def go_on(self, writing: asyncio.Task[None]) -> None:
        """Waits until RECORDS_PER_ROUND_MIN more records are acknowledged; `writing` must not end meanwhile."""
        goal = self.written + RECORDS_PER_ROUND_MIN
        while self.written < goal:
            if writing.done():
                writing.result()
                raise AssertionError("the newest writer was fenced")
            await asyncio.sleep(0.01)

    async def _write(self, writer: SequencedWriter) -> None:
        number = (await writer.fence()).next_sequence
        assert number >= self.written, f"acknowledged up to {self.written}, the fence says {number}"
        self.begun.append(number)
        while True:
            count = self._rng.choice([1, 7, 300])
            values = BytesColumn.from_list([b"%d" % n for n in range(number, number + count)])
            await writer.write(number, values, timestamps_ms=1_700_000_000_000)
            number += count
            self.written = max(self.written, number)


@pytest.mark.parametrize("acks", ["wal", "durable"])
async def test_a_zombie_and_its_successors_write_one_stream_once_through_kills(tmp_path: Path, acks: Acks) -> None:
    rng = random.Random(SEED)
    process = EmbeddedProcess(tmp_path / "data", tmp_path, SMALL)
    await process.start_serving()
    tasks: list[asyncio.Task[None]] = []
    try:
        coordinator = CoordinatorClient(Connection([process.address]))
        await coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic=TOPIC, partitions=1))
        writers = Writers(process.address, await new_producer_id(process.address), acks, rng)
        for epoch in range(1, ROUNDS + 1):
            tasks.append(asyncio.create_task(writers.write(epoch)))
            await writers.go_on(tasks[-1])
            # In the middle of whatever the writers do: one writes, its successor may be fencing.
            if rng.random() < 0.5:
                tasks.append(asyncio.create_task(writers.write(epoch)))
                await asyncio.sleep(rng.random() * 0.05)
            process.kill()
            await process.start_serving()
        last = asyncio.create_task(writers.write(ROUNDS + 1))
        await all_fenced(writers, tasks, ROUNDS)
        last.cancel()
        await asyncio.wait([last])
        contents = await read_partition(QueryClient(Connection([process.address])), TOPIC, 0)
    finally:
        for task in tasks:
            task.cancel()
        await process.stop()
    check(contents, writers)


@pytest.mark.parametrize("acks", ["wal", "durable"])
async def test_the_stream_is_one_through_takeovers(storage: dict[str, str], tmp_path: Path, acks: Acks) -> None:
    """With `durable` the other agent goes on at once. With `wal` it waits until the killed one is back."""
    rng = random.Random(SEED)
    cluster = Cluster({**storage, **SMALL}, tmp_path, {"coordinator": 1, "query": 1, "segmenter": 1})
    tasks: list[asyncio.Task[None]] = []
    try:
        await cluster.start()
        async with Admin(cluster.bootstrap) as admin:
            await admin.create_topic(TOPIC, partitions=1, min_acks=acks)
            writers = Writers(cluster.bootstrap, await new_producer_id(cluster.bootstrap), acks, rng)
            for epoch in range(1, TAKEOVERS + 1):
                tasks.append(asyncio.create_task(writers.write(epoch)))
                await writers.go_on(tasks[-1])
                before = (await admin.describe_topic(TOPIC)).partitions[0]
                victim = cluster.services[before.leader_agent_id]
                victim.kill()
                while (after := (await admin.describe_topic(TOPIC)).partitions[0]).epoch == before.epoch:
                    await asyncio.sleep(0.1)
                assert after.leader_agent_id != before.leader_agent_id
                if acks == "durable":
                    await writers.go_on(tasks[-1])
                victim.start()
                await victim.wait_serving(cluster.addresses[before.leader_agent_id])
            last = asyncio.create_task(writers.write(TAKEOVERS + 1))
            await all_fenced(writers, tasks, TAKEOVERS)
            last.cancel()
            await asyncio.wait([last])
        query = QueryClient(Connection([cluster.addresses["query-1"]]))
        contents = await read_partition(query, TOPIC, 0)
        await cluster.stop()
    finally:
        for task in tasks:
            task.cancel()
        cluster.kill_all()
    check(contents, writers)


async def all_fenced(writers: Writers, tasks: list[asyncio.Task[None]], count: int) -> None:
    """Waits until all writers but the last have ended by themselves: their epochs are fenced."""
    done, _ = await asyncio.wait(tasks, timeout=120)
    assert len(done) == len(tasks), "a zombie still writes"
    for task in tasks:
        task.result()
    assert sorted(set(writers.fenced)) == list(range(1, count + 1)), f"seed {SEED}"


def check(contents: PartitionContents, writers: Writers) -> None:
    assert_ascending(contents.offsets, TOPIC)
    numbers = [int(value or b"-1") for value in contents.values]
    assert numbers == list(range(len(numbers))), f"seed {SEED}: not every record once and in order"
    assert len(numbers) >= writers.written, f"seed {SEED}: acknowledged {writers.written}, there are {len(numbers)}"
