"""Which small segments are worth merging, and whether a merged one may take their place."""

from collections.abc import Sequence
from itertools import pairwise

from shproto.events import Segment

from streamhouse_coordinator.core.registration import Result
from streamhouse_coordinator.core.tables import SegmentRow


def choose(
    segments: Sequence[SegmentRow], small_bytes_max: int, target_bytes: int, segments_min: int
) -> list[SegmentRow]:
    """The first run of at least `segments_min` adjacent segments below `small_bytes_max` that together have at most
    `target_bytes`, as long as it gets; empty if there is none. `segments`: of one partition, by offset."""
    run: list[SegmentRow] = []
    size_bytes = 0
    for segment in segments:
        if segment.lost_reason or segment.size_bytes >= small_bytes_max:
            if len(run) >= segments_min:
                return run
            run, size_bytes = [], 0
            continue
        fits = size_bytes + segment.size_bytes <= target_bytes
        adjacent = not run or run[-1].end_offset == segment.base_offset
        if not (fits and adjacent) and len(run) >= segments_min:
            return run
        if not adjacent:
            run, size_bytes = [], 0
        run.append(segment)
        size_bytes += segment.size_bytes
        while size_bytes > target_bytes:
            size_bytes -= run.pop(0).size_bytes
    return run if len(run) >= segments_min else []


def judge(merged: Segment, replaced: Sequence[SegmentRow], asked: int, known: bool, declared: bool) -> Result:
    """Compare-and-set: REGISTERED only if all `asked` segments are still there and `merged` holds just what they hold.

    `replaced`: those that are, by offset. `known`: `merged` is registered already, by an earlier try. `declared`:
    whether its object is one that nobody may delete.
    """
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
