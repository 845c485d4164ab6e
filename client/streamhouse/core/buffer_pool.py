"""Buffer of a producer's records, counted in bytes; pure.

Owns: the bytes in use, and the order of the takers that wait. Does not own: the records, how a taker waits.
Invariants: takers get room in the order in which they came. At most `limit_bytes` are in use, except by a
single larger taker alone. Not a ByteBudget: the pool counts the full size of a larger taker, which its metric shows.
"""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class BufferPool(Generic[T]):
    """Room for `limit_bytes`. A taker larger than the limit is admitted alone, or it would wait for ever."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._waiting: deque[tuple[T, int]] = deque()

    def try_take(self, size_bytes: int) -> bool:
        """Takes room. Returns False, and takes nothing, if there is too little or others wait."""
        # Behind those that wait, also if this one would fit: small takers could keep a large one waiting for ever.
        if self._waiting or not self._fits(size_bytes):
            return False
        self.used_bytes += size_bytes
        return True

    def enqueue(self, waiter: T, size_bytes: int) -> None:
        """Puts a taker behind those that wait already."""
        self._waiting.append((waiter, size_bytes))

    def leave(self, waiter: T) -> bool:
        """Takes a taker out of the queue. Returns False if it was admitted before: its room is to be given back."""
        before = len(self._waiting)
        self._waiting = deque(item for item in self._waiting if item[0] is not waiter)
        return len(self._waiting) < before

    def admit(self) -> list[T]:
        """Takes room for the takers at the head of the queue that fit now. Returns them, for the caller to wake."""
        admitted = []
        while self._waiting and self._fits(self._waiting[0][1]):
            waiter, size_bytes = self._waiting.popleft()
            self.used_bytes += size_bytes
            admitted.append(waiter)
        return admitted

    def give_back(self, size_bytes: int) -> None:
        """Gives room back; `admit` follows."""
        self.used_bytes -= size_bytes
        assert self.used_bytes >= 0, "more given back than taken"

    def _fits(self, size_bytes: int) -> bool:
        return not self.used_bytes or self.used_bytes + size_bytes <= self.limit_bytes
