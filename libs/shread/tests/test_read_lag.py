"""The lag of consumer groups, in records and in time."""

import pytest
from shcluster.index import PartitionIndex
from shproto.model import Range, RangeStatus, Segment
from shread.core.lag import GroupLag, lag_of

pytestmark = pytest.mark.quick

NOW_MS = 100_000


def segment(epoch: int, base_offset: int, end_offset: int, max_timestamp_ms: int) -> Segment:
    return Segment(
        segment_id="s", topic_id="t", topic="orders", partition=0, epoch=epoch, base_offset=base_offset,
        end_offset=end_offset, record_count=end_offset - base_offset, object_key="k", object_at=0, size_bytes=1,
        raw_bytes=1, first_timestamp_ms=0, max_timestamp_ms=max_timestamp_ms,
    )  # fmt: skip


def partition(status: RangeStatus = RangeStatus.SETTLED) -> PartitionIndex:
    """Epoch 1 wrote offsets 0 to 9, epoch 2 100 to 109, and 10 more that are in no segment."""
    found = PartitionIndex(topic_id=b"t" * 16, topic="orders", partition=0, durable_only=False)
    end = 10 if status is RangeStatus.SETTLED else None
    found.ranges = [
        Range(
            epoch=1,
            start_offset=0,
            limit_offset=100,
            registered_end=10,
            end_offset=end,
            status=status,
            agent_id="a",
            wal_id="w",
        ),
        Range(
            epoch=2,
            start_offset=100,
            limit_offset=200,
            registered_end=110,
            end_offset=None,
            status=RangeStatus.OPEN,
            agent_id="a",
            wal_id="w",
        ),
    ]
    found.segments = [segment(1, 0, 10, 40_000), segment(2, 100, 110, 70_000)]
    found._bases = [0, 100]
    return found


def test_lag_counts_records_and_not_the_offsets_between_epochs() -> None:
    assert lag_of(partition(), 4, 120, NOW_MS) == GroupLag(6 + 20, 60_000)
    assert lag_of(partition(), 10, 120, NOW_MS) == GroupLag(20, 30_000), "at the gap: the first record is behind it"
    assert lag_of(partition(), 105, 120, NOW_MS) == GroupLag(15, 30_000)


def test_records_that_are_in_no_segment_yet_are_counted_and_not_old() -> None:
    assert lag_of(partition(), 110, 120, NOW_MS) == GroupLag(10, 0)
    assert lag_of(partition(), 120, 120, NOW_MS) == GroupLag(0, 0)


def test_of_a_range_that_is_not_settled_what_is_registered_counts() -> None:
    assert lag_of(partition(RangeStatus.ORPHANED), 4, 120, NOW_MS).records == 6 + 20


def test_what_retention_removed_is_not_lag() -> None:
    found = partition()
    found.log_start_offset = 8
    assert lag_of(found, 0, 120, NOW_MS).records == 2 + 20


def test_timestamps_ahead_of_the_clock_are_no_lag() -> None:
    assert lag_of(partition(), 4, 120, 10_000).behind_ms == 0
