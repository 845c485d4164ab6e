"""Bytes of requests that are not answered yet, by connection: one client cannot fill the queue of all.

Owns: the byte budget of each connection that has requests. Callers in this process count for nothing.
Invariants: a request that is larger than the limit is in flight alone. Requests of a connection wait in the order in
which they came, so that a large one is not passed over for ever, and an answer wakes only those that it makes room for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shruntime.byte_budget import ByteBudget

from streamhouse_ingest.refusals import overloaded

RETRY_MS = 20  # as for the queue: what is in flight is written within some milliseconds
IN_PROCESS = ""


@dataclass(slots=True)
class _Connection:
    """`requests`: those in flight, and those that wait."""

    budget: ByteBudget
    requests: int = 0


class ConnectionByteLimit:
    """Byte limit per connection: unary calls beyond it are refused (`hold`), streams are read no further (`take`)."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._of: dict[str, _Connection] = {}

    @contextmanager
    def hold(self, connection: str, size_bytes: int) -> Iterator[None]:
        """Counts one request until it is answered. Raises Overloaded."""
        if connection == IN_PROCESS:
            yield
            return
        budget = self._begin(connection)
        try:
            lent_bytes = budget.try_take(size_bytes)
            if lent_bytes is None:
                raise overloaded("connection_bytes_in_flight_max", self._bytes_max, budget.lent_bytes, RETRY_MS)
            try:
                yield
            finally:
                budget.give(lent_bytes)
        finally:
            self._end(connection)

    async def take(self, connection: str, size_bytes: int) -> None:
        """Waits for room; `give_back` follows once the request is answered."""
        if connection == IN_PROCESS:
            return
        budget = self._begin(connection)
        try:
            await budget.take(size_bytes)
        except BaseException:
            self._end(connection)
            raise

    def give_back(self, connection: str, size_bytes: int) -> None:
        """Gives back what `take` took for a request of this size."""
        if connection != IN_PROCESS:
            self._of[connection].budget.give(min(size_bytes, self._bytes_max))
            self._end(connection)

    def _begin(self, connection: str) -> ByteBudget:
        held = self._of.setdefault(connection, _Connection(ByteBudget(self._bytes_max)))
        held.requests += 1
        return held.budget

    def _end(self, connection: str) -> None:
        held = self._of[connection]
        held.requests -= 1
        if not held.requests:
            del self._of[connection]
