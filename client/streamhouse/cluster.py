"""The cluster as an admin sees it: dataclasses, and how they come out of the coordinator's messages."""

from dataclasses import dataclass, field

from shproto.v1 import coordinator_pb2, types_pb2

from streamhouse.core.options import ACKS_NAMES, Acks


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic's settings. retention None: kept for ever; retention_bytes is per partition."""

    topic: str
    topic_id: str
    partitions: int
    retention_ms: int | None
    retention_bytes: int | None
    min_acks: Acks
    unclean_recovery_after_ms: int | None
    created_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedRecords:
    """Result of a deletion of records: where the partition's log starts then, and the segments removed."""

    log_start_offset: int
    segments_removed: int
    bytes_removed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicConfig:
    """A setting of a topic. None as value or default: not set. `alterable`: "yes"; "more", only upwards; "not to or
    from durable"."""

    name: str
    value: int | str | None
    default: int | str | None
    alterable: str


@dataclass(frozen=True, slots=True)
class OffsetRange:
    """The offsets one epoch owns: [start_offset, limit_offset), registered up to registered_end. end_offset is set
    once it is settled. status: open | orphaned | settled | lost. orphaned_ms: when its leader was lost; 0: it is not
    orphaned. acknowledged_end: set when its log came back, and lacks records that it had acknowledged up to there."""

    epoch: int
    start_offset: int
    limit_offset: int
    registered_end: int
    end_offset: int | None
    status: str
    agent_id: str
    orphaned_ms: int = 0
    acknowledged_end: int | None = None


@dataclass(frozen=True, slots=True)
class LostRecords:
    """Offsets [base_offset, end_offset) of an epoch whose records are gone for good; reading them is DATA_LOSS."""

    epoch: int
    base_offset: int
    end_offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class Partition:
    """leader_agent_id and leader_address are empty while nobody leads. size_bytes and raw_bytes (before
    compression), segment_count and record_count are of what is on the object store."""

    partition: int
    leader_agent_id: str
    leader_address: str
    epoch: int
    log_start_offset: int
    registered_end: int
    segment_count: int
    size_bytes: int
    raw_bytes: int
    record_count: int
    ranges: tuple[OffsetRange, ...]
    lost: tuple[LostRecords, ...] = ()


@dataclass(frozen=True, slots=True)
class TopicDescription:
    topic: Topic
    partitions: tuple[Partition, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """A live service. role: ingest | query | segmenter | coordinator. log_full: the disk of an ingest agent's log has
    no room, so that it leads only what no other can."""

    agent_id: str
    role: str
    address: str
    session_id: str
    expires_in_ms: int
    started_ms: int
    log_full: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """Who leads a partition. status: active | moving | unassigned; `unsettled`: older ranges readers wait for."""

    topic: str
    partition: int
    agent_id: str
    epoch: int
    status: str
    log_start_offset: int
    registered_end: int
    unsettled: tuple[OffsetRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferFailure:
    """A sealed buffer whose last hand-over to the object store failed. reason: "kind: what happened"; of kind
    `refused`, repeating it does not help before an operator has acted."""

    buffer_id: str
    agent_id: str
    attempt: int
    reason: str
    size_bytes: int

    @property
    def refused(self) -> bool:
        """True if the store refused it for good."""
        return self.reason.startswith("refused: ")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreachableAgent:
    """An ingest agent that some segmenters or query services cannot reach. cut_off: its partitions go to others.
    since_ms: since when the first of `failing` cannot; 0: all can again."""

    agent_id: str
    address: str
    cut_off: bool
    failing: tuple[str, ...]
    reaching: tuple[str, ...]
    since_ms: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """missing_position: of an event that was seen and is not there any more, so that the metadata is to be restored;
    0: none. buffer_failures: the oldest of those there are. unreachable_agents: those that a worker cannot reach, or
    that are cut off still."""

    sessions: tuple[Session, ...]
    leases: tuple[Lease, ...]
    buffers_waiting: int
    buffers_claimed: int
    buffers_waiting_bytes: int
    events_position: int
    outbox_position: int
    missing_position: int = 0
    buffer_failures: tuple[BufferFailure, ...] = ()
    unreachable_agents: tuple[UnreachableAgent, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundOffset:
    """timestamp_ms is that of the record found; -1 when the answer is the end of the partition."""

    offset: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class CommittedOffset:
    """offset: the next one the group will read. topic_id: which topic of that name it was committed in."""

    topic: str
    partition: int
    offset: int
    metadata: str = ""
    committed_ms: int = field(default=0)
    topic_id: str = ""


def topic_of(info: coordinator_pb2.TopicInfo) -> Topic:
    return Topic(
        info.topic,
        info.topic_id.hex(),
        info.partitions,
        info.retention_ms if info.HasField("retention_ms") else None,
        info.retention_bytes if info.HasField("retention_bytes") else None,
        ACKS_NAMES.get(info.min_acks, "wal"),
        info.unclean_recovery_after_ms if info.HasField("unclean_recovery_after_ms") else None,
        info.created_ms,
    )


def configs_of(topic: Topic) -> list[TopicConfig]:
    """Returns the topic's settings with their defaults."""
    rows: list[tuple[str, int | str | None, int | str | None, str]] = [
        ("partitions", topic.partitions, 1, "more"),
        ("min_acks", topic.min_acks, "wal", "not to or from durable"),
        ("retention_ms", topic.retention_ms, None, "yes"),
        ("retention_bytes", topic.retention_bytes, None, "yes"),
        ("unclean_recovery_after_ms", topic.unclean_recovery_after_ms, None, "yes"),
    ]
    return [TopicConfig(name=row[0], value=row[1], default=row[2], alterable=row[3]) for row in rows]


def range_of(info: types_pb2.OffsetRange) -> OffsetRange:
    return OffsetRange(
        info.epoch,
        info.start_offset,
        info.limit_offset,
        info.registered_end,
        info.end_offset if info.HasField("end_offset") else None,
        info.status,
        info.agent_id,
        info.orphaned_ms,
        info.acknowledged_end if info.HasField("acknowledged_end") else None,
    )


def partition_of(info: coordinator_pb2.PartitionInfo) -> Partition:
    return Partition(
        info.partition,
        info.leader_agent_id,
        info.leader_address,
        info.epoch,
        info.log_start_offset,
        info.registered_end,
        info.segment_count,
        info.size_bytes,
        info.raw_bytes,
        info.record_count,
        tuple(range_of(part) for part in info.ranges),
        tuple(LostRecords(span.epoch, span.base_offset, span.end_offset, span.reason) for span in info.lost),
    )


def session_of(info: coordinator_pb2.SessionInfo) -> Session:
    return Session(
        info.agent_id,
        info.role,
        info.address,
        info.session_id,
        info.expires_in_ms,
        info.started_ms,
        info.log_full,
    )


def lease_of(info: coordinator_pb2.LeaseInfo) -> Lease:
    return Lease(
        info.topic,
        info.partition,
        info.agent_id,
        info.epoch,
        info.status,
        info.log_start_offset,
        info.registered_end,
        tuple(range_of(part) for part in info.unsettled),
    )
