"""Many records in memory as columns: no Python object per record.

Owns: the distinction of null, empty and present, slicing and joining. Does not own: bytes on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, MissingExtra
from .limits import INT64_MAX, INT64_MIN

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]
Header = tuple[str, bytes | None]

# Arrow's plain binary array has 32-bit offsets.
_ARROW_BINARY_BYTES_MAX = (1 << 31) - 1


@dataclass(slots=True, eq=False)
class BytesColumn:
    """A column of byte strings, each present (maybe empty) or null.

    ``data``: all values back to back. ``ends``: int64, shape (n,), where value i ends in data (value i starts
    where value i-1 ends). ``valid``: bool, shape (n,), False = null (and then of length 0); None = no nulls.
    """

    data: bytes | memoryview
    ends: Int64s
    valid: Bools | None = None

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def from_list(cls, values: Sequence[bytes | None]) -> BytesColumn:
        """Returns the column of a list; raises TypeError for an item that is neither bytes nor None."""
        valid = None
        present = cast(Sequence[bytes], values)
        try:
            data = b"".join(present)
        except TypeError:  # nulls, or an item that the second join refuses, too
            valid = np.fromiter((value is not None for value in values), np.bool_, len(values))
            present = [b"" if value is None else value for value in values]
            data = b"".join(present)
        sizes = np.fromiter(map(len, present), np.int64, len(present))
        return cls(data, np.cumsum(sizes), valid)

    @classmethod
    def nulls(cls, count: int) -> BytesColumn:
        """Returns a column of `count` nulls."""
        return cls(b"", np.zeros(count, np.int64), np.zeros(count, np.bool_))

    def to_list(self) -> list[bytes | None]:
        """Returns a bytes object (or None) per value; copies the data once."""
        data = bytes(self.data)
        ends = self.ends.tolist()
        values: list[bytes | None] = [data[start:end] for start, end in zip(chain((0,), ends), ends, strict=False)]
        if self.valid is not None:
            for null in np.flatnonzero(~self.valid).tolist():
                values[null] = None
        return values

    def slice(self, start: int, stop: int) -> BytesColumn:
        """Returns values start to stop (0 <= start <= stop <= n), the data as a view."""
        first = int(self.ends[start - 1]) if start else 0
        last = int(self.ends[stop - 1]) if stop else 0
        valid = None if self.valid is None else self.valid[start:stop]
        return BytesColumn(memoryview(self.data)[first:last], self.ends[start:stop] - first, valid)

    @property
    def size_bytes(self) -> int:
        """Bytes of all values."""
        return len(self.data)

    @property
    def all_null(self) -> bool:
        """True if no value is present (also for zero values)."""
        return self.valid is not None and not self.valid.any()

    @staticmethod
    def concat(columns: Sequence[BytesColumn]) -> BytesColumn:
        """Returns all columns joined in order; copies the data once."""
        data = b"".join([column.data for column in columns])
        ends = _concat_ends([(column.ends, len(column.data)) for column in columns])
        if all(column.valid is None for column in columns):
            return BytesColumn(data, ends)
        masks = [np.ones(len(c), np.bool_) if c.valid is None else c.valid for c in columns]
        return BytesColumn(data, ends, np.concatenate(masks))

    def to_arrow(self) -> Any:
        """Returns a pyarrow binary array (large_binary from 2 GiB on) over the same data, not copied."""
        pa = _pyarrow("to_arrow()")
        large = len(self.data) > _ARROW_BINARY_BYTES_MAX
        offsets = np.zeros(len(self) + 1, np.int64 if large else np.int32)
        offsets[1:] = self.ends
        bitmap = None if self.valid is None else pa.py_buffer(np.packbits(self.valid, bitorder="little"))
        buffers = [bitmap, pa.py_buffer(offsets), pa.py_buffer(self.data)]
        return pa.Array.from_buffers(pa.large_binary() if large else pa.binary(), len(self), buffers)

    @classmethod
    def from_arrow(cls, array: Any) -> BytesColumn:
        """Returns the column of a pyarrow Array or ChunkedArray of binary or string values, of whichever of Arrow's
        layouts; text is UTF-8.

        The data is not copied, unless the array has several chunks, a null over bytes, or a layout without one data
        buffer (views, dictionaries, fixed sizes). Raises TypeError for values of another type, FormatError if the
        array's offsets contradict its buffers, MissingExtra without pyarrow.
        """
        pa = _pyarrow("from_arrow()")
        if isinstance(array, pa.ChunkedArray):
            chunks = [cls.from_arrow(chunk) for chunk in array.chunks if len(chunk)]
            return cls.concat(chunks) if len(chunks) != 1 else chunks[0]
        if not isinstance(array, pa.Array):
            raise TypeError(f"a pyarrow Array or ChunkedArray is needed, not a {type(array).__name__}")
        if pa.types.is_null(array.type):
            return cls.nulls(len(array))
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if not _is_bytes(pa, array.type):
            raise TypeError(f"an array of {array.type} has no bytes: cast it to pyarrow.binary() or pyarrow.string()")
        valid = None
        if array.null_count:
            valid = array.is_valid().to_numpy(zero_copy_only=False)
        if not _has_data_buffer(pa, array.type):
            array = array.cast(pa.large_binary())
        column = cls(*_data_of(pa, array), valid)
        if valid is not None and _covers_nulls(column.ends, valid):
            column = cls(*_data_of(pa, array.cast(pa.large_binary()).fill_null(b"")), valid)
        return column


def _pyarrow(user: str) -> Any:
    """Returns the module; it is an extra, and slow to import. Raises MissingExtra, which names `user`."""
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise MissingExtra(user, "pyarrow", "arrow") from error
    return pyarrow


def _is_bytes(pa: Any, kind: Any) -> bool:
    types = pa.types
    return bool(
        _has_data_buffer(pa, kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
        or types.is_string_view(kind)
    )


def _has_data_buffer(pa: Any, kind: Any) -> bool:
    """Returns True for a layout of offsets and one data buffer."""
    types = pa.types
    return bool(
        types.is_binary(kind) or types.is_string(kind) or types.is_large_binary(kind) or types.is_large_string(kind)
    )


def _data_of(pa: Any, array: Any) -> tuple[memoryview, Int64s]:
    """Returns data and ends of an array of offsets and one data buffer. Raises FormatError."""
    count = len(array)
    if not count:  # such an array may have no buffers at all
        return memoryview(b""), np.zeros(0, np.int64)
    _, offsets_buffer, data_buffer = array.buffers()
    data = memoryview(b"") if data_buffer is None else memoryview(data_buffer).cast("B")
    large = pa.types.is_large_binary(array.type) or pa.types.is_large_string(array.type)
    every: NDArray[Any] = np.frombuffer(offsets_buffer, np.int64 if large else np.int32)
    offsets = every[array.offset : array.offset + count + 1]
    # Arrow checks nothing of what it is given as buffers, say by a file: a wrong offset would be an end far away.
    if len(offsets) <= count or offsets[0] < 0 or offsets[-1] > len(data) or (offsets[1:] < offsets[:-1]).any():
        raise FormatError(f"the array's offsets do not lie in its {len(data)} bytes of data, in order")
    first = int(offsets[0])
    return data[first : int(offsets[-1])], offsets[1:].astype(np.int64) - first


def _covers_nulls(ends: Int64s, valid: Bools) -> bool:
    """Returns True if a null has a length, which Arrow allows."""
    return bool((np.diff(ends, prepend=0)[~valid] != 0).any())


def _repeated(column: BytesColumn, times: int) -> BytesColumn:
    """Returns the values of a small column over and over."""
    size_bytes = len(column.data)
    starts = np.repeat(np.arange(times, dtype=np.int64) * size_bytes, len(column))
    valid = None if column.valid is None else np.tile(column.valid, times)
    return BytesColumn(bytes(column.data) * times, np.tile(column.ends, times) + starts, valid)


def _concat_ends(columns: Sequence[tuple[Int64s, int]]) -> Int64s:
    """Returns the joined cumulative ends, each column shifted by the totals of those before."""
    joined = np.empty(sum(len(ends) for ends, _ in columns), np.int64)
    position, base = 0, 0
    for ends, total in columns:
        np.add(ends, base, out=joined[position : position + len(ends)])
        position += len(ends)
        base += total
    return joined


@dataclass(slots=True, eq=False)
class HeadersColumn:
    """The headers of n records: ``ends`` int64, shape (n,), cumulative header count; names (UTF-8, never
    null) and values (may be null) of all headers back to back."""

    ends: Int64s
    names: BytesColumn
    values: BytesColumn

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def from_list(cls, headers: Sequence[Sequence[Header]]) -> HeadersColumn:
        """Returns the column for a sequence of (name, value) per record.

        Raises UnicodeEncodeError for a lone surrogate in a name.
        """
        flat = list(chain.from_iterable(headers))
        counts = np.fromiter(map(len, headers), np.int64, len(headers))
        names = BytesColumn.from_list([name.encode() for name, _ in flat])
        return cls(np.cumsum(counts), names, BytesColumn.from_list([value for _, value in flat]))

    @classmethod
    def constant(cls, count: int, headers: Sequence[Header]) -> HeadersColumn:
        """Returns the column of `count` records that all have these headers.

        Raises UnicodeEncodeError for a lone surrogate in a name.
        """
        one = cls.from_list([headers])
        each = len(headers)
        return cls(
            np.arange(1, count + 1, dtype=np.int64) * each,
            _repeated(one.names, count),
            _repeated(one.values, count),
        )

    @classmethod
    def of_columns(cls, columns: Sequence[tuple[str, BytesColumn]]) -> HeadersColumn:
        """Returns the column of records that all have the same header names, at least one: each name with a column of
        a value per record. A null is a header without a value.

        Raises UnicodeEncodeError for a lone surrogate in a name, FormatError for columns of different lengths, and
        MissingExtra for more than one name without pyarrow.
        """
        each, count = len(columns), len(columns[0][1])
        for name, column in columns:
            if len(column) != count:
                raise FormatError(f"header {name!r} has {len(column)} values for {count} records")
        if each == 1:
            values = columns[0][1]
        else:
            # All of a name, then all of the next: taken in turns, record by record.
            turns = np.arange(each * count).reshape(each, count).T.ravel()
            values = BytesColumn.concat([column for _, column in columns])
            values = BytesColumn.from_arrow(values.to_arrow().take(_pyarrow("of_columns()").array(turns)))
        names = BytesColumn.from_list([name.encode() for name, _ in columns])
        return cls(np.arange(1, count + 1, dtype=np.int64) * each, _repeated(names, count), values)

    @classmethod
    def empty(cls, count: int) -> HeadersColumn:
        """Returns the column of `count` records without headers."""
        none = np.zeros(0, np.int64)
        return cls(np.zeros(count, np.int64), BytesColumn(b"", none), BytesColumn(b"", none))

    def to_list(self) -> list[list[Header]]:
        """Returns a list of (name, value) per record."""
        names = self.names.to_list()
        flat = [(b"" if n is None else n).decode() for n in names]
        pairs = list(zip(flat, self.values.to_list(), strict=True))
        ends = self.ends.tolist()
        return [pairs[start:end] for start, end in zip(chain((0,), ends), ends, strict=False)]

    def slice(self, start: int, stop: int) -> HeadersColumn:
        """Returns the headers of records start to stop."""
        first = int(self.ends[start - 1]) if start else 0
        last = int(self.ends[stop - 1]) if stop else 0
        return HeadersColumn(
            self.ends[start:stop] - first, self.names.slice(first, last), self.values.slice(first, last)
        )

    def to_arrow(self, kind: Any) -> Any:
        """Returns a pyarrow list array of type `kind`: a list of structs of a name (string) and a value (binary). The
        values are not copied. Raises MissingExtra without pyarrow."""
        pa = _pyarrow("to_arrow()")
        names, values = self.names.to_arrow(), self.values.to_arrow()
        offsets = np.zeros(len(self) + 1, np.int32)
        offsets[1:] = self.ends
        pairs = pa.StructArray.from_arrays([names.cast(pa.string()), values], fields=list(kind.value_type))
        return pa.ListArray.from_arrays(pa.array(offsets), pairs, type=kind)

    @classmethod
    def from_arrow(cls, array: Any) -> HeadersColumn:
        """Returns the column of a pyarrow list array as `to_arrow` makes it, or of a map array; a null has no headers.
        Raises TypeError for another type, FormatError for a null name, MissingExtra without pyarrow."""
        pa = _pyarrow("from_arrow()")
        if isinstance(array, pa.ChunkedArray):
            chunks = [cls.from_arrow(chunk) for chunk in array.chunks if len(chunk)]
            return cls.concat(chunks) if chunks else cls.empty(0)
        kind = array.type
        if pa.types.is_map(kind):
            kind = pa.list_(pa.struct([kind.key_field, kind.item_field]))
            array = array.cast(kind)
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not (is_list and pa.types.is_struct(kind.value_type) and kind.value_type.num_fields == 2):
            raise TypeError(f"headers must be a list per record of structs of a name and a value, not {kind}")
        # Lengths instead of offsets: flatten() leaves out what lies under nulls and outside of a slice.
        counts = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        names, values = array.flatten().flatten()
        if names.null_count:
            raise FormatError("the name of a header is null")
        return cls(np.cumsum(counts), BytesColumn.from_arrow(names), BytesColumn.from_arrow(values))

    @property
    def size_bytes(self) -> int:
        """Bytes of all names and values."""
        return self.names.size_bytes + self.values.size_bytes

    @staticmethod
    def concat(columns: Sequence[HeadersColumn]) -> HeadersColumn:
        """Returns all columns joined in order."""
        return HeadersColumn(
            _concat_ends([(column.ends, len(column.names)) for column in columns]),
            BytesColumn.concat([column.names for column in columns]),
            BytesColumn.concat([column.values for column in columns]),
        )


@dataclass(slots=True, eq=False, kw_only=True)
class Records:
    """n records as columns, all of length n. ``headers`` is None when no record has any.

    Columns of decoded records are views into the decoded bytes, which they keep alive.
    """

    offsets: Int64s
    timestamps_ms: Int64s
    keys: BytesColumn
    values: BytesColumn
    headers: HeadersColumn | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    @classmethod
    def from_lists(
        cls,
        values: Sequence[bytes | None],
        keys: Sequence[bytes | None] | None = None,
        timestamps_ms: int | Sequence[int] | Int64s | None = None,
        headers: Sequence[Sequence[Header]] | None = None,
        offsets: Sequence[int] | Int64s | None = None,
    ) -> Records:
        """Returns the columns of plain lists.

        keys None: all null. timestamps_ms None: all 0 (there is no clock here), an int: the same for all.
        offsets None: 0, 1, 2, ... Raises FormatError if a list is not as long as `values` or a number is
        outside int64.
        """
        count = len(values)
        for name, column in (("keys", keys), ("headers", headers)):
            if column is not None and len(column) != count:
                raise FormatError(f"{name} has {len(column)} entries for {count} values")
        return cls(
            offsets=_int64s("offsets", np.arange(count) if offsets is None else offsets, count),
            timestamps_ms=_int64s("timestamps_ms", 0 if timestamps_ms is None else timestamps_ms, count),
            keys=BytesColumn.nulls(count) if keys is None else BytesColumn.from_list(keys),
            values=BytesColumn.from_list(values),
            headers=HeadersColumn.from_list(headers) if headers is not None and any(headers) else None,
        )

    def slice(self, start: int, stop: int) -> Records:
        """Returns records start to stop (positions, not offsets), data as views."""
        return Records(
            offsets=self.offsets[start:stop],
            timestamps_ms=self.timestamps_ms[start:stop],
            keys=self.keys.slice(start, stop),
            values=self.values.slice(start, stop),
            headers=None if self.headers is None else self.headers.slice(start, stop),
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all keys, values, header names and header values, as the application sent them."""
        headers = 0 if self.headers is None else self.headers.size_bytes
        return self.keys.size_bytes + self.values.size_bytes + headers

    @staticmethod
    def concat(parts: Sequence[Records]) -> Records:
        """Returns all parts joined in order; copies the data once. `parts` must not be empty."""
        if len(parts) == 1:
            return parts[0]
        headers = None
        if any(part.headers is not None for part in parts):
            headers = HeadersColumn.concat([part.headers or HeadersColumn.empty(len(part)) for part in parts])
        return Records(
            offsets=np.concatenate([part.offsets for part in parts]),
            timestamps_ms=np.concatenate([part.timestamps_ms for part in parts]),
            keys=BytesColumn.concat([part.keys for part in parts]),
            values=BytesColumn.concat([part.values for part in parts]),
            headers=headers,
        )


def _int64s(name: str, numbers: int | Sequence[int] | NDArray[Any], count: int) -> Int64s:
    """Returns an int64 array of `count` numbers, an int repeated; refuses numbers outside int64 with FormatError."""
    if isinstance(numbers, int):
        if not INT64_MIN <= numbers <= INT64_MAX:
            raise FormatError(f"{name} is {numbers}, outside int64")
        return np.full(count, numbers, np.int64)
    column = np.asarray(numbers) if len(numbers) else np.zeros(0, np.int64)
    if column.dtype.kind not in "iu" or (column.dtype.kind == "u" and column.max() > INT64_MAX):
        raise FormatError(f"{name} holds something that is not an int64")
    if column.shape != (count,):
        raise FormatError(f"{name} has shape {column.shape} for {count} values")
    return column.astype(np.int64, copy=False)
