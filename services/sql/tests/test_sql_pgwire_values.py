"""Values in PostgreSQL's formats: as columns to a client, and as parameters from it."""

import datetime
import struct
import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamhouse_sql.pgwire.core import types as pg
from streamhouse_sql.pgwire.core.arguments import decoded, duck_type
from streamhouse_sql.pgwire.core.errors import PgError
from streamhouse_sql.pgwire.core.types import ColumnType, PgType, column_type, parameter_oid
from streamhouse_sql.pgwire.values import data_rows, encoded

pytestmark = pytest.mark.quick

UTC = datetime.UTC
UUID = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")
MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5, 250_000)
SINCE_2000_US = int((MOMENT - datetime.datetime(2000, 1, 1)).total_seconds()) * 1_000_000 + 250_000


def array_of(values: list[Any], kind: Any) -> pa.Array:
    """Returns the values as part of a longer array, as a slice of a batch is."""
    return pa.array([values[0], *values, values[-1]], kind).slice(1, len(values))


@pytest.mark.parametrize(
    ("arrow", "kind", "value", "text", "binary"),
    [
        (pa.bool_(), pg.BOOL, True, b"t", b"\1"),
        (pa.bool_(), pg.BOOL, False, b"f", b"\0"),
        (pa.int16(), pg.INT2, -2, b"-2", b"\xff\xfe"),
        (pa.int8(), pg.INT2, -2, b"-2", b"\xff\xfe"),
        (pa.int32(), pg.INT4, 1 << 30, b"1073741824", b"\x40\0\0\0"),
        (pa.uint16(), pg.INT4, 65535, b"65535", b"\0\0\xff\xff"),
        (pa.int64(), pg.INT8, -(1 << 63), b"-9223372036854775808", b"\x80" + bytes(7)),
        (pa.uint32(), pg.OID, (1 << 32) - 1, b"4294967295", b"\xff" * 4),
        (pa.float32(), pg.FLOAT4, 1.5, b"1.5", b"\x3f\xc0\0\0"),
        (pa.float64(), pg.FLOAT8, 0.1, b"0.1", struct.pack("!d", 0.1)),
        (pa.float64(), pg.FLOAT8, float("-inf"), b"-Infinity", struct.pack("!d", float("-inf"))),
        (pa.float64(), pg.FLOAT8, float("nan"), b"NaN", struct.pack("!d", float("nan"))),
        (pa.string(), pg.TEXT, 'ü"\\', 'ü"\\'.encode(), 'ü"\\'.encode()),
        (pa.string(), pg.TEXT, "", b"", b""),
        (pa.string(), pg.JSON, '{"a":1}', b'{"a":1}', b'{"a":1}'),
        (pa.binary(), pg.BYTEA, b"\0\xff", b"\\x00ff", b"\0\xff"),
        (pa.binary(), pg.BYTEA, b"", b"\\x", b""),
        (pa.date32(), pg.DATE, datetime.date(1999, 12, 31), b"1999-12-31", struct.pack("!i", -1)),
        (pa.time64("us"), pg.TIME, datetime.time(1, 2, 3), b"01:02:03.000000", struct.pack("!q", 3_723_000_000)),
        (pa.timestamp("us"), pg.TIMESTAMP, MOMENT, b"2026-01-02 03:04:05.250000", struct.pack("!q", SINCE_2000_US)),
        (
            pa.timestamp("us", "UTC"),
            pg.TIMESTAMPTZ,
            MOMENT.replace(tzinfo=UTC),
            b"2026-01-02 03:04:05.250000+00",
            struct.pack("!q", SINCE_2000_US),
        ),
        (pa.string(), pg.UUID, str(UUID), str(UUID).encode(), UUID.bytes),
        (
            pa.month_day_nano_interval(),
            pg.INTERVAL,
            (14, -3, -5_000_000),
            b"14 mons -3 days -0:00:00.005000",
            struct.pack("!qii", -5_000, -3, 14),
        ),
    ],
)
def test_a_value_is_written_in_both_formats(arrow: Any, kind: PgType, value: Any, text: bytes, binary: bytes) -> None:
    column = array_of([None, value, value], arrow)
    assert encoded(column, ColumnType(kind), 0).to_pylist() == [None, text, text]
    assert encoded(column, ColumnType(kind), 1).to_pylist() == [None, binary, binary]


