"""Decides which segments become part of the log: the compare-and-set on (epoch, next offset) that fencing rests on.
Pure."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from shproto.events import BufferCompleted, BufferRegistered, Event, SegmentRegistered
from shproto.model import Segment

from streamhouse_coordinator.core.tables import LOST, BufferRow, BufferSliceRow, LostSpanRow, RangeRow, RangeRowKey

# Segments of an event, some 500 bytes each: a follower's message of 250 KB.
SEGMENTS_PER_EVENT = 500


class Result(IntEnum):
    """Results of a registration, numbered as RegistrationResult in the proto."""

    REGISTERED = 1
    COVERED = 2
    FENCED = 3
    EARLY = 4
    WITHDRAWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Outcome of a registration."""

    results: list[Result]  # in the order of the segments
    events: list[SegmentRegistered]
    ranges: dict[RangeRowKey, RangeRow]  # as they are afterwards
    lost_done: list[LostSpanRow]  # reported holes that are registered or obsolete


def judge(segment: Segment, row: RangeRow | None) -> Result:
    """Returns the result of registering `segment` now. A span that straddles registered_end is fenced: a part of its
    records would be in the log twice. The worker with the records cuts a new segment."""
    if row is None or row.status == LOST:
        return Result.FENCED
    # Before the end is checked: a retry for a range that has ended meanwhile is no refusal.
    if segment.end_offset <= row.registered_end:
        return Result.COVERED
    if segment.base_offset < row.registered_end:
        return Result.FENCED
    # Until the end is known the limit fences: offsets beyond it belong to the next epoch.
    end = row.limit_offset if row.end_offset is None else row.end_offset
    if segment.end_offset > end:
        return Result.FENCED
    if segment.base_offset > row.registered_end:
        return Result.EARLY
    return Result.REGISTERED


def register(
    segments: Sequence[Segment],
    *,
    ranges: Mapping[RangeRowKey, RangeRow],
    known_ids: Collection[str],
    lost: Sequence[LostSpanRow],
    topics: Mapping[str, str],
    buffer_id: str,
    declared: Collection[str],
) -> Registration:
    """Judges the segments of an object, in offset order within each range, and the reported holes that they run up to;
    returns the outcome.

    `ranges`: those of the segments and holes. `known_ids`: segment ids registered before. `lost`: holes that wait.
    `topics`: name by topic_id. `declared`: keys of the objects that are protected from deletion; a segment in another
    object is WITHDRAWN.
    """
    now = dict(ranges)
    results: dict[int, Result] = {}
    events: list[SegmentRegistered] = []
    todo = sorted(enumerate(segments), key=lambda item: item[1].base_offset)
    for at, segment in todo:
        _fill_holes(now, key_of(segment), lost, topics, events)
        # A retry after a lost answer. By its offsets it would be COVERED, and count as a segment that was not needed.
        if segment.segment_id in known_ids:
            results[at] = Result.REGISTERED
            continue
        results[at] = judge(segment, now.get(key_of(segment)))
        # Only where the segment would become part of the log: a covered or fenced object may be deleted.
        if results[at] is Result.REGISTERED and segment.object_key not in declared:
            results[at] = Result.WITHDRAWN
        if results[at] is Result.REGISTERED:
            _take(now, segment, events, buffer_id=buffer_id)
    for key in list(now):
        _fill_holes(now, key, lost, topics, events)
    lost_done = [span for span in lost if _judge_hole(span, now, topics) is not Result.EARLY]
    return Registration(
        results=[results[at] for at in range(len(segments))], events=events, ranges=now, lost_done=lost_done
    )


def early_ranges(segments: Sequence[Segment], ranges: Mapping[RangeRowKey, RangeRow]) -> set[RangeRowKey]:
    """Returns the ranges in which every offered segment is EARLY, judged by rows that may be outdated.

    Such an answer is right without a lock: `registered_end` never goes back, so at worst the segment is offered once
    more. It holds only if no reported hole of the range waits, which would have to be filled first.
    """
    verdicts: dict[RangeRowKey, set[Result]] = {}
    for segment in segments:
        verdicts.setdefault(key_of(segment), set()).add(judge(segment, ranges.get(key_of(segment))))
    return {key for key, found in verdicts.items() if found == {Result.EARLY}}


