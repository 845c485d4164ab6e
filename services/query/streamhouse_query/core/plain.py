"""Records in the plain form, for clients that do not know the batch encoding.

The only place of a server that makes an object per record; it is bounded by RECORDS_MAX per response.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from shformat import Records, decode_batch
from shproto.v1 import types_pb2

# About 10 ms of work. Readers of more take encoded batches.
RECORDS_MAX = 10_000
# Cost of a header beside its bytes, so that millions of empty headers count.
_HEADER_BYTES = 16


def plain_records(
    batches: Iterable[bytes], offset: int, next_offset: int, bytes_max: int
) -> tuple[list[types_pb2.Record], int]:
    """Returns records from `offset` on, and the offset to go on at.

    Returns at least one record if there is one, else up to `bytes_max` of keys, values and headers. `next_offset`:
    where a reader of all of `batches` goes on. Raises FormatError.
    """
    plain: list[types_pb2.Record] = []
    for batch in batches:
        records = decode_batch(batch)
        # The first batch may begin before the offset, as batches are served whole.
        first = int(np.searchsorted(records.offsets, offset))
        sizes = _sizes(records)
        stop = _stop(sizes, first, bytes_max, RECORDS_MAX - len(plain), at_least_one=not plain)
        plain += _messages(records.slice(first, stop))
        bytes_max -= int(sizes[stop] - sizes[first])
        if stop < len(records):
            return plain, int(records.offsets[stop])
    return plain, next_offset


def _sizes(records: Records) -> NDArray[np.int64]:
    """Returns the cumulative bytes of records: before each, and of all."""
    # Over columns, because a server path has no loop over single records.
    sizes = np.zeros(len(records) + 1, np.int64)
    sizes[1:] = records.keys.ends + records.values.ends
    if records.headers is not None:
        of_headers = np.zeros(len(records.headers.names) + 1, np.int64)
        of_headers[1:] = records.headers.names.ends + records.headers.values.ends
        of_headers += np.arange(len(of_headers)) * _HEADER_BYTES
        sizes[1:] += of_headers[records.headers.ends]
    return sizes


def _stop(sizes: NDArray[np.int64], first: int, bytes_max: int, count_max: int, *, at_least_one: bool) -> int:
    """Returns the first position that does not fit any more."""
    count = len(sizes) - 1
    fits = int(np.searchsorted(sizes[1:], int(sizes[first]) + bytes_max, side="right"))
    stop = min(fits, first + count_max, count)
    # A record larger than the limit is served alone: otherwise its reader would never get past it.
    return max(stop, first + 1) if at_least_one and first < count else max(stop, first)


def _messages(records: Records) -> list[types_pb2.Record]:
    headers = records.headers.to_list() if records.headers is not None else [[]] * len(records)
    columns = zip(
        records.keys.to_list(),
        records.values.to_list(),
        headers,
        records.timestamps_ms.tolist(),
        records.offsets.tolist(),
        strict=True,
    )
    return [
        types_pb2.Record(
            key=key,
            value=value,
            headers=[types_pb2.Header(key=name, value=content) for name, content in pairs],
            timestamp_ms=timestamp_ms,
            offset=offset,
        )
        for key, value, pairs, timestamp_ms, offset in columns
    ]
