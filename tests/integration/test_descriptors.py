"""Clients that connect and say nothing take descriptors from a server, not its life.

Quotes guarantee G7 (pressure is visible, never fatal): the write-ahead log goes on rolling over while a thousand silent
connections want more descriptors than there are.
"""

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import pytest
from shformat import Codec, Records, encode_batch
from shproto import errors
from shproto.rpc import Connection
from shproto.services import CoordinatorClient, IngestClient, QueryClient
from shproto.v1 import coordinator_pb2, ingest_pb2
from shruntime.descriptors import raise_descriptor_limit

from tests.integration.processes import EmbeddedProcess
from tests.integration.reading import read_partition

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

TOPIC = "silence"
DESCRIPTORS = 400
SILENT = 1_000


async def produce(ingest: IngestClient, value: bytes) -> int:
    batch = encode_batch(Records.from_lists([value], timestamps_ms=0), codec=Codec.NONE)
    async with asyncio.timeout(60):
        while True:
            try:
                return (await ingest.produce(ingest_pb2.ProduceRequest(topic=TOPIC, batch=batch))).base_offset
            except (errors.NotLeader, errors.DiskFull, errors.Unavailable):
                await asyncio.sleep(0.05)


def connect(address: str, count: int) -> list[socket.socket]:
    host, _, port = address.rpartition(":")
    opened = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            opened.append(socket.create_connection((host, int(port)), 5))
    return opened


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def test_g7_a_thousand_silent_connections_do_not_end_a_server(tmp_path: Path) -> None:
    raise_descriptor_limit()  # ours
    server = EmbeddedProcess(tmp_path / "data", tmp_path, {"STREAMHOUSE_WAL_FILE_BYTES": str(64 * 1024)})
    server.arguments = ["sh", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "sh", *server.arguments]
    await server.start_serving()
    coordinator = CoordinatorClient(Connection([server.address]))
    await coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic=TOPIC, partitions=1))
    ingest, query = (client(Connection([server.address])) for client in (IngestClient, QueryClient))
    written = {await produce(ingest, value): value for value in [b"first"]}
    silent: list[socket.socket] = []
    try:
        for _ in range(10):
            silent += await asyncio.to_thread(connect, server.address, SILENT // 10)
            for _ in range(3):  # each in a file of its own
                value = os.urandom(50_000)
                written[await produce(ingest, value)] = value
            assert server.is_running(), server.log_tail()
        assert open_files(server.pid) < DESCRIPTORS - 50, "some are kept for files"
        assert (await read_partition(query, TOPIC, 0)).at() == written
    finally:
        for connection in silent:
            connection.close()
        for client in (coordinator, ingest, query):
            await client.close()
    assert await server.stop() == 0, server.log_tail()
    assert "Traceback" not in server.log_tail(100_000)
