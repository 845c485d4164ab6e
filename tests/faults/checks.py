"""What is wrong with a run. One function per anomaly: a timeline in, anomalies out. Pure.

The names follow the literature (Jepsen's Kafka workload) where it has one.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from tests.faults import history as h
from tests.faults.timeline import Outcome, PartitionTimeline, Timeline, Write


@dataclass(frozen=True, slots=True)
class Anomaly:
    """lines: where in the history it can be seen, the first line is 1."""

    kind: str
    text: str
    lines: tuple[int, ...] = ()


Check = Callable[[Timeline], Iterator[Anomaly]]
MIN_ACKS_DURABLE = "durable"
# An error with these reasons says that bytes are gone or wrong; others say that somebody is away.
DAMAGE = ("DATA_LOSS", "INTERNAL", "OFFSET_BEYOND_END", "OFFSET_BELOW_START")

BIT_FLIPS = "s3-bit-flips"
"""The nemesis that damages what is read on its way: who reads meanwhile may be told of it."""

TOLD_LATE_MS = 10_000
"""Until a consumer hears what its query service has met: the longest wait of a request, and a busy machine."""


def _at(partition: PartitionTimeline, offset: int) -> str:
    return f"{partition.where[0]}/{partition.where[1]} offset {offset}"


# ---- records


def two_values(timeline: Timeline) -> Iterator[Anomaly]:
    """G2: an offset was seen with one record, and with another one."""
    for partition in timeline.partitions.values():
        for offset, first, other in partition.conflicts:
            text = f"{_at(partition, offset)}: {first.value!r}, then {other.value!r}"
            yield Anomaly("two-values", text, (first.line, other.line))


def lost_writes(timeline: Timeline) -> Iterator[Anomaly]:
    """G1: an acknowledged record is not there at the end."""
    for partition in timeline.partitions.values():
        for offset, (write, value) in partition.acknowledged.items():
            missing = [reader for reader, there in partition.read_back.items() if offset not in there]
            if missing and not _is_fenced(partition, offset, write):
                text = f"{_at(partition, offset)}: {value!r} was acknowledged, {', '.join(missing)} cannot read it"
                yield Anomaly("lost-write", text, (write.line, write.done_line))


def fenced_acks(timeline: Timeline) -> Iterator[Anomaly]:
    """G4: a leader whose epoch was over, or had been settled below, acknowledged a record."""
    for partition in timeline.partitions.values():
        for offset, (write, value) in partition.acknowledged.items():
            if _is_fenced(partition, offset, write):
                owner = partition.range_of(offset)
                whose = f"epoch {owner.epoch} owns it" if owner else "no epoch owns it"
                text = f"{_at(partition, offset)}: {value!r} acknowledged in epoch {write.epoch or '?'}, but {whose}"
                yield Anomaly("fenced-ack", text, (write.line, write.done_line))


def _is_fenced(partition: PartitionTimeline, offset: int, write: Write) -> bool:
    if not partition.ranges:
        return False
    owner = partition.range_of(offset)
    return owner is None or bool(write.epoch and write.epoch != owner.epoch)


def vanished(timeline: Timeline) -> Iterator[Anomaly]:
    """G2: a consumer was given a record that is not there at the end."""
    for partition in timeline.partitions.values():
        if not partition.read_back:
            continue
        there = set[int]().union(*partition.read_back.values())
        for offset, seen in partition.first_seen.items():
            if offset not in there and offset not in partition.acknowledged:
                yield Anomaly(
                    "vanished", f"{_at(partition, offset)}: {seen.value!r} was read, and is gone", (seen.line,)
                )


def resurrected(timeline: Timeline) -> Iterator[Anomaly]:
    """A record whose producer was told that it was not written is there; or one that nobody ever sent."""
    for partition in timeline.partitions.values():
        for offset, seen in partition.first_seen.items():
            write = timeline.writers.get(seen.value)
            if write is None:
                yield Anomaly("never-sent", f"{_at(partition, offset)}: nobody sent {seen.value!r}", (seen.line,))
            elif (write.produce.topic, write.produce.partition) != partition.where:
                sent_to = f"{write.produce.topic}/{write.produce.partition}"
                text = f"{_at(partition, offset)}: {seen.value!r} was sent to {sent_to}"
                yield Anomaly("never-sent", text, (write.line, seen.line))
            elif write.outcome is Outcome.FAIL:
                text = f"{_at(partition, offset)}: {seen.value!r} was refused, and is there"
                yield Anomaly("resurrected", text, (write.line, write.done_line, seen.line))


def duplicates(timeline: Timeline) -> Iterator[Anomaly]:
    """G5: a record that was sent once, or by an idempotent producer, is there twice."""
    for partition, value, offsets in _repeated(timeline):
        if not _retry_may_repeat(timeline, partition, offsets):
            lines = [partition.first_seen[offset].line for offset in offsets]
            write = timeline.writers.get(value)
            lines = [write.line, *lines] if write else lines
            text = f"{_at(partition, offsets[0])}: {value!r} is also at {', '.join(map(str, offsets[1:]))}"
            yield Anomaly("duplicate", text, tuple(sorted(set(lines))))


def permitted_repeats(timeline: Timeline) -> int:
    """Records that are there twice as docs/guarantees.md allows: retried across an unsettled takeover."""
    return sum(_retry_may_repeat(timeline, partition, offsets) for partition, _, offsets in _repeated(timeline))


def _repeated(timeline: Timeline) -> Iterator[tuple[PartitionTimeline, str, list[int]]]:
    for partition in timeline.partitions.values():
        for value, places in partition.places.items():
            if len(places) > 1:
                yield partition, value, sorted(places)


def _retry_may_repeat(timeline: Timeline, partition: PartitionTimeline, offsets: list[int]) -> bool:
    """Whether between any two neighbours of these copies another agent took over without knowing the log's end.

    Only then can the new leader not know what the old one has written. A topic that demands durable acks settles at
    what is registered, so the new leader knows all there is.
    """
    topic = timeline.topics.get(partition.where[0])
    if topic is None or topic.min_acks == MIN_ACKS_DURABLE:
        return False
    takeovers = [after.start_offset for before, after in pairwise(partition.ranges) if _took_over(before, after)]
    return all(any(low < start <= high for start in takeovers) for low, high in pairwise(offsets))


def _took_over(before: h.Range, after: h.Range) -> bool:
    # Beyond the limit, not only at it: the coordinator does not list an epoch in between that stayed empty. A range
    # that turned out to be full up to its limit may have been handed over as well: the ranges do not tell.
    return after.start_offset >= before.limit_offset


# ---- order


def order_inversions(timeline: Timeline) -> Iterator[Anomaly]:
    """G3: one producer's records, acknowledged in another order than they were sent; or read in another order."""
    for partition in timeline.partitions.values():
        last: dict[str, tuple[int, Write]] = {}
        for write in partition.writes:
            for offset, value in zip(write.offsets, write.produce.values, strict=False):
                before = last.get(write.produce.process)
                if before is not None and offset <= before[0]:
                    text = f"{_at(partition, offset)}: {write.produce.process} sent it after {before[0]}"
                    yield Anomaly("order-inversion", text, (before[1].line, before[1].done_line, write.line))
                last[write.produce.process] = (_first_copy(timeline, partition, offset, value), write)
        for line, before_offset, offset in partition.read_back_disorder:
            yield Anomaly("order-inversion", f"{_at(partition, offset)}: read back after {before_offset}", (line,))


