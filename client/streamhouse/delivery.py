"""What became of sent records: one outcome per batch, shared by the futures of its records."""

import asyncio
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamhouse.records import RecordMetadata


class Delivery:
    """The outcome of one batch: the base offset it got, or an error. Futures of its records share it."""

    __slots__ = ("_waiters", "base_offset", "done", "error", "partition", "seen", "topic")

    def __init__(self, topic: str, partition: int) -> None:
        self.topic = topic
        self.partition = partition
        self.base_offset = -1
        self.error: Exception | None = None
        self.done = False
        self.seen = False  # whether somebody learnt of the error
        self._waiters: list[asyncio.Future[None] | Callable[[], object]] = []

    def resolve(self, base_offset: int) -> None:
        """The batch is acknowledged."""
        self.base_offset = base_offset
        self._finish()

    def fail(self, error: Exception) -> None:
        """The batch is given up."""
        self.error = error
        self._finish()

    def _finish(self) -> None:
        assert not self.done, "a batch has one outcome"
        self.done = True
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not isinstance(waiter, asyncio.Future):
                asyncio.get_running_loop().call_soon(waiter)
            elif not waiter.done():
                waiter.set_result(None)

    async def finished(self) -> None:
        """Until the batch is delivered or failed; raises nothing of it."""
        if not self.done:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def call_when_done(self, callback: Callable[[], object]) -> None:
        """Runs `callback` from the event loop once done."""
        if self.done:
            asyncio.get_running_loop().call_soon(callback)
        else:
            self._waiters.append(callback)

    def offset_of(self, index: int) -> int:
        """The offset of record `index` of the batch; raises what the batch failed with."""
        if self.error is not None:
            self.seen = True
            raise self.error
        return self.base_offset + index if self.base_offset >= 0 else -1


class SendFuture:
    """Awaitable outcome of one `send`; await it from the producer's event loop, as often as wanted."""

    __slots__ = ("_delivery", "_index", "_timestamp_ms")

    def __init__(self, delivery: Delivery, index: int, timestamp_ms: int) -> None:
        self._delivery = delivery
        self._index = index
        self._timestamp_ms = timestamp_ms

    def __await__(self) -> Generator[Any, None, RecordMetadata]:
        if not self._delivery.done:
            yield from self._delivery.finished().__await__()
        return self.result()

    def done(self) -> bool:
        return self._delivery.done

    def result(self) -> RecordMetadata:
        """Where the record is. Raises what delivery failed with, or InvalidStateError before it is done."""
        delivery = self._delivery
        if not delivery.done:
            raise asyncio.InvalidStateError("the record is not acknowledged yet")
        offset = delivery.offset_of(self._index)
        return RecordMetadata(delivery.topic, delivery.partition, offset, self._timestamp_ms)

    def exception(self) -> Exception | None:
        """What delivery failed with; None if it did not. Raises InvalidStateError before it is done."""
        if not self._delivery.done:
            raise asyncio.InvalidStateError("the record is not acknowledged yet")
        self._delivery.seen = True
        return self._delivery.error

    def add_done_callback(self, callback: Callable[["SendFuture"], object]) -> None:
        """Calls `callback(self)` from the event loop once done."""
        self._delivery.call_when_done(lambda: callback(self))


class SentRecords(NamedTuple):
    """Where the records of a `send_many` are, in the order they were given: int64 arrays of shape (n,)."""

    topic: str
    partitions: NDArray[np.int64]
    offsets: NDArray[np.int64]


class Placed(NamedTuple):
    """Records `indices` of a send_many are records first, first + 1, ... of a batch."""

    delivery: Delivery
    first: int
    indices: NDArray[np.int64]


class SendResult:
    """Awaitable outcome of one `send_many`: `await result` gives `SentRecords`."""

    __slots__ = ("_count", "_placed", "_topic")

    def __init__(self, topic: str, count: int, placed: Sequence[Placed]) -> None:
        self._topic = topic
        self._count = count
        self._placed = placed

    def __len__(self) -> int:
        return self._count

    def __await__(self) -> Generator[Any, None, SentRecords]:
        for placed in self._placed:
            yield from placed.delivery.finished().__await__()
        return self.result()

    def done(self) -> bool:
        return all(placed.delivery.done for placed in self._placed)

    def result(self) -> SentRecords:
        """Raises what the first failed batch failed with, or InvalidStateError before all are done."""
        if not self.done():
            raise asyncio.InvalidStateError("not all records are acknowledged yet")
        errors = self.errors()
        if errors:
            raise errors[0][0]
        return SentRecords(self._topic, *self._arrays())

    def errors(self) -> list[tuple[Exception, NDArray[np.int64]]]:
        """What failed so far: the error and the positions (in the lists given) of the records it concerns."""
        failed = [placed for placed in self._placed if placed.delivery.error is not None]
        for placed in failed:
            placed.delivery.seen = True
        return [(placed.delivery.error, placed.indices) for placed in failed if placed.delivery.error is not None]

    def _arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        partitions = np.empty(self._count, np.int64)
        offsets = np.empty(self._count, np.int64)
        for delivery, first, indices in self._placed:
            partitions[indices] = delivery.partition
            base = delivery.base_offset
            offsets[indices] = np.arange(base + first, base + first + len(indices)) if base >= 0 else -1
        return partitions, offsets
