"""Detects that events of the metadata that were seen are gone: a rollback, as of an old dump. Pure.

Owns: the position of the last event that is known to be missing from a history.
Invariant: the position is kept until another history begins, as a restore makes it: new events soon fill the positions
of the missing events.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class MissingEvents:
    """Position of an event of `history_id` that was seen and is gone; 0: none."""

    history_id: str = ""
    position: int = 0

    def judge(self, history_id: str, position: int, noted_position: int, *, seen: tuple[str, int]) -> int:
        """Returns the missing position, after a look at the coordinator's head, event `position` of `history_id`.
        `noted_position`: the missing event that coordinators know of. `seen`: history and position of the index from
        before the head was requested."""
        if history_id != self.history_id:
            self.history_id, self.position = history_id, 0
        seen_history_id, seen_position = seen
        if seen_history_id == history_id and position < seen_position:
            self.position = max(self.position, seen_position)
        self.position = max(self.position, noted_position)
        return self.position
