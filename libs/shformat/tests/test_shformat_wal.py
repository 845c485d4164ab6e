"""WAL files: whole frames come back, damage is placed, and what follows it is found again."""

import mmap
import random
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shformat import (
    FRAME_HEADER_SIZE,
    WAL_AHEAD_BYTES_MAX,
    WAL_AHEAD_UNIT_BYTES,
    WAL_FILE_HEADER_SIZE,
    WAL_FILE_HEADER_SIZE_V1,
    Codec,
    DamagedSpan,
    FormatError,
    FormatLimits,
    Records,
    SpaceAhead,
    WalFileHeader,
    WalFrame,
    decode_batch,
    decode_wal_file_header,
    encode_batch,
    encode_frame_header,
    encode_wal_file_header,
    frames_start,
    scan_frames,
    stamp_batch,
)
from shformat.wal import FRAME_MAGIC

pytestmark = pytest.mark.quick

INT64_MAX = (1 << 63) - 1
WAL_ID = bytes(range(1, 17))
TOPIC = bytes(range(16, 32))


def frame(base_offset: int, values: list[bytes], epoch: int = 3, partition: int = 2) -> bytes:
    batch = stamp_batch(encode_batch(Records.from_lists(values), codec=Codec.NONE), base_offset, epoch)
    return encode_frame_header(TOPIC, partition, epoch, base_offset, len(values), batch) + batch


def wal_file(*frames: bytes) -> bytes:
    return encode_wal_file_header(WAL_ID, 9) + b"".join(frames)


FRAMES = [frame(0, [b"a", b"bb"]), frame(2, [b"c" * 100]), frame(3, [b"", b"d", b"e"])]
STARTS = [
    WAL_FILE_HEADER_SIZE,
    WAL_FILE_HEADER_SIZE + len(FRAMES[0]),
    WAL_FILE_HEADER_SIZE + len(FRAMES[0] + FRAMES[1]),
]


def good(items: list[WalFrame | DamagedSpan]) -> list[int]:
    return [item.base_offset for item in items if isinstance(item, WalFrame)]


def damage(items: list[WalFrame | DamagedSpan]) -> list[DamagedSpan]:
    return [item for item in items if isinstance(item, DamagedSpan)]


def assert_covers(data: bytes, items: list[WalFrame | DamagedSpan]) -> None:
    """Frames and damage lie side by side from the file header to the end."""
    at = WAL_FILE_HEADER_SIZE
    for item in items:
        assert item.at == at
        assert item.size_bytes > 0
        at += item.size_bytes
    assert at == max(len(data), WAL_FILE_HEADER_SIZE)


# ---- file header


