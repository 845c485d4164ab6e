"""Values of parameters, in PostgreSQL's text and binary formats, to values that DuckDB is given. Pure."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from uuid import UUID

from streamhouse_sql.pgwire.core import types as pg
from streamhouse_sql.pgwire.core.errors import PgError

Value = object
_EPOCH = datetime(2000, 1, 1)
_INFINITE = {2**63 - 1: "infinity", -(2**63): "-infinity"}
_INFINITE_DATE = {2**31 - 1: "infinity", -(2**31): "-infinity"}
_DIGITS_MAX = 38
_INT_BITS = {pg.INT2: 16, pg.INT4: 32, pg.INT8: 64}


def duck_type(oid: int) -> str:
    """Returns the name of the DuckDB type of a parameter, "" for an unspecified one. Raises PgError for a type that is
    not known here."""
    if oid in (0, pg.UNKNOWN_OID):
        return ""
    if oid not in pg.BY_OID:
        raise PgError("0A000", f"parameters of the type with OID {oid} are not supported")
    kind, is_array = pg.BY_OID[oid]
    # The digits behind the point are those of the value: see `decoded`.
    name = "DECIMAL(38,10)" if kind is pg.NUMERIC else kind.duck
    return f"{name}[]" if is_array else name


def decoded(number: int, data: bytes | None, form: int, oid: int) -> tuple[Value, str]:
    """Returns the value of parameter `number`, and its DuckDB type. `oid`: of its type. Raises PgError for bytes that
    are no value of the type."""
    kind, is_array = pg.BY_OID[oid]
    if data is None:
        return None, duck_type(oid)
    try:
        if form == 0:
            text = data.decode()
            value = array_of_text(text, kind) if is_array else _of_text(text, kind)
        else:
            value = _array_of_binary(data, kind) if is_array else _of_binary(data, kind)
    except (ValueError, struct.error, OverflowError, InvalidOperation) as error:
        raise PgError(
            "22P03" if form else "22P02",
            f"parameter ${number} is not a valid {'binary ' if form else ''}value of type "
            f"{kind.name}{'[]' if is_array else ''}",
            detail=str(error),
        ) from None
    if kind is not pg.NUMERIC:
        return value, duck_type(oid)
    return _numeric(number, value, is_array)


def _numeric(number: int, value: Value, is_array: bool) -> tuple[Value, str]:
    """Returns decimals with the one type that has room for all their digits."""
    decimals = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Decimal)]
    if any(not item.is_finite() for item in decimals):
        raise PgError("0A000", f"parameter ${number}: NaN and infinity are not supported as numeric; float8 has them")
    scale = max((max(0, -_exponent(item)) for item in decimals), default=0)
    whole = max((item.adjusted() + 1 for item in decimals if item), default=0)
    if scale + max(0, whole) > _DIGITS_MAX:
        raise PgError("22003", f"parameter ${number} has more than {_DIGITS_MAX} digits, the most of a numeric here")
    kind = f"DECIMAL({_DIGITS_MAX},{scale})"
    if isinstance(value, list):
        return [None if item is None else f"{item:f}" for item in value], f"{kind}[]"
    return f"{value:f}", kind


def _exponent(value: Decimal) -> int:
    exponent = value.as_tuple().exponent
    return exponent if isinstance(exponent, int) else 0


# ---- text


_TRUE, _FALSE = {"t", "true", "y", "yes", "on", "1"}, {"f", "false", "n", "no", "off", "0"}


def _of_text(text: str, kind: pg.PgType) -> Value:
    if kind in _INT_BITS:
        return _checked(int(text), _INT_BITS[kind])
    if kind is pg.BOOL:
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError(f"{text!r} is neither true nor false")
        return word in _TRUE
    if kind is pg.BYTEA:
        if not text.startswith("\\x"):
            raise ValueError("bytea is taken in hex format only: \\x…")
        return bytes.fromhex(text[2:])
    if kind is pg.NUMERIC:
        return Decimal(text.strip())
    if kind in (pg.FLOAT4, pg.FLOAT8):
        return float(text)
    if kind is pg.UUID:
        return str(UUID(text))
    # DuckDB reads the others as PostgreSQL does, and says their errors.
    return text


def _checked(number: int, bits: int) -> int:
    if not -(1 << bits - 1) <= number < 1 << bits - 1:
        raise ValueError(f"{number} does not fit into {bits} bits")
    return number


def array_of_text(text: str, kind: pg.PgType) -> list[Value]:
    """Returns the elements of `{1,NULL,"a"}`. Raises ValueError."""
    body = text.strip()
    if not body.startswith("{") or not body.endswith("}"):
        raise ValueError(f"{text!r} is not an array: {{…}}")
    items: list[Value] = []
    at, end = 1, len(body) - 1
    while at < end:
        if body[at] == "{":
            raise ValueError("arrays of more than one dimension are not supported")
        item, at, is_quoted = _item(body, at, end)
        items.append(None if not is_quoted and item.upper() == "NULL" else _of_text(item, kind))
        if at < end and body[at] != ",":
            raise ValueError(f"a comma is missing at {at}")
        at += 1
    return items


def _item(body: str, at: int, end: int) -> tuple[str, int, bool]:
    """Returns an element, the position behind it, and True if it was quoted."""
    if body[at] != '"':
        stop = body.find(",", at, end)
        stop = end if stop < 0 else stop
        return body[at:stop].strip(), stop, False
    written: list[str] = []
    at += 1
    while at < end and body[at] != '"':
        at += body[at] == "\\"
        written.append(body[at])
        at += 1
    if at >= end:
        raise ValueError("a quote is not closed")
    return "".join(written), at + 1, True


# ---- binary


def _of_binary(data: bytes, kind: pg.PgType) -> Value:
    if kind.size_bytes > 0 and len(data) != kind.size_bytes:
        raise ValueError(f"has {len(data)} bytes, not {kind.size_bytes}")
    if kind in _BINARY:
        return _BINARY[kind](data)
    return data.decode()


def _date(data: bytes) -> Value:
    days = struct.unpack("!i", data)[0]
    return _INFINITE_DATE.get(days) or date.fromordinal(_EPOCH.toordinal() + days)


def _timestamp(data: bytes) -> Value:
    us = struct.unpack("!q", data)[0]
    return _INFINITE.get(us) or str(_EPOCH + timedelta(microseconds=us))


def _timestamptz(data: bytes) -> Value:
    text = _timestamp(data)
    return text if text in _INFINITE.values() else f"{text}+00"


def _time(data: bytes) -> Value:
    us = struct.unpack("!q", data)[0]
    if us == 86_400_000_000:
        return "24:00:00"
    return str((datetime.min + timedelta(microseconds=us)).time()) if us >= 0 else str(time.fromisoformat(str(us)))


def _interval(data: bytes) -> Value:
    us, days, months = struct.unpack("!qii", data)
    return f"{months} months {days} days {us} microseconds"


def _json(data: bytes) -> Value:
    return data.decode()


def _jsonb(data: bytes) -> Value:
    if data[:1] != b"\x01":
        raise ValueError("unknown version of jsonb")
    return data[1:].decode()


def _decimal(data: bytes) -> Value:
    count, weight, sign, scale = struct.unpack_from("!HhHH", data)
    if sign not in (0, 0x4000):
        return Decimal("NaN" if sign == 0xC000 else "Infinity" if sign == 0xD000 else "-Infinity")
    if len(data) != 8 + 2 * count:
        raise ValueError(f"has {len(data)} bytes for {count} groups of digits")
    if count > 16 or abs(weight) > 16 or scale > 64:
        raise ValueError(f"has more than {_DIGITS_MAX} digits")
    groups = struct.unpack_from(f"!{count}H", data, 8)
    if any(group > 9_999 for group in groups):
        raise ValueError("a group of digits is above 9999")
    # As integers: arithmetic on Decimals rounds to the 28 digits of its context.
    digits = 0
    for group in groups:
        digits = digits * 10_000 + group
    exponent = 4 * (weight - count + 1)
    if exponent > -scale:
        digits, exponent = digits * 10 ** (exponent + scale), -scale
    elif digits % (unit := 10 ** (-scale - exponent)) == 0:
        digits, exponent = digits // unit, -scale
    return Decimal(f"{'-' if sign else ''}{digits}E{exponent}")


_BINARY: dict[pg.PgType, Callable[[bytes], Value]] = {
    pg.BOOL: lambda data: data != b"\0",
    pg.INT2: lambda data: struct.unpack("!h", data)[0],
    pg.INT4: lambda data: struct.unpack("!i", data)[0],
    pg.INT8: lambda data: struct.unpack("!q", data)[0],
    pg.OID: lambda data: struct.unpack("!I", data)[0],
    pg.FLOAT4: lambda data: struct.unpack("!f", data)[0],
    pg.FLOAT8: lambda data: struct.unpack("!d", data)[0],
    pg.BYTEA: bytes,
    pg.DATE: _date,
    pg.TIME: _time,
    pg.TIMESTAMP: _timestamp,
    pg.TIMESTAMPTZ: _timestamptz,
    pg.INTERVAL: _interval,
    pg.UUID: lambda data: str(UUID(bytes=data)),
    pg.JSONB: _jsonb,
    pg.NUMERIC: _decimal,
}


def _array_of_binary(data: bytes, kind: pg.PgType) -> Value:
    dimensions, _, oid = struct.unpack_from("!iiI", data)
    if dimensions == 0:
        return []
    if dimensions != 1:
        raise ValueError("arrays of more than one dimension are not supported")
    if oid != kind.oid:
        raise ValueError(f"has elements of the type with OID {oid}, not {kind.oid}")
    (count,) = struct.unpack_from("!i", data, 12)
    # An element has its length at least: a count that the bytes do not bear out is refused before anything is made.
    if not 0 <= count <= (len(data) - 20) // 4:
        raise ValueError(f"has no room for {count} elements")
    at = 20
    items: list[Value] = []
    for _ in range(count):
        (size,) = struct.unpack_from("!i", data, at)
        at += 4
        if size == -1:
            items.append(None)
            continue
        if not 0 <= size <= len(data) - at:
            raise ValueError("an element is longer than the array")
        items.append(_of_binary(data[at : at + size], kind))
        at += size
    if at != len(data):
        raise ValueError("has bytes behind its last element")
    return items


def formats_for(formats: Sequence[int], count: int, what: str) -> list[int]:
    """Returns a format for each of `count` values: none given means text, and one is meant for all. Raises PgError."""
    if len(formats) not in (0, 1, count):
        raise PgError("08P01", f"bind message has {len(formats)} {what} formats but {count} {what}s")
    if any(form not in (0, 1) for form in formats):
        raise PgError("22023", f"unsupported format code: {max(formats)}")
    return list(formats) if len(formats) == count else [formats[0] if formats else 0] * count
