"""The record batch: a fixed header, then the columnar payload, LZ4-compressed as a whole or not.

The one record encoding on the wire, in the WAL and in segments (a segment block is a batch).
docs/formats/record-batch.md draws it. Owns: the header, checksum, compression. The columns are payload.py's.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import lz4.block

from .columns import Records
from .errors import FormatError
from .limits import DEFAULT_LIMITS, INT64_MAX, UINT32_MAX, FormatLimits
from .payload import PAYLOAD_BYTES_MIN, PayloadShape, decode_payload, encode_payload
from .varint import largest_of

Buffer = bytes | bytearray | memoryview | mmap.mmap

BATCH_MAGIC = b"SHRB"
BATCH_VERSION = 1

# base offset, epoch | crc | magic, version, codec, flags, size, uncompressed, count, last offset delta,
# first and max timestamp, producer id, base sequence, producer epoch
_STAMP = struct.Struct("<qQ")
_CRC = struct.Struct("<I")
_BODY = struct.Struct("<4sBBHIIIqqqqqI")
_HEADER = struct.Struct("<qQI4sBBHIIIqqqqqI")
BATCH_HEADER_SIZE = 84
_STAMP_SIZE = 16
_BODY_AT = 20
assert _HEADER.size == BATCH_HEADER_SIZE == _BODY_AT + _BODY.size
assert _STAMP.size == _STAMP_SIZE == _BODY_AT - _CRC.size

# One byte of LZ4 stands for at most 255 bytes of output; more is a lie told to make a reader allocate.
_LZ4_RATIO_MAX = 255


class Codec(IntEnum):
    """How a payload is compressed. Persisted, never reuse; 0 is invalid."""

    NONE = 1
    LZ4 = 2


class _Flag(IntFlag):
    """Persisted, never reuse; all other bits must be 0."""

    OFFSET_GAPS = 1
    KEYS = 2
    HEADERS = 4


_FLAGS_ALL = int(_Flag.OFFSET_GAPS | _Flag.KEYS | _Flag.HEADERS)
_CODECS = {int(codec): codec for codec in Codec}


@dataclass(frozen=True, slots=True)
class ProducerStamp:
    """Who wrote a batch, for deduplication. producer_id 1 to 2**63-1 (0 = none), producer_epoch u32,
    base_sequence (of the first record) 0 to 2**63-1."""

    producer_id: int
    producer_epoch: int
    base_sequence: int


@dataclass(frozen=True, slots=True)
class BatchHeader:
    """The fixed header of one batch. Sizes in bytes; size_bytes is the whole batch, header included;
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
        """One past the last record's offset."""
        return self.base_offset + self.last_offset_delta + 1


# ---- encoding


def encode_batch(
    records: Records,
    *,
    base_offset: int = 0,
    epoch: int = 0,
    codec: Codec = Codec.LZ4,
    producer: ProducerStamp | None = None,
    limits: FormatLimits = DEFAULT_LIMITS,
) -> bytes:
    """One encoded batch; payload that LZ4 does not shrink is stored as Codec.NONE.

    Contiguous records take their offsets from `base_offset`; the offsets in `records` count only when
    they have gaps, and then base_offset must be 0 or the first of them.
    Raises FormatError for no records, columns that do not belong together, offsets that descend or exceed
    int64, and anything a reader with the same `limits` would refuse.
    """
    count = len(records)
    _check_columns(records, limits)
    contiguous, first_offset, delta = _offset_plan(records, base_offset)
    shape = PayloadShape(
        record_count=count,
        base_offset=first_offset,
        last_offset_delta=delta,
        first_timestamp_ms=int(records.timestamps_ms[0]),
        contiguous=contiguous,
        has_keys=not records.keys.all_null,
        has_headers=records.headers is not None and len(records.headers.names) > 0,
    )
    _check_stamp(first_offset, delta, epoch)
    parts = encode_payload(records, shape, limits)
    uncompressed_bytes = sum(map(len, parts))
    _check_uncompressed(uncompressed_bytes, limits, 0)
    codec, parts = _compress(parts, uncompressed_bytes, codec)
    return _assemble(
        parts, shape, epoch, codec, uncompressed_bytes, int(largest_of(records.timestamps_ms)), producer, limits
    )


