"""Restores the metadata: loads a backup into an empty database, then adopts the segments that the object store holds
beyond it, all in a single transaction.

Invariants: either everything is written or nothing. Events are loaded without gap, from the first kept event to the
position that the manifest names.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from shproto.errors import InvalidArgument
from shproto.events import (
    Event,
    GroupMemberLeft,
    GroupRebalanced,
    HistoryBegan,
    SessionClosed,
)
from shstore import ObjectStore

from streamhouse_coordinator.core import sql_jobs
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove, Set, replayed, row_ops
from streamhouse_coordinator.core.tables import PartitionRowKey
from streamhouse_coordinator.ports import RestoreTransaction, where
from streamhouse_coordinator.recovery import backup_format as fmt
from streamhouse_coordinator.recovery import restore_plan
from streamhouse_coordinator.recovery import stored_segments as stored
from streamhouse_coordinator.recovery.backup import read_chunk
from streamhouse_coordinator.recovery.segment_selection import SegmentCandidate
from streamhouse_coordinator.service.common import known_topic_ids

log = logging.getLogger(__name__)

# Rows of a statement: a few hundred bytes each, and some ms.
BATCH_ROWS = 1000

RowT = TypeVar("RowT", t.RangeRow, t.SegmentRow)
Progress = Callable[[str, int, int], None]


@dataclass(slots=True, kw_only=True)
class PartitionReport:
    """Differences between a restored partition and its backup. `log_start_moved`: from, to. `lost`, `stranded`: (epoch,
    from, to)."""

    topic: str
    partition: int
    adopted_segments: int = 0
    adopted_records: int = 0
    missing_segments: int = 0
    log_start_moved: tuple[int, int] | None = None
    lost: list[tuple[int, int, int]] = field(default_factory=list)
    stranded: list[tuple[int, int, int]] = field(default_factory=list)
    unrecovered_ranges: int = 0


@dataclass(slots=True, kw_only=True)
class RestoreReport:
    """Result of a restore. `warnings`: sentences for the operator."""

    backup: str
    history_id: str
    position: int
    events: int
    topics: int = 0
    recovered_topics: list[str] = field(default_factory=list)
    partitions: int = 0
    segments: int = 0
    adopted_segments: int = 0
    adopted_records: int = 0
    missing_segments: int = 0
    unrecovered_ranges: int = 0
    stranded_segments: int = 0
    lost_spans: int = 0
    damaged_objects: list[str] = field(default_factory=list)
    changed: list[PartitionReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


async def restore(
    tx: RestoreTransaction,
    store: ObjectStore,
    manifest: fmt.Manifest,
    *,
    accept_holes: bool,
    new_id: Callable[[], str],
    progress: Progress,
) -> RestoreReport:
    """Fills the empty database of `tx` and returns the report. Raises InvalidArgument if the database is not empty,
    BackupDamaged, StoreError, Unavailable; nothing is written then."""
    if found := await tx.found():
        raise InvalidArgument(
            f"the database is not empty: {', '.join(found)}. Restore into a new one, with no coordinator running",
            field="pg_dsn",
        )
    events = await _load(tx, store, manifest, progress)
    report = RestoreReport(backup=manifest.name, history_id=new_id(), position=manifest.position, events=events)
    await _end_the_moment(tx)
    await _adopt(tx, store, accept_holes, report, progress)
    await _begin_history(tx, manifest, report)
    report.position = await tx.position()
    return report


# ---- the backup


async def _load(tx: RestoreTransaction, store: ObjectStore, manifest: fmt.Manifest, progress: Progress) -> int:
    """Loads all rows of the backup; returns the number of events."""
    # The migrations have begun a history for the new database; those of the backup replace it.
    old = await tx.select(t.HISTORIES)
    await tx.apply([Remove(t.HISTORIES, {"nth": row.nth}) for row in old])
    await tx.apply([Set(t.PRUNED, (True,), {"position": manifest.pruned_position})])
    bases = [chunk for chunk in manifest.chunks if chunk.table in fmt.BASES]
    async for _, table, batch in _batches(store, bases):
        await tx.apply([Put(table, row) for row in batch])
    # Bases before events: the events are applied on top of them.
    await tx.fill_from_bases()
    # Kept events must begin right behind the last pruned event, which the bases include.
    last = manifest.pruned_position
    async for key, table, batch in _batches(store, [chunk for chunk in manifest.chunks if chunk not in bases]):
        if table is t.EVENTS:
            last = _follows(key, last, batch)
            progress("events", last, manifest.position)
            await _load_events(tx, batch)
        else:
            await tx.apply([Put(table, row) for row in batch])
    if last != manifest.position:
        raise fmt.BackupDamaged(f"{manifest.name} ends at event {last}, its manifest says {manifest.position}")
    await tx.set_position(last)
    return last - manifest.pruned_position


async def _batches(
    store: ObjectStore, chunks: Sequence[fmt.Chunk]
) -> AsyncIterator[tuple[str, t.Table[Any], list[Any]]]:
    """Yields the rows of the chunks in turn, with the key of their object and their table."""
    for chunk in chunks:
        rows = await read_chunk(store, chunk)
        for first in range(0, len(rows), BATCH_ROWS):
            yield chunk.key, fmt.BY_NAME[chunk.table], rows[first : first + BATCH_ROWS]


def _follows(key: str, last: int, events: Sequence[t.EventRow]) -> int:
    expected = list(range(last + 1, last + 1 + len(events)))
    if [row.position for row in events] != expected:
        raise fmt.BackupDamaged(f"{key}: events are missing after position {last}")
    return last + len(events)


async def _load_events(tx: RestoreTransaction, rows: Sequence[t.EventRow]) -> None:
    await tx.apply([Put(t.EVENTS, row) for row in rows])
    events = [replayed(row) for row in rows]
    # Without the row operations of these events the projections would be incomplete.
    unknown = sorted({row.type for row, event in zip(rows, events, strict=True) if event is None})
    if unknown:
        raise fmt.BackupDamaged(f"events of types this version does not know: {', '.join(unknown)}")
    await tx.apply([op for event in events if event is not None for op in row_ops(event)])


async def _append(tx: RestoreTransaction, events: Sequence[Event]) -> None:
    for first in range(0, len(events), BATCH_ROWS):
        await tx.append(events[first : first + BATCH_ROWS])


async def _end_the_moment(tx: RestoreTransaction) -> None:
    """Ends sessions and group memberships: their processes ended with the old database. The buffers that they had
    sealed are not in a backup, nor is the place of SQL jobs."""
    why = restore_plan.WHY_RESTORED
    events: list[Event] = [
        SessionClosed(session_id=row.session_id, agent_id=row.agent_id, role=row.role, why=why)
        for row in await tx.select(t.SESSIONS)
    ]
    events += [GroupMemberLeft(row.group_name, row.member_id, why) for row in await tx.select(t.GROUP_MEMBERS)]
    for group in await tx.select(t.GROUPS):
        generation = group.generation + restore_plan.JUMP_GENERATIONS
        events.append(GroupRebalanced(group.group_name, generation, {}))
    # Journals and checkpoints are not in a backup: the log may hold output of later micro-batches. Agents refuse the
    # producers of before the restore.
    now_ms = await tx.now_ms()
    events += [sql_jobs.lose(row, now_ms) for row in await tx.select(t.SQL_JOBS)]
    await _append(tx, events)


async def _begin_history(tx: RestoreTransaction, manifest: fmt.Manifest, report: RestoreReport) -> None:
    histories = await tx.select(t.HISTORIES, order=("nth",))
    if not histories or histories[-1].history_id != manifest.history_id:
        raise fmt.BackupDamaged(f"{manifest.name}: its histories do not end with {manifest.history_id}")
    producer_id = manifest.producer_id + restore_plan.JUMP_PRODUCER_IDS
    # Beyond all ids that may have been given out: the state of older producers is not restored, so agents refuse them.
    await tx.set_producer_id(producer_id)
    row = t.HistoryRow(
        nth=histories[-1].nth + 1,
        history_id=report.history_id,
        from_position=manifest.position,
        producer_ids_from=producer_id,
        created_ms=await tx.now_ms(),
    )
    await tx.apply([Put(t.HISTORIES, row)])
    await tx.append(
        [
            HistoryBegan(
                history_id=report.history_id,
                restored_from=manifest.history_id,
                backup=manifest.name,
                backup_position=manifest.position,
            )
        ]
    )


# ---- the object store


async def _adopt(
    tx: RestoreTransaction, store: ObjectStore, accept_holes: bool, report: RestoreReport, progress: Progress
) -> None:
    known = await tx.select(t.SEGMENTS, order=("topic_id", "partition", "base_offset"))
    objects = await stored.scan(store, _known_ends(known), progress)
    report.damaged_objects = [f"{item.object_key} before byte {item.at}: {item.what}" for item in objects.damaged]
    # Compared by place: a registered segment has a random id, a stored segment has an id that follows from the place.
    places = {(row.object_key, row.object_at) for row in known}
    fresh = [item for item in objects.found if (item.segment.object_key, item.segment.object_at) not in places]
    # Before the topics are read: partitions of topics younger than the backup are restored like the others.
    await _recover_topics(tx, fresh, report)
    topics = {row.topic_id: row for row in await tx.select(t.TOPICS)}
    # Lost segments have no object, and stay as they are.
    present = {row.segment_id for row in known if row.lost_reason or _is_there(row, objects.sizes)}
    candidates = stored.by_partition([item for item in fresh if item.segment.topic_id in topics])
    segments = _grouped(known)
    ranges = _grouped(await tx.select(t.RANGES, order=t.RANGES.key))
    spans = await tx.select(t.LOST_SPANS)
    partitions = await tx.select(t.PARTITIONS, order=t.PARTITIONS.key)
    report.topics, report.partitions = len(topics), len(partitions)
    for nth, partition in enumerate(partitions):
        key = (partition.topic_id, partition.partition)
        of_partition = restore_plan.BackedUpPartition(
            topic=topics[partition.topic_id],
            partition=partition,
            ranges=ranges.get(key, []),
            segments=segments.get(key, []),
            present=present,
            candidates=_named(candidates.get(key, []), topics[partition.topic_id].topic),
        )
        # In a thread, because many small segments take many steps: a progress display on this loop goes on.
        restored = await asyncio.to_thread(restore_plan.restore_partition, of_partition, accept_holes=accept_holes)
        await _append(tx, restored.events)
        _account(report, of_partition, restored)
        progress("partitions", nth + 1, len(partitions))
    # Holes that the restored ranges have passed are settled; the others wait as before.
    left = restore_plan.outstanding(spans, await tx.select(t.RANGES))
    done = [span for span in spans if span not in left]
    await tx.apply([Remove(t.LOST_SPANS, {name: getattr(span, name) for name in t.LOST_SPANS.key}) for span in done])
    _warn(report)


def _known_ends(segments: Iterable[t.SegmentRow]) -> dict[str, int]:
    """Returns the bytes of each object that registered segments account for."""
    sizes: Counter[str] = Counter()
    for row in segments:
        sizes[row.object_key] += row.size_bytes
    return dict(sizes)


def _is_there(row: t.SegmentRow, sizes: dict[str, int]) -> bool:
    # A truncated object counts as missing.
    return sizes.get(row.object_key, 0) >= row.object_at + row.size_bytes


def _grouped(rows: Iterable[RowT]) -> dict[PartitionRowKey, list[RowT]]:
    found: dict[PartitionRowKey, list[RowT]] = {}
    for row in rows:
        found.setdefault((row.topic_id, row.partition), []).append(row)
    return found


def _named(candidates: Sequence[SegmentCandidate], topic: str) -> list[SegmentCandidate]:
    return [replace(item, segment=replace(item.segment, topic=topic)) for item in candidates]


async def _recover_topics(tx: RestoreTransaction, found: Sequence[SegmentCandidate], report: RestoreReport) -> None:
    """Creates topics that are younger than the backup, as far as their objects tell: id, partitions with records, and
    the name, unless all records lie in objects shared with other topics. A topic deleted before the backup stays
    deleted."""
    ids = {item.segment.topic_id for item in found}
    for topic_id in sorted(ids):
        if await known_topic_ids(tx, [topic_id]):
            continue
        of_topic = [item.segment for item in found if item.segment.topic_id == topic_id]
        name = stored.topic_name((segment.object_key for segment in of_topic), topic_id)
        taken = await tx.select(t.TOPICS, where(topic=name)) if name else []
        partitions = 1 + max(segment.partition for segment in of_topic)
        event = restore_plan.recovered_topic(topic_id, "" if taken else name, partitions, await tx.now_ms())
        await tx.append([event])
        name = event.topic
        report.recovered_topics.append(name)
        report.warnings.append(
            f"topic {name} was created after the backup: it has its records, {partitions} partitions (as many as have "
            "records), and default settings"
        )


# ---- the report


def _account(
    report: RestoreReport, known: restore_plan.BackedUpPartition, restored: restore_plan.RestoredPartition
) -> None:
    selection = restored.selection
    before, after = known.partition.log_start_offset, selection.log_start_offset
    part = PartitionReport(
        topic=known.topic.topic,
        partition=known.partition.partition,
        adopted_segments=len(restored.adopted),
        adopted_records=sum(item.segment.record_count for item in restored.adopted),
        missing_segments=len(restored.missing),
        log_start_moved=(before, after) if before != after else None,
        lost=[(span.epoch, span.base_offset, span.end_offset) for span in selection.lost],
        stranded=[(item.segment.epoch, item.base_offset, item.end_offset) for item in selection.stranded],
        unrecovered_ranges=restored.unrecovered_ranges,
    )
    report.segments += len(selection.chosen) - len(restored.adopted)
    report.adopted_segments += part.adopted_segments
    report.adopted_records += part.adopted_records
    report.missing_segments += part.missing_segments
    report.lost_spans += len(part.lost)
    report.stranded_segments += len(part.stranded)
    report.unrecovered_ranges += part.unrecovered_ranges
    if part.adopted_segments or part.missing_segments or part.log_start_moved or part.lost or part.stranded:
        report.changed.append(part)


def _warn(report: RestoreReport) -> None:
    if report.lost_spans:
        report.warnings.append(
            f"{report.lost_spans} spans of registered records are in no object: reading them is DATA_LOSS"
        )
    if report.stranded_segments:
        report.warnings.append(
            f"{report.stranded_segments} segments lie behind holes in their epochs and were left out: agents that are "
            "back may have what is missing; if none has it, restore again with --accept-holes"
        )
    if report.damaged_objects:
        report.warnings.append(f"{len(report.damaged_objects)} objects cannot be read and were left out")
