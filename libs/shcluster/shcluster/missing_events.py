"""Detects that events of the metadata that were seen are gone: a rollback, as of an old dump. Pure.

Owns: the position of the last event that is known to be missing, of one history.
Invariant: it is kept until another history begins, as a restore does: soon there are as many events again as were seen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class MissingEvents:
    """`position`: of an event of `history_id` that was seen and is gone; 0: none."""

    history_id: str = ""
    position: int = 0

    def judge(self, history_id: str, position: int, noted_position: int, *, seen: tuple[str, int]) -> int:
        """Returns the position from now on. The coordinator's head is event `position` of `history_id`, and
        `noted_position` is what coordinators know to be missing; `seen`: the history and position of the index, as of
        before the head was asked for."""
        if history_id != self.history_id:
            self.history_id, self.position = history_id, 0
        seen_history_id, seen_position = seen
        if seen_history_id == history_id and position < seen_position:
            self.position = max(self.position, seen_position)
        self.position = max(self.position, noted_position)
        return self.position
