"""Background tasks with an owner, and back-off for what they retry."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from shruntime import signals

if TYPE_CHECKING:
    from shruntime.supervisor import Supervisor

log = logging.getLogger(__name__)


class Tasks:
    """Owns background tasks: one that dies is reported through `failed`, `stop` cancels and awaits them all."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.failed = asyncio.Event()
        self.error: BaseException | None = None

    def spawn(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The owner raises it, traceback and all; an expected failure must not look like a defect here.
            log.error("%s ended: %s", task.get_name(), error or type(error).__name__)
            self.error = self.error or error
            self.failed.set()

    async def stop(self) -> None:
        """Cancels what still runs and waits for it to end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Backoff:
    """Capped exponential back-off with full jitter
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/)."""

    def __init__(self, first_ms: int, max_ms: int, rng: random.Random | None = None) -> None:
        self._first_ms = first_ms
        self._max_ms = max_ms
        # One for all: a generator of its own takes longer to seed than a whole call needs.
        self._uniform = (rng or random).uniform
        self._attempt = 0

    def next_ms(self) -> float:
        """How long to wait before the next try."""
        ceiling = min(self._max_ms, self._first_ms * 2 ** min(self._attempt, 32))
        self._attempt += 1
        return self._uniform(0, ceiling)

    def reset(self) -> None:
        self._attempt = 0


async def run_until_first_ends(parts: Mapping[str, Coroutine[Any, Any, Any]]) -> None:
    """Runs coroutines, by name, side by side until the first ends; cancels the others and waits for their ends. Raises
    what the first raises."""
    tasks = [asyncio.create_task(part, name=name) for name, part in parts.items()]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_stop(tasks: Tasks, supervisor: Supervisor) -> None:
    """Returns on SIGINT or SIGTERM; raises what killed a background task, should one die first. Tells `supervisor` that
    the service stops, either way. A further signal, while the service drains, does what it did before the call."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, stop.set)
    waits = [asyncio.create_task(stop.wait()), asyncio.create_task(tasks.failed.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        signals.take_back(loop, before)
        supervisor.stopping()
    if tasks.error is not None and not stop.is_set():
        raise tasks.error
