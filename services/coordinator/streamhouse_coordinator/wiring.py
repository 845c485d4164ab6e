"""Puts the coordinator together; the only place that names concrete classes."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from shproto.errors import Internal, Overloaded, SessionExpired, StreamHouseError, Unavailable
from shproto.events import BufferSealed
from shproto.rpc import Connection
from shproto.services import IngestClient
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import ingest_pb2
from shruntime import service
from shruntime.clock import SystemClock
from shruntime.service import Apis, ServiceContext
from shruntime.tasks import Backoff, Tasks, retry
from shruntime.urls import masked
from shstore import ObjectStore

from streamhouse_coordinator.adapters import postgres_backup
from streamhouse_coordinator.adapters.listener import Listener
from streamhouse_coordinator.adapters.postgres import PostgresStore
from streamhouse_coordinator.adapters.postgres_connections import Connections, Limits, Listening
from streamhouse_coordinator.adapters.rabbitmq import Relay
from streamhouse_coordinator.adapters.wait_queues import LockQueues, WaitingCalls
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.core.projection import Put
from streamhouse_coordinator.core.tables import EVENTS, HISTORY_MARKS, EventRow
from streamhouse_coordinator.feed import Feed
from streamhouse_coordinator.ports import where
from streamhouse_coordinator.probe import Probe
from streamhouse_coordinator.recovery import backup, restore
from streamhouse_coordinator.recovery.backup_format import Manifest
from streamhouse_coordinator.service.common import Context, new_uuid
from streamhouse_coordinator.service.pruning import mark_of
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.sweeper import Pruner, Sweeper

log = logging.getLogger(__name__)

# Running calls take milliseconds; event streams never end by themselves and are cut after this time.
CALL_GRACE_MS = 500

# PostgreSQL fails over within seconds; a waiting coordinator asks at most this often.
START_RETRY_FIRST_MS, START_RETRY_MS_MAX = 100, 5_000
# PostgreSQL is away or slow; too many transactions change the same rows; a statement was refused unexpectedly.
_LATER = (Unavailable, Overloaded, Internal)


@dataclass(kw_only=True)
class CoordinatorService:
    """A running coordinator. `api` may be called before `start` has ended: calls are answered Unavailable until
    then."""

    settings: CoordinatorSettings
    api: CoordinatorApi
    context: Context
    feed: Feed
    _store: PostgresStore
    _listener: Listener
    _relay: Relay | None
    _tasks: Tasks
    _session_token: str = field(default="", init=False)

    async def start(self) -> None:
        """Connects, migrates and starts the background work. Tries until PostgreSQL answers and accepts the login.
        Raises SettingsError for a DSN that can never work, DatabaseRefused."""

        def is_final(error: StreamHouseError) -> bool:
            if not isinstance(error, Unavailable):
                return True
            log.warning("waiting for %s (STREAMHOUSE_PG_DSN): %s", masked(self.settings.pg_dsn), error.message)
            return False

        await retry(self._store.open, Backoff(START_RETRY_FIRST_MS, START_RETRY_MS_MAX), is_final)
        self._tasks.spawn("listener", self._listener.run())
        self._tasks.spawn("feed", self.feed.run())
        self._tasks.spawn("sweeper", Sweeper(self.context).run())
        self._tasks.spawn("pruner", Pruner(self.context).run())
        if self._relay is not None:
            self._tasks.spawn("relay", self._relay.run())

    async def open_session(self, address: str) -> None:
        """Registers this coordinator at `address` (host:port) until `stop`. Tries until PostgreSQL answers."""
        name = self.settings.coordinator_id or f"coordinator-{new_uuid()[:8]}"
        request = pb.OpenSessionRequest(agent_id=name, role="coordinator", address=address)
        backoff = Backoff(START_RETRY_FIRST_MS, START_RETRY_MS_MAX)
        await self._reopen(request)
        while not self._session_token:
            await asyncio.sleep(backoff.next_ms() / 1000)
            await self._reopen(request)
        self._tasks.spawn("heartbeat", self._heartbeat(request))

    async def _heartbeat(self, request: pb.OpenSessionRequest) -> None:
        while True:
            await asyncio.sleep(self.settings.heartbeat_interval_ms / 1000)
            try:
                await self.api.heartbeat(pb.HeartbeatRequest(session_token=self._session_token))
            except SessionExpired:
                await self._reopen(request)
            # The lease outlasts two failed heartbeats; beyond that the answer is SessionExpired, and another session is
            # opened.
            except StreamHouseError as error:
                log.warning("no heartbeat: %s", error.message)

    async def _reopen(self, request: pb.OpenSessionRequest) -> None:
        try:
            self._session_token = (await self.api.open_session(request)).session_token
        except _LATER as error:
            log.warning("no session: %s", error.message)

    async def failed(self) -> None:
        """Waits for ever; raises the error that ended a background task."""
        await self._tasks.raise_failure()

    async def stop(self) -> None:
        """Ends the background work, closes the session if PostgreSQL answers, and closes the connections."""
        # Tasks first: a heartbeat that finds the session closed would open another.
        await self._tasks.stop()
        if self._session_token:
            try:
                await self.api.close_session(pb.CloseSessionRequest(session_token=self._session_token))
            except StreamHouseError as error:
                log.warning("session stays until it expires: %s", error.message)
        await self._store.close()


def build(settings: CoordinatorSettings) -> CoordinatorService:
    """Returns a coordinator that is not started yet."""
    tasks = Tasks()
    limits = Limits(settings.pg_timeout_ms, settings.pg_transaction_idle_ms)
    waiters = WaitingCalls(settings.pg_waiting_max)
    connections = Connections(
        settings.pg_dsn,
        pool_max=settings.pg_pool_max,
        # However small the pool, a connection stays for leases, registrations and sweeps.
        client_slots=min(settings.pg_pool_clients_max, settings.pg_pool_max - 1),
        limits=limits,
        pooler=settings.pg_pooler,
        waiters=waiters,
    )
    turns = LockQueues(waiters, settings.pg_lock_waiting_max)
    store = PostgresStore(connections, turns, waiters, migration_timeout_ms=settings.pg_migration_timeout_ms)

    def listens() -> bool:
        return bool(settings.pg_listen_dsn) or not connections.through_pooler

    feed = Feed(
        store,
        poll_interval_ms=settings.events_poll_interval_ms,
        batch=settings.events_batch,
        cached=settings.events_cached,
        listens=listens,
    )
    relay = _relay(settings, feed, store)

    def buffer_sealed(sealed: BufferSealed, trace_context: str) -> None:
        if not listens():  # else PostgreSQL notifies this coordinator, like all others
            feed.sealed(sealed.buffer_id)
        if relay is not None:
            relay.sealed(sealed, trace_context)

    context = Context(store=store, settings=settings, buffer_sealed=buffer_sealed)
    api = CoordinatorApi(context, feed, Probe(context, tasks, _describe_agent))
    listening = Listening(
        settings.pg_listen_dsn or settings.pg_dsn, settings.pg_timeout_ms, past_pooler=bool(settings.pg_listen_dsn)
    )
    listener = Listener(
        listening.connect,
        events_changed=feed.wake,
        group_changed=context.waiters.changed,
        buffer_sealed=feed.sealed,
        works=listens,
    )
    return CoordinatorService(
        settings=settings,
        api=api,
        context=context,
        feed=feed,
        _store=store,
        _listener=listener,
        _relay=relay,
        _tasks=tasks,
    )


async def _describe_agent(address: str) -> ingest_pb2.DescribeAgentResponse:
    """Returns an agent's description of itself, over a connection made for this call: agents are asked only when an
    agent takes another's place."""
    connection = Connection([address])
    try:
        return await IngestClient(connection).describe_agent(ingest_pb2.DescribeAgentRequest())
    finally:
        await connection.close()


