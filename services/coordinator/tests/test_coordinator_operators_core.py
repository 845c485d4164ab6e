"""What operators do, without a database: states of groups, counting lag, what may be declared lost."""

from dataclasses import replace

import pytest
from shproto.errors import GroupNotEmpty, InvalidArgument
from shproto.events import GroupDeleted, OffsetChange, OffsetsReset, RangeLost
from streamhouse_coordinator.core import sessions
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.groups import Group, check_empty, records_before, state_of
from streamhouse_coordinator.core.projection import Remove, row_ops

pytestmark = pytest.mark.quick

TOPIC = "0" * 32
RANGE = t.RangeRow(
    topic_id=TOPIC,
    partition=0,
    epoch=1,
    start_offset=0,
    limit_offset=1000,
    registered_end=100,
    end_offset=None,
    status=t.ORPHANED,
    session_id="s",
    agent_id="a",
    wal_id="w",
    moving=False,
)


def test_a_groups_state_says_whether_partitions_are_still_to_change_hands() -> None:
    target = {"m": frozenset({"t:0"})}
    assert state_of(Group(name="g", generation=3, topics={}, owned={}, target=target)) == "empty"
    assert state_of(Group(name="g", generation=3, topics={"m": {"t"}}, owned={}, target=target)) == "rebalancing"
    assert state_of(Group(name="g", generation=3, topics={"m": {"t"}}, owned=target, target=target)) == "stable"


def test_a_group_with_members_is_told_to_stop_them() -> None:
    check_empty(Group(name="g", generation=3), "delete it")
    with pytest.raises(GroupNotEmpty) as caught:
        check_empty(Group(name="g", generation=3, topics={"m": {"t"}}), "delete it")
    assert caught.value.details == {"group": "g", "members": "1"}
    assert "stop the consumers, then delete it" in caught.value.message


@pytest.mark.parametrize(
    ("offset", "records", "exact"),
    [(0, 150, True), (90, 60, True), (100, 50, True), (1000, 50, True), (1040, 10, True), (2000, 0, True)],
)
def test_lag_counts_records_not_the_distance_of_offsets(offset: int, records: int, exact: bool) -> None:
    ranges = [
        replace(RANGE, status=t.LOST, end_offset=1000),
        replace(
            RANGE, epoch=2, start_offset=1000, limit_offset=2000, registered_end=1010, end_offset=1050, status="settled"
        ),
    ]
    assert records_before(ranges, offset) == (records, exact)


def test_an_unsettled_range_may_hold_more_than_is_registered() -> None:
    assert records_before([RANGE], 40) == (60, False)
    assert records_before([RANGE], 500) == (0, False)
    assert records_before([RANGE], 1000) == (0, True), "behind its limit nothing of it can be missing"


def test_only_an_orphaned_range_is_given_up() -> None:
    assert sessions.declare_lost(RANGE, "operator x") == RangeLost(
        topic_id=TOPIC, partition=0, epoch=1, end_offset=1000, why="operator x"
    )
    assert sessions.declare_lost(replace(RANGE, status=t.SETTLED, end_offset=100), "") is None
    assert sessions.declare_lost(replace(RANGE, status=t.LOST, end_offset=1000), "") is None
    with pytest.raises(InvalidArgument, match="led by agent a"):
        sessions.declare_lost(replace(RANGE, status=t.OPEN), "")


def test_a_reset_changes_no_projection_and_a_deletion_only_the_group() -> None:
    """Committed offsets are state: a rebuild must not put old ones in the place of newer commits."""
    assert (
        row_ops(OffsetsReset("g", (OffsetChange(topic_id=TOPIC, topic="t", partition=0, offset_before=5, offset=0),)))
        == ()
    )
    assert row_ops(GroupDeleted("g")) == (Remove(t.GROUPS, {"group_name": "g"}),)
