"""Data directories of older versions are opened after retention and a deleted topic: what is acknowledged and kept is
there, and work goes on where it ended."""

import asyncio
import json
import tarfile
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from streamhouse import Admin, Consumer, Producer
from streamhouse_embedded.postgres import EmbeddedPostgres

from tests.integration.processes import EmbeddedProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PATIENCE_S = 120
ARCHIVES = sorted((Path(__file__).parent / "data_directories").glob("*.tar.gz"))
assert len(ARCHIVES) >= 3, "the archives are missing"


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.gz"))
async def test_a_data_directory_of_an_older_version_is_opened(archive: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(archive) as packed:
        packed.extractall(data, filter="data")
    expected = json.loads((data / "expected.json").read_text())
    await load(data / "postgres", (data / "database.sql").read_text())
    for name in ("expected.json", "database.sql"):
        (data / name).unlink()
    server = EmbeddedProcess(data, tmp_path, {})
    await server.start_serving()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await look(server.address, expected)
            await go_on(server.address, expected)
    finally:
        assert await server.stop() == 0, server.log_tail()
    assert "Traceback" not in server.log_path.read_text(), server.log_tail()


async def load(directory: Path, sql: str) -> None:
    server = EmbeddedPostgres(directory)
    connection = await asyncpg.connect(await server.start())
    await connection.execute(sql)
    await connection.close()
    await server.stop()


async def look(address: str, expected: dict[str, Any]) -> None:
    """At topics, records, and the group's place."""
    async with Admin(address) as admin:
        topics = {info.topic for info in await admin.list_topics()}
        described = await admin.describe_group(expected["group"])
    assert topics == set(expected["records"])
    assert sum(position.offset or 0 for position in described.positions) == expected["committed"]
    found = await read(address, "orders", len(expected["records"]["orders"]))
    assert found == {(partition, offset): value for partition, offset, value in expected["records"]["orders"]}
    kept = {(partition, offset): value for partition, offset, value in expected["records"]["kept"]}
    newest = max(kept)
    assert (await read(address, "kept", 1, until=newest)).items() <= kept.items(), "retention may have removed some"


async def read(
    address: str, topic: str, count: int, until: tuple[int, int] | None = None
) -> dict[tuple[int, int], str]:
    found: dict[tuple[int, int], str] = {}
    async with Consumer(address, [topic], start="earliest") as consumer:
        async for record in consumer:
            assert record.value is not None
            found[(record.partition, record.offset)] = record.value.decode()
            if until in found if until else len(found) == count:
                return found
    raise AssertionError("the consumer ended")


async def go_on(address: str, expected: dict[str, Any]) -> None:
    """New records follow on, at offsets that nobody had."""
    taken = {(partition, offset) for partition, offset, _ in expected["records"]["orders"]}
    async with Producer(address, acks="durable") as producer:
        for nth in range(10):
            sent = await (await producer.send("orders", key=b"k%d" % nth, value=b"new"))
            assert (sent.partition, sent.offset) not in taken
            assert sent.offset > max(offset for partition, offset in taken if partition == sent.partition)
            taken.add((sent.partition, sent.offset))
    async with Admin(address) as admin:
        await admin.create_topic(expected["deleted"], partitions=1)
