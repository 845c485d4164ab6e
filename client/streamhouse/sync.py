"""The client for plain code: the same `Producer`, `Consumer` and `Admin`, without async.

All share one event loop on one background thread. A producer and an admin may be used by several threads at once; a
consumer by one at a time.
"""

import asyncio
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Literal, NamedTuple, Self, Unpack

import numpy as np
from numpy.typing import NDArray
from shformat import Header
from shproto.rpc import Interceptors

from streamhouse import admin, cluster, consumer, delivery, group_admin, producer
from streamhouse.background import BACKGROUND
from streamhouse.core.lag import Lag
from streamhouse.core.options import Acks, ConsumerKwargs, ProducerKwargs, Start
from streamhouse.core.outgoing import check_record
from streamhouse.delivery import SentRecords
from streamhouse.records import Record, RecordBatch, RecordMetadata, TopicPartition

__all__ = ["Admin", "Consumer", "Producer", "SendFuture", "SendResult"]

# Records wait here for the loop's thread to come round; beyond this the sending thread waits for it.
STAGED_RECORDS_MAX = 10_000


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
        check_record(value, key, headers, timestamp_ms)
        if not self._inner.knows(topic, partition):
            BACKGROUND.run(self._inner.open_topic(topic, partition))
        future = SendFuture(self)
        with self._fewer:
            while len(self._staged) >= STAGED_RECORDS_MAX:
                self._fewer.wait()
            self._staged.append(_Staged(future, topic, value, key, headers, partition, timestamp_ms))
            if not self._scheduled:
                self._scheduled = True
                asyncio.run_coroutine_threadsafe(self._drain(), BACKGROUND.loop)
        return future

    async def _drain(self) -> None:
        """Hands everything staged to the producer, in order."""
        async with self._drain_lock:
            while True:
                with self._fewer:
                    staged, self._staged = self._staged, []
                    if not staged:
                        self._scheduled = False
                        return
                    self._fewer.notify_all()
                for future, topic, value, key, headers, partition, timestamp_ms in staged:
                    try:
                        future._inner = await self._inner.send(topic, value, key, headers, partition, timestamp_ms)
                    except Exception as error:  # noqa: BLE001 - kept for the future, and for flush
                        future._error = error
                        self._refused = self._refused or error

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


