"""Runs work that would block the event loop in threads, a few jobs at a time, by turns.

Owns: the queued jobs. Does not own: threads, which are the loop's. Invariants: at most `at_once_max` jobs run, and each
key has a job started before any other key has two; the queue never exceeds `bytes_max`, a single job of any size
excepted.
"""

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from shruntime.round_robin import RoundRobinQueue

T = TypeVar("T")


class QueueFull(Exception):
    """The queue has no room for the job; `queued_bytes` wait."""

    def __init__(self, queued_bytes: int) -> None:
        super().__init__(f"{queued_bytes} bytes wait to be worked on")
        self.queued_bytes = queued_bytes


@dataclass(frozen=True, slots=True)
class _Job(Generic[T]):
    work: Callable[[], T]
    size_bytes: int
    done: asyncio.Future[T]


class FairExecutor:
    """Keys are callers that must not wait behind one another's jobs: connections, say."""

    def __init__(self, *, at_once_max: int, bytes_max: int) -> None:
        self._at_once_max = at_once_max
        self._bytes_max = bytes_max
        self._jobs: RoundRobinQueue[Hashable, _Job[Any]] = RoundRobinQueue()
        self._running = 0
        self.queued_bytes = 0

    async def run(self, key: Hashable, work: Callable[[], T], size_bytes: int) -> T:
        """Returns the result of `work`, run in a thread when it is this key's turn. Raises QueueFull, and the errors
        of `work`."""
        if self.queued_bytes and self.queued_bytes + size_bytes > self._bytes_max:
            raise QueueFull(self.queued_bytes)
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.queued_bytes += size_bytes
        self._jobs.put(key, _Job(work, size_bytes, done))
        self._start_next()
        return await done

    def _start_next(self) -> None:
        loop = asyncio.get_running_loop()
        while self._running < self._at_once_max and self._jobs:
            _, job = self._jobs.take()
            if job.done.cancelled():  # its caller was cancelled
                self.queued_bytes -= job.size_bytes
                continue
            self._running += 1
            running = loop.run_in_executor(None, job.work)
            running.add_done_callback(partial(self._ended, job))

    def _ended(self, job: _Job[Any], ended: asyncio.Future[Any]) -> None:
        self._running -= 1
        # Only now, as the thread has held the bytes even if its caller was cancelled meanwhile.
        self.queued_bytes -= job.size_bytes
        error = ended.exception() if not ended.cancelled() else asyncio.CancelledError()
        if not job.done.done():
            if error is None:
                job.done.set_result(ended.result())
            else:
                job.done.set_exception(error)
        self._start_next()
