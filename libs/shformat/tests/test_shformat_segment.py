"""Segments: what goes in as batches comes out by byte ranges; everything else is a FormatError."""

import dataclasses
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shformat import (
    SEGMENT_FOOTER_SIZE,
    SEGMENT_HEADER_SIZE,
    SEGMENT_MAGIC,
    BuiltSegment,
    Codec,
    FormatError,
    FormatLimits,
    ProducerStamp,
    Records,
    SegmentBuilder,
    SegmentHeader,
    SegmentIndex,
    decode_batch,
    decode_footer,
    decode_index,
    decode_segment_header,
    encode_batch,
    last_segment_size,
    open_segment,
    read_batch_header,
    read_block,
    run_plan,
    run_plan_async,
    stamp_batch,
)
from shformat.segment_builder import COPY_BYTES_MIN

pytestmark = pytest.mark.quick

INT64_MAX = (1 << 63) - 1
TOPIC = bytes(range(1, 17))


def batch(base_offset: int, count: int, epoch: int = 3, size: int = 20, codec: Codec = Codec.LZ4) -> bytes:
    offsets = range(base_offset, base_offset + count)
    records = Records.from_lists([b"%d " % o * (size // 4) for o in offsets], timestamps_ms=[1000 + o for o in offsets])
    return stamp_batch(encode_batch(records, codec=codec), base_offset, epoch)


def build(batches: list[bytes], epoch: int = 9, **options: object) -> BuiltSegment:
    builder = SegmentBuilder(TOPIC, 4, epoch, **options)  # type: ignore[arg-type]
    for one in batches:
        builder.add(one)
    return builder.finish()


def test_segments_back_to_back_are_found_from_the_end() -> None:
    one, two = joined(build([batch(0, 10)])), joined(build([batch(10, 2000), batch(2010, 2000)]))
    assert last_segment_size(one + two, len(one) + len(two)) == len(two)
    assert last_segment_size((one + two)[-40:], len(one) + len(two)) == len(two), "the footer is enough"
    assert last_segment_size(one, len(one)) == len(one)


@pytest.mark.parametrize(
    ("tail", "size_bytes", "what"),
    [
        (b"short", 100, "5 of 32 bytes"),
        (bytes(32), 1000, "footer"),
        (b"\xff" * 32, 1000, "footer of a segment of"),
    ],
)
def test_what_is_no_footer_is_refused(tail: bytes, size_bytes: int, what: str) -> None:
    with pytest.raises(FormatError, match=what):
        last_segment_size(tail, size_bytes)


def test_a_footer_of_more_than_the_object_is_refused() -> None:
    one = joined(build([batch(0, 10)]))
    with pytest.raises(FormatError, match="must be"):
        last_segment_size(one, len(one) - 1)


def joined(built: BuiltSegment) -> bytes:
    data = b"".join(built.parts)
    assert len(data) == built.info.size_bytes
    return data


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda at, size_bytes: data[at : at + size_bytes]


def opened(data: bytes, limits: FormatLimits | None = None) -> tuple[SegmentHeader, SegmentIndex]:
    return run_plan(open_segment(len(data), limits or FormatLimits()), reader(data))


def all_records(data: bytes) -> Records:
    _, index = opened(data)
    return Records.concat([decode_batch(run_plan(read_block(entry), reader(data))) for entry in index])


# ---- building and reading back


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3), st.integers(0, 1), st.sampled_from(Codec)), min_size=1),
    st.sampled_from([1, 500, 5000]),
    st.sampled_from(Codec),
)
def test_round_trip(shape: list[tuple[int, int, int, Codec]], target: int, codec: Codec) -> None:
    batches, expected, offset, epoch = [], [], 0, 1
    for count, gap, step, kind in shape:
        offset, epoch = offset + gap, epoch + step
        batches.append(batch(offset, count, epoch, codec=kind))
        expected += range(offset, offset + count)
        offset += count
    built = build(batches, epoch + 1, block_bytes_target=target, codec=codec)
    data = joined(built)
    records = all_records(data)
    assert records.offsets.tolist() == expected
    assert records.values.to_list() == [b"%d " % o * 5 for o in expected]
    assert records.timestamps_ms.tolist() == [1000 + o for o in expected]
    header, index = opened(data)
    info = built.info
    assert (info.topic_id, info.partition, info.epoch) == (TOPIC, 4, epoch + 1)
    assert (info.base_offset, info.end_offset, info.record_count) == (expected[0], offset, len(expected))
    assert (info.first_timestamp_ms, info.max_timestamp_ms) == (1000 + expected[0], 1000 + expected[-1])
    assert (info.block_count, info.raw_bytes) == (len(index), index.raw_bytes)
    assert header == SegmentHeader(
        topic_id=TOPIC,
        partition=4,
        codec=codec,
        epoch=info.epoch,
        base_offset=info.base_offset,
        end_offset=info.end_offset,
        record_count=info.record_count,
    )
    epochs = [entry.epoch for entry in index]
    assert epochs == sorted(epochs)


