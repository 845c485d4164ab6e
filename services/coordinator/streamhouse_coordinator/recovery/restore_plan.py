"""Plans how a restore rebuilds the ranges and segments of a partition from the backup and the object store together.
Pure.

Offsets, epochs, generations and producer ids that were granted or written after the backup must never be allocated
again, so a restore continues far beyond them.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from shproto.acks import ACKS_DURABLE, ACKS_WAL
from shproto.events import Event, PartitionRestored, RangeOrphaned, TopicCreated
from shproto.model import Range, RangeStatus, Segment

from streamhouse_coordinator.core.tables import (
    LOST,
    ORPHANED,
    SETTLED,
    LostSpanRow,
    PartitionRow,
    RangeRow,
    SegmentRow,
    TopicRow,
)
from streamhouse_coordinator.recovery.segment_selection import EpochSpan, SegmentCandidate, Selection, select_segments
from streamhouse_coordinator.recovery.unrecovered_ranges import is_unrecovered, unrecovered_range

# A range is 2^30 offsets wide by default, and a takeover skips as many: this covers a thousand takeovers, or 10^12
# records of a partition, since the backup. 2^63 has space for eight million restores.
JUMP_OFFSETS = 2**40
# Every takeover and every start of an agent is an epoch: a takeover per second for twelve days.
JUMP_EPOCHS = 2**20
# A generation per rebalance.
JUMP_GENERATIONS = 2**20
# An id per start of an idempotent producer.
JUMP_PRODUCER_IDS = 2**32

WHY_RESTORED = "restored"
MISSING_REASON = "missing in the object store when the metadata was restored"
# Segments named by an event: some 400 bytes each.
SEGMENTS_PER_EVENT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredPartition:
    """A planned partition, as `events` in order. `selection`: the chosen segments. `adopted`: segments that the
    backup does not name. `missing`: segments of the backup without an object. `unrecovered_ranges`: their
    number."""

    events: list[Event]
    selection: Selection
    adopted: list[SegmentCandidate]
    missing: list[SegmentRow]
    unrecovered_ranges: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackedUpPartition:
    """A partition as the backup has it, and its readable segments. `present`: ids of the backup's segments with an
    existing object."""

    topic: TopicRow
    partition: PartitionRow
    ranges: Sequence[RangeRow]
    segments: Sequence[SegmentRow]
    present: Collection[str]
    candidates: Sequence[SegmentCandidate] = field(default_factory=list)


def restore_partition(known: BackedUpPartition, *, accept_holes: bool) -> RestoredPartition:
    """Returns the events that restore the partition, and the selection behind them."""
    topic = known.topic
    rows = {row.segment_id: row for row in known.segments}
    missing = [row for row in known.segments if row.segment_id not in known.present]
    held = [_candidate(row, topic.topic) for row in known.segments if row.segment_id in known.present]
    found = select_segments(
        known.partition.log_start_offset,
        known.ranges,
        [*held, *(item for item in known.candidates if item.segment.segment_id not in rows)],
        has_retention=topic.retention_ms is not None or topic.retention_bytes is not None,
        accept_holes=accept_holes,
    )
    ranges = _ranges(known, found)
    adopted = [item for item in found.chosen if item.segment.segment_id not in rows]
    events = _events(known, found, ranges, adopted)
    return RestoredPartition(
        events=events,
        selection=found,
        adopted=adopted,
        missing=missing,
        unrecovered_ranges=sum(map(is_unrecovered, ranges)),
    )


def lost_segment(topic: TopicRow, partition: int, span: EpochSpan, reason: str) -> Segment:
    """Returns the segment that stands for lost records. Its id follows from the place."""
    return Segment(
        segment_id=f"lost-{topic.topic_id}-{partition}-{span.epoch}-{span.base_offset}",
        topic_id=topic.topic_id,
        topic=topic.topic,
        partition=partition,
        epoch=span.epoch,
        base_offset=span.base_offset,
        end_offset=span.end_offset,
        record_count=span.end_offset - span.base_offset,
        object_key="",
        object_at=0,
        size_bytes=0,
        raw_bytes=0,
        first_timestamp_ms=0,
        max_timestamp_ms=0,
        lost_reason=reason,
    )


def _candidate(row: SegmentRow, topic: str) -> SegmentCandidate:
    values = {name: getattr(row, name) for name in SegmentRow.__slots__}
    return SegmentCandidate(Segment(topic=topic, **values), spans=(), registered=True)


def recovered_topic(topic_id: str, name: str, partitions: int, now_ms: int) -> TopicCreated:
    """Returns the event that creates a topic which the backup does not know, under its old id and, if known and free,
    its old name."""
    name = name or f"recovered-{topic_id[:8]}"
    return TopicCreated(
        topic_id=topic_id,
        topic=name,
        partitions=partitions,
        retention_ms=None,
        retention_bytes=None,
        min_acks=ACKS_WAL,
        unclean_recovery_after_ms=None,
        created_ms=now_ms,
    )


def unknown_partitions(topic: TopicRow, numbers: Iterable[int]) -> list[Event]:
    """Returns the events of partitions that only agents' logs know: unrecovered ranges from the beginning."""
    events: list[Event] = []
    for number in numbers:
        nothing = BackedUpPartition(
            topic=topic,
            partition=PartitionRow(topic_id=topic.topic_id, partition=number, epoch=0, log_start_offset=0),
            ranges=(),
            segments=(),
            present=(),
        )
        for event in restore_partition(nothing, accept_holes=False).events:
            events.append(
                replace(event, partitions=topic.partitions) if isinstance(event, PartitionRestored) else event
            )
    return events