def _check_columns(records: Records, limits: FormatLimits) -> None:
    count = len(records)
    if not 1 <= count <= limits.record_count_max:
        raise FormatError(f"record count is {count}, must be 1 to {limits.record_count_max} (record_count_max)")
    headers = count if records.headers is None else len(records.headers)
    lengths = (len(records.timestamps_ms), len(records.keys), len(records.values), headers)
    if any(length != count for length in lengths):
        raise FormatError(f"columns of {lengths} entries (timestamps, keys, values, headers) for {count} offsets")


def _offset_plan(records: Records, base_offset: int) -> tuple[bool, int, int]:
    """(contiguous, base offset, last offset - base offset)."""
    first, last, count = int(records.offsets[0]), int(records.offsets[-1]), len(records)
    # Compared, not subtracted: a difference of two int64 may overflow.
    if not (records.offsets[1:] > records.offsets[:-1]).all():
        raise FormatError("offsets are not ascending")
    if last - first == count - 1:
        return True, base_offset, count - 1
    if base_offset not in (0, first):
        raise FormatError(f"base_offset is {base_offset}, but the offsets have gaps and start at {first}")
    return False, first, last - first


def _compress(
    parts: list[bytes | memoryview], uncompressed_bytes: int, codec: Codec
) -> tuple[Codec, list[bytes | memoryview]]:
    if codec is Codec.LZ4:
        compressed: bytes = lz4.block.compress(b"".join(parts), store_size=False)
        if len(compressed) < uncompressed_bytes:
            return Codec.LZ4, [compressed]
    return Codec.NONE, parts


def _assemble(
    parts: list[bytes | memoryview],
    shape: PayloadShape,
    epoch: int,
    codec: Codec,
    uncompressed_bytes: int,
    max_timestamp_ms: int,
    producer: ProducerStamp | None,
    limits: FormatLimits,
) -> bytes:
    size_bytes = BATCH_HEADER_SIZE + sum(map(len, parts))
    if size_bytes > limits.batch_bytes_max:
        raise FormatError(f"batch of {size_bytes} bytes, batch_bytes_max is {limits.batch_bytes_max}")
    producer = producer or ProducerStamp(0, 0, 0)
    _check_producer(producer.producer_id, producer.producer_epoch, producer.base_sequence, 0)
    body = _BODY.pack(
        BATCH_MAGIC,
        BATCH_VERSION,
        codec,
        _flags_of(shape),
        size_bytes,
        uncompressed_bytes,
        shape.record_count,
        shape.last_offset_delta,
        shape.first_timestamp_ms,
        max_timestamp_ms,
        producer.producer_id,
        producer.base_sequence,
        producer.producer_epoch,
    )
    crc = zlib.crc32(body)
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([_STAMP.pack(shape.base_offset, epoch), _CRC.pack(crc), body, *parts])


def _flags_of(shape: PayloadShape) -> int:
    return (
        (0 if shape.contiguous else _Flag.OFFSET_GAPS)
        | (_Flag.KEYS if shape.has_keys else 0)
        | (_Flag.HEADERS if shape.has_headers else 0)
    )


def stamp_batch(batch: Buffer, base_offset: int, epoch: int) -> bytes:
    """The same batch with base offset and epoch written in; one copy, the CRC stays valid.

    `batch` is one whole batch whose header was read before. Raises FormatError when the offsets would
    exceed int64 or the epoch is not 1 to 2**63-1.
    """
    header = read_batch_header(batch)
    if epoch == 0:
        raise FormatError("epoch is 0, a stamped batch has 1 or more", 8)
    _check_stamp(base_offset, header.last_offset_delta, epoch)
    return b"".join((_STAMP.pack(base_offset, epoch), memoryview(batch)[_STAMP_SIZE:]))


# ---- reading


