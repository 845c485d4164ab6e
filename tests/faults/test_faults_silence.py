"""How long nothing went on while a nemesis was at work."""

from tests.faults import history as h
from tests.faults.checker import check
from tests.faults.silence import silences, table
from tests.faults.timeline import index


def acknowledged(operation: int, at_ms: int, acks: str = "wal") -> list[h.Event]:
    value = (f"v{operation}",)
    return [
        h.Produce(operation, "p", "t", 0, value, acks, at_ms=at_ms),
        h.Produced(operation, ((operation, 1),), at_ms=at_ms),
    ]


def run(*fault: h.Event) -> list[h.Event]:
    """Acknowledged at 0, 1, 2 s, then at 9, 10, 11 s; durable at 1 s only."""
    events = [*acknowledged(7, 1000, "durable"), *fault]
    for number, at_ms in enumerate((0, 1000, 2000, 9000, 10_000, 11_000)):
        events += acknowledged(number, at_ms)
    return sorted(events, key=lambda event: event.at_ms)


def fault(begins_ms: int, over_ms: int, name: str = "kill") -> list[h.Event]:
    return [h.Fault(name, h.BEGINS, "", at_ms=begins_ms), h.Fault(name, h.OVER, "", at_ms=over_ms)]


def test_a_silence_lasts_until_the_first_sign_of_life_behind_the_heal() -> None:
    (found,) = silences(index(run(*fault(1500, 5000))))
    assert (found.times, found.held_ms, found.quiet_ms["wal"]) == (1, 3500, 7000)


def test_what_was_silent_before_a_fault_is_not_its_own() -> None:
    (found,) = silences(index(run(*fault(5000, 6000))))
    assert found.quiet_ms["wal"] == 4000


def test_a_silence_without_an_end_lasts_for_as_long_as_anything_is_acknowledged() -> None:
    (found,) = silences(index(run(*fault(3000, 7000))))
    assert found.quiet_ms == {"wal": 6000, "durable": 8000, "reads": 8000}
    (found,) = silences(index(run(*fault(10_500, 12_000))))
    assert found.quiet_ms == {"wal": 1000, "durable": 1500, "reads": 1500}, "at least the fault's own time"


def test_the_longest_of_all_turns_counts() -> None:
    (found,) = silences(index(run(*fault(0, 1500), *fault(3000, 4000), *fault(10_000, 10_500))))
    assert (found.times, found.held_ms, found.quiet_ms["wal"]) == (3, 1500, 6000)


def test_a_fault_that_was_skipped_or_is_not_over_has_none() -> None:
    events = run(h.Fault("kill", h.SKIPPED, "", at_ms=10), h.Fault("pause", h.BEGINS, "", at_ms=20))
    assert silences(index(events)) == []


def test_the_report_has_a_line_for_each_nemesis() -> None:
    events = run(*fault(1500, 5000), *fault(5000, 6000, "pause"))
    lines = [line for line in check(events).summary() if line.startswith(("longest", "kill", "pause"))]
    assert [line.split() for line in lines] == [
        ["longest", "silence,", "s", "turns", "held", "wal", "durable", "reads"],
        ["kill", "1", "3.5", "7.0", "9.5", "9.5"],
        ["pause", "1", "1.0", "4.0", "6.0", "6.0"],
    ]
    assert list(table([])) == []
