"""Deletes files of the write-ahead log once everything in them is registered.

Owns: the request to trim. Does not own: which files are deletable (wal_index.py), the files (adapters/wal.py).
Invariants: the metadata position is saved before a file is deleted, unless the disk is full; a file leaves the index
only after its deletion.
"""

import asyncio
import logging

from streamhouse_ingest.log.history import History
from streamhouse_ingest.log.logs import Logs
from streamhouse_ingest.ports import LogFiles

log = logging.getLogger(__name__)


class Trimmer:
    """A single task. Deletes in the log's own thread, so that a deletion never races with a rotation."""

    def __init__(self, logs: Logs, files: LogFiles, history: History) -> None:
        self._logs = logs
        self._files = files
        self._history = history
        self._requested = asyncio.Event()

    def request(self) -> None:
        """Makes `run` trim soon; requests until then count as one."""
        self._requested.set()

    async def run(self) -> None:
        """Deletes deletable files after each request(), until cancelled. Raises OSError."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            await self.trim()

    async def trim(self) -> None:
        """Deletes all deletable files, oldest first. Raises OSError if a file cannot be deleted."""
        wal, index = self._files.wal, self._files.index
        for file in index.deletable(self._logs.registered_end, wal.active):
            # If the metadata were restored to a state before these registrations, the log would look complete although
            # the records are gone; the saved position reveals the rollback. A single save serves all files, unless the
            # disk is full: then the save succeeds once a deleted file has made room.
            await self._history.save()
            await self._files.run(wal.delete, file)
            # After the deletion: the index must not forget a file that is still on the disk.
            index.remove(file)
            log.info("deleted log file %d: everything in it is registered", file)
