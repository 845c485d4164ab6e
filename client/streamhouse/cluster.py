"""The cluster as an admin sees it: dataclasses, made of the coordinator's messages."""

from dataclasses import dataclass, field

from shproto.acks import ACKS_NAMES, Acks
from shproto.v1 import coordinator_pb2, types_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """Settings of a topic. retention_ms, retention_bytes None: records are kept for ever; retention_bytes is per
    partition."""

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
    """Result of a deletion of records: the new start of the partition's log, and the segments and bytes removed."""

    log_start_offset: int
    segments_removed: int
    bytes_removed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicConfig:
    """A setting of a topic. value or default None: not set. alterable: "yes"; "more" (only upwards); "not to or from
    durable"."""

    name: str
    value: int | str | None
    default: int | str | None
    alterable: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetRange:
    """Offsets [start_offset, limit_offset) that an epoch owns, registered up to registered_end. end_offset is set when
    the range is settled. status: open | orphaned | settled | lost. orphaned_ms: when its leader was lost; 0: it is not
    orphaned. acknowledged_end: set if the log of its agent came back without records that were acknowledged up to
    there."""

    epoch: int
    start_offset: int
    limit_offset: int
    registered_end: int
    end_offset: int | None
    status: str
    agent_id: str
    orphaned_ms: int = 0
    acknowledged_end: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRecords:
    """Offsets [base_offset, end_offset) of an epoch with records that are lost for good; reading them is DATA_LOSS."""

    epoch: int
    base_offset: int
    end_offset: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A partition. leader_agent_id and leader_address are empty while there is no leader. size_bytes, raw_bytes (before
    compression), segment_count and record_count count segments on the object store."""

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
    """A topic with its partitions, by number."""

    topic: Topic
    partitions: tuple[Partition, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Session of a live service. role: ingest | query | segmenter | coordinator | sql. log_full: the log disk of an
    ingest agent is full, so that the agent leads only partitions that no other agent can lead."""

    agent_id: str
    role: str
    address: str
    session_id: str
    expires_in_ms: int
    started_ms: int
    log_full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Lease of a partition's leader. status: active | moving | unassigned. unsettled: older ranges that readers wait
    for."""

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
    """A sealed buffer whose last hand-over to the object store failed. reason: "kind: explanation"; a retry after kind
    `refused` does not help before an operator has acted."""

    buffer_id: str
    agent_id: str
    attempt: int
    reason: str
    size_bytes: int

    @property
    def refused(self) -> bool:
        """True if the object store refused the buffer for good."""
        return self.reason.startswith("refused: ")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreachableAgent:
    """An ingest agent that some segmenters or query services cannot reach. cut_off: its partitions go to other agents.
    since_ms: when the first of `failing` lost contact; 0: all reach the agent again."""

    agent_id: str
    address: str
    cut_off: bool
    failing: tuple[str, ...]
    reaching: tuple[str, ...]
    since_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """State of the cluster. missing_position: position of an event that was seen and does not exist any more, so that
    the metadata has to be restored; 0: none. buffer_failures: the oldest failures. unreachable_agents: agents that a
    worker cannot reach, or that are still cut off."""

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
    """An offset found. timestamp_ms: of the record found; -1 if the offset is the end of the partition."""

    offset: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedOffset:
    """Committed position of a group in a partition. offset: the next to read. topic_id: id of the topic in which the
    group committed; its name may belong to another topic by now."""

    topic: str
    partition: int
    offset: int
    metadata: str = ""
    committed_ms: int = field(default=0)
    topic_id: str = ""


def topic_of(info: coordinator_pb2.TopicInfo) -> Topic:
    """Returns a topic from the coordinator's message."""
    return Topic(
        topic=info.topic,
        topic_id=info.topic_id.hex(),
        partitions=info.partitions,
        retention_ms=info.retention_ms if info.HasField("retention_ms") else None,
        retention_bytes=info.retention_bytes if info.HasField("retention_bytes") else None,
        min_acks=ACKS_NAMES.get(info.min_acks, "wal"),
        unclean_recovery_after_ms=info.unclean_recovery_after_ms
        if info.HasField("unclean_recovery_after_ms")
        else None,
        created_ms=info.created_ms,
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
    """Returns an offset range from the coordinator's message."""
    return OffsetRange(
        epoch=info.epoch,
        start_offset=info.start_offset,
        limit_offset=info.limit_offset,
        registered_end=info.registered_end,
        end_offset=info.end_offset if info.HasField("end_offset") else None,
        status=info.status,
        agent_id=info.agent_id,
        orphaned_ms=info.orphaned_ms,
        acknowledged_end=info.acknowledged_end if info.HasField("acknowledged_end") else None,
    )


def partition_of(info: coordinator_pb2.PartitionInfo) -> Partition:
    """Returns a partition from the coordinator's message."""
    return Partition(
        partition=info.partition,
        leader_agent_id=info.leader_agent_id,
        leader_address=info.leader_address,
        epoch=info.epoch,
        log_start_offset=info.log_start_offset,
        registered_end=info.registered_end,
        segment_count=info.segment_count,
        size_bytes=info.size_bytes,
        raw_bytes=info.raw_bytes,
        record_count=info.record_count,
        ranges=tuple(range_of(part) for part in info.ranges),
        lost=tuple(
            LostRecords(epoch=span.epoch, base_offset=span.base_offset, end_offset=span.end_offset, reason=span.reason)
            for span in info.lost
        ),
    )


def session_of(info: coordinator_pb2.SessionInfo) -> Session:
    """Returns a session from the coordinator's message."""
    return Session(
        agent_id=info.agent_id,
        role=info.role,
        address=info.address,
        session_id=info.session_id,
        expires_in_ms=info.expires_in_ms,
        started_ms=info.started_ms,
        log_full=info.log_full,
    )


def lease_of(info: coordinator_pb2.LeaseInfo) -> Lease:
    """Returns a lease from the coordinator's message."""
    return Lease(
        topic=info.topic,
        partition=info.partition,
        agent_id=info.agent_id,
        epoch=info.epoch,
        status=info.status,
        log_start_offset=info.log_start_offset,
        registered_end=info.registered_end,
        unsettled=tuple(range_of(part) for part in info.unsettled),
    )
