"""What the files of a write-ahead log amount to: per log its batches and producers, and where damage lies."""

from dataclasses import dataclass, field

from shformat import BatchHeader

from streamhouse_ingest.core.buffer import Buffer, WalPosition
from streamhouse_ingest.core.partition_log import LogKey
from streamhouse_ingest.core.producers import ProducerState, after_write


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a file that are no valid frames, or a whole file (size_bytes 0) that is missing."""

    file: int
    at: int
    size_bytes: int
    reason: str


@dataclass(slots=True)
class ReplayedLog:
    """`end_offset`: up to where the log was written, damaged frames included."""

    first_offset: int
    end_offset: int
    buffers: list[Buffer] = field(default_factory=list)


class Replay:
    """Takes the frames of all files in the order they were written.

    A damaged frame whose header is intact leaves a known gap. Damage that hides its headers leaves a gap only where
    a later frame of the same partition shows it; beyond that nobody can say whose records they were, and all that
    is left is the error in the log and the metric.
    """

    def __init__(self, buffer_bytes_max: int) -> None:
        self._buffer_bytes_max = buffer_bytes_max
        self.logs: dict[LogKey, ReplayedLog] = {}
        self.producers: dict[tuple[bytes, int], dict[int, ProducerState]] = {}
        self.damage: list[Damage] = []

    def add(self, key: LogKey, base_offset: int, header: BatchHeader, position: WalPosition) -> None:
        """A valid frame. One that overlaps what came before is damage: offsets never change their records."""
        log = self.logs.setdefault(key, ReplayedLog(base_offset, base_offset))
        if base_offset < log.end_offset:
            overlap = f"frame at offset {base_offset}, but offsets up to {log.end_offset} were written before"
            self.damaged(position.file, position.at, position.size_bytes, overlap)
            return
        last = log.buffers[-1] if log.buffers else None
        if last is None or base_offset > last.end_offset or last.size_bytes >= self._buffer_bytes_max:
            last = Buffer(base_offset, 0)
            log.buffers.append(last)
        last.append(header.record_count, position, None)
        log.end_offset = last.end_offset
        if header.producer is not None:
            states = self.producers.setdefault(key.partition_key, {})
            stamp = header.producer
            states[stamp.producer_id] = after_write(
                states.get(stamp.producer_id), stamp, header.record_count, base_offset
            )

    def damaged(self, file: int, at: int, size_bytes: int, reason: str) -> None:
        self.damage.append(Damage(file, at, size_bytes, reason))

    def lost(self, key: LogKey, base_offset: int, record_count: int) -> None:
        """A damaged frame held these records."""
        log = self.logs.setdefault(key, ReplayedLog(base_offset, base_offset))
        log.end_offset = max(log.end_offset, base_offset + record_count)
