"""The producer: takes records, partitions them, waits for room, hands them to the sender."""

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from shformat import Header
from shproto.errors import AcksTooWeak, InvalidArgument, Overloaded
from shproto.rpc import Interceptors

from streamhouse.batches import Batch
from streamhouse.core.options import ACKS, ACKS_NAMES, Acks, Compression, ProducerOptions, addresses_of
from streamhouse.core.outgoing import ManyRecords, check_record, cut
from streamhouse.core.room import Room
from streamhouse.delivery import Delivery, Placed, SendFuture, SendResult
from streamhouse.gatherer import LaneState
from streamhouse.metadata import MetadataCache
from streamhouse.peers import Peers
from streamhouse.placing import TopicLanes
from streamhouse.retries import Retries
from streamhouse.sender import Sender

# send_many takes room and gives the event loop a turn after this much: 4 MiB take about 30 ms to partition and encode.
SLICE_BYTES = 4 * 1024 * 1024
_DEFAULTS = ProducerOptions()
# Failed batches that nobody asked about are remembered for the next flush, a few hundred bytes each.
UNSEEN_FAILURES_MAX = 1_000


class Producer:
    """Writes records. Use it as an async context manager: leaving it waits until everything is acknowledged.

    acks: "wal" (the leader's write-ahead log, fsynced), "durable" (object store and metadata), "none" (do not wait;
    offsets are -1). idempotent: retries are written once. linger_ms, batch_bytes: how long and how much to gather.
    buffer_bytes_max: unacknowledged records beyond it make `send` wait. delivery_timeout_ms: how long a record is
    retried before its future fails. Raises InvalidArgument for an option out of its limits.
    One producer belongs to one event loop; `streamhouse.sync.Producer` may be shared by threads.
    """

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        *,
        acks: Acks = _DEFAULTS.acks,
        linger_ms: int = _DEFAULTS.linger_ms,
        batch_bytes: int = _DEFAULTS.batch_bytes,
        compression: Compression = _DEFAULTS.compression,
        idempotent: bool = _DEFAULTS.idempotent,
        max_in_flight: int = _DEFAULTS.max_in_flight,
        buffer_bytes_max: int = _DEFAULTS.buffer_bytes_max,
        delivery_timeout_ms: int = _DEFAULTS.delivery_timeout_ms,
        request_timeout_ms: int = _DEFAULTS.request_timeout_ms,
        client_id: str = _DEFAULTS.client_id,
        telemetry: Interceptors | None = None,
    ) -> None:
        self._options = ProducerOptions(
            acks=acks,
            linger_ms=linger_ms,
            batch_bytes=batch_bytes,
            compression=compression,
            idempotent=idempotent,
            max_in_flight=max_in_flight,
            buffer_bytes_max=buffer_bytes_max,
            delivery_timeout_ms=delivery_timeout_ms,
            request_timeout_ms=request_timeout_ms,
            client_id=client_id,
        )
        addresses = addresses_of(bootstrap)
        self._peers = Peers(addresses, request_timeout_ms, telemetry)
        self._retries = Retries("delivery_timeout_ms", delivery_timeout_ms, addresses)
        self._metadata = MetadataCache(self._peers.coordinator)
        self._room: Room[asyncio.Future[None]] = Room(buffer_bytes_max)
        self._topics: dict[str, TopicLanes] = {}
        self._made_sender: Sender | None = None
        self._failures: list[Delivery] = []  # since the last flush; those that were seen meanwhile among them
        self._closed = False

    @property
    def _sender(self) -> Sender:
        """Made inside the event loop that it then belongs to."""
        if self._made_sender is None:
            self._made_sender = Sender(self._options, self._peers, self._metadata, self._on_done)
        return self._made_sender

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
            return
        # The body's error is the one to be seen; a cancelled body is not made to wait.
        await self.close(flush=not issubclass(kind, (asyncio.CancelledError, KeyboardInterrupt)), raise_failures=False)

    # ---- sending

    async def send(
        self,
        topic: str,
        value: bytes | None = None,
        key: bytes | None = None,
        headers: Sequence[Header] | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> SendFuture:
        """Takes one record; waits only while the buffer is full. `await` the future for its `RecordMetadata`.

        A record with a key goes to the key's partition as in Kafka; one without stays with the others of its batch.
        Raises UnknownTopic, UnknownPartition, AcksTooWeak, BatchTooLarge (the record alone is over the limit),
        InvalidArgument (also once closed), TypeError, Overloaded (no room within delivery_timeout_ms), Unavailable.
        """
        target = self._topics.get(topic) or await self._open_topic(topic)
        size_bytes = check_record(value, key, headers, timestamp_ms)
        if partition is not None:
            target.lane(partition)  # refused before it has taken room
        if not self._room.try_take(size_bytes):
            await self._wait_for_room(size_bytes)
        self._must_be_open(size_bytes)
        if timestamp_ms is None:
            timestamp_ms = time.time_ns() // 1_000_000
        if partition is not None:
            lane = target.lane(partition)
        elif key is not None:
            lane = target.lane_of_key(key)
        else:
            lane = target.sticky_lane(size_bytes)
        return self._sender.gatherer.add(lane, value, key, headers, timestamp_ms, size_bytes)

    async def send_many(
        self,
        topic: str,
        values: Sequence[bytes | None],
        keys: Sequence[bytes | None] | None = None,
        timestamps_ms: int | Sequence[int] | None = None,
        headers: Sequence[Sequence[Header]] | None = None,
        partition: int | None = None,
    ) -> SendResult:
        """Takes many records, in the order given; waits while the buffer is full. Lists, one entry per record.

        `await` the result for `SentRecords` (partitions and offsets as arrays). Nothing is sent if any record is
        refused; raises what `send` raises, with the record's position.
        """
        target = self._topics.get(topic) or await self._open_topic(topic)
        if partition is not None:
            target.lane(partition)
        if timestamps_ms is None:
            timestamps_ms = time.time_ns() // 1_000_000
        records = ManyRecords.of(values, keys, timestamps_ms, headers)
        placed: list[Placed] = []
        for start, stop in cut(records.sizes, min(SLICE_BYTES, self._options.buffer_bytes_max // 4)):
            size_bytes = int(records.sizes[start:stop].sum())
            if not self._room.try_take(size_bytes):
                await self._wait_for_room(size_bytes)
            else:
                await asyncio.sleep(0)  # the streams' turn
            self._must_be_open(size_bytes)
            placed.extend(self._place(target, records, start, stop, partition))
        return SendResult(topic, len(values), placed)

    async def flush(self) -> None:
        """Waits until everything taken so far is acknowledged or has failed.

        Raises the first failure that nobody has seen through a future or a result since the last flush.
        """
        if self._made_sender is not None:
            self._sender.gatherer.hurry()
            for delivery in list(self._sender.unfinished):
                await delivery.finished()
        failures, self._failures = self._failures, []
        for failure in failures:
            if not failure.seen and failure.error is not None:
                failure.seen = True
                raise failure.error

    async def close(self, *, flush: bool = True, raise_failures: bool = True) -> None:
        """Flushes (unless told not to), then closes the connections. Raises what `flush` raises, after closing."""
        if self._closed:
            return
        self._closed = True
        try:
            if flush:
                await self.flush()
        except Exception:
            if raise_failures:
                raise
        finally:
            if self._made_sender is not None:
                await self._made_sender.close()
            await self._metadata.close()
            await self._peers.close()

    # ---- topics and partitions

    def knows(self, topic: str, partition: int | None) -> bool:
        """Whether `send` would find topic and partition without asking; safe from any thread."""
        target = self._topics.get(topic)
        return target is not None and (partition is None or 0 <= partition < len(target.lanes))

    async def open_topic(self, topic: str, partition: int | None = None) -> None:
        """Asks for the topic ahead of the first `send`. Raises UnknownTopic, UnknownPartition, AcksTooWeak."""
        target = self._topics.get(topic) or await self._open_topic(topic)
        if partition is not None:
            target.lane(partition)

    async def _open_topic(self, topic: str) -> TopicLanes:
        self._must_be_open()
        state = await self._retries.run(lambda: self._metadata.topic(topic))
        # Acks ascend in strength: none, wal, durable.
        if ACKS[self._options.acks] < state.min_acks:
            weakest = ACKS_NAMES.get(state.min_acks, str(state.min_acks))
            raise AcksTooWeak(
                f"topic {topic!r} wants acks {weakest} at least, not {self._options.acks}",
                acks=self._options.acks,
                min_acks=weakest,
            )
        lanes = [self._sender.gatherer.lane(topic, number) for number in range(state.partitions)]
        return self._topics.setdefault(topic, TopicLanes(state, lanes, self._options.batch_bytes))

    def _place(
        self, target: TopicLanes, records: ManyRecords, start: int, stop: int, partition: int | None
    ) -> list[Placed]:
        """Puts records start to stop, grouped by partition, into the lanes' batches."""
        if partition is not None:
            return self._extend(target.lanes[partition], records, np.arange(start, stop))
        partitions = target.partitions(records, start, stop)
        order = np.argsort(partitions, kind="stable")
        numbers, firsts = np.unique(partitions[order], return_index=True)
        groups = np.split(order + start, firsts[1:])
        return [
            placed
            for number, indices in zip(numbers.tolist(), groups, strict=True)
            for placed in self._extend(target.lanes[number], records, indices)
        ]

    def _extend(self, lane: LaneState, records: ManyRecords, indices: NDArray[np.int64]) -> list[Placed]:
        """`indices` are ascending: the partition keeps the order given."""
        gathering = lane.gathering
        begun = gathering.size_bytes if gathering is not None else 0
        sizes = records.sizes[indices]
        placed = []
        for start, stop in cut(sizes, self._options.batch_bytes, begun):
            part = indices[start:stop]
            delivery, first = self._sender.gatherer.extend(lane, *records.pick(part), int(sizes[start:stop].sum()))
            placed.append(Placed(delivery, first, part))
        return placed

    # ---- room

    async def _wait_for_room(self, size_bytes: int) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._room.enqueue(waiter, size_bytes)
        self._sender.gatherer.hurry()
        try:
            async with asyncio.timeout(self._options.delivery_timeout_ms / 1000):
                await waiter
        except BaseException as error:
            left = self._room.leave(waiter)
            self._give_back(0 if left else size_bytes)  # in both cases there may be room for those behind it now
            if isinstance(error, TimeoutError):
                raise self._no_room(size_bytes) from None
            raise

    def _no_room(self, size_bytes: int) -> Overloaded:
        limit = self._options.buffer_bytes_max
        return Overloaded(
            f"no room for {size_bytes} bytes within delivery_timeout_ms = {self._options.delivery_timeout_ms}: "
            f"{self._room.used_bytes} of buffer_bytes_max = {limit} are not acknowledged yet",
            field="buffer_bytes_max",
            limit=limit,
            value=self._room.used_bytes,
        )

    def _must_be_open(self, taken_bytes: int = 0) -> None:
        """Raises InvalidArgument once closed, the room taken given back: nobody sends what a lane gets then."""
        if self._closed:
            self._give_back(taken_bytes)
            raise InvalidArgument("the producer is closed")

    def _on_done(self, batch: Batch) -> None:
        if batch.delivery.error is not None:
            self._remember_failure(batch.delivery)
        self._give_back(batch.size_bytes)

    def _remember_failure(self, delivery: Delivery) -> None:
        """For the next flush: the application may still learn of any of them by itself, so one is not enough."""
        if len(self._failures) >= UNSEEN_FAILURES_MAX:
            self._failures = [failure for failure in self._failures if not failure.seen]
        if len(self._failures) < UNSEEN_FAILURES_MAX:
            self._failures.append(delivery)

    def _give_back(self, size_bytes: int) -> None:
        self._room.give_back(size_bytes)
        for waiter in self._room.admit():
            if not waiter.done():
                waiter.set_result(None)
