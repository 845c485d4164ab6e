"""Record batches: round trips, what is refused, and arbitrary damage.

The promise: for any bytes the decoder returns records or raises FormatError, in bounded memory.
"""

import gzip
import pickle
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import lz4.block
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shformat import (
    BATCH_HEADER_SIZE,
    DEFAULT_LIMITS,
    TIMESTAMP_MS_MAX,
    TIMESTAMP_MS_MIN,
    BatchHeader,
    BytesColumn,
    Codec,
    FormatError,
    FormatLimits,
    HeaderColumns,
    HeadersColumn,
    ProducerStamp,
    Records,
    ValueOutOfRange,
    check_batch,
    decode_batch,
    decode_batches,
    encode_batch,
    read_batch_header,
    read_batch_headers,
    split_batches,
    stamp_batch,
    validate_batch,
    validate_new_batch,
)
from shformat.compression import COMPRESSION_RATIO_MAX

pytestmark = pytest.mark.quick

INT64_MAX = (1 << 63) - 1
INT64_MIN = -(1 << 63)

int64s = st.one_of(
    st.integers(-5, 5),
    st.integers(1_700_000_000_000, 1_700_000_100_000),
    st.integers(INT64_MIN, INT64_MAX),
    st.sampled_from([INT64_MIN, INT64_MAX, 0, -1]),
)
cells = st.one_of(st.none(), st.just(b""), st.binary(max_size=6), st.binary(min_size=120, max_size=200))
header_lists = st.lists(st.tuples(st.text(max_size=4), cells), max_size=3)


@st.composite
def records_strategy(draw: st.DrawFn, max_size: int = 12) -> Records:
    count = draw(st.integers(1, max_size))
    exactly = {"min_size": count, "max_size": count}
    offsets = None
    if draw(st.booleans()):
        top = draw(st.sampled_from([60, 1 << 40, INT64_MAX - 1]))
        offsets = sorted(draw(st.sets(st.integers(max(0, top - draw(st.sampled_from([50, top]))), top), **exactly)))
    return Records.from_lists(
        draw(st.lists(cells, **exactly)),
        keys=draw(st.one_of(st.none(), st.lists(cells, **exactly))),
        timestamps_ms=draw(st.lists(int64s, **exactly)),
        headers=draw(st.one_of(st.none(), st.lists(header_lists, **exactly))),
        offsets=offsets,
    )


def header_rows(records: Records) -> list[list[tuple[str, bytes | None]]]:
    return [[] for _ in range(len(records))] if records.headers is None else records.headers.to_list()


def assert_same(found: Records, expected: Records, offsets: list[int]) -> None:
    assert found.offsets.tolist() == offsets
    assert found.timestamps_ms.tolist() == expected.timestamps_ms.tolist()
    assert found.keys.to_list() == expected.keys.to_list()
    assert found.values.to_list() == expected.values.to_list()
    assert header_rows(found) == header_rows(expected)


# ---- hand-made batches


def with_crc(batch: bytes | bytearray) -> bytes:
    """The batch with a CRC that fits whatever it now says, so that the checks behind it are reached."""
    fixed = bytearray(batch)
    if len(fixed) >= BATCH_HEADER_SIZE:
        struct.pack_into("<I", fixed, 16, zlib.crc32(memoryview(fixed)[20:]))
    return bytes(fixed)


def patched(batch: bytes, form: str, at: int, value: int | bytes) -> bytes:
    changed = bytearray(batch)
    struct.pack_into(form, changed, at, value)
    return with_crc(changed)


def sample(codec: Codec = Codec.NONE) -> bytes:
    records = Records.from_lists(
        [b"value one", None, b"", b"value four" * 20],
        keys=[b"k1", None, b"", b"key4"],
        timestamps_ms=[1_700_000_000_000, 1_700_000_000_005, -3, INT64_MAX],
        headers=[[("trace", b"1"), ("né", None)], [], [("", b"")], []],
        offsets=[10, 11, 300, 70_000],
    )
    return encode_batch(records, codec=codec, epoch=3, producer=ProducerStamp(5, 6, 7))


def stored_as(payload: bytes, codec: Codec) -> bytes:
    """The payload as another program would compress it."""
    match codec:
        case Codec.NONE:
            return payload
        case Codec.LZ4:
            return bytes(lz4.block.compress(payload, store_size=False))
        case Codec.ZSTD:
            return zstandard.ZstdCompressor(level=19).compress(payload)
        case Codec.GZIP:
            return gzip.compress(payload, 9)


def around(batch: bytes, stored: bytes, codec: Codec, declared: int) -> bytes:
    """The header of `batch` around these stored bytes, which it says are `declared` bytes uncompressed."""
    whole = bytearray(batch[:BATCH_HEADER_SIZE] + stored)
    whole[25] = codec
    struct.pack_into("<II", whole, 28, len(whole), declared)
    return with_crc(whole)


def wrapped(batch: bytes, payload: bytes, codec: Codec) -> bytes:
    """The header of `batch` around another payload, sizes and CRC made to fit."""
    stored = stored_as(payload, codec)
    whole = bytearray(batch[:BATCH_HEADER_SIZE] + stored)
    whole[25] = codec
    struct.pack_into("<II", whole, 28, len(whole), len(payload))
    return with_crc(whole)


# ---- round trips


