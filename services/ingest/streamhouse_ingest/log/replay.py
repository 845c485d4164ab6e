"""What the files of a write-ahead log amount to: per log its batches and producers, and where damage lies."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import add

from shformat import HeaderColumns, ProducerStamp, WalFrame
from shproto.keys import RangeKey

from streamhouse_ingest.log.buffer import Buffer
from streamhouse_ingest.log.producers import BATCHES_REMEMBERED, ProducerState, after_write

# A producer's batch: its stamp, record count, base offset, the epoch it was written in.
_Written = tuple[ProducerStamp, int, int, int]
# A producer's batches are cut down to those that count once there are this many: not at every frame.
_WRITTEN_MAX = 2 * BATCHES_REMEMBERED


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a file that are no valid frames, or a whole file (size_bytes 0) that is missing."""

    file: int
    at: int
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why offsets beyond the ends that a replay found may have been used. `hidden`: damage hides frames, of any log
    that is not `certain`. `torn`: see Replay.torn()."""

    hidden: bool = False
    torn: bool = False
    certain: frozenset[RangeKey] = frozenset()

    def __bool__(self) -> bool:
        return self.hidden or self.torn

    def knows_end(self, key: RangeKey) -> bool:
        return not self.hidden or key in self.certain


NO_DOUBT = Doubt()


@dataclass(slots=True)
class ReplayedLog:
    """`end_offset`: up to where the log was written, damaged frames included. `written`: by producer id the last
    batches of the partition (producers outlive epochs). `hidings_before`: how often damage had hidden frames before the
    last frame of this log."""

    first_offset: int
    end_offset: int
    written: dict[int, list[_Written]]
    hidings_before: int = 0
    buffers: list[Buffer] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """Frames of one log in one file, in the order they were written, as columns. `ats`, `sizes_bytes`: of the batches.
    `producer_ids`: 0 for none."""

    base_offsets: list[int]
    record_counts: list[int]
    ats: list[int]
    sizes_bytes: list[int]
    producer_ids: list[int]
    producer_epochs: list[int]
    base_sequences: list[int]

    def ends(self) -> list[int]:
        """Where each frame's offsets end."""
        return list(map(add, self.base_offsets, self.record_counts))

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the frames between two gaps, or steps back, in the offsets."""
        start = 0
        for i, (base_offset, end) in enumerate(zip(self.base_offsets[1:], self.ends(), strict=False), 1):
            if base_offset != end:
                yield start, i
                start = i
        yield start, len(self.base_offsets)


def runs_of(frames: Sequence[WalFrame], headers: HeaderColumns) -> Iterator[tuple[RangeKey, Run]]:
    """The frames of each log, `headers` being their batches'; those of a partition in the order they were written,
    whatever its epochs. What takes a step per frame is left to the interpreter's own loops from here on: a log of small
    batches has millions of them."""
    base_offsets = [frame.base_offset for frame in frames]
    ats = [frame.batch_at for frame in frames]
    sizes_bytes = [frame.batch_size_bytes for frame in frames]
    columns = (base_offsets, headers.record_counts, ats, sizes_bytes, *headers[1:])
    for key, places in _places_of(frames):
        yield key, Run(*(list(map(column.__getitem__, places)) for column in columns))


def _places_of(frames: Sequence[WalFrame]) -> list[tuple[RangeKey, list[int]]]:
    """Which of the frames follow each other in a log, until there is one of another epoch of its partition."""
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
    """Takes the frames of all files in the order they were written.

    A damaged frame whose header is intact leaves a known gap. Damage that hides headers leaves a known gap only where
    a later frame of the same log shows it; of all other logs, those without any frame too, nobody can say any more how
    far they went: `doubt`.
    """

    def __init__(self, buffer_bytes_max: int) -> None:
        self._buffer_bytes_max = buffer_bytes_max
        self.logs: dict[RangeKey, ReplayedLog] = {}
        self._written: dict[tuple[bytes, int], dict[int, list[_Written]]] = {}
        self.damage: list[Damage] = []
        self._hidings = 0  # how often damage may have hidden frames of any log
        self._torn = False

    @property
    def doubt(self) -> Doubt:
        """What cannot be said of the ends of this log's ranges."""
        certain = frozenset(key for key, log in self.logs.items() if log.hidings_before == self._hidings)
        return Doubt(self._hidings > 0, self._torn, certain)

    @property
    def producers(self) -> dict[tuple[bytes, int], dict[int, ProducerState]]:
        """By partition and producer id, after the frames so far."""
        return {
            key: {producer_id: _state_after(batches) for producer_id, batches in written.items()}
            for key, written in self._written.items()
            if written
        }

    def add(self, key: RangeKey, file: int, run: Run) -> None:
        """Valid frames. One that overlaps what came before is damage: offsets never change their records."""
        log = self.logs.get(key) or self._begin(key, run.base_offsets[0])
        for start, stop in run.pieces():
            kept = bisect_left(run.base_offsets, log.end_offset, start, stop)
            for i in range(start, kept):
                overlap = (
                    f"frame at offset {run.base_offsets[i]}, but offsets up to {log.end_offset} were written before"
                )
                self.damaged(file, run.ats[i], run.sizes_bytes[i], overlap)
            if kept < stop:
                log.hidings_before = self._hidings
                self._append(log, file, run, kept, stop)
                _note_written(log.written, key.epoch, run, kept, stop)

    def _append(self, log: ReplayedLog, file: int, run: Run, start: int, stop: int) -> None:
        """Frames start to stop of the run, without a gap between them; a buffer takes them until it is full."""
        while start < stop:
            last = log.buffers[-1] if log.buffers else None
            if last is None or run.base_offsets[start] > last.end_offset or last.size_bytes >= self._buffer_bytes_max:
                last = Buffer(run.base_offsets[start], 0)
                log.buffers.append(last)
            sizes_before = list(accumulate(run.sizes_bytes[start:stop], initial=last.size_bytes))
            taken = slice(start, start + bisect_left(sizes_before, self._buffer_bytes_max, 0, stop - start))
            last.extend(run.record_counts[taken], file, run.ats[taken], run.sizes_bytes[taken])
            log.end_offset, start = last.end_offset, taken.stop

    def damaged(self, file: int, at: int, size_bytes: int, reason: str, *, hides: bool = False) -> None:
        """`hides`: there may have been frames of any log."""
        self.damage.append(Damage(file, at, size_bytes, reason))
        if hides:
            self._hidings += 1

    def torn(self) -> None:
        """The log ends with what a write that a power failure cut off can leave (so can, less likely, damage), or was
        not synced before every ack: what was read of it may be gone, and its offsets must not be used again."""
        self._torn = True

    def lost(self, key: RangeKey, base_offset: int, record_count: int) -> None:
        """A damaged frame held these records."""
        log = self.logs.get(key) or self._begin(key, base_offset)
        log.end_offset = max(log.end_offset, base_offset + record_count)
        log.hidings_before = self._hidings

    def _begin(self, key: RangeKey, base_offset: int) -> ReplayedLog:
        """The log starts at this frame, as far as the files say."""
        written = self._written.setdefault(key.partition_key, {})
        log = self.logs[key] = ReplayedLog(base_offset, base_offset, written)
        return log


def _note_written(producers: dict[int, list[_Written]], epoch: int, run: Run, start: int, stop: int) -> None:
    """Frames start to stop were written by their producers, if they have one."""
    if run.producer_ids[start:stop].count(run.producer_ids[start]) == stop - start:
        start = max(start, stop - BATCHES_REMEMBERED)  # those before say nothing any more
    for i in range(start, stop):
        producer_id = run.producer_ids[i]
        if producer_id:
            written = producers.setdefault(producer_id, [])
            if len(written) >= _WRITTEN_MAX:
                del written[:-BATCHES_REMEMBERED]
            stamp = ProducerStamp(producer_id, run.producer_epochs[i], run.base_sequences[i])
            written.append((stamp, run.record_counts[i], run.base_offsets[i], epoch))


def _state_after(written: Sequence[_Written]) -> ProducerState:
    """Only its last batches say what a producer's state is: worked out once at the end instead of after each frame."""
    state = None
    for batch in written:
        state = after_write(state, *batch)
    assert state is not None, "a producer that wrote nothing"
    return state
