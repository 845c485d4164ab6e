"""Arrow batches as tables, JSON lines, CSV, Arrow streams and Parquet files."""

import csv
import io
import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from streamhouse_cli import sql_formats
from streamhouse_cli.sql_formats import FORMATS, new_format
from streamhouse_cli.sql_values import json_texts, texts

pytestmark = pytest.mark.quick

ROWS = pa.record_batch({"carrier": ["UA", None, "B6"], "flights": [58665, 1, None], "share": [0.5, 0.25, float("nan")]})


def rendered(name: str, *batches: pa.RecordBatch, **options: bool) -> str:
    form = new_format(name, **options)
    data = b"".join(form.batch(batch) for batch in batches) + form.end(batches[0].schema)
    return data.decode()


# ---- values


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([2**63 - 1, -1]), [str(2**63 - 1), "-1"]),
        (pa.array([0.1, 1e300, 1.0]), ["0.1", "1e+300", "1.0"]),
        (pa.array([0.1, 16777216.0], pa.float32()), ["0.1", "16777216.0"]),
        (pa.array([float("nan"), float("inf"), float("-inf")]), ["NaN", "Infinity", "-Infinity"]),
        (pa.array([Decimal("1.500"), Decimal("-0.001")]), ["1.500", "-0.001"]),
        (pa.array([Decimal(10**37)], pa.decimal128(38, 0)), [str(10**37)]),
        (pa.array([b"\x00\xffa"]), ["\\x00ff61"]),
        (pa.array([datetime(2013, 1, 1, 5, 15)], pa.timestamp("us")), ["2013-01-01T05:15:00"]),
        (pa.array([datetime(2013, 1, 1, 5, 15, tzinfo=UTC)], pa.timestamp("ms", "UTC")), ["2013-01-01T05:15:00Z"]),
        (pa.array([1, -1, 1_000], pa.timestamp("ns")),
         ["1970-01-01T00:00:00.000000001", "1969-12-31T23:59:59.999999999", "1970-01-01T00:00:00.000001"]),
        (pa.array([120], pa.timestamp("ms")), ["1970-01-01T00:00:00.120"]),
        (pa.array([2**63 - 1, 1 - 2**63, 10**18], pa.timestamp("us")),
         ["infinity", "-infinity", "1000000000000 s since 1970"]),
        (pa.array([date(2013, 1, 1)]), ["2013-01-01"]),
        (pa.array([2**31 - 1, 10**7], pa.date32()), ["infinity", "10000000 days since 1970"]),
        (pa.array([86_400_000], pa.date64()), ["1970-01-02"]),
        (pa.array([time(1, 2, 3, 4)]), ["01:02:03.000004"]),
        (pa.array([3723], pa.time32("s")), ["01:02:03"]),
        (pa.array([timedelta(hours=25, microseconds=1)]), ["PT25H0.000001S"]),
        (pa.array([pa.MonthDayNano([14, 3, -3_600_000_000_000])]), ["P14M3DT-1H"]),
        (pa.array([pa.MonthDayNano([0, 0, 0])]), ["PT0S"]),
        (pa.array([b"0123456789abcdef"], pa.uuid()), ["30313233-3435-3637-3839-616263646566"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([[1, None], []]), ["[1,null]", "[]"]),
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)), ["[1,2]", "[3,4]"]),
        (pa.array([{"a": 1, "b": ["x"]}]), ['{"a":1,"b":["x"]}']),
        (pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int8())), ['{"k":1}', "{}"]),
        (pa.array([[(1, "v")]], pa.map_(pa.int8(), pa.string())), ['[[1,"v"]]']),
    ],
)  # fmt: skip
def test_each_type_as_text(array, text):
    nulls = pa.concat_arrays([array.slice(0, 0), pa.nulls(1, array.type), array])
    assert texts(array) == text
    assert texts(nulls) == [None, *text]
    assert texts(nulls.slice(1)) == text, "a slice keeps to its rows"
    for written in json_texts(nulls):
        assert written is None or json.loads(written) is not None


def test_numbers_in_json_keep_all_digits():
    big = pa.array([Decimal("12345678901234567890.12")])
    assert json_texts(big) == ["12345678901234567890.12"]
    assert json_texts(pa.array([float("nan"), 0.5])) == ['"NaN"', "0.5"]


@given(st.text(st.characters(max_codepoint=0x100, exclude_categories=["Cs"]), max_size=20))
def test_text_in_json_is_read_as_it_was_and_controls_no_terminal(text):
    [written] = json_texts(pa.array([text]))
    assert json.loads(written) == text
    assert not any(char < " " or "\x7f" <= char <= "\x9f" for char in written)


# ---- tables


def test_a_table_has_its_columns_aligned_numbers_right():
    assert rendered("table", ROWS) == (
        "carrier  flights  share\n"
        "───────────────────────\n"
        "UA         58665    0.5\n"
        "NULL           1   0.25\n"
        "B6          NULL    NaN\n"
        "(3 rows)\n"
    )


def test_the_first_batch_decides_about_the_widths_and_later_values_are_whole():
    long = pa.record_batch({"name": ["a long name"], "n": [1]})
    text = rendered("table", pa.record_batch({"name": ["a"], "n": [1]}), long)
    assert text == "name  n\n───────\na     1\na long name  1\n(2 rows)\n"


def test_one_long_value_does_not_widen_all_rows():
    batch = pa.record_batch({"name": ["x" * 500, "y"], "n": [1, 2]})
    lines = rendered("table", batch).splitlines()
    assert lines[2] == "x" * 500 + "  1" and len(lines[3]) == sql_formats.PADDED_WIDTH_MAX + 3


