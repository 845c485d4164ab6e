"""Decides how sessions open and end, and how the ranges of an ended session settle. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeVar

from shproto.errors import AgentIdTaken, InvalidArgument
from shproto.events import (
    Event,
    LogFoundTruncated,
    RangeExtended,
    RangeLost,
    RangeOrphaned,
    RangeSettled,
    SessionClosed,
    SessionOpened,
)
from shproto.limits import SNAPSHOT_BYTES_MAX, SNAPSHOTS_BYTES_MAX

from streamhouse_coordinator.core.tables import (
    LOST,
    OPEN,
    ORPHANED,
    SETTLED,
    PartitionRowKey,
    ProducerSnapshotRow,
    RangeRow,
    RangeRowKey,
    SessionRow,
)

INGEST, SEGMENTER = "ingest", "segmenter"
ROLES = (INGEST, "query", SEGMENTER, "coordinator", "sql")


@dataclass(frozen=True, slots=True, kw_only=True)
class WalEnds:
    """An agent's report on the ends of its log's ranges. `unknown`, `torn`: as in OpenSessionRequest. `snapshots`:
    state of the producers of unregistered records, where there are any. `firsts`: first offset in the log of each
    range, where the log says so. `topics`: known names by topic id."""

    ends: Mapping[RangeRowKey, int] = field(default_factory=dict)
    snapshots: Mapping[RangeRowKey, bytes] = field(default_factory=dict)
    unknown: bool = False
    torn: bool = False
    firsts: Mapping[RangeRowKey, int] = field(default_factory=dict)
    topics: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSnapshot:
    """A ProducerSnapshotRow without its bytes."""

    topic_id: str
    partition: int
    epoch: int
    end_offset: int
    size_bytes: int

    @property
    def key(self) -> tuple[str, int, int, int]:
        """Primary key of the snapshot's row."""
        return (self.topic_id, self.partition, self.epoch, self.end_offset)


SnapshotT = TypeVar("SnapshotT", ProducerSnapshotRow, StoredSnapshot)


@dataclass(frozen=True, slots=True)
class AcknowledgedEnds:
    """Acknowledged records that are not registered, as far as the coordinator knows. `announced`: by range, the end of
    its announced buffers. In `durable_topics` only registered records count as acknowledged."""

    announced: Mapping[RangeRowKey, int] = field(default_factory=dict)
    durable_topics: Collection[str] = ()

    def acknowledged_end(self, row: RangeRow) -> int:
        """Returns the lowest offset at which `row` can end."""
        if row.topic_id in self.durable_topics:
            return row.registered_end
        return max(row.registered_end, self.announced.get(row.key, 0), row.acknowledged_end or 0)


def open_session(
    opened: SessionOpened,
    others: Sequence[SessionRow],
    live: Collection[str],
    ranges: Sequence[RangeRow],
    wal_ends: WalEnds,
    known: AcknowledgedEnds,
) -> list[Event]:
    """Returns the events of a new session. With a torn log they only orphan the open ranges, so that the next epochs
    begin at the limits; settle_all() has to follow those grants.

    `others`: sessions with the same agent id and role, or the same write-ahead log. `live`: ids of sessions with a
    valid lease. `ranges`: the unfinished ranges of `others` and of the log. Raises AgentIdTaken, InvalidArgument.
    """
    events: list[Event] = []
    for other in others:
        # The log is opened again: its former process is gone, or did not answer a probe.
        if other.wal_id == opened.wal_id:
            why = "superseded"
        elif other.session_id in live:
            raise AgentIdTaken(
                f"agent id {opened.agent_id!r} is in use by a live agent at {other.address} with another write-ahead "
                "log; give this agent another id (STREAMHOUSE_AGENT_ID)",
                agent_id=opened.agent_id,
                address=other.address,
            )
        else:
            why = "expired"
            events += end_leadership(
                [row for row in ranges if row.session_id == other.session_id], durable_topics=known.durable_topics
            )
        events.append(SessionClosed(session_id=other.session_id, agent_id=other.agent_id, role=other.role, why=why))
    if opened.wal_id:
        own = [row for row in ranges if row.wal_id == opened.wal_id]
        events += (
            end_leadership(own, durable_topics=())
            if wal_ends.torn
            else settle_all(own, wal_ends, known, opened.session_id)
        )
    # Last: a follower never sees two sessions of the same log.
    return [*events, opened]


def agent_id_taken(rival: SessionRow) -> AgentIdTaken:
    """Returns the refusal for a session that would replace a live process."""
    what = "write-ahead log" if rival.role == INGEST else "id"
    setting = "STREAMHOUSE_WORKER_ID" if rival.role == SEGMENTER else "STREAMHOUSE_AGENT_ID"
    return AgentIdTaken(
        f"the {what} of {rival.role} {rival.agent_id!r} is in use by a live process at {rival.address}; "
        + ("one of the two works on a copy" if rival.role == INGEST else f"give this one another id ({setting})"),
        agent_id=rival.agent_id,
        address=rival.address,
    )


