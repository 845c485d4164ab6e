"""Bytes shared by many takers: lent first come, first served.

Owns: the lent bytes, the waiting takers, the connections with a budget. Does not own: the use of the bytes. Invariants:
at most `bytes_max` are lent. No taker is lent bytes before those who wait: a large taker is not passed over for small
ones. A taker of more than the budget waits for all of it, and is lent all of it. The users of a connection share a
budget, which is forgotten with the last of them.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class ByteBudget:
    """`take` or `try_take` the bytes needed, then `give_back` the bytes lent."""

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
        # Small takers that passed earlier takers would starve a large one.
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
            # Lent in the very moment of the cancellation; or first in line, and the free bytes are enough for the next.
            self.give_back(0 if turn.cancelled() else size_bytes)
            raise
        return size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Takes bytes back, and lends them to waiting takers."""
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


class ConnectionBudgets:
    """A budget for each connection that has users, so that a single client cannot take everything."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._budgets: dict[str, tuple[ByteBudget, int]] = {}

    @contextmanager
    def budget(self, connection: str) -> Iterator[ByteBudget]:
        """Lends the connection's budget to a user. Callers in this process, without a connection, have a budget
        each."""
        if not connection:
            yield ByteBudget(self._bytes_max)
            return
        budget = self.join(connection)
        try:
            yield budget
        finally:
            self.leave(connection)

    def join(self, connection: str) -> ByteBudget:
        """Returns the connection's budget, for another user; `leave` follows."""
        budget, users = self._budgets.get(connection) or (ByteBudget(self._bytes_max), 0)
        self._budgets[connection] = (budget, users + 1)
        return budget

    def leave(self, connection: str) -> ByteBudget:
        """Removes a user of the connection; returns the budget, for bytes that the user has still to give back."""
        budget, users = self._budgets.pop(connection)
        if users > 1:
            self._budgets[connection] = (budget, users - 1)
        return budget