def key_of(segment: Segment) -> RangeRowKey:
    """Returns the key of the segment's range."""
    return (segment.topic_id, segment.partition, segment.epoch)


def _take(
    now: dict[RangeRowKey, RangeRow], segment: Segment, events: list[SegmentRegistered], *, buffer_id: str
) -> None:
    events.append(SegmentRegistered(segment, buffer_id))
    now[key_of(segment)] = replace(now[key_of(segment)], registered_end=segment.end_offset)


def _fill_holes(
    now: dict[RangeRowKey, RangeRow],
    key: RangeRowKey,
    lost: Sequence[LostSpanRow],
    topics: Mapping[str, str],
    events: list[SegmentRegistered],
) -> None:
    """Registers the holes of a range that registration has reached."""
    for span in sorted(lost, key=lambda span: span.base_offset):
        if span.range_key == key and _judge_hole(span, now, topics) is Result.REGISTERED:
            _take(now, _lost_segment(span, topics, now[key]), events, buffer_id="")


def _judge_hole(span: LostSpanRow, now: Mapping[RangeRowKey, RangeRow], topics: Mapping[str, str]) -> Result:
    row = now.get(span.range_key)
    return judge(_lost_segment(span, topics, row), row)


def _lost_segment(span: LostSpanRow, topics: Mapping[str, str], row: RangeRow | None) -> Segment:
    # The registered part of the span stays; the id follows from the place, so that a repeat gives the same segment.
    base = span.base_offset if row is None else max(span.base_offset, min(row.registered_end, span.end_offset))
    return Segment(
        segment_id=f"lost-{span.topic_id}-{span.partition}-{span.epoch}-{base}",
        topic_id=span.topic_id,
        topic=topics.get(span.topic_id, ""),
        partition=span.partition,
        epoch=span.epoch,
        base_offset=base,
        end_offset=span.end_offset,
        record_count=span.end_offset - base,
        object_key="",
        object_at=0,
        size_bytes=0,
        raw_bytes=0,
        first_timestamp_ms=0,
        max_timestamp_ms=0,
        lost_reason=span.reason,
    )


def of_buffer(registered: Sequence[SegmentRegistered], buffer: BufferRow, completed: bool) -> list[Event]:
    """Returns a single event for all registered segments of a buffer's object, as long as they fit into a message; or
    the completion of a buffer that earlier registrations have finished."""
    segments = [event.segment for event in registered]
    parts = [segments[at : at + SEGMENTS_PER_EVENT] for at in range(0, len(segments), SEGMENTS_PER_EVENT)]
    events: list[Event] = [
        BufferRegistered(
            buffer_id=buffer.buffer_id,
            agent_id=buffer.agent_id,
            segments=tuple(part),
            # With the last part: a follower that sees the buffer completed has seen all of its segments.
            completed=completed and part is parts[-1],
        )
        for part in parts
    ]
    return events or ([BufferCompleted(buffer.buffer_id, buffer.agent_id)] if completed else [])


def unresolved(slices: Iterable[BufferSliceRow], ranges: Mapping[RangeRowKey, RangeRow]) -> list[BufferSliceRow]:
    """Returns the slices of a buffer that are still to be registered. A partly registered slice begins where
    registration ended."""
    rest = []
    for item in slices:
        row = ranges.get(item.range_key)
        if row is None or row.status == LOST or item.end_offset <= row.registered_end:
            continue
        if row.end_offset is not None and item.end_offset > row.end_offset:
            continue
        base = max(item.base_offset, row.registered_end)
        rest.append(
            item if base == item.base_offset else replace(item, base_offset=base, record_count=item.end_offset - base)
        )
    return rest
