"""The producer for plain code: records wait for the event loop's thread and are handed to it together."""

import asyncio
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self, Unpack

import numpy as np
from numpy.typing import NDArray
from shformat import Header
from shproto.rpc import Interceptors

from streamhouse import delivery, producer
from streamhouse.background import BACKGROUND
from streamhouse.core.options import ProducerKwargs
from streamhouse.core.outgoing import check_record
from streamhouse.delivery import SentRecords
from streamhouse.records import RecordMetadata

# Records wait here for the loop's thread to come round; beyond this the sending thread waits for it. While the buffer
# is full this is held twice on top of it: what waits for room, and what waits behind that.
STAGED_RECORDS_MAX = 10_000
STAGED_BYTES_MAX = 4 * 1024 * 1024


class SendFuture:
    """Outcome of one `send`."""

    __slots__ = ("_error", "_inner", "_producer")

    def __init__(self, owner: "Producer") -> None:
        self._producer = owner
        self._inner: delivery.SendFuture | None = None
        self._error: Exception | None = None

    def done(self) -> bool:
        return self._error is not None or (self._inner is not None and self._inner.done())

    def result(self, timeout_s: float | None = None) -> RecordMetadata:
        """Where the record is, once acknowledged. Raises what delivery failed with, TimeoutError after timeout_s."""
        if self._inner is not None and self._inner.done():
            return self._inner.result()
        return BACKGROUND.run(self._outcome(), timeout_s)

    def exception(self, timeout_s: float | None = None) -> Exception | None:
        """What delivery failed with; None once it is acknowledged. Raises TimeoutError after timeout_s."""
        try:
            self.result(timeout_s)
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001 - returned, that is the promise
            return error
        return None

    async def _outcome(self) -> RecordMetadata:
        await self._producer._drain()
        if self._error is not None:
            raise self._error
        assert self._inner is not None, "drained, and neither sent nor refused"
        return await self._inner


class SendResult:
    """Outcome of one `send_many`."""

    def __init__(self, inner: delivery.SendResult) -> None:
        self._inner = inner

    def __len__(self) -> int:
        return len(self._inner)

    def done(self) -> bool:
        return self._inner.done()

    def result(self, timeout_s: float | None = None) -> SentRecords:
        """Partitions and offsets. Raises what the first failed batch failed with, TimeoutError after timeout_s."""
        return BACKGROUND.run(self._outcome(), timeout_s)

    def errors(self) -> list[tuple[Exception, NDArray[np.int64]]]:
        """What failed so far: the error and the positions of the records it concerns."""
        return self._inner.errors()

    async def _outcome(self) -> SentRecords:
        return await self._inner


class _Staged(NamedTuple):
    """Arguments of a `send` on their way to the loop's thread."""

    future: SendFuture
    topic: str
    value: bytes | None
    key: bytes | None
    headers: Sequence[Header] | None
    partition: int | None
    timestamp_ms: int | None
    size_bytes: int


class Producer:
    """Writes records; see `streamhouse.Producer` for the options. Leaving the context flushes."""

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        *,
        telemetry: Interceptors | None = None,
        **options: Unpack[ProducerKwargs],
    ) -> None:
        self._inner = producer.Producer(bootstrap, telemetry=telemetry, **options)
        self._staged: list[_Staged] = []
        self._staged_bytes = 0
        self._fewer = threading.Condition()
        self._scheduled = False
        self._drain_lock = asyncio.Lock()
        self._refused: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        BACKGROUND.run(self._close(flush=not interrupted, raise_failures=kind is None))

    def send(
        self,
        topic: str,
        value: bytes | None = None,
        key: bytes | None = None,
        headers: Sequence[Header] | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> SendFuture:
        """Takes one record; waits while the buffer is full. `result()` of the future waits for the acknowledgement.

        Raises UnknownTopic, UnknownPartition, AcksTooWeak, BatchTooLarge, InvalidArgument, TypeError, Unavailable.
        """
        size_bytes = check_record(value, key, headers, timestamp_ms)
        if not self._inner.knows(topic, partition):
            BACKGROUND.run(self._inner.open_topic(topic, partition))
        headers = tuple(headers) if headers else None  # the application's list may change before it is handed over
        future, loop = SendFuture(self), BACKGROUND.loop
        with self._fewer:
            while not self._may_stage(size_bytes):
                self._fewer.wait()
            self._staged.append(_Staged(future, topic, value, key, headers, partition, timestamp_ms, size_bytes))
            self._staged_bytes += size_bytes
            if not self._scheduled:
                self._scheduled = True
                asyncio.run_coroutine_threadsafe(self._drain(), loop)
        return future

    def _may_stage(self, size_bytes: int) -> bool:
        """One record may always wait alone, however large."""
        few = len(self._staged) < STAGED_RECORDS_MAX and self._staged_bytes + size_bytes <= STAGED_BYTES_MAX
        return few or not self._staged

    async def _drain(self) -> None:
        """Hands everything staged to the producer, in order."""
        async with self._drain_lock:
            while True:
                with self._fewer:
                    staged, self._staged, self._staged_bytes = self._staged, [], 0
                    if not staged:
                        self._scheduled = False
                        return
                    self._fewer.notify_all()
                await self._hand_over(staged)

    async def _hand_over(self, staged: list[_Staged]) -> None:
        """Cancelled (whoever waits for a record has no more time, and drains for all) it puts back what is left: the
        drain that was scheduled with it is still to come."""
        done = 0
        try:
            for future, topic, value, key, headers, partition, timestamp_ms, _ in staged:
                try:
                    future._inner = await self._inner.send(topic, value, key, headers, partition, timestamp_ms)
                except Exception as error:  # noqa: BLE001 - kept for the future, and for flush
                    future._error = error
                    self._refused = self._refused or error
                done += 1
        finally:
            if done < len(staged):
                with self._fewer:
                    self._staged[:0] = staged[done:]
                    self._staged_bytes = sum(record.size_bytes for record in self._staged)

    def send_many(
        self,
        topic: str,
        values: Sequence[bytes | None],
        keys: Sequence[bytes | None] | None = None,
        timestamps_ms: int | Sequence[int] | None = None,
        headers: Sequence[Sequence[Header]] | None = None,
        partition: int | None = None,
    ) -> SendResult:
        """Takes many records, in the order given; waits while the buffer is full. Raises what `send` raises."""
        return BACKGROUND.run(self._send_many(topic, values, keys, timestamps_ms, headers, partition))

    async def _send_many(
        self,
        topic: str,
        values: Sequence[bytes | None],
        keys: Sequence[bytes | None] | None,
        timestamps_ms: int | Sequence[int] | None,
        headers: Sequence[Sequence[Header]] | None,
        partition: int | None,
    ) -> SendResult:
        await self._drain()
        return SendResult(await self._inner.send_many(topic, values, keys, timestamps_ms, headers, partition))

    def flush(self) -> None:
        """Waits until everything taken so far is acknowledged or has failed; raises the first failure nobody saw."""
        BACKGROUND.run(self._flush())

    async def _flush(self) -> None:
        await self._drain()
        await self._inner.flush()
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused

    def close(self) -> None:
        """Flushes, then closes the connections."""
        BACKGROUND.run(self._close(flush=True, raise_failures=True))

    async def _close(self, *, flush: bool, raise_failures: bool) -> None:
        try:
            if flush:
                await self._flush()
        except Exception:
            if raise_failures:
                raise
        finally:
            await self._inner.close(flush=False)
