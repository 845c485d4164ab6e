"""`serve` runs SQL in a child process: what ends that process neither ends the log, nor is left behind by its end."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest
from streamhouse import Admin, Producer, Sql
from streamhouse.errors import ShuttingDown, Unavailable

from tests.integration.processes import EmbeddedProcess, free_ports

pytestmark = pytest.mark.integration
TIMEOUT_S = 60.0


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[EmbeddedProcess]:
    (port,) = free_ports(1)
    process = EmbeddedProcess(tmp_path / "data", tmp_path, {"STREAMHOUSE_SQL_PG_LISTEN": f"127.0.0.1:{port}"})
    await process.start_serving()
    yield process
    await process.stop()


def sql_pids(serve: EmbeddedProcess) -> list[int]:
    """Returns the children that run SQL."""
    children = Path(f"/proc/{serve.pid}/task/{serve.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"streamhouse_sql" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until_ended(pid: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while is_running(pid):
            await asyncio.sleep(0.05)


async def count(serve: EmbeddedProcess) -> int:
    async with Sql(serve.address) as sql:
        (row,) = [row for batch in [batch async for batch in sql("SELECT count(*) AS n FROM t")] for row in batch["n"]]
    return int(row.as_py())


def pg_count(serve: EmbeddedProcess) -> int:
    host, _, port = serve.environ["STREAMHOUSE_SQL_PG_LISTEN"].rpartition(":")
    with psycopg.connect(host=host, port=int(port), dbname="streamhouse", user="u", autocommit=True) as connection:
        row = connection.execute("SELECT count(*) FROM t").fetchone()
    assert row is not None
    return int(row[0])


async def test_a_killed_process_of_sql_is_started_again_and_the_log_goes_on(serve: EmbeddedProcess) -> None:
    async with Admin(serve.address) as admin, Producer(serve.address) as producer:
        await admin.create_topic("t", partitions=1)
        for number in range(3):
            (pid,) = sql_pids(serve)
            os.kill(pid, signal.SIGKILL)
            await (await producer.send("t", b"while it is away"))
            assert await count(serve) == number + 1
            assert await asyncio.to_thread(pg_count, serve) == number + 1
            assert sql_pids(serve) not in ([], [pid])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_process_of_sql_ends_with_the_platform(serve: EmbeddedProcess, number: signal.Signals) -> None:
    (pid,) = sql_pids(serve)
    serve.send_signal(number)
    await until_ended(serve.pid)
    await until_ended(pid)


async def test_a_platform_that_stops_tells_the_clients_of_its_statements_why(serve: EmbeddedProcess) -> None:
    async with Admin(serve.address) as admin, Producer(serve.address) as producer, Sql(serve.address) as sql:
        await admin.create_topic("t", partitions=1)
        await (await producer.send("t", b"v"))
        changes = aiter(sql("SELECT _offset FROM t EMIT CHANGES"))
        assert (await anext(changes))["_offset"].to_pylist() == [0]
        serve.send_signal(signal.SIGTERM)
        with pytest.raises(ShuttingDown, match="this SQL service is stopping"):
            await anext(changes)


async def test_a_process_of_sql_that_cannot_start_leaves_the_log_serving(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    (data_dir / "sql").write_text("no directory")
    serve = EmbeddedProcess(data_dir, tmp_path)
    try:
        await serve.start_serving()
        async with Admin(serve.address) as admin, Producer(serve.address) as producer:
            await admin.create_topic("t", partitions=1)
            await (await producer.send("t", b"v"))
        with pytest.raises(Unavailable, match="no SQL service runs"):
            await count(serve)
        assert "error: the process of SQL: " in serve.log_tail(60_000)
        (data_dir / "sql").unlink()
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    assert await count(serve) == 1
                    break
                except Unavailable:
                    await asyncio.sleep(0.2)
    finally:
        await serve.stop()
