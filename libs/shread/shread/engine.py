"""The read engine of a process, put together: an index that follows the events, caches, and what reads share.

Owns: the index and its feed, the session under which others find the process, the caches. Does not own: the object
store, the protocol that offers reads.
Invariants: reads are served once `start` has returned. After `stop` nothing waits, and no task runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shcluster.agent_checks import AgentChecks
from shcluster.follower import Follower
from shcluster.index_catch_up import IndexCatchUp
from shcluster.live_index import LiveIndex
from shcluster.session import SessionKeeper
from shproto.services import CoordinatorApi, IngestApi
from shruntime.clock import Clock
from shruntime.settings import PREFIX, SettingsError
from shruntime.tasks import Tasks
from shruntime.urls import masked
from shstore import ObjectStore, RetryingStore

from shread.adapters.disk_cache import DiskCache
from shread.adapters.redis_cache import RedisCache
from shread.chunk_reader import ChunkReader
from shread.core.breaker import CircuitBreaker
from shread.core.readahead import ReadAhead
from shread.counters import Counters, export
from shread.reads import Reads
from shread.segment_reader import SegmentReader
from shread.settings import ReadSettings
from shread.tail_polls import TailPolls


@dataclass(kw_only=True)
class ReadEngine:
    """The parts of a running read engine. `tasks` reports a background task that died."""

    reads: Reads
    disk: DiskCache
    tasks: Tasks
    _redis: RedisCache | None
    _follower: Follower
    _session: SessionKeeper

    @property
    def session_token(self) -> str:
        """Token of the session at the moment; empty while there is none."""
        return self._session.token

    async def start(self, address: str) -> None:
        """Loads the index, then opens the session under which clients find `address`. Waits for a coordinator.

        Raises CacheDirError.
        """
        # Before the session: a directory that cannot be used ends the process while no client knows its address.
        await self.disk.open()
        await self._follower.load()
        self._session.start(address)
        await self._session.open()
        self.tasks.spawn("event feed", self._follower.run())
        self.tasks.spawn("head of the events", self._follower.watch_head())
        self.tasks.spawn("session", self._session.run())

    async def stop(self) -> None:
        """Ends long polls and subscriptions with ShuttingDown, gives the session back. Safe after a failed start."""
        # First: waiting calls end with ShuttingDown, and their clients go on elsewhere while the rest stops.
        self.reads.index.close()
        await self.tasks.stop()
        # After the tasks: a heartbeat would find the session closed and open another.
        await self._session.close()
        # Caches last: downloads, which are tasks, write to them, and end once their threads have.
        if self._redis is not None:
            await self._redis.close()
        self.disk.close()


def build_engine(
    settings: ReadSettings,
    coordinator: CoordinatorApi,
    store: ObjectStore,
    ingest_at: Callable[[str], IngestApi],
    clock: Clock,
    *,
    role: str,
    agent_id: str,
) -> ReadEngine:
    """Returns the engine over its peers; does no I/O. The caller closes `store`. `role`, `agent_id`: of the session.
    Raises SettingsError."""
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
    agents = AgentChecks(ingest_at)
    reads = Reads(
        index=index,
        segments=segments,
        ingest_at=ingest_at,
        agents=agents,
        index_catch_up=IndexCatchUp(coordinator, index, settings.catch_up_ms),
        readahead=ReadAhead(settings.readahead_chunks),
        polls=TailPolls(ingest_at, agents, tasks, clock, counters),
        catch_up_ms=settings.catch_up_ms,
        clock=clock,
        counters=counters,
        # The store repeats silently: without its trouble a caller would hear of a time-out, not of its cause.
        store_trouble=lambda: store.trouble if isinstance(store, RetryingStore) else "",
    )
    session = SessionKeeper(coordinator, clock, agents, role=role, agent_id=agent_id)
    follower = Follower(coordinator, index, lambda: session.token, clock, counters.snapshot_taken)
    return ReadEngine(reads=reads, disk=disk, tasks=tasks, _redis=redis, _follower=follower, _session=session)


def export_metrics(engine: ReadEngine, disk_free_bytes: Callable[[], int | None]) -> None:
    """Registers the counters and gauges of the engine with telemetry. `disk_free_bytes`: of the cache's disk."""
    disk, index = engine.disk, engine.reads.index
    export(
        engine.reads.counters,
        {
            "streamhouse_query_cache_bytes": lambda: disk.size_bytes,
            "streamhouse_query_cache_bytes_max": lambda: disk.bytes_max,
            "streamhouse_query_cache_disk_free_bytes": disk_free_bytes,
            "streamhouse_query_index_segments": lambda: index.cluster.segment_count,
            "streamhouse_query_feed_position": lambda: index.cluster.position,
        },
    )


def _redis(settings: ReadSettings, clock: Clock, counters: Counters) -> RedisCache | None:
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
