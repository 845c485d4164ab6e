"""Records given to a producer: checked at the door, so that one bad record fails alone and not its batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import cast

import numpy as np
from numpy.typing import NDArray
from shformat import DEFAULT_LIMITS, BytesColumn, Header
from shproto.errors import BatchTooLarge, InvalidArgument

from streamhouse.core.accumulator import RECORD_BYTES_MAX, RECORD_OVERHEAD_BYTES, record_size

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1
_BYTES_OR_NULL = {bytes, type(None)}


def check_record(
    value: bytes | None, key: bytes | None, headers: Sequence[Header] | None, timestamp_ms: int | None
) -> int:
    """The record's size in bytes. Raises TypeError, InvalidArgument, BatchTooLarge."""
    if (value.__class__ is not bytes and value is not None) or (key.__class__ is not bytes and key is not None):
        name, wrong = ("value", value) if value.__class__ is not bytes and value is not None else ("key", key)
        raise TypeError(f"{name} must be bytes or None, not {type(wrong).__name__}")
    if headers:
        _check_headers(headers, "headers")
    if timestamp_ms is not None and not _INT64_MIN <= index(timestamp_ms) <= _INT64_MAX:
        raise InvalidArgument(
            f"timestamp_ms is {timestamp_ms}, outside int64", field="timestamp_ms", value=timestamp_ms
        )
    size_bytes = record_size(value, key, headers)
    if size_bytes > RECORD_BYTES_MAX:
        raise _too_large("the record", size_bytes)
    return size_bytes


@dataclass(frozen=True, slots=True)
class ManyRecords:
    """The lists given to `send_many`, checked. `sizes`: int64, shape (n,), bytes each record counts for; `key_sizes`
    the bytes of its key, 0 for null."""

    values: Sequence[bytes | None]
    keys: Sequence[bytes | None] | None
    timestamps_ms: NDArray[np.int64]
    headers: Sequence[Sequence[Header]] | None
    sizes: NDArray[np.int64]
    key_sizes: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        values: Sequence[bytes | None],
        keys: Sequence[bytes | None] | None,
        timestamps_ms: int | Sequence[int],
        headers: Sequence[Sequence[Header]] | None,
    ) -> "ManyRecords":
        """Raises TypeError, InvalidArgument, BatchTooLarge."""
        count = len(values)
        for name, column in (("keys", keys), ("headers", headers)):
            if column is not None and len(column) != count:
                raise InvalidArgument(f"{name} has {len(column)} entries for {count} values", field=name)
        sizes = _sizes("values", values) + RECORD_OVERHEAD_BYTES
        key_sizes = np.zeros(count, np.int64) if keys is None else _sizes("keys", keys)
        sizes += key_sizes
        if headers is not None:
            sizes += _header_sizes(headers)
        if count and int(sizes.max()) > RECORD_BYTES_MAX:
            position = int(np.argmax(sizes))
            raise _too_large(f"record {position}", int(sizes[position]))
        return cls(values, keys, _timestamps(timestamps_ms, count), headers, sizes, key_sizes)

    def key_column(self, start: int, stop: int) -> BytesColumn | None:
        """The keys of records start to stop; None when no list of keys was given."""
        if self.keys is None:
            return None
        keys, ends = self.keys[start:stop], np.cumsum(self.key_sizes[start:stop])
        if None not in keys:
            return BytesColumn(b"".join(cast("Sequence[bytes]", keys)), ends)
        valid = np.fromiter((key is not None for key in keys), np.bool_, len(keys))
        return BytesColumn(b"".join(key for key in keys if key is not None), ends, valid)

    def pick(
        self, indices: NDArray[np.int64]
    ) -> tuple[Sequence[bytes | None], Sequence[bytes | None] | None, Sequence[Sequence[Header]] | None, Sequence[int]]:
        """values, keys, headers, timestamps_ms of some records, in the order of `indices`."""
        wanted = indices.tolist()
        return (
            list(map(self.values.__getitem__, wanted)),
            None if self.keys is None else list(map(self.keys.__getitem__, wanted)),
            None if self.headers is None else list(map(self.headers.__getitem__, wanted)),
            self.timestamps_ms[indices].tolist(),
        )


def cut(sizes: NDArray[np.int64], limit: int, begun: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive parts of at most `limit`, or of one item that is larger alone.

    The first part has only what `begun` leaves of the limit; where no item fits there, it has the whole.
    """
    totals = np.cumsum(sizes)
    start, floor = 0, -begun
    while start < len(sizes):
        stop = int(np.searchsorted(totals, floor + limit, side="right"))
        if stop == start and begun:
            floor, begun = 0, 0
            continue
        stop = max(stop, start + 1)
        yield start, stop
        start, floor, begun = stop, int(totals[stop - 1]), 0


def _sizes(name: str, column: Sequence[bytes | None]) -> NDArray[np.int64]:
    kinds = set(map(type, column))
    if not kinds <= _BYTES_OR_NULL:
        wrong = ", ".join(sorted(kind.__name__ for kind in kinds - _BYTES_OR_NULL))
        raise TypeError(f"{name} must hold bytes or None, not {wrong}")
    if type(None) in kinds:
        return np.fromiter((0 if item is None else len(item) for item in column), np.int64, len(column))
    return np.fromiter(map(len, column), np.int64, len(column))  # type: ignore[arg-type]


def _header_sizes(headers: Sequence[Sequence[Header]]) -> NDArray[np.int64]:
    for position, pairs in enumerate(headers):
        if pairs:
            _check_headers(pairs, f"headers of record {position}")
    return np.fromiter((record_size(None, None, pairs) for pairs in headers), np.int64, len(headers)) - (
        RECORD_OVERHEAD_BYTES
    )


def _check_headers(headers: Sequence[Header], what: str) -> None:
    limit = DEFAULT_LIMITS.headers_per_record_max
    if len(headers) > limit:
        raise InvalidArgument(
            f"{what}: {len(headers)}, at most {limit}", field="headers", value=len(headers), limit=limit
        )
    for name, value in headers:
        if not isinstance(name, str) or type(value) not in _BYTES_OR_NULL:
            raise TypeError(f"{what} must be (str, bytes or None) pairs, not ({name!r}, {value!r})")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"{what}: name {name!r} is not text: {error.reason}", field="headers") from error


def _timestamps(timestamps_ms: int | Sequence[int], count: int) -> NDArray[np.int64]:
    try:
        if isinstance(timestamps_ms, int):
            return np.full(count, timestamps_ms, np.int64)
        column = np.asarray(timestamps_ms if len(timestamps_ms) else np.zeros(0, np.int64))
    except OverflowError as error:
        raise InvalidArgument(f"timestamps_ms: {error}", field="timestamps_ms") from error
    if column.dtype.kind != "i" or column.shape != (count,):
        raise InvalidArgument(
            f"timestamps_ms must be {count} int64 numbers, not {column.dtype} of shape {column.shape}",
            field="timestamps_ms",
        )
    return column.astype(np.int64, copy=False)


def _too_large(what: str, size_bytes: int) -> BatchTooLarge:
    return BatchTooLarge(
        f"{what} has {size_bytes} bytes, a record may have {RECORD_BYTES_MAX}",
        size_bytes=size_bytes,
        limit_bytes=RECORD_BYTES_MAX,
    )
