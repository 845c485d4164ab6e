"""The producer for plain code: records wait in a queue for the event loop's thread, which takes them in order.

Owns: records on their way to the loop's thread, the threads that wait for room in that queue, producers that have to be
flushed before the process ends. Does not own: records that the loop's thread has taken.
Invariants: threads share no lock (`streamhouse.background` says why). A record that `send` has accepted gets an
outcome, also if the producer is closed meanwhile.
"""

import asyncio
import contextlib
import logging
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import repeat
from types import TracebackType
from typing import Any, Generic, Never, Self, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray
from opentelemetry import trace
from shproto import forks
from shproto.errors import InvalidArgument, Overloaded, Unavailable
from shproto.rpc import Interceptors

from streamhouse import producer, tracing
from streamhouse.background import BACKGROUND
from streamhouse.core.arrow_records import ArrowRecords
from streamhouse.core.kafka_names import (
    explains_kafka_arguments,
    explains_kafka_methods,
    explains_kafka_names,
    refuse_arguments,
)
from streamhouse.core.options import ProducerKwargs, check_exit_timeout, check_timeout_s, partition_number
from streamhouse.core.producer_batch import ProducerBatch
from streamhouse.core.record_checks import CheckedRecord, Headers, RecordColumns, check_record
from streamhouse.core.sync_mismatch import PlainContext
from streamhouse.delivery import PlacedRecords, SentRecords, finished, metadata_of
from streamhouse.metrics import ProducerMetrics
from streamhouse.producer import close_with, not_acknowledged
from streamhouse.records import RecordMetadata
from streamhouse.sender import UNSEEN_FAILURES_MAX

log = logging.getLogger(__name__)

F = TypeVar("F")
T = TypeVar("T")

# Staged records are counted in slots, one for each SLOT_BYTES begun. At most 4 MiB, or 8,192 records, wait for the
# loop's thread; beyond that the sending thread waits. That is four milliseconds of records at 2 million a second.
SLOT_BYTES = 512
STAGED_SLOTS_MAX = 8_192
# The loop's thread takes this many records, a few milliseconds of work, then gives streams and heartbeats a turn.
TURN_RECORDS = 1_000
# Limit for the last records of a script: a leader that answers takes milliseconds, and an unreachable leader must not
# keep the process from ending.
EXIT_TIMEOUT_MS = 5_000


class _DeliveryFuture(Generic[T]):
    """Outcome that threads wait for, or register callbacks at."""

    __slots__ = ()

    @abstractmethod
    def done(self) -> bool:
        """Returns True once everything is acknowledged or has failed."""

    @abstractmethod
    async def _finished(self) -> None:
        """Returns once `done` is True."""

    @abstractmethod
    def _outcome(self) -> T:
        """Returns the outcome, once done, and marks a failure as seen. Raises the error of the delivery."""

    @abstractmethod
    def _call_when_done(self, fn: Callable[[Any], object]) -> None:
        """Calls `fn(self)` once done. Called in the loop's thread, so that no outcome comes between checking and
        registering."""

    def result(self, timeout_s: float | None = None, **kafka: Never) -> T:
        """Returns the place of the sent records, once acknowledged. Raises the error of the delivery (of several failed
        batches the first error), TimeoutError after timeout_s."""
        if kafka:
            refuse_arguments("SendFuture.result", kafka)
        if not self.done():
            check_timeout_s("timeout_s", timeout_s)
            BACKGROUND.run(self._finished(), timeout_s)
        return self._outcome()

    def exception(self, timeout_s: float | None = None, **kafka: Never) -> Exception | None:
        """Returns the error that `result` would raise; None once all records are acknowledged. Raises TimeoutError
        after timeout_s."""
        if kafka:
            refuse_arguments("SendFuture.exception", kafka)
        try:
            self.result(timeout_s)
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001 - returned, that is the promise
            return error
        return None

    def add_done_callback(self, fn: Callable[[Self], object]) -> None:
        """Calls `fn(self)` once everything is acknowledged or has failed: at once if that is already so, else from the
        client's background thread, before `flush` returns.

        All clients of the process stand still while `fn` runs there: keep `fn` short. Calls of a client in `fn` that
        would have to wait raise RuntimeError. An exception of `fn` is logged.
        """
        if self.done():
            _call(fn, self)
        else:
            BACKGROUND.loop.call_soon_threadsafe(self._call_when_done, fn)