class Consumer:
    """Reads records; see `streamhouse.Consumer` for the options and for what is committed when."""

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        topics: Sequence[str] = (),
        *,
        assign: Sequence[tuple[str, int]] = (),
        telemetry: Interceptors | None = None,
        **options: Unpack[ConsumerKwargs],
    ) -> None:
        self._inner = consumer.Consumer(bootstrap, topics, assign=assign, telemetry=telemetry, **options)

    def __enter__(self) -> Self:
        BACKGROUND.run(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        BACKGROUND.run(self._inner.close(done_with_last=kind is None))

    def __iter__(self) -> Self:
        self._inner.__aiter__()
        return self

    def __next__(self) -> Record:
        while True:
            for record in self._inner._walk:
                return record
            if not BACKGROUND.run(self._inner._advance()):
                raise StopIteration

    def batches(self) -> Iterator[RecordBatch]:
        """Records as columns, a `RecordBatch` of one partition at a time."""
        self._inner.__aiter__()
        while (batch := self._inner._rest()) is not None or BACKGROUND.run(self._inner._advance()):
            if batch is not None:
                yield batch

    def commit(self, offsets: Mapping[tuple[str, int], int] | None = None) -> None:
        """Stores where the group goes on: everything handed over so far, or the `offsets` given."""
        BACKGROUND.run(self._inner.commit(offsets))

    def seek(self, topic: str, partition: int, offset: Start) -> None:
        """Goes on at `offset` (or at an end, or a time)."""
        BACKGROUND.run(self._inner.seek(topic, partition, offset))

    def lag(self) -> dict[TopicPartition, Lag]:
        """Records still to be handed over, per partition."""
        return BACKGROUND.run(self._inner.lag())

    def positions(self) -> dict[TopicPartition, int]:
        """The next offset that will be handed over, per partition."""
        return self._inner.positions()

    @property
    def assignment(self) -> frozenset[TopicPartition]:
        """The partitions being read."""
        return self._inner.assignment

    @property
    def waiting(self) -> Mapping[TopicPartition, str]:
        """Why partitions that cannot be read on at the moment wait."""
        return self._inner.waiting

    def close(self) -> None:
        """Commits (with auto_commit), leaves the group, closes the connections."""
        BACKGROUND.run(self._inner.close())


class Admin:
    """Topics, offsets, status; see `streamhouse.Admin`."""

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        *,
        request_timeout_ms: int = admin.REQUEST_TIMEOUT_MS,
        telemetry: Interceptors | None = None,
    ) -> None:
        self._inner = admin.Admin(bootstrap, request_timeout_ms=request_timeout_ms, telemetry=telemetry)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def create_topic(
        self,
        topic: str,
        partitions: int = 1,
        *,
        retention_ms: int | None = None,
        retention_bytes: int | None = None,
        min_acks: Acks = "wal",
        unclean_recovery_after_ms: int | None = None,
    ) -> cluster.Topic:
        """Raises TopicExists, InvalidArgument."""
        return BACKGROUND.run(
            self._inner.create_topic(
                topic,
                partitions,
                retention_ms=retention_ms,
                retention_bytes=retention_bytes,
                min_acks=min_acks,
                unclean_recovery_after_ms=unclean_recovery_after_ms,
            )
        )

    def list_topics(self) -> list[cluster.Topic]:
        return BACKGROUND.run(self._inner.list_topics())

    def describe_topic(self, topic: str) -> cluster.TopicDescription:
        """Raises UnknownTopic."""
        return BACKGROUND.run(self._inner.describe_topic(topic))

    def delete_topic(self, topic: str) -> str:
        """The deleted topic's id. Raises UnknownTopic."""
        return BACKGROUND.run(self._inner.delete_topic(topic))

    def status(self) -> cluster.ClusterStatus:
        return BACKGROUND.run(self._inner.status())

    def offsets(
        self, topic: str, at: Literal["earliest", "latest"] | int | datetime, partitions: Iterable[int] | None = None
    ) -> dict[TopicPartition, cluster.FoundOffset]:
        """Where each partition begins, ends, or has its first record at or after a time."""
        return BACKGROUND.run(self._inner.offsets(topic, at, partitions))

    def group_offsets(self, group: str) -> list[cluster.CommittedOffset]:
        """What the group has committed. Raises UnknownGroup."""
        return BACKGROUND.run(self._inner.group_offsets(group))

    def commit_group_offsets(self, group: str, offsets: dict[tuple[str, int], int]) -> None:
        """Sets where a group without members goes on."""
        BACKGROUND.run(self._inner.commit_group_offsets(group, offsets))

    def list_groups(self) -> list[group_admin.Group]:
        return BACKGROUND.run(self._inner.list_groups())

    def describe_group(self, group: str) -> group_admin.GroupDescription:
        """Members, what they work on, positions and lag. Raises UnknownGroup."""
        return BACKGROUND.run(self._inner.describe_group(group))

    def reset_offsets(
        self,
        group: str,
        to: group_admin.ResetTo,
        *,
        topic: str | None = None,
        partition: int | None = None,
        execute: bool = False,
    ) -> list[group_admin.OffsetReset]:
        """Where the group would go on; only with `execute` it does. Raises GroupNotEmpty then, while it has members."""
        return BACKGROUND.run(self._inner.reset_offsets(group, to, topic=topic, partition=partition, execute=execute))

    def delete_group(self, group: str) -> None:
        """With its committed offsets. Raises UnknownGroup, GroupNotEmpty."""
        BACKGROUND.run(self._inner.delete_group(group))

    def orphaned_ranges(self, topic: str, partition: int) -> list[cluster.OffsetRange]:
        """What readers of the partition wait for, and only an agent that is gone has."""
        return BACKGROUND.run(self._inner.orphaned_ranges(topic, partition))

    def declare_lost(
        self, topic: str, partition: int, epochs: Sequence[int], reason: str = ""
    ) -> list[cluster.OffsetRange]:
        """Gives up what is not registered of these orphaned ranges, for good."""
        return BACKGROUND.run(self._inner.declare_lost(topic, partition, epochs, reason))

    def close(self) -> None:
        BACKGROUND.run(self._inner.close())
