"""Histories of a system that does everything right: the checker's own tests need them.

A log with epochs, takeovers and unknown outcomes, producers that try once, plain consumers, a group whose members
come and go. Everything random comes from the generator that is given.
"""

import random
from dataclasses import dataclass, field

from tests.faults import history as h

WIDTH_OFFSETS = 1000
STEPS_MAX = 60
MEMBERS = ("m1", "m2", "m3")


@dataclass
class _Partition:
    """One partition's truth. ends: (epoch, start, end) of the epochs that are over."""

    topic: str
    number: int
    records: list[tuple[int, str]] = field(default_factory=list)
    epoch: int = 1
    start: int = 0
    next_offset: int = 0
    ends: list[tuple[int, int, int, int]] = field(default_factory=list)
    committed: int = -1
    owner: str = ""
    owner_position: int = 0

    def append(self, values: tuple[str, ...]) -> h.Spans:
        base = self.next_offset
        self.records += [(base + n, value) for n, value in enumerate(values)]
        self.next_offset += len(values)
        return ((base, len(values)),)

    def change_leader(self, is_takeover: bool) -> None:
        """A takeover begins at the old limit, a move at the old end."""
        limit = self.start + WIDTH_OFFSETS
        self.ends.append((self.epoch, self.start, limit, self.next_offset))
        self.epoch += 1
        self.start = self.next_offset = limit if is_takeover else self.next_offset

    def after(self, offset: int, count: int) -> list[tuple[int, str]]:
        return [record for record in self.records if record[0] >= offset][:count]


class _Model:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.events: list[h.Event] = [h.Topic("t", 2, "wal"), h.Topic("d", 1, "durable")]
        self.partitions = [_Partition("t", 0), _Partition("t", 1), _Partition("d", 0)]
        self.positions = {id(partition): 0 for partition in self.partitions}
        self.operation = 0
        self.values = 0
        self.events += [h.Assigned("plain", item.topic, item.number, 0) for item in self.partitions]

    def next_operation(self) -> int:
        self.operation += 1
        return self.operation

    def produce(self, partition: _Partition) -> None:
        count = self.rng.randrange(1, 5)
        values = tuple(f"v{self.values + n}" for n in range(count))
        self.values += count
        operation = self.next_operation()
        process = self.rng.choice(("p", "q"))
        acks = "durable" if partition.topic == "d" else "wal"
        self.events.append(h.Produce(operation, process, partition.topic, partition.number, values, acks))
        match self.rng.choice(("ok", "ok", "ok", "fail", "written", "not written")):
            case "ok":
                self.events.append(h.Produced(operation, partition.append(values), partition.epoch))
            case "fail":
                self.events.append(h.ProduceFailed(operation, True, "OVERLOADED"))
            case "written":
                partition.append(values)
                self.events.append(h.ProduceFailed(operation, False, "UNAVAILABLE"))
            case _:
                self.events.append(h.ProduceFailed(operation, False, "UNAVAILABLE"))

    def poll(self, partition: _Partition) -> None:
        records = partition.after(self.positions[id(partition)], self.rng.randrange(1, 8))
        if records:
            self.events.append(_polled("plain", "", partition, records))
            self.positions[id(partition)] = records[-1][0] + 1

    def group_step(self, partition: _Partition) -> None:
        """A member polls, commits, or another one takes over where the group has committed."""
        if not partition.owner or self.rng.random() < 0.2:
            self.fetch_committed(partition)
            partition.owner = self.rng.choice([member for member in MEMBERS if member != partition.owner])
            partition.owner_position = max(partition.committed, 0)
        records = partition.after(partition.owner_position, self.rng.randrange(1, 8))
        if not records:
            return
        self.events.append(_polled(partition.owner, "g", partition, records))
        partition.owner_position = records[-1][0] + 1
        if self.rng.random() < 0.7:
            self.commit(partition)

    def commit(self, partition: _Partition) -> None:
        operation = self.next_operation()
        offset = partition.owner_position
        self.events.append(h.Commit(operation, partition.owner, "g", partition.topic, partition.number, offset))
        outcome = self.rng.choice(("ok", "ok", "fail", "unknown"))
        if outcome == "ok" or (outcome == "unknown" and self.rng.random() < 0.5):
            partition.committed = offset
        self.events.append(h.CommitDone(operation, outcome))

    def fetch_committed(self, partition: _Partition) -> None:
        operation = self.next_operation()
        self.events.append(h.FetchCommitted(operation, "any", "g", partition.topic, partition.number))
        self.events.append(h.Committed(operation, partition.committed))

    def step(self) -> None:
        partition = self.rng.choice(self.partitions)
        match self.rng.choice(("produce", "produce", "poll", "group", "leader")):
            case "produce":
                self.produce(partition)
            case "poll":
                self.poll(partition)
            case "group":
                self.group_step(partition)
            case _:
                partition.change_leader(is_takeover=self.rng.random() < 0.5)

    def finish(self) -> None:
        """The end of a run: everyone catches up, everything is read back, listed and registered."""
        for partition in self.partitions:
            while partition.after(self.positions[id(partition)], 1):
                self.poll(partition)
            end = self.positions[id(partition)]
            self.events.append(h.Position("plain", partition.topic, partition.number, end))
            self.fetch_committed(partition)
            for reader in ("query-1", "query-2"):
                spans, values = _columns(partition.records)
                self.events.append(h.ReadBack(reader, partition.topic, partition.number, spans, values))
            self.facts(partition)
        self.events.append(h.End())

    def facts(self, partition: _Partition) -> None:
        ranges = [*partition.ends, (partition.epoch, partition.start, partition.start + WIDTH_OFFSETS, -1)]
        for epoch, start, limit, end in ranges:
            written = partition.next_offset if end < 0 else end
            status = "open" if end < 0 else "settled"
            where = (partition.topic, partition.number)
            self.events.append(h.Range(*where, epoch, start, limit, written, end, status))
            base = start
            while base < written:
                to = min(written, base + self.rng.randrange(1, 10))
                key = f"data/{partition.topic}/{partition.number}/{base}-{epoch}.seg"
                size_bytes = 10 * (to - base)
                self.events.append(h.Segment(key, *where, epoch, base, to, key, 0, size_bytes))
                self.events.append(h.StoredObject(key, size_bytes))
                base = to


def _columns(records: list[tuple[int, str]]) -> tuple[h.Spans, tuple[str, ...]]:
    return h.spans_of(offset for offset, _ in records), tuple(value for _, value in records)


def _polled(process: str, group: str, partition: _Partition, records: list[tuple[int, str]]) -> h.Polled:
    return h.Polled(process, partition.topic, partition.number, *_columns(records), group=group)


def generate(rng: random.Random) -> list[h.Event]:
    """A history without anomalies."""
    model = _Model(rng)
    for _ in range(rng.randrange(STEPS_MAX)):
        model.step()
    model.finish()
    return model.events
