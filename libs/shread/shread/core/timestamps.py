"""Finds the first record at or after a timestamp in offset order: in segments, then in the tail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from shcluster.index import PartitionIndex
from shformat import Records
from shproto.model import Range, RangeStatus, Segment


@dataclass(frozen=True, slots=True)
class LookInSegment:
    """The segment has records that may be late enough."""

    segment: Segment


@dataclass(frozen=True, slots=True)
class LookInTail:
    """Records from `offset` on are not registered yet; if none of them is late enough, go on at `resume_offset`."""

    offset: int
    resume_offset: int


@dataclass(frozen=True, slots=True)
class AtEnd:
    """No record of the partition is late enough."""


def look(partition: PartitionIndex, timestamp_ms: int, from_offset: int) -> LookInSegment | LookInTail | AtEnd:
    """Returns the next place, from `from_offset` on, that may hold a record at or after the timestamp."""
    from_offset = max(from_offset, partition.log_start_offset)
    segment = partition.segment_reaching(timestamp_ms, from_offset)
    tail = _first_tail(partition, from_offset)
    # In offset order: the unregistered end of an older epoch lies before the segments of later epochs.
    if segment is not None and (tail is None or segment.base_offset < tail.offset):
        return LookInSegment(segment)
    return tail or AtEnd()


def _first_tail(partition: PartitionIndex, from_offset: int) -> LookInTail | None:
    for item in partition.ranges:
        start, end = max(item.registered_end, from_offset), _end(item)
        if item.status is not RangeStatus.LOST and start < end:
            return LookInTail(start, end)
    return None


def _end(item: Range) -> int:
    return item.limit_offset if item.end_offset is None else item.end_offset


def first_at(records: Records, timestamp_ms: int, from_offset: int) -> tuple[int, int] | None:
    """Returns offset and timestamp of the first record with offset >= from_offset and timestamp >= timestamp_ms."""
    late = (records.timestamps_ms >= timestamp_ms) & (records.offsets >= from_offset)
    position = int(np.argmax(late)) if len(late) else 0
    if not len(late) or not late[position]:
        return None
    return int(records.offsets[position]), int(records.timestamps_ms[position])
