"""Unrecovered ranges: offsets of which a restore cannot know the records, because only agents' logs may hold them.
Pure.

An unrecovered range is orphaned and has neither agent nor log. With epoch n an unrecovered range stands for all epochs
above the previous range up to n, and for the rest of the previous range if that has no known end: the previous range
ends where the unrecovered range begins, until its agent reports more. Readers wait at an unrecovered range. An agent
that opens a session with a log of such an epoch gets the part as a range of its own.

Invariant: the ranges of a partition ascend by epoch and by offset alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from streamhouse_coordinator.core.tables import ORPHANED, SETTLED, RangeRow


@dataclass(frozen=True, slots=True)
class Reported:
    """Offsets [first_offset, end_offset) that an agent's log holds of an epoch. Lower offsets are registered, or have
    left the log."""

    epoch: int
    first_offset: int
    end_offset: int


@dataclass(slots=True, kw_only=True)
class Split:
    """Changes of a partition's ranges. `reset`: epochs that lose their segments, because the agent has all of their
    records and earlier ones. `ends`: the ends that count, where these are below the reported ends."""

    ranges: list[RangeRow]
    removed_epochs: list[int] = field(default_factory=list)
    reset: list[int] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)


def unrecovered_range(topic_id: str, partition: int, epoch: int, start_offset: int, limit_offset: int) -> RangeRow:
    """Returns an unrecovered range for [start_offset, limit_offset)."""
    return RangeRow(
        topic_id=topic_id,
        partition=partition,
        epoch=epoch,
        start_offset=start_offset,
        limit_offset=limit_offset,
        registered_end=start_offset,
        end_offset=None,
        status=ORPHANED,
        session_id="",
        agent_id="",
        wal_id="",
        moving=False,
    )


def is_blank(row: RangeRow) -> bool:
    """True for an unrecovered range with nothing registered."""
    return is_unrecovered(row) and row.registered_end == row.start_offset


def is_unrecovered(row: RangeRow) -> bool:
    """True if a restore made the range, and no agent has claimed it."""
    return row.status == ORPHANED and not row.wal_id


def released(row: RangeRow) -> RangeRow:
    """Returns the range as settled, for when no agent has records of it. A range with nothing registered becomes empty
    and lies at the old limit, so that the next range begins behind all offsets that may have been allocated."""
    at = row.limit_offset if is_blank(row) else row.registered_end
    start = at if is_blank(row) else row.start_offset
    return replace(row, status=SETTLED, start_offset=start, registered_end=at, limit_offset=at, end_offset=at)


def split(ranges: Sequence[RangeRow], reported: Sequence[Reported], agent_id: str, wal_id: str) -> Split:
    """Returns the changes of a partition's ranges that follow from an agent's report of its log. `ranges`: all of the
    partition, ascending."""
    rows = sorted(ranges, key=lambda row: row.epoch)
    result = Split(ranges=[])
    for item in sorted(reported, key=lambda item: item.epoch):
        # The first row at or above the epoch: its own range, or the unrecovered range that stands for it.
        at = next((at for at, row in enumerate(rows) if row.epoch >= item.epoch), len(rows))
        if at < len(rows) and rows[at].epoch == item.epoch and not is_blank(rows[at]):
            _claim(rows, at, item, agent_id, wal_id, result)
        elif at < len(rows) and is_blank(rows[at]):
            _take(rows, at, item, agent_id, wal_id, result)
    _compare(ranges, rows, result)
    return result


def _claim(rows: list[RangeRow], at: int, item: Reported, agent_id: str, wal_id: str, result: Split) -> None:
    """Claims a known range for the agent; records of the log beyond its limit are taken out of the unrecovered range
    that follows."""
    row = rows[at]
    # Settled and lost ranges have their ends, and the range of another log can only grow by that log.
    if row.status != ORPHANED or row.wal_id not in ("", wal_id):
        return
    row = replace(row, agent_id=agent_id, wal_id=wal_id)
    before = rows[at - 1] if at else None
    floor = 0 if before is None else before.registered_end if before.end_offset is None else before.end_offset
    if not rows[at].wal_id and max(item.first_offset, floor) < row.start_offset:
        # Nothing of the epoch was registered before the backup: the segment that was found is not its beginning, and
        # the log has the same records and earlier ones.
        start = max(item.first_offset, floor)
        row = replace(row, start_offset=start, registered_end=start)
        result.reset.append(row.epoch)
        if before is not None and before.end_offset is None:
            rows[at - 1] = replace(before, limit_offset=min(before.limit_offset, start))
    rows[at] = row
    following = rows[at + 1] if at + 1 < len(rows) else None
    if following is not None and is_blank(following) and following.start_offset == row.limit_offset:
        end = min(max(item.end_offset, row.limit_offset), following.limit_offset)
        rows[at] = replace(row, limit_offset=end)
        rows[at + 1] = replace(following, start_offset=end, registered_end=end)
    if item.end_offset > rows[at].limit_offset:
        result.ends[item.epoch] = rows[at].limit_offset


def _take(rows: list[RangeRow], at: int, item: Reported, agent_id: str, wal_id: str, result: Split) -> None:
    """Inserts an unknown epoch as a range; the rest of the unrecovered range stays on both sides."""
    whole = rows[at]
    first = max(item.first_offset, whole.start_offset)
    end = min(item.end_offset, whole.limit_offset)
    if end != item.end_offset:
        result.ends[item.epoch] = end
    if first >= end:
        return
    own = replace(whole, epoch=item.epoch, start_offset=first, registered_end=first, limit_offset=end)
    parts = [replace(own, agent_id=agent_id, wal_id=wal_id)]
    before = rows[at - 1] if at else None
    if item.epoch > (before.epoch if before is not None else 0) + 1:
        parts.insert(0, replace(whole, epoch=item.epoch - 1, limit_offset=first))
    # Adjacent epochs leave no number for an unrecovered range in between: the earlier range takes these offsets.
    elif before is not None and before.end_offset is None and before.limit_offset == whole.start_offset:
        rows[at - 1] = replace(before, limit_offset=first)
    if whole.epoch > item.epoch:
        parts.append(replace(whole, start_offset=end, registered_end=end))
    rows[at : at + 1] = parts


def _compare(before: Sequence[RangeRow], rows: list[RangeRow], result: Split) -> None:
    """Drops empty ranges and keeps the changed ones in `result`. The last range stays, even if empty: the next range is
    granted behind it."""
    empty = [row for row in rows[:-1] if is_blank(row) and row.start_offset == row.limit_offset]
    kept = [row for row in rows if row not in empty]
    known: Mapping[int, RangeRow] = {row.epoch: row for row in before}
    result.ranges = [row for row in kept if known.get(row.epoch) != row]
    result.removed_epochs = sorted(set(known) - {row.epoch for row in kept})
