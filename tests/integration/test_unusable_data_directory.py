"""A data directory that `serve` cannot open: one line says why, without a traceback, and nothing in it is changed."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest
from shproto.rpc import Connection
from shproto.services import CoordinatorClient
from shproto.v1 import coordinator_pb2
from streamhouse import Producer
from streamhouse_embedded.postgres import EmbeddedPostgres
from streamhouse_embedded.postgres_system import processes_on, stop_orphans

from tests.integration.processes import EmbeddedProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

Damage = Callable[[Path], Awaitable[None]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a record, stopped."""
    work_dir = tmp_path_factory.mktemp("sound")

    async def make() -> None:
        server = EmbeddedProcess(work_dir / "data", work_dir)
        await server.start_serving()
        try:
            coordinator = CoordinatorClient(Connection([server.address]))
            await coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic="t", partitions=1))
            await coordinator.close()
            async with Producer(server.address) as producer:
                await (await producer.send("t", value=b"x"))
        finally:
            server.kill()  # so that the log keeps it

    try:
        asyncio.run(make())
    finally:
        stop_orphans(work_dir / "data" / "postgres")
    return work_dir / "data"


def file_instead(name: str) -> Damage:
    async def damage(data_dir: Path) -> None:
        await asyncio.to_thread(shutil.rmtree, data_dir / name)
        (data_dir / name).write_text("not a directory")

    return damage


def content(name: str, written: bytes) -> Damage:
    async def damage(data_dir: Path) -> None:
        (data_dir / name).write_bytes(written)

    return damage


def without(name: str) -> Damage:
    async def damage(data_dir: Path) -> None:
        (data_dir / name).unlink()

    return damage


def sql(statement: str) -> Damage:
    async def damage(data_dir: Path) -> None:
        postgres = EmbeddedPostgres(data_dir / "postgres")
        connection = await asyncpg.connect(await postgres.start())
        await connection.execute(statement)
        await connection.close()
        await postgres.stop()

    return damage


async def flipped_bit(data_dir: Path) -> None:
    """In a page of PostgreSQL's that every start reads."""
    postgres = EmbeddedPostgres(data_dir / "postgres")
    connection = await asyncpg.connect(await postgres.start())
    path = data_dir / "postgres" / await connection.fetchval("SELECT pg_relation_filepath('migrations')")
    await connection.close()
    await postgres.stop()
    page = bytearray(path.read_bytes())
    page[page.index(b"0001_tables")] ^= 1
    path.write_bytes(page)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(file_instead("wal"), "wal: not a directory", id="the log is a file"),
        pytest.param(content("wal/identity", b"\xff\xfe"), "wal/identity: not an identity file", id="identity"),
        pytest.param(without("wal/identity"), "there are log files but no identity file", id="no identity"),
        pytest.param(content("wal/history", b"\xff" * 1024), "wal/history: not a note of a history", id="note"),
        pytest.param(content("wal/history", b'{"history_id":'), "wal/history: not a note of a history", id="old note"),
        pytest.param(content("wal/x.wal", b""), "not a name of a write-ahead log file", id="foreign file"),
        pytest.param(file_instead("objects"), "objects: Not a directory", id="the store is a file"),
        pytest.param(file_instead("cache"), "cache cannot be used: File exists", id="the cache is a file"),
        pytest.param(file_instead("postgres"), "cannot set up", id="the database is a file"),
        pytest.param(content("postgres/PG_VERSION", b"9.6\n"), "are of PostgreSQL 9.6, the programs", id="version"),
        pytest.param(content("postgres/PG_VERSION", b"\xff"), "are of PostgreSQL", id="version that is none"),
        pytest.param(content("postgres/global/pg_control", b""), "pg_control", id="control file"),
        pytest.param(sql("DROP TABLE sweeps"), "but not sweeps.name, sweeps.last_ms", id="table"),
        pytest.param(sql("ALTER TABLE groups RENAME generation TO g"), "but not groups.generation", id="column"),
        pytest.param(
            sql("DELETE FROM migrations WHERE name <> '0001_tables'"), "migration 0002_orphaned_ranges does not fit",
            id="migrations that were made already",
        ),
        pytest.param(sql("INSERT INTO migrations VALUES ('9999_of_the_future')"), "9999_of_the_future", id="too new"),
        pytest.param(flipped_bit, "invalid page in block 0", id="damaged page"),
    ],
)  # fmt: skip
async def test_a_start_says_in_one_line_why_it_cannot_be(
    sound: Path, tmp_path: Path, damage: Damage, said: str
) -> None:
    data_dir = tmp_path / "data"
    await asyncio.to_thread(shutil.copytree, sound, data_dir, ignore=shutil.ignore_patterns(".s.*"))
    await damage(data_dir)
    command = [sys.executable, "-m", "streamhouse_cli", "serve", "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        async with asyncio.timeout(120):
            _, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = err.decode()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1, text
    assert "Traceback" not in text
    assert len(errors) == 1, text
    assert said in errors[0]
    assert not processes_on(data_dir / "postgres"), "its PostgreSQL runs on"
