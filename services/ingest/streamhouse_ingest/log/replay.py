"""Findings of a replay of the write-ahead log: batches and producers of each log, and the damage.

Owns: the findings while files are read. Does not own: the files and their format (adapters/wal_replay.py, shformat).
Invariants: frames are added in the order in which they were written; offsets of a log only grow, and a frame that
overlaps earlier frames is damage.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import add

from shformat import HeaderColumns, ProducerStamp, WalFrame
from shproto.keys import RangeKey

from streamhouse_ingest.log.buffer import Buffer
from streamhouse_ingest.log.producers import (
    BATCHES_REMEMBERED,
    FIRST_EPOCH,
    ProducerState,
    WrittenBatch,
    after_write,
)

# A producer's batch: its stamp, record count, base offset, the epoch it was written in.
_Written = tuple[ProducerStamp, int, int, int]
# A producer's list of batches is cut to the last BATCHES_REMEMBERED at this length instead of at every frame.
_WRITTEN_MAX = 2 * BATCHES_REMEMBERED


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Bytes of a file that are no valid frames, or a whole file (size_bytes 0) that is missing or empty."""

    file: int
    at: int
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReplayGaps:
    """Reasons why offsets beyond the ends found by a replay may have been used. `corrupt_frames`: damage may hide
    frames of any log that is not in `certain`. `torn_tail`: see Replay.torn(). True if there is a reason."""

    corrupt_frames: bool = False
    torn_tail: bool = False
    certain: frozenset[RangeKey] = frozenset()

    def __bool__(self) -> bool:
        return self.corrupt_frames or self.torn_tail

    def knows_end(self, key: RangeKey) -> bool:
        """True if no corrupt frames can hide frames of log `key`: its replayed end may be declared to the
        coordinator. A torn tail does not count."""
        return not self.corrupt_frames or key in self.certain


NO_GAPS = ReplayGaps()


