"""Keeps the index up to date: a snapshot, then every event in order, over reconnects and restarts of coordinators.

Owns: the feed's position, and the position of events that went missing. Does not own: the index and its readers
(live_index.py), the session of which the feed carries the token.
Invariants: the index changes by a whole snapshot or by the next event, never otherwise. An event that does not fit
costs a snapshot, and is never skipped.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from shproto.errors import EventsPruned, StreamHouseError
from shproto.events import BufferRegistered, event_from_json
from shproto.limits import RECONNECT_FIRST_MS, RECONNECT_MS_MAX
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2
from shruntime.clock import Clock
from shruntime.tasks import Backoff

from shcluster.index import IndexMismatch
from shcluster.live_index import LiveIndex
from shcluster.missing_events import MissingEvents
from shcluster.snapshot import SnapshotBuilder

log = logging.getLogger(__name__)

# A short statement for the database; readers hear of a rollback within the interval of a subscription's heartbeat.
HEAD_INTERVAL_MS = 5_000


class Follower:
    """Follower of the event feed: `load` once, then `run` for ever. The index stays readable, and grows old, while no
    coordinator answers.

    `session_token`: returns the token of the process's session, empty while there is none. `snapshot_taken` is called
    after each snapshot.
    """

    def __init__(
        self,
        coordinator: CoordinatorApi,
        index: LiveIndex,
        session_token: Callable[[], str],
        clock: Clock,
        snapshot_taken: Callable[[], None],
    ) -> None:
        self._coordinator = coordinator
        self._index = index
        self._session_token = session_token
        self._clock = clock
        self._snapshot_taken = snapshot_taken
        self._backoff = Backoff(RECONNECT_FIRST_MS, RECONNECT_MS_MAX)
        self._missing = MissingEvents()

    async def load(self) -> None:
        """Takes the first snapshot; tries until a coordinator gives it."""
        while not await self._tried_snapshot():
            await self._clock.sleep_ms(self._backoff.next_ms())
        self._backoff.reset()

    async def run(self) -> None:
        """Follows the feed from the position of the index on, until cancelled."""
        while True:
            try:
                # The coordinator refuses to feed an index of another history; only a snapshot gets on from there.
                if await self._went_back():
                    log.warning("event %d is of another history than the coordinator's", self._index.cluster.position)
                    await self._snapshot()
                await self._follow()
                log.info("the event feed ended at %d; connecting again", self._index.cluster.position)
            except (IndexMismatch, EventsPruned) as error:
                log.warning("the index does not fit the event feed, taking a new snapshot: %s", error)
                await self._tried_snapshot()
            except StreamHouseError as error:
                log.warning("the event feed broke at %d: %s", self._index.cluster.position, error)
            # Also after a feed that ended in order: the followers of a coordinator that stops would return all at once.
            await self._clock.sleep_ms(self._backoff.next_ms())

    async def watch_head(self) -> None:
        """Detects a rollback of the metadata while the feed goes on, until cancelled: the feed need not break, since
        there may be as many events as before."""
        while True:
            await self._clock.sleep_ms(HEAD_INTERVAL_MS)
            try:
                await self._head()
            except StreamHouseError as error:
                log.debug("no coordinator says where the events end: %s", error)

    async def _head(self) -> coordinator_pb2.GetHeadResponse:
        """Returns the coordinator's head, and notes if events that the index has seen are gone."""
        seen = self._index.cluster.history_id, self._index.cluster.position
        head = await self._coordinator.get_head(coordinator_pb2.GetHeadRequest())
        before = self._missing.position
        missing = self._missing.judge(head.history_id, head.events_position, head.missing_position, seen=seen)
        if missing and missing != before:  # once per rollback, not with every look
            log.error("the metadata went back: event %d was seen, and is not there any more", missing)
        self._index.miss(missing)
        return head

    async def _tried_snapshot(self) -> bool:
        try:
            await self._snapshot()
        except (StreamHouseError, IndexMismatch) as error:
            log.warning("no snapshot of the index yet: %s", error)
            return False
        return True

    async def _snapshot(self) -> None:
        await self._head()  # first: no reader may take the end of older metadata for the end
        builder = SnapshotBuilder()
        async for part in self._coordinator.get_snapshot(coordinator_pb2.GetSnapshotRequest()):
            builder.add(part)
        self._index.replace(builder.cluster)
        self._snapshot_taken()
        cluster = builder.cluster
        log.info("index of event %d: %d segments in %d partitions", cluster.position, cluster.segment_count,
                 len(cluster.partitions))  # fmt: skip

    async def _went_back(self) -> bool:
        head = await self._head()
        cluster = self._index.cluster
        return head.events_position < cluster.position or head.history_id != cluster.history_id

    async def _follow(self) -> None:
        request = coordinator_pb2.FollowEventsRequest(
            after_position=self._index.cluster.position,
            session_token=self._session_token(),
            history_id=self._index.cluster.history_id,
        )
        # Closed here and now: left to the garbage collector, a broken feed would stay open at the coordinator.
        async with contextlib.aclosing(self._coordinator.follow_events(request)) as events:  # type: ignore[type-var]
            async for event in events:
                self._apply(event)
                # Not when the feed opens: a feed that breaks at its first event would be opened again without a pause.
                self._backoff.reset()

    def _apply(self, event: coordinator_pb2.Event) -> None:
        try:
            fact = event_from_json(event.type, event.payload_json)
        except (TypeError, ValueError, KeyError) as error:
            # A mismatch, because a snapshot gets past an event that this version cannot read.
            raise IndexMismatch(f"event {event.position} {event.type} cannot be read: {error}") from error
        self._index.apply(event.position, fact)
        if event.trace_context and isinstance(fact, BufferRegistered):
            self._index.note_trace([segment.segment_id for segment in fact.segments], event.trace_context)
