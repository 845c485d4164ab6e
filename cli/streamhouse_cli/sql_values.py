"""Values of Arrow columns as text and as JSON. Pure.

Texts are those of ISO 8601 for times and intervals, `\\x` and hexadecimal digits for bytes; no digit of a number is
lost.
JSON has numbers and booleans as they are, all other values as these texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from json.encoder import encode_basestring
from typing import Any

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_DAY_S = 86_400
# The years 1 to 9999, the range of `datetime`, in seconds.
_CALENDAR_S = (-62_135_596_800, 253_402_300_799)
# Beyond the controls that JSON escapes by itself.
_OBEYED = re.compile("[\x7f-\x9f]")
# DuckDB's infinite dates and times, by the bits of the number.
_INFINITE = {bits: 2 ** (bits - 1) - 1 for bits in (32, 64)}

Texts = list[str | None]


def is_number(kind: Any) -> bool:
    """Returns True for the type of a column of numbers, which are aligned right."""
    from pyarrow import types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def texts(column: Any) -> Texts:
    """Returns the values of a pyarrow.Array as text, None for a null; nested values are JSON."""
    column = _storage(column)
    return json_texts(column) if _is_nested(column.type) else _leaf_texts(column)


def json_texts(column: Any) -> Texts:
    """Returns the values of a pyarrow.Array as JSON, None for a null."""
    from pyarrow import types

    column = _storage(column)
    kind = column.type
    if types.is_struct(kind):
        return _objects(column)
    if types.is_map(kind):
        return _maps(column)
    if _is_nested(kind):
        return _lists(column)
    found = _leaf_texts(column)
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_decimal(kind):
        return found
    if types.is_floating(kind):  # NaN and Infinity are no numbers of JSON
        return [text if text is None or text[-1].isdigit() else f'"{text}"' for text in found]
    if _OBEYED.search("".join(filter(None, found))):
        return _mapped(found, quoted)
    return _mapped(found, encode_basestring)


def quoted(text: str) -> str:
    """Returns the text as JSON, also DEL and the controls beyond ASCII escaped, which terminals obey."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", encode_basestring(text))


def _storage(column: Any) -> Any:
    """Returns the column without dictionary and without extension types, but for UUIDs."""
    import pyarrow as pa

    if isinstance(column, pa.ExtensionArray) and str(column.type) != "extension<arrow.uuid>":
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_nested(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_nested(kind))


def _objects(column: Any) -> Texts:
    names = [quoted(field.name) for field in column.type]
    fields = [json_texts(field) for field in column.flatten()]
    rows = zip(*fields, strict=True) if fields else iter([()] * len(column))
    return [
        "{" + ",".join(f"{name}:{_or_null(text)}" for name, text in zip(names, row, strict=True)) + "}"
        if valid
        else None
        for row, valid in zip(rows, column.is_valid().to_pylist(), strict=True)
    ]


def _maps(column: Any) -> Texts:
    """Returns objects where the keys are text, else lists of [key, value]."""
    keys, items = json_texts(column.keys), [_or_null(text) for text in json_texts(column.items)]
    is_object = all(key is None or key.startswith('"') for key in keys)
    apart, opening, closing = (":", "{", "}") if is_object else (",", "[", "]")
    pairs = [f"{_or_null(key)}{apart}{item}" for key, item in zip(keys, items, strict=True)]
    if not is_object:
        pairs = [f"[{pair}]" for pair in pairs]
    return _joined(column, column.offsets.to_pylist(), pairs, opening, closing)


def _lists(column: Any) -> Texts:
    from pyarrow import types

    if types.is_fixed_size_list(column.type):
        size = column.type.list_size
        offsets = [(column.offset + at) * size for at in range(len(column) + 1)]
        values = column.values
    elif types.is_list(column.type) or types.is_large_list(column.type):
        offsets, values = column.offsets.to_pylist(), column.values
    else:  # views and unions: no engine that we know sends these
        return [None if value is None else quoted(str(value)) for value in column.to_pylist()]
    return _joined(column, offsets, [_or_null(text) for text in json_texts(values)], "[", "]")


def _joined(column: Any, offsets: list[int], parts: list[str], opening: str, closing: str) -> Texts:
    valid = column.is_valid().to_pylist()
    return [
        f"{opening}{','.join(parts[begin:end])}{closing}" if there else None
        for begin, end, there in zip(offsets[:-1], offsets[1:], valid, strict=True)
    ]


def _or_null(text: str | None) -> str:
    return "null" if text is None else text


