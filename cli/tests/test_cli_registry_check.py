"""What `verify` finds: gaps and overlaps in the registry, and bytes that are not what is registered."""

import uuid
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import Records, SegmentBuilder, describe_segment, encode_batch, stamp_batch
from shproto.model import Range, RangeStatus, Segment
from streamhouse_cli.registry_check import (
    check_contents,
    check_partition,
)

pytestmark = pytest.mark.quick

TOPIC_ID = uuid.uuid4()


def segment(base: int, end: int, **changes: Any) -> Segment:
    made = Segment(
        segment_id=f"s{base}", topic_id=TOPIC_ID.hex, topic="orders", partition=0, epoch=7, base_offset=base,
        end_offset=end, record_count=end - base, object_key=f"data/{base}", object_at=0, size_bytes=100, raw_bytes=100,
        first_timestamp_ms=5, max_timestamp_ms=9,
    )  # fmt: skip
    return replace(made, **changes)


def owned_range(epoch: int, start: int, end: int) -> Range:
    return Range(
        epoch=epoch, start_offset=start, limit_offset=end, registered_end=end, end_offset=end,
        status=RangeStatus.SETTLED, agent_id="a", wal_id="w",
    )  # fmt: skip


def kinds(ranges: list[tuple[int, int]], segments: list[Segment], log_start: int = 0) -> list[Any]:
    owned = [owned_range(number, *span) for number, span in enumerate(ranges, 1)]
    found = check_partition("orders", 0, log_start, owned, segments)
    return [(item.kind, item.base_offset, item.end_offset) for item in found]


def test_a_sound_partition_has_no_findings() -> None:
    """Gaps between epochs are no gaps; nor is what retention removed."""
    segments = [segment(0, 10), segment(10, 20), segment(1000, 1010)]
    assert kinds([(0, 20), (1000, 1010), (2000, 2000)], segments) == []
    assert kinds([(0, 20), (1000, 1010)], segments[1:], log_start=10) == []


def test_a_merged_segment_may_span_epochs() -> None:
    assert kinds([(0, 20), (1000, 1010)], [segment(0, 1010)]) == []


def test_registered_offsets_that_no_segment_holds_are_a_gap() -> None:
    assert kinds([(0, 30)], [segment(0, 10), segment(15, 20)]) == [("gap", 10, 15), ("gap", 20, 30)]
    assert kinds([(0, 30)], []) == [("gap", 0, 30)]


def test_two_segments_of_the_same_offsets_overlap() -> None:
    assert kinds([(0, 20)], [segment(0, 20), segment(5, 10), segment(12, 20)]) == [
        ("overlapping", 5, 10),
        ("overlapping", 12, 20),
    ]


@given(st.sets(st.integers(1, 60), min_size=1, max_size=8), st.data())
def test_removing_any_segment_of_a_sound_partition_is_found(cuts: set[int], data: st.DataObject) -> None:
    ends = sorted(cuts)
    segments = [segment(base, end) for base, end in zip([0, *ends], ends, strict=False)]
    assert kinds([(0, ends[-1])], segments) == []
    gone = data.draw(st.sampled_from(segments))
    left = [item for item in segments if item is not gone]
    assert kinds([(0, ends[-1])], left) == [("gap", gone.base_offset, gone.end_offset)]


@pytest.fixture(scope="module")
def contents() -> bytes:
    builder = SegmentBuilder(TOPIC_ID.bytes, 0, 7)
    records = Records.from_lists([b"a", b"b", b"c"], timestamps_ms=[5, 9, 6])
    builder.add(stamp_batch(encode_batch(records), 10, 7))
    return b"".join(builder.finish().parts)


def check(contents: bytes, registered: Segment) -> list[tuple[str, str]]:
    described = describe_segment(lambda at, size_bytes: contents[at : at + size_bytes], len(contents))
    return [(item.kind, item.what) for item in check_contents(registered, described)]


def test_the_registered_segment_is_what_the_bytes_say(contents: bytes) -> None:
    assert check(contents, segment(10, 13)) == []


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=5))
def test_what_the_builder_says_of_a_segment_is_what_its_bytes_say(blocks: list[list[int]]) -> None:
    """Also where timestamps descend from one block to the next: a late client, a retry, another clock."""
    builder = SegmentBuilder(TOPIC_ID.bytes, 0, 7, block_bytes_target=1)  # every batch is a block of its own
    offset = 10
    for timestamps in blocks:
        records = Records.from_lists([b"x"] * len(timestamps), timestamps_ms=timestamps)
        builder.add(stamp_batch(encode_batch(records), offset, 7))
        offset += len(timestamps)
    built = builder.finish()
    assert built.info.block_count == len(blocks)
    registered = segment(
        built.info.base_offset,
        built.info.end_offset,
        first_timestamp_ms=built.info.first_timestamp_ms,
        max_timestamp_ms=built.info.max_timestamp_ms,
    )
    assert check(b"".join(built.parts), registered) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("topic_id", "f" * 32),
        ("partition", 1),
        ("epoch", 8),
        ("end_offset", 14),
        ("record_count", 2),
        ("first_timestamp_ms", 4),
        ("max_timestamp_ms", 10),
    ],
)
def test_another_segment_than_registered_is_different(contents: bytes, name: str, value: Any) -> None:
    ((kind, what),) = check(contents, segment(10, 13, **{name: value}))
    assert kind == "different" and what.startswith(f"{name} is registered as {value}, the object has ")


def test_any_flipped_bit_is_damage(contents: bytes) -> None:
    for at in range(0, len(contents), 7):
        damaged = bytearray(contents)
        damaged[at] ^= 0x10
        assert {kind for kind, _ in check(bytes(damaged), segment(10, 13))} & {"damaged", "different"}, at
