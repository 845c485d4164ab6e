"""Limits the bytes of unanswered requests per connection, so that no client can fill the queue of all.

Owns: the byte budgets of connections with requests. Does not own: the queue and its limit (writer.py).
Invariants: a request larger than the limit is in flight alone. Requests of a connection wait in the order in which they
arrived, so that a large request is not passed over for ever, and an answer wakes only the requests it makes room for.
Callers in this process are not limited.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from shruntime.byte_budget import ConnectionBudgets

from streamhouse_ingest.produce.refusals import overloaded

RETRY_MS = 20  # as for the queue: requests in flight are written within some milliseconds
IN_PROCESS = ""


class ConnectionByteLimit:
    """Byte limit per connection: unary calls beyond it are refused (`hold`), streams are read no further (`take`)."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._budgets = ConnectionBudgets(bytes_max)

    @contextmanager
    def hold(self, connection: str, size_bytes: int) -> Iterator[None]:
        """Counts a request until it is answered. Raises Overloaded if the connection has no room for it."""
        with self._budgets.budget(connection) as budget:
            lent_bytes = budget.try_take(size_bytes)
            if lent_bytes is None:
                raise overloaded("connection_bytes_in_flight_max", self._bytes_max, budget.lent_bytes, RETRY_MS)
            try:
                yield
            finally:
                budget.give_back(lent_bytes)

    async def take(self, connection: str, size_bytes: int) -> None:
        """Waits for room and takes it; the caller calls `give_back` once the request is answered."""
        if connection == IN_PROCESS:
            return
        budget = self._budgets.join(connection)
        try:
            await budget.take(size_bytes)
        # A cancelled wait must leave the connection, or its budget would be kept for ever.
        except BaseException:
            self._budgets.leave(connection)
            raise

    def give_back(self, connection: str, size_bytes: int) -> None:
        """Returns the room that `take` took for a request of `size_bytes`."""
        if connection != IN_PROCESS:
            self._budgets.leave(connection).give_back(min(size_bytes, self._bytes_max))