@given(records_strategy(), st.sampled_from(Codec), st.integers(0, INT64_MAX - 100), st.integers(0, INT64_MAX))
def test_round_trip(records: Records, codec: Codec, base_offset: int, epoch: int) -> None:
    gaps = int(records.offsets[-1]) - int(records.offsets[0]) != len(records) - 1
    base = int(records.offsets[0]) if gaps else base_offset
    batch = encode_batch(records, base_offset=base, epoch=epoch, codec=codec)
    offsets = records.offsets.tolist() if gaps else list(range(base, base + len(records)))
    assert_same(decode_batch(batch), records, offsets)
    header = validate_batch(batch)
    assert header == read_batch_header(batch) == check_batch(batch)
    assert (header.base_offset, header.epoch) == (base, epoch)
    assert header.record_count == len(records)
    assert header.end_offset == offsets[-1] + 1
    assert header.contiguous is not gaps
    assert header.size_bytes == len(batch)
    assert header.first_timestamp_ms == records.timestamps_ms[0]
    assert header.max_timestamp_ms == records.timestamps_ms.max()
    assert header.producer is None
    # Encoding is a function of the records: what was decoded encodes to the same bytes.
    assert encode_batch(decode_batch(batch), base_offset=base, epoch=epoch, codec=codec) == batch


@given(records_strategy(max_size=4), st.integers(1, INT64_MAX), st.integers(0, 2**32 - 1), st.integers(0, INT64_MAX))
def test_producer_stamp_survives(records: Records, producer_id: int, epoch: int, sequence: int) -> None:
    stamp = ProducerStamp(producer_id, epoch, sequence)
    assert validate_batch(encode_batch(records, producer=stamp)).producer == stamp


def test_null_empty_and_present_stay_apart() -> None:
    records = Records.from_lists(
        [None, b"", b"v"], keys=[b"", None, b"k"], headers=[[("a", None), ("a", b"")], [], [("", b"x")]]
    )
    decoded = decode_batch(encode_batch(records))
    assert decoded.values.to_list() == [None, b"", b"v"]
    assert decoded.keys.to_list() == [b"", None, b"k"]
    assert header_rows(decoded) == [[("a", None), ("a", b"")], [], [("", b"x")]]


def test_all_empty_keys_are_not_null_keys() -> None:
    decoded = decode_batch(encode_batch(Records.from_lists([b"a", b"b"], keys=[b"", b""])))
    assert decoded.keys.to_list() == [b"", b""]


def test_timestamps_whose_difference_exceeds_int64() -> None:
    stamps = [INT64_MIN, INT64_MAX, -1, INT64_MIN, 0, INT64_MAX]
    decoded = decode_batch(encode_batch(Records.from_lists([b""] * 6, timestamps_ms=stamps)))
    assert decoded.timestamps_ms.tolist() == stamps


@pytest.mark.parametrize(
    ("timestamps_ms", "bad"),
    [
        ([0, -(2**63)], -(2**63)),
        ([TIMESTAMP_MS_MIN - 1, 0], TIMESTAMP_MS_MIN - 1),
        ([5, TIMESTAMP_MS_MAX + 1, 5], TIMESTAMP_MS_MAX + 1),
        ([TIMESTAMP_MS_MIN, TIMESTAMP_MS_MAX], None),
    ],
)
def test_a_new_batch_has_timestamps_that_are_dates_and_an_old_one_may_have_others(
    timestamps_ms: list[int], bad: int | None
) -> None:
    batch = encode_batch(Records.from_lists([b"v"] * len(timestamps_ms), timestamps_ms=timestamps_ms))
    assert decode_batch(batch).timestamps_ms.tolist() == timestamps_ms
    assert validate_batch(batch).record_count == len(timestamps_ms)
    if bad is None:
        assert validate_new_batch(batch) == validate_batch(batch)
        return
    with pytest.raises(ValueOutOfRange, match=f"timestamp_ms is {bad}, must be {TIMESTAMP_MS_MIN} to") as caught:
        validate_new_batch(batch)
    copied = pickle.loads(pickle.dumps(caught.value))  # from a pool of processes
    assert (copied.field, copied.value, copied.most) == ("timestamp_ms", bad, TIMESTAMP_MS_MAX)


@pytest.mark.parametrize(("first", "fits"), [(2**63 - 3, True), (2**63 - 2, False), (2**63 - 1, False)])
def test_the_sequence_numbers_of_a_new_batch_end_within_int64(first: int, fits: bool) -> None:
    batch = encode_batch(Records.from_lists([b"a", b"b"]), producer=ProducerStamp(7, 0, first))
    assert validate_batch(batch).producer == ProducerStamp(7, 0, first)
    if fits:
        assert validate_new_batch(batch) == validate_batch(batch)
    else:
        with pytest.raises(ValueOutOfRange, match=f"base_sequence is {first}, must be 0 to {2**63 - 3} .at byte 72"):
            validate_new_batch(batch)


def test_the_highest_offset_and_the_widest_gap() -> None:
    records = Records.from_lists([b"a", b"b"], offsets=[0, INT64_MAX - 1])
    batch = encode_batch(records)
    assert decode_batch(batch).offsets.tolist() == [0, INT64_MAX - 1]
    assert read_batch_header(batch).end_offset == INT64_MAX
    last = encode_batch(Records.from_lists([b"a"]), base_offset=INT64_MAX - 1)
    assert decode_batch(last).offsets.tolist() == [INT64_MAX - 1]


