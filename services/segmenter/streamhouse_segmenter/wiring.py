"""Puts a segmenter together: the only place that names concrete classes."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from shcluster.peers import Peers
from shcluster.session import SessionKeeper
from shproto.services import CoordinatorApi, IngestApi
from shruntime.advertise import advertised_address
from shruntime.clock import Clock, SystemClock
from shruntime.descriptors import raise_descriptor_limit
from shruntime.logs import configure_logging
from shruntime.memory import give_back_freed_memory, log_memory_limits, spare_loaded_code
from shruntime.server import RpcServer, ServerLimits
from shruntime.supervisor import Supervisor
from shruntime.tasks import Tasks, wait_for_stop
from shruntime.telemetry import Telemetry
from shstore import ObjectStore, RetryingStore, RetryPolicy
from shstore.configured import configured_store

from streamhouse_segmenter.adapters.feed_waker import BUFFERS_AND_WORKERS, WORKERS, follow_events
from streamhouse_segmenter.adapters.loop_worker import LoopWorker
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.service import Segmenter
from streamhouse_segmenter.settings import SegmenterSettings

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SegmenterService:
    """A segmenter and its drivers. `stop` finishes claimed work."""

    api: Segmenter
    ports: Ports
    worker: LoopWorker
    session: SessionKeeper
    tasks: Tasks
    follow_feed: bool = True

    async def start(self, address: str = "") -> None:
        """Starts the drivers. `address`: where this process listens, for a session of its own; empty: it runs in the
        coordinator's process."""
        if address:
            self.session.start(address)
            types = BUFFERS_AND_WORKERS if self.follow_feed else WORKERS
            self.tasks.spawn(
                "segmenter session",
                self.session.run(self.wake, lambda token: follow_events(self.ports, types, self.wake, token)),
            )
        elif self.follow_feed:
            self.tasks.spawn("segmenter feed", follow_events(self.ports, BUFFERS_AND_WORKERS, self.wake))
        await self.worker.start()

    async def stop(self) -> None:
        self.api.close()
        await self.worker.stop()  # while there is a session: the claims of work under way end with it
        await self.tasks.stop()
        await self.session.close()

    def wake(self) -> None:
        """Looks for a buffer now, not at the next scan."""
        self.worker.wake()


def build(
    settings: SegmenterSettings,
    coordinator: CoordinatorApi,
    store: ObjectStore,
    ingest_at: Callable[[str], IngestApi],
    clock: Clock | None = None,
) -> SegmenterService:
    """Returns a segmenter over these peers, woken by the coordinator's feed; `ingest_at(address)` returns an agent's
    API."""
    ports = Ports(coordinator, _retrying(store, settings), ingest_at, clock or SystemClock())
    worker_id = settings.worker_id or f"{socket.gethostname()}-{os.getpid()}"
    session = SessionKeeper(ports.coordinator, ports.clock, ports.agents, role="segmenter", agent_id=worker_id)
    segmenter = Segmenter(ports, settings, worker_id, session.may_work)
    worker = LoopWorker(segmenter, settings, ports)
    return SegmenterService(segmenter, ports, worker, session, Tasks())


def _retrying(store: ObjectStore, settings: SegmenterSettings) -> ObjectStore:
    if isinstance(store, RetryingStore):
        return store
    return RetryingStore(store, RetryPolicy(deadline_ms=max(1, settings.s3_attempts_deadline_ms)))


async def run(settings: SegmenterSettings) -> None:
    """The segmenter as a process of its own, until SIGTERM or SIGINT. `python -m streamhouse_segmenter` calls it,
    because nameko wants the event loop prepared before anything else is imported.

    Raises StoreError (the store refuses), ListenError.
    """
    configure_logging("segmenter", settings)
    raise_descriptor_limit()
    give_back_freed_memory()
    spare_loaded_code()
    log_memory_limits(settings)
    async with contextlib.AsyncExitStack() as stack:
        supervisor = await stack.enter_async_context(Supervisor.of_environment())
        telemetry = Telemetry.configure("segmenter", settings)
        stack.callback(telemetry.shutdown)
        store = configured_store(settings)
        stack.push_async_callback(store.close)
        peers = Peers(settings.bootstrap, settings.rpc_timeout_ms, telemetry)
        stack.push_async_callback(peers.close)
        server = RpcServer(settings.listen, (), telemetry.server(), ServerLimits.of(settings), supervisor)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        service = build(settings, peers.coordinator, store, peers.ingest)
        service.follow_feed = not settings.amqp_url
        stack.push_async_callback(service.stop)
        service.tasks.spawn("segmenter start", _serve(service, server, store, settings, stack))
        await wait_for_stop(service.tasks, supervisor)
        await server.set_serving(False)


async def _serve(
    service: SegmenterService,
    server: RpcServer,
    store: RetryingStore,
    settings: SegmenterSettings,
    stack: contextlib.AsyncExitStack,
) -> None:
    """Starts the service in the background, so that a stop is heard while there is no store yet."""
    await store.wait_until_usable()
    address = await advertised_address(settings, server.address)
    await service.start(address)
    _wake_by_events(settings, service, stack)
    await server.set_serving(True)
    log.info("segmenter %s serves health checks on %s", service.api.worker_id, address)


def _wake_by_events(settings: SegmenterSettings, service: SegmenterService, stack: contextlib.AsyncExitStack) -> None:
    """Connects nameko if RabbitMQ is configured; otherwise the service follows the feed."""
    if settings.amqp_url:
        from streamhouse_segmenter.adapters.nameko_worker import NamekoWorker  # only this process has eventlet

        worker = NamekoWorker(settings, service.api)
        worker.start()
        stack.push_async_callback(worker.stop)
        stack.callback(service.api.close)  # runs before worker.stop: handlers claim nothing more
