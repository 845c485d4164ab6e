"""Lag of a consumer group in a partition, as far as the index and the leaders' latest answers tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shcluster.index import PartitionIndex
from shproto.model import Range, RangeStatus


@dataclass(frozen=True, slots=True)
class GroupLag:
    """Number of `records` still to be read, and age of the first of them in ms."""

    records: int
    behind_ms: int

    def __add__(self, other: GroupLag) -> GroupLag:
        """Returns the lag of two partitions together: the sum of the records, the greater age."""
        return GroupLag(self.records + other.records, max(self.behind_ms, other.behind_ms))


def lag_of(partition: PartitionIndex, offset: int, end_offset: int, now_ms: int) -> GroupLag:
    """Returns the lag of a reader whose next record is at `offset`; `end_offset` is the partition's.

    The time of a record is taken for that of the newest record of its segment. Records outside segments are 0 ms old:
    they are sealed within seconds.
    """
    offset = max(offset, partition.log_start_offset)
    records = sum(max(0, end - max(offset, start)) for start, end in _written(partition.ranges, end_offset))
    segment = partition.segment_at(offset) or partition.segment_after(offset)
    if not records or segment is None or segment.lost_reason:
        return GroupLag(records, 0)
    return GroupLag(records, max(0, now_ms - segment.max_timestamp_ms))


def _written(ranges: list[Range], end_offset: int) -> Iterable[tuple[int, int]]:
    """Yields start and end of the acknowledged part of each range, which has no gaps inside."""
    for item in ranges[:-1]:
        settled_end = item.end_offset if item.status is RangeStatus.SETTLED else None
        yield item.start_offset, item.registered_end if settled_end is None else settled_end
    if ranges:
        yield ranges[-1].start_offset, end_offset
