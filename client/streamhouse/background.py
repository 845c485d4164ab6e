"""One event loop on one background thread, for the synchronous client. Started on first use, ended with the process."""

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# How long the process waits at its end for the loop's last callbacks.
JOIN_TIMEOUT_S = 5.0


class Background:
    """`run` hands a coroutine to the loop and waits; from any thread but the loop's own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Raises RuntimeError in a child that was forked after the first use."""
        with self._lock:
            if self._loop is None:
                return self._start()
            if self._pid != os.getpid():
                # gRPC's own thread has not come along either: the first call would wait for ever, past its deadline.
                raise RuntimeError(
                    "this process was forked from one that had used the client, and gRPC does not work in it: use the "
                    "client only after forking, or start processes with the method `spawn`"
                )
            return self._loop

    def _start(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="streamhouse", daemon=True)
        self._thread.start()
        self._loop, self._pid = loop, os.getpid()
        atexit.register(self.stop)
        return loop

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """The coroutine's result. Raises what it raises, TimeoutError after timeout_s, RuntimeError in a forked child;
        a wait that is interrupted cancels it."""
        try:
            loop = self.loop
        except RuntimeError:
            work.close()
            raise
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("the synchronous client would wait for itself here: use the async one in callbacks")
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Ends the thread; later use starts another one."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
            if loop is None or thread is None or self._pid != os.getpid():
                return
        loop.call_soon_threadsafe(loop.stop)
        thread.join(JOIN_TIMEOUT_S)


BACKGROUND = Background()
