"""The lag of consumer groups, in records and in time."""

import pytest
from shcluster.index import EpochRange, PartitionIndex, RangeStatus, SegmentEntry
from shread.core.lag import Lag, lag_of

pytestmark = pytest.mark.quick

NOW_MS = 100_000


def segment(epoch: int, base_offset: int, end_offset: int, max_timestamp_ms: int) -> SegmentEntry:
    return SegmentEntry("s", epoch, base_offset, end_offset, end_offset - base_offset, "k", 0, 1, max_timestamp_ms, "")


def partition(status: RangeStatus = RangeStatus.SETTLED) -> PartitionIndex:
    """Epoch 1 wrote offsets 0 to 9, epoch 2 100 to 109, and 10 more that are in no segment."""
    found = PartitionIndex(b"t" * 16, "orders", 0, durable_only=False)
    end = 10 if status is RangeStatus.SETTLED else None
    found.ranges = [
        EpochRange(1, 0, 100, 10, end, status, "a", "w"),
        EpochRange(2, 100, 200, 110, None, RangeStatus.OPEN, "a", "w"),
    ]
    found.segments = [segment(1, 0, 10, 40_000), segment(2, 100, 110, 70_000)]
    found._bases = [0, 100]
    return found


def test_lag_counts_records_and_not_the_offsets_between_epochs() -> None:
    assert lag_of(partition(), 4, 120, NOW_MS) == Lag(6 + 20, 60_000)
    assert lag_of(partition(), 10, 120, NOW_MS) == Lag(20, 30_000), "at the gap: the first record is behind it"
    assert lag_of(partition(), 105, 120, NOW_MS) == Lag(15, 30_000)


def test_records_that_are_in_no_segment_yet_are_counted_and_not_old() -> None:
    assert lag_of(partition(), 110, 120, NOW_MS) == Lag(10, 0)
    assert lag_of(partition(), 120, 120, NOW_MS) == Lag(0, 0)


def test_of_a_range_that_is_not_settled_what_is_registered_counts() -> None:
    assert lag_of(partition(RangeStatus.ORPHANED), 4, 120, NOW_MS).records == 6 + 20


def test_what_retention_removed_is_not_lag() -> None:
    found = partition()
    found.log_start_offset = 8
    assert lag_of(found, 0, 120, NOW_MS).records == 2 + 20


def test_timestamps_ahead_of_the_clock_are_no_lag() -> None:
    assert lag_of(partition(), 4, 120, 10_000).behind_ms == 0
