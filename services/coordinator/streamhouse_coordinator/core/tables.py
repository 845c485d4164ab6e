"""The rows the coordinator keeps, as frozen dataclasses; docs/tables.md is the page for readers.

Projections are built from events only (projection.py) and can be rebuilt. Each has a base, with the same columns: its
rows as of the last event that was pruned, which rebuilding starts from. State is what is not an event: expiry times,
claims, committed offsets. Field order is column order; identifiers of topics and logs are UUIDs in hex.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

RowT = TypeVar("RowT")


@dataclass(frozen=True, kw_only=True)
class Table(Generic[RowT]):
    """A table: its row type, its primary key, and whether it is a projection of the events."""

    name: str
    row: Callable[..., RowT]
    key: tuple[str, ...]
    projection: bool = False

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(item.name for item in fields(self.row))  # type: ignore[arg-type]

    def row_of(self, values: Sequence[object]) -> RowT:
        """Returns the row with `values`, in the order of the columns. Trailing columns that `values` lacks, as rows of
        an older version may, have their defaults. Raises TypeError or ValueError if there is no such row."""
        if len(values) > len(self.columns):
            raise ValueError(f"{len(values)} values for the {len(self.columns)} columns of {self.name}")
        return self.row(**dict(zip(self.columns, values, strict=False)))

    def key_of(self, row: RowT) -> tuple[object, ...]:
        return tuple(getattr(row, name) for name in self.key)


# ---- projections


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicRow:
    topic_id: str
    topic: str
    partitions: int
    retention_ms: int | None
    retention_bytes: int | None
    min_acks: int
    unclean_recovery_after_ms: int | None
    created_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionRow:
    """`epoch` is the last one granted (0: none yet); it only grows."""

    topic_id: str
    partition: int
    epoch: int
    log_start_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRow:
    """The offsets one epoch owns. `registered_end` only grows; `end_offset` is set once, when the range ends.
    `acknowledged_end`: set when the range's log came back and ended before it, though it had announced buffers up to
    there; the range is settled at no lower end. `orphaned_ms`: when it lost its leader; 0: it never did."""

    topic_id: str
    partition: int
    epoch: int
    start_offset: int
    limit_offset: int
    registered_end: int
    end_offset: int | None
    status: str
    session_id: str
    agent_id: str
    wal_id: str
    moving: bool
    acknowledged_end: int | None = None
    orphaned_ms: int = 0

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.topic_id, self.partition, self.epoch)

    @property
    def unfinished(self) -> bool:
        """Whether registration may still go on."""
        return self.status != LOST and self.registered_end != self.end_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRow:
    session_id: str
    agent_id: str
    role: str
    address: str
    wal_id: str
    started_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOffRow:
    """An agent that its workers could not reach in this session, and since when they can again; 0: not yet. `reporters`
    is a JSON list of worker ids."""

    agent_id: str
    session_id: str
    reporters: str
    since_ms: int
    times: int
    reachable_ms: int


@dataclass(frozen=True, slots=True)
class DeletedTopicRow:
    """A topic that was deleted: its id is known for ever, so that a log or an object of it is not taken for one of a
    topic that this metadata has never heard of."""

    topic_id: str
    topic: str
    deleted_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferRow:
    buffer_id: str
    session_id: str
    agent_id: str
    wal_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSliceRow:
    buffer_id: str
    topic_id: str
    partition: int
    epoch: int
    base_offset: int
    end_offset: int
    record_count: int
    size_bytes: int

    @property
    def range_key(self) -> tuple[str, int, int]:
        return (self.topic_id, self.partition, self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRow:
    segment_id: str
    topic_id: str
    partition: int
    epoch: int
    base_offset: int
    end_offset: int
    record_count: int
    object_key: str
    object_at: int
    size_bytes: int
    raw_bytes: int
    first_timestamp_ms: int
    max_timestamp_ms: int
    lost_reason: str


@dataclass(frozen=True, slots=True)
class GroupRow:
    """`assignment` is JSON: member id -> ["topic:partition", ...]."""

    group_name: str
    generation: int
    assignment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMemberRow:
    """`topics` is a JSON list."""

    group_name: str
    member_id: str
    client_id: str
    topics: str
    session_timeout_ms: int


# ---- state


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLeaseRow:
    """`grants_version` changes with every change of who leads what. `log_full`: its agent's log has no room."""

    session_id: str
    expires_ms: int
    grants_version: int
    log_full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachReportRow:
    """Report of a worker about an agent: since when it reaches it or does not, and when it last said so."""

    session_id: str
    agent_session_id: str
    reached: bool
    since_ms: int
    reported_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferClaimRow:
    """Free to claim from `free_at_ms` on: 0 when never claimed, the claim's expiry, or when a retry is due.
    `sealed_ms`: when it was announced; of rows of before, the position of its event, smaller than any time."""

    buffer_id: str
    wal_id: str
    sealed_ms: int
    size_bytes: int
    trace_context: str
    claim_id: str
    worker_id: str
    free_at_ms: int
    attempt: int
    last_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionClaimRow:
    topic_id: str
    partition: int
    claim_id: str
    worker_id: str
    expires_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerSnapshotRow:
    """Idempotent producers' state at `end_offset`, as the leader of `epoch` encoded it."""

    topic_id: str
    partition: int
    epoch: int
    end_offset: int
    snapshot: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LostSpanRow:
    """A reported hole that waits until registration reaches its base_offset."""

    topic_id: str
    partition: int
    epoch: int
    base_offset: int
    end_offset: int
    reason: str

    @property
    def range_key(self) -> tuple[str, int, int]:
        return (self.topic_id, self.partition, self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMemberStateRow:
    """`owned` is a JSON list: what the member works on or was told to work on. `complete`: that is all it will get,
    and all it may have, in this generation."""

    group_name: str
    member_id: str
    expires_ms: int
    owned: str
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOffsetRow:
    group_name: str
    topic_id: str
    partition: int
    next_offset: int
    metadata: str
    committed_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadIntentRow:
    """An object that `worker_id` said it would upload. `buffer_id`: what for; empty: a compaction."""

    object_key: str
    claim_id: str
    buffer_id: str
    worker_id: str
    declared_ms: int


@dataclass(frozen=True, slots=True)
class DeletionRow:
    """An object that nothing refers to. `begun_ms`: since when it may be gone from the store; 0: it is there."""

    object_key: str
    noticed_ms: int
    begun_ms: int


@dataclass(frozen=True, slots=True)
class SweepRow:
    """When expired leases were last looked for, by any coordinator."""

    name: str
    last_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryRow:
    """A history of the events; the newest `nth` is the one that goes on. It shares the events up to `from_position`
    with the ones before. Producer ids below `producer_ids_from` were given out in an older one."""

    nth: int
    history_id: str
    from_position: int
    producer_ids_from: int
    created_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryMarkRow:
    """What identifies an event that a mark in the object store names; kept when the event itself is pruned."""

    position: int
    stream_id: str
    version: int
    type: str
    created_ms: int


@dataclass(frozen=True, slots=True)
class PrunedRow:
    """One row. `position`: of the last event that was pruned; the bases are as of it. 0: none was."""

    only_row: bool
    position: int


# ---- events


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkRow:
    """An event at `position` of the history was seen, and is not there any more. seen_by: coordinator | agent"""

    history_id: str
    position: int
    seen_by: str
    noticed_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    position: int
    stream_id: str
    version: int
    type: str
    payload: str
    trace_context: str
    created_ms: int


OPEN, ORPHANED, SETTLED, LOST = "open", "orphaned", "settled", "lost"

TOPICS = Table(name="topics", row=TopicRow, key=("topic_id",), projection=True)
PARTITIONS = Table(name="partitions", row=PartitionRow, key=("topic_id", "partition"), projection=True)
RANGES = Table(name="ranges", row=RangeRow, key=("topic_id", "partition", "epoch"), projection=True)
SESSIONS = Table(name="sessions", row=SessionRow, key=("session_id",), projection=True)
CUT_OFFS = Table(name="cut_offs", row=CutOffRow, key=("agent_id",), projection=True)
DELETED_TOPICS = Table(name="deleted_topics", row=DeletedTopicRow, key=("topic_id",), projection=True)
SEGMENTS = Table(name="segments", row=SegmentRow, key=("segment_id",), projection=True)
GROUPS = Table(name="groups", row=GroupRow, key=("group_name",), projection=True)
GROUP_MEMBERS = Table(name="group_members", row=GroupMemberRow, key=("group_name", "member_id"), projection=True)

SESSION_LEASES = Table(name="session_leases", row=SessionLeaseRow, key=("session_id",))
REACH_REPORTS = Table(name="reach_reports", row=ReachReportRow, key=("session_id", "agent_session_id"))
BUFFERS = Table(name="buffers", row=BufferRow, key=("buffer_id",))
BUFFER_SLICES = Table(
    name="buffer_slices", row=BufferSliceRow, key=("buffer_id", "topic_id", "partition", "epoch", "base_offset")
)
BUFFER_CLAIMS = Table(name="buffer_claims", row=BufferClaimRow, key=("buffer_id",))
COMPACTION_CLAIMS = Table(name="compaction_claims", row=CompactionClaimRow, key=("topic_id", "partition"))
PRODUCER_SNAPSHOTS = Table(
    name="producer_snapshots", row=ProducerSnapshotRow, key=("topic_id", "partition", "epoch", "end_offset")
)
LOST_SPANS = Table(name="lost_spans", row=LostSpanRow, key=("topic_id", "partition", "epoch", "base_offset"))
GROUP_MEMBER_STATE = Table(name="group_member_state", row=GroupMemberStateRow, key=("group_name", "member_id"))
GROUP_OFFSETS = Table(name="group_offsets", row=GroupOffsetRow, key=("group_name", "topic_id", "partition"))
UPLOAD_INTENTS = Table(name="upload_intents", row=UploadIntentRow, key=("object_key",))
DELETIONS = Table(name="deletions", row=DeletionRow, key=("object_key",))
SWEEPS = Table(name="sweeps", row=SweepRow, key=("name",))
HISTORIES = Table(name="histories", row=HistoryRow, key=("nth",))
FORKS = Table(name="forks", row=ForkRow, key=("history_id",))
HISTORY_MARKS = Table(name="history_marks", row=HistoryMarkRow, key=("position",))
PRUNED = Table(name="pruned_position", row=PrunedRow, key=("only_row",))
EVENTS = Table(name="events", row=EventRow, key=("position",))

# Tables whose rows are locked one after the other, in this order, and the tables whose rows only the holder of another
# lock changes: of the range or partition they belong to (segments, lost spans, buffers), or of their group. The rules
# are in service/common.py.
LOCK_ORDER: tuple[Table[Any], ...] = (
    TOPICS,
    RANGES,
    PARTITIONS,
    BUFFER_CLAIMS,
    COMPACTION_CLAIMS,
    UPLOAD_INTENTS,
    DELETIONS,
    PRODUCER_SNAPSHOTS,
    GROUP_OFFSETS,
    SWEEPS,
    SESSION_LEASES,
)
_LOCK_RANKS = {table.name: rank for rank, table in enumerate(LOCK_ORDER)}


def lock_rank(table: Table[Any]) -> int:
    """Returns the place of a table's rows in the order of locks; of rows that have none, behind all others."""
    return _LOCK_RANKS.get(table.name, len(LOCK_ORDER))


PROJECTIONS: tuple[Table[object], ...] = (
    TOPICS,
    PARTITIONS,
    RANGES,
    SESSIONS,
    CUT_OFFS,
    SEGMENTS,
    GROUPS,
    GROUP_MEMBERS,
    DELETED_TOPICS,
)  # type: ignore[assignment]


def base_of(table: Table[RowT]) -> Table[RowT]:
    """Returns the table of a projection's rows as of the last event that was pruned."""
    return replace(table, name=f"base_{table.name}", projection=False)


def rebuilt_of(table: Table[RowT]) -> Table[RowT]:
    """Returns the table that a projection is built in once more, to be compared with; it is there for as long."""
    return replace(table, name=f"rebuilt_{table.name}", projection=False)


STATE: tuple[Table[object], ...] = (
    SESSION_LEASES,
    REACH_REPORTS,
    BUFFERS,
    BUFFER_SLICES,
    BUFFER_CLAIMS,
    COMPACTION_CLAIMS,
    PRODUCER_SNAPSHOTS,
    LOST_SPANS,
    GROUP_MEMBER_STATE,
    GROUP_OFFSETS,
    UPLOAD_INTENTS,
    DELETIONS,
    SWEEPS,
    HISTORIES,
    FORKS,
    HISTORY_MARKS,
    PRUNED,
)  # type: ignore[assignment]
