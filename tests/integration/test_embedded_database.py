"""`streamhouse serve` and the PostgreSQL it runs: who may do what, and what becomes of one without the other."""

import asyncio
import os
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shproto.errors import StreamHouseError
from shproto.rpc import Connection
from shproto.services import CoordinatorClient
from shproto.v1 import coordinator_pb2
from streamhouse import Producer

from tests.integration.processes import EmbeddedProcess, is_serving

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SECRETS = {"STREAMHOUSE_S3_SECRET_KEY": "topsecret", "STREAMHOUSE_S3_ACCESS_KEY": "key"}


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[EmbeddedProcess]:
    server = EmbeddedProcess(tmp_path / "data", tmp_path, {"STREAMHOUSE_SEAL_AGE_MS": "200"} | SECRETS)
    await server.start_serving()
    coordinator = CoordinatorClient(Connection([server.address]))
    await coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic="t", partitions=1))
    await coordinator.close()
    yield server
    await server.stop()


def postmaster(data_dir: Path) -> int:
    return int((data_dir / "postgres" / "postmaster.pid").read_text().split()[0])


async def until(serving: bool, address: str) -> None:
    async with asyncio.timeout(60):
        while await is_serving(address) != serving:
            await asyncio.sleep(0.05)


async def produce(address: str, acks: str) -> None:
    async with Producer(address, acks=acks) as producer:  # type: ignore[arg-type]
        await (await producer.send("t", value=b"x"))


def modes_of_others(path: Path) -> dict[str, str]:
    """Everything below `path` that group or others may do something with, sockets and links apart."""
    found = {}
    for item in (path, *path.rglob("*")):
        mode = item.lstat().st_mode
        if (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and mode & 0o077:
            found[str(item.relative_to(path))] = oct(stat.S_IMODE(mode))
    return found


def environment_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


async def test_nothing_is_anybody_elses_to_read(serve: EmbeddedProcess, tmp_path: Path) -> None:
    await produce(serve.address, "durable")
    assert modes_of_others(tmp_path / "data") == {}
    assert "topsecret" in environment_of(serve.pid)
    assert "topsecret" not in environment_of(postmaster(tmp_path / "data"))


async def test_health_says_while_postgresql_is_away_and_it_is_started_again(
    serve: EmbeddedProcess, tmp_path: Path
) -> None:
    control = tmp_path / "data" / "postgres" / "global" / "pg_control"
    control.rename(tmp_path / "away")
    os.kill(postmaster(tmp_path / "data"), signal.SIGKILL)
    await until(False, serve.address)
    with pytest.raises((StreamHouseError, TimeoutError)):
        await asyncio.wait_for(produce(serve.address, "durable"), 3)
    assert serve.is_running()
    (tmp_path / "away").rename(control)
    await until(True, serve.address)
    for acks in ("wal", "durable"):
        await produce(serve.address, acks)


async def test_a_start_right_after_both_were_killed(serve: EmbeddedProcess, tmp_path: Path) -> None:
    for first in ("serve", "PostgreSQL", "serve"):
        await produce(serve.address, "wal")
        pid = postmaster(tmp_path / "data")
        if first == "serve":
            os.kill(pid, signal.SIGSTOP)  # it cannot heed the signal of its parent's death
            serve.kill()
            os.kill(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
            serve.kill()
        await serve.start_serving()


async def test_a_lock_file_that_was_half_written_keeps_nothing_from_starting(
    serve: EmbeddedProcess, tmp_path: Path
) -> None:
    pid = postmaster(tmp_path / "data")
    serve.kill()
    os.kill(pid, signal.SIGKILL)
    (tmp_path / "data" / "postgres" / "postmaster.pid").write_text("")
    await serve.start_serving()
    await produce(serve.address, "durable")
