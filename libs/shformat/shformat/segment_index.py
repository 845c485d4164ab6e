"""The block index of a segment in memory: a row per block. docs/formats/segment.md draws an entry.

Owns: the layout of an entry and finding blocks. Does not own: reading the index from bytes and its rules (segment.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .batch_header import DECODED_RECORD_BYTES, BatchHeader
from .columns import Int64s

INDEX_ENTRY = np.dtype(
    [
        ("first_offset", "<i8"),
        ("end_offset", "<i8"),
        ("at", "<u8"),
        ("first_timestamp_ms", "<i8"),
        ("max_timestamp_ms", "<i8"),
        ("epoch", "<u8"),
        ("size_bytes", "<u4"),
        ("record_count", "<u4"),
        ("uncompressed_bytes", "<u4"),
        ("crc", "<u4"),
    ]
)
INDEX_ENTRY_SIZE = 64
assert INDEX_ENTRY.itemsize == INDEX_ENTRY_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEntry:
    """A block: offsets [first_offset, end_offset), bytes [at, at + size_bytes) from the segment's start. crc covers
    all bytes of the block, base offset and epoch included."""

    first_offset: int
    end_offset: int
    at: int
    first_timestamp_ms: int
    max_timestamp_ms: int
    epoch: int
    size_bytes: int
    record_count: int
    uncompressed_bytes: int
    crc: int

    @property
    def decoded_bytes(self) -> int:
        """Approximate memory of the block's decoded columns, as in its header."""
        return self.uncompressed_bytes + DECODED_RECORD_BYTES * self.record_count

    @classmethod
    def of(cls, header: BatchHeader, at: int, crc: int) -> BlockEntry:
        """Returns the entry of the block with this batch header at position `at`."""
        return cls(
            first_offset=header.base_offset,
            end_offset=header.end_offset,
            at=at,
            first_timestamp_ms=header.first_timestamp_ms,
            max_timestamp_ms=header.max_timestamp_ms,
            epoch=header.epoch,
            size_bytes=header.size_bytes,
            record_count=header.record_count,
            uncompressed_bytes=header.uncompressed_bytes,
            crc=crc,
        )


class SegmentIndex:
    """The blocks of a segment in offset order, as a single array; BlockEntry objects are made on request."""

    __slots__ = ("_blocks", "_ends", "_latest")

    def __init__(self, blocks: NDArray[np.void]) -> None:
        self._blocks = blocks
        # Contiguous copies: a bisect over the strided field would touch a cache line per probe anyway, but
        # searchsorted would copy the whole column on every call.
        self._ends: Int64s = np.ascontiguousarray(blocks["end_offset"])
        # Timestamps need not ascend. Their running maximum does, so a search by time can bisect.
        self._latest: Int64s = np.maximum.accumulate(blocks["max_timestamp_ms"])

    @classmethod
    def of(cls, entries: list[BlockEntry]) -> SegmentIndex:
        """Returns an index of these blocks, in order."""
        rows = [tuple(getattr(entry, name) for name in _FIELDS) for entry in entries]
        return cls(np.array(rows, INDEX_ENTRY))

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, position: int) -> BlockEntry:
        return _entry(self._blocks[position].item())

    def __iter__(self) -> Iterator[BlockEntry]:
        return map(_entry, self._blocks.tolist())

    def find(self, offset: int) -> int:
        """Returns the position of the block that holds `offset`, or of the next block after it; len(self) past the
        end."""
        return int(np.searchsorted(self._ends, offset, side="right"))

    def find_timestamp(self, timestamp_ms: int) -> int:
        """Returns the position of the first block that reaches `timestamp_ms`; len(self) if none does."""
        return int(np.searchsorted(self._latest, timestamp_ms, side="left"))

    @property
    def record_count(self) -> int:
        """Number of records in all blocks."""
        return int(self._blocks["record_count"].sum(dtype=np.int64))

    @property
    def raw_bytes(self) -> int:
        """Uncompressed payload bytes of all blocks."""
        return int(self._blocks["uncompressed_bytes"].sum(dtype=np.int64))

    @property
    def size_bytes(self) -> int:
        """Memory of the index in bytes."""
        return self._blocks.nbytes + self._ends.nbytes + self._latest.nbytes

    def encode(self) -> bytes:
        """Returns the index as bytes, INDEX_ENTRY_SIZE per block."""
        return self._blocks.tobytes()


_FIELDS: tuple[str, ...] = INDEX_ENTRY.names or ()


def _entry(row: tuple[int, ...]) -> BlockEntry:
    """Returns a row of the index as an object."""
    return BlockEntry(**dict(zip(_FIELDS, row, strict=True)))