# ---- ranges


def _ranges(known: BackedUpPartition, found: Selection) -> list[RangeRow]:
    """Returns all ranges of the partition, ascending, with unrecovered ranges in between."""
    ends, starts = _registered(found)
    rows = [replace(row, registered_end=max(row.registered_end, ends.get(row.epoch, 0))) for row in known.ranges]
    rows.sort(key=lambda row: row.epoch)
    newest = known.partition.epoch
    for epoch in sorted(set(starts) - {row.epoch for row in rows}):
        template = unrecovered_range(known.topic.topic_id, known.partition.partition, epoch, starts[epoch], ends[epoch])
        rows.append(replace(template, registered_end=ends[epoch]))
    # Epochs and offsets granted after the backup are unknown; granted once more, an offset would have two records.
    last_epoch = max([newest, *(row.epoch for row in rows)]) + JUMP_EPOCHS
    last_offset = max([found.log_start_offset, *(max(row.limit_offset, row.registered_end) for row in rows)])
    jump = last_offset + JUMP_OFFSETS
    end = unrecovered_range(known.topic.topic_id, known.partition.partition, last_epoch, jump, jump)
    # Grants after the backup follow the newest epoch, so the limits of older ranges are final.
    older = [row for row in rows if row.epoch < newest]
    uncertain = [row for row in rows if row.epoch >= newest]
    # Every acknowledged record is in the store, so no range has to wait for an agent.
    if known.topic.min_acks == ACKS_DURABLE:
        settled = [_settled(row, row.registered_end) for row in [*older, *uncertain]]
        return [*settled, _settled(end, end.start_offset)]
    return [*map(_unled, older), *_with_unrecovered(known, found, [*uncertain, end])]


def _registered(found: Selection) -> tuple[dict[int, int], dict[int, int]]:
    """Returns two maps by epoch: the ends and the starts of the selected or lost records."""
    ends: dict[int, int] = {}
    starts: dict[int, int] = {}
    spans = [span for item in found.chosen for span in item.spans]
    for span in [*spans, *found.lost]:
        ends[span.epoch] = max(ends.get(span.epoch, 0), span.end_offset)
        starts[span.epoch] = min(starts.get(span.epoch, span.base_offset), span.base_offset)
    return ends, starts


def _settled(row: RangeRow, end_offset: int) -> RangeRow:
    if row.status in (SETTLED, LOST):
        return row
    limit = max(row.registered_end, end_offset)
    return replace(row, status=SETTLED, end_offset=end_offset, limit_offset=limit, session_id="", moving=False)


def _unled(row: RangeRow) -> RangeRow:
    return row if row.status in (SETTLED, LOST) else replace(row, status=ORPHANED, session_id="", moving=False)


