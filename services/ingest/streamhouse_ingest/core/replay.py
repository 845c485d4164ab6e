"""What the files of a write-ahead log amount to: per log its batches and producers, and where damage lies."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from shformat import BatchHeader, ProducerStamp

from streamhouse_ingest.core.buffer import Buffer, WalPosition
from streamhouse_ingest.core.partition_log import LogKey
from streamhouse_ingest.core.producers import BATCHES_REMEMBERED, ProducerState, after_write

# A producer's batch: its stamp, record count, base offset.
_Written = tuple[ProducerStamp, int, int]
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
    certain: frozenset[LogKey] = frozenset()

    def __bool__(self) -> bool:
        return self.hidden or self.torn

    def knows_end(self, key: LogKey) -> bool:
        return not self.hidden or key in self.certain


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


class Replay:
    """Takes the frames of all files in the order they were written.

    A damaged frame whose header is intact leaves a known gap. Damage that hides headers leaves a known gap only where
    a later frame of the same log shows it; of all other logs, those without any frame too, nobody can say any more how
    far they went: `doubt`.
    """

    def __init__(self, buffer_bytes_max: int) -> None:
        self._buffer_bytes_max = buffer_bytes_max
        self.logs: dict[LogKey, ReplayedLog] = {}
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

    def add(self, key: LogKey, base_offset: int, header: BatchHeader, position: WalPosition) -> None:
        """A valid frame. One that overlaps what came before is damage: offsets never change their records."""
        log = self.logs.get(key)
        if log is None:
            log = self._begin(key, base_offset)
        if base_offset < log.end_offset:
            overlap = f"frame at offset {base_offset}, but offsets up to {log.end_offset} were written before"
            self.damaged(position.file, position.at, position.size_bytes, overlap)
            return
        log.hidings_before = self._hidings
        last = log.buffers[-1] if log.buffers else None
        if last is None or base_offset > last.end_offset or last.size_bytes >= self._buffer_bytes_max:
            last = Buffer(base_offset, 0)
            log.buffers.append(last)
        last.append(header.record_count, position, None)
        log.end_offset = last.end_offset
        stamp = header.producer
        if stamp is not None:
            written = log.written.get(stamp.producer_id)
            if written is None:
                written = log.written[stamp.producer_id] = []
            elif len(written) >= _WRITTEN_MAX:
                del written[:-BATCHES_REMEMBERED]
            written.append((stamp, header.record_count, base_offset))

    def damaged(self, file: int, at: int, size_bytes: int, reason: str, *, hides: bool = False) -> None:
        """`hides`: there may have been frames of any log."""
        self.damage.append(Damage(file, at, size_bytes, reason))
        if hides:
            self._hidings += 1

    def torn(self) -> None:
        """The log ends with what a write that a power failure cut off can leave (so can, less likely, damage), or was
        not synced before every ack: what was read of it may be gone, and its offsets must not be used again."""
        self._torn = True

    def lost(self, key: LogKey, base_offset: int, record_count: int) -> None:
        """A damaged frame held these records."""
        log = self.logs.get(key) or self._begin(key, base_offset)
        log.end_offset = max(log.end_offset, base_offset + record_count)
        log.hidings_before = self._hidings

    def _begin(self, key: LogKey, base_offset: int) -> ReplayedLog:
        """The log starts at this frame, as far as the files say."""
        written = self._written.setdefault(key.partition_key, {})
        log = self.logs[key] = ReplayedLog(base_offset, base_offset, written)
        return log


def _state_after(written: Sequence[_Written]) -> ProducerState:
    """Only its last batches say what a producer's state is: worked out once at the end instead of after each frame."""
    state = None
    for stamp, record_count, base_offset in written:
        state = after_write(state, stamp, record_count, base_offset)
    assert state is not None, "a producer that wrote nothing"
    return state
