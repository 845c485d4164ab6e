"""Points at which a worker dies: before or after each call that leaves the process or changes the job's state."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

BEFORE, AFTER = "before", "after"


class CrashPoint:
    """The `nth` call (from 1) of an operation, before its effect or after it. `reached` is set there, and the caller
    waits for ever; `let_go` ends waits in threads, whose callers nobody can cancel."""

    def __init__(self, operation: str, when: str, nth: int = 1) -> None:
        self.operation, self.when, self.nth = operation, when, nth
        self.reached = asyncio.Event()
        self.calls: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        self._let_go = threading.Event()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Lets a call go on that stands still, as a process does that was stopped for a while."""
        self._woken.set()

    def let_go(self) -> None:
        self._let_go.set()

    async def call(self, operation: str, method: Any, *args: Any, **more: Any) -> Any:
        nth = self._count(operation)
        await self._pass(operation, BEFORE, nth)
        result = await method(*args, **more)
        await self._pass(operation, AFTER, nth)
        return result

    def call_in_thread(self, operation: str, method: Any, *args: Any, **more: Any) -> Any:
        nth = self._count(operation)
        self._pass_in_thread(operation, BEFORE, nth)
        result = method(*args, **more)
        self._pass_in_thread(operation, AFTER, nth)
        return result

    def _count(self, operation: str) -> int:
        self.calls[operation] += 1
        return self.calls[operation]

    async def _pass(self, *here: Any) -> None:
        if here == (self.operation, self.when, self.nth):
            self.reached.set()
            await self._woken.wait()

    def _pass_in_thread(self, *here: Any) -> None:
        if here == (self.operation, self.when, self.nth):
            self._loop.call_soon_threadsafe(self.reached.set)
            self._let_go.wait()
            raise RuntimeError("the worker is dead")

    def of(self, target: Any, prefix: str, *methods: str) -> Any:
        """Returns the target with points at these coroutine methods."""
        return _Watched(self, target, prefix, frozenset(methods))

    def of_pipeline(self, target: Any) -> Any:
        """Returns a pipeline with points at its calls, which are made in threads."""
        return _WatchedPipeline(self, target)


class _Watched:
    def __init__(self, point: CrashPoint, target: Any, prefix: str, methods: frozenset[str]) -> None:
        self._point, self._target, self._prefix, self._methods = point, target, prefix, methods

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        if name not in self._methods:
            return method

        async def call(*args: Any, **more: Any) -> Any:
            return await self._point.call(f"{self._prefix}.{name}", method, *args, **more)

        return call

    def list(self, *args: Any, **more: Any) -> AsyncIterator[Any]:
        found: AsyncIterator[Any] = self._target.list(*args, **more)
        return found


class _WatchedPipeline:
    def __init__(self, point: CrashPoint, target: Any) -> None:
        self._point, self._target = point, target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        if name not in ("step", "state", "restore"):
            return method
        return lambda *args, **more: self._point.call_in_thread(f"pipeline.{name}", method, *args, **more)

    def interrupt(self) -> None:
        self._point.let_go()
        self._target.interrupt()
