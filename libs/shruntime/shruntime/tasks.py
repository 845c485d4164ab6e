"""Background tasks with an owner, their ends, and retries with back-off.

Terms: a task *ends* when it has returned, raised or been cancelled; its *outcome* is the result or the error.

Owns: the tasks of `Tasks` until they end, the error of the first that failed, the number of tries of a `Backoff`. Does
not own: the reaction to a failed task, which is up to the caller of `raise_failure`.
Invariants: `error` is set before `failed`, and never replaced. A cancelled task does not count as failed. Tasks that
run when `stop` is called have ended when `stop` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import random
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from shproto.errors import StreamHouseError

from shruntime import signals

if TYPE_CHECKING:
    from shruntime.clock import Clock
    from shruntime.supervisor import Supervisor

log = logging.getLogger(__name__)
T = TypeVar("T")


async def outcomes(*calls: Awaitable[T]) -> list[T | BaseException]:
    """Waits until all calls have ended. Returns the outcome of each, in order: the result, or the error it raised.

    If the caller is cancelled meanwhile, all calls are cancelled and awaited before CancelledError is raised.
    """
    return await asyncio.gather(*calls, return_exceptions=True)


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and returns once all of them have ended, so that none runs on behind its owner.

    Errors of the tasks are not raised, and count as seen: a caller that wants them looks at the tasks afterwards. A
    cancellation of the caller is raised once the tasks have ended.
    """
    for task in tasks:
        task.cancel()
    # Not asyncio.wait: a cancellation of the caller would end the wait and leave the tasks running, and errors that
    # nobody asks for would be logged as defects ("exception was never retrieved").
    await outcomes(*tasks)


async def run_to_end(call: Callable[..., T], *arguments: object) -> T:
    """Runs a blocking call in a thread, and returns its result.

    No cancellation stops a thread. Where `asyncio.to_thread` would return at once and leave the thread at work behind
    its owner, a cancellation of the caller is raised here once the call has ended.
    """
    context = contextvars.copy_context()
    return await until_done(asyncio.get_running_loop().run_in_executor(None, lambda: context.run(call, *arguments)))


async def until_done(future: asyncio.Future[T]) -> T:
    """Returns the result of a future that has no other waiter. A cancellation of the caller is raised once the future
    is done, which then still has its result."""
    try:
        return await asyncio.shield(future)
    finally:
        while not future.done():  # the caller is being cancelled; further cancellations are part of that one
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # counts as seen, or asyncio would log it as a defect


class Tasks:
    """Owns background tasks: one that dies is reported through `failed`, `stop` cancels and awaits them all."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.failed = asyncio.Event()
        self.error: BaseException | None = None

    def spawn(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts the coroutine as a task called `name` and returns the task. An error of the task sets `failed`."""
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

    async def raise_failure(self) -> None:
        """Waits until a task dies. Raises the error of the first; never returns."""
        await self.failed.wait()
        assert self.error is not None, "it is set before `failed`"
        raise self.error

    async def stop(self) -> None:
        """Cancels what still runs and waits for it to end."""
        await cancel_and_wait(*self._tasks)


def _backoff_ms_max(attempt: int, first_ms: int, max_ms: int) -> int:
    """Returns the longest wait after try number `attempt`, from 1 on: `first_ms`, doubled up to `max_ms`."""
    return min(max_ms, first_ms << min(max(attempt - 1, 0), 32))


def retry_after_ms(attempt: int, jitter: float, *, first_ms: int, max_ms: int) -> int:
    """Returns the wait of a Backoff, at least 1 ms, for work whose tries are counted elsewhere, say in a table.
    `attempt` counts from 1, `jitter` lies in [0, 1)."""
    return max(1, int(_backoff_ms_max(attempt, first_ms, max_ms) * jitter))


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
        """Returns the ms to wait before the next try."""
        self._attempt += 1
        return self._uniform(0, _backoff_ms_max(self._attempt, self._first_ms, self._max_ms))

    def reset(self) -> None:
        """Starts over with the first wait, after a success."""
        self._attempt = 0


async def sleep_ms(duration_ms: float) -> None:
    """Sleeps by the event loop's time."""
    await asyncio.sleep(duration_ms / 1000)


async def retry(
    call: Callable[[], Awaitable[T]],
    backoff: Backoff,
    until: Callable[[StreamHouseError], bool],
    sleep_ms: Callable[[float], Awaitable[None]] = sleep_ms,
) -> T:
    """Calls until a call succeeds, and returns its result; waits as `backoff` says between two calls.

    until: asked after each failure, and the place to log it; True ends the retries. Raises the failure then, and
    errors that are no StreamHouseError at once: they are defects, or answers that only the caller understands.
    """
    while True:
        try:
            return await call()
        except StreamHouseError as error:
            if until(error):
                raise
        # Outside of the handler: a failure that is awaited there would keep its traceback, with all the frames' bytes.
        await sleep_ms(backoff.next_ms())


async def done_within(clock: Clock, future: asyncio.Future[Any], wait_ms: float) -> bool:
    """Returns True if the future is done within `wait_ms` by the clock; the future goes on if not."""
    if future.done():
        return True
    sleep = asyncio.ensure_future(clock.sleep_ms(max(wait_ms, 0)))
    try:
        await asyncio.wait((future, sleep), return_when=asyncio.FIRST_COMPLETED)
    finally:
        sleep.cancel()
    return future.done()


async def ends_within(clock: Clock, coroutine: Coroutine[Any, Any, Any], wait_ms: float) -> bool:
    """Returns True if the coroutine ends within `wait_ms` by the clock, and cancels the coroutine if not. Raises the
    coroutine's error."""
    task = asyncio.ensure_future(coroutine)
    try:
        ended = await done_within(clock, task, wait_ms)
        if ended:
            task.result()
        return ended
    finally:
        await cancel_and_wait(task)


async def run_until_first_ends(parts: Mapping[str, Coroutine[Any, Any, Any]]) -> None:
    """Runs coroutines, by name, side by side until the first ends; cancels the others and waits for their ends. Raises
    what the first raises."""
    tasks = [asyncio.create_task(part, name=name) for name, part in parts.items()]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await cancel_and_wait(*tasks)


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
