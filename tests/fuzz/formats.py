"""What must hold for any bytes given to the decoders of batches, log files and segments.

Each check calls every reader there is, lets FormatError pass and holds the answers of different readers against
each other: a batch that validates must decode, alone, among others and through a segment, to the same records.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from shformat import (
    BATCH_HEADER_SIZE,
    FRAME_HEADER_SIZE,
    BlockEntry,
    BuiltSegment,
    Codec,
    DamagedSpan,
    FormatError,
    FormatLimits,
    Records,
    SegmentBuilder,
    SegmentIndex,
    SpaceAhead,
    WalFrame,
    check_batch,
    decode_batch,
    decode_batches,
    decode_wal_file_header,
    describe_segment,
    describe_wal_file,
    encode_batch,
    frames_start,
    open_segment,
    read_batch_header,
    read_batch_headers,
    read_block,
    run_plan,
    scan_frames,
    split_batches,
    stamp_batch,
    validate_batch,
)
from streamhouse_ingest.log.wal_tail import Tail, judge_tail

from tests.fuzz.checksums import repair_batches, repair_segment, repair_wal
from tests.fuzz.format_mutators import mutate_batches, mutate_segment, mutate_wal
from tests.fuzz.target import GOLDEN, Target, ensure

T = TypeVar("T")

# Small enough that a declared size above a limit, should it ever be believed, stands out in memory.
LIMITS = FormatLimits(
    batch_bytes_max=256 * 1024,
    uncompressed_bytes_max=1024 * 1024,
    record_count_max=50_000,
    headers_per_record_max=16,
    header_count_max=1_000,
    segment_bytes_max=1024 * 1024,
    index_entries_max=64,
)
TOPIC = bytes(range(1, 17))
_BLOCK_BYTES_TARGET = 1024
_BATCHES_MAX = 32


def attempt(call: Callable[[], T], bound: int | None = None) -> T | FormatError:
    """The result, or the FormatError; its position must lie within the `bound` bytes that were given."""
    try:
        return call()
    except FormatError as error:
        if bound is not None:
            ensure(0 <= error.at <= max(bound, BATCH_HEADER_SIZE), "FormatError.at lies outside of the buffer")
        return error


def rows(records: Records) -> list[tuple[Any, ...]]:
    """Every record as a tuple."""
    headers: list[Any] = [[]] * len(records) if records.headers is None else records.headers.to_list()
    columns = (records.offsets.tolist(), records.timestamps_ms.tolist(), records.keys.to_list())
    return list(zip(*columns, records.values.to_list(), headers, strict=True))


# ---- batches


def check_batches(data: bytes) -> None:
    """`data` as one batch, and as batches back to back."""
    header = attempt(lambda: read_batch_header(data, 0, LIMITS), len(data))
    attempt(lambda: check_batch(data, 0, LIMITS), len(data))
    if len(data) >= BATCH_HEADER_SIZE:
        many = attempt(lambda: read_batch_headers(data, [0], LIMITS))
        ensure(isinstance(many, FormatError) == isinstance(header, FormatError), "one header and many: other rules")
    _check_one_batch(data)
    batches = attempt(lambda: split_batches(data, LIMITS), len(data))
    if isinstance(batches, FormatError) or len(batches) > _BATCHES_MAX:
        return
    ensure(b"".join(batches) == data, "split_batches loses bytes")
    if len(batches) > 1:
        _check_many(batches)
    _check_builder(batches)


def _check_one_batch(data: bytes) -> None:
    header = attempt(lambda: validate_batch(data, LIMITS), len(data))
    records = attempt(lambda: decode_batch(data, LIMITS), len(data))
    ensure(isinstance(header, FormatError) == isinstance(records, FormatError), "validate and decode disagree")
    if isinstance(records, FormatError) or isinstance(header, FormatError):
        return
    found = rows(records)
    ensure(len(found) == header.record_count, "decode gives another number of records than the header")
    ensure((found[0][0], found[-1][0] + 1) == (header.base_offset, header.end_offset), "offsets are not the header's")
    ensure(max(row[1] for row in found) == header.max_timestamp_ms, "max timestamp is not the header's")
    ensure(rows(decode_batch(memoryview(bytearray(data)), LIMITS)) == found, "another buffer type, other records")
    again = encode_batch(records, base_offset=header.base_offset, producer=header.producer)
    ensure(rows(decode_batch(again)) == found, "encoding what was decoded gives other records")


def _check_many(batches: list[memoryview]) -> None:
    alone = [attempt(lambda batch=batch: decode_batch(batch, LIMITS)) for batch in batches]  # type: ignore[misc]
    together = attempt(lambda: decode_batches(batches, LIMITS))
    if isinstance(together, FormatError):
        ensure(any(isinstance(one, FormatError) for one in alone), "decode_batches refuses what decodes alone")
        return
    ensure(not any(isinstance(one, FormatError) for one in alone), "decode_batches takes what is refused alone")
    expected = [row for one in alone if isinstance(one, Records) for row in rows(one)]
    ensure(rows(together) == expected, "decode_batches gives other records than decoding each")


def _check_builder(batches: list[memoryview]) -> None:
    """Batches that validate, stamped one after the other, make a segment that holds their records."""
    builder = SegmentBuilder(TOPIC, 0, 9, block_bytes_target=_BLOCK_BYTES_TARGET, limits=LIMITS)
    expected: list[tuple[Any, ...]] = []
    for batch in batches:
        header = attempt(lambda batch=batch: validate_batch(batch, LIMITS))  # type: ignore[misc]
        if isinstance(header, FormatError):
            continue
        stamped = attempt(lambda batch=batch: stamp_batch(batch, builder.end_offset, 9))  # type: ignore[misc]
        if isinstance(stamped, FormatError) or isinstance(
            attempt(lambda stamped=stamped: builder.add(stamped)),  # type: ignore[misc]
            FormatError,
        ):
            return
        expected += rows(decode_batch(stamped, LIMITS))
    if expected:
        _check_built(builder.finish(), expected)


def _check_built(built: BuiltSegment, expected: list[tuple[Any, ...]]) -> None:
    data = b"".join(built.parts)
    ensure(len(data) == built.info.size_bytes, "a segment has another size than its info says")
    found = list(_segment_rows(data, run_plan(open_segment(len(data), LIMITS), _reader(data))[1]))
    ensure(found == expected, "a segment gives other records than were added")


# ---- log files


def check_wal(data: bytes) -> None:
    """Header, frames and damage: always a tiling of the file, the same for every kind of buffer."""
    header = attempt(lambda: decode_wal_file_header(data), len(data))
    items = list(scan_frames(data, limits=LIMITS))
    at = min(frames_start(data, LIMITS), len(data))
    for item in items:
        ensure(item.at == at and item.size_bytes > 0, "scan_frames leaves a gap or overlaps")
        at = item.at + item.size_bytes
        if isinstance(item, WalFrame):
            _check_frame(data, item)
        if isinstance(item, SpaceAhead):
            allowed = 0 if isinstance(header, FormatError) else header.ahead_bytes
            ensure(item is items[-1] and item.size_bytes <= allowed, "space ahead that the header does not allow")
            ensure(not data[item.at :].strip(b"\0"), "space ahead that is not empty")
    ensure(at == len(data), "scan_frames does not reach the end of the file")
    first = next((item for item in items if isinstance(item, DamagedSpan)), None)
    if first is not None:
        judged = judge_tail(data, first, 0 if isinstance(header, FormatError) else header.ahead_bytes)
        ends_early = first.at + FRAME_HEADER_SIZE > len(data) or first.lost is not None
        ensure(judged is not Tail.UNFINISHED or ends_early or not data[first.at], "a whole group counts as unfinished")
    ensure(list(scan_frames(memoryview(data), limits=LIMITS)) == items, "another buffer type, other frames")
    _check_description(describe_wal_file(data, LIMITS), any(isinstance(item, DamagedSpan) for item in items))


def _check_frame(data: bytes, frame: WalFrame) -> None:
    ensure(frame.batch_at + frame.batch_size_bytes == frame.at + frame.size_bytes, "a batch leaves its frame")
    ensure(BATCH_HEADER_SIZE <= frame.batch_size_bytes <= LIMITS.batch_bytes_max, "a frame is over the limit")
    _check_one_batch(data[frame.batch_at : frame.batch_at + frame.batch_size_bytes])


def _check_description(description: dict[str, Any], damaged: bool) -> None:
    json.dumps(description)
    ensure(not damaged or description["damage"], "a description without the damage")


# ---- segments


def _reader(data: bytes) -> Callable[[int, int], bytes]:
    def read(at: int, size_bytes: int) -> bytes:
        ensure(0 <= at <= at + size_bytes <= len(data), "a plan reads outside of the segment")
        return data[at : at + size_bytes]

    return read


def _segment_rows(data: bytes, index: SegmentIndex) -> Iterator[tuple[Any, ...]]:
    for entry in index:
        yield from rows(decode_batch(run_plan(read_block(entry, LIMITS), _reader(data)), LIMITS))


def check_segment(data: bytes) -> None:
    """open_segment, every block and every look-up; describe_segment never raises."""
    opened = attempt(lambda: run_plan(open_segment(len(data), LIMITS), _reader(data)), len(data))
    if not isinstance(opened, FormatError):
        header, index = opened
        ensure(1 <= len(index) <= LIMITS.index_entries_max, "an index over the limit")
        ensure(index.record_count == header.record_count, "header and index differ in the record count")
        intact = [_check_block(data, index, position) for position in range(len(index))]
        if all(intact):
            found = list(_segment_rows(data, index))
            offsets = [row[0] for row in found]
            ensure(offsets == sorted(set(offsets)), "offsets of a segment do not ascend")
            ensure(len(found) == header.record_count, "a segment holds another number of records than it says")
    description = describe_segment(_reader(data), len(data), LIMITS)
    _check_description(description, isinstance(opened, FormatError))


def _check_block(data: bytes, index: SegmentIndex, position: int) -> bool:
    entry = index[position]
    for offset in (entry.first_offset, entry.end_offset - 1):
        ensure(index.find(offset) == position, "an offset is found in another block")
    ensure(index.find_timestamp(entry.max_timestamp_ms) <= position, "a timestamp is found too late")
    block = attempt(lambda: run_plan(read_block(entry, LIMITS), _reader(data)), len(data))
    if isinstance(block, FormatError):
        return False
    batch = attempt(lambda: validate_batch(block, LIMITS), len(block))
    if isinstance(batch, FormatError):
        return False
    ensure(BlockEntry.of(batch, entry.at, zlib.crc32(block)) == entry, "a block is not the one that its entry names")
    return True


# ---- seeds


def _golden(*names: str) -> list[bytes]:
    return [(GOLDEN / name).read_bytes() for name in names]


def _batch_seeds() -> list[bytes]:
    # The plain rows once, the edges (gaps, keys, headers) in every codec: most of what a reader decides is in those.
    kinds = ["plain_none", *(f"edges_{codec.name.lower()}" for codec in Codec)]
    batches = _golden(*(f"batch_v1_{kind}.bin" for kind in kinds))
    return [*batches, b"".join(batches), batches[0] * 3]


TARGETS = (
    Target("batch", check_batches, _batch_seeds, mutate_batches, repair_batches),
    Target("wal", check_wal, lambda: _golden("wal_v1.bin", "wal_v2.bin", "wal_v3.bin"), mutate_wal, repair_wal),
    Target("segment", check_segment, lambda: _golden("segment_v1.bin"), mutate_segment, repair_segment),
)
