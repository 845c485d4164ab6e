"""The log of a single epoch of a partition, as far as this agent holds it.

Owns: the next offset, the permission to append, the buffers (open, sealed, registered), the fences of producers in
this range. Does not own: disk, network, time, memory accounting (logs.py).
Invariants: appends are decided on a draft (draft.py) and change the log only in apply(), after the write-ahead log has
them. Buffers ascend and never overlap. next_offset only goes back when the range is settled below it.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

from shformat import ProducerStamp
from shproto.keys import RangeKey

from streamhouse_ingest.log.buffer import Buffer, WalPosition
from streamhouse_ingest.log.fences import Fence
from streamhouse_ingest.log.producers import FIRST_EPOCH, REPORTED, ProducerState, ProducerTable, after_write


class OffsetSpan(NamedTuple):
    """Offsets [base_offset, end_offset)."""

    base_offset: int
    end_offset: int


@dataclass(frozen=True, slots=True)
class BatchAppended:
    """A batch was appended at offsets [base_offset, base_offset + record_count)."""

    base_offset: int
    record_count: int
    stamp: ProducerStamp | None


class PartitionLog:
    """The range [start_offset, limit_offset) belongs to this epoch; batches cover it up to next_offset.

    Buffers, ascending: `tail` (registered, kept for readers), `sealed`, `open`. A gap between buffers above
    registered_end is damage: those records were acknowledged and cannot be read any more.
    """

    def __init__(
        self, key: RangeKey, topic: str, start_offset: int, limit_offset: int, producers: ProducerTable
    ) -> None:
        self.key = key
        self.topic = topic
        self.start_offset = start_offset
        self.limit_offset = limit_offset
        self._width = limit_offset - start_offset
        self.registered_end = start_offset
        self.settled_end: int | None = None
        self.next_offset = start_offset
        self.leading = False
        self.min_acks = 0
        self.producers = producers
        self.fences: dict[int, Fence] = {}
        self._fenced_before: set[int] = set()  # producers whose state in the table is certain
        self._reported: dict[int, ProducerState] = {}  # of producers that fence, at the registered end of a replay
        self.tail: deque[Buffer] = deque()
        self.sealed: deque[Buffer] = deque()
        self.open: Buffer | None = None
        self._damaged: list[OffsetSpan] = []

    # ---- appending

    def apply(self, event: BatchAppended, position: WalPosition, batch: bytes | None, now_ms: int) -> None:
        """Adds a batch that the write-ahead log has at `position` to the open buffer. `batch` is None if its bytes stay
        on disk only."""
        assert event.base_offset == self.next_offset, "gap, or applied twice"
        if self.open is None:
            self.open = Buffer(self.next_offset, now_ms)
        self.open.append(event.record_count, position, batch)
        self.next_offset += event.record_count
        if event.stamp is not None:
            producer_id = event.stamp.producer_id
            state = self.producers.get(producer_id)
            # Computed from the table, not taken from the draft: the table has changed only by groups that were written.
            written = after_write(state, event.stamp, event.record_count, event.base_offset, self.key.epoch)
            self.producers.put(producer_id, written)

    def restore(self, buffers: Iterable[Buffer], end_offset: int) -> None:
        """Adds the buffers found by a replay, in ascending order, as sealed. `end_offset` is the end of the last frame
        of the log, damaged frames included."""
        self.sealed.extend(buffers)
        self.next_offset = end_offset

    # ---- fences

    def raise_fence(self, producer_id: int, producer_epoch: int) -> int:
        """Refuses older epochs of the producer from now on, and its batches until the fence is open, unless it is open
        already. Returns the newest epoch that has fenced here, which may be newer."""
        fence = self.fences.get(producer_id)
        if fence is None or fence.producer_epoch < producer_epoch:
            fence = self.fences[producer_id] = Fence(producer_epoch, is_open=False)
        return fence.producer_epoch

    def know(self, producer_id: int, state: ProducerState | None) -> None:
        """Sets all that older ranges know of a fenced producer, at its first fence in this range; later ones change
        nothing: from then on the range knows by itself."""
        if producer_id not in self._fenced_before:
            self._fenced_before.add(producer_id)
            self.producers.know(producer_id, state)

    def open_fence(self, producer_id: int) -> None:
        """Takes batches of the fenced epoch from now on."""
        self.fences[producer_id] = self.fences[producer_id]._replace(is_open=True)

    @property
    def has_fencing(self) -> bool:
        """True if producers that fence may have written to this range."""
        return bool(self.fences or self._reported) or any(buffer.last_batches for buffer in self.sealed)

    # ---- what the coordinator says

    def note_reported(self, states: Mapping[int, ProducerState]) -> None:
        """Notes the coordinator's states of producers, those that fence, at the registered end of this range or
        before."""
        self._reported = {key: state for key, state in states.items() if state.producer_epoch > FIRST_EPOCH}

    def name(self, topic: str, start_offset: int, min_acks: int) -> None:
        """Sets topic name, start and ack level as the coordinator knows them. A replay knows neither name nor ack level
        and assumes that the log starts at the first batch found."""
        self.topic = topic
        self.min_acks = min_acks
        if start_offset != self.start_offset:
            self.registered_end = start_offset
            self.start_offset = start_offset
            self.next_offset = max(self.next_offset, start_offset)

    def extend(self, limit_offset: int) -> None:
        """Extends the range to `limit_offset`; ignores a lower limit, because limits only grow."""
        if limit_offset > self.limit_offset:
            self._width = limit_offset - max(self.limit_offset, self.start_offset)
            self.limit_offset = limit_offset

    @property
    def runs_low(self) -> bool:
        """True if less than a quarter of the last extension is left: time to request another."""
        # Early: while PostgreSQL is away nothing is extended, and writes go on to the end of the range.
        return self.limit_offset - self.next_offset < self._width // 4

    # ---- sealing and registration

    def take_snapshots(self) -> None:
        """Sets the producer snapshots of replayed buffers; called once the coordinator has reported its producers."""
        # The table remembers a producer's last batches, all of which may lie beyond a buffer. If the producer fences,
        # its last one up to the end of the buffer must be there nevertheless: the range may turn out to end there.
        fencing = dict(self._reported)
        for buffer in self.sealed:
            fencing |= buffer.last_batches
            if buffer.snapshot is None:
                buffer.snapshot = self.producers.snapshot(buffer.end_offset, fencing)

    def tail_snapshot(self, *, fencing_only: bool = False) -> bytes:
        """Returns the encoded producer states of this log's unregistered records; `fencing_only`: of producers that
        fence. States from other logs of the replay are left out: their records may have been fenced or lost since."""
        return self.producers.snapshot_of(
            self.key.epoch, self.registered_end, self.next_offset, fencing_only=fencing_only
        )

    def seal(self) -> Buffer | None:
        """Seals the open buffer and returns it; returns None if no buffer is open."""
        buffer, self.open = self.open, None
        if buffer is not None:
            buffer.snapshot = self.producers.snapshot(buffer.end_offset)
            self.sealed.append(buffer)
        return buffer

    def register(self, registered_end: int) -> list[Buffer]:
        """Notes that segments cover everything below `registered_end`. Returns the buffers registered by this call.

        Raises ValueError if `registered_end` is inside a batch: segments consist of whole batches.
        """
        if registered_end <= self.registered_end:
            return []
        self.registered_end = registered_end
        # Raised if the end of the log was lost: offsets that are in segments are never given out again.
        self.next_offset = max(self.next_offset, registered_end)
        if self.open is not None and self.open.base_offset < registered_end:
            self.seal()  # records of the open buffer were registered under an earlier announcement
        registered: list[Buffer] = []
        while self.sealed and self.sealed[0].base_offset < registered_end:
            buffer = self.sealed.popleft()
            if buffer.end_offset > registered_end:
                buffer, rest = self._split(buffer, registered_end)
                self.sealed.appendleft(rest)
            registered.append(buffer)
        self.tail.extend(registered)
        return registered

    def _split(self, buffer: Buffer, offset: int) -> tuple[Buffer, Buffer]:
        if not buffer.is_boundary(offset):
            raise ValueError(f"{self.describe()}: offset {offset} is inside a batch")
        return buffer.split(offset)

    def settle(self, end_offset: int) -> list[Buffer]:
        """Settles the range at `end_offset`: stops leading and fences all records beyond, which can never be
        registered. Returns their buffers."""
        self.leading = False
        self.settled_end = end_offset
        self.seal()
        fenced: list[Buffer] = []
        while self.sealed and self.sealed[-1].end_offset > end_offset:
            buffer = self.sealed.pop()
            if buffer.base_offset < end_offset:
                buffer, beyond = self._split(buffer, end_offset)
                # The next leader answers retries from this snapshot: a batch beyond the end in it would be called a
                # duplicate and be lost.
                buffer.snapshot = self.producers.snapshot(end_offset)
                self.sealed.append(buffer)
                buffer = beyond
            fenced.append(buffer)
        # A retry of a fenced record must be written anew: it is no duplicate.
        end_offset = max(end_offset, self.registered_end)
        self.producers.forget(self.key.epoch, end_offset, self.next_offset)
        self.next_offset = min(self.next_offset, end_offset)
        return fenced

    def forget_unregistered(self) -> None:
        """Forgets the producers' unregistered batches: the range is over and nothing more of it can be registered."""
        self.producers.forget(self.key.epoch, self.registered_end, self.next_offset)

    def cut_out(self, buffer: Buffer, damaged: Collection[WalPosition]) -> list[Buffer]:
        """Removes damaged batches from a sealed buffer and returns the remaining buffers.

        The gaps are lost spans from now on, and a retry of a lost batch is no duplicate.
        """
        left = buffer.cut_out(damaged)
        at = self.sealed.index(buffer)
        del self.sealed[at]
        for part in reversed(left):
            self.sealed.insert(at, part)
        edges = [buffer.base_offset, *chain(*((part.base_offset, part.end_offset) for part in left)), buffer.end_offset]
        for gap in map(OffsetSpan, edges[::2], edges[1::2]):
            if gap.base_offset < gap.end_offset:
                self._damaged.append(gap)
                self._forget_lost(gap)
        # The parts have no snapshot yet, and those of later buffers still name batches that were cut out.
        for later in islice(self.sealed, at, None):
            later.snapshot = self.producers.snapshot(later.end_offset)
        return left

    def forget_lost(self) -> None:
        """Forgets the producers' batches in damaged and lost spans. Called when the registered end is known and the
        coordinator has reported producers: its report may be older than the damage."""
        for span in (*self._damaged, *self.lost_spans()):
            self._forget_lost(span)

    def _forget_lost(self, span: OffsetSpan) -> None:
        """Forgets the batches in `span`, written here or reported: below the end of this range every offset belongs to
        this epoch."""
        self.producers.forget(self.key.epoch, *span, damaged=True)
        self.producers.forget(REPORTED, *span, damaged=True)

    def is_damaged(self, offset: int) -> bool:
        """True if the batch at `offset` was written but damaged before its registration."""
        return any(span.base_offset <= offset < span.end_offset for span in self._damaged)

    def lost_spans(self) -> list[OffsetSpan]:
        """Returns the damaged spans at or above the registered end, in ascending order."""
        spans = []
        end = self.registered_end
        for buffer in chain(self.sealed, () if self.open is None else (self.open,)):
            if buffer.base_offset > end:
                spans.append(OffsetSpan(end, buffer.base_offset))
            end = buffer.end_offset
        if self._expected_end() > end:
            spans.append(OffsetSpan(end, self._expected_end()))
        return spans

    def _expected_end(self) -> int:
        """Returns the offset up to which records must be held."""
        return self.next_offset if self.settled_end is None else max(self.settled_end, self.next_offset)

    # ---- reading

    @property
    def held_from(self) -> int:
        """Lowest offset that can be read here; next_offset if no batch is held."""
        first = next(self._buffers(), None)
        return self.next_offset if first is None else first.base_offset

    @property
    def unregistered_bytes(self) -> int:
        """Size of the batches that no segment covers yet, in memory or only on disk."""
        return sum(buffer.size_bytes for buffer in self.sealed) + (self.open.size_bytes if self.open else 0)

    def read(self, offset: int, end_offset: int, bytes_max: int) -> list[tuple[WalPosition, bytes | None]]:
        """Returns consecutive whole batches from the batch that holds `offset`; none if `offset` is not held.

        Stops before `end_offset`, at a gap, and before `bytes_max` would be exceeded, but not before the first batch.
        """
        picked: list[tuple[WalPosition, bytes | None]] = []
        for buffer in self._buffers():
            if buffer.end_offset <= offset:
                continue
            if buffer.base_offset > offset or offset >= end_offset or (picked and bytes_max <= 0):
                break
            more = buffer.pick(offset, end_offset, bytes_max)
            if picked and more[0][0].size_bytes > bytes_max:
                break
            picked += more
            bytes_max -= sum(position.size_bytes for position, _ in more)
            offset = buffer.end_after(offset, len(more))
            if offset < buffer.end_offset:
                break
        return picked

    def is_boundary(self, offset: int) -> bool:
        """True if a batch begins or ends at `offset`."""
        return any(
            buffer.base_offset <= offset <= buffer.end_offset and buffer.is_boundary(offset)
            for buffer in self._buffers()
        )

    def end_after(self, offset: int, count: int) -> int:
        """Returns the end offset of the `count` batches that read() returned from `offset`. Raises ValueError if fewer
        are held."""
        for buffer in self._buffers():
            if buffer.base_offset <= offset < buffer.end_offset:
                there = buffer.count_from(offset)
                if count <= there:
                    return buffer.end_after(offset, count)
                count, offset = count - there, buffer.end_offset
        raise ValueError(f"{self.describe()}: fewer batches than asked for are held")

    def gap_at(self, offset: int) -> OffsetSpan | None:
        """Returns the damaged span that holds `offset`, None if no span does."""
        return next((span for span in self.lost_spans() if span.base_offset <= offset < span.end_offset), None)

    def _buffers(self) -> Iterator[Buffer]:
        yield from self.tail
        yield from self.sealed
        if self.open is not None:
            yield self.open

    def describe(self) -> str:
        """Returns the log's name for messages: topic, or its id if the name is unknown, partition and epoch."""
        return f"{self.topic or self.key.topic_id.hex()}/{self.key.partition} epoch {self.key.epoch}"
