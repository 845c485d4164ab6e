"""Index of the records of every partition: ranges of epochs, registered segments, agents with a session. Pure.

Owns: the state that the coordinator's snapshot and feed describe. `ClusterIndex.apply` is its only mutator.
Does not own: the feed (follower.py), the readers that wait (live_index.py), how records are read.
Invariants: `position` grows by one with each event applied. An event that does not fit raises IndexMismatch: a
snapshot then replaces the state.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import shproto.events as ev
from shproto.acks import ACKS_DURABLE
from shproto.keys import PartitionKey, TopicId
from shproto.model import Range, RangeStatus, Segment

INGEST = "ingest"


class IndexMismatch(Exception):
    """An event or a snapshot contradicts the state; a new snapshot replaces the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSession:
    """A live session. `wal_id` is empty if not known: snapshots have sessions without the id, only events have it."""

    session_id: str
    agent_id: str
    role: str
    address: str
    wal_id: str = ""


@dataclass(slots=True, kw_only=True)
class TopicEntry:
    """A topic. durable_only: records count as acknowledged once registered, since the topic's ack level is durable."""

    topic_id: TopicId
    topic: str
    partitions: int
    durable_only: bool


@dataclass(frozen=True, slots=True)
class SqlTable:
    """A table that was declared for SQL. `table`: its name in small letters; `definition`: the CREATE TABLE
    statement."""

    table_id: str
    table: str
    definition: str


@dataclass(slots=True, kw_only=True)
class PartitionIndex:
    """Index of a partition.

    Invariants: ranges ascend by (start_offset, epoch), segments by base offset; segments do not overlap. `_bases` are
    the base offsets of `segments`. `_latest` are the running maxima of their latest timestamps, for a prefix of
    `segments`: the rest is computed on demand.
    """

    topic_id: TopicId
    topic: str
    partition: int
    durable_only: bool
    log_start_offset: int = 0
    ranges: list[Range] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    _bases: list[int] = field(default_factory=list)
    _latest: list[int] = field(default_factory=list)
    key: PartitionKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = PartitionKey(self.topic_id, self.partition)  # once: every fetch uses the key some times

    @property
    def name(self) -> str:
        return f"{self.topic}/{self.partition}"

    # ---- looking up

    def segment_at(self, offset: int) -> Segment | None:
        """Returns the segment that holds `offset`, or None."""
        position = bisect_right(self._bases, offset) - 1
        if position < 0 or self.segments[position].end_offset <= offset:
            return None
        return self.segments[position]

    def segment_after(self, offset: int) -> Segment | None:
        """Returns the first segment with a base offset of `offset` or above, or None."""
        position = bisect_left(self._bases, offset)
        return self.segments[position] if position < len(self.segments) else None

    def segment_reaching(self, timestamp_ms: int, from_offset: int) -> Segment | None:
        """Returns the first segment that ends beyond `from_offset` and has a record at `timestamp_ms` or later, or
        None. Lost segments have no records."""
        latest = self._running_latest()
        position = bisect_left(latest, timestamp_ms)
        position = max(position, bisect_right(self._bases, from_offset) - 1)
        for segment in self.segments[position:]:
            late = segment.max_timestamp_ms >= timestamp_ms and segment.end_offset > from_offset
            if late and not segment.lost_reason:
                return segment
        return None

    def range_position(self, offset: int) -> int:
        """Returns the position of the last range that starts at or below `offset`; -1 if there is none."""
        return bisect_right(self.ranges, offset, key=lambda item: item.start_offset) - 1

    @property
    def known_end(self) -> int:
        """Offset below which every record is certainly acknowledged: the end of what is registered or settled."""
        if not self.ranges:
            return self.log_start_offset
        newest = self.ranges[-1]
        return newest.registered_end if newest.end_offset is None else newest.end_offset

    def first_of_last(self, count: int, end: int) -> int:
        """Returns the offset of the first of the last `count` records below `end`, the high watermark; the log's start
        if it has fewer. Of a range that is not settled only registered records are counted, so more may lie behind."""
        unregistered_from = self.ranges[-1].registered_end if self.ranges else end
        left = count - max(0, end - unregistered_from)
        if left <= 0:
            return end - count
        for segment in reversed(self.segments):
            first = max(segment.base_offset, self.log_start_offset)
            held = 0 if segment.lost_reason else max(0, min(segment.end_offset, end) - first)
            if held >= left:
                return first + held - left
            left -= held
        return self.log_start_offset

    def _running_latest(self) -> list[int]:
        for segment in self.segments[len(self._latest) :]:
            before = self._latest[-1] if self._latest else segment.max_timestamp_ms
            self._latest.append(max(before, segment.max_timestamp_ms))
        return self._latest

    # ---- changing; only ClusterIndex calls these

    def load(self, log_start_offset: int, ranges: Iterable[Range], segments: Iterable[Segment]) -> None:
        """Adds a part of a snapshot; a large partition comes in several parts. Raises IndexMismatch if segments
        overlap."""
        self.log_start_offset = log_start_offset
        known = {item.epoch: item for item in self.ranges} | {item.epoch: item for item in ranges}
        self.ranges = sorted(known.values(), key=lambda item: (item.start_offset, item.epoch))
        for segment in segments:
            self.add_segment(segment)

    def add_segment(self, segment: Segment) -> None:
        """Inserts a segment. Raises IndexMismatch if the segment overlaps a known segment."""
        position = bisect_left(self._bases, segment.base_offset)
        before = self.segments[position - 1] if position else None
        after = self.segments[position] if position < len(self.segments) else None
        if (before and before.end_offset > segment.base_offset) or (after and after.base_offset < segment.end_offset):
            raise IndexMismatch(f"{self.name}: segment {segment.segment_id} overlaps its neighbours")
        self.segments.insert(position, segment)
        self._bases.insert(position, segment.base_offset)
        # Computed again by the next search; little is dropped, since segments are registered in order.
        del self._latest[position:]

    def remove_segments(self, segment_ids: Iterable[str]) -> list[Segment]:
        """Removes segments and returns them; ignores unknown ids."""
        gone = set(segment_ids)
        removed = [segment for segment in self.segments if segment.segment_id in gone]
        if removed:
            self.segments = [segment for segment in self.segments if segment.segment_id not in gone]
            self._bases = [segment.base_offset for segment in self.segments]
            self._latest = []
        return removed

    def grant(self, granted: Range) -> None:
        """Adds the range of a new epoch. Raises IndexMismatch unless the epoch is above all others."""
        if self.ranges and granted.epoch <= self.ranges[-1].epoch:
            raise IndexMismatch(f"{self.name}: epoch {granted.epoch} granted after {self.ranges[-1].epoch}")
        self.ranges.append(granted)

    def change_range(self, epoch: int, **changes: Any) -> None:
        """Replaces fields of the range of an epoch. Raises IndexMismatch if there is no such range."""
        for position in range(len(self.ranges) - 1, -1, -1):
            if self.ranges[position].epoch == epoch:
                self.ranges[position] = replace(self.ranges[position], **changes)
                return
        raise IndexMismatch(f"{self.name}: no range of epoch {epoch}")

    def move_log_start(self, offset: int) -> None:
        """Moves the start of the log, and drops the ranges wholly below, which no reader can need; the newest range
        stays."""
        self.log_start_offset = offset
        last = len(self.ranges) - 1
        self.ranges = [
            item
            for position, item in enumerate(self.ranges)
            if position == last or not (item.complete and item.registered_end <= offset)
        ]


