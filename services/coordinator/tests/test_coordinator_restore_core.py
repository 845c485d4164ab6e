"""A restored partition: the selection of stored segments, the jump, unrecovered ranges and their split."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shproto.acks import ACKS_DURABLE, ACKS_WAL
from shproto.errors import InvalidArgument, MetadataWentBack
from shproto.events import PartitionRestored, RangeOrphaned
from shproto.model import Segment
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.assignment import start_of_next
from streamhouse_coordinator.recovery import backup_format as fmt
from streamhouse_coordinator.recovery.histories import Head, check_log, check_seen
from streamhouse_coordinator.recovery.restore_plan import (
    JUMP_EPOCHS,
    JUMP_OFFSETS,
    BackedUpPartition,
    restore_partition,
)
from streamhouse_coordinator.recovery.segment_selection import EpochSpan, SegmentCandidate, select_segments
from streamhouse_coordinator.recovery.unrecovered_ranges import Reported, is_blank, is_unrecovered, released, split

pytestmark = pytest.mark.quick

TOPIC = t.TopicRow(
    topic_id="aa" * 16,
    topic="orders",
    partitions=1,
    retention_ms=None,
    retention_bytes=None,
    min_acks=ACKS_WAL,
    unclean_recovery_after_ms=None,
    created_ms=0,
)
WIDTH = 1000


def segment(base: int, end: int, epoch: int = 1, name: str = "") -> Segment:
    name = name or f"{epoch}-{base}-{end}"
    return Segment(
        segment_id=name,
        topic_id=TOPIC.topic_id,
        topic="orders",
        partition=0,
        epoch=epoch,
        base_offset=base,
        end_offset=end,
        record_count=end - base,
        object_key=f"data/{name}",
        object_at=0,
        size_bytes=9,
        raw_bytes=9,
        first_timestamp_ms=0,
        max_timestamp_ms=0,
    )


def found(base: int, end: int, epoch: int = 1, *, spans: Sequence[EpochSpan] = ()) -> SegmentCandidate:
    return SegmentCandidate(segment(base, end, epoch), tuple(spans) or (EpochSpan(epoch, base, end),))


def known(base: int, end: int, epoch: int = 1) -> SegmentCandidate:
    return SegmentCandidate(segment(base, end, epoch), (), registered=True)


def owned(
    epoch: int, start: int, registered: int, end: int | None = None, status: str = "", **changes: object
) -> t.RangeRow:
    state = status or (t.SETTLED if end is not None else t.OPEN)
    row = t.RangeRow(
        topic_id=TOPIC.topic_id,
        partition=0,
        epoch=epoch,
        start_offset=start,
        limit_offset=start + WIDTH,
        registered_end=registered,
        end_offset=end,
        status=state,
        session_id="s",
        agent_id="a",
        wal_id="bb" * 16,
        moving=False,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def chosen(*candidates: SegmentCandidate, ranges: Sequence[t.RangeRow] = (), **options: bool) -> list[tuple[int, int]]:
    flags = {"has_retention": False, "accept_holes": False} | options
    return [(c.base_offset, c.end_offset) for c in select_segments(0, ranges, candidates, **flags).chosen]


# ---- the cover


def test_registered_segments_are_kept_and_what_follows_is_added() -> None:
    ranges = [owned(1, 0, 20)]
    assert chosen(known(0, 10), known(10, 20), found(20, 25), ranges=ranges) == [(0, 10), (10, 20), (20, 25)]
    # The merged one holds the same; two that are registered beat one that is not.
    assert chosen(known(0, 10), known(10, 20), found(0, 20), ranges=ranges) == [(0, 10), (10, 20)]


def test_a_merged_segment_takes_the_place_of_missing_ones() -> None:
    assert chosen(known(0, 10), found(10, 30), found(0, 30), ranges=[owned(1, 0, 30)]) == [(0, 30)]
    assert chosen(known(10, 20), found(0, 30), ranges=[owned(1, 0, 30)]) == [(0, 30)]


def test_of_repeated_uploads_those_that_reach_farthest() -> None:
    assert chosen(found(0, 10), found(0, 15), found(10, 25), found(25, 30), found(15, 20)) == [
        (0, 10),
        (10, 25),
        (25, 30),
    ]


def test_records_beyond_the_start_of_a_later_epoch_are_void() -> None:
    result = chosen(found(0, 10), found(10, 20), found(10, 15, epoch=2), found(15, 17, epoch=2))
    assert result == [(0, 10), (10, 15), (15, 17)]


def test_records_beyond_a_known_end_are_void() -> None:
    assert chosen(known(0, 10), found(10, 20), ranges=[owned(1, 0, 10, end=10)]) == [(0, 10)]
    lost = owned(1, 0, 10, end=WIDTH, status=t.LOST)
    assert chosen(known(0, 10), found(10, 20), ranges=[lost]) == [(0, 10)], "given up, registration would fence it"


def test_what_lies_behind_a_hole_is_left_out_unless_it_is_accepted() -> None:
    candidates = [found(0, 10), found(20, 30), found(30, 40), found(50, 60, epoch=2)]
    result = select_segments(0, [], candidates, has_retention=False, accept_holes=False)
    assert [c.base_offset for c in result.chosen] == [0, 50]
    assert [c.base_offset for c in result.stranded] == [20, 30] and result.lost == []
    result = select_segments(0, [], candidates, has_retention=False, accept_holes=True)
    assert [c.base_offset for c in result.chosen] == [0, 20, 30, 50] and result.lost == [EpochSpan(1, 10, 20)]


def test_registered_records_that_no_object_holds_are_lost() -> None:
    ranges = [owned(1, 0, 20, end=20), owned(2, 20, 40)]
    result = select_segments(0, ranges, [known(0, 10), known(30, 40, 2)], has_retention=False, accept_holes=False)
    assert result.lost == [EpochSpan(1, 10, 20), EpochSpan(2, 20, 30)] and len(result.chosen) == 2


@pytest.mark.parametrize("has_retention", [False, True])
def test_the_segment_that_the_log_starts_in_is_kept(has_retention: bool) -> None:
    """Where records were deleted up to an offset inside it."""
    ranges = [owned(1, 0, 20)]
    result = select_segments(5, ranges, [known(0, 10), known(10, 20)], has_retention=has_retention, accept_holes=False)
    assert [(item.base_offset, item.end_offset) for item in result.chosen] == [(0, 10), (10, 20)]
    assert (result.log_start_offset, result.lost, result.stranded) == (5, [], [])


def test_retention_has_removed_what_is_missing_at_the_beginning() -> None:
    ranges = [owned(1, 0, 20, end=20), owned(2, 20, 40)]
    result = select_segments(0, ranges, [known(30, 40, 2)], has_retention=True, accept_holes=False)
    assert (result.log_start_offset, result.lost) == (30, [])
    result = select_segments(0, ranges, [], has_retention=True, accept_holes=False)
    assert (result.log_start_offset, result.lost, result.chosen) == (40, [], [])


def test_a_merged_segment_of_several_epochs_counts_for_each() -> None:
    merged = found(0, 30, 2, spans=[EpochSpan(1, 0, 10), EpochSpan(2, 10, 30)])
    rows = restored(ranges=[owned(1, 0, 0)], epoch=1, candidates=[merged])
    assert [(r.epoch, r.start_offset, r.registered_end, r.status) for r in rows[:2]] == [
        (1, 0, 10, t.SETTLED),
        (2, 10, 30, t.ORPHANED),
    ]


# ---- ranges


def restored(
    ranges: Sequence[t.RangeRow], epoch: int, candidates: Sequence[SegmentCandidate] = (), topic: t.TopicRow = TOPIC
) -> list[t.RangeRow]:
    """The ranges once the event is applied."""
    of_partition = BackedUpPartition(
        topic=topic,
        partition=t.PartitionRow(topic_id=topic.topic_id, partition=0, epoch=epoch, log_start_offset=0),
        ranges=ranges,
        segments=[],
        present=(),
        candidates=list(candidates),
    )
    result = restore_partition(of_partition, accept_holes=False)
    return applied(ranges, result.events)


def applied(ranges: Sequence[t.RangeRow], events: Sequence[object]) -> list[t.RangeRow]:
    rows = {row.epoch: row for row in ranges}
    for event in events:
        if isinstance(event, PartitionRestored):
            for item in event.ranges:
                rows[item.epoch] = t.RangeRow(
                    topic_id=TOPIC.topic_id,
                    partition=0,
                    epoch=item.epoch,
                    start_offset=item.start_offset,
                    limit_offset=item.limit_offset,
                    registered_end=item.registered_end,
                    end_offset=item.end_offset,
                    status=item.status,
                    session_id="",
                    agent_id=item.agent_id,
                    wal_id=item.wal_id,
                    moving=False,
                )
            for epoch in event.removed_epochs:
                del rows[epoch]
        else:
            assert isinstance(event, RangeOrphaned) and rows[event.epoch].status == t.ORPHANED
    return [rows[epoch] for epoch in sorted(rows)]


def test_the_next_range_begins_far_beyond_all_that_may_have_been_given_out() -> None:
    rows = restored([owned(3, 100, 100)], epoch=3)
    assert rows[-1].epoch == 3 + JUMP_EPOCHS
    assert start_of_next(rows[-1]) == 100 + WIDTH + JUMP_OFFSETS


def test_an_unrecovered_range_lies_between_what_is_known_and_the_jump() -> None:
    one, unrecovered = restored([owned(1, 0, 20)], epoch=1)
    assert (one.status, one.limit_offset, one.wal_id) == (t.ORPHANED, 20, "bb" * 16), "it may still grow"
    assert is_blank(unrecovered) and (unrecovered.start_offset, unrecovered.limit_offset) == (20, WIDTH + JUMP_OFFSETS)


def test_a_durable_topic_has_no_unrecovered_range() -> None:
    rows = restored([owned(1, 0, 20)], 1, [found(30, 40, 2)], replace(TOPIC, min_acks=ACKS_DURABLE))
    assert [(row.status, row.end_offset) for row in rows] == [
        (t.SETTLED, 20),
        (t.SETTLED, 40),
        (t.SETTLED, rows[-1].start_offset),
    ]
    assert start_of_next(rows[-1]) > JUMP_OFFSETS


def test_a_partition_nobody_had_led_has_an_unrecovered_range_from_the_beginning() -> None:
    (unrecovered,) = restored([], epoch=0)
    assert is_blank(unrecovered) and (unrecovered.epoch, unrecovered.start_offset) == (JUMP_EPOCHS, 0)


def test_released_unrecovered_ranges_are_empty_and_keep_the_jump() -> None:
    rows = [released(row) for row in restored([owned(1, 0, 20)], epoch=1) if is_unrecovered(row)]
    (row,) = rows
    assert row.start_offset == row.registered_end == row.end_offset == row.limit_offset
    assert start_of_next(row) == WIDTH + JUMP_OFFSETS


# ---- unrecovered ranges


def ranges_after(
    rows: Sequence[t.RangeRow], wal_id: str, *reported: tuple[int, int, int]
) -> list[tuple[int, int, int, str]]:
    result = split(rows, [Reported(*item) for item in reported], wal_id[:1], wal_id)
    by_epoch = {row.epoch: row for row in rows} | {row.epoch: row for row in result.ranges}
    return [
        (row.epoch, row.start_offset, row.limit_offset, row.wal_id)
        for epoch, row in sorted(by_epoch.items())
        if epoch not in result.removed_epochs
    ]


def test_an_agent_takes_its_part_out_of_the_unrecovered_range() -> None:
    rows = restored([owned(1, 0, 20, wal_id="a")], epoch=1)
    last, end = rows[-1].epoch, rows[-1].limit_offset
    assert ranges_after(rows, "a", (1, 20, 25), (4, 2000, 2010)) == [
        (1, 0, 25, "a"),
        (3, 25, 2000, ""),
        (4, 2000, 2010, "a"),
        (last, 2010, end, ""),
    ]


def test_the_epoch_right_behind_leaves_its_predecessor_the_rest() -> None:
    rows = restored([owned(1, 0, 20, wal_id="a")], epoch=1)
    last, end = rows[-1].epoch, rows[-1].limit_offset
    assert ranges_after(rows, "b", (2, 30, 35)) == [(1, 0, 30, "a"), (2, 30, 35, "b"), (last, 35, end, "")]


def test_what_was_found_of_an_epoch_gives_way_to_a_log_that_has_more_before_it() -> None:
    rows = restored([owned(1, 0, 20, wal_id="a")], 1, [found(40, 50, epoch=3)])
    result = split(rows, [Reported(3, 30, 60)], "b", "b")
    assert result.reset == [3], "nothing of it had been registered, or the log would not have its beginning"
    by_epoch = {row.epoch: row for row in result.ranges}
    assert (by_epoch[3].start_offset, by_epoch[3].registered_end, by_epoch[3].limit_offset) == (30, 30, 60)


def test_records_beyond_the_next_epochs_start_do_not_count() -> None:
    rows = restored([owned(1, 0, 20, wal_id="a")], 1, [found(40, 50, epoch=2)])
    result = split(rows, [Reported(1, 20, 45)], "a", "a")
    assert result.ends == {1: 40}


def test_another_log_does_not_get_the_range_of_a_known_one() -> None:
    rows = restored([owned(1, 0, 20, wal_id="a")], epoch=1)
    result = split(rows, [Reported(1, 20, 45)], "b", "b")
    assert (result.ranges, result.ends) == ([], {})


# ---- any history


@dataclass
class Epoch:
    """Written in its log up to `written`, registered up to `registered`; [start, limit)."""

    number: int
    wal_id: str
    start: int
    registered: int
    written: int
    limit: int
    settled: bool
    cuts: list[int] = field(default_factory=list)
    early: tuple[int, int] | None = None  # uploaded, not registered
    fenced: int = (
        0  # so many records beyond the end it was settled at were uploaded: by a leader that was none any more
    )


@st.composite
def pasts(draw: st.DrawFn) -> tuple[list[Epoch], int, int]:
    """Epochs; how many of them the backup knows; up to where the last of these was registered then."""
    epochs: list[Epoch] = []
    at = 0
    for number in range(1, draw(st.integers(1, 6)) + 1):
        registered = at + draw(st.just(0) | st.integers(0, 30))
        written = registered + draw(st.integers(0, 20))
        settled = draw(st.booleans())
        cuts = sorted(draw(st.sets(st.integers(at, registered), max_size=4)) | {at, registered})
        early = None
        if written - registered >= 2 and draw(st.booleans()):
            base = draw(st.integers(registered, written - 1))
            early = (base, draw(st.integers(base + 1, written)))
        wal_id = draw(st.sampled_from("abc"))
        fenced = draw(st.integers(0, 5)) if settled else 0
        epochs.append(Epoch(number, wal_id, at, registered, written, at + WIDTH, settled, cuts, early, fenced))
        at = written if settled else at + WIDTH
    known_count = draw(st.integers(0, len(epochs)))
    last = epochs[known_count - 1] if known_count else None
    return epochs, known_count, draw(st.sampled_from(last.cuts)) if last is not None else 0


def backup_of(epochs: Sequence[Epoch], known_count: int, registered: int) -> list[t.RangeRow]:
    rows = []
    for item in epochs[:known_count]:
        newest = item.number == known_count
        if newest:
            state, end, upto = t.OPEN, None, registered
        else:
            state, end, upto = (
                (t.SETTLED, item.written, item.registered) if item.settled else (t.ORPHANED, None, item.registered)
            )
        rows.append(owned(item.number, item.start, upto, end, state, wal_id=item.wal_id))
    return rows


def stored_of(epochs: Sequence[Epoch], known_count: int, merged: bool) -> list[SegmentCandidate]:
    stored = []
    for item, following in zip(epochs, [*epochs[1:], None], strict=True):
        stored += [found(one, other, item.number) for one, other in pairwise(item.cuts)]
        if item.early is not None:
            stored.append(found(*item.early, item.number))
        if merged and item.registered > item.start:
            stored.append(found(item.start, item.registered, item.number))
        # Nothing but the metadata or a later epoch's segment at the same offset tells (docs/decisions/0006).
        told = item.number < known_count or (following is not None and following.registered > following.start)
        if item.fenced and told:
            stored.append(found(item.written, item.written + item.fenced, item.number))
    return stored


def check_rows(rows: Sequence[t.RangeRow]) -> None:
    """As the table demands, and ascending without overlap."""
    for row in rows:
        assert row.start_offset <= row.registered_end <= row.limit_offset, row
        assert (row.end_offset is None) == (row.status == t.ORPHANED), row
        assert row.end_offset is None or row.registered_end <= row.end_offset <= row.limit_offset, row
    for one, other in pairwise(rows):
        one_end = one.limit_offset if one.end_offset is None else one.end_offset
        assert one.epoch < other.epoch and one_end <= other.start_offset, (one, other)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(pasts(), st.booleans(), st.permutations("abc"))
def test_whatever_happened_before_nothing_acknowledged_is_lost(
    past: tuple[list[Epoch], int, int], merged: bool, order: Sequence[str]
) -> None:
    epochs, known_count, registered = past
    ranges = backup_of(epochs, known_count, registered)
    candidates = stored_of(epochs, known_count, merged)
    result = restore_partition(
        BackedUpPartition(
            topic=TOPIC,
            partition=t.PartitionRow(topic_id=TOPIC.topic_id, partition=0, epoch=known_count, log_start_offset=0),
            ranges=ranges,
            segments=[],
            present=(),
            candidates=candidates,
        ),
        accept_holes=False,
    )
    rows = applied(ranges, result.events)
    check_rows(rows)
    assert start_of_next(rows[-1]) > max(item.written for item in epochs)
    for one, other in pairwise(result.selection.chosen):
        assert one.end_offset <= other.base_offset, "no overlap"
    kept = {(c.segment.epoch, at) for c in result.selection.chosen for at in range(c.base_offset, c.end_offset)}
    registered_ones = {(item.number, at) for item in epochs for at in range(item.start, item.registered)}
    assert kept >= registered_ones, "all that was registered, and of the epoch that it was registered for"
    for wal_id in order:
        logs = [item for item in epochs if item.wal_id == wal_id and item.written > item.registered]
        outcome = split(rows, [Reported(item.number, item.registered, item.written) for item in logs], wal_id, wal_id)
        by_epoch = {row.epoch: row for row in rows} | {row.epoch: row for row in outcome.ranges}
        rows = [row for epoch, row in sorted(by_epoch.items()) if epoch not in outcome.removed_epochs]
        check_rows(rows)
        for item in logs:
            row = by_epoch[item.number]
            if row.status == t.ORPHANED:
                assert row.wal_id == wal_id and item.written <= row.limit_offset, (
                    "there is room for all that is in the log"
                )
            assert item.number not in outcome.ends
        assert start_of_next(rows[-1]) > max(item.written for item in epochs)
    by_epoch = {row.epoch: row for row in rows}
    for item in epochs:
        if item.written > item.registered:
            end = by_epoch[item.number].end_offset
            assert by_epoch[item.number].registered_end >= item.registered, "the log has the rest"
            assert end is None or end >= item.written


# ---- histories


HISTORIES = [
    t.HistoryRow(nth=1, history_id="first", from_position=0, producer_ids_from=0, created_ms=0),
    t.HistoryRow(nth=2, history_id="second", from_position=10, producer_ids_from=0, created_ms=0),
]


@pytest.mark.parametrize(
    "seen",
    [Head(history_id="", position=0), Head(history_id="second", position=15), Head(history_id="first", position=99)],
)
def test_metadata_that_goes_on_from_what_was_seen_is_fine(seen: Head) -> None:
    check_seen(HISTORIES, 15, seen)


@pytest.mark.parametrize("seen", [Head(history_id="second", position=16), Head(history_id="third", position=1)])
def test_metadata_that_went_back_is_refused(seen: Head) -> None:
    with pytest.raises(MetadataWentBack, match="streamhouse restore"):
        check_seen(HISTORIES, 15, seen)


GRANTED = {("aa", 0): 3, ("aa", 1): 0}


@pytest.mark.parametrize("declared", [[], [("aa", 0, 1), ("aa", 0, 3)], [("deleted", 5, 9)], [("aa", 7, 1)]])
def test_a_log_without_a_history_may_have_what_was_granted(declared: list[tuple[str, int, int]]) -> None:
    check_log(Head(history_id="h", position=15), declared, GRANTED, {"aa", "deleted"})


@pytest.mark.parametrize("unknown", [("aa", 0, 4), ("aa", 1, 1), ("never", 0, 1)])
def test_a_log_without_a_history_and_with_records_of_an_unknown_epoch_is_refused(unknown: tuple[str, int, int]) -> None:
    with pytest.raises(MetadataWentBack, match=f"epoch {unknown[2]} of topic {unknown[0]}.*streamhouse restore"):
        check_log(Head(history_id="h", position=15), [("aa", 0, 3), unknown], GRANTED, {"aa", "deleted"})


# ---- the format


EVENT = t.EventRow(
    position=1, stream_id="topic/x", version=1, type="TopicCreated", payload="{}", trace_context="", created_ms=5
)


def manifest(**changes: object) -> fmt.Manifest:
    chunk, _ = fmt.encode_chunk(fmt.chunk_key("20261123T000000Z-000000000001", "events", 0), t.EVENTS, [EVENT])
    whole = fmt.Manifest(
        version=1,
        name="20261123T000000Z-000000000001",
        created_ms=7,
        position=1,
        history_id="h",
        producer_id=3,
        migrations=("0001_tables",),
        chunks=(chunk,),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_a_chunk_comes_back_as_it_was() -> None:
    chunk, body = fmt.encode_chunk("k", t.EVENTS, [EVENT, replace(EVENT, position=2)])
    assert fmt.decode_chunk(chunk, body) == [EVENT, replace(EVENT, position=2)]
    with pytest.raises(fmt.BackupDamaged, match="not the bytes"):
        fmt.decode_chunk(chunk, body[:-1] + bytes([body[-1] ^ 1]))


def test_a_manifest_comes_back_as_it_was() -> None:
    key = fmt.manifest_key(manifest().name)
    assert fmt.decode_manifest(key, fmt.encode_manifest(manifest())) == manifest()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"version": 3}, "version 3"),
        (
            {"chunks": (fmt.Chunk(key="data/x", table="events", rows=1, size_bytes=1, raw_bytes=1, sha256=""),)},
            "not of this backup",
        ),
        ({"chunks": (replace(manifest().chunks[0], size_bytes=2**40),)}, "too large"),
    ],
)
def test_a_manifest_that_says_impossible_things_is_damaged(changes: dict[str, object], what: str) -> None:
    key = fmt.manifest_key(manifest().name)
    with pytest.raises(fmt.BackupDamaged, match=what):
        fmt.decode_manifest(key, fmt.encode_manifest(manifest(**changes)))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"sha256": "", "backup": "{}"}', b'{"backup": 7, "sha256": ""}'])
def test_what_is_no_manifest_is_damaged(data: bytes) -> None:
    with pytest.raises(fmt.BackupDamaged):
        fmt.decode_manifest("backup/x/manifest.json", data)


def test_names_of_backups() -> None:
    assert fmt.name_of(fmt.manifest_key("20261123T000000Z-000000000001")) == "20261123T000000Z-000000000001"
    assert fmt.name_of("backup/else/manifest.json") == fmt.name_of("data/x") == ""
    with pytest.raises(InvalidArgument):
        fmt.check_name("../x")
    assert fmt.complete(["b", "a", "c"], ["c", "b"]) == (["b", "c"], ["a"])
