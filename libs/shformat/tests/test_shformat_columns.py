"""Columns in memory: null, empty and present are three different things; slices and joins keep them."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import BytesColumn, FormatError, HeadersColumn, Records

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
