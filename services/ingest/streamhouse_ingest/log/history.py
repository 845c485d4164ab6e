"""What this agent's log goes with: the history of the metadata, and how far of it the agent has heard. Kept beside the
log, so that metadata that went back in time is noticed before anything is dropped or given out again."""

import logging

from streamhouse_ingest.ports import SCARCE, LogFiles, Seen

log = logging.getLogger(__name__)


class History:
    """Owned by the session; saved in the log's own thread."""

    def __init__(self, seen: Seen, files: LogFiles) -> None:
        self.seen = self._saved = seen
        self._files = files

    def opened(self, history_id: str, position: int) -> None:
        """A session was opened over this history."""
        self.seen = Seen(history_id, position)

    def heard_of(self, position: int) -> None:
        self.seen = Seen(self.seen.history_id, max(self.seen.position, position))

    async def save(self) -> None:
        """Durably; on a full disk, or without a file descriptor, the next call that finds room does. Raises OSError.

        Without room the agent goes on: it can only get some by giving its log away, to segmenters and with heartbeats.
        What is noted from before still serves, for all that the metadata held then.
        """
        seen = self.seen
        if seen == self._saved or not seen.history_id:
            return
        try:
            await self._files.run(self._files.wal.note_history, seen)
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            log.warning("how far the metadata was heard of will be noted later: %s", error)
        else:
            self._saved = seen
