"""The producer: checks records, chooses partitions, takes room in the buffer, appends to batches, wakes the sender.

Owns: the buffer, the gRPC channels (Peers), the metadata, the topics that were written to, the order of calls that
wait. Does not own: batches once appended (accumulator.py), the tasks, timers and streams that send them (sender.py).
Invariants: records of a topic are appended in the order in which the calls were made. A record that is refused takes no
room in the buffer.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, Never, Self, Unpack

import numpy as np
from numpy.typing import NDArray
from opentelemetry import trace
from shcluster.peers import Peers
from shproto import forks
from shproto.acks import ACKS, ACKS_NAMES
from shproto.errors import AcksTooWeak, InvalidArgument, Overloaded
from shproto.rpc import Interceptors
from shruntime.urls import addresses_of

from streamhouse import tracing
from streamhouse.accumulator import RecordAccumulator
from streamhouse.core.arrow_records import ArrowRecords
from streamhouse.core.buffer_pool import BufferPool
from streamhouse.core.kafka_names import (
    explains_kafka_arguments,
    explains_kafka_methods,
    explains_kafka_names,
    refuse_arguments,
)
from streamhouse.core.options import (
    ProducerKwargs,
    ProducerOptions,
    check_timeout_s,
    check_topic_name,
    shows_options,
)
from streamhouse.core.partition_queue import PartitionQueue
from streamhouse.core.producer_batch import ProducerBatch
from streamhouse.core.record_checks import CheckedRecord, Headers, Indices, RecordColumns, check_record, cut, where
from streamhouse.core.serializers import Serializers
from streamhouse.core.sync_mismatch import AsyncContext
from streamhouse.delivery import Placed, PlacedRecords, SendFuture, SendResult, finished, send_future
from streamhouse.fair_lock import FairLock, Ticket
from streamhouse.loop_turns import TURN_S, LoopTurns, let_loop_run
from streamhouse.metadata import MetadataCache
from streamhouse.metrics import ProducerMetrics
from streamhouse.partitioner import Partitioner, choose, choose_many
from streamhouse.records import RecordMetadata
from streamhouse.retries import Retries
from streamhouse.sender import SendCounts, Sender

log = logging.getLogger(__name__)

# Bytes after which send_many takes room again and gives the event loop a turn: 4 MiB take about 30 ms to partition and
# encode.
SLICE_BYTES = 4 * 1024 * 1024


@explains_kafka_methods("Producer")
class Producer(AsyncContext):
    """Writes records. Use a producer as an async context manager: leaving waits until everything is acknowledged.

    acks: "wal" (the leader's write-ahead log, fsynced), "durable" (object store and metadata), "none" (do not wait;
    offsets are -1). idempotent: retries are written once. linger_ms, batch_bytes: time and size up to which a batch
    collects records. buffer_bytes_max: unacknowledged records beyond this limit make `send` wait. delivery_timeout_ms:
    time in which a record is retried before its future fails. key_serializer, value_serializer: called with every key
    and value that is not None, return bytes. partitioner: called with topic, key and number of partitions, returns a
    partition or None.
    trace_headers: True to give records the W3C `traceparent` of the span in which they are sent, if that is recorded.

    Raises InvalidArgument for an option out of its limits.
    A producer belongs to one event loop; `streamhouse.sync.Producer` may be shared by threads.
    """

    @explains_kafka_names("Producer")
    @shows_options(ProducerOptions)
    def __init__(
        self,
        bootstrap: str | Sequence[str],
        *,
        telemetry: Interceptors | None = None,
        **options: Unpack[ProducerKwargs],
    ) -> None:
        self._options = ProducerOptions(**options)
        tracing.tracer()  # so that `tracing.is_on` is known
        self._serializers = Serializers.of(self._options)
        addresses = addresses_of(bootstrap)
        self._peers = Peers(addresses, self._options.request_timeout_ms, telemetry)
        self._retries = Retries("delivery_timeout_ms", self._options.delivery_timeout_ms, addresses)
        self._metadata = MetadataCache(self._peers)
        self._pool: BufferPool[asyncio.Future[None]] = BufferPool(self._options.buffer_bytes_max)
        self._topics: dict[str, Partitioner] = {}
        self._order = FairLock()
        self._made_sender: Sender | None = None
        self._closed = False
        self._life: AsyncGenerator[None, None] | None = None  # since the first use

    @property
    def _sender(self) -> Sender:
        assert self._made_sender is not None, "no topic was opened"
        return self._made_sender

    async def _begin(self) -> None:
        """Makes the sender, which belongs to the running event loop from here on."""
        if self._made_sender is None:
            self._turns = LoopTurns(asyncio.get_running_loop())
            self._accumulator = RecordAccumulator(self._options)
            self._made_sender = Sender(self._options, self._peers, self._metadata, self._accumulator, self._pool)
            self._life = self._live()
            await anext(self._life)

    async def _live(self) -> AsyncGenerator[None, None]:
        """Yields once and stays suspended from the first use to the end."""
        # An event loop that ends closes the generators that are suspended in it: a producer that was not closed then
        # logs the number of records that are lost, and leaves no task behind.
        try:
            yield
        finally:
            if not self._closed:
                self._closed = True
                if lost := self.unacknowledged + self.unseen_failures:
                    log.warning("the event loop ends, and its producer was not closed: %s", not_acknowledged(lost))
                await self._disconnect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
            return
        # The body's error must not be hidden by a failed flush; a cancelled body is not made to wait.
        await self.close(flush=not issubclass(kind, (asyncio.CancelledError, KeyboardInterrupt)), raise_failures=False)

    # ---- sending

    async def send(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Headers | None = None,
        partition: int | None = None,
        timestamp_ms: int | datetime | None = None,
        **kafka: Never,
    ) -> SendFuture:
        """Appends one record and returns the future of its `RecordMetadata`. Waits only while the buffer is full, and
        gives the event loop a turn every few milliseconds.

        A record with a key goes to the key's partition as in Kafka; records without a key fill one batch together.
        headers: a dict, or pairs. timestamp_ms: milliseconds since 1970 or an aware datetime; default: now.
        Raises UnknownTopic, UnknownPartition, AcksTooWeak, BatchTooLarge (the record alone is over the limit),
        InvalidArgument (also once closed), TypeError, SerializationError, Overloaded (no room within
        delivery_timeout_ms), Unavailable.
        """
        if kafka:
            refuse_arguments("Producer.send", kafka)
        if self._serializers is not None:
            value, key = self._serializers.one(topic, value, key)
        record = check_record(value, key, headers, timestamp_ms)
        target = self._at_once(topic, partition, record[-1]) or await self._wait(topic, partition, record[-1])
        if partition is None and self._options.partitioner is not None:
            try:
                partition = self.choose_partition(topic, record[1])
            except BaseException:
                self._sender.give_back(record[-1])
                raise
        batch, index, taken_ms = self._add(target, record, partition, None)
        if batch.trace is not None:
            batch.trace.sent(index, trace.get_current_span())
        future = send_future(target.loop, batch, index, taken_ms)
        if (stood_s := self._turns.stood_s()) >= TURN_S:
            await let_loop_run(stood_s)  # behind `_add`: no later call overtakes this call meanwhile
        return future

    @explains_kafka_arguments("Producer.send_and_wait")
    async def send_and_wait(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Headers | None = None,
        partition: int | None = None,
        timestamp_ms: int | datetime | None = None,
    ) -> RecordMetadata:
        """Sends one record and waits for the acknowledgement; lingers as `send` does, for records of other tasks.
        Returns the place of the record. Raises the errors of `send`, and the error that delivery failed with."""
        return await (await self.send(topic, value, key, headers, partition, timestamp_ms))

    def choose_partition(self, topic: str, key: bytes | None) -> int | None:
        """Returns the partitioner's choice for a key of a topic that `knows`; safe from any thread. Raises TypeError,
        UnknownPartition, and the errors of the partitioner."""
        partitioner = self._options.partitioner
        assert partitioner is not None, "only called with a partitioner"
        return choose(partitioner, topic, key, len(self._topics[topic].queues))

    async def append(
        self, topic: str, record: CheckedRecord, partition: int | None, sent_s: float, caller: trace.Span | None
    ) -> tuple[ProducerBatch, int, int]:
        """Appends a record from `check_record`; asks no partitioner. Returns its batch, its position there and its
        timestamp. Raises the errors of `send`.

        sent_s: `time.monotonic` of the application's call. delivery_timeout_ms counts from there for the wait for room
        and for the delivery together: records that queue up behind a full buffer fail together, not in turn.
        caller: the span in which the application called, if spans may be recorded.
        """
        deadline_ms = sent_s * 1000 + self._options.delivery_timeout_ms
        target = self._at_once(topic, partition, record[-1])
        if target is None:
            target = await self._wait(topic, partition, record[-1], deadline_ms)
        taken = self._add(target, record, partition, deadline_ms)
        if (batch_trace := taken[0].trace) is not None:
            batch_trace.sent(taken[1], caller or trace.INVALID_SPAN)
        return taken

    def _at_once(self, topic: str, partition: int | None, size_bytes: int) -> Partitioner | None:
        """Returns the topic's partitioner, room taken, if the call need not wait; None otherwise. Raises
        UnknownPartition."""
        try:
            target = self._topics[topic]
        except (KeyError, TypeError):  # TypeError: a topic that cannot be hashed, such as a list
            return None
        if partition is not None:
            target.queue(partition)  # an unknown partition is refused before room is taken
        # Calls that wait go first, also if this record would fit; and room is taken last, so that nothing has to be
        # given back.
        if self._order.queues or self._closed or forks.lost or not self._pool.try_take(size_bytes):
            return None
        return target

    def _add(
        self, target: Partitioner, record: CheckedRecord, partition: int | None, deadline_ms: float | None
    ) -> tuple[ProducerBatch, int, int]:
        """Appends a record whose room is taken. Returns its batch, its position there and its timestamp."""
        value, key, headers, timestamp_ms, size_bytes = record
        if timestamp_ms is None:
            timestamp_ms = time.time_ns() // 1_000_000
        if partition is not None:
            queue = target.queue(partition)
        elif key is not None:
            queue = target.queue_of_key(key)
        else:
            queue = target.sticky_queue(size_bytes)
        batch, index, is_new = self._accumulator.append(
            queue, value, key, headers, timestamp_ms, size_bytes, deadline_ms
        )
        if is_new:
            self._sender.opened(queue)
        return batch, index, timestamp_ms

    @explains_kafka_arguments("Producer.send_many")
    async def send_many(
        self,
        topic: str,
        values: Sequence[Any],
        keys: Sequence[Any] | None = None,
        timestamps_ms: int | datetime | Sequence[int | datetime] | None = None,
        headers: Sequence[Headers] | None = None,
        partition: int | None = None,
    ) -> SendResult:
        """Appends many records, in the order given, and returns the future of `SentRecords` (partitions and offsets as
        arrays). The lists have an entry per record. Waits while the buffer is full.

        Nothing is sent if any record is refused; raises the errors of `send`, with the record's position.
        """
        records = self.check_many(topic, values, keys, timestamps_ms, headers)
        return SendResult(await self.append_many(topic, records, partition), loop=asyncio.get_running_loop())

    def check_many(
        self,
        topic: str,
        values: Sequence[Any],
        keys: Sequence[Any] | None,
        timestamps_ms: int | datetime | Sequence[int | datetime] | None,
        headers: Sequence[Headers] | None,
    ) -> RecordColumns:
        """Returns the checked records of a `send_many`; safe from any thread. Raises TypeError,
        InvalidArgument, BatchTooLarge, SerializationError."""
        if self._serializers is not None:
            values, keys = self._serializers.many(topic, values, keys)
        return RecordColumns.of(
            values, keys, time.time_ns() // 1_000_000 if timestamps_ms is None else timestamps_ms, headers
        )

    async def send_columns(
        self,
        topic: str,
        values: Any,
        keys: Any = None,
        *,
        timestamps_ms: Any = None,
        headers: Any = None,
        partition: int | None = None,
    ) -> SendResult:
        """Appends the records of pyarrow arrays, in the order given, and returns the future of `SentRecords`. No record
        becomes a Python object. Waits while the buffer is full; needs the extra `arrow`.

        values, keys: arrays of binary or text (UTF-8), also chunked. timestamps_ms: an array of timestamps or of
        milliseconds, or one of `send`'s for all. headers: a dict of names to bytes (for all records) or arrays (an
        entry per record), or an array of lists as `to_arrow()` of a batch has it. The arrays must not change until the
        records are sent, as Arrow's never do.

        Nothing is sent if any record is refused; raises the errors of `send`, with the record's position.
        InvalidArgument if the producer has serializers: they take objects.
        """
        records = self.check_columns(values, keys, timestamps_ms, headers)
        return SendResult(await self.append_many(topic, records, partition), loop=asyncio.get_running_loop())

    def check_columns(self, values: Any, keys: Any, timestamps_ms: Any, headers: Any) -> ArrowRecords:
        """Returns the checked records of a `send_columns`; safe from any thread. Raises TypeError, InvalidArgument,
        BatchTooLarge, MissingExtra."""
        if self._serializers is not None:
            raise InvalidArgument(
                "send_columns takes bytes, and this producer has a serializer for objects: use another producer",
                field="key_serializer, value_serializer",
                value="set",
                limit="None",
            )
        now_ms = time.time_ns() // 1_000_000
        return ArrowRecords.of(values, keys, now_ms if timestamps_ms is None else timestamps_ms, headers)

    def choose_partitions(self, topic: str, records: RecordColumns | ArrowRecords) -> NDArray[np.int64] | None:
        """Returns the partitioner's choices for records of a topic that `knows`, -1 where it makes none; None without a
        partitioner; safe from any thread. Raises the errors of `choose_partition`."""
        partitioner = self._options.partitioner
        if partitioner is None:
            return None
        return choose_many(partitioner, topic, records, len(self._topics[topic].queues))

    async def append_many(
        self,
        topic: str,
        records: RecordColumns | ArrowRecords,
        partition: int | None,
        chosen: NDArray[np.int64] | None = None,
        caller: trace.Span | None = None,
    ) -> PlacedRecords:
        """Appends the records of a `send_many` and returns their batches. chosen: the result of `choose_partitions`, if
        the caller has it already. caller: the span of the call, if not the current span."""
        check_topic_name(topic)
        caller = caller or trace.get_current_span()
        placed: list[Placed] = []
        with self._order.ticket(topic, alone=True) as ticket:
            target = await self._opened(topic, partition)
            if partition is None and chosen is None:
                chosen = self.choose_partitions(topic, records)  # of all: nothing is sent if it fails for one
            # A quarter of the buffer at a time: a list larger than the buffer passes while its first parts are
            # acknowledged.
            for start, stop in cut(records.sizes, min(SLICE_BYTES, self._options.buffer_bytes_max // 4)):
                await asyncio.sleep(0)  # the streams' turn
                await self._take_room(int(records.sizes[start:stop].sum()), ticket)
                placed.extend(self._place(target, records, start, stop, partition, chosen, caller))
        return PlacedRecords(topic, len(records), placed)

    # ---- the end

    @explains_kafka_arguments("Producer.flush")
    async def flush(self, timeout_s: float | None = None) -> None:
        """Waits until everything taken so far is acknowledged or has failed.

        Raises TimeoutError when that takes longer than timeout_s (None: no limit but delivery_timeout_ms); sending goes
        on. Else raises the first failure since the last flush that the application has not seen through a future.
        """
        check_timeout_s("timeout_s", timeout_s)
        forks.check()
        try:
            async with asyncio.timeout(timeout_s):
                await self.all_finished()
        except TimeoutError:
            text = not_acknowledged(self.unacknowledged, f"timeout_s = {timeout_s}", self.last_error)
            raise TimeoutError(text) from None
        self.raise_unseen_failure()

    async def all_finished(self) -> None:
        """Waits until everything appended so far is acknowledged or has failed; raises no failure of a batch."""
        if self._made_sender is not None:
            self._sender.flush()
            # A copy: records that are sent from now on are the business of the next flush.
            for batch in list(self._sender.unfinished):
                await finished(batch)

    def raise_unseen_failure(self) -> None:
        """Reports the first failure since the last flush that the application has not seen, by raising its error."""
        if self._made_sender is None:
            return
        failures, self._sender.failures = self._sender.failures, []
        for failure in failures:
            if not failure.seen and failure.error is not None:
                failure.seen = True
                raise failure.error

    @explains_kafka_arguments("Producer.close")
    async def close(self, timeout_s: float | None = None, *, flush: bool = True, raise_failures: bool = True) -> None:
        """Flushes (unless flush=False), then closes the connections. Raises the errors of `flush`, after closing.

        The futures of records that are not acknowledged after timeout_s fail with Unavailable.
        """
        check_timeout_s("timeout_s", timeout_s)
        forks.check()
        if self._closed:
            return
        self._closed = True
        flushed = partial(self.flush, timeout_s) if flush else None
        await close_with(flushed, lambda: self.unacknowledged, self.shut_down, raise_failures=raise_failures)

    @property
    def closed(self) -> bool:
        """True once the producer takes no more records."""
        return self._closed

    async def shut_down(self) -> None:
        """Closes the connections without a flush: records that are not acknowledged fail."""
        self._closed = True
        await self._disconnect()
        if self._life is not None:
            await self._life.aclose()

    async def _disconnect(self) -> None:
        if self._made_sender is not None:
            await self._made_sender.close()
        await self._metadata.close()
        await self._peers.close()

    def metrics(self) -> ProducerMetrics:
        """Returns counters since the producer was made and gauges of this moment."""
        counts = SendCounts() if self._made_sender is None else self._made_sender.counts
        return ProducerMetrics(
            **asdict(counts),
            records_unacknowledged=self.unacknowledged,
            buffer_used_bytes=self._pool.used_bytes,
            buffer_bytes_max=self._options.buffer_bytes_max,
        )

    @property
    def unacknowledged(self) -> int:
        """Number of records taken that are neither acknowledged nor failed."""
        return 0 if self._made_sender is None else self._made_sender.unfinished_records

    @property
    def unseen_failures(self) -> int:
        """Number of records that failed since the last flush and that the application has not asked about."""
        return sum(failure.record_count for failure in self._failures() if not failure.seen)

    @property
    def last_error(self) -> Exception | None:
        """Error of the last failed try, if no later try succeeded, or of a batch that failed unseen; None otherwise."""
        tried = None if self._made_sender is None else self._made_sender.last_error
        return tried or next((failure.error for failure in reversed(self._failures()) if not failure.seen), None)

    def _failures(self) -> list[ProducerBatch]:
        """Returns the batches that failed since the last flush."""
        return [] if self._made_sender is None else self._made_sender.failures

    # ---- topics and partitions

    def knows(self, topic: str, partition: int | None) -> bool:
        """Returns True if `send` would find topic and partition without a request; safe from any thread."""
        try:
            target = self._topics.get(topic)
        except TypeError:  # cannot be hashed; `open_topic` refuses the name
            return False
        return target is not None and (partition is None or 0 <= partition < len(target.queues))

    async def open_topic(self, topic: str, partition: int | None = None) -> None:
        """Fetches the topic ahead of the first `send`. Raises UnknownTopic, UnknownPartition, AcksTooWeak."""
        check_topic_name(topic)
        await self._opened(topic, partition)

    async def _opened(self, topic: str, partition: int | None) -> Partitioner:
        """Returns the topic's partitioner. Raises UnknownTopic, UnknownPartition, AcksTooWeak, Unavailable."""
        target = self._topics.get(topic) or await self._open_topic(topic)
        if partition is not None:
            target.queue(partition)
        return target

    async def _open_topic(self, topic: str) -> Partitioner:
        self._must_be_open()
        # The first contact waits for a coordinator that is about to start, as long as a record may wait.
        state = await self._retries.run(lambda: self._metadata.topic(topic))
        # Acks ascend in strength: none, wal, durable.
        if ACKS[self._options.acks] < state.min_acks:
            weakest = ACKS_NAMES.get(state.min_acks, str(state.min_acks))
            raise AcksTooWeak(
                f"topic {topic!r} wants acks {weakest} at least, not {self._options.acks}",
                acks=self._options.acks,
                min_acks=weakest,
            )
        self._must_be_open()
        await self._begin()
        # Two first calls may have asked side by side: both must get the same partitioner, or a partition would have two
        # queues.
        return self._topics.setdefault(topic, Partitioner(state, self._accumulator, self._options.batch_bytes))

    def _place(
        self,
        target: Partitioner,
        records: RecordColumns | ArrowRecords,
        start: int,
        stop: int,
        partition: int | None,
        chosen: NDArray[np.int64] | None,
        caller: trace.Span,
    ) -> list[Placed]:
        """Appends records start to stop, grouped by partition. Returns the batches and positions that they got."""
        if partition is not None:
            return self._extend(target.queues[partition], records, range(start, stop), caller)
        if not records.has_keys and chosen is None:
            queue = target.sticky_queue_for_all(int(records.sizes[start:stop].sum()))
            if queue is not None:  # grouping them would cost more than all the rest
                return self._extend(queue, records, range(start, stop), caller)
        partitions = target.partitions(records, start, stop, chosen)
        # Stable: records of a partition keep the order of the list.
        order = np.argsort(partitions, kind="stable")
        numbers, firsts = np.unique(partitions[order], return_index=True)
        groups = np.split(order + start, firsts[1:])
        return [
            placed
            for number, indices in zip(numbers.tolist(), groups, strict=True)
            for placed in self._extend(target.queues[number], records, indices, caller)
        ]

    def _extend(
        self, queue: PartitionQueue, records: RecordColumns | ArrowRecords, indices: Indices, caller: trace.Span
    ) -> list[Placed]:
        """Appends records to one partition. Returns the batches and positions that they got. `indices` are ascending,
        so that the partition keeps the order given."""
        begun = queue.open_batch.size_bytes if queue.open_batch is not None else 0
        sizes = records.sizes[where(indices)]
        placed = []
        for start, stop in cut(sizes, self._options.batch_bytes, begun):
            part = indices[start:stop]
            batch, first, is_new = self._accumulator.extend(queue, records, part, int(sizes[start:stop].sum()))
            if batch.trace is not None:  # before the next part: the batch may be full and go
                batch.trace.sent(first, caller)
            if is_new:
                self._sender.opened(queue)
            placed.append(Placed(batch, first, part))
        return placed

    # ---- turns and room

    async def _wait(
        self, topic: str, partition: int | None, size_bytes: int, deadline_ms: float | None = None
    ) -> Partitioner:
        """Returns the topic's partitioner once room is taken, behind all calls made before. Raises the errors of
        `send`.

        The caller appends its record without a further await: the next call has the turn by then.
        """
        check_topic_name(topic)
        with self._order.ticket(topic, alone=False) as ticket:
            target = await self._opened(topic, partition)
            await self._take_room(size_bytes, ticket, deadline_ms)
        return target

    async def _take_room(self, size_bytes: int, ticket: Ticket, deadline_ms: float | None = None) -> None:
        """Waits until the call has the turn, and takes room. Raises Overloaded at deadline_ms of the event loop's
        clock (None: delivery_timeout_ms from now), InvalidArgument once closed."""
        forks.check()
        self._must_be_open()
        if not ticket.granted or not self._pool.try_take(size_bytes):
            try:
                # One deadline for the turn and the room together: otherwise a thousand calls behind a full buffer would
                # time out in turn, each after the call before.
                if deadline_ms is None:
                    deadline_ms = self._accumulator.deadline_ms()
                async with asyncio.timeout_at(deadline_ms / 1000):
                    await ticket.wait()
                    if not self._pool.try_take(size_bytes):
                        await self._wait_for_room(size_bytes)
            except TimeoutError:
                raise self._no_room(size_bytes) from None
            self._must_be_open(size_bytes)

    async def _wait_for_room(self, size_bytes: int) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pool.enqueue(waiter, size_bytes)
        self._sender.flush()
        try:
            await waiter
        except BaseException:
            left = self._pool.leave(waiter)
            self._sender.give_back(0 if left else size_bytes)  # in both cases the calls behind may have room now
            raise

    def _no_room(self, size_bytes: int) -> Overloaded:
        limit = self._options.buffer_bytes_max
        return Overloaded(
            f"no room for {size_bytes} bytes within delivery_timeout_ms = {self._options.delivery_timeout_ms}: "
            f"{self._pool.used_bytes} of buffer_bytes_max = {limit} are not acknowledged yet",
            field="buffer_bytes_max",
            limit=limit,
            value=self._pool.used_bytes,
        )

    def _must_be_open(self, taken_bytes: int = 0) -> None:
        """Refuses records once the producer is closed, and gives back the bytes taken for them: they would never be
        sent. Raises InvalidArgument."""
        if self._closed:
            if taken_bytes:
                self._sender.give_back(taken_bytes)
            raise InvalidArgument("the producer is closed", field="producer", value="closed")


async def close_with(
    flush: Callable[[], Awaitable[None]] | None,
    unacknowledged: Callable[[], int],
    shut_down: Callable[[], Awaitable[None]],
    *,
    raise_failures: bool,
) -> None:
    """Flushes (unless `flush` is None), then shuts down in any case; closes producers of both kinds. Raises the error
    of `flush` after shutting down, or logs it if not `raise_failures`. Logs how many records are dropped silently."""
    is_reported = False
    try:
        if flush is not None:
            await flush()
    except Exception as error:
        is_reported = True
        if raise_failures:
            raise
        log.warning("closing the producer: %s", error)
    finally:
        dropped = unacknowledged()
        if dropped and not is_reported:
            log.warning("the producer is closed without a flush: %s", not_acknowledged(dropped))
        await shut_down()


def not_acknowledged(count: int, within: str = "", error: BaseException | None = None) -> str:
    """Returns the sentence on `count` records for errors and warnings."""
    text = "1 record is not acknowledged" if count == 1 else f"{count:,} records are not acknowledged"
    text += f" within {within}" if within else ""
    return text if error is None else f"{text}; the last error: {error}"
