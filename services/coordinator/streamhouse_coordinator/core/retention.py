"""Which segments retention and the deletion of records remove: whole ones, from the oldest on."""

from collections.abc import Sequence

from shproto.errors import InvalidArgument
from shproto.events import LogStartMoved

from streamhouse_coordinator.core.tables import PartitionRow, RangeRow, SegmentRow, TopicRow


def retain(
    topic: TopicRow, partition: PartitionRow, oldest: Sequence[SegmentRow], size_bytes: int, now_ms: int
) -> LogStartMoved | None:
    """Moves the log start past segments that are wholly older than retention_ms, or that the partition (`size_bytes`
    in all) can spare and still keep retention_bytes: less would throw away a segment larger than that as soon as it is
    registered. `oldest`: by offset. None if nothing is due."""
    removed: list[SegmentRow] = []
    reasons = set()
    for segment in oldest:
        why = _why(topic, segment, size_bytes, now_ms)
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
        log_start_offset=max(partition.log_start_offset, removed[-1].end_offset),
        removed_segment_ids=tuple(segment.segment_id for segment in removed),
        why=",".join(sorted(reasons)),
    )


def check_deletion(topic: str, partition: int, before_offset: int, ranges: Sequence[RangeRow]) -> None:
    """Checks that every record below `before_offset` is in a segment, or lost: those that only an agent's log has would
    come into segments below the start of the log, where nobody would remove them. Raises InvalidArgument."""
    limit = min((row.registered_end for row in ranges if row.unfinished), default=None)
    if limit is None:  # nobody leads the partition, and all of it is in segments
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
    """Moves the log start to `before_offset`, with the segments that end at or below it. `oldest`: by offset; with
    `more` there are others behind them, and the log start moves no further than these. None if nothing is to be done.
    """
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
