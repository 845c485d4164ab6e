"""What is loaded into a process does what it is told, and nothing before and after."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.faults.proxy import FaultProxy
from tests.faults.shim import Control, build

HOUR_S = 3600

# Answers what it is asked on standard input, so that a test can change what it suffers in between.
PROCESS = """
import datetime, os, socket, sys, time
import grpc
def connect_by_grpc(address):
    try:
        return grpc.channel_ready_future(grpc.insecure_channel(address)).result(2)
    except grpc.FutureTimeoutError:
        return 0
file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = build(tmp_path_factory.mktemp("shim"))
    if found is None:
        pytest.skip("no C compiler")
    return found


class Process:
    def __init__(self, environ: dict[str, str], path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
        )

    def ask(self, expression: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{expression}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def control(tmp_path: Path) -> Control:
    return Control(tmp_path / "control")


@pytest.fixture
def process(control: Control, library: Path, tmp_path: Path) -> Iterator[Process]:
    made = Process(control.environ(library), tmp_path / "file")
    yield made
    made.close()


@pytest.mark.parametrize(
    "clock",
    ["time.time()", "time.time_ns() / 1e9", "datetime.datetime.now().timestamp()", "time.clock_gettime(5)"],
)
def test_a_running_process_sees_its_wall_clock_jump_forwards_and_backwards(
    process: Process, control: Control, clock: str
) -> None:
    for shift_s in (0.0, HOUR_S, -HOUR_S, 0.25, -0.75, 0.0):
        control.shift_clock(int(shift_s * 1000))
        assert process.ask(clock) - time.time() == pytest.approx(shift_s, abs=0.2)


def test_a_clock_that_only_grows_is_left_alone(process: Process, control: Control) -> None:
    control.shift_clock(-HOUR_S * 1000)
    assert process.ask("time.monotonic()") == pytest.approx(time.monotonic(), abs=5)


def test_programs_in_c_see_it_too(control: Control, library: Path) -> None:
    control.shift_clock(HOUR_S * 1000)
    shown = subprocess.run(
        ["date", "+%s"], env={**os.environ, **control.environ(library)}, capture_output=True, text=True, check=True
    )
    assert int(shown.stdout) - time.time() == pytest.approx(HOUR_S, abs=5)


@pytest.mark.parametrize("call", ["os.fsync(file) or 0", "os.fdatasync(file) or 0"])
def test_fsync_fails_while_it_is_told_to(process: Process, control: Control, call: str) -> None:
    assert process.ask(call) == 0
    control.fail_fsync(True)
    assert process.ask(call) == 5  # EIO
    control.heal()
    assert process.ask(call) == 0


class Line:
    """A server that says its number to everybody, behind a proxy."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.visitors = 0

    async def start(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._say, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.proxy = FaultProxy(str(self._number), f"{host}:{port}")
        await self.proxy.start()
        return self.proxy

    async def _say(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visitors += 1
        writer.write(b"%d" % self._number)
        writer.close()

    async def stop(self) -> None:
        await self.proxy.stop()
        self._server.close()


@pytest.fixture
async def lines() -> AsyncIterator[list[Line]]:
    made = [Line(1), Line(2)]
    for line in made:
        await line.start()
    yield made
    for line in made:
        await line.stop()


async def test_a_process_goes_by_a_link_of_its_own(
    lines: list[Line], control: Control, library: Path, tmp_path: Path
) -> None:
    told, own = (line.proxy.address for line in lines)
    process = Process(control.environ(library, {told: own}), tmp_path / "file")
    try:
        for host in ("127.0.0.1", "::ffff:127.0.0.1"):
            question = f"socket.create_connection(({host!r}, {told.rpartition(':')[2]})).recv(1).decode()"
            assert await asyncio.to_thread(process.ask, question) == 2
        assert lines[0].visitors == 0
        before = lines[1].visitors
        await asyncio.to_thread(process.ask, f"connect_by_grpc({told!r})")
        assert (lines[0].visitors, lines[1].visitors > before) == (0, True)
    finally:
        process.close()