def test_contiguous_offsets_cost_nothing_and_gaps_about_a_byte() -> None:
    contiguous = encode_batch(Records.from_lists([b"v"] * 100), codec=Codec.NONE)
    gapped = encode_batch(Records.from_lists([b"v"] * 100, offsets=range(0, 200, 2)), codec=Codec.NONE)
    assert len(gapped) - len(contiguous) == 99


def test_what_lz4_cannot_shrink_is_stored() -> None:
    noise = np.random.default_rng(1).bytes(20_000)
    assert read_batch_header(encode_batch(Records.from_lists([noise]))).codec is Codec.NONE
    assert read_batch_header(encode_batch(Records.from_lists([b"a" * 500]))).codec is Codec.LZ4


def test_the_most_compressible_batch_is_not_taken_for_a_lie() -> None:
    records = Records.from_lists([bytes(10_000_000)])
    assert decode_batch(encode_batch(records)).values.to_list() == [bytes(10_000_000)]


def test_a_codec_given_as_its_number_counts_and_an_unknown_one_is_refused() -> None:
    records = Records.from_lists([b"a" * 500])
    assert read_batch_header(encode_batch(records, codec=2)).codec is Codec.LZ4  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5 is not a valid Codec"):
        encode_batch(records, codec=5)  # type: ignore[arg-type]


def test_columns_are_views_not_copies() -> None:
    records = Records.from_lists([b"value-%d" % i for i in range(100)], keys=[b"k"] * 100)
    batch = encode_batch(records, codec=Codec.NONE)
    decoded = decode_batch(batch)
    assert isinstance(decoded.values.data, memoryview)
    assert decoded.values.data.obj is batch
    compressed = decode_batch(encode_batch(records))
    assert isinstance(compressed.values.data, memoryview)
    assert isinstance(compressed.keys.data, memoryview)
    assert compressed.values.data.obj is compressed.keys.data.obj


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(kind: Callable[[bytes], bytes]) -> None:
    batch = kind(encode_batch(Records.from_lists([b"a" * 100])))
    assert decode_batch(batch).values.to_list() == [b"a" * 100]
    assert decode_batch(stamp_batch(batch, 7, 2)).offsets.tolist() == [7]


# ---- stamping and splitting


def test_stamp_changes_only_base_offset_and_epoch() -> None:
    batch = encode_batch(Records.from_lists([b"a", b"b"], offsets=[4, 9]), producer=ProducerStamp(1, 2, 3))
    stamped = stamp_batch(batch, 100, 7)
    assert stamped[16:] == batch[16:]
    header = validate_batch(stamped)
    assert (header.base_offset, header.end_offset, header.epoch) == (100, 106, 7)
    assert decode_batch(stamped).offsets.tolist() == [100, 105]


@pytest.mark.parametrize(
    ("base_offset", "epoch", "says"),
    [
        (INT64_MAX - 1, 1, "leave int64"),
        (-1, 1, "leave int64"),
        (0, 0, "epoch is 0"),
        (0, -1, "epoch is -1"),
        (0, 1 << 63, "epoch is 9223372036854775808"),
    ],
)
def test_stamp_refuses(base_offset: int, epoch: int, says: str) -> None:
    batch = encode_batch(Records.from_lists([b"a", b"b"]))
    with pytest.raises(FormatError, match=says):
        stamp_batch(batch, base_offset, epoch)


@given(st.lists(records_strategy(max_size=3), max_size=4))
def test_split_gives_each_batch(many: list[Records]) -> None:
    batches = [encode_batch(records) for records in many]
    assert [bytes(view) for view in split_batches(b"".join(batches))] == batches


def test_split_refuses_a_cut_batch() -> None:
    batch = encode_batch(Records.from_lists([b"a" * 50]))
    with pytest.raises(FormatError, match="are there") as caught:
        split_batches(batch + batch[:-1])
    assert caught.value.at == len(batch)
    with pytest.raises(FormatError, match="10 of 84 bytes"):
        split_batches(batch + batch[:10])


def test_header_at_a_position() -> None:
    first, second = encode_batch(Records.from_lists([b"a"])), encode_batch(Records.from_lists([b"b"]), base_offset=1)
    assert check_batch(first + second, len(first)).base_offset == 1
    for at in (-1, len(first) + len(second), len(first) + 1):
        with pytest.raises(FormatError):
            check_batch(first + second, at)


# ---- many at once


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(records_strategy(max_size=5), st.sampled_from(Codec)), min_size=1, max_size=6))
def test_many_batches_at_once_are_each_one_after_the_other(many: list[tuple[Records, Codec]]) -> None:
    batches = [encode_batch(records, codec=codec) for records, codec in many]
    expected = Records.concat([decode_batch(batch) for batch in batches])
    assert_same(decode_batches(batches), expected, expected.offsets.tolist())


def test_many_batches_of_contiguous_offsets() -> None:
    records = Records.from_lists([b"a", None, b"c"], keys=[None, b"", b"k"])
    bases = [0, 3, 1000, INT64_MAX - 3]
    decoded = decode_batches([encode_batch(records, base_offset=base) for base in bases])
    assert decoded.offsets.tolist() == [base + n for base in bases for n in range(3)]
    assert decoded.values.to_list() == [b"a", None, b"c"] * 4


