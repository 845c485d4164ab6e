"""Group commit: takes queued batches as a group, decides, writes and syncs the group, applies it and answers in order.

Owns: the queue in front of the write-ahead log, the order of appends. Does not own: the files (ports.py), the state of
logs, sealing.
Invariants: a single task writes, a group at a time; the next group gathers in the queue meanwhile. Logs change only
after the write, so that a failed group leaves nothing behind. Every queued batch gets exactly one outcome, and no batch
is acknowledged unless the lease is held after the write.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from shformat import BatchHeader, stamp_batch
from shproto.errors import DiskFull, ShuttingDown, StreamHouseError, Unavailable
from shruntime.clock import Clock

from streamhouse_ingest.log.buffer import WalPosition
from streamhouse_ingest.log.lease import Lease
from streamhouse_ingest.log.logs import HeldLog, Logs
from streamhouse_ingest.log.partition_log import BatchAppended
from streamhouse_ingest.log.producers import DuplicateOf
from streamhouse_ingest.log.wal_space import WalSpace
from streamhouse_ingest.metrics import IngestMetrics
from streamhouse_ingest.ports import Frame, LogFiles, WalBroken, WalFull
from streamhouse_ingest.produce.draft import Decision, Draft, NotLed
from streamhouse_ingest.produce.refusals import lease_lost, log_failed, overloaded, refusal

log = logging.getLogger(__name__)

# Deciding and applying a batch take about 20 us each on the event loop, which serves no other call meanwhile.
_GROUP_BATCHES_MAX = 1024
_QUEUE_RETRY_MS = 20  # the queue drains a group every few milliseconds
_WAL_RETRY_MS = 1000  # space becomes free when a segment is registered, once per sealed buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The log has the batch at [base_offset, end_offset); for a duplicate, the offsets of the original."""

    held: HeldLog
    base_offset: int
    end_offset: int
    duplicate: bool


class Append:
    """A validated batch on its way to the log; `written` is None if no caller waits (acks none). `sequenced`: its
    producer fences.

    Errors are set as results of `written`, not as exceptions: asyncio would log an exception that no caller retrieves,
    and the caller may be gone by then.
    """

    __slots__ = ("batch", "durable", "header", "held", "queued_ms", "sequenced", "traceparent", "written")

    def __init__(
        self,
        held: HeldLog,
        header: BatchHeader,
        batch: bytes,
        *,
        durable: bool = False,
        sequenced: bool = False,
        traceparent: str = "",
        written: asyncio.Future[Written | StreamHouseError] | None = None,
    ) -> None:
        self.held = held
        self.header = header
        self.batch = batch
        self.durable = durable
        self.sequenced = sequenced
        self.traceparent = traceparent
        self.written = written
        self.queued_ms = 0


