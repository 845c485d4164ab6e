"""Services as systemd runs them: told of readiness, reloads and stops over a real socket, watched, and hung up on."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.integration.cluster import SERVICES, Cluster
from tests.integration.processes import EmbeddedProcess, ServiceProcess, free_ports

pytestmark = pytest.mark.integration

PATIENCE_S = 60
NOBODY = "127.0.0.1:1"


class Systemd:
    """The receiving end of NOTIFY_SOCKET; a queue of states."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(PATIENCE_S)

    def until(self, wanted: str) -> list[str]:
        """Waits for a datagram that begins with `wanted`; returns all up to it, signs of life left out."""
        found: list[str] = []
        while not found or not found[-1].startswith(wanted):
            state = self._socket.recv(4096).decode()
            if state != "WATCHDOG=1" or wanted == state:
                found.append(state)
        return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    made = Systemd(tmp_path / "notify")
    yield made
    made.close()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.05)


async def test_serve_tells_systemd_when_it_is_ready_reloads_and_stops(tmp_path: Path, systemd: Systemd) -> None:
    log_file = tmp_path / "service.log"
    environ = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "1000000", "STREAMHOUSE_LOG_FILE": str(log_file)}
    server = EmbeddedProcess(tmp_path / "data", tmp_path, environ)
    server.start()
    try:
        states = await asyncio.to_thread(systemd.until, "READY=1")
        assert states == ["STATUS=starting", f"READY=1\nSTATUS=serving on {server.address}"]
        await server.wait_serving(server.address)
        await asyncio.to_thread(systemd.until, "WATCHDOG=1")
        log_file.rename(tmp_path / "service.log.1")
        server.send_signal(signal.SIGHUP)
        reloading, *_, ready = await asyncio.to_thread(systemd.until, "READY=1")
        assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=") and ready == "READY=1"
        assert "opened anew" in log_file.read_text()
        assert await server.stop() == 0, server.log_tail()
        assert (await asyncio.to_thread(systemd.until, "STOPPING=1"))[-1] == "STOPPING=1\nSTATUS=draining"
        assert "draining" in log_file.read_text() and "draining" not in (tmp_path / "service.log.1").read_text()
    finally:
        await server.stop()


async def test_a_process_that_stands_still_gives_no_sign_of_life(tmp_path: Path, systemd: Systemd) -> None:
    environ = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "200000"}
    server = EmbeddedProcess(tmp_path / "data", tmp_path, environ)
    server.start()
    try:
        await asyncio.to_thread(systemd.until, "READY=1")
        server.send_signal(signal.SIGSTOP)
        systemd._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                systemd._socket.recv(4096)
        systemd._socket.settimeout(2)
        with pytest.raises(TimeoutError):
            systemd._socket.recv(4096)
        server.send_signal(signal.SIGCONT)
        systemd._socket.settimeout(PATIENCE_S)
        await asyncio.to_thread(systemd.until, "WATCHDOG=1")
    finally:
        server.send_signal(signal.SIGCONT)
        await server.stop()


async def test_every_service_tells_systemd(tmp_path: Path, storage: dict[str, str]) -> None:
    cluster = Cluster(storage, tmp_path, dict.fromkeys(SERVICES, 1))
    ends = {name: Systemd(tmp_path / f"{name}.notify") for name in cluster.services}
    for name, process in cluster.services.items():
        process.environ["NOTIFY_SOCKET"] = str(ends[name].path)
    try:
        await cluster.start()
        for name, end in ends.items():
            states = await asyncio.to_thread(end.until, "READY=1")
            assert states == ["STATUS=starting", f"READY=1\nSTATUS=serving on {cluster.addresses[name]}"], name
        assert set((await cluster.stop()).values()) == {0}
        for name, end in ends.items():
            assert await asyncio.to_thread(end.until, "STOPPING=1") == ["STOPPING=1\nSTATUS=draining"], name
    finally:
        cluster.kill_all()
        for end in ends.values():
            end.close()


