"""Futures of sent records; the futures of a batch's records share its outcome.

Owns: the futures, and which of them are registered with a batch. Does not own: outcomes (core/producer_batch.py).
Invariants: a future has taken over the outcome before its application can see that the batch is done. A future that
nothing waits for is not registered with its batch.
"""

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextvars import Context
from typing import Any, NamedTuple, Never, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from shproto import forks

from streamhouse.core.kafka_names import explains_kafka_methods, refuse_arguments
from streamhouse.core.producer_batch import ProducerBatch
from streamhouse.core.record_checks import Indices, where
from streamhouse.records import RecordMetadata

T = TypeVar("T")


async def finished(batch: ProducerBatch) -> None:
    """Waits until the batch is delivered or has failed; does not raise its error."""
    if not batch.is_done:
        done = asyncio.Event()
        batch.when_done(done.set)
        await done.wait()


def metadata_of(batch: ProducerBatch, index: int, timestamp_ms: int) -> RecordMetadata:
    """Returns the place of record `index` of a finished batch. Raises the error that the batch failed with."""
    if batch.error is not None:
        raise batch.error
    offset = batch.base_offset + index if batch.base_offset >= 0 else -1
    return RecordMetadata(batch.topic, batch.partition, offset, timestamp_ms)


class _DeliveryFuture(asyncio.Future[T]):
    """An asyncio future that follows batches only once a task waits for it.

    Most futures of `send` are dropped at once. If each were kept and settled with its batch, a full buffer of small
    records would hold 100 MB of them. So a future looks at its batches when it is asked, and registers with them when a
    task waits.

    Cancelling a future ends the waiting and recalls nothing: the records are on their way.
    """

    __slots__ = ("_follows",)
    _follows: bool  # registered with a batch

    @abstractmethod
    def _pending(self) -> ProducerBatch | None:
        """Returns a batch that is not done; None once all are."""

    @abstractmethod
    def _outcome(self) -> T:
        """Returns the outcome of the finished batches. Raises the error that they failed with."""

    @abstractmethod
    def _mark_seen(self) -> None:
        """Notes that the application learns of failures."""

    def _update(self) -> bool:
        """Takes over the outcome if it is known. Returns True once this future is done."""
        if super().done():
            return True
        if self._pending() is not None:
            return False
        try:
            super().set_result(self._outcome())
        except Exception as error:  # noqa: BLE001 - the batch failed with it
            super().set_exception(error)
            self._log_traceback = False  # `flush` raises failures that were not seen
        return True

    def _follow(self) -> None:
        """Registers with a batch that is not done, unless all are done or the future is registered already."""
        if not self._update() and not self._follows:
            pending = self._pending()
            assert pending is not None, "not done, so something is pending"
            self._follows = True
            pending.when_done(self._go_on)

    def _go_on(self) -> None:
        self._follows = False
        self._follow()

    def done(self) -> bool:
        """Returns True once delivered, failed or cancelled."""
        return self._update()

    def cancel(self, msg: Any | None = None) -> bool:
        """Ends the waiting; the records are on their way all the same. Returns False if the future is done already."""
        return not self._update() and super().cancel(msg)

    def cancelled(self) -> bool:
        """Returns True after `cancel`, unless the future was done before."""
        return self._update() and super().cancelled()

    def result(self, **kafka: Never) -> T:
        """Returns the place of the records. Raises the error that delivery failed with, InvalidStateError before the
        future is done."""
        if kafka:
            refuse_arguments("SendFuture.result", kafka)
        if self._update():
            self._mark_seen()
        return super().result()

    def exception(self, **kafka: Never) -> BaseException | None:
        """Returns the error that delivery failed with, or None. Raises InvalidStateError before the future is done."""
        if kafka:
            refuse_arguments("SendFuture.exception", kafka)
        if self._update():
            self._mark_seen()
        return super().exception()

    def add_done_callback(self, fn: Callable[[Self], object], /, *, context: Context | None = None) -> None:
        """Calls `fn(self)` from the event loop once done."""
        super().add_done_callback(fn, context=context)
        self._follow()

    def __await__(self) -> Generator[Any, None, T]:
        if not self._update():
            forks.check()
            self._asyncio_future_blocking = True
            yield self  # the waiting task adds its callback
        return self.result()

    __iter__ = __await__


