"""Virtual time on an event loop that has real threads and files: it stands still while anything can run, and then jumps
to the next timer. The simulation has a loop of its own, without either.

Owns: the time of one running loop. Does not own: the loop.
Invariants: time never passes while a callback is ready, or a job of an executor runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

POLL_S = 0.001
"""How long the loop looks for the answer of a thread before it runs its callbacks again."""


class _Time:
    """Stands in the place of the loop's clock, its selector and its way to executors."""

    def __init__(self, loop: Any) -> None:
        self._now_s = loop.time()
        self._jobs = 0
        self._selector = loop._selector
        self._run_in_executor = loop.run_in_executor

    def time(self) -> float:
        return float(self._now_s)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._run_in_executor(executor, func, *args)
        self._jobs += 1
        future.add_done_callback(self._job_done)
        return future

    def _job_done(self, future: asyncio.Future[Any]) -> None:
        self._jobs -= 1

    def select(self, timeout_s: float | None = None) -> list[Any]:
        found: list[Any] = self._selector.select(0)
        if found or timeout_s == 0:
            return found
        if timeout_s is None or self._jobs:
            return self._selector.select(POLL_S)  # type: ignore[no-any-return]
        self._now_s += timeout_s
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._selector, name)


@contextmanager
def virtual_time() -> Iterator[None]:
    """Makes time of the running loop virtual while the block runs: waits take none."""
    loop: Any = asyncio.get_running_loop()
    time, selector = _Time(loop), loop._selector
    loop.time, loop.run_in_executor, loop._selector = time.time, time.run_in_executor, time
    try:
        yield
    finally:
        del loop.time, loop.run_in_executor
        loop._selector = selector
