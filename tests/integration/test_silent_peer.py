"""A process that hangs keeps its connections open and answers nothing: those at the other end must notice."""

import asyncio
import contextlib
import signal
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2
from shproto.errors import Unavailable
from shproto.rpc import Connection

from tests.integration.processes import ServiceProcess, free_ports

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

PATIENCE_S = 45
"""Pings find it out in 15 s; without a limit of their own they would take 70."""


async def test_a_stream_to_a_process_that_hangs_breaks(tmp_path: Path) -> None:
    listen, nobody = (f"127.0.0.1:{port}" for port in free_ports(2))
    environ = {"STREAMHOUSE_LISTEN": listen, "STREAMHOUSE_BOOTSTRAP": nobody, "STREAMHOUSE_WAL_DIR": str(tmp_path)}
    process = ServiceProcess("ingest", ["ingest"], environ, tmp_path)
    process.start()
    connection = Connection([listen])
    try:
        await connected(connection)
        states = connection.unary_stream(
            "/grpc.health.v1.Health/Watch", health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse
        )
        async with contextlib.aclosing(states), asyncio.timeout(PATIENCE_S):  # type: ignore[type-var]
            await anext(states)
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(Unavailable, match="ping timeout"):
                await anext(states)
    finally:
        process.kill()
        await connection.close()


async def connected(connection: Connection) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await connection.connect(1_000)
            except Unavailable:
                await asyncio.sleep(0.1)
