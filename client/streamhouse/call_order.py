"""Keeps the calls of a producer that cannot be done at once in the order in which they were made, topic by topic.

Owns: which calls wait, and which have the turn. Does not own: what a call waits for before and after that.
Invariants: calls of a topic get the turn in the order in which they were made, and go on in that order. Calls that add
one record get it together, as many as are ready; a call that adds several has it alone. The next get it once all that
have it have left. A topic has an entry only while it has calls.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager


class Place:
    """The place of one call. `alone`: no other call has the turn at the same time."""

    __slots__ = ("_line", "alone", "has_turn", "is_ready", "turn")

    def __init__(self, line: "_Line", *, alone: bool) -> None:
        self._line = line
        self.alone = alone
        self.is_ready = False  # waits for nothing but the turn
        self.has_turn = False
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait(self) -> None:
        """Returns once the call has the turn."""
        self.is_ready = True
        self._line.give_turns()
        await self.turn


class _Line:
    """The calls of one topic."""

    def __init__(self) -> None:
        # OrderedDict: leaves from the middle, and finds the first after thousands have left, in constant time.
        self.waiting: OrderedDict[Place, None] = OrderedDict()
        self.having_turn = 0

    def give_turns(self) -> None:
        """Once nobody has the turn: gives it to the first call and to those behind it that may have it together with
        it. These go on in one round of the event loop; a round for each would double what a crowd of calls costs."""
        if self.having_turn:
            return
        while self.waiting:
            place = next(iter(self.waiting))
            if not place.is_ready or (place.alone and self.having_turn):
                return
            del self.waiting[place]
            self.having_turn += 1
            place.has_turn = True
            if not place.turn.done():  # cancelled otherwise, and about to leave
                place.turn.set_result(None)
            if place.alone:
                return

    def leave(self, place: Place) -> None:
        if place.has_turn:
            self.having_turn -= 1
        else:
            del self.waiting[place]
        self.give_turns()


class CallOrder:
    """`lines` is empty while every call may be done at once."""

    def __init__(self) -> None:
        self.lines: dict[str, _Line] = {}

    @contextmanager
    def place(self, topic: str, *, alone: bool) -> Iterator[Place]:
        """Holds a place behind all calls made before, until the block ends."""
        line = self.lines.setdefault(topic, _Line())
        place = Place(line, alone=alone)
        line.waiting[place] = None
        try:
            yield place
        finally:
            line.leave(place)
            if not line.waiting and not line.having_turn:
                del self.lines[topic]
