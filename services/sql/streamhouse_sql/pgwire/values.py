"""Columns of Arrow to PostgreSQL's text and binary formats, and whole batches to DataRow messages.

Everything is computed by column: a value never becomes a Python object. A *piece* is a binary column with the bytes of
each row; a row's message is the join of its pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from streamhouse_sql.pgwire.core import types as pg
from streamhouse_sql.pgwire.core.types import ColumnType

TEXT, BINARY = 0, 1
# Between the epochs of Arrow (1970) and PostgreSQL (2000).
_EPOCH_DAYS = 10_957
_EPOCH_US = _EPOCH_DAYS * 86_400_000_000
_DAY_US, _HOUR_US, _MINUTE_US, _SECOND_US = 86_400_000_000, 3_600_000_000, 60_000_000, 1_000_000
_NULL_LENGTH = 0xFFFFFFFF


def data_rows(batch: Any, columns: Sequence[ColumnType], formats: Sequence[int]) -> bytes:
    """Returns the batch as DataRow messages."""
    if batch.num_rows == 0:
        return b""
    pieces: list[Any] = []
    sizes = np.full(batch.num_rows, 4 + 2 + 4 * len(columns), np.int64)
    for array, column, form in zip(batch.columns, columns, formats, strict=True):
        value = encoded(array, column, form)
        lengths = _lengths(value)
        sizes += lengths
        pieces += [_length_piece(value, lengths), pc.fill_null(value, b"")]
    header = np.empty(batch.num_rows, np.dtype([("tag", "S1"), ("size", ">i4"), ("columns", ">i2")]))
    header["tag"], header["size"], header["columns"] = b"D", sizes, len(columns)
    return _bytes_of(_join(_fixed(header), *pieces))


def encoded(array: Any, column: ColumnType, form: int) -> Any:
    """Returns the values of a column as a binary array, null where the value is."""
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), pa.binary())
    if column.is_array:
        return _array_binary(array, column) if form == BINARY else _array_text(array, column)
    return _binary(array, column.type) if form == BINARY else _text(array, column.type).cast(pa.binary())


# ---- text


def _text(array: Any, kind: pg.PgType) -> Any:
    """Returns the values as PostgreSQL writes them: a string or binary array."""
    match kind:
        case pg.BOOL:
            return pc.if_else(array, "t", "f")
        case pg.FLOAT4 | pg.FLOAT8:
            return _float_text(array)
        case pg.NUMERIC:
            return _numeric_text(array)
        case pg.BYTEA:
            return _join_text(pa.scalar("\\x"), _hex(array))
        case pg.TIMESTAMP | pg.TIMESTAMPTZ:
            # Arrow writes the zone as Z, PostgreSQL as an offset.
            local = array.cast(pa.timestamp("us", "UTC" if array.type.tz else None)).cast(pa.int64())
            return _timestamp_text(local, "+00" if kind is pg.TIMESTAMPTZ else "")
        case pg.DATE:
            return _with_infinity(array.cast(pa.int32()), array, np.int32)
        case pg.INTERVAL:
            return _interval_text(array)
    return array.cast(pa.string())


def _float_text(array: Any) -> Any:
    text = array.cast(pa.string())
    for ours, theirs in (("nan", "NaN"), ("inf", "Infinity"), ("-inf", "-Infinity")):
        text = pc.if_else(pc.equal(text, ours), theirs, text)
    return text


def _numeric_text(array: Any) -> Any:
    """Returns decimals without an exponent, which Arrow writes for small ones."""
    if not pa.types.is_decimal(array.type):
        return array.cast(pa.string())
    scale = array.type.scale
    if scale == 0:
        return array.cast(pa.string())
    unscaled = _unscaled(array).cast(pa.string())
    is_negative = pc.starts_with(unscaled, "-")
    digits = pc.utf8_lpad(pc.replace_substring(unscaled, "-", ""), scale + 1, "0")
    whole, rest = pc.utf8_slice_codeunits(digits, 0, -scale), pc.utf8_slice_codeunits(digits, -scale)
    return _join_text(pc.if_else(is_negative, "-", ""), whole, pa.scalar("."), rest)


def _unscaled(array: Any) -> Any:
    """Returns the decimals times ten to the power of their scale."""
    array = array.cast(pa.decimal128(38, array.type.scale))
    return pa.Array.from_buffers(pa.decimal128(38, 0), len(array), array.buffers(), offset=array.offset)


# The values with which DuckDB says infinity.
_INFINITY = {np.int32: 2**31 - 1, np.int64: 2**63 - 1}


def _with_infinity(numbers: Any, array: Any, width: Any) -> Any:
    most = _INFINITY[width]
    is_finite = pc.and_(pc.less(numbers, most), pc.greater(numbers, -most))
    text = pc.if_else(is_finite, array, None).cast(pa.string())
    return pc.if_else(is_finite, text, pc.if_else(pc.greater(numbers, 0), "infinity", "-infinity"))


def _timestamp_text(numbers: Any, zone: str) -> Any:
    array = numbers.cast(pa.timestamp("us"))
    most = _INFINITY[np.int64]
    is_finite = pc.and_(pc.less(numbers, most), pc.greater(numbers, -most))
    text = pc.if_else(is_finite, array, None).cast(pa.string())
    if zone:
        text = _join_text(text, pa.scalar(zone))
    return pc.if_else(is_finite, text, pc.if_else(pc.greater(numbers, 0), "infinity", "-infinity"))


def _hex(array: Any) -> Any:
    data, offsets = _data_of(array)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    written = np.empty(2 * len(data), np.uint8)
    written[0::2], written[1::2] = digits[data >> 4], digits[data & 15]
    return _variable(written, 2 * offsets, array).cast(pa.string())


def _interval_text(array: Any) -> Any:
    months, days, us = _interval_parts(array)
    sign, rest = np.where(us < 0, "-", ""), np.abs(us)
    parts = (
        months, " mons ", days, " days ", sign, rest // _HOUR_US, ":", _two(rest // _MINUTE_US % 60), ":",
        _two(rest // _SECOND_US % 60), ".", np.char.zfill((rest % _SECOND_US).astype(str), 6),
    )  # fmt: skip
    columns = [pa.scalar(part) if isinstance(part, str) else pa.array(part.astype(str), pa.string()) for part in parts]
    return _masked(_join_text(*columns), array)


def _two(numbers: Any) -> Any:
    return np.char.zfill(numbers.astype(str), 2)


def _interval_parts(array: Any) -> tuple[Any, Any, Any]:
    form = np.dtype([("months", "<i4"), ("days", "<i4"), ("ns", "<i8")])
    values = np.frombuffer(array.buffers()[1], form)[array.offset : array.offset + len(array)]
    return values["months"], values["days"], values["ns"] // 1000


# ---- binary


def _binary(array: Any, kind: pg.PgType) -> Any:
    """Returns the values in PostgreSQL's binary format."""
    match kind:
        case pg.BOOL:
            return _numbers(array.cast(pa.int8()), "i1")
        case pg.INT2 | pg.INT4 | pg.INT8 | pg.OID:
            return _numbers(array.cast(pa.int64()), f">i{kind.size_bytes}")
        case pg.FLOAT4 | pg.FLOAT8:
            return _numbers(array, f">f{kind.size_bytes}")
        case pg.NUMERIC:
            return _numeric_binary(array)
        case pg.BYTEA:
            return array.cast(pa.binary())
        case pg.DATE:
            return _numbers(_since_2000(array.cast(pa.int32()), _EPOCH_DAYS, np.int32), ">i4")
        case pg.TIME:
            return _numbers(array.cast(pa.time64("us")).cast(pa.int64()), ">i8")
        case pg.TIMESTAMP | pg.TIMESTAMPTZ:
            numbers = array.cast(pa.timestamp("us", array.type.tz)).cast(pa.int64())
            return _numbers(_since_2000(numbers, _EPOCH_US, np.int64), ">i8")
        case pg.INTERVAL:
            months, days, us = _interval_parts(array)
            values = np.empty(len(array), np.dtype([("us", ">i8"), ("days", ">i4"), ("months", ">i4")]))
            values["us"], values["days"], values["months"] = us, days, months
            return _masked(_fixed(values), array)
        case pg.UUID:
            return _uuid_binary(array)
    return array.cast(pa.string()).cast(pa.binary())


