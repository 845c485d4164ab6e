"""An event loop on a background thread, for the synchronous client: started on first use, ended with the process.

Owns: the loop and its thread, the work to do before the process ends. Does not own: the coroutines.
Invariants: the loop's thread never waits for a lock that another thread can hold. KeyboardInterrupt may come between
any two steps of an application thread, also inside `Condition.__enter__`, and then leaves the lock taken for ever. So
threads meet in deques and in `_Call`: the loop's thread only ever releases its lock.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from shproto import forks

T = TypeVar("T")

# Wait of the ending process for the loop's last callbacks.
JOIN_TIMEOUT_S = 5.0


class _Call(Generic[T]):
    """A coroutine that the loop's thread runs and another thread waits for."""

    __slots__ = ("_cancelled", "_done", "_task", "_work")

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self._cancelled = False
        # Taken until the task has ended. Each call has its own lock: a lock that stays taken after an interrupt blocks
        # no other thread.
        self._done = threading.Lock()
        self._done.acquire()

    def start(self) -> None:
        """Runs the coroutine, unless `cancel` came first. Called in the loop's thread."""
        if not self._cancelled:
            self._task = asyncio.get_running_loop().create_task(self._work)
            self._task.add_done_callback(self._ended)

    def cancel(self) -> None:
        """Ends the coroutine, also if the coroutine has not started. Called in the loop's thread."""
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()
        else:
            self._work.close()

    def _ended(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # marked as retrieved: asyncio would log the error if the waiting thread was interrupted
        self._done.release()

    def wait(self, timeout_s: float | None) -> T:
        """Returns the coroutine's result. Raises the coroutine's error, TimeoutError after timeout_s. Called in the
        waiting thread."""
        limit_s = -1 if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)
        if not self._done.acquire(timeout=limit_s):
            raise TimeoutError(f"no result after timeout_s = {timeout_s}")
        assert self._task is not None, "it ended, so it was started"
        if self._task.cancelled():
            raise RuntimeError("the client was stopped while this call waited")
        return self._task.result()


class Background:
    """The event loop and its thread. `run` hands a coroutine to the loop and waits; from any thread but the loop's
    own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # never taken by the loop's thread
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._ended = False
        self._before_end: list[Callable[[], None]] = []

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, started on first use. Raises RuntimeError in a child process forked after that, and once
        the process ends."""
        loop = self._loop
        if loop is None:
            forks.check()
            with self._lock:
                return self._loop or self._start()
        if self._pid != os.getpid():
            raise RuntimeError(forks.MESSAGE)  # a fork does not copy the thread
        return loop

    def _start(self) -> asyncio.AbstractEventLoop:
        if self._ended:
            raise RuntimeError("the process ends: the client has been stopped")
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._run, args=(loop,), name="streamhouse", daemon=True)
        thread.start()
        if self._thread is None:
            atexit.register(self.stop)
        self._thread, self._pid = thread, os.getpid()
        self._loop = loop  # last: a thread that sees the loop sees the other fields as well
        return loop

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        with asyncio.Runner(loop_factory=lambda: loop):  # at its end cancels and awaits the remaining tasks
            loop.run_forever()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Returns the coroutine's result. Raises the coroutine's error, TimeoutError after timeout_s, RuntimeError in a
        forked child. An interrupt of the wait cancels the coroutine."""
        try:
            loop = self.loop
            self.refuse_own_thread()
        except BaseException:
            work.close()
            raise
        call: _Call[T] | None = None
        try:
            call = _Call(work)
            loop.call_soon_threadsafe(call.start)
            return call.wait(timeout_s)
        except BaseException:
            if call is None or loop.is_closed():
                work.close()
            else:
                loop.call_soon_threadsafe(call.cancel)
            raise

    def refuse_own_thread(self) -> None:
        """Refuses calls in the loop's thread, which would wait for itself. Raises RuntimeError."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("the synchronous client would wait for itself here: use the async one in callbacks")

    def before_end(self, work: Callable[[], None]) -> None:
        """Registers `work` to be called when the process ends, while the loop still runs."""
        self._before_end.append(work)

    def stop(self) -> None:
        """Calls the work registered with `before_end`, then ends the thread for good."""
        if self._loop is None or self._pid != os.getpid():
            return
        try:
            for work in self._before_end:
                work()
        finally:
            self._ended = True
            loop, thread, self._loop = self._loop, self._thread, None
            # After the work above: what runs before the end needs the loop.
            loop.call_soon_threadsafe(loop.stop)
            if thread is not None:
                # With a limit: a callback of the application in that thread must not keep the process from ending.
                thread.join(JOIN_TIMEOUT_S)


BACKGROUND = Background()