def test_a_bad_batch_among_many_is_named() -> None:
    good, bad = sample(), bytearray(sample())
    bad[-1] ^= 1
    with pytest.raises(FormatError, match="batch 1 of 3: batch CRC") as caught:
        decode_batches([good, bad, good])
    assert caught.value.at == 16
    with pytest.raises(FormatError, match="batch 2 of 3: values: lengths add up"):
        decode_batches([good, good, raw_batch(b"\2\2", b"abc")])
    with pytest.raises(FormatError, match="no batches"):
        decode_batches([])


def raw_batch(lengths: bytes, data: bytes, deltas: bytes = b"\0") -> bytes:
    sections = [b"", deltas, b"", lengths, b"", b"", data]
    payload = struct.pack("<7I", *map(len, sections)) + b"".join(sections)
    return wrapped(encode_batch(Records.from_lists([b"", b""]), codec=Codec.NONE), payload, Codec.NONE)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (raw_batch(b"\2\2\1", b"ab"), raw_batch(b"\3", b"cd")),
        (raw_batch(b"\2\2", b"a"), raw_batch(b"\2\2", b"bcd")),
        (raw_batch(b"\1\1", b"", b"\0\0"), raw_batch(b"\1\1", b"", b"")),
        (raw_batch(b"\1\1", b"", b"\x80"), raw_batch(b"\1\1", b"", b"\0\0\0")),
    ],
)
def test_columns_that_only_fit_together_are_not_let_through(first: bytes, second: bytes) -> None:
    """What one batch has too much and the next too little must not even out."""
    with pytest.raises(FormatError, match="batch 0 of 2"):
        decode_batches([first, second])


# ---- refused when encoding


