"""The record batch: a fixed header, then the columnar payload, compressed as a whole or not.

A batch is the only record encoding on the wire, in the WAL and in segments (a segment block is a batch).
docs/formats/record-batch.md draws it. Owns: the checksum. Does not own: the header (batch_header.py), the columns
(payload.py), compression (compression.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from .batch_header import (
    BASE_SEQUENCE_AT,
    BATCH_HEADER_SIZE,
    BODY_AT,
    FIRST_TIMESTAMP_AT,
    STAMP_SIZE,
    BatchHeader,
    Buffer,
    ProducerStamp,
    check_stamp,
    check_uncompressed,
    encode_batch_header,
    encode_stamp,
    read_batch_header,
)
from .columns import Header, Int64s, Records
from .compression import Codec, compress, decompress
from .errors import FormatError, ValueOutOfRange
from .few import FEW_RECORDS_MAX, encode_few, timestamps_of_few
from .limits import DEFAULT_LIMITS, INT64_MAX, TIMESTAMP_MS_MAX, TIMESTAMP_MS_MIN, FormatLimits
from .payload import PayloadShape, decode_payload, encode_payload
from .varint import largest_of, smallest_of

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
    """Returns an encoded batch.

    A payload that `codec` does not shrink is stored as Codec.NONE, a payload that `codec` would shrink beyond
    COMPRESSION_RATIO_MAX as Codec.LZ4. Contiguous records take their offsets from `base_offset`; the offsets in
    `records` count only if they have gaps, and then base_offset must be 0 or the first of them. Raises FormatError for
    no records, columns of different lengths, offsets that descend or exceed int64, and anything a reader with the same
    `limits` would refuse.
    """
    _check_columns(records, limits)
    contiguous, first_offset, delta = _offset_plan(records, base_offset)
    check_stamp(first_offset, delta, epoch)
    shape = PayloadShape(
        record_count=len(records),
        base_offset=first_offset,
        last_offset_delta=delta,
        first_timestamp_ms=int(records.timestamps_ms[0]),
        contiguous=contiguous,
        has_keys=not records.keys.all_null,
        has_headers=records.headers is not None and len(records.headers.names) > 0,
    )
    payload = encode_payload(records, shape, limits)
    uncompressed_bytes = sum(map(len, payload))
    check_uncompressed(uncompressed_bytes, limits, 0)
    codec, parts = compress(payload, Codec(codec))
    size_bytes = _checked_size(parts, limits)
    header = BatchHeader(
        base_offset=first_offset,
        epoch=epoch,
        crc=0,
        codec=codec,
        size_bytes=size_bytes,
        uncompressed_bytes=uncompressed_bytes,
        record_count=len(records),
        last_offset_delta=delta,
        first_timestamp_ms=shape.first_timestamp_ms,
        max_timestamp_ms=int(largest_of(records.timestamps_ms)),
        producer=producer,
        contiguous=contiguous,
        has_keys=shape.has_keys,
        has_headers=shape.has_headers,
    )
    return b"".join([encode_batch_header(header, parts), *parts])


def encode_lists(
    values: Sequence[bytes | None],
    keys: Sequence[bytes | None] | None,
    timestamps_ms: Sequence[int],
    headers: Sequence[Sequence[Header]] | None = None,
    *,
    codec: Codec = Codec.LZ4,
    producer: ProducerStamp | None = None,
    limits: FormatLimits = DEFAULT_LIMITS,
) -> bytes:
    """Returns encode_batch(Records.from_lists(...)), at a lower cost for few records."""
    count = len(values)
    if headers is None and 1 <= count <= FEW_RECORDS_MAX and len(timestamps_ms) == count:
        if keys is not None and keys.count(None) == count:
            keys = None
        payload = encode_few(values, keys, timestamps_ms) if keys is None or len(keys) == count else None
        if payload is not None:
            return _encode_few(payload, count, keys is not None, timestamps_ms, codec, producer, limits)
    return encode_batch(
        Records.from_lists(values, keys, timestamps_ms, headers), codec=codec, producer=producer, limits=limits
    )


def _encode_few(
    payload: bytes,
    record_count: int,
    has_keys: bool,
    timestamps_ms: Sequence[int],
    codec: Codec,
    producer: ProducerStamp | None,
    limits: FormatLimits,
) -> bytes:
    check_uncompressed(len(payload), limits, 0)
    codec, parts = compress([payload], Codec(codec))
    header = BatchHeader(
        base_offset=0,
        epoch=0,
        crc=0,
        codec=codec,
        size_bytes=_checked_size(parts, limits),
        uncompressed_bytes=len(payload),
        record_count=record_count,
        last_offset_delta=record_count - 1,
        first_timestamp_ms=timestamps_ms[0],
        max_timestamp_ms=max(timestamps_ms),
        producer=producer,
        contiguous=True,
        has_keys=has_keys,
        has_headers=False,
    )
    return b"".join([encode_batch_header(header, parts), *parts])


def _checked_size(parts: Sequence[bytes | memoryview], limits: FormatLimits) -> int:
    size_bytes = BATCH_HEADER_SIZE + sum(map(len, parts))
    if size_bytes > limits.batch_bytes_max:
        raise FormatError(f"batch of {size_bytes} bytes, batch_bytes_max is {limits.batch_bytes_max}")
    return size_bytes


def _check_columns(records: Records, limits: FormatLimits) -> None:
    count = len(records)
    if not 1 <= count <= limits.record_count_max:
        raise FormatError(f"record count is {count}, must be 1 to {limits.record_count_max} (record_count_max)")
    headers = count if records.headers is None else len(records.headers)
    lengths = (len(records.timestamps_ms), len(records.keys), len(records.values), headers)
    if any(length != count for length in lengths):
        raise FormatError(f"columns of {lengths} entries (timestamps, keys, values, headers) for {count} offsets")


def _offset_plan(records: Records, base_offset: int) -> tuple[bool, int, int]:
    """Returns whether the offsets are contiguous, the base offset, and the last offset minus the base offset."""
    first, last, count = int(records.offsets[0]), int(records.offsets[-1]), len(records)
    # Compared, not subtracted: a difference of two int64 may overflow.
    if not (records.offsets[1:] > records.offsets[:-1]).all():
        raise FormatError("offsets are not ascending")
    if last - first == count - 1:
        return True, base_offset, count - 1
    if base_offset not in (0, first):
        raise FormatError(f"base_offset is {base_offset}, but the offsets have gaps and start at {first}")
    return False, first, last - first


def stamp_batch(batch: Buffer, base_offset: int, epoch: int) -> bytes:
    """Returns the same batch with base offset and epoch written in; one copy, the CRC stays valid.

    `batch` is a whole batch whose header was read before. Raises FormatError if the offsets would exceed int64 or the
    epoch is not 1 to 2**63-1.
    """
    header = read_batch_header(batch)
    if epoch == 0:
        raise FormatError("epoch is 0, a stamped batch has 1 or more", 8)
    check_stamp(base_offset, header.last_offset_delta, epoch)
    return b"".join((encode_stamp(base_offset, epoch), memoryview(batch)[STAMP_SIZE:]))


# ---- reading


def check_batch(buffer: Buffer, at: int = 0, limits: FormatLimits = DEFAULT_LIMITS) -> BatchHeader:
    """Reads the header, checks that the whole batch is present and that the CRC matches, and returns the header.

    Decodes nothing. Raises FormatError.
    """
    header = read_batch_header(buffer, at, limits)
    if len(buffer) - at < header.size_bytes:
        raise FormatError(f"batch of {header.size_bytes} bytes, {len(buffer) - at} are there", at)
    crc = zlib.crc32(memoryview(buffer)[at + BODY_AT : at + header.size_bytes])
    if crc != header.crc:
        raise FormatError(f"batch CRC is {crc:#010x}, the header says {header.crc:#010x}", at + STAMP_SIZE)
    return header


def validate_batch(buffer: Buffer, limits: FormatLimits = DEFAULT_LIMITS) -> BatchHeader:
    """Checks a batch as check_batch() does, decodes the payload, and returns the header.

    A batch that passes never fails to decode later. `buffer` must hold exactly one batch.
    """
    return _decode_one(buffer, limits)[0]


def validate_new_batch(buffer: Buffer, limits: FormatLimits = DEFAULT_LIMITS) -> BatchHeader:
    """Checks a batch that is to be written, and returns its header.

    Checks what validate_batch() checks, that all timestamps are dates, and that all sequence numbers lie within int64.
    Raises ValueOutOfRange for a timestamp or sequence number, FormatError for everything else. Batches written before
    these two limits existed may exceed them, and stay readable.
    """
    header = check_one_batch(buffer, limits)
    # Decoded, not only checked by CRC: a CRC proves what the client sent, not that it can be read (decision 0002).
    few = _timestamps_of_few(buffer, header)
    if few is None:
        check_new_timestamps(decode_checked(buffer, header, limits).timestamps_ms)
    else:
        _check_new_timestamps(min(few), header.max_timestamp_ms)
    if header.producer is not None:
        most = INT64_MAX - header.record_count
        if header.producer.base_sequence > most:
            raise ValueOutOfRange("base_sequence", header.producer.base_sequence, 0, most, BASE_SEQUENCE_AT)
    return header


def _timestamps_of_few(buffer: Buffer, header: BatchHeader) -> list[int] | None:
    """Returns the timestamps of a checked batch of few records, or None if the column path has to decide."""
    if header.record_count > FEW_RECORDS_MAX or header.has_headers or not header.contiguous:
        return None
    payload, _ = open_payload(buffer, header)
    timestamps = timestamps_of_few(payload, header.record_count, header.first_timestamp_ms, header.has_keys)
    return timestamps if timestamps is not None and max(timestamps) == header.max_timestamp_ms else None


def check_new_timestamps(timestamps_ms: Int64s) -> None:
    """Checks that all timestamps lie in the years 1 to 9999. Raises ValueOutOfRange."""
    _check_new_timestamps(int(smallest_of(timestamps_ms)), int(largest_of(timestamps_ms)))


def _check_new_timestamps(earliest_ms: int, latest_ms: int) -> None:
    for extreme in (earliest_ms, latest_ms):
        if not TIMESTAMP_MS_MIN <= extreme <= TIMESTAMP_MS_MAX:
            raise ValueOutOfRange("timestamp_ms", extreme, TIMESTAMP_MS_MIN, TIMESTAMP_MS_MAX, FIRST_TIMESTAMP_AT)


def decode_batch(buffer: Buffer, limits: FormatLimits = DEFAULT_LIMITS) -> Records:
    """Returns the records of exactly one batch; raises FormatError, and no other error, for anything else.

    Columns are views into the decompressed payload, or into `buffer` itself if the payload is not compressed.
    """
    return _decode_one(buffer, limits)[1]


def split_batches(buffer: Buffer, limits: FormatLimits = DEFAULT_LIMITS) -> list[memoryview]:
    """Returns a view of each batch in a buffer of back-to-back batches. Walks the headers; checks no CRC."""
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
    """Checks a batch as check_batch() does, and that `buffer` ends with it; returns the header."""
    header = check_batch(buffer, 0, limits)
    if len(buffer) != header.size_bytes:
        extra = len(buffer) - header.size_bytes
        raise FormatError(f"{extra} bytes after the batch", header.size_bytes)
    return header


def decode_checked(buffer: Buffer, header: BatchHeader, limits: FormatLimits) -> Records:
    """Returns the records of a batch whose `header` came from check_one_batch()."""
    payload, shape = open_payload(buffer, header)
    try:
        records = decode_payload(payload, shape, limits)
    except FormatError as error:
        raise _in_buffer(error, header) from error
    # Searches by time and retention trust the maximum of the header without decoding the batch.
    latest = int(largest_of(records.timestamps_ms))
    if latest != header.max_timestamp_ms:
        raise FormatError(f"latest timestamp is {latest}, the header says {header.max_timestamp_ms}", 56)
    return records


def open_payload(buffer: Buffer, header: BatchHeader) -> tuple[memoryview, PayloadShape]:
    """Returns the decompressed payload of a checked batch, and its shape according to the header."""
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
    try:
        return decompress(payload, header.codec, header.uncompressed_bytes)
    except FormatError as error:
        raise FormatError(error.what, BATCH_HEADER_SIZE) from error


def _in_buffer(error: FormatError, header: BatchHeader) -> FormatError:
    """Returns the error with its position in the buffer; for a compressed payload the position is the payload's
    start."""
    if header.codec is Codec.NONE:
        return FormatError(error.what, BATCH_HEADER_SIZE + error.at)
    return FormatError(f"{error.what}, byte {error.at} of the decompressed payload", BATCH_HEADER_SIZE)
