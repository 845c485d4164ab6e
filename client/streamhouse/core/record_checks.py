"""Checks records given to a producer before they are appended, so that a bad record fails alone and not its batch.

Objects that the application may still change (bytearrays, memoryviews, lists, dicts) are copied: encoding comes later.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import index
from reprlib import repr as short
from typing import Any, SupportsIndex, cast

import numpy as np
from numpy.typing import NDArray
from shformat import DEFAULT_LIMITS, TIMESTAMP_MS_MAX, TIMESTAMP_MS_MIN, BytesColumn, Header
from shproto.errors import BatchTooLarge, InvalidArgument

from streamhouse.core.producer_batch import RECORD_BYTES_MAX, RECORD_OVERHEAD_BYTES, ProducerBatch
from streamhouse.core.times import ms_of

Bytes = bytes | bytearray | memoryview
Headers = Mapping[str, Bytes | None] | Iterable[tuple[str, Bytes | None]]
# value, key, headers, timestamp_ms (None: now), bytes that the record counts for.
CheckedRecord = tuple[bytes | None, bytes | None, tuple[Header, ...], int | None, int]

_BYTES_OR_NULL = {bytes, type(None)}


def check_record(
    value: Bytes | None, key: Bytes | None, headers: Headers | None, timestamp_ms: int | datetime | None
) -> CheckedRecord:
    """Returns the record as it will be sent, with its size. Raises TypeError, InvalidArgument, BatchTooLarge."""
    size_bytes = RECORD_OVERHEAD_BYTES
    if value is not None:
        if value.__class__ is not bytes:
            value = _bytes_of("value", value)
        size_bytes += len(value)
    if key is not None:
        if key.__class__ is not bytes:
            key = _bytes_of("key", key)
        size_bytes += len(key)
    own: tuple[Header, ...] = ()
    if headers:
        own, headers_bytes = _headers_of("headers", headers)
        size_bytes += headers_bytes
    if timestamp_ms is not None:
        timestamp_ms = _timestamp_of("timestamp_ms", timestamp_ms)
    if size_bytes > RECORD_BYTES_MAX:
        raise _too_large("the record", size_bytes)
    return value, key, own, timestamp_ms, size_bytes


Indices = NDArray[np.int64] | range
"""Ascending positions of records in the lists of a `send_many`. A range steps by 1."""


def where(indices: Indices) -> Any:
    """Returns an index of lists and arrays for these positions: a slice for a range, which copies less."""
    return slice(indices.start, indices.stop) if isinstance(indices, range) else indices


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordColumns:
    """The lists given to `send_many`, checked. `sizes`: int64, shape (n,), bytes each record counts for; `key_sizes`
    the bytes of its key, 0 for null."""

    values: Sequence[bytes | None]
    keys: Sequence[bytes | None] | None
    timestamps_ms: NDArray[np.int64]
    headers: Sequence[tuple[Header, ...]] | None
    sizes: NDArray[np.int64]
    key_sizes: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        values: Sequence[Bytes | None],
        keys: Sequence[Bytes | None] | None,
        timestamps_ms: int | datetime | Sequence[int | datetime],
        headers: Sequence[Headers] | None,
    ) -> "RecordColumns":
        """Checks the lists, and returns them as columns. Raises TypeError, InvalidArgument, BatchTooLarge."""
        count = count_of("values", values)
        for name, column in (("keys", keys), ("headers", headers)):
            if column is not None and count_of(name, column) != count:
                raise InvalidArgument(
                    f"{name} has {len(column)} entries for {count} values", field=name, value=len(column), limit=count
                )
        own_values, sizes = _column_of("values", values)
        sizes += RECORD_OVERHEAD_BYTES
        own_keys, key_sizes = (None, np.zeros(count, np.int64)) if keys is None else _column_of("keys", keys)
        sizes += key_sizes
        own_headers: list[tuple[Header, ...]] | None = None
        if headers is not None:
            checked = [_headers_of(f"headers[{at}]", item) if item else ((), 0) for at, item in enumerate(headers)]
            own_headers = [pairs for pairs, _ in checked]
            sizes += np.fromiter((size_bytes for _, size_bytes in checked), np.int64, count)
        check_sizes(sizes)
        return cls(
            values=own_values,
            keys=own_keys,
            timestamps_ms=timestamps_of(timestamps_ms, count),
            headers=own_headers,
            sizes=sizes,
            key_sizes=key_sizes,
        )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def has_keys(self) -> bool:
        """True if a list of keys was given."""
        return self.keys is not None

    def append_to(self, batch: ProducerBatch, indices: Indices, size_bytes: int) -> int:
        """Appends some records to a batch, which has room for them. Returns the position of the first there."""
        return batch.extend(*self.pick(indices), size_bytes)

    def key_column(self, start: int, stop: int) -> BytesColumn | None:
        """Returns the keys of records start to stop; None if no list of keys was given."""
        if self.keys is None:
            return None
        keys, ends = self.keys[start:stop], np.cumsum(self.key_sizes[start:stop])
        if None not in keys:
            return BytesColumn(b"".join(cast("Sequence[bytes]", keys)), ends)
        valid = np.fromiter((key is not None for key in keys), np.bool_, len(keys))
        return BytesColumn(b"".join(key for key in keys if key is not None), ends, valid)

    def pick(
        self, indices: Indices
    ) -> tuple[
        Sequence[bytes | None], Sequence[bytes | None] | None, Sequence[tuple[Header, ...]] | None, Sequence[int]
    ]:
        """Returns values, keys, headers and timestamps_ms of some records, in the order of `indices`."""
        if isinstance(indices, range):
            run = where(indices)
            return (
                self.values[run],
                None if self.keys is None else self.keys[run],
                None if self.headers is None else self.headers[run],
                self.timestamps_ms[run].tolist(),
            )
        wanted = indices.tolist()
        return (
            list(map(self.values.__getitem__, wanted)),
            None if self.keys is None else list(map(self.keys.__getitem__, wanted)),
            None if self.headers is None else list(map(self.headers.__getitem__, wanted)),
            self.timestamps_ms[indices].tolist(),
        )


def cut(sizes: NDArray[np.int64], limit: int, begun: int = 0) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of consecutive parts of at most `limit`, or of a single item that is larger.

    The first part has only the room that `begun` leaves of the limit; if no item fits there, it has the whole limit.
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


def check_sizes(sizes: NDArray[np.int64]) -> None:
    """Refuses records of which one is too large. Raises BatchTooLarge with the position."""
    if len(sizes) and int(sizes.max()) > RECORD_BYTES_MAX:
        position = int(np.argmax(sizes))
        raise _too_large(f"record {position}", int(sizes[position]))


def count_of(name: str, column: Sequence[Any]) -> int:
    """Returns the number of entries of a list given by the application. Raises TypeError for anything else."""
    if isinstance(column, str | bytes | bytearray | memoryview | Mapping) or not hasattr(column, "__getitem__"):
        raise TypeError(f"{name} must be a list, one entry per record, not {_described(column)}")
    return len(column)


def _column_of(name: str, column: Sequence[Bytes | None]) -> tuple[Sequence[bytes | None], NDArray[np.int64]]:
    """Returns values or keys as bytes, and the size of each. Raises TypeError, BatchTooLarge."""
    # A copy: the application may change its list while the records wait for room.
    own = cast("list[bytes | None]", list(column))
    # One pass in C: only a list with other types than bytes is walked in Python.
    kinds = set(map(type, own))
    if not kinds <= _BYTES_OR_NULL:
        for at, item in enumerate(own):
            if item is not None and item.__class__ is not bytes:
                own[at] = _bytes_of(f"{name}[{at}]", item)
    if type(None) in kinds:
        return own, np.fromiter((0 if item is None else len(item) for item in own), np.int64, len(own))
    return own, np.fromiter(map(len, cast("Sequence[bytes]", own)), np.int64, len(own))


def _bytes_of(name: str, item: object) -> bytes:
    """Returns a copy that nobody else can change. Raises TypeError, and BatchTooLarge before anything is copied."""
    if not isinstance(item, bytes | bytearray | memoryview):
        hint = "; encode it first" if isinstance(item, str) else ""
        raise TypeError(f"{name} must be bytes, bytearray, memoryview or None, not {_described(item)}{hint}")
    size_bytes = item.nbytes if isinstance(item, memoryview) else len(item)
    if size_bytes > RECORD_BYTES_MAX:
        raise _too_large(name, size_bytes)
    return bytes(item)


def _headers_of(name: str, headers: Headers) -> tuple[tuple[Header, ...], int]:
    """Returns the headers as pairs, and the bytes they count for. Raises TypeError, InvalidArgument, BatchTooLarge."""
    if isinstance(headers, Mapping):
        headers = headers.items()
    elif isinstance(headers, str | bytes | bytearray | memoryview) or not isinstance(headers, Iterable):
        raise TypeError(f"{name} must be a dict or a list of (name, value) pairs, not {_described(headers)}")
    limit, size_bytes = DEFAULT_LIMITS.headers_per_record_max, 0
    own: list[Header] = []
    for pair in headers:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{name} must hold (name, value) pairs, not {_described(pair)}")
        if len(own) == limit:
            more = f"{len(headers)}" if isinstance(headers, Sequence | Mapping) else f"more than {limit}"
            raise InvalidArgument(
                f"{name} holds {more} headers, a record may have {limit}", field="headers", value=more, limit=limit
            )
        header, value = pair
        if not isinstance(header, str):
            raise TypeError(f"{name} must have names of text, not {_described(header)}")
        if value is not None and value.__class__ is not bytes:
            value = _bytes_of(f"{name}[{short(header)}]", value)
        try:
            size_bytes += len(header.encode()) + len(value or b"") + RECORD_OVERHEAD_BYTES
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"{name} has the name {short(header)}, which is no text: {error.reason}", field="headers", value=header
            ) from error
        own.append((header, value))
    return tuple(own), size_bytes


def _timestamp_of(name: str, timestamp_ms: int | datetime) -> int:
    if isinstance(timestamp_ms, datetime):
        return ms_of(name, timestamp_ms)
    try:
        number = index(timestamp_ms)
    except TypeError:
        raise TypeError(
            f"{name} must be milliseconds since 1970 or a datetime, not {_described(timestamp_ms)}"
        ) from None
    if not TIMESTAMP_MS_MIN <= number <= TIMESTAMP_MS_MAX:
        raise InvalidArgument(
            f"{name} is {number}, must be {TIMESTAMP_MS_MIN} to {TIMESTAMP_MS_MAX}, the years 1 to 9999",
            field="timestamp_ms",
            value=number,
            limit=f"{TIMESTAMP_MS_MIN}..{TIMESTAMP_MS_MAX}",
        )
    return number


def timestamps_of(timestamps_ms: int | datetime | Sequence[int | datetime], count: int) -> NDArray[np.int64]:
    """Returns the milliseconds of `count` records, of one moment for all or a list. Raises TypeError,
    InvalidArgument."""
    single = isinstance(timestamps_ms, datetime | SupportsIndex) and not isinstance(timestamps_ms, np.ndarray)
    if single:
        return np.full(count, _timestamp_of("timestamps_ms", cast("int | datetime", timestamps_ms)), np.int64)
    column = cast("Sequence[int | datetime]", timestamps_ms)
    if count_of("timestamps_ms", column) != count:
        raise InvalidArgument(
            f"timestamps_ms has {len(column)} entries for {count} values",
            field="timestamps_ms",
            value=len(column),
            limit=count,
        )
    if isinstance(column, np.ndarray) or set(map(type, column)) <= {int}:
        try:
            numbers = np.array(column)
        except OverflowError:
            # Beyond 64 bits: the slow way below names the position.
            numbers = np.zeros(0)
        if numbers.dtype.kind == "i" and numbers.shape == (count,):
            numbers = numbers.astype(np.int64, copy=False)
            if not ((numbers < TIMESTAMP_MS_MIN) | (numbers > TIMESTAMP_MS_MAX)).any():
                return numbers
    each = (_timestamp_of(f"timestamps_ms[{at}]", item) for at, item in enumerate(column))
    return np.fromiter(each, np.int64, count)


def _described(item: object) -> str:
    return f"{short(item)} ({type(item).__name__})"


def _too_large(what: str, size_bytes: int) -> BatchTooLarge:
    return BatchTooLarge(
        f"{what} has {size_bytes} bytes, a record may have {RECORD_BYTES_MAX}",
        size_bytes=size_bytes,
        limit_bytes=RECORD_BYTES_MAX,
    )
