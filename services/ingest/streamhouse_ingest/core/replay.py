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
    buffers: list[Buffer] = field(default_factory=list)

    @property
    def end_offset(self) -> int:
        return self.buffers[-1].end_offset


class Replay:
    """Takes the frames of all files in the order they were written."""

    def __init__(self, buffer_bytes_max: int) -> None:
        self._buffer_bytes_max = buffer_bytes_max
        self.logs: dict[LogKey, ReplayedLog] = {}
        self.producers: dict[tuple[bytes, int], dict[int, ProducerState]] = {}
        self.damage: list[Damage] = []

    def add(self, key: LogKey, base_offset: int, header: BatchHeader, position: WalPosition) -> None:
        """A valid frame. One that overlaps what came before is damage: offsets never change their records."""
        log = self.logs.setdefault(key, ReplayedLog())
        if log.buffers and base_offset < log.end_offset:
            overlap = f"frame at offset {base_offset}, but offsets up to {log.end_offset} were written before"
            self.damage.append(Damage(position.file, position.at, position.size_bytes, overlap))
            return
        if not log.buffers or base_offset > log.end_offset or log.buffers[-1].size_bytes >= self._buffer_bytes_max:
            log.buffers.append(Buffer(base_offset, 0))
        log.buffers[-1].append(header.record_count, position, None)
        if header.producer is not None:
            states = self.producers.setdefault(key.partition_key, {})
            stamp = header.producer
            states[stamp.producer_id] = after_write(
                states.get(stamp.producer_id), stamp, header.record_count, base_offset
            )

    def damaged(self, file: int, at: int, size_bytes: int, reason: str) -> None:
        self.damage.append(Damage(file, at, size_bytes, reason))
