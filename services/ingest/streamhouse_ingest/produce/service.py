"""Produce: checks a request, passes its batch to the writer, waits for the requested ack level.

Owns: pending requests until they are answered, with their deadlines and spans. Does not own: the queue and the order
of appends (writer.py), the rules for requests (request_rules.py), the registration of logs.
Invariants: batches accepted one after another are queued in that order. A durable acknowledgement is given only after
the batch, or the original that it repeats, is registered. A timeout never reports that a batch was not written.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from shformat import BatchHeader
from shproto.errors import (
    UNKNOWN,
    DataLoss,
    DurableTimeout,
    StreamHouseError,
    Unavailable,
)
from shproto.rpc import caller_connection
from shproto.v1 import ingest_pb2 as pb
from shproto.v1 import types_pb2
from shruntime.clock import Clock
from shruntime.tasks import done_within
from shruntime.telemetry import context_of, current_traceparent

from streamhouse_ingest.log.logs import HeldLog, Logs, not_leader
from streamhouse_ingest.log.partition_log import PartitionLog
from streamhouse_ingest.metrics import IngestMetrics
from streamhouse_ingest.produce.leaders import leading_log
from streamhouse_ingest.produce.request_rules import RequestRules
from streamhouse_ingest.produce.topics import TopicLookup
from streamhouse_ingest.produce.writer import Append, Writer, Written
from streamhouse_ingest.settings import IngestSettings

tracer = trace.get_tracer("streamhouse.ingest")

# Interval of asking the coordinator for the registration of a durable retry's original in the range of another agent.
_ASK_AGAIN_MS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingProduce:
    """A request whose batch is queued; `answer_by_ms` is on the monotonic clock. The request itself is not held: its
    copy of the batch would stay in memory until the answer, for seconds with `durable` acks."""

    topic: str
    partition: int
    held: HeldLog
    header: BatchHeader
    acks: int
    timeout_ms: int
    answer_by_ms: int
    written: asyncio.Future[Written | StreamHouseError] | None
    span: trace.Span


class ProduceService:
    """Answers produce requests. RequestRules validates them, the writer appends their batches."""

    def __init__(
        self,
        logs: Logs,
        writer: Writer,
        topics: TopicLookup,
        clock: Clock,
        settings: IngestSettings,
        metrics: IngestMetrics,
        rules: RequestRules,
    ) -> None:
        self._logs = logs
        self._writer = writer
        self._topics = topics
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._rules = rules

    async def produce(self, request: pb.ProduceRequest) -> pb.ProduceResponse:
        """Returns the response at the requested ack level. Raises the StreamHouseErrors of docs/errors.md."""
        return await self.answer(await self.accept(request))

    async def accept(self, request: pb.ProduceRequest) -> PendingProduce:
        """Checks the request, queues its batch and returns it for answer(). Batches accepted one after another are
        written in that order. Raises the error that refuses the request."""
        with self._counting_refusals():
            return await self._accept(request)

    @contextlib.contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except StreamHouseError as error:
            self._metrics.rejected.add(1, {"reason": error.reason})
            raise

    async def _accept(self, request: pb.ProduceRequest) -> PendingProduce:
        held = await leading_log(self._logs, self._topics, request)
        acks = self._rules.acks(request, held)
        connection = caller_connection()
        sequenced = request.HasField("sequenced_batch")
        if sequenced:
            batch = request.sequenced_batch
        else:
            batch = request.batch if request.HasField("batch") else await self._rules.encode(request, connection)
        # Before anything is queued: the writer, whose group others wait for, decides on batches that are known to be
        # valid.
        header = await self._rules.validate(batch, connection)
        self._rules.check_timestamp(header)
        self._rules.check_producer(header, sequenced=sequenced)
        timeout_ms = request.timeout_ms or self._settings.produce_timeout_ms
        written = None if acks == types_pb2.ACKS_NONE else asyncio.get_running_loop().create_future()
        # The log may have stopped leading during the awaits above: the writer's draft decides again, and refuses with
        # NotLed.
        span, traceparent = _start_span(held, request.trace_context)
        durable = acks == types_pb2.ACKS_DURABLE
        try:
            self._writer.submit(
                Append(
                    held,
                    header,
                    batch,
                    durable=durable,
                    sequenced=sequenced,
                    traceparent=traceparent,
                    written=written,
                )
            )
        except StreamHouseError:
            # `answer`, which ends the span otherwise, is not called for a refused request.
            span.end()
            raise
        answer_by_ms = self._clock.monotonic_ms() + timeout_ms
        return PendingProduce(
            topic=request.topic,
            partition=request.partition,
            held=held,
            header=header,
            acks=acks,
            timeout_ms=timeout_ms,
            answer_by_ms=answer_by_ms,
            written=written,
            span=span,
        )

    async def answer(self, pending: PendingProduce) -> pb.ProduceResponse:
        """Returns the response once the ack level is reached.

        Raises the error that refused the batch, DurableTimeout, Unavailable, and DataLoss if the batch repeats a batch
        that was declared lost, or was damaged before its registration.
        """
        with self._counting_refusals(), trace.use_span(pending.span, end_on_exit=True):
            return await self._answer(pending)

    async def _answer(self, pending: PendingProduce) -> pb.ProduceResponse:
        log = pending.held.log
        response = pb.ProduceResponse(
            topic=log.topic,
            partition=log.key.partition,
            epoch=log.key.epoch,
            base_offset=-1,
            record_count=pending.header.record_count,
        )
        if pending.written is None:
            return response
        written = await self._wait_written(pending, pending.written)
        if pending.acks == types_pb2.ACKS_DURABLE:
            await self._wait_durable(pending, written)
        response.base_offset = written.base_offset
        response.duplicate = written.duplicate
        return response

    async def _wait_written(
        self, pending: PendingProduce, written: asyncio.Future[Written | StreamHouseError]
    ) -> Written:
        # The batch is not taken back: it may be in the file already, so its outcome is unknown.
        if not await self._done_in_time(pending, written):
            raise Unavailable(
                f"not written within {pending.timeout_ms} ms; the outcome is unknown", timeout_ms=pending.timeout_ms
            )
        outcome = written.result()
        if isinstance(outcome, StreamHouseError):
            raise outcome
        return outcome

    async def _wait_durable(self, pending: PendingProduce, written: Written) -> None:
        held, log = self._holder(written), written.held.log
        if held is None:
            if log.start_offset <= written.base_offset and written.end_offset <= log.registered_end:
                _check_kept(log, written)
                return  # not held any more because the whole log is registered
            if not written.duplicate:
                why = "its range is over; whether the batch is kept is unknown"
                raise not_leader(log.topic, log.key.partition, why, outcome=UNKNOWN)
            await self._wait_registered_elsewhere(pending, written)
            return
        registered = held.wait_registered(written.end_offset)
        try:
            if not await self._done_in_time(pending, registered):
                raise _durable_timeout(pending, held.log, written)
        finally:
            registered.cancel()  # after a timeout the log can drop the wait; no effect on a future that is done
        if (error := registered.result()) is not None:
            raise error
        _check_kept(held.log, written)

    async def _wait_registered_elsewhere(self, pending: PendingProduce, written: Written) -> None:
        """Waits until the original, which lies in an older range, is registered. Raises DurableTimeout, DataLoss,
        NotLeader.

        The range may be orphaned, of an agent whose disk is gone, so that having been written there once is not enough
        for a durable acknowledgement.
        """
        log = written.held.log
        # The coordinator is asked: events of a range whose log is not held here change nothing.
        while not await self._topics.is_registered(log, written.base_offset):
            left_ms = pending.answer_by_ms - self._clock.monotonic_ms()
            if left_ms <= 0:
                raise _durable_timeout(pending, log, written)
            await self._clock.sleep_ms(min(left_ms, _ASK_AGAIN_MS))

    def _holder(self, written: Written) -> HeldLog | None:
        """Returns the log that holds the batch, None if no log does. The original of a duplicate may lie in an older
        epoch."""
        log = written.held.log
        for held in self._logs.of_partition(log.key.topic_id, log.key.partition):
            if held.log.start_offset <= written.base_offset < held.log.next_offset:
                return held
        return None

    async def _done_in_time(self, pending: PendingProduce, future: asyncio.Future[Any]) -> bool:
        return await done_within(self._clock, future, pending.answer_by_ms - self._clock.monotonic_ms())


def _check_kept(log: PartitionLog, written: Written) -> None:
    """Checks that a batch below the registered end was not lost: everything below is registered, or recorded as lost.
    Raises DataLoss."""
    if log.is_damaged(written.base_offset):
        raise DataLoss(
            f"{log.describe()}: the batch at offset {written.base_offset} was damaged in the write-ahead log before it "
            "was in the object store",
            topic=log.topic,
            partition=log.key.partition,
            base_offset=written.base_offset,
            end_offset=written.end_offset,
        )


def _durable_timeout(pending: PendingProduce, log: PartitionLog, written: Written) -> DurableTimeout:
    return DurableTimeout(
        f"{log.describe()}: offset {written.base_offset} is in a write-ahead log, but was not registered within "
        f"{pending.timeout_ms} ms",
        base_offset=written.base_offset,
        timeout_ms=pending.timeout_ms,
    )


def _start_span(held: HeldLog, trace_context: str) -> tuple[trace.Span, str]:
    """Returns the span `ingest.append` and its traceparent if the span of the producer or of the call is recorded;
    otherwise an invalid span and an empty text."""
    if not trace_context and not trace.get_current_span().is_recording():
        return trace.INVALID_SPAN, ""
    span = tracer.start_span("ingest.append", context_of(trace_context) if trace_context else None)
    span.set_attribute("messaging.destination.name", held.log.topic)
    span.set_attribute("messaging.destination.partition.id", str(held.log.key.partition))
    with trace.use_span(span):
        return span, current_traceparent()