@pytest.mark.parametrize(
    ("arrow", "kind", "most", "binary"),
    [
        (pa.timestamp("us"), pg.TIMESTAMP, (1 << 63) - 1, struct.pack("!q", (1 << 63) - 1)),
        (pa.date32(), pg.DATE, (1 << 31) - 1, struct.pack("!i", (1 << 31) - 1)),
    ],
)
def test_infinity_is_postgresqls(arrow: Any, kind: PgType, most: int, binary: bytes) -> None:
    plain = pa.int64() if kind is pg.TIMESTAMP else pa.int32()
    column = pa.array([most, -most], plain).view(arrow)
    assert encoded(column, ColumnType(kind), 0).to_pylist() == [b"infinity", b"-infinity"]
    assert encoded(column, ColumnType(kind), 1).to_pylist() == [
        binary,
        bytes((binary[0] ^ 0xFF, *bytes(len(binary) - 1))),
    ]


@given(st.data(), st.integers(0, 38))
def test_any_numeric_is_read_again_as_it_was(data: st.DataObject, scale: int) -> None:
    """The parameter's decoder is the judge of the column's encoder: neither uses the other."""
    number = st.integers(-(10**38) + 1, 10**38 - 1).map(lambda digits: Decimal(f"{digits}E-{scale}"))
    values = data.draw(st.lists(number | st.none(), min_size=1, max_size=5))
    column = pa.array(values, pa.decimal128(38, scale))
    for form in (0, 1):
        for value, written in zip(values, encoded(column, ColumnType(pg.NUMERIC), form).to_pylist(), strict=True):
            read, _ = decoded(1, written, form, pg.NUMERIC.oid)
            assert (None if read is None else Decimal(str(read))) == value
            if form == 0 and written is not None:
                assert b"E" not in written


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ([1, None, 3], pg.INT4, b"{1,NULL,3}"),
        ([], pg.INT4, b"{}"),
        ([None], pg.INT8, b"{NULL}"),
        (["a", 'q"\\', "NULL", "", None, "a,b}"], pg.TEXT, b'{"a","q\\"\\\\","NULL","",NULL,"a,b}"}'),
        ([True, False], pg.BOOL, b"{t,f}"),
        ([1.5, None], pg.FLOAT8, b"{1.5,NULL}"),
    ],
)
def test_an_array_is_written_in_both_formats(values: list[Any], kind: PgType, text: bytes) -> None:
    arrow = {
        pg.INT4: pa.int32(),
        pg.INT8: pa.int64(),
        pg.TEXT: pa.string(),
        pg.BOOL: pa.bool_(),
        pg.FLOAT8: pa.float64(),
    }
    column = array_of([None, values, values], pa.list_(arrow[kind]))
    assert encoded(column, ColumnType(kind, True), 0).to_pylist() == [None, text, text]
    for form in (0, 1):
        written = encoded(column, ColumnType(kind, True), form).to_pylist()
        assert written[0] is None
        assert decoded(1, written[2], form, kind.array_oid)[0] == values


def test_rows_are_messages() -> None:
    batch = pa.RecordBatch.from_pydict(
        {"a": [1, None], "b": ["x", "yz"]}, pa.schema({"a": pa.int32(), "b": pa.string()})
    )
    columns = [ColumnType(pg.INT4), ColumnType(pg.TEXT)]
    first = b"\0\2" + struct.pack("!i", 4) + b"\0\0\0\1" + struct.pack("!i", 1) + b"x"
    second = b"\0\2" + struct.pack("!i", -1) + struct.pack("!i", 2) + b"yz"
    rows = b"".join(b"D" + struct.pack("!i", len(body) + 4) + body for body in (first, second))
    assert data_rows(batch, columns, [1, 0]) == rows
    assert data_rows(batch.slice(1), columns, [1, 0]) == rows[len(first) + 5 :]
    assert data_rows(batch.slice(2), columns, [0, 0]) == b""


