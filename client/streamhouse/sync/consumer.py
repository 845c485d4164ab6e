"""The consumer for plain code: `streamhouse.Consumer` without `await`, for any number of threads.

Owns: a worker for each thread that reads, the lock by which threads take turns, consumers that have to leave their
groups before the process ends. Does not own: state of the event loop's thread.
Invariants: the event loop's thread never waits for a lock of this module. Each thread's interrupted record is handed
over again.
"""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Self, TypeVar, Unpack

from opentelemetry import trace
from shproto.errors import SerializationError
from shproto.rpc import Interceptors

from streamhouse import consumer
from streamhouse.assignments import Callbacks, PlainCallback, callbacks_of
from streamhouse.background import BACKGROUND
from streamhouse.core.in_flight import Worker
from streamhouse.core.kafka_names import explains_kafka_arguments, explains_kafka_methods, explains_kafka_names
from streamhouse.core.lag import Lag
from streamhouse.core.options import (
    POLL_BATCHES_RECORDS_MAX,
    POLL_RECORDS_MAX,
    ConsumerKwargs,
    Start,
    check_poll,
    check_timeout_ms,
)
from streamhouse.core.serializers import records_of_poll
from streamhouse.core.subscription import Topics, subscription_of
from streamhouse.core.sync_mismatch import PlainContext, PlainIteration
from streamhouse.metrics import ConsumerMetrics
from streamhouse.records import (
    MembershipState,
    OffsetAndMetadata,
    Record,
    RecordBatch,
    TopicPartition,
)

T = TypeVar("T")

# Limit for the last commits and for leaving the groups when the process ends: a coordinator that answers takes
# milliseconds, and an unreachable coordinator must not keep the process from ending.
EXIT_TIMEOUT_MS = 5_000


