"""The segmenter's decisions, without I/O."""

import dataclasses
import uuid
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import BatchHeader, SegmentBuilder, encode_batch, read_batch_header
from shproto.v1 import coordinator_pb2 as c
from shproto.v1 import types_pb2
from shruntime.settings import SettingsError
from shruntime.tasks import retry_after_ms
from shstore.keys import check_key
from streamhouse_segmenter.core.compaction import CompactionRefused, check_mergeable
from streamhouse_segmenter.core.history import HistoryMark, went_back
from streamhouse_segmenter.core.keys import data_key, object_key
from streamhouse_segmenter.core.plan import SliceMismatch, SliceProgress, plan_objects, still_early
from streamhouse_segmenter.core.sweep import Orphan, StoredObject, judge, old_enough
from streamhouse_segmenter.settings import SegmenterSettings

from tests.platform.log_agent import records_of

pytestmark = pytest.mark.quick

TOPIC_ID = uuid.UUID(int=0x0123456789ABCDEF0123456789ABCDEF).bytes


def slice_of(partition: int, base: int, end: int, size_bytes: int = 100) -> c.BufferSlice:
    return c.BufferSlice(
        topic_id=TOPIC_ID,
        topic="orders",
        partition=partition,
        epoch=3,
        base_offset=base,
        end_offset=end,
        record_count=end - base,
        size_bytes=size_bytes,
    )


def header_of(base: int, count: int, epoch: int = 3) -> BatchHeader:
    return read_batch_header(encode_batch(records_of(0, base, count), base_offset=base, epoch=epoch))


# ---- settings


@pytest.mark.parametrize("extreme", ["Ge", "Le"])
def test_segments_can_be_built_of_all_blocks_that_may_be_asked_for(extreme: str) -> None:
    """Else every buffer would fail, for ever."""
    field = SegmenterSettings.model_fields["block_bytes_target"]
    [bound] = [getattr(item, extreme.lower()) for item in field.metadata if type(item).__name__ == extreme]
    SegmentBuilder(TOPIC_ID, 0, 1, block_bytes_target=bound)


def test_blocks_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(SettingsError, match="block_bytes_target"):
        SegmenterSettings.load({}, block_bytes_target=8 << 20)


# ---- keys


def test_keys_are_the_documented_ones() -> None:
    assert data_key("orders", TOPIC_ID, 7, 42, 3, "ab12") == (
        f"data/orders.{TOPIC_ID.hex()[:8]}/7/00000000000000000042-3-ab12.seg"
    )
    assert object_key([slice_of(0, 0, 1), slice_of(1, 0, 1)], "2024-05-01", "ab12") == "mixed/2024-05-01/ab12.seg"


@given(topic=st.text("abcXYZ019._-", min_size=1, max_size=249), offset=st.integers(0, 2**63 - 1))
def test_every_legal_topic_gives_a_legal_key(topic: str, offset: int) -> None:
    check_key(data_key(topic, TOPIC_ID, 2**32 - 1, offset, 2**63 - 1, "f" * 32))


@given(st.lists(st.integers(0, 2**63 - 1), min_size=2))
def test_keys_of_a_partition_sort_by_offset(offsets: list[int]) -> None:
    keys = [data_key("orders", TOPIC_ID, 0, offset, 1, "x") for offset in sorted(offsets)]
    assert keys == sorted(keys)


# ---- what goes into which object


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300)), max_size=30), st.integers(1, 500))
def test_planned_objects_hold_every_slice_once_in_order(spec: list[tuple[int, int]], target: int) -> None:
    slices = [slice_of(partition, n * 10, n * 10 + 10, size) for n, (partition, size) in enumerate(spec)]
    objects = plan_objects(slices, target)
    flat = [item for planned in objects for item in planned]
    assert sorted((s.partition, s.base_offset) for s in slices) == [(s.partition, s.base_offset) for s in flat]
    assert all(planned for planned in objects)
    for planned in objects:
        assert len(planned) == 1 or sum(s.size_bytes for s in planned) <= target


# ---- announced and pulled


def test_the_announced_batches_pass() -> None:
    progress = SliceProgress.of(slice_of(0, 10, 40))
    progress.take([header_of(10, 20), header_of(30, 10)])
    progress.finish()


