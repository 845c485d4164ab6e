"""Hands received records over to any number of tasks or threads, singly or as batches, by turns between partitions; in
a bounded read only up to its ends.

Owns: the portion whose turn it is, records in hand. Does not own: receiving, the choice of partitions.
Invariants: a record is handed to a single worker. Records of a partition are handed over in order: `delivered` of its
cursor is one past the last. An exception at any point skips no record: an interrupted record is handed over again.

`take` and `take_batch` run in the application's tasks, or in its threads, one at a time by a lock of those threads.
Everything else runs in the event loop. The two sides share no lock, only single assignments: an application thread that
holds a lock would stop the loop, and with the loop the heartbeats of all clients.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import islice

import numpy as np

from streamhouse.core.in_flight import InFlight, Worker
from streamhouse.core.options import ConsumerOptions
from streamhouse.core.positions import ROWS_FIRST, ROWS_MAX, Cursor, Portion
from streamhouse.loop_turns import TURN_S, let_loop_run
from streamhouse.offsets import Offsets
from streamhouse.reader import Reader
from streamhouse.records import Record, RecordBatch, TopicPartition

# Records are handed over in bursts, and the clock is read between two bursts: reading the clock for every record costs
# a tenth of handing the record over. An application that needs long for a record gets bursts of a single record. But an
# application that was fast and suddenly becomes slow has the rest of a burst before the loop gets its turn: with 0.5 s
# per record that is 8 s, and a member may be silent for 10.
BURST_MAX = 16
BURST_S_MIN, BURST_S_MAX = TURN_S / 8, TURN_S / 2

# Cursor of the empty burst, before the first portion.
_NO_CURSOR = Cursor.at(TopicPartition("", 0), 0)


class Iteration:
    """Hands over records: `begin` when the application starts an iteration; then `next`, or `take` or `take_batch`, and
    `advance` whenever these return None.

    `opening()`: True if further partitions are about to be opened. `more(worker)`: the owner's advance.
    `received(batch)`: called with each portion when the application gets it, in the application's task or thread.
    `is_interrupted()`: True while the owner has to do something, in `more`, before another portion is handed over;
    called from any thread. `in_loop`: makes the event loop call a function; None if the application runs in the loop.
    """

    def __init__(
        self,
        reader: Reader,
        offsets: Offsets,
        options: ConsumerOptions,
        opening: Callable[[], bool],
        more: Callable[[Worker], Awaitable[bool]],
        *,
        received: Callable[[RecordBatch], None],
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._reader = reader
        self._offsets = offsets
        self._stop_at_end = options.stop_at_end
        self._is_bounded = options.stop_at_end or options.end is not None
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
        # `_leaving` if its turn ends before its records do, else to `_finished`; from both back to the reader.
        self._coming: Portion | None = None
        self._portion: Portion | None = None
        self._turn_offset = 0  # where the portion's turn began
        self._records_read = self._bytes_read = 0  # counted in earlier turns
        self._leaving: list[Portion] = []
        self._finished: list[Portion] = []
        self._cursor = _NO_CURSOR
        # Records of the portion: `_burst` iterates over a part of `_rows`, the records made so far. The last record of
        # a portion is in neither.
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
        """Begins an iteration: a bounded read (stop_at_end) ends where the log ends now; among several iterations the
        last to begin decides."""
        self._ends_wanted = self._stop_at_end

    def close(self) -> None:
        """Stops handing over."""
        self._closed = True
        self._reader.notify()

    @property
    def is_ready(self) -> bool:
        """True if there may be a portion to take already."""
        return self._portion is not None or self._coming is not None

    def progress(self) -> object:
        """Returns an object that differs from the last answer if the application has asked for records since, or waits
        for them now."""
        return object() if self._waiting else (self._asked, *self.in_flight.held())

    # ---- in the application's tasks or threads

    async def next(self, worker: Worker) -> Record:
        """Returns the next record, now in the worker's hand. Raises StopAsyncIteration at the end, and the errors of
        `advance`."""
        while True:
            cursor = self._cursor
            for record in self._burst:  # inlined from `take`: a call would add a tenth to the cost of a record
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
        """Returns the next record, now in the worker's hand; None if `advance` is needed first. If the call is
        interrupted, or the record does not reach the application, `give_back` has to follow."""
        cursor = self._cursor
        for record in self._burst:
            if cursor.stopped:
                break
            worker.held = (cursor, record, worker.held)
            cursor.delivered = record[2] + 1
            return record
        return self._take_slowly(worker)

    def _take_slowly(self, worker: Worker) -> Record | None:
        """Returns the next record like `take`, after a burst has ended."""
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
                self._finish(portion)  # now, not with the next call: others may wait for the end
                return record
        self._burst = islice(self._rows, self._burst_count - 1)
        worker.held = (portion.cursor, record, worker.held)
        portion.cursor.delivered = record.offset + 1
        return record

    def take_batch(self, worker: Worker, count_max: int | None = None) -> RecordBatch | None:
        """Returns the rest of the portion whose turn it is, or count_max records of it, now in the worker's hand; None
        if `advance` is needed first. `give_back` as for `take`."""
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
            self._forget_rows()  # the rows made so far may begin before the cursor
            return batch
        if batch is not None:
            worker.held = (portion.cursor, batch, worker.held)
        self._finish(portion)
        return batch

    def _has_turn(self) -> bool:
        """Returns True if there is a portion and its turn is not over; begins the turn of a portion that is coming."""
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
            # In this order: the loop brings another portion as soon as both fields are None.
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
        # At least one record of each portion per turn: otherwise a slow machine would pass portions round and hand
        # nothing over. And where the loop has a thread of its own, nothing waits for the end of a turn while there is
        # no other partition.
        if now_s >= self._turn_ends_s and (is_new or (self.in_loop is not None and not self._reader.has_more)):
            self._turn_ends_s = now_s + TURN_S
        if now_s >= self._turn_ends_s:
            self._put_down(self._leaving)
            return False
        if not is_new:
            self._adapt_burst(now_s - self._burst_began_s)
        if not portion.is_handed_over:  # for the first time: after a turn a portion comes back
            portion.is_handed_over = True
            if portion.batch is not None:
                self._received(portion.batch)
        self._burst_began_s = now_s
        return True

    def _adapt_burst(self, took_s: float) -> None:
        """Sizes the next burst by the duration of the last."""
        if took_s > BURST_S_MAX:
            self._burst_count = max(1, self._burst_count // 4)
        elif took_s < BURST_S_MIN:
            self._burst_count = min(2 * self._burst_count, BURST_MAX)

    def _finish(self, portion: Portion) -> None:
        """Puts down a portion after its last record, or after a loss of its partition."""
        # The rest of a lost partition's portion must not be committed: the next owner has to read those records.
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
        # Waiting tasks and threads have looked already: this may leave the rest of a portion for them, or room for the
        # next portions, or be the end. Later callers look by themselves.
        if self._waiting:
            self._tell(self._wake)

    def read(self) -> tuple[int, int]:
        """Returns the number of records handed over so far, and the bytes of their keys, values and headers. Must not
        run while a thread is inside `take`."""
        return self._read_with(self._portion)

    def _read_with(self, portion: Portion | None) -> tuple[int, int]:
        """Returns the counts including the portion in its turn. Counted by turns: counting each record would cost a
        tenth of handing the record over."""
        if portion is None or portion.batch is None:
            return self._records_read, self._bytes_read
        turn = (self._turn_offset, portion.cursor.delivered)
        start, stop = np.searchsorted(portion.batch.offsets, turn).tolist()
        handed_over = portion.batch.slice(start, stop)
        return self._records_read + len(handed_over), self._bytes_read + handed_over.size_bytes

    def _forget_rows(self) -> None:
        """Drops the rows made so far; they are made again from the cursor's position."""
        self._burst = self._rows = iter(())
        self._rows_count, self._burst_count = ROWS_FIRST, 1

    def give_back(self, worker: Worker, first: Mapping[TopicPartition, int] | None = None) -> None:
        """Takes back records that have not reached the application (Ctrl-C comes between any two steps); they are
        handed over before anything else."""
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
        bounded read, or once closed.

        Raises the error with which reading failed: DataLoss, OffsetBelowStart, OffsetBeyondEnd, UnknownTopic,
        Unavailable (no answer for retry_timeout_ms). Iterating again continues where reading failed.
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
        """Returns True if there is something to take, without waiting. Leaves a queued error for `advance` to raise: a
        poll that has taken records returns these first."""
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
        """Gives the loop turns: an application that never waits would starve the stream and the heartbeats of all
        tasks."""
        await let_loop_run(self._clock() - self._turn_ends_s)

    async def _find(self) -> tuple[bool, bool]:
        """Returns two flags: True if there is something to take, and True if the call had to wait for that."""
        has_waited = False
        while not self._closed:
            if self._is_interrupted() or self.bring():
                return True, has_waited  # another worker that waited as well may take it first
            portion = self._reader.pop()  # raises a failure whose turn it is
            assert portion is None, "it would have been brought"
            if self._is_bounded and self._all_at_end():
                self._reader.notify()  # wakes the other waiting workers
                return False, has_waited
            await self._reader.wait()
            has_waited = True
        return False, has_waited

    def _wake(self) -> None:
        self._settle()
        self._reader.notify()

    def _settle(self) -> None:
        """Returns portions to the reader: finished portions as consumed, the others with their remaining records."""
        while self._finished:
            self._reader.consumed(self._finished.pop())
        while self._leaving:
            self._reader.put_back(self._leaving.pop())

    def _prepared(self, portion: Portion) -> Portion | None:
        """Returns the portion, cut at the end of a bounded read; the rest is fetched again if the end moves. Returns
        None if no records are left; then only the position moves."""
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
        # A list, no generator: threads read `at_end`, see InFlight.
        unread = [cursor for cursor in list(self._reader.cursors.values()) if not cursor.at_end]
        return not unread and not self._opening()

    async def _set_ends(self) -> None:
        async with self._ends_turn:
            if not self._ends_wanted:
                return  # another task has looked the ends up meanwhile
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
    """Returns the loop's clock. The clock is read for every burst: for the usual loop this is time.monotonic itself,
    without a call in between."""
    return time.monotonic if type(loop).time is asyncio.BaseEventLoop.time else loop.time


def _ended_well(owner: object) -> bool:
    """Returns True if the task returned without an error. `exception()` would tell as well, but also mark the error as
    retrieved, and asyncio reports only errors that were not."""
    return isinstance(owner, asyncio.Task) and owner.done() and not owner.cancelled() and not owner.get_stack(limit=1)


def _has_ended(owner: object) -> bool:
    if isinstance(owner, threading.Thread):
        return not owner.is_alive()
    return isinstance(owner, asyncio.Task) and owner.done()