@dataclass(slots=True, kw_only=True)
class ReplayedLog:
    """Findings about a log. `end_offset`: end of its last frame, damaged frames included. `written`: the last batches
    of the partition by producer id (producers outlive epochs). `hidings_before`: number of damages that may hide
    frames, counted up to the last frame of this log."""

    first_offset: int
    end_offset: int
    written: dict[int, list[_Written]]
    hidings_before: int = 0
    buffers: list[Buffer] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameColumns:
    """Frames of a log in a single file, as columns, in the order in which they were written. `ats`, `sizes_bytes`: byte
    positions and sizes of the batches. `producer_ids`: 0 for a batch without a producer."""

    base_offsets: list[int]
    record_counts: list[int]
    ats: list[int]
    sizes_bytes: list[int]
    producer_ids: list[int]
    producer_epochs: list[int]
    base_sequences: list[int]

    def ends(self) -> list[int]:
        """Returns the end offset of each frame."""
        return list(map(add, self.base_offsets, self.record_counts))

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yields (start, stop) of each stretch of frames whose offsets have neither a gap nor a step back."""
        start = 0
        for i, (base_offset, end) in enumerate(zip(self.base_offsets[1:], self.ends(), strict=False), 1):
            if base_offset != end:
                yield start, i
                start = i
        yield start, len(self.base_offsets)


def frames_by_log(frames: Sequence[WalFrame], headers: HeaderColumns) -> Iterator[tuple[RangeKey, FrameColumns]]:
    """Yields the frames as runs of each log; `headers` are the headers of their batches.

    Runs of a partition keep the order in which the frames were written, across its epochs. A log of small batches has
    millions of frames, so from here on steps per frame are left to the interpreter's own loops (map, comprehensions).
    """
    base_offsets = [frame.base_offset for frame in frames]
    ats = [frame.batch_at for frame in frames]
    sizes_bytes = [frame.batch_size_bytes for frame in frames]
    for key, places in _places_of(frames):
        yield (
            key,
            FrameColumns(
                base_offsets=_at(places, base_offsets),
                record_counts=_at(places, headers.record_counts),
                ats=_at(places, ats),
                sizes_bytes=_at(places, sizes_bytes),
                producer_ids=_at(places, headers.producer_ids),
                producer_epochs=_at(places, headers.producer_epochs),
                base_sequences=_at(places, headers.base_sequences),
            ),
        )


def _at(places: Sequence[int], column: Sequence[int]) -> list[int]:
    """Returns the entries of the column at these places."""
    return list(map(column.__getitem__, places))


def _places_of(frames: Sequence[WalFrame]) -> list[tuple[RangeKey, list[int]]]:
    """Returns the indices of the frames of each run; a run ends at a frame of another epoch of the same partition."""
    found: list[tuple[RangeKey, list[int]]] = []
    growing: dict[tuple[bytes, int, int], list[int]] = {}
    latest: dict[tuple[bytes, int], RangeKey] = {}
    for place, frame in enumerate(frames):
        places = growing.get(frame[:3])
        if places is None:
            key = RangeKey(*frame[:3])
            growing.pop(latest.get(key.partition_key, key), None)
            latest[key.partition_key] = key
            places = growing[key] = []
            found.append((key, places))
        places.append(place)
    return found


class Replay:
    """Collects the frames of all files, in the order in which they were written.

    A damaged frame with an intact header leaves a known gap. Damage that hides headers leaves a known gap only if a
    later frame of the same log shows it; the ends of all other logs, including logs without any frame, are unknown:
    `gaps`.
    """

    def __init__(self, buffer_bytes_max: int) -> None:
        self._buffer_bytes_max = buffer_bytes_max
        self.logs: dict[RangeKey, ReplayedLog] = {}
        self._written: dict[tuple[bytes, int], dict[int, list[_Written]]] = {}
        self.damage: list[Damage] = []
        self._hidings = 0  # number of damages that may hide frames of any log
        self._torn = False

    @property
    def gaps(self) -> ReplayGaps:
        """Uncertainty about the ends of the ranges in this write-ahead log."""
        # A frame behind all damage is the proof that the end found is the true end of its log.
        certain = frozenset(key for key, log in self.logs.items() if log.hidings_before == self._hidings)
        return ReplayGaps(self._hidings > 0, self._torn, certain)

    @property
    def producers(self) -> dict[tuple[bytes, int], dict[int, ProducerState]]:
        """States by partition and producer id, after the frames added so far."""
        return {
            key: {producer_id: _state_after(batches) for producer_id, batches in written.items()}
            for key, written in self._written.items()
            if written
        }

    def add(self, key: RangeKey, file: int, frames: FrameColumns) -> None:
        """Adds valid frames. A frame that overlaps earlier offsets is damage: the record at an offset never changes."""
        log = self.logs.get(key) or self._begin(key, frames.base_offsets[0])
        for start, stop in frames.pieces():
            kept = bisect_left(frames.base_offsets, log.end_offset, start, stop)
            for i in range(start, kept):
                overlap = (
                    f"frame at offset {frames.base_offsets[i]}, but offsets up to {log.end_offset} were written before"
                )
                self.damaged(file, frames.ats[i], frames.sizes_bytes[i], overlap)
            if kept < stop:
                # A frame behind damage shows that the log went on: what the damage hid before it is a known gap, not an
                # unknown end.
                log.hidings_before = self._hidings
                self._append(log, key.epoch, file, frames, kept, stop)
                _note_written(log.written, key.epoch, frames, kept, stop)

    def _append(self, log: ReplayedLog, epoch: int, file: int, frames: FrameColumns, start: int, stop: int) -> None:
        """Appends frames `start` to `stop`, which have no gap, to the last buffer; begins a buffer after a gap and
        after a full buffer."""
        while start < stop:
            last = log.buffers[-1] if log.buffers else None
            if (
                last is None
                or frames.base_offsets[start] > last.end_offset
                or last.size_bytes >= self._buffer_bytes_max
            ):
                last = Buffer(frames.base_offsets[start], 0)
                log.buffers.append(last)
            # Cut at the size at which buffers are sealed: each becomes a segment, which a segmenter builds in memory.
            sizes_before = list(accumulate(frames.sizes_bytes[start:stop], initial=last.size_bytes))
            taken = slice(start, start + bisect_left(sizes_before, self._buffer_bytes_max, 0, stop - start))
            last.extend(frames.record_counts[taken], file, frames.ats[taken], frames.sizes_bytes[taken])
            if max(frames.producer_epochs[taken]) > FIRST_EPOCH:
                last.last_batches |= _last_batches(epoch, frames, taken.start, taken.stop)
            log.end_offset, start = last.end_offset, taken.stop

    def damaged(self, file: int, at: int, size_bytes: int, reason: str, *, hides: bool = False) -> None:
        """Adds damage. `hides`: the damaged bytes may have held frames of any log."""
        self.damage.append(Damage(file=file, at=at, size_bytes=size_bytes, reason=reason))
        if hides:
            self._hidings += 1

    def torn(self) -> None:
        """Notes a torn tail: records that were read may be gone, and their offsets must not be used again.

        Either the end of the log looks like a write cut off by a power failure (damage could look the same, less
        likely), or the log was not synced before every ack.
        """
        self._torn = True

    def lost(self, key: RangeKey, base_offset: int, record_count: int) -> None:
        """Notes that a damaged frame held these records: the log ends behind them, or has a gap."""
        log = self.logs.get(key) or self._begin(key, base_offset)
        log.end_offset = max(log.end_offset, base_offset + record_count)
        log.hidings_before = self._hidings

    def _begin(self, key: RangeKey, base_offset: int) -> ReplayedLog:
        """Returns a new log that starts at `base_offset`; the coordinator knows the real start."""
        written = self._written.setdefault(key.partition_key, {})
        log = self.logs[key] = ReplayedLog(first_offset=base_offset, end_offset=base_offset, written=written)
        return log


def _note_written(
    producers: dict[int, list[_Written]], epoch: int, frames: FrameColumns, start: int, stop: int
) -> None:
    """Adds frames `start` to `stop` to the batches of their producers; skips frames without a producer."""
    if frames.producer_ids[start:stop].count(frames.producer_ids[start]) == stop - start:
        start = max(start, stop - BATCHES_REMEMBERED)  # earlier batches of the same producer would be forgotten anyway
    for i in range(start, stop):
        producer_id = frames.producer_ids[i]
        if producer_id:
            written = producers.setdefault(producer_id, [])
            # Bounded while the log is read: a producer may have millions of batches in it, and the last ones decide.
            if len(written) >= _WRITTEN_MAX:
                del written[:-BATCHES_REMEMBERED]
            stamp = ProducerStamp(producer_id, frames.producer_epochs[i], frames.base_sequences[i])
            written.append((stamp, frames.record_counts[i], frames.base_offsets[i], epoch))


def _last_batches(epoch: int, frames: FrameColumns, start: int, stop: int) -> dict[int, ProducerState]:
    """Returns the last batch of each producer that fences among frames `start` to `stop`, as its state."""
    last = dict(zip(frames.producer_ids[start:stop], range(start, stop), strict=True))
    return {
        producer_id: ProducerState(
            frames.producer_epochs[i],
            (WrittenBatch(frames.base_sequences[i], frames.record_counts[i], frames.base_offsets[i], epoch),),
        )
        for producer_id, i in last.items()
        if frames.producer_epochs[i] > FIRST_EPOCH
    }


def _state_after(written: Sequence[_Written]) -> ProducerState:
    """Returns the state after these batches. Only the last batches of a producer decide its state, so the state is
    computed once at the end instead of after each frame."""
    state = None
    for batch in written:
        state = after_write(state, *batch)
    assert state is not None, "a producer that wrote nothing"
    return state
