"""The payload of a record batch: a table of section sizes, then a section per column.

Encode and decode sit together. Does not know the batch header, compression or checksums: positions in errors count from
the start of the payload.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .columns import BytesColumn, HeadersColumn, Int64s, Records
from .errors import FormatError
from .limits import FormatLimits
from .varint import Uint64s, decode_varints, encode_varints, largest_of, running_sum, smallest_of, unzigzag, zigzag

# offset gaps, timestamp deltas, key lengths, value lengths, headers, key bytes, value bytes
_TABLE = struct.Struct("<7I")
# counts per record, name lengths, value lengths, name bytes, value bytes
_HEADERS_TABLE = struct.Struct("<5I")
assert _TABLE.size == 28
assert _HEADERS_TABLE.size == 20

PAYLOAD_BYTES_MIN = _TABLE.size


class PayloadShape(NamedTuple):
    """Shape of a payload, taken from the batch header."""

    record_count: int
    base_offset: int
    last_offset_delta: int
    first_timestamp_ms: int
    contiguous: bool
    has_keys: bool
    has_headers: bool


@dataclass(slots=True)
class Section:
    """The bytes of a column, and their position in the payload."""

    view: memoryview
    at: int


class Sections(NamedTuple):
    """The columns of a payload, in the order of the table."""

    gaps: Section
    deltas: Section
    key_lengths: Section
    value_lengths: Section
    headers: Section
    keys: Section
    values: Section


# ---- encoding


def encode_payload(records: Records, shape: PayloadShape, limits: FormatLimits) -> list[bytes | memoryview]:
    """Returns the parts of the payload, to be joined. Raises FormatError for columns that contradict each other."""
    sections = [
        b"" if shape.contiguous else encode_varints((records.offsets[1:] - records.offsets[:-1] - 1).view(np.uint64)),
        encode_varints(zigzag(records.timestamps_ms[1:] - records.timestamps_ms[:-1])),
        _encode_lengths("keys", records.keys) if shape.has_keys else b"",
        _encode_lengths("values", records.values),
        _encode_headers(records.headers, limits) if records.headers is not None and shape.has_headers else b"",
        records.keys.data if shape.has_keys else b"",
        records.values.data,
    ]
    return [_TABLE.pack(*_section_sizes(sections)), *sections]


def _section_sizes(sections: list[bytes | memoryview]) -> list[int]:
    sizes = [len(section) for section in sections]
    if sum(sizes) + _TABLE.size > 0xFFFFFFFF:
        raise FormatError(f"payload of {sum(sizes)} bytes does not fit 32 bits")
    return sizes


def _sizes_of(ends: Int64s) -> Int64s:
    """Returns the differences of cumulative ends, the first against 0."""
    sizes = ends.copy()
    sizes[1:] -= ends[:-1]
    return sizes


def _encode_lengths(name: str, column: BytesColumn) -> bytes:
    """Returns lengths + 1, with 0 for null, as varints."""
    stored = _sizes_of(column.ends)
    total = int(column.ends[-1]) if len(column.ends) else 0
    if total != len(column.data) or (len(stored) and smallest_of(stored) < 0):
        raise FormatError(f"{name}: ends do not cover the {len(column.data)} bytes of data in order")
    stored += 1
    if column.valid is not None:
        nulls = ~column.valid
        if (stored[nulls] != 1).any():
            raise FormatError(f"{name}: a null with a length")
        stored[nulls] = 0
    return encode_varints(stored.view(np.uint64))


def _encode_headers(headers: HeadersColumn, limits: FormatLimits) -> bytes:
    counts = _sizes_of(headers.ends)
    total = int(headers.ends[-1])
    if smallest_of(counts) < 0 or total != len(headers.names) or total != len(headers.values):
        raise FormatError("headers: counts, names and values do not belong together")
    if headers.names.valid is not None and not headers.names.valid.all():
        raise FormatError("headers: a name is null")
    _check_header_counts(counts, total, limits, 0)
    name_lengths = _sizes_of(headers.names.ends)
    covered = int(headers.names.ends[-1]) if total else 0
    if covered != len(headers.names.data) or (total and smallest_of(name_lengths) < 0):
        raise FormatError("headers: name ends do not cover the names in order")
    sections = [
        encode_varints(counts.view(np.uint64)),
        encode_varints(name_lengths.view(np.uint64)),
        _encode_lengths("header values", headers.values),
        bytes(headers.names.data),
        headers.values.data,
    ]
    _check_names(memoryview(sections[3]), headers.names.ends, 0)
    return b"".join([_HEADERS_TABLE.pack(*_section_sizes(sections)), *sections])


# ---- decoding


def decode_payload(payload: memoryview, shape: PayloadShape, limits: FormatLimits) -> Records:
    """Returns all columns, the data as views into `payload`. Reads nothing outside it; raises FormatError."""
    count = shape.record_count
    parts = split_payload(payload, shape)
    keys = BytesColumn.nulls(count)
    if shape.has_keys:
        keys = _decode_column("keys", parts.key_lengths, parts.keys, count)
    return Records(
        offsets=decode_offsets(parts.gaps, shape),
        timestamps_ms=_decode_timestamps(parts.deltas, shape),
        keys=keys,
        values=_decode_column("values", parts.value_lengths, parts.values, count),
        headers=decode_headers(parts.headers, count, limits) if shape.has_headers else None,
    )


def split_payload(payload: memoryview, shape: PayloadShape) -> Sections:
    """Returns the sections of a payload; a section whose flag is not set is empty."""
    parts = Sections(*_split(payload, _TABLE, 0, "payload"))
    _check_presence(shape, parts)
    return parts


def _split(view: memoryview, table: struct.Struct, at: int, name: str) -> list[Section]:
    """Returns the sections that the table of `view` declares; they must fill `view` exactly."""
    if len(view) < table.size:
        raise FormatError(f"{name}: {len(view)} bytes, the table of sections alone takes {table.size}", at)
    sizes = table.unpack_from(view)
    # Exactly: bytes that no section claims would pass all other checks.
    if table.size + sum(sizes) != len(view):
        raise FormatError(f"{name}: sections add up to {table.size + sum(sizes)} bytes, there are {len(view)}", at)
    sections = []
    start = table.size
    for size in sizes:
        sections.append(Section(view[start : start + size], at + start))
        start += size
    return sections


def _check_presence(shape: PayloadShape, parts: Sections) -> None:
    for name, flag, section in (
        ("offset gaps", not shape.contiguous, parts.gaps),
        ("key lengths", shape.has_keys, parts.key_lengths),
        ("key bytes", shape.has_keys, parts.keys),
        ("headers", shape.has_headers, parts.headers),
    ):
        if not flag and len(section.view):
            raise FormatError(f"{name}: {len(section.view)} bytes, but the flag says there are none", section.at)


def decode_offsets(gaps: Section, shape: PayloadShape) -> Int64s:
    """Returns all offsets, decoded from the gaps, or contiguous without them."""
    count, first = shape.record_count, shape.base_offset
    last = first + shape.last_offset_delta
    if shape.contiguous:
        return np.arange(first, last + 1, dtype=np.int64)
    skipped = decode_varints(gaps.view, count - 1, "offset gaps", gaps.at)
    # Bounds each step, so that no sum can wrap all the way round to the right end.
    if len(skipped) and int(largest_of(skipped)) > shape.last_offset_delta:
        raise FormatError("offset gaps: a gap is wider than the whole batch", gaps.at)
    offsets = np.empty(count, np.int64)
    offsets[0] = first
    np.add(skipped.view(np.int64), 1, out=offsets[1:])
    running_sum(offsets, out=offsets)
    # Steps are at most 2**63 from a sum below it, so the first step past int64 shows as a negative sum.
    if int(smallest_of(offsets)) < 0 or int(offsets[-1]) != last:
        raise FormatError(f"offset gaps: end at {int(offsets[-1])}, the header says {last}", gaps.at)
    return offsets


def _decode_timestamps(deltas: Section, shape: PayloadShape) -> Int64s:
    """Returns the timestamps. Sums wrap modulo 2**64 as the differences did, so any two int64 may be neighbours."""
    timestamps = np.empty(shape.record_count, np.int64)
    timestamps[0] = shape.first_timestamp_ms
    timestamps[1:] = unzigzag(decode_varints(deltas.view, shape.record_count - 1, "timestamp deltas", deltas.at))
    return running_sum(timestamps, out=timestamps)


def _decode_column(name: str, lengths: Section, data: Section, count: int) -> BytesColumn:
    stored = decode_varints(lengths.view, count, f"{name} lengths", lengths.at)
    return column_of(name, stored, data.view, lengths.at)


def column_of(name: str, stored: Uint64s, data: memoryview, at: int) -> BytesColumn:
    """Returns a column from its lengths + 1 (0 = null) and `data`, which the lengths must cover exactly. Reuses
    `stored`."""
    count, size = len(stored), len(data)
    # Checked separately before the sum: count * size stays far below 2**63.
    longest = int(largest_of(stored)) - 1 if count else 0
    if longest > size:
        raise FormatError(f"{name}: a length of {longest} in {size} bytes", at)
    sizes = stored.view(np.int64)
    valid = None
    if count and not smallest_of(stored):
        valid = stored != 0
        sizes = sizes - valid
    else:
        sizes -= 1
    ends = running_sum(sizes)
    total = int(ends[-1]) if count else 0
    if total != size:
        raise FormatError(f"{name}: lengths add up to {total}, there are {size} bytes", at)
    return BytesColumn(data, ends, valid)


def decode_headers(section: Section, count: int, limits: FormatLimits) -> HeadersColumn:
    """Returns the headers of `count` records, decoded from their section."""
    counts, name_lengths, value_lengths, names, values = _split(section.view, _HEADERS_TABLE, section.at, "headers")
    per_record = decode_varints(counts.view, count, "header counts", counts.at)
    if int(largest_of(per_record)) > limits.headers_per_record_max:
        raise _too_many_in_record(int(largest_of(per_record)), limits, counts.at)
    ends = running_sum(per_record.view(np.int64))
    total = int(ends[-1])
    _check_header_counts(per_record.view(np.int64), total, limits, counts.at)
    name_column = _decode_names(name_lengths, names, total)
    return HeadersColumn(ends, name_column, _decode_column("header values", value_lengths, values, total))


def _decode_names(lengths: Section, names: Section, total: int) -> BytesColumn:
    sizes = decode_varints(lengths.view, total, "header name lengths", lengths.at)
    size = len(names.view)
    if total and int(largest_of(sizes)) > size:
        raise FormatError(f"header names: a length of {int(largest_of(sizes))} in {size} bytes", lengths.at)
    ends = running_sum(sizes.view(np.int64))
    covered = int(ends[-1]) if total else 0
    if covered != size:
        raise FormatError(f"header names: lengths add up to {covered}, there are {size} bytes", lengths.at)
    _check_names(names.view, ends, names.at)
    return BytesColumn(names.view, ends)


def _check_header_counts(counts: Int64s, total: int, limits: FormatLimits, at: int) -> None:
    if int(largest_of(counts)) > limits.headers_per_record_max:
        raise _too_many_in_record(int(largest_of(counts)), limits, at)
    if total > limits.header_count_max:
        raise FormatError(f"{total} headers in a batch, header_count_max is {limits.header_count_max}", at)


def _too_many_in_record(count: int, limits: FormatLimits, at: int) -> FormatError:
    bound = limits.headers_per_record_max
    return FormatError(f"a record with {count} headers, headers_per_record_max is {bound}", at)


def _check_names(data: memoryview, ends: Int64s, at: int) -> None:
    """Checks that every name is UTF-8: the joined bytes are, and no name starts inside a character."""
    try:
        str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"header names: not UTF-8 ({error.reason})", at + error.start) from error
    starts = ends[ends < len(data)]
    inside = (np.frombuffer(data, np.uint8)[starts] & 0xC0) == 0x80 if len(data) else starts[:0]
    if np.any(inside):
        raise FormatError("header names: a name starts inside a UTF-8 character", at)
