"""Puts the query service together: the only place of it that names concrete classes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass

from shcluster.agent_checks import AgentChecks
from shcluster.follower import Follower
from shcluster.index_catch_up import IndexCatchUp
from shcluster.live_index import LiveIndex
from shcluster.peers import Peers
from shcluster.session import SessionKeeper
from shproto.services import CoordinatorApi, IngestApi
from shproto.v1 import query_pb2
from shread.adapters.disk_cache import DiskCache
from shread.adapters.redis_cache import RedisCache
from shread.chunk_reader import ChunkReader
from shread.core.breaker import CircuitBreaker
from shread.core.readahead import ReadAhead
from shread.counters import Counters, export
from shread.group_lags import GroupLags
from shread.reads import Reads
from shread.segment_reader import SegmentReader
from shread.tail_polls import TailPolls
from shruntime import service
from shruntime.clock import Clock, SystemClock
from shruntime.disk_space import DiskSpace
from shruntime.service import Apis, ServiceContext
from shruntime.settings import PREFIX, SettingsError
from shruntime.tasks import Tasks
from shruntime.urls import masked
from shstore import ObjectStore, RetryingStore
from shstore.open import configured_store

from streamhouse_query.api import QueryApi
from streamhouse_query.settings import QuerySettings

# For calls that run when the service stops: a fetch of some MiB is through by then, long polls were ended before.
CALL_GRACE_MS = 1_000


@dataclass(kw_only=True)
class QueryService:
    """The parts of a running query service. `tasks` reports a background task that died."""

    api: QueryApi
    tasks: Tasks
    _index: LiveIndex
    _disk: DiskCache
    _redis: RedisCache | None
    _follower: Follower
    _session: SessionKeeper
    _measuring: Mapping[str, Callable[[], Coroutine[None, None, None]]]

    async def start(self, address: str) -> None:
        """Loads the index, then opens the session under which clients find `address`. Waits for a coordinator.

        Raises CacheDirError.
        """
        # Before the session: a directory that cannot be used ends the process while no client knows its address.
        await self._disk.open()
        await self._follower.load()
        self._session.start(address)
        await self._session.open()
        self.tasks.spawn("query feed", self._follower.run())
        self.tasks.spawn("query head", self._follower.watch_head())
        self.tasks.spawn("query session", self._session.run())
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
        # First: waiting calls end with ShuttingDown, and their clients go on elsewhere while the rest stops.
        self._index.close()
        await self.tasks.stop()
        # After the tasks: a heartbeat would find the session closed and open another.
        await self._session.close()
        # Caches last: downloads, which are tasks, write to them, and end once their threads have.
        if self._redis is not None:
            await self._redis.close()
        self._disk.close()


def build(
    settings: QuerySettings,
    coordinator: CoordinatorApi,
    store: ObjectStore,
    ingest_at: Callable[[str], IngestApi],
    clock: Clock | None = None,
) -> QueryService:
    """Returns the service over its peers; does no I/O. The caller closes `store`. Raises SettingsError."""
    clock = clock or SystemClock()
    counters, tasks, index = Counters(), Tasks(), LiveIndex()
    disk = DiskCache(settings.cache_dir, settings.cache_bytes_max, settings.cache_chunk_bytes, counters)
    redis = _redis(settings, clock, counters)
    chunks = ChunkReader(
        store,
        disk,
        redis,
        downloads_in_flight_max=settings.downloads_in_flight_max,
        tasks=tasks,
        counters=counters,
    )
    segments = SegmentReader(
        chunks, lambda key: index.cluster.object_extent(key), settings.segment_index_cache_entries, counters
    )
    index_catch_up = IndexCatchUp(coordinator, index, settings.catch_up_ms)
    agents = AgentChecks(ingest_at)
    reads = Reads(
        index=index,
        segments=segments,
        ingest_at=ingest_at,
        agents=agents,
        index_catch_up=index_catch_up,
        readahead=ReadAhead(settings.readahead_chunks),
        polls=TailPolls(ingest_at, agents, tasks, clock, counters),
        catch_up_ms=settings.catch_up_ms,
        clock=clock,
        counters=counters,
        # The store repeats silently: without its trouble a caller would hear of a time-out, not of its cause.
        store_trouble=lambda: store.trouble if isinstance(store, RetryingStore) else "",
    )
    session = SessionKeeper(coordinator, clock, agents, role="query", agent_id=settings.agent_id)
    space = DiskSpace(settings.cache_dir, clock)
    lags = GroupLags(
        coordinator,
        index,
        reads.watermarks,
        clock,
        interval_ms=settings.group_lag_interval_ms,
        series_max=settings.metrics_group_topics_max,
    )
    lags.export()
    follower = Follower(coordinator, index, lambda: session.token, clock, counters.snapshot_taken)
    export(
        counters,
        {
            "streamhouse_query_cache_bytes": lambda: disk.size_bytes,
            "streamhouse_query_cache_bytes_max": lambda: disk.bytes_max,
            "streamhouse_query_cache_disk_free_bytes": lambda: space.free_bytes,
            "streamhouse_query_index_segments": lambda: index.cluster.segment_count,
            "streamhouse_query_feed_position": lambda: index.cluster.position,
        },
    )
    api = QueryApi(reads, disk, settings)
    # Only where metrics are exported: each look at the lag is a call to the coordinator for every group.
    measuring = {"group lag": lags.run, "free space of the cache's disk": space.run} if settings.is_measured else {}
    return QueryService(
        api=api,
        tasks=tasks,
        _index=index,
        _disk=disk,
        _redis=redis,
        _follower=follower,
        _session=session,
        _measuring=measuring,
    )


def _redis(settings: QuerySettings, clock: Clock, counters: Counters) -> RedisCache | None:
    if not settings.redis_url:
        return None
    try:
        return RedisCache(
            settings.redis_url,
            chunk_bytes=settings.cache_chunk_bytes,
            timeout_ms=settings.redis_timeout_ms,
            ttl_s=settings.redis_ttl_s,
            breaker=CircuitBreaker(settings.redis_failures_max, settings.redis_pause_ms),
            clock=clock,
            counters=counters,
        )
    except ValueError as error:
        raise SettingsError(f"redis_url ({PREFIX}REDIS_URL) = {masked(settings.redis_url)!r}: {error}") from error


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
