"""The agent's life: lock and replay the log, open the session, serve, drain, stop."""

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shproto.errors import ShuttingDown, Unavailable
from shproto.services import CoordinatorApi
from shproto.v1 import ingest_pb2 as pb
from shruntime.clock import Clock
from shruntime.settings import MIB
from shruntime.tasks import Backoff, Tasks

from streamhouse_ingest.adapters.wal import Wal, WalReader
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.adapters.wal_replay import Replayed, replay_directory
from streamhouse_ingest.core.lease import Lease
from streamhouse_ingest.core.partition_log import PartitionLog
from streamhouse_ingest.core.sealing import SealLimits
from streamhouse_ingest.core.wal_index import WalIndex
from streamhouse_ingest.logs import HeldLog, Logs
from streamhouse_ingest.metrics import IngestMetrics
from streamhouse_ingest.moves import Moves
from streamhouse_ingest.ranges import Ranges
from streamhouse_ingest.sealer import Sealer, SessionHolder
from streamhouse_ingest.service import ProduceService
from streamhouse_ingest.session import Identity, Session
from streamhouse_ingest.settings import IngestSettings
from streamhouse_ingest.tail import TailReader
from streamhouse_ingest.topics import TopicLookup
from streamhouse_ingest.trimmer import Trimmer
from streamhouse_ingest.waiting import ends_within
from streamhouse_ingest.writer import Writer, WriterLimits

log = logging.getLogger(__name__)

# One segmenter builds an object in memory: the largest sealed buffer there may be.
_OBJECT_BYTES_MAX = 256 * MIB


@dataclass(frozen=True, slots=True)
class Running:
    """Everything that exists once the log is open."""

    directory: WalDirectory
    wal: Wal
    index: WalIndex
    logs: Logs
    writer: Writer
    sealer: Sealer
    session: Session
    ranges: Ranges
    moves: Moves
    trimmer: Trimmer
    holder: SessionHolder
    produce: ProduceService
    tail: TailReader


