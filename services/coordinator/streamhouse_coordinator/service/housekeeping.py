"""Applies retention and deletions of records, hands out compactions, and finds unreferenced objects."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from shproto.errors import UnknownTopic
from shproto.events import LogStartMoved, SegmentsCompacted
from shproto.model import Segment

from streamhouse_coordinator.core import compaction, retention, topics
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove
from streamhouse_coordinator.core.registration import Result
from streamhouse_coordinator.core.tables import PartitionRowKey
from streamhouse_coordinator.ports import Above, AtMost, In, Totals, Transaction, where, where_keys
from streamhouse_coordinator.service.common import Context, topic_named, topic_names

# Small segments read at once, some 300 bytes each: hours of a partition with durable acknowledgements.
COMPACTION_SEGMENTS = 10_000


# ---- retention


async def apply_retention(context: Context) -> tuple[int, int]:
    """Applies every topic's retention; returns (segments removed, their bytes)."""

    async def with_retention(tx: Transaction) -> list[t.TopicRow]:
        rows = await tx.select(t.TOPICS, order=("topic_id",))
        return [row for row in rows if row.retention_ms is not None or row.retention_bytes is not None]

    segments = size_bytes = 0
    for topic in await context.store.run(with_retention):
        # A transaction per partition: none holds locks over a whole topic.
        for partition in await context.store.run(partial(_due, topic)):
            removed = await _retain_partition(context, topic, partition)
            segments += removed[0]
            size_bytes += removed[1]
    return segments, size_bytes


async def _due(topic: t.TopicRow, tx: Transaction) -> list[int]:
    """Returns partitions that may have segments to remove: two aggregates per topic, for any number of partitions."""
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
        # The row of the partition stands for its segments: a compaction locks it as well, so none is replaced
        # meanwhile.
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


async def delete_records(context: Context, topic: str, partition: int, before_offset: int) -> tuple[int, int, int]:
    """Deletes records below an offset; returns (log start, segments removed, their bytes). Raises UnknownTopic,
    UnknownPartition, InvalidArgument."""

    async def step(tx: Transaction) -> tuple[bool, int, int, int]:
        row = await topic_named(tx, topic)
        topics.check_partition(row, partition)
        of_partition = where(topic_id=row.topic_id, partition=partition)
        # Read without locks: registered ends only grow, and new epochs begin behind them.
        ranges = await tx.select(t.RANGES, of_partition)
        retention.check_deletion(topic, partition, before_offset, ranges)
        rows = await tx.select(t.PARTITIONS, of_partition, lock="wait")
        if not rows:
            raise UnknownTopic(f"topic {topic!r} was deleted", topic=topic)
        batch = context.settings.retention_batch
        oldest = await tx.select(t.SEGMENTS, of_partition, order=("base_offset",), limit=batch)
        event = retention.delete_before(rows[0], oldest, before_offset, more=len(oldest) == batch)
        if event is None:
            return True, rows[0].log_start_offset, 0, 0
        await tx.append([event])
        removed = _removed(event, oldest)
        done = len(removed) < batch
        return done, event.log_start_offset, len(removed), sum(segment.size_bytes for segment in removed)

    segments = size_bytes = 0
    while True:
        # A transaction per batch: the deletion of a million segments must not hold the row of the partition throughout.
        done, log_start_offset, count, removed_bytes = await context.store.run(step)
        segments += count
        size_bytes += removed_bytes
        if done:
            return log_start_offset, segments, size_bytes


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
    """Claims a run of small segments of a partition that no other worker compacts; returns the claim, None if there is
    no such run."""
    claim_id = context.new_id()
    choose = partial(_choose, small_bytes_max=small_bytes_max, target_bytes=target_bytes, segments_min=segments_min)

    async def work(tx: Transaction) -> CompactionClaim | None:
        now_ms = await tx.now_ms()
        taken = {
            (row.topic_id, row.partition)
            for row in await tx.select(t.COMPACTION_CLAIMS, where(expires_ms=Above(now_ms)))
        }
        small = where(size_bytes=AtMost(small_bytes_max - 1), lost_reason="")
        rows: list[Totals] = await tx.totals(t.SEGMENTS, small, by=("topic_id", "partition"))
        counts = {(row.group[0], row.group[1]): row.count for row in rows if row.group not in taken}
        for key in compaction.partitions_to_look_at(counts, segments_min, turn=claim_id):
            # First without a lock, because most partitions have nothing to merge.
            if await choose(tx, key) and await _take(tx, key, now_ms):
                run = await choose(tx, key)  # the choice holds now that the partition is locked
                if run:
                    row = t.CompactionClaimRow(
                        topic_id=key[0],
                        partition=key[1],
                        claim_id=claim_id,
                        worker_id=worker_id,
                        expires_ms=now_ms + ttl_ms,
                    )
                    await tx.apply([Put(t.COMPACTION_CLAIMS, row)])
                    return CompactionClaim(claim_id, (await topic_names(tx, {key[0]})).get(key[0], ""), run)
        return None

    return await context.store.run(work)


