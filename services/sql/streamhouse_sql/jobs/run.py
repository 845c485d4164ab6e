"""Runs a job as long as this worker holds it: takes it over, then one micro-batch after the other.

Owns: the state of the program, the place in the inputs, the numbers of the output. Does not own: the hold on the job
(worker.py), the work of the parts.
Invariants: boundaries are in the journal before their micro-batch runs, so nothing that was seen of it is ever undone.
Output is written behind the journal. The pointer moves only over output that is written. Micro-batches run one after
the other, in one thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from shproto.errors import (
    DataLoss,
    Fenced,
    ProducerFenced,
    Unavailable,
    UnknownTopic,
)
from shproto.keys import PartitionKey, TopicId
from shproto.limits import RETRY_MS_MAX
from shproto.v1 import coordinator_pb2 as pb
from shread.reads import Reads
from shruntime.tasks import cancel_and_wait, run_to_end, run_until_first_ends, until_done

from streamhouse_sql import telemetry
from streamhouse_sql.core.continuous.model import JobPlan
from streamhouse_sql.jobs import takeover
from streamhouse_sql.jobs.checkpoints import Checkpoints
from streamhouse_sql.jobs.encode import Encoded, Encoder
from streamhouse_sql.jobs.gather import Gather, Gathered, GatherLimits, read_again
from streamhouse_sql.jobs.journal import Journal
from streamhouse_sql.jobs.micro_batch import Checkpoint, InputPosition, MicroBatch, advanced
from streamhouse_sql.jobs.output import Output, Writer
from streamhouse_sql.jobs.patience import until_available
from streamhouse_sql.jobs.programs import Programs
from streamhouse_sql.pipeline import Pipeline, Step
from streamhouse_sql.settings import SqlSettings
from streamhouse_sql.threads import in_daemon

log = logging.getLogger(__name__)
T = TypeVar("T")
# Values of columns that rows of a view must have.
Equals = tuple[tuple[str, int | str], ...]
# A micro-batch that is journalled, and its records; None: no more come.
_Ahead = tuple[MicroBatch, Mapping[str, Any]] | None

SAVING_POLL_MS = 100
# Micro-batches behind a checkpoint after which the next one is due whatever the time: the next owner repeats them, and
# the journal has room for ten times as many.
CHECKPOINT_BATCHES = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """A job's program, and the parts that compute it."""

    plan: JobPlan
    new_pipeline: Callable[[], Pipeline]
    new_encoder: Callable[[], Encoder]


@dataclass(frozen=True, kw_only=True)
class JobParts:
    """Parts that all jobs of a worker share. `decoders`, `programs`: threads that decode records, and run programs.
    `plan_of` returns the program of a job over topics with these numbers of partitions, and blocks; `new_writer` the
    writer of an epoch of a job to a partition."""

    reads: Reads
    settings: SqlSettings
    journal: Journal
    checkpoints: Checkpoints
    decoders: Executor
    programs: Programs
    plan_of: Callable[[pb.SqlJobInfo, Mapping[str, int]], PlannedJob]
    new_writer: Callable[[pb.SqlJobInfo, int], Writer]

    def close(self) -> None:
        """Ends the decoders, which nothing uses any more."""
        self.decoders.shutdown(wait=False, cancel_futures=True)


@dataclass(slots=True)
class _Place:
    """Place of a job behind a micro-batch."""

    number: int
    inputs: dict[str, InputPosition]
    watermark_us: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    """State of a job to be stored as a checkpoint."""

    place: _Place
    sequences: tuple[int, ...]
    state: Mapping[str, Any] = field(repr=False)