def _first_copy(timeline: Timeline, partition: PartitionTimeline, offset: int, value: str) -> int:
    """Where the record at `offset` stands first: what follows it may follow a copy that a retry may have left."""
    places = sorted(partition.places[value])
    may_repeat = len(places) > 1 and _retry_may_repeat(timeline, partition, places)
    return places[0] if may_repeat else offset


def polls(timeline: Timeline) -> Iterator[Anomaly]:
    """G3: a consumer went back, or passed over a record.

    A group's member may also begin where its group has committed (or at 0): it was given the partition.
    """
    for partition in timeline.partitions.values():
        commits = _commit_starts(partition)
        positions: dict[str, tuple[int, int]] = {}
        for line, event in partition.reads:
            if isinstance(event, h.Assigned):
                positions[event.process] = (event.offset, line)
                continue
            starts = [(0, 0), *commits.get(event.group, ())] if event.group else ()
            yield from _poll(partition, line, event, positions.get(event.process, (-1, 0)), starts)
            if event.spans:
                positions[event.process] = (sum(event.spans[-1]), line)


def _commit_starts(partition: PartitionTimeline) -> dict[str, list[tuple[int, int]]]:
    """Per group: (offset, line of the commit), by offset. Whether it was stored may be unknown; a refusal was not."""
    return {
        group: sorted((s.offset, s.line) for s in steps if not s.is_read and s.outcome is not Outcome.FAIL)
        for group, steps in partition.commits.items()
    }


