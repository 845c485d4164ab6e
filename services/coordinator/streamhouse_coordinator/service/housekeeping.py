"""Retention, compaction, and which objects nobody refers to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from shproto.events import LogStartMoved, Segment, SegmentsCompacted

from streamhouse_coordinator.core import compaction, retention
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove
from streamhouse_coordinator.core.registration import Result
from streamhouse_coordinator.ports import Above, AtMost, In, Totals, Transaction, where
from streamhouse_coordinator.service.common import Context, topic_names

# Partitions whose segments are looked at per claim: the ones with the most small segments come first.
COMPACTION_CANDIDATES = 20
# Segments of one partition that a claim looks at: at 64 KiB each, 10,000 of them would make ten large ones.
COMPACTION_SEGMENTS = 10_000

PartitionKey = tuple[str, int]


# ---- retention


async def apply_retention(context: Context) -> tuple[int, int]:
    """Applies every topic's retention; returns (segments removed, their bytes)."""

    async def with_retention(tx: Transaction) -> list[t.TopicRow]:
        rows = await tx.select(t.TOPICS, order=("topic_id",))
        return [row for row in rows if row.retention_ms is not None or row.retention_bytes is not None]

    segments = size_bytes = 0
    for topic in await context.store.run(with_retention):
        for partition in await context.store.run(partial(_due, topic)):
            removed = await _retain_partition(context, topic, partition)
            segments += removed[0]
            size_bytes += removed[1]
    return segments, size_bytes


async def _due(topic: t.TopicRow, tx: Transaction) -> list[int]:
    """Partitions that may have something to remove: two aggregates per topic, whatever its number of partitions."""
    due: set[int] = set()
    if topic.retention_ms is not None:
        before_ms = await tx.now_ms() - topic.retention_ms - 1
        old = await tx.totals(
            t.SEGMENTS, where(topic_id=topic.topic_id, max_timestamp_ms=AtMost(before_ms)), by=("partition",)
        )
        due |= {row.group[0] for row in old}
    if topic.retention_bytes is not None:
        sizes = await tx.totals(t.SEGMENTS, where(topic_id=topic.topic_id), by=("partition",), sums=("size_bytes",))
        due |= {row.group[0] for row in sizes if row.sums[0] > topic.retention_bytes}
    return sorted(due)


async def _retain_partition(context: Context, topic: t.TopicRow, partition: int) -> tuple[int, int]:
    async def work(tx: Transaction) -> tuple[int, int]:
        of_partition = where(topic_id=topic.topic_id, partition=partition)
        rows = await tx.select(t.PARTITIONS, of_partition, lock="wait")
        if not rows:
            return 0, 0
        batch = context.settings.retention_batch
        oldest = await tx.select(t.SEGMENTS, of_partition, order=("base_offset",), limit=batch)
        size_bytes = (await tx.totals(t.SEGMENTS, of_partition, sums=("size_bytes",)))[0].sums[0]
        event = retention.retain(topic, rows[0], oldest, size_bytes, await tx.now_ms())
        if event is None:
            return 0, 0
        await tx.append([event])
        return len(event.removed_segment_ids), sum(row.size_bytes for row in _removed(event, oldest))

    return await context.store.run(work)


def _removed(event: LogStartMoved, segments: Sequence[t.SegmentRow]) -> list[t.SegmentRow]:
    return list(segments[: len(event.removed_segment_ids)])


# ---- compaction


@dataclass(frozen=True, slots=True)
class CompactionClaim:
    claim_id: str
    topic: str
    segments: list[t.SegmentRow]