def column(sizes: list[int], data: bytes, valid: list[bool] | None = None) -> BytesColumn:
    return BytesColumn(data, np.cumsum(sizes), None if valid is None else np.array(valid))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"values": column([1], b"a")}, "columns of"),
        ({"keys": column([1], b"a")}, "columns of"),
        ({"timestamps_ms": np.zeros(3, np.int64)}, "columns of"),
        ({"headers": HeadersColumn.empty(1)}, "columns of"),
        ({"offsets": np.array([5, 5])}, "not ascending"),
        ({"offsets": np.array([5, 4])}, "not ascending"),
        ({"offsets": np.array([INT64_MAX, INT64_MIN])}, "not ascending"),
        ({"offsets": np.array([-1, 5])}, "leave int64"),
        ({"offsets": np.array([0, INT64_MAX])}, "leave int64"),
        ({"offsets": np.array([INT64_MIN, INT64_MAX])}, "leave int64"),
        ({"values": column([1, 1], b"abc")}, "ends do not cover"),
        ({"values": column([3, -1], b"ab")}, "ends do not cover"),
        ({"values": column([1, 1], b"ab", [True, False])}, "a null with a length"),
        ({"headers": HeadersColumn(np.array([1, 1]), column([1], b"\xff"), column([0], b""))}, "not UTF-8"),
        ({"headers": HeadersColumn(np.array([1, 2]), column([1, 1], "é".encode()), column([0, 0], b""))}, "inside a"),
        ({"headers": HeadersColumn(np.array([1, 1]), column([0], b"", [False]), column([0], b""))}, "name is null"),
        ({"headers": HeadersColumn(np.array([1, 3]), column([1], b"a"), column([0], b""))}, "do not belong"),
        ({"headers": HeadersColumn(np.array([2, 1]), column([1], b"a"), column([0], b""))}, "do not belong"),
        ({"headers": HeadersColumn(np.array([1, 2]), column([2, -1], b"a"), column([0, 0], b""))}, "name"),
        ({"headers": HeadersColumn(np.array([1, 1]), column([1], b"ab"), column([0], b""))}, "name"),
    ],
)
def test_encode_refuses_columns_that_do_not_belong_together(change: dict[str, object], says: str) -> None:
    records = Records.from_lists([b"a", b"b"])
    for name, value in change.items():
        setattr(records, name, value)
    with pytest.raises(FormatError, match=says):
        encode_batch(records)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"base_offset": -1}, "leave int64"),
        ({"base_offset": INT64_MAX - 1}, "leave int64"),
        ({"epoch": -1}, "epoch is -1"),
        ({"epoch": 1 << 63}, "epoch is 9223372036854775808"),
        ({"producer": ProducerStamp(-1, 0, 0)}, "producer id is -1"),
        ({"producer": ProducerStamp(1, 1 << 32, 0)}, "producer epoch is 4294967296"),
        ({"producer": ProducerStamp(1, 0, -1)}, "base sequence is -1"),
        ({"producer": ProducerStamp(0, 1, 0)}, "without a producer id"),
        ({"limits": FormatLimits(record_count_max=1)}, "record count is 2, must be 1 to 1"),
        ({"limits": FormatLimits(batch_bytes_max=100)}, "batch_bytes_max is 100"),
        ({"limits": FormatLimits(uncompressed_bytes_max=30)}, "uncompressed_bytes_max is 30"),
    ],
)
def test_encode_refuses_arguments(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        encode_batch(Records.from_lists([b"a", b"b"]), **arguments)  # type: ignore[arg-type]


def test_encode_refuses_an_empty_batch_and_a_contradicting_base_offset() -> None:
    with pytest.raises(FormatError, match="record count is 0"):
        encode_batch(Records.from_lists([]))
    with pytest.raises(FormatError, match="base_offset is 3, but the offsets have gaps and start at 4"):
        encode_batch(Records.from_lists([b"a", b"b"], offsets=[4, 9]), base_offset=3)


def test_header_limits_hold_in_both_directions() -> None:
    records = Records.from_lists([b"a", b"b"], headers=[[("h", b"1")] * 3, [("h", b"1")] * 2])
    batch = encode_batch(records)
    for limits, says in (
        (FormatLimits(headers_per_record_max=2), "3 headers, headers_per_record_max is 2"),
        (FormatLimits(header_count_max=4), "5 headers in a batch, header_count_max is 4"),
    ):
        with pytest.raises(FormatError, match=says):
            encode_batch(records, limits=limits)
        with pytest.raises(FormatError, match=says):
            decode_batch(batch, limits)


def test_limits_must_fit_the_fields_on_disk() -> None:
    with pytest.raises(ValueError, match="batch_bytes_max is 4294967296"):
        FormatLimits(batch_bytes_max=1 << 32)
    with pytest.raises(ValueError, match="record_count_max is 0"):
        FormatLimits(record_count_max=0)


# ---- refused when reading


@pytest.mark.parametrize(
    ("form", "at", "value", "says", "error_at"),
    [
        ("<4s", 20, b"SHRX", "batch magic is", 20),
        ("<B", 24, 0, "batch version is 0", 24),
        ("<B", 24, 2, "batch version is 2", 24),
        ("<B", 25, 0, "batch codec is 0", 25),
        ("<B", 25, 5, "batch codec is 5", 25),
        ("<H", 26, 8, "unknown bits", 26),
        ("<I", 28, 84, "batch size is 84", 28),
        ("<I", 28, 0xFFFFFFFF, "batch size is 4294967295", 28),
        ("<I", 32, 0, "stored in", 32),
        ("<I", 32, 0xFFFFFFFF, "uncompressed_bytes_max", 32),
        ("<I", 36, 0, "record count is 0", 36),
        ("<I", 36, 1_000_001, "record count is 1000001", 36),
        ("<I", 36, 500_000, "cannot fit", 36),
        ("<q", 40, -1, "last offset delta is -1", 40),
        ("<q", 40, 3, "last offset delta is 3 for 4 gapped", 40),
        ("<q", 40, INT64_MAX, "outside int64", 0),
        ("<q", 40, 69_991, "the header says 70001", None),
        ("<q", 56, 0, "max timestamp 0 is before the first", 56),
        ("<q", 56, INT64_MAX - 1, "latest timestamp is", 56),
        ("<q", 64, -1, "producer id is -1", 64),
        ("<q", 64, 0, "without a producer id", 64),
        ("<q", 72, -1, "base sequence is -1", 72),
        ("<q", 0, -1, "outside int64", 0),
        ("<q", 0, INT64_MAX, "outside int64", 0),
        ("<Q", 8, 1 << 63, "epoch is", 8),
    ],
)
def test_wrong_header_fields(form: str, at: int, value: int | bytes, says: str, error_at: int | None) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        validate_batch(patched(sample(), form, at, value))
    assert error_at is None or caught.value.at == error_at


def test_flags_that_contradict_the_payload() -> None:
    batch = sample()
    (flags,) = struct.unpack_from("<H", batch, 26)
    assert flags == 7
    for bit, says in ((2, "key lengths"), (4, "headers")):
        with pytest.raises(FormatError, match=f"{says}.*the flag says there are none"):
            validate_batch(patched(batch, "<H", 26, flags & ~bit))
    without = encode_batch(Records.from_lists([b"a" * 9, b"b"]), codec=Codec.NONE)
    for bit, says in ((2, "keys lengths: 2 varints"), (4, "headers: 0 bytes")):
        with pytest.raises(FormatError, match=says):
            validate_batch(patched(without, "<H", 26, bit))


def test_wrong_crc_and_wrong_length() -> None:
    batch = sample()
    flipped = bytearray(batch)
    flipped[-1] ^= 1
    with pytest.raises(FormatError, match="batch CRC is") as caught:
        validate_batch(flipped)
    assert caught.value.at == 16
    with pytest.raises(FormatError, match="1 bytes after the batch"):
        validate_batch(batch + b"x")
    with pytest.raises(FormatError, match="are there"):
        validate_batch(batch[:-1])
    assert check_batch(batch + b"x").size_bytes == len(batch)


@pytest.mark.parametrize("codec", Codec)
def test_every_single_bit_flip_behind_the_stamp_is_caught(codec: Codec) -> None:
    batch = sample(codec)
    assert read_batch_header(batch).codec is codec
    for at in range(16, len(batch)):
        for bit in range(8):
            flipped = bytearray(batch)
            flipped[at] ^= 1 << bit
            with pytest.raises(FormatError):
                decode_batch(flipped)


@pytest.mark.parametrize("codec", Codec)
def test_every_truncation_is_caught(codec: Codec) -> None:
    batch = sample(codec)
    for size in range(len(batch)):
        with pytest.raises(FormatError):
            decode_batch(batch[:size])


def assert_total(batch: bytes) -> None:
    """Records that are whole, or a FormatError; and validate_batch() and decode_batch() agree."""
    try:
        records = decode_batch(batch)
    except FormatError as error:
        assert 0 <= error.at <= len(batch)
        with pytest.raises(FormatError):
            validate_batch(batch)
        return
    header = validate_batch(batch)
    assert len(records) == header.record_count
    assert len(records.keys.to_list()) == len(records.values.to_list()) == len(records)
    assert len(header_rows(records)) == len(records)
    offsets = records.offsets.tolist()
    assert offsets == sorted(set(offsets)) and offsets[0] == header.base_offset
    assert offsets[-1] + 1 == header.end_offset
    assert records.timestamps_ms.max() == header.max_timestamp_ms


edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 1 << 16), st.integers(1, 255)),
        st.tuples(st.just("set"), st.integers(0, 1 << 16), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])),
        st.tuples(st.just("cut"), st.integers(0, 1 << 16), st.integers(1, 8)),
        st.tuples(st.just("insert"), st.integers(0, 1 << 16), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=4,
)


