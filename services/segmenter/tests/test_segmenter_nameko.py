"""The segmenter as a process of its own, a nameko worker on a real RabbitMQ: woken by events in nameko's
convention; goes on without the broker; hears events again when it is back."""

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import aio_pika
import pytest
from shproto.v1 import coordinator_pb2, ingest_pb2
from shruntime.clock import SystemClock
from shruntime.server import RpcServer
from shstore import LocalStore, StoreOptions
from streamhouse_coordinator.core.tables import SESSIONS

from services.segmenter.tests.segmenter_world import World, assert_all_stored

for _noisy in ("aiormq", "aio_pika"):
    logging.getLogger(_noisy).setLevel(logging.CRITICAL)  # they log every refused connection while a broker starts

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

QUEUE = "evt-coordinator-BufferSealed--segmenter.buffer_sealed"
DEAD_LETTERS = "streamhouse.dead-letters"
# The first and as many again as the queue allows.
DELIVERIES_MAX = 6
NEVER_MS = 3_600_000
# A machine with two busy cores starts RabbitMQ and Python slowly.
PATIENCE_S = 60.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Broker:
    """A RabbitMQ node with its own directory, ports and port mapper."""

    def __init__(self, work_dir: Path, program: str, epmd: str) -> None:
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/"
        self._program, self._epmd_program, self._dir = program, epmd, work_dir
        shared = {"ERL_EPMD_PORT": str(free_port()), "ERL_EPMD_ADDRESS": "127.0.0.1"}
        self._environ = os.environ | shared | {
            "HOME": str(work_dir),
            "RABBITMQ_NODENAME": f"segmenter-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(work_dir / "mnesia"),
            "RABBITMQ_LOG_BASE": str(work_dir / "log"),
            "RABBITMQ_CONFIG_FILE": str(work_dir / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(work_dir / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(work_dir / "enabled_plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none",
        }  # fmt: skip
        (work_dir / "rabbitmq.conf").write_text("disk_free_limit.absolute = 50MB\n")
        (work_dir / "enabled_plugins").write_text("[].\n")
        (work_dir / "rabbitmq-env.conf").touch()
        self._epmd = self._spawn(self._epmd_program)
        self._node: subprocess.Popen[bytes] | None = None

    def _spawn(self, program: str) -> subprocess.Popen[bytes]:
        with (self._dir / "output.log").open("ab") as log:
            return subprocess.Popen(
                [program], env=self._environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    async def start(self) -> None:
        self._node = self._spawn(self._program)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                assert self._node.poll() is None, (self._dir / "output.log").read_text()[-2000:]
                if await asyncio.to_thread(self._greets):
                    return
                await asyncio.sleep(0.1)

    def _greets(self) -> bool:
        """Whether it answers the protocol header with Connection.Start."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"AMQP\0\0\x09\x01")
                return connection.recv(1) == b"\x01"
        except OSError:
            return False

    async def stop(self) -> None:
        """In order: a killed single node of RabbitMQ 3.10 may come back with a quorum queue without a leader."""
        if self._node is not None:
            self._node.terminate()
            await asyncio.to_thread(self._node.wait)
            self._node = None

    def close(self) -> None:
        for process in (self._node, self._epmd):
            if process is not None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    # Distributions put a script on PATH that only runs as the user rabbitmq.
    packaged = "/usr/lib/rabbitmq/bin/rabbitmq-server"
    program = packaged if Path(packaged).exists() else shutil.which("rabbitmq-server")
    epmd = shutil.which("epmd")
    if program is None or epmd is None:
        pytest.skip("no rabbitmq-server with epmd on this machine")
    work_dir = tmp_path / "rabbitmq"
    work_dir.mkdir()
    broker = Broker(work_dir, program, epmd)
    yield broker
    broker.close()


class Platform:
    """A coordinator and an agent on gRPC, a local store, and segmenter processes."""

    def __init__(self, work_dir: Path) -> None:
        self.world = World(clock=SystemClock())
        self.objects = work_dir / "objects"
        self.store = LocalStore(StoreOptions(kind="local", path=self.objects))
        self.server = RpcServer(
            "127.0.0.1:0",
            (
                (coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"], self.world.coordinator),
                (ingest_pb2.DESCRIPTOR.services_by_name["Ingest"], self.world.agent),
            ),
        )
        self.workers: list[subprocess.Popen[bytes]] = []
        self._dir = work_dir

    def start_worker(self, name: str, settings: Mapping[str, object]) -> subprocess.Popen[bytes]:
        values = {
            "BOOTSTRAP": self.server.address,
            "STORE_DIR": self.objects,
            "WORKER_ID": name,
            "LOG_LEVEL": "INFO",
            **settings,
        }
        environ = {key: value for key, value in os.environ.items() if not key.startswith("STREAMHOUSE_")}
        environ |= {f"STREAMHOUSE_{key}": str(value) for key, value in values.items()}
        with (self._dir / f"{name}.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "streamhouse_segmenter"], env=environ, stdout=log, stderr=log
            )
        self.workers.append(worker)
        return worker

    def log(self, name: str) -> str:
        return (self._dir / f"{name}.log").read_text()

    async def start(self) -> None:
        await self.server.start()
        await self.world.start()
        self.world.held.address = self.server.address
        await self.world.open()

    async def stop(self) -> None:
        await self.server.stop(0)
        await self.world.stop()

    @property
    def sessions(self) -> set[str]:
        """Of segmenters."""
        return {f"{row.role}/{row.agent_id}" for row in self.world.rows(SESSIONS) if row.role == "segmenter"}

    async def seal(self, buffer_id: str, partition: int = 0) -> None:
        await self.world.seal(buffer_id, self.world.append(partition, [10, 20]))

    async def drained(self, what: str) -> None:
        await self.until(what, lambda: not self.world.waiting)
        await assert_all_stored(self.world, self.store, self.world.held)

    async def until(self, what: str, holds: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not holds():
                    for worker in self.workers:
                        assert worker.poll() is None, f"{what}: a worker ended with {worker.returncode}\n{self.logs()}"
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"not within {PATIENCE_S} s: {what}\n{self.logs()}") from None

    def logs(self) -> str:
        return "\n".join(path.read_text()[-6000:] for path in self._dir.glob("*.log"))


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    platform = Platform(tmp_path)
    await platform.start()
    yield platform
    for worker in platform.workers:
        worker.kill()
        worker.wait()
    await platform.stop()


async def publish(url: str, body: bytes) -> None:
    """As the coordinator's relay does: topic exchange, routing key = event type, JSON."""
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel(on_return_raises=True)
        exchange = await channel.declare_exchange("coordinator.events", aio_pika.ExchangeType.TOPIC, durable=True)
        message = aio_pika.Message(
            body,
            content_type="application/json",
            content_encoding="utf-8",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        await exchange.publish(message, routing_key="BufferSealed", mandatory=True)


def event(buffer_id: str) -> bytes:
    payload = {"buffer_id": buffer_id}
    return json.dumps({"position": 1, "type": "BufferSealed", "payload": payload, "trace_context": ""}).encode()


async def queue_size(url: str, name: str) -> int | None:
    """Messages ready in a queue; None while it does not exist."""
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        try:
            queue = await channel.declare_queue(name, passive=True)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return None
        return queue.declaration_result.message_count


async def consumers(url: str) -> int:
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        try:
            queue = await channel.declare_queue(QUEUE, passive=True)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return 0
        return queue.declaration_result.consumer_count or 0


async def wait_for_consumers(url: str, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await consumers(url) < count:
            await asyncio.sleep(0.1)


async def test_events_wake_it_and_poison_is_set_aside(platform: Platform, broker: Broker) -> None:
    await broker.start()
    settings = {"AMQP_URL": broker.url, "SCAN_INTERVAL_MS": NEVER_MS}
    worker = platform.start_worker("w1", settings)
    await wait_for_consumers(broker.url, 1)
    for number in range(3):
        await platform.seal(f"b{number}", partition=number)
        await publish(broker.url, event(f"b{number}"))
        await platform.drained(f"buffer b{number} is registered after its event")

    await publish(broker.url, b'{"type": "SomethingElse"}')
    await publish(broker.url, b"this is no JSON")
    async with asyncio.timeout(PATIENCE_S):
        while await queue_size(broker.url, DEAD_LETTERS) != 2:
            await asyncio.sleep(0.1)
    assert await queue_size(broker.url, QUEUE) == 0

    await platform.seal("last")
    await publish(broker.url, event("last"))
    await platform.drained("an event after the poison is handled")
    await platform.until("its session is open", lambda: platform.sessions == {"segmenter/w1"})
    worker.terminate()
    assert await asyncio.to_thread(worker.wait, PATIENCE_S) == 0, platform.logs()
    assert platform.sessions == set()
    log = platform.log("w1")
    assert log.count("Traceback") == log.count("ValueError: not a BufferSealed") == DELIVERIES_MAX, log


async def test_it_goes_on_without_the_broker_and_hears_events_when_it_is_back(
    platform: Platform, broker: Broker
) -> None:
    """RabbitMQ only makes things faster: losing it loses nothing and stops nothing."""
    scanning = {"AMQP_URL": broker.url, "SCAN_INTERVAL_MS": 500, "AMQP_HEARTBEAT_S": 5}
    first = platform.start_worker("w1", scanning)
    await platform.seal("before")
    await platform.drained("the scan works before the broker was ever there")

    await broker.start()
    await wait_for_consumers(broker.url, 1)
    await platform.seal("with")
    await publish(broker.url, event("with"))
    await platform.drained("works with the broker")

    await broker.stop()
    for number in range(3):
        await platform.seal(f"without-{number}")
        await platform.drained("the scan goes on without the broker")
    first.terminate()
    assert await asyncio.to_thread(first.wait, PATIENCE_S) == 0, "stops cleanly while the broker is away"
    platform.workers.clear()

    await broker.start()
    platform.start_worker("w2", scanning | {"SCAN_INTERVAL_MS": NEVER_MS})
    await wait_for_consumers(broker.url, 1)
    await broker.stop()
    await broker.start()
    await wait_for_consumers(broker.url, 1)
    await platform.seal("after")
    await publish(broker.url, event("after"))
    await platform.drained("the same process hears events after the broker came back")


async def test_workers_compete_and_a_killed_one_is_replaced(platform: Platform, broker: Broker) -> None:
    await broker.start()
    settings = {"AMQP_URL": broker.url, "SCAN_INTERVAL_MS": 500, "CLAIM_TTL_MS": 1_000, "RPC_TIMEOUT_MS": 600}
    victim = platform.start_worker("w1", settings)
    platform.start_worker("w2", settings)
    await wait_for_consumers(broker.url, 2)
    for number in range(40):
        await platform.seal(f"b{number}", partition=number % 5)
        await publish(broker.url, event(f"b{number}"))
    victim.kill()
    victim.wait()
    platform.workers.remove(victim)
    await platform.world.expire_claims()
    await platform.drained("everything is registered once, whoever died")


async def test_prometheus_metrics_are_served_beside_nameko(platform: Platform, broker: Broker) -> None:
    await broker.start()
    metrics = f"127.0.0.1:{free_port()}"
    platform.start_worker("w1", {"AMQP_URL": broker.url, "PROMETHEUS_LISTEN": metrics})
    await platform.seal("b1")
    await platform.drained("works with telemetry on")

    def read() -> str:
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=5) as response:
            return str(response.read().decode())

    text = await asyncio.to_thread(read)
    assert 'streamhouse_segmenter_buffers_total{otel_scope_name="streamhouse.segmenter"' in text
    assert "streamhouse_segmenter_records_total" in text


STOPPED_SOON = """
import os, sys
os.environ["EVENTLET_HUB"] = "asyncio"
import warnings
warnings.filterwarnings("ignore", message=r"\\s*Eventlet is deprecated")
import eventlet
eventlet.monkey_patch(thread=False)
import asyncio
from eventlet.asyncio import spawn_for_awaitable
from streamhouse_segmenter.adapters.nameko_worker import NamekoWorker
from streamhouse_segmenter.settings import SegmenterSettings

async def main():
    for turns in range(16):
        worker = NamekoWorker(SegmenterSettings(amqp_url=sys.argv[1]), None)
        worker.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        await worker.stop()
    print("stopped")

spawn_for_awaitable(main()).wait()
"""
"""A worker that is told to stop so many turns of the loop after its start."""


def test_a_stop_right_after_the_start_prints_no_traces() -> None:
    """nameko's consumer cannot be stopped while it is being started, or looks for its broker."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_SOON, f"amqp://guest:guest@127.0.0.1:{free_port()}/"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert done.stdout == "stopped\n"
    assert "Traceback" not in done.stderr and "kill" not in done.stderr, done.stderr


async def test_unusable_settings_end_it_with_a_message(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for settings, message in (
        ({"STORE_DIR": tmp_path / "file" / "store"}, f"{tmp_path}/file/store"),
        ({"BUILDS_IN_FLIGHT_MAX": 0}, "builds_in_flight_max (STREAMHOUSE_BUILDS_IN_FLIGHT_MAX) = '0'"),
        ({"SEGMENT_TARGET": 1}, "unknown setting STREAMHOUSE_SEGMENT_TARGET"),
    ):
        worker = platform.start_worker("bad", settings)
        platform.workers.clear()
        assert await asyncio.to_thread(worker.wait, PATIENCE_S) == 1
        assert message in platform.log("bad")
        assert "Traceback" not in platform.log("bad")
