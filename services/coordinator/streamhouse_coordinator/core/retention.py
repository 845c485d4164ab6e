"""Which segments retention removes: whole ones, from the oldest on."""

from collections.abc import Sequence

from shproto.events import LogStartMoved

from streamhouse_coordinator.core.tables import PartitionRow, SegmentRow, TopicRow


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


def _why(topic: TopicRow, segment: SegmentRow, size_bytes: int, now_ms: int) -> str:
    if topic.retention_ms is not None and segment.max_timestamp_ms < now_ms - topic.retention_ms:
        return "retention_ms"
    if topic.retention_bytes is not None and size_bytes - segment.size_bytes >= topic.retention_bytes:
        return "retention_bytes"
    return ""
