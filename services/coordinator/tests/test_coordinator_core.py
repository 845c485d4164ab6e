"""Tables of cases for the coordinator's decisions."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shproto.errors import AgentIdTaken, InvalidArgument, Overloaded, TopicExists
from shproto.events import (
    LogFoundTruncated,
    RangeExtended,
    RangeLost,
    RangeOrphaned,
    RangeSettled,
    SegmentRegistered,
    SessionClosed,
    SessionOpened,
    TopicCreated,
)
from shproto.limits import MESSAGE_BYTES_MAX, SNAPSHOT_BYTES_MAX, SNAPSHOTS_BYTES_MAX
from shproto.model import Segment
from streamhouse_coordinator.core import compaction, names, registration, retention, sessions, topics
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.registration import Result
from streamhouse_coordinator.core.sessions import AcknowledgedEnds, WalEnds

pytestmark = pytest.mark.quick

TOPIC = "0" * 32
KEY = (TOPIC, 0, 1)
RANGE = t.RangeRow(
    topic_id=TOPIC,
    partition=0,
    epoch=1,
    start_offset=0,
    limit_offset=1000,
    registered_end=100,
    end_offset=None,
    status=t.OPEN,
    session_id="s",
    agent_id="a",
    wal_id="w",
    moving=False,
)
SETTLED = replace(RANGE, status=t.SETTLED, end_offset=150)
NOTHING_KNOWN = AcknowledgedEnds()


def segment(base: int, end: int, name: str = "x", **changes: Any) -> Segment:
    made = Segment(
        segment_id=name,
        topic_id=TOPIC,
        topic="orders",
        partition=0,
        epoch=1,
        base_offset=base,
        end_offset=end,
        record_count=end - base,
        object_key="key",
        object_at=0,
        size_bytes=10,
        raw_bytes=20,
        first_timestamp_ms=1,
        max_timestamp_ms=2,
    )
    return replace(made, **changes)


def row(base: int, end: int, size: int = 10, name: str = "", max_ms: int = 0, lost: str = "") -> t.SegmentRow:
    name = name or f"s{base}"
    return t.SegmentRow(
        segment_id=name,
        topic_id=TOPIC,
        partition=0,
        epoch=1,
        base_offset=base,
        end_offset=end,
        record_count=end - base,
        object_key="key",
        object_at=0,
        size_bytes=size,
        raw_bytes=2 * size,
        first_timestamp_ms=0,
        max_timestamp_ms=max_ms,
        lost_reason=lost,
    )


# ---- names and topics


@pytest.mark.parametrize("name", ["a", "Orders.v1_x-2", "...", "a" * 249])
def test_legal_topic_names(name: str) -> None:
    names.check_topic(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a" * 250, "a b", "ä", "a/b", "a\n", "a:0", "a\0"])
def test_illegal_topic_names(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        names.check_topic(name)
    assert caught.value.details["field"] == "topic"


@pytest.mark.parametrize("name", ["agent-1", "Agent 1: Ühlingen", "\u7d50\u5408", "\U0001f980"])
def test_legal_names_of_agents_and_groups(name: str) -> None:
    names.check_name("agent_id", name, 249)


@pytest.mark.parametrize(
    "name", ["a\nb", "a\r", "\tb", "\x1b[2J", "a\x00", "a\x7f", "a\x85b", "a\u2028b", "a\u202eb", "", "a" * 250]
)
def test_a_name_that_would_not_stay_on_its_line_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        names.check_name("agent_id", name, 249)
    assert caught.value.details["field"] == "agent_id"
    assert caught.value.message.isprintable()


CREATE = TopicCreated(
    topic_id="",
    topic="orders",
    partitions=1,
    retention_ms=None,
    retention_bytes=None,
    min_acks=2,
    unclean_recovery_after_ms=None,
    created_ms=0,
)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"partitions": 0}, "partitions"),
        ({"partitions": 101}, "partitions"),
        ({"retention_ms": 0}, "retention_ms"),
        ({"retention_ms": 2**62}, "retention_ms"),
        ({"retention_bytes": -1}, "retention_bytes"),
        ({"unclean_recovery_after_ms": -1}, "unclean_recovery_after_ms"),
        ({"min_acks": 7}, "min_acks"),
        ({"topic": ".."}, "topic"),
    ],
)
def test_a_topic_out_of_limits_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        topics.check_create(replace(CREATE, **change), 100)
    assert caught.value.details["field"] == field


def test_creating_topics() -> None:
    topics.check_create(CREATE, 1)
    assert topics.create(CREATE, [], 0, 1) == CREATE
    with pytest.raises(TopicExists):
        topics.create(
            CREATE,
            [
                t.TopicRow(
                    topic_id=TOPIC,
                    topic="orders",
                    partitions=1,
                    retention_ms=None,
                    retention_bytes=None,
                    min_acks=2,
                    unclean_recovery_after_ms=None,
                    created_ms=0,
                )
            ],
            0,
            1,
        )
    with pytest.raises(Overloaded):
        topics.create(CREATE, [], 1, 1)


# ---- sessions

OPENED = SessionOpened(session_id="new", agent_id="a", role="ingest", address="h:1", wal_id="w", started_ms=0)


def old(session_id: str = "s", wal_id: str = "w") -> t.SessionRow:
    return t.SessionRow(session_id=session_id, agent_id="a", role="ingest", address="h:0", wal_id=wal_id, started_ms=0)


def test_the_same_log_supersedes_its_own_session_at_once_and_settles_where_its_replay_ended() -> None:
    events = sessions.open_session(OPENED, [old()], {"s"}, [RANGE], WalEnds(ends={KEY: 140}), NOTHING_KNOWN)
    assert events == [
        SessionClosed(session_id="s", agent_id="a", role="ingest", why="superseded"),
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=140),
        OPENED,
    ]


def test_without_a_word_about_a_range_it_settles_at_what_is_registered() -> None:
    assert sessions.settle_all([RANGE], WalEnds(), NOTHING_KNOWN, "new") == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=100)
    ]
    assert sessions.settle_all([replace(RANGE, status=t.ORPHANED)], WalEnds(), NOTHING_KNOWN, "new") == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=100)
    ]
    assert sessions.settle_all([SETTLED], WalEnds(ends={KEY: 500}), NOTHING_KNOWN, "new") == [], (
        "an end is declared once"
    )


def test_a_log_that_lost_its_tail_does_not_take_back_what_is_registered() -> None:
    assert sessions.settle_all([RANGE], WalEnds(ends={KEY: 50}), NOTHING_KNOWN, "new") == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=100)
    ]


@pytest.mark.parametrize(
    ("row_", "known"),
    [
        (RANGE, AcknowledgedEnds({KEY: 140})),
        (replace(RANGE, status=t.ORPHANED), AcknowledgedEnds({KEY: 140})),
        (replace(RANGE, status=t.ORPHANED, acknowledged_end=140), NOTHING_KNOWN),
    ],
)
def test_g1_a_log_that_lacks_what_it_had_announced_settles_nothing(row_: t.RangeRow, known: AcknowledgedEnds) -> None:
    """An older copy of the disk came back: what was acknowledged since is given up by nobody but an operator."""
    orphaned = [RangeOrphaned(topic_id=TOPIC, partition=0, epoch=1)] if row_.status == t.OPEN else []
    noted = (
        [LogFoundTruncated(topic_id=TOPIC, partition=0, epoch=1, log_end=120, acknowledged_end=140)]
        if row_.acknowledged_end is None
        else []
    )
    assert sessions.settle_all([row_], WalEnds(ends={KEY: 120}), known, "new") == [*orphaned, *noted]
    nothing_left = sessions.settle_all([row_], WalEnds(), known, "new")
    assert [type(event).__name__ for event in nothing_left] == [type(event).__name__ for event in [*orphaned, *noted]]
    assert sessions.settle_all([row_], WalEnds(ends={KEY: 140}), known, "new") == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=140)
    ]
    durable = AcknowledgedEnds(known.announced, {TOPIC})
    assert sessions.settle_all([row_], WalEnds(ends={KEY: 120}), durable, "new") == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=120)
    ]


def test_g2_a_damaged_log_settles_at_the_limit_what_its_replay_cannot_tell() -> None:
    unknown = WalEnds(ends={KEY: 140}, unknown=True)
    other = replace(RANGE, partition=1)
    assert sessions.settle_all([RANGE, other], unknown, NOTHING_KNOWN, "new") == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=140),
        RangeSettled(topic_id=TOPIC, partition=1, epoch=1, end_offset=RANGE.limit_offset),
    ]
    durable = sessions.settle_all([other], unknown, AcknowledgedEnds({}, {TOPIC}), "new")
    assert durable == [RangeSettled(topic_id=TOPIC, partition=1, epoch=1, end_offset=100)], (
        "nothing beyond was acknowledged, or read"
    )


def test_a_range_granted_to_the_session_whose_opening_is_retried_was_never_written_to() -> None:
    fresh = replace(RANGE, session_id="new", registered_end=RANGE.start_offset)
    settled = sessions.settle_all([replace(fresh, status=t.ORPHANED)], WalEnds(unknown=True), NOTHING_KNOWN, "new")
    assert settled == [RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=RANGE.start_offset)]


def test_an_opened_session_is_found_again_by_whoever_opened_it() -> None:
    session = t.SessionRow(session_id="new", agent_id="a", role="ingest", address="h:1", wal_id="w", started_ms=7)
    assert sessions.reopened(session, OPENED) is session
    for other in ({"agent_id": "b"}, {"role": "query"}, {"address": "h:2"}, {"wal_id": "v"}):
        with pytest.raises(InvalidArgument):
            sessions.reopened(replace(session, **other), OPENED)


def test_g2_with_a_torn_log_the_next_epochs_are_granted_before_the_ends_are_declared() -> None:
    events = sessions.open_session(
        OPENED, [old()], {"s"}, [RANGE, SETTLED], WalEnds(ends={KEY: 140}, torn=True), NOTHING_KNOWN
    )
    assert events == [
        SessionClosed(session_id="s", agent_id="a", role="ingest", why="superseded"),
        RangeOrphaned(topic_id=TOPIC, partition=0, epoch=1),
        OPENED,
    ]


def test_an_end_beyond_the_range_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        sessions.settle_all([RANGE], WalEnds(ends={KEY: 1001}), NOTHING_KNOWN, "new")


def test_another_log_under_the_same_agent_id() -> None:
    with pytest.raises(AgentIdTaken):
        sessions.open_session(OPENED, [old(wal_id="other")], {"s"}, [], WalEnds(), NOTHING_KNOWN)
    foreign = replace(RANGE, wal_id="other")
    events = sessions.open_session(OPENED, [old(wal_id="other")], set(), [foreign], WalEnds(), NOTHING_KNOWN)
    assert events == [
        RangeOrphaned(topic_id=TOPIC, partition=0, epoch=1),
        SessionClosed(session_id="s", agent_id="a", role="ingest", why="expired"),
        OPENED,
    ]


def test_ranges_of_a_leader_that_is_gone() -> None:
    assert sessions.end_leadership([RANGE], durable_topics=()) == [RangeOrphaned(topic_id=TOPIC, partition=0, epoch=1)]
    assert sessions.end_leadership([RANGE], durable_topics={TOPIC}) == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=100)
    ], "durable: no wait"
    assert sessions.end_leadership([SETTLED], durable_topics=()) == []


def test_settling_is_repeatable_and_only_for_the_leader() -> None:
    session = old()
    assert sessions.settle(session, {KEY: RANGE}, {KEY: 140}, NOTHING_KNOWN) == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=140)
    ]
    assert sessions.settle(session, {KEY: SETTLED}, {KEY: 150}, NOTHING_KNOWN) == []
    assert sessions.settle(session, {}, {KEY: 150}, NOTHING_KNOWN) == [], "the topic was deleted"
    for row_, end in ((replace(RANGE, wal_id="other"), 140), (RANGE, 99), (RANGE, 1001)):
        with pytest.raises(InvalidArgument):
            sessions.settle(session, {KEY: row_}, {KEY: end}, NOTHING_KNOWN)


def test_g1_a_leader_settles_nothing_below_what_it_announced() -> None:
    announced = AcknowledgedEnds({KEY: 140})
    with pytest.raises(InvalidArgument, match="acknowledged up to 140"):
        sessions.settle(old(), {KEY: RANGE}, {KEY: 139}, announced)
    assert sessions.settle(old(), {KEY: RANGE}, {KEY: 140}, announced) == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=140)
    ]
    durable = AcknowledgedEnds({KEY: 140}, {TOPIC})
    assert sessions.settle(old(), {KEY: RANGE}, {KEY: 120}, durable) == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=120)
    ]


def test_a_range_that_waits_for_what_its_log_lacks_keeps_no_agent_from_leaving() -> None:
    waits = replace(RANGE, status=t.ORPHANED, acknowledged_end=140)
    assert sessions.settle(old(), {KEY: waits}, {KEY: 120}, NOTHING_KNOWN) == []
    assert sessions.settle(old(), {KEY: waits}, {KEY: 150}, NOTHING_KNOWN) == [
        RangeSettled(topic_id=TOPIC, partition=0, epoch=1, end_offset=150)
    ]
    with pytest.raises(InvalidArgument):
        sessions.settle(old(wal_id="other"), {KEY: waits}, {KEY: 120}, NOTHING_KNOWN)


def test_ranges_are_extended_when_a_quarter_is_left() -> None:
    assert sessions.extend(RANGE, 751, 1000) == RangeExtended(topic_id=TOPIC, partition=0, epoch=1, limit_offset=2000)
    assert sessions.extend(RANGE, 750, 1000) is None
    assert sessions.extend(SETTLED, 999, 1000) is None


def test_giving_up_a_range() -> None:
    orphaned = replace(RANGE, status=t.ORPHANED, orphaned_ms=1000)
    assert sessions.lose_unclean(orphaned, 50, 1049) is None
    assert sessions.lose_unclean(orphaned, 50, 1050) == RangeLost(
        topic_id=TOPIC, partition=0, epoch=1, end_offset=1000, why="unclean_recovery_after_ms"
    )
    assert sessions.lose_unclean(replace(orphaned, orphaned_ms=0), 50, 10**15) is None, "nobody knows since when"


def snapshot(epoch: int, end: int) -> t.ProducerSnapshotRow:
    return t.ProducerSnapshotRow(
        topic_id=TOPIC, partition=0, epoch=epoch, end_offset=end, snapshot=f"{epoch}@{end}".encode()
    )


def test_which_producers_state_a_leader_gets() -> None:
    earlier = [snapshot(1, 100), snapshot(1, 140)]
    assert sessions.snapshot_for(replace(RANGE, epoch=2), earlier) == b"1@140", "a new range: the latest"
    own = [*earlier, snapshot(2, 60), snapshot(2, 90), snapshot(2, 110)]
    assert sessions.snapshot_for(replace(RANGE, epoch=2), own) == b"2@90", "a resumed one: at registered_end"
    assert sessions.snapshot_for(RANGE, []) == b""


@pytest.mark.parametrize(
    ("sizes_bytes", "reported"),
    [
        ([], 0),
        ([5], 1),
        ([11], 1),
        ([11, 1], 1),
        ([4, 6], 2),
        ([4, 6, 1], 2),
        ([4, 7, 1], 1),
        ([0, 0, 11, 0], 2),
    ],
)
def test_how_many_producers_states_an_answer_tells(
    monkeypatch: pytest.MonkeyPatch, sizes_bytes: list[int], reported: int
) -> None:
    """The first, whatever its size; none behind one that is omitted."""
    monkeypatch.setattr(sessions, "SNAPSHOTS_BYTES_MAX", 10)
    assert sessions.reported_count(sizes_bytes) == reported


def test_the_largest_answer_fits_into_a_message() -> None:
    largest = max(SNAPSHOT_BYTES_MAX, SNAPSHOTS_BYTES_MAX)
    assert largest <= MESSAGE_BYTES_MAX // 2, "the other half is for what else 100,000 grants say"


def test_where_an_older_epoch_has_a_producers_state_a_newer_one_has() -> None:
    """What is omitted from an answer goes by it."""
    snapshots = [snapshot(2, 60), snapshot(2, 90), snapshot(3, 95)]
    for end in (0, 60, 95):
        rows = [replace(RANGE, epoch=epoch, registered_end=end) for epoch in range(1, 6)]
        found = [sessions.newest_for(row, snapshots) is not None for row in rows]
        assert found == sorted(found) and found[-1]


def test_producers_state_of_fenced_records_is_not_used() -> None:
    assert sessions.usable(snapshot(1, 150), SETTLED)
    assert not sessions.usable(snapshot(1, 151), SETTLED)
    assert not sessions.usable(snapshot(1, 101), replace(RANGE, status=t.LOST, end_offset=1000))
    assert not sessions.usable(snapshot(1, 1), None)


def test_what_a_settled_range_says_of_its_producers_follows_what_was_known() -> None:
    declared = WalEnds(ends={KEY: 150}, snapshots={KEY: b"tail"})
    known = {(TOPIC, 0): [snapshot(1, 90), snapshot(1, 120)]}
    kept = t.ProducerSnapshotRow(topic_id=TOPIC, partition=0, epoch=1, end_offset=150, snapshot=b"1@90tail")
    assert sessions.settled_snapshots([SETTLED], declared, known) == [kept]
    assert sessions.usable(kept, SETTLED) and sessions.snapshot_for(replace(RANGE, epoch=2), [kept]) == b"1@90tail"
    two = replace(SETTLED, epoch=2, start_offset=150, registered_end=150, end_offset=170)
    both = WalEnds(ends={KEY: 150, two.key: 170}, snapshots={KEY: b"tail", two.key: b"more"})
    assert [row.snapshot for row in sessions.settled_snapshots([two, SETTLED], both, known)] == [
        b"1@90tail",
        b"1@90tailmore",
    ]


def test_nothing_is_kept_of_producers_where_nothing_is_left_to_register() -> None:
    declared = {KEY: b"tail"}
    assert sessions.settled_snapshots([SETTLED], WalEnds(ends={KEY: 140}, snapshots=declared), {}) == [], (
        "settled elsewhere"
    )
    registered = replace(SETTLED, registered_end=150)
    assert sessions.settled_snapshots([registered], WalEnds(ends={KEY: 150}, snapshots=declared), {}) == []
    assert sessions.settled_snapshots([SETTLED], WalEnds(ends={KEY: 150}), {}) == []


# ---- registration


@pytest.mark.parametrize(
    ("offered", "held", "expected"),
    [
        (segment(100, 120), RANGE, Result.REGISTERED),
        (segment(80, 100), RANGE, Result.COVERED),
        (segment(90, 110), RANGE, Result.FENCED),
        (segment(110, 120), RANGE, Result.EARLY),
        (segment(100, 1001), RANGE, Result.FENCED),
        (segment(100, 150), SETTLED, Result.REGISTERED),
        (segment(100, 151), SETTLED, Result.FENCED),
        (segment(120, 151), SETTLED, Result.FENCED),
        (segment(120, 130), SETTLED, Result.EARLY),
        (segment(100, 120), replace(RANGE, status=t.ORPHANED), Result.REGISTERED),
        (segment(100, 120), replace(RANGE, status=t.LOST, end_offset=1000), Result.FENCED),
        (segment(100, 120), None, Result.FENCED),
    ],
)
def test_judging_a_segment(offered: Segment, held: t.RangeRow | None, expected: Result) -> None:
    assert registration.judge(offered, held) == expected


def register(
    segments: list[Segment], known: set[str] | None = None, lost: list[t.LostSpanRow] | None = None
) -> registration.Registration:
    keys = {item.object_key for item in segments}
    return registration.register(
        segments,
        ranges={KEY: RANGE},
        known_ids=known or set(),
        lost=lost or [],
        topics={TOPIC: "orders"},
        buffer_id="b",
        declared=keys,
    )


def test_segments_of_one_object_register_in_offset_order_and_answer_in_the_order_asked() -> None:
    done = register([segment(120, 130, "b"), segment(100, 120, "a"), segment(140, 150, "c"), segment(90, 100, "d")])
    assert done.results == [Result.REGISTERED, Result.REGISTERED, Result.EARLY, Result.COVERED]
    assert [event.segment.segment_id for event in done.events if isinstance(event, SegmentRegistered)] == ["a", "b"]
    assert done.ranges[KEY].registered_end == 130


def test_a_segment_registered_before_is_registered_without_another_event() -> None:
    done = register([segment(80, 100, "a")], known={"a"})
    assert (done.results, done.events) == ([Result.REGISTERED], [])


def lost(base: int, end: int) -> t.LostSpanRow:
    return t.LostSpanRow(topic_id=TOPIC, partition=0, epoch=1, base_offset=base, end_offset=end, reason="bit rot")


def test_a_hole_is_filled_as_soon_as_registration_reaches_it() -> None:
    done = register([segment(100, 110, "a"), segment(120, 130, "b")], lost=[lost(110, 120)])
    assert done.results == [Result.REGISTERED, Result.REGISTERED]
    spans = [(e.segment.base_offset, e.segment.end_offset, e.segment.lost_reason) for e in done.events]  # type: ignore[attr-defined]
    assert spans == [(100, 110, ""), (110, 120, "bit rot"), (120, 130, "")]
    assert done.lost_done == [lost(110, 120)]


def test_holes_that_are_early_wait_and_those_that_are_covered_are_done() -> None:
    done = register([], lost=[lost(50, 60), lost(200, 210)])
    assert (done.events, done.lost_done, done.ranges[KEY].registered_end) == ([], [lost(50, 60)], 100)
    partly = register([], lost=[lost(90, 105)])
    assert partly.ranges[KEY].registered_end == 105, "what of the hole is registered stays"


def test_what_of_a_buffer_is_left() -> None:
    def item(base: int, end: int, epoch: int = 1) -> t.BufferSliceRow:
        return t.BufferSliceRow(
            buffer_id="b",
            topic_id=TOPIC,
            partition=0,
            epoch=epoch,
            base_offset=base,
            end_offset=end,
            record_count=end - base,
            size_bytes=10,
        )

    ranges = {KEY: SETTLED, (TOPIC, 0, 3): replace(RANGE, epoch=3, status=t.LOST, end_offset=1000)}
    slices = [
        item(50, 100),
        item(90, 120),
        item(120, 150),
        item(150, 160),
        item(0, 1, epoch=2),
        item(100, 110, epoch=3),
    ]
    left = registration.unresolved(slices, ranges)
    assert left == [replace(item(90, 120), base_offset=100, record_count=20), item(120, 150)]


# ---- retention

POLICY = t.TopicRow(
    topic_id=TOPIC,
    topic="orders",
    partitions=1,
    retention_ms=100,
    retention_bytes=25,
    min_acks=2,
    unclean_recovery_after_ms=None,
    created_ms=0,
)
PARTITION = t.PartitionRow(topic_id=TOPIC, partition=0, epoch=1, log_start_offset=0)


@pytest.mark.parametrize(
    ("policy", "segments", "expected"),
    [
        (POLICY, [], None),
        (POLICY, [row(0, 10, max_ms=900), row(10, 20, max_ms=950)], None),
        (POLICY, [row(0, 10, max_ms=899), row(10, 20, max_ms=950)], (10, "retention_ms")),
        (POLICY, [row(0, 10, max_ms=950), row(10, 20, max_ms=950), row(20, 30, 15, max_ms=1)], (10, "retention_bytes")),
        (POLICY, [row(0, 10, max_ms=1), row(20, 30, max_ms=1)], (30, "retention_ms")),
        (
            replace(POLICY, retention_ms=None),
            [row(0, 10, 10), row(10, 20, 20), row(20, 30, 10), row(30, 40, 15)],
            (20, "retention_bytes"),
        ),
        # What is kept is never less than retention_bytes, were it one segment that is larger.
        (replace(POLICY, retention_ms=None), [row(0, 10, 10), row(10, 20, 24)], None),
        (replace(POLICY, retention_ms=None), [row(0, 10, 1000)], None),
        (replace(POLICY, retention_bytes=None), [row(0, 10, 100, max_ms=950)], None),
        (replace(POLICY, retention_ms=None, retention_bytes=None), [row(0, 10, 100)], None),
    ],
)
def test_retention(policy: t.TopicRow, segments: list[t.SegmentRow], expected: tuple[int, str] | None) -> None:
    size_bytes = sum(item.size_bytes for item in segments)
    event = retention.retain(policy, PARTITION, segments, size_bytes, 1000)
    assert (None if event is None else (event.log_start_offset, event.why)) == expected
    if event is not None:
        gone = [item for item in segments if item.segment_id in event.removed_segment_ids]
        assert gone == [item for item in segments if item.end_offset <= event.log_start_offset]


def test_the_log_start_never_moves_back() -> None:
    event = retention.retain(POLICY, replace(PARTITION, log_start_offset=50), [row(0, 10, max_ms=1)], 10, 1000)
    assert event is not None and event.log_start_offset == 50


# ---- compaction


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([], []),
        ([row(0, 1), row(1, 2)], []),
        ([row(0, 1), row(1, 2), row(2, 3)], [0, 1, 2]),
        ([row(0, 1), row(2, 3), row(3, 4), row(4, 5)], [2, 3, 4]),
        ([row(0, 1), row(1, 2, 50), row(2, 3), row(3, 4), row(4, 5)], [2, 3, 4]),
        ([row(0, 1), row(1, 2, lost="hole"), row(2, 3), row(3, 4), row(4, 5)], [2, 3, 4]),
        ([row(0, 1, 19), row(1, 2, 19), row(2, 3, 19), row(3, 4, 9), row(4, 5, 9)], [0, 1]),
        ([row(0, 1, 19), row(1, 2, 5), row(2, 3, 5), row(3, 4, 5)], [1, 2, 3]),
        ([row(0, 1, 19), row(1, 2, 5), row(2, 3, 5)], []),
        ([row(0, 1, 19), row(1, 2, 5), row(2, 3, 5), row(3, 4, 40)], [0, 1, 2]),
        ([row(0, 1), row(1, 2), row(2, 3), row(3, 4), row(4, 5), row(5, 6)], [0, 1, 2, 3, 4]),
        ([row(0, 1), row(1, 2), row(2, 3), row(9, 10)], [0, 1, 2]),
    ],
)
def test_choosing_what_to_merge(segments: list[t.SegmentRow], expected: list[int]) -> None:
    run = compaction.choose(segments, small_bytes_max=20, target_bytes=50, segments_min=3)
    assert [item.base_offset for item in run] == expected


def test_a_nearly_full_segment_is_not_taken_along_for_a_few_small_ones() -> None:
    """Every merge wrote the merged segment of the one before again, with the few that came since."""
    old = row(0, 100, 15_000)
    new = [row(base, base + 1, 100) for base in range(100, 110)]
    assert compaction.choose([old, *new], 16_000, 64_000, 8) == new


def test_segments_that_are_left_out_close_a_run() -> None:
    segments = [row(0, 1, 9), row(1, 2, 5), row(2, 3, 1)]
    assert compaction.choose(segments, 20, 50, 3) == []
    assert compaction.choose(segments, 20, 50, 3, followed={3}) == segments
    assert compaction.choose(segments, 20, 50, 3, followed={2, 4}) == []


@given(
    sizes=st.lists(st.one_of(st.integers(1, 20), st.integers(1, 5000)), max_size=150),
    gaps=st.sets(st.integers(0, 150), max_size=3),
    segments_min=st.integers(2, 8),
)
def test_merging_comes_to_rest_with_bounded_runs_and_bounded_rewrites(
    sizes: list[int], gaps: set[int], segments_min: int
) -> None:
    small, target = 1000, 4000
    segments = [row(2 * at + (at in gaps), 2 * at + 2, size) for at, size in enumerate(sizes)]
    writes = dict.fromkeys((item.segment_id for item in segments), 0)
    while chosen := compaction.choose(segments, small, target, segments_min):
        total = sum(item.size_bytes for item in chosen)
        assert len(chosen) > 1 and total <= target
        assert all(one.end_offset == other.base_offset for one, other in pairwise(chosen))
        assert max(item.size_bytes for item in chosen) < small
        at = segments.index(chosen[0])
        merged = row(chosen[0].base_offset, chosen[-1].end_offset, total, name=f"merged {len(writes)}")
        writes[merged.segment_id] = 1 + max(writes[item.segment_id] for item in chosen)
        segments[at : at + len(chosen)] = [merged]
    for run in compaction.runs(segments, small):
        assert len(run.segments) <= compaction.RUN_SEGMENTS_MAX
        assert not run.closed or len(run.segments) < segments_min
        assert sum(item.size_bytes for item in run.segments) <= target
    # To the base segments_min, and once each to fill a segment, for an end, and for a run that was too long.
    assert max(writes.values(), default=0) <= math.log(target, segments_min) + 3


def test_claims_look_at_the_most_crowded_partitions_and_at_the_others_by_turns() -> None:
    """Twenty partitions with many small segments and nothing to merge kept all others from ever being looked at."""
    counts = {(TOPIC, number): 100 if number < 50 else 10 for number in range(200)} | {(TOPIC, 300): 7}
    looked = [compaction.partitions_to_look_at(counts, 8, f"claim {number}") for number in range(40)]
    assert all(len(set(keys)) == len(keys) == compaction.LOOKS_MAX for keys in looked)
    assert all(counts[key] == 100 for keys in looked for key in keys[: compaction.CROWDED_LOOKS])
    assert {key for keys in looked for key in keys} == counts.keys() - {(TOPIC, 300)}


def test_a_merged_segment_takes_the_place_of_just_what_it_holds() -> None:
    replaced = [row(0, 10), row(10, 20)]
    merged = segment(0, 20, "m")
    assert compaction.judge(merged, replaced, 2, known=False, declared=True) == Result.REGISTERED
    assert compaction.judge(merged, [], 2, known=True, declared=False) == Result.REGISTERED, "an earlier try succeeded"
    for bad, rows, asked in (
        (merged, replaced[:1], 2),  # one is gone
        (merged, [], 0),
        (replace(merged, end_offset=21), replaced, 2),
        (replace(merged, base_offset=1), replaced, 2),
        (replace(merged, partition=1), replaced, 2),
        (replace(merged, topic_id="f" * 32), replaced, 2),
        (replace(merged, record_count=19), replaced, 2),
        (merged, [row(0, 10), row(11, 20)], 2),
        (merged, [row(0, 10), row(10, 20, lost="hole")], 2),
    ):
        assert compaction.judge(bad, rows, asked, known=False, declared=True) == Result.FENCED