class JobRun:
    """A job that this worker holds. `run` goes on until it is cancelled, or `stop` was called and all is stored."""

    def __init__(self, parts: JobParts, grant: pb.SqlJobGrant) -> None:
        self.job = grant.job
        self._parts = parts
        self._grant = grant
        self._settings = parts.settings
        self._output = Output(
            lambda partition: parts.new_writer(grant.job, partition), bytes_max=parts.settings.sql_job_output_bytes_max
        )
        self._place = _Place(0, {})
        self._topics: Mapping[str, tuple[TopicId, int]] = {}  # of the program: id and number of partitions
        self._planned: PlannedJob | None = None
        self._pipeline: Pipeline | None = None
        self._encoder: Encoder | None = None
        self._gather: Gather | None = None
        self._state_bytes = 0
        self._is_stopping = asyncio.Event()
        self._now_us = 0
        self._checkpoint: Checkpoint | None = None
        self._saving = asyncio.Event()  # a snapshot waits to be stored, or is being stored
        self._snapshot: _Snapshot | None = None
        self._saved = asyncio.Event()
        self._is_ready = False
        self._is_lost = False  # a thread goes on with the program, and heeds no interrupt
        self._view_lock = asyncio.Lock()
        # Micro-batch that runs, for the place of an error.
        self.batch: MicroBatch | None = None

    # ---- for the worker

    @property
    def number(self) -> int:
        """Number of the micro-batch that runs, or of the last one."""
        return self.batch.number if self.batch is not None else self._place.number

    @property
    def where(self) -> str:
        """Micro-batch that runs and its ranges, for the reason of a failure; empty outside of any."""
        if self.batch is None:
            return ""
        ranges = ", ".join(
            f"{item.input}/{item.partition} {item.offset_from}..{item.offset_to}" for item in self.batch.ranges[:8]
        )
        more = f" and {len(self.batch.ranges) - 8} more" if len(self.batch.ranges) > 8 else ""
        return f"micro-batch {self.batch.number} ({ranges}{more})"

    @property
    def trouble(self) -> str:
        """Reason for which the job waits, empty if it does not."""
        return self._output.trouble or (self._gather.trouble if self._gather is not None else "")

    def progress(self) -> pb.SqlJobProgress:
        """Returns the progress as the coordinator keeps it."""
        return pb.SqlJobProgress(
            lag_records=self._gather.lag_records if self._gather is not None else 0,
            watermark_us=self._place.watermark_us,
            state_bytes=self._state_bytes,
        )

    def stop(self) -> None:
        """Makes `run` return after the micro-batch that runs, with everything stored."""
        self._is_stopping.set()

    async def view_table(self, equals: Equals = ()) -> Any:
        """Returns the result of a view as a `pyarrow.Table`: all of it, or the rows with these values of columns.
        Raises Unavailable before the state is restored."""
        # One at a time: the second cursor of an instance is not for several threads.
        async with self._view_lock:
            if self._pipeline is None or not self._is_ready:
                raise Unavailable(f"view {self.job.job} is not restored yet", retry_after_ms=RETRY_MS_MAX)
            if equals:
                return await run_to_end(self._pipeline.lookup, *zip(*equals, strict=True))
            return await run_to_end(self._pipeline.view_table)

    @property
    def plan(self) -> JobPlan | None:
        """The program, None before it is made."""
        return self._planned.plan if self._planned is not None else None

    async def run(self) -> None:
        """Runs the job. Raises Fenced once another worker holds it, and the error that ends it: DataLoss,
        StatementFailed, StatementLimit, StatementTimeout, InvalidStatement, OffsetBelowStart, UnknownTopic."""
        try:
            await self._open()
            await run_until_first_ends({"job output": self._output.run(), "job": self._take_over_and_go_on()})
        except ProducerFenced as error:
            raise Fenced(f"job {self.job.job}: {error.message}") from error
        finally:
            # Further cancellations are part of the first: nothing is left open, and the worker awaits this run.
            await until_done(asyncio.create_task(self._close(), name="job close"))

    # ---- take-over

    async def _open(self) -> None:
        parts, job = self._parts, self.job
        # The job may be younger than the newest event that the index knows, and so may be its topics.
        await self._until_available(parts.reads.index_catch_up.catch_up_to_head)
        partitions = self._output_partitions()
        grant = self._grant
        self._checkpoint = Checkpoint.decode(grant.checkpoint) if grant.checkpoint else None
        self._topics = {name: (found.topic_id, found.partitions) for name, found in parts.reads.index.topics().items()}
        topics = {name: partitions for name, (_, partitions) in self._topics.items()}
        if self._checkpoint is not None:
            # The program is that of the beginning: partitions that came since do not change it.
            topics |= {place.topic: place.first_partitions for place in self._checkpoint.inputs.values()}
        self._planned = await run_to_end(parts.plan_of, job, topics)
        journal = [MicroBatch.decode(item.number, item.entry) for item in grant.journal]
        # Nothing is read of former owners before they can write no more.
        written = await self._output.fence(partitions)
        plan = takeover.take_over(
            self._checkpoint,
            journal,
            written,
            fingerprint=self._planned.plan.fingerprint,
            epoch=job.epoch,
            journal_epoch=max((item.epoch for item in grant.journal), default=0),
            ended_epoch=grant.ended_epoch,
        )
        self._output.begin(plan.sequences_in(len(written)))
        self._takeover = plan

    async def _take_over_and_go_on(self) -> None:
        await self._restore()
        await self._replay()
        self._is_ready = True
        log.info("job %s: epoch %d goes on behind micro-batch %d", self.job.job, self.job.epoch, self._place.number)
        gather = self._gather = Gather(
            self._parts.reads,
            self._parts.decoders,
            self.plan_now.inputs,
            self._place.inputs,
            GatherLimits.of(self._settings),
        )
        try:
            await run_until_first_ends({"job steps": self._go_on(gather), "job checkpoints": self._save_all()})
        finally:
            await gather.close()

    @property
    def plan_now(self) -> JobPlan:
        """The program, once it is made."""
        assert self._planned is not None
        return self._planned.plan

    async def _restore(self) -> None:
        assert self._planned is not None
        state = await self._until_available(lambda: self._parts.checkpoints.read(self._takeover.restore))
        self._pipeline = await self._in_thread(self._planned.new_pipeline)
        self._encoder = await self._in_thread(self._planned.new_encoder)
        checkpoint = self._checkpoint
        if checkpoint is None:
            # The first owner: from where the job begins is fixed before anything is read.
            self._place = _Place(0, self._first_places())
            checkpoint = self._checkpoint = self._pointer(self._place, (), ())
            await self._parts.checkpoints.point(self.job.job_id, self.job.epoch, checkpoint)
            return
        if checkpoint.inputs.keys() != {source.name for source in self.plan_now.inputs}:
            raise DataLoss(
                f"the checkpoint is of a program with the inputs {', '.join(sorted(checkpoint.inputs))}, which is not "
                "this one"
            )
        if state:  # none yet: the checkpoint of the beginning
            await self._in_thread(self._pipeline.restore, state)
        self._place = _Place(checkpoint.number, dict(checkpoint.inputs), checkpoint.watermark_us)
        await self._parts.checkpoints.sweep(self.job.job_id, checkpoint, self.job.epoch)

    def _first_places(self) -> dict[str, InputPosition]:
        """Returns the log starts of the partitions that the program was made for: there may be more by now, since
        fencing may take minutes."""
        index = self._parts.reads.index
        places = {}
        for source in self.plan_now.inputs:
            topic_id, partitions = self._topics[source.topic]
            starts = {
                number: index.get(PartitionKey(topic_id, number), source.topic).log_start_offset
                for number in range(partitions)
            }
            places[source.name] = InputPosition(
                topic=source.topic, topic_id=topic_id.hex(), first_partitions=partitions, offsets=starts
            )
        return places

    async def _replay(self) -> None:
        parts, plan = self._parts, self._takeover
        for batch in plan.replay:
            self.batch = batch
            self._now_us = max(self._now_us, batch.now_us)
            inputs = await read_again(parts.reads, parts.decoders, self.plan_now.inputs, self._place.inputs, batch)
            await self._run_batch(batch, inputs)
        takeover.check_replayed(self._output.sequences, plan.written)

    # ---- micro-batches

    async def _go_on(self, gather: Gather) -> None:
        """Runs micro-batches until the job is to stop. The next one is gathered and journalled while one runs."""
        ahead: asyncio.Queue[_Ahead] = asyncio.Queue(1)
        await run_until_first_ends({"job gather": self._gather_all(gather, ahead), "job program": self._run_all(ahead)})

    async def _gather_all(self, gather: Gather, ahead: asyncio.Queue[_Ahead]) -> None:
        """Gathers and journals micro-batches; once the job is to stop, adds None behind the last."""
        number = self._place.number
        while (gathered := await self._gathered(gather)) is not None:
            number += 1
            batch = self._batch_of(number, gathered)
            await self._parts.journal.append(self.job.job_id, self.job.epoch, number, batch.encode())
            await ahead.put((batch, gathered.inputs))
        await ahead.put(None)
        await asyncio.Event().wait()  # the micro-batches that are journalled still run

    async def _gathered(self, gather: Gather) -> Gathered | None:
        """Returns the records of the next micro-batch, None once the job is to stop."""
        gathering = asyncio.create_task(gather.next(), name="job gather")
        stopping = asyncio.create_task(self._is_stopping.wait(), name="job stop")
        try:
            await asyncio.wait((gathering, stopping), return_when=asyncio.FIRST_COMPLETED)
            return None if stopping.done() else gathering.result()
        finally:
            await cancel_and_wait(gathering, stopping)

    def _batch_of(self, number: int, gathered: Gathered) -> MicroBatch:
        # A clock that is set back must not make state younger.
        self._now_us = max(self._now_us, self._parts.reads.clock.wall_ms() * 1000)
        return MicroBatch(
            number=number,
            ranges=gathered.ranges,
            idle=gathered.idle,
            now_us=self._now_us,
            output_partitions=max(self._output_partitions(), len(self._output.sequences)),
            fingerprint=self.plan_now.fingerprint,
        )

    def _output_partitions(self) -> int:
        """Returns the number of partitions of the output topic. Raises UnknownTopic once it was deleted."""
        job = self.job
        entry = self._parts.reads.index.topics().get(job.output_topic)
        if entry is None or entry.topic_id != job.output_topic_id:
            raise UnknownTopic(f"topic {job.output_topic!r}, which the job writes, was deleted", topic=job.output_topic)
        return entry.partitions

    async def _run_all(self, ahead: asyncio.Queue[_Ahead]) -> None:
        clock = self._parts.reads.clock
        checkpoint_ms = clock.monotonic_ms()
        if self._takeover.replay:
            await self._take_snapshot()  # so that a next owner need not repeat all of it once more
        while True:
            left_ms = checkpoint_ms + self._settings.sql_checkpoint_interval_ms - clock.monotonic_ms()
            # A snapshot that is being stored is waited for, by looking now and then.
            left_ms = max(left_ms, SAVING_POLL_MS if self._saving.is_set() else 0)
            try:
                async with asyncio.timeout(left_ms / 1000 if self._behind else None):
                    found = await ahead.get()
            except TimeoutError:
                pass  # nothing new, and a checkpoint is due
            else:
                if found is None:
                    break
                await self._run_batch(*found)
            is_due = clock.monotonic_ms() - checkpoint_ms >= self._settings.sql_checkpoint_interval_ms
            if self._behind and (is_due or self._behind >= CHECKPOINT_BATCHES) and not self._saving.is_set():
                checkpoint_ms = clock.monotonic_ms()
                await self._take_snapshot()
        await self._store_all()

    @property
    def _behind(self) -> int:
        """Number of micro-batches that no snapshot covers, stored or on its way."""
        covered = self._checkpoint.number if self._checkpoint is not None else 0
        if self._snapshot is not None:
            covered = self._snapshot.place.number
        return self._place.number - covered

    async def _run_batch(self, batch: MicroBatch, inputs: Mapping[str, Any]) -> None:
        self.batch = batch
        await self._output.room()
        step, records = await self._in_thread(self._step, batch, inputs)
        self._output.add(batch.number, records, batch.output_partitions, batch.now_us // 1000)
        self._place = _Place(batch.number, advanced(self._place.inputs, batch.ranges), step.watermark_us)
        self._state_bytes = step.state_bytes
        self.batch = None
        telemetry.job_steps.add(1)
        telemetry.job_rows_in.add(sum(item.records for item in batch.ranges))
        telemetry.job_rows_out.add(len(records))
        telemetry.job_late_rows.add(step.late_rows)
        telemetry.job_bad_rows.add(step.bad_rows)

    def _step(self, batch: MicroBatch, inputs: Mapping[str, Any]) -> tuple[Step, Encoded]:
        assert self._pipeline is not None and self._encoder is not None
        step = self._pipeline.step(inputs, idle=batch.idle, now_us=batch.now_us)
        return step, self._encoder.encode(step.rows)

    # ---- checkpoints

    async def _take_snapshot(self) -> None:
        """Takes the state as it is now; it is stored beside the next micro-batches."""
        assert self._pipeline is not None
        state = await self._in_thread(self._pipeline.state)
        self._snapshot = _Snapshot(place=self._place, sequences=self._output.sequences, state=state)
        self._saved.clear()
        self._saving.set()

    async def _store_all(self) -> None:
        """Stores the state of now, so that the next owner has nothing to repeat."""
        if self._saving.is_set():
            await self._saved.wait()
        stored = self._checkpoint.number if self._checkpoint is not None else 0
        if self._place.number > stored:
            await self._take_snapshot()
            await self._saved.wait()

    async def _save_all(self) -> None:
        """Stores snapshots until cancelled. Raises Fenced."""
        while True:
            await self._saving.wait()
            assert self._snapshot is not None
            await self._save(self._snapshot)
            self._snapshot = None
            self._saving.clear()
            self._saved.set()

    async def _save(self, snapshot: _Snapshot) -> None:
        checkpoints, job = self._parts.checkpoints, self.job
        await self._output.written(snapshot.sequences)
        objects = await self._until_available(
            lambda: checkpoints.write(job.job_id, job.epoch, snapshot.place.number, snapshot.state)
        )
        pointer = self._pointer(snapshot.place, snapshot.sequences, objects)
        await checkpoints.point(job.job_id, job.epoch, pointer)
        before, self._checkpoint = self._checkpoint, pointer
        telemetry.job_checkpoints.add(1)
        if before is not None:
            needed = {item.key for item in objects}
            await checkpoints.delete([item.key for item in before.objects if item.key not in needed])

    def _pointer(self, place: _Place, sequences: tuple[int, ...], objects: tuple[Any, ...]) -> Checkpoint:
        return Checkpoint(
            number=place.number,
            fingerprint=self.plan_now.fingerprint,
            inputs=place.inputs,
            sequences=sequences,
            objects=objects,
            watermark_us=place.watermark_us,
        )

    async def _until_available(self, call: Callable[[], Awaitable[T]]) -> T:
        return await until_available(call, lambda error: log.info("job %s waits: %s", self.job.job, error.message))

    # ---- the program's thread

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Returns the result of `work`, run in a thread of programs. Raises StatementTimeout."""
        return await self._parts.programs.run(
            partial(work, *arguments),
            self._interrupt,
            self._lose,
            timeout_ms=self._settings.sql_job_step_timeout_ms,
        )

    def _interrupt(self) -> None:
        if self._pipeline is not None:
            self._pipeline.interrupt()

    def _lose(self) -> None:
        self._is_lost = True

    async def _close(self) -> None:
        self._is_ready = False
        async with self._view_lock:
            pipeline, self._pipeline = self._pipeline, None
        encoder, self._encoder = self._encoder, None
        if self._is_lost:
            return  # a thread uses them; they are freed if it ever ends
        for part in (pipeline, encoder):
            if part is not None:
                await in_daemon(part.close, "job program")