def test_small_batches_become_blocks_of_the_target_size() -> None:
    built = build([batch(at * 10, 10) for at in range(100)], block_bytes_target=5000)
    _, index = opened(joined(built))
    assert [entry.uncompressed_bytes <= 5000 for entry in index] == [True] * len(index)
    assert len(index) == -(-1000 // (index[0].record_count))
    assert all(read_batch_header(part).producer is None for part in built.parts[1:-2])


def test_a_large_batch_is_copied_as_it_is() -> None:
    stamp = ProducerStamp(1, 2, 3)
    large = stamp_batch(encode_batch(Records.from_lists([b"large " * 500] * 20), producer=stamp), 5, 3)
    built = build([batch(0, 5), large, batch(25, 5)], block_bytes_target=10_000)
    assert built.parts[2] == large
    assert built.info.block_count == 3


def test_a_large_batch_without_compression_is_compressed() -> None:
    stamp = ProducerStamp(1, 2, 3)
    records = Records.from_lists([b"large " * 500] * 20)
    large = stamp_batch(encode_batch(records, producer=stamp, codec=Codec.NONE), 5, 3)
    built = build([large], block_bytes_target=10_000)
    header = read_batch_header(built.parts[1])
    assert (header.codec, header.producer, header.base_offset, header.epoch) == (Codec.LZ4, stamp, 5, 3)
    assert len(built.parts[1]) < len(large) // 10
    assert build([large], block_bytes_target=10_000, codec=Codec.NONE).parts[1] == large


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.GZIP])
def test_a_large_batch_keeps_the_codec_of_its_producer_and_small_ones_are_merged_as_lz4(codec: Codec) -> None:
    large = stamp_batch(
        encode_batch(Records.from_lists([b"large %d" % at for at in range(2_000)]), codec=codec), 100, 3
    )
    built = build([batch(0, 50, codec=codec), batch(50, 50, codec=codec), large], block_bytes_target=10_000)
    assert built.parts[2] == large
    assert [read_batch_header(block).codec for block in built.parts[1:3]] == [Codec.LZ4, codec]
    assert len(all_records(joined(built))) == 2_100


def test_batches_from_the_copy_threshold_on_are_copied_as_they_are() -> None:
    """With the default block size. A merged block carries no producer stamp, a copied one its own."""
    stamp, value = ProducerStamp(1, 2, 3), bytes(COPY_BYTES_MIN)
    large = stamp_batch(encode_batch(Records.from_lists([value]), producer=stamp), 0, 3)
    small = stamp_batch(encode_batch(Records.from_lists([value[: COPY_BYTES_MIN - 100]]), producer=stamp), 1, 3)
    built = build([large, small])
    assert built.parts[1] == large
    assert read_batch_header(built.parts[2]).producer is None


def test_epochs_never_share_a_block() -> None:
    built = build([batch(0, 5, 1), batch(5, 5, 1), batch(10, 5, 2), batch(100, 5, 2)])
    _, index = opened(joined(built))
    assert [(entry.epoch, entry.first_offset, entry.end_offset) for entry in index] == [(1, 0, 10), (2, 10, 105)]


