"""Keeps a producer's calls that have to wait in the order in which they were made, topic by topic.

Owns: the waiting calls, and the calls that have the turn. Does not own: the reasons why calls wait (metadata, room).
Invariants: calls of a topic get the turn in the order in which they were made, and go on in that order. Calls that add
a single record get the turn together, as many as are ready; a call that adds several has the turn alone. The next calls
get the turn once all calls that have it have left. A topic has an entry only while it has calls.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager


class Ticket:
    """Place of a call in the order. `alone`: no other call has the turn at the same time."""

    __slots__ = ("_queue", "alone", "granted", "is_ready", "turn")

    def __init__(self, queue: "_WaitQueue", *, alone: bool) -> None:
        self._queue = queue
        self.alone = alone
        self.is_ready = False  # waits for nothing but the turn
        self.granted = False
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait(self) -> None:
        """Waits until the call has the turn."""
        self.is_ready = True
        self._queue.give_turns()
        await self.turn


class _WaitQueue:
    """Calls of a topic."""

    def __init__(self) -> None:
        # OrderedDict: leaves from the middle, and finds the first after thousands have left, in constant time.
        self.waiting: OrderedDict[Ticket, None] = OrderedDict()
        self.granted_count = 0

    def give_turns(self) -> None:
        """Gives the turn, once no call has it, to the first call and to the calls behind that may share the turn."""
        # Calls that share the turn go on in the same round of the event loop; a round for each would double the cost of
        # a crowd of calls.
        if self.granted_count:
            return
        while self.waiting:
            ticket = next(iter(self.waiting))
            if not ticket.is_ready or (ticket.alone and self.granted_count):
                return
            del self.waiting[ticket]
            self.granted_count += 1
            ticket.granted = True
            if not ticket.turn.done():  # cancelled otherwise, and about to leave
                ticket.turn.set_result(None)
            if ticket.alone:
                return

    def leave(self, ticket: Ticket) -> None:
        """Ends the turn of a granted ticket, or the wait of another; then gives turns to tickets that may go."""
        if ticket.granted:
            self.granted_count -= 1
        else:
            del self.waiting[ticket]
        self.give_turns()


class FairLock:
    """`queues` is empty while every call may be done at once."""

    def __init__(self) -> None:
        self.queues: dict[str, _WaitQueue] = {}

    @contextmanager
    def ticket(self, topic: str, *, alone: bool) -> Iterator[Ticket]:
        """Holds a ticket behind all calls made before, until the block ends."""
        queue = self.queues.setdefault(topic, _WaitQueue())
        ticket = Ticket(queue, alone=alone)
        queue.waiting[ticket] = None
        try:
            yield ticket
        finally:
            queue.leave(ticket)
            if not queue.waiting and not queue.granted_count:
                # Removed with its last call, so that an empty dict says that every call may be done at once.
                del self.queues[topic]
