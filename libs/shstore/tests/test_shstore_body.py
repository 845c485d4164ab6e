"""The body of an upload as a file: what io.BytesIO does with the same bytes, without holding them twice."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shstore.body import COPIED_BYTES_MAX, ViewsFile, request_body

pytestmark = pytest.mark.quick

MOVES = st.one_of(
    st.tuples(st.just("read"), st.integers(-1, 40)),
    st.tuples(st.just("readinto"), st.integers(0, 40)),
    st.tuples(st.just("seek"), st.integers(0, 60)),
    st.tuples(st.just("back"), st.integers(-5, 5)),
    st.tuples(st.just("end"), st.integers(-5, 5)),
)


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=6), st.lists(MOVES, max_size=20))
def test_it_reads_and_seeks_as_a_file_of_the_joined_bytes(parts: list[bytes], moves: list[tuple[str, int]]) -> None:
    file, model = ViewsFile([memoryview(part) for part in parts]), io.BytesIO(b"".join(parts))
    for move, number in moves:
        if move == "read":
            assert file.read(number) == model.read(number)
        elif move == "readinto":
            buffers = bytearray(number), bytearray(number)
            assert (file.readinto(buffers[0]), buffers[0]) == (model.readinto(buffers[1]), buffers[1])
        elif move == "seek":
            assert file.seek(number) == model.seek(number)
        else:
            base = model.tell() if move == "back" else len(model.getvalue())
            whence = io.SEEK_CUR if move == "back" else io.SEEK_END
            if base + number >= 0:
                assert file.seek(number, whence) == model.seek(number, whence)
        assert file.tell() == model.tell()


def test_a_position_before_the_beginning_is_refused() -> None:
    with pytest.raises(ValueError, match="position is -1"):
        ViewsFile([memoryview(b"x")]).seek(-1)


def test_only_a_large_body_is_a_file() -> None:
    assert request_body([]) == b""
    assert request_body([memoryview(b"a"), memoryview(b"b")]) == b"ab"
    assert isinstance(request_body([memoryview(bytes(COPIED_BYTES_MAX)), memoryview(b"b")]), ViewsFile)
