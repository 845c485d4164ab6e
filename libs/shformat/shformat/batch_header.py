"""The fixed header of a record batch: its bytes, and the values its fields may have.

docs/formats/record-batch.md draws it. Owns: the layout and the checks that both directions share. Does not own: the
payload, compression.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Sequence
from enum import IntFlag
from typing import NamedTuple

from .compression import COMPRESSION_RATIO_MAX, Codec
from .errors import FormatError
from .limits import DEFAULT_LIMITS, INT64_MAX, UINT32_MAX, FormatLimits
from .payload import PAYLOAD_BYTES_MIN

Buffer = bytes | bytearray | memoryview | mmap.mmap

BATCH_MAGIC = b"SHRB"
BATCH_VERSION = 1

# Offset and epoch stand before the CRC, outside of it: the leader stamps a checked batch without computing it again.
# The CRC of the frame in the log, and of the index entry in a segment, covers both.
# base offset, epoch | crc | magic, version, codec, flags, size, uncompressed, count, last offset delta,
# first and max timestamp, producer id, base sequence, producer epoch
_STAMP = struct.Struct("<qQ")
_CRC = struct.Struct("<I")
_BODY = struct.Struct("<4sBBHIIIqqqqqI")
_HEADER = struct.Struct("<qQI4sBBHIIIqqqqqI")
BATCH_HEADER_SIZE = 84
STAMP_SIZE = 16
BODY_AT = 20
FIRST_TIMESTAMP_AT = 48
BASE_SEQUENCE_AT = 72
assert _HEADER.size == BATCH_HEADER_SIZE == BODY_AT + _BODY.size
assert _STAMP.size == STAMP_SIZE == BODY_AT - _CRC.size

# Memory of a decoded record beside its bytes: offset, timestamp, end of its key and of its value, 8 bytes each.
DECODED_RECORD_BYTES = 32


class Flag(IntFlag):
    """Persisted, never reuse; all other bits must be 0."""

    OFFSET_GAPS = 1
    KEYS = 2
    HEADERS = 4


# As numbers: operations on an IntFlag cost a third of what reading a header does.
_OFFSET_GAPS, _KEYS, _HEADERS = map(int, Flag)
FLAGS_ALL = _OFFSET_GAPS | _KEYS | _HEADERS
_CODECS = {int(codec): codec for codec in Codec}


# Tuples: a replay of the write-ahead log reads a header per frame, and a frozen dataclass of as many fields takes seven
# times as long to make.
class ProducerStamp(NamedTuple):
    """Producer of a batch, for deduplication. producer_id 1 to 2**63-1 (0 = none), producer_epoch u32, base_sequence
    (of the first record) 0 to 2**63-1."""

    producer_id: int
    producer_epoch: int
    base_sequence: int


class BatchHeader(NamedTuple):
    """The fixed header of a batch. Sizes in bytes; size_bytes is the whole batch, header included;
    uncompressed_bytes is the payload alone. epoch is a u64 up to 2**63-1, 0 = not stamped yet."""

    base_offset: int
    epoch: int
    crc: int
    codec: Codec
    size_bytes: int
    uncompressed_bytes: int
    record_count: int
    last_offset_delta: int
    first_timestamp_ms: int
    max_timestamp_ms: int
    producer: ProducerStamp | None
    contiguous: bool
    has_keys: bool
    has_headers: bool

    @property
    def end_offset(self) -> int:
        """Offset after the last record's."""
        return self.base_offset + self.last_offset_delta + 1

    @property
    def decoded_bytes(self) -> int:
        """Approximate memory of the decoded columns in bytes, known without decoding."""
        return self.uncompressed_bytes + DECODED_RECORD_BYTES * self.record_count


# ---- encoding


