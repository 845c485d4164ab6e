"""Threads that compute statements: blocking calls that are interrupted, and may not heed it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

T = TypeVar("T")

# A statement that is to end is interrupted again after this time: an interrupt that comes between two calls of DuckDB
# is lost.
INTERRUPT_AGAIN_MS = 50


def in_daemon(work: Callable[[], T], name: str = "sql statement") -> asyncio.Future[T]:
    """Returns the result of `work`, run in a thread of its own. Not an executor's: Python waits for those at its end,
    and a statement's thread may not end. Nor the loop's: it waits for decoders, which would wait for a thread."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - the future has it
            report = partial(done.set_exception, error)
        else:
            report = partial(done.set_result, result)
        with contextlib.suppress(RuntimeError):  # the loop is closed: an abandoned statement
            loop.call_soon_threadsafe(report)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


async def run_interruptibly(work: Callable[[], T], interrupt: Callable[[], None]) -> T:
    """Returns the result of `work`, run in a thread. A caller that is cancelled interrupts the work, and goes on once
    the thread has ended."""
    call = in_daemon(work)
    try:
        await asyncio.wait((call,))
    finally:
        while not call.done():  # the caller is being cancelled; further cancellations are part of that one
            interrupt()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((call,), timeout=INTERRUPT_AGAIN_MS / 1000)
        call.exception()  # seen: of work that was ended it is only the interrupt
    return call.result()
