"""Lets agents back in after a restore, with ranges that only their logs know, and completes the restore on an
operator's command."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from shproto.errors import InvalidArgument
from shproto.events import Event, PartitionRestored, RangeLost, SegmentRegistered

from streamhouse_coordinator.core import sessions
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.tables import PartitionRowKey, RangeRowKey
from streamhouse_coordinator.ports import ORPHANED_RANGES, In, Transaction, where, where_keys
from streamhouse_coordinator.recovery import restore_plan, unrecovered_ranges
from streamhouse_coordinator.recovery.segment_selection import EpochSpan
from streamhouse_coordinator.service.common import (
    Context,
    change_leadership,
    commit_leadership,
    known_topic_ids,
    topic_names,
)

log = logging.getLogger(__name__)


async def recover_topics(tx: Transaction, declared: sessions.WalEnds, partitions_max: int) -> list[str]:
    """Recovers topics and partitions that only an agent's log knows: they are younger than the backup, and were not
    uploaded in full. Their offsets are unrecovered ranges at first. Returns the names of the changed topics. The caller
    holds the cluster lock."""
    counts: dict[str, int] = {}
    for topic_id, partition, _ in declared.ends:
        # The number comes from a log: the limit bounds what a damaged log can create.
        if partition < partitions_max:
            counts[topic_id] = max(counts.get(topic_id, 0), partition + 1)
    topics = {row.topic_id: row for row in await tx.select(t.TOPICS, where(topic_id=In(counts)))}
    changed = []
    for topic_id, count in sorted(counts.items()):
        topic = topics.get(topic_id) or await _recovered(tx, topic_id, count, declared.topics.get(topic_id, ""))
        if topic is not None and (topic_id not in topics or count > topic.partitions):
            new = range(topics[topic_id].partitions if topic_id in topics else 0, count)
            await tx.append(restore_plan.unknown_partitions(replace(topic, partitions=count), new))
            log.warning("topic %s is not in the backup: recovered with %d partitions", topic.topic, count)
            changed.append(topic.topic)
    return changed


async def _recovered(tx: Transaction, topic_id: str, partitions: int, name: str) -> t.TopicRow | None:
    """Creates a topic under its old id and returns its row; None if it was deleted before the backup."""
    if await known_topic_ids(tx, [topic_id]):
        return None
    # A younger topic may have the name by now.
    taken = await tx.select(t.TOPICS, where(topic=name)) if name else []
    event = restore_plan.recovered_topic(topic_id, "" if taken else name, partitions, await tx.now_ms())
    await tx.append([event])
    return (await tx.select(t.TOPICS, where(topic_id=topic_id)))[0]


async def ranges_to_split(tx: Transaction, declared: sessions.WalEnds) -> list[RangeRowKey]:
    """Returns the keys of all ranges that split_unrecovered_ranges() may change: the ranges of those partitions of a
    log that have unrecovered ranges. The caller holds the cluster lock, and has to lock them together with all other
    ranges that it needs."""
    waiting = await _unrecovered_partitions(tx, declared)
    rows = await tx.select(t.RANGES, where_keys(("topic_id", "partition"), waiting)) if waiting else []
    return [row.key for row in rows]


async def _unrecovered_partitions(tx: Transaction, declared: sessions.WalEnds) -> list[PartitionRowKey]:
    unclaimed = await tx.select(t.RANGES, where(ORPHANED_RANGES, wal_id=""))
    return sorted({(row.topic_id, row.partition) for row in unclaimed} & {key[:2] for key in declared.ends})


async def split_unrecovered_ranges(
    tx: Transaction, agent_id: str, wal_id: str, declared: sessions.WalEnds
) -> sessions.WalEnds:
    """Inserts the ranges that an agent's log knows and the restored database does not. Returns `declared` with the ends
    that count. The caller holds the cluster lock, and locks on the ranges of ranges_to_split()."""
    ends = dict(declared.ends)
    for key in await _unrecovered_partitions(tx, declared):
        ends |= await _split(tx, key, agent_id, wal_id, declared)
    return replace(declared, ends=ends)


async def _split(
    tx: Transaction, key: PartitionRowKey, agent_id: str, wal_id: str, declared: sessions.WalEnds
) -> Mapping[RangeRowKey, int]:
    of_partition = where(topic_id=key[0], partition=key[1])
    partition = (await tx.select(t.PARTITIONS, of_partition, lock="wait"))[0]
    rows = await tx.select(t.RANGES, of_partition, order=("epoch",))
    reported = [
        unrecovered_ranges.Reported(epoch, declared.firsts.get((*key, epoch), 0), end)
        for (topic_id, number, epoch), end in declared.ends.items()
        if (topic_id, number) == key
    ]
    result = unrecovered_ranges.split(rows, reported, agent_id, wal_id)
    if result.ranges or result.removed_epochs:
        names = await topic_names(tx, {key[0]})
        reset = await tx.select(t.SEGMENTS, where(topic_id=key[0], partition=key[1], epoch=In(result.reset)))
        gone = [row.segment_id for row in reset]
        event = _restored(partition, names[key[0]], result.ranges, result.removed_epochs, gone)
        await tx.append([event, *restore_plan.orphanings(rows, result.ranges)])
    # After the split: only now the ranges of this log have their starts and limits.
    await _register_holes(tx, key, wal_id, reported)
    return {(*key, epoch): end for epoch, end in result.ends.items()}


async def _register_holes(
    tx: Transaction, key: PartitionRowKey, wal_id: str, reported: Sequence[unrecovered_ranges.Reported]
) -> None:
    """Registers as lost the records that were registered after the backup, have left the log since, and are in no
    object."""
    firsts = {item.epoch: item.first_offset for item in reported}
    own = await tx.select(t.RANGES, where(topic_id=key[0], partition=key[1], wal_id=wal_id, status=t.ORPHANED))
    topics = await tx.select(t.TOPICS, where(topic_id=key[0]))
    # The log begins above the registered end: it has dropped the records in between, because they were registered.
    spans = [EpochSpan(row.epoch, row.registered_end, min(firsts.get(row.epoch, 0), row.limit_offset)) for row in own]
    events = []
    for span in spans:
        if span.base_offset < span.end_offset:
            segment = restore_plan.lost_segment(topics[0], key[1], span, restore_plan.MISSING_REASON)
            events.append(SegmentRegistered(segment, buffer_id=""))
            log.error("%s/%d: offsets %d to %d were registered after the backup, and no object holds them",
                      topics[0].topic, key[1], span.base_offset, span.end_offset)  # fmt: skip
    await tx.append(events)


async def complete(
    context: Context, *, lost: bool, dry_run: bool, reason: str
) -> tuple[list[tuple[str, t.RangeRow]], list[str]]:
    """Ends every unrecovered range: as empty, or with `lost` as ranges that may have had records. Returns the ranges as
    they were, with the names of their topics, and the ids of the ingest agents that have a session. Raises
    InvalidArgument."""
    if reason and not lost:
        raise InvalidArgument("a reason is kept with what is lost only", field="reason", value=reason)

    async def work(tx: Transaction) -> tuple[list[tuple[str, t.RangeRow]], list[str]]:
        # Ranges before partitions, as in the lock order; an agent that takes its part waits for the cluster lock.
        rows = await tx.select(t.RANGES, where(ORPHANED_RANGES, wal_id=""), order=t.RANGES.key, lock="wait")
        keys = {(row.topic_id, row.partition) for row in rows}
        names = await topic_names(tx, {key[0] for key in keys})
        agents = await tx.select(t.SESSIONS, where(role=sessions.INGEST), order=("agent_id",))
        if rows and not dry_run:
            of_rows = where_keys(("topic_id", "partition"), sorted(keys))
            partitions = await tx.select(t.PARTITIONS, of_rows, lock="wait")
            events = _lost(rows, reason) if lost else _released(partitions, rows, names)
            await commit_leadership(tx, context.settings, events)
        return [(names[row.topic_id], row) for row in rows], [row.agent_id for row in agents]

    return await change_leadership(context, work)


def _lost(rows: Sequence[t.RangeRow], reason: str) -> list[Event]:
    why = f"operator {reason}".strip()
    return [
        RangeLost(topic_id=row.topic_id, partition=row.partition, epoch=row.epoch, end_offset=row.limit_offset, why=why)
        for row in rows
    ]


def _released(
    partitions: Sequence[t.PartitionRow], rows: Sequence[t.RangeRow], names: Mapping[str, str]
) -> list[Event]:
    events: list[Event] = []
    for partition in partitions:
        key = (partition.topic_id, partition.partition)
        released = [unrecovered_ranges.released(row) for row in rows if (row.topic_id, row.partition) == key]
        events.append(_restored(partition, names[key[0]], released))
    return events


def _restored(
    partition: t.PartitionRow,
    topic: str,
    ranges: Sequence[t.RangeRow],
    removed_epochs: Sequence[int] = (),
    removed_segment_ids: Sequence[str] = (),
) -> PartitionRestored:
    return PartitionRestored(
        topic_id=partition.topic_id,
        topic=topic,
        partition=partition.partition,
        epoch=partition.epoch,
        log_start_offset=partition.log_start_offset,
        ranges=tuple(map(restore_plan.range_of_row, ranges)),
        removed_epochs=tuple(removed_epochs),
        segments=(),
        removed_segment_ids=tuple(removed_segment_ids),
    )
