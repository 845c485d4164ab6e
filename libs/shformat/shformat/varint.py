"""Columns of LEB128 varints, encoded and decoded many at a time.

A varint holds 7 bits per byte, lowest first, the top bit set on all bytes but the last: at most 10 bytes
for 64 bits. Signed numbers are folded with zigzag first. No Python step per number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError

VARINT_BYTES_MAX = 10
_LAST_BYTE_MAX = 1  # the tenth byte carries bit 63 only

_ONE = np.uint64(1)

# Ufunc methods instead of max(), all() and cumsum(): the same loops without 1-2 us of wrapper per call, which is most
# of the time that a batch of ten records takes.
largest_of = np.maximum.reduce
smallest_of = np.minimum.reduce
running_sum = np.add.accumulate

Uint64s = NDArray[np.uint64]
Int64s = NDArray[np.int64]


def zigzag(numbers: Int64s) -> Uint64s:
    """Returns int64 folded into uint64 so that small magnitudes of either sign stay small."""
    return ((numbers << 1) ^ (numbers >> 63)).view(np.uint64)


def unzigzag(numbers: Uint64s) -> Int64s:
    """Returns the inverse of zigzag()."""
    signed = (numbers >> _ONE).view(np.int64)
    signed ^= -(numbers & _ONE).view(np.int64)
    return signed


def encode_varints(numbers: Uint64s) -> bytes:
    """Returns the varints of `numbers`, back to back."""
    if not numbers.size:
        return b""
    largest = int(largest_of(numbers))
    if largest < 0x80:
        return numbers.astype(np.uint8).tobytes()
    sizes = np.ones(len(numbers), np.int64)
    for shift in range(7, largest.bit_length(), 7):
        sizes += numbers >= np.uint64(1 << shift)
    ends = running_sum(sizes)
    starts = ends - sizes
    encoded = np.empty(int(ends[-1]), np.uint8)
    encoded[starts] = _byte_of(numbers, 0, sizes)
    for k in range(1, int(largest_of(sizes))):
        longer = np.flatnonzero(sizes > k)
        encoded[starts[longer] + k] = _byte_of(numbers[longer], k, sizes[longer])
    return encoded.tobytes()


def _byte_of(numbers: Uint64s, k: int, sizes: Int64s) -> NDArray[np.uint8]:
    septets = (numbers >> np.uint64(7 * k)).astype(np.uint8) & np.uint8(0x7F)
    return septets | ((sizes > k + 1).astype(np.uint8) << np.uint8(7))


def decode_varints(section: memoryview, count: int, name: str, at: int) -> Uint64s:
    """Returns exactly `count` varints, which must fill `section` exactly.

    Memory stays within a small multiple of 8 * count bytes for any content. Raises FormatError with the column `name`
    and its byte position `at`.
    """
    size = len(section)
    # Bounds the memory for the declared count by bytes that are really there.
    if not count <= size <= count * VARINT_BYTES_MAX:
        raise FormatError(f"{name}: {count} varints cannot fill {size} bytes", at)
    encoded = np.frombuffer(section, np.uint8)
    # One byte each, as short lengths and small deltas are: the bytes are the numbers.
    if size == count:
        if count and largest_of(encoded) >= 0x80:
            raise FormatError(f"{name}: fewer varints than the {count} declared", at)
        return encoded.astype(np.uint64)
    return _decode_long(encoded, count, name, at)


def _decode_long(encoded: NDArray[np.uint8], count: int, name: str, at: int) -> Uint64s:
    last_bytes = np.flatnonzero(encoded < 0x80)
    if len(last_bytes) != count or last_bytes[-1] != len(encoded) - 1:
        raise FormatError(f"{name}: {len(last_bytes)} whole varints, {count} declared", at)
    starts = np.empty_like(last_bytes)
    starts[0] = 0
    np.add(last_bytes[:-1], 1, out=starts[1:])
    sizes = last_bytes - starts
    sizes += 1
    longest = int(largest_of(sizes))
    _refuse_overflow(encoded, last_bytes, sizes, longest, name, at)
    numbers = (encoded[starts] & np.uint8(0x7F)).astype(np.uint64)
    for k in range(1, longest):
        longer = np.flatnonzero(sizes > k)
        septets = (encoded[starts[longer] + k] & np.uint8(0x7F)).astype(np.uint64)
        numbers[longer] |= septets << np.uint64(7 * k)
    return numbers


def _refuse_overflow(
    encoded: NDArray[np.uint8], last_bytes: Int64s, sizes: Int64s, longest: int, name: str, at: int
) -> None:
    if longest < VARINT_BYTES_MAX:
        return
    if longest > VARINT_BYTES_MAX:
        where = at + int(last_bytes[int(sizes.argmax())]) - longest + 1
        raise FormatError(f"{name}: varint of {longest} bytes, at most {VARINT_BYTES_MAX}", where)
    full = last_bytes[sizes == VARINT_BYTES_MAX]
    if encoded[full].max() > _LAST_BYTE_MAX:
        raise FormatError(f"{name}: varint exceeds 64 bits", at + int(full[0]))