@dataclass(slots=True)
class _ObjectExtent:
    """Number of registered segments in an object, and the end of the last of them in bytes."""

    segments: int = 0
    end: int = 0


class ClusterIndex:
    """All partitions and sessions, as of event `position`. `missing_position` is the position of an event that was seen
    and is gone from the metadata, so that more may have been written than the index knows; 0: none is missing."""

    def __init__(self) -> None:
        self.position = 0
        self.missing_position = 0
        self.history_id = ""
        self.topics: dict[str, TopicEntry] = {}
        self.partitions: dict[PartitionKey, PartitionIndex] = {}
        self.sessions: dict[str, AgentSession] = {}
        self.sql_tables: dict[str, SqlTable] = {}
        self.segment_count = 0
        self._objects: dict[str, _ObjectExtent] = {}

    # ---- looking up

    def address_of(self, agent_id: str, wal_id: str) -> str:
        """Returns the address of the ingest agent that holds this write-ahead log; empty without a live session."""
        # The newest session counts, as long as the end of an earlier session of the agent is not known.
        for session in reversed(self.sessions.values()):
            if session.role == INGEST and session.agent_id == agent_id and session.wal_id in ("", wal_id):
                return session.address
        return ""

    def object_extent(self, object_key: str) -> int:
        """Returns the number of bytes, from the start of the object, that registered segments are known to use."""
        extent = self._objects.get(object_key)
        return extent.end if extent else 0

    # ---- changing

    def add_topic(self, topic: TopicEntry) -> None:
        """Adds a topic with empty partitions."""
        self.topics[topic.topic] = topic
        for partition in range(topic.partitions):
            key = PartitionKey(topic.topic_id, partition)
            self.partitions[key] = PartitionIndex(
                topic_id=topic.topic_id, topic=topic.topic, partition=partition, durable_only=topic.durable_only
            )

    def load_partition(
        self,
        key: PartitionKey,
        log_start_offset: int,
        ranges: Iterable[Range],
        segments: Iterable[Segment],
    ) -> None:
        """Adds a part of a snapshot to a partition, the topic of which was added before. Raises IndexMismatch if
        segments overlap."""
        segments = list(segments)
        self.partitions[key].load(log_start_offset, ranges, segments)
        for segment in segments:
            self._count_segment(segment)

    def apply(self, position: int, event: ev.Event | None) -> frozenset[PartitionKey] | None:
        """Brings the state to `position`. Returns the partitions of which readers have to look again; None: all.

        `event` is None for a type that this version does not know. Raises IndexMismatch if the event does not fit.
        """
        if position != self.position + 1:
            raise IndexMismatch(f"event {position} after {self.position}")
        handler = _HANDLERS.get(type(event))
        changed: frozenset[PartitionKey] | None = frozenset()
        # An event that concerns no reader takes its position all the same.
        if event is not None and handler is not None:
            changed = handler(self, event)
        self.position = position
        return changed

    def _partition(self, topic_id: str, partition: int) -> PartitionIndex:
        try:
            return self.partitions[PartitionKey(_topic_id(topic_id), partition)]
        except KeyError:
            raise IndexMismatch(f"no partition {partition} of topic id {topic_id}") from None

    def _count_segment(self, segment: Segment) -> None:
        self.segment_count += 1
        if not segment.lost_reason:
            extent = self._objects.setdefault(segment.object_key, _ObjectExtent())
            extent.segments += 1
            extent.end = max(extent.end, segment.object_at + segment.size_bytes)

    def _forget_segments(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            self.segment_count -= 1
            extent = self._objects.get(segment.object_key)
            if extent is not None and not segment.lost_reason:
                extent.segments -= 1
                if not extent.segments:
                    del self._objects[segment.object_key]

    # ---- one method per event

    def _topic_created(self, event: ev.TopicCreated) -> frozenset[PartitionKey]:
        topic_id = _topic_id(event.topic_id)
        self.add_topic(
            TopicEntry(
                topic_id=topic_id,
                topic=event.topic,
                partitions=event.partitions,
                durable_only=event.min_acks == ACKS_DURABLE,
            )
        )
        return frozenset(PartitionKey(topic_id, partition) for partition in range(event.partitions))

    def _topic_altered(self, event: ev.TopicAltered) -> frozenset[PartitionKey]:
        durable_only = event.min_acks == ACKS_DURABLE  # never changes: the coordinator refuses it
        topic_id = _topic_id(event.topic_id)
        self.topics[event.topic] = TopicEntry(
            topic_id=topic_id, topic=event.topic, partitions=event.partitions, durable_only=durable_only
        )
        new = [PartitionKey(topic_id, number) for number in range(event.partitions_before, event.partitions)]
        for key in new:
            self.partitions[key] = PartitionIndex(
                topic_id=topic_id, topic=event.topic, partition=key.partition, durable_only=durable_only
            )
        return frozenset(new)

    def _topic_deleted(self, event: ev.TopicDeleted) -> frozenset[PartitionKey]:
        topic_id = _topic_id(event.topic_id)
        topic = self.topics.get(event.topic)
        if topic is not None and topic.topic_id == topic_id:
            del self.topics[event.topic]
        gone = frozenset(key for key in self.partitions if key.topic_id == topic_id)
        for key in gone:
            self._forget_segments(self.partitions.pop(key).segments)
        return gone

    def _sql_table_created(self, event: ev.SqlTableCreated) -> frozenset[PartitionKey]:
        self.sql_tables[event.table] = SqlTable(event.table_id, event.table, event.definition)
        return frozenset()

    def _sql_table_dropped(self, event: ev.SqlTableDropped) -> frozenset[PartitionKey]:
        self.sql_tables.pop(event.table, None)
        return frozenset()

    def _session_opened(self, event: ev.SessionOpened) -> frozenset[PartitionKey] | None:
        self.sessions[event.session_id] = AgentSession(
            session_id=event.session_id,
            agent_id=event.agent_id,
            role=event.role,
            address=event.address,
            wal_id=event.wal_id,
        )
        # Any partition may wait for the address of this agent: its ranges outlive its sessions.
        return None if event.role == INGEST else frozenset()

    def _session_closed(self, event: ev.SessionClosed) -> frozenset[PartitionKey] | None:
        self.sessions.pop(event.session_id, None)
        return None if event.role == INGEST else frozenset()

    def _epoch_granted(self, event: ev.EpochGranted) -> frozenset[PartitionKey]:
        partition = self._partition(event.topic_id, event.partition)
        partition.grant(
            Range(
                epoch=event.epoch,
                start_offset=event.start_offset,
                limit_offset=event.limit_offset,
                registered_end=event.start_offset,
                end_offset=None,
                status=RangeStatus.OPEN,
                agent_id=event.agent_id,
                wal_id=event.wal_id,
            )
        )
        return frozenset([partition.key])

    def _range_extended(self, event: ev.RangeExtended) -> frozenset[PartitionKey]:
        return self._range_changed(event, limit_offset=event.limit_offset)

    def _range_orphaned(self, event: ev.RangeOrphaned) -> frozenset[PartitionKey]:
        return self._range_changed(event, status=RangeStatus.ORPHANED)

    def _log_found_truncated(self, event: ev.LogFoundTruncated) -> frozenset[PartitionKey]:
        return self._range_changed(event, acknowledged_end=event.acknowledged_end)

    def _range_settled(self, event: ev.RangeSettled) -> frozenset[PartitionKey]:
        return self._range_changed(event, status=RangeStatus.SETTLED, end_offset=event.end_offset)

    def _range_lost(self, event: ev.RangeLost) -> frozenset[PartitionKey]:
        return self._range_changed(event, status=RangeStatus.LOST, end_offset=event.end_offset)

    def _range_changed(
        self,
        event: ev.RangeExtended | ev.RangeOrphaned | ev.LogFoundTruncated | ev.RangeSettled | ev.RangeLost,
        **changes: Any,
    ) -> frozenset[PartitionKey]:
        partition = self._partition(event.topic_id, event.partition)
        partition.change_range(event.epoch, **changes)
        return frozenset([partition.key])

    def _segment_registered(self, event: ev.SegmentRegistered) -> frozenset[PartitionKey]:
        return frozenset([self._register(event.segment)])

    def _buffer_registered(self, event: ev.BufferRegistered) -> frozenset[PartitionKey]:
        return frozenset([self._register(segment) for segment in event.segments])

    def _register(self, segment: Segment) -> PartitionKey:
        partition = self._partition(segment.topic_id, segment.partition)
        partition.change_range(segment.epoch, registered_end=segment.end_offset)
        partition.add_segment(segment)
        self._count_segment(segment)
        return partition.key

    def _segments_compacted(self, event: ev.SegmentsCompacted) -> frozenset[PartitionKey]:
        segment = event.segment
        partition = self._partition(segment.topic_id, segment.partition)
        self._forget_segments(partition.remove_segments(event.replaced_segment_ids))
        partition.add_segment(segment)
        self._count_segment(segment)
        return frozenset([partition.key])

    def _log_start_moved(self, event: ev.LogStartMoved) -> frozenset[PartitionKey]:
        partition = self._partition(event.topic_id, event.partition)
        self._forget_segments(partition.remove_segments(event.removed_segment_ids))
        partition.move_log_start(event.log_start_offset)
        return frozenset([partition.key])


def _topic_id(topic_id: str) -> TopicId:
    """Returns the id that an event has in hex. Raises IndexMismatch if it is not hex."""
    try:
        return bytes.fromhex(topic_id)
    except ValueError:
        raise IndexMismatch(f"topic id {topic_id[:100]!r} is not hex") from None


def _restored(index: ClusterIndex, event: ev.PartitionRestored | ev.HistoryBegan) -> frozenset[PartitionKey]:
    """Refuses the event: after a restore, ranges and segments may have changed in any way. Raises IndexMismatch."""
    raise IndexMismatch(f"the metadata was restored ({event.stream_id})")


_HANDLERS: dict[type, Callable[[ClusterIndex, Any], frozenset[PartitionKey] | None]] = {
    ev.TopicCreated: ClusterIndex._topic_created,
    ev.TopicAltered: ClusterIndex._topic_altered,
    ev.TopicDeleted: ClusterIndex._topic_deleted,
    ev.SqlTableCreated: ClusterIndex._sql_table_created,
    ev.SqlTableDropped: ClusterIndex._sql_table_dropped,
    ev.SessionOpened: ClusterIndex._session_opened,
    ev.SessionClosed: ClusterIndex._session_closed,
    ev.EpochGranted: ClusterIndex._epoch_granted,
    ev.RangeExtended: ClusterIndex._range_extended,
    ev.RangeOrphaned: ClusterIndex._range_orphaned,
    ev.LogFoundTruncated: ClusterIndex._log_found_truncated,
    ev.RangeSettled: ClusterIndex._range_settled,
    ev.RangeLost: ClusterIndex._range_lost,
    ev.SegmentRegistered: ClusterIndex._segment_registered,
    ev.BufferRegistered: ClusterIndex._buffer_registered,
    ev.SegmentsCompacted: ClusterIndex._segments_compacted,
    ev.LogStartMoved: ClusterIndex._log_start_moved,
    ev.PartitionRestored: _restored,
    ev.HistoryBegan: _restored,
}
