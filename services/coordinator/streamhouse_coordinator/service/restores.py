"""After a restore: agents come back with what only their logs have, and an operator says when nobody else will."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shproto.errors import InvalidArgument
from shproto.events import Event, PartitionRestored, RangeLost

from streamhouse_coordinator.core import barriers, restoring, sessions
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.ports import ORPHANED_RANGES, In, Transaction, where, where_keys
from streamhouse_coordinator.service.common import CLUSTER_LOCK, Context, commit_leadership, topic_names

PartitionKey = tuple[str, int]


async def split_barriers(tx: Transaction, agent_id: str, wal_id: str, declared: sessions.WalEnds) -> sessions.WalEnds:
    """Gives the ranges that an agent's log knows and a restored database does not their place. Returns `declared`, with
    the ends that count. The caller holds the cluster lock."""
    keys = {key[:2] for key in declared.ends}
    if not wal_id or not keys:
        return declared
    unclaimed = await tx.select(t.RANGES, where(ORPHANED_RANGES, wal_id=""))
    waiting = sorted({(row.topic_id, row.partition) for row in unclaimed} & keys)
    ends = dict(declared.ends)
    for key in waiting:
        ends |= await _split(tx, key, agent_id, wal_id, declared)
    return replace(declared, ends=ends)


async def _split(
    tx: Transaction, key: PartitionKey, agent_id: str, wal_id: str, declared: sessions.WalEnds
) -> Mapping[tuple[str, int, int], int]:
    of_partition = where(topic_id=key[0], partition=key[1])
    partition = (await tx.select(t.PARTITIONS, of_partition, lock="wait"))[0]
    rows = await tx.select(t.RANGES, of_partition, order=("epoch",), lock="wait")
    reported = [
        barriers.Reported(epoch, declared.firsts.get((*key, epoch), 0), end)
        for (topic_id, number, epoch), end in declared.ends.items()
        if (topic_id, number) == key
    ]
    result = barriers.split(rows, reported, agent_id, wal_id)
    if result.ranges or result.removed_epochs:
        names = await topic_names(tx, {key[0]})
        reset = await tx.select(t.SEGMENTS, where(topic_id=key[0], partition=key[1], epoch=In(result.reset)))
        gone = [row.segment_id for row in reset]
        event = _restored(partition, names[key[0]], result.ranges, result.removed_epochs, gone)
        await tx.append([event, *restoring.orphanings(rows, result.ranges)])
    return {(*key, epoch): end for epoch, end in result.ends.items()}


async def complete(
    context: Context, *, lost: bool, dry_run: bool, reason: str
) -> tuple[list[tuple[str, t.RangeRow]], list[str]]:
    """Ends every barrier: nothing is there, or (`lost`) something may have been. Returns them as they were, with the
    names of their topics, and the ids of the ingest agents that have a session."""
    if reason and not lost:
        raise InvalidArgument("a reason is kept with what is lost only", field="reason", value=reason)

    async def work(tx: Transaction) -> tuple[list[tuple[str, t.RangeRow]], list[str]]:
        await tx.lock(CLUSTER_LOCK)
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

    return await context.store.run(work)


def _lost(rows: Sequence[t.RangeRow], reason: str) -> list[Event]:
    why = f"operator {reason}".strip()
    return [RangeLost(row.topic_id, row.partition, row.epoch, row.limit_offset, why) for row in rows]


def _released(
    partitions: Sequence[t.PartitionRow], rows: Sequence[t.RangeRow], names: Mapping[str, str]
) -> list[Event]:
    events: list[Event] = []
    for partition in partitions:
        key = (partition.topic_id, partition.partition)
        released = [barriers.released(row) for row in rows if (row.topic_id, row.partition) == key]
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
        ranges=tuple(map(restoring.range_state, ranges)),
        removed_epochs=tuple(removed_epochs),
        segments=(),
        removed_segment_ids=tuple(removed_segment_ids),
    )
