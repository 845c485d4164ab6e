"""Puts a segmenter together: the only place that names concrete classes."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shproto.rpc import Connection
from shproto.services import CoordinatorApi, CoordinatorClient, IngestApi, IngestClient
from shruntime.clock import Clock, SystemClock
from shruntime.logs import configure_logging
from shruntime.server import RpcServer
from shruntime.tasks import Tasks, wait_for_stop
from shruntime.telemetry import Telemetry
from shstore import ObjectStore, RetryingStore, RetryPolicy, StoreSettings, open_store

from streamhouse_segmenter.adapters.feed_waker import follow_buffers
from streamhouse_segmenter.adapters.loop_worker import LoopWorker
from streamhouse_segmenter.adapters.session import keep_session
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.service import Segmenter
from streamhouse_segmenter.settings import SegmenterSettings

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SegmenterService:
    """A segmenter and what drives it. `stop` finishes what is in hand."""

    api: Segmenter
    ports: Ports
    worker: LoopWorker
    tasks: Tasks
    follow_feed: bool = True

    async def start(self) -> None:
        await self.worker.start()
        if self.follow_feed:
            self.tasks.spawn("segmenter feed", follow_buffers(self.ports, self.wake))

    async def stop(self) -> None:
        await self.tasks.stop()
        await self.worker.stop()

    def wake(self) -> None:
        """There may be a buffer to claim: look now, not at the next scan."""
        self.worker.wake()


def build(
    settings: SegmenterSettings,
    coordinator: CoordinatorApi,
    store: ObjectStore,
    ingest_at: Callable[[str], IngestApi],
    clock: Clock | None = None,
) -> SegmenterService:
    """A segmenter over these peers, woken by the coordinator's feed; `ingest_at(address)` gives an agent's API."""
    ports = Ports(coordinator, _retrying(store, settings), ingest_at, clock or SystemClock())
    worker_id = settings.worker_id or f"{socket.gethostname()}-{os.getpid()}"
    segmenter = Segmenter(ports, settings, worker_id)
    return SegmenterService(segmenter, ports, LoopWorker(segmenter, settings, ports), Tasks())


def _retrying(store: ObjectStore, settings: SegmenterSettings) -> ObjectStore:
    if isinstance(store, RetryingStore):
        return store
    return RetryingStore(store, RetryPolicy(deadline_ms=max(1, settings.s3_attempts_deadline_ms)))


class _Agents:
    """One cached connection per agent address."""

    def __init__(self, settings: SegmenterSettings, telemetry: Telemetry) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._connections: dict[str, Connection] = {}

    def __call__(self, address: str) -> IngestApi:
        if address not in self._connections:
            self._connections[address] = Connection(
                [address], timeout_ms=self._settings.rpc_timeout_ms, interceptors=self._telemetry
            )
        return IngestClient(self._connections[address])

    async def close(self) -> None:
        for connection in self._connections.values():
            await connection.close()


def _open_store(settings: SegmenterSettings) -> ObjectStore:
    if settings.store_dir:
        return open_store(StoreSettings(kind="local", path=Path(settings.store_dir)))
    return open_store(
        StoreSettings(
            kind="s3",
            bucket=settings.s3_bucket,
            prefix=settings.s3_prefix,
            endpoint=settings.s3_endpoint or None,
            region=settings.s3_region,
            access_key=settings.s3_access_key or None,
            secret_key=settings.s3_secret_key or None,
            connect_timeout_ms=settings.s3_connect_timeout_ms,
            read_timeout_ms=settings.s3_read_timeout_ms,
            multipart_threshold_bytes=settings.s3_multipart_threshold_bytes,
            multipart_part_bytes=settings.s3_multipart_part_bytes,
        )
    )


async def run(settings: SegmenterSettings) -> None:
    """The segmenter as a process of its own, until SIGTERM or SIGINT. `python -m streamhouse_segmenter` calls it,
    because nameko wants the event loop prepared before anything else is imported.

    Raises StoreError (the store is not usable), ListenError.
    """
    configure_logging("segmenter", settings.log_level, settings.log_json)
    async with contextlib.AsyncExitStack() as stack:
        telemetry = Telemetry.configure("segmenter", settings)
        stack.callback(telemetry.shutdown)
        store = _open_store(settings)
        stack.push_async_callback(store.close)
        await store.check()
        addresses = [address.strip() for address in settings.bootstrap.split(",")]
        connection = Connection(addresses, timeout_ms=settings.rpc_timeout_ms, interceptors=telemetry)
        stack.push_async_callback(connection.close)
        agents = _Agents(settings, telemetry)
        stack.push_async_callback(agents.close)
        server = RpcServer(settings.listen, (), telemetry.server())
        await server.start()
        stack.push_async_callback(server.stop, 0)
        service = build(settings, CoordinatorClient(connection), store, agents)
        service.follow_feed = not settings.amqp_url
        await service.start()
        stack.push_async_callback(service.stop)
        _wake_by_events(settings, service, stack)
        address = settings.advertise or server.address
        service.tasks.spawn("segmenter session", keep_session(service.ports, service.api.worker_id, address))
        await server.set_serving(True)
        log.info("segmenter %s serves health checks on %s", service.api.worker_id, address)
        await wait_for_stop(service.tasks)
        await server.set_serving(False)


def _wake_by_events(settings: SegmenterSettings, service: SegmenterService, stack: contextlib.AsyncExitStack) -> None:
    """Hooks nameko up where there is a RabbitMQ; elsewhere the service follows the feed."""
    if settings.amqp_url:
        from streamhouse_segmenter.adapters.nameko_worker import NamekoWorker  # only this process has eventlet

        worker = NamekoWorker(settings, service.api)
        worker.start()
        stack.push_async_callback(worker.stop)