Decided = tuple[Append, Decision, Frame | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterLimits:
    """Limits of queue, group and log. `wal_ahead_bytes`: space written ahead in the file that is appended to."""

    queue_bytes_max: int
    group_bytes_max: int
    wal_bytes_max: int
    wal_ahead_bytes: int


class Writer:
    """Appends queued batches in groups. `run` is its task."""

    def __init__(
        self,
        logs: Logs,
        files: LogFiles,
        lease: Lease,
        clock: Clock,
        limits: WriterLimits,
        metrics: IngestMetrics,
        space: WalSpace,
    ) -> None:
        self._logs = logs
        self._files = files
        self._wal = files.wal
        self._index = files.index
        self._lease = lease
        self._clock = clock
        self._limits = limits
        self._metrics = metrics
        self._space = space
        self._queue: deque[Append] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusing: StreamHouseError | None = None
        self._failed = False
        self.queue_bytes = 0  # batches that wait or are being written

    @property
    def broken(self) -> bool:
        """True if the write-ahead log may hold records that were never applied: only a replay can find the ends of its
        ranges."""
        return self._failed or self._wal.broken

    def submit(self, append: Append) -> None:
        """Queues the batch. Raises Overloaded beyond a limit, or the error given to refuse()."""
        if self._refusing is not None:
            # A new error for each batch: a single one, raised again and again, would collect the frames of all calls.
            raise type(self._refusing)(self._refusing.message, retry_after_ms=self._refusing.retry_after_ms)
        size_bytes = len(append.batch)
        if self.queue_bytes + size_bytes > self._limits.queue_bytes_max:
            raise overloaded("queue_bytes_max", self._limits.queue_bytes_max, self.queue_bytes, _QUEUE_RETRY_MS)
        # Queued batches count as written, because nothing compares them with the limit again before they are.
        wal_bytes = self._index.size_bytes + self._limits.wal_ahead_bytes + self.queue_bytes
        if wal_bytes + size_bytes > self._limits.wal_bytes_max and not self._only_next_makes_room:
            raise overloaded("wal_bytes_max", self._limits.wal_bytes_max, wal_bytes, _WAL_RETRY_MS)
        if self._logs.memory_full:
            raise overloaded("memory_bytes_max", self._logs.memory_bytes_max, self._logs.memory_bytes, _WAL_RETRY_MS)
        # Nothing is awaited from the checks above to here: the sums that were checked are the sums that count.
        append.queued_ms = self._clock.monotonic_ms()
        self.queue_bytes += size_bytes
        self._queue.append(append)
        self._wake.set()

    @property
    def _only_next_makes_room(self) -> bool:
        """True if everything is registered, but the open file can be deleted only after the next group begins another
        file. Happens if a group, or a batch, is larger than two files together may be."""
        return not self.queue_bytes and self._index.all_covered(self._logs.registered_end)

    def refuse(self, error: StreamHouseError) -> None:
        """Refuses new batches with `error` from now on; queued batches are still written."""
        self._refusing = error

    async def barrier(self) -> None:
        """Waits until the group that is being written, if any, is applied."""
        await self._idle.wait()

    async def sync(self) -> None:
        """Waits until the group that is being written, if any, is applied, and all applied groups are synced, whatever
        the policy. Raises Unavailable if the log failed."""
        await self.barrier()
        try:
            await self._files.run(self._wal.sync)
        except WalBroken as error:
            raise log_failed() from error

    async def drain(self) -> None:
        """Waits until all queued batches are written; call after refuse()."""
        while self._queue or not self._idle.is_set():
            await self._idle.wait()
            # `_idle` stays set until `run` takes the batches that are queued: this gives `run` its turn.
            await asyncio.sleep(0)

    async def run(self) -> None:
        """Writes groups until cancelled. Raises WalBroken after a failure that leaves the state of the log unknown."""
        try:
            while True:
                await self._wake.wait()
                if group := self._take():
                    await self._write(group)
                else:
                    self._wake.clear()
        finally:
            # Also after a cancellation: no task takes from the queue any more, and its callers must not wait for ever.
            self._fail_queued()

    # ---- one group

    def _take(self) -> list[Append]:
        group: list[Append] = []
        room = self._limits.group_bytes_max
        # A first batch larger than the limit is a group of its own: it would otherwise block the queue for ever.
        while self._queue and len(group) < _GROUP_BATCHES_MAX and (not group or len(self._queue[0].batch) <= room):
            append = self._queue.popleft()
            room -= len(append.batch)
            group.append(append)
        return group

    async def _write(self, group: list[Append]) -> None:
        self._idle.clear()
        try:
            decided = self._decide(group)
            frames = [frame for _, _, frame in decided if frame is not None]
            positions = await self._append(frames) if frames else []
            self._apply(decided, iter(positions))
        except WalFull as error:
            # Nothing of the group was kept, so the log goes on, and the producers may try again.
            self._space.note_full()
            self._fail(group, DiskFull(f"the write-ahead log cannot grow: {error}", retry_after_ms=_WAL_RETRY_MS))
        except WalBroken:
            self._failed = True
            self.refuse(log_failed())
            self._fail(group, log_failed())
            raise
        except BaseException:  # cancelled, or a defect: no caller may wait for ever
            # The write may have been finished or not: only a replay knows, so that this process writes nothing more.
            self._failed = True
            self._fail(group, Unavailable("stopped while the batch was written; the outcome is unknown"))
            raise
        finally:
            self.queue_bytes -= sum(len(append.batch) for append in group)
            self._idle.set()

    def _decide(self, group: list[Append]) -> list[Decided]:
        # A batch follows the batches of its group that the log does not have yet; the drafts stand in for the logs.
        drafts: dict[HeldLog, Draft] = {}
        # Without the lease nothing is written: a batch refused now is certainly not in the log, so its producer may
        # send it to the next leader. After the write its outcome would be unknown.
        led = self._lease.held(self._clock.monotonic_ms())
        decided: list[Decided] = []
        for append in group:
            draft = drafts.get(append.held)
            if draft is None:
                draft = drafts[append.held] = Draft(append.held.log)
            header = append.header
            decision: Decision = NotLed()
            if led:
                decision = draft.decide(header.record_count, header.producer, sequenced=append.sequenced)
            frame = None
            if isinstance(decision, BatchAppended):
                key = append.held.log.key
                batch = stamp_batch(append.batch, decision.base_offset, key.epoch)
                frame = Frame(key=key, base_offset=decision.base_offset, record_count=header.record_count, batch=batch)
            decided.append((append, decision, frame))
        return decided

    async def _append(self, frames: list[Frame]) -> list[WalPosition]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            positions = await self._files.run(self._wal.append, frames)
        finally:
            # Also after a failed write, which may have begun another file before.
            if self._wal.active is not None:
                self._index.resize(self._wal.active, self._wal.active_bytes)
        self._metrics.write_ms.record((loop.time() - started) * 1000)
        self._metrics.group_bytes.record(sum(position.size_bytes for position in positions))
        return positions

    # ---- after the write

    def _apply(self, decided: list[Decided], positions: Iterator[WalPosition]) -> None:
        now_ms = self._clock.monotonic_ms()
        # A leader that was stopped during the write (SIGSTOP, a stuck disk) may have lost its lease meanwhile: it keeps
        # the written batches but acknowledges none of them.
        led = self._lease.held(now_ms)
        touched: dict[HeldLog, None] = {}
        for append, decision, frame in decided:
            if isinstance(decision, BatchAppended):
                assert frame is not None
                self._apply_one(append, decision, frame, next(positions), now_ms)
                touched[append.held] = None
            # Also for a duplicate: a retry of a durable batch waits for the same buffer as the original.
            if append.durable and _waits_for_seal(append, decision):
                append.held.durable_since_ms = append.held.durable_since_ms or now_ms
                touched[append.held] = None
            self._resolve(append, self._answer(append, decision) if led else lease_lost(append.held))
        for held in touched:
            self._logs.appended(held)
        self._logs.trim()

    def _apply_one(
        self, append: Append, event: BatchAppended, frame: Frame, position: WalPosition, now_ms: int
    ) -> None:
        held = append.held
        held.log.apply(event, position, frame.batch, now_ms)
        self._logs.count_batch(held, position.size_bytes)
        self._index.note(position.file, held.log.key, event.base_offset + event.record_count)
        if append.traceparent:
            held.note_trace(event.base_offset + event.record_count, append.traceparent)
        self._metrics.records.add(event.record_count)
        self._metrics.bytes.add(position.size_bytes)
        self._metrics.topic_records.add(held.log.topic, event.record_count)
        self._metrics.topic_bytes.add(held.log.topic, position.size_bytes)
        self._metrics.append_ms.record(now_ms - append.queued_ms)

    def _answer(self, append: Append, decision: Decision) -> Written | StreamHouseError:
        count = append.header.record_count
        if isinstance(decision, BatchAppended):
            return Written(
                held=append.held,
                base_offset=decision.base_offset,
                end_offset=decision.base_offset + count,
                duplicate=False,
            )
        if isinstance(decision, DuplicateOf):
            self._metrics.duplicates.add(1)
            return Written(
                held=append.held,
                base_offset=decision.base_offset,
                end_offset=decision.base_offset + count,
                duplicate=True,
            )
        return refusal(append.held, append.header.producer, decision)

    def _fail(self, group: list[Append], error: StreamHouseError) -> None:
        for append in group:
            self._resolve(append, error)

    def _resolve(self, append: Append, outcome: Written | StreamHouseError) -> None:
        if append.written is None:
            if isinstance(outcome, StreamHouseError):  # acks none: only the metric shows the refusal
                self._metrics.rejected.add(1, {"reason": outcome.reason})
        # Done already: a group that failed halfway through `_apply` has answered some of its batches.
        elif not append.written.done():
            append.written.set_result(outcome)

    def _fail_queued(self) -> None:
        self._fail(list(self._queue), ShuttingDown("the agent stops; the batch was not written"))
        self.queue_bytes -= sum(len(append.batch) for append in self._queue)
        self._queue.clear()


def _waits_for_seal(append: Append, decision: Decision) -> bool:
    """True if the batch, or the original that it repeats, is in the open buffer."""
    buffer = append.held.log.open
    if buffer is None or not isinstance(decision, BatchAppended | DuplicateOf):
        return False
    return decision.base_offset >= buffer.base_offset