def test_the_callers_buffer_may_be_reused() -> None:
    builder = SegmentBuilder(TOPIC, 4, 3)
    buffer = bytearray(batch(0, 5, codec=Codec.NONE))
    builder.add(buffer)
    buffer[:] = bytes(len(buffer))
    assert all_records(joined(builder.finish())).values.to_list() == [b"%d " % o * 5 for o in range(5)]


def test_offsets_up_to_the_end_of_int64() -> None:
    last = INT64_MAX - 1
    data = joined(build([batch(0, 1), stamp_batch(encode_batch(Records.from_lists([b"last"])), last, 3)]))
    assert all_records(data).offsets.tolist() == [0, last]
    assert opened(data)[0].end_offset == INT64_MAX


def test_size_so_far_bounds_the_finished_size() -> None:
    builder = SegmentBuilder(TOPIC, 4, 3, block_bytes_target=3000)
    assert builder.end_offset == 0
    for at in range(50):
        builder.add(batch(at * 10, 10))
    assert builder.end_offset == 500
    so_far = builder.size_bytes
    assert so_far >= builder.finish().info.size_bytes > so_far // 20


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (batch(10, 5), batch(14, 5), "starts at offset 14, segment ends at 15"),
        (batch(10, 5), batch(0, 5), "starts at offset 0"),
        (batch(0, 5, 4), batch(5, 5, 3), "epoch is 3, must be 4 to 9"),
        (batch(0, 5, 4), batch(5, 5, 10), "epoch is 10, must be 4 to 9"),
        (batch(0, 5), encode_batch(Records.from_lists([b"a"]), base_offset=5), "epoch is 0"),
        (batch(0, 5), batch(5, 5)[:-1], "are there"),
        (batch(0, 5), batch(5, 5) + b"x", "1 bytes after the batch"),
        (batch(0, 5), batch(5, 5)[:90] + b"\xee" + batch(5, 5)[91:], "batch CRC"),
    ],
)
def test_add_refuses_and_takes_nothing(first: bytes, second: bytes, says: str) -> None:
    builder = SegmentBuilder(TOPIC, 4, 9)
    builder.add(first)
    with pytest.raises(FormatError, match=says):
        builder.add(second)
    alone = build([first])
    assert joined(builder.finish()) == joined(alone)


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((b"short", 0, 1), {}, "topic id"),
        ((bytes(16), 0, 1), {}, "topic id"),
        ((TOPIC, -1, 1), {}, "partition is -1"),
        ((TOPIC, 1 << 32, 1), {}, "partition is 4294967296"),
        ((TOPIC, 0, 0), {}, "epoch is 0"),
        ((TOPIC, 0, 1), {"block_bytes_target": 0}, "block_bytes_target is 0"),
        ((TOPIC, 0, 1), {"block_bytes_target": 5 << 20}, "must be 1 to 4000000"),
    ],
)
def test_builder_refuses(arguments: tuple[bytes, int, int], options: dict[str, int], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        SegmentBuilder(*arguments, **options)


def test_builder_limits() -> None:
    with pytest.raises(FormatError, match="no batches"):
        SegmentBuilder(TOPIC, 0, 1).finish()
    with pytest.raises(FormatError, match="segment_bytes_max is 500"):
        build([batch(0, 30)], limits=FormatLimits(segment_bytes_max=500))
    with pytest.raises(FormatError, match="index_entries_max"):
        build([batch(at, 1) for at in range(9)], block_bytes_target=1, limits=FormatLimits(index_entries_max=5))
    limits = FormatLimits(record_count_max=40)
    built = build([batch(at * 15, 15) for at in range(6)], limits=limits)
    assert [entry.record_count for entry in opened(joined(built))[1]] == [30, 30, 30]


def test_merged_headers_stay_within_the_limit_of_a_batch() -> None:
    limits = FormatLimits(header_count_max=60)
    with pytest.raises(FormatError, match="block_bytes_target is 121, must be 1 to 120"):
        SegmentBuilder(TOPIC, 0, 1, block_bytes_target=121, limits=limits)
    records = Records.from_lists([b""], headers=[[("", None)] * 3])
    built = build(
        [stamp_batch(encode_batch(records), at, 3) for at in range(30)], block_bytes_target=120, limits=limits
    )
    assert all_records(joined(built)).headers.to_list() == [[("", None)] * 3] * 30  # type: ignore[union-attr]


def test_a_malformed_batch_with_a_right_crc_is_never_built_into_a_segment() -> None:
    good = bytearray(batch(0, 5, codec=Codec.NONE))
    good[84 + 28 + 4] += 1  # the first value length
    struct.pack_into("<I", good, 16, zlib.crc32(good[20:]))
    builder = SegmentBuilder(TOPIC, 4, 3)
    builder.add(good)
    builder.add(batch(5, 5))
    for _ in range(2):
        with pytest.raises(FormatError, match="lengths add up to"):
            builder.finish()


# ---- the reader


def test_opening_takes_two_reads_and_a_block_one() -> None:
    data = joined(build([batch(at * 100, 100, size=2000, codec=Codec.NONE) for at in range(20)], codec=Codec.NONE))
    asked = []

    def read(at: int, size_bytes: int) -> bytes:
        asked.append((at, size_bytes))
        return data[at : at + size_bytes]

    _, index = run_plan(open_segment(len(data)), read)
    assert asked == [(len(data) - 32768, 32768), (0, 64)]
    run_plan(read_block(index[1]), read)
    assert asked[2:] == [(index[1].at, index[1].size_bytes)]


def test_a_small_segment_is_opened_in_one_read_and_a_long_index_in_three() -> None:
    for count, reads in ((5, 1), (600, 3)):
        data = joined(build([batch(at, 1) for at in range(count)], block_bytes_target=1))
        asked = []

        def read(at: int, size_bytes: int, data: bytes = data, asked: list[int] = asked) -> bytes:
            asked.append(at)
            return data[at : at + size_bytes]

        _, index = run_plan(open_segment(len(data)), read)
        assert (len(index), len(asked)) == (count, reads)


async def test_the_same_plan_runs_asynchronously() -> None:
    data = joined(build([batch(0, 5)]))

    async def read(at: int, size_bytes: int) -> bytes:
        return data[at : at + size_bytes]

    _, index = await run_plan_async(open_segment(len(data)), read)
    block = await run_plan_async(read_block(index[0]), read)
    assert decode_batch(block).offsets.tolist() == [0, 1, 2, 3, 4]


async def test_errors_of_the_read_pass_through() -> None:
    def failing(at: int, size_bytes: int) -> bytes:
        raise OSError(f"no bytes at {at}")

    async def failing_async(at: int, size_bytes: int) -> bytes:
        raise OSError(f"no bytes at {at}")

    with pytest.raises(OSError, match="no bytes"):
        run_plan(open_segment(1000), failing)
    with pytest.raises(OSError, match="no bytes"):
        await run_plan_async(open_segment(1000), failing_async)


def test_a_short_read_says_so() -> None:
    data = joined(build([batch(0, 5)]))
    with pytest.raises(FormatError, match=f"asked for {len(data)} bytes, got {len(data) - 1}"):
        run_plan(open_segment(len(data)), lambda at, size_bytes: data[at : at + size_bytes - 1])


def test_index_lookup() -> None:
    built = build(
        [batch(10, 10), batch(20, 10), batch(50, 10)], block_bytes_target=100
    )  # offsets [10, 20) [20, 30) [50, 60), timestamps 1000 + offset
    _, index = opened(joined(built))
    assert [index.find(offset) for offset in (0, 10, 19, 20, 29, 30, 49, 50, 59, 60, INT64_MAX)] == [
        *[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    ]
    assert [index.find_timestamp(ts) for ts in (-5, 1010, 1019, 1020, 1030, 1059, 1060)] == [0, 0, 0, 1, 2, 2, 3]
    assert [entry.first_offset for entry in index] == [index[at].first_offset for at in range(3)] == [10, 20, 50]
    assert (index.record_count, index.raw_bytes) == (30, built.info.raw_bytes)
    assert index.size_bytes > 3 * 64


def test_timestamps_that_go_back_are_found_by_the_first_block_that_reached_them() -> None:
    batches = []
    for at, stamp in enumerate([100, 500, 200, 600]):
        batches.append(stamp_batch(encode_batch(Records.from_lists([b"v"], timestamps_ms=stamp)), at, 1))
    _, index = opened(joined(build(batches, block_bytes_target=1)))
    assert [index.find_timestamp(ts) for ts in (100, 101, 200, 500, 501, 601)] == [0, 1, 1, 1, 3, 4]


# ---- damage


SAMPLE = joined(build([batch(at * 5, 5, 1 + at // 2) for at in range(4)], block_bytes_target=1))


def read_everything(data: bytes) -> list[int]:
    return all_records(data).offsets.tolist()


def test_every_bit_flip_and_truncation_is_caught() -> None:
    assert read_everything(SAMPLE) == list(range(20))
    for at in range(len(SAMPLE)):
        flipped = bytearray(SAMPLE)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(FormatError):
            read_everything(bytes(flipped))
        with pytest.raises(FormatError):
            read_everything(SAMPLE[:at])
    with pytest.raises(FormatError):
        read_everything(SAMPLE + b"\0")


def refit(data: bytearray, block_count: int) -> bytes:
    """All checksums made to fit, so that the checks behind them are reached."""
    footer_at = len(data) - SEGMENT_FOOTER_SIZE
    (index_at,) = struct.unpack_from("<Q", data, footer_at)
    index_at = min(index_at, footer_at)
    struct.pack_into("<I", data, footer_at + 16, zlib.crc32(data[footer_at - block_count * 64 : footer_at]))
    struct.pack_into("<I", data, footer_at + 24, zlib.crc32(data[footer_at : footer_at + 24]))
    struct.pack_into("<I", data, 60, zlib.crc32(data[:60]))
    return bytes(data)


INDEX_AT = len(SAMPLE) - SEGMENT_FOOTER_SIZE - 64 * 4
assert opened(SAMPLE)[1][0].at == SEGMENT_HEADER_SIZE and len(opened(SAMPLE)[1]) == 4


@pytest.mark.parametrize(
    ("form", "at", "value", "says"),
    [
        ("<4s", 0, b"STRX", "segment magic"),
        ("<H", 4, 2, "segment version is 2"),
        ("<B", 6, 0, "segment codec is 0"),
        ("<B", 7, 1, "segment flags"),
        ("<16s", 8, bytes(16), "topic id"),
        ("<Q", 28, 0, "epoch is 0"),
        ("<Q", 28, 1, "header says epoch 1, the last block has 2"),
        ("<q", 36, -1, "segment offsets"),
        ("<q", 36, 1, "record count is 20 over 19|base offset"),
        ("<q", 44, 0, "segment offsets"),
        ("<q", 44, 21, "says end offset 21, the index 20"),
        ("<Q", 52, 0, "record count is 0"),
        ("<Q", 52, 19, "says record count 19, the index 20"),
        ("<q", INDEX_AT, -1, "offsets of block 0"),
        ("<q", INDEX_AT + 8, 0, "offsets of block 0"),
        ("<q", INDEX_AT + 8, 6, "offset order of block 1"),
        ("<q", INDEX_AT + 64 + 8, INT64_MAX, "offset order of block 2"),
        ("<Q", INDEX_AT + 16, 65, "position of block 0"),
        ("<q", INDEX_AT + 24, 1 << 40, "timestamps of block 0"),
        ("<Q", INDEX_AT + 40, 0, "epoch of block 0"),
        ("<Q", INDEX_AT + 40, 1 << 63, "epoch of block 0"),
        ("<Q", INDEX_AT + 40, 2, "epoch order of block 1"),
        ("<I", INDEX_AT + 48, 84, "size of block 0"),
        ("<I", INDEX_AT + 48, 0xFFFFFFFF, "size of block 0"),
        ("<I", INDEX_AT + 48, 200, "position of block 1"),
        ("<I", INDEX_AT + 3 * 64 + 48, 200, "the index is at"),
        ("<I", INDEX_AT + 52, 0, "record count of block 0"),
        ("<I", INDEX_AT + 52, 6, "record count of block 0"),
        ("<I", INDEX_AT + 56, 0xFFFFFFFF, "uncompressed size of block 0"),
        ("<I", INDEX_AT + 56, 1, "block header and index entry differ"),
        ("<I", INDEX_AT + 60, 1, "block CRC"),
        ("<Q", len(SAMPLE) - 32, 0xFFFFFFFFFFFFFFFF, "does not end at the footer"),
        ("<Q", len(SAMPLE) - 32, 0, "does not end at the footer"),
        ("<I", len(SAMPLE) - 24, 64, "index of 64 bytes for 4 blocks"),
        ("<I", len(SAMPLE) - 20, 0, "segment has 0 blocks"),
        ("<I", len(SAMPLE) - 20, 0xFFFFFFFF, "segment has 4294967295 blocks"),
        ("<H", len(SAMPLE) - 12, 2, "footer version 2"),
        ("<H", len(SAMPLE) - 10, 1, "flags 0x0001"),
        ("<4s", len(SAMPLE) - 4, b"STRX", "segment ends in"),
    ],
)
def test_fields_that_do_not_agree(form: str, at: int, value: int | bytes, says: str) -> None:
    changed = bytearray(SAMPLE)
    struct.pack_into(form, changed, at, value)
    with pytest.raises(FormatError, match=says):
        read_everything(refit(changed, 4))


@settings(max_examples=300)
@given(st.integers(0, len(SAMPLE) - 1), st.binary(min_size=1, max_size=8))
def test_any_overwrite_with_fitting_checksums_is_records_or_a_format_error(at: int, value: bytes) -> None:
    changed = bytearray(SAMPLE)
    changed[at : at + len(value)] = value[: len(changed) - at]
    for data in (bytes(changed), refit(changed, 4)):
        try:
            offsets = read_everything(data)
        except FormatError:
            continue
        assert len(offsets) == opened(data)[0].record_count
        assert offsets == sorted(set(offsets))


@given(st.binary(max_size=400))
def test_any_bytes_at_all(data: bytes) -> None:
    with pytest.raises(FormatError):
        opened(data)
    for decode in (decode_segment_header, lambda given: decode_footer(given, len(given))):
        with pytest.raises(FormatError):
            decode(data)


def test_sizes_are_checked_against_limits_before_anything_is_read() -> None:
    for size in (0, 100, (1 << 30) + 1, 1 << 62):
        with pytest.raises(FormatError, match=f"segment of {size} bytes"):
            next(open_segment(size))
    with pytest.raises(FormatError, match="index_entries_max"):
        opened(SAMPLE, FormatLimits(index_entries_max=3))


def test_decode_index_wants_exactly_its_bytes() -> None:
    footer = decode_footer(SAMPLE, len(SAMPLE))
    index = SAMPLE[footer.index_at : footer.index_at + footer.index_size_bytes]
    assert len(decode_index(index, footer)) == 4
    with pytest.raises(FormatError, match="255 of 256 bytes"):
        decode_index(index[:-1], footer)


def test_a_block_of_another_segment_is_refused() -> None:
    _, index = opened(SAMPLE)
    other = batch(0, 5)
    first = index[0]
    moved = dataclasses.replace(
        first, size_bytes=len(other), record_count=5, uncompressed_bytes=1, crc=zlib.crc32(other)
    )
    with pytest.raises(FormatError, match="block header and index entry differ"):
        run_plan(read_block(moved), lambda at, size_bytes: other)


def test_magic_and_index_are_what_the_page_says() -> None:
    assert SAMPLE[:4] == SAMPLE[-4:] == SEGMENT_MAGIC == b"STRM"
    _, index = opened(SAMPLE)
    assert index.encode() == SAMPLE[INDEX_AT : INDEX_AT + 256]
    assert SegmentIndex.of(list(index)).encode() == index.encode()
    assert np.frombuffer(index.encode(), "<i8")[0] == 0