def _poll(
    partition: PartitionTimeline,
    line: int,
    event: h.Polled,
    position: tuple[int, int],
    starts: Sequence[tuple[int, int]],
) -> Iterator[Anomaly]:
    expected, since = position
    for number, (first, count) in enumerate(event.spans):
        if number == 0:
            expected, since = _nearest_start(partition, line, first, (expected, since), starts)
        skipped = partition.known_in(expected, first) if first >= expected >= 0 else []
        if skipped:
            text = f"{event.process} passed over {_at(partition, skipped[0])} ({len(skipped)} records)"
            yield Anomaly("poll-gap", text, (since, line))
        elif first < expected or expected < 0:
            text = f"{event.process} was given {_at(partition, first)} where {expected} was next"
            yield Anomaly("order-inversion", text, (since, line))
        expected, since = first + count, line


def _nearest_start(
    partition: PartitionTimeline, line: int, first: int, own: tuple[int, int], starts: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Where the consumer must have come from: its own position, if that explains `first`; else the highest of
    `starts` that was committed before and does not lie beyond `first`."""
    if first >= own[0] >= 0 and not partition.known_in(own[0], first):
        return own
    for offset, committed_line in reversed(starts[: bisect_left(starts, (first + 1, 0))]):
        if committed_line < line:
            explains = not partition.known_in(offset, first)
            return (offset, committed_line) if explains or own[0] < 0 else own
    return own


def unseen(timeline: Timeline) -> Iterator[Anomaly]:
    """A consumer that had all the time it needed never got to the end."""
    for partition in timeline.partitions.values():
        for line, event in partition.positions:
            beyond = partition.known[bisect_left(partition.known, event.offset) :]
            if beyond:
                whose = f"{event.process} (group {event.group})" if event.group else event.process
                text = f"{whose} stays at {_at(partition, event.offset)}, {len(beyond)} records follow"
                yield Anomaly("unseen", text, (line,))


def passed_by_group(timeline: Timeline) -> Iterator[Anomaly]:
    """A group has committed beyond a record that none of its members was ever given."""
    for partition in timeline.partitions.values():
        for line, event in partition.positions:
            if event.group:
                given = partition.given_to(event.group)
                passed = [offset for offset in partition.known_in(0, event.offset) if offset not in given]
                if passed:
                    text = f"group {event.group} is at {event.offset}, and was never given {len(passed)} records"
                    yield Anomaly("group-gap", f"{_at(partition, passed[0])}: {text}", (line,))


# ---- numbered streams


def numbered_streams(timeline: Timeline) -> Iterator[Anomaly]:
    """G5: a numbered stream has a gap, a record twice, an end before the one that a writer was told, or a record of a
    producer epoch behind the fence of a newer one."""
    for partition in timeline.partitions.values():
        if partition.read_back:
            yield from _stream(partition)


def _stream(partition: PartitionTimeline) -> Iterator[Anomaly]:
    expected, last_line = 0, 0
    for offset in sorted(set[int]().union(*partition.read_back.values())):
        seen = partition.first_seen[offset]
        if seen.value not in partition.numbered:
            continue
        sequence, epoch = partition.numbered[seen.value]
        text = f"{_at(partition, offset)}: sequence {sequence} where {expected} was next"
        lines = (last_line, seen.line) if last_line else (seen.line,)
        if sequence > expected:
            yield Anomaly("stream-gap", text, lines)
        elif sequence < expected:
            yield Anomaly("stream-double", text, lines)
        yield from _zombies(partition, offset, sequence, epoch)
        expected, last_line = max(expected, sequence + 1), seen.line
    for line, end in partition.stream_ends:
        if end.next_sequence > expected:
            text = f"{partition.where[0]}/{partition.where[1]} ends before sequence {expected}"
            yield Anomaly("stream-lost", f"{text}, {end.process} was told {end.next_sequence}", (line,))


def _zombies(partition: PartitionTimeline, offset: int, sequence: int, epoch: int) -> Iterator[Anomaly]:
    for line, end in partition.stream_ends:
        if end.fenced and epoch < end.epoch and sequence >= end.next_sequence:
            text = f"epoch {epoch} wrote sequence {sequence}; epoch {end.epoch} had fenced at {end.next_sequence}"
            yield Anomaly(
                "zombie-write", f"{_at(partition, offset)}: {text}", (line, partition.first_seen[offset].line)
            )
            return


# ---- groups


def commits_going_back(timeline: Timeline) -> Iterator[Anomaly]:
    """A commit was stored, or read, that is below one that was over before it began."""
    for partition in timeline.partitions.values():
        for group, steps in partition.commits.items():
            for step in steps:
                if step.outcome is Outcome.OK and step.offset < step.floor:
                    what = "reads" if step.is_read else "commits"
                    text = f"group {group} {what} {_at(partition, step.offset)} after {step.floor} was committed"
                    yield Anomaly("commit-back", text, (step.floor_line, step.line, step.done_line))


def commits_from_nowhere(timeline: Timeline) -> Iterator[Anomaly]:
    """A committed offset was read that no member committed, or whose commit was refused."""
    for partition in timeline.partitions.values():
        for group, steps in partition.commits.items():
            made = {step.offset for step in steps if not step.is_read and step.outcome is not Outcome.FAIL} | {-1}
            for step in steps:
                if step.is_read and step.outcome is Outcome.OK and step.offset not in made:
                    text = f"group {group} has {_at(partition, step.offset)}, which nobody committed"
                    yield Anomaly("commit-from-nowhere", text, (step.line, step.done_line))


# ---- objects and registrations


def registrations_without_object(timeline: Timeline) -> Iterator[Anomaly]:
    """G8: a registered segment whose object is missing or too short."""
    if not timeline.complete:
        return
    for partition in timeline.partitions.values():
        for line, segment in partition.segments:
            if not segment.object_key:
                continue
            found = timeline.objects.get(segment.object_key)
            if found is None or found[1].size_bytes < segment.object_at + segment.size_bytes:
                size = f"{found[1].size_bytes} bytes long" if found else "missing"
                text = f"{_at(partition, segment.base_offset)}: object {segment.object_key} is {size}"
                yield Anomaly("registration-without-object", text, (line,))


def objects_without_registration(timeline: Timeline) -> Iterator[Anomaly]:
    """G8: an object that nothing refers to outlived its grace."""
    partitions = timeline.partitions.values()
    referred = {segment.object_key for partition in partitions for _, segment in partition.segments}
    for key, (line, item) in timeline.objects.items():
        if key not in referred and timeline.complete:
            yield Anomaly("object-without-registration", f"object {key} ({item.size_bytes} bytes)", (line,))


def registrations_in_disorder(timeline: Timeline) -> Iterator[Anomaly]:
    """G4: registered segments overlap, belong to another epoch than they say, or do not cover exactly what the
    epochs' ranges say is registered. A merged segment may span epochs; it bears the newest one's number."""
    for partition in timeline.partitions.values():
        for (_, before), (line, after) in pairwise(partition.segments):
            if after.base_offset < before.end_offset:
                text = f"{_at(partition, after.base_offset)}: a segment up to {before.end_offset} covers it already"
                yield Anomaly("registration-disorder", text, (line,))
        for line, segment in partition.segments:
            owner = partition.range_of(segment.end_offset - 1)
            if owner is None or owner.epoch != segment.epoch:
                text = f"{_at(partition, segment.end_offset - 1)}: epoch {segment.epoch} does not own it"
                yield Anomaly("registration-disorder", text, (line,))
        if timeline.complete:
            yield from _coverage(partition)


def _coverage(partition: PartitionTimeline) -> Iterator[Anomaly]:
    """Merged segments may reach over the gap between two epochs, where no offset is."""
    covered = _joined((segment.base_offset, segment.end_offset) for _, segment in partition.segments)
    for item in partition.ranges:
        end = item.end_offset if item.end_offset >= 0 else item.limit_offset
        missing = (item.registered_end - item.start_offset) - _overlap(covered, item.start_offset, item.registered_end)
        if missing:
            text = f"epoch {item.epoch} is registered up to {item.registered_end}, {missing} offsets in no segment"
            yield Anomaly("registration-disorder", f"{_at(partition, item.start_offset)}: {text}")
        if beyond := _overlap(covered, item.registered_end, end):
            text = f"{beyond} offsets beyond the registered end of epoch {item.epoch} in segments"
            yield Anomaly("registration-disorder", f"{_at(partition, item.registered_end)}: {text}")


def _overlap(spans: Iterable[tuple[int, int]], first: int, end: int) -> int:
    """How many offsets of [first, end) lie in `spans`, which do not overlap each other."""
    return sum(max(0, min(end, last) - max(first, start)) for start, last in spans)


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same offsets in as few spans (first, end) as possible."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(span for span in spans if span[0] < span[1]):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((first, end))
    return joined


def unregistered(timeline: Timeline) -> Iterator[Anomaly]:
    """G1: everything was healed and drained, and an acknowledged record is in no segment."""
    if not timeline.complete:
        return
    for partition in timeline.partitions.values():
        spans = [(segment.base_offset, segment.end_offset) for _, segment in partition.segments if segment.object_key]
        for offset, (write, value) in partition.acknowledged.items():
            at = bisect_left(spans, (offset + 1, 0)) - 1
            if partition.ranges and (at < 0 or offset >= spans[at][1]) and not _is_fenced(partition, offset, write):
                text = f"{_at(partition, offset)}: {value!r} was acknowledged and is in no segment"
                yield Anomaly("unregistered", text, (write.line, write.done_line))


# ---- what was said, and what ended


def damage(timeline: Timeline) -> Iterator[Anomaly]:
    """G6 turned round: no fault here damages stored bytes, so nobody may be told of damage; but while bits flip on the
    way."""
    flips = _windows(timeline, BIT_FLIPS)
    for line, event in timeline.read_errors:
        is_flipped = any(begin <= event.at_ms <= end + TOLD_LATE_MS for begin, end in flips)
        if event.reason in DAMAGE and not (event.reason == "DATA_LOSS" and is_flipped):
            yield Anomaly("damage", f"{event.process}: {event.reason}: {event.error}", (line,))


def _windows(timeline: Timeline, name: str) -> list[tuple[int, int]]:
    """When the nemesis was at work, in ms since the run began."""
    begins = [event.at_ms for _, event in timeline.faults if (event.name, event.state) == (name, h.BEGINS)]
    ends = [event.at_ms for _, event in timeline.faults if (event.name, event.state) == (name, h.OVER)]
    return list(zip_longest(begins, ends, fillvalue=sys.maxsize))


def deaths(timeline: Timeline) -> Iterator[Anomaly]:
    """A service ended by itself."""
    for line, event in timeline.deaths:
        yield Anomaly("died", f"{event.process} ended with exit code {event.exit_code}", (line,))


CHECKS: tuple[Check, ...] = (
    two_values,
    lost_writes,
    fenced_acks,
    vanished,
    resurrected,
    duplicates,
    order_inversions,
    polls,
    unseen,
    passed_by_group,
    numbered_streams,
    commits_going_back,
    commits_from_nowhere,
    registrations_without_object,
    objects_without_registration,
    registrations_in_disorder,
    unregistered,
    damage,
    deaths,
)
