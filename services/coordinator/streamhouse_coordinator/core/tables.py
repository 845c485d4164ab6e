"""Rows that the coordinator keeps, as frozen dataclasses; docs/tables.md is the page for readers. Pure.

Projections are built from events only (projection.py) and can be rebuilt. Each projection has a base with the same
columns: its rows as of the last pruned event, from which rebuilding starts. State is everything that is not an event:
expiry times, claims, committed offsets. Field order is column order; identifiers of topics and logs are UUIDs in hex.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

RowT = TypeVar("RowT")


PartitionRowKey = tuple[str, int]
RangeRowKey = tuple[str, int, int]
"""Keys of rows: topic_id in hex, partition, and of a range its epoch. shproto.keys has the keys outside of tables."""


@dataclass(frozen=True, kw_only=True)
class Table(Generic[RowT]):
    """A table: its row type, its primary key, and True in `projection` if events alone build it."""

    name: str
    row: Callable[..., RowT]
    key: tuple[str, ...]
    projection: bool = False

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in the order of the row's fields."""
        return tuple(item.name for item in fields(self.row))  # type: ignore[arg-type]

    def row_of(self, values: Sequence[object]) -> RowT:
        """Returns the row with `values`, in the order of the columns. Trailing columns that `values` lacks, as rows of
        an older version may, have their defaults. Raises TypeError or ValueError if there is no such row."""
        if len(values) > len(self.columns):
            raise ValueError(f"{len(values)} values for the {len(self.columns)} columns of {self.name}")
        return self.row(**dict(zip(self.columns, values, strict=False)))

    def key_of(self, row: RowT) -> tuple[object, ...]:
        """Returns the primary key of `row`."""
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
    """A partition of a topic. `epoch` is the last epoch granted (0: none yet) and only grows."""

    topic_id: str
    partition: int
    epoch: int
    log_start_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRow:
    """Offsets [start_offset, limit_offset) that an epoch owns.

    `registered_end` only grows; `end_offset` is set once, when the range ends. `acknowledged_end` is set when the
    range's log came back and ended below the buffers announced from it; the range settles at no lower end.
    `orphaned_ms` is the time at which the range lost its leader; 0: never.
    """

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
    def key(self) -> RangeRowKey:
        return (self.topic_id, self.partition, self.epoch)

    @property
    def unfinished(self) -> bool:
        """True while registration may go on."""
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
    """An agent that its workers could not reach in this session. `reachable_ms`: since when they can again; 0: not yet.
    `reporters`: a JSON list of worker ids."""

    agent_id: str
    session_id: str
    reporters: str
    since_ms: int
    times: int
    reachable_ms: int


@dataclass(frozen=True, slots=True)
class DeletedTopicRow:
    """A deleted topic. The id stays known for ever, so that a log or an object of the topic is not attributed to a
    topic that this metadata has never known."""

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
    def range_key(self) -> RangeRowKey:
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
    """A consumer group. `assignment` is JSON: member id -> ["topic:partition", ...]."""

    group_name: str
    generation: int
    assignment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMemberRow:
    """A member of a consumer group. `topics` is a JSON list."""

    group_name: str
    member_id: str
    client_id: str
    topics: str
    session_timeout_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlTableRow:
    """A table that was declared for SQL. `table_name` is in small letters; `definition` is the CREATE TABLE
    statement."""

    table_name: str
    table_id: str
    definition: str
    created_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlJobRow:
    """A continuous query. `job` is its name in small letters; `kind`: view | sink | insert; `state`: running | paused |
    failed | lost."""

    job: str
    job_id: str
    kind: str
    statement: str
    output_topic: str
    output_topic_id: str
    producer_id: int
    state: str
    reason: str
    created_ms: int
    definitions: str  # JSON, a list of texts


