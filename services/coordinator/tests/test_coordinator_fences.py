"""Fences of producers: which epoch counts, and which older ranges are known."""

from dataclasses import replace

import pytest
from shproto.errors import Fenced, InvalidArgument, Overloaded, ProducerFenced
from shproto.limits import SNAPSHOTS_BYTES_MAX
from streamhouse_coordinator.core import fences
from streamhouse_coordinator.core import tables as t

pytestmark = pytest.mark.quick

TOPIC = "aa" * 16
ASKED = fences.AskedFence(
    topic_id=TOPIC, partition=0, epoch=5, producer_id=7, producer_epoch=2, known_epoch=0, state=b""
)
HELD = t.ProducerFenceRow(topic_id=TOPIC, partition=0, producer_id=7, producer_epoch=2, known_epoch=3, state=b"s")


def range_of(epoch: int, status: str = t.SETTLED, *, registered: int = 10, end: int | None = 10) -> t.RangeRow:
    return t.RangeRow(
        topic_id=TOPIC, partition=0, epoch=epoch, start_offset=0, limit_offset=100, registered_end=registered,
        end_offset=end, status=status, session_id="s", agent_id="a", wal_id="w", moving=False,
    )  # fmt: skip


def snapshot(epoch: int, end_offset: int, data: bytes) -> t.ProducerSnapshotRow:
    return t.ProducerSnapshotRow(topic_id=TOPIC, partition=0, epoch=epoch, end_offset=end_offset, snapshot=data)


@pytest.mark.parametrize(
    "row",
    [None, range_of(5), range_of(5, t.ORPHANED, end=None), replace(range_of(5, t.OPEN, end=None), session_id="other")],
)
def test_only_the_leader_fences(row: t.RangeRow | None) -> None:
    with pytest.raises(Fenced):
        fences.check_leader(row, "s", 5)


def test_the_leader_fences() -> None:
    fences.check_leader(range_of(5, t.OPEN, end=None), "s", 5)


def test_a_first_fence_has_nothing_to_learn_of_older_ranges() -> None:
    row = fences.raise_epoch(ASKED, None, 0, 1)
    assert (row.producer_epoch, row.known_epoch, row.state) == (2, 5, b"")


def test_epochs_only_grow_and_the_same_one_may_ask_again() -> None:
    assert fences.raise_epoch(ASKED, HELD, 1, 1) == HELD
    assert fences.raise_epoch(replace(ASKED, producer_epoch=9), HELD, 1, 1) == replace(HELD, producer_epoch=9)
    with pytest.raises(ProducerFenced) as refused:
        fences.raise_epoch(replace(ASKED, producer_epoch=1), HELD, 1, 1)
    assert refused.value.details["held"] == "2"


def test_what_was_gathered_is_kept_and_never_taken_back() -> None:
    newer = fences.raise_epoch(replace(ASKED, known_epoch=5, state=b"n"), HELD, 1, 1)
    assert (newer.known_epoch, newer.state) == (5, b"n")
    assert fences.raise_epoch(replace(ASKED, known_epoch=3, state=b"late"), HELD, 1, 1) == HELD
    with pytest.raises(InvalidArgument, match="known_epoch is 6, must be at most 5"):
        fences.raise_epoch(replace(ASKED, known_epoch=6), HELD, 1, 1)


def test_one_producer_too_many_is_refused() -> None:
    with pytest.raises(Overloaded, match="producer_fences_per_partition_max is 3"):
        fences.raise_epoch(ASKED, None, 3, 3)


def test_older_states_come_from_every_range_since_the_known_epoch() -> None:
    ranges = [range_of(epoch) for epoch in (2, 3, 4)] + [range_of(5, t.OPEN, end=None)]
    snapshots = [snapshot(epoch, end, b"%d-%d" % (epoch, end)) for epoch in (2, 3, 4, 5) for end in (5, 10)]
    found = fences.older_states(HELD, 5, ranges, snapshots)
    assert ([state for _, state in found.ends], found.next_epoch, found.waits_for) == ([b"3-10", b"4-10"], 5, None)
    assert [row.epoch for row, _ in found.ends] == [3, 4]


@pytest.mark.parametrize(
    ("row", "ends", "known"),
    [
        (range_of(3, t.ORPHANED, end=None), (10,), False),
        (range_of(3, registered=5), (5,), False),  # settled, and what lies beyond registered_end is being uploaded
        (range_of(3, registered=5), (5, 10), True),  # declared with the end, or announced
        (range_of(3, registered=5), (5, 11), False),  # of records that were given up
        (range_of(3), (), True),  # nobody wrote
        (range_of(3, t.LOST, registered=5, end=None), (5,), True),
    ],
)
def test_a_range_is_known_once_a_snapshot_tells_all_of_it(row: t.RangeRow, ends: tuple[int, ...], known: bool) -> None:
    found = fences.older_states(HELD, 5, [row, range_of(4)], [snapshot(3, end, b"%d" % end) for end in ends])
    assert (found.waits_for is None) is known
    assert found.next_epoch == (5 if known else 3)
    if not known:
        assert found.waits_for == row
        assert found.ends == (), "nothing beyond is told before"


def test_states_that_do_not_fit_come_with_the_next_answer() -> None:
    large = bytes(SNAPSHOTS_BYTES_MAX // 2 + 1)
    ranges, snapshots = [range_of(3), range_of(4)], [snapshot(3, 10, large), snapshot(4, 10, large)]
    first = fences.older_states(HELD, 5, ranges, snapshots)
    assert (len(first.ends), first.next_epoch) == (1, 4)
    second = fences.older_states(replace(HELD, known_epoch=4), 5, ranges, snapshots)
    assert (len(second.ends), second.next_epoch) == (1, 5)