def reopened(session: SessionRow, wanted: SessionOpened) -> SessionRow:
    """Returns the session that the first try of a repeated call opened. Raises InvalidArgument if it belongs to another
    process."""
    found = (session.agent_id, session.role, session.address, session.wal_id)
    if found != (wanted.agent_id, wanted.role, wanted.address, wanted.wal_id):
        raise InvalidArgument(
            f"the token is the one of session {session.session_id!r}, of another {session.role}; draw another one",
            field="session_token",
            value=session.session_id,
        )
    return session


def settle_all(ranges: Sequence[RangeRow], wal_ends: WalEnds, known: AcknowledgedEnds, session_id: str) -> list[Event]:
    """Returns the events that declare the ends of a log's ranges: the end that a replay found, else the registered end,
    or, where damage may hide records, the limit. A range without its announced records in the log is orphaned, and
    waits.

    Ranges granted to the very session that opens cannot have been written to: they come from a first try, of which the
    answer was lost and the lease has expired since.
    """
    events: list[Event] = []
    for row in ranges:
        if row.status in (OPEN, ORPHANED):
            written = row.session_id != session_id
            hidden = wal_ends.unknown and written and row.topic_id not in known.durable_topics
            end_offset = wal_ends.ends.get(row.key, row.limit_offset if hidden else row.registered_end)
            if max(end_offset, row.registered_end) < known.acknowledged_end(row):
                events += _truncated(row, end_offset, known.acknowledged_end(row))
            else:
                events.append(_settled(row, end_offset))
    return events


def _truncated(row: RangeRow, log_end: int, acknowledged_end: int) -> list[Event]:
    """Returns the events for a log that lacks announced records: an older copy of the log came back, and the rest may
    still exist."""
    events: list[Event] = end_leadership([row], durable_topics=())
    # Reported once, however often the same log is opened again.
    if row.acknowledged_end != acknowledged_end:
        events.append(
            LogFoundTruncated(
                topic_id=row.topic_id,
                partition=row.partition,
                epoch=row.epoch,
                log_end=log_end,
                acknowledged_end=acknowledged_end,
            )
        )
    return events


def _settled(row: RangeRow, end_offset: int) -> RangeSettled:
    if end_offset > row.limit_offset:
        raise InvalidArgument(
            f"partition {row.partition} of {row.topic_id}, epoch {row.epoch}: end {end_offset} is beyond the "
            f"range's limit {row.limit_offset}",
            field="end_offset",
            value=end_offset,
            limit=row.limit_offset,
        )
    # A log that lost its tail (power failure without fsync) may end below the registered end.
    return RangeSettled(
        topic_id=row.topic_id, partition=row.partition, epoch=row.epoch, end_offset=max(end_offset, row.registered_end)
    )


def end_leadership(ranges: Sequence[RangeRow], *, durable_topics: Collection[str]) -> list[Event]:
    """Returns the events that end the leadership of open ranges. If only durable records are acknowledged, the log
    holds no acknowledged record that is not registered, and the range settles at once."""
    events: list[Event] = []
    for row in ranges:
        if row.status == OPEN and row.topic_id in durable_topics:
            events.append(
                RangeSettled(
                    topic_id=row.topic_id, partition=row.partition, epoch=row.epoch, end_offset=row.registered_end
                )
            )
        elif row.status == OPEN:
            events.append(RangeOrphaned(topic_id=row.topic_id, partition=row.partition, epoch=row.epoch))
    return events


def end_session(
    session: SessionRow, ranges: Sequence[RangeRow], durable_topics: Collection[str], why: str
) -> list[Event]:
    """Returns the events that end a session. why: closed | expired | unreachable"""
    closed = SessionClosed(session_id=session.session_id, agent_id=session.agent_id, role=session.role, why=why)
    return [closed, *end_leadership(ranges, durable_topics=durable_topics)]


def settle(
    session: SessionRow,
    ranges: Mapping[RangeRowKey, RangeRow],
    ends: Mapping[RangeRowKey, int],
    known: AcknowledgedEnds,
) -> list[RangeSettled]:
    """Returns the events with which a leader ends its ranges. Skips ended ranges and deleted topics, since the call may
    be a retry, and ranges that wait for records their log lacks. Raises InvalidArgument for a range of another log, or
    an end below the registered or announced end."""
    events: list[RangeSettled] = []
    for key, end_offset in ends.items():
        row = ranges.get(key)
        if row is None or row.status in (SETTLED, LOST):
            continue
        least = known.acknowledged_end(row)
        waits = row.acknowledged_end is not None and row.registered_end <= end_offset < row.acknowledged_end
        if row.wal_id == session.wal_id and waits:
            continue
        if row.wal_id != session.wal_id or end_offset < least:
            raise InvalidArgument(
                f"partition {row.partition} of {row.topic_id}, epoch {row.epoch}: cannot settle at {end_offset}; "
                f"acknowledged up to {least}, registered up to {row.registered_end}, led by agent {row.agent_id}",
                field="end_offset",
                value=end_offset,
                limit=least,
            )
        events.append(_settled(row, end_offset))
    return events


