"""One ProduceStream to one leader: requests go out as they come, answers come back in their order.

Owns: which requests are on the wire. Does not own: what is sent next, retries.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Generic, TypeVar, cast

from shproto.errors import StreamHouseError, Unavailable
from shproto.services import IngestApi
from shproto.v1 import ingest_pb2

T = TypeVar("T")


class LeaderStream(Generic[T]):
    """`answered(stream, token, response)` for every answer; when the stream ends, once `broken(stream, sent, unsent,
    error)` with the tokens that have no answer: whether those sent were written is unknown."""

    def __init__(
        self,
        address: str,
        api: IngestApi,
        connect: Callable[[str], Awaitable[None]],
        max_in_flight: int,
        answer_timeout_ms: int,
        answered: Callable[["LeaderStream[T]", T, ingest_pb2.ProduceResponse], None],
        broken: Callable[["LeaderStream[T]", list[T], list[T], StreamHouseError], None],
    ) -> None:
        self.address = address
        self._api = api
        self._connect = connect
        self._max_in_flight = max_in_flight
        self._answer_timeout_s = answer_timeout_ms / 1000
        self._answered = answered
        self._broken = broken
        self._outgoing: deque[tuple[T, ingest_pb2.ProduceRequest]] = deque()
        self._in_flight: deque[tuple[T, float]] = deque()
        self._wake = asyncio.Event()
        self._ended = False
        self._stalled = False
        self._watch: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def has_room(self) -> bool:
        return len(self._in_flight) + len(self._outgoing) < self._max_in_flight

    def submit(self, token: T, request: ingest_pb2.ProduceRequest) -> None:
        """Sends `request` after those submitted before."""
        self._outgoing.append((token, request))
        self._wake.set()

    async def run(self) -> None:
        """Opens the stream and reads its answers until it ends."""
        self._task = asyncio.current_task()
        error: StreamHouseError = Unavailable(f"the leader at {self.address} ended the stream")
        try:
            await self._connect(self.address)  # until then nothing can have been written
            async with aclosing(self._open()) as responses:
                async for response in responses:
                    if not self._in_flight:
                        error = Unavailable(f"the leader at {self.address} answered what was not asked")
                        break
                    token, _ = self._in_flight.popleft()
                    self._answered(self, token, response)
        except StreamHouseError as raised:
            error = raised
        except asyncio.CancelledError:
            if not self._stalled or self._task is None or self._task.uncancel():
                raise
            error = Unavailable(f"the leader at {self.address} did not answer within {self._answer_timeout_s} s")
        finally:
            self._ended = True
            self._wake.set()  # gRPC waits for more requests even after the call has failed
            if self._watch is not None:
                self._watch.cancel()
        sent, unsent = [token for token, _ in self._in_flight], [token for token, _ in self._outgoing]
        self._broken(self, sent, unsent, error)

    def _open(self) -> AsyncGenerator[ingest_pb2.ProduceResponse, None]:
        """The generated clients' streams are generators; closing them cancels the call."""
        return cast("AsyncGenerator[ingest_pb2.ProduceResponse, None]", self._api.produce_stream(self._requests()))

    async def _requests(self) -> AsyncIterator[ingest_pb2.ProduceRequest]:
        while not self._ended:
            while self._outgoing and not self._ended:
                token, request = self._outgoing.popleft()
                self._in_flight.append((token, asyncio.get_running_loop().time()))
                self._start_watch()
                yield request
            if not self._ended:
                self._wake.clear()
                await self._wake.wait()

    def _start_watch(self) -> None:
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(self._answer_timeout_s, self._check_answers)

    def _check_answers(self) -> None:
        """Cuts a stream whose oldest request has waited too long; a leader may hang without closing anything."""
        self._watch = None
        if not self._in_flight:
            return
        loop = asyncio.get_running_loop()
        due = self._in_flight[0][1] + self._answer_timeout_s
        if loop.time() < due:
            self._watch = loop.call_at(due, self._check_answers)
        elif self._task is not None:
            self._stalled = True
            self._task.cancel()
