"""The four services in this process, over a PostgreSQL of their own and an object store in memory.

Small limits, so that a fuzzer meets them; short waits, so that it does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from shformat import Records, encode_batch
from shproto.errors import NotLeader, UnknownTopic
from shproto.v1 import coordinator_pb2, ingest_pb2, types_pb2
from shruntime.tasks import Tasks
from shstore import MemoryStore
from streamhouse_coordinator import wiring as coordinator_wiring
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_embedded.postgres import EmbeddedPostgres
from streamhouse_ingest import wiring as ingest_wiring
from streamhouse_ingest.settings import IngestSettings
from streamhouse_query import wiring as query_wiring
from streamhouse_query.settings import QuerySettings
from streamhouse_segmenter import wiring as segmenter_wiring
from streamhouse_segmenter.settings import SegmenterSettings

MIB = 1024 * 1024
# Nothing listens there; nobody may be reached.
ADDRESS = "127.0.0.1:1"
WAIT_MS_MAX = 20
TOPIC = "orders"
_START_TIMEOUT_S = 60


class Cluster:
    """`apis` by service name; `start` and `stop` once each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = contextlib.AsyncExitStack()
        self._watched: dict[str, Tasks] = {}
        self._coordinator_failed: asyncio.Task[None] | None = None
        self.apis: dict[str, Any] = {}

    async def start(self) -> None:
        """Everything runs, and TOPIC has records in a segment and in the tail."""
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self._start()
                await self.restore_topic()
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        postgres = EmbeddedPostgres(self._directory / "pg")
        dsn = await postgres.start()
        self._stack.push_async_callback(postgres.stop)
        dsn += ("&" if "?" in dsn else "?") + "synchronous_commit=off"
        store = MemoryStore()
        coordinator = coordinator_wiring.build(_coordinator_settings(dsn))
        ingest = ingest_wiring.build(_ingest_settings(self._directory), coordinator.api)
        query = query_wiring.build(_query_settings(self._directory), coordinator.api, store, lambda address: ingest.api)
        segmenter = segmenter_wiring.build(
            SegmenterSettings.load({}, worker_id="segmenter", scan_interval_ms=200),
            coordinator.api, store, lambda address: ingest.api,
        )  # fmt: skip
        await coordinator.start()
        self._stack.push_async_callback(coordinator.stop)
        self._coordinator_failed = asyncio.ensure_future(coordinator.failed())
        self._stack.push_async_callback(self._unwatch)
        await segmenter.start()
        self._stack.push_async_callback(segmenter.stop)
        await query.start(ADDRESS)
        self._stack.push_async_callback(query.stop)
        await ingest.start(ADDRESS)
        self._stack.push_async_callback(ingest.stop)
        self._watched = {"ingest": ingest.tasks, "query": query.tasks, "segmenter": segmenter.tasks}
        self.apis = {"Coordinator": coordinator.api, "Ingest": ingest.api, "Query": query.api}

    async def _unwatch(self) -> None:
        assert self._coordinator_failed is not None
        self._coordinator_failed.cancel()
        await asyncio.gather(self._coordinator_failed, return_exceptions=True)

    async def restore_topic(self) -> None:
        """TOPIC exists, with records durable and in the tail; creates it anew where it was deleted."""
        try:
            await self.apis["Coordinator"].describe_topic(coordinator_pb2.DescribeTopicRequest(topic=TOPIC))
        except UnknownTopic:
            request = coordinator_pb2.CreateTopicRequest(topic=TOPIC, partitions=2)
            await self.apis["Coordinator"].create_topic(request)
            await self._produce(types_pb2.ACKS_DURABLE)
            await self._produce(types_pb2.ACKS_WAL)

    async def _produce(self, acks: types_pb2.Acks.ValueType) -> None:
        batch = encode_batch(Records.from_lists([b"value %d" % n for n in range(20)], timestamps_ms=5))
        request = ingest_pb2.ProduceRequest(topic=TOPIC, batch=batch, acks=acks, timeout_ms=20_000)
        while True:
            try:
                await self.apis["Ingest"].produce(request)
                return
            except NotLeader:  # the agent hears of its lease in a moment
                await asyncio.sleep(0.01)

    def died(self) -> BaseException | None:
        """What ended a background task of one of the services, if anything did."""
        if self._coordinator_failed is not None and self._coordinator_failed.done():
            return self._coordinator_failed.exception()
        return next((tasks.error for tasks in self._watched.values() if tasks.error is not None), None)


def _coordinator_settings(dsn: str) -> CoordinatorSettings:
    return CoordinatorSettings.load({}, pg_dsn=dsn, partitions_per_topic_max=16, topics_max=20, events_batch=50)


def _ingest_settings(directory: Path) -> IngestSettings:
    return IngestSettings.load(
        {}, wal_dir=str(directory / "wal"), agent_id="agent", wal_fsync="never", wal_file_bytes=MIB,
        wal_bytes_max=64 * MIB, batch_bytes_max=MIB, queue_bytes_max=4 * MIB, memory_bytes_max=8 * MIB,
        seal_age_ms=100, produce_timeout_ms=5 * WAIT_MS_MAX, read_tail_wait_ms_max=WAIT_MS_MAX,
        records_per_plain_request_max=100, producers_per_partition_max=10, retry_first_ms=5, retry_max_ms=50,
    )  # fmt: skip


def _query_settings(directory: Path) -> QuerySettings:
    return QuerySettings.load(
        {}, cache_dir=directory / "cache", cache_chunk_bytes=64 * 1024, cache_bytes_max=4 * MIB,
        max_wait_ms_max=WAIT_MS_MAX, catch_up_ms=50, subscribe_heartbeat_ms=10, subscribe_positions_max=20,
    )  # fmt: skip