def extend(row: RangeRow, next_offset: int, width_offsets: int) -> RangeExtended | None:
    """Returns a wider range if less than a quarter of a width is left, else None (for a repeated request, say)."""
    # By default a quarter is 2^28 offsets: many heartbeats of any agent, so no leader runs out of offsets in between.
    if row.status != OPEN or row.limit_offset - next_offset >= width_offsets // 4:
        return None
    return RangeExtended(
        topic_id=row.topic_id, partition=row.partition, epoch=row.epoch, limit_offset=row.limit_offset + width_offsets
    )


def newest_for(row: RangeRow, snapshots: Sequence[SnapshotT]) -> SnapshotT | None:
    """Returns the snapshot from which the leader of `row` continues: the newest of the registered part of the range,
    or, at its beginning, the newest of an earlier epoch; None if there is none.

    If an older range of the partition has a snapshot, a newer range has a snapshot as well: answers that omit snapshots
    rely on this (reported_count).
    """
    own = [item for item in snapshots if item.epoch == row.epoch and item.end_offset <= row.registered_end]
    earlier = [item for item in snapshots if item.epoch < row.epoch]
    return max(own or earlier, key=lambda item: (item.epoch, item.end_offset), default=None)


def snapshot_for(row: RangeRow, snapshots: Sequence[ProducerSnapshotRow]) -> bytes:
    """Returns the bytes of newest_for(), empty if there is none."""
    newest = newest_for(row, snapshots)
    return newest.snapshot if newest is not None else b""


def reported_count(sizes_bytes: Sequence[int]) -> int:
    """Returns how many leading snapshots fit into SNAPSHOTS_BYTES_MAX together, at least 1 if there are any. Later ones
    are omitted even if they would fit, so that an agent that requests omitted snapshots again makes progress with every
    answer."""
    fitting = sum(total <= SNAPSHOTS_BYTES_MAX for total in accumulate(sizes_bytes))
    return max(fitting, min(1, len(sizes_bytes)))


def usable(snapshot: ProducerSnapshotRow | StoredSnapshot, row: RangeRow | None) -> bool:
    """Returns True if the batches that `snapshot` remembers are in the log, or may still get there. A retry of a fenced
    or lost batch must not count as a duplicate."""
    if row is None or row.status == LOST:
        return row is not None and snapshot.end_offset <= row.registered_end
    return row.end_offset is None or snapshot.end_offset <= row.end_offset


def settled_snapshots(
    settled: Sequence[RangeRow], declared: WalEnds, known: Mapping[PartitionRowKey, Sequence[ProducerSnapshotRow]]
) -> list[ProducerSnapshotRow]:
    """Returns the producer state to keep for ranges that have just settled with unregistered records.

    The agent's snapshot has only the unregistered records, so the earlier state (the newest usable of `known`) is put
    before. The announcement of the last buffer of the range replaces the row by the full state.
    """
    rows: list[ProducerSnapshotRow] = []
    for row in sorted(settled, key=lambda item: item.key):
        reported = declared.snapshots.get(row.key, b"")
        if reported and row.end_offset == declared.ends[row.key] > row.registered_end:
            partition = row.topic_id, row.partition
            # Ranges of a partition that settle together: the later continues from the state of the earlier.
            here = [item for item in rows if (item.topic_id, item.partition) == partition]
            before = snapshot_for(row, [*known.get(partition, ()), *here])
            whole = before + reported if len(before) + len(reported) <= SNAPSHOT_BYTES_MAX else reported
            rows.append(
                ProducerSnapshotRow(
                    topic_id=row.topic_id,
                    partition=row.partition,
                    epoch=row.epoch,
                    end_offset=row.end_offset,
                    snapshot=whole,
                )
            )
    return rows


def lose_unclean(row: RangeRow, unclean_after_ms: int, now_ms: int) -> RangeLost | None:
    """Returns the loss of a range that has waited for its agent for longer than unclean_recovery_after_ms, None if it
    has not. The true end is unknown, so everything up to the limit counts as lost."""
    # Without a time it is not known how long the range has waited: an operator has to decide.
    if not row.orphaned_ms or now_ms - row.orphaned_ms < unclean_after_ms:
        return None
    return RangeLost(
        topic_id=row.topic_id,
        partition=row.partition,
        epoch=row.epoch,
        end_offset=row.limit_offset,
        why="unclean_recovery_after_ms",
    )


def declare_lost(row: RangeRow, why: str) -> RangeLost | None:
    """Returns the loss of a range on an operator's command; None if there is nothing to lose: the end is known, or the
    range is lost already. Raises InvalidArgument while the range has a leader."""
    if row.status in (SETTLED, LOST):
        return None
    if row.status == OPEN:
        raise InvalidArgument(
            f"partition {row.partition} of {row.topic_id}, epoch {row.epoch} is led by agent {row.agent_id}; only a "
            "range whose agent is gone can be declared lost",
            field="epochs",
            value=row.epoch,
        )
    return RangeLost(
        topic_id=row.topic_id, partition=row.partition, epoch=row.epoch, end_offset=row.limit_offset, why=why
    )