@pytest.mark.parametrize(
    ("headers", "what", "expected", "got"),
    [
        ([header_of(11, 29)], "base offset", 10, 11),
        ([header_of(10, 10), header_of(21, 19)], "base offset", 20, 21),
        ([header_of(10, 10), header_of(10, 30)], "base offset", 20, 10),
        ([header_of(10, 31)], "end offset", 40, 41),
        ([header_of(10, 30, epoch=4)], "epoch", 3, 4),
        ([header_of(10, 29)], "end offset", 40, 39),
        ([], "end offset", 40, 10),
        (
            [header_of(10, 29)._replace(last_offset_delta=29, contiguous=False)],
            "offsets of a batch",
            29,
            30,
        ),
    ],
)
def test_other_batches_than_announced_do_not(headers: list[BatchHeader], what: str, expected: int, got: int) -> None:
    progress = SliceProgress.of(slice_of(0, 10, 40))
    with pytest.raises(SliceMismatch) as refused:
        progress.take(headers)
        progress.finish()
    assert (refused.value.what, refused.value.expected, refused.value.got) == (what, expected, got)
    assert "orders/0 epoch 3 [10, 40)" in str(refused.value)


# ---- retries


@given(st.integers(-1, 10_000), st.floats(0, 1, exclude_max=True))
def test_back_off_stays_within_its_cap(attempt: int, jitter: float) -> None:
    assert 1 <= retry_after_ms(attempt, jitter, first_ms=200, max_ms=30_000) <= 30_000


def test_back_off_doubles() -> None:
    waits = [retry_after_ms(attempt, 0.999, first_ms=200, max_ms=30_000) for attempt in range(1, 12)]
    assert waits[:4] == [199, 399, 799, 1598]
    assert waits[-1] == 29970


def test_only_early_segments_are_offered_again() -> None:
    segments = [types_pb2.SegmentRef(segment_id=str(n)) for n in range(4)]
    results = [
        c.REGISTRATION_RESULT_REGISTERED,
        c.REGISTRATION_RESULT_EARLY,
        c.REGISTRATION_RESULT_FENCED,
        c.REGISTRATION_RESULT_EARLY,
    ]
    assert [segment.segment_id for segment in still_early(segments, results)] == ["1", "3"]
    with pytest.raises(ValueError, match="shorter"):
        still_early(segments, results[:3])


# ---- orphans


def object_of(key: str, modified_ms: int = 0) -> StoredObject:
    return StoredObject(key, 10, modified_ms)


def test_young_objects_are_left_alone() -> None:
    objects = [object_of("a", 0), object_of("b", 1), object_of("from the future", 5000)]
    assert old_enough(objects, now_ms=1000, grace_ms=1000) == [objects[0]]


def deletion_of(key: str, verdict: "c.DeletionVerdict.ValueType", **changes: Any) -> c.ObjectDeletion:
    return c.ObjectDeletion(object_key=key, verdict=verdict, **changes)


def test_orphans_are_what_the_coordinator_says() -> None:
    answer = c.BeginDeletionResponse(
        objects=[
            deletion_of("a", c.DELETION_VERDICT_REFERENCED),
            deletion_of("b", c.DELETION_VERDICT_DECLARED, declared_ms=90, worker_id="w"),
            deletion_of("c", c.DELETION_VERDICT_NOTICED),
            deletion_of("d", c.DELETION_VERDICT_BEGUN, noticed_ms=40, declared_ms=30, worker_id="w"),
        ],
        now_ms=100,
    )
    judged = judge([object_of(key, 7) for key in "abcd"], answer)
    assert judged.declared == 1
    assert judged.orphans == [
        Orphan(key="c", size_bytes=10, modified_ms=7, since_ms=100, declared_ms=0, worker_id="", deletable=False),
        Orphan(key="d", size_bytes=10, modified_ms=7, since_ms=40, declared_ms=30, worker_id="w", deletable=True),
    ]
    assert "no segment" in judged.orphans[0].why and "never registered" in judged.orphans[1].why


@pytest.mark.parametrize("keys", [["b", "a"], ["a"], ["a", "b", "c"]])
def test_an_answer_about_other_objects_deletes_nothing(keys: list[str]) -> None:
    answer = c.BeginDeletionResponse(objects=[deletion_of(key, c.DELETION_VERDICT_BEGUN) for key in keys])
    with pytest.raises(ValueError, match=r"asked about|argument"):
        judge([object_of("a"), object_of("b")], answer)