@explains_kafka_methods("Consumer")
class Consumer(PlainContext, PlainIteration):
    """Reads records; `streamhouse.Consumer` explains the options and the time of commits. Several threads may iterate
    over one consumer: each record goes to a single thread, which has processed the record when the thread asks for its
    next record.

    on_assigned, on_revoked and on_lost are plain functions, called in the thread that asks for records, starts,
    subscribes or closes. The records in hand of that thread then count as processed, and a callback may call the
    consumer.
    """

    @explains_kafka_names("Consumer")
    def __init__(
        self,
        bootstrap: str | Sequence[str],
        topics: Topics = (),
        *,
        pattern: str | None = None,
        assign: Sequence[tuple[str, int]] = (),
        on_assigned: PlainCallback | None = None,
        on_revoked: PlainCallback | None = None,
        on_lost: PlainCallback | None = None,
        telemetry: Interceptors | None = None,
        **options: Unpack[ConsumerKwargs],
    ) -> None:
        callbacks_of(Callbacks(on_assigned, on_revoked, on_lost), plain=True)
        self._inner = consumer.Consumer(
            bootstrap,
            topics,
            pattern=pattern,
            assign=assign,
            on_assigned=on_assigned,
            on_revoked=on_revoked,
            on_lost=on_lost,
            telemetry=telemetry,
            **options,
        )
        self._assignments = self._inner._assignments
        self._iteration = self._inner._iteration
        self._deserializers = self._inner._deserializers
        self._iteration.in_loop = _in_loop
        self._take = self._iteration.take
        self._workers = threading.local()  # by thread; not by its number, which a later thread may get
        self._taking = threading.Lock()  # one thread at a time inside `take`
        self._advancing = threading.Lock()  # one thread at a time waits for records; the others find them

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._close(done_with_last=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(done_with_last=kind is None)

    def start(self) -> None:
        """Joins the group, or opens the partitions. Returns once the position at which reading begins is known for each
        of them and on_assigned has returned. Iterating starts the consumer as well. Idempotent.

        Raises UnknownTopic, UnknownPartition, InvalidArgument, Unavailable, RuntimeError in a forked child.
        """
        self._assignments.refuse_inside("start")
        if not self._inner._closed:
            _opened(self)
        BACKGROUND.run(self._inner._start())
        self._call_due()

    @explains_kafka_arguments("Consumer.subscribe")
    def subscribe(
        self,
        topics: Topics = (),
        *,
        pattern: str | None = None,
        on_assigned: PlainCallback | None = None,
        on_revoked: PlainCallback | None = None,
        on_lost: PlainCallback | None = None,
    ) -> None:
        """Reads these topics instead of the earlier ones: names, or a pattern that has to match the whole name, also of
        topics created later. Raises InvalidArgument, UnknownTopic (then nothing has changed), Unavailable, and the
        error of a callback; see `streamhouse.Consumer.subscribe`."""
        subscription = subscription_of(topics, pattern)
        callbacks = callbacks_of(Callbacks(on_assigned, on_revoked, on_lost), plain=True)
        self._assignments.refuse_inside("subscribe")
        BACKGROUND.run(self._inner._subscribe(self._worker(), subscription, callbacks))
        self._finish_revocation()
        BACKGROUND.run(self._inner._await_subscription())
        self._call_due()

    def unsubscribe(self) -> None:
        """Reads nothing until the next `subscribe`: revokes all partitions, with on_revoked, and leaves the group. The
        records in hand of the calling thread count as processed and are committed with auto_commit.

        Raises the error of that commit or of a callback; the consumer is unsubscribed all the same.
        """
        self._assignments.refuse_inside("unsubscribe")
        refusal = BACKGROUND.run(self._inner._unsubscribe(self._worker()))
        try:
            self._finish_revocation()
        finally:
            BACKGROUND.run(self._inner._step_out_of_group())
        if refusal is not None:
            raise refusal

    def _finish_revocation(self) -> None:
        """Returns once the callbacks for all revoked and lost partitions have returned."""
        while not BACKGROUND.run(self._assignments.wait_revoked()):
            self._call_due()

    def _call_due(self) -> None:
        """Calls the callbacks that are due, in this thread. Raises the error of a callback; the hand-over continues."""
        thread = threading.current_thread()
        # After Ctrl-C between two steps of this loop the thread gets the same step again: its callback is called once,
        # and the step finished once the callback was called.
        while self._has_call:
            step = BACKGROUND.run(self._assignments.begin(thread))
            if step is None:
                return
            try:
                if self._assignments.called is not step:
                    self._assignments.call_plainly(step)
            finally:
                if self._assignments.called is step:
                    BACKGROUND.run(_call(functools.partial(self._assignments.finish, step)))

    @property
    def _has_call(self) -> bool:
        """True if a callback has to be called before anything else."""
        return self._assignments.is_due or self._assignments.caller is threading.current_thread()

    def __iter__(self) -> Self:
        self._iteration.begin()
        return self

    def __next__(self) -> Record:
        try:
            # Cheaper than a test while the attribute is there, and this runs for every record.
            worker: Worker = self._workers.worker
        except AttributeError:
            worker = self._worker()
        worker.held = None
        try:
            while True:
                with self._taking:
                    record = self._take(worker)
                if record is not None:
                    return record if self._deserializers is None else self._deserializers.record(record)
                if not self._advance(worker):
                    raise StopIteration
        except SerializationError:
            raise  # the record stays in hand as if handed over: the next call continues behind it
        except BaseException:
            self._give_back(worker)
            raise

    def batches(self) -> "BatchIterator":
        """Returns an iterator of records as columns: each `RecordBatch` has records of one partition."""
        self._iteration.begin()
        return BatchIterator(self)

    def _next_batch(self) -> RecordBatch:
        worker = self._worker()
        worker.held = None
        try:
            while True:
                with self._taking:
                    batch = self._iteration.take_batch(worker)
                if batch is not None:
                    return batch
                if not self._advance(worker):
                    raise StopIteration
        except BaseException:
            self._give_back(worker)
            raise

    def processing(self, records: Record | RecordBatch) -> contextlib.AbstractContextManager[trace.Span]:
        """Returns a context manager in which a `process` span is current; see `streamhouse.Consumer.processing`."""
        return self._inner.processing(records)

    @explains_kafka_arguments("Consumer.poll")
    def poll(self, timeout_ms: int = 0, max_records: int = POLL_RECORDS_MAX) -> dict[TopicPartition, list[Record]]:
        """Returns received records by partition, at most max_records; empty if none arrive within timeout_ms, or at the
        end of a bounded read (`at_end`). The records of the thread's previous poll count as processed. Raises as
        iterating does; InvalidArgument once the consumer is closed."""
        return self._polled(timeout_ms, max_records, self._records_of)

    @explains_kafka_arguments("Consumer.poll_batches")
    def poll_batches(
        self, timeout_ms: int = 0, max_records: int = POLL_BATCHES_RECORDS_MAX
    ) -> dict[TopicPartition, list[RecordBatch]]:
        """Returns records as `poll` does, but as columns: for each partition a list of `RecordBatch`."""
        return self._polled(timeout_ms, max_records, lambda worker, polled: polled)

    def _records_of(
        self, worker: Worker, polled: dict[TopicPartition, list[RecordBatch]]
    ) -> dict[TopicPartition, list[Record]]:
        return records_of_poll(self._deserializers, polled, functools.partial(self._give_back, worker))

    def _polled(
        self, timeout_ms: int, max_records: int, shape: Callable[[Worker, dict[TopicPartition, list[RecordBatch]]], T]
    ) -> T:
        check_poll(timeout_ms, max_records)
        worker = self._worker()
        worker.held = None
        try:
            return shape(worker, self._poll(worker, time.monotonic() + timeout_ms / 1000, max_records))
        except SerializationError:
            raise  # its record stays in hand, as in `__next__`
        except BaseException:
            self._give_back(worker)
            raise

    def _poll(self, worker: Worker, deadline_s: float, left: int) -> dict[TopicPartition, list[RecordBatch]]:
        polled: dict[TopicPartition, list[RecordBatch]] = {}
        while left:
            with self._taking:
                batch = self._iteration.take_batch(worker, left)
            if batch is not None:
                polled.setdefault(TopicPartition(batch.topic, batch.partition), []).append(batch)
                left -= len(batch)
            elif not (BACKGROUND.run(self._bring()) if polled else self._advance_within(worker, deadline_s)):
                break
        return polled

    async def _bring(self) -> bool:
        return self._iteration.bring()

    def _advance_within(self, worker: Worker, deadline_s: float) -> bool:
        """Advances as `_advance` does; returns False also if no record arrives by the deadline (of time.monotonic)."""
        if not self._inner._closed:
            _opened(self)
        self._assignments.refuse_inside("reading")
        self._call_due()
        # Without the lock of `_advance`: Ctrl-C during a wait for a lock with a timeout may leave the lock taken.
        return BACKGROUND.run(self._wait(worker, deadline_s))

    async def _wait(self, worker: Worker, deadline_s: float | None = None) -> bool:
        """Waits like `_advance`, without callbacks: the calling thread has called them."""
        if deadline_s is not None:
            self._inner._refuse_closed()
        await self._inner._enter()
        return await self._inner._wait_for_more(worker, _loop_time(deadline_s))

    @property
    def at_end(self) -> bool:
        """True once a bounded read (`end`, `stop_at_end`) has handed over everything up to its end."""
        return self._inner.at_end

    def _worker(self) -> Worker:
        """Returns the worker of the calling thread."""
        try:
            worker: Worker = self._workers.worker
        except AttributeError:
            worker = self._workers.worker = self._inner._in_flight.worker(threading.current_thread())
        return worker

    def _advance(self, worker: Worker) -> bool:
        """Waits for more records, one thread at a time; threads behind the first find the records received
        meanwhile."""
        self._assignments.refuse_inside("reading")
        self._call_due()  # without the lock: other threads continue with records of other partitions
        with self._advancing:
            if self._inner._closed:
                return False
            _opened(self)
            return self._iteration.is_ready or BACKGROUND.run(self._wait(worker))

    def _give_back(self, worker: Worker, first: Mapping[TopicPartition, int] | None = None) -> None:
        """Takes back records that have not reached the application, as `InFlight.give_back` does: after an error, or
        Ctrl-C, which may come between any two steps."""
        with self._taking:
            self._iteration.give_back(worker, first)

    @explains_kafka_arguments("Consumer.committed")
    def committed(
        self, partitions: Sequence[tuple[str, int]] | None = None
    ) -> dict[TopicPartition, OffsetAndMetadata | None]:
        """Returns the group's committed position in each of these partitions, assigned or not, or in all assigned
        partitions; None where nothing is committed. Raises InvalidArgument without a group, UnknownTopic,
        UnknownPartition, Unavailable."""
        return BACKGROUND.run(self._inner.committed(partitions))

    @explains_kafka_arguments("Consumer.commit")
    def commit(self, offsets: Mapping[tuple[str, int], int | OffsetAndMetadata] | None = None) -> None:
        """Stores the position at which the group continues: behind all processed records, the record in hand of the
        calling thread included; or the `offsets` given, with metadata if they are `OffsetAndMetadata`. Raises
        InvalidArgument without a group, IllegalGeneration if a partition was revoked, Unavailable."""
        BACKGROUND.run(self._inner._commit(self._worker(), offsets))

    def seek(self, topic: str, partition: int, offset: Start) -> None:
        """Continues at `offset`, an end of the log, or a time. Raises InvalidArgument if the partition is not
        assigned."""
        BACKGROUND.run(self._inner.seek(topic, partition, offset))

    def seek_to_beginning(self, partitions: Sequence[tuple[str, int]] | None = None) -> None:
        """Continues at the first record that still exists, in these or all assigned partitions. Raises as `seek` does;
        then nothing has moved."""
        BACKGROUND.run(self._inner.seek_to_beginning(partitions))

    def seek_to_end(self, partitions: Sequence[tuple[str, int]] | None = None) -> None:
        """Continues behind the last acknowledged record, in these or all assigned partitions. Raises as `seek` does;
        then nothing has moved."""
        BACKGROUND.run(self._inner.seek_to_end(partitions))

    def seek_to_timestamp(
        self, timestamp_ms: int | datetime, partitions: Sequence[tuple[str, int]] | None = None
    ) -> None:
        """Continues at the first record, by offset, that is at least as late as `timestamp_ms` (since 1970-01-01 UTC,
        or a datetime with a time zone), in these or all assigned partitions; at the end of a partition without such a
        record. Raises as `seek` does; then nothing has moved."""
        BACKGROUND.run(self._inner.seek_to_timestamp(timestamp_ms, partitions))

    def pause(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Hands over no records of these partitions, and fetches none, until `resume`. A thread that asks at the same
        moment may still get a record. Raises InvalidArgument if a partition is not assigned; then none is paused."""
        BACKGROUND.run(_call(lambda: self._inner.pause(partitions)))

    def resume(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Continues paused partitions where they stopped, or where a `seek` has moved them. Raises InvalidArgument if a
        partition is not assigned; then none is resumed."""
        BACKGROUND.run(_call(lambda: self._inner.resume(partitions)))

    def paused(self) -> frozenset[TopicPartition]:
        """Returns the assigned partitions that are paused."""
        return self._inner.paused()

    def lag(self) -> dict[TopicPartition, Lag]:
        """Returns the number of records still to be handed over, for each partition; `Lag.exact` says when it is
        exact."""
        return BACKGROUND.run(self._inner.lag())

    def metrics(self) -> ConsumerMetrics:
        """Returns counters since the consumer was made and gauges of this moment; sends no request, unlike `lag`."""
        with self._taking:
            return self._inner.metrics()

    def positions(self) -> dict[TopicPartition, int]:
        """Returns the next offset to be handed over, for each partition."""
        return self._inner.positions()

    @property
    def assignment(self) -> frozenset[TopicPartition]:
        """Partitions being read, or revoked while on_revoked has not returned."""
        return self._inner.assignment

    def wait_for_assignment(self, timeout_ms: int | None = None) -> frozenset[TopicPartition]:
        """Returns the assignment as soon as the position at which reading begins is known for at least one partition;
        starts the consumer. Raises TimeoutError after timeout_ms (None: never), InvalidArgument once the consumer is
        closed, else as iterating does."""
        if timeout_ms is not None:
            check_timeout_ms(timeout_ms)
        if not self._inner._closed:
            _opened(self)
        deadline_s = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        BACKGROUND.run(self._wait_for_assignment(timeout_ms, deadline_s))
        while not self._inner._is_reading:
            self._call_due()
            BACKGROUND.run(self._wait_for_assignment(timeout_ms, deadline_s))
        return self.assignment

    async def _wait_for_assignment(self, timeout_ms: int | None, deadline_s: float | None) -> None:
        await self._inner._wait_for_assignment(timeout_ms, _loop_time(deadline_s))

    @property
    def membership(self) -> MembershipState | None:
        """State of the consumer in its group; None without a group, and for partitions given by `assign`."""
        return self._inner.membership

    @property
    def waiting(self) -> Mapping[TopicPartition, str]:
        """Partitions that cannot be read on at the moment, each with the server's reason."""
        return dict(self._inner.waiting)  # a copy: the loop's thread goes on changing the original

    @explains_kafka_arguments("Consumer.close")
    def close(self, timeout_s: float | None = None) -> None:
        """Commits (with auto_commit), revokes the partitions, with on_revoked, leaves the group, then closes the
        connections.

        Raises TimeoutError if closing takes longer than timeout_s (None: only the options' limits apply), the error of
        a callback, or the error of the last commit; everything is closed all the same. timeout_s does not limit a
        callback, but after a callback that was too slow nothing is waited for.
        """
        self._close(timeout_s, done_with_last=True)

    def _close(self, timeout_s: float | None = None, *, done_with_last: bool) -> None:
        try:
            self._assignments.refuse_inside("close")
            begin = self._inner._begin_close(self._worker(), timeout_s, done_with_last=done_with_last)
            closing = BACKGROUND.run(begin)
            if closing is None:
                return
            try:
                while self._has_call or BACKGROUND.run(self._other_calls()):
                    try:
                        self._call_due()
                    except Exception as error:  # noqa: BLE001 - raised once everything is closed
                        closing.errors.insert(0, error)
            except BaseException:
                BACKGROUND.run(self._inner._shut_down())
                raise
            BACKGROUND.run(self._inner._end_close(closing))
        finally:
            _UNCLOSED.discard(self)  # closed even if an error is raised

    async def _other_calls(self) -> bool:
        """Returns True if a callback is due, once no other thread is inside a callback."""
        await self._assignments.idle()
        return self._assignments.is_due


class BatchIterator(PlainIteration, Iterator[RecordBatch]):
    """Iterator of `Consumer.batches`. A timeout or Ctrl-C ends a single wait, not the iteration."""

    def __init__(self, owner: Consumer) -> None:
        self._consumer = owner

    def __next__(self) -> RecordBatch:
        return self._consumer._next_batch()


# Consumers that were used and are not closed.
_UNCLOSED: set[Consumer] = set()


def _opened(used: Consumer) -> None:
    """Has the consumer closed before the process ends."""
    _UNCLOSED.add(used)
    _close_before_end()


@functools.cache
def _close_before_end() -> None:
    """Registers the end of consumers once, on first use: consumers end after producers, which may still write results
    of records that consumers have read."""
    BACKGROUND.before_end(_leave_at_exit)


def _leave_at_exit() -> None:
    """Closes the consumers that are not closed: commits processed records, and leaves the groups, so that other members
    need not wait for a session to expire. Threads that still iterate come to the end."""
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C skips the wait
        BACKGROUND.run(_leave(list(_UNCLOSED)))


async def _leave(consumers: Sequence[Consumer]) -> None:
    with contextlib.suppress(TimeoutError):  # the groups notice by the session timeout
        async with asyncio.timeout(EXIT_TIMEOUT_MS / 1000):
            await asyncio.gather(*(unclosed._inner._close_quietly() for unclosed in consumers))


async def _call(call: Callable[[], None]) -> None:
    """Makes the call in the event loop, which owns the consumer's state."""
    call()


def _loop_time(deadline_s: float | None) -> float | None:
    """Returns a deadline of time.monotonic as a time of the running event loop; None stays None."""
    if deadline_s is None:
        return None
    return asyncio.get_running_loop().time() + max(0.0, deadline_s - time.monotonic())


def _in_loop(call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has stopped: the process ends, and no thread waits any more
        BACKGROUND.loop.call_soon_threadsafe(call)
