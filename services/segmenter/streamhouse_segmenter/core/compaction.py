"""Rules for merging segments: preconditions of the inputs, and checks of the result."""

from collections.abc import Sequence
from itertools import pairwise

from shformat import SegmentHeader, SegmentInfo
from shproto.v1 import types_pb2


class CompactionRefused(Exception):
    """The segments cannot be merged, or the merged segment differs from them; nothing was changed."""


def describe(segment: types_pb2.SegmentRef) -> str:
    """Returns topic/partition, offsets and place, for people."""
    span = f"[{segment.base_offset}, {segment.end_offset})"
    return f"{segment.topic}/{segment.partition} {span} in {segment.object_key!r} at {segment.object_at}"


def check_mergeable(segments: Sequence[types_pb2.SegmentRef], build_bytes_max: int) -> None:
    """Refuses with CompactionRefused all but two or more present segments of a partition, in order and small enough."""
    if len(segments) < 2:
        raise CompactionRefused(f"{len(segments)} segments to merge, must be 2 or more")
    for segment, after in pairwise(segments):
        if (segment.topic_id, segment.partition) != (after.topic_id, after.partition):
            raise CompactionRefused(f"{describe(segment)} and {describe(after)} are of different partitions")
        if segment.end_offset > after.base_offset or segment.epoch > after.epoch:
            raise CompactionRefused(f"{describe(after)} is not after {describe(segment)}")
    for segment in segments:
        if segment.lost_reason:
            raise CompactionRefused(f"{describe(segment)} is lost: {segment.lost_reason}")
    total_bytes = sum(segment.size_bytes for segment in segments)
    if total_bytes > build_bytes_max:
        raise CompactionRefused(f"{total_bytes} bytes to merge, segment_build_bytes_max is {build_bytes_max}")


def check_source(segment: types_pb2.SegmentRef, header: SegmentHeader) -> None:
    """Refuses with CompactionRefused an object that holds another segment than the registered."""
    registered = (
        segment.topic_id, segment.partition, segment.base_offset, segment.end_offset, segment.record_count
    )  # fmt: skip
    found = (header.topic_id, header.partition, header.base_offset, header.end_offset, header.record_count)
    if registered != found:
        raise CompactionRefused(f"{describe(segment)}: its header is of another segment: {header}")


def check_merged(segments: Sequence[types_pb2.SegmentRef], info: SegmentInfo) -> None:
    """Refuses with CompactionRefused a merged segment with other offsets or another number of records."""
    expected = (segments[0].base_offset, segments[-1].end_offset, sum(segment.record_count for segment in segments))
    got = (info.base_offset, info.end_offset, info.record_count)
    if expected != got:
        raise CompactionRefused(f"merged (base, end, records) is {got}, expected {expected}")
