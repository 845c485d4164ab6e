"""Varint columns: against a plain one-number-at-a-time definition, and everything that is no column."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import FormatError
from shformat.varint import decode_varints, encode_varints, unzigzag, zigzag

pytestmark = pytest.mark.quick

UINT64_MAX = (1 << 64) - 1
numbers = st.lists(st.one_of(st.integers(0, 127), st.integers(0, 1 << 21), st.integers(0, UINT64_MAX)), max_size=60)


def plain_varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


@given(numbers)
def test_encoding_equals_the_definition_and_decodes_back(values: list[int]) -> None:
    encoded = encode_varints(np.array(values, np.uint64))
    assert encoded == b"".join(map(plain_varint, values))
    assert decode_varints(memoryview(encoded), len(values), "n", 0).tolist() == values


@pytest.mark.parametrize("bits", range(64))
def test_every_power_of_two_and_its_neighbours(bits: int) -> None:
    values = [(1 << bits) - 1, 1 << bits, min((1 << bits) + 1, UINT64_MAX)]
    encoded = encode_varints(np.array(values, np.uint64))
    assert encoded == b"".join(map(plain_varint, values))
    assert decode_varints(memoryview(encoded), 3, "n", 0).tolist() == values


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=30))
def test_zigzag_round_trip_and_definition(values: list[int]) -> None:
    folded = zigzag(np.array(values, np.int64))
    assert folded.tolist() == [2 * v if v >= 0 else -2 * v - 1 for v in values]
    assert unzigzag(folded).tolist() == values


@given(st.binary(max_size=60), st.integers(0, 40))
def test_any_bytes_are_numbers_or_a_format_error(encoded: bytes, count: int) -> None:
    try:
        decoded = decode_varints(memoryview(encoded), count, "n", 7)
    except FormatError as error:
        assert error.what.startswith("n: ")
        assert 7 <= error.at <= 7 + len(encoded)
    else:
        assert len(decoded) == count


@pytest.mark.parametrize(
    ("encoded", "count", "says"),
    [
        (b"\x01\x02", 1, "2 whole varints, 1 declared"),
        (b"\x80", 1, "fewer varints than the 1 declared"),
        (b"\x01\x80", 2, "fewer varints than the 2 declared"),
        (b"\x81\x01\x80", 2, "1 whole varints, 2 declared"),
        (b"", 1, "1 varints cannot fill 0 bytes"),
        (b"\x00", 0, "0 varints cannot fill 1 bytes"),
        (b"\x80" * 10 + b"\x00", 1, "1 varints cannot fill 11 bytes"),
        (b"\x80" * 10 + b"\x00\x00", 2, "varint of 11 bytes, at most 10"),
        (b"\xff" * 9 + b"\x02", 1, "varint exceeds 64 bits"),
    ],
)
def test_what_is_no_column_is_refused(encoded: bytes, count: int, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        decode_varints(memoryview(encoded), count, "n", 0)


def test_overlong_but_whole_varints_are_read() -> None:
    assert decode_varints(memoryview(b"\x81\x80\x00\x05"), 2, "n", 0).tolist() == [1, 5]
    assert decode_varints(memoryview(b"\xff" * 9 + b"\x01"), 1, "n", 0).tolist() == [UINT64_MAX]