def test_a_result_without_rows_shows_its_columns():
    assert rendered("table", ROWS.slice(0, 0)) == "carrier  flights  share\n───────────────────────\n(0 rows)\n"
    assert rendered("csv", ROWS.slice(0, 0)) == "carrier,flights,share\n"
    assert rendered("json", ROWS.slice(0, 0)) == ""


def test_one_row_is_no_rows():
    assert rendered("table", ROWS.slice(0, 1)).endswith("(1 row)\n")


@pytest.mark.parametrize("name", ["table", "json", "csv"])
def test_a_statement_without_columns_writes_nothing(name):
    assert rendered(name, pa.record_batch([], names=[])) == ""


def test_a_table_is_bold_and_dim_where_styles_are_shown():
    text = rendered("table", ROWS, styled=True)
    assert "\x1b[1mcarrier\x1b[0m" in text and "\x1b[2mNULL\x1b[0m" in text
    plain = text.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert plain == rendered("table", ROWS)


@pytest.mark.parametrize("expanded", [True, False])
def test_values_control_no_terminal_and_stay_on_their_line(expanded):
    batch = pa.record_batch({"a\n": ["x\ny\x1b[31m\x9b"]})
    text = rendered("table", batch, expanded=expanded)
    assert "x\\ny\\x1b[31m\\x9b" in text and "a\\n" in text and "\x1b" not in text


def test_wide_characters_are_counted_as_terminals_show_them():
    batch = pa.record_batch({"a": ["名前", "x"], "b": ["1", "2"]})
    assert rendered("table", batch) == "a     b\n───────\n名前  1\nx     2\n(2 rows)\n"


def test_expanded_has_a_line_per_value():
    text = rendered("table", ROWS.slice(0, 2), expanded=True)
    assert text.splitlines() == [
        "─[ row 1 ]─────────────────",
        "carrier  UA",
        "flights  58665",
        "share    0.5",
        "─[ row 2 ]─────────────────",
        "carrier  NULL",
        "flights  1",
        "share    0.25",
        "(2 rows)",
    ]
    assert rendered("table", ROWS.slice(0, 0), expanded=True) == "(0 rows)\n"


# ---- for programs


def test_json_has_an_object_per_line():
    lines = [json.loads(line) for line in rendered("json", ROWS, ROWS).splitlines()]
    assert (
        lines
        == [
            {"carrier": "UA", "flights": 58665, "share": 0.5},
            {"carrier": None, "flights": 1, "share": 0.25},
            {"carrier": "B6", "flights": None, "share": "NaN"},
        ]
        * 2
    )


def test_json_keeps_columns_of_the_same_name_apart():
    batch = pa.RecordBatch.from_arrays([pa.array([n]) for n in range(4)], names=["n", "n", "n_2", "n"])
    assert rendered("json", batch) == '{"n":0,"n_2":1,"n_2_2":2,"n_3":3}\n'


def test_csv_tells_a_null_from_an_empty_text():
    batch = pa.record_batch({"a": [None, "", "x", 'say "hi"', "a,b", "line\nbreak", " x"], "b": range(7)})
    text = rendered("csv", batch)
    assert text == 'a,b\n,0\n"",1\nx,2\n"say ""hi""",3\n"a,b",4\n"line\nbreak",5\n" x",6\n'
    rows = list(csv.reader(io.StringIO(text)))
    assert [row[0] for row in rows[1:]] == ["", "", "x", 'say "hi"', "a,b", "line\nbreak", " x"]


def test_csv_on_a_terminal_controls_nothing():
    batch = pa.record_batch({"a": ["\x1b[31m"]})
    assert rendered("csv", batch) == "a\n\x1b[31m\n"
    assert rendered("csv", batch, terminal=True) == "a\n\\x1b[31m\n"


EXACT = ROWS.drop_columns(["share"])  # NaN equals nothing


def joined(name: str, *batches: pa.RecordBatch) -> bytes:
    form = new_format(name)
    return b"".join([*map(form.batch, batches), form.end(batches[0].schema)])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_arrow_stream_is_read_by_arrow(count):
    data = joined("arrow", *[EXACT] * count) if count else joined("arrow", EXACT.slice(0, 0))
    assert pa.ipc.open_stream(data).read_all() == pa.Table.from_batches([EXACT] * count, EXACT.schema)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_parquet_file_is_read_by_arrow(count):
    data = joined("parquet", *[EXACT] * count) if count else joined("parquet", EXACT.slice(0, 0))
    found = parquet.ParquetFile(io.BytesIO(data))
    assert found.read() == pa.Table.from_batches([EXACT] * count, EXACT.schema)
    assert found.num_row_groups == 1


def test_rows_of_parquet_leave_as_soon_as_a_row_group_is_full(monkeypatch):
    monkeypatch.setattr(sql_formats, "ROW_GROUP_ROWS", 6)
    form = new_format("parquet")
    sizes = [len(form.batch(ROWS)) for _ in range(4)]
    assert sizes[0] == sizes[2] == 0 and sizes[1] > 0 and sizes[3] > 0


def test_wide_rows_leave_by_their_bytes(monkeypatch):
    monkeypatch.setattr(sql_formats, "ROW_GROUP_BYTES", 1)
    assert new_format("parquet").batch(ROWS)


def test_every_format_is_there():
    assert all(new_format(name) for name in FORMATS)
