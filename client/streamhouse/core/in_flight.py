"""Records in hand: handed over to a task or thread that has not asked for another record since.

Owns: the records in hand of each worker. Does not own: the order of handing over, commits.
Invariants: a record is in hand before its cursor's `delivered` passes the record, and until its worker asks for
another. `done_below` never passes a record in hand. Threads hand over while the event loop calls `done_below`: each
change is a single assignment, so that the loop sees the old or the new state and nothing between.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from shformat import Records

from streamhouse.core.positions import Cursor
from streamhouse.records import Record, RecordBatch, TopicPartition

Held = tuple[Cursor, Record | RecordBatch, "Held | None"]
"""Cursor, record or batch, and the entry before, which the worker has as well. A plain tuple, because one is made for
every record."""

# Workers that have ended are removed whenever the number of workers has doubled.
SWEEP_FIRST = 16


class Worker:
    """A task or thread that takes records. `owner`: the task or thread; None: code that runs in no task. `held`: its
    records in hand. Handing over adds to `held` (several entries if the worker asked again before the first answer),
    asking for records clears `held`: the worker has processed them."""

    __slots__ = ("held", "is_reported", "owner")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.held: Held | None = None
        self.is_reported = False

    def in_hand(self) -> Iterator[Held]:
        """Yields all entries in the worker's hand, the newest first."""
        held = self.held
        while held is not None:
            yield held
            held = held[2]


class InFlight:
    """Records in hand of all workers of a consumer. `ended_well(owner)`: True if the task returned without an error.
    `has_ended(owner)`: True also after an error, and for threads that have ended, because a thread does not tell
    how."""

    def __init__(self, ended_well: Callable[[object], bool], has_ended: Callable[[object], bool]) -> None:
        self._ended_well = ended_well
        self._has_ended = has_ended
        self._workers: dict[object, Worker] = {}
        self._sweep_at = SWEEP_FIRST
        # The worker that asked for the first time or had to wait most recently. Setting this for every record would
        # cost too much.
        self._last: Worker | None = None
        # Records that did not reach their worker because of an interrupt; handed over before anything else.
        self.returned: tuple[tuple[Cursor, RecordBatch], ...] = ()

    def worker(self, owner: object) -> Worker:
        """Returns the worker for this task or thread."""
        worker = self._workers.get(owner)
        if worker is None:
            if len(self._workers) >= self._sweep_at:
                self._sweep()
            worker = self._last = self._workers[owner] = Worker(owner)
        return worker

    def waited(self, worker: Worker) -> None:
        """Records that the worker has waited for more. Adds the worker again if a sweep removed it while its hand was
        empty: an iterator outlives the task that made it if another task continues the iteration."""
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
        """Returns True if the worker's task has returned without an error, and another worker has come since. Until
        then the task may have waited for the record on behalf of another task, as tasks of `asyncio.wait_for` do."""
        return self._last is not worker and self._ended_well(worker.owner)

    def done_below(self, cursor: Cursor) -> int:
        """Returns the offset below which the application has processed all records of the cursor's partition."""
        delivered = cursor.delivered  # read before the workers: a record is in hand before `delivered` passes it
        in_hand = [
            first_offset(item)
            for worker in list(self._workers.values())
            for of, item, _ in worker.in_hand()
            if of is cursor and not self._is_done(worker)
        ]
        returned = [int(batch.offsets[0]) for of, batch in self.returned if of is cursor]
        return min([delivered, *in_hand, *returned])

    def held(self) -> list[Held | None]:
        """Returns the entry in the hand of each worker; equal to an earlier answer only if no worker has asked
        since."""
        return [worker.held for worker in list(self._workers.values())]

    def finish_ended(self) -> None:
        """Counts the records in hand of tasks that returned without an error as processed."""
        for worker in list(self._workers.values()):
            if self._ended_well(worker.owner):
                worker.held = None

    def give_back(self, worker: Worker, first: Mapping[TopicPartition, int] | None = None) -> None:
        """Takes back records that have not reached the worker: all in its hand, or for the partitions in `first` the
        records from that offset on. They are handed over next, in the order of offsets."""
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
            # Not simply last: the queue may hold the rest of a batch of which this is the beginning.
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
        """Returns the records given back first, of partitions that are not paused, now in the worker's hand: a single
        record, or with `whole` all of a batch, at most count_max records; None if there are none."""
        while (place := self._first_to_take()) >= 0:
            before, (cursor, batch), others = self.returned[:place], self.returned[place], self.returned[place + 1 :]
            count = min(len(batch), count_max or len(batch)) if whole else 1
            rest = batch.slice(count, len(batch))
            item: Record | RecordBatch = batch.slice(0, count) if whole else next(iter(batch))
            is_live = cursor.live
            if is_live:
                worker.held = (cursor, item, worker.held)
            # In one assignment, after the record is in hand: `done_below` may run in the loop's thread at any step.
            self.returned = (*before, *([(cursor, rest)] if len(rest) else ()), *others)
            if is_live:
                return item
        return None

    @property
    def has_returned(self) -> bool:
        """True if `take_returned` has records to return."""
        return self._first_to_take() >= 0

    def _first_to_take(self) -> int:
        # Loops instead of generators, here and in `give_back`: Python swallows a Ctrl-C that arrives while a half-used
        # generator is dropped.
        for place, (cursor, _) in enumerate(self.returned):
            if not cursor.paused:
                return place
        return -1

    def abandoned(self) -> Iterator[tuple[Worker, Cursor, int]]:
        """Yields workers that have ended without asking again and so hold back the group's position, each with cursor
        and offset of a record in hand; every worker is yielded once."""
        for worker in list(self._workers.values()):
            held = next((held for held in worker.in_hand() if held[0].live), None)
            if held is None or worker.is_reported or not self._has_ended(worker.owner):
                continue
            if not self._ended_well(worker.owner):
                worker.is_reported = True
                yield worker, held[0], first_offset(held[1])


def first_offset(item: Record | RecordBatch) -> int:
    """Returns the offset of a record, or of the first record of a batch."""
    return item.offset if isinstance(item, Record) else int(item.offsets[0])


def _batch_of(item: Record | RecordBatch) -> RecordBatch:
    if isinstance(item, RecordBatch):
        return item
    headers = [item.headers] if item.headers else None
    columns = Records.from_lists([item.value], [item.key], item.timestamp_ms, headers, [item.offset])
    return RecordBatch(item.topic, item.partition, columns)
