"""Events of the control plane: facts in the past tense. Pure.

The coordinator appends these to the `events` table, rebuilds its projections from them and publishes them
(gRPC feed, RabbitMQ). Names and fields are persisted: fields may be added with a default, never renamed.
docs/events.md is the page for readers. Identifiers of topics and logs are UUIDs in hex (32 characters) in JSON.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar

from shproto.model import Range, RangeStatus, Segment


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. `registry` has the classes by name, the type of an event in the table."""

    registry: ClassVar[dict[str, type["Event"]]] = {}

    @property
    def stream_id(self) -> str:
        """Name of the history that the event is a part of, of a topic, partition, agent, buffer or group."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Returns the fields as JSON, without the type."""
        # asdict() copies every string of every nested row, which is most of a wide command's time.
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return json.dumps(values, separators=(",", ":"), default=asdict)


def event_type(cls: type[Event]) -> type[Event]:
    """Registers a class of events, and returns it."""
    Event.registry[cls.__name__] = cls
    return cls


def event_from_json(type_name: str, payload: str | Mapping[str, Any]) -> Event | None:
    """Returns the event; None for a type that this version does not know (a newer coordinator's). Ignores unknown
    fields."""
    cls = Event.registry.get(type_name)
    if cls is None:
        return None
    values: Mapping[str, Any] = json.loads(payload) if isinstance(payload, str) else payload
    known = {item.name for item in fields(cls)}
    kwargs = {name: value for name, value in values.items() if name in known}
    for name, part in _NESTED.items():
        if name in kwargs:
            value = kwargs[name]
            kwargs[name] = part(**value) if isinstance(value, Mapping) else tuple(part(**row) for row in value)
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in kwargs.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Part of a sealed buffer that belongs to a partition."""

    topic_id: str
    topic: str
    partition: int
    epoch: int
    base_offset: int
    end_offset: int
    record_count: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetChange:
    """New position of a group in a partition. offset_before -1: no offset was committed."""

    topic_id: str
    topic: str
    partition: int
    offset_before: int
    offset: int


@lru_cache(maxsize=16_384)
def _shared(text: str) -> str:
    """Returns an equal text, the same object for all: an index holds a million segments of some topics, and 136 bytes
    of each would be the topic's id and name."""
    return text


def _segment(**row: Any) -> Segment:
    return Segment(**row | {"topic_id": _shared(row["topic_id"]), "topic": _shared(row["topic"])})


def _range(**row: Any) -> Range:
    return Range(**row | {"status": RangeStatus(row["status"])})


_NESTED: dict[str, Callable[..., Segment | Slice | OffsetChange | Range]] = {
    "segment": _segment,
    "slices": Slice,
    "changes": OffsetChange,
    "ranges": _range,
    "segments": _segment,
}


def topic_stream(topic_id: str) -> str:
    return f"topic/{topic_id}"


def partition_stream(topic_id: str, partition: int) -> str:
    return f"partition/{topic_id}/{partition}"


class _OfTopic:
    __slots__ = ()
    topic_id: str

    @property
    def stream_id(self) -> str:
        return topic_stream(self.topic_id)


class _OfPartition:
    __slots__ = ()
    topic_id: str
    partition: int

    @property
    def stream_id(self) -> str:
        return partition_stream(self.topic_id, self.partition)


class _OfAgent:
    __slots__ = ()
    agent_id: str

    @property
    def stream_id(self) -> str:
        return f"agent/{self.agent_id}"


class _OfBuffer:
    __slots__ = ()
    buffer_id: str

    @property
    def stream_id(self) -> str:
        return f"buffer/{self.buffer_id}"


class _OfGroup:
    __slots__ = ()
    group: str

    @property
    def stream_id(self) -> str:
        return f"group/{self.group}"


class _OfSqlTable:
    __slots__ = ()
    table: str

    @property
    def stream_id(self) -> str:
        return f"sql/{self.table}"


class _OfProducer:
    __slots__ = ()
    name: str

    @property
    def stream_id(self) -> str:
        return f"producer/{self.name}"


# ---- topics


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class TopicCreated(_OfTopic, Event):
    topic_id: str
    topic: str
    partitions: int
    retention_ms: int | None
    retention_bytes: int | None
    min_acks: int
    unclean_recovery_after_ms: int | None
    created_ms: int


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class TopicAltered(_OfTopic, Event):
    """The topic has these settings from here on; partitions `partitions_before` to `partitions` - 1 are new."""

    topic_id: str
    topic: str
    partitions_before: int
    partitions: int
    retention_ms: int | None
    retention_bytes: int | None
    min_acks: int
    unclean_recovery_after_ms: int | None


