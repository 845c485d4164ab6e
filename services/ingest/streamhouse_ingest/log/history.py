"""The metadata history (id, last position seen) under which this log was written.

Owns: the current and the saved position. Does not own: the file (adapters/wal_note.py), the check for a rollback, which
the coordinator makes when a session opens.
Invariants: within a session the position never goes back. The saved position lets the coordinator refuse metadata that
was restored to an earlier state, before records are dropped or offsets are given out again.
"""

import asyncio
import logging

from shruntime.tasks import Tasks

from streamhouse_ingest.ports import SCARCE, LogFiles, Seen

log = logging.getLogger(__name__)


class History:
    """The metadata history as seen by the session; saved in the log's own thread. `tasks` owns the task of a save that
    nothing waits for."""

    def __init__(self, seen: Seen, files: LogFiles, tasks: Tasks) -> None:
        self.seen = self._saved = seen
        self._files = files
        self._tasks = tasks
        self._saving: asyncio.Task[None] | None = None

    def opened(self, history_id: str, position: int) -> None:
        """Sets the history and the position at which a session was opened."""
        self.seen = Seen(history_id, position)

    def advance(self, position: int) -> None:
        """Advances the current position to `position`; a lower position changes nothing. `save` makes it durable."""
        self.seen = Seen(self.seen.history_id, max(self.seen.position, position))

    def save_later(self) -> None:
        """Starts a save if the position has changed, unless a started save still runs; an OSError fails `tasks`."""
        if self._is_unsaved and (self._saving is None or self._saving.done()):
            self._saving = self._tasks.spawn("save of the metadata position", self.save())

    @property
    def _is_unsaved(self) -> bool:
        return self.seen != self._saved and bool(self.seen.history_id)

    async def save(self) -> None:
        """Saves the position durably if it has changed. Raises OSError.

        Without disk space or a file descriptor the agent goes on and a later call saves: space comes back only while
        the agent runs, sends heartbeats and serves its log to segmenters. Until then the position saved before still
        detects a rollback to a state before that position.
        """
        if not self._is_unsaved:
            return
        seen = self.seen
        try:
            await self._files.run(self._files.wal.note_history, seen)
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            log.warning("the last position seen will be saved later: %s", error)
        else:
            self._saved = seen