async def waiting(service: str, tmp_path: Path, systemd: Systemd, *before: str) -> ServiceProcess:
    """Starts a service whose peers are not there, behind the command `before`; returns once it waits for them, and so
    would hear a stop."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    environ = {
        "NOTIFY_SOCKET": str(systemd.path),
        "STREAMHOUSE_LISTEN": address,
        "STREAMHOUSE_BOOTSTRAP": NOBODY,
        "STREAMHOUSE_PG_DSN": f"postgresql://streamhouse:secret@{NOBODY}/streamhouse",
        "STREAMHOUSE_STORE_DIR": str(tmp_path / "objects"),
        "STREAMHOUSE_WAL_DIR": str(tmp_path / "wal"),
        "STREAMHOUSE_CACHE_DIR": str(tmp_path / "cache"),
    }
    process = ServiceProcess(service, [service], environ, tmp_path)
    process.arguments = [*before, *process.arguments]
    process.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            request, stub = health_pb2.HealthCheckRequest(), health_pb2_grpc.HealthStub(channel)
            await stub.Check(request, wait_for_ready=True, timeout=PATIENCE_S)
        assert await asyncio.to_thread(systemd.until, "STATUS=starting") == ["STATUS=starting"]
    except BaseException:
        process.kill()
        raise
    return process


@pytest.mark.parametrize("service", SERVICES)
async def test_a_hangup_never_ends_a_service(service: str, tmp_path: Path, systemd: Systemd) -> None:
    process = await waiting(service, tmp_path, systemd)
    try:
        for count in (1, 2):
            process.send_signal(signal.SIGHUP)
            await eventually(lambda: process.log_tail().count("SIGHUP changes nothing here") >= count)  # noqa: B023
        assert process.is_running()
        assert await process.stop() == 0, process.log_tail()
        assert (await asyncio.to_thread(systemd.until, "STOPPING=1"))[-1] == "STOPPING=1\nSTATUS=draining"
    finally:
        await process.stop()


@pytest.mark.parametrize("service", ["coordinator", "segmenter"])
async def test_nohup_is_respected(service: str, tmp_path: Path, systemd: Systemd) -> None:
    process = await waiting(service, tmp_path, systemd, "nohup")
    try:
        process.send_signal(signal.SIGHUP)
        assert signal.SIGHUP in ignored_by(process.pid)
        assert process.is_running()
        assert await process.stop() == 0, process.log_tail()
        assert "SIGHUP" not in process.log_tail()
    finally:
        await process.stop()


def ignored_by(pid: int) -> set[int]:
    """The signals that a process ignores."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:")]
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


async def test_a_terminal_that_closes_leaves_serve_running(tmp_path: Path) -> None:
    """Its standard streams are dead then, which log lines must not make an end of it."""
    main, terminal = os.openpty()
    log_file = tmp_path / "service.log"
    server = EmbeddedProcess(tmp_path / "data", tmp_path, {"STREAMHOUSE_LOG_FILE": str(log_file)})
    child = subprocess.Popen(  # noqa: ASYNC220 - returns at once
        ["setsid", "--ctty", *server.arguments], env=server.environ, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    try:
        await server_is_up(server, child, main)
        os.close(main)  # the kernel sends SIGHUP to the session
        await eventually(lambda: "opened anew" in log_file.read_text())
        assert child.poll() is None
        child.terminate()
        assert await asyncio.to_thread(child.wait, PATIENCE_S) == 0
    finally:
        child.kill()
        child.wait()


async def server_is_up(server: EmbeddedProcess, child: "subprocess.Popen[bytes]", main: int) -> None:
    """Reads what is shown on the terminal until it says that it serves."""
    os.set_blocking(main, False)
    shown, deadline = b"", time.monotonic() + PATIENCE_S
    while b"Ctrl-C stops it" not in shown:
        assert child.poll() is None and time.monotonic() < deadline, shown.decode()
        try:
            shown += os.read(main, 65536)
        except BlockingIOError:
            await asyncio.sleep(0.05)
