"""Bytes of requests that are not answered yet, by connection: one client cannot fill the queue of all.

Owns: the bytes of each connection, and who waits for room in one. Callers in this process count for nothing.
Invariant: a connection exceeds its limit by one request at most, and only if nothing else of it is in flight.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from streamhouse_ingest.refusals import overloaded

RETRY_MS = 20  # as for the queue: what is in flight is written within some milliseconds
IN_PROCESS = ""


@dataclass(slots=True)
class _Held:
    size_bytes: int = 0
    requests: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class BytesInFlight:
    """Of unary calls beyond the limit the caller is told (`hold`), of streams no more is read (`take`)."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._of: dict[str, _Held] = {}

    @contextmanager
    def hold(self, connection: str, size_bytes: int) -> Iterator[None]:
        """Around one request until it is answered. Raises Overloaded."""
        held = self._of.get(connection)
        if connection != IN_PROCESS and held is not None and not self._fits(held, size_bytes):
            raise overloaded("connection_bytes_in_flight_max", self._bytes_max, held.size_bytes, RETRY_MS)
        self._add(connection, size_bytes)
        try:
            yield
        finally:
            self.give_back(connection, size_bytes)

    async def take(self, connection: str, size_bytes: int) -> None:
        """Waits for room; `give_back` follows once the request is answered."""
        while connection != IN_PROCESS and not self._fits(held := self._of.setdefault(connection, _Held()), size_bytes):
            room = asyncio.get_running_loop().create_future()
            held.waiting.append(room)
            try:
                await room
            finally:
                if room in held.waiting:
                    held.waiting.remove(room)
                if not held.requests and not held.waiting and self._of.get(connection) is held:
                    del self._of[connection]
        self._add(connection, size_bytes)

    def give_back(self, connection: str, size_bytes: int) -> None:
        held = self._of[connection]
        held.size_bytes -= size_bytes
        held.requests -= 1
        for room in held.waiting:  # each looks again: the next may need less than the first
            if not room.done():
                room.set_result(None)
        if not held.requests and not held.waiting:
            del self._of[connection]

    def _fits(self, held: _Held, size_bytes: int) -> bool:
        return not held.requests or held.size_bytes + size_bytes <= self._bytes_max

    def _add(self, connection: str, size_bytes: int) -> None:
        held = self._of.setdefault(connection, _Held())
        held.size_bytes += size_bytes
        held.requests += 1