@event_type
@dataclass(frozen=True, slots=True)
class TopicDeleted(_OfTopic, Event):
    topic_id: str
    topic: str
    deleted_ms: int


# ---- SQL


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class SqlTableCreated(_OfSqlTable, Event):
    """A table was declared for SQL. `table`: its name in small letters; `definition`: the CREATE TABLE statement."""

    table_id: str
    table: str
    definition: str
    created_ms: int


@event_type
@dataclass(frozen=True, slots=True)
class SqlTableDropped(_OfSqlTable, Event):
    """The declaration is gone; the topic and its records stay."""

    table_id: str
    table: str
    dropped_ms: int


class _OfSqlJob:
    __slots__ = ()
    job: str

    @property
    def stream_id(self) -> str:
        return f"sql-job/{self.job}"


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class SqlJobCreated(_OfSqlJob, Event):
    """A continuous query was started. kind: view | sink | insert. `definitions`: of the tables that it names, as they
    were then. `producer_id`: of what it writes; never another producer's."""

    job_id: str
    job: str
    kind: str
    statement: str
    output_topic: str
    output_topic_id: str
    producer_id: int
    created_ms: int
    definitions: tuple[str, ...] = ()


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class SqlJobAltered(_OfSqlJob, Event):
    """state: running | paused | failed | lost. `reason`: why it failed, or why its place is not known."""

    job_id: str
    job: str
    state: str
    reason: str
    altered_ms: int


@event_type
@dataclass(frozen=True, slots=True)
class SqlJobDropped(_OfSqlJob, Event):
    """The job is gone with its journal and checkpoints; what it has written stays."""

    job_id: str
    job: str
    dropped_ms: int


# ---- named producers


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerInitialized(_OfProducer, Event):
    """A writer took over the producer of this name, as its newest epoch. The id stays; epochs begin at 1."""

    name: str
    producer_id: int
    producer_epoch: int
    initialized_ms: int


@event_type
@dataclass(frozen=True, slots=True)
class ProducerDeleted(_OfProducer, Event):
    """The name is free: the next producer of this name has another id, and knows nothing of what was written."""

    name: str
    producer_id: int
    deleted_ms: int


# ---- sessions


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened(_OfAgent, Event):
    session_id: str
    agent_id: str
    role: str
    address: str
    wal_id: str
    started_ms: int


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class SessionClosed(_OfAgent, Event):
    """why: closed | expired | superseded | unreachable | restored"""

    session_id: str
    agent_id: str
    role: str
    why: str


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCutOff(_OfAgent, Event):
    """The workers in `reporters` cannot reach the agent: from `since_ms` on, other agents are to lead its partitions.
    `times`: number of such events without an hour of calm in between."""

    agent_id: str
    session_id: str
    reporters: tuple[str, ...]
    since_ms: int
    times: int


@event_type
@dataclass(frozen=True, slots=True)
class AgentReachable(_OfAgent, Event):
    """Workers have reached the agent again for long enough: it may lead."""

    agent_id: str
    session_id: str
    reachable_ms: int


# ---- epochs and ranges


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class EpochGranted(_OfPartition, Event):
    """`agent_id` leads the partition with this epoch and owns [start_offset, limit_offset)."""

    topic_id: str
    topic: str
    partition: int
    epoch: int
    session_id: str
    agent_id: str
    wal_id: str
    start_offset: int
    limit_offset: int


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class RangeExtended(_OfPartition, Event):
    topic_id: str
    partition: int
    epoch: int
    limit_offset: int


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRequested(_OfPartition, Event):
    """The leader is asked to seal, upload, settle and hand over the partition. why: balance | log_full | cut_off
    (without waiting for the upload); empty in events of older versions."""

    topic_id: str
    topic: str
    partition: int
    epoch: int
    session_id: str
    agent_id: str
    why: str = ""


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class RangeOrphaned(_OfPartition, Event):
    """The session of the range's leader ended; records that are acknowledged and not registered are in the leader's log
    only. `orphaned_ms`: time of the end in ms since 1970, set when the event is appended; 0 in events of older
    versions."""

    topic_id: str
    partition: int
    epoch: int
    orphaned_ms: int = 0


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class LogFoundTruncated(_OfPartition, Event):
    """The range's log was opened again and ends at `log_end`, though buffers up to `acknowledged_end` had been
    announced from it. The range stays orphaned until the rest comes back, or an operator declares it lost."""

    topic_id: str
    partition: int
    epoch: int
    log_end: int
    acknowledged_end: int


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class RangeSettled(_OfPartition, Event):
    """No record at or beyond `end_offset` was acknowledged in this epoch. Registration below `end_offset` goes on."""

    topic_id: str
    partition: int
    epoch: int
    end_offset: int


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class RangeLost(_OfPartition, Event):
    """Declared lost by an operator or by policy: records below `end_offset` that are not registered never will be."""

    topic_id: str
    partition: int
    epoch: int
    end_offset: int
    why: str


