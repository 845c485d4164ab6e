"""Deletes the log's files once nothing in them is needed."""

import asyncio
import logging
from concurrent.futures import Executor

from streamhouse_ingest.log.history import History
from streamhouse_ingest.log.logs import Logs
from streamhouse_ingest.log.wal_index import WalIndex
from streamhouse_ingest.ports import Wal

log = logging.getLogger(__name__)


class Trimmer:
    """One task; in the log's own thread, so that a deletion never races with a rotation."""

    def __init__(self, logs: Logs, wal: Wal, index: WalIndex, thread: Executor, history: History) -> None:
        self._logs = logs
        self._wal = wal
        self._index = index
        self._thread = thread
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
        loop = asyncio.get_running_loop()
        for file in self._index.deletable(self._logs.registered_end, self._wal.active):
            # Metadata from before these registrations must not find the log without them and take it for whole. Noted
            # once for all files, or, where the disk is full, when one that is gone has made room.
            await self._history.save()
            await loop.run_in_executor(self._thread, self._wal.delete, file)
            self._index.remove(file)
            log.info("deleted log file %d: everything in it is registered", file)