@pytest.mark.parametrize(
    ("duck", "oid", "cast"),
    [
        ("INTEGER", 23, "{}"),
        ("UBIGINT", 1700, "CAST({} AS DECIMAL(20,0))"),
        ("DECIMAL(10,2)", 1700, "{}"),
        ("ENUM('a', 'b')", 25, "CAST({} AS VARCHAR)"),
        ("INTEGER[]", 1007, "CAST({} AS INTEGER[])"),
        ("INTEGER[3]", 1007, "CAST({} AS INTEGER[])"),
        ("TIMESTAMP_NS[]", 1115, "CAST({} AS TIMESTAMP[])"),
        ("INTEGER[][]", 114, "CAST(to_json({}) AS VARCHAR)"),
        ("STRUCT(a INTEGER)", 114, "CAST(to_json({}) AS VARCHAR)"),
        ("STRUCT(a INTEGER)[]", 114, "CAST(to_json({}) AS VARCHAR)"),
        ("MAP(VARCHAR, INTEGER)", 114, "CAST(to_json({}) AS VARCHAR)"),
        ("BIT", 25, "CAST({} AS VARCHAR)"),
        ('"NULL"', 25, "CAST({} AS VARCHAR)"),
    ],
)
def test_a_type_that_postgresql_has_not_becomes_the_nearest(duck: str, oid: int, cast: str) -> None:
    assert (column_type(duck).oid, column_type(duck).cast) == (oid, cast)


@pytest.mark.parametrize(
    ("duck", "oid"),
    [("", 25), ("TEXT", 25), ("INT", 23), ("INT[]", 1007), ("TEXT[]", 1009), ("DECIMAL", 1700), ("TIMESTAMPTZ", 1184)],
)
def test_a_parameter_has_the_type_of_its_cast(duck: str, oid: int) -> None:
    assert parameter_oid(duck) == oid


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (pg.INT4, b"-7", -7),
        (pg.BOOL, b"yes", True),
        (pg.BOOL, b"off", False),
        (pg.BYTEA, b"\\x00ff", b"\0\xff"),
        (pg.FLOAT8, b"1e3", 1000.0),
        (pg.UUID, str(UUID).encode(), str(UUID)),
        (pg.TIMESTAMP, b"2026-01-02 03:04:05", "2026-01-02 03:04:05"),
        (pg.TEXT, b"x'y", "x'y"),
    ],
)
def test_a_parameter_is_read_from_text(kind: PgType, text: bytes, value: object) -> None:
    assert decoded(1, text, 0, kind.oid)[0] == value


@pytest.mark.parametrize(
    ("kind", "data", "value"),
    [
        (pg.BOOL, b"\1", True),
        (pg.INT2, b"\xff\xfe", -2),
        (pg.OID, b"\xff" * 4, (1 << 32) - 1),
        (pg.FLOAT4, b"\x3f\xc0\0\0", 1.5),
        (pg.DATE, struct.pack("!i", 1), datetime.date(2000, 1, 2)),
        (pg.DATE, struct.pack("!i", (1 << 31) - 1), "infinity"),
        (pg.TIME, struct.pack("!q", 3_723_000_000), "01:02:03"),
        (pg.TIME, struct.pack("!q", 86_400_000_000), "24:00:00"),
        (pg.TIMESTAMP, struct.pack("!q", 1_500_000), "2000-01-01 00:00:01.500000"),
        (pg.TIMESTAMPTZ, struct.pack("!q", 0), "2000-01-01 00:00:00+00"),
        (pg.TIMESTAMPTZ, struct.pack("!q", -(1 << 63)), "-infinity"),
        (pg.INTERVAL, struct.pack("!qii", 5, -3, 14), "14 months -3 days 5 microseconds"),
        (pg.UUID, UUID.bytes, str(UUID)),
        (pg.JSONB, b"\1{}", "{}"),
    ],
)
def test_a_parameter_is_read_from_binary(kind: PgType, data: bytes, value: object) -> None:
    assert decoded(1, data, 1, kind.oid)[0] == value


