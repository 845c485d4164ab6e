"""Waiting for something or for time to pass, by the service's clock."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from shruntime.clock import Clock
from shruntime.tasks import cancel_and_wait


async def done_within(clock: Clock, future: asyncio.Future[Any], wait_ms: float) -> bool:
    """Is the future done within `wait_ms`? It goes on if not."""
    if future.done():
        return True
    sleep = asyncio.ensure_future(clock.sleep_ms(max(wait_ms, 0)))
    try:
        await asyncio.wait((future, sleep), return_when=asyncio.FIRST_COMPLETED)
    finally:
        sleep.cancel()
    return future.done()


async def ends_within(clock: Clock, coroutine: Coroutine[Any, Any, Any], wait_ms: float) -> bool:
    """Does the coroutine end within `wait_ms`? It is cancelled if not; what it raises is raised."""
    task = asyncio.ensure_future(coroutine)
    try:
        ended = await done_within(clock, task, wait_ms)
        if ended:
            task.result()
        return ended
    finally:
        await cancel_and_wait(task)