def _leaf_texts(column: Any) -> Texts:
    """Returns the texts of values without parts. Arrow makes the texts where its own are the same: a value that becomes
    a Python object first costs five times as much."""
    import pyarrow as pa
    from pyarrow import types

    kind = column.type
    if types.is_string(kind) or types.is_large_string(kind):
        return _objects_of(column)
    whole = types.is_decimal(kind) and kind.scale == 0  # Arrow writes small fractions with an exponent
    if types.is_integer(kind) or types.is_boolean(kind) or whole:
        return _objects_of(column.cast(pa.string()))
    if types.is_floating(kind):
        return _floats(column)
    if types.is_timestamp(kind):
        return _timestamps(column)
    values: list[Any]
    if types.is_date(kind):
        is_days = types.is_date32(kind)
        values = column.view(pa.int32() if is_days else pa.int64()).to_pylist()
        return _mapped(values, lambda number: _date(number, 1 if is_days else _DAY_S * 1_000))
    if types.is_time(kind):
        values = column.view(pa.int32() if types.is_time32(kind) else pa.int64()).to_pylist()
        return _mapped(values, lambda number: _clock(number, _PER_SECOND[kind.unit]))
    if types.is_duration(kind):
        values = column.view(pa.int64()).to_pylist()
        per_second = 1_000_000_000 // _PER_SECOND[kind.unit]
        return _mapped(values, lambda number: _interval(0, 0, number * per_second))
    if kind == "month_day_nano_interval":
        return _mapped(column.to_pylist(), lambda value: _interval(value.months, value.days, value.nanoseconds))
    if types.is_decimal(kind):
        return _mapped(column.to_pylist(), "{:f}".format)
    return _mapped(column.to_pylist(), lambda value: f"\\x{value.hex()}" if isinstance(value, bytes) else str(value))


def _objects_of(column: Any) -> list[Any]:
    """Returns the values as objects of Python, several times as fast as `to_pylist`; None for a null."""
    found: list[Any] = column.to_numpy(zero_copy_only=False).tolist()
    return found


def _mapped(values: list[Any], text_of: Callable[[Any], str]) -> Texts:
    if None in values:
        return [None if value is None else text_of(value) for value in values]
    return list(map(text_of, values))


def _floats(column: Any) -> Texts:
    import numpy as np

    numbers = column.fill_null(0).to_numpy(zero_copy_only=False)
    # The shortest text that gives the same number in its own size: 0.1, not 0.10000000149011612.
    values = numbers.tolist() if numbers.dtype == np.float64 else [float(str(number)) for number in numbers]
    found: Texts = list(map(repr, values))
    for at in np.flatnonzero(~np.isfinite(numbers)).tolist():
        found[at] = _no_number(values[at])
    for at in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
        found[at] = None
    return found


def _no_number(value: float) -> str:
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _timestamps(column: Any) -> Texts:
    import pyarrow as pa
    from pyarrow import compute

    unit, zone = column.type.unit, "Z" if column.type.tz else ""
    numbers, per_second = column.view(pa.int64()), _PER_SECOND[unit]
    limits = compute.min_max(numbers).as_py()
    low_s, high_s = _CALENDAR_S
    if limits["min"] is None or limits["min"] < low_s * per_second or limits["max"] > high_s * per_second:
        return _mapped(numbers.to_pylist(), lambda number: _timestamp(number, per_second, zone))
    written = compute.replace_substring(column.view(pa.timestamp(unit)).cast(pa.string()), " ", "T")
    # A fraction has three, six or nine digits, and none if it is 0.
    written = compute.replace_substring_regex(written, r"\.?(?:000)*$", zone)
    return _objects_of(written)


def _timestamp(number: int, per_second: int, zone: str) -> str:
    if abs(number) >= _INFINITE[64]:
        return "infinity" if number > 0 else "-infinity"
    seconds, fraction = divmod(number, per_second)
    try:
        moment = _EPOCH + timedelta(seconds=seconds)
    except OverflowError:  # outside of the years 1 to 9999
        return f"{seconds}{_fraction(fraction, per_second)} s since 1970"
    return f"{moment.replace(tzinfo=None).isoformat()}{_fraction(fraction, per_second)}{zone}"


def _date(number: int, per_day: int) -> str:
    if abs(number) >= _INFINITE[32 if per_day == 1 else 64]:
        return "infinity" if number > 0 else "-infinity"
    try:
        return (_EPOCH + timedelta(days=number // per_day)).date().isoformat()
    except OverflowError:
        return f"{number // per_day} days since 1970"


def _clock(number: int, per_second: int) -> str:
    seconds, fraction = divmod(number, per_second)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{_fraction(fraction, per_second)}"


def _fraction(fraction: int, per_second: int) -> str:
    """Returns the decimal point and the digits of a fraction of a second, in groups of three; nothing for 0."""
    digits = f"{fraction:0{len(str(per_second)) - 1}}" if fraction else ""
    while digits.endswith("000"):
        digits = digits[:-3]
    return f".{digits}" if digits else ""


def _interval(months: int, days: int, nanoseconds: int) -> str:
    """Returns an interval as in ISO 8601; as there, each part has its own sign."""
    date = "".join(f"{number}{unit}" for number, unit in ((months, "M"), (days, "D")) if number)
    sign, rest = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    seconds, fraction = divmod(rest, 1_000_000_000)
    last = f"{seconds % 60}{_fraction(fraction, 1_000_000_000)}"
    parts = ((seconds // 3600, "H"), (seconds // 60 % 60, "M"), (last, "S"))
    time = "".join(f"{sign}{number}{unit}" for number, unit in parts if number not in (0, "0"))
    return f"P{date}{f'T{time}' if time else ''}" if date or time else "PT0S"