# ---- state


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlJobLeaseRow:
    """Hold of a worker's session on a job, until the session ends (empty: none). `epoch` only grows, one with every new
    holder: it is the producer epoch of what the holder writes. `ended_epoch` is the newest whose holder said that it
    ended with an error, or that was paused or resumed, 0: none. The numbers are those of the last micro-batch in the
    journal and of the last that a checkpoint covers; `journal_bytes` is the size of the entries between. The rest was
    reported by the holder at `reported_ms`, 0: nothing yet."""

    job_id: str
    session_id: str
    epoch: int
    journal_number: int = 0
    checkpoint_number: int = 0
    journal_bytes: int = 0
    lag_records: int = 0
    watermark_us: int | None = None
    state_bytes: int = 0
    reported_ms: int = 0
    ended_epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlJournalRow:
    """A micro-batch behind the checkpoint, with fixed boundaries. `epoch`: of the worker that fixed them."""

    job_id: str
    number: int
    epoch: int
    entry: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlCheckpointRow:
    """The last checkpoint of a job. `number`: of the last micro-batch that it covers."""

    job_id: str
    number: int
    epoch: int
    checkpoint: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLeaseRow:
    """Lease of a session. `grants_version` changes with every change of leadership. `log_full`: the agent's log has no
    space left."""

    session_id: str
    expires_ms: int
    grants_version: int
    log_full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachReportRow:
    """Report of a worker about an agent: since when the worker reaches the agent or fails to, and the time of its last
    report."""

    session_id: str
    agent_session_id: str
    reached: bool
    since_ms: int
    reported_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferClaimRow:
    """Claim of a sealed buffer, free to take from `free_at_ms` on: 0 if never claimed, else the claim's expiry or the
    time of the next try. `sealed_ms`: when the buffer was announced; rows of older versions have the position of their
    event, which is smaller than any time."""

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
    """State of idempotent producers at `end_offset`, as the leader of `epoch` encoded it."""

    topic_id: str
    partition: int
    epoch: int
    end_offset: int
    snapshot: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerFenceRow:
    """The newest epoch of a producer that fences, in a partition. `state`: of the producer in all ranges with an epoch
    below `known_epoch`, as an agent encoded it."""

    topic_id: str
    partition: int
    producer_id: int
    producer_epoch: int
    known_epoch: int
    state: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LostSpanRow:
    """A reported hole, kept until registration reaches its base_offset."""

    topic_id: str
    partition: int
    epoch: int
    base_offset: int
    end_offset: int
    reason: str

    @property
    def range_key(self) -> RangeRowKey:
        return (self.topic_id, self.partition, self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMemberStateRow:
    """State of a group member. `owned`: a JSON list of the partitions that the member works on or was assigned.
    `complete`: the member gets no further partitions, and may keep no others, in this generation."""

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
    """An object that `worker_id` declared before its upload. `buffer_id`: the buffer in the object; empty: a
    compaction."""

    object_key: str
    claim_id: str
    buffer_id: str
    worker_id: str
    declared_ms: int


@dataclass(frozen=True, slots=True)
class DeletionRow:
    """An object that no segment refers to. `begun_ms`: since when the object may be gone from the store; 0: it is still
    there."""

    object_key: str
    noticed_ms: int
    begun_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedProducerRow:
    """The newest epoch of a producer that writers take over by its name."""

    name: str
    producer_id: int
    producer_epoch: int
    initialized_ms: int


@dataclass(frozen=True, slots=True)
class SweepRow:
    """Time of the last sweep of a name, by any coordinator."""

    name: str
    last_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryRow:
    """A history of the events; the row with the greatest `nth` continues. A history shares the events up to
    `from_position` with the rows before. Producer ids below `producer_ids_from` were allocated in an older history."""

    nth: int
    history_id: str
    from_position: int
    producer_ids_from: int
    created_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryMarkRow:
    """Identity of an event that a mark in the object store names; kept when the event itself is pruned."""

    position: int
    stream_id: str
    version: int
    type: str
    created_ms: int


@dataclass(frozen=True, slots=True)
class PrunedRow:
    """The only row of its table. `position`: position of the last pruned event, as of which the bases are; 0: no event
    was pruned."""

    only_row: bool
    position: int


# ---- events


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkRow:
    """A rollback: an event at `position` of the history was seen and is gone. seen_by: coordinator | agent"""

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


# A kind of SQL job whose result is a table, too.
VIEW = "view"
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
SQL_JOBS = Table(name="sql_jobs", row=SqlJobRow, key=("job",), projection=True)
SQL_TABLES = Table(name="sql_tables", row=SqlTableRow, key=("table_name",), projection=True)
NAMED_PRODUCERS = Table(name="named_producers", row=NamedProducerRow, key=("name",), projection=True)

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
PRODUCER_FENCES = Table(name="producer_fences", row=ProducerFenceRow, key=("topic_id", "partition", "producer_id"))
LOST_SPANS = Table(name="lost_spans", row=LostSpanRow, key=("topic_id", "partition", "epoch", "base_offset"))
GROUP_MEMBER_STATE = Table(name="group_member_state", row=GroupMemberStateRow, key=("group_name", "member_id"))
GROUP_OFFSETS = Table(name="group_offsets", row=GroupOffsetRow, key=("group_name", "topic_id", "partition"))
UPLOAD_INTENTS = Table(name="upload_intents", row=UploadIntentRow, key=("object_key",))
DELETIONS = Table(name="deletions", row=DeletionRow, key=("object_key",))
SQL_JOB_LEASES = Table(name="sql_job_leases", row=SqlJobLeaseRow, key=("job_id",))
SQL_JOURNAL = Table(name="sql_journal", row=SqlJournalRow, key=("job_id", "number"))
SQL_CHECKPOINTS = Table(name="sql_checkpoints", row=SqlCheckpointRow, key=("job_id",))
SWEEPS = Table(name="sweeps", row=SweepRow, key=("name",))
HISTORIES = Table(name="histories", row=HistoryRow, key=("nth",))
FORKS = Table(name="forks", row=ForkRow, key=("history_id",))
HISTORY_MARKS = Table(name="history_marks", row=HistoryMarkRow, key=("position",))
PRUNED = Table(name="pruned_position", row=PrunedRow, key=("only_row",))
EVENTS = Table(name="events", row=EventRow, key=("position",))

# Tables with row locks, in the order of locking. Rows of the tables that are missing here are changed only under the
# lock of another row: that of their range or partition (segments, lost spans, fences, buffers), or of their group. The
# rules are in service/common.py.
LOCK_ORDER: tuple[Table[Any], ...] = (
    TOPICS,  # alteration and deletion, shared with commits of offsets
    RANGES,  # registration, and all that ends or extends an epoch
    PARTITIONS,  # for the segments of a partition: compaction, retention, deletion of records
    BUFFER_CLAIMS,  # for the buffer: a registration may complete the buffer
    COMPACTION_CLAIMS,
    UPLOAD_INTENTS,  # for the object: registration against deletion (decision 0007)
    DELETIONS,
    PRODUCER_SNAPSHOTS,
    GROUP_OFFSETS,
    SWEEPS,
    SQL_JOB_LEASES,  # for the journal and the checkpoint of the job
    SESSION_LEASES,  # last: a heartbeat holds a single lease and nothing else
)
_LOCK_RANKS = {table.name: rank for rank, table in enumerate(LOCK_ORDER)}


def lock_rank(table: Table[Any]) -> int:
    """Returns the rank of a table's rows in the lock order; tables without row locks come last."""
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
    SQL_TABLES,
    SQL_JOBS,
    NAMED_PRODUCERS,
)  # type: ignore[assignment]


def base_of(table: Table[RowT]) -> Table[RowT]:
    """Returns the table with a projection's rows as of the last pruned event."""
    return replace(table, name=f"base_{table.name}", projection=False)


def rebuilt_of(table: Table[RowT]) -> Table[RowT]:
    """Returns the temporary table in which a projection is built again for comparison."""
    return replace(table, name=f"rebuilt_{table.name}", projection=False)


STATE: tuple[Table[object], ...] = (
    SESSION_LEASES,
    REACH_REPORTS,
    BUFFERS,
    BUFFER_SLICES,
    BUFFER_CLAIMS,
    COMPACTION_CLAIMS,
    PRODUCER_SNAPSHOTS,
    PRODUCER_FENCES,
    LOST_SPANS,
    GROUP_MEMBER_STATE,
    GROUP_OFFSETS,
    UPLOAD_INTENTS,
    DELETIONS,
    SWEEPS,
    SQL_JOB_LEASES,
    SQL_JOURNAL,
    SQL_CHECKPOINTS,
    HISTORIES,
    FORKS,
    HISTORY_MARKS,
    PRUNED,
)  # type: ignore[assignment]