@explains_kafka_methods("SendFuture")
class SendFuture(_DeliveryFuture[RecordMetadata]):
    """Outcome of a `send`."""

    __slots__ = ("_batch", "_callbacks", "_error", "_index", "_producer", "_seen", "_timestamp_ms")

    def __init__(self, owner: "Producer") -> None:
        self._producer = owner
        self._batch: ProducerBatch | None = None  # once the loop's thread has taken the record
        self._index = 0
        self._timestamp_ms = 0
        self._error: Exception | None = None  # the loop's thread has refused the record
        self._seen = False
        # Callbacks registered before the loop's thread has taken the record; only that thread touches them.
        self._callbacks: tuple[Callable[[Any], object], ...] = ()

    def done(self) -> bool:
        """Returns True once the record is acknowledged or has failed."""
        return self._error is not None or (self._batch is not None and self._batch.is_done)

    def _outcome(self) -> RecordMetadata:
        if self._error is not None:
            self._seen = True
            raise self._error
        assert self._batch is not None, "done, and neither sent nor refused"
        self._batch.seen = True
        return metadata_of(self._batch, self._index, self._timestamp_ms)

    def _call_when_done(self, fn: Callable[[Any], object]) -> None:
        if self.done():
            _call(fn, self)
        elif self._batch is not None:
            self._batch.when_done(partial(_call, fn, self))
        else:
            self._callbacks = (*self._callbacks, fn)

    def _taken(self) -> None:
        """Registers the callbacks given so far, once the record is in a batch or refused. Called in the loop's
        thread."""
        callbacks, self._callbacks = self._callbacks, ()
        for fn in callbacks:
            self._call_when_done(fn)

    async def _finished(self) -> None:
        if self._batch is None and self._error is None:
            await self._producer._handed_over()
        if self._batch is not None:
            await finished(self._batch)


@explains_kafka_methods("SendFuture")
class SendResult(_DeliveryFuture[SentRecords]):
    """Outcome of a `send_many`."""

    __slots__ = ("_records",)

    def __init__(self, records: PlacedRecords) -> None:
        self._records = records

    def __len__(self) -> int:
        return self._records.count

    def __bool__(self) -> bool:
        return True  # also a result of no records

    def done(self) -> bool:
        """Returns True once every record is acknowledged or has failed."""
        return self._records.pending() is None

    def _outcome(self) -> SentRecords:
        self._records.errors()
        return self._records.result()

    def errors(self) -> list[tuple[Exception, NDArray[np.int64]]]:
        """Returns the failures so far: each error with the positions of its records."""
        return self._records.errors()

    def _call_when_done(self, fn: Callable[[Any], object]) -> None:
        pending = self._records.pending()
        if pending is None:
            _call(fn, self)
        else:
            pending.when_done(partial(self._call_when_done, fn))

    async def _finished(self) -> None:
        while (pending := self._records.pending()) is not None:
            await finished(pending)


def _call(fn: Callable[[F], object], future: F) -> None:
    """Calls a done-callback and logs its exception, which would otherwise abort the loop thread's work on a batch."""
    try:
        fn(future)
    except BaseException:  # SystemExit, too: outside of the main thread it ends nothing
        log.exception("a done-callback of a %s raised", type(future).__name__)


# The last two: time.monotonic when `send` was called, and the span current at that time.
_Staged = tuple[SendFuture, str, CheckedRecord, int | None, float, trace.Span | None]
# An item of the queue to the loop's thread: a record; None behind a record for each further slot that the record takes;
# a future to be resolved once everything before it has been taken.
_Item = _Staged | asyncio.Future[None] | None


