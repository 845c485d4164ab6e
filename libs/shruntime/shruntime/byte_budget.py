"""Bytes that many share: lent first come, first served.

Owns: how much is lent, and who waits. Does not own: what the bytes are for.
Invariants: at most `bytes_max` are lent. Nobody is lent bytes before those who wait: a large taker is not passed over
for small ones. A taker of more than there are waits for all of them, and is lent those.
"""

import asyncio
from collections import deque


class ByteBudget:
    """`take` or `try_take` what is needed, then `give` what was lent."""

    def __init__(self, bytes_max: int) -> None:
        self._free = bytes_max
        self._bytes_max = bytes_max
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def lent_bytes(self) -> int:
        """Bytes that are lent now."""
        return self._bytes_max - self._free

    def try_take(self, size_bytes: int) -> int | None:
        """Returns the bytes lent, at most the whole budget; None if that would be too much, or others wait."""
        size_bytes = min(size_bytes, self._bytes_max)
        if self._waiting or size_bytes > self._free:
            return None
        self._free -= size_bytes
        return size_bytes

    async def take(self, size_bytes: int) -> int:
        """Waits for its turn. Returns the bytes lent, at most the whole budget."""
        if (lent := self.try_take(size_bytes)) is not None:
            return lent
        size_bytes = min(size_bytes, self._bytes_max)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # Lent in the very moment of the cancellation; or first in line, and what is free is enough for the next.
            self.give(0 if turn.cancelled() else size_bytes)
            raise
        return size_bytes

    def give(self, size_bytes: int) -> None:
        """Takes bytes back, and lends them to those who wait."""
        self._free += size_bytes
        while self._waiting:
            wanted, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
            elif wanted <= self._free:
                self._waiting.popleft()
                self._free -= wanted
                turn.set_result(None)
            else:
                return
