"""Queues in which calls wait for a connection to PostgreSQL, or for a lock, for which they wait without a connection.

Owns: the places of each queue, and the order of the waiting calls. Does not own: connections, PostgreSQL's own locks,
deadlines; a cancelled caller leaves its queue.
Invariants: a queue never has more holders than places, nor more clients' calls among them than client places. Within
its kind the first call to arrive is served first. A call that waits for a lock holds no connection, so the holder of a
lock always gets a connection.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from opentelemetry import metrics
from shproto.errors import Overloaded
from shruntime.counters import counter, up_down_counter

# A queue that refuses a call takes about pg_timeout_ms to drain; an earlier retry only adds to the work.
RETRY_AFTER_MS = 1_000

_meter = metrics.get_meter("streamhouse.coordinator")
_waiting = up_down_counter(
    _meter, "streamhouse_coordinator_calls_waiting", "calls that wait for a lock's turn or for a connection"
)
_overloaded = counter(
    _meter,
    "streamhouse_coordinator_calls_overloaded_total",
    "calls answered OVERLOADED, nothing of them begun: too many waited, or they waited for too long",
)


# Compared by identity: calls are keys of the queues.
@dataclass(eq=False, slots=True)
class Call:
    """A call in queues. `urgent`: the call is the platform's own, or holds a lock for which such a call waits."""

    urgent: bool
    waits_in: "WaitQueue | None" = None

    def make_urgent(self) -> None:
        """Makes the call urgent, in the present queue and in later ones. Otherwise an expired session would wait for a
        client's CreateTopic, and CreateTopic for the connections of a thousand other clients."""
        if not self.urgent:
            self.urgent = True
            if self.waits_in is not None:
                self.waits_in.moved_ahead(self)


class WaitingCalls:
    """Counts clients' calls that wait in any queue; at most `total_max` together. The platform's own calls are not
    counted: their number is limited by the tasks of agents and workers."""

    def __init__(self, total_max: int) -> None:
        self._total_max = total_max
        self._total = 0

    def enter(self, in_line: int, line_max: int | None) -> None:
        """Counts a call that begins to wait behind `in_line` others. Raises Overloaded."""
        if line_max is not None and in_line >= line_max:
            raise overloaded("too many calls wait for the same lock", limit=f"pg_lock_waiting_max ({line_max})")
        if self._total >= self._total_max:
            raise overloaded("too many calls wait", limit=f"pg_waiting_max ({self._total_max})")
        self._total += 1

    def leave(self) -> None:
        """Counts a call that waits no longer."""
        self._total -= 1


def overloaded(message: str, **details: object) -> Overloaded:
    """Returns the error of a call that is refused before anything has begun, and counts the refusal."""
    _overloaded.add(1)
    return Overloaded(f"{message}; try again", retry_after_ms=RETRY_AFTER_MS, **details)


