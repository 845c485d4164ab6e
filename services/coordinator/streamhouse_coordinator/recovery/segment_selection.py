"""Selects the stored segments that make up a partition after a restore, without gap or overlap. Pure.

Objects that overlap (inputs and outputs of compactions, repeated uploads) hold the same records for the same epoch and
offset, so any selection without overlaps is right. Segments do not count if registration had fenced them: with records
of an epoch at or beyond the start of a later epoch, or beyond the known end of their own range.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shproto.model import Segment

from streamhouse_coordinator.core.tables import LOST, RangeRow


@dataclass(frozen=True, slots=True)
class EpochSpan:
    """Offsets [base_offset, end_offset) of an epoch."""

    epoch: int
    base_offset: int
    end_offset: int


@dataclass(frozen=True, slots=True)
class SegmentCandidate:
    """A readable segment. `spans`: epochs and offsets of its records, several for a merged segment; a registered
    segment may come without. `registered`: the backup names the segment."""

    segment: Segment
    spans: tuple[EpochSpan, ...]
    registered: bool = False

    @property
    def base_offset(self) -> int:
        return self.segment.base_offset

    @property
    def end_offset(self) -> int:
        return self.segment.end_offset


@dataclass(slots=True, kw_only=True)
class Selection:
    """The selected segments, ascending, as `chosen`. `lost`: spans that were registered and that no object holds.
    `stranded`: segments behind a hole inside their epoch, so not part of the log. `log_start_offset`: the new start of
    the log."""

    log_start_offset: int
    chosen: list[SegmentCandidate] = field(default_factory=list)
    lost: list[EpochSpan] = field(default_factory=list)
    stranded: list[SegmentCandidate] = field(default_factory=list)


def select_segments(
    log_start_offset: int,
    ranges: Sequence[RangeRow],
    candidates: Iterable[SegmentCandidate],
    *,
    has_retention: bool,
    accept_holes: bool,
) -> Selection:
    """Returns the segments of a partition from `log_start_offset` on.

    `ranges`: as the backup has them. `has_retention`: retention has removed missing records at the beginning.
    `accept_holes`: holes inside epochs become lost spans, and segments behind them count.
    """
    return _Search(log_start_offset, ranges, candidates, has_retention=has_retention, accept_holes=accept_holes).run()


class _Search:
    """The search of `select_segments`, with its intermediate results."""

    def __init__(
        self,
        log_start_offset: int,
        ranges: Sequence[RangeRow],
        candidates: Iterable[SegmentCandidate],
        *,
        has_retention: bool,
        accept_holes: bool,
    ) -> None:
        self._ranges = {row.epoch: row for row in ranges}
        self._has_retention = has_retention
        self._accept_holes = accept_holes
        every = list(candidates)
        self._starts = _starts(self._ranges, every)
        self._epochs = sorted(self._starts)
        # Registered segments passed the fence when they were registered; objects that were only found may not have.
        self._usable = [item for item in every if item.registered or not self._void(item)]
        self._usable.sort(key=lambda item: (item.base_offset, item.end_offset))
        self._found = Selection(log_start_offset=log_start_offset)

    def run(self) -> Selection:
        at = self._first_base()
        edges = _by_base(self._usable)
        # Each round takes the farthest path, then crosses the gap to the next candidate, or strands the epoch of that
        # candidate if the gap must not be crossed.
        while True:
            path = _farthest(at, edges)
            if path:
                self._found.chosen += path
                at = path[-1].end_offset
            following = self._following(at)
            if not self._cross(at, following):
                self._strand(following)
                edges = _by_base(self._usable)
            elif following is None:
                return self._found
            else:
                at = following

    def _first_base(self) -> int:
        """Returns the start of the log, or the base of the registered segment around it: the records in between are
        deleted."""
        start = self._found.log_start_offset
        around = [
            item.base_offset for item in self._usable if item.registered and item.base_offset < start < item.end_offset
        ]
        return min(around, default=start)

    def _following(self, at: int) -> int | None:
        """Returns the base of the next usable candidate, None if there is none."""
        position = bisect_left(self._usable, at, key=lambda item: item.base_offset)
        return self._usable[position].base_offset if position < len(self._usable) else None

    def _cross(self, at: int, following: int | None) -> bool:
        """Accounts for the offsets in between; returns False if the segments at `following` must not be reached."""
        lost = self._registered_between(at, following)
        hole = self._hole_before(at, following)
        # The gap is at the beginning of the log, where retention removes segments.
        if self._has_retention and not self._found.chosen:
            ends = [span.end_offset for span in lost] + ([following] if following is not None else [])
            self._found.log_start_offset = max([self._found.log_start_offset, *ends])
            return True
        if hole is not None and not self._accept_holes:
            return False
        self._found.lost += lost
        if hole is not None:
            self._found.lost.append(hole)
        return True

    def _registered_between(self, at: int, following: int | None) -> list[EpochSpan]:
        found = []
        for row in self._ranges.values():
            base = max(at, row.start_offset)
            end = row.registered_end if following is None else min(following, row.registered_end)
            if base < end:
                found.append(EpochSpan(row.epoch, base, end))
        return sorted(found, key=lambda span: span.base_offset)

    def _hole_before(self, at: int, following: int | None) -> EpochSpan | None:
        """Returns the offsets that were never registered in the epoch that continues at `following`; None if there are
        none."""
        epoch = None if following is None else self._owner(following)
        if following is None or epoch is None:
            return None
        known = self._ranges[epoch].registered_end if epoch in self._ranges else 0
        base = max(at, self._starts[epoch], known)
        return EpochSpan(epoch, base, following) if base < following else None

    def _strand(self, following: int | None) -> None:
        assert following is not None, "only what follows can be stranded"
        epoch = self._owner(following)
        gone = [
            item for item in self._usable if item.base_offset >= following and self._owner(item.base_offset) == epoch
        ]
        self._found.stranded += gone
        stranded = {id(item) for item in gone}
        self._usable = [item for item in self._usable if id(item) not in stranded]

    def _owner(self, offset: int) -> int | None:
        """Returns the last epoch that starts at or below `offset`; starts ascend with the epochs."""
        position = bisect_right(self._epochs, offset, key=lambda epoch: self._starts[epoch]) - 1
        return self._epochs[position] if position >= 0 else None

    def _void(self, item: SegmentCandidate) -> bool:
        return any(self._fenced(span) for span in item.spans)

    def _fenced(self, span: EpochSpan) -> bool:
        position = bisect_right(self._epochs, span.epoch)
        if position < len(self._epochs) and self._starts[self._epochs[position]] < span.end_offset:
            return True
        row = self._ranges.get(span.epoch)
        # Younger than the backup: only the epochs behind it limit its offsets.
        if row is None:
            return False
        end = row.registered_end if row.status == LOST else row.end_offset
        return span.base_offset < row.start_offset or (end is not None and span.end_offset > end)


def _starts(ranges: Mapping[int, RangeRow], candidates: Iterable[SegmentCandidate]) -> dict[int, int]:
    """Returns the start of each epoch, as far as it can be known. Starts are made to ascend: offsets below a known
    later start belong to the earlier epoch."""
    starts: dict[int, int] = {epoch: row.start_offset for epoch, row in ranges.items()}
    for item in candidates:
        for span in item.spans:
            if span.epoch not in ranges:
                starts[span.epoch] = min(starts.get(span.epoch, span.base_offset), span.base_offset)
    lowest: int | None = None
    for epoch in sorted(starts, reverse=True):
        lowest = starts[epoch] if lowest is None else min(lowest, starts[epoch])
        starts[epoch] = lowest
    return starts


def _by_base(candidates: Iterable[SegmentCandidate]) -> dict[int, list[SegmentCandidate]]:
    edges: dict[int, list[SegmentCandidate]] = defaultdict(list)
    for item in candidates:
        edges[item.base_offset].append(item)
    return edges


def _farthest(at: int, edges: Mapping[int, Sequence[SegmentCandidate]]) -> list[SegmentCandidate]:
    """Returns the adjacent candidates from `at` on that reach farthest; of several paths the path with the fewest
    unregistered segments, then with the fewest segments."""
    best: dict[int, tuple[tuple[int, int], SegmentCandidate | None]] = {at: ((0, 0), None)}
    waiting, farthest = [at], at
    while waiting:
        # Candidates lead to greater offsets only, so the cost of an offset is final once it leaves the heap.
        offset = heapq.heappop(waiting)
        (new, count), _ = best[offset]
        for item in edges.get(offset, ()):
            cost = (new + (not item.registered), count + 1)
            if item.end_offset not in best:
                heapq.heappush(waiting, item.end_offset)
            if item.end_offset not in best or cost < best[item.end_offset][0]:
                best[item.end_offset] = (cost, item)
            farthest = max(farthest, item.end_offset)
    path: list[SegmentCandidate] = []
    while (step := best[farthest][1]) is not None:
        path.append(step)
        farthest = step.base_offset
    return path[::-1]