async def claim_compaction(
    context: Context, worker_id: str, ttl_ms: int, small_bytes_max: int, target_bytes: int, segments_min: int
) -> CompactionClaim | None:
    """A run of small segments to merge, of a partition nobody else works on; None if there is none."""
    claim_id = context.new_id()

    async def work(tx: Transaction) -> CompactionClaim | None:
        now_ms = await tx.now_ms()
        taken = {
            (row.topic_id, row.partition)
            for row in await tx.select(t.COMPACTION_CLAIMS, where(expires_ms=Above(now_ms)))
        }
        for key in await _crowded(tx, small_bytes_max, segments_min, taken):
            claim = t.CompactionClaimRow(*key, claim_id, worker_id, now_ms + ttl_ms)
            run = await _take(tx, claim, now_ms, small_bytes_max, target_bytes, segments_min)
            if run:
                return CompactionClaim(claim_id, (await topic_names(tx, {key[0]})).get(key[0], ""), run)
        return None

    return await context.store.run(work)


async def _crowded(
    tx: Transaction, small_bytes_max: int, segments_min: int, taken: set[PartitionKey]
) -> list[PartitionKey]:
    small = where(size_bytes=AtMost(small_bytes_max - 1), lost_reason="")
    counts: list[Totals] = await tx.totals(t.SEGMENTS, small, by=("topic_id", "partition"))
    crowded = [row for row in counts if row.count >= segments_min and row.group not in taken]
    crowded.sort(key=lambda row: (-row.count, row.group))
    return [(row.group[0], row.group[1]) for row in crowded[:COMPACTION_CANDIDATES]]


async def _take(
    tx: Transaction,
    claim: t.CompactionClaimRow,
    now_ms: int,
    small_bytes_max: int,
    target_bytes: int,
    segments_min: int,
) -> list[t.SegmentRow]:
    of_partition = where(topic_id=claim.topic_id, partition=claim.partition)
    # The partition's row decides between two workers that look at the same time; the loser takes another partition.
    if not await tx.select(t.PARTITIONS, of_partition, lock="skip"):
        return []
    held = await tx.select(t.COMPACTION_CLAIMS, of_partition)
    if any(row.expires_ms > now_ms for row in held):
        return []
    segments = await tx.select(t.SEGMENTS, of_partition, order=("base_offset",), limit=COMPACTION_SEGMENTS)
    run = compaction.choose(segments, small_bytes_max, target_bytes, segments_min)
    if run:
        await tx.apply([Put(t.COMPACTION_CLAIMS, claim)])
    return run


async def register_compaction(context: Context, claim_id: str, replaced_ids: Sequence[str], merged: Segment) -> Result:
    """Puts `merged` in the place of the segments named if all of them are still there, else FENCED; WITHDRAWN if its
    object may be deleted."""

    async def work(tx: Transaction) -> Result:
        of_partition = where(topic_id=merged.topic_id, partition=merged.partition)
        await tx.select(t.PARTITIONS, of_partition, lock="wait")
        claims = await tx.select(t.COMPACTION_CLAIMS, where(claim_id=claim_id), lock="wait")
        intents = await tx.select(t.UPLOAD_INTENTS, where(object_key=merged.object_key), lock="wait")
        known = bool(await tx.select(t.SEGMENTS, where(segment_id=merged.segment_id)))
        rows = await tx.select(t.SEGMENTS, where(segment_id=In(replaced_ids)), order=("base_offset",))
        result = compaction.judge(merged, rows, len(set(replaced_ids)), known, bool(intents))
        if result is Result.REGISTERED and not known:
            names = await topic_names(tx, {merged.topic_id})
            named = replace(merged, topic=names.get(merged.topic_id, merged.topic))
            await tx.append([SegmentsCompacted(named, tuple(row.segment_id for row in rows))])
            await tx.apply([Remove(t.UPLOAD_INTENTS, {"object_key": merged.object_key})])
        await tx.apply(
            [Remove(t.COMPACTION_CLAIMS, {"topic_id": c.topic_id, "partition": c.partition}) for c in claims]
        )
        return result

    return await context.store.run(work)


async def filter_unreferenced(context: Context, object_keys: Sequence[str]) -> list[str]:
    """Those of the keys that no segment lies in, in the order asked."""

    async def work(tx: Transaction) -> list[str]:
        rows = await tx.totals(t.SEGMENTS, where(object_key=In(set(object_keys))), by=("object_key",))
        referenced = {row.group[0] for row in rows}
        return [key for key in object_keys if key not in referenced]

    return await context.store.run(work)
