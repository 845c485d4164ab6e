"""Lines, keys, positions and texts of the command line: pure parts."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat.limits import INT64_MAX
from streamhouse.core.producer_batch import RECORD_BYTES_MAX
from streamhouse.core.record_checks import check_record
from streamhouse_cli.lines import (
    LINE_BYTES_MAX,
    BadHeader,
    BinaryInput,
    KeyedByColumn,
    LineSplitter,
    LineTooLong,
    MagicCheck,
    RowSplitter,
    UnfinishedRow,
    keyed_by_field,
    keyed_by_separator,
    records_of_json,
    without_keys,
)
from streamhouse_cli.position import TIMESTAMP_MS_MAX, TIMESTAMP_MS_MIN, PositionOption, parse_position
from streamhouse_cli.text import record_json, text_lines, unescape

pytestmark = pytest.mark.quick


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_lines_do_not_depend_on_where_chunks_end(data: bytes, cuts: list[int]) -> None:
    splitter, at, lines = LineSplitter(), 0, []
    for cut in [*sorted(cuts), len(data)]:
        lines += splitter.feed(data[at:cut])
        at = max(at, cut)
    lines += splitter.finish()
    whole = data.split(b"\n")
    assert lines == (whole if whole[-1] else whole[:-1])


def test_last_line_without_newline_and_empty_lines_are_kept() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"a\n\nb\r\nc") == [b"a", b"", b"b\r"]
    assert splitter.finish() == [b"c"]
    assert splitter.finish() == []


def test_a_line_beyond_the_limit_is_refused_where_its_end_is_in_the_same_piece() -> None:
    splitter = LineSplitter()
    splitter.feed(b"x" * LINE_BYTES_MAX)
    with pytest.raises(LineTooLong, match=str(LINE_BYTES_MAX)):
        splitter.feed(b"x\n")


def test_the_longest_line_fits_a_record() -> None:
    splitter = LineSplitter()
    (line,) = splitter.feed(b"x" * LINE_BYTES_MAX + b"\n")
    assert check_record(line, None, None, None)[-1] <= RECORD_BYTES_MAX


def test_a_line_beyond_the_limit_is_refused_before_it_is_gathered() -> None:
    splitter = LineSplitter()
    half = b"x" * (LINE_BYTES_MAX // 2 + 1)
    splitter.feed(half)
    with pytest.raises(LineTooLong, match=str(LINE_BYTES_MAX)):
        splitter.feed(half)


def test_a_line_that_does_not_fit_a_record_together_with_its_key_is_told_apart() -> None:
    key = "k" * (LINE_BYTES_MAX // 2)
    long = json.dumps({"k": key}).encode()
    keyed = keyed_by_field("k")([b'{"k":1}', long, b'{"k":2}'])
    assert (keyed.values, keyed.keys) == ([b'{"k":1}'], [b"1"])
    assert keyed.error is not None and f"limit of {LINE_BYTES_MAX} bytes" in keyed.error
    fits = json.dumps({"k": key[:-10]}).encode()
    (value,), (kept,) = keyed_by_field("k")([fits]).values, keyed_by_field("k")([fits]).keys or [None]
    assert check_record(value, kept, None, None)[-1] <= RECORD_BYTES_MAX


def test_without_keys_each_line_is_a_value() -> None:
    keyed = without_keys([b"a", b""])
    assert (keyed.values, keyed.keys, keyed.error) == ([b"a", b""], None, None)


def test_separator_splits_at_its_first_place_and_stops_at_a_line_without_it() -> None:
    keyed = keyed_by_separator(b":")([b"k:v:w", b":empty key", b"k:", b"none", b"k:never"])
    assert keyed.keys == [b"k", b"", b"k"]
    assert keyed.values == [b"v:w", b"empty key", b""]
    assert keyed.error == "no key separator ':'"


def test_field_gives_the_key_and_the_value_stays_as_it_is() -> None:
    lines = [b'{"k": "\\u00e9"}', b'{"k":7}', b'{"k":true}', b'{"k":null}', b'{"other":1}', b' {"k":1.5} ']
    keyed = keyed_by_field("k")(lines)
    assert keyed.keys == ["é".encode(), b"7", b"true", None, None, b"1.5"]
    assert keyed.values == lines
    assert keyed.error is None


def test_a_key_that_is_no_text_is_called_so() -> None:
    """JSON can escape half a character. It was said not to be JSON."""
    keyed = keyed_by_field("k")([b'{"k":"a"}', b'{"k":"\\ud800"}'])
    assert keyed.keys == [b"a"]
    assert keyed.error == "field 'k' is no text: surrogates not allowed"


def test_numbers_keep_their_own_text_as_keys() -> None:
    lines = [b'{"k":1.50}', b'{"k":12345678901234567890123}', b'{"k":1E+2}', b'{"k":-0}']
    assert keyed_by_field("k")(lines).keys == [b"1.50", b"12345678901234567890123", b"1E+2", b"-0"]


def test_a_path_reaches_into_objects_and_absent_fields_are_counted() -> None:
    lines = [
        b'{"a":{"b":"x"}}',
        b'{"a.b":"y","a":{"b":"z"}}',
        b'{"a":{"b":null}}',
        b'{"a":1}',
        b'{"a":[{"b":1}]}',
        b"{}",
    ]
    keyed = keyed_by_field("a.b")(lines)
    assert keyed.keys == [b"x", b"y", None, None, None, None]
    assert keyed.missing_keys == 3
    assert keyed.error is None


# ---- input that is no lines


@pytest.mark.parametrize(
    "magic", [b"\x1f\x8b\x08\0", b"PAR1\x15", b"BZh91AY&SYx", b"PK\x03\x04", b"Obj\x01", b"\x28\xb5\x2f\xfd"]
)
def test_compressed_and_columnar_files_are_refused_however_their_bytes_come(magic: bytes) -> None:
    check = MagicCheck()
    assert b"".join(check.feed(magic[at : at + 1]) for at in range(1)) == b""
    with pytest.raises(BinaryInput, match="not lines"):
        for at in range(1, len(magic)):
            check.feed(magic[at : at + 1])


@given(st.lists(st.binary(max_size=4), max_size=6))
def test_what_is_no_magic_number_comes_through_unchanged(chunks: list[bytes]) -> None:
    check = MagicCheck()
    try:
        passed = [check.feed(chunk) for chunk in chunks]
    except BinaryInput:
        return
    assert b"".join(passed) + check.finish() == b"".join(chunks)


def test_text_is_not_held_back_for_more_to_come() -> None:
    assert MagicCheck().feed(b"P\n") == b"P\n"


# ---- CSV


@given(
    st.lists(st.lists(st.text(alphabet='a,"\n;é', max_size=6), min_size=1, max_size=4), max_size=6), st.integers(1, 7)
)
def test_rows_are_those_of_a_csv_reader_wherever_chunks_end(table: list[list[str]], size: int) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(table)
    data, splitter = text.getvalue().encode(), RowSplitter()
    rows = [row for at in range(0, len(data), size) for row in splitter.feed(data[at : at + size])] + splitter.finish()
    assert [next(csv.reader([row.decode()]), []) for row in rows] == table


def test_a_stray_quote_opens_no_field_and_the_value_stays_as_it_is() -> None:
    splitter = RowSplitter(b"\t")
    rows = splitter.feed(b'5" pipe\t2\nx\t"a\n""b""\n"\ty\n\n"q"r"\tz\n')
    assert rows == [b'5" pipe\t2', b'x\t"a\n""b""\n"\ty', b"", b'"q"r"\tz']
    assert splitter.feed(b'end\t"open\n') == []
    assert splitter.unfinished_bytes == len(b'end\t"open\n')
    with pytest.raises(UnfinishedRow):
        splitter.finish()


def test_a_row_beyond_the_limit_is_refused_before_it_is_gathered() -> None:
    splitter = RowSplitter()
    splitter.feed(b'"' + b"x" * (LINE_BYTES_MAX // 2) + b"\n")
    with pytest.raises(LineTooLong, match="a row is longer"):
        splitter.feed(b"x" * (LINE_BYTES_MAX // 2) + b"\n")


def test_a_column_gives_the_key() -> None:
    parse = KeyedByColumn("id", ",")
    first = parse([b'\xef\xbb\xbfname,"id"', b'"a,b",7', b"short"])
    assert (first.values, first.keys, first.missing_keys) == ([b'"a,b",7'], [b"7"], 0)
    assert first.error == "the row has 1 field, the header has 2"
    assert parse([b'x,"1\n2"']).keys == [b"1\n2"]
    with pytest.raises(BadHeader, match="row 1: no column 'id', only 'name', 'Id'"):
        KeyedByColumn("id", ",")([b"name,Id"])


# ---- records as consume writes them


@given(
    st.lists(
        st.tuples(
            st.none() | st.binary(max_size=9),
            st.none() | st.binary(max_size=9),
            st.lists(st.tuples(st.text(alphabet="aé\n", max_size=3), st.none() | st.binary(max_size=5)), max_size=3),
            st.integers(TIMESTAMP_MS_MIN, TIMESTAMP_MS_MAX),
            st.integers(0, 2**32 - 1),
        ),
        max_size=5,
    )
)
def test_json_records_are_read_back_as_they_were(
    rows: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]], int, int]],
) -> None:
    lines = [
        record_json(
            {"topic": "t", "partition": partition, "offset": at, "timestamp_ms": ms}, key, value, headers
        ).encode()
        for at, (key, value, headers, ms, partition) in enumerate(rows)
    ]
    records = records_of_json(lines)
    assert records.error is None
    columns = (records.keys, records.values, records.headers, records.timestamps_ms, records.partitions)
    assert list(zip(*columns, strict=True)) == rows  # type: ignore[arg-type]


def test_what_a_json_record_leaves_out_is_left_to_the_producer() -> None:
    records = records_of_json([b'{"value":"v"}'])
    assert (records.values, records.keys, records.headers) == ([b"v"], [None], [[]])
    assert (records.timestamps_ms, records.partitions) == ([None], [None])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"nonsense", "not JSON: "),
        (b"", "empty, not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"key":"k"}', "no field 'value'"),
        (b'{"value":"v","vlaue":1}', "unknown field 'vlaue'"),
        (b'{"value":1}', "'value' is neither text nor null"),
        (b'{"value":"v","value_base64":""}', "exclude each other"),
        (b'{"value_base64":"*"}', "'value_base64' is not base64"),
        (b'{"value_base64":null}', "'value_base64' is not base64"),
        (b'{"value":"\\ud800"}', "'value' is no text"),
        (b'{"value":"v","partition":-1}', "'partition' is -1"),
        (b'{"value":"v","partition":true}', "'partition' is not an integer"),
        (b'{"value":"v","timestamp_ms":1.5}', "'timestamp_ms' is not an integer"),
        (b'{"value":"v","timestamp_ms":99999999999999999999}', "the years 1 to 9999"),
        (b'{"value":"v","headers":{}}', "'headers' is not a list"),
        (b'{"value":"v","headers":[{"value":"x"}]}', "text 'key'"),
        (b'{"value":"v","headers":[' + b",".join([b'{"key":"h","value":null}'] * 257) + b"]}", "a record may have 256"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_line_that_is_no_record_ends_the_records_there(bad: bytes, reason: str) -> None:
    records = records_of_json([b'{"value":"a"}', bad, b'{"value":"b"}'])
    assert records.values == [b"a"]
    assert records.error is not None and reason in records.error


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("\\t", b"\t"),
        ("\\0", b"\0"),
        ("\\r\\n", b"\r\n"),
        ("\\xff--", b"\xff--"),
        ("\\\\t", b"\\t"),
        ("é", "é".encode()),
        ("\udcff", b"\xff"),
    ],
)
def test_delimiters_are_written_as_in_c(text: str, delimiter: bytes) -> None:
    assert unescape(text) == delimiter


@pytest.mark.parametrize("text", ["\\", "a\\q", "\\x1"])
def test_an_escape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a backslash is"):
        unescape(text)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "not JSON"),
        (b"", "empty"),
        (b"[1]", "not a JSON object"),
        (b'{"k":[1]}', "field 'k' is list"),
        (b'{"k":{}}', "field 'k' is dict"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_line_without_a_usable_key_ends_the_records_there(bad: bytes, reason: str) -> None:
    keyed = keyed_by_field("k")([b'{"k":"a"}', bad, b'{"k":"b"}'])
    assert keyed.keys == [b"a"]
    assert keyed.values == [b'{"k":"a"}']
    assert keyed.error is not None and reason in keyed.error


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("earliest", PositionOption("earliest")),
        ("latest", PositionOption("latest")),
        ("0", PositionOption("offset", 0)),
        (str(INT64_MAX), PositionOption("offset", INT64_MAX)),
        ("@1700000000000", PositionOption("timestamp", 1_700_000_000_000)),
        ("@-1", PositionOption("timestamp", -1)),
        ("2023-11-14T22:13:20Z", PositionOption("timestamp", 1_700_000_000_000)),
        ("2023-11-14T22:13:20", PositionOption("timestamp", 1_700_000_000_000)),
        ("2023-11-14T23:13:20.125+01:00", PositionOption("timestamp", 1_700_000_000_125)),
        ("2023-11-14", PositionOption("timestamp", 1_699_920_000_000)),
        ("1969-12-31T23:59:59.999Z", PositionOption("timestamp", -1)),
    ],
)
def test_positions(text: str, position: PositionOption) -> None:
    assert parse_position(text) == position


@pytest.mark.parametrize("text", ["", "-1", "@", "@1.5", "@x", "yesterday", "1e3", "²", str(INT64_MAX + 1), "9" * 5000])
def test_positions_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is none of|after @|beyond"):
        parse_position(text)


def test_the_last_records_are_a_position_where_that_is_taken() -> None:
    assert parse_position("-5", takes_last=True) == PositionOption("last", 5)
    assert PositionOption("last", 5).start == -5
    for text in ("-0", "--5", "-", "-5.5", "-²", str(-(INT64_MAX + 1))):
        with pytest.raises(ValueError, match=r"is none of .*\(-5\)|beyond"):
            parse_position(text, takes_last=True)


def test_text_is_verbatim_when_it_is_utf8_and_escaped_where_it_is_not() -> None:
    values = ["é\ttab".encode(), None, b"", b"\xc3", b"\x80\x1b[31m"]
    assert text_lines(values[:3], terminal=False) == "é\ttab\n\n\n".encode()
    assert text_lines(values, terminal=False) == "é\ttab\n\n\n\\xc3\n\\x80\x1b[31m\n".encode()
    assert text_lines([], terminal=False) == b""


def test_a_terminal_gets_no_control_characters() -> None:
    assert text_lines([b"\x1b]0;title\x07", "\x9b".encode()], terminal=True) == b"\\x1b]0;title\\x07\n\\x9b\n"


@given(st.lists(st.one_of(st.none(), st.binary(max_size=8)), max_size=8))
def test_two_halves_of_a_character_in_two_records_do_not_join(values: list[bytes | None]) -> None:
    lines = text_lines(values, terminal=False)
    assert lines == b"".join(((v or b"").decode("utf-8", "backslashreplace") + "\n").encode() for v in values)


@given(st.one_of(st.none(), st.binary()), st.one_of(st.none(), st.binary()))
def test_json_keeps_every_byte(key: bytes | None, value: bytes | None) -> None:
    import base64

    shown = json.loads(record_json({"offset": 1}, key, value, [("h", value)]))

    def back(item: dict[str, str | None], name: str) -> bytes | None:
        if f"{name}_base64" in item:
            return base64.b64decode(str(item[f"{name}_base64"]))
        text = item[name]
        return None if text is None else text.encode()

    assert back(shown, "key") == key
    assert back(shown, "value") == value
    assert back(shown["headers"][0], "value") == value
