"""Data directories of earlier versions are opened: records at their offsets, groups where they were, and work goes on.

Quotes guarantees G1 (nothing acknowledged is lost) and G2 (an offset never changes its record).
"""

import asyncio
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from streamhouse import Admin, Consumer, Producer
from streamhouse_embedded.postgres import EmbeddedPostgres
from streamhouse_embedded.postgres_system import find_bin_dir

from tests.integration.processes import EmbeddedProcess

KEPT = sorted((Path(__file__).parent / "data_directories").glob("*.tar.xz"))
Place = tuple[int, int]

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def unpack(packed: Path, target: Path) -> tuple[dict[Place, tuple[str, str]], int]:
    """Returns the records by partition and offset, and how many of them the group has committed."""
    with tarfile.open(packed) as archive:
        archive.extractall(target, filter="data")
    expected = json.loads((target / "expected.json").read_text())
    return {(p, offset): (key, value) for p, offset, key, value in expected["records"]}, expected["committed"]


async def load_database(data_dir: Path) -> None:
    """From the SQL that stands for PostgreSQL's files."""
    postgres = EmbeddedPostgres(data_dir / "postgres")
    dsn = await postgres.start()  # over TCP if the path is too long for a socket
    try:
        arguments = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", data_dir / "database.sql", dsn]
        process = await asyncio.create_subprocess_exec(find_bin_dir() / "psql", *arguments, stdout=subprocess.DEVNULL)
        assert await process.wait() == 0
    finally:
        await postgres.stop()


async def read(address: str, group: str | None = None) -> dict[Place, tuple[str, str]]:
    """All records, or those behind what the group has committed."""
    found = {}
    async with Consumer(address, ["orders"], group=group, start="earliest", stop_at_end=True) as consumer:
        async for record in consumer:
            assert record.key is not None and record.value is not None
            found[record.partition, record.offset] = (record.key.decode(), record.value.decode())
    return found


@pytest.mark.parametrize("packed", KEPT, ids=lambda packed: packed.name.removesuffix(".tar.xz"))
async def test_g1_a_data_directory_of_an_earlier_version_is_opened(packed: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    expected, committed = unpack(packed, data_dir)
    await load_database(data_dir)
    server = EmbeddedProcess(data_dir, tmp_path, {"STREAMHOUSE_SEAL_AGE_MS": "200"})
    try:
        await server.start_serving()
        assert await read(server.address) == expected
        assert len(await read(server.address, group="billing")) == len(expected) - committed
        async with Admin(server.address) as admin:
            assert {topic.topic for topic in await admin.list_topics()} == {"orders", "empty"}
        async with Producer(server.address, acks="durable") as producer:
            at = await (await producer.send("orders", key=b"key-0", value=b"new"))
        verify = [sys.executable, "-m", "streamhouse_cli", "verify", "--data-dir", str(data_dir)]
        verified = await asyncio.create_subprocess_exec(*verify, "--bootstrap", server.address)
        assert await verified.wait() == 0
        await server.stop()
        await server.start_serving()
        assert await read(server.address) == expected | {(at.partition, at.offset): ("key-0", "new")}
    finally:
        await server.stop()


def test_there_are_some() -> None:
    """The test above passes with none."""
    assert len(KEPT) >= 7