def encode_batch_header(header: BatchHeader, stored: Sequence[bytes | memoryview]) -> bytes:
    """Returns the header for the `stored` payload parts, with the CRC over both; `header.crc` is not used."""
    producer = header.producer or ProducerStamp(0, 0, 0)
    check_stamp(header.base_offset, header.last_offset_delta, header.epoch)
    _check_producer(producer, 0)
    body = _BODY.pack(
        BATCH_MAGIC,
        BATCH_VERSION,
        header.codec,
        _flags_of(header),
        header.size_bytes,
        header.uncompressed_bytes,
        header.record_count,
        header.last_offset_delta,
        header.first_timestamp_ms,
        header.max_timestamp_ms,
        producer.producer_id,
        producer.base_sequence,
        producer.producer_epoch,
    )
    # Part by part, since joining the parts would copy the payload.
    crc = zlib.crc32(body)
    for part in stored:
        crc = zlib.crc32(part, crc)
    return encode_stamp(header.base_offset, header.epoch) + _CRC.pack(crc) + body


def encode_stamp(base_offset: int, epoch: int) -> bytes:
    """Returns the first STAMP_SIZE bytes of a batch, which its CRC does not cover."""
    return _STAMP.pack(base_offset, epoch)


def _flags_of(header: BatchHeader) -> int:
    return (
        (0 if header.contiguous else _OFFSET_GAPS)
        | (_KEYS if header.has_keys else 0)
        | (_HEADERS if header.has_headers else 0)
    )


# ---- reading


def read_batch_header(buffer: Buffer, at: int = 0, limits: FormatLimits = DEFAULT_LIMITS) -> BatchHeader:
    """Returns the header at position `at`, its fields checked against each other and against `limits`.

    Reads BATCH_HEADER_SIZE bytes and no payload: neither the CRC nor the presence of the payload is checked. Raises
    FormatError.
    """
    if at < 0 or len(buffer) - at < BATCH_HEADER_SIZE:
        raise FormatError(f"batch header: {max(len(buffer) - at, 0)} of {BATCH_HEADER_SIZE} bytes", at)
    (
        base_offset,
        epoch,
        crc,
        magic,
        version,
        codec_id,
        flags,
        size_bytes,
        uncompressed_bytes,
        record_count,
        delta,
        first_timestamp_ms,
        max_timestamp_ms,
        producer_id,
        base_sequence,
        producer_epoch,
    ) = _HEADER.unpack_from(buffer, at)
    codec = _check_kind(magic, version, codec_id, flags, at)
    _check_sizes(codec, size_bytes, uncompressed_bytes, record_count, limits, at)
    contiguous = not flags & _OFFSET_GAPS
    _check_offsets(base_offset, epoch, delta, record_count, contiguous, at)
    if max_timestamp_ms < first_timestamp_ms:
        raise FormatError(f"max timestamp {max_timestamp_ms} is before the first, {first_timestamp_ms}", at + 56)
    producer = ProducerStamp(producer_id, producer_epoch, base_sequence)
    _check_producer(producer, at)
    return BatchHeader(
        base_offset,
        epoch,
        crc,
        codec,
        size_bytes,
        uncompressed_bytes,
        record_count,
        delta,
        first_timestamp_ms,
        max_timestamp_ms,
        producer if producer_id else None,
        contiguous,
        flags & _KEYS != 0,
        flags & _HEADERS != 0,
    )


# ---- checks shared by both directions


def _check_kind(magic: bytes, version: int, codec_id: int, flags: int, at: int) -> Codec:
    if magic != BATCH_MAGIC:
        raise FormatError(f"batch magic is {magic!r}, expected {BATCH_MAGIC!r}", at + 20)
    if version != BATCH_VERSION:
        raise FormatError(f"batch version is {version}, this reader knows {BATCH_VERSION}", at + 24)
    codec = _CODECS.get(codec_id)
    # Refused, not passed on: services are updated before the producers that use a new codec.
    if codec is None:
        raise FormatError(f"batch codec is {codec_id}, this reader knows {sorted(_CODECS)}", at + 25)
    if flags & ~FLAGS_ALL:
        raise FormatError(f"batch flags {flags:#06x} have unknown bits", at + 26)
    return codec


