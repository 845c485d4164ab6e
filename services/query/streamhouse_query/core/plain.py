"""Records in the plain form, for clients that do not know the batch encoding.

The one place of a server that makes an object per record; it is bounded by RECORDS_MAX per response.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from shformat import Records, decode_batch
from shproto.v1 import types_pb2

# About 10 ms of work. Who wants more takes encoded batches.
RECORDS_MAX = 10_000


def plain_records(
    batches: Iterable[bytes], offset: int, next_offset: int, bytes_max: int
) -> tuple[list[types_pb2.Record], int]:
    """(records from `offset` on: at least one if there is one, else up to `bytes_max` of keys and values;
    the offset to go on at). `next_offset`: where a reader of all of `batches` goes on. Raises FormatError."""
    plain: list[types_pb2.Record] = []
    for batch in batches:
        records = decode_batch(batch)
        first = int(np.searchsorted(records.offsets, offset))
        stop = _stop(records, first, bytes_max, RECORDS_MAX - len(plain), at_least_one=not plain)
        taken = records.slice(first, stop)
        plain += _messages(taken)
        bytes_max -= taken.size_bytes
        if stop < len(records):
            return plain, int(records.offsets[stop])
    return plain, next_offset


def _stop(records: Records, first: int, bytes_max: int, count_max: int, *, at_least_one: bool) -> int:
    """The first position that does not fit any more."""
    sizes = records.keys.ends + records.values.ends
    base = int(sizes[first - 1]) if first else 0
    fits = int(np.searchsorted(sizes, base + bytes_max, side="right"))
    stop = min(fits, first + count_max, len(records))
    return max(stop, first + 1) if at_least_one and first < len(records) else max(stop, first)


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
