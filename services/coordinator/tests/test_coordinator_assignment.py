"""Grants and moves: balanced, sticky, never over another epoch's offsets."""

from collections.abc import Collection
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from shproto.events import (
    EpochGranted,
    MoveRequested,
    RangeLost,
    RangeOrphaned,
    RangeSettled,
    SessionClosed,
    TopicCreated,
)
from streamhouse_coordinator.core.assignment import (
    able_to_lead,
    excess,
    grant,
    left_without_leader,
    move,
    start_of_next,
)
from streamhouse_coordinator.core.projection import row_ops
from streamhouse_coordinator.core.tables import LOST, OPEN, ORPHANED, SETTLED, PartitionRow, RangeRow, SessionRow

WIDTH = 100
TOPIC = "t" * 32


def session(name: str) -> SessionRow:
    return SessionRow(f"session-{name}", name, "ingest", f"{name}:1", f"wal-{name}", 0)


def range_of(partition: int, status: str, agent: str, *, epoch: int = 1, end: int | None = None) -> RangeRow:
    return RangeRow(TOPIC, partition, epoch, 0, WIDTH, 0, end, status, f"session-{agent}", agent, f"wal-{agent}", False)


def run(
    count: int, latest: dict[int, RangeRow], agents: list[str], full: Collection[str] = ()
) -> tuple[dict[int, EpochGranted], list[MoveRequested]]:
    waiting = [
        PartitionRow(TOPIC, number, latest[number].epoch if number in latest else 0, 0)
        for number in range(count)
        if number not in latest or latest[number].status != OPEN
    ]
    by_key = {(TOPIC, row.partition): latest[row.partition] for row in waiting if row.partition in latest}
    sessions = [session(name) for name in agents]
    held = [row for row in latest.values() if row.status == OPEN and not row.moving]
    loads = {row.session_id: sum(one.session_id == row.session_id for one in held) for row in sessions}
    full = {f"session-{name}" for name in full}
    able = able_to_lead(sessions, full)
    grants = grant({TOPIC: "orders"}, waiting, by_key, loads, able, count, WIDTH)
    for event in grants:
        loads[event.session_id] += 1
    moves = move({TOPIC: "orders"}, held, excess(loads, sessions, count, full))
    return {event.partition: event for event in grants}, moves


def apply(
    latest: dict[int, RangeRow], grants: dict[int, EpochGranted], moves: list[MoveRequested]
) -> dict[int, RangeRow]:
    after = dict(latest)
    for number, granted in grants.items():
        after[number] = row_ops(granted)[0].row  # type: ignore[union-attr]
    for event in moves:
        after[event.partition] = replace(after[event.partition], moving=True)
    return after


def test_where_the_next_epoch_starts() -> None:
    assert start_of_next(None) == 0
    assert start_of_next(range_of(0, SETTLED, "a", end=40)) == 40, "no gap after a known end"
    assert start_of_next(range_of(0, ORPHANED, "a")) == WIDTH, "past everything the lost leader may have acknowledged"
    assert start_of_next(range_of(0, LOST, "a", end=WIDTH)) == WIDTH


def test_which_partitions_events_leave_without_a_leader() -> None:
    events = [
        TopicCreated(TOPIC, "orders", 2, None, None, 2, None, 0),
        RangeSettled("a", 5, 1, 10),
        RangeOrphaned("a", 6, 1),
        RangeLost("a", 7, 1, 100, "why"),
        SessionClosed("session-a", "a", "ingest", "expired"),
    ]
    assert list(left_without_leader(events)) == [(TOPIC, 0), (TOPIC, 1), ("a", 5), ("a", 6), ("a", 7)]


def test_no_agents_no_grants() -> None:
    assert run(3, {}, []) == ({}, [])


