"""Puts the query service together: the only place of it that names concrete classes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass

from shcluster.peers import Peers
from shproto.services import CoordinatorApi, IngestApi
from shproto.v1 import query_pb2
from shread.engine import ReadEngine, build_engine, export_metrics
from shread.group_lags import GroupLags
from shruntime import service
from shruntime.clock import Clock, SystemClock
from shruntime.disk_space import DiskSpace
from shruntime.service import Apis, ServiceContext
from shruntime.tasks import Tasks
from shstore import ObjectStore
from shstore.open import configured_store

from streamhouse_query.api import QueryApi
from streamhouse_query.settings import QuerySettings

# For calls that run when the service stops: a fetch of some MiB is through by then, long polls were ended before.
CALL_GRACE_MS = 1_000


@dataclass(kw_only=True)
class QueryService:
    """The parts of a running query service. `tasks` reports a background task that died."""

    api: QueryApi
    engine: ReadEngine
    _measuring: Mapping[str, Callable[[], Coroutine[None, None, None]]]

    @property
    def tasks(self) -> Tasks:
        """Background tasks of the service."""
        return self.engine.tasks

    async def start(self, address: str) -> None:
        """Loads the index, then opens the session under which clients find `address`. Waits for a coordinator.

        Raises CacheDirError.
        """
        await self.engine.start(address)
        for name, measure in self._measuring.items():
            self.tasks.spawn(name, measure())

    @property
    def apis(self) -> Apis:
        """RPC services of the process, with their names."""
        return [(query_pb2.DESCRIPTOR.services_by_name["Query"], self.api)]

    async def failed(self) -> None:
        """Waits for ever. Raises the error that ended a background task."""
        await self.tasks.raise_failure()

    async def stop(self) -> None:
        """Ends long polls and subscriptions with ShuttingDown, gives the session back. Safe after a failed start."""
        await self.engine.stop()


def build(
    settings: QuerySettings,
    coordinator: CoordinatorApi,
    store: ObjectStore,
    ingest_at: Callable[[str], IngestApi],
    clock: Clock | None = None,
) -> QueryService:
    """Returns the service over its peers; does no I/O. The caller closes `store`. Raises SettingsError."""
    clock = clock or SystemClock()
    engine = build_engine(settings, coordinator, store, ingest_at, clock, role="query", agent_id=settings.agent_id)
    reads = engine.reads
    space = DiskSpace(settings.cache_dir, clock)
    lags = GroupLags(
        coordinator,
        reads.index,
        reads.watermarks,
        clock,
        interval_ms=settings.group_lag_interval_ms,
        series_max=settings.metrics_group_topics_max,
    )
    lags.export()
    export_metrics(engine, lambda: space.free_bytes)
    api = QueryApi(reads, engine.disk, settings)
    # Only where metrics are exported: each look at the lag is a call to the coordinator for every group.
    measuring = {"group lag": lags.run, "free space of the cache's disk": space.run} if settings.is_measured else {}
    return QueryService(api=api, engine=engine, _measuring=measuring)


async def run(settings: QuerySettings) -> None:
    """Runs the query service as a process of its own, until SIGINT or SIGTERM.

    Raises SettingsError, StoreError (the object store refuses), CacheDirError, ListenError.
    """

    def over_network(context: ServiceContext) -> QueryService:
        store = configured_store(settings)
        context.close_at_end(store.close)
        # Before the index is loaded: a service that cannot read must not be found by clients.
        context.wait_for(store.wait_until_usable)
        peers = Peers(settings.bootstrap, settings.rpc_timeout_ms, context.telemetry)
        context.close_at_end(peers.close)
        return build(settings, peers.coordinator, store, peers.ingest)

    await service.run(settings, over_network, call_grace_ms=CALL_GRACE_MS)
