"""Lines, keys, positions and texts of the command line: pure parts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamhouse.cli.lines import (
    LINE_BYTES_MAX,
    LineSplitter,
    LineTooLong,
    keyed_by_field,
    keyed_by_separator,
    without_keys,
)
from streamhouse.cli.position import INT64_MAX, Position, parse_position
from streamhouse.cli.text import record_json, text_lines
from streamhouse.core.accumulator import RECORD_BYTES_MAX
from streamhouse.core.outgoing import check_record


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
        ("earliest", Position("earliest")),
        ("latest", Position("latest")),
        ("0", Position("offset", 0)),
        (str(INT64_MAX), Position("offset", INT64_MAX)),
        ("@1700000000000", Position("timestamp", 1_700_000_000_000)),
        ("@-1", Position("timestamp", -1)),
        ("2023-11-14T22:13:20Z", Position("timestamp", 1_700_000_000_000)),
        ("2023-11-14T22:13:20", Position("timestamp", 1_700_000_000_000)),
        ("2023-11-14T23:13:20.125+01:00", Position("timestamp", 1_700_000_000_125)),
        ("2023-11-14", Position("timestamp", 1_699_920_000_000)),
        ("1969-12-31T23:59:59.999Z", Position("timestamp", -1)),
    ],
)
def test_positions(text: str, position: Position) -> None:
    assert parse_position(text) == position


@pytest.mark.parametrize("text", ["", "-1", "@", "@1.5", "@x", "yesterday", "1e3", "²", str(INT64_MAX + 1), "9" * 5000])
def test_positions_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is none of|after @|beyond"):
        parse_position(text)


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
