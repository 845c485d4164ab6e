"""Puts a segmenter together: the only place that names concrete classes."""

import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from shcluster.peers import Peers
from shcluster.session import SessionKeeper
from shproto.services import CoordinatorApi, IngestApi
from shruntime import service
from shruntime.clock import Clock, SystemClock
from shruntime.service import Apis, ServiceContext
from shruntime.tasks import Tasks
from shstore import ObjectStore, RetryingStore, RetryPolicy
from shstore.open import configured_store

from streamhouse_segmenter.adapters.feed_waker import BUFFERS_AND_WORKERS, WORKERS, follow_events
from streamhouse_segmenter.adapters.loop_worker import LoopWorker
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.service import Segmenter
from streamhouse_segmenter.settings import SegmenterSettings


@dataclass(slots=True, kw_only=True)
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
            # Before the tasks: from now on may_work() is False until a session is open, so nothing is claimed without
            # it.
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
        """Claims nothing more, finishes claimed work within shutdown_timeout_ms, then stops the drivers and closes the
        session."""
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
    ports = Ports(
        coordinator=coordinator,
        store=_retrying(store, settings),
        ingest_at=ingest_at,
        clock=clock or SystemClock(),
    )
    worker_id = settings.worker_id or f"{socket.gethostname()}-{os.getpid()}"
    session = SessionKeeper(ports.coordinator, ports.clock, ports.agents, role="segmenter", agent_id=worker_id)
    segmenter = Segmenter(ports, settings, worker_id, session.may_work)
    worker = LoopWorker(segmenter, settings, ports)
    return SegmenterService(api=segmenter, ports=ports, worker=worker, session=session, tasks=Tasks())


def _retrying(store: ObjectStore, settings: SegmenterSettings) -> ObjectStore:
    if isinstance(store, RetryingStore):
        return store
    return RetryingStore(store, RetryPolicy(deadline_ms=max(1, settings.s3_attempts_deadline_ms)))


@dataclass(slots=True, kw_only=True)
class _Process:
    """The segmenter as its own process: with a session, and woken by RabbitMQ if there is one."""

    segmenter: SegmenterService
    settings: SegmenterSettings
    stop_waker: Callable[[], Awaitable[None]] | None = None
    apis: Apis = ()

    async def start(self, address: str) -> None:
        await self.segmenter.start(address)
        if self.settings.amqp_url:
            from streamhouse_segmenter.adapters.nameko_worker import NamekoWorker  # only this process has eventlet

            worker = NamekoWorker(self.settings, self.segmenter.api)
            worker.start()
            self.stop_waker = worker.stop

    async def failed(self) -> None:
        await self.segmenter.tasks.raise_failure()

    async def stop(self) -> None:
        if self.stop_waker is not None:
            self.segmenter.api.close()  # first: handlers that still run claim nothing more
            await self.stop_waker()
        await self.segmenter.stop()


async def run(settings: SegmenterSettings) -> None:
    """Runs the segmenter as a process of its own, until SIGTERM or SIGINT. `python -m streamhouse_segmenter` calls it,
    because nameko wants the event loop prepared before anything else is imported.

    Raises StoreError (the store refuses), ListenError.
    """

    def over_network(context: ServiceContext) -> _Process:
        store = configured_store(settings)
        context.close_at_end(store.close)
        context.wait_for(store.wait_until_usable)
        peers = Peers(settings.bootstrap, settings.rpc_timeout_ms, context.telemetry)
        context.close_at_end(peers.close)
        segmenter = build(settings, peers.coordinator, store, peers.ingest)
        # RabbitMQ gives each notice to a single worker; the feed wakes all of them for the same buffer.
        segmenter.follow_feed = not settings.amqp_url
        return _Process(segmenter=segmenter, settings=settings)

    # Without a grace: the only calls are health checks.
    await service.run(settings, over_network, call_grace_ms=0)
