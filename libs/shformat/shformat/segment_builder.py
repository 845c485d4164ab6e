"""Builds a segment from stamped batches in offset order. Holds all of it in memory; does no I/O.

Owns: the blocks made so far and the pending small batches. Invariants: offsets ascend without overlap; a block never
mixes epochs; a refused batch changes nothing. Small batches are merged into blocks, because a block is the unit that a
reader finds by the index and decompresses: 1 MiB costs one index entry and compresses well. Batches from COPY_BYTES_MIN
on are copied unchanged.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from .batch import check_one_batch, decode_checked, encode_batch
from .batch_header import BATCH_HEADER_SIZE, BatchHeader, Buffer, read_batch_header
from .batches import decode_checked_batches
from .compression import Codec
from .errors import FormatError
from .limits import DEFAULT_LIMITS, MIB, FormatLimits
from .segment import (
    SEGMENT_FOOTER_SIZE,
    SEGMENT_HEADER_SIZE,
    SegmentFooter,
    SegmentHeader,
    SegmentInfo,
    check_identity,
    encode_footer,
    encode_segment_header,
)
from .segment_index import INDEX_ENTRY_SIZE, BlockEntry, SegmentIndex

BLOCK_BYTES_TARGET = MIB

# Copying takes a tenth of what merging does. LZ4 looks back 64 KiB, so batches of this size compress nearly as well
# alone as in a block of 1 MiB, and their index entries are 0.1 % of them (figures: docs/benchmarks.md).
COPY_BYTES_MIN = 64 * 1024

# Merging may add a column that some of the batches did not need (offset gaps, keys, headers): at most 3 bytes for a
# record that takes at least 2. Blocks stay within the limits when the target is a quarter of them.
_MERGE_GROWTH_MAX = 4

# A header takes at least this much of a payload: the lengths of its name and value.
_HEADER_BYTES_MIN = 2


@dataclass(frozen=True, slots=True)
class BuiltSegment:
    """A finished segment: its bytes, in parts to be written in order, and its description."""

    parts: list[bytes]
    info: SegmentInfo


class SegmentBuilder:
    """Takes stamped batches with add(), returns the segment with finish(). For a single use by a single owner.

    epoch is the highest epoch that may occur; it becomes the segment's. Batches of different epochs (after a change of
    leader, in compaction) never share a block. Large batches keep the codec of their producer; `codec` is for merged
    blocks and for large batches that are not compressed. Merged blocks carry no producer stamp: deduplication is done
    by the time the batch is acknowledged.
    """

    def __init__(
        self,
        topic_id: bytes,
        partition: int,
        epoch: int,
        *,
        block_bytes_target: int = BLOCK_BYTES_TARGET,
        codec: Codec = Codec.LZ4,
        limits: FormatLimits = DEFAULT_LIMITS,
    ) -> None:
        check_identity(topic_id, partition, epoch)
        bound = min(
            limits.uncompressed_bytes_max // _MERGE_GROWTH_MAX,
            limits.batch_bytes_max // _MERGE_GROWTH_MAX,
            limits.header_count_max * _HEADER_BYTES_MIN,
        )
        if not 1 <= block_bytes_target <= bound:
            raise FormatError(f"block_bytes_target is {block_bytes_target}, must be 1 to {bound}")
        self._topic_id = topic_id
        self._partition = partition
        self._epoch = epoch
        self._block_bytes_target = block_bytes_target
        # With a small target, batches of half its size are copied too: merged, they would fill no block better.
        self._copy_bytes_min = min(COPY_BYTES_MIN, block_bytes_target // 2)
        self._codec = Codec(codec)
        self._limits = limits
        self._blocks: list[bytes] = []
        self._entries: list[BlockEntry] = []
        self._blocks_size_bytes = 0
        self._pending: list[bytes] = []
        self._pending_headers: list[BatchHeader] = []
        self._pending_epoch = 0
        self._pending_bytes = 0
        self._pending_count = 0
        self._end_offset = 0
        self._last_epoch = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the segment so far, the records not yet in a block counted uncompressed."""
        index = (len(self._entries) + bool(self._pending)) * INDEX_ENTRY_SIZE
        frame = SEGMENT_HEADER_SIZE + SEGMENT_FOOTER_SIZE
        return frame + index + self._blocks_size_bytes + self._pending_bytes

    @property
    def end_offset(self) -> int:
        """Offset after the last record added; 0 before the first."""
        return self._end_offset

    def add(self, batch: Buffer) -> BatchHeader:
        """Appends a stamped batch and returns the header; the batch's bytes may be reused afterwards.

        Raises FormatError (and takes nothing) for a damaged batch, offsets that overlap those before, an epoch below
        those before or above the segment's, and beyond the size limits. The columns of a small batch are decoded when
        its block is made, by a later add() or finish(): should a batch with a right CRC be malformed inside
        (validate_batch() refuses such), that call raises and the segment cannot be finished.
        """
        # All checks come first: a refused batch changes nothing.
        header = check_one_batch(batch, self._limits)
        self._check_order(header)
        if header.uncompressed_bytes >= self._copy_bytes_min:
            block = self._as_block(batch, header)
            self._check_room(len(block))
            # The pending batches have the lower offsets.
            self._flush()
            self._append(block)
        else:
            self._check_room(header.uncompressed_bytes)
            self._merge(bytes(batch), header)
        self._end_offset, self._last_epoch = header.end_offset, header.epoch
        return header

    def finish(self) -> BuiltSegment:
        """Returns the segment. Raises FormatError if nothing was added."""
        self._flush()
        if not self._entries:
            raise FormatError("a segment of no batches")
        index = SegmentIndex.of(self._entries)
        header = SegmentHeader(
            topic_id=self._topic_id,
            partition=self._partition,
            codec=self._codec,
            epoch=self._epoch,
            base_offset=self._entries[0].first_offset,
            end_offset=self._end_offset,
            record_count=index.record_count,
        )
        encoded_index = index.encode()
        index_at = SEGMENT_HEADER_SIZE + self._blocks_size_bytes
        footer = SegmentFooter(
            index_at=index_at,
            index_size_bytes=len(encoded_index),
            block_count=len(index),
            index_crc=zlib.crc32(encoded_index),
        )
        parts = [encode_segment_header(header), *self._blocks, encoded_index, encode_footer(footer)]
        size_bytes = sum(map(len, parts))
        # Checked once more, as a merged block may be larger than the sum of its batches.
        self._check_size(size_bytes)
        return BuiltSegment(parts, self._info(header, index, size_bytes))

    def _info(self, header: SegmentHeader, index: SegmentIndex, size_bytes: int) -> SegmentInfo:
        return SegmentInfo(
            topic_id=header.topic_id,
            partition=header.partition,
            epoch=header.epoch,
            base_offset=header.base_offset,
            end_offset=header.end_offset,
            record_count=header.record_count,
            first_timestamp_ms=self._entries[0].first_timestamp_ms,
            max_timestamp_ms=max(entry.max_timestamp_ms for entry in self._entries),
            size_bytes=size_bytes,
            block_count=len(index),
            raw_bytes=index.raw_bytes,
        )

    def _check_order(self, header: BatchHeader) -> None:
        if header.base_offset < self._end_offset:
            raise FormatError(f"batch starts at offset {header.base_offset}, segment ends at {self._end_offset}")
        if not max(self._last_epoch, 1) <= header.epoch <= self._epoch:
            low, high = max(self._last_epoch, 1), self._epoch
            raise FormatError(f"batch epoch is {header.epoch}, must be {low} to {high}", 8)

    def _check_room(self, extra_bytes: int) -> None:
        # Two more entries: the pending block and the new one.
        if len(self._entries) + 2 > self._limits.index_entries_max:
            raise FormatError(f"segment of more than {self._limits.index_entries_max} blocks (index_entries_max)")
        self._check_size(self.size_bytes + INDEX_ENTRY_SIZE + BATCH_HEADER_SIZE + extra_bytes)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._limits.segment_bytes_max:
            bound = self._limits.segment_bytes_max
            raise FormatError(f"segment of {size_bytes} bytes, segment_bytes_max is {bound}")

    def _as_block(self, batch: Buffer, header: BatchHeader) -> bytes:
        """Returns the batch unchanged, or compressed now if the producer did not compress it."""
        # Never decoded to change the codec: one producer's gzip would take the CPU from all others (decision 0015).
        if header.codec is not Codec.NONE or self._codec is Codec.NONE:
            return bytes(batch)
        return encode_batch(
            decode_checked(batch, header, self._limits),
            base_offset=header.base_offset,
            epoch=header.epoch,
            codec=self._codec,
            producer=header.producer,
            limits=self._limits,
        )

    def _merge(self, batch: bytes, header: BatchHeader) -> None:
        # A block is a batch, and the header of a batch holds a single epoch.
        if (
            header.epoch != self._pending_epoch
            or self._pending_bytes + header.uncompressed_bytes > self._block_bytes_target
            or self._pending_count + header.record_count > self._limits.record_count_max
        ):
            self._flush()
        self._pending.append(batch)
        self._pending_headers.append(header)
        self._pending_epoch = header.epoch
        self._pending_bytes += header.uncompressed_bytes
        self._pending_count += header.record_count

    def _flush(self) -> None:
        """Makes a block of the pending batches."""
        if not self._pending:
            return
        records = decode_checked_batches(self._pending, self._pending_headers, self._limits)
        base_offset = self._pending_headers[0].base_offset
        self._append(
            encode_batch(
                records,
                base_offset=base_offset,
                epoch=self._pending_epoch,
                codec=self._codec,
                limits=self._limits,
            )
        )
        self._pending, self._pending_headers, self._pending_bytes, self._pending_count = [], [], 0, 0

    def _append(self, block: bytes) -> None:
        at = SEGMENT_HEADER_SIZE + self._blocks_size_bytes
        header = read_batch_header(block, 0, self._limits)
        self._entries.append(BlockEntry.of(header, at, zlib.crc32(block)))
        self._blocks.append(block)
        self._blocks_size_bytes += len(block)
