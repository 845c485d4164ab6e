"""Follows the coordinator's events, and passes on those of this agent's ranges and buffers.

Owns: the stream of events. Does not own: the session's position, which heartbeats read, too.
Invariants: events are handled in the order of their positions, and each position is noted before its event is handled.
A session whose events cannot be followed without a gap is abandoned.
"""

import contextlib
import logging
from typing import Never

from shproto.errors import EventsPruned, MetadataWentBack, SessionExpired, StreamHouseError
from shproto.events import (
    AgentCutOff,
    BufferCompleted,
    BufferRegistered,
    EpochGranted,
    Event,
    MoveRequested,
    RangeExtended,
    RangeLost,
    RangeOrphaned,
    RangeSettled,
    SegmentRegistered,
    SessionClosed,
    TopicDeleted,
    event_from_json,
)
from shproto.keys import RangeKey
from shproto.model import Segment
from shproto.v1 import coordinator_pb2 as pb
from shruntime.tasks import Backoff

from streamhouse_ingest.leadership.context import LeadershipContext
from streamhouse_ingest.leadership.grants import Grants
from streamhouse_ingest.leadership.ranges import Ranges
from streamhouse_ingest.log.logs import Logs
from streamhouse_ingest.sealing.sealer import Sealer

log = logging.getLogger(__name__)

FOLLOWED = (
    AgentCutOff,
    BufferCompleted,
    BufferRegistered,
    EpochGranted,
    MoveRequested,
    RangeExtended,
    RangeLost,
    RangeOrphaned,
    RangeSettled,
    SegmentRegistered,
    SessionClosed,
    TopicDeleted,
)


class EventFeed:
    """`run` once per session."""

    def __init__(self, context: LeadershipContext, logs: Logs, ranges: Ranges, sealer: Sealer, grants: Grants) -> None:
        self._context = context
        self._session = context.session
        self._logs = logs
        self._ranges = ranges
        self._sealer = sealer
        self._grants = grants

    async def run(self) -> Never:
        """Follows the events from the session's position on, reconnecting. Raises SessionExpired if the session is
        closed, or if events are missing: the answers of a new session cover them."""
        backoff = self._context.backoff()
        while True:
            try:
                await self._follow(backoff)
            except SessionExpired:
                raise
            except MetadataWentBack as error:
                log.error("the session is abandoned, another is opened: %s", error.message)
                raise SessionExpired(error.message) from error
            except EventsPruned as error:
                log.warning("the session is abandoned, another is opened: %s", error.message)
                raise SessionExpired(error.message) from error
            except StreamHouseError as error:
                log.warning("the event feed broke off: %s", error.message)
            await self._context.clock.sleep_ms(backoff.next_ms())

    async def _follow(self, backoff: Backoff) -> None:
        """Passes on events until the stream ends. Raises SessionExpired when the session is closed."""
        # With the history: positions of restored metadata do not compare with those of this log, so the coordinator
        # refuses them.
        request = pb.FollowEventsRequest(
            after_position=self._session.position,
            types=[kind.__name__ for kind in FOLLOWED],
            session_token=self._session.token,
            history_id=self._context.history.seen.history_id,
        )
        # Closed on the way out: a generator left to the garbage collector would keep its call open.
        async with contextlib.aclosing(self._context.coordinator.follow_events(request)) as rows:  # type: ignore[type-var]
            async for row in rows:
                backoff.reset()
                self._session.position = row.position
                self._context.history.advance(row.position)
                event = event_from_json(row.type, row.payload_json)
                if event is not None and self._closes_us(event):
                    raise SessionExpired("the session was closed")
                if event is not None:
                    self._handle(event)

    def _closes_us(self, event: Event) -> bool:
        return isinstance(event, SessionClosed) and event.session_id == self._session.session_id

    def _handle(self, event: Event) -> None:
        match event:
            case SegmentRegistered(segment=segment):
                self._registered(segment)
            case BufferRegistered(buffer_id=buffer_id, segments=segments, completed=completed):
                # Registered first: `completed` announces anew whatever is not registered.
                for segment in segments:
                    self._registered(segment)
                if completed:
                    self._sealer.completed(buffer_id)
            case BufferCompleted(buffer_id=buffer_id):
                self._sealer.completed(buffer_id)
            case RangeExtended():
                self._ranges.extend(_key(event), event.limit_offset)
            case AgentCutOff():
                if event.agent_id == self._context.identity.agent_id:
                    self._grants.request_all()  # transfers under way must not wait for their upload any more
            case EpochGranted() | MoveRequested():
                # The event has neither the producers' state nor min_acks: docs/decisions/0019.
                if event.agent_id == self._context.identity.agent_id:
                    self._grants.changed([_key(event)], self._session.position)
            case RangeSettled(end_offset=end_offset):
                if self._logs.get(_key(event)) is not None:
                    self._grants.settled(_key(event), end_offset, self._session.position)
            case RangeOrphaned() | RangeLost():
                if self._logs.get(_key(event)) is not None:
                    self._grants.changed([_key(event)], self._session.position)
            case TopicDeleted():
                topic_id = bytes.fromhex(event.topic_id)
                keys = [held.log.key for held in self._logs if held.log.key.topic_id == topic_id]
                self._grants.changed(keys, self._session.position)

    def _registered(self, segment: Segment) -> None:
        key = RangeKey(bytes.fromhex(segment.topic_id), segment.partition, segment.epoch)
        if self._ranges.registered(key, segment.end_offset):
            self._grants.finished(key, self._session.position)


def _key(
    event: EpochGranted | MoveRequested | RangeExtended | RangeSettled | RangeOrphaned | RangeLost,
) -> RangeKey:
    return RangeKey(bytes.fromhex(event.topic_id), event.partition, event.epoch)
