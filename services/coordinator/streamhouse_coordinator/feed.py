"""Delivers events to many followers: a single reader of the database per coordinator, with the newest events in memory.

Followers that are behind the events in memory read the database for themselves until they have caught up, as far as
events are kept. Notices of sealed buffers travel beside the events, to followers that ask for them: they are not kept,
and only save time.

Owns: the newest events that were read, and the signal for followers that wait for more. Does not own: the events, which
PostgreSQL keeps.
Invariants: positions are gapless and in commit order, so "everything after position p" is exact. A follower never gets
events of another history than its first.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from opentelemetry import metrics
from shproto.errors import EventsPruned, InvalidArgument, StreamHouseError
from shproto.events import BufferSealed
from shruntime.counters import up_down_counter
from shruntime.tasks import Backoff

from streamhouse_coordinator.core.tables import EventRow
from streamhouse_coordinator.ports import Store
from streamhouse_coordinator.recovery import rollback_detection
from streamhouse_coordinator.recovery.histories import Head, went_back

log = logging.getLogger(__name__)

_followers = up_down_counter(
    metrics.get_meter("streamhouse.coordinator"), "streamhouse_coordinator_followers", "open event streams"
)


# A database that came back is noticed within about the time for which a client keeps trying.
DATABASE_RETRY_FIRST_MS, DATABASE_RETRY_MS_MAX = 50, 2_000


class Feed:
    """A feed. `run` must be running for followers to see new events; `wake` makes it read at once. `listens`: False
    while no notices come from other coordinators, so that segmenters have to look for sealed buffers themselves."""

    def __init__(
        self,
        store: Store,
        *,
        poll_interval_ms: int,
        batch: int,
        cached: int,
        listens: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._poll_interval_s = poll_interval_ms / 1000
        self._batch = batch
        self._listens = listens
        self._recent: deque[EventRow] = deque(maxlen=cached)
        self._position = -1  # of the newest event read; -1 before the first read
        self._last: EventRow | None = None  # event at `_position`, once read
        self._history_id = ""
        self._checked = False  # True while the history is known to be unchanged
        self._era = 0  # number of changes of the history
        self._sealed_count = 0  # number of notices
        self._sealed_id = ""  # buffer of the last notice
        self._wake = asyncio.Event()
        self._changed = _Signal()

    @property
    def position(self) -> int:
        """Position of the newest event read; -1 before the first read."""
        return self._position

    def wake(self) -> None:
        """Makes `run` read new events at once."""
        self._wake.set()

    def sealed(self, buffer_id: str) -> None:
        """Notifies followers that a buffer may be claimed; if empty, that any may."""
        self._sealed_count += 1
        self._sealed_id = buffer_id
        self._changed.set()

    async def run(self) -> None:
        """Reads events for ever. Tries again after every error of the database."""
        backoff = Backoff(DATABASE_RETRY_FIRST_MS, DATABASE_RETRY_MS_MAX)
        while True:
            try:
                if self._checked or await self._check_history():
                    while await self._read():
                        pass
                backoff.reset()
                await self._pause(self._poll_interval_s)
            except StreamHouseError as error:
                self._checked = False
                log.debug("cannot read events: %s", error)
                await self._pause(backoff.next_ms() / 1000)  # the listener ends the pause when PostgreSQL is back

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            self._checked = False  # a notification may have been missed: poll
            if not self._listens():
                self.sealed("")
        finally:
            # Before the next read: a wake that comes during that read ends the pause after it.
            self._wake.clear()

    async def _check_history(self) -> bool:
        """Returns True if there are events to read. Compares the history first: another database, with other events,
        may have replaced the database that was read."""
        head = await self._store.head()
        if head.history_id != self._history_id or head.position < self._position:
            await self._went_back(head)
        self._checked = True
        return head.position > self._position

    async def _read(self) -> bool:
        """Reads the next events; returns True if there may be more. Reads the last known event again with those behind:
        if another event is at that position now, all events read so far are gone, however many there are by now."""
        known = min(self._position, 1)
        try:
            rows = await self._store.read_events(self._position - known, self._batch + known)
        except EventsPruned as error:
            await self._skip(error)
            return False
        if known and not (rows and rows[0].position == self._position and self._last in (None, rows[0])):
            await self._went_back(await self._store.head())
            return False
        if rows:
            self._last = rows[-1]
        if new := rows[known:]:
            self._recent.extend(new)
            self._moved_to(new[-1].position)
        return len(new) == self._batch

    async def _went_back(self, head: Head) -> None:
        """Starts over at the end of another history, which may continue at any position: a restore has accounted for
        missing events. Records a rollback if the history is the same. Raises Unavailable."""
        # Before the first read there is nothing that could be missing.
        if self._position >= 0:
            if head.history_id == self._history_id:
                await rollback_detection.record(
                    self._store,
                    Head(history_id=self._history_id, position=self._position),
                    rollback_detection.COORDINATOR,
                )
            # Ends all followers: their positions mean other events in this history.
            self._era += 1
            log.error("the metadata went back: event %d of %s was read, now there is %d of %s",
                      self._position, self._history_id, head.position, head.history_id)  # fmt: skip
        self._history_id, self._last = head.history_id, None
        self._recent.clear()
        self._moved_to(head.position)

    async def _skip(self, error: EventsPruned) -> None:
        """Skips pruned events: this coordinator was away for longer than events are kept, and cannot tell if the last
        event read is still there. Followers that are behind read for themselves, and are refused."""
        head = await self._store.head()
        log.warning("goes on at event %d: %s", head.position, error.message)
        if head.history_id != self._history_id or head.position < self._position:
            await self._went_back(head)
        else:
            self._last = None
            self._recent.clear()
            self._moved_to(head.position)

    def _moved_to(self, position: int) -> None:
        self._position = position
        self._changed.set()

    async def follow(
        self, after_position: int, types: Sequence[str] = (), history_id: str = ""
    ) -> AsyncIterator[EventRow]:
        """Yields every event after the position, for ever; with BufferSealed among the types also notices, at the
        position of the last event. Raises InvalidArgument for a position that does not exist yet, EventsPruned if
        events behind the position are pruned, MetadataWentBack if `history_id` is not the current history or is
        replaced later, Unavailable if the database goes away while the follower has to read there."""
        await self._check(Head(history_id=history_id, position=after_position))
        era = self._era
        wanted = frozenset(types)
        at = after_position
        seen_sealed = self._sealed_count if BufferSealed.__name__ in wanted else None
        _followers.add(1)
        try:
            while True:
                rows = await self._next(at, era, seen_sealed)
                if self._era != era:
                    raise went_back(
                        Head(history_id=self._history_id, position=self._position),
                        Head(history_id=history_id, position=at),
                        "it was replaced",
                    )
                for row in rows:
                    at = row.position
                    if not wanted or row.type in wanted:
                        yield row
                # All notices since the last are a single notice: a segmenter that looks drains every waiting buffer.
                if seen_sealed is not None and seen_sealed != self._sealed_count:
                    seen_sealed = self._sealed_count
                    yield _notice(at, self._sealed_id)
        finally:
            _followers.add(-1)

    async def _check(self, seen: Head) -> None:
        last, after_position = self._position, seen.position
        if after_position > last or (seen.history_id and seen.history_id != self._history_id):
            head = await self._store.head()
            last = head.position
            if seen.history_id and (seen.history_id != head.history_id or after_position > last):
                raise went_back(head, seen, "it is not what is followed")
        if not 0 <= after_position <= last:
            raise InvalidArgument(
                f"after_position {after_position} is not between 0 and the last event, {last}; take a new snapshot",
                field="after_position",
                value=after_position,
                limit=last,
            )

    async def moved_beyond(self, position: int) -> None:
        """Returns once there is an event after the position, or after a poll interval."""
        try:
            async with asyncio.timeout(self._poll_interval_s):
                while self._position <= position:
                    await self._changed.wait()
        except TimeoutError:
            return

    async def _next(self, at: int, era: int, seen_sealed: int | None) -> list[EventRow]:
        """Returns the next events after `at`, in order, as soon as there are any; none if the history has changed since
        `era`, or if there are notices beyond `seen_sealed`."""
        while self._position <= at and self._era == era and seen_sealed in (None, self._sealed_count):
            await self._changed.wait()
        if self._era != era or self._position <= at:
            return []
        if self._recent and self._recent[0].position <= at + 1:
            # By index from the end: a deque has no slices, and is reached quickly only near its ends.
            count = self._position - at
            return [self._recent[index] for index in range(len(self._recent) - count, len(self._recent))]
        # Behind the events in memory, a follower reads for itself, and holds up no other.
        return await self._store.read_events(at, self._batch)


def _notice(position: int, buffer_id: str) -> EventRow:
    """Returns the notice of a sealed buffer in the form of an event row."""
    payload = json.dumps({"buffer_id": buffer_id})
    return EventRow(
        position=position,
        stream_id=f"buffer/{buffer_id}",
        version=0,
        type=BufferSealed.__name__,
        payload=payload,
        trace_context="",
        created_ms=0,
    )


class _Signal:
    """Wakes all waiting tasks at each change."""

    def __init__(self) -> None:
        self._waiting: asyncio.Future[None] | None = None

    def set(self) -> None:
        # A new future for the next change: tasks that look and wait again must not find this future done.
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.set_result(None)

    async def wait(self) -> None:
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._waiting)  # a shared future: a cancelled waiter must not cancel the others