def _relay(settings: CoordinatorSettings, feed: Feed, store: PostgresStore) -> Relay | None:
    if not settings.amqp_url:
        return None
    batch, timeout_ms = settings.outbox_batch, settings.amqp_timeout_ms
    # The claim lasts for a read, a publish of timeout_ms and the move of the position, so that no other coordinator
    # begins meanwhile.
    drain = partial(store.drain_outbox, claim_ms=timeout_ms + 2 * settings.pg_timeout_ms)
    return Relay(settings.amqp_url, feed, drain, batch=batch, timeout_ms=timeout_ms)


# ---- without a coordinator


async def take_backup(pg_dsn: str, store: ObjectStore) -> Manifest:
    """Takes a backup of the metadata and returns its manifest; services may run meanwhile. Raises Unavailable,
    InvalidArgument, StoreError."""
    async with postgres_backup.snapshot(pg_dsn) as snapshot:
        return await backup.take(snapshot, store, SystemClock().wall_ms())


async def read_backups(store: ObjectStore) -> list[Manifest]:
    """Returns the manifests of all backups, oldest first. Raises BackupDamaged, StoreError."""
    listed = await backup.list_backups(store)
    return [await backup.read_manifest(store, name) for name in listed.backups]


async def prune_backups(store: ObjectStore, keep: int) -> list[str]:
    """Deletes all but the `keep` newest backups; returns the names of the deleted ones. Raises StoreError."""
    return await backup.prune(store, keep, SystemClock().wall_ms())


async def restore_backup(
    pg_dsn: str,
    store: ObjectStore,
    name: str,
    *,
    dry_run: bool,
    accept_holes: bool,
    progress: Callable[[str, int, int], None],
) -> tuple[restore.RestoreReport, EventRow]:
    """Restores a backup by its name, or the "latest", into an empty database; no service may run. Returns the report
    and the last event of the restored database. Raises the errors of restore.restore, and DatabaseRefused."""
    manifest = await backup.read_manifest(store, name)
    async with postgres_backup.restore_transaction(pg_dsn, commit=not dry_run) as tx:
        report = await restore.restore(
            tx, store, manifest, accept_holes=accept_holes, new_id=new_uuid, progress=progress
        )
        last = (await tx.select(EVENTS, where(position=report.position)))[0]
        await tx.apply([Put(HISTORY_MARKS, mark_of(last))])  # the store gets a mark of this event
    return report, last


@dataclass(frozen=True, slots=True)
class _Process:
    """The coordinator as its own process: found by others under the address of that process alone."""

    coordinator: CoordinatorService

    @property
    def apis(self) -> Apis:
        return [(pb.DESCRIPTOR.services_by_name["Coordinator"], self.coordinator.api)]

    async def start(self, address: str) -> None:
        await self.coordinator.start()
        await self.coordinator.open_session(address)

    async def failed(self) -> None:
        await self.coordinator.failed()

    async def stop(self) -> None:
        await self.coordinator.stop()


async def run(settings: CoordinatorSettings) -> None:
    """Runs the coordinator as a process of its own, until SIGINT or SIGTERM. Raises SettingsError when the DSN is of no
    use, DatabaseRefused, ListenError."""

    def over_database(context: ServiceContext) -> _Process:
        # The relay says once that RabbitMQ is away; the library would at every try, with a traceback.
        logging.getLogger("aiormq").setLevel(logging.CRITICAL)
        return _Process(build(settings))

    # Running calls take milliseconds, and need PostgreSQL to the last; event streams never end by themselves.
    await service.run(settings, over_database, call_grace_ms=CALL_GRACE_MS, calls_end_first=True)
