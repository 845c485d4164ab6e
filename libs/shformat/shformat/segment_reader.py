"""Reads a segment by byte ranges, without I/O: a plan yields ReadAt and is sent the bytes.

The caller owns fetching, caching and retries. Positions count from the start of the segment, which may lie anywhere in
an object.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Generator
from typing import NamedTuple, TypeVar

from .batch_header import Buffer, read_batch_header
from .errors import FormatError
from .limits import DEFAULT_LIMITS, FormatLimits
from .segment import (
    SEGMENT_BYTES_MIN,
    SEGMENT_FOOTER_SIZE,
    SEGMENT_HEADER_SIZE,
    SegmentHeader,
    check_agreement,
    decode_footer,
    decode_index,
    decode_segment_header,
    size_by_footer,
)
from .segment_index import BlockEntry, SegmentIndex

T = TypeVar("T")

# The first read takes the footer and, with it, an index of up to 511 blocks (records of half a GiB): one request
# instead of two, for bytes that cost nothing beside a request.
TAIL_READ_BYTES = 32 * 1024


class ReadAt(NamedTuple):
    """Request for exactly `size_bytes` bytes from position `at` of the segment."""

    at: int
    size_bytes: int


Plan = Generator[ReadAt, Buffer, T]


def open_segment(size_bytes: int, limits: FormatLimits = DEFAULT_LIMITS) -> Plan[tuple[SegmentHeader, SegmentIndex]]:
    """Returns header and index of a segment of `size_bytes`, after two reads (three for a very long index).

    Raises FormatError if header, index, footer and size contradict each other.
    """
    if not SEGMENT_BYTES_MIN <= size_bytes <= limits.segment_bytes_max:
        low, high = SEGMENT_BYTES_MIN, limits.segment_bytes_max
        raise FormatError(f"segment of {size_bytes} bytes, must be {low} to {high} (segment_bytes_max)")
    tail_at = max(0, size_bytes - TAIL_READ_BYTES)
    tail = yield from _read(tail_at, size_bytes - tail_at)
    footer = decode_footer(tail, size_bytes, limits)
    if footer.index_at >= tail_at:
        start = footer.index_at - tail_at
        encoded_index = tail[start : start + footer.index_size_bytes]
    else:
        encoded_index = yield from _read(footer.index_at, footer.index_size_bytes)
    index = decode_index(encoded_index, footer, limits)
    # A segment of up to TAIL_READ_BYTES was read whole already.
    lead = tail if tail_at == 0 else (yield from _read(0, SEGMENT_HEADER_SIZE))
    header = decode_segment_header(lead[:SEGMENT_HEADER_SIZE])
    check_agreement(header, index)
    return header, index


def last_segment_size(tail: Buffer, object_size_bytes: int, limits: FormatLimits = DEFAULT_LIMITS) -> int:
    """Returns the size of the last of several back-to-back segments, from its footer at the end of `tail`.

    Walks the segments of an object backwards; used when the registry is lost. Raises FormatError.
    """
    footer = memoryview(tail)[-SEGMENT_FOOTER_SIZE:]
    if len(footer) != SEGMENT_FOOTER_SIZE:
        raise FormatError(f"segment footer: {len(footer)} of {SEGMENT_FOOTER_SIZE} bytes")
    size_bytes = size_by_footer(footer)
    if not SEGMENT_BYTES_MIN <= size_bytes <= min(object_size_bytes, limits.segment_bytes_max):
        high = min(object_size_bytes, limits.segment_bytes_max)
        raise FormatError(f"footer of a segment of {size_bytes} bytes, must be {SEGMENT_BYTES_MIN} to {high}")
    decode_footer(footer, size_bytes, limits)
    return size_bytes


def read_block(entry: BlockEntry, limits: FormatLimits = DEFAULT_LIMITS) -> Plan[memoryview]:
    """Returns the bytes of a block (an encoded batch), checked against the index entry; not decoded.

    Raises FormatError with the position in the segment.
    """
    block = yield from _read(entry.at, entry.size_bytes)
    check_block(block, entry, limits)
    return block


def check_block(block: Buffer, entry: BlockEntry, limits: FormatLimits = DEFAULT_LIMITS) -> None:
    """Checks by CRC and header that `block` is the block of `entry`; raises FormatError if not."""
    if len(block) != entry.size_bytes:
        raise FormatError(f"block: {len(block)} of {entry.size_bytes} bytes", entry.at)
    computed = zlib.crc32(block)
    if computed != entry.crc:
        raise FormatError(f"block CRC is {computed:#010x}, the index says {entry.crc:#010x}", entry.at)
    try:
        header = read_batch_header(block, 0, limits)
    except FormatError as error:
        raise FormatError(error.what, entry.at + error.at) from error
    # Plans of reads trust the entry alone, so the block must say the same of its offsets, epoch and times.
    if BlockEntry.of(header, entry.at, entry.crc) != entry:
        raise FormatError("block header and index entry differ", entry.at)


def _read(at: int, size_bytes: int) -> Plan[memoryview]:
    sent = memoryview((yield ReadAt(at, size_bytes)))
    if len(sent) != size_bytes:
        raise FormatError(f"asked for {size_bytes} bytes, got {len(sent)}", at)
    return sent


def run_plan(plan: Plan[T], read: Callable[[int, int], Buffer]) -> T:
    """Runs a plan with `read(at, size_bytes)` and returns its result; errors of `read` pass through."""
    try:
        wanted = next(plan)
        while True:
            wanted = plan.send(read(wanted.at, wanted.size_bytes))
    except StopIteration as finished:
        result: T = finished.value
        return result
    finally:
        plan.close()


async def run_plan_async(plan: Plan[T], read: Callable[[int, int], Awaitable[Buffer]]) -> T:
    """Runs a plan as run_plan() does, with an asynchronous `read`, and returns its result."""
    try:
        wanted = next(plan)
        while True:
            wanted = plan.send(await read(wanted.at, wanted.size_bytes))
    except StopIteration as finished:
        result: T = finished.value
        return result
    finally:
        plan.close()
