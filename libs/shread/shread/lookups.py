"""Offsets by position (earliest, latest) and by timestamp."""

from __future__ import annotations

import asyncio

from shcluster.index import PartitionIndex
from shcluster.live_index import LiveIndex
from shformat import BlockEntry, FormatError, decode_batch, read_batch_header
from shproto.errors import DataLoss, StreamHouseError, Unavailable
from shproto.keys import PartitionKey
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.model import Segment
from shproto.v1 import ingest_pb2
from shruntime.tasks import Backoff
from shstore import ObjectMissing

from shread.core.plan import ReadTail, Wait, plan, went_back_reason
from shread.core.timestamps import AtEnd, LookInSegment, LookInTail, first_at, look
from shread.fetch import fetch
from shread.reads import Reads, Want

# Bytes of a tail searched for a timestamp, per call to the agent.
TAIL_BYTES = 4 * 1024 * 1024

Found = tuple[int, int]
"""(offset, timestamp in ms; -1 at the end of the partition)."""


class Lookups:
    """Look-ups of offsets. All raise Unavailable while the truth is unknown: a guess would make a reader skip or
    repeat."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._index: LiveIndex = reads.index

    def earliest(self, partition: PartitionIndex) -> Found:
        """Returns the start of the log; its timestamp is not known (-1)."""
        return partition.log_start_offset, -1

    async def latest(self, key: PartitionKey, topic: str) -> Found:
        """Returns the high watermark, from the leader unless all records are registered."""
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        deadline_ms = self._reads.clock.monotonic_ms() + self._reads.catch_up_ms
        with self._index.watch(key) as watch:
            while True:
                watch.arm()
                partition = self._index.get(key, topic)
                if self._index.cluster.missing_position:
                    reason = went_back_reason(self._index.cluster, partition.name, partition.known_end)
                    raise Unavailable(f"the end of {partition.name} is not known: {reason}", retry_after_ms=1_000)
                newest = partition.ranges[-1] if partition.ranges else None
                if newest is None or newest.end_offset is not None:
                    return partition.known_end, -1
                if partition.durable_only:
                    return newest.registered_end, -1
                high_watermark = await self._ask_leader(partition, newest.epoch, newest.registered_end)
                if high_watermark is not None:
                    return high_watermark, -1
                remaining_ms = deadline_ms - self._reads.clock.monotonic_ms()
                if remaining_ms <= 0:
                    raise Unavailable(
                        f"{partition.name}: agent {newest.agent_id} does not hold epoch {newest.epoch} yet",
                        retry_after_ms=RETRY_MS_MAX,
                    )
                await asyncio.wait((watch.changed,), timeout=min(backoff.next_ms(), remaining_ms) / 1000)

    async def first_of_last(self, key: PartitionKey, topic: str, count: int) -> Found:
        """Returns the offset of the first of the last `count` records, counted as PartitionIndex.first_of_last does."""
        end, _ = await self.latest(key, topic)
        return self._index.get(key, topic).first_of_last(count, end), -1

    async def _ask_leader(self, partition: PartitionIndex, epoch: int, registered_end: int) -> int | None:
        """Returns the leader's high watermark, or None if the leader does not hold the range (yet)."""
        step = plan(self._index.cluster, partition, registered_end)
        if isinstance(step, Wait):
            raise Unavailable(f"the end of {partition.name} is not known: {step.reason}", retry_after_ms=1_000)
        if not isinstance(step, ReadTail):
            return None
        request = ingest_pb2.ReadTailRequest(
            topic_id=partition.topic_id,
            partition=partition.partition,
            offset=registered_end,
            max_bytes=1,
        )
        try:
            response = await self._reads.read_tail(step, request)
        except StreamHouseError as error:
            raise Unavailable(
                f"the end of {partition.name} is not known: agent {step.agent_id} at {step.address}: {error}",
                retry_after_ms=1_000,
            ) from error
        if response.not_held:
            return None
        self._reads.watermarks.learn(partition.key, epoch, response.high_watermark)
        return max(registered_end, response.high_watermark)

    # ---- by timestamp

    async def at_timestamp(self, key: PartitionKey, topic: str, timestamp_ms: int) -> Found:
        """Returns the first record, in offset order, at or after the timestamp; without such a record, the end."""
        from_offset = self._index.get(key, topic).log_start_offset
        while True:
            partition = self._index.get(key, topic)
            where = look(partition, timestamp_ms, from_offset)
            match where:
                case LookInSegment(segment):
                    found = await self._in_segment(partition, segment, timestamp_ms, from_offset)
                    from_offset = segment.end_offset
                case LookInTail(offset):
                    found, from_offset = await self._in_tail(partition, timestamp_ms, offset)
                case AtEnd():
                    return await self.latest(key, topic)
            if found is not None:
                return found

    async def _in_segment(
        self, partition: PartitionIndex, segment: Segment, timestamp_ms: int, from_offset: int
    ) -> Found | None:
        segments = self._reads.segments
        try:
            index = await segments.open(partition, segment)
            first = max(index.find_timestamp(timestamp_ms), index.find(from_offset))
            for position in range(first, len(index)):
                entry: BlockEntry = index[position]
                if entry.max_timestamp_ms >= timestamp_ms:
                    blocks = await segments.read_blocks(partition, segment, [entry])
                    found = await asyncio.to_thread(_search, blocks, timestamp_ms, from_offset)
                    if found is not None:
                        return found
        except ObjectMissing as error:  # compacted or removed meanwhile, most likely: the next try sees the new index
            raise Unavailable(f"{partition.name}: {error}", retry_after_ms=1_000) from error
        except FormatError as error:
            raise DataLoss(f"{partition.name}: {segment.object_key}: {error}") from error
        return None

    async def _in_tail(self, partition: PartitionIndex, timestamp_ms: int, offset: int) -> tuple[Found | None, int]:
        """Returns the record found, or None, and the offset to go on at."""
        fetched = await fetch(
            self._reads, Want(partition=partition.key, topic=partition.topic, offset=offset, bytes_max=TAIL_BYTES)
        )
        if fetched.waiting_reason:
            raise Unavailable(
                f"{partition.name}: offsets from {offset} on can not be searched now: {fetched.waiting_reason}",
                retry_after_ms=1_000,
            )
        if not fetched.batches and fetched.next_offset == offset:
            return (offset, -1), offset
        found = await asyncio.to_thread(_search, fetched.batches, timestamp_ms, offset)
        return found, fetched.next_offset


def _search(batches: list[bytes], timestamp_ms: int, from_offset: int) -> Found | None:
    for batch in batches:
        if read_batch_header(batch).max_timestamp_ms >= timestamp_ms:
            found = first_at(decode_batch(batch), timestamp_ms, from_offset)
            if found is not None:
                return found
    return None
