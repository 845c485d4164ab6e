"""A byte budget with a queue: who came first gets room first."""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class BufferPool(Generic[T]):
    """`limit_bytes` in all. One taker larger than the limit is let in alone, or it would wait for ever."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._waiting: deque[tuple[T, int]] = deque()

    def try_take(self, size_bytes: int) -> bool:
        """Takes room if there is some and nobody waits for it."""
        if self._waiting or not self._fits(size_bytes):
            return False
        self.used_bytes += size_bytes
        return True

    def enqueue(self, waiter: T, size_bytes: int) -> None:
        self._waiting.append((waiter, size_bytes))

    def leave(self, waiter: T) -> bool:
        """`waiter` no longer waits; False if it had been let in already."""
        before = len(self._waiting)
        self._waiting = deque(item for item in self._waiting if item[0] is not waiter)
        return len(self._waiting) < before

    def admit(self) -> list[T]:
        """Takes room for those at the head of the queue that fit now; they are to be told."""
        admitted = []
        while self._waiting and self._fits(self._waiting[0][1]):
            waiter, size_bytes = self._waiting.popleft()
            self.used_bytes += size_bytes
            admitted.append(waiter)
        return admitted

    def give_back(self, size_bytes: int) -> None:
        self.used_bytes -= size_bytes
        assert self.used_bytes >= 0, "more given back than taken"

    def _fits(self, size_bytes: int) -> bool:
        return not self.used_bytes or self.used_bytes + size_bytes <= self.limit_bytes
