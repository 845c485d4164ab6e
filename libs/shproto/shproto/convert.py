"""Makes the shapes of shproto.model from messages. Pure; checks nothing but what a shape needs."""

from collections.abc import Iterable, Iterator

from shproto.model import Range, RangeStatus, Segment
from shproto.v1 import types_pb2


def range_from_proto(item: types_pb2.OffsetRange) -> Range:
    """Returns the range of a message, without `orphaned_ms`: events of older versions lack that time, so an index that
    follows events would differ from one that a snapshot replaced. Raises ValueError if the status is unknown."""
    return Range(
        epoch=item.epoch,
        start_offset=item.start_offset,
        limit_offset=item.limit_offset,
        registered_end=item.registered_end,
        end_offset=item.end_offset if item.HasField("end_offset") else None,
        status=RangeStatus(item.status),
        agent_id=item.agent_id,
        wal_id=item.wal_id.hex(),
        acknowledged_end=item.acknowledged_end if item.HasField("acknowledged_end") else None,
    )


def segments_from_proto(items: Iterable[types_pb2.SegmentRef]) -> Iterator[Segment]:
    """Yields the segments of messages. Segments of a topic share the texts of its id and name: an index holds a million
    of them."""
    topics: dict[bytes, tuple[str, str]] = {}
    for item in items:
        names = topics.get(item.topic_id)
        if names is None or names[1] != item.topic:
            names = topics[item.topic_id] = (item.topic_id.hex(), item.topic)
        yield Segment(
            segment_id=item.segment_id,
            topic_id=names[0],
            topic=names[1],
            partition=item.partition,
            epoch=item.epoch,
            base_offset=item.base_offset,
            end_offset=item.end_offset,
            record_count=item.record_count,
            object_key=item.object_key,
            object_at=item.object_at,
            size_bytes=item.size_bytes,
            raw_bytes=item.raw_bytes,
            first_timestamp_ms=item.first_timestamp_ms,
            max_timestamp_ms=item.max_timestamp_ms,
            lost_reason=item.lost_reason,
        )