def _check_sizes(
    codec: Codec, size_bytes: int, uncompressed_bytes: int, record_count: int, limits: FormatLimits, at: int
) -> None:
    if not BATCH_HEADER_SIZE < size_bytes <= limits.batch_bytes_max:
        bound = limits.batch_bytes_max
        raise FormatError(f"batch size is {size_bytes}, must be above {BATCH_HEADER_SIZE}, at most {bound}", at + 28)
    check_uncompressed(uncompressed_bytes, limits, at)
    stored = size_bytes - BATCH_HEADER_SIZE
    if codec is Codec.NONE and uncompressed_bytes != stored:
        raise FormatError(f"uncompressed payload of {uncompressed_bytes} bytes stored in {stored}", at + 32)
    # Known before anything is allocated; else a batch of a few KB could claim 64 MiB (decision 0015).
    if uncompressed_bytes > stored * COMPRESSION_RATIO_MAX:
        most = f"a stored byte may stand for {COMPRESSION_RATIO_MAX}"
        raise FormatError(f"{uncompressed_bytes} bytes out of {stored} stored: {most}", at + 32)
    if not 1 <= record_count <= limits.record_count_max:
        raise FormatError(f"record count is {record_count}, must be 1 to {limits.record_count_max}", at + 36)
    # Every record has a value length, and all but the first a timestamp delta, of at least one byte.
    if PAYLOAD_BYTES_MIN + 2 * record_count - 1 > uncompressed_bytes:
        raise FormatError(f"{record_count} records cannot fit in {uncompressed_bytes} bytes", at + 36)


def check_uncompressed(uncompressed_bytes: int, limits: FormatLimits, at: int) -> None:
    """Refuses a payload above the limit with FormatError."""
    bound = limits.uncompressed_bytes_max
    if uncompressed_bytes > bound:
        raise FormatError(f"payload of {uncompressed_bytes} bytes, uncompressed_bytes_max is {bound}", at + 32)


def _check_offsets(base_offset: int, epoch: int, delta: int, record_count: int, contiguous: bool, at: int) -> None:
    if (delta != record_count - 1) if contiguous else (delta < record_count):
        kind = "contiguous" if contiguous else "gapped"
        raise FormatError(f"last offset delta is {delta} for {record_count} {kind} records", at + 40)
    if not 0 <= base_offset <= INT64_MAX - 1 - delta:
        raise FormatError(f"base offset {base_offset} with delta {delta} is outside int64", at)
    if epoch > INT64_MAX:
        raise FormatError(f"epoch is {epoch}, at most {INT64_MAX}", at + 8)


def check_stamp(base_offset: int, delta: int, epoch: int) -> None:
    """Refuses offsets or an epoch outside int64 with FormatError."""
    if not 0 <= base_offset <= INT64_MAX - 1 - delta:
        raise FormatError(f"offsets {base_offset} to {base_offset + delta} leave int64 (the end is exclusive)")
    if not 0 <= epoch <= INT64_MAX:
        raise FormatError(f"epoch is {epoch}, must be 0 to {INT64_MAX}")


def _check_producer(producer: ProducerStamp, at: int) -> None:
    if not 0 <= producer.producer_id <= INT64_MAX:
        raise FormatError(f"producer id is {producer.producer_id}, must be 0 (none) to {INT64_MAX}", at + 64)
    if not 0 <= producer.base_sequence <= INT64_MAX:
        raise FormatError(f"base sequence is {producer.base_sequence}, must be 0 to {INT64_MAX}", at + 72)
    if not 0 <= producer.producer_epoch <= UINT32_MAX:
        raise FormatError(f"producer epoch is {producer.producer_epoch}, must be 0 to {UINT32_MAX}", at + 80)
    if not producer.producer_id and (producer.producer_epoch or producer.base_sequence):
        raise FormatError("producer epoch or sequence without a producer id", at + 64)
