"""Events to many followers: one reader of the database per coordinator, the newest events in memory.

Followers that lag behind what is in memory read their own way up to it, as far as events are kept. Notices of sealed
buffers travel beside the events, to whoever asks for them: they are not kept, and only make things faster.

Owns: the newest events that were read, who waits for more. Does not own: the events, which PostgreSQL keeps.
Invariants: positions are gapless and in commit order, so "everything after position p" is exact. A follower is never
given events of another history than the one that it began with.
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


# A database that came back is noticed about as fast as a client gives up a call.
DATABASE_RETRY_FIRST_MS, DATABASE_RETRY_MS_MAX = 50, 2_000


class Feed:
    """`run` must be running for followers to see new events; `wake` makes it look at once. `listens`: False where no
    notices come from other coordinators, so that whoever waits for sealed buffers has to look by itself."""

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
        self._position = -1  # the newest event read; -1 until the reader has begun
        self._last: EventRow | None = None  # the one at `_position`, once it was read
        self._history_id = ""
        self._checked = False  # whether the history is known to be the same since the database was last away
        self._era = 0  # counts the changes of history
        self._sealed_count = 0  # of notices
        self._sealed_id = ""  # the buffer of the last one
        self._wake = asyncio.Event()
        self._changed = _Signal()

    @property
    def position(self) -> int:
        return self._position

    def wake(self) -> None:
        self._wake.set()

    def sealed(self, buffer_id: str) -> None:
        """Tells followers that a buffer may be claimed; empty: that some may."""
        self._sealed_count += 1
        self._sealed_id = buffer_id
        self._changed.set()

    async def run(self) -> None:
        """Reads for ever. Without the database it tries again, whatever it answers."""
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
                await self._pause(backoff.next_ms() / 1000)  # the listener wakes it when PostgreSQL is back

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            self._checked = False  # poll: a notification may have been missed
            if not self._listens():
                self.sealed("")
        finally:
            self._wake.clear()

    async def _check_history(self) -> bool:
        """Whether there are events to read. Another database may have taken the place of the one that was read: its
        events are not the same."""
        head = await self._store.head()
        if head.history_id != self._history_id or head.position < self._position:
            await self._went_back(head)
        self._checked = True
        return head.position > self._position

    async def _read(self) -> bool:
        """Whether there may be more. The last event is read again with those behind it: where another one is in its
        place, those that were read are gone, however many there are by now."""
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
        """Another history may go on at any place: a restore has accounted for what is gone. Raises Unavailable."""
        if self._position >= 0:
            if head.history_id == self._history_id:
                await rollback_detection.record(
                    self._store,
                    Head(history_id=self._history_id, position=self._position),
                    rollback_detection.COORDINATOR,
                )
            self._era += 1
            log.error("the metadata went back: event %d of %s was read, now there is %d of %s",
                      self._position, self._history_id, head.position, head.history_id)  # fmt: skip
        self._history_id, self._last = head.history_id, None
        self._recent.clear()
        self._moved_to(head.position)

    async def _skip(self, error: EventsPruned) -> None:
        """This coordinator was away for longer than events are kept: nothing tells whether the one that it read last is
        still there. Followers that are behind read on for themselves, and are refused."""
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
        """Yields every event after the position, for ever; with BufferSealed among the types also notices of these, at
        the position of the last event. Raises InvalidArgument for a position that is not there yet, EventsPruned for
        one behind which events are not kept any more, MetadataWentBack when the history is not, or not any more, the
        one that the position is of, Unavailable when the database goes away while the follower has to read it."""
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
        """Waits until there is an event after the position, or as long as a poll takes."""
        try:
            async with asyncio.timeout(self._poll_interval_s):
                while self._position <= position:
                    await self._changed.wait()
        except TimeoutError:
            return

    async def _next(self, at: int, era: int, seen_sealed: int | None) -> list[EventRow]:
        """Returns the next events after `at`, in order, as soon as there are any; nothing once the era has ended, or
        when there are notices beyond the `seen_sealed`."""
        while self._position <= at and self._era == era and seen_sealed in (None, self._sealed_count):
            await self._changed.wait()
        if self._era != era or self._position <= at:
            return []
        if self._recent and self._recent[0].position <= at + 1:
            count = self._position - at
            return [self._recent[index] for index in range(len(self._recent) - count, len(self._recent))]
        return await self._store.read_events(at, self._batch)


def _notice(position: int, buffer_id: str) -> EventRow:
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
    """Wakes all who wait, each time that something has changed."""

    def __init__(self) -> None:
        self._waiting: asyncio.Future[None] | None = None

    def set(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.set_result(None)

    async def wait(self) -> None:
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._waiting)  # which the others wait for, too
