"""Watches whether the log's disk has been without room for so long that others should lead.

Owns: since when there is no room, and the look whether there is some again. Does not own: the moves, which the
coordinator asks for once it hears of it.
Invariants: a log that was full counts as full until there is room for a whole file, or small batches that still fit
would send the leaderships to and fro. Nobody waits for a look: the log's thread, which makes it, may hang on a disk.
"""

import asyncio
import logging

from shruntime.clock import Clock
from shruntime.tasks import Tasks

from streamhouse_ingest.ports import LogFiles

log = logging.getLogger(__name__)


class WalSpace:
    """`note_full` by the writer, `look` and `is_full` by whoever tells the coordinator. `tasks` owns the look."""

    def __init__(self, files: LogFiles, clock: Clock, tasks: Tasks, *, grace_ms: int) -> None:
        self._files = files
        self._clock = clock
        self._tasks = tasks
        self._grace_ms = grace_ms
        self._full_since_ms: int | None = None
        self._is_full = False
        self._looking: asyncio.Task[None] | None = None

    @property
    def is_full(self) -> bool:
        """True if at the last look the log had been full for the grace period, and still was."""
        return self._is_full

    def note_full(self) -> None:
        """Notes that a group could not be written for lack of space."""
        if self._full_since_ms is None:
            self._full_since_ms = self._clock.monotonic_ms()
            log.warning("the write-ahead log cannot grow; after %d ms others are to lead instead", self._grace_ms)

    def look(self) -> None:
        """Begins to look whether a log that was full still is, unless such a look is under way."""
        if self._full_since_ms is not None and (self._looking is None or self._looking.done()):
            self._looking = self._tasks.spawn("look for room in the log", self._look(self._full_since_ms))

    async def _look(self, since_ms: int) -> None:
        if await self._files.run(self._files.wal.has_space_for_file):
            log.info("the write-ahead log has room again")
            self._full_since_ms, self._is_full = None, False
        else:
            self._is_full = self._clock.monotonic_ms() - since_ms >= self._grace_ms
