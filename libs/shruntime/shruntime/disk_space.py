"""Free space of a disk, for a metric.

Owns: the latest look. Does not own: the disk, or the thread that looks. Invariants: only the task waits for a look: on
a disk that hangs the call does not return, and the metrics page must.
"""

import asyncio
import logging
import os
from concurrent.futures import Executor
from pathlib import Path

from shruntime.clock import Clock

log = logging.getLogger(__name__)

LOOK_EVERY_MS = 10_000
"""As often as most scrapers ask; an answer takes microseconds."""


class DiskSpace:
    """Looks at the file system of `directory` in `thread` (None: the event loop's own threads)."""

    def __init__(self, directory: Path, clock: Clock, thread: Executor | None = None) -> None:
        self._directory = directory
        self._clock = clock
        self._thread = thread
        self.free_bytes: int | None = None
        """Bytes that this process may still write there; None before the first look and after one that failed."""

    async def run(self) -> None:
        """Looks in a loop until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                self.free_bytes = await loop.run_in_executor(self._thread, self._look)
            except OSError as error:
                if self.free_bytes is not None:
                    log.warning("the free space of %s is not known: %s", self._directory, error)
                self.free_bytes = None
            await self._clock.sleep_ms(LOOK_EVERY_MS)

    def _look(self) -> int:
        found = os.statvfs(self._directory)
        return found.f_bavail * found.f_frsize