@given(
    st.binary(min_size=16, max_size=16).filter(any),
    st.integers(0, INT64_MAX),
    st.just(0) | st.integers(WAL_FILE_HEADER_SIZE_V1, INT64_MAX),
    st.integers(0, WAL_AHEAD_BYTES_MAX // WAL_AHEAD_UNIT_BYTES),
)
def test_file_header_round_trip(wal_id: bytes, sequence: int, previous: int, units: int) -> None:
    ahead_bytes = units * WAL_AHEAD_UNIT_BYTES
    encoded = encode_wal_file_header(wal_id, sequence, previous, ahead_bytes)
    assert len(encoded) == WAL_FILE_HEADER_SIZE
    header = decode_wal_file_header(encoded + b"frames")
    assert header == WalFileHeader(
        wal_id=wal_id,
        sequence=sequence,
        previous_size_bytes=previous,
        version=3 if units else 2,
        ahead_bytes=ahead_bytes,
    )
    assert header.size_bytes == WAL_FILE_HEADER_SIZE


def version_1(*frames: bytes) -> bytes:
    """A file as version 1 wrote it."""
    body = struct.pack("<4sHH16sQ", b"SHWL", 1, 0, WAL_ID, 9)
    return body + zlib.crc32(body).to_bytes(4, "little") + b"".join(frames)


def test_version_1_says_nothing_of_the_file_before() -> None:
    header = decode_wal_file_header(version_1())
    assert header == WalFileHeader(wal_id=WAL_ID, sequence=9, previous_size_bytes=0, version=1)
    assert header.size_bytes == WAL_FILE_HEADER_SIZE_V1 == len(version_1())
    assert good(list(scan_frames(version_1(*FRAMES)))) == [0, 2, 3]


@pytest.mark.parametrize("make", [version_1, wal_file])
def test_a_damaged_file_header_does_not_cost_its_frames(make: Callable[..., bytes]) -> None:
    """Whatever is damaged of it, its version included."""
    whole = make(*FRAMES)
    for at in range(len(make())):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        items = list(scan_frames(damaged))
        assert (good(items), damage(items)) == ([0, 2, 3], []), at
        assert frames_start(damaged) == len(make())


def test_a_damaged_file_header_and_first_frame_leave_the_rest() -> None:
    for make in (version_1, wal_file):
        damaged = bytearray(make(*FRAMES))
        damaged[20] ^= 1
        damaged[len(make()) + 9] ^= 1
        items = list(scan_frames(damaged))
        assert (good(items), [span.at for span in damage(items)]) == ([2, 3], [len(make())])


def test_file_header_damage_is_caught_bit_by_bit() -> None:
    encoded = encode_wal_file_header(WAL_ID, 1)
    for at in range(len(encoded)):
        for bit in range(8):
            flipped = bytearray(encoded)
            flipped[at] ^= 1 << bit
            with pytest.raises(FormatError):
                decode_wal_file_header(flipped)
        with pytest.raises(FormatError):
            decode_wal_file_header(encoded[:at])


@pytest.mark.parametrize(
    ("form", "at", "value", "says"),
    [
        ("<4s", 0, b"SHWX", "WAL file magic"),
        ("<H", 4, 4, "version is 4"),
        ("<H", 4, 3, "no space ahead"),
        ("<H", 6, 1, "flags are 0x0001"),
        ("<16s", 8, bytes(16), "wal id is"),
        ("<Q", 24, 1 << 63, "sequence is 9223372036854775808"),
        ("<Q", 32, 1 << 63, "previous size is 9223372036854775808"),
        ("<Q", 32, 35, "previous size is 35"),
    ],
)
def test_file_header_fields(form: str, at: int, value: int | bytes, says: str) -> None:
    changed = bytearray(encode_wal_file_header(WAL_ID, 1))
    struct.pack_into(form, changed, at, value)
    struct.pack_into("<I", changed, 40, zlib.crc32(changed[:40]))
    with pytest.raises(FormatError, match=says):
        decode_wal_file_header(changed)


@pytest.mark.parametrize(("wal_id", "sequence"), [(b"short", 1), (bytes(16), 1), (WAL_ID, -1), (WAL_ID, 1 << 63)])
def test_file_header_refuses(wal_id: bytes, sequence: int) -> None:
    with pytest.raises(FormatError):
        encode_wal_file_header(wal_id, sequence)


# ---- frames


def test_whole_frames_come_back_with_their_positions() -> None:
    data = wal_file(*FRAMES)
    items = list(scan_frames(data))
    assert_covers(data, items)
    assert [item.at for item in items] == STARTS
    first = items[0]
    assert isinstance(first, WalFrame)
    assert (first.topic_id, first.partition, first.epoch, first.base_offset, first.record_count) == (TOPIC, 2, 3, 0, 2)
    assert first.batch_at == first.at + FRAME_HEADER_SIZE
    batch = data[first.batch_at : first.batch_at + first.batch_size_bytes]
    assert decode_batch(batch).values.to_list() == [b"a", b"bb"]


def test_an_empty_file_has_no_frames() -> None:
    assert list(scan_frames(wal_file())) == []
    assert list(scan_frames(b"")) == []


def test_every_kind_of_buffer(tmp_path: Path) -> None:
    data = bytearray(wal_file(*FRAMES))
    data[STARTS[1] + 10] ^= 1
    expected = list(scan_frames(bytes(data)))
    assert list(scan_frames(data)) == list(scan_frames(memoryview(data))) == expected
    path = tmp_path / "wal"
    path.write_bytes(data)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert list(scan_frames(mapped)) == expected
        mapped.close()  # nothing holds on to the mapping after the scan


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((b"short", 0, 1, 0, 1), "topic id is"),
        ((bytes(16), 0, 1, 0, 1), "topic id is"),
        ((TOPIC, -1, 1, 0, 1), "partition is -1"),
        ((TOPIC, 1 << 32, 1, 0, 1), "partition is 4294967296"),
        ((TOPIC, 0, 0, 0, 1), "epoch is 0"),
        ((TOPIC, 0, 1 << 63, 0, 1), "epoch is"),
        ((TOPIC, 0, 1, -1, 1), "base offset is -1"),
        ((TOPIC, 0, 1, INT64_MAX, 1), "base offset is"),
        ((TOPIC, 0, 1, 0, 0), "record count is 0"),
    ],
)
def test_encode_frame_header_refuses(arguments: tuple[bytes, int, int, int, int], says: str) -> None:
    batch = encode_batch(Records.from_lists([b"a"]))
    with pytest.raises(FormatError, match=says):
        encode_frame_header(*arguments, batch)
    with pytest.raises(FormatError, match="frame size is 66"):
        encode_frame_header(TOPIC, 0, 1, 0, 1, b"too short.")