def edited(original: bytes, changes: list[tuple[str, int, int]], start: int = 0) -> bytes:
    data = bytearray(original)
    for kind, where, value in changes:
        at = start + where % max(len(data) - start, 1)
        if kind == "insert":
            data.insert(at, value)
        elif kind == "cut":
            del data[at : at + value]
        elif at < len(data):
            data[at] = value if kind == "set" else data[at] ^ value
    return bytes(data)


@pytest.mark.long
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(records_strategy(max_size=5), st.sampled_from(Codec), edits)
def test_any_edit_with_a_fitting_crc_and_size(
    records: Records, codec: Codec, changes: list[tuple[str, int, int]]
) -> None:
    batch = edited(encode_batch(records, codec=codec), changes)
    assert_total(batch)
    assert_total(with_crc(batch))
    if len(batch) >= BATCH_HEADER_SIZE:
        assert_total(patched(batch, "<I", 28, len(batch)))


@pytest.mark.long
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(records_strategy(max_size=5), st.sampled_from(Codec), edits)
def test_any_edit_inside_the_payload(records: Records, codec: Codec, changes: list[tuple[str, int, int]]) -> None:
    batch = encode_batch(records, codec=Codec.NONE)
    assert_total(wrapped(batch, edited(batch[BATCH_HEADER_SIZE:], changes), codec))


@pytest.mark.long
def test_every_byte_of_the_payload_set_to_every_telling_value() -> None:
    batch = sample()
    for at in range(BATCH_HEADER_SIZE, len(batch)):
        for value in (0, 1, 0x7F, 0x80, 0x81, 0xFE, 0xFF):
            changed = bytearray(batch)
            changed[at] = value
            assert_total(with_crc(changed))


@given(st.binary(max_size=300))
def test_any_bytes_at_all(data: bytes) -> None:
    assert_total(data)
    assert_total(with_crc(data))
    with pytest.raises(FormatError) if data else pytest.raises(AssertionError):
        assert split_batches(data)


def gapped_payload(gaps: bytes, count: int) -> bytes:
    sections = [gaps, b"\0" * (count - 1), b"", b"\1" * count, b"", b"", b""]
    return struct.pack("<7I", *map(len, sections)) + b"".join(sections)


@pytest.mark.parametrize(
    ("gaps", "says"),
    [
        (b"\xff" * 8 + b"\x7f" + b"\0", "a gap is wider|end at"),
        (b"\xff" * 9 + b"\x01" + b"\0", "a gap is wider than the whole batch"),
        # Two steps of 2**62 each and then back: sums that leave int64 must not come home again.
        ((b"\x80" * 8 + b"\x40") * 2, "end at"),
    ],
)
def test_offset_sums_that_leave_int64(gaps: bytes, says: str) -> None:
    batch = encode_batch(Records.from_lists([b"", b"", b""], offsets=[0, 1, INT64_MAX - 1]), codec=Codec.NONE)
    with pytest.raises(FormatError, match=says):
        decode_batch(wrapped(batch, gapped_payload(gaps, 3), Codec.NONE))


def test_length_sums_that_leave_64_bits() -> None:
    huge = b"\xff" * 9 + b"\x01"
    sections = [b"", b"\0", b"", huge + b"\x02", b"", b"", b"x"]
    payload = struct.pack("<7I", *map(len, sections)) + b"".join(sections)
    batch = encode_batch(Records.from_lists([b"", b""]), codec=Codec.NONE)
    with pytest.raises(FormatError, match="values: a length of 18446744073709551614 in 1 bytes"):
        decode_batch(wrapped(batch, payload, Codec.NONE))


