"""Counts ranges without an agent, and declares them lost by policy or on an operator's command."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from shproto.errors import InvalidArgument
from shproto.events import BufferCompleted, Event, RangeLost

from streamhouse_coordinator.core import registration, sessions
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.tables import RangeRowKey
from streamhouse_coordinator.core.topics import check_partition
from streamhouse_coordinator.ports import ORPHANED_RANGES, In, Transaction, where, where_keys
from streamhouse_coordinator.service.buffers import done_with
from streamhouse_coordinator.service.common import (
    RANGE_KEYS,
    Context,
    change_leadership,
    commit_leadership,
    ranges_by_key,
    topic_named,
)


async def count_orphaned(tx: Transaction) -> tuple[int, list[str]]:
    """Returns the number of orphaned ranges, and the ids of their topics that have unclean_recovery_after_ms."""
    orphaned = await tx.select(t.RANGES, where(ORPHANED_RANGES))
    if not orphaned:
        return 0, []
    rows = await tx.select(t.TOPICS, where(topic_id=In({row.topic_id for row in orphaned})))
    return len(orphaned), [row.topic_id for row in rows if row.unclean_recovery_after_ms is not None]


async def recover_unclean(context: Context, topic_ids: Sequence[str]) -> int:
    """Declares ranges of these topics lost that waited for their agent longer than unclean_recovery_after_ms; returns
    the number of lost ranges."""
    return await change_leadership(context, lambda tx: _recover(tx, context, topic_ids))


async def _recover(tx: Transaction, context: Context, topic_ids: Sequence[str]) -> int:
    topics = await tx.select(t.TOPICS, where(topic_id=In(topic_ids)))
    unclean_after_ms = {
        row.topic_id: row.unclean_recovery_after_ms for row in topics if row.unclean_recovery_after_ms is not None
    }
    # Locked: a registration in an orphaned range either commits before, or finds the range lost.
    ranges = await tx.select(t.RANGES, where(ORPHANED_RANGES, topic_id=In(unclean_after_ms)), lock="wait")
    now_ms = await tx.now_ms()
    due = [sessions.lose_unclean(row, unclean_after_ms[row.topic_id], now_ms) for row in ranges]
    lost = [event for event in due if event is not None]
    await _lose(tx, context, ranges, lost)
    return len(lost)


async def declare_lost(
    context: Context, topic: str, partition: int, epochs: Sequence[int], reason: str
) -> list[t.RangeRow]:
    """Declares orphaned ranges lost; returns all of `epochs` as they are afterwards. A range with a known end stays
    unchanged. Raises UnknownTopic, UnknownPartition, InvalidArgument for a range that is led or does not exist."""

    async def work(tx: Transaction) -> list[t.RangeRow]:
        row = await topic_named(tx, topic)
        check_partition(row, partition)
        keys = [(row.topic_id, partition, epoch) for epoch in epochs]
        ranges = await ranges_by_key(tx, keys, lock="wait")
        for key in keys:
            if key not in ranges:
                text = f"partition {partition} of topic {topic!r} has no epoch {key[2]}"
                raise InvalidArgument(text, field="epochs", value=key[2])
        why = f"operator {reason}".strip()
        lost = [event for item in ranges.values() if (event := sessions.declare_lost(item, why)) is not None]
        await _lose(tx, context, list(ranges.values()), lost)
        ranges = await ranges_by_key(tx, keys)
        return [ranges[key] for key in keys]

    return await change_leadership(context, work)


async def _lose(tx: Transaction, context: Context, ranges: Collection[t.RangeRow], lost: Sequence[RangeLost]) -> None:
    """Appends `lost` and completes the buffers that have nothing left to register. The caller holds the cluster lock
    and the rows of `ranges`."""
    if not lost:
        return
    keys = {(event.topic_id, event.partition, event.epoch) for event in lost}
    # The rows were read before the events: their status is changed here as the events change it.
    gone = {row.key: replace(row, status=t.LOST) for row in ranges if row.key in keys}
    # Locks leases before the claims below, as the holder of the cluster lock may.
    await commit_leadership(tx, context.settings, list[Event](lost))
    done = await _emptied_buffers(tx, gone)
    await tx.append([BufferCompleted(row.buffer_id, row.agent_id) for row in done])
    await tx.apply(done_with([row.buffer_id for row in done]))


async def _emptied_buffers(tx: Transaction, gone: dict[RangeRowKey, t.RangeRow]) -> list[t.BufferRow]:
    """Returns buffers with nothing left to register once the ranges `gone` are lost: no worker would ever claim
    them."""
    touched = await tx.select(t.BUFFER_SLICES, where_keys(RANGE_KEYS, sorted(gone)))
    buffer_ids = In({item.buffer_id for item in touched})
    # The claim rows stand for the buffers: while they are locked, no registration completes one.
    await tx.select(t.BUFFER_CLAIMS, where(buffer_id=buffer_ids), lock="wait")
    slices = await tx.select(t.BUFFER_SLICES, where(buffer_id=buffer_ids))
    known = await ranges_by_key(tx, {item.range_key for item in slices} - set(gone))
    left = {item.buffer_id for item in registration.unresolved(slices, known | gone)}
    buffers = await tx.select(t.BUFFERS, where(buffer_id=buffer_ids), order=("buffer_id",))
    return [row for row in buffers if row.buffer_id not in left]
