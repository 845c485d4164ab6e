"""Consecutive batches of a log: the WAL position of each batch, and its bytes while memory allows.

Owns: positions and bytes of its batches. Does not own: the memory limit and its accounting (logs.py), the files.
Invariants: the batches cover [base_offset, end_offset) without a gap. Batches are stored as columns instead of objects:
a batch costs at most 48 bytes besides its own, so that a log full of tiny batches fits in memory.
"""

from array import array
from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import accumulate, islice, repeat
from typing import NamedTuple

from streamhouse_ingest.log.producers import ProducerState

# Cost of a batch in the columns below: four 8-byte numbers and a pointer, rounded up for the spare room that arrays and
# lists keep.
BATCH_OVERHEAD_BYTES = 48


class WalPosition(NamedTuple):
    """Place of a batch in the write-ahead log: file sequence, byte position in that file, size."""

    file: int
    at: int
    size_bytes: int


class Buffer:
    """Batches from base_offset to end_offset. Grows until it is sealed.

    `snapshot`: encoded state of the idempotent producers at end_offset, held from sealing to registration.
    `last_batches`: of a buffer that a replay found, the last batch of each producer that fences."""

    __slots__ = (
        "_ats",
        "_batches",
        "_ends",
        "_files",
        "_sizes",
        "base_offset",
        "end_offset",
        "first_append_ms",
        "last_batches",
        "memory_bytes",
        "size_bytes",
        "snapshot",
    )

    def __init__(self, base_offset: int, first_append_ms: int) -> None:
        self.base_offset = base_offset
        self.end_offset = base_offset
        self.first_append_ms = first_append_ms
        self.size_bytes = 0
        self.memory_bytes = 0  # size of the batches whose bytes are in memory
        self.snapshot: bytes | None = None
        self.last_batches: dict[int, ProducerState] = {}
        self._ends = array("q")
        self._files = array("q")
        self._ats = array("q")
        self._sizes = array("q")
        self._batches: list[bytes | None] = []

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def record_count(self) -> int:
        return self.end_offset - self.base_offset

    @property
    def overhead_bytes(self) -> int:
        """Memory of the columns, besides the batches' own bytes."""
        return len(self._ends) * BATCH_OVERHEAD_BYTES

    def append(self, record_count: int, position: WalPosition, batch: bytes | None) -> None:
        """Appends a batch; `batch` is None if its bytes are not in memory."""
        file, at, size_bytes = position
        self.end_offset += record_count
        self._ends.append(self.end_offset)
        self._files.append(file)
        self._ats.append(at)
        self._sizes.append(size_bytes)
        self._batches.append(batch)
        self.size_bytes += size_bytes
        if batch is not None:
            self.memory_bytes += size_bytes

    def extend(self, record_counts: Sequence[int], file: int, ats: Sequence[int], sizes_bytes: Sequence[int]) -> None:
        """Appends many batches of a single file that are not in memory; the sequences are columns."""
        # By columns: a replay adds millions of small batches.
        self._ends.extend(islice(accumulate(record_counts, initial=self.end_offset), 1, None))
        self._files.extend(repeat(file, len(ats)))
        self._ats.extend(ats)
        self._sizes.extend(sizes_bytes)
        self._batches.extend(repeat(None, len(ats)))
        self.end_offset += sum(record_counts)
        self.size_bytes += sum(sizes_bytes)

    def drop_batches(self) -> int:
        """Drops the batches from memory; the log on disk has them. Returns the number of bytes freed."""
        freed, self.memory_bytes = self.memory_bytes, 0
        if freed:
            self._batches = [None] * len(self._ends)
        return freed

    @property
    def snapshot_bytes(self) -> int:
        """Memory of the producer snapshot; 0 without a snapshot."""
        return len(self.snapshot or b"")

    def drop_snapshot(self) -> int:
        """Drops the snapshot, which is not needed after registration. Returns the number of bytes freed."""
        freed, self.snapshot = self.snapshot_bytes, None
        return freed

    def pick(self, offset: int, end_offset: int, bytes_max: int) -> list[tuple[WalPosition, bytes | None]]:
        """Returns whole batches, position and bytes (None if only on disk), from the batch that holds `offset`.

        Stops before a batch that begins at or beyond `end_offset`, and before `bytes_max` would be exceeded, but not
        before the first batch.
        """
        picked: list[tuple[WalPosition, bytes | None]] = []
        total = 0
        for i in range(bisect_right(self._ends, offset), len(self._ends)):
            if self._base_of(i) >= end_offset or (picked and total + self._sizes[i] > bytes_max):
                break
            picked.append((self._position(i), self._batches[i]))
            total += self._sizes[i]
        return picked

    def count_from(self, offset: int) -> int:
        """Returns the number of batches from the batch that holds `offset` to the end."""
        return len(self._ends) - bisect_right(self._ends, offset)

    def end_after(self, offset: int, count: int) -> int:
        """Returns the end offset of the `count`-th batch, counted from 1 at the batch that holds `offset`."""
        return self._ends[bisect_right(self._ends, offset) + count - 1]

    def is_boundary(self, offset: int) -> bool:
        """True if a batch of this buffer ends at `offset`, or the first batch begins there."""
        if offset in (self.base_offset, self.end_offset):
            return True
        i = bisect_right(self._ends, offset)
        return i > 0 and self._ends[i - 1] == offset

    def split(self, offset: int) -> tuple["Buffer", "Buffer"]:
        """Returns two buffers that meet at `offset`, a batch boundary inside this buffer. The second has the snapshot,
        which is that of the end."""
        assert self.base_offset < offset < self.end_offset and self.is_boundary(offset), "not between two batches"
        at = bisect_right(self._ends, offset)
        head, rest = self._part(0, at), self._part(at, len(self))
        rest.snapshot = self.snapshot
        for producer_id, state in self.last_batches.items():
            part = head if state.batches[-1].base_offset < offset else rest
            part.last_batches[producer_id] = state
        return head, rest

    def cut_out(self, damaged: Collection[WalPosition]) -> list["Buffer"]:
        """Returns the remaining batches as buffers with gaps in place of the damaged batches; no buffer is empty."""
        holes = [i for i in range(len(self)) if self._position(i) in damaged]
        cuts = [(-1, *holes)[n] + 1 for n in range(len(holes) + 1)]
        return [self._part(start, stop) for start, stop in zip(cuts, [*holes, len(self)], strict=True) if start < stop]

    def on_disk_only(self) -> list[WalPosition]:
        """Returns the positions of the batches that are not in memory."""
        return [self._position(i) for i, batch in enumerate(self._batches) if batch is None]

    def holds(self, position: WalPosition) -> bool:
        """True if a batch of this buffer lies at `position`."""
        return any(self._ats[i] == position.at and self._files[i] == position.file for i in range(len(self)))

    def _part(self, start: int, stop: int) -> "Buffer":
        """Returns a buffer of batches `start` to `stop` (numbers, `stop` excluded), without a snapshot."""
        part, span = Buffer(self._base_of(start), self.first_append_ms), slice(start, stop)
        part._ends, part._files = self._ends[span], self._files[span]
        part._ats, part._sizes, part._batches = self._ats[span], self._sizes[span], self._batches[span]
        part.end_offset = part._ends[-1]
        part.size_bytes = sum(part._sizes)
        part.memory_bytes = sum(len(batch) for batch in part._batches if batch is not None)
        return part

    def _position(self, i: int) -> WalPosition:
        return WalPosition(self._files[i], self._ats[i], self._sizes[i])

    def _base_of(self, i: int) -> int:
        return self._ends[i - 1] if i else self.base_offset
