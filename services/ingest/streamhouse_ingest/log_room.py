"""Watches whether the log's disk has been without room for so long that others should lead.

Owns: since when there is no room. Does not own: the moves, which the coordinator asks for once it hears of it.
Invariant: a log that was full counts as full until there is room for a whole file, or small batches that still fit
would send the leaderships to and fro.
"""

import asyncio
import logging
from concurrent.futures import Executor

from shruntime.clock import Clock

from streamhouse_ingest.ports import Wal

log = logging.getLogger(__name__)


class LogRoom:
    """`full` by the writer, `lacking` by whoever tells the coordinator."""

    def __init__(self, wal: Wal, thread: Executor, clock: Clock, *, grace_ms: int) -> None:
        self._wal = wal
        self._thread = thread
        self._clock = clock
        self._grace_ms = grace_ms
        self._full_since_ms: int | None = None

    def full(self) -> None:
        """A group could not be written for lack of room."""
        if self._full_since_ms is None:
            self._full_since_ms = self._clock.monotonic_ms()
            log.warning("the write-ahead log cannot grow; after %d ms others are to lead instead", self._grace_ms)

    async def lacking(self) -> bool:
        """Returns True once the log has been full for longer than the grace period; looks whether it still is."""
        since_ms = self._full_since_ms
        if since_ms is None:
            return False
        if await asyncio.get_running_loop().run_in_executor(self._thread, self._wal.has_room):
            log.info("the write-ahead log has room again")
            self._full_since_ms = None
            return False
        return self._clock.monotonic_ms() - since_ms >= self._grace_ms
