"""Writes a numbered stream of records to one partition, each record once, under a producer epoch that fences.

The caller numbers the records; a record keeps its number for ever, however batches are cut and whoever leads. After any
failure a fence tells how far the leader has come, and the rest is sent from there.

Owns: the address of the leader, the topic's id as it was first seen. Does not own: the records, the producer id and its
epochs, the connections.
Invariants: one call at a time. A sequence is never given to another record, and never sent under another epoch. Nothing
is reported as written that the leader has not acknowledged, for a batch or in the answer to a fence.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from shformat import (
    DEFAULT_LIMITS,
    TIMESTAMP_MS_MAX,
    TIMESTAMP_MS_MIN,
    BytesColumn,
    Codec,
    FormatError,
    HeadersColumn,
    ProducerStamp,
    Records,
    encode_batch,
)
from shformat.limits import INT64_MAX
from shproto.acks import ACKS, Acks
from shproto.errors import (
    BatchTooLarge,
    Internal,
    InvalidArgument,
    InvalidBatch,
    NotLeader,
    ProducerNotFenced,
    SequenceGap,
    StreamHouseError,
    Unavailable,
    UnknownTopic,
)
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.v1 import coordinator_pb2, ingest_pb2
from shruntime.tasks import Backoff

from shcluster.peers import Peers

Int64s = NDArray[np.int64]

# Batches that are sent before the first is answered: two group commits' worth on one partition.
_IN_FLIGHT_MAX = 8
# Longest wait of one try of a fence: a leader that is gone must not hold the call up for all of its time.
_FENCE_WAIT_MS_MAX = 10_000
# The leader answers within its own time; the answer needs time to travel.
_ANSWER_GRACE_MS = 5_000
# Errors after which the leader is asked by a fence, besides those that are retriable: it has changed, a batch before
# was refused, or a call was cut off in the middle.
_FENCE_AGAIN = (ProducerNotFenced, SequenceGap, Internal)
# A record's or header's cost in a batch besides its bytes: lengths and timestamp, at most 30. So the records of a batch
# of batch_bytes have a limit also where they are empty: 524,288 in the largest, half of record_count_max.
_OVERHEAD_BYTES = 32
# A record alone may fill a batch: the limit of the format, minus its header and tables.
_RECORD_BYTES_MAX = DEFAULT_LIMITS.batch_bytes_max - 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Answer to a fence. `last_sequence`, `last_offset`: of the producer's last record in the partition; -1: it has
    none. `last_record_count`: of that record's batch."""

    last_sequence: int
    last_record_count: int
    last_offset: int

    @property
    def next_sequence(self) -> int:
        """Sequence at which the producer goes on."""
        return self.last_sequence + 1


