"""Decides which small segments are worth merging, and if a merged segment may replace them. Pure.

A merge writes all of its bytes again, so the merged segment has to be `segments_min` times as large as its largest
input. Then every byte is rewritten at most log(target / first size) times, to that base, however long the partition
lives, and no nearly full segment is rewritten for a few small ones. The number of waiting segments is bounded, too: of
each size, in powers of `segments_min`, some segments less than that
(docs/decisions/0010-merges-grow-what-they-merge.md).
"""

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from shproto.model import Segment

from streamhouse_coordinator.core.registration import Result
from streamhouse_coordinator.core.tables import PartitionRowKey, SegmentRow

# Length of a run of small segments that is merged even if the result does not grow enough: sizes that differ wildly
# could wait for ever, while every read of the partition opens each of them. Regular appends leave some 30.
RUN_SEGMENTS_MAX = 64
# Partitions that a claim looks at, a few milliseconds each: the most crowded, where a backlog is, and others in turn,
# since many small segments do not always contain a merge.
LOOKS_MAX, CROWDED_LOOKS = 64, 16


def partitions_to_look_at(counts: Mapping[PartitionRowKey, int], segments_min: int, turn: str) -> list[PartitionRowKey]:
    """Returns partitions that may have segments to merge, at most LOOKS_MAX. `counts`: small segments by partition.
    `turn`: another text selects other partitions."""
    crowded = sorted(
        (key for key, count in counts.items() if count >= segments_min), key=lambda key: (-counts[key], key)
    )
    others = sorted(crowded[CROWDED_LOOKS:], key=lambda key: zlib.crc32(f"{turn} {key}".encode()))
    return [*crowded[:CROWDED_LOOKS], *others[: LOOKS_MAX - CROWDED_LOOKS]]


@dataclass(frozen=True, slots=True)
class SegmentRun:
    """Adjacent small segments of a partition. `closed`: the segment that follows never merges with them, so the run
    will not grow."""

    segments: Sequence[SegmentRow]
    closed: bool

    @property
    def end_offset(self) -> int:
        """Offset behind the last segment."""
        return self.segments[-1].end_offset


def choose(
    segments: Sequence[SegmentRow],
    small_bytes_max: int,
    target_bytes: int,
    segments_min: int,
    followed: Collection[int] = (),
) -> list[SegmentRow]:
    """Returns the segments to merge next, two or more that are adjacent, at most `target_bytes` together; none if no
    merge is worth the bytes.

    In a run of segments below `small_bytes_max` these are: as many as fill a segment of `target_bytes`; all of a closed
    run; the most segments that together are `segments_min` times as large as the largest of them. `segments`: of a
    partition, by offset. `followed`: first offsets of segments that are missing in `segments`.
    """
    small_bytes_max = min(small_bytes_max, target_bytes // 2)  # two fit together, and a filled segment is not small
    best: Sequence[SegmentRow] = ()
    for run in runs(segments, small_bytes_max):
        sizes = [segment.size_bytes for segment in run.segments]
        if sum(sizes) > target_bytes:
            return list(run.segments[: sum(total <= target_bytes for total in accumulate(sizes))])
        if len(sizes) >= segments_min and (run.closed or run.end_offset in followed):
            return list(run.segments)
        first, end = _most_grown(sizes, segments_min)
        if end - first > len(best):
            best = run.segments[first:end]
    return list(best)


def runs(segments: Sequence[SegmentRow], small_bytes_max: int) -> Iterator[SegmentRun]:
    """Yields the runs of small segments, in order."""
    run: list[SegmentRow] = []
    for segment in segments:
        follows = bool(run) and run[-1].end_offset == segment.base_offset
        small = not segment.lost_reason and segment.size_bytes < small_bytes_max
        if run and not (small and follows):
            yield SegmentRun(run, closed=follows)
            run = []
        if small:
            run.append(segment)
    if run:
        yield SegmentRun(run, closed=False)


def _most_grown(sizes: Sequence[int], segments_min: int) -> tuple[int, int]:
    """Returns [first, end) of the most neighbours that are together at least `segments_min` times as large as the
    largest of them; in too long a run, if there are none, of the neighbours that grow most; else (0, 0)."""
    totals = [0, *accumulate(sizes)]
    long = len(sizes) > RUN_SEGMENTS_MAX
    best, rank = (0, 0), (0, 0.0)
    for largest, (first, end) in zip(sizes, _largest_in(sizes), strict=True):
        grown = (totals[end] - totals[first]) / largest
        if grown >= segments_min:
            rank_here = (2, float(end - first))
        elif long and end - first >= segments_min:
            rank_here = (1, grown)
        else:
            continue
        if rank_here > rank:
            best, rank = (first, end), rank_here
    return best


def _largest_in(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Returns for each place the widest [first, end) around it in which no size is larger, in linear time."""
    first, end = list(range(len(sizes))), [len(sizes)] * len(sizes)
    open_: list[int] = []  # places without an end so far, their sizes descending
    for at, size in enumerate(sizes):
        while open_ and sizes[open_[-1]] < size:
            end[open_.pop()] = at
        if not open_:
            first[at] = 0
        elif sizes[open_[-1]] == size:
            first[at] = first[open_[-1]]
        else:
            first[at] = open_[-1] + 1
        open_.append(at)
    return list(zip(first, end, strict=True))


def judge(merged: Segment, replaced: Sequence[SegmentRow], asked: int, known: bool, declared: bool) -> Result:
    """Returns the result of a compare-and-set: REGISTERED only if all `asked` segments still exist and `merged` holds
    exactly their records.

    `replaced`: the existing segments, by offset. `known`: `merged` was registered by an earlier try. `declared`: the
    object of `merged` is protected from deletion.
    """
    # Before the checks: the first try of this call has replaced the inputs.
    if known:
        return Result.REGISTERED
    same_partition = all((row.topic_id, row.partition) == (merged.topic_id, merged.partition) for row in replaced)
    if not replaced or len(replaced) != asked or not same_partition:
        return Result.FENCED
    adjacent = all(one.end_offset == other.base_offset for one, other in pairwise(replaced))
    covers = (replaced[0].base_offset, replaced[-1].end_offset) == (merged.base_offset, merged.end_offset)
    complete = sum(row.record_count for row in replaced) == merged.record_count
    healthy = not any(row.lost_reason for row in replaced)
    if not (adjacent and covers and complete and healthy):
        return Result.FENCED
    return Result.REGISTERED if declared else Result.WITHDRAWN
