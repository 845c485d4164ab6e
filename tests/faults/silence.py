"""How long nothing went on while each nemesis was at work: no acknowledgement, nothing read. Pure.

Shows what a fault costs, and what hangs; the machine's own load is in the figures.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tests.faults.history import BEGINS, OVER
from tests.faults.timeline import Timeline

ACKNOWLEDGEMENTS = ("wal", "durable")
KINDS = (*ACKNOWLEDGEMENTS, "reads")
"""Acknowledgements of each level, and records handed to consumers."""


@dataclass
class Silence:
    """A nemesis of the run. `quiet_ms`: the longest time of each kind that lay in one of its turns, at least in part;
    it ends with the first sign of life, also behind the heal, or with the last acknowledgement of either level."""

    name: str
    times: int = 0
    held_ms: int = 0
    quiet_ms: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))


def silences(timeline: Timeline) -> list[Silence]:
    """One for each nemesis that had a turn, by name."""
    last_ms = max((timeline.signs_ms[kind][-1] for kind in ACKNOWLEDGEMENTS if timeline.signs_ms[kind]), default=0)
    found: dict[str, Silence] = {}
    began: dict[str, int] = {}
    for _, event in timeline.faults:
        if event.state == BEGINS:
            began[event.name] = event.at_ms
        elif event.state == OVER and event.name in began:
            silence = found.setdefault(event.name, Silence(event.name))
            begin_ms = began.pop(event.name)
            silence.times += 1
            silence.held_ms = max(silence.held_ms, event.at_ms - begin_ms)
            for kind in KINDS:
                quiet_ms = _longest(timeline.signs_ms[kind], begin_ms, event.at_ms, last_ms)
                silence.quiet_ms[kind] = max(silence.quiet_ms[kind], quiet_ms)
    return [found[name] for name in sorted(found)]


def _longest(signs_ms: Sequence[int], begin_ms: int, end_ms: int, last_ms: int) -> int:
    """Returns the longest time without a sign, from `begin_ms` to the first sign after `end_ms`. Where none comes any
    more, the silence lasts for as long as anything was acknowledged (`last_ms`)."""
    first, last = bisect_right(signs_ms, begin_ms), bisect_right(signs_ms, end_ms)
    points = [begin_ms, *signs_ms[first : last + 1]]
    if last == len(signs_ms):
        points.append(max(end_ms, last_ms, points[-1]))
    return max((after - before for before, after in pairwise(points)), default=0)


def table(found: Sequence[Silence]) -> Iterator[str]:
    """Lines for people."""
    if found:
        yield f"{'longest silence, s':<34}{'turns':>6}{'held':>7}" + "".join(f"{kind:>9}" for kind in KINDS)
    for item in found:
        quiet = "".join(f"{item.quiet_ms[kind] / 1000:>9.1f}" for kind in KINDS)
        yield f"{item.name:<34}{item.times:>6}{item.held_ms / 1000:>7.1f}{quiet}"
