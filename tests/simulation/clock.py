"""Time as one machine knows it."""

from __future__ import annotations

import asyncio

from tests.simulation.loop import SimLoop

EPOCH_MS = 1_700_000_000_000


class SimClock:
    """shruntime.clock.Clock: the loop's time, and a wall clock that may be set."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self.offset_ms = 0

    def monotonic_ms(self) -> int:
        return int(self._loop.time() * 1000)

    def wall_ms(self) -> int:
        return EPOCH_MS + int(self._loop.time() * 1000) + self.offset_ms

    async def sleep_ms(self, duration_ms: float) -> None:
        await asyncio.sleep(duration_ms / 1000)
