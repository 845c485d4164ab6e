"""Batches of few records, encoded and checked in plain Python.

A column operation costs 1 us even for a single record, so a batch of one costs 80 us in NumPy, 10 us in plain Python.
Owns no rule of the format: both functions return None for anything out of the ordinary, and the column path of batch.py
then decides and names the fault. Their results are equal to the byte; tests compare them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .limits import INT64_MAX, INT64_MIN

FEW_RECORDS_MAX = 16
"""The columns are faster from about 100 records on; this few gain the most, and stay cheap with long varints too."""

_TABLE = struct.Struct("<7I")
_WRAP = 1 << 64
_VARINT_BYTES = [bytes([number]) for number in range(0x80)]
_VARINT_BYTES_MAX = 10


def encode_few(
    values: Sequence[bytes | None], keys: Sequence[bytes | None] | None, timestamps_ms: Sequence[int]
) -> bytes | None:
    """Returns the uncompressed payload of contiguous records without headers, or None if a value is not `bytes` or a
    timestamp not int64. All lists have the same length, 1 to FEW_RECORDS_MAX; `keys` holds at least one key or is
    None."""
    value_lengths = _encode_lengths(values)
    key_lengths = b"" if keys is None else _encode_lengths(keys)
    deltas = _encode_deltas(timestamps_ms)
    if value_lengths is None or key_lengths is None or deltas is None:
        return None
    key_data = b"" if keys is None else b"".join([key for key in keys if key])
    value_data = b"".join([value for value in values if value])
    table = _TABLE.pack(0, len(deltas), len(key_lengths), len(value_lengths), 0, len(key_data), len(value_data))
    return b"".join((table, deltas, key_lengths, value_lengths, key_data, value_data))


def _encode_lengths(column: Sequence[bytes | None]) -> bytes | None:
    """Returns the items' lengths + 1, with 0 for null; None if an item is not `bytes`."""
    parts = []
    for item in column:
        if item is None:
            parts.append(b"\0")
        elif item.__class__ is bytes:
            parts.append(_encode_varint(len(item) + 1))
        else:
            return None
    return b"".join(parts)


def _encode_deltas(timestamps_ms: Sequence[int]) -> bytes | None:
    parts = []
    before = timestamps_ms[0]
    for number in timestamps_ms:
        if number.__class__ is not int or not INT64_MIN <= number <= INT64_MAX:
            return None
        delta, before = number - before, number
        if delta > INT64_MAX:
            delta -= _WRAP
        elif delta < INT64_MIN:
            delta += _WRAP
        parts.append(_encode_varint(delta << 1 if delta >= 0 else ~(delta << 1)))
    return b"".join(parts[1:])


def _encode_varint(number: int) -> bytes:
    if number < 0x80:
        return _VARINT_BYTES[number]
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def timestamps_of_few(
    payload: memoryview, record_count: int, first_timestamp_ms: int, has_keys: bool
) -> list[int] | None:
    """Checks the payload of contiguous records without headers, and returns their timestamps; None if anything is
    wrong or above the numbers this path handles."""
    if len(payload) < _TABLE.size:
        return None
    sizes = _TABLE.unpack_from(payload)
    gaps, deltas_size, key_lengths_size, value_lengths_size, headers, keys_size, values_size = sizes
    if gaps or headers or _TABLE.size + sum(sizes) != len(payload):
        return None
    keys_at = _TABLE.size + deltas_size
    values_at = keys_at + key_lengths_size
    end = values_at + value_lengths_size
    # Bounds the copy below: three columns with at most 10 bytes for each record.
    if end - _TABLE.size > 3 * record_count * _VARINT_BYTES_MAX:
        return None
    lengths = bytes(payload[_TABLE.size : end])
    deltas = _decode_varints(lengths[:deltas_size], record_count - 1)
    values = _decode_varints(lengths[values_at - _TABLE.size :], record_count)
    if deltas is None or values is None or not _is_covered(values, values_size):
        return None
    if has_keys:
        keys = _decode_varints(lengths[deltas_size : values_at - _TABLE.size], record_count)
        if keys is None or not _is_covered(keys, keys_size):
            return None
    elif key_lengths_size or keys_size:
        return None
    timestamps = [first_timestamp_ms]
    for folded in deltas:
        number = timestamps[-1] + (~(folded >> 1) if folded & 1 else folded >> 1)
        if not INT64_MIN <= number <= INT64_MAX:
            return None  # sums that wrap
        timestamps.append(number)
    return timestamps


def _decode_varints(encoded: bytes, count: int) -> list[int] | None:
    """Returns `encoded` as exactly `count` varints of less than 64 bits, or None for any other content."""
    if len(encoded) == count and encoded.isascii():
        return list(encoded)
    numbers = []
    number = shift = 0
    for byte in encoded:
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            numbers.append(number)
            number = shift = 0
        elif (shift := shift + 7) > 56:
            return None
    return numbers if len(numbers) == count and not shift else None


def _is_covered(stored: list[int], size_bytes: int) -> bool:
    """True if the lengths, stored + 1 (0 = null), add up to `size_bytes`."""
    return sum(stored) - len(stored) + stored.count(0) == size_bytes
