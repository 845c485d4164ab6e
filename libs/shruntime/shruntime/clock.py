"""Time as a port: services ask a Clock, so that tests and simulations can hold it."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_ms(self) -> int:
        """Returns milliseconds that never decrease; for deadlines. Comparable within one process only."""

    def wall_ms(self) -> int:
        """Returns milliseconds since 1970-01-01 UTC; for timestamps, never for safety."""

    async def sleep_ms(self, duration_ms: float) -> None: ...


class SystemClock:
    """The running event loop's time, so that a loop with virtual time carries its clock with it."""

    def monotonic_ms(self) -> int:
        return int(asyncio.get_running_loop().time() * 1000)

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    async def sleep_ms(self, duration_ms: float) -> None:
        await asyncio.sleep(duration_ms / 1000)


class ManualClock:
    """Moves only by hand; sleepers wake in order of their deadlines."""

    def __init__(self, now_ms: int = 0) -> None:
        self.now_ms = now_ms
        self._sleepers: list[tuple[int, asyncio.Event]] = []

    def monotonic_ms(self) -> int:
        return self.now_ms

    def wall_ms(self) -> int:
        return self.now_ms

    async def sleep_ms(self, duration_ms: float) -> None:
        wake = asyncio.Event()
        self._sleepers.append((self.now_ms + int(duration_ms), wake))
        await wake.wait()

    def advance(self, duration_ms: int) -> None:
        self.now_ms += duration_ms
        due = [sleeper for sleeper in self._sleepers if sleeper[0] <= self.now_ms]
        self._sleepers = [sleeper for sleeper in self._sleepers if sleeper[0] > self.now_ms]
        for _, wake in sorted(due, key=lambda sleeper: sleeper[0]):
            wake.set()
