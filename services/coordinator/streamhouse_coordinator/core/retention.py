"""Decides which segments retention and the deletion of records remove: whole segments, from the oldest on. Pure."""

from collections.abc import Sequence

from shproto.errors import InvalidArgument
from shproto.events import LogStartMoved

from streamhouse_coordinator.core.tables import PartitionRow, RangeRow, SegmentRow, TopicRow


def retain(
    topic: TopicRow, partition: PartitionRow, oldest: Sequence[SegmentRow], size_bytes: int, now_ms: int
) -> LogStartMoved | None:
    """Returns how the log start moves past segments wholly older than retention_ms, or past those that the partition
    (`size_bytes` in all) can lose and still keep retention_bytes; None if no segment is due. Keeping at least
    retention_bytes, not at most: otherwise a segment larger than that would go as soon as it is registered. `oldest`:
    by offset."""
    removed: list[SegmentRow] = []
    reasons = set()
    for segment in oldest:
        why = _why(topic, segment, size_bytes, now_ms)
        # The first segment to keep ends the removal: the log loses its beginning, never a part in the middle.
        if not why:
            break
        reasons.add(why)
        size_bytes -= segment.size_bytes
        removed.append(segment)
    if not removed:
        return None
    return LogStartMoved(
        topic_id=topic.topic_id,
        partition=partition.partition,
        # Never back: records may have been deleted beyond these segments.
        log_start_offset=max(partition.log_start_offset, removed[-1].end_offset),
        removed_segment_ids=tuple(segment.segment_id for segment in removed),
        why=",".join(sorted(reasons)),
    )


def check_deletion(topic: str, partition: int, before_offset: int, ranges: Sequence[RangeRow]) -> None:
    """Checks that every record below `before_offset` is in a segment, or lost. Records that only an agent's log has
    would get into segments below the start of the log, which nothing would remove. Raises InvalidArgument."""
    limit = min((row.registered_end for row in ranges if row.unfinished), default=None)
    if limit is None:  # the partition has no leader, and all of its records are in segments
        limit = max((row.registered_end if row.end_offset is None else row.end_offset for row in ranges), default=0)
    if not 0 <= before_offset <= limit:
        raise InvalidArgument(
            f"before_offset is {before_offset}, must be 0 to {limit}: from there on not all records of "
            f"{topic}/{partition} are in segments yet",
            field="before_offset",
            value=before_offset,
            limit=f"0..{limit}",
        )


def delete_before(
    partition: PartitionRow, oldest: Sequence[SegmentRow], before_offset: int, *, more: bool
) -> LogStartMoved | None:
    """Returns how the log start moves to `before_offset`, with the segments that end at or below; None if nothing
    changes. `oldest`: by offset; with `more` there are others behind them, and the log start moves no further than
    these."""
    removed = [segment for segment in oldest if segment.end_offset <= before_offset]
    if more and len(removed) == len(oldest):
        before_offset = min(before_offset, removed[-1].end_offset)
    if before_offset <= partition.log_start_offset and not removed:
        return None
    return LogStartMoved(
        topic_id=partition.topic_id,
        partition=partition.partition,
        log_start_offset=max(partition.log_start_offset, before_offset),
        removed_segment_ids=tuple(segment.segment_id for segment in removed),
        why="deleted",
    )


def _why(topic: TopicRow, segment: SegmentRow, size_bytes: int, now_ms: int) -> str:
    if topic.retention_ms is not None and segment.max_timestamp_ms < now_ms - topic.retention_ms:
        return "retention_ms"
    if topic.retention_bytes is not None and size_bytes - segment.size_bytes >= topic.retention_bytes:
        return "retention_bytes"
    return ""