def _numbers(array: Any, form: str) -> Any:
    values = pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(form)
    return _masked(_fixed(values), array)


def _since_2000(array: Any, epoch: int, width: Any) -> Any:
    """Returns numbers counted from PostgreSQL's epoch. Infinity is its largest and smallest number."""
    most = _INFINITY[width]
    moved = pc.subtract(pc.cast(array, pa.int64()), epoch) if width is np.int32 else pc.subtract(array, epoch)
    moved = pc.if_else(pc.greater_equal(array, most), most, moved)
    return pc.if_else(pc.less_equal(array, -most), -most - 1, moved)


def _uuid_binary(array: Any) -> Any:
    data, _ = _data_of(pc.fill_null(pc.replace_substring(array, "-", ""), "0" * 32).cast(pa.binary()))
    nibbles = np.where(data >= ord("a"), data - ord("a") + 10, data - ord("0")).astype(np.uint8)
    values = (nibbles[0::2] << 4 | nibbles[1::2]).reshape(-1, 16)
    return _masked(_fixed(values), array)


_GROUPS_MAX = 11  # of 4 decimal digits: 38 digits, and up to 3 zeros behind them


def _numeric_binary(array: Any) -> Any:
    """Returns decimals as groups of 4 decimal digits, computed by long division over columns of 32-bit limbs."""
    if not pa.types.is_decimal(array.type):
        array = array.cast(pa.decimal128(38, 0))
    scale = array.type.scale
    filled = pc.fill_null(_unscaled(array), 0)
    words = np.frombuffer(filled.buffers()[1], "<u4").reshape(-1, 4)[filled.offset : filled.offset + len(filled)]
    is_negative = (words[:, 3] >> 31).astype(bool)
    limbs = [np.where(is_negative, ~words[:, at], words[:, at]).astype(np.uint64) for at in range(4)]
    carry = is_negative.astype(np.uint64)
    # The groups end at the decimal point, so the fraction is filled up with zeros to whole groups.
    factor = np.uint64(10 ** (-scale % 4))
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for at in range(4):  # two's complement, and then the factor
        limbs[at] = limbs[at] + carry
        carry, limbs[at] = limbs[at] >> shift, limbs[at] & mask
    carry = np.zeros(len(filled), np.uint64)
    for at in range(4):
        limbs[at] = limbs[at] * factor + carry
        carry, limbs[at] = limbs[at] >> shift, limbs[at] & mask
    limbs.append(carry)
    groups = np.empty((len(filled), _GROUPS_MAX), np.int64)
    base = np.uint64(10_000)
    for group in range(_GROUPS_MAX - 1, -1, -1):
        remainder = np.zeros(len(filled), np.uint64)
        for at in range(4, -1, -1):
            value = remainder << shift | limbs[at]
            limbs[at], remainder = value // base, value % base
        groups[:, group] = remainder
    is_zero = groups == 0
    leading = np.where(is_zero.all(1), _GROUPS_MAX, np.argmin(is_zero, 1))
    count = _GROUPS_MAX - leading
    written = np.empty((len(filled), 4 + _GROUPS_MAX), ">i2")
    written[:, 0] = count
    written[:, 1] = np.where(count == 0, 0, count - 1 - -(-scale // 4))
    written[:, 2] = np.where(is_negative, 0x4000, 0)
    written[:, 3] = scale
    written[:, 4:] = groups
    kept = np.ones_like(written, bool)
    kept[:, 4:] = np.arange(_GROUPS_MAX) >= leading[:, None]
    offsets = np.zeros(len(filled) + 1, np.int64)
    np.cumsum(2 * (4 + count), out=offsets[1:])
    return _variable(written[kept].view(np.uint8), offsets, array)


# ---- arrays


def _array_text(array: Any, column: ColumnType) -> Any:
    elements = array.flatten()
    text = _text(elements, column.type).cast(pa.string())
    if column.type not in _UNQUOTED:
        for plain in ("\\", '"'):
            text = pc.replace_substring(text, plain, "\\" + plain)
        text = _join_text(pa.scalar('"'), text, pa.scalar('"'))
    joined = pc.binary_join(_list_like(array, pc.fill_null(text, "NULL")), ",")
    return _masked(_join_text(pa.scalar("{"), joined, pa.scalar("}")), array).cast(pa.binary())


_UNQUOTED = (pg.BOOL, pg.INT2, pg.INT4, pg.INT8, pg.FLOAT4, pg.FLOAT8, pg.NUMERIC, pg.DATE, pg.TIME, pg.UUID)


def _array_binary(array: Any, column: ColumnType) -> Any:
    elements = _binary(array.flatten(), column.type)
    counts = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    values = _join(_length_piece(elements, _lengths(elements)), pc.fill_null(elements, b""))
    joined = pc.fill_null(pc.binary_join(_list_like(array, values), b""), b"")
    form = [("dimensions", ">i4"), ("nulls", ">i4"), ("oid", ">u4"), ("count", ">i4"), ("first", ">i4")]
    header = np.empty(len(array), np.dtype(form))
    header["dimensions"], header["nulls"], header["oid"] = counts > 0, elements.null_count > 0, column.type.oid
    header["count"], header["first"] = counts, 1
    # An empty array has no dimension, and so neither a count nor a first index.
    kept = np.ones((len(array), 20), bool)
    kept[counts == 0, 12:] = False
    offsets = np.zeros(len(array) + 1, np.int64)
    np.cumsum(kept.sum(1), out=offsets[1:])
    data = header.view(np.uint8).reshape(-1, 20)[kept]
    return _masked(_join(_variable(data, offsets), joined), array)


def _list_like(array: Any, elements: Any) -> Any:
    """Returns lists of the same lengths over other elements."""
    counts = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(array) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), elements)


