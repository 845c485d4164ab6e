"""Watches for a disk of the log that stays full for so long that other agents should lead.

Owns: the time since which the disk is full, and the check for new room. Does not own: the leadership transfers, which
the coordinator starts when a heartbeat reports a full log.
Invariants: a log that was full counts as full until there is room for a whole file; otherwise small batches that still
fit would send leaderships to and fro. No caller waits for a check: the log's thread runs it, and may hang on the disk.
"""

import asyncio
import logging

from shruntime.clock import Clock
from shruntime.tasks import Tasks

from streamhouse_ingest.ports import LogFiles

log = logging.getLogger(__name__)


class WalSpace:
    """Fullness of the disk. The writer calls `note_full`; the heartbeats call `check` and report `is_full`. `tasks`
    owns the task of a check. grace_ms: how long the disk may be full before the log is reported full."""

    def __init__(self, files: LogFiles, clock: Clock, tasks: Tasks, *, grace_ms: int) -> None:
        self._files = files
        self._clock = clock
        self._tasks = tasks
        self._grace_ms = grace_ms
        self._full_since_ms: int | None = None
        self._is_full = False
        self._checking: asyncio.Task[None] | None = None

    @property
    def is_full(self) -> bool:
        """True if the last check found the disk still full after `grace_ms`."""
        return self._is_full

    def note_full(self) -> None:
        """Notes that a group could not be written for lack of space."""
        if self._full_since_ms is None:
            self._full_since_ms = self._clock.monotonic_ms()
            log.warning("the write-ahead log cannot grow; after %d ms others are to lead instead", self._grace_ms)

    def check(self) -> None:
        """Starts a check for room if the log was full, unless a check is still running."""
        if self._full_since_ms is not None and (self._checking is None or self._checking.done()):
            self._checking = self._tasks.spawn("check for room in the log", self._check(self._full_since_ms))

    async def _check(self, since_ms: int) -> None:
        # In the log's thread: on a disk that hangs the check waits behind the writes, and the heartbeats go on.
        if await self._files.run(self._files.wal.has_space_for_file):
            log.info("the write-ahead log has room again")
            self._full_since_ms, self._is_full = None, False
        else:
            self._is_full = self._clock.monotonic_ms() - since_ms >= self._grace_ms