@explains_kafka_methods("Producer")
class Producer(PlainContext):
    """Writes records; see `streamhouse.Producer` for the options. Leaving the context flushes. Several threads may
    share a producer.

    exit_timeout_ms: how long the end of the process waits for a producer that was not closed; a warning counts the
    records not acknowledged by then.
    """

    @explains_kafka_names("Producer")
    def __init__(
        self,
        bootstrap: str | Sequence[str],
        *,
        exit_timeout_ms: int = EXIT_TIMEOUT_MS,
        telemetry: Interceptors | None = None,
        **options: Unpack[ProducerKwargs],
    ) -> None:
        check_exit_timeout(exit_timeout_ms)
        self._inner = producer.Producer(bootstrap, telemetry=telemetry, **options)
        self._serializers = self._inner._serializers
        self._partitioner = self._inner._options.partitioner
        self._exit_timeout_ms = exit_timeout_ms
        self._wait_ms = self._inner._options.delivery_timeout_ms
        # Appended to by any thread, popped by the loop's thread alone; single operations of a deque need no lock.
        self._staged: deque[_Item] = deque()
        self._waiting: deque[threading.Lock] = deque()
        self._woken = False  # the loop's thread is going to take the staged records
        self._taking: asyncio.Task[None] | None = None
        # Records refused by the loop's thread since the last flush: the futures for the flush to raise, and their
        # number.
        self._refused: list[SendFuture] = []
        self._refused_count = 0
        self._refused_total = 0  # since the producer was made
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and forks.lost:
            return  # a forked child leaves the block: the parent closes the producer
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._close(None, flush=not interrupted, raise_failures=kind is None)

    # ---- sending

    def send(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Headers | None = None,
        partition: int | None = None,
        timestamp_ms: int | datetime | None = None,
        **kafka: Never,
    ) -> SendFuture:
        """Accepts a record and returns a future; waits while the buffer is full. `result()` of the future waits for the
        acknowledgement.

        Raises UnknownTopic, UnknownPartition, AcksTooWeak, BatchTooLarge, InvalidArgument (also once closed),
        TypeError, SerializationError, Overloaded (no room within delivery_timeout_ms), Unavailable.
        """
        if kafka:
            refuse_arguments("Producer.send", kafka)
        self._must_be_open()
        if self._serializers is not None:
            value, key = self._serializers.one(topic, value, key)
        record = check_record(value, key, headers, timestamp_ms)
        if partition is not None and partition.__class__ is not int:
            partition = partition_number(partition)
        if not self._inner.knows(topic, partition):
            self._open_topic(topic, partition)
        if partition is None and self._partitioner is not None:
            partition = self._inner.choose_partition(topic, record[1])
        future = SendFuture(self)
        # Now: in the loop's thread the application's span is not current.
        caller = trace.get_current_span() if tracing.is_on else None
        self._stage((future, topic, record, partition, time.monotonic(), caller), record[4])
        return future

    @explains_kafka_arguments("Producer.send_and_wait")
    def send_and_wait(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Headers | None = None,
        partition: int | None = None,
        timestamp_ms: int | datetime | None = None,
    ) -> RecordMetadata:
        """Sends a record and waits for the acknowledgement; lingers as `send` does, for records of other threads.
        Returns the place of the record. Raises as `send` does, and the error of the delivery."""
        return self.send(topic, value, key, headers, partition, timestamp_ms).result()

    @explains_kafka_arguments("Producer.send_many")
    def send_many(
        self,
        topic: str,
        values: Sequence[Any],
        keys: Sequence[Any] | None = None,
        timestamps_ms: int | datetime | Sequence[int | datetime] | None = None,
        headers: Sequence[Headers] | None = None,
        partition: int | None = None,
    ) -> SendResult:
        """Accepts many records, in the order given, and returns their result; waits while the buffer is full.
        `result()` of the result waits for the acknowledgements. Raises as `send` does."""
        self._must_be_open()
        return self._accept(topic, self._inner.check_many(topic, values, keys, timestamps_ms, headers), partition)

    def send_columns(
        self,
        topic: str,
        values: Any,
        keys: Any = None,
        *,
        timestamps_ms: Any = None,
        headers: Any = None,
        partition: int | None = None,
    ) -> SendResult:
        """Accepts the records of pyarrow arrays, as the `send_columns` of `streamhouse.Producer` does, and returns
        their result; waits while the buffer is full. Raises as `send` does."""
        self._must_be_open()
        return self._accept(topic, self._inner.check_columns(values, keys, timestamps_ms, headers), partition)

    def _accept(self, topic: str, records: RecordColumns | ArrowRecords, partition: int | None) -> SendResult:
        chosen: NDArray[np.int64] | None = None
        if partition is None and self._partitioner is not None:
            # In this thread, not in the loop's: the application's partitioner may take its time.
            if not self._inner.knows(topic, None):
                self._open_topic(topic, None)
            chosen = self._inner.choose_partitions(topic, records)
        _UNCLOSED.add(self)
        return SendResult(
            BACKGROUND.run(self._append_many(topic, records, partition, chosen, trace.get_current_span()))
        )

    async def _append_many(
        self,
        topic: str,
        records: RecordColumns | ArrowRecords,
        partition: int | None,
        chosen: NDArray[np.int64] | None,
        caller: trace.Span,
    ) -> PlacedRecords:
        await self._handed_over()
        return await self._inner.append_many(topic, records, partition, chosen, caller)

    def _open_topic(self, topic: str, partition: int | None) -> None:
        _UNCLOSED.add(self)
        BACKGROUND.run(self._inner.open_topic(topic, partition))

    def _must_be_open(self) -> None:
        if forks.lost:
            forks.check()
        if self._closed:
            raise InvalidArgument("the producer is closed", field="producer", value="closed")

    # ---- on the way to the loop's thread

    def _stage(self, item: _Staged, size_bytes: int) -> None:
        """Appends a record to the staged records, after waiting for room; a single record is always accepted, however
        large."""
        staged, more_slots = self._staged, size_bytes // SLOT_BYTES
        if len(staged) + more_slots >= STAGED_SLOTS_MAX and staged:
            self._wait_for_room(size_bytes)
        staged.append(item)
        if more_slots:
            staged.extend(repeat(None, more_slots))
        # Without a lock: at worst two threads wake the loop, which finds nothing the second time.
        if not self._woken:
            self._wake()

    def _wake(self) -> None:
        """Has the loop's thread take the staged records. An interrupt in here may cause a second wake-up, never lose
        the only one."""
        loop = BACKGROUND.loop
        try:
            self._woken = True
            loop.call_soon_threadsafe(self._take_over)
        except BaseException:
            self._woken = False
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._take_over)
            raise

    def _wait_for_room(self, size_bytes: int) -> None:
        """Returns once the record may be staged. Raises Overloaded after delivery_timeout_ms."""
        BACKGROUND.refuse_own_thread()
        deadline_s = time.monotonic() + self._wait_ms / 1000
        while self._staged and len(self._staged) + size_bytes // SLOT_BYTES >= STAGED_SLOTS_MAX:
            # Each wait has its own lock: after an interrupt that lock stays in the deque until the loop's thread
            # releases it, to no effect.
            room = threading.Lock()
            room.acquire()
            self._waiting.append(room)
            self._wake()  # after the append: the loop's thread may have looked just before
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not room.acquire(timeout=min(left_s, threading.TIMEOUT_MAX)):
                raise Overloaded(
                    f"no room for {size_bytes} bytes within delivery_timeout_ms = {self._wait_ms}: the buffer is full "
                    f"and {len(self._staged)} slots of records wait for it",
                    field="buffer_bytes_max",
                    limit=STAGED_SLOTS_MAX,
                    value=len(self._staged),
                )

    def _take_over(self) -> None:
        """Begins to take the staged records, unless a task does so already. Called in the loop's thread."""
        if self._taking is None or self._taking.done():
            self._taking = asyncio.get_running_loop().create_task(self._take_staged())

    async def _take_staged(self) -> None:
        """Hands all staged records to the producer, in order, until none is left."""
        staged, append, taken = self._staged, self._inner.append, 0
        while True:
            try:
                item = staged[0]  # stays in the queue until taken: counted, and not lost
            except IndexError:
                self._let_on()
                self._woken = False
                if not staged:  # later records wake this thread again
                    return
                self._woken = True
                continue
            if isinstance(item, tuple):
                future, topic, record, partition, sent_s, caller = item
                try:
                    taken_over = await append(topic, record, partition, sent_s, caller)
                    batch, future._index, future._timestamp_ms = taken_over
                    future._batch = batch  # last: with the batch the future may be done
                except Exception as error:  # noqa: BLE001 - kept for the future, and for flush
                    if self._inner.closed and isinstance(error, InvalidArgument):
                        # `send` has accepted the record: it fails as the records of batches fail at a close.
                        error = Unavailable("the producer was closed before the record was sent")
                    self._refuse(future, error)
                if future._callbacks:
                    future._taken()
                taken += 1
                if taken % TURN_RECORDS == 0:
                    await asyncio.sleep(0)
            elif item is not None and not item.done():
                item.set_result(None)
            staged.popleft()
            # At half, not at the first free slot: threads then wake once for thousands of records, not for each.
            if self._waiting and len(staged) <= STAGED_SLOTS_MAX // 2:
                self._let_on()

    def _refuse(self, future: SendFuture, error: Exception) -> None:
        future._error = error
        self._refused_count += 1
        self._refused_total += 1
        if len(self._refused) < UNSEEN_FAILURES_MAX:
            self._refused.append(future)

    def _let_on(self) -> None:
        """Wakes the threads that wait for room."""
        while self._waiting:
            self._waiting.popleft().release()

    async def _handed_over(self) -> None:
        """Returns once everything staged so far is taken."""
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._staged.append(reached)
        self._take_over()
        await reached

    # ---- the end

    @explains_kafka_arguments("Producer.flush")
    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until all records accepted so far are acknowledged or have failed, at most delivery_timeout_ms.

        Raises TimeoutError after timeout_s, while sending goes on; else the first failure that the application has not
        seen.
        """
        check_timeout_s("timeout_s", timeout_s)
        BACKGROUND.run(self._flush(timeout_s))

    async def _flush(self, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._handed_over()
                await self._inner.all_finished()
        except TimeoutError:
            text = not_acknowledged(self._unacknowledged(), f"timeout_s = {timeout_s}", self._inner.last_error)
            raise TimeoutError(text) from None
        refused, self._refused, self._refused_count = self._refused, [], 0
        self._inner.raise_unseen_failure()
        for future in refused:
            if not future._seen and future._error is not None:
                future._seen = True
                raise future._error

    def metrics(self) -> ProducerMetrics:
        """Returns counters since the producer was made and gauges of this moment. A record on its way to the client's
        background thread counts as unacknowledged, a record refused by that thread as failed."""
        inner = self._inner.metrics()
        return replace(
            inner,
            records_unacknowledged=self._unacknowledged(),
            records_failed=inner.records_failed + self._refused_total,
        )

    @explains_kafka_arguments("Producer.close")
    def close(self, timeout_s: float | None = None) -> None:
        """Flushes, then closes the connections. Raises as `flush` does, after closing.

        The futures of records not acknowledged after timeout_s fail.
        """
        check_timeout_s("timeout_s", timeout_s)
        self._close(timeout_s, flush=True, raise_failures=True)

    def _close(self, timeout_s: float | None, *, flush: bool, raise_failures: bool) -> None:
        forks.check()
        self._closed = True
        BACKGROUND.run(self._end(timeout_s, flush=flush, raise_failures=raise_failures))

    async def _end(self, timeout_s: float | None, *, flush: bool, raise_failures: bool) -> None:
        flushed = partial(self._flush, timeout_s) if flush else None
        await close_with(flushed, self._unacknowledged, self._shut_down, raise_failures=raise_failures)

    async def _shut_down(self) -> None:
        # First: the staged records are then refused by a closed producer instead of waiting for room.
        await self._inner.shut_down()
        await self._handed_over()  # staged records fail then, and do not wait for ever
        _UNCLOSED.discard(self)  # here, not where `close` returns: `close` also raises errors of the flush

    async def _flush_at_exit(self) -> None:
        with contextlib.suppress(TimeoutError):  # the remaining records are counted
            async with asyncio.timeout(self._exit_timeout_ms / 1000):
                await self._handed_over()
                await self._inner.all_finished()

    def _unacknowledged(self) -> int:
        """Returns the number of records that are staged, or taken and neither acknowledged nor failed."""
        return sum(isinstance(item, tuple) for item in self._staged.copy()) + self._inner.unacknowledged

    def _lost(self) -> int:
        """Returns the number of records whose loss or failure would stay unreported if the process ended now."""
        refused = self._refused_count - sum(future._seen for future in self._refused)
        return self._unacknowledged() + self._inner.unseen_failures + refused


# Producers that were used and are not closed.
_UNCLOSED: set[Producer] = set()


def _flush_at_exit() -> None:
    """Waits for the records of producers that were not closed; logs in a single line how many are dropped."""
    producers = list(_UNCLOSED)
    for unclosed in producers:
        unclosed._closed = True  # threads that go on sending get an error

    async def each(work: Callable[[Producer], Coroutine[None, None, None]]) -> None:
        await asyncio.gather(*map(work, producers))

    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C skips the wait
        BACKGROUND.run(each(Producer._flush_at_exit))
    lost = sum(unclosed._lost() for unclosed in producers)
    errors = [unclosed._inner.last_error for unclosed in producers]
    BACKGROUND.run(each(Producer._shut_down))
    if lost:
        limit_ms = max(unclosed._exit_timeout_ms for unclosed in producers)
        error = next((error for error in errors if error is not None), None)
        text = not_acknowledged(lost, f"exit_timeout_ms = {limit_ms}", error)
        log.warning("the process ends, and its producer was not closed: %s. They are dropped", text)


BACKGROUND.before_end(_flush_at_exit)
