"""Maps each event to the row operations that it causes in the projections. Pure.

Invariant: nothing else changes the projections, live and in a replay alike, so a rebuild gives the same rows.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

from shproto import events as ev
from shproto.model import Range, Segment

from streamhouse_coordinator.core import tables as t


@dataclass(frozen=True, slots=True)
class Put:
    """Inserts the row, or replaces the row with its key."""

    table: t.Table[Any]
    row: Any


@dataclass(frozen=True, slots=True)
class Set:
    """Changes columns of the row with this key; has no effect if there is none."""

    table: t.Table[Any]
    key: tuple[object, ...]
    changes: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Remove:
    """Deletes the rows whose columns equal `where`: a single row if the columns are the key, or many."""

    table: t.Table[Any]
    where: Mapping[str, object]


RowOp = Put | Set | Remove
RowOps = tuple[RowOp, ...]


@singledispatch
def row_ops(event: ev.Event) -> RowOps:
    """Returns the row changes of `event`; none for an event without rows of its own."""
    raise TypeError(f"no projection for {type(event).__name__}")


@row_ops.register
def _(event: ev.TopicCreated) -> RowOps:
    row = t.TopicRow(
        topic_id=event.topic_id,
        topic=event.topic,
        partitions=event.partitions,
        retention_ms=event.retention_ms,
        retention_bytes=event.retention_bytes,
        min_acks=event.min_acks,
        unclean_recovery_after_ms=event.unclean_recovery_after_ms,
        created_ms=event.created_ms,
    )
    partitions = (
        Put(t.PARTITIONS, t.PartitionRow(topic_id=event.topic_id, partition=number, epoch=0, log_start_offset=0))
        for number in range(event.partitions)
    )
    return (Put(t.TOPICS, row), *partitions)


@row_ops.register
def _(event: ev.TopicAltered) -> RowOps:
    changes = {
        "partitions": event.partitions,
        "retention_ms": event.retention_ms,
        "retention_bytes": event.retention_bytes,
        "min_acks": event.min_acks,
        "unclean_recovery_after_ms": event.unclean_recovery_after_ms,
    }
    new = range(event.partitions_before, event.partitions)
    added = (
        Put(t.PARTITIONS, t.PartitionRow(topic_id=event.topic_id, partition=number, epoch=0, log_start_offset=0))
        for number in new
    )
    return (Set(t.TOPICS, (event.topic_id,), changes), *added)


@row_ops.register
def _(event: ev.TopicDeleted) -> RowOps:
    where = {"topic_id": event.topic_id}
    # The id is kept: a log or object of this topic must not pass for that of a topic lost with the metadata.
    gone = (Remove(table, where) for table in (t.TOPICS, t.PARTITIONS, t.RANGES, t.SEGMENTS))
    return (*gone, Put(t.DELETED_TOPICS, t.DeletedTopicRow(event.topic_id, event.topic, event.deleted_ms)))


@row_ops.register
def _(event: ev.SqlTableCreated) -> RowOps:
    row = t.SqlTableRow(
        table_name=event.table, table_id=event.table_id, definition=event.definition, created_ms=event.created_ms
    )
    return (Put(t.SQL_TABLES, row),)


@row_ops.register
def _(event: ev.SqlTableDropped) -> RowOps:
    return (Remove(t.SQL_TABLES, {"table_name": event.table}),)


@row_ops.register
def _(event: ev.SqlJobCreated) -> RowOps:
    row = t.SqlJobRow(
        job=event.job,
        job_id=event.job_id,
        kind=event.kind,
        statement=event.statement,
        output_topic=event.output_topic,
        output_topic_id=event.output_topic_id,
        producer_id=event.producer_id,
        state="running",
        reason="",
        created_ms=event.created_ms,
        definitions=json.dumps(event.definitions),
    )
    return (Put(t.SQL_JOBS, row),)


@row_ops.register
def _(event: ev.SqlJobAltered) -> RowOps:
    return (Set(t.SQL_JOBS, (event.job,), {"state": event.state, "reason": event.reason}),)


@row_ops.register
def _(event: ev.SqlJobDropped) -> RowOps:
    return (Remove(t.SQL_JOBS, {"job": event.job}),)


@row_ops.register
def _(event: ev.ProducerInitialized) -> RowOps:
    row = t.NamedProducerRow(
        name=event.name,
        producer_id=event.producer_id,
        producer_epoch=event.producer_epoch,
        initialized_ms=event.initialized_ms,
    )
    return (Put(t.NAMED_PRODUCERS, row),)


@row_ops.register
def _(event: ev.ProducerDeleted) -> RowOps:
    return (Remove(t.NAMED_PRODUCERS, {"name": event.name}),)


@row_ops.register
def _(event: ev.SessionOpened) -> RowOps:
    row = t.SessionRow(
        session_id=event.session_id,
        agent_id=event.agent_id,
        role=event.role,
        address=event.address,
        wal_id=event.wal_id,
        started_ms=event.started_ms,
    )
    return (Put(t.SESSIONS, row),)


@row_ops.register
def _(event: ev.SessionClosed) -> RowOps:
    return (Remove(t.SESSIONS, {"session_id": event.session_id}),)


@row_ops.register
def _(event: ev.AgentCutOff) -> RowOps:
    reporters = json.dumps(list(event.reporters))
    row = t.CutOffRow(
        agent_id=event.agent_id,
        session_id=event.session_id,
        reporters=reporters,
        since_ms=event.since_ms,
        times=event.times,
        reachable_ms=0,
    )
    return (Put(t.CUT_OFFS, row),)


@row_ops.register
def _(event: ev.AgentReachable) -> RowOps:
    return (Set(t.CUT_OFFS, (event.agent_id,), {"reachable_ms": event.reachable_ms}),)


@row_ops.register
def _(event: ev.EpochGranted) -> RowOps:
    row = t.RangeRow(
        topic_id=event.topic_id,
        partition=event.partition,
        epoch=event.epoch,
        start_offset=event.start_offset,
        limit_offset=event.limit_offset,
        registered_end=event.start_offset,
        end_offset=None,
        status=t.OPEN,
        session_id=event.session_id,
        agent_id=event.agent_id,
        wal_id=event.wal_id,
        moving=False,
    )
    return (Put(t.RANGES, row), Set(t.PARTITIONS, (event.topic_id, event.partition), {"epoch": event.epoch}))


def _set_range(event: Any, **changes: object) -> RowOps:
    return (Set(t.RANGES, (event.topic_id, event.partition, event.epoch), changes),)


@row_ops.register
def _(event: ev.RangeExtended) -> RowOps:
    return _set_range(event, limit_offset=event.limit_offset)


@row_ops.register
def _(event: ev.MoveRequested) -> RowOps:
    return _set_range(event, moving=True)


@row_ops.register
def _(event: ev.RangeOrphaned) -> RowOps:
    return _set_range(event, status=t.ORPHANED, moving=False, orphaned_ms=event.orphaned_ms)


@row_ops.register
def _(event: ev.LogFoundTruncated) -> RowOps:
    return _set_range(event, acknowledged_end=event.acknowledged_end)


@row_ops.register
def _(event: ev.RangeSettled) -> RowOps:
    return _set_range(event, status=t.SETTLED, end_offset=event.end_offset, moving=False)


@row_ops.register
def _(event: ev.RangeLost) -> RowOps:
    return _set_range(event, status=t.LOST, end_offset=event.end_offset, moving=False)


@row_ops.register
def _(event: ev.BufferSealed) -> RowOps:
    return ()  # buffers are state; older logs have the event


@row_ops.register
def _(event: ev.BufferCompleted) -> RowOps:
    return ()


def _segment_row(segment: Segment) -> t.SegmentRow:
    return t.SegmentRow(**{name: getattr(segment, name) for name in t.SEGMENTS.columns})


@row_ops.register
def _(event: ev.SegmentRegistered) -> RowOps:
    return _registered(event.segment)


@row_ops.register
def _(event: ev.BufferRegistered) -> RowOps:
    return tuple(op for segment in event.segments for op in _registered(segment))


def _registered(segment: Segment) -> RowOps:
    key = (segment.topic_id, segment.partition, segment.epoch)
    return (Put(t.SEGMENTS, _segment_row(segment)), Set(t.RANGES, key, {"registered_end": segment.end_offset}))


@row_ops.register
def _(event: ev.SegmentsCompacted) -> RowOps:
    removed = (Remove(t.SEGMENTS, {"segment_id": segment_id}) for segment_id in event.replaced_segment_ids)
    return (*removed, Put(t.SEGMENTS, _segment_row(event.segment)))


@row_ops.register
def _(event: ev.LogStartMoved) -> RowOps:
    removed = (Remove(t.SEGMENTS, {"segment_id": segment_id}) for segment_id in event.removed_segment_ids)
    changes = {"log_start_offset": event.log_start_offset}
    return (*removed, Set(t.PARTITIONS, (event.topic_id, event.partition), changes))


@row_ops.register
def _(event: ev.HistoryBegan) -> RowOps:
    return ()  # histories are no projection: the first began without an event


@row_ops.register
def _(event: ev.PartitionRestored) -> RowOps:
    key = {"topic_id": event.topic_id, "partition": event.partition}
    gone = [Remove(t.RANGES, key | {"epoch": epoch}) for epoch in event.removed_epochs]
    gone += [Remove(t.SEGMENTS, {"segment_id": segment_id}) for segment_id in event.removed_segment_ids]
    ranges = [Put(t.RANGES, _restored_range(event, item)) for item in event.ranges]
    segments = [Put(t.SEGMENTS, _segment_row(item)) for item in event.segments]
    row = t.PartitionRow(
        topic_id=event.topic_id, partition=event.partition, epoch=event.epoch, log_start_offset=event.log_start_offset
    )
    topic = [Set(t.TOPICS, (event.topic_id,), {"partitions": event.partitions})] if event.partitions else []
    return (*topic, *gone, *ranges, *segments, Put(t.PARTITIONS, row))


def _restored_range(event: ev.PartitionRestored, item: Range) -> t.RangeRow:
    return t.RangeRow(
        topic_id=event.topic_id,
        partition=event.partition,
        epoch=item.epoch,
        start_offset=item.start_offset,
        limit_offset=item.limit_offset,
        registered_end=item.registered_end,
        end_offset=item.end_offset,
        status=item.status,
        session_id="",
        agent_id=item.agent_id,
        wal_id=item.wal_id,
        moving=False,
        acknowledged_end=item.acknowledged_end,
        orphaned_ms=item.orphaned_ms,
    )


@row_ops.register
def _(event: ev.GroupMemberJoined) -> RowOps:
    topics = json.dumps(list(event.topics))
    row = t.GroupMemberRow(
        group_name=event.group,
        member_id=event.member_id,
        client_id=event.client_id,
        topics=topics,
        session_timeout_ms=event.session_timeout_ms,
    )
    return (Put(t.GROUP_MEMBERS, row),)


@row_ops.register
def _(event: ev.GroupMemberLeft) -> RowOps:
    return (Remove(t.GROUP_MEMBERS, {"group_name": event.group, "member_id": event.member_id}),)


@row_ops.register
def _(event: ev.GroupRebalanced) -> RowOps:
    return (Put(t.GROUPS, t.GroupRow(event.group, event.generation, json.dumps(event.assignment, sort_keys=True))),)


@row_ops.register
def _(event: ev.OffsetsReset) -> RowOps:
    return ()  # committed offsets are no projection: most commits cause no event


@row_ops.register
def _(event: ev.GroupDeleted) -> RowOps:
    return (Remove(t.GROUPS, {"group_name": event.group}),)


# ---- pruned and kept events


def stamped(event: ev.Event, at_ms: int) -> ev.Event:
    """Returns the event with `at_ms` as the time at which ranges lost their leader, if the event does not say the
    time."""
    match event:
        case ev.RangeOrphaned(orphaned_ms=0):
            return replace(event, orphaned_ms=at_ms)
        case ev.PartitionRestored(ranges=ranges) if any(map(_lacks_time, ranges)):
            full = (replace(item, orphaned_ms=at_ms) if _lacks_time(item) else item for item in ranges)
            return replace(event, ranges=tuple(full))
        case _:
            return event


def _lacks_time(item: Range) -> bool:
    return item.status == t.ORPHANED and not item.orphaned_ms


def replayed(row: t.EventRow) -> ev.Event | None:
    """Returns the event of a row, ready for row_ops(); None for a type that this version does not know. Events that an
    older version appended without a time are stamped with the time of their row."""
    event = ev.event_from_json(row.type, row.payload)
    return None if event is None else stamped(event, row.created_ms)


def elsewhere(op: RowOp, table_of: Callable[[t.Table[Any]], t.Table[Any]]) -> RowOp:
    """Returns the same operation on another table with the same columns."""
    return replace(op, table=table_of(op.table))


# ---- many operations in few statements


def coalesce(ops: Iterable[RowOp]) -> list[list[RowOp]]:
    """Returns the same effect as groups, each of which may run as a single statement: same table, same kind, same
    columns, no key twice, keys ascending. The groups are in the order of the tables' locks and must run in this
    order."""
    groups: list[list[RowOp]] = []
    pending: dict[str, dict[tuple[object, ...], RowOp]] = {}
    for op in ops:
        table_ops = pending.setdefault(op.table.name, {})
        key = _key(op)
        if key is None:  # removes rows by other columns than the key: earlier operations must run before
            groups += _grouped(table_ops.values())
            groups.append([op])
            table_ops.clear()
        else:
            table_ops[key] = _merge(table_ops.get(key), op)
    groups += [group for table_ops in pending.values() for group in _grouped(table_ops.values())]
    # The sort is stable: the groups of a table stay in their order.
    return sorted(groups, key=lambda group: t.lock_rank(group[0].table))


def _key(op: RowOp) -> tuple[object, ...] | None:
    match op:
        case Put(table, row):
            return table.key_of(row)
        case Set(_, key, _):
            return key
        case Remove(table, where):
            return tuple(where[name] for name in table.key) if set(where) == set(table.key) else None


def _merge(before: RowOp | None, op: RowOp) -> RowOp:
    if isinstance(op, Set) and isinstance(before, Put):
        return Put(op.table, replace(before.row, **op.changes))
    if isinstance(op, Set) and isinstance(before, Set):
        return Set(op.table, op.key, {**before.changes, **op.changes})
    # A change of a removed row has no effect.
    if isinstance(op, Set) and isinstance(before, Remove):
        return before
    # A later Put or Remove replaces any earlier operation on the row.
    return op


def _grouped(ops: Iterable[RowOp]) -> list[list[RowOp]]:
    groups: dict[tuple[object, ...], list[RowOp]] = {}
    for op in sorted(ops, key=lambda op: _key(op) or ()):
        columns = tuple(sorted(op.changes)) if isinstance(op, Set) else ()
        groups.setdefault((type(op), columns), []).append(op)
    # Removals first: a topic that is created again has the name of the deleted topic, under another key.
    return sorted(groups.values(), key=lambda group: not isinstance(group[0], Remove))
