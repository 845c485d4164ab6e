"""The power fails, on a file system that keeps no more than what was fsynced: neither content nor names.

Quotes guarantee G1 (nothing acknowledged is lost): what `streamhouse serve` has acknowledged is there when it starts
again on what the power cut left. The first start counts too, which makes every directory; so do files of the log that
were begun and deleted meanwhile, segments, and a restored database.
"""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from shformat import Records, encode_batch
from shproto.rpc import Connection
from shproto.services import CoordinatorClient, IngestClient, QueryClient
from shproto.v1 import coordinator_pb2, ingest_pb2, types_pb2

from tests.integration.forgetful import ForgetfulDirectory
from tests.integration.processes import EmbeddedProcess
from tests.integration.reading import read_partition

TOPIC = "cut"
BATCHES = 40
VALUE_BYTES = 10_000

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


async def produce(address: str, first: int, count: int, acks: int) -> dict[int, bytes]:
    """Batches of one record, one after the other; the values by their offsets, all acknowledged."""
    ingest = IngestClient(Connection([address]))
    acknowledged = {}
    for number in range(first, first + count):
        value = b"%d-" % number + bytes([number % 251]) * VALUE_BYTES
        batch = encode_batch(Records.from_lists([value]))
        request = ingest_pb2.ProduceRequest(topic=TOPIC, acks=acks, batch=batch, timeout_ms=20_000)  # type: ignore[arg-type]
        acknowledged[(await ingest.produce(request)).base_offset] = value
    await ingest.close()
    return acknowledged


async def create_topic(address: str) -> None:
    coordinator = CoordinatorClient(Connection([address]))
    await coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic=TOPIC, partitions=1))
    await coordinator.close()


async def read_all(address: str) -> dict[int, bytes | None]:
    query = QueryClient(Connection([address]))
    contents = await read_partition(query, TOPIC, 0)
    await query.close()
    return contents.at()


async def read_after_a_start_on(data_dir: Path, log_dir: Path, *, restored: bool = False) -> dict[int, bytes | None]:
    server = EmbeddedProcess(data_dir, log_dir)
    try:
        await server.start_serving()
        if restored:
            await asyncio.to_thread(command_line, "restore", "--complete", "--yes", "--bootstrap", server.address)
        return await read_all(server.address)
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("acks", "environ"),
    [
        pytest.param(types_pb2.ACKS_WAL, {"STREAMHOUSE_SEAL_AGE_MS": "3600000"}, id="the log holds everything"),
        pytest.param(types_pb2.ACKS_WAL, {"STREAMHOUSE_SEAL_AGE_MS": "200"}, id="the log is trimmed meanwhile"),
        pytest.param(types_pb2.ACKS_DURABLE, {}, id="segments hold everything"),
    ],
)
async def test_g1_what_was_acknowledged_since_the_first_start_survives(
    tmp_path: Path, acks: int, environ: dict[str, str]
) -> None:
    disk = ForgetfulDirectory(tmp_path)
    small_files = {"STREAMHOUSE_WAL_FILE_BYTES": str(64 * 1024), "STREAMHOUSE_WAL_BYTES_MAX": str(1 << 30)}
    server = EmbeddedProcess(disk.path / "made" / "here" / "data", tmp_path, small_files | environ | disk.environ)
    try:
        await server.start_serving()
        await create_topic(server.address)
        acknowledged = await produce(server.address, 0, BATCHES, acks)
        disk.cut_power()
        server.kill()
    finally:
        await server.stop()
    disk.leave(tmp_path / "left")
    found = await read_after_a_start_on(tmp_path / "left" / "made" / "here" / "data", tmp_path)
    assert {offset: found.get(offset) for offset in acknowledged} == acknowledged


async def test_g1_a_second_start_makes_durable_what_a_killed_first_one_had_only_made(tmp_path: Path) -> None:
    """The first process died between mkdir and fsync; the second one finds the directories."""
    disk = ForgetfulDirectory(tmp_path)
    data_dir = disk.path / "data"
    for name in ("wal", "objects/objects", "objects/tmp", "cache"):
        (data_dir / name).mkdir(parents=True, exist_ok=True)
    server = EmbeddedProcess(data_dir, tmp_path, disk.environ | {"STREAMHOUSE_SEAL_AGE_MS": "3600000"})
    try:
        await server.start_serving()
        await create_topic(server.address)
        acknowledged = await produce(server.address, 0, 3, types_pb2.ACKS_WAL)
        acknowledged |= await produce(server.address, 3, 3, types_pb2.ACKS_DURABLE)
        disk.cut_power()
        server.kill()
    finally:
        await server.stop()
    disk.leave(tmp_path / "left")
    found = await read_after_a_start_on(tmp_path / "left" / "data", tmp_path)
    assert {offset: found.get(offset) for offset in acknowledged} == acknowledged


async def test_g1_a_restored_database_survives(tmp_path: Path) -> None:
    disk = ForgetfulDirectory(tmp_path)
    server = EmbeddedProcess(tmp_path / "before", tmp_path)
    try:
        await server.start_serving()
        await create_topic(server.address)
        acknowledged = await produce(server.address, 0, 5, types_pb2.ACKS_DURABLE)
        command_line("backup", "--data-dir", str(tmp_path / "before"))
    finally:
        await server.stop()
    # The database alone is where everything may be forgotten: objects are in both places.
    objects, data_dir = tmp_path / "before" / "objects", disk.path / "data"
    shutil.copytree(objects, data_dir / "objects")
    command_line("restore", "--yes", "--data-dir", str(data_dir), environ=disk.environ)
    disk.cut_power()
    disk.leave(tmp_path / "left")
    shutil.rmtree(tmp_path / "left" / "data" / "objects")
    shutil.copytree(objects, tmp_path / "left" / "data" / "objects")
    found = await read_after_a_start_on(tmp_path / "left" / "data", tmp_path, restored=True)
    assert {offset: found.get(offset) for offset in acknowledged} == acknowledged


def command_line(*arguments: str, environ: Mapping[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "streamhouse_cli", *arguments]
    ended = subprocess.run(command, env={**os.environ, **(environ or {})}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