class WaitQueue:
    """A queue for `places` calls at once, at most `client_places` of them clients'. `waiting_max`: limit of clients'
    calls that wait here; None: no limit of its own."""

    def __init__(
        self, waiters: WaitingCalls, *, places: int, client_places: int, waiting_max: int | None = None
    ) -> None:
        self._waiters = waiters
        self._places = places
        self._client_places = client_places
        self._waiting_max = waiting_max
        self._holders: set[Call] = set()
        self._clients: set[Call] = set()  # of the holders
        self._urgent_queue: OrderedDict[Call, asyncio.Future[None]] = OrderedDict()
        self._client_queue: OrderedDict[Call, asyncio.Future[None]] = OrderedDict()

    @property
    def is_idle(self) -> bool:
        """True if no call has a place or waits for a place."""
        return not (self._holders or self._urgent_queue or self._client_queue)

    async def take(self, call: Call) -> None:
        """Waits for a place, which the caller has to give back. Raises Overloaded."""
        queue = self._urgent_queue if call.urgent else self._client_queue
        if not queue and self._has_place_for(call):
            self._serve(call)
            return
        # Fixed here: the call may become urgent while it waits, and still has to be counted out.
        counted = not call.urgent
        if counted:
            self._waiters.enter(len(queue), self._waiting_max)
        queue[call] = served = asyncio.get_running_loop().create_future()
        call.waits_in = self
        _waiting.add(1)
        try:
            await served
        except asyncio.CancelledError:
            if served.done() and not served.cancelled():
                self.give_back(call)  # granted, but the task was cancelled before it ran
            raise
        finally:
            # From both queues: the call may have become urgent while it waited.
            self._urgent_queue.pop(call, None)
            self._client_queue.pop(call, None)
            call.waits_in = None
            _waiting.add(-1)
            if counted:
                self._waiters.leave()

    def give_back(self, call: Call) -> None:
        """Gives the call's place to the next in the queue."""
        self._holders.remove(call)
        self._clients.discard(call)
        # Repeated, because a call that was cancelled takes no place.
        while (first := self._next()) is not None:
            self._grant(*first)

    def moved_ahead(self, call: Call) -> None:
        """Moves a waiting call to the end of the urgent calls."""
        if (served := self._client_queue.pop(call, None)) is not None:
            if self._has_place_for(call):
                self._grant(call, served)
            else:
                self._urgent_queue[call] = served

    def make_holders_urgent(self) -> None:
        """Makes the calls that hold places urgent."""
        for holder in self._holders:
            holder.make_urgent()

    def _serve(self, call: Call) -> None:
        self._holders.add(call)
        if not call.urgent:
            self._clients.add(call)

    def _grant(self, call: Call, served: asyncio.Future[None]) -> None:
        """Grants the place to a waiting call, unless its task was cancelled and has not run since."""
        if not served.cancelled():
            self._serve(call)
            served.set_result(None)

    def _has_place_for(self, call: Call) -> bool:
        return len(self._holders) < self._places and (call.urgent or self._client_has_place())

    def _client_has_place(self) -> bool:
        return len(self._clients) < self._client_places

    def _next(self) -> tuple[Call, asyncio.Future[None]] | None:
        """Removes the next call from the queue and returns it; None if there is no call that has a place. Urgent calls
        go first, unless no client's call holds a place: clients wait longer, but not for ever."""
        if len(self._holders) >= self._places:
            return None
        if self._client_queue and self._client_has_place():
            # With a single place, as for a lock, urgent calls always go first.
            left_out = self._places > 1 and not self._clients
            if left_out or not self._urgent_queue:
                return self._client_queue.popitem(last=False)
        return self._urgent_queue.popitem(last=False) if self._urgent_queue else None


class LockQueues:
    """Queues for locks, by name. Of all calls of this process that want a lock, a single call at a time asks
    PostgreSQL; the others wait here and hold no connection."""

    def __init__(self, waiters: WaitingCalls, waiting_max: int) -> None:
        self._waiters = waiters
        self._waiting_max = waiting_max
        self._queues: dict[str, WaitQueue] = {}

    def __len__(self) -> int:
        """Number of locks that calls hold or wait for."""
        return len(self._queues)

    async def take(self, name: str, call: Call) -> None:
        """Waits for the turn with the lock `name`, which the caller has to give back. Raises Overloaded."""
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = WaitQueue(
                self._waiters, places=1, client_places=1, waiting_max=self._waiting_max
            )
        # The urgent call waits for the holder's transaction, which must not wait behind clients in turn.
        if call.urgent:
            queue.make_holders_urgent()
        try:
            await queue.take(call)
        finally:
            self._forget(name, queue)

    def give_back(self, name: str, call: Call) -> None:
        """Gives the turn with the lock `name` to the next in line."""
        queue = self._queues[name]
        queue.give_back(call)
        self._forget(name, queue)

    def _forget(self, name: str, queue: WaitQueue) -> None:
        if queue.is_idle and self._queues.get(name) is queue:
            del self._queues[name]