def test_a_frame_above_the_limit_is_damage() -> None:
    items = list(scan_frames(wal_file(*FRAMES), limits=FormatLimits(batch_bytes_max=150)))
    assert good(items) == [0, 3]
    assert "must be 84 to 150" in damage(items)[0].reason


# ---- damage


def test_a_damaged_batch_names_what_is_lost_and_costs_only_itself() -> None:
    data = bytearray(wal_file(*FRAMES))
    data[STARTS[1] + FRAME_HEADER_SIZE + 90] ^= 4
    items = list(scan_frames(data))
    assert good(items) == [0, 3]
    (span,) = damage(items)
    assert (span.at, span.size_bytes) == (STARTS[1], len(FRAMES[1]))
    assert span.lost is not None
    assert (span.lost.partition, span.lost.base_offset, span.lost.record_count) == (2, 2, 1)
    assert "batch CRC" in span.reason


def test_every_bit_flip_costs_exactly_the_frame_it_hits() -> None:
    data = wal_file(*FRAMES)
    for at in range(STARTS[1], STARTS[2]):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            items = list(scan_frames(flipped))
            assert good(items) == [0, 3], (at, bit)
            assert [(span.at, span.size_bytes) for span in damage(items)] == [(STARTS[1], len(FRAMES[1]))]


def test_every_torn_tail_is_one_span_at_the_end() -> None:
    data = wal_file(*FRAMES)
    for size in range(STARTS[2] + 1, len(data)):
        items = list(scan_frames(data[:size]))
        assert good(items) == [0, 2]
        (span,) = damage(items)
        assert span is items[-1]
        assert (span.at, span.size_bytes) == (STARTS[2], size - STARTS[2])


def test_zeros_after_the_last_frame_are_one_span() -> None:
    items = list(scan_frames(wal_file(*FRAMES) + bytes(10_000)))
    assert good(items) == [0, 2, 3]
    assert [span.size_bytes for span in damage(items)] == [10_000]


def ahead_file(*frames: bytes, zeros: int) -> bytes:
    return encode_wal_file_header(WAL_ID, 9, 0, 4096) + b"".join(frames) + bytes(zeros)


@pytest.mark.parametrize("zeros", [1, 60, 4096])
def test_zeros_ahead_of_the_last_frame_are_no_damage(zeros: int) -> None:
    ends_in_zeros = frame(6, [b"e" + bytes(100)])
    for pieces in (FRAMES, [*FRAMES, ends_in_zeros], []):
        data = ahead_file(*pieces, zeros=zeros)
        items = list(scan_frames(data))
        assert items.pop() == SpaceAhead(len(data) - zeros, zeros)
        assert [item.size_bytes for item in items] == [len(piece) for piece in pieces]
        assert damage(items) == []


def test_more_zeros_than_the_header_allows_are_damage_as_far_as_they_go() -> None:
    data = ahead_file(*FRAMES, zeros=5000)
    end = len(data) - 5000
    *frames, span, ahead = scan_frames(data)
    assert good(frames) == [0, 2, 3]
    assert (span.at, span.size_bytes, ahead) == (end, 5000 - 4096, SpaceAhead(end + 5000 - 4096, 4096))


@pytest.mark.parametrize("last", [[b"c" * 100], [b"c" * 50 + bytes(50)]])
def test_a_damaged_frame_before_the_space_ahead_costs_only_itself(last: list[bytes]) -> None:
    piece = frame(2, last)
    data = bytearray(ahead_file(FRAMES[0], piece, zeros=700))
    data[STARTS[1] + FRAME_HEADER_SIZE + 90] ^= 4
    items = list(scan_frames(data))
    assert items.pop() == SpaceAhead(len(data) - 700, 700)
    (span,) = damage(items)
    assert span.lost is not None
    assert (span.at, span.size_bytes) == (STARTS[1], len(piece))


def test_a_frame_says_whether_it_continues_a_group() -> None:
    batch = stamp_batch(encode_batch(Records.from_lists([b"a"])), 0, 3)
    first = encode_frame_header(TOPIC, 2, 3, 0, 1, batch) + batch
    second = encode_frame_header(TOPIC, 2, 3, 0, 1, batch, continues=True) + batch
    items = list(scan_frames(ahead_file(first, second, zeros=0)))
    assert [(item.continues, item.size_bytes) for item in items] == [(False, len(first)), (True, len(second))]  # type: ignore[union-attr]
    flipped = bytearray(second)
    flipped[15] ^= 0x80
    assert good(list(scan_frames(ahead_file(first, bytes(flipped), zeros=0)))) == [0], "the header's CRC covers it"


def test_damage_in_the_middle_and_a_torn_tail_stay_apart() -> None:
    data = bytearray(wal_file(*FRAMES)[:-5])
    data[STARTS[1] + 5] ^= 1
    items = list(scan_frames(data))
    assert good(items) == [0]
    assert [span.at for span in damage(items)] == [STARTS[1], STARTS[2]]
    assert damage(items)[0].lost is None
    assert damage(items)[1].lost is not None


