"""A bounded scan of a partition: the blocks of a range of offsets, in order, without those that are too old.

Owns: nothing beyond the scan. Does not own: index, segments, the agents' tails (reads.py, fetch.py).
Invariants: every record of the range whose timestamp is `timestamp_min_ms` or later is in a yielded block; blocks may
hold records outside of the range, too. Offsets are never stepped over in silence: lost or unreachable records raise.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from shformat import BlockEntry, read_batch_header
from shproto.errors import Unavailable
from shproto.keys import PartitionKey
from shproto.model import Segment
from shstore import ObjectMissing

from shread.core.plan import ReadSegment, plan
from shread.fetch import fetch
from shread.reads import Reads, Want

# Decoded bytes of one step: large enough that a step's fixed cost (a plan, a thread) does not show, small enough that
# the scans of a few partitions fit into memory.
STEP_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRange:
    """Offsets [offset_from, offset_to) of a partition. Records with a timestamp below `timestamp_min_ms` (None: no
    limit) are not wanted."""

    partition: PartitionKey
    topic: str
    offset_from: int
    offset_to: int
    timestamp_min_ms: int | None = None


async def scan(reads: Reads, wanted: ScanRange, *, max_wait_ms: int) -> AsyncGenerator[list[bytes]]:
    """Yields runs of encoded batches that hold the wanted records. A run is about STEP_BYTES once decoded, or a single
    batch of any size.

    `max_wait_ms`: longest wait for records that exist and cannot be read at the moment; then raises Unavailable, with
    the reason. Raises DataLoss, OffsetBelowStart (retention came first), UnknownTopic (deleted meanwhile).
    """
    offset = wanted.offset_from
    while offset < wanted.offset_to:
        partition = reads.index.get(wanted.partition, wanted.topic)
        step = plan(reads.index.cluster, partition, offset)
        if isinstance(step, ReadSegment):
            if _is_too_old(step.segment, wanted):
                offset = step.segment.end_offset
                continue
            run = await _read_segment(reads, step.segment, offset, wanted)
            if run is not None:
                batches, offset = run
                if batches:
                    yield batches
                continue
        want = Want(
            partition=wanted.partition,
            topic=wanted.topic,
            offset=offset,
            bytes_max=STEP_BYTES,
            # A byte more would make a fetch wait for records that are not written yet.
            bytes_min=1,
            max_wait_ms=max_wait_ms,
            decoded_bytes_max=STEP_BYTES,
        )
        fetched = await fetch(reads, want)
        if fetched.next_offset <= offset:
            reason = (
                fetched.waiting_reason or "no records came, though the end of the partition is known to be further on"
            )
            raise Unavailable(f"{partition.name}: offset {offset} cannot be read now: {reason}", retry_after_ms=1_000)
        offset = fetched.next_offset
        batches = [batch for batch in fetched.batches if not _is_batch_too_old(batch, wanted)]
        if batches:
            yield batches


async def _read_segment(
    reads: Reads, segment: Segment, offset: int, wanted: ScanRange
) -> tuple[list[bytes], int] | None:
    """Returns the next wanted blocks of the segment, and the offset to go on at; None if its object is gone, which
    `fetch` finds out the reason of: compaction, retention or a loss."""
    partition = reads.index.get(wanted.partition, wanted.topic)
    try:
        index = await reads.segments.open(partition, segment)
        entries: list[BlockEntry] = []
        decoded_bytes = 0
        next_offset = segment.end_offset
        for position in range(index.find(offset), len(index)):
            entry = index[position]
            if entry.first_offset >= wanted.offset_to:
                break
            if wanted.timestamp_min_ms is not None and entry.max_timestamp_ms < wanted.timestamp_min_ms:
                continue
            if entries and decoded_bytes + entry.decoded_bytes > STEP_BYTES:
                next_offset = entry.first_offset
                break
            entries.append(entry)
            decoded_bytes += entry.decoded_bytes
        if not entries:
            return [], next_offset
        blocks = await reads.segments.read_blocks(partition, segment, entries)
    except ObjectMissing:
        return None
    last = entries[-1]
    reads.ahead(wanted.partition, segment, offset, next_offset, segment.object_at + last.at + last.size_bytes)
    return blocks, next_offset


def _is_too_old(segment: Segment, wanted: ScanRange) -> bool:
    return wanted.timestamp_min_ms is not None and segment.max_timestamp_ms < wanted.timestamp_min_ms


def _is_batch_too_old(batch: bytes, wanted: ScanRange) -> bool:
    if wanted.timestamp_min_ms is None:
        return False
    return read_batch_header(batch).max_timestamp_ms < wanted.timestamp_min_ms
