"""The checker finds each anomaly in a history that is wrong on purpose, and nothing in one that is right."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shproto import errors

from tests.faults import history as h
from tests.faults.checker import check, explain, main
from tests.faults.checks import BIT_FLIPS, TOLD_LATE_MS
from tests.faults.generate import generate
from tests.faults.nemeses import store
from tests.faults.producers import is_refusal
from tests.faults.store_proxy import StoreFault

pytestmark = pytest.mark.quick

KEY = "data/t.0/0/0.seg"


def stream(numbers: Sequence[int] = (0, 1, 2), epochs: Sequence[int] = (1, 2, 2)) -> list[h.Event]:
    """A numbered stream as it was read back. Epoch 2 fences where sequence 1 is next, and is acknowledged up to 3."""
    events: list[h.Event] = [h.Topic("t", 1, "wal")]
    values = tuple(f"{at}" for at in range(len(numbers)))
    for at, number in enumerate(numbers):
        events += [
            h.Produce(at, "w", "t", 0, (values[at],), "wal"),
            h.Numbered(at, number, epochs[min(at, len(epochs) - 1)]),
            h.ProduceFailed(at, False, "numbered"),
        ]
    return [
        *events,
        h.StreamEnd("w", "t", 0, 2, 1, True),
        h.StreamEnd("w", "t", 0, 2, 3, False),
        h.ReadBack("query-1", "t", 0, ((0, len(numbers)),), values),
    ]


def test_a_stream_without_gap_or_double_is_right() -> None:
    assert not check(stream()).anomalies


def good() -> list[h.Event]:
    """Two producers, a plain and a group consumer, a takeover at 100, everything read back and registered."""
    return [
        h.Topic("t", 1, "wal"),
        h.Topic("d", 1, "durable"),
        h.Assigned("plain", "t", 0, 0),
        h.Produce(1, "p", "t", 0, ("a", "b"), "wal"),
        h.Produced(1, ((0, 2),), epoch=1),
        h.Produce(2, "q", "t", 0, ("refused",), "wal"),
        h.ProduceFailed(2, True, "OVERLOADED"),
        h.Polled("plain", "t", 0, ((0, 2),), ("a", "b")),
        h.Polled("m1", "t", 0, ((0, 2),), ("a", "b"), group="g"),
        h.Commit(3, "m1", "g", "t", 0, 2),
        h.CommitDone(3, "ok"),
        h.Produce(4, "p", "t", 0, ("c",), "wal"),
        h.Produced(4, ((100, 1),), epoch=2),
        h.Polled("plain", "t", 0, ((100, 1),), ("c",)),
        h.FetchCommitted(5, "m2", "g", "t", 0),
        h.Committed(5, 2),
        h.Polled("m2", "t", 0, ((100, 1),), ("c",), group="g"),
        h.Commit(6, "m2", "g", "t", 0, 101),
        h.CommitDone(6, "ok"),
        h.Position("plain", "t", 0, 101),
        h.ReadBack("query-1", "t", 0, ((0, 2), (100, 1)), ("a", "b", "c")),
        h.Range("t", 0, 1, 0, 100, 2, 2, "settled"),
        h.Range("t", 0, 2, 100, 200, 101, -1, "open"),
        h.Segment("s1", "t", 0, 1, 0, 2, KEY, 0, 50),
        h.Segment("s2", "t", 0, 2, 100, 101, KEY, 50, 50),
        h.StoredObject(KEY, 100),
        h.End(),
    ]


def replaced(kind: type[h.Event], nth: int, **changes: Any) -> list[h.Event]:
    """The good history with the nth event of `kind` changed."""
    events = good()
    at = [position for position, event in enumerate(events) if isinstance(event, kind)][nth]
    events[at] = dataclasses.replace(events[at], **changes)
    return events


def without(kind: type[h.Event], nth: int = 0) -> list[h.Event]:
    events = good()
    del events[[position for position, event in enumerate(events) if isinstance(event, kind)][nth]]
    return events


def before(kind: type[h.Event], *more: h.Event) -> list[h.Event]:
    """The good history with `more` in front of the first event of `kind`."""
    events = good()
    at = next(position for position, event in enumerate(events) if isinstance(event, kind))
    return [*events[:at], *more, *events[at:]]


def test_nothing_in_a_good_history() -> None:
    report = check(good())
    assert report.anomalies == []
    assert (report.operations, report.acknowledged_operations, report.refused_operations) == (3, 2, 1)
    assert report.acknowledged_records == 3
    assert report.complete


WRONG: dict[str, tuple[list[h.Event], set[str]]] = {
    "lost write": (
        replaced(h.ReadBack, 0, spans=((0, 1), (100, 1)), values=("a", "c")),
        {"lost-write"},
    ),
    "lost write, one reader only": (
        before(h.End, h.ReadBack("query-2", "t", 0, ((0, 2),), ("a", "b"))),
        {"lost-write"},
    ),
    "two values at one offset": (
        replaced(h.Polled, 0, values=("a", "c")),
        {"two-values"},  # c is at 100, too, behind a takeover: a retry may do that
    ),
    "two values acknowledged at one offset": (
        before(h.ReadBack, h.Produce(7, "q", "t", 0, ("x",), "wal"), h.Produced(7, ((1, 1),), epoch=1)),
        {"two-values"},
    ),
    "acknowledged in the wrong order": (
        [
            *before(h.Range, h.Produce(7, "p", "t", 0, ("x",), "wal"), h.Produced(7, ((2, 1),), epoch=1))[:21],
            h.Produce(7, "p", "t", 0, ("x",), "wal"),
            h.Produced(7, ((2, 1),), epoch=1),
            h.ReadBack("query-2", "t", 0, ((0, 3), (100, 1)), ("a", "b", "x", "c")),
        ],
        {"order-inversion", "lost-write", "poll-gap"},
    ),
    "polled in the wrong order": (
        replaced(h.Polled, 0, spans=((1, 1), (0, 1)), values=("b", "a")),
        {"order-inversion", "poll-gap"},
    ),
    "polled again": (
        before(h.Position, h.Polled("plain", "t", 0, ((100, 1),), ("c",))),
        {"order-inversion"},
    ),
    "read back in the wrong order": (
        replaced(h.ReadBack, 0, spans=((100, 1), (0, 2)), values=("c", "a", "b")),
        {"order-inversion"},
    ),
    "poll gap": (
        replaced(h.Polled, 0, spans=((0, 1),), values=("a",)),
        {"poll-gap"},
    ),
    "poll gap inside one poll": (
        [event for event in replaced(h.Polled, 0, spans=((0, 1), (100, 1)), values=("a", "c"))
         if event != h.Polled("plain", "t", 0, ((100, 1),), ("c",))],
        {"poll-gap"},
    ),
    "poll gap in a group": (
        replaced(h.Polled, 1, spans=((1, 1),), values=("b",)),
        {"poll-gap"},
    ),
    "duplicate of an idempotent write": (
        [
            *good()[:12],
            h.Produce(4, "p", "t", 0, ("c",), "wal"),
            h.Produced(4, ((2, 1),), epoch=1),
            h.ReadBack("query-1", "t", 0, ((0, 4),), ("a", "b", "c", "c")),
        ],
        {"duplicate"},
    ),
    "duplicate on a durable topic, takeover or not": (
        [
            h.Topic("t", 1, "durable"),
            h.Produce(1, "p", "t", 0, ("a",), "durable"),
            h.Produced(1, ((100, 1),), epoch=2),
            h.ReadBack("query-1", "t", 0, ((0, 1), (100, 1)), ("a", "a")),
            h.Range("t", 0, 1, 0, 100, 1, 1, "settled"),
            h.Range("t", 0, 2, 100, 200, 101, -1, "open"),
        ],
        {"duplicate"},
    ),
    "duplicate after a graceful move": (
        [
            h.Topic("t", 1, "wal"),
            h.Produce(1, "p", "t", 0, ("a",), "wal"),
            h.Produced(1, ((1, 1),), epoch=2),
            h.ReadBack("query-1", "t", 0, ((0, 2),), ("a", "a")),
            h.Range("t", 0, 1, 0, 100, 1, 1, "settled"),
            h.Range("t", 0, 2, 1, 101, 2, -1, "open"),
        ],
        {"duplicate"},
    ),
    "resurrected write": (
        replaced(h.ReadBack, 0, spans=((0, 3), (100, 1)), values=("a", "b", "refused", "c")),
        {"resurrected", "poll-gap"},
    ),
    "a write that nobody sent": (
        replaced(h.ReadBack, 0, spans=((0, 2), (100, 2)), values=("a", "b", "c", "?")),
        {"never-sent", "unseen"},
    ),
    "a write of another partition": (
        before(h.Range, h.ReadBack("query-1", "d", 0, ((0, 1),), ("a",))),
        {"never-sent"},
    ),
    "read, then gone": (
        before(h.Position, h.Produce(7, "q", "t", 0, ("x",), "wal"), h.Polled("plain", "t", 0, ((101, 1),), ("x",))),
        {"vanished"},
    ),
    "unseen": (
        replaced(h.Position, 0, offset=100),
        {"unseen"},
    ),
    "a group that stays behind": (
        before(h.ReadBack, h.Position("members", "t", 0, 100, group="g")),
        {"unseen"},
    ),
    "committed by a group, given to none of its members": (
        before(h.ReadBack, h.Position("members", "t", 0, 101, group="another")),
        {"group-gap"},
    ),
    "committed offset read lower": (
        before(h.Position, h.FetchCommitted(8, "m3", "g", "t", 0), h.Committed(8, 2)),
        {"commit-back"},
    ),
    "committed offset lost": (
        before(h.Position, h.FetchCommitted(8, "m3", "g", "t", 0), h.Committed(8, -1)),
        {"commit-back"},
    ),
    "a late member commits lower": (
        before(h.Position, h.Commit(8, "m1", "g", "t", 0, 2), h.CommitDone(8, "ok")),
        {"commit-back"},
    ),
    "a commit that nobody made": (
        replaced(h.Committed, 0, offset=50),
        {"commit-from-nowhere"},
    ),
    "a refused commit that was stored": (
        replaced(h.CommitDone, 0, outcome="fail"),
        {"commit-from-nowhere", "poll-gap"},
    ),
    "acknowledged by a fenced leader, beyond the settled end": (
        before(h.Position, h.Produce(7, "q", "t", 0, ("x",), "wal"), h.Produced(7, ((2, 1),), epoch=1)),
        {"fenced-ack", "poll-gap"},
    ),
    "acknowledged by a fenced leader, in another's range": (
        replaced(h.Produced, 1, epoch=1),
        {"fenced-ack"},
    ),
    "acknowledged in a range that was declared lost": (
        replaced(h.Range, 0, status="lost"),
        {"fenced-ack", "registration-disorder"},  # with the segments still there
    ),
    "object without registration": (
        before(h.End, h.StoredObject("data/t.0/0/7.seg", 10)),
        {"object-without-registration"},
    ),
    "registration without object": (
        without(h.StoredObject),
        {"registration-without-object"},
    ),
    "registration of a truncated object": (
        replaced(h.StoredObject, 0, size_bytes=99),
        {"registration-without-object"},
    ),
    "overlapping registrations": (
        replaced(h.Segment, 1, epoch=1, base_offset=1, end_offset=2),
        {"registration-disorder", "unregistered"},
    ),
    "registration of an unknown epoch": (
        replaced(h.Segment, 1, epoch=9),
        {"registration-disorder"},
    ),
    "acknowledged and in no segment": (
        without(h.Segment, 1),
        {"registration-disorder", "unregistered"},
    ),
    "declared lost": (
        replaced(h.Segment, 0, object_key=""),
        {"unregistered"},
    ),
    "a numbered stream with a gap": (
        stream(numbers=(0, 1, 3)),
        {"stream-gap"},
    ),
    "a numbered stream with a record twice": (
        stream(numbers=(0, 1, 1, 2)),
        {"stream-double"},
    ),
    "a numbered stream out of order": (
        stream(numbers=(1, 0, 2), epochs=(2, 2, 2)),
        {"stream-gap", "stream-double"},
    ),
    "a numbered stream that ends before what was acknowledged": (
        stream(numbers=(0, 1)),
        {"stream-lost"},
    ),
    "a zombie that wrote behind a fence": (
        stream(epochs=(1, 2, 1)),
        {"zombie-write"},
    ),
    "damage": (
        before(h.End, h.ReadFailed("plain", "DATA_LOSS", "offset 3 is damaged")),
        {"damage"},
    ),
    "a service that died by itself": (
        before(h.End, h.ProcessDied("query-1", 1)),
        {"died"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_anomaly_is_found(name: str) -> None:
    events, kinds = WRONG[name]
    assert check(events).kinds == kinds


@pytest.mark.parametrize(("limit", "start"), [(100, 100), (100, 200), (1, 1)])
def test_a_takeover_without_the_logs_end_may_repeat_a_retry(limit: int, start: int) -> None:
    """Allowed for `wal`, where the new leader cannot know what the old one wrote; counted, not hidden. Also when one
    took over in between and wrote nothing, or the older range was full."""
    events = [
        h.Topic("t", 1, "wal"),
        h.Produce(1, "p", "t", 0, ("a",), "wal"),
        h.Produced(1, ((start, 1),), epoch=3),
        h.ReadBack("query-1", "t", 0, ((0, 1), (start, 1)), ("a", "a")),
        h.Range("t", 0, 1, 0, limit, 1, 1, "settled"),
        h.Range("t", 0, 3, start, start + 100, start + 1, -1, "open"),
    ]
    report = check(events)
    assert report.anomalies == []
    assert report.permitted_repeats == 1


def test_what_follows_a_record_that_is_repeated_may_follow_its_first_copy() -> None:
    """ "a" and "b" in flight at a takeover: another agent wrote "a" again, the first one came back and knew "b"."""
    events = [
        h.Topic("t", 1, "wal"),
        h.Produce(1, "p", "t", 0, ("a", "b"), "wal"),
        h.Produced(1, ((100, 1), (1, 1))),
        h.ReadBack("query-1", "t", 0, ((0, 2), (100, 1)), ("a", "b", "a")),
        h.Range("t", 0, 1, 0, 100, 2, 2, "settled"),
        h.Range("t", 0, 2, 100, 200, 101, -1, "open"),
    ]
    report = check(events)
    assert report.anomalies == []
    assert report.permitted_repeats == 1


def test_an_unknown_write_may_be_there_or_not() -> None:
    events = before(h.ReadBack, h.Produce(7, "q", "t", 0, ("x",), "wal"), h.ProduceFailed(7, False, "UNAVAILABLE"))
    assert check(events).anomalies == []
    there = [
        dataclasses.replace(event, spans=((0, 2), (100, 2)), values=("a", "b", "c", "x"))
        if isinstance(event, h.ReadBack)
        else dataclasses.replace(event, offset=102)
        if isinstance(event, h.Position)
        else dataclasses.replace(event, registered_end=102)
        if isinstance(event, h.Range) and event.epoch == 2
        else dataclasses.replace(event, end_offset=102)
        if isinstance(event, h.Segment) and event.epoch == 2
        else event
        for event in events
    ]
    assert check(there).anomalies == []


@pytest.mark.parametrize("gap", [0, 98])
def test_a_merged_segment_may_span_epochs(gap: int) -> None:
    """After a graceful move there is nothing between two epochs, after a takeover a gap; compaction joins both."""
    events = [
        h.Topic("t", 1, "wal"),
        h.Range("t", 0, 1, 0, 100, 2, 2, "settled"),
        h.Range("t", 0, 2, 2 + gap, 1000, 5 + gap, -1, "open"),
        h.Segment("s1", "t", 0, 2, 0, 4 + gap, KEY, 0, 50),
        h.Segment("s2", "t", 0, 2, 4 + gap, 5 + gap, KEY, 50, 50),
        h.StoredObject(KEY, 100),
        h.End(),
    ]
    assert check(events).anomalies == []
    events[4] = h.Segment("s2", "t", 0, 2, 4 + gap, 7 + gap, KEY, 50, 50)
    assert check(events).kinds == {"registration-disorder"}


def test_a_group_member_may_begin_where_the_group_committed_but_not_beyond() -> None:
    again = h.Polled("m3", "t", 0, ((100, 1),), ("c",), group="g")
    assert check(before(h.Position, again)).anomalies == []
    from_the_middle = h.Polled("m3", "t", 0, ((1, 1), (100, 1)), ("b", "c"), group="g")
    assert check(before(h.Position, from_the_middle)).kinds == {"poll-gap"}


def test_a_run_that_was_cut_off_is_not_called_complete(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    h.write_history(path, good()[:14])
    assert not check(h.read_history(path)).complete
    assert main([str(path)]) == 2


# ---- the program and the file


def test_the_program_prints_each_anomaly_with_its_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "history.jsonl"
    h.write_history(path, WRONG["lost write"][0])
    assert main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "lost-write: t/0 offset 1: 'b' was acknowledged, query-1 cannot read it" in printed
    assert '    4: {"kind":"Produce"' in printed
    assert "anomalies: 1 (lost-write 1)" in printed


def test_the_program_accepts_a_good_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "history.jsonl"
    h.write_history(path, good())
    assert main([str(path)]) == 0
    assert "anomalies: 0" in capsys.readouterr().out


def test_many_anomalies_of_a_kind_are_counted_not_all_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "history.jsonl"
    h.write_history(path, before(h.End, *[h.StoredObject(f"data/{n}.seg", 1) for n in range(50)]))
    assert len([line for line in explain(check(h.read_history(path)).anomalies, path) if line[0] != " "]) == 20
    assert main([str(path)]) == 1
    assert "anomalies: 50 (object-without-registration 50)" in capsys.readouterr().out


def test_the_records_of_one_operation_are_explained_once(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    h.write_history(path, replaced(h.ReadBack, 0, spans=((100, 1),), values=("c",)))
    report = check(h.read_history(path))
    assert len(report.anomalies) == 2
    assert len([line for line in explain(report.anomalies, path) if line[0] != " "]) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "Expecting"),
        ("[]", "no event"),
        ('{"kind":"Nothing"}', "no event"),
        ('{"kind":"Topic","topic":"t"}', "Topic"),
        ('{"kind":"CommitDone","id":3,"outcome":"ok"}', "never began"),
        ('{"kind":"Polled","process":"c","topic":"t","partition":0,"spans":[[0,2]],"values":["a"]}', "line 1"),
    ],
)
def test_what_is_no_history_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(line + "\n")
    assert main([str(path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told_ms", "reason", "fault", "is_found"),
    [
        (1500, "DATA_LOSS", BIT_FLIPS, False),
        (2000 + TOLD_LATE_MS, "DATA_LOSS", BIT_FLIPS, False),
        (2001 + TOLD_LATE_MS, "DATA_LOSS", BIT_FLIPS, True),
        (999, "DATA_LOSS", BIT_FLIPS, True),
        (1500, "INTERNAL", BIT_FLIPS, True),
        (1500, "DATA_LOSS", "kill", True),
    ],
)
def test_damage_may_be_told_of_while_bits_flip_on_the_way(
    told_ms: int, reason: str, fault: str, is_found: bool
) -> None:
    events = before(
        h.End,
        h.Fault(fault, h.BEGINS, "", at_ms=1000),
        h.Fault(fault, h.OVER, "", at_ms=2000),
        h.ReadFailed("plain", reason, "", at_ms=told_ms),
    )
    assert check(events).kinds == ({"damage"} if is_found else set())


def test_the_nemesis_that_flips_bits_is_known_by_that_name() -> None:
    assert store.FAULTS[BIT_FLIPS] == (StoreFault.FLIPPED,)


def test_every_kind_of_event_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    events = [
        *good(),
        h.ReadFailed("c", "UNAVAILABLE", "away"),
        h.Note("member-1", "joins"),
        h.Fault("kill", h.BEGINS, "kill -9 ingest-1"),
        h.ProcessDied("ingest-1", -9),
        h.Numbered(1, 0, 1),
        h.StreamEnd("w", "t", 0, 1, 7, True),
    ]
    h.write_history(path, events)
    assert list(h.read_history(path)) == events
    assert {type(event) for event in events} == set(h.Event.kinds.values())


@given(st.lists(st.integers(0, 20)))
def test_spans_keep_offsets_and_their_order(offsets: list[int]) -> None:
    spans = h.spans_of(offsets)
    assert list(h.offsets_of(spans)) == offsets
    assert h.count_of(spans) == len(offsets)


# ---- a correct model, and what breaks it


@given(st.integers(0, 2**32 - 1))
def test_a_correct_model_has_no_anomalies(seed: int) -> None:
    assert check(generate(random.Random(seed))).anomalies == []


Mutation = Callable[[random.Random, list[h.Event]], Sequence[h.Event] | None]


def _one(rng: random.Random, events: Sequence[h.Event], fits: Callable[[h.Event], bool]) -> int | None:
    places = [position for position, event in enumerate(events) if fits(event)]
    return rng.choice(places) if places else None


def _acknowledged(events: Sequence[h.Event]) -> set[tuple[str, int, int]]:
    produced = {event.id: event for event in events if isinstance(event, h.Produced)}
    return {
        (event.topic, event.partition, offset)
        for event in events
        if isinstance(event, h.Produce) and event.id in produced
        for offset in h.offsets_of(produced[event.id].spans)
    }


def lose(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    """An acknowledged record disappears from everything that was read."""
    acknowledged = sorted(_acknowledged(events))
    if not acknowledged:
        return None
    topic, partition, lost = rng.choice(acknowledged)

    def forget(event: h.Event) -> h.Event:
        if not isinstance(event, h.Polled | h.ReadBack) or (event.topic, event.partition) != (topic, partition):
            return event
        left = [pair for pair in zip(h.offsets_of(event.spans), event.values, strict=True) if pair[0] != lost]
        return dataclasses.replace(
            event, spans=h.spans_of(offset for offset, _ in left), values=tuple(value for _, value in left)
        )

    return [forget(event) for event in events]


def swap_value(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    """One reader gets two records of a poll the other way round."""
    at = _one(rng, events, lambda event: isinstance(event, h.Polled) and len(event.values) > 1)
    if at is None:
        return None
    event = events[at]
    assert isinstance(event, h.Polled)
    events[at] = dataclasses.replace(event, values=(event.values[1], event.values[0], *event.values[2:]))
    return events


def poll_twice(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    at = _one(rng, events, lambda event: isinstance(event, h.Polled) and not event.group)
    return None if at is None else [*events[: at + 1], *events[at:]]


def skip_poll(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    """A plain consumer never gets one of its polls, and stands behind it all the same."""
    at = _one(rng, events, lambda event: isinstance(event, h.Polled) and not event.group)
    if at is None:
        return None
    gone = events[at]
    assert isinstance(gone, h.Polled)
    later = [e for e in events[at + 1 :] if isinstance(e, h.Polled) and _reader(e) == _reader(gone)]
    return [*events[:at], *events[at + 1 :]] if later else None


def _reader(event: h.Polled) -> tuple[str, str, int]:
    return event.process, event.topic, event.partition


def write_again(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    """A record of the newest epoch is there once more, behind all others."""
    at = _one(rng, events, lambda event: isinstance(event, h.ReadBack) and bool(event.values))
    if at is None:
        return None
    event = events[at]
    assert isinstance(event, h.ReadBack)
    end = sum(event.spans[-1])
    events[at] = dataclasses.replace(event, spans=(*event.spans, (end, 1)), values=(*event.values, event.values[-1]))
    return events


def refuse(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    """An acknowledged write had been refused."""
    at = _one(rng, events, lambda event: isinstance(event, h.Produced))
    if at is None:
        return None
    event = events[at]
    assert isinstance(event, h.Produced)
    events[at] = h.ProduceFailed(event.id, True, "OVERLOADED")
    return events


def stay_behind(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    ends = {(topic, partition): offset for topic, partition, offset in sorted(_acknowledged(events))}
    at = _one(rng, events, lambda event: isinstance(event, h.Position) and (event.topic, event.partition) in ends)
    if at is None:
        return None
    event = events[at]
    assert isinstance(event, h.Position)
    events[at] = dataclasses.replace(event, offset=ends[event.topic, event.partition])
    return events


def forget_commit(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    """What a group has committed is gone in the end."""
    at = _one(rng, events, lambda event: isinstance(event, h.CommitDone) and event.outcome == "ok")
    if at is None:
        return None
    done = events[at]
    assert isinstance(done, h.CommitDone)
    commit = next(event for event in events if isinstance(event, h.Commit) and event.id == done.id)
    fetch = h.FetchCommitted(-1, "any", commit.group, commit.topic, commit.partition)
    return [*events[:-1], fetch, h.Committed(-1, -1), events[-1]]


def commit_higher(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    at = _one(rng, events, lambda event: isinstance(event, h.Committed))
    if at is None:
        return None
    event = events[at]
    assert isinstance(event, h.Committed)
    events[at] = dataclasses.replace(event, offset=10**9)
    return events


def wrong_epoch(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    at = _one(rng, events, lambda event: isinstance(event, h.Produced))
    if at is None:
        return None
    event = events[at]
    assert isinstance(event, h.Produced)
    events[at] = dataclasses.replace(event, epoch=event.epoch + 1)
    return events


def drop_object(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    at = _one(rng, events, lambda event: isinstance(event, h.StoredObject))
    return None if at is None else [*events[:at], *events[at + 1 :]]


def drop_segment(rng: random.Random, events: list[h.Event]) -> Sequence[h.Event] | None:
    at = _one(rng, events, lambda event: isinstance(event, h.Segment))
    return None if at is None else [*events[:at], *events[at + 1 :]]


MUTATIONS: list[tuple[Mutation, set[str]]] = [
    (lose, {"lost-write"}),
    (swap_value, {"two-values"}),
    (poll_twice, {"order-inversion"}),
    (skip_poll, {"poll-gap"}),
    (write_again, {"duplicate"}),
    (refuse, {"resurrected"}),
    (stay_behind, {"unseen"}),
    (forget_commit, {"commit-back"}),
    (commit_higher, {"commit-from-nowhere"}),
    (wrong_epoch, {"fenced-ack"}),
    (drop_object, {"registration-without-object"}),
    (drop_segment, {"object-without-registration"}),
]


@pytest.mark.parametrize(("mutation", "kinds"), MUTATIONS, ids=lambda item: getattr(item, "__name__", ""))
@given(seed=st.integers(0, 2**32 - 1))
def test_each_mutation_of_a_correct_model_is_found(mutation: Mutation, kinds: set[str], seed: int) -> None:
    rng = random.Random(seed)
    mutated = mutation(rng, generate(rng))
    if mutated is not None:
        assert check(mutated).kinds & kinds


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (errors.Overloaded("x"), True),
        (errors.NotLeader("x", outcome=errors.NOT_WRITTEN), True),
        (errors.NotLeader("x", outcome=errors.UNKNOWN), False),
        (errors.NotLeader("x"), False),
        (errors.DurableTimeout("x"), False),
        (errors.Unavailable("x"), False),
    ],
)
def test_only_what_leaves_no_doubt_is_a_refusal(error: errors.StreamHouseError, refusal: bool) -> None:
    """The producer's word is the checker's evidence."""
    assert is_refusal(error) is refusal