def test_frames_written_after_a_torn_one_are_found() -> None:
    items = list(scan_frames(wal_file(FRAMES[0], FRAMES[1][:70], FRAMES[2])))
    assert good(items) == [0, 3]


def test_bytes_between_frames_are_skipped() -> None:
    data = wal_file(FRAMES[0], b"noise" + FRAME_MAGIC + b"noise", FRAMES[2])
    items = list(scan_frames(data))
    assert_covers(data, items)
    assert good(items) == [0, 3]


def test_a_frame_stored_in_a_record_is_not_taken_for_one_when_its_batch_is_damaged() -> None:
    outer = frame(2, [b"x" * 50, FRAMES[2], b"y" * 50])
    data = bytearray(wal_file(FRAMES[0], outer, frame(5, [b"z"])))
    assert good(list(scan_frames(data))) == [0, 2, 5]
    data[STARTS[1] + FRAME_HEADER_SIZE + 130] ^= 1
    assert good(list(scan_frames(data))) == [0, 5]


chunks = st.one_of(
    st.sampled_from(FRAMES),
    st.binary(max_size=30),
    st.just(FRAME_MAGIC),
    st.sampled_from([piece[:cut] for piece in FRAMES for cut in (3, 20, 56, 100)]),
    st.sampled_from([piece[cut:] for piece in FRAMES for cut in (1, 56)]),
)


@settings(max_examples=200)
@given(st.lists(chunks, max_size=8), st.integers(0, 400), st.integers(0, 255))
def test_any_mixture_is_covered_without_gap_and_whole_frames_are_whole(
    pieces: list[bytes], where: int, value: int
) -> None:
    data = bytearray(wal_file(*pieces))
    if where and len(data) > WAL_FILE_HEADER_SIZE:
        data[WAL_FILE_HEADER_SIZE + where % (len(data) - WAL_FILE_HEADER_SIZE)] = value
    items = list(scan_frames(bytes(data)))
    assert_covers(bytes(data), items)
    for item in items:
        if isinstance(item, WalFrame):
            assert bytes(data[item.at : item.at + item.size_bytes]) in FRAMES


def test_whole_frames_between_garbage_are_all_found() -> None:
    rng = random.Random(7)
    pieces = []
    for at in range(60):
        pieces += [frame(at, [b"v%d" % at]), rng.randbytes(rng.randrange(80))]
    assert good(list(scan_frames(wal_file(*pieces)))) == list(range(60))


@pytest.mark.long
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_scanning_garbage_takes_linear_time(kind: type) -> None:
    """The worst cases: magics without end, headers that are intact but whose batches are not there."""
    header = FRAMES[0][:FRAME_HEADER_SIZE]
    batch = bytes(8 << 20)
    wide = encode_frame_header(TOPIC, 2, 3, 0, 1, batch)
    for garbage in (FRAME_MAGIC * 200_000, header * 20_000, wide * 40_000, bytes(16 << 20)):
        started = time.process_time()
        items = list(scan_frames(kind(wal_file(garbage))))
        assert good(items) == []
        assert time.process_time() - started < 10


@pytest.mark.long
def test_forged_overlapping_frames_cost_linear_time_and_hide_nothing_that_is_whole() -> None:
    """75,000 intact headers, each claiming a megabyte of what follows: 75 GB of checksums if all were believed."""
    forged = encode_frame_header(TOPIC, 2, 3, 0, 1, bytes((1 << 20) + 1)) * 75_000
    data = wal_file(FRAMES[0], b"damage", forged, FRAMES[1], FRAMES[2])
    started = time.process_time()
    items = list(scan_frames(data))
    assert time.process_time() - started < 20
    assert_covers(data, items)
    assert good(items) == [0, 2, 3]
    assert any("not checked" in span.reason for span in damage(items))


@pytest.mark.parametrize(
    ("form", "at", "value"),
    [("<16s", 16, bytes(16)), ("<I", 36, 0), ("<Q", 40, 0), ("<Q", 40, 1 << 63), ("<q", 48, -1), ("<q", 48, INT64_MAX)],
)
def test_frame_fields_out_of_range_are_damage_even_with_a_right_crc(form: str, at: int, value: int | bytes) -> None:
    changed = bytearray(FRAMES[1])
    struct.pack_into(form, changed, at, value)
    struct.pack_into("<I", changed, 4, zlib.crc32(changed[8:56]))
    items = list(scan_frames(wal_file(FRAMES[0], bytes(changed), FRAMES[2])))
    assert good(items) == [0, 3]
    assert "frame fields" in damage(items)[0].reason
