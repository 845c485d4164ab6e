"""Columns in memory: null, empty and present are three different things; slices and joins keep them."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import BytesColumn, FormatError, HeadersColumn, Records, encode_batch

pytestmark = pytest.mark.quick

cells = st.lists(st.one_of(st.none(), st.binary(max_size=5)), max_size=20)
header_lists = st.lists(
    st.lists(st.tuples(st.text(max_size=3), st.one_of(st.none(), st.binary(max_size=3))), max_size=3), max_size=8
)


@given(cells, st.data())
def test_bytes_column_round_trip_slice_concat(values: list[bytes | None], data: st.DataObject) -> None:
    column = BytesColumn.from_list(values)
    assert len(column) == len(values)
    assert column.to_list() == values
    start = data.draw(st.integers(0, len(values)))
    stop = data.draw(st.integers(start, len(values)))
    assert column.slice(start, stop).to_list() == values[start:stop]
    parts = [column.slice(0, start), column.slice(start, stop), column.slice(stop, len(values))]
    assert BytesColumn.concat(parts).to_list() == values


@given(cells)
def test_bytes_column_to_arrow_is_the_same_and_shares_the_data(values: list[bytes | None]) -> None:
    column = BytesColumn.from_list(values)
    array = column.to_arrow()
    array.validate(full=True)
    assert array.type == pa.binary()
    assert array.to_pylist() == values
    if column.data:
        assert array.buffers()[2].address == pa.py_buffer(column.data).address


ARROW_TYPES = (
    pa.binary(),
    pa.string(),
    pa.large_binary(),
    pa.large_string(),
    pa.binary_view(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
)


@given(st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=12), st.sampled_from(ARROW_TYPES), st.data())
def test_bytes_column_is_that_of_an_arrow_array_of_any_layout(
    values: list[str | None], kind: pa.DataType, data: st.DataObject
) -> None:
    array = pa.array(values, pa.string()).cast(kind)
    expected = [None if value is None else value.encode() for value in values]
    start = data.draw(st.integers(0, len(values)))
    assert BytesColumn.from_arrow(array).to_list() == expected
    assert BytesColumn.from_arrow(array[start:]).to_list() == expected[start:]
    chunked = pa.chunked_array([array[:start], array[start:], array], type=kind)
    column = BytesColumn.from_arrow(chunked)
    assert column.to_list() == expected * 2
    if len(column):  # the encoder refuses columns that contradict themselves
        encoded = encode_batch(Records.from_lists([b""] * len(column), keys=column.to_list()))
        columnar = Records.from_lists([b""] * len(column))
        columnar.keys = column
        assert encode_batch(columnar) == encoded


def test_an_arrow_array_keeps_its_data_where_it_is() -> None:
    array = pa.array([b"one", b"two", b"three"])
    column = BytesColumn.from_arrow(array[1:])
    assert np.frombuffer(column.data, np.uint8).ctypes.data == array.buffers()[2].address + 3


def test_a_null_over_bytes_has_none() -> None:
    offsets = pa.py_buffer(np.array([0, 1, 3, 4], np.int32))
    array = pa.Array.from_buffers(pa.binary(), 3, [pa.py_buffer(b"\5"), offsets, pa.py_buffer(b"abcd")])
    column = BytesColumn.from_arrow(array)
    assert column.to_list() == [b"a", None, b"d"]
    assert bytes(column.data) == b"ad"
    assert BytesColumn.from_arrow(pa.array([b"ab", None], pa.binary(2))).to_list() == [b"ab", None]
    assert BytesColumn.from_arrow(pa.nulls(2)).to_list() == [None, None]


@pytest.mark.parametrize("offsets", [[0, 3, 1, 4], [0, 9, 2, 4], [0, 1, -1, 4]])
def test_arrow_offsets_outside_of_the_data_are_refused(offsets: list[int]) -> None:
    buffers = [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(b"abcd")]
    with pytest.raises(FormatError, match="offsets"):
        BytesColumn.from_arrow(pa.Array.from_buffers(pa.binary(), 3, buffers))


@pytest.mark.parametrize("array", [pa.array([1, 2]), pa.array([["a"]]), [b"a"]])
def test_what_has_no_bytes_is_refused_by_type(array: object) -> None:
    with pytest.raises(TypeError, match=r"cast it to|pyarrow Array"):
        BytesColumn.from_arrow(array)
    with pytest.raises((TypeError, AttributeError)):
        HeadersColumn.from_arrow(array)


ARROW_HEADERS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.binary())]))


@given(header_lists, st.data())
def test_headers_column_is_that_of_an_arrow_array(
    headers: list[list[tuple[str, bytes | None]]], data: st.DataObject
) -> None:
    array = HeadersColumn.from_list(headers).to_arrow(ARROW_HEADERS)
    start = data.draw(st.integers(0, len(headers)))
    assert HeadersColumn.from_arrow(array[start:]).to_list() == headers[start:]
    assert HeadersColumn.from_arrow(pa.chunked_array([array, array])).to_list() == headers * 2


def test_arrow_headers_may_be_null_or_a_map_and_have_names() -> None:
    pair = {"name": "h", "value": b"1"}
    assert HeadersColumn.from_arrow(pa.array([None, [pair]], ARROW_HEADERS)).to_list() == [[], [("h", b"1")]]
    maps = pa.array([[("h", b"1"), ("i", None)], None], pa.map_(pa.string(), pa.binary()))
    assert HeadersColumn.from_arrow(maps).to_list() == [[("h", b"1"), ("i", None)], []]
    with pytest.raises(FormatError, match="name"):
        HeadersColumn.from_arrow(pa.array([[{"name": None, "value": b"1"}]], ARROW_HEADERS))


@given(st.integers(0, 5), st.lists(st.tuples(st.text(max_size=3), st.one_of(st.none(), st.binary(max_size=3)))))
def test_constant_headers_are_those_of_every_record(count: int, headers: list[tuple[str, bytes | None]]) -> None:
    assert HeadersColumn.constant(count, headers).to_list() == [headers] * count


@given(st.lists(st.tuples(*[st.one_of(st.none(), st.binary(max_size=3))] * 3), max_size=8), st.integers(1, 3))
def test_headers_of_columns_take_turns(rows: list[tuple[bytes | None, ...]], each: int) -> None:
    names = ["op", "", "ü"][:each]
    columns = [(name, BytesColumn.from_list([row[at] for row in rows])) for at, name in enumerate(names)]
    assert HeadersColumn.of_columns(columns).to_list() == [list(zip(names, row, strict=False)) for row in rows]


def test_headers_of_columns_have_a_value_for_every_record() -> None:
    two, one = BytesColumn.from_list([b"1", b"2"]), BytesColumn.from_list([b"1"])
    with pytest.raises(FormatError, match="'n' has 1 values for 2 records"):
        HeadersColumn.of_columns([("op", two), ("n", one)])


@given(header_lists, st.data())
def test_headers_column_round_trip_slice_concat(
    headers: list[list[tuple[str, bytes | None]]], data: st.DataObject
) -> None:
    column = HeadersColumn.from_list(headers)
    assert column.to_list() == headers
    start = data.draw(st.integers(0, len(headers)))
    first, second = column.slice(0, start), column.slice(start, len(headers))
    assert first.to_list() == headers[:start]
    assert second.to_list() == headers[start:]
    assert HeadersColumn.concat([first, second]).to_list() == headers
    assert HeadersColumn.empty(3).to_list() == [[], [], []]


def test_records_concat_fills_in_what_some_parts_lack() -> None:
    plain = Records.from_lists([b"a", b"b"], timestamps_ms=5)
    rich = Records.from_lists([b"c"], keys=[b"k"], timestamps_ms=[6], headers=[[("h", None)]], offsets=[9])
    joined = Records.concat([plain, rich])
    assert joined.values.to_list() == [b"a", b"b", b"c"]
    assert joined.keys.to_list() == [None, None, b"k"]
    assert joined.headers is not None
    assert joined.headers.to_list() == [[], [], [("h", None)]]
    assert joined.offsets.tolist() == [0, 1, 9]
    assert joined.timestamps_ms.tolist() == [5, 5, 6]
    assert joined.size_bytes == 5
    assert joined.slice(1, 3).values.to_list() == [b"b", b"c"]


def test_no_headers_at_all_is_none() -> None:
    assert Records.from_lists([b"a", b"b"], headers=[[], []]).headers is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"keys": [b"k"]}, "keys has 1 entries for 2 values"),
        ({"headers": [[]]}, "headers has 1 entries for 2 values"),
        ({"timestamps_ms": [1]}, r"timestamps_ms has shape \(1,\) for 2 values"),
        ({"timestamps_ms": []}, r"timestamps_ms has shape \(0,\) for 2 values"),
        ({"timestamps_ms": 1 << 63}, "timestamps_ms is 9223372036854775808, outside int64"),
        ({"timestamps_ms": [0, 1 << 63]}, "timestamps_ms holds something that is not an int64"),
        ({"timestamps_ms": [0, 1 << 70]}, "timestamps_ms holds something that is not an int64"),
        ({"timestamps_ms": [0.5, 1.5]}, "timestamps_ms holds something that is not an int64"),
        ({"offsets": [0, -(1 << 70)]}, "offsets holds something that is not an int64"),
    ],
)
def test_lists_that_do_not_belong_together_are_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        Records.from_lists([b"a", b"b"], **arguments)  # type: ignore[arg-type]


def test_what_is_not_bytes_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        BytesColumn.from_list([b"a", "b"])  # type: ignore[list-item]


def test_slices_are_views() -> None:
    column = BytesColumn.from_list([b"abc", b"def", b"ghi"])
    part = column.slice(1, 3)
    assert isinstance(part.data, memoryview)
    assert part.data.obj is column.data
    assert part.ends.tolist() == [3, 6]
    assert np.shares_memory(column.slice(0, 2).ends, column.ends) is False  # rebased, the data is not copied
