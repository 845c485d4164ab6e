"""A history put in order for the checks: operations with their outcomes, and what was seen of each partition.

Owns: the index. Does not own: what counts as an anomaly (checks.py).
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from tests.faults import history as h

Where = tuple[str, int]
"""Topic and partition."""


class Outcome(Enum):
    OK = "ok"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Write:
    """One produce operation. `line`s are numbers in the history, from 1; done_line 0: it never came back."""

    produce: h.Produce
    line: int
    outcome: Outcome = Outcome.UNKNOWN
    offsets: tuple[int, ...] = ()
    epoch: int = 0
    done_line: int = 0


@dataclass(frozen=True, slots=True)
class Sighting:
    """A value seen at an offset: acknowledged, polled or read back."""

    value: str
    line: int


@dataclass(slots=True)
class CommitStep:
    """A commit, or an answer to what was committed (is_read). floor: what was surely committed when it began."""

    line: int
    offset: int
    is_read: bool
    floor: int
    floor_line: int
    done_line: int = 0
    outcome: Outcome = Outcome.UNKNOWN


@dataclass
class PartitionTimeline:
    """All about one partition."""

    where: Where
    writes: list[Write] = field(default_factory=list)
    acknowledged: dict[int, tuple[Write, str]] = field(default_factory=dict)
    first_seen: dict[int, Sighting] = field(default_factory=dict)
    conflicts: list[tuple[int, Sighting, Sighting]] = field(default_factory=list)
    places: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    read_back: defaultdict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    read_back_disorder: list[tuple[int, int, int]] = field(default_factory=list)
    reads: list[tuple[int, h.Assigned | h.Polled]] = field(default_factory=list)
    positions: list[tuple[int, h.Position]] = field(default_factory=list)
    ranges: list[h.Range] = field(default_factory=list)
    segments: list[tuple[int, h.Segment]] = field(default_factory=list)
    commits: defaultdict[str, list[CommitStep]] = field(default_factory=lambda: defaultdict(list))
    # Of a numbered stream: sequence and producer epoch of each value, and what its writers were told of its end.
    numbered: dict[str, tuple[int, int]] = field(default_factory=dict)
    stream_ends: list[tuple[int, h.StreamEnd]] = field(default_factory=list)

    def see(self, offset: int, value: str, line: int) -> None:
        sighting = Sighting(value, line)
        first = self.first_seen.setdefault(offset, sighting)
        if first.value != value:
            self.conflicts.append((offset, first, sighting))
        self.places[value].add(offset)

    @cached_property
    def known(self) -> list[int]:
        """Offsets that surely hold a record, ascending: acknowledged, or there at the end. Ask when all is indexed."""
        return sorted(set(self.acknowledged).union(*self.read_back.values()))

    def known_in(self, start: int, end: int) -> list[int]:
        """Known offsets in [start, end)."""
        return self.known[bisect_left(self.known, start) : bisect_left(self.known, end)]

    def given_to(self, group: str) -> set[int]:
        """Offsets that members of the group were given."""
        polled = (event for _, event in self.reads if isinstance(event, h.Polled) and event.group == group)
        return {offset for event in polled for offset in h.offsets_of(event.spans)}

    def range_of(self, offset: int) -> h.Range | None:
        """The epoch that owns the offset; None where an epoch has ended below it, or none ever had it."""
        for item in self.ranges:
            end = item.end_offset if item.end_offset >= 0 else item.limit_offset
            if item.start_offset <= offset < end and item.status != "lost":
                return item
        return None


@dataclass
class Timeline:
    """The whole run. signs_ms: when something was acknowledged (by ack level), and handed to consumers (reads)."""

    topics: dict[str, h.Topic] = field(default_factory=dict)
    partitions: dict[Where, PartitionTimeline] = field(default_factory=dict)
    writers: dict[str, Write] = field(default_factory=dict)
    values_sent_twice: list[tuple[str, int]] = field(default_factory=list)
    objects: dict[str, tuple[int, h.StoredObject]] = field(default_factory=dict)
    read_errors: list[tuple[int, h.ReadFailed]] = field(default_factory=list)
    deaths: list[tuple[int, h.ProcessDied]] = field(default_factory=list)
    faults: list[tuple[int, h.Fault]] = field(default_factory=list)
    signs_ms: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    complete: bool = False

    def partition(self, topic: str, partition: int) -> PartitionTimeline:
        where = (topic, partition)
        found = self.partitions.get(where)
        if found is None:
            found = self.partitions[where] = PartitionTimeline(where)
        return found


class _Indexer:
    """Takes events one by one. Operations that are under way are its own."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self._writes: dict[int, Write] = {}
        self._commits: dict[int, tuple[PartitionTimeline, str, CommitStep]] = {}
        self._floors: dict[tuple[str, Where], tuple[int, int]] = {}

    def take(self, line: int, event: h.Event) -> None:
        timeline = self.timeline
        match event:
            case h.Topic():
                timeline.topics[event.topic] = event
            case h.Produce():
                self._begin_write(line, event)
            case h.Produced():
                self._acknowledge(line, event)
            case h.ProduceFailed():
                write = self._writes.pop(event.id)
                write.done_line = line
                write.outcome = Outcome.FAIL if event.definite else Outcome.UNKNOWN
            case h.Numbered():
                self._number(event)
            case h.Assigned():
                timeline.partition(event.topic, event.partition).reads.append((line, event))
            case h.Polled():
                partition = timeline.partition(event.topic, event.partition)
                partition.reads.append((line, event))
                timeline.signs_ms["reads"].append(event.at_ms)
                self._see_all(partition, line, event)
            case h.ReadBack():
                self._read_back(line, event)
            case h.Position():
                timeline.partition(event.topic, event.partition).positions.append((line, event))
            case h.Commit() | h.FetchCommitted():
                self._begin_commit(line, event)
            case h.CommitDone():
                self._end_commit(line, event.id, Outcome(event.outcome))
            case h.Committed():
                self._commits[event.id][2].offset = event.offset
                self._end_commit(line, event.id, Outcome.OK)
            case _:
                self._take_fact(line, event)

    def _take_fact(self, line: int, event: h.Event) -> None:
        timeline = self.timeline
        match event:
            case h.Range():
                timeline.partition(event.topic, event.partition).ranges.append(event)
            case h.StreamEnd():
                timeline.partition(event.topic, event.partition).stream_ends.append((line, event))
            case h.Segment():
                timeline.partition(event.topic, event.partition).segments.append((line, event))
            case h.StoredObject():
                timeline.objects[event.key] = (line, event)
            case h.ReadFailed():
                timeline.read_errors.append((line, event))
            case h.ProcessDied():
                timeline.deaths.append((line, event))
            case h.Fault():
                timeline.faults.append((line, event))
            case h.End():
                timeline.complete = True

    def _begin_write(self, line: int, event: h.Produce) -> None:
        write = self._writes[event.id] = Write(event, line)
        self.timeline.partition(event.topic, event.partition).writes.append(write)
        for value in event.values:
            if self.timeline.writers.setdefault(value, write) is not write:
                self.timeline.values_sent_twice.append((value, line))

    def _number(self, event: h.Numbered) -> None:
        produce = self._writes[event.id].produce
        partition = self.timeline.partition(produce.topic, produce.partition)
        for sequence, value in enumerate(produce.values, event.first_sequence):
            partition.numbered[value] = (sequence, event.epoch)

    def _acknowledge(self, line: int, event: h.Produced) -> None:
        write = self._writes.pop(event.id)
        write.outcome, write.done_line, write.epoch = Outcome.OK, line, event.epoch
        write.offsets = tuple(h.offsets_of(event.spans))
        self.timeline.signs_ms[write.produce.acks].append(event.at_ms)
        partition = self.timeline.partition(write.produce.topic, write.produce.partition)
        for offset, value in zip(write.offsets, write.produce.values, strict=True):
            partition.see(offset, value, line)
            partition.acknowledged.setdefault(offset, (write, value))

    def _see_all(self, partition: PartitionTimeline, line: int, event: h.Polled | h.ReadBack) -> None:
        for offset, value in zip(h.offsets_of(event.spans), event.values, strict=True):
            partition.see(offset, value, line)

    def _read_back(self, line: int, event: h.ReadBack) -> None:
        partition = self.timeline.partition(event.topic, event.partition)
        there = partition.read_back[event.process]
        self._see_all(partition, line, event)
        last = next(reversed(there), -1)
        for offset in h.offsets_of(event.spans):
            if offset <= last:
                partition.read_back_disorder.append((line, last, offset))
            there[offset] = line
            last = offset

    def _begin_commit(self, line: int, event: h.Commit | h.FetchCommitted) -> None:
        partition = self.timeline.partition(event.topic, event.partition)
        is_read = isinstance(event, h.FetchCommitted)
        offset = -1 if isinstance(event, h.FetchCommitted) else event.offset
        floor, floor_line = self._floors.get((event.group, partition.where), (-1, 0))
        step = CommitStep(line, offset, is_read, floor, floor_line)
        partition.commits[event.group].append(step)
        self._commits[event.id] = (partition, event.group, step)

    def _end_commit(self, line: int, operation: int, outcome: Outcome) -> None:
        partition, group, step = self._commits.pop(operation)
        step.outcome, step.done_line = outcome, line
        held = self._floors.get((group, partition.where), (-1, 0))
        if outcome is Outcome.OK and step.offset > held[0]:
            self._floors[group, partition.where] = (step.offset, line)


def index(events: Iterable[h.Event]) -> Timeline:
    """Raises HistoryError for an end without a beginning, or offsets and values that do not match."""
    indexer = _Indexer()
    for line, event in enumerate(events, 1):
        try:
            indexer.take(line, event)
        except KeyError as error:
            raise h.HistoryError(f"line {line}: operation {error} never began, or is over: {event}") from error
        except ValueError as error:
            raise h.HistoryError(f"line {line}: {error}: {event}") from error
    timeline = indexer.timeline
    for partition in timeline.partitions.values():
        partition.ranges.sort(key=lambda item: item.epoch)
        partition.segments.sort(key=lambda item: (item[1].base_offset, item[1].end_offset))
    return timeline
