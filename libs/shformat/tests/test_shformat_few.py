"""Batches of few records: the plain path is the column path, to the byte and to the refusal."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import (
    BATCH_HEADER_SIZE,
    BatchHeader,
    Codec,
    FormatError,
    FormatLimits,
    ProducerStamp,
    Records,
    check_batch,
    encode_batch,
    encode_lists,
    validate_batch,
    validate_new_batch,
)
from shformat.few import FEW_RECORDS_MAX, encode_few, timestamps_of_few

pytestmark = pytest.mark.quick

INT64_MAX = (1 << 63) - 1
INT64_MIN = -(1 << 63)
TABLE = struct.Struct("<7I")

timestamps = st.one_of(
    st.integers(1_700_000_000_000, 1_700_000_100_000),
    st.integers(INT64_MIN, INT64_MAX),
    st.sampled_from([INT64_MIN, INT64_MAX, 0, -1]),
)
cells = st.one_of(st.none(), st.just(b""), st.binary(max_size=6), st.binary(min_size=120, max_size=200))
stamps = st.one_of(st.none(), st.just(ProducerStamp(5, 2, 77)))


@st.composite
def lists(draw: st.DrawFn) -> tuple[list[bytes | None], list[bytes | None] | None, list[int]]:
    count = draw(st.integers(1, FEW_RECORDS_MAX + 2))
    exactly = {"min_size": count, "max_size": count}
    keys = draw(st.one_of(st.none(), st.lists(cells, **exactly)))
    return draw(st.lists(cells, **exactly)), keys, draw(st.lists(timestamps, **exactly))


@given(lists(), stamps, st.sampled_from(Codec))
def test_lists_are_encoded_as_columns_are(
    columns: tuple[list[bytes | None], list[bytes | None] | None, list[int]],
    stamp: ProducerStamp | None,
    codec: Codec,
) -> None:
    values, keys, timestamps_ms = columns
    expected = encode_batch(Records.from_lists(values, keys, timestamps_ms), codec=codec, producer=stamp)
    assert encode_lists(values, keys, timestamps_ms, codec=codec, producer=stamp) == expected


def test_lists_with_headers_are_encoded_as_columns_are() -> None:
    headers = [[("a", b"1"), ("b", None)], []]
    expected = encode_batch(Records.from_lists([b"x", b"y"], timestamps_ms=[1, 2], headers=headers))
    assert encode_lists([b"x", b"y"], None, [1, 2], headers) == expected


def test_the_plain_path_takes_what_it_is_for() -> None:
    assert encode_few([b"x", None], [b"k", b""], [5, 3]) is not None
    payload = encode_few([b"x", None], [b"k", b""], [5, 3])
    assert payload is not None
    assert timestamps_of_few(memoryview(payload), 2, 5, True) == [5, 3]


@pytest.mark.parametrize(
    ("values", "keys", "timestamps_ms", "message"),
    [
        ([], None, [], "record count is 0"),
        ([b"x"], [b"k", b"l"], [1], "keys has 2 entries for 1 values"),
        ([b"x"], None, [1, 2], "timestamps_ms has shape"),
        ([b"x"], None, [1 << 63], "something that is not an int64"),
        ([b"x"], None, [1.5], "something that is not an int64"),
    ],
)
def test_lists_that_make_no_batch_are_refused_as_columns_are(
    values: list[bytes | None], keys: list[bytes | None] | None, timestamps_ms: list[int], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        encode_lists(values, keys, timestamps_ms)


def test_a_value_that_is_no_bytes_is_refused() -> None:
    with pytest.raises(TypeError):
        encode_lists(["text"], None, [1])  # type: ignore[list-item]
    assert encode_lists([bytearray(b"x")], None, [1]) == encode_lists([b"x"], None, [1])  # type: ignore[list-item]


def test_the_limits_of_a_batch_hold_for_few_records() -> None:
    with pytest.raises(FormatError, match="uncompressed_bytes_max is 100"):
        encode_lists([bytes(200)], None, [1], limits=FormatLimits(uncompressed_bytes_max=100))
    with pytest.raises(FormatError, match="batch_bytes_max is 150"):
        encode_lists([bytes(range(200))], None, [1], limits=FormatLimits(batch_bytes_max=150))


# ---- checking


def with_payload(batch: bytes, payload: bytes) -> bytes:
    """`batch`, not compressed, with another payload, its sizes and its CRC right."""
    body = bytearray(batch[20:BATCH_HEADER_SIZE])
    struct.pack_into("<II", body, 8, BATCH_HEADER_SIZE + len(payload), len(payload))
    crc = zlib.crc32(bytes(body) + payload)
    return batch[:16] + struct.pack("<I", crc) + bytes(body) + payload


def outcome(batch: bytes) -> BatchHeader | str:
    """As the column path has it."""
    try:
        return validate_batch(batch)
    except FormatError as error:
        return str(error)


def outcome_of_new(batch: bytes) -> BatchHeader | str:
    try:
        return validate_new_batch(batch)
    except FormatError as error:
        return str(error)


@given(st.data())
def test_damaged_payloads_are_refused_as_the_column_path_refuses_them(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    exactly = {"min_size": count, "max_size": count}
    values = data.draw(st.lists(cells, **exactly))
    keys = data.draw(st.one_of(st.none(), st.lists(cells, **exactly)))
    dates = data.draw(st.lists(st.integers(1_700_000_000_000, 1_700_000_100_000), **exactly))
    batch = encode_lists(values, keys, dates, codec=Codec.NONE)
    assert outcome_of_new(batch) == outcome(batch) == check_batch(batch)
    payload = bytearray(batch[BATCH_HEADER_SIZE:])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0x80, 0xFF, 0x7F, 0])))
    if data.draw(st.booleans()):
        payload += data.draw(st.binary(max_size=12))
    damaged = with_payload(batch, bytes(payload))
    found, expected = outcome_of_new(damaged), outcome(damaged)
    # Where timestamps come out as no dates, a new batch is refused though it can be read.
    assert found == expected or (isinstance(expected, BatchHeader) and "timestamp_ms" in str(found))


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(TABLE.pack(0, 0, 0, 1, 0, 0, 1) + b"\x02", id="a byte short"),
        pytest.param(TABLE.pack(0, 0, 0, 2, 0, 0, 1) + b"\x82\x00x", id="a varint longer than it need be"),
        pytest.param(TABLE.pack(0, 0, 0, 11, 0, 0, 1) + b"\x82" + b"\x80" * 9 + b"\0x", id="a varint of 11 bytes"),
        pytest.param(TABLE.pack(0, 0, 1, 1, 0, 0, 0) + b"\x01\x01", id="keys without the flag"),
        pytest.param(TABLE.pack(1, 0, 0, 1, 0, 0, 0) + b"\x01\x01", id="gaps without the flag"),
        pytest.param(TABLE.pack(0, 1, 0, 1, 0, 0, 0) + b"\x01\x01", id="a delta too many"),
        pytest.param(TABLE.pack(0, 0, 0, 2, 0, 0, 0) + b"\x01\x81", id="a varint that does not end"),
    ],
)
def test_odd_payloads_are_judged_as_the_column_path_judges_them(payload: bytes) -> None:
    batch = with_payload(encode_lists([b"x"], None, [1_700_000_000_000], codec=Codec.NONE), payload)
    assert outcome_of_new(batch) == outcome(batch)
