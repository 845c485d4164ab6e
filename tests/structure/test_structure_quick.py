"""`make quick` opens nothing: a test that does cannot bear the mark."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import grpc.aio
import pytest

from tests.quick import closed_doors


def _bind() -> None:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))


async def _connect() -> None:
    await asyncio.open_connection("127.0.0.1", 1)


async def _start() -> None:
    await asyncio.create_subprocess_exec("true")


@pytest.mark.parametrize(
    "open_something",
    [
        _bind,
        lambda: subprocess.run([sys.executable, "-c", ""]),
        lambda: asyncio.run(_connect()),
        lambda: asyncio.run(_start()),
        lambda: grpc.aio.insecure_channel("127.0.0.1:1"),
        lambda: os.fork(),
    ],
)
def test_a_quick_test_that_opens_something_fails(open_something: Callable[[], object]) -> None:
    with closed_doors(), pytest.raises(pytest.fail.Exception, match="marked quick, and calls"):
        open_something()


def test_behind_a_quick_test_doors_are_open_again() -> None:
    with closed_doors():
        asyncio.run(asyncio.sleep(0))  # an event loop is no door
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
