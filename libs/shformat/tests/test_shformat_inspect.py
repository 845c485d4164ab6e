"""inspect: a sound file described whole, a damaged one with the place of the damage."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import (
    FRAME_HEADER_SIZE,
    SEGMENT_FOOTER_SIZE,
    WAL_FILE_HEADER_SIZE,
    Codec,
    Records,
    SegmentBuilder,
    describe_segment,
    describe_wal_file,
    encode_batch,
    encode_frame_header,
    encode_wal_file_header,
    stamp_batch,
)
from shformat.inspect import Description

pytestmark = pytest.mark.quick

TOPIC = bytes(range(1, 17))
TOPIC_TEXT = "01020304-0506-0708-090a-0b0c0d0e0f10"


def batch(base_offset: int) -> bytes:
    records = Records.from_lists([b"value", b"other"], timestamps_ms=[5, 6])
    return stamp_batch(encode_batch(records, codec=Codec.NONE), base_offset, 3)


def segment() -> bytes:
    builder = SegmentBuilder(TOPIC, 4, 3, block_bytes_target=1, codec=Codec.NONE)
    for at in (0, 2, 4):
        builder.add(batch(at))
    return b"".join(builder.finish().parts)


def wal_file(ahead_bytes: int = 0) -> bytes:
    parts = [encode_wal_file_header(TOPIC, 9, ahead_bytes=ahead_bytes)]
    for at in (0, 2, 4):
        parts += [encode_frame_header(TOPIC, 4, 3, at, 2, batch(at)), batch(at)]
    return b"".join(parts)


BLOCK = len(batch(0))
FRAME = FRAME_HEADER_SIZE + BLOCK


def described(data: bytes) -> Description:
    description = describe_segment(lambda at, size_bytes: data[at : at + size_bytes], len(data))
    json.dumps(description)
    return description


def described_wal(data: bytes) -> Description:
    description = describe_wal_file(data)
    json.dumps(description)
    return description


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 0x10
    return bytes(changed)


def test_a_sound_segment() -> None:
    data = segment()
    found = described(data)
    assert found["damage"] == []
    assert found["index_intact"] is True
    assert found["header"] == {
        "topic_id": TOPIC_TEXT,
        "partition": 4,
        "codec": "none",
        "epoch": 3,
        "base_offset": 0,
        "end_offset": 6,
        "record_count": 6,
    }
    assert [(block["at"], block["size_bytes"]) for block in found["blocks"]] == [
        (64, BLOCK),
        (64 + BLOCK, BLOCK),
        (64 + 2 * BLOCK, BLOCK),
    ]
    assert all(block["intact"] and block["codec"] == "none" for block in found["blocks"])
    assert found["footer_at"] == len(data) - SEGMENT_FOOTER_SIZE
    assert found["raw_bytes"] == sum(block["uncompressed_bytes"] for block in found["blocks"])
    assert found["compression_ratio"] == round(found["raw_bytes"] / len(data), 3)


def test_a_damaged_block_is_pointed_at_and_the_others_are_described() -> None:
    found = described(flipped(segment(), 64 + BLOCK + 100))
    assert [block["intact"] for block in found["blocks"]] == [True, False, True]
    (damage,) = found["damage"]
    assert damage["at"] == 64 + BLOCK
    assert "block CRC" in damage["what"]


@pytest.mark.parametrize(
    ("back", "says"),
    [(1, "segment ends in"), (SEGMENT_FOOTER_SIZE, "footer CRC"), (SEGMENT_FOOTER_SIZE + 5, "index CRC")],
)
def test_without_an_index_the_blocks_are_found_by_walking(back: int, says: str) -> None:
    data = segment()
    found = described(flipped(data, len(data) - back))
    assert found["index_intact"] is False
    assert [block["first_offset"] for block in found["blocks"]] == [0, 2, 4]
    assert says in found["damage"][0]["what"]
    assert found["damage"][1]["at"] >= 64 + 3 * BLOCK
    assert found["header"]["record_count"] == 6


def test_a_damaged_header_leaves_the_index() -> None:
    found = described(flipped(segment(), 10))
    assert found["header"] is None
    assert len(found["blocks"]) == 3
    assert [damage["at"] for damage in found["damage"]] == [60]


def test_a_cut_segment() -> None:
    found = described(segment()[: 64 + BLOCK + 20])
    assert [block["first_offset"] for block in found["blocks"]] == [0]
    assert found["damage"][-1]["at"] >= 64 + BLOCK
    assert described(b"")["blocks"] == []


def test_zeros_ahead_of_the_last_frame_are_no_damage() -> None:
    found = described_wal(wal_file(ahead_bytes=4096) + bytes(4000))
    assert found["header"]["ahead_bytes"] == 4096
    assert (found["space_ahead_bytes"], found["damage"], found["ends_in_damage"]) == (4000, [], False)
    found = described_wal(flipped(wal_file(ahead_bytes=4096), WAL_FILE_HEADER_SIZE + 2 * FRAME + 1) + bytes(4000))
    assert (found["space_ahead_bytes"], len(found["damage"]), found["ends_in_damage"]) == (4000, 1, True)
    assert described_wal(wal_file() + bytes(4000))["ends_in_damage"] is True, "nothing was to be there"


def test_a_sound_wal_file() -> None:
    found = described_wal(wal_file())
    assert found["header"] == {
        "wal_id": TOPIC.hex(),
        "sequence": 9,
        "previous_size_bytes": 0,
        "version": 2,
        "ahead_bytes": 0,
    }
    assert found["damage"] == []
    assert found["ends_in_damage"] is False
    assert found["record_count"] == 6
    first = found["frames"][0]
    assert (first["topic_id"], first["partition"], first["base_offset"]) == (TOPIC_TEXT, 4, 0)
    assert first["batch"]["record_count"] == 2
    assert [frame["at"] for frame in found["frames"]] == [WAL_FILE_HEADER_SIZE + FRAME * n for n in range(3)]


def test_a_damaged_frame_names_what_is_lost() -> None:
    found = described_wal(flipped(wal_file(), WAL_FILE_HEADER_SIZE + FRAME + FRAME_HEADER_SIZE + 100))
    (damage,) = found["damage"]
    assert (damage["at"], damage["size_bytes"]) == (WAL_FILE_HEADER_SIZE + FRAME, FRAME)
    assert damage["lost"]["base_offset"] == 2
    assert found["ends_in_damage"] is False
    assert [frame["base_offset"] for frame in found["frames"]] == [0, 4]


def test_a_torn_tail_and_a_damaged_file_header() -> None:
    found = described_wal(flipped(wal_file(), 9)[:-3])
    assert found["header"] is None
    assert found["ends_in_damage"] is True
    assert [damage["at"] for damage in found["damage"]] == [40, WAL_FILE_HEADER_SIZE + 2 * FRAME]
    assert described_wal(b"")["ends_in_damage"] is True


def test_a_batch_that_is_not_what_its_frame_says() -> None:
    data = encode_wal_file_header(TOPIC, 9) + encode_frame_header(TOPIC, 4, 3, 7, 2, batch(0)) + batch(0)
    noise = bytes(100)
    data += encode_frame_header(TOPIC, 4, 3, 9, 2, noise) + noise
    found = described_wal(data)
    assert [frame["intact"] for frame in found["frames"]] == [False, False]
    assert "batch and frame differ" in found["damage"][0]["what"]
    assert "batch magic" in found["damage"][1]["what"]
    assert found["damage"][1]["lost"]["base_offset"] == 9


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=9), st.booleans())
def test_never_raises_whatever_the_bytes(at: int, value: bytes, cut: bool) -> None:
    for data, describe in ((segment(), described), (wal_file(), described_wal)):
        where = at % len(data)
        changed = data[:where] + value + (b"" if cut else data[where + len(value) :])
        assert describe(changed)["size_bytes"] == len(changed)
