"""Records as Arrow columns: nulls, empty columns, text that is none, times that are none."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shformat import Records
from shproto.errors import StatementFailed
from streamhouse_sql.arrow import schema_of, table_of, to_arrow, to_stream
from streamhouse_sql.core.columns import COLUMN_NAMES

pytestmark = pytest.mark.quick

VALUES = st.lists(st.one_of(st.none(), st.text(max_size=20).map(str.encode)), max_size=20)


def arrow(records: Records, *columns: str) -> pa.RecordBatch:
    return to_arrow("t", 3, records, columns or COLUMN_NAMES)


@settings(max_examples=50, deadline=None)
@given(values=VALUES, data=st.data())
def test_the_columns_are_those_of_the_records(values: list[bytes | None], data: st.DataObject) -> None:
    def lists(items: st.SearchStrategy[object]) -> list[object]:
        return data.draw(st.lists(items, min_size=len(values), max_size=len(values)))

    keys = lists(st.one_of(st.none(), st.text(max_size=5).map(str.encode)))
    headers = lists(st.lists(st.tuples(st.text(max_size=5), st.one_of(st.none(), st.binary(max_size=5))), max_size=3))
    times = lists(st.integers(-(10**12), 10**13))
    records = Records.from_lists(
        values, keys=keys, headers=headers, timestamps_ms=times, offsets=[7 + i for i in range(len(values))]
    )
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    found = arrow(records.slice(first, last))
    assert found.schema == schema_of(COLUMN_NAMES) and found.num_rows == last - first
    found.validate(full=True)
    part = slice(first, last)
    assert found["_value_bytes"].to_pylist() == values[part]
    assert found["_key_bytes"].to_pylist() == keys[part]
    assert found["_value"].to_pylist() == [value if value is None else value.decode() for value in values[part]]
    assert found["_key"].to_pylist() == [key if key is None else key.decode() for key in keys[part]]
    assert found["_headers"].to_pylist() == [
        [{"name": name, "value": value} for name, value in pairs] for pairs in headers[part]
    ]
    assert found["_offset"].to_pylist() == [7 + i for i in range(first, last)]
    assert set(found["_partition"].to_pylist()) <= {3}
    assert found["_timestamp"].cast(pa.int64()).to_pylist() == [ms * 1000 for ms in times[part]]


def test_records_without_keys_and_headers_have_nulls_and_empty_lists() -> None:
    found = arrow(Records.from_lists([b"a", b""]))
    assert found["_key"].to_pylist() == [None, None] and found["_headers"].to_pylist() == [[], []]
    assert found["_value"].to_pylist() == ["a", ""]
    assert arrow(Records.from_lists([])).num_rows == 0


def test_only_the_columns_asked_for_are_made() -> None:
    records = Records.from_lists([b"\xff"], keys=[b"k"])
    assert arrow(records, "_key", "_offset").schema.names == ["_key", "_offset"]
    assert arrow(records, "_value_bytes")["_value_bytes"].to_pylist() == [b"\xff"]


@pytest.mark.parametrize("broken", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"ok\xf5\x80\x80\x80", b"\x80"])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_the_first_value_that_is_not_utf_8_is_named_by_its_offset(broken: bytes, position: int) -> None:
    values: list[bytes | None] = ["ä€😀".encode(), None, b"", b"x", b"y"]
    values[position] = broken
    records = Records.from_lists(values, offsets=[100, 101, 105, 106, 120])
    offset = [100, 101, 105, 106, 120][position]
    with pytest.raises(StatementFailed) as error:
        arrow(records, "_value")
    assert str(error.value) == (
        f"t/3: _value of the record at offset {offset} is not UTF-8; _value_bytes has its bytes"
    )
    assert error.value.details == {"topic": "t", "partition": "3", "offset": str(offset)}
    with pytest.raises(StatementFailed, match=f"_key of the record at offset {offset}"):
        arrow(Records.from_lists([None] * 5, keys=values, offsets=[100, 101, 105, 106, 120]), "_key")


def test_characters_cut_between_two_values_are_not_utf_8() -> None:
    """Both halves of a character back to back are valid bytes of one buffer."""
    first, second = "ä".encode()[:1], "ä".encode()[1:]
    with pytest.raises(StatementFailed, match="offset 0"):
        arrow(Records.from_lists([first, second]), "_value")


@pytest.mark.parametrize("ms", [2**63 - 1, -(2**63), 2**63 // 1000, -(2**63) // 1000 - 1])
def test_a_time_that_a_timestamp_does_not_have_is_an_error_with_its_offset(ms: int) -> None:
    records = Records.from_lists([b"a", b"b"], timestamps_ms=[0, ms], offsets=[5, 9])
    with pytest.raises(StatementFailed, match=f"t/3: the timestamp of the record at offset 9 is {ms} ms"):
        arrow(records, "_timestamp")
    assert arrow(records, "_offset").num_rows == 2


def test_the_first_and_the_last_time_are_columns() -> None:
    limit = 2**63 // 1000 - 1
    found = arrow(Records.from_lists([b"a", b"b"], timestamps_ms=[limit, -limit]), "_timestamp")
    assert found["_timestamp"].cast(pa.int64()).to_pylist() == [limit * 1000, -limit * 1000]


def test_megabytes_are_columns() -> None:
    records = Records.from_lists([b"x" * (5 << 20), None, b"y"])
    assert [len(value or "") for value in arrow(records, "_value")["_value"].to_pylist()] == [5 << 20, 0, 1]


def test_a_stream_has_its_schema_also_without_rows() -> None:
    schema = schema_of(COLUMN_NAMES)
    with pa.ipc.open_stream(to_stream(schema, [])) as reader:
        assert reader.schema == schema and list(reader) == []
    batch = table_of({"a": [1, None]}, {"a": pa.int32()})
    with pa.ipc.open_stream(to_stream(batch.schema, [batch])) as reader:
        assert list(reader) == [batch]