# ---- pieces


def _fixed(values: Any) -> Any:
    """Returns rows of equal size as a binary array. `values`: a numpy array, a row each."""
    values = np.ascontiguousarray(values)
    size = values.dtype.itemsize * (values.shape[1] if values.ndim > 1 else 1)
    return _variable(values.view(np.uint8).reshape(-1), np.arange(len(values) + 1, dtype=np.int64) * size)


def _variable(data: Any, offsets: Any, nulls_of: Any = None) -> Any:
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(np.ascontiguousarray(data))]
    array = pa.Array.from_buffers(pa.binary(), len(offsets) - 1, buffers)
    return array if nulls_of is None else _masked(array, nulls_of)


def _masked(array: Any, nulls_of: Any) -> Any:
    """Returns the array with null where `nulls_of` has null."""
    return pc.if_else(nulls_of.is_valid(), array, None) if nulls_of.null_count else array


def _lengths(array: Any) -> Any:
    return pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)


def _length_piece(array: Any, lengths: Any) -> Any:
    is_valid = array.is_valid().to_numpy(zero_copy_only=False)
    return _fixed(np.where(is_valid, lengths, _NULL_LENGTH).astype(">u4"))


def _join(*pieces: Any) -> Any:
    return pc.binary_join_element_wise(*pieces, b"")


def _join_text(*pieces: Any) -> Any:
    return pc.binary_join_element_wise(*pieces, "")


def _data_of(array: Any) -> tuple[Any, Any]:
    """Returns the bytes of a binary array, and the offsets in them."""
    array = array.cast(pa.binary())
    _, offsets, data = array.buffers()
    at = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    content = np.frombuffer(data, np.uint8)[at[0] : at[-1]] if data is not None else np.empty(0, np.uint8)
    return content, at - at[0]


def _bytes_of(array: Any) -> bytes:
    return bytes(_data_of(array)[0].tobytes())
