"""Makes the checksums of batches, log files and segments fit what they now cover.

Without this a fuzzer changes one byte and learns that the checksum is right; with it, it reaches every check behind.
Whatever is not recognisable stays as it is.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from shformat.batch_header import BATCH_HEADER_SIZE, BATCH_MAGIC, BODY_AT
from shformat.segment import SEGMENT_FOOTER_SIZE, SEGMENT_HEADER_SIZE
from shformat.segment_index import INDEX_ENTRY_SIZE
from shformat.wal import FRAME_HEADER_SIZE, FRAME_MAGIC, WAL_FILE_HEADER_SIZE, WAL_FILE_HEADER_SIZE_V1

_U32 = struct.Struct("<I")
_SIZE_AT = 28
_FOOTER = struct.Struct("<QII")


def _put_crc(data: bytearray, at: int, start: int, end: int) -> None:
    _U32.pack_into(data, at, zlib.crc32(memoryview(data)[start:end]))


def batch_spans(data: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """(start, end) of back-to-back batches, as far as their sizes can be followed; the last may be cut off."""
    at = 0
    while at + BATCH_HEADER_SIZE <= len(data):
        (size_bytes,) = _U32.unpack_from(data, at + _SIZE_AT)
        end = min(at + max(size_bytes, BATCH_HEADER_SIZE), len(data))
        yield at, end
        at = end


def repair_batches(data: bytes) -> bytes:
    """Every batch of back-to-back ones."""
    fixed = bytearray(data)
    for at, end in batch_spans(fixed):
        _put_crc(fixed, at + BODY_AT - 4, at + BODY_AT, end)
    return bytes(fixed)


def frame_starts(data: bytes | bytearray) -> Iterator[int]:
    """Where frames of a log file start: after the one before, else wherever the magic is."""
    at = WAL_FILE_HEADER_SIZE_V1
    while (at := data.find(FRAME_MAGIC, at)) >= 0:
        if at + FRAME_HEADER_SIZE > len(data):
            return
        yield at
        size_bytes = frame_size(data, at)
        whole = FRAME_HEADER_SIZE <= size_bytes <= len(data) - at
        at += size_bytes if whole else 4


def frame_size(data: bytes | bytearray, at: int) -> int:
    """As the header of the frame has it, without the bit that says whether it continues a group."""
    (size,) = _U32.unpack_from(data, at + 12)
    return int(size & 0x7FFF_FFFF)


def repair_wal(data: bytes) -> bytes:
    """The file header, every frame, and the batch in every frame."""
    fixed = bytearray(data)
    size_bytes = WAL_FILE_HEADER_SIZE_V1 if fixed[4:6] == b"\1\0" else WAL_FILE_HEADER_SIZE
    if len(fixed) >= size_bytes:
        _put_crc(fixed, size_bytes - 4, 0, size_bytes - 4)
    for at in frame_starts(data):
        batch_at = at + FRAME_HEADER_SIZE
        size_bytes = frame_size(fixed, at)
        end = min(at + max(size_bytes, FRAME_HEADER_SIZE), len(fixed))
        if fixed[batch_at + 20 : batch_at + 24] == BATCH_MAGIC and end - batch_at >= BATCH_HEADER_SIZE:
            _put_crc(fixed, batch_at + BODY_AT - 4, batch_at + BODY_AT, end)
        _put_crc(fixed, at + 8, batch_at, end)
        _put_crc(fixed, at + 4, at + 8, batch_at)
    return bytes(fixed)


def index_entries(data: bytes | bytearray) -> range:
    """Positions of the index entries, by what the footer says; empty where that is outside of the file."""
    footer_at = len(data) - SEGMENT_FOOTER_SIZE
    if footer_at < SEGMENT_HEADER_SIZE:
        return range(0)
    index_at, _, _ = _FOOTER.unpack_from(data, footer_at)
    if not SEGMENT_HEADER_SIZE <= index_at <= footer_at:
        return range(0)
    return range(index_at, footer_at - INDEX_ENTRY_SIZE + 1, INDEX_ENTRY_SIZE)


def repair_segment(data: bytes) -> bytes:
    """Header, blocks, index entries, index and footer."""
    fixed = bytearray(data)
    if len(fixed) < SEGMENT_HEADER_SIZE + SEGMENT_FOOTER_SIZE:
        return data
    entries = index_entries(fixed)
    for at in entries:
        (block_at,) = struct.unpack_from("<Q", fixed, at + 16)
        (size_bytes,) = _U32.unpack_from(fixed, at + 48)
        if block_at + size_bytes <= len(fixed):
            if size_bytes >= BATCH_HEADER_SIZE and block_at >= SEGMENT_HEADER_SIZE and block_at + size_bytes <= at:
                _put_crc(fixed, block_at + BODY_AT - 4, block_at + BODY_AT, block_at + size_bytes)
            _put_crc(fixed, at + 60, block_at, block_at + size_bytes)
    _put_crc(fixed, SEGMENT_HEADER_SIZE - 4, 0, SEGMENT_HEADER_SIZE - 4)
    footer_at = len(fixed) - SEGMENT_FOOTER_SIZE
    if entries:
        _put_crc(fixed, footer_at + 16, entries.start, footer_at)
    _put_crc(fixed, footer_at + 24, footer_at, footer_at + 24)
    return bytes(fixed)