def test_a_restarted_agent_gets_its_partitions_back() -> None:
    latest = {0: range_of(0, SETTLED, "a", end=5), 1: range_of(1, SETTLED, "a", end=5), 2: range_of(2, OPEN, "b")}
    latest |= {3: range_of(3, OPEN, "b")}
    grants, moves = run(4, latest, ["a", "b"])
    assert {number: (event.agent_id, event.epoch, event.start_offset) for number, event in grants.items()} == {
        0: ("a", 2, 5),
        1: ("a", 2, 5),
    }
    assert not moves


def test_a_new_agent_makes_the_others_move_just_enough() -> None:
    latest = {number: range_of(number, OPEN, "a") for number in range(5)}
    grants, moves = run(5, latest, ["a", "b"])
    assert not grants
    assert [move.partition for move in moves] == [3, 4]
    moving = {number: replace(row, moving=number >= 3) for number, row in latest.items()}
    assert run(5, moving, ["a", "b"]) == ({}, []), "what is on the move is not moved again"


def settled(latest: dict[int, RangeRow]) -> dict[int, RangeRow]:
    """Every move is made."""
    return {
        number: replace(row, status=SETTLED, end_offset=row.start_offset, moving=False) if row.moving else row
        for number, row in latest.items()
    }


def test_an_agent_whose_log_is_full_gives_all_up_and_gets_its_share_back() -> None:
    latest = {number: range_of(number, OPEN, "ab"[number % 2]) for number in range(6)}
    _, moves = run(6, latest, ["a", "b", "c"], full="a")
    assert {move.agent_id for move in moves} == {"a"} and len(moves) == 3
    latest = settled(apply(latest, {}, moves))
    grants, _ = run(6, latest, ["a", "b", "c"], full="a")
    assert {event.agent_id for event in grants.values()} == {"c"}, "also those whose past is in the full log"
    latest = apply(latest, grants, [])
    assert run(6, latest, ["a", "b", "c"], full="a") == ({}, [])
    assert len(run(6, latest, ["a", "b", "c"])[1]) == 2, "with room it has its share again"


def test_when_all_logs_are_full_nothing_moves() -> None:
    latest = {number: range_of(number, OPEN, "ab"[number % 2]) for number in range(6)}
    assert run(6, latest, ["a", "b"], full="ab") == ({}, [])
    assert {event.agent_id for event in run(1, {}, ["a"], full="a")[0].values()} == {"a"}, "nobody else is there"


@given(
    count=st.integers(0, 40),
    agents=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=7, unique=True),
    data=st.data(),
)
def test_it_ends_balanced_with_every_partition_led_once(count: int, agents: list[str], data: st.DataObject) -> None:
    latest = {}
    for number in range(count):
        status = data.draw(st.sampled_from([None, OPEN, ORPHANED, SETTLED]))
        agent = data.draw(st.sampled_from(agents if status == OPEN else "abcdefghij"))
        if status is not None:
            latest[number] = range_of(number, status, agent, end=50 if status == SETTLED else None)
    before = dict(latest)
    for _ in range(3):  # grants and moves; the moves settle; the rest is granted
        grants, moves = run(count, latest, agents)
        assert not any(number in latest and latest[number].status == OPEN for number in grants)
        latest = apply(latest, grants, moves)
        for number, row in latest.items():
            if row.moving:
                latest[number] = replace(row, status=SETTLED, end_offset=row.start_offset, moving=False)
    loads = [sum(row.agent_id == agent for row in latest.values()) for agent in agents]
    assert sorted(latest) == list(range(count)) and all(row.status == OPEN for row in latest.values())
    assert max(loads) - min(loads) <= 1
    assert run(count, latest, agents) == ({}, []), "stable once balanced"
    open_before = {number: row.agent_id for number, row in before.items() if row.status == OPEN}
    kept = {agent: sum(holder == agent for holder in open_before.values()) for agent in agents}
    moved = sum(latest[number].agent_id != agent for number, agent in open_before.items())
    least, extra = divmod(count, len(agents))
    shares = [least + (rank < extra) for rank in range(len(agents))]
    fewest = sum(max(0, have - share) for have, share in zip(sorted(kept.values(), reverse=True), shares, strict=True))
    assert moved <= fewest, "no more moves than balance needs"
