"""Checks Arrow arrays given to a producer, and hands out their records by batch: no Python object per record.

The arrays must not change until the records are sent, which Arrow asks for anyway: batches are views of their buffers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shformat import DEFAULT_LIMITS, BytesColumn, FormatError, HeadersColumn, MissingExtra, Records
from shproto.errors import InvalidArgument

from streamhouse.core.producer_batch import RECORD_OVERHEAD_BYTES, ProducerBatch
from streamhouse.core.record_checks import Bytes, Indices, check_sizes, timestamps_of, where
from streamhouse.records import headers_type

Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ArrowRecords:
    """The arrays given to `send_columns`, checked. `sizes`: int64, shape (n,), bytes each record counts for."""

    records: Records
    sizes: Int64s
    has_keys: bool

    @classmethod
    def of(
        cls,
        values: Any,
        keys: Any,
        timestamps_ms: Any,
        headers: Any,
    ) -> "ArrowRecords":
        """Checks the arrays, and returns them as columns. Raises TypeError, InvalidArgument, BatchTooLarge, and
        MissingExtra without pyarrow."""
        value_column = _bytes_column("values", values)
        count = len(value_column)
        key_column = BytesColumn.nulls(count) if keys is None else _bytes_column("keys", keys)
        header_column = None if headers is None else _headers_column(headers, count)
        stamps = _timestamps(timestamps_ms, count)
        for name, column in (("keys", key_column), ("headers", header_column)):
            if column is not None and len(column) != count:
                raise InvalidArgument(
                    f"{name} has {len(column)} entries for {count} values", field=name, value=len(column), limit=count
                )
        records = Records(
            offsets=np.arange(count),
            timestamps_ms=stamps,
            keys=key_column,
            values=value_column,
            headers=header_column,
        )
        sizes = _sizes_of(value_column.ends) + _sizes_of(key_column.ends) + RECORD_OVERHEAD_BYTES
        if header_column is not None:
            sizes += _header_sizes(header_column)
        check_sizes(sizes)
        return cls(records=records, sizes=sizes, has_keys=keys is not None)

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def keys(self) -> Sequence[bytes | None] | None:
        """Keys as a list, for a partitioner of the application; None if no keys were given."""
        return self.records.keys.to_list() if self.has_keys else None

    def key_column(self, start: int, stop: int) -> BytesColumn | None:
        """Returns the keys of records start to stop; None if no keys were given."""
        return self.records.keys.slice(start, stop) if self.has_keys else None

    def append_to(self, batch: ProducerBatch, indices: Indices, size_bytes: int) -> int:
        """Appends some records to a batch, which has room for them. Returns the position of the first there."""
        return batch.extend_columns(self.pick(indices), size_bytes)

    def pick(self, indices: Indices) -> Records:
        """Returns some records, in the order of `indices`: views for a range, else copies."""
        if isinstance(indices, range):
            return self.records.slice(indices.start, indices.stop)
        keys, values, headers = self._arrays
        wanted = _pyarrow().array(indices)
        return Records(
            offsets=np.arange(len(indices)),
            timestamps_ms=self.records.timestamps_ms[where(indices)],
            keys=BytesColumn.nulls(len(indices)) if keys is None else BytesColumn.from_arrow(keys.take(wanted)),
            values=BytesColumn.from_arrow(values.take(wanted)),
            headers=None if headers is None else HeadersColumn.from_arrow(headers.take(wanted)),
        )

    @cached_property
    def _arrays(self) -> tuple[Any, Any, Any]:
        """Keys, values and headers as Arrow arrays, whose `take` gathers in C++."""
        headers = self.records.headers
        return (
            self.records.keys.to_arrow() if self.has_keys else None,
            self.records.values.to_arrow(),
            None if headers is None else headers.to_arrow(headers_type(_pyarrow())),
        )


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise MissingExtra("send_columns()", "pyarrow", "arrow") from error
    return pyarrow


def _sizes_of(ends: Int64s) -> Int64s:
    return np.diff(ends, prepend=0)


def _header_sizes(headers: HeadersColumn) -> Int64s:
    """Returns the bytes that the headers of each record count for. Raises InvalidArgument for too many headers."""
    counts = _sizes_of(headers.ends)
    limit = DEFAULT_LIMITS.headers_per_record_max
    if len(counts) and int(counts.max()) > limit:
        position = int(counts.argmax())
        raise InvalidArgument(
            f"headers[{position}] holds {counts[position]} headers, a record may have {limit}",
            field="headers",
            value=int(counts[position]),
            limit=limit,
        )
    flat = np.concatenate([np.zeros(1, np.int64), headers.names.ends + headers.values.ends])
    return _sizes_of(flat[headers.ends]) + counts * RECORD_OVERHEAD_BYTES


def _bytes_column(field: str, array: Any) -> BytesColumn:
    """Returns values, keys or values of a header as a column. Raises TypeError, InvalidArgument that name the field."""
    try:
        return BytesColumn.from_arrow(array)
    except TypeError as error:
        raise TypeError(f"{field}: {error}") from None
    except FormatError as error:
        raise InvalidArgument(f"{field}: {error.what}", field=field) from error


def _headers_column(headers: Any, count: int) -> HeadersColumn | None:
    """Returns the headers of `count` records; None for an empty dict. Raises TypeError, InvalidArgument."""
    if isinstance(headers, Mapping):
        return _headers_of_mapping(headers, count)
    pa = _pyarrow()
    if not isinstance(headers, pa.Array | pa.ChunkedArray):
        raise TypeError(
            f"headers must be a dict of bytes or arrays, or an array of lists of (name, value), not a "
            f"{type(headers).__name__}"
        )
    try:
        column = HeadersColumn.from_arrow(headers)
        column.names.to_arrow().cast(pa.string())  # refuses names that are no text
    except TypeError as error:
        raise TypeError(f"headers: {error}") from None
    except (FormatError, pa.ArrowInvalid) as error:
        raise InvalidArgument(f"headers: {error}", field="headers") from error
    return column


def _headers_of_mapping(headers: Mapping[str, Any], count: int) -> HeadersColumn | None:
    """Returns the headers of `count` records which all have the same names: a value for all of them, or an array."""
    columns: list[tuple[str, BytesColumn]] = []
    for name, value in headers.items():
        if not isinstance(name, str):
            raise TypeError(f"headers must have names of text, not {name!r}")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"headers has the name {name!r}, which is no text: {error.reason}", field="headers", value=name
            ) from error
        if value is None:
            column = BytesColumn.nulls(count)
        elif isinstance(value, Bytes):
            own = bytes(value)
            column = BytesColumn(own * count, np.arange(1, count + 1, dtype=np.int64) * len(own))
        else:
            column = _bytes_column(f"headers[{name!r}]", value)
            if len(column) != count:
                raise InvalidArgument(
                    f"headers[{name!r}] has {len(column)} entries for {count} values",
                    field="headers",
                    value=len(column),
                    limit=count,
                )
        columns.append((name, column))
    return HeadersColumn.of_columns(columns) if columns else None


def _timestamps(timestamps_ms: Any, count: int) -> Int64s:
    """Returns the timestamps in milliseconds: of one for all, of an array of integers or of Arrow timestamps, rounded
    down. Raises TypeError, InvalidArgument."""
    pa = _pyarrow()
    if not isinstance(timestamps_ms, pa.Array | pa.ChunkedArray):
        return timestamps_of(timestamps_ms, count)
    if timestamps_ms.null_count:
        raise InvalidArgument(
            f"timestamps_ms has {timestamps_ms.null_count} nulls, a record has a timestamp",
            field="timestamps_ms",
            value=None,
        )
    if pa.types.is_timestamp(timestamps_ms.type):
        import pyarrow.compute as pc

        timestamps_ms = pc.floor_temporal(timestamps_ms, unit="millisecond").cast(pa.timestamp("ms")).cast(pa.int64())
    elif not pa.types.is_integer(timestamps_ms.type):
        raise TypeError(f"timestamps_ms must be an array of timestamps or integers, not of {timestamps_ms.type}")
    return timestamps_of(timestamps_ms.to_numpy(zero_copy_only=False), count)