class Agent:
    """`start` once, `stop` once. `tasks.failed` is set when the agent cannot go on (a broken log, say)."""

    def __init__(self, settings: IngestSettings, coordinator: CoordinatorApi, clock: Clock) -> None:
        self._settings = settings
        self._coordinator = coordinator
        self._clock = clock
        self._metrics = IngestMetrics()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wal")
        self._running: Running | None = None
        self._stopping = False
        self.tasks = Tasks()

    def running(self) -> Running:
        """Raises Unavailable before `start` is done, ShuttingDown after `stop`."""
        if self._running is None:
            if self._stopping:
                raise ShuttingDown("the agent has stopped")
            raise Unavailable("the agent is starting: its log is being replayed", retry_after_ms=200)
        return self._running

    # ---- start

    async def start(self, advertised_address: str) -> None:
        """Raises WalDirectoryError (locked, another agent's), AgentIdTaken, OSError. Waits for the coordinator."""
        loop = asyncio.get_running_loop()
        directory = None
        try:
            directory = await loop.run_in_executor(self._thread, self._open_directory)
            replayed = await loop.run_in_executor(self._thread, replay_directory, directory, self._settings.seal_bytes)
            running = self._build(directory, replayed, advertised_address)
            self._restore(running.logs, replayed)
            self._observe(running)
            self._spawn_before_session(running)
            await running.session.open()
        except BaseException:
            await self.tasks.stop()
            if directory is not None:
                directory.close()
            self._thread.shutdown(wait=False)
            raise
        self.tasks.spawn("session", running.session.run())
        self._running = running

    def _open_directory(self) -> WalDirectory:
        return WalDirectory.open(Path(self._settings.wal_dir), self._settings.agent_id)

    def _restore(self, logs: Logs, replayed: Replayed) -> None:
        self._metrics.damaged.add(len(replayed.replay.damage))
        for partition_key, states in replayed.replay.producers.items():
            logs.producers(partition_key).merge(states)
        for key, found in sorted(replayed.replay.logs.items()):
            first_offset = found.first_offset
            restored = PartitionLog(key, "", first_offset, first_offset, logs.producers(key.partition_key))
            restored.restore(found.buffers, found.end_offset)
            logs.hold(restored)
            log.info("replayed %s: offsets %d to %d", restored.describe(), first_offset, restored.next_offset)

    def _build(self, directory: WalDirectory, replayed: Replayed, address: str) -> Running:
        s = self._settings
        logs = Logs(
            memory_bytes_max=s.memory_bytes_max,
            tail_cache_bytes=s.tail_cache_bytes,
            producers_max=s.producers_per_partition_max,
        )
        wal = Wal(directory, replayed.next_sequence, file_bytes=s.wal_file_bytes, fsync_each=s.wal_fsync == "always")
        holder, lease = SessionHolder(), Lease(s.lease_margin_ms)
        sealer = Sealer(logs, self._coordinator, holder, self._clock, _seal_limits(s), self._backoff(), self._metrics)
        writer = Writer(
            logs,
            wal,
            replayed.index,
            lease,
            self._thread,
            self._clock,
            WriterLimits(s.queue_bytes_max, s.wal_group_bytes_max, s.wal_bytes_max),
            self._metrics,
            lambda held: self._appended(held, sealer),
        )
        trimmer = Trimmer(logs, wal, replayed.index, self._thread)
        moves = Moves(
            logs,
            writer,
            sealer,
            self._coordinator,
            holder,
            self._clock,
            self.tasks,
            timeout_ms=s.move_timeout_ms,
            retry_first_ms=s.retry_first_ms,
            retry_max_ms=s.retry_max_ms,
        )
        ranges = Ranges(logs, writer, moves, self._metrics, trimmer.want)
        session = Session(
            Identity(s.agent_id, directory.wal_id, address),
            self._coordinator,
            ranges,
            moves,
            logs,
            writer,
            sealer,
            lease,
            holder,
            self._clock,
            self._backoff,
        )
        topics = TopicLookup(logs, self._coordinator, self._clock, s.agent_id, session.reconcile)
        produce = ProduceService(logs, writer, topics, self._clock, s, self._metrics)
        tail = TailReader(
            logs,
            WalReader(directory),
            self._clock,
            bytes_max=s.read_tail_bytes_max,
            wait_ms_max=s.read_tail_wait_ms_max,
        )
        return Running(
            directory,
            wal,
            replayed.index,
            logs,
            writer,
            sealer,
            session,
            ranges,
            moves,
            trimmer,
            holder,
            produce,
            tail,
        )

    def _backoff(self) -> Backoff:
        return Backoff(self._settings.retry_first_ms, self._settings.retry_max_ms)

    def _appended(self, held: HeldLog, sealer: Sealer) -> None:
        sealer.appended(held)
        if held.log.runs_low and self._running is not None:
            self._running.session.want_heartbeat()

    def _spawn_before_session(self, running: Running) -> None:
        self.tasks.spawn("wal writer", running.writer.run())
        self.tasks.spawn("sealer", running.sealer.run())
        self.tasks.spawn("announcer", running.sealer.announce())
        self.tasks.spawn("wal trimmer", running.trimmer.run())
        if self._settings.wal_fsync == "interval":
            self.tasks.spawn("wal fsync", self._sync_loop(running.wal))

    async def _sync_loop(self, wal: Wal) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._clock.sleep_ms(self._settings.wal_fsync_interval_ms)
            await loop.run_in_executor(self._thread, wal.sync)

    def _observe(self, running: Running) -> None:
        gauges = {
            "wal_bytes": ("bytes of the write-ahead log", lambda: running.index.size_bytes),
            "memory_bytes": ("bytes of batches in memory", lambda: running.logs.memory_bytes),
            "queue_bytes": ("bytes waiting to be written", lambda: running.writer.queue_bytes),
            "sealed_bytes": ("bytes sealed and not registered", lambda: running.sealer.sealed_bytes),
        }
        for name, (description, value) in gauges.items():
            self._metrics.observe(f"streamhouse_ingest_{name}", description, value)

    # ---- stop

    async def stop(self) -> None:
        """Drains: refuses new batches, seals, waits for registration, settles, closes the session and the log.

        What is not registered within shutdown_timeout_ms stays in the log for the next start.
        """
        running, self._stopping = self._running, True
        if running is None:
            return
        running.ranges.closing = True
        running.writer.refuse(ShuttingDown("the agent is shutting down", retry_after_ms=1000))
        if self.tasks.error is None:
            await self._drain(running)
        await running.session.close()
        await self.tasks.stop()
        self._running = None
        await self._close_log(running)

    async def _drain(self, running: Running) -> None:
        await running.writer.drain()
        running.moves.cancel_all()
        for held in running.logs:
            running.logs.stop_leading(held)
        running.sealer.seal_now(running.logs)
        timeout_ms = self._settings.shutdown_timeout_ms
        if not await ends_within(self._clock, _all_registered(running.logs), timeout_ms):
            log.warning(
                "%d bytes are not registered after %d ms; they stay in the log",
                sum(held.log.unregistered_bytes for held in running.logs),
                timeout_ms,
            )

    async def _close_log(self, running: Running) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, running.wal.close)
            await running.trimmer.trim()
        finally:
            running.directory.close()
            self._thread.shutdown()

    # ---- describe

    def describe(self) -> pb.DescribeAgentResponse:
        running = self.running()
        return pb.DescribeAgentResponse(
            agent_id=self._settings.agent_id,
            wal_id=running.directory.wal_id,
            wal_bytes=running.index.size_bytes,
            wal_bytes_max=self._settings.wal_bytes_max,
            memory_bytes=running.logs.memory_bytes,
            memory_bytes_max=self._settings.memory_bytes_max,
            sealed_bytes=running.sealer.sealed_bytes,
            unregistered_bytes=sum(held.log.unregistered_bytes for held in running.logs),
            partitions=[_led_partition(held) for held in running.logs if held.log.leading],
        )


def _seal_limits(settings: IngestSettings) -> SealLimits:
    return SealLimits(
        seal_bytes=settings.seal_bytes,
        seal_age_ms=settings.seal_age_ms,
        durable_linger_ms=settings.durable_linger_ms,
        open_bytes_max=settings.memory_bytes_max // 2,  # the other half is for what is sealed and being uploaded
        object_bytes_max=_OBJECT_BYTES_MAX,
    )


async def _all_registered(logs: Iterable[HeldLog]) -> None:
    await asyncio.gather(*(held.wait_registered(held.log.next_offset) for held in logs))


def _led_partition(held: HeldLog) -> pb.LedPartition:
    return pb.LedPartition(
        topic=held.log.topic,
        partition=held.log.key.partition,
        epoch=held.log.key.epoch,
        start_offset=held.log.start_offset,
        registered_end=held.log.registered_end,
        high_watermark=held.log.next_offset,
        buffered_bytes=held.log.unregistered_bytes,
    )
