"""Services of StreamHouse as real processes: started with the commands and variables that deploy/ uses."""

import asyncio
import atexit
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

READY_TIMEOUT_S = 60


_ours: list[socket.socket] = []


def bound_socket(address: tuple[str, int]) -> socket.socket:
    """A socket that does not listen. Others are not given its port by chance as long as it is open, and may bind to it
    by its number, as servers do (SO_REUSEADDR)."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setblocking(False)
    made.bind(address)
    return made


def free_ports(count: int) -> list[int]:
    """Ports that are ours until this process ends: nobody else takes them before a server starts, or while it is
    down."""
    made = [bound_socket(("127.0.0.1", 0)) for _ in range(count)]
    _ours.extend(made)
    return [item.getsockname()[1] for item in made]


@atexit.register
def _close_ports() -> None:
    for item in _ours:
        item.close()


async def is_serving(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class ServiceProcess:
    """One `streamhouse …` process in a process group of its own, its output in a file."""

    def __init__(self, name: str, arguments: Sequence[str], environ: Mapping[str, str], log_dir: Path) -> None:
        self.name = name
        self.arguments = [sys.executable, "-m", "streamhouse_cli", *arguments]
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith("STREAMHOUSE_")},
            **environ,
        }
        self.log_path = log_dir / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.arguments, env=self.environ, stdout=log, stderr=log, start_new_session=True
            )

    async def wait_serving(self, address: str) -> None:
        """Until its health check says SERVING; fails with its log when it ends or takes too long."""
        deadline = asyncio.get_running_loop().time() + READY_TIMEOUT_S
        while not await is_serving(address):
            if not self.is_running():
                raise AssertionError(f"{self.name} ended before it was ready:\n{self.log_tail()}")
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"{self.name} is not ready after {READY_TIMEOUT_S} s:\n{self.log_tail()}")
            await asyncio.sleep(0.05)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_tail(self, size_bytes: int = 6000) -> str:
        return self.log_path.read_bytes()[-size_bytes:].decode(errors="replace")

    def kill(self) -> None:
        """SIGKILL to this process alone, as a crash would have it."""
        assert self._process is not None, f"{self.name} was not started"
        self._process.kill()
        self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process is not None, f"{self.name} was not started"
        self._process.send_signal(number)

    async def stop(self, timeout_s: float = 60) -> int:
        """SIGTERM, then waits for the drain; returns the exit code. A process that hangs is killed and reported."""
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            return await asyncio.to_thread(self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not stop within {timeout_s} s:\n{self.log_tail()}") from None


class EmbeddedProcess(ServiceProcess):
    """`streamhouse serve` on a data directory."""

    def __init__(self, data_dir: Path, log_dir: Path, environ: Mapping[str, str] | None = None) -> None:
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        arguments = ["serve", "--data-dir", str(data_dir), "--listen", self.address]
        super().__init__("serve", arguments, {"STREAMHOUSE_SQL_PG_LISTEN": "127.0.0.1:0", **(environ or {})}, log_dir)

    async def start_serving(self) -> None:
        """A process that does not get that far is stopped: nobody else would, most callers begin their `try` behind."""
        self.start()
        try:
            await self.wait_serving(self.address)
        except BaseException:
            await self.stop()
            raise