@explains_kafka_methods("SendFuture")
class SendFuture(_DeliveryFuture[RecordMetadata]):
    """Outcome of a `send`: an asyncio future, for `await`, `asyncio.wait`, `gather`, `wait_for` and callbacks."""

    __slots__ = ("_batch", "_index", "_timestamp_ms")
    _batch: ProducerBatch
    _index: int
    _timestamp_ms: int

    def _pending(self) -> ProducerBatch | None:
        return None if self._batch.is_done else self._batch

    def _outcome(self) -> RecordMetadata:
        return metadata_of(self._batch, self._index, self._timestamp_ms)

    def _mark_seen(self) -> None:
        self._batch.seen = True


def send_future(loop: asyncio.AbstractEventLoop, batch: ProducerBatch, index: int, timestamp_ms: int) -> SendFuture:
    """Returns the future of record `index` of a batch."""
    # An `__init__` of the class, or looking for the running loop (a system call), would double the cost.
    future = SendFuture(loop=loop)
    future._batch, future._index, future._timestamp_ms, future._follows = batch, index, timestamp_ms, False
    return future


class SentRecords(NamedTuple):
    """Partitions and offsets of the records of a `send_many`, in the order they were given: int64, shape (n,)."""

    topic: str
    partitions: NDArray[np.int64]
    offsets: NDArray[np.int64]


class Placed(NamedTuple):
    """Records `indices` of a send_many are records first, first + 1, ... of a batch."""

    batch: ProducerBatch
    first: int
    indices: Indices


class PlacedRecords:
    """Records of a `send_many`, by their batches."""

    __slots__ = ("_done_count", "_placed", "_topic", "count")

    def __init__(self, topic: str, count: int, placed: Sequence[Placed]) -> None:
        self.count = count
        self._topic = topic
        self._placed = placed
        self._done_count = 0  # leading batches that are done

    def pending(self) -> ProducerBatch | None:
        """Returns the first batch that is not done; None once all are."""
        for at in range(self._done_count, len(self._placed)):
            self._done_count = at  # stored, not counted up: `streamhouse.sync` asks from several threads
            if not self._placed[at].batch.is_done:
                return self._placed[at].batch
        self._done_count = len(self._placed)
        return None

    def result(self) -> SentRecords:
        """Returns partitions and offsets, once nothing is pending. Raises the error of the first failed batch."""
        for placed in self._placed:
            if placed.batch.error is not None:
                raise placed.batch.error
        partitions = np.empty(self.count, np.int64)
        offsets = np.empty(self.count, np.int64)
        for batch, first, indices in self._placed:
            partitions[where(indices)] = batch.partition
            base = batch.base_offset
            offsets[where(indices)] = np.arange(base + first, base + first + len(indices)) if base >= 0 else -1
        return SentRecords(self._topic, partitions, offsets)

    def errors(self) -> list[tuple[Exception, NDArray[np.int64]]]:
        """Returns the failures so far: the error and the positions (in the lists given) of its records."""
        failed = [placed for placed in self._placed if placed.batch.error is not None]
        for placed in failed:
            placed.batch.seen = True
        return [
            (placed.batch.error, np.asarray(placed.indices, np.int64))
            for placed in failed
            if placed.batch.error is not None
        ]


@explains_kafka_methods("SendFuture")
class SendResult(_DeliveryFuture[SentRecords]):
    """Outcome of a `send_many`: an asyncio future of `SentRecords`. Done once all batches are; fails with the error of
    the first batch that failed."""

    __slots__ = ("_records",)

    def __init__(self, records: PlacedRecords, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._records = records
        self._follows = False

    def __len__(self) -> int:
        return self._records.count

    def __bool__(self) -> bool:
        return True  # a future also without records

    def errors(self) -> list[tuple[Exception, NDArray[np.int64]]]:
        """Returns the failures so far: the error and the positions (in the lists given) of its records."""
        return self._records.errors()

    def _pending(self) -> ProducerBatch | None:
        return self._records.pending()

    def _outcome(self) -> SentRecords:
        return self._records.result()

    def _mark_seen(self) -> None:
        self._records.errors()
