"""The history of a run: what clients and observers did and saw, one JSON object per line, in the order it happened.

All of a run is recorded by one event loop, so the order of lines is real time: an operation whose end is above
another's beginning was over before that one began. The checker takes nothing but this file.

Offsets are written as spans [first, count]; values are unique strings, so that every record has one writer.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

Spans = tuple[tuple[int, int], ...]
"""Offsets, ascending or not, as (first, count): (7, 2) is 7 and 8."""


class HistoryError(ValueError):
    """A line that is no event; names file and line."""


@dataclass(frozen=True, slots=True)
class Event:
    """`at_ms`: milliseconds since the run began; for people, the order of lines is what counts."""

    kinds: ClassVar[dict[str, type["Event"]]] = {}
    at_ms: int = dataclasses.field(default=0, kw_only=True)


@dataclass(frozen=True, slots=True)
class Topic(Event):
    """A topic of the run. min_acks: wal | durable."""

    topic: str
    partitions: int
    min_acks: str


@dataclass(frozen=True, slots=True)
class Produce(Event):
    """A producer sends `values`, in this order. `id` names the operation; acks: wal | durable."""

    id: int
    process: str
    topic: str
    partition: int
    values: tuple[str, ...]
    acks: str


@dataclass(frozen=True, slots=True)
class Produced(Event):
    """Acknowledged at these offsets. epoch: of the acknowledgement; 0 where the client does not say."""

    id: int
    spans: Spans
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class ProduceFailed(Event):
    """Not acknowledged. definite: the answer says that nothing was written; otherwise nobody knows."""

    id: int
    definite: bool
    error: str


@dataclass(frozen=True, slots=True)
class Numbered(Event):
    """The values of operation `id` are numbered, from `first_sequence` on, in the numbered stream of their partition.
    epoch: of the producer that writes them."""

    id: int
    first_sequence: int
    epoch: int


@dataclass(frozen=True, slots=True)
class StreamEnd(Event):
    """A writer was told that the numbered stream of a partition is there below `next_sequence`. fenced: by a fence of
    its epoch, after which no older epoch may write; else by an acknowledgement."""

    process: str
    topic: str
    partition: int
    epoch: int
    next_sequence: int
    fenced: bool


@dataclass(frozen=True, slots=True)
class Assigned(Event):
    """A consumer begins (again) at `offset`. group: empty for a plain consumer."""

    process: str
    topic: str
    partition: int
    offset: int
    group: str = ""


@dataclass(frozen=True, slots=True)
class Polled(Event):
    """Records handed to a consumer, in this order."""

    process: str
    topic: str
    partition: int
    spans: Spans
    values: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True, slots=True)
class Position(Event):
    """Where a consumer stands when the run is over and it had all the time to catch up."""

    process: str
    topic: str
    partition: int
    offset: int
    group: str = ""


@dataclass(frozen=True, slots=True)
class Commit(Event):
    """A group member begins to commit `offset` as the next one to read."""

    id: int
    process: str
    group: str
    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class CommitDone(Event):
    """outcome: ok | fail (refused, nothing stored) | unknown."""

    id: int
    outcome: str


@dataclass(frozen=True, slots=True)
class FetchCommitted(Event):
    """Somebody begins to ask what the group has committed."""

    id: int
    process: str
    group: str
    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Committed(Event):
    """The answer; -1: nothing."""

    id: int
    offset: int


@dataclass(frozen=True, slots=True)
class ReadFailed(Event):
    """A consumer was told of an error. reason: the stable word of docs/errors.md."""

    process: str
    reason: str
    error: str


@dataclass(frozen=True, slots=True)
class ReadBack(Event):
    """All that can be read of a partition when the run is over. May come in parts; `process` names the reader."""

    process: str
    topic: str
    partition: int
    spans: Spans
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Range(Event):
    """The offsets of one epoch as the coordinator knows them at the end. end_offset -1: not settled."""

    topic: str
    partition: int
    epoch: int
    start_offset: int
    limit_offset: int
    registered_end: int
    end_offset: int
    status: str


@dataclass(frozen=True, slots=True)
class Segment(Event):
    """A registration at the end. object_key is empty for a span that was declared lost."""

    segment_id: str
    topic: str
    partition: int
    epoch: int
    base_offset: int
    end_offset: int
    object_key: str
    object_at: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StoredObject(Event):
    """An object of the listing at the end."""

    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Note(Event):
    """Something to know when reading the history: a process ends and may, a member joins."""

    process: str
    text: str


BEGINS, OVER, SKIPPED = "begins", "over", "skipped"


@dataclass(frozen=True, slots=True)
class Fault(Event):
    """A nemesis of that name. state: begins | over | skipped (nothing was done, the text says why)."""

    name: str
    state: str
    text: str


@dataclass(frozen=True, slots=True)
class ProcessDied(Event):
    """A service ended without being told to and without a fault that may end it."""

    process: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class End(Event):
    """Everything was healed, drained, read back and listed: what is missing now is missing for good."""


Event.kinds.update({kind.__name__: kind for kind in Event.__subclasses__()})


def spans_of(offsets: Iterable[int]) -> Spans:
    """Offsets in their order as spans: 1, 2, 3, 7 are (1, 3), (7, 1)."""
    spans: list[tuple[int, int]] = []
    for offset in offsets:
        if spans and spans[-1][0] + spans[-1][1] == offset:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((offset, 1))
    return tuple(spans)


def offsets_of(spans: Spans) -> Iterator[int]:
    for first, count in spans:
        yield from range(first, first + count)


def count_of(spans: Spans) -> int:
    return sum(count for _, count in spans)


def to_line(event: Event) -> str:
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return json.dumps({"kind": type(event).__name__, **fields}, separators=(",", ":"))


def from_line(line: str) -> Event:
    """Raises ValueError naming what is wrong with the line."""
    fields = json.loads(line)
    if not isinstance(fields, dict) or fields.get("kind") not in Event.kinds:
        raise ValueError(f"no event of a known kind: {line[:80]!r}")
    kind = Event.kinds[fields.pop("kind")]
    for name in ("values", "spans"):
        if name in fields:
            fields[name] = tuple(tuple(item) if isinstance(item, list) else item for item in fields[name])
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from error


def read_history(path: Path) -> Iterator[Event]:
    """Raises HistoryError for a line that is none."""
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield from_line(line)
            except ValueError as error:
                raise HistoryError(f"{path}:{number}: {error}") from error


class Recorder:
    """Writes the history of a run as it happens. Used from one event loop."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w")
        self._started = time.monotonic()
        self._next_id = 0
        self.counts: dict[str, int] = {}

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def write(self, event: Event) -> None:
        """Appends `event`, with the time it has now."""
        at_ms = int((time.monotonic() - self._started) * 1000)
        self._file.write(to_line(dataclasses.replace(event, at_ms=at_ms)) + "\n")
        name = type(event).__name__
        self.counts[name] = self.counts.get(name, 0) + 1

    def note(self, process: str, text: str) -> None:
        self.write(Note(process, text))
        self._file.flush()

    def fault(self, event: Fault) -> None:
        self.write(event)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def write_history(path: Path, events: Sequence[Event]) -> None:
    path.write_text("".join(to_line(event) + "\n" for event in events))
