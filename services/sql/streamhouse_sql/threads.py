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


def in_daemon(work: Callable[[], T]) -> asyncio.Future[T]:
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

    threading.Thread(target=run, name="sql statement", daemon=True).start()
    return done
