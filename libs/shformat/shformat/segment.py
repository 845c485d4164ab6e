"""The frame of a segment: its header, block index and footer. docs/formats/segment.md draws them.

    header (64) | block | block | ... | index (64 per block) | footer (32)

Owns: those bytes and what must agree between them. Does not own: building (segment_builder.py), fetching
byte ranges (segment_reader.py), the blocks themselves (record batches, batch.py).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batch_header import BATCH_HEADER_SIZE, Buffer
from .compression import Codec
from .errors import FormatError
from .limits import DEFAULT_LIMITS, INT64_MAX, UINT32_MAX, FormatLimits
from .segment_index import INDEX_ENTRY, INDEX_ENTRY_SIZE, SegmentIndex

SEGMENT_MAGIC = b"STRM"
SEGMENT_VERSION = 1

# magic, version, codec, flags, topic id, partition, epoch, base offset, end offset, record count | crc
_HEADER_BODY = struct.Struct("<4sHBB16sIQqqQ")
_HEADER = struct.Struct("<4sHBB16sIQqqQI")
SEGMENT_HEADER_SIZE = 64
assert _HEADER.size == SEGMENT_HEADER_SIZE == _HEADER_BODY.size + 4

# Readers begin at the end of a segment, so the footer has a version and a magic of its own.
# index position, index size, block count, index crc, version, flags | footer crc, magic
_FOOTER_BODY = struct.Struct("<QIIIHH")
_FOOTER = struct.Struct("<QIIIHHI4s")
SEGMENT_FOOTER_SIZE = 32
assert _FOOTER.size == SEGMENT_FOOTER_SIZE == _FOOTER_BODY.size + 8

SEGMENT_BYTES_MIN = SEGMENT_HEADER_SIZE + BATCH_HEADER_SIZE + INDEX_ENTRY_SIZE + SEGMENT_FOOTER_SIZE

_NIL = bytes(16)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    """Topic, partition and offsets [base_offset, end_offset) of a segment. No block has a higher epoch than the
    segment."""

    topic_id: bytes
    partition: int
    codec: Codec
    epoch: int
    base_offset: int
    end_offset: int
    record_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentFooter:
    """Position of the index (bytes from the start of the segment) and its checksum."""

    index_at: int
    index_size_bytes: int
    block_count: int
    index_crc: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentInfo:
    """A finished segment, as the registry keeps it. raw_bytes: uncompressed payload bytes of its blocks."""

    topic_id: bytes
    partition: int
    epoch: int
    base_offset: int
    end_offset: int
    record_count: int
    first_timestamp_ms: int
    max_timestamp_ms: int
    size_bytes: int
    block_count: int
    raw_bytes: int


# ---- header


def encode_segment_header(header: SegmentHeader) -> bytes:
    """Returns the SEGMENT_HEADER_SIZE bytes of a header. Raises FormatError for a field out of range."""
    _check_header(header)
    body = _HEADER_BODY.pack(
        SEGMENT_MAGIC,
        SEGMENT_VERSION,
        header.codec,
        0,
        header.topic_id,
        header.partition,
        header.epoch,
        header.base_offset,
        header.end_offset,
        header.record_count,
    )
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode_segment_header(buffer: Buffer) -> SegmentHeader:
    """Returns the header at the start of `buffer`. Raises FormatError."""
    if len(buffer) < SEGMENT_HEADER_SIZE:
        raise FormatError(f"segment header: {len(buffer)} of {SEGMENT_HEADER_SIZE} bytes")
    magic, version, codec_id, flags, topic_id, partition, epoch, base, end, count, crc = _HEADER.unpack_from(buffer)
    if magic != SEGMENT_MAGIC:
        raise FormatError(f"segment magic is {magic!r}, expected {SEGMENT_MAGIC!r}")
    if version != SEGMENT_VERSION:
        raise FormatError(f"segment version is {version}, this reader knows {SEGMENT_VERSION}", 4)
    computed = zlib.crc32(memoryview(buffer)[: _HEADER_BODY.size])
    if computed != crc:
        raise FormatError(f"segment header CRC is {computed:#010x}, the header says {crc:#010x}", 60)
    if flags:
        raise FormatError(f"segment flags are {flags:#04x}, must be 0", 7)
    if codec_id not in set(Codec):
        raise FormatError(f"segment codec is {codec_id}, this reader knows {sorted(Codec)}", 6)
    header = SegmentHeader(
        topic_id=topic_id,
        partition=partition,
        codec=Codec(codec_id),
        epoch=epoch,
        base_offset=base,
        end_offset=end,
        record_count=count,
    )
    _check_header(header)
    return header


def _check_header(header: SegmentHeader) -> None:
    check_identity(header.topic_id, header.partition, header.epoch)
    if not 0 <= header.base_offset < header.end_offset <= INT64_MAX:
        raise FormatError(f"segment offsets are {header.base_offset} to {header.end_offset}", 36)
    span = header.end_offset - header.base_offset
    if not 1 <= header.record_count <= span:
        raise FormatError(f"segment record count is {header.record_count} over {span} offsets", 52)


def check_identity(topic_id: bytes, partition: int, epoch: int) -> None:
    """Refuses with FormatError a topic_id that is nil or not 16 bytes, a partition outside u32, an epoch outside 1
    to 2**63-1."""
    if len(topic_id) != len(_NIL) or topic_id == _NIL:
        raise FormatError(f"segment topic id is {topic_id!r}, must be 16 bytes, not all zero", 8)
    if not 0 <= partition <= UINT32_MAX:
        raise FormatError(f"segment partition is {partition}, must be 0 to {UINT32_MAX}", 24)
    if not 1 <= epoch <= INT64_MAX:
        raise FormatError(f"segment epoch is {epoch}, must be 1 to {INT64_MAX}", 28)


# ---- footer


def encode_footer(footer: SegmentFooter) -> bytes:
    """Returns the SEGMENT_FOOTER_SIZE bytes of a footer."""
    body = _FOOTER_BODY.pack(
        footer.index_at, footer.index_size_bytes, footer.block_count, footer.index_crc, SEGMENT_VERSION, 0
    )
    return body + zlib.crc32(body).to_bytes(4, "little") + SEGMENT_MAGIC


def size_by_footer(buffer: Buffer) -> int:
    """Returns the size of the whole segment according to its footer, which is not checked."""
    index_at, index_size_bytes, *_ = _FOOTER.unpack_from(buffer)
    return int(index_at + index_size_bytes + SEGMENT_FOOTER_SIZE)


def decode_footer(buffer: Buffer, segment_size_bytes: int, limits: FormatLimits = DEFAULT_LIMITS) -> SegmentFooter:
    """Returns the footer from the last SEGMENT_FOOTER_SIZE bytes of `buffer`, which ends with the segment.

    Raises FormatError; its positions count from the start of the segment.
    """
    at = segment_size_bytes - SEGMENT_FOOTER_SIZE
    if len(buffer) < SEGMENT_FOOTER_SIZE:
        raise FormatError(f"segment footer: {len(buffer)} of {SEGMENT_FOOTER_SIZE} bytes", max(at, 0))
    view = memoryview(buffer)[len(buffer) - SEGMENT_FOOTER_SIZE :]
    index_at, index_size, block_count, index_crc, version, flags, crc, magic = _FOOTER.unpack(view)
    if magic != SEGMENT_MAGIC:
        raise FormatError(f"segment ends in {magic!r}, expected {SEGMENT_MAGIC!r}", at + 28)
    computed = zlib.crc32(view[: _FOOTER_BODY.size])
    if computed != crc:
        raise FormatError(f"segment footer CRC is {computed:#010x}, the footer says {crc:#010x}", at + 24)
    if version != SEGMENT_VERSION or flags:
        raise FormatError(f"segment footer version {version}, flags {flags:#06x} are unknown", at + 20)
    if not 1 <= block_count <= limits.index_entries_max:
        bound = limits.index_entries_max
        raise FormatError(f"segment has {block_count} blocks, must be 1 to {bound} (index_entries_max)", at + 12)
    if index_size != block_count * INDEX_ENTRY_SIZE:
        raise FormatError(f"index of {index_size} bytes for {block_count} blocks", at + 8)
    if index_at + index_size != at or index_at < SEGMENT_HEADER_SIZE:
        raise FormatError(f"index at {index_at}, {index_size} bytes, does not end at the footer", at)
    return SegmentFooter(index_at=index_at, index_size_bytes=index_size, block_count=block_count, index_crc=index_crc)


# ---- index


def decode_index(buffer: Buffer, footer: SegmentFooter, limits: FormatLimits = DEFAULT_LIMITS) -> SegmentIndex:
    """Returns the index from exactly its bytes.

    Raises FormatError for blocks that do not follow one another in bytes, offsets or epochs, or exceed the limits; its
    positions count from the start of the segment.
    """
    at = footer.index_at
    if len(buffer) != footer.index_size_bytes:
        raise FormatError(f"segment index: {len(buffer)} of {footer.index_size_bytes} bytes", at)
    computed = zlib.crc32(buffer)
    if computed != footer.index_crc:
        raise FormatError(f"segment index CRC is {computed:#010x}, the footer says {footer.index_crc:#010x}", at)
    # A copy: as a view the index would keep all bytes that were read with it in memory.
    blocks = np.frombuffer(bytes(buffer), INDEX_ENTRY)
    _check_blocks(blocks, footer, limits)
    return SegmentIndex(blocks)


def _check_blocks(blocks: NDArray[np.void], footer: SegmentFooter, limits: FormatLimits) -> None:
    sizes, first, end = blocks["size_bytes"], blocks["first_offset"], blocks["end_offset"]
    counts, epochs, starts = blocks["record_count"], blocks["epoch"], blocks["at"]
    # In 64 bits, because the sum of unchecked 32-bit sizes may not fit into 32.
    byte_ends = SEGMENT_HEADER_SIZE + np.cumsum(sizes, dtype=np.uint64)
    expected = np.concatenate([[np.uint64(SEGMENT_HEADER_SIZE)], byte_ends[:-1]])
    spans = end - first  # of two non-negative int64, once the first check below has passed
    faults: list[tuple[str, NDArray[Any]]] = [
        ("offsets", (first < 0) | (end <= first)),
        ("size", (sizes <= BATCH_HEADER_SIZE) | (sizes > limits.batch_bytes_max)),
        ("position", starts != expected),
        ("record count", (counts < 1) | (counts > limits.record_count_max) | (counts > spans)),
        ("epoch", (epochs < 1) | (epochs > INT64_MAX)),
        ("uncompressed size", blocks["uncompressed_bytes"] > limits.uncompressed_bytes_max),
        ("timestamps", blocks["max_timestamp_ms"] < blocks["first_timestamp_ms"]),
        ("offset order", np.concatenate([[False], first[1:] < end[:-1]])),
        ("epoch order", np.concatenate([[False], epochs[1:] < epochs[:-1]])),
    ]
    for name, wrong in faults:
        if wrong.any():
            position = int(wrong.argmax())
            where = footer.index_at + position * INDEX_ENTRY_SIZE
            raise FormatError(f"segment index: {name} of block {position}", where)
    if int(byte_ends[-1]) != footer.index_at:
        raise FormatError(f"blocks end at {int(byte_ends[-1])}, the index is at {footer.index_at}", footer.index_at)


def check_agreement(header: SegmentHeader, index: SegmentIndex) -> None:
    """Refuses a header and an index that contradict each other with FormatError."""
    first, last = index[0], index[len(index) - 1]
    for name, declared, found, at in (
        ("base offset", header.base_offset, first.first_offset, 36),
        ("end offset", header.end_offset, last.end_offset, 44),
        ("record count", header.record_count, index.record_count, 52),
    ):
        if declared != found:
            raise FormatError(f"segment header says {name} {declared}, the index {found}", at)
    if last.epoch > header.epoch:
        raise FormatError(f"segment header says epoch {header.epoch}, the last block has {last.epoch}", 28)
