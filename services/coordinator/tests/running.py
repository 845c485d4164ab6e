"""Coordinators that run for the length of a block, and what they do by themselves waited for."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService, build

PATIENCE_S = 60
"""Until something that must come is given up: no duration is tested by it, and the machine may be busy."""


@asynccontextmanager
async def running(settings: CoordinatorSettings) -> AsyncIterator[CoordinatorService]:
    service = build(settings)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Returns once the condition is met; raises TimeoutError after PATIENCE_S."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.02)


def children(pid: int) -> list[int]:
    """Returns the processes that this one has started and that run."""
    with open(f"/proc/{pid}/task/{pid}/children") as numbers:
        return [int(number) for number in numbers.read().split()]