async def _choose(
    tx: Transaction, key: PartitionRowKey, *, small_bytes_max: int, target_bytes: int, segments_min: int
) -> list[t.SegmentRow]:
    """Returns the segments of a partition to merge next; none if no merge is worth its bytes. Reads only the small
    segments, page by page: any number of large segments may lie before them."""
    after = -1
    while True:
        of_page = where(
            topic_id=key[0],
            partition=key[1],
            base_offset=Above(after),
            size_bytes=AtMost(small_bytes_max - 1),
            lost_reason="",
        )
        page = await tx.select(t.SEGMENTS, of_page, order=("base_offset",), limit=COMPACTION_SEGMENTS)
        found = list(compaction.runs(page, small_bytes_max))
        ends = [(*key, run.end_offset) for run in found]
        behind = await tx.select(t.SEGMENTS, where_keys(("topic_id", "partition", "base_offset"), ends)) if ends else []
        followed = {row.base_offset for row in behind}
        run = compaction.choose(page, small_bytes_max, target_bytes, segments_min, followed)
        if run or len(page) < COMPACTION_SEGMENTS:
            return run
        after = found[-1].segments[0].base_offset - 1  # the last run may continue in the next page


async def _take(tx: Transaction, key: PartitionRowKey, now_ms: int) -> bool:
    """Returns True if the caller may claim the partition, until its transaction ends. Of two workers that look at the
    same time the loser takes another partition."""
    of_partition = where(topic_id=key[0], partition=key[1])
    if not await tx.select(t.PARTITIONS, of_partition, lock="skip"):
        return False
    # Again under the lock: another worker may have claimed the partition since the claims were read.
    return not any(row.expires_ms > now_ms for row in await tx.select(t.COMPACTION_CLAIMS, of_partition))


async def register_compaction(context: Context, claim_id: str, replaced_ids: Sequence[str], merged: Segment) -> Result:
    """Replaces the named segments by `merged` and returns REGISTERED if all of them still exist; else FENCED, or
    WITHDRAWN if the object of `merged` may be deleted."""

    async def work(tx: Transaction) -> Result:
        of_partition = where(topic_id=merged.topic_id, partition=merged.partition)
        await tx.select(t.PARTITIONS, of_partition, lock="wait")
        claims = await tx.select(t.COMPACTION_CLAIMS, where(claim_id=claim_id), lock="wait")
        # The intent stands for the object: a deletion holds its row when it begins, and withdraws it.
        intents = await tx.select(t.UPLOAD_INTENTS, where(object_key=merged.object_key), lock="wait")
        # A retry after a lost answer, whose inputs are replaced already.
        known = bool(await tx.select(t.SEGMENTS, where(segment_id=merged.segment_id)))
        rows = await tx.select(t.SEGMENTS, where(segment_id=In(replaced_ids)), order=("base_offset",))
        result = compaction.judge(merged, rows, len(set(replaced_ids)), known, bool(intents))
        if result is Result.REGISTERED and not known:
            names = await topic_names(tx, {merged.topic_id})
            named = replace(merged, topic=names.get(merged.topic_id, merged.topic))
            await tx.append([SegmentsCompacted(named, tuple(row.segment_id for row in rows))])
            await tx.apply([Remove(t.UPLOAD_INTENTS, {"object_key": merged.object_key})])
        # The claim ends with any result: a worker whose merge was fenced has to look again.
        await tx.apply(
            [Remove(t.COMPACTION_CLAIMS, {"topic_id": c.topic_id, "partition": c.partition}) for c in claims]
        )
        return result

    return await context.store.run(work)


async def filter_unreferenced(context: Context, object_keys: Sequence[str]) -> list[str]:
    """Returns the keys that no segment lies in, in the order requested."""

    async def work(tx: Transaction) -> list[str]:
        rows = await tx.totals(t.SEGMENTS, where(object_key=In(set(object_keys))), by=("object_key",))
        referenced = {row.group[0] for row in rows}
        return [key for key in object_keys if key not in referenced]

    return await context.store.run(work)
