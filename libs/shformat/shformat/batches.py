"""Many batches decoded at once: each column of all of them in one NumPy call.

The cost of a small batch is not its records but the NumPy calls for each of its columns. Joined column by column, a
thousand batches of ten records cost hardly more than one of ten thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from .batch import check_one_batch, decode_batch, decode_checked, open_payload
from .batch_header import BatchHeader, Buffer
from .columns import BytesColumn, HeadersColumn, Int64s, Records
from .errors import FormatError
from .limits import DEFAULT_LIMITS, FormatLimits
from .payload import PayloadShape, Sections, column_of, decode_headers, decode_offsets, split_payload
from .varint import Uint64s, decode_varints, running_sum, unzigzag


def decode_batches(batches: Sequence[Buffer], limits: FormatLimits = DEFAULT_LIMITS) -> Records:
    """Returns the records of all batches in order; same checks and result as decoding each alone.

    `limits` hold for each batch; the caller bounds the number of batches. Raises FormatError with the number of the
    batch and the position inside it, also for an empty list.
    """
    if not batches:
        raise FormatError("no batches to decode")
    try:
        headers = [check_one_batch(batch, limits) for batch in batches]
        return decode_checked_batches(batches, headers, limits)
    except FormatError as error:
        _raise_in_its_place(batches, limits, error)


def decode_checked_batches(batches: Sequence[Buffer], headers: Sequence[BatchHeader], limits: FormatLimits) -> Records:
    """Returns the records of batches whose `headers` came from check_one_batch(); errors carry no exact place."""
    if len(batches) == 1:
        return decode_checked(batches[0], headers[0], limits)
    shapes, parts = [], []
    for batch, header in zip(batches, headers, strict=True):
        payload, shape = open_payload(batch, header)
        shapes.append(shape)
        parts.append(split_payload(payload, shape))
    counts = np.array([shape.record_count for shape in shapes])
    ends = running_sum(counts)
    return Records(
        offsets=_offsets(parts, shapes, counts, ends),
        timestamps_ms=_timestamps(parts, headers, counts, ends),
        keys=_keys(parts, shapes, ends),
        values=_column("values", [p.value_lengths.view for p in parts], [p.values.view for p in parts], ends),
        headers=_headers(parts, shapes, limits),
    )


def _raise_in_its_place(batches: Sequence[Buffer], limits: FormatLimits, error: FormatError) -> NoReturn:
    for position, batch in enumerate(batches):
        try:
            decode_batch(batch, limits)
        except FormatError as found:
            raise FormatError(f"batch {position} of {len(batches)}: {found.what}", found.at) from error
    raise error


def _offsets(parts: list[Sections], shapes: list[PayloadShape], counts: Int64s, ends: Int64s) -> Int64s:
    if not all(shape.contiguous for shape in shapes):
        return np.concatenate([decode_offsets(p.gaps, shape) for p, shape in zip(parts, shapes, strict=True)])
    bases = np.array([shape.base_offset for shape in shapes])
    offsets = np.repeat(bases - (ends - counts), counts)
    offsets += np.arange(len(offsets))
    return offsets


def _timestamps(parts: list[Sections], headers: Sequence[BatchHeader], counts: Int64s, ends: Int64s) -> Int64s:
    """Returns all timestamps: a running sum over all batches (modulo 2**64, as in each batch), minus the sum carried
    into each batch."""
    # A delta of 0 before each batch, in place of the first timestamp, which is in the header.
    sections = [piece for part in parts for piece in (b"\0", part.deltas.view)]
    sizes = np.array([len(part.deltas.view) + 1 for part in parts])
    timestamps = unzigzag(_varints("timestamp deltas", sections, sizes, ends))
    starts = ends - counts
    timestamps[starts] = [header.first_timestamp_ms for header in headers]
    timestamps = running_sum(timestamps)
    carried = np.concatenate([[0], timestamps[ends[:-1] - 1]])
    timestamps -= np.repeat(carried, counts)
    latest = np.maximum.reduceat(timestamps, starts)
    if (latest != [header.max_timestamp_ms for header in headers]).any():
        raise FormatError("latest timestamp is not what the header says")
    return timestamps


def _keys(parts: list[Sections], shapes: list[PayloadShape], ends: Int64s) -> BytesColumn:
    if not any(shape.has_keys for shape in shapes):
        return BytesColumn.nulls(int(ends[-1]))
    # A batch without keys counts as a batch of null keys.
    lengths = [
        part.key_lengths.view if shape.has_keys else memoryview(bytes(shape.record_count))
        for part, shape in zip(parts, shapes, strict=True)
    ]
    return _column("keys", lengths, [part.keys.view for part in parts], ends)


def _column(name: str, lengths: list[memoryview], data: list[memoryview], ends: Int64s) -> BytesColumn:
    sizes = np.fromiter(map(len, lengths), np.int64, len(lengths))
    stored = _varints(f"{name} lengths", lengths, sizes, ends)
    column = column_of(name, stored, memoryview(b"".join(data)), 0)
    data_sizes = np.fromiter(map(len, data), np.int64, len(data))
    if (column.ends[ends - 1] != running_sum(data_sizes)).any():
        raise FormatError(f"{name}: lengths do not cover the bytes of each batch")
    return column


def _varints(name: str, sections: Sequence[bytes | memoryview], sizes: Int64s, ends: Int64s) -> Uint64s:
    """Returns the numbers of all sections; `ends` has the cumulative counts, `sizes` the bytes, an entry per batch."""
    joined = b"".join(sections)
    numbers = decode_varints(memoryview(joined), int(ends[-1]), name, 0)
    last_bytes = np.flatnonzero(np.frombuffer(joined, np.uint8) < 0x80)
    if (last_bytes[ends - 1] != running_sum(sizes) - 1).any():
        raise FormatError(f"{name}: a batch does not hold as many as it declares")
    return numbers


def _headers(parts: list[Sections], shapes: list[PayloadShape], limits: FormatLimits) -> HeadersColumn | None:
    if not any(shape.has_headers for shape in shapes):
        return None
    return HeadersColumn.concat(
        [
            decode_headers(part.headers, shape.record_count, limits)
            if shape.has_headers
            else HeadersColumn.empty(shape.record_count)
            for part, shape in zip(parts, shapes, strict=True)
        ]
    )