def read_batch_header(buffer: Buffer, at: int = 0, limits: FormatLimits = DEFAULT_LIMITS) -> BatchHeader:
    """The header at `at`, its fields checked against each other and against `limits`.

    Reads BATCH_HEADER_SIZE bytes and no payload: neither CRC nor the presence of the payload is checked.
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
    contiguous = not flags & _Flag.OFFSET_GAPS
    _check_offsets(base_offset, epoch, delta, record_count, contiguous, at)
    if max_timestamp_ms < first_timestamp_ms:
        raise FormatError(f"max timestamp {max_timestamp_ms} is before the first, {first_timestamp_ms}", at + 56)
    _check_producer(producer_id, producer_epoch, base_sequence, at)
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
        ProducerStamp(producer_id, producer_epoch, base_sequence) if producer_id else None,
        contiguous,
        bool(flags & _Flag.KEYS),
        bool(flags & _Flag.HEADERS),
    )


def check_batch(buffer: Buffer, at: int = 0, limits: FormatLimits = DEFAULT_LIMITS) -> BatchHeader:
    """read_batch_header(), and the whole batch is there and its CRC is right. Decodes nothing."""
    header = read_batch_header(buffer, at, limits)
    if len(buffer) - at < header.size_bytes:
        raise FormatError(f"batch of {header.size_bytes} bytes, {len(buffer) - at} are there", at)
    crc = zlib.crc32(memoryview(buffer)[at + _BODY_AT : at + header.size_bytes])
    if crc != header.crc:
        raise FormatError(f"batch CRC is {crc:#010x}, the header says {header.crc:#010x}", at + _STAMP_SIZE)
    return header


def validate_batch(buffer: Buffer, limits: FormatLimits = DEFAULT_LIMITS) -> BatchHeader:
    """check_batch() and a full decode of the structure: what passes can never fail to decode later.

    `buffer` must hold exactly one batch.
    """
    return _decode_one(buffer, limits)[0]


def decode_batch(buffer: Buffer, limits: FormatLimits = DEFAULT_LIMITS) -> Records:
    """The records of exactly one batch. Raises FormatError for anything else, and nothing else.

    Columns are views into the decompressed payload, or into `buffer` itself where it is not compressed.
    """
    return _decode_one(buffer, limits)[1]


def split_batches(buffer: Buffer, limits: FormatLimits = DEFAULT_LIMITS) -> list[memoryview]:
    """One view per batch of back-to-back batches. Walks the headers; checks no CRC."""
    view = memoryview(buffer)
    batches = []
    at = 0
    while at < len(view):
        size_bytes = read_batch_header(view, at, limits).size_bytes
        if size_bytes > len(view) - at:
            raise FormatError(f"batch of {size_bytes} bytes, {len(view) - at} are there", at)
        batches.append(view[at : at + size_bytes])
        at += size_bytes
    return batches


def _decode_one(buffer: Buffer, limits: FormatLimits) -> tuple[BatchHeader, Records]:
    header = check_one_batch(buffer, limits)
    return header, decode_checked(buffer, header, limits)


def check_one_batch(buffer: Buffer, limits: FormatLimits) -> BatchHeader:
    """check_batch(), and `buffer` holds nothing after the batch."""
    header = check_batch(buffer, 0, limits)
    if len(buffer) != header.size_bytes:
        extra = len(buffer) - header.size_bytes
        raise FormatError(f"{extra} bytes after the batch", header.size_bytes)
    return header


def decode_checked(buffer: Buffer, header: BatchHeader, limits: FormatLimits) -> Records:
    """decode_batch() for a batch that check_one_batch() gave `header` for."""
    payload, shape = open_payload(buffer, header)
    try:
        records = decode_payload(payload, shape, limits)
    except FormatError as error:
        raise _in_buffer(error, header) from error
    latest = int(largest_of(records.timestamps_ms))
    if latest != header.max_timestamp_ms:
        raise FormatError(f"latest timestamp is {latest}, the header says {header.max_timestamp_ms}", 56)
    return records


def open_payload(buffer: Buffer, header: BatchHeader) -> tuple[memoryview, PayloadShape]:
    """The decompressed payload of a checked batch, and what its header says about it."""
    shape = PayloadShape(
        header.record_count,
        header.base_offset,
        header.last_offset_delta,
        header.first_timestamp_ms,
        header.contiguous,
        header.has_keys,
        header.has_headers,
    )
    return _decompress(memoryview(buffer)[BATCH_HEADER_SIZE:], header), shape


def _decompress(payload: memoryview, header: BatchHeader) -> memoryview:
    if header.codec is Codec.NONE:
        return payload
    try:
        plain: bytes = lz4.block.decompress(payload, uncompressed_size=header.uncompressed_bytes)
    except lz4.block.LZ4BlockError as error:
        raise FormatError(f"LZ4 payload: {error}", BATCH_HEADER_SIZE) from error
    if len(plain) != header.uncompressed_bytes:
        declared = header.uncompressed_bytes
        raise FormatError(f"LZ4 payload holds {len(plain)} bytes, {declared} declared", BATCH_HEADER_SIZE)
    return memoryview(plain)


def _in_buffer(error: FormatError, header: BatchHeader) -> FormatError:
    """A position in the payload as one in the buffer; inside LZ4 only the payload's start has one."""
    if header.codec is Codec.NONE:
        return FormatError(error.what, BATCH_HEADER_SIZE + error.at)
    return FormatError(f"{error.what}, byte {error.at} of the decompressed payload", BATCH_HEADER_SIZE)


