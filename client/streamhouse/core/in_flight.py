"""Records that were handed over and are not done with, by the task or thread that has them.

Owns: who has which records in hand. Does not own: what is handed over next, commits.
Invariants: a record is in hand before its cursor's `delivered` passes it, and until its worker asks for another one;
`done_below` never passes a record in hand. Threads hand over while the event loop asks `done_below`: each change is one
assignment, so that it sees the old or the new state and nothing between.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from shformat import Records

from streamhouse.core.positions import Cursor
from streamhouse.records import Record, RecordBatch, TopicPartition

Held = tuple[Cursor, Record | RecordBatch, "Held | None"]
"""Of which partition, what, and what the worker was given before that and has as well. A plain tuple: one is made for
every record."""

# Workers are looked through for those that have ended whenever their number has doubled.
SWEEP_FIRST = 16


class Worker:
    """A task or thread that takes records. `owner`: the task or thread; None: code that runs in no task. `held`: what
    it has in hand, set by those who hand it something (several things if it asked again before it got the first), and
    by those who ask for it: then it has done with what it had."""

    __slots__ = ("held", "is_reported", "owner")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.held: Held | None = None
        self.is_reported = False

    def in_hand(self) -> Iterator[Held]:
        """Yields all that the worker has in hand."""
        held = self.held
        while held is not None:
            yield held
            held = held[2]


class InFlight:
    """`ended_well(owner)`: True if the task returned without an error. `has_ended(owner)`: True also if it did not, and
    for threads that have ended, of which nobody can tell how."""

    def __init__(self, ended_well: Callable[[object], bool], has_ended: Callable[[object], bool]) -> None:
        self._ended_well = ended_well
        self._has_ended = has_ended
        self._workers: dict[object, Worker] = {}
        self._sweep_at = SWEEP_FIRST
        # The worker that came last to ask or had to wait: not set with every record, for what that costs.
        self._last: Worker | None = None
        # Meant for a worker that it did not reach: an interrupt came between. To be handed over before anything else.
        self.returned: tuple[tuple[Cursor, RecordBatch], ...] = ()

    def worker(self, owner: object) -> Worker:
        """Returns the worker that stands for this task or thread."""
        worker = self._workers.get(owner)
        if worker is None:
            if len(self._workers) >= self._sweep_at:
                self._sweep()
            worker = self._last = self._workers[owner] = Worker(owner)
        return worker

    def waited(self, worker: Worker) -> None:
        """Tells that the worker has waited for more. It may have been forgotten meanwhile, having nothing in hand: an
        iterator outlives the task that made it if another one goes on with it."""
        self._workers.setdefault(worker.owner, worker)
        self._last = worker

    def _sweep(self) -> None:
        for worker in list(self._workers.values()):
            if self._has_ended(worker.owner) and all(
                self._is_done(worker) or not cursor.live for cursor, _, _ in worker.in_hand()
            ):
                self._workers.pop(worker.owner, None)
        self._sweep_at = max(SWEEP_FIRST, 2 * len(self._workers))

    def _is_done(self, worker: Worker) -> bool:
        """True if the worker's task has returned without an error, and another one has come since. Until then it may
        have waited for the record on behalf of another task, as those of `asyncio.wait_for` do."""
        return self._last is not worker and self._ended_well(worker.owner)

    def done_below(self, cursor: Cursor) -> int:
        """Returns the offset below which the application has done with everything of the cursor's partition."""
        delivered = cursor.delivered  # before the workers: a record is in hand by the time that this passes it
        in_hand = [
            first_offset(item)
            for worker in list(self._workers.values())
            for of, item, _ in worker.in_hand()
            if of is cursor and not self._is_done(worker)
        ]
        returned = [int(batch.offsets[0]) for of, batch in self.returned if of is cursor]
        return min([delivered, *in_hand, *returned])

    def held(self) -> list[Held | None]:
        """Returns the record in the hand of each worker; equal to an earlier answer only if none has asked for more."""
        return [worker.held for worker in list(self._workers.values())]

    def finish_ended(self) -> None:
        """Counts what tasks have in hand that returned without an error as done with."""
        for worker in list(self._workers.values()):
            if self._ended_well(worker.owner):
                worker.held = None

    def give_back(self, worker: Worker, first: Mapping[TopicPartition, int] | None = None) -> None:
        """Takes from the worker what it has in hand and has not got: all, or of the partitions in `first` the records
        from that offset on. That is handed over next, in the order of offsets."""
        in_hand = [(cursor, _batch_of(item)) for cursor, item, _ in worker.in_hand()]
        kept: Held | None = None
        held: list[tuple[Cursor, RecordBatch]] = []
        for cursor, batch in reversed(in_hand):
            if first is None:
                stop = 0
            else:
                stop = int(np.searchsorted(batch.offsets, first.get(cursor.where, batch.offsets[-1] + 1)))
            if stop:
                kept = (cursor, batch.slice(0, stop), kept)
            if stop < len(batch):
                held.append((cursor, batch.slice(stop, len(batch))))
        held.reverse()
        returned = list(self.returned)
        for cursor, batch in reversed(held):
            # Not simply last: what is there may be the rest of a batch of which this is the beginning.
            place = len(returned)
            for at, (of, rest) in enumerate(returned):
                if of is cursor and rest.offsets[0] > batch.offsets[0]:
                    place = at
                    break
            returned.insert(place, (cursor, batch))
        self.returned = tuple(returned)
        worker.held = kept
        for cursor, batch in held:
            cursor.delivered = max(cursor.delivered, int(batch.offsets[-1]) + 1)

    def take_returned(
        self, worker: Worker, *, whole: bool, count_max: int | None = None
    ) -> Record | RecordBatch | None:
        """Gives the worker what was given back first, of partitions that are not paused: a record, or all that was of
        one batch, but at most count_max records; None if nothing was."""
        while (place := self._first_to_take()) >= 0:
            before, (cursor, batch), others = self.returned[:place], self.returned[place], self.returned[place + 1 :]
            count = min(len(batch), count_max or len(batch)) if whole else 1
            rest = batch.slice(count, len(batch))
            item: Record | RecordBatch = batch.slice(0, count) if whole else next(iter(batch))
            is_live = cursor.live
            if is_live:
                worker.held = (cursor, item, worker.held)
            self.returned = (*before, *([(cursor, rest)] if len(rest) else ()), *others)
            if is_live:
                return item
        return None

    @property
    def has_returned(self) -> bool:
        """True if `take_returned` has something to look at."""
        return self._first_to_take() >= 0

    def _first_to_take(self) -> int:
        # Loops, here and in `give_back`: Ctrl-C that comes while Python drops a half-used generator is swallowed.
        for place, (cursor, _) in enumerate(self.returned):
            if not cursor.paused:
                return place
        return -1

    def abandoned(self) -> Iterator[tuple[Worker, Cursor, int]]:
        """Yields what workers have in hand that have ended without asking again, and so hold back the group's position:
        the worker, the cursor, the offset; of each worker once."""
        for worker in list(self._workers.values()):
            held = next((held for held in worker.in_hand() if held[0].live), None)
            if held is None or worker.is_reported or not self._has_ended(worker.owner):
                continue
            if not self._ended_well(worker.owner):
                worker.is_reported = True
                yield worker, held[0], first_offset(held[1])


def first_offset(item: Record | RecordBatch) -> int:
    """Returns the record's offset, or that of the first one of a batch."""
    return item.offset if isinstance(item, Record) else int(item.offsets[0])


def _batch_of(item: Record | RecordBatch) -> RecordBatch:
    if isinstance(item, RecordBatch):
        return item
    headers = [item.headers] if item.headers else None
    columns = Records.from_lists([item.value], [item.key], item.timestamp_ms, headers, [item.offset])
    return RecordBatch(item.topic, item.partition, columns)
