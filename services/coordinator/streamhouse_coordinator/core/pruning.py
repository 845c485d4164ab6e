"""Decides which events may be pruned, and how the bases change. Pure.

Terms: the *base* of a projection has its rows as of the last pruned event (`pruned_position`).
Invariant: base and kept events together give the projection; an event is pruned by applying it to the bases.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Remove, RowOp, Set, elsewhere, replayed, row_ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Reasons to keep events. `before_ms`: only events appended before this time may go. `up_to`: only events up to
    this position. RabbitMQ has confirmed the events up to `published`, and gets the later events that are younger than
    `unpublished_before_ms`; None: no relay publishes."""

    before_ms: int
    up_to: int
    published: int | None
    unpublished_before_ms: int

    def keep(self, row: t.EventRow) -> bool:
        """Returns True if the event is needed."""
        if row.position > self.up_to or row.created_ms >= self.before_ms:
            return True
        unpublished = self.published is not None and row.position > self.published
        return unpublished and row.created_ms >= self.unpublished_before_ms


def prunable(oldest: Sequence[t.EventRow], needs: Needs) -> list[t.EventRow]:
    """Returns the leading events of `oldest`, ascending, up to the first that is needed. An event of a type that this
    version does not know is kept with all later events, since its row operations are unknown."""
    rows: list[t.EventRow] = []
    for row in oldest:
        if needs.keep(row) or replayed(row) is None:
            break
        rows.append(row)
    return rows


def pruning(rows: Sequence[t.EventRow]) -> list[RowOp]:
    """Returns the row operations that prune these events, which are the oldest and not empty: they move the bases
    on."""
    events = [replayed(row) for row in rows]
    moved = [elsewhere(op, t.base_of) for event in events if event is not None for op in row_ops(event)]
    gone = [Remove(t.EVENTS, {"position": row.position}) for row in rows]
    return [*moved, *gone, Set(t.PRUNED, (True,), {"position": rows[-1].position})]
