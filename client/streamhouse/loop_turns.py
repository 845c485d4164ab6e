"""Turns of the event loop for applications whose code never waits: `async for` over what is there, `await send(...)`.

Owns: how long the loop has stood still since it last ran. Invariant: what is given a turn has changed its state before.
"""

import asyncio

# For so long an application's code runs before the event loop has a turn. Short beside any session timeout and about
# what a batch lingers; a turn costs about 50 us.
TURN_S = 0.005
# The loop is given a turn for every so long that it stood still: an answer to a heartbeat takes it about five.
LOOP_TURN_S, LOOP_TURNS_MAX = 0.010, 10


async def let_loop_run(stood_s: float) -> None:
    """Gives the event loop as many turns as befit the time that it stood still, at least one."""
    for _ in range(min(1 + int(stood_s / LOOP_TURN_S), LOOP_TURNS_MAX)):
        await asyncio.sleep(0)


class LoopTurns:
    """For calls that do not wait on most of their ways. Costs a look at the clock for each."""

    __slots__ = ("_loop", "_stands_since_s")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stands_since_s: float | None = None  # None: it has run since the last call

    def stood_s(self) -> float:
        """Returns how long the loop has stood still, as far as calls of this show."""
        now_s = self._loop.time()
        if self._stands_since_s is None:
            self._stands_since_s = now_s
            self._loop.call_soon(self._has_run)
        return now_s - self._stands_since_s

    def _has_run(self) -> None:
        self._stands_since_s = None