@pytest.mark.parametrize(
    ("kind", "form", "data"),
    [
        (pg.INT4, 0, b"x"),
        (pg.INT4, 0, b"2147483648"),
        (pg.INT4, 1, b"\0\0\0"),
        (pg.INT8, 1, b""),
        (pg.BOOL, 0, b"maybe"),
        (pg.BYTEA, 0, b"plain"),
        (pg.UUID, 0, b"no"),
        (pg.TEXT, 0, b"\xff"),
        (pg.DATE, 1, struct.pack("!i", 1 << 30)),
        (pg.TIME, 1, struct.pack("!q", -1)),
        (pg.NUMERIC, 0, b"abc"),
        (pg.NUMERIC, 1, b"\0\1"),
        (pg.NUMERIC, 1, struct.pack("!HhHHH", 1, 0, 0, 0, 10_000)),
        (pg.NUMERIC, 1, struct.pack("!HhHH", 65535, 0, 0, 0)),
        (pg.JSONB, 1, b"\2{}"),
    ],
)
def test_bytes_that_are_no_value_are_refused(kind: PgType, form: int, data: bytes) -> None:
    with pytest.raises(PgError) as refused:
        decoded(3, data, form, kind.oid)
    assert refused.value.sqlstate in ("22P02", "22P03") and "$3" in refused.value.message


@pytest.mark.parametrize(
    ("form", "data"),
    [
        (0, b"1,2"),
        (0, b"{{1}}"),
        (0, b'{"a'),
        (0, b'{"1"2}'),
        (1, b""),
        (1, struct.pack("!iiIii", 1, 0, 23, 1_000_000_000, 1)),
        (1, struct.pack("!iiIiii", 1, 0, 23, 1, 1, 1_000)),
        (1, struct.pack("!iiIii", 1, 0, 25, 0, 1)),
        (1, struct.pack("!iiIii", 2, 0, 23, 0, 1)),
    ],
)
def test_an_array_that_is_none_is_refused_before_it_is_made(form: int, data: bytes) -> None:
    with pytest.raises(PgError):
        decoded(1, data, form, pg.INT4.array_oid)


def test_a_numeric_has_all_its_digits_or_is_refused() -> None:
    assert decoded(1, b"12.3456", 0, 1700) == ("12.3456", "DECIMAL(38,4)")
    assert decoded(1, b"0E-38", 0, 1700)[1] == "DECIMAL(38,38)"
    assert decoded(1, b"1e3", 0, 1700) == ("1000", "DECIMAL(38,0)")
    assert decoded(1, b"{1,2.25}", 0, 1231) == (["1", "2.25"], "DECIMAL(38,2)[]")
    for text, sqlstate in ((b"1" * 39, "22003"), (b"0." + b"1" * 39, "22003"), (b"NaN", "0A000")):
        with pytest.raises(PgError) as refused:
            decoded(1, text, 0, 1700)
        assert refused.value.sqlstate == sqlstate


@given(st.binary(max_size=64), st.sampled_from(sorted(pg.BY_OID)), st.sampled_from((0, 1)))
def test_any_bytes_are_a_value_or_refused(data: bytes, oid: int, form: int) -> None:
    try:
        decoded(1, data, form, oid)
    except PgError as error:
        assert error.sqlstate in ("22P02", "22P03", "22003", "0A000")


def test_a_type_that_is_not_known_is_refused() -> None:
    with pytest.raises(PgError, match="OID 600"):
        duck_type(600)
    assert duck_type(0) == duck_type(705) == ""
