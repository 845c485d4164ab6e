"""One agent's log disk is full, another agent has room: leaderships move, and nobody needs to know.

Quotes guarantees G1 (nothing acknowledged is lost), G2 (an offset never changes its record) and G7 (pressure is
visible, never fatal).
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from shproto.rpc import Connection
from shproto.services import QueryClient
from streamhouse import Admin, Producer

from tests.integration.cluster import Cluster
from tests.integration.reading import read_partition

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

TOPIC = "orders"
PARTITIONS = 4
FILE_BYTES = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The directory of one agent's log, on a file system of 8 MiB."""
    wal = tmp_path / "ingest-1"
    wal.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(wal)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.strip()}")
    yield wal
    subprocess.run(["umount", "-l", str(wal)], check=True)


@pytest.fixture
async def cluster(storage: dict[str, str], small_disk: Path, tmp_path: Path) -> AsyncIterator[Cluster]:
    changes = {"HEARTBEAT_INTERVAL_MS": 200, "WAL_FULL_GRACE_MS": 1_000, "WAL_FILE_BYTES": FILE_BYTES}
    environ = storage | {f"STREAMHOUSE_{name}": str(value) for name, value in changes.items()}
    cluster = Cluster(environ, tmp_path, {"coordinator": 1, "ingest": 2, "query": 1, "segmenter": 1})
    await cluster.start()
    yield cluster
    await cluster.stop()
    cluster.kill_all()


def fill(path: Path) -> None:
    """Leaves not a block on the file system."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


async def leads(admin: Admin) -> dict[str, int]:
    """How many partitions each agent leads that are not on the move."""
    found: dict[str, int] = {}
    for lease in (await admin.status()).leases:
        if lease.status == "active":
            found[lease.agent_id] = found.get(lease.agent_id, 0) + 1
    return found


async def until_leads(admin: Admin, expected: dict[str, int]) -> None:
    async with asyncio.timeout(60):
        while await leads(admin) != expected:
            await asyncio.sleep(0.1)


async def test_g1_g7_leaderships_leave_an_agent_whose_disk_is_full(cluster: Cluster, small_disk: Path) -> None:
    async with Admin(cluster.bootstrap) as admin:
        await admin.create_topic(TOPIC, partitions=PARTITIONS)
        await until_leads(admin, {"ingest-1": 2, "ingest-2": 2})
        sent: dict[int, dict[int, bytes]] = {partition: {} for partition in range(PARTITIONS)}
        async with Producer(cluster.bootstrap, acks="wal") as producer:

            async def write(rounds: int) -> None:
                for number in range(rounds):
                    for partition in range(PARTITIONS):
                        value = b"%d" % number + os.urandom(20_000)  # beyond the space ahead, which the log has
                        metadata = await (await producer.send(TOPIC, value, partition=partition))
                        assert metadata.offset not in sent[partition]
                        sent[partition][metadata.offset] = value

            await write(3)
            await asyncio.to_thread(fill, small_disk / "ballast")
            await write(10)  # the producer waits, is sent to the other agent, and goes on
            await until_leads(admin, {"ingest-2": PARTITIONS})
            said = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "streamhouse_cli", "status", "--bootstrap", cluster.bootstrap],
                capture_output=True,
                text=True,
            )
            assert "THE LOG OF AGENT ingest-1 HAS NO ROOM" in said.stdout, said
            (small_disk / "ballast").unlink()
            await until_leads(admin, {"ingest-1": 2, "ingest-2": 2})
            await write(3)
    query = QueryClient(Connection([cluster.addresses["query-1"]]))
    for partition, values in sent.items():
        assert (await read_partition(query, TOPIC, partition)).at() == values
    await query.close()
