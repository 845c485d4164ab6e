"""Handing over: what was received, in turn, as records or as batches; in a bounded read only up to its ends.

Owns: the portion in hand. Does not own: what is received, and of which partitions.
"""

from collections.abc import Callable, Iterator

from streamhouse.core.positions import Cursor, Portion
from streamhouse.offsets import Offsets
from streamhouse.reader import Reader
from streamhouse.records import Record, RecordBatch


class Iteration:
    """`begin` when the application starts an iteration, `advance` whenever it has taken all of the portion in hand:
    with `records`, or with `rest`. `opening()`: whether more partitions are to come."""

    def __init__(self, reader: Reader, offsets: Offsets, stop_at_end: bool, opening: Callable[[], bool]) -> None:
        self._reader = reader
        self._offsets = offsets
        self._stop_at_end = stop_at_end
        self._opening = opening
        self._portion: Portion | None = None
        self._ends_wanted = False
        self._closed = False
        self.records: Iterator[Record] = iter(())

    def begin(self) -> None:
        """A bounded read ends where the log ends now."""
        self._ends_wanted = self._stop_at_end

    def close(self) -> None:
        """Nothing more is handed over."""
        self._closed = True
        self._reader.notify()

    def rest(self) -> RecordBatch | None:
        """What was not handed over yet of the portion in hand, now handed over."""
        portion = self._portion
        batch = portion.rest() if portion is not None else None
        if portion is not None and batch is not None:
            portion.cursor.delivered = portion.end_offset
            self.records = iter(())
        return batch

    async def advance(self) -> bool:
        """Takes the next portion in hand, done with the one before; False at the end of a bounded read, or when closed.

        Raises what reading failed with: DataLoss, OffsetBelowStart, OffsetBeyondEnd, UnknownTopic, Unavailable (nothing
        answered for retry_timeout_ms). Iterating again goes on where it failed.
        """
        if self._portion is not None and self._portion.broken_off:
            self._portion.resume()
            self.records = self._portion.records()
            return True
        if self._portion is not None:
            self._portion.finish()
            self._portion = None
        if self._ends_wanted:
            await self._set_ends()
            self._ends_wanted = False
        while not self._closed:
            portion = self._reader.pop()
            if portion is not None:
                self._portion = self._bounded(portion)
                self.records = self._portion.records()
                return True
            if self._stop_at_end and self._all_at_end():
                break
            await self._reader.wait()
        return False

    def _bounded(self, portion: Portion) -> Portion:
        """Not beyond the end of a bounded read; what was received beyond it will be read again."""
        cursor = portion.cursor
        if cursor.end is None:
            return portion
        end = max(cursor.end, cursor.delivered)
        if portion.end_offset <= end:
            return portion
        stopped = Cursor.at(cursor.where, end, cursor.committed, end, cursor.topic_id)
        stopped.delivered, stopped.taken = cursor.delivered, cursor.taken
        self._reader.put(stopped)
        portion.cursor = stopped
        return portion.cut_at(end)

    def _all_at_end(self) -> bool:
        return not self._opening() and all(cursor.at_end for cursor in self._reader.cursors.values())

    async def _set_ends(self) -> None:
        for where, end in (await self._offsets.look_up("latest", self._reader.topic_ids())).items():
            cursor = self._reader.cursors.get(where)
            if cursor is not None and cursor.end != end:
                self._reader.put(Cursor.at(where, cursor.delivered, cursor.committed, end, cursor.topic_id))