# ---- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"claim_ttl_ms": 14_000},
            r"rpc_timeout_ms \(10000\) must be at most two thirds of claim_ttl_ms \(14000\)",
        ),
        (
            {"handover_retry_first_ms": 6_000},
            r"handover_retry_first_ms \(6000\) must not be above handover_retry_max_ms \(5000\)",
        ),
        ({"early_retry_max_ms": 10}, r"early_retry_first_ms \(20\) must not be above early_retry_max_ms \(10\)"),
    ],
)
def test_settings_that_would_not_work_together_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SegmenterSettings.load({}, **changes)
    assert SegmenterSettings.load({}, claim_ttl_ms=15_000)


# ---- history


def test_a_mark_survives_its_encoding() -> None:
    mark = HistoryMark(position=7, stream_id="topic/ab", version=2, type="TopicCreated", created_ms=1234)
    assert HistoryMark.decode(mark.encode()) == (mark, True)


def test_a_mark_is_the_bytes_that_its_page_describes() -> None:
    mark = HistoryMark(
        position=7, stream_id="topic/ab", version=2, type="TopicCreated", created_ms=1234, sweep_from_ms=99
    )
    fields = b'"position": 7, "stream_id": "topic/ab", "version": 2, "type": "TopicCreated", "created_ms": 1234'
    old = b"{" + fields + b', "sweep_from_ms": 99}'
    assert mark.encode() == old[:-1] + b', "crc32": %d}' % zlib.crc32(old)
    assert HistoryMark.decode(old) == (mark, False), "of a version without checksums"
    assert HistoryMark.decode(b"{" + fields + b"}") == (dataclasses.replace(mark, sweep_from_ms=0), False)


def test_no_flipped_bit_of_a_mark_is_overlooked() -> None:
    mark = HistoryMark(
        position=7,
        stream_id="topic/ab",
        version=2,
        type="TopicCreated",
        created_ms=1234,
        sweep_from_ms=1_790_000_000_000,
    )
    body = mark.encode()
    for at in range(8 * len(body)):
        flipped = bytearray(body)
        flipped[at // 8] ^= 1 << at % 8
        try:
            found, _ = HistoryMark.decode(bytes(flipped))
        except ValueError:
            continue
        assert found == mark, f"bit {at}"


def _mark_created(created: str) -> bytes:
    return b'{"position": 1, "stream_id": "", "version": 1, "type": "", "created_ms": %s}' % created.encode()


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"nonsense", b"{}", b"[1]", b"5", b'{"position": 1}', b"\xff\xfe"),
        *(
            _mark_created('"x"'),
            _mark_created("1e30"),
            _mark_created('1, "crc32": 1'),
            _mark_created('1, "crc32": "x"'),
        ),
    ],
)
def test_a_damaged_mark_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        HistoryMark.decode(body)


def test_another_history_is_noticed() -> None:
    mark = HistoryMark(position=7, stream_id="topic/ab", version=2, type="TopicCreated", created_ms=1234)
    head = c.GetHeadResponse(events_position=5, history_id="h2")
    assert went_back(mark, mark, head) == ""
    assert went_back(dataclasses.replace(mark, sweep_from_ms=9), mark, head) == ""
    assert went_back(mark, None, head) == (
        "the store has seen event 7 (TopicCreated of topic/ab, 1234 ms after 1970), which is not there:"
        " PostgreSQL stands at event 5 of history h2"
    )
    assert "is another one there" in went_back(mark, dataclasses.replace(mark, created_ms=1235), head)


# ---- compaction


def ref(base: int, end: int, **fields: object) -> types_pb2.SegmentRef:
    return types_pb2.SegmentRef(
        topic_id=TOPIC_ID,
        topic="orders",
        epoch=1,
        base_offset=base,
        end_offset=end,
        record_count=end - base,
        size_bytes=100,
        **fields,
    )


def test_adjacent_segments_may_be_merged_over_a_gap_of_epochs() -> None:
    later = ref(1000, 1010)
    later.epoch = 2
    check_mergeable([ref(0, 10), ref(10, 20), later], 300)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([ref(0, 10)], "must be 2 or more"),
        ([ref(0, 10), ref(9, 20)], "is not after"),
        ([ref(10, 20), ref(0, 10)], "is not after"),
        ([ref(0, 10), ref(10, 20, partition=1)], "different partitions"),
        ([ref(0, 10), ref(10, 20, lost_reason="damaged")], "is lost: damaged"),
        ([ref(0, 10), ref(10, 20), ref(20, 30), ref(30, 40)], "400 bytes to merge"),
    ],
)
def test_what_may_not_be_merged_is_refused(segments: list[types_pb2.SegmentRef], message: str) -> None:
    with pytest.raises(CompactionRefused, match=message):
        check_mergeable(segments, 300)