# ---- buffers and segments


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSealed(_OfBuffer, Event):
    """Notice that a buffer may be claimed; not kept. Event logs of older versions have it as an event."""

    buffer_id: str
    session_id: str
    agent_id: str
    wal_id: str
    slices: tuple[Slice, ...] = field(default_factory=tuple)


@event_type
@dataclass(frozen=True, slots=True)
class BufferCompleted(_OfBuffer, Event):
    """Every slice of the buffer is registered, covered or fenced, and none was registered by this call."""

    buffer_id: str
    agent_id: str


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class BufferRegistered(_OfBuffer, Event):
    """The segments of a buffer's object are part of the log: as SegmentRegistered for each of them, in this order.
    `completed`: the buffer has no slice left to register."""

    buffer_id: str
    agent_id: str
    segments: tuple[Segment, ...]
    completed: bool


@event_type
@dataclass(frozen=True, slots=True)
class SegmentRegistered(Event):
    """registered_end of the segment's epoch moved to the segment's end_offset. With `lost_reason`, the span is lost for
    good. Event logs of older versions have this event for each segment of a buffer."""

    segment: Segment
    buffer_id: str

    @property
    def stream_id(self) -> str:
        return partition_stream(self.segment.topic_id, self.segment.partition)


@event_type
@dataclass(frozen=True, slots=True)
class SegmentsCompacted(Event):
    """A merged segment took the place of others, of which it has all records."""

    segment: Segment
    replaced_segment_ids: tuple[str, ...]

    @property
    def stream_id(self) -> str:
        return partition_stream(self.segment.topic_id, self.segment.partition)


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class LogStartMoved(_OfPartition, Event):
    """Records below log_start_offset are gone, and so are the segments in `removed_segment_ids`. why: retention_ms,
    retention_bytes, both with a comma between, or deleted. Only if deleted, log_start_offset may lie in a segment."""

    topic_id: str
    partition: int
    log_start_offset: int
    removed_segment_ids: tuple[str, ...]
    why: str


# ---- restores


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryBegan(Event):
    """The metadata was restored: events from here on are of another history than those that the backup was taken of."""

    history_id: str
    restored_from: str
    backup: str
    backup_position: int

    @property
    def stream_id(self) -> str:
        return "history"


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionRestored(_OfPartition, Event):
    """State of a partition after a restore: ranges and segments as given here, without the removed ones.
    `epoch`: the highest that may have been granted. `partitions`: number of the topic's partitions; 0: as before."""

    topic_id: str
    topic: str
    partition: int
    epoch: int
    log_start_offset: int
    ranges: tuple[Range, ...]
    removed_epochs: tuple[int, ...]
    segments: tuple[Segment, ...]
    removed_segment_ids: tuple[str, ...]
    partitions: int = 0


# ---- consumer groups


@event_type
@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMemberJoined(_OfGroup, Event):
    group: str
    member_id: str
    client_id: str
    topics: tuple[str, ...]
    session_timeout_ms: int


@event_type
@dataclass(frozen=True, slots=True)
class GroupMemberLeft(_OfGroup, Event):
    """why: left | expired | restored"""

    group: str
    member_id: str
    why: str


@event_type
@dataclass(frozen=True, slots=True)
class GroupRebalanced(_OfGroup, Event):
    """The target assignment of a generation: member id -> ["topic:partition", ...]."""

    group: str
    generation: int
    assignment: dict[str, list[str]]


@event_type
@dataclass(frozen=True, slots=True)
class OffsetsReset(_OfGroup, Event):
    """An operator moved a group without members, forwards or backwards."""

    group: str
    changes: tuple[OffsetChange, ...]


@event_type
@dataclass(frozen=True, slots=True)
class GroupDeleted(_OfGroup, Event):
    """A group is gone with its committed offsets. A group that is created again under the name begins at generation
    1."""

    group: str