class SequencedWriter:
    """Writer of one producer epoch to one partition.

    `producer_id` comes from InitProducer; `producer_epoch`, at least 1, is raised by each successor of a writer, which
    must fence before it writes. `timeout_ms`: of a call in all. `batch_bytes`: size at which batches are cut, before
    compression; a larger record has a batch of its own.
    """

    def __init__(
        self,
        peers: Peers,
        topic: str,
        partition: int,
        *,
        producer_id: int,
        producer_epoch: int,
        acks: Acks = "durable",
        codec: Codec = Codec.LZ4,
        batch_bytes: int = 1024 * 1024,
        request_timeout_ms: int = 30_000,
        timeout_ms: int = 120_000,
    ) -> None:
        if acks == "none":
            raise InvalidArgument("acks none acknowledges nothing", field="acks", value=acks, limit="wal, durable")
        if not 1 <= batch_bytes <= DEFAULT_LIMITS.batch_bytes_max:
            limit = f"1..{DEFAULT_LIMITS.batch_bytes_max}"
            raise InvalidArgument(
                f"batch_bytes is {batch_bytes}, must be 1 to {DEFAULT_LIMITS.batch_bytes_max}",
                field="batch_bytes",
                value=batch_bytes,
                limit=limit,
            )
        self._peers = peers
        self._topic = topic
        self._partition = partition
        self._producer_id = producer_id
        self._producer_epoch = producer_epoch
        self._acks = ACKS[acks]
        self._codec = codec
        self._batch_bytes = batch_bytes
        self._request_timeout_ms = request_timeout_ms
        self._timeout_ms = timeout_ms
        self._topic_id = b""
        self._leader = ""

    async def fence(self) -> Fence:
        """Refuses older epochs of the producer in the partition from now on, and returns its last record there,
        at this writer's ack level.

        Raises ProducerFenced if a newer epoch has fenced; Unavailable if the time is over, say because the log of an
        older leader is not back yet: the message names its agent; DataLoss if the last batch was given up.
        """
        return await self._fence(self._deadline_s())

    async def write(
        self,
        first_sequence: int,
        values: BytesColumn,
        keys: BytesColumn | None = None,
        *,
        headers: HeadersColumn | None = None,
        timestamps_ms: Int64s | int,
    ) -> int:
        """Writes the records with the sequences from `first_sequence` on, those that are not in the partition yet;
        returns the offset of the last one, -1 if it was written before and others follow it.

        The columns have an entry per record, and must not change before this returns; batches are views of them. A
        record that no batch may hold is refused before any is sent, with InvalidArgument or BatchTooLarge.
        Raises ProducerFenced once a newer epoch has fenced; SequenceGap if records before `first_sequence` are missing
        (details: expected, from where to write again: an older leader's log was given up); and the errors of a call
        whose time is over: the next fence tells how much was written.
        """
        records = _records(values, keys, headers, timestamps_ms)
        ends = _ends(records)
        _check(self._where, first_sequence, records, ends)
        deadline_s, backoff = self._deadline_s(), Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        done, last_offset = 0, -1
        while done < len(records):
            error = None
            try:
                async with aclosing(self._send(first_sequence, records, ends, done, deadline_s)) as acknowledged:
                    async for progress in acknowledged:
                        done, last_offset = progress
                        backoff.reset()
            except StreamHouseError as raised:
                if _is_final(raised):
                    raise
                error = raised
            if error is None:
                continue
            await self._pause(error, backoff, deadline_s)
            fence = await self._fence(deadline_s)
            if fence.next_sequence < first_sequence:
                raise SequenceGap(
                    f"{self._where}: sequence {first_sequence} is next, but the partition ends at "
                    f"{fence.last_sequence}: the records between are not there",
                    topic=self._topic,
                    partition=self._partition,
                    producer_id=self._producer_id,
                    expected=fence.next_sequence,
                    got=first_sequence,
                )
            done = min(fence.next_sequence - first_sequence, len(records))
            last_offset = fence.last_offset if fence.next_sequence == first_sequence + len(records) else -1
        return last_offset

    @property
    def _where(self) -> str:
        return f"{self._topic}/{self._partition}"

    def _deadline_s(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_ms / 1000

    # ---- fencing

    async def _fence(self, deadline_s: float) -> Fence:
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        while True:
            try:
                answer = await self._ask_fence(deadline_s)
            except StreamHouseError as error:
                if _is_final(error):
                    raise
                await self._pause(error, backoff, deadline_s)
            else:
                return Fence(
                    last_sequence=answer.last_sequence,
                    last_record_count=answer.last_record_count,
                    last_offset=answer.last_offset,
                )

    async def _ask_fence(self, deadline_s: float) -> ingest_pb2.FenceProducerResponse:
        left_ms = int((deadline_s - asyncio.get_running_loop().time()) * 1000)
        request = ingest_pb2.FenceProducerRequest(
            topic=self._topic,
            partition=self._partition,
            producer_id=self._producer_id,
            producer_epoch=self._producer_epoch,
            acks=self._acks,
            # Below the time of the call itself, so that the leader's reason arrives.
            max_wait_ms=max(1, min(left_ms, _FENCE_WAIT_MS_MAX, self._request_timeout_ms // 2)),
        )
        leader = await self._find_leader()
        request.topic_id = self._topic_id
        return await self._peers.ingest(leader).fence_producer(request)

    # ---- sending

    async def _send(
        self, first_sequence: int, records: Records, ends: Int64s, done: int, deadline_s: float
    ) -> AsyncGenerator[tuple[int, int], None]:
        """Sends the records from the position `done` on, over one stream; yields the position behind each acknowledged
        batch, and the offset before that. Raises the error of the first batch that is refused."""
        leader = await self._find_leader()
        await self._peers.connect(leader)
        in_flight: deque[int] = deque()
        room = asyncio.Semaphore(_IN_FLIGHT_MAX)
        bad: list[InvalidBatch] = []

        async def requests() -> AsyncIterator[ingest_pb2.ProduceRequest]:
            for start, stop in _cuts(ends, done, self._batch_bytes):
                await room.acquire()
                try:
                    request = self._request(first_sequence + start, records.slice(start, stop))
                except InvalidBatch as error:  # gRPC would take it for a defect of this iterator
                    bad.append(error)
                    return
                in_flight.append(stop)
                yield request

        last = len(records)
        stream = cast(
            "AsyncGenerator[ingest_pb2.ProduceResponse, None]", self._peers.ingest(leader).produce_stream(requests())
        )
        async with aclosing(stream) as answers:
            while done < last:
                answer = await self._next(answers, deadline_s)
                if bad and not in_flight:
                    raise bad[0]
                if answer is None or not in_flight:
                    raise Unavailable(f"{self._where}: the leader at {leader} ended the stream")
                if answer.HasField("error"):
                    raise StreamHouseError.from_detail(answer.error)
                done = in_flight.popleft()
                room.release()
                yield done, answer.base_offset + answer.record_count - 1

    async def _next(
        self, answers: AsyncIterator[ingest_pb2.ProduceResponse], deadline_s: float
    ) -> ingest_pb2.ProduceResponse | None:
        """Returns the next answer, None at the end of the stream. Raises Unavailable if it takes too long."""
        loop = asyncio.get_running_loop()
        by_s = min(deadline_s, loop.time() + (self._request_timeout_ms + _ANSWER_GRACE_MS) / 1000)
        try:
            async with asyncio.timeout_at(by_s) as timeout:
                return await anext(answers, None)
        except StreamHouseError as error:
            # Of the stream, not of a batch: the batches in flight have no answer.
            raise Unavailable(f"{self._where}: the stream to the leader broke: {error.message}") from error
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise Unavailable(f"{self._where}: the leader did not answer in time") from error

    def _request(self, sequence: int, records: Records) -> ingest_pb2.ProduceRequest:
        stamp = ProducerStamp(self._producer_id, self._producer_epoch, sequence)
        try:
            batch = encode_batch(records, codec=self._codec, producer=stamp)
        except FormatError as error:
            raise InvalidBatch(f"{self._where}: these records make no batch: {error}", what=error.what) from error
        return ingest_pb2.ProduceRequest(
            topic=self._topic,
            topic_id=self._topic_id,
            partition=self._partition,
            acks=self._acks,
            sequenced_batch=batch,
            timeout_ms=self._request_timeout_ms,
        )

    # ---- the leader

    async def _find_leader(self) -> str:
        """Returns the address of the leader. Raises NotLeader if there is none now, UnknownTopic if the topic is
        another one than at first: its partitions know nothing of this producer."""
        if self._leader:
            return self._leader
        request = coordinator_pb2.GetMetadataRequest(topics=[self._topic])
        response = await self._peers.coordinator.get_metadata(request)
        found = next((item for item in response.topics if item.topic.topic == self._topic), None)
        if found is None or (self._topic_id and found.topic.topic_id != self._topic_id):
            raise UnknownTopic(f"topic {self._topic} was deleted", topic=self._topic)
        leader = next((item.address for item in found.leaders if item.partition == self._partition), "")
        if not leader:
            raise NotLeader(f"{self._where} has no leader at the moment", topic=self._topic, partition=self._partition)
        self._topic_id, self._leader = found.topic.topic_id, leader
        return leader

    async def _pause(self, error: StreamHouseError, backoff: Backoff, deadline_s: float) -> None:
        """Waits before the next try. Raises `error` if the time would be over then."""
        self._leader = ""
        wait_s = (error.retry_after_ms + backoff.next_ms()) / 1000
        if asyncio.get_running_loop().time() + wait_s >= deadline_s:
            raise error
        await asyncio.sleep(wait_s)


def _is_final(error: StreamHouseError) -> bool:
    return not error.retriable and not isinstance(error, _FENCE_AGAIN)


def _records(
    values: BytesColumn,
    keys: BytesColumn | None,
    headers: HeadersColumn | None,
    timestamps_ms: Int64s | int,
) -> Records:
    """Returns the columns as records. Raises InvalidArgument for a column of another length."""
    count = len(values)
    if isinstance(timestamps_ms, int):
        timestamps_ms = np.full(count, timestamps_ms, np.int64)
    keys = BytesColumn.nulls(count) if keys is None else keys
    for field, column in (("keys", keys), ("headers", headers), ("timestamps_ms", timestamps_ms)):
        if column is not None and len(column) != count:
            raise InvalidArgument(
                f"{field} has {len(column)} entries for {count} values", field=field, value=len(column), limit=count
            )
    return Records(offsets=np.arange(count), timestamps_ms=timestamps_ms, keys=keys, values=values, headers=headers)


def _check(where: str, first_sequence: int, records: Records, ends: Int64s) -> None:
    """Refuses records of which no batch can be made, so that nothing is written of a call that cannot be done.
    Raises InvalidArgument, BatchTooLarge."""
    if not 0 <= first_sequence <= INT64_MAX - len(records):
        raise InvalidArgument(
            f"first_sequence is {first_sequence}, must be 0 to {INT64_MAX - len(records)}",
            field="first_sequence",
            value=first_sequence,
            limit=f"0..{INT64_MAX - len(records)}",
        )
    if not len(records):
        return
    stamps = records.timestamps_ms
    for bad in (int(stamps.min()), int(stamps.max())):
        if not TIMESTAMP_MS_MIN <= bad <= TIMESTAMP_MS_MAX:
            raise InvalidArgument(
                f"{where}: a timestamp is {bad} ms, must be {TIMESTAMP_MS_MIN} to {TIMESTAMP_MS_MAX}",
                field="timestamps_ms",
                value=bad,
                limit=f"{TIMESTAMP_MS_MIN}..{TIMESTAMP_MS_MAX}",
            )
    if records.headers is not None:
        most = int(np.diff(records.headers.ends, prepend=0).max())
        if most > DEFAULT_LIMITS.headers_per_record_max:
            limit = DEFAULT_LIMITS.headers_per_record_max
            raise InvalidArgument(
                f"{where}: a record has {most} headers, may have {limit}",
                field="headers",
                value=most,
                limit=limit,
            )
    sizes = np.diff(ends, prepend=0)
    at = int(sizes.argmax())
    if sizes[at] > _RECORD_BYTES_MAX:
        raise BatchTooLarge(
            f"{where}: the record of sequence {first_sequence + at} has {sizes[at]} bytes, a record may have "
            f"{_RECORD_BYTES_MAX}",
            size_bytes=int(sizes[at]),
            limit_bytes=_RECORD_BYTES_MAX,
        )


def _ends(records: Records) -> Int64s:
    """Returns the bytes that the records up to each count for, the record included; int64, shape (n,)."""
    ends = records.keys.ends + records.values.ends + np.arange(1, len(records) + 1) * _OVERHEAD_BYTES
    if records.headers is not None and len(records.headers.names):
        flat = np.concatenate([np.zeros(1, np.int64), records.headers.names.ends + records.headers.values.ends])
        ends += flat[records.headers.ends] + records.headers.ends * _OVERHEAD_BYTES
    return ends


def _cuts(ends: Int64s, start: int, batch_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of batches of at most `batch_bytes`, or of a single record."""
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + batch_bytes, side="right")))
        yield start, stop
        start = stop