def peak_bytes(step: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_declared_size_is_not_allocated_on_faith() -> None:
    batch = sample(Codec.LZ4)
    for declared in (64 << 20, 0xFFFFFFFF):
        assert peak_bytes(lambda declared=declared: decode_batch(patched(batch, "<I", 32, declared))) < 1 << 18
    assert peak_bytes(lambda: decode_batch(patched(batch, "<I", 36, 999_999))) < 1 << 18


def test_the_densest_batch_stays_within_bounded_memory() -> None:
    """20 million empty headers in 160 KB of LZ4: refused before columns are made of them."""
    count, per_record = 200_000, 100
    total = count * per_record
    inner = [bytes([per_record]) * count, b"\0" * total, b"\1" * total, b"", b""]
    headers = struct.pack("<5I", *map(len, inner)) + b"".join(inner)
    sections = [b"", b"\0" * (count - 1), b"", b"\1" * count, headers, b"", b""]
    payload = struct.pack("<7I", *map(len, sections)) + b"".join(sections)
    batch = wrapped(encode_batch(Records.from_lists([b""] * count)), payload, Codec.LZ4)
    batch = patched(batch, "<H", 26, 4)
    with pytest.raises(FormatError, match="20000000 headers in a batch, header_count_max is 2000000"):
        decode_batch(batch)
    # The payload twice (the LZ4 binding copies its output once) and the columns of 200,000 records.
    assert peak_bytes(lambda: decode_batch(batch)) < 2 * len(payload) + 80 * count


def test_a_full_batch_of_records_is_decoded_in_bounded_memory() -> None:
    """FormatLimits promises about 80 bytes of temporary columns per record."""
    count = 200_000
    batch = encode_batch(Records.from_lists([b""] * count, keys=[b""] * count, offsets=range(0, 2 * count, 2)))
    tracemalloc.start()
    decode_batch(batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * count


def test_lz4_that_holds_less_than_declared() -> None:
    batch = sample(Codec.LZ4)
    (declared,) = struct.unpack_from("<I", batch, 32)
    with pytest.raises(FormatError, match=f"LZ4 payload holds {declared} bytes, {declared + 1} declared"):
        decode_batch(patched(batch, "<I", 32, declared + 1))
    with pytest.raises(FormatError, match="LZ4 payload: "):
        decode_batch(patched(batch, "<I", 32, declared - 1))


COMPRESSED = [Codec.LZ4, Codec.ZSTD, Codec.GZIP]


def test_numbers_of_codecs_have_no_gap() -> None:
    """Many headers are checked by the first and the last of them."""
    assert sorted(Codec) == list(range(1, len(Codec) + 1))


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(FormatError, match=r"batch codec is 5, this reader knows \[1, 2, 3, 4\]") as caught:
        decode_batch(patched(sample(), "<B", 25, 5))
    assert caught.value.at == 25


@pytest.mark.parametrize("codec", COMPRESSED)
def test_a_payload_of_another_size_than_declared_is_refused(codec: Codec) -> None:
    batch = encode_batch(Records.from_lists([b"a" * 500]), codec=Codec.NONE)
    payload = batch[BATCH_HEADER_SIZE:]
    stored = stored_as(payload, codec)
    for declared in (len(payload) - 1, len(payload) + 1):
        with pytest.raises(FormatError, match="payload") as caught:
            decode_batch(around(batch, stored, codec, declared))
        assert caught.value.at == BATCH_HEADER_SIZE


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.GZIP])
@pytest.mark.parametrize("damage", ["cut off", "bytes behind", "a second one behind", "flipped", "nothing of it"])
def test_a_damaged_frame_is_refused(codec: Codec, damage: str) -> None:
    batch = encode_batch(Records.from_lists([b"abc%d" % at for at in range(200)]), codec=Codec.NONE)
    payload = batch[BATCH_HEADER_SIZE:]
    stored = stored_as(payload, codec)
    bad = {
        "cut off": stored[:-3],
        "bytes behind": stored + b"\0",
        "a second one behind": stored + stored_as(b"x", codec),
        "flipped": stored[:1] + bytes([stored[1] ^ 1]) + stored[2:],
        "nothing of it": b"\0" * len(stored),
    }[damage]
    with pytest.raises(FormatError, match=f"{codec.name.lower()} payload"):
        decode_batch(around(batch, bad, codec, len(payload)))


def test_a_zstd_frame_that_does_not_say_its_size_is_refused() -> None:
    batch = encode_batch(Records.from_lists([b"a" * 500]), codec=Codec.NONE)
    payload = batch[BATCH_HEADER_SIZE:]
    stored = zstandard.ZstdCompressor(write_content_size=False).compress(payload)
    with pytest.raises(FormatError, match="zstd payload does not say how many bytes it holds"):
        decode_batch(around(batch, stored, Codec.ZSTD, len(payload)))


@pytest.mark.long
@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.GZIP])
def test_a_bomb_makes_a_reader_allocate_no_more_than_it_declares(codec: Codec) -> None:
    """512 MiB in a few KB (zstd) or half a MB (gzip). Declared, they are beyond the limit; not declared, they are found
    out before they are all there."""
    if codec is Codec.ZSTD:
        compressor = zstandard.ZstdCompressor().compressobj(size=512 << 20)
        pieces = [compressor.compress(bytes(1 << 20)) for _ in range(512)]
        stored = b"".join([*pieces, compressor.flush()])
    else:
        member = zlib.compressobj(6, zlib.DEFLATED, 31)
        stored = b"".join([*(member.compress(bytes(1 << 20)) for _ in range(512)), member.flush()])
    batch = encode_batch(Records.from_lists([b"a" * 500]), codec=Codec.NONE)
    most = min(len(stored) * COMPRESSION_RATIO_MAX, DEFAULT_LIMITS.uncompressed_bytes_max)
    for declared, said in (
        (512 << 20, "uncompressed_bytes_max"),
        (len(stored) * COMPRESSION_RATIO_MAX + 1, "a stored byte may stand for 255|uncompressed_bytes_max"),
        (most, "payload holds"),
        (64 * 1024, "payload holds"),
    ):
        bomb = around(batch, stored, codec, declared)
        with pytest.raises(FormatError, match=said):
            decode_batch(bomb)
        assert peak_bytes(lambda bomb=bomb: decode_batch(bomb)) < 2 * min(declared, most) + len(stored) + (1 << 18)


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.GZIP])
def test_what_a_codec_would_shrink_beyond_the_limit_is_stored_as_lz4(codec: Codec) -> None:
    records = Records.from_lists([bytes(4_000_000)])
    batch = encode_batch(records, codec=codec)
    assert read_batch_header(batch).codec is Codec.LZ4
    assert decode_batch(batch).values.to_list() == [bytes(4_000_000)]