def _with_unrecovered(known: BackedUpPartition, found: Selection, rows: list[RangeRow]) -> list[RangeRow]:
    """Returns `rows` with unrecovered ranges between them. `rows`: ranges without a known end, ascending, and an empty
    range that stands for the end of the unknown."""
    topic_id, partition = known.topic.topic_id, known.partition.partition
    result: list[RangeRow] = []
    if not known.ranges and rows[0].epoch > 1:
        result += _gap(topic_id, partition, rows[0], found.log_start_offset)
    for row, following in pairwise(rows):
        result += _bounded(row, following)
        at = result[-1].limit_offset if result[-1].end_offset is None else result[-1].end_offset
        assert at is not None
        if following.epoch > row.epoch + 1:
            result += _gap(topic_id, partition, following, at)
    return result


def _bounded(row: RangeRow, following: RangeRow) -> list[RangeRow]:
    """Returns `row` with the end that can be inferred from the range that follows, if any."""
    if row.status in (SETTLED, LOST):
        return [row]
    row = replace(row, status=ORPHANED, session_id="", moving=False)
    if row.registered_end == following.start_offset:
        return [_settled(row, row.registered_end)]
    adjacent = following.epoch == row.epoch + 1
    return [replace(row, limit_offset=following.start_offset if adjacent else row.registered_end)]


def _gap(topic_id: str, partition: int, following: RangeRow, start_offset: int) -> list[RangeRow]:
    """Returns the unrecovered range before `following`, if there are offsets between; the end of the unknown is an
    unrecovered range itself."""
    is_end = following.limit_offset == following.start_offset
    epoch = following.epoch if is_end else following.epoch - 1
    if start_offset >= following.start_offset:
        return []
    return [unrecovered_range(topic_id, partition, epoch, start_offset, following.start_offset)]


# ---- events


def _events(
    known: BackedUpPartition, found: Selection, ranges: list[RangeRow], adopted: Sequence[SegmentCandidate]
) -> list[Event]:
    topic, partition = known.topic, known.partition.partition
    kept = {item.segment.segment_id for item in found.chosen}
    removed = [row.segment_id for row in known.segments if row.segment_id not in kept]
    segments = [item.segment for item in adopted]
    segments += [lost_segment(topic, partition, span, MISSING_REASON) for span in found.lost]
    segments.sort(key=lambda segment: segment.base_offset)
    before = {row.epoch: row for row in known.ranges}
    changed = [row for row in ranges if before.get(row.epoch) != row]
    epoch = max(row.epoch for row in ranges)
    events: list[Event] = []
    for first in range(0, max(1, len(segments), len(removed)), SEGMENTS_PER_EVENT):
        part = slice(first, first + SEGMENTS_PER_EVENT)
        events.append(
            PartitionRestored(
                topic_id=topic.topic_id,
                topic=topic.topic,
                partition=partition,
                epoch=epoch,
                log_start_offset=found.log_start_offset,
                ranges=tuple(map(range_of_row, changed)) if not first else (),
                removed_epochs=(),
                segments=tuple(segments[part]),
                removed_segment_ids=tuple(removed[part]),
            )
        )
    return [*events, *orphanings(before.values(), changed)]


def orphanings(before: Iterable[RangeRow], changed: Iterable[RangeRow]) -> list[Event]:
    """Returns the events that record since when readers wait for newly orphaned ranges."""
    already = {row.epoch for row in before if row.status == ORPHANED}
    return [
        RangeOrphaned(topic_id=row.topic_id, partition=row.partition, epoch=row.epoch)
        for row in changed
        if row.status == ORPHANED and row.epoch not in already
    ]


def range_of_row(row: RangeRow) -> Range:
    """Returns the range as events carry it."""
    return Range(
        epoch=row.epoch,
        start_offset=row.start_offset,
        limit_offset=row.limit_offset,
        registered_end=row.registered_end,
        end_offset=row.end_offset,
        status=RangeStatus(row.status),
        agent_id=row.agent_id,
        wal_id=row.wal_id,
        acknowledged_end=row.acknowledged_end,
        orphaned_ms=row.orphaned_ms,
    )


def outstanding(spans: Iterable[LostSpanRow], ranges: Iterable[RangeRow]) -> list[LostSpanRow]:
    """Returns the reported holes that registration has not reached yet."""
    ends = {row.key: row.registered_end for row in ranges}
    return [span for span in spans if span.end_offset > ends.get(span.range_key, span.end_offset)]
