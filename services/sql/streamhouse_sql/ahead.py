"""Steps of a generator, made ahead of their reader by a task of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

from shruntime.tasks import cancel_and_wait

T = TypeVar("T")


class Ahead(Generic[T]):
    """Runs a generator ahead of `next`: at most `steps_max` of its steps wait, and one that is made. `task` ends with
    the generator, which a cancellation of the task ends."""

    def __init__(self, steps: AsyncGenerator[T], steps_max: int, name: str) -> None:
        self._made: asyncio.Queue[T] = asyncio.Queue(steps_max)
        self.task = asyncio.create_task(self._make(steps), name=name)

    async def _make(self, steps: AsyncGenerator[T]) -> None:
        try:
            async for step in steps:
                await self._made.put(step)
        finally:
            await steps.aclose()

    async def next(self) -> T | None:
        """Returns the next step, None at the end. Raises the error that ended the generator, or CancelledError once the
        task is cancelled."""
        if self._made.empty() and not self.task.done():
            taken = asyncio.ensure_future(self._made.get())
            try:
                await asyncio.wait((taken, self.task), return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not taken.done():
                    await cancel_and_wait(taken)
            if not taken.cancelled():  # both may have come at once
                return taken.result()
        if not self._made.empty():
            return self._made.get_nowait()
        self.task.result()
        return None
