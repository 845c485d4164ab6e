"""Turns of the event loop for applications that never wait: `async for` over received records, `await send(...)` into a
buffer with room.

Owns: the time since the loop last ran. Does not own: the calls that give the loop turns.
Invariants: a call has finished its change of state before it gives the loop a turn.
"""

import asyncio

# An application's code runs this long before the event loop has a turn. Short beside any session timeout and about as
# long as a batch lingers; a turn costs about 50 us.
TURN_S = 0.005
# The loop gets a turn for each LOOP_TURN_S that it stood still, at most LOOP_TURNS_MAX: an answer to a heartbeat needs
# about five.
LOOP_TURN_S, LOOP_TURNS_MAX = 0.010, 10


async def let_loop_run(stood_s: float) -> None:
    """Gives the event loop turns in proportion to the time that the loop stood still, at least one."""
    for _ in range(min(1 + int(stood_s / LOOP_TURN_S), LOOP_TURNS_MAX)):
        await asyncio.sleep(0)


class LoopTurns:
    """Measures how long the loop stands still, for calls that usually do not wait. Reads the clock once per call."""

    __slots__ = ("_loop", "_stands_since_s")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stands_since_s: float | None = None  # None: the loop has run since the last call

    def stood_s(self) -> float:
        """Returns the seconds for which the loop has stood still, as far as calls of this method show."""
        now_s = self._loop.time()
        if self._stands_since_s is None:
            self._stands_since_s = now_s
            # Runs at the loop's next turn: from then on the loop stands still no longer.
            self._loop.call_soon(self._has_run)
        return now_s - self._stands_since_s

    def _has_run(self) -> None:
        self._stands_since_s = None
