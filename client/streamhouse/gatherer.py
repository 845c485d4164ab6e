"""Collects records into batches, one in the making per partition, and says when one may go.

Owns: the batches in the making and their linger timers. Does not own: how batches are sent.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shformat import Header
from shproto.errors import StreamHouseError
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shruntime.tasks import Backoff

from streamhouse.batches import Batch
from streamhouse.core.accumulator import Gathering
from streamhouse.core.options import ProducerOptions
from streamhouse.core.sequences import Lane, Outgoing
from streamhouse.delivery import Delivery
from streamhouse.leader_stream import LeaderStream
from streamhouse.tracing import SendTrace, tracer

# A batch that has lingered and may not go yet (no room, or sender.SMALL_IN_FLIGHT_MAX are unanswered) grows this long,
# then it is closed and its deadline counts alone.
GROW_MS_MAX = 1_000

Stream = LeaderStream["tuple[LaneState, Outgoing[Batch]]"]


def new_backoff(options: ProducerOptions) -> Backoff:
    """Returns one short enough that a batch gets several tries within its time. A leader change takes seconds: asking
    once a second finds it soon and costs the coordinator little."""
    return Backoff(RETRY_FIRST_MS, min(RETRY_MS_MAX, options.delivery_timeout_ms // 4))


@dataclass(slots=True, eq=False)
class LaneState:
    """State of a partition: its lane, the batch in the making, and the timers."""

    topic: str
    partition: int
    lane: Lane[Batch]
    backoff: Backoff
    gathering: Gathering[Delivery] | None = None
    due: bool = False  # what is in the making may go
    stream: Stream | None = None
    parked: bool = False  # waits for a timer or a task that will pump again
    queued: bool = False  # waits for room on its stream
    linger: asyncio.TimerHandle | None = None
    expiry: asyncio.TimerHandle | None = None
    retry: asyncio.TimerHandle | None = None
    last_sent_ms: float = -math.inf
    last_error: StreamHouseError | None = None

    def cancel_timers(self) -> None:
        for timer in (self.linger, self.expiry, self.retry):
            if timer is not None:
                timer.cancel()


class Gatherer:
    """`opened(state)`: a batch was begun. `pump(state)`: one may go, or has been closed."""

    def __init__(
        self, options: ProducerOptions, opened: Callable[[LaneState], None], pump: Callable[[LaneState], None]
    ) -> None:
        self._options = options
        self._opened = opened
        self._pump = pump
        self.loop = asyncio.get_running_loop()
        self._lanes: dict[tuple[str, int], LaneState] = {}

    def lanes(self) -> list[LaneState]:
        return list(self._lanes.values())

    def lane(self, topic: str, partition: int) -> LaneState:
        """The partition's lane, made at first sight."""
        state = self._lanes.get((topic, partition))
        if state is None:
            state = LaneState(topic, partition, Lane(self._options.idempotent), new_backoff(self._options))
            self._lanes[topic, partition] = state
        return state

    def add(
        self,
        state: LaneState,
        value: bytes | None,
        key: bytes | None,
        headers: tuple[Header, ...],
        timestamp_ms: int,
        size_bytes: int,
        deadline_ms: float,
    ) -> tuple[Delivery, int, int]:
        """Puts one record behind those given before; a batch that it begins fails at deadline_ms. Returns the batch's
        outcome, the record's position in the batch and its timestamp."""
        gathering = state.gathering
        if gathering is None or gathering.size_bytes + size_bytes > self._options.batch_bytes:
            gathering = self._renew(state, deadline_ms)
        index = gathering.add(value, key, headers, timestamp_ms, size_bytes)
        gathering.delivery.record_count = index + 1
        return gathering.delivery, index, timestamp_ms

    def extend(
        self,
        state: LaneState,
        values: Sequence[bytes | None],
        keys: Sequence[bytes | None] | None,
        headers: Sequence[tuple[Header, ...]] | None,
        timestamps_ms: Sequence[int],
        size_bytes: int,
    ) -> tuple[Delivery, int]:
        """Puts many records, not more than one batch of them, behind those given before. Returns the batch's outcome
        and the position of the first in the batch."""
        gathering = state.gathering
        if gathering is None or gathering.size_bytes + size_bytes > self._options.batch_bytes:
            gathering = self._renew(state, self.deadline_ms())
        first = gathering.extend(values, keys, headers, timestamps_ms, size_bytes)
        gathering.delivery.record_count = first + len(values)
        return gathering.delivery, first

    def deadline_ms(self) -> float:
        """Returns when what is sent now fails."""
        return self.loop.time() * 1000 + self._options.delivery_timeout_ms

    def _renew(self, state: LaneState, deadline_ms: float) -> Gathering[Delivery]:
        """A new batch in the making; the one before is full and goes."""
        if state.gathering is not None:
            self.close(state)
            self._pump(state)
        gathering = Gathering(Delivery(state.topic, state.partition, self._trace(state)), deadline_ms)
        state.gathering, state.due = gathering, False
        state.linger = self.loop.call_later(self._options.linger_ms / 1000, self._lingered, state, gathering)
        self._opened(state)
        return gathering

    def _trace(self, state: LaneState) -> SendTrace | None:
        """Returns what records the spans of a new batch; None if nothing can be recorded."""
        if (found := tracer()) is None:
            return None
        return SendTrace(found, state.topic, state.partition, self._options.acks, self._options.client_id)

    def _lingered(self, state: LaneState, gathering: Gathering[Delivery]) -> None:
        if state.gathering is not gathering:
            return
        state.due = True
        self._pump(state)
        if state.gathering is gathering:
            state.linger = self.loop.call_later(GROW_MS_MAX / 1000, self._grown, state, gathering)

    def _grown(self, state: LaneState, gathering: Gathering[Delivery]) -> None:
        if state.gathering is gathering:
            self.close(state)
            self._pump(state)

    def close(self, state: LaneState) -> None:
        """The batch in the making, if there is one, takes its place in the lane."""
        gathering = state.gathering
        if gathering is None:
            return
        if state.linger is not None:
            state.linger.cancel()
        state.gathering, state.due = None, False
        batch = Batch(gathering, trace_headers=self._options.trace_headers)
        state.lane.append(Outgoing(batch, len(gathering.values), gathering.deadline_ms))

    def hurry(self) -> None:
        """Nothing lingers any more of what has been gathered so far."""
        for state in self.lanes():
            if state.gathering is not None:
                state.due = True
                self._pump(state)
