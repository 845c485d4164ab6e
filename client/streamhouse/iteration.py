"""Handing over: what was received, by turns between partitions, as records or as batches, to any number of tasks or
threads; in a bounded read only up to its ends.

Owns: the portion whose turn it is, which records are in hand. Does not own: what is received, and of which partitions.
Invariants: a record is handed to one worker only. Records of a partition are handed over in order: `delivered` of its
cursor is one past the last one. Whatever an exception interrupts, no record is passed over: it is handed over again.

`take` and `take_batch` run where the application does: in its tasks, or in its threads, one at a time by a lock of
theirs. Everything else runs in the event loop. Between the two there is no lock, only single assignments: the loop
would stand still with an application thread that holds one, and the heartbeats of all clients with it.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import islice

import numpy as np

from streamhouse.core.in_flight import InFlight, Worker
from streamhouse.core.positions import ROWS_FIRST, ROWS_MAX, Cursor, Portion
from streamhouse.loop_turns import TURN_S, let_loop_run
from streamhouse.offsets import Offsets
from streamhouse.reader import Reader
from streamhouse.records import Record, RecordBatch, TopicPartition

# Records are handed over in bursts, and the clock is asked between two: for every record that would cost a tenth of
# what handing it over does. An application that needs long for a record gets bursts of one; but where it was fast and
# becomes slow at once, it has the rest of a burst before the loop has its turn: with 0.5 s each, 8 s, and a member may
# be silent for 10.
BURST_MAX = 16
BURST_S_MIN, BURST_S_MAX = TURN_S / 8, TURN_S / 2

# Of no rows, before there is a portion.
_NO_CURSOR = Cursor.at(TopicPartition("", 0), 0)


class Iteration:
    """`begin` when the application starts an iteration; then `next`, or `take` or `take_batch` and `advance` whenever
    these have nothing. `opening()`: whether more partitions are to come. `more(worker)`: advances, by the owner.
    `received(batch)`: the application is handed a portion, where it runs. `is_interrupted()`: True while the owner has
    something to do, in `more`, before it hands over another portion; asked from any thread. `in_loop`: has the event
    loop make a call; None if that is where the application runs."""

    def __init__(
        self,
        reader: Reader,
        offsets: Offsets,
        stop_at_end: bool,
        opening: Callable[[], bool],
        more: Callable[[Worker], Awaitable[bool]],
        *,
        received: Callable[[RecordBatch], None],
        is_interrupted: Callable[[], bool] = lambda: False,
        is_bounded: bool = False,
    ) -> None:
        self._reader = reader
        self._offsets = offsets
        self._stop_at_end = stop_at_end
        self._is_bounded = is_bounded or stop_at_end
        self._opening = opening
        self._more = more
        self._received = received
        self._is_interrupted = is_interrupted
        self._clock = time.monotonic
        self.in_flight = InFlight(_ended_well, _has_ended)
        self.in_loop: Callable[[Callable[[], None]], object] | None = None
        self._ends_wanted = False
        self._ends_turn = asyncio.Lock()
        self._closed = False
        self._waiting = 0
        self._asked = 0
        self._turn_ends_s = 0.0
        # A portion goes from the reader to `_coming` (in the loop), to `_portion` (by `take`), and from there to
        # `_leaving` if its turn is over before its records, else to `_finished`; back to the reader from both.
        self._coming: Portion | None = None
        self._portion: Portion | None = None
        self._turn_offset = 0  # where the portion's turn began
        self._records_read = self._bytes_read = 0  # in the turns before
        self._leaving: list[Portion] = []
        self._finished: list[Portion] = []
        self._cursor = _NO_CURSOR
        # Records of the portion: this burst, out of those that were made so far. The last one of all is in neither.
        self._burst: Iterator[Record] = iter(())
        self._rows: Iterator[Record] = iter(())
        self._rows_count = ROWS_FIRST
        self._burst_count = 1
        self._burst_began_s = 0.0

    def start(self) -> None:
        """Takes the running loop's clock."""
        self._clock = _clock_of(asyncio.get_running_loop())
        self._turn_ends_s = self._clock()

    def begin(self) -> None:
        """A bounded read ends where the log ends now; of several at a time, where it ended when the last one began."""
        self._ends_wanted = self._stop_at_end

    def close(self) -> None:
        """Nothing more is handed over."""
        self._closed = True
        self._reader.notify()

    @property
    def is_ready(self) -> bool:
        """True if there may be something to take already."""
        return self._portion is not None or self._coming is not None

    def progress(self) -> object:
        """Returns what is another thing whenever the application has asked since the last time, or waits right now."""
        return object() if self._waiting else (self._asked, *self.in_flight.held())

    # ---- in the application's tasks or threads

    async def next(self, worker: Worker) -> Record:
        """Returns the next record, now in the worker's hand. Raises StopAsyncIteration at the end, and what `advance`
        raises."""
        while True:
            cursor = self._cursor
            for record in self._burst:  # as in `take`: a call would cost a tenth of all that a record does
                if cursor.stopped:
                    break
                worker.held = (cursor, record, worker.held)
                cursor.delivered = record[2] + 1
                return record
            taken = self._take_slowly(worker)
            if taken is not None:
                return taken
            if not await self._more(worker):
                raise StopAsyncIteration

    def take(self, worker: Worker) -> Record | None:
        """Returns the next record, now in the worker's hand; None if `advance` is needed first. If it is interrupted,
        or the record does not reach the application, `give_back` must follow."""
        cursor = self._cursor
        for record in self._burst:
            if cursor.stopped:
                break
            worker.held = (cursor, record, worker.held)
            cursor.delivered = record[2] + 1
            return record
        return self._take_slowly(worker)

    def _take_slowly(self, worker: Worker) -> Record | None:
        """Returns the next record like `take`, where a burst has ended."""
        returned = self.in_flight.take_returned(worker, whole=False)
        if returned is not None:
            assert isinstance(returned, Record), "one at a time"
            return returned
        if not self._has_turn():
            return None
        portion = self._portion
        assert portion is not None, "it has the turn"
        record = next(self._rows, None)
        if record is None or not portion.cursor.live:
            rows, is_last = portion.rows(self._rows_count)
            if rows is None:
                self._finish(portion)
                return None
            self._rows_count = min(2 * self._rows_count, ROWS_MAX)
            self._rows = iter(rows)
            record = next(self._rows)
            if is_last:
                worker.held = (portion.cursor, record, worker.held)
                self._finish(portion)  # now, not when somebody asks again: others may wait for the end
                return record
        self._burst = islice(self._rows, self._burst_count - 1)
        worker.held = (portion.cursor, record, worker.held)
        portion.cursor.delivered = record.offset + 1
        return record

    def take_batch(self, worker: Worker, count_max: int | None = None) -> RecordBatch | None:
        """As `take`, but all that is left of the portion whose turn it is, or count_max records of it."""
        returned = self.in_flight.take_returned(worker, whole=True, count_max=count_max)
        if returned is not None:
            assert isinstance(returned, RecordBatch), "the whole"
            return returned
        if not self._has_turn():
            return None
        portion = self._portion
        assert portion is not None, "it has the turn"
        batch = portion.rest()
        if batch is not None and count_max is not None and len(batch) > count_max:
            batch = batch.slice(0, count_max)
            worker.held = (portion.cursor, batch, worker.held)
            portion.cursor.delivered = int(batch.offsets[-1]) + 1
            self._forget_rows()  # they may begin before
            return batch
        if batch is not None:
            worker.held = (portion.cursor, batch, worker.held)
        self._finish(portion)
        return batch

    def _has_turn(self) -> bool:
        """True if there is a portion and its turn is not over; one that is coming has its turn now."""
        if self._is_interrupted():
            if self._portion is not None:
                self._put_down(self._leaving)
            return False
        now_s = self._clock()
        is_new = self._portion is None
        if is_new:
            coming = self._coming
            if coming is None:
                return False
            # In this order, and only what is there: the loop brings another one as soon as it finds neither.
            self._portion = coming
            self._coming = None
            self._cursor = coming.cursor
            self._turn_offset = coming.cursor.delivered
            self._forget_rows()
        portion = self._portion
        assert portion is not None, "it is there, or was taken just now"
        if portion.cursor.paused:
            self._put_down(self._leaving)
            return False
        # One record at least of each portion, or a slow machine would pass portions round and hand nothing over. And
        # where the loop has a thread of its own, nobody waits for the turn's end if there is no other partition.
        if now_s >= self._turn_ends_s and (is_new or (self.in_loop is not None and not self._reader.has_more)):
            self._turn_ends_s = now_s + TURN_S
        if now_s >= self._turn_ends_s:
            self._put_down(self._leaving)
            return False
        if not is_new:
            self._adapt_burst(now_s - self._burst_began_s)
        if not portion.is_handed_over:  # for the first time: a portion whose turn ended comes back
            portion.is_handed_over = True
            if portion.batch is not None:
                self._received(portion.batch)
        self._burst_began_s = now_s
        return True

    def _adapt_burst(self, took_s: float) -> None:
        """Sizes the next burst by how long the last one took."""
        if took_s > BURST_S_MAX:
            self._burst_count = max(1, self._burst_count // 4)
        elif took_s < BURST_S_MIN:
            self._burst_count = min(2 * self._burst_count, BURST_MAX)

    def _finish(self, portion: Portion) -> None:
        """All of the portion is handed over, or its partition lost."""
        # What is left of a partition that was lost is nobody's to commit: the next owner is to read it.
        if portion.cursor.live:
            portion.cursor.delivered = portion.end_offset
        self._put_down(self._finished)

    def _put_down(self, where: list[Portion]) -> None:
        portion = self._portion
        assert portion is not None, "there is one to put down"
        where.append(portion)
        self._portion = None
        self._forget_rows()
        self._records_read, self._bytes_read = self._read_with(portion)
        # Those who wait for more have looked already: to them it may be the rest of a portion, or room for the next
        # ones, or the end. Whoever comes after this looks by itself.
        if self._waiting:
            self._tell(self._wake)

    def read(self) -> tuple[int, int]:
        """Returns the number of records handed over so far, and the bytes of their keys, values and headers. Not while
        a thread is inside `take`."""
        return self._read_with(self._portion)

    def _read_with(self, portion: Portion | None) -> tuple[int, int]:
        """Counts what was handed over of the portion in its turn: by turns, since counting each record would cost a
        tenth of handing it over."""
        if portion is None or portion.batch is None:
            return self._records_read, self._bytes_read
        turn = (self._turn_offset, portion.cursor.delivered)
        start, stop = np.searchsorted(portion.batch.offsets, turn).tolist()
        handed_over = portion.batch.slice(start, stop)
        return self._records_read + len(handed_over), self._bytes_read + handed_over.size_bytes

    def _forget_rows(self) -> None:
        """They are made again, from where the cursor is."""
        self._burst = self._rows = iter(())
        self._rows_count, self._burst_count = ROWS_FIRST, 1

    def give_back(self, worker: Worker, first: Mapping[TopicPartition, int] | None = None) -> None:
        """Returns the record that has not reached the application (Ctrl-C comes between any two steps) to the front: it
        is handed over before anything else."""
        self.in_flight.give_back(worker, first)
        self._forget_rows()
        self._tell(self._wake)

    def _tell(self, call: Callable[[], None]) -> None:
        if self.in_loop is not None:
            self.in_loop(call)
        else:
            call()

    # ---- in the event loop

    async def advance(self) -> bool:
        """Returns True when there is something to take, or the owner has something to do first; False at the end of a
        bounded read, or when closed.

        Raises what reading failed with: DataLoss, OffsetBelowStart, OffsetBeyondEnd, UnknownTopic, Unavailable (nothing
        answered for retry_timeout_ms). Iterating again goes on where it failed.
        """
        self._waiting += 1
        self._asked += 1
        is_over = self._clock() >= self._turn_ends_s
        try:
            self._settle()
            if is_over and self.in_loop is None:
                await self._let_loop_run()
            if self._ends_wanted:
                await self._set_ends()
            found, has_waited = await self._find()
            is_over = is_over or has_waited
            return found
        finally:
            self._waiting -= 1
            if is_over:
                self._turn_ends_s = self._clock() + TURN_S

    def bring(self) -> bool:
        """Returns True when there is something to take, without waiting. A failure whose turn it is stays where it is,
        for `advance` to raise: whoever has taken records meanwhile gets these first."""
        self._settle()
        while not self._closed and not self._is_interrupted():
            if self.in_flight.has_returned or self._portion is not None or self._coming is not None:
                return True
            if not self._reader.has_portion:
                return False
            portion = self._reader.pop()
            assert portion is not None, "it was there"
            self._coming = self._prepared(portion)
        return False

    @property
    def at_end(self) -> bool:
        """True once a bounded read has handed over everything up to its ends."""
        return self._is_bounded and not self.in_flight.returned and self._all_at_end()

    async def _let_loop_run(self) -> None:
        """An application whose code never waits would starve heartbeats, its own and others', and the stream."""
        await let_loop_run(self._clock() - self._turn_ends_s)

    async def _find(self) -> tuple[bool, bool]:
        """Returns whether there is something to take, and whether it had to be waited for."""
        has_waited = False
        while not self._closed:
            if self._is_interrupted() or self.bring():
                return True, has_waited  # perhaps another worker's, who has waited as well
            portion = self._reader.pop()  # raises a failure whose turn it is
            assert portion is None, "it would have been brought"
            if self._is_bounded and self._all_at_end():
                self._reader.notify()  # the others who wait
                return False, has_waited
            await self._reader.wait()
            has_waited = True
        return False, has_waited

    def _wake(self) -> None:
        self._settle()
        self._reader.notify()

    def _settle(self) -> None:
        """Returns to the reader what the application is done with for now."""
        while self._finished:
            self._reader.consumed(self._finished.pop())
        while self._leaving:
            self._reader.put_back(self._leaving.pop())

    def _prepared(self, portion: Portion) -> Portion | None:
        """Returns the portion, without what lies beyond the end of a bounded read: that is read again if the end moves.
        None if no records are left in it; then only the position moves."""
        cursor = portion.cursor
        if cursor.end is not None and portion.end_offset > (end := max(cursor.end, cursor.delivered)):
            self._reader.rewind(cursor, end)
            portion.cut_at(end)
        if portion.batch is not None:
            return portion
        cursor.delivered = portion.end_offset
        self._reader.consumed(portion)
        return None

    def _all_at_end(self) -> bool:
        # A list, no generator: threads ask for `at_end`, see InFlight.
        unread = [cursor for cursor in list(self._reader.cursors.values()) if not cursor.at_end]
        return not unread and not self._opening()

    async def _set_ends(self) -> None:
        async with self._ends_turn:
            if not self._ends_wanted:
                return  # another one has asked since
            self._ends_wanted = False  # an iteration that begins meanwhile asks again
            try:
                ends = await self._offsets.look_up("latest", self._reader.topic_ids())
            except BaseException:
                self._ends_wanted = True
                raise
            for where, end in ends.items():
                cursor = self._reader.cursors.get(where)
                if cursor is not None and cursor.end != (nearest := cursor.end_at(end)):
                    self._reader.set_end(cursor, nearest)


def _clock_of(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """The loop's clock, asked for every record: where it is the usual one, without the call in between."""
    return time.monotonic if type(loop).time is asyncio.BaseEventLoop.time else loop.time


def _ended_well(owner: object) -> bool:
    """True if the task returned. `exception()` would say so as well, and count as having seen it: asyncio reports those
    that nobody has seen."""
    return isinstance(owner, asyncio.Task) and owner.done() and not owner.cancelled() and not owner.get_stack(limit=1)


def _has_ended(owner: object) -> bool:
    if isinstance(owner, threading.Thread):
        return not owner.is_alive()
    return isinstance(owner, asyncio.Task) and owner.done()
