"""Faults of disks and of the database: a full disk, a damaged write-ahead log, PostgreSQL that is not there.

Each gives a clear error with the right status; nothing acknowledged is lost; things go on when the cause is gone.
"""

import asyncio
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from shformat import Codec, Records, encode_batch
from shproto import errors
from shproto.rpc import Connection
from shproto.services import CoordinatorClient, IngestClient, QueryClient
from shproto.v1 import coordinator_pb2, ingest_pb2, types_pb2

from tests.integration.processes import EmbeddedProcess, ServiceProcess, free_ports
from tests.integration.reading import read_partition
from tests.integration.rivals import rivals

pytestmark = pytest.mark.integration

TOPIC = "disk-faults"


async def create_topic(address: str) -> None:
    client = CoordinatorClient(Connection([address]))
    await client.create_topic(coordinator_pb2.CreateTopicRequest(topic=TOPIC, partitions=1))
    await client.close()


async def produce(ingest: IngestClient, value: bytes, acks: types_pb2.Acks.ValueType = types_pb2.ACKS_WAL) -> int:
    batch = encode_batch(Records.from_lists([value], timestamps_ms=0), codec=Codec.NONE)
    async with asyncio.timeout(30):
        while True:
            try:
                request = ingest_pb2.ProduceRequest(topic=TOPIC, batch=batch, acks=acks)
                return (await ingest.produce(request)).base_offset
            except errors.NotLeader:
                await asyncio.sleep(0.02)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A data directory whose write-ahead log lies on a file system of 4 MiB."""
    wal = tmp_path / "data" / "wal"
    wal.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(wal)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.strip()}")
    yield tmp_path / "data"
    subprocess.run(["umount", "-l", str(wal)], check=True)


async def test_a_full_disk_refuses_and_recovers(small_disk: Path, tmp_path: Path) -> None:
    """G7: pressure is visible, never fatal. With the object store slow to take over, the log fills its disk."""
    environ = {"STREAMHOUSE_SEAL_AGE_MS": "3000", "STREAMHOUSE_WAL_FILE_BYTES": str(1 << 20)}
    server = EmbeddedProcess(small_disk, tmp_path, environ)
    await server.start_serving()
    await create_topic(server.address)
    ingest, query = (client(Connection([server.address])) for client in (IngestClient, QueryClient))
    rng = random.Random(1)
    acknowledged: dict[int, bytes] = {}
    refusals = 0
    async with asyncio.timeout(60):
        while refusals < 3 or len(acknowledged) < 40:
            value = rng.randbytes(200_000)
            try:
                acknowledged[await produce(ingest, value)] = value
            except (errors.DiskFull, errors.Overloaded) as error:
                refusals += 1
                assert error.retriable
                await asyncio.sleep(0.3)
    contents = await read_partition(query, TOPIC, 0)
    assert contents.at() == acknowledged, "what was refused left no trace, what was acknowledged is there"
    await ingest.close()
    await query.close()
    assert await server.stop() == 0, server.log_tail()


async def test_damage_in_the_middle_of_the_log_is_an_error_with_its_place(tmp_path: Path) -> None:
    """G6: the damaged record is reported, not skipped; its neighbours are there, at their offsets."""
    server = EmbeddedProcess(tmp_path / "data", tmp_path, {"STREAMHOUSE_SEAL_AGE_MS": "600000"})
    await server.start_serving()
    await create_topic(server.address)
    ingest = IngestClient(Connection([server.address]))
    values = [b"first" * 50, b"second" * 50, b"third" * 50]
    assert [await produce(ingest, value) for value in values] == [0, 1, 2]
    server.kill()
    await ingest.close()

    (log_file,) = (tmp_path / "data" / "wal").glob("*.wal")
    content = bytearray(log_file.read_bytes())
    content[content.index(b"second") + 7] ^= 0x01
    log_file.write_bytes(content)

    await server.start_serving()
    query = QueryClient(Connection([server.address]))
    with pytest.raises(errors.DataLoss) as caught:
        await read_partition(query, TOPIC, 0)
    assert (caught.value.details["base_offset"], caught.value.details["end_offset"]) == ("1", "2")
    assert (await read_partition(query, TOPIC, 0, from_offset=2)).at() == {2: values[2]}
    ingest = IngestClient(Connection([server.address]))
    assert await produce(ingest, b"after") == 3
    await ingest.close()
    await query.close()
    assert await server.stop() == 0, server.log_tail()


async def test_damage_on_a_running_agents_disk_is_an_error_with_its_place(
    storage: dict[str, str], tmp_path: Path
) -> None:
    """G6, G1: of a buffer that is read from the log again to be uploaded. The damaged record is on record as lost, the
    others are in the object store: the log itself is not needed any more."""
    memory = {"memory_bytes_max": 1 << 20, "tail_cache_bytes": 0}
    async with rivals(storage["STREAMHOUSE_PG_DSN"], tmp_path, types_pb2.ACKS_WAL, **memory) as found:
        found.store.gate.clear()
        rng = random.Random(2)
        values = [rng.randbytes(50_000) for _ in range(60)]
        for value in values:
            await found.produce("old", value, types_pb2.ACKS_WAL)
        hit = 35  # a segmenter builds two buffers of some ten records at a time, none of which it can upload
        (log_file,) = (tmp_path / "old").glob("*.wal")
        with log_file.open("r+b") as file:  # in place: the agent has it open
            file.seek(log_file.read_bytes().index(values[hit]) + 25_000)
            file.write(b"damaged")
        found.store.gate.set()
        assert await found.produce("old", b"durable", types_pb2.ACKS_DURABLE) == 60, "what lies behind is registered"
        kept = {at: value for at, value in found.acknowledged.items() if at != hit}
        assert await found.read() == (kept, [(hit, hit + 1)])
        await found.check_registry()


@pytest.fixture
async def coordinator_without_postgres(tmp_path: Path) -> AsyncIterator[str]:
    listen, nowhere = (f"127.0.0.1:{port}" for port in free_ports(2))
    environ = {
        "STREAMHOUSE_LISTEN": listen,
        "STREAMHOUSE_PG_DSN": f"postgresql://nobody@{nowhere}/nothing",
        "STREAMHOUSE_PG_TIMEOUT_MS": "500",
    }
    process = ServiceProcess("coordinator", ["coordinator"], environ, tmp_path)
    process.start()
    yield listen
    await process.stop()


async def test_postgres_not_there_is_unavailable(coordinator_without_postgres: str) -> None:
    client = CoordinatorClient(Connection([coordinator_without_postgres]))
    async with asyncio.timeout(30):
        while True:
            with pytest.raises(errors.Unavailable) as caught:
                await client.list_topics(coordinator_pb2.ListTopicsRequest())
            if "PostgreSQL" in str(caught.value):  # until then nobody listens on the port
                break
            await asyncio.sleep(0.1)
    await client.close()
