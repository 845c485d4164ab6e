"""Deletes the log's files once nothing in them is needed."""

import asyncio
import logging

from streamhouse_ingest.log.history import History
from streamhouse_ingest.log.logs import Logs
from streamhouse_ingest.ports import LogFiles

log = logging.getLogger(__name__)


class Trimmer:
    """One task; in the log's own thread, so that a deletion never races with a rotation."""

    def __init__(self, logs: Logs, files: LogFiles, history: History) -> None:
        self._logs = logs
        self._files = files
        self._history = history
        self._wanted = asyncio.Event()

    def want(self) -> None:
        self._wanted.set()

    async def run(self) -> None:
        """Deletes what may go, whenever something was registered."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            await self.trim()

    async def trim(self) -> None:
        """Raises OSError when a file cannot be deleted."""
        wal, index = self._files.wal, self._files.index
        for file in index.deletable(self._logs.registered_end, wal.active):
            # Metadata from before these registrations must not find the log without them and take it for whole. Noted
            # once for all files, or, where the disk is full, when one that is gone has made room.
            await self._history.save()
            await self._files.run(wal.delete, file)
            index.remove(file)
            log.info("deleted log file %d: everything in it is registered", file)
