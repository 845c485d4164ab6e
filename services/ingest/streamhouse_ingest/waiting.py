"""Waits with a time limit on the clock of the service, so that tests can pass virtual time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from shruntime.clock import Clock
from shruntime.tasks import cancel_and_wait


async def done_within(clock: Clock, future: asyncio.Future[Any], wait_ms: float) -> bool:
    """True if the future is done within `wait_ms`; otherwise the future stays pending."""
    if future.done():
        return True
    sleep = asyncio.ensure_future(clock.sleep_ms(max(wait_ms, 0)))
    try:
        await asyncio.wait((future, sleep), return_when=asyncio.FIRST_COMPLETED)
    finally:
        sleep.cancel()
    return future.done()


async def ends_within(clock: Clock, coroutine: Coroutine[Any, Any, Any], wait_ms: float) -> bool:
    """True if the coroutine ends within `wait_ms`; otherwise cancels it. Raises the error of the coroutine."""
    task = asyncio.ensure_future(coroutine)
    try:
        ended = await done_within(clock, task, wait_ms)
        if ended:
            task.result()
        return ended
    finally:
        await cancel_and_wait(task)
