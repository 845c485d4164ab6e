"""The consumer for plain code.

Owns: one worker for each thread that reads, and the lock by which they take turns; consumers that are to leave their
groups before the process ends. Does not own: anything of the event loop's thread, which never waits for that lock.
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

# For the last commit and leaving the group at the end of a script: a coordinator that answers takes milliseconds, one
# that does not must not keep the process from ending.
EXIT_TIMEOUT_MS = 5_000


@explains_kafka_methods("Consumer")
class Consumer(PlainContext, PlainIteration):
    """Reads records; see `streamhouse.Consumer` for the options and for what is committed when. Several threads may
    iterate one consumer: each record goes to one of them, who has done with it when it asks for its next one.

    on_assigned, on_revoked and on_lost are plain functions, called in the thread that asks for records, starts,
    subscribes or closes: with what it had in hand done with, and free to call the consumer."""

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
        self._workers = threading.local()  # by thread; a number of a thread may be another one's later
        self._taking = threading.Lock()
        self._advancing = threading.Lock()

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
        """Joins the group or opens the partitions: returns once it is known where reading begins in each of them, and
        on_assigned has returned. Iterating does it as well. Idempotent.

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
        """Reads these topics instead of those before: names, or a pattern that the whole name has to match, also of
        topics that are created later; see `streamhouse.Consumer.subscribe`."""
        subscription = subscription_of(topics, pattern)
        callbacks = callbacks_of(Callbacks(on_assigned, on_revoked, on_lost), plain=True)
        self._assignments.refuse_inside("subscribe")
        BACKGROUND.run(self._inner._subscribe(self._worker(), subscription, callbacks))
        self._give_up()
        BACKGROUND.run(self._inner._await_subscription())
        self._call_due()

    def unsubscribe(self) -> None:
        """Reads nothing until the next `subscribe`: gives up all partitions, with on_revoked, and leaves the group.
        What the thread has in hand counts as done with, and is committed with auto_commit.

        Raises what that commit is refused with, or what a callback raises; it is unsubscribed all the same.
        """
        self._assignments.refuse_inside("unsubscribe")
        refusal = BACKGROUND.run(self._inner._unsubscribe(self._worker()))
        try:
            self._give_up()
        finally:
            BACKGROUND.run(self._inner._step_out_of_group())
        if refusal is not None:
            raise refusal

    def _give_up(self) -> None:
        """Returns once what was taken away is given up, with the callbacks for it."""
        while not BACKGROUND.run(self._assignments.given_up()):
            self._call_due()

    def _call_due(self) -> None:
        """Calls the callbacks that are due, in this thread. Raises what a callback raises: the hand-over goes on."""
        thread = threading.current_thread()
        # Its own step again, where Ctrl-C came between two steps of this: called once, and finished once it was.
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
        """True if a callback is to be called before anything else."""
        return self._assignments.is_due or self._assignments.caller is threading.current_thread()

    def __iter__(self) -> Self:
        self._iteration.begin()
        return self

    def __next__(self) -> Record:
        try:
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
            raise  # the record stays in hand, as if it had been handed over: the next call goes on behind it
        except BaseException:
            self._give_back(worker)
            raise

    def batches(self) -> "BatchIterator":
        """Records as columns, a `RecordBatch` of one partition at a time."""
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
        """Returns records by partition: what has been received, at most max_records; empty if nothing comes within
        timeout_ms, or at the end of a bounded read (`at_end`). What the last poll of the thread returned is done
        with."""
        return self._polled(timeout_ms, max_records, self._records_of)

    @explains_kafka_arguments("Consumer.poll_batches")
    def poll_batches(
        self, timeout_ms: int = 0, max_records: int = POLL_BATCHES_RECORDS_MAX
    ) -> dict[TopicPartition, list[RecordBatch]]:
        """As `poll`, but returns the records as columns: of each partition a list of `RecordBatch`."""
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
        """As `_advance`; False as well if there is nothing to take by the deadline (of time.monotonic)."""
        if not self._inner._closed:
            _opened(self)
        self._assignments.refuse_inside("reading")
        self._call_due()
        # Without the lock of `_advance`: waiting for a lock with a timeout is no step that Ctrl-C leaves whole.
        return BACKGROUND.run(self._wait(worker, deadline_s))

    async def _wait(self, worker: Worker, deadline_s: float | None = None) -> bool:
        """As `_advance`, where callbacks are called by the thread."""
        if deadline_s is not None:
            self._inner._refuse_closed()
        await self._inner._enter()
        return await self._inner._wait_for_more(worker, _loop_time(deadline_s))

    @property
    def at_end(self) -> bool:
        """True once a bounded read (`end`, `stop_at_end`) has handed over everything up to its end."""
        return self._inner.at_end

    def _worker(self) -> Worker:
        """The thread that calls."""
        try:
            worker: Worker = self._workers.worker
        except AttributeError:
            worker = self._workers.worker = self._inner._in_flight.worker(threading.current_thread())
        return worker

    def _advance(self, worker: Worker) -> bool:
        """Waits for more records, one thread at a time; those behind it find what it received."""
        self._assignments.refuse_inside("reading")
        self._call_due()  # without the lock: the others go on with what they may read
        with self._advancing:
            if self._inner._closed:
                return False
            _opened(self)
            return self._iteration.is_ready or BACKGROUND.run(self._wait(worker))

    def _give_back(self, worker: Worker, first: Mapping[TopicPartition, int] | None = None) -> None:
        """Takes back what has not reached the application, as `InFlight.give_back` does: after an error, or Ctrl-C,
        which may come between any two steps."""
        with self._taking:
            self._iteration.give_back(worker, first)

    @explains_kafka_arguments("Consumer.committed")
    def committed(
        self, partitions: Sequence[tuple[str, int]] | None = None
    ) -> dict[TopicPartition, OffsetAndMetadata | None]:
        """Returns what the group has committed in these partitions, assigned or not, or in all that are assigned; None
        where nothing is."""
        return BACKGROUND.run(self._inner.committed(partitions))

    @explains_kafka_arguments("Consumer.commit")
    def commit(self, offsets: Mapping[tuple[str, int], int | OffsetAndMetadata] | None = None) -> None:
        """Stores where the group goes on: behind everything that the application has done with, the record in hand of
        the thread that calls included; or the `offsets` given, with metadata if they are `OffsetAndMetadata`."""
        BACKGROUND.run(self._inner._commit(self._worker(), offsets))

    def seek(self, topic: str, partition: int, offset: Start) -> None:
        """Goes on at `offset` (or at an end, or a time)."""
        BACKGROUND.run(self._inner.seek(topic, partition, offset))

    def seek_to_beginning(self, partitions: Sequence[tuple[str, int]] | None = None) -> None:
        """Goes on at the first record that is still there, in these partitions or all that are assigned."""
        BACKGROUND.run(self._inner.seek_to_beginning(partitions))

    def seek_to_end(self, partitions: Sequence[tuple[str, int]] | None = None) -> None:
        """Goes on behind the last acknowledged record, in these partitions or all that are assigned."""
        BACKGROUND.run(self._inner.seek_to_end(partitions))

    def seek_to_timestamp(
        self, timestamp_ms: int | datetime, partitions: Sequence[tuple[str, int]] | None = None
    ) -> None:
        """Goes on at the first record that is as late as `timestamp_ms` (since 1970, or a datetime with a time zone),
        in these partitions or all that are assigned; at the end of those without any."""
        BACKGROUND.run(self._inner.seek_to_timestamp(timestamp_ms, partitions))

    def pause(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Hands over no records of these partitions, and fetches none, until `resume`. A thread that asks at the same
        moment may still be given one."""
        BACKGROUND.run(_call(lambda: self._inner.pause(partitions)))

    def resume(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Goes on with paused partitions where they were, or where a `seek` has put them meanwhile."""
        BACKGROUND.run(_call(lambda: self._inner.resume(partitions)))

    def paused(self) -> frozenset[TopicPartition]:
        """Returns the assigned partitions that are paused."""
        return self._inner.paused()

    def lag(self) -> dict[TopicPartition, Lag]:
        """Records still to be handed over, per partition."""
        return BACKGROUND.run(self._inner.lag())

    def metrics(self) -> ConsumerMetrics:
        """Returns counters since the consumer was made and gauges of this moment; asks no server, as `lag` does."""
        with self._taking:
            return self._inner.metrics()

    def positions(self) -> dict[TopicPartition, int]:
        """The next offset that will be handed over, per partition."""
        return self._inner.positions()

    @property
    def assignment(self) -> frozenset[TopicPartition]:
        """The partitions being read."""
        return self._inner.assignment

    def wait_for_assignment(self, timeout_ms: int | None = None) -> frozenset[TopicPartition]:
        """Returns the assignment as soon as it is known where reading begins in at least one partition; starts the
        consumer. Raises TimeoutError after timeout_ms (None: never)."""
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
        """How the consumer stands in its group; None without one, and for partitions given by `assign`."""
        return self._inner.membership

    @property
    def waiting(self) -> Mapping[TopicPartition, str]:
        """Why partitions that cannot be read on at the moment wait."""
        return dict(self._inner.waiting)  # as it is now: the other thread goes on changing it

    @explains_kafka_arguments("Consumer.close")
    def close(self, timeout_s: float | None = None) -> None:
        """Commits (with auto_commit), gives up the partitions, with on_revoked, leaves the group, closes the
        connections.

        Raises TimeoutError if that takes longer than timeout_s (None: no limit but those of the options), what a
        callback raises, or what the last commit failed with; everything is closed all the same. A callback takes as
        long as it takes: nothing is waited for behind one that was too slow.
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
            _UNCLOSED.discard(self)  # it raises what the last commit failed with, and is closed all the same

    async def _other_calls(self) -> bool:
        """Returns True if a callback is due, once no other thread is inside one."""
        await self._assignments.idle()
        return self._assignments.is_due


class BatchIterator(PlainIteration, Iterator[RecordBatch]):
    """Iterator of `Consumer.batches`. A timeout or Ctrl-C ends one wait, not the iteration."""

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
    """Registers the end of consumers once, on first use: after the producers, which may still write what consumers
    have read."""
    BACKGROUND.before_end(_leave_at_exit)


def _leave_at_exit() -> None:
    """Commits what consumers that were not closed have done with, and leaves their groups: the others need not wait for
    a session to expire. Threads that still iterate come to the end."""
    with contextlib.suppress(KeyboardInterrupt):  # no patience to wait for them
        BACKGROUND.run(_leave(list(_UNCLOSED)))


async def _leave(consumers: Sequence[Consumer]) -> None:
    with contextlib.suppress(TimeoutError):  # the groups find out by themselves
        async with asyncio.timeout(EXIT_TIMEOUT_MS / 1000):
            await asyncio.gather(*(unclosed._inner._close_quietly() for unclosed in consumers))


async def _call(call: Callable[[], None]) -> None:
    """Makes the call in the event loop, where the consumer's state belongs."""
    call()


def _loop_time(deadline_s: float | None) -> float | None:
    """Returns a deadline of time.monotonic as a time of the running event loop; None stays None."""
    if deadline_s is None:
        return None
    return asyncio.get_running_loop().time() + max(0.0, deadline_s - time.monotonic())


def _in_loop(call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # it is gone: the process ends, and nobody waits any more
        BACKGROUND.loop.call_soon_threadsafe(call)