# ---- checks shared by both directions


def _check_kind(magic: bytes, version: int, codec_id: int, flags: int, at: int) -> Codec:
    if magic != BATCH_MAGIC:
        raise FormatError(f"batch magic is {magic!r}, expected {BATCH_MAGIC!r}", at + 20)
    if version != BATCH_VERSION:
        raise FormatError(f"batch version is {version}, this reader knows {BATCH_VERSION}", at + 24)
    codec = _CODECS.get(codec_id)
    if codec is None:
        raise FormatError(f"batch codec is {codec_id}, this reader knows {sorted(_CODECS)}", at + 25)
    if flags & ~_FLAGS_ALL:
        raise FormatError(f"batch flags {flags:#06x} have unknown bits", at + 26)
    return codec


def _check_sizes(
    codec: Codec, size_bytes: int, uncompressed_bytes: int, record_count: int, limits: FormatLimits, at: int
) -> None:
    if not BATCH_HEADER_SIZE < size_bytes <= limits.batch_bytes_max:
        bound = limits.batch_bytes_max
        raise FormatError(f"batch size is {size_bytes}, must be above {BATCH_HEADER_SIZE}, at most {bound}", at + 28)
    _check_uncompressed(uncompressed_bytes, limits, at)
    stored = size_bytes - BATCH_HEADER_SIZE
    if codec is Codec.NONE and uncompressed_bytes != stored:
        raise FormatError(f"uncompressed payload of {uncompressed_bytes} bytes stored in {stored}", at + 32)
    if uncompressed_bytes > stored * _LZ4_RATIO_MAX:
        raise FormatError(f"{uncompressed_bytes} bytes cannot come out of {stored} bytes of LZ4", at + 32)
    if not 1 <= record_count <= limits.record_count_max:
        raise FormatError(f"record count is {record_count}, must be 1 to {limits.record_count_max}", at + 36)
    # Every record has a value length, and all but the first a timestamp delta, of at least one byte.
    if PAYLOAD_BYTES_MIN + 2 * record_count - 1 > uncompressed_bytes:
        raise FormatError(f"{record_count} records cannot fit in {uncompressed_bytes} bytes", at + 36)


def _check_uncompressed(uncompressed_bytes: int, limits: FormatLimits, at: int) -> None:
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


def _check_stamp(base_offset: int, delta: int, epoch: int) -> None:
    if not 0 <= base_offset <= INT64_MAX - 1 - delta:
        raise FormatError(f"offsets {base_offset} to {base_offset + delta} leave int64 (the end is exclusive)")
    if not 0 <= epoch <= INT64_MAX:
        raise FormatError(f"epoch is {epoch}, must be 0 to {INT64_MAX}")


def _check_producer(producer_id: int, producer_epoch: int, base_sequence: int, at: int) -> None:
    if not 0 <= producer_id <= INT64_MAX:
        raise FormatError(f"producer id is {producer_id}, must be 0 (none) to {INT64_MAX}", at + 64)
    if not 0 <= base_sequence <= INT64_MAX:
        raise FormatError(f"base sequence is {base_sequence}, must be 0 to {INT64_MAX}", at + 72)
    if not 0 <= producer_epoch <= UINT32_MAX:
        raise FormatError(f"producer epoch is {producer_epoch}, must be 0 to {UINT32_MAX}", at + 80)
    if not producer_id and (producer_epoch or base_sequence):
        raise FormatError("producer epoch or sequence without a producer id", at + 64)