@pytest.mark.parametrize("codec", COMPRESSED)
def test_what_a_codec_does_not_shrink_is_stored_as_it_is(codec: Codec) -> None:
    batch = encode_batch(Records.from_lists([random.Random(1).randbytes(100_000)]), codec=codec)
    assert read_batch_header(batch).codec is Codec.NONE


def test_threads_compress_and_decompress_side_by_side() -> None:
    """zstd's contexts are each thread's own."""

    def work(number: int) -> bool:
        values = [b"%d of %d" % (at, number) for at in range(2_000)]
        return all(
            decode_batch(encode_batch(Records.from_lists(values), codec=codec)).values.to_list() == values
            for codec in COMPRESSED
            for _ in range(5)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_positions_in_a_compressed_payload_are_said_to_be_such() -> None:
    payload = raw_batch(b"\2\2", b"abc")[BATCH_HEADER_SIZE:]
    bad = wrapped(encode_batch(Records.from_lists([b"", b""])), payload, Codec.LZ4)
    with pytest.raises(FormatError, match="byte 29 of the decompressed payload") as caught:
        decode_batch(bad)
    assert caught.value.at == BATCH_HEADER_SIZE


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(FormatError("what it is", 7)))
    assert (error.what, error.at, str(error)) == ("what it is", 7, "what it is (at byte 7)")


# ---- many headers at once

# Every field of the header: where it is, its format, values about its bounds.
HEADER_FIELDS = [
    (0, "<q", [-1, 0, 7, INT64_MAX - 3, INT64_MAX - 2, INT64_MAX, INT64_MIN]),
    (8, "<Q", [0, 1, INT64_MAX, INT64_MAX + 1, (1 << 64) - 1]),
    (20, "<I", [0, int.from_bytes(b"SHRA", "little")]),
    (24, "<B", [0, 1, 2, 255]),
    (25, "<B", [0, 1, 2, 3, 255]),
    (26, "<H", [0, 1, 2, 4, 7, 8, 1 << 15, (1 << 16) - 1]),
    (28, "<I", [0, 83, 84, 85, 120, 1 << 20, (1 << 24) + 1, (1 << 32) - 1]),
    (32, "<I", [0, 28, 33, 34, 1 << 20, (1 << 26) + 1, (1 << 32) - 1]),
    (36, "<I", [0, 1, 2, 3, 4, 1 << 20, (1 << 31) + 1, (1 << 32) - 1]),
    (40, "<q", [-1, 0, 1, 2, 3, 4, INT64_MAX, INT64_MIN]),
    (48, "<q", [0, 5, INT64_MAX, INT64_MIN]),
    (56, "<q", [0, 5, INT64_MAX, INT64_MIN]),
    (64, "<q", [0, 1, -1, INT64_MAX, INT64_MIN]),
    (72, "<q", [0, 1, -1, INT64_MAX, INT64_MIN]),
    (80, "<I", [0, 1, (1 << 32) - 1]),
]
header_changes = st.lists(
    st.sampled_from([(at, form, value) for at, form, values in HEADER_FIELDS for value in values]), max_size=4
)


def changed(batch: bytes, changes: list[tuple[int, str, int]]) -> bytes:
    copy = bytearray(batch)
    for at, form, value in changes:
        struct.pack_into(form, copy, at, value)
    return bytes(copy)


def attempt_header(data: bytes, at: int) -> BatchHeader | str:
    try:
        return read_batch_header(data, at)
    except FormatError as error:
        return str(error)


def columns_of(headers: list[BatchHeader]) -> HeaderColumns:
    stamps = [header.producer or ProducerStamp(0, 0, 0) for header in headers]
    return HeaderColumns(
        [header.record_count for header in headers],
        [stamp.producer_id for stamp in stamps],
        [stamp.producer_epoch for stamp in stamps],
        [stamp.base_sequence for stamp in stamps],
    )


def assert_read_alike(batches: list[bytes]) -> None:
    """Many headers at once: the same fields as one by one, or the error of the first bad one."""
    data = b"".join(batches)
    ats = list(accumulate(map(len, batches), initial=0))[:-1]
    one_by_one = [attempt_header(data, at) for at in ats]
    wrong = next((header for header in one_by_one if isinstance(header, str)), None)
    if wrong is None:
        assert read_batch_headers(data, ats) == columns_of([h for h in one_by_one if not isinstance(h, str)])
    else:
        with pytest.raises(FormatError) as raised:
            read_batch_headers(data, ats)
        assert str(raised.value) == wrong


@settings(max_examples=300)
@given(st.sampled_from(list(Codec)), st.lists(header_changes, min_size=1, max_size=4))
def test_many_headers_are_read_as_one(codec: Codec, changes: list[list[tuple[int, str, int]]]) -> None:
    batch = encode_batch(Records.from_lists([b"a" * 9] * 3), codec=codec, producer=ProducerStamp(5, 6, 7))
    assert_read_alike([changed(batch, each) for each in changes])


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("producer", [None, ProducerStamp(5, 6, 7)])
def test_every_bound_of_a_header_is_the_same_for_many(codec: Codec, producer: ProducerStamp | None) -> None:
    for offsets in (None, [4, 6, 9]):
        batch = encode_batch(Records.from_lists([b"a" * 40] * 3, offsets=offsets), codec=codec, producer=producer)
        for at, form, values in HEADER_FIELDS:
            for value in values:
                assert_read_alike([batch, changed(batch, [(at, form, value)]), batch])
