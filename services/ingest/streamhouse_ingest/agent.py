"""Life of the agent: open and replay the log, open the session, serve, drain, stop.

Owns: the log's thread, the background tasks, the parts of the running agent. Does not own: the rules of the parts.
Invariants: nothing is served before the log is replayed and a session is open; the log is unlocked last, by the thread
that writes to it.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shproto.errors import ShuttingDown, Unavailable
from shproto.services import CoordinatorApi
from shproto.v1 import ingest_pb2 as pb
from shruntime.clock import Clock
from shruntime.disk_space import DiskSpace
from shruntime.tasks import Tasks, ends_within, until_done

from streamhouse_ingest.log.logs import HeldLog, Logs
from streamhouse_ingest.log.partition_log import PartitionLog
from streamhouse_ingest.log.replay import Replay
from streamhouse_ingest.metrics import IngestMetrics
from streamhouse_ingest.parts import AgentContext, AgentParts, assemble
from streamhouse_ingest.ports import OpenedLog, Wal
from streamhouse_ingest.settings import IngestSettings

log = logging.getLogger(__name__)


class Agent:
    """The agent; `start` and `stop` are called once each. `tasks.failed` is set if the agent cannot go on, for example
    with a broken log.

    `open_log` locks and replays the log; it blocks and is called in the log's own thread.
    """

    def __init__(
        self,
        settings: IngestSettings,
        coordinator: CoordinatorApi,
        clock: Clock,
        open_log: Callable[[], OpenedLog],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._open_log = open_log
        self._metrics = IngestMetrics(settings.metrics_topics_max)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wal")
        self._running: AgentParts | None = None
        self._following: asyncio.Task[None] | None = None
        self._stopping = False
        self.tasks = Tasks()
        self._context = AgentContext(
            settings=settings,
            coordinator=coordinator,
            clock=clock,
            metrics=self._metrics,
            tasks=self.tasks,
            thread=self._thread,
        )

    def running(self) -> AgentParts:
        """Returns the parts of the running agent. Raises Unavailable before `start` is done, ShuttingDown after
        `stop`."""
        if self._running is None:
            if self._stopping:
                raise ShuttingDown("the agent has stopped")
            raise Unavailable("the agent is starting: its log is being replayed", retry_after_ms=200)
        return self._running

    # ---- start

    async def start(self, advertised_address: str) -> None:
        """Replays the log, opens a session and starts the tasks; waits for the coordinator.

        Raises WalDirectoryError (locked, or of another agent), AgentIdTaken, OSError; everything opened is closed then.
        """
        running: AgentParts | None = None
        opening = asyncio.get_running_loop().run_in_executor(self._thread, self._open_log)
        try:
            # A start that is cancelled waits for the thread, which would lock the directory afterwards.
            opened = await until_done(opening)
            running = assemble(self._context, opened, self._restore(opened.replay), advertised_address)
            self._observe(running)
            self._spawn_parts(running)
            await running.session.open(await self._session_token(opened, advertised_address), opened.replay.gaps)
            # Only after the session is open: a refused start leaves the directory free for another agent id.
            await asyncio.get_running_loop().run_in_executor(self._thread, opened.wal.mark_used)
            if opened.replay.gaps:
                await self._mark_settled(opened)
        except BaseException:
            async with contextlib.AsyncExitStack() as undo:  # the last comes first, and each although another fails
                undo.callback(self._thread.shutdown, wait=False)
                if opening.done() and not opening.cancelled() and opening.exception() is None:
                    undo.push_async_callback(self._unlock, opening.result())
                undo.push_async_callback(self.tasks.stop)
                if running is not None:
                    # Otherwise the id stays taken until the session expires.
                    undo.push_async_callback(running.session.close)
            raise
        self._following = self.tasks.spawn("session", running.session.run())
        self._running = running

    async def _session_token(self, opened: OpenedLog, address: str) -> str:
        """Returns the token of the first session.

        Over a damaged log, an earlier process may have requested a session and died before the answer. Its token is
        used again, because nothing was written to the ranges granted to that session, and they must not be reported as
        possibly lost. A torn log may not show all writes, so a new token is used.
        """
        drawn, gaps = str(uuid.uuid4()), opened.replay.gaps
        if not gaps.corrupt_frames or gaps.torn_tail:
            return drawn
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, opened.wal.opening_token, address, drawn
            )
        except OSError as error:
            log.warning("the session's token cannot be noted, empty ranges may be reported as possibly lost: %s", error)
            return drawn

    async def _mark_settled(self, opened: OpenedLog) -> None:
        """Notes that the damage was reported, so that the next start does not take the same damage for new."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, opened.wal.mark_settled)
        except OSError as error:
            log.warning("that the log's damage was reported cannot be noted before something is written: %s", error)

    def _restore(self, replay: Replay) -> Logs:
        """Returns the logs as the replay found them; none of them leads."""
        logs = Logs(
            memory_bytes_max=self._settings.memory_bytes_max,
            tail_cache_bytes=self._settings.tail_cache_bytes,
            producers_max=self._settings.producers_per_partition_max,
        )
        self._metrics.damaged.add(len(replay.damage))
        for partition_key, states in replay.producers.items():
            logs.producers(partition_key).merge(states)
        for key, found in sorted(replay.logs.items()):
            first_offset = found.first_offset
            restored = PartitionLog(key, "", first_offset, first_offset, logs.producers(key.partition_key))
            restored.restore(found.buffers, found.end_offset)
            logs.hold(restored)
            log.info("replayed %s: offsets %d to %d", restored.describe(), first_offset, restored.next_offset)
        return logs

    def _spawn_parts(self, running: AgentParts) -> None:
        self.tasks.spawn("wal writer", running.writer.run())
        self.tasks.spawn("sealer", running.sealer.run())
        self.tasks.spawn("announcer", running.sealer.announce())
        self.tasks.spawn("wal trimmer", running.trimmer.run())
        if self._settings.wal_fsync == "interval":
            self.tasks.spawn("wal fsync", self._sync_loop(running.opened.wal))

    async def _sync_loop(self, wal: Wal) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._clock.sleep_ms(self._settings.wal_fsync_interval_ms)
            await loop.run_in_executor(self._thread, wal.sync)

    def _observe(self, running: AgentParts) -> None:
        disk = DiskSpace(Path(self._settings.wal_dir), self._clock, self._thread)
        if self._settings.is_measured:
            self.tasks.spawn("free space of the log's disk", disk.run())
        gauges: dict[str, tuple[str, Callable[[], int | None]]] = {
            "streamhouse_ingest_wal_bytes_max": ("limit of it", lambda: self._settings.wal_bytes_max),
            "streamhouse_ingest_wal_disk_free_bytes": ("bytes left on the disk of the log", lambda: disk.free_bytes),
            "streamhouse_ingest_wal_bytes": ("bytes of the write-ahead log", lambda: running.opened.index.size_bytes),
            "streamhouse_ingest_memory_bytes": ("bytes of batches in memory", lambda: running.logs.memory_bytes),
            "streamhouse_ingest_queue_bytes": ("bytes waiting to be written", lambda: running.writer.queue_bytes),
            "streamhouse_ingest_sealed_bytes": ("bytes sealed and not registered", lambda: running.sealer.sealed_bytes),
        }
        for name, (description, value) in gauges.items():
            self._metrics.observe(name, description, value)

    # ---- stop

    async def stop(self) -> None:
        """Drains: refuses new batches, seals, waits for registration, closes the session and the log.

        Records that are not registered within shutdown_timeout_ms stay in the log for the next start.
        """
        running, self._stopping = self._running, True
        if running is None:
            return
        # First: a grant that arrives during the drain must not make a log lead again.
        running.ranges.closing = True
        running.writer.refuse(ShuttingDown("the agent is shutting down", retry_after_ms=1000))
        # After the failure of a task, such as a broken log, nothing more is written or announced: a drain would wait in
        # vain.
        if self.tasks.error is None:
            await self._drain(running)
        assert self._following is not None, "it runs since the agent does"
        # Ended before the session is closed: it would take the closed session for a lost one, and open another.
        self._following.cancel()
        await asyncio.wait([self._following])
        await running.session.close()
        await self.tasks.stop()
        self._running = None
        await self._close_log(running)

    async def _drain(self, running: AgentParts) -> None:
        await running.writer.drain()
        running.transfers.cancel_all()
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

    async def _close_log(self, running: AgentParts) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, running.opened.wal.close)
            # Now that no file is active: a log without unregistered records ends without files.
            await running.trimmer.trim()
        finally:
            try:
                await self._unlock(running.opened)
            finally:
                self._thread.shutdown()

    async def _unlock(self, opened: OpenedLog) -> None:
        """Unlocks the log in its own thread, and so behind every write of a task that was cancelled: another process
        that gets the lock is the only one that writes. A cancellation of the caller is raised afterwards."""
        await until_done(asyncio.get_running_loop().run_in_executor(self._thread, opened.unlock))

    # ---- describe

    def describe(self) -> pb.DescribeAgentResponse:
        """Returns the state of this agent for `streamhouse status`. Raises Unavailable, ShuttingDown."""
        running = self.running()
        return pb.DescribeAgentResponse(
            agent_id=self._settings.agent_id,
            wal_id=running.opened.wal_id,
            wal_bytes=running.opened.index.size_bytes,
            wal_bytes_max=self._settings.wal_bytes_max,
            memory_bytes=running.logs.memory_bytes,
            memory_bytes_max=self._settings.memory_bytes_max,
            sealed_bytes=running.sealer.sealed_bytes,
            unregistered_bytes=sum(held.log.unregistered_bytes for held in running.logs),
            partitions=[_led_partition(held) for held in running.logs if held.log.leading],
            session_id=running.current_session.session_id,
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
