"""One call over the simulated network: one message each way, or a stream of them.

A call's handler is a task of the process that serves it: it ends with that process, and is cancelled when its caller is
gone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message
from shproto.errors import Internal, StreamHouseError
from shproto.v1 import types_pb2

from tests.simulation.loop import Process, SimFuture, SimLoop

if TYPE_CHECKING:
    from tests.simulation.network import Network

WINDOW_ITEMS = 16
"""Messages of a stream that its reader has not taken: HTTP/2's flow control."""

END = object()
"""What `Call.next` answers after the last message."""


class NoAnswer(Exception):
    """The transport failed; nobody knows what became of the call."""


def resolve(future: SimFuture, value: Any) -> None:
    if not future.done():
        future.set_result(value)


class _Way:
    """One direction of a connection: what is posted runs on the other side in the order of the posts, as over TCP.
    `broke(why)`: it ends here, nothing that is posted later arrives."""

    __slots__ = ("_broke", "_early", "_network", "_received", "_sent", "_source", "_target")

    def __init__(self, network: Network, source: str, target: str, broke: Callable[[str], None]) -> None:
        self._network = network
        self._source = source
        self._target = target
        self._broke = broke
        self._sent = 0
        self._received = 0
        self._early: dict[int, Callable[[], None]] = {}

    def post(self, arrive: Callable[[], None], lost: float = 0.0) -> None:
        """`lost`: the chance that the connection breaks instead."""
        number = self._sent
        self._sent += 1
        if self._network.chance(lost):
            self._network.later(self._network.latency(), self._broke, "the connection broke")
            return
        self._network.send(self._source, self._target, partial(self._arrived, number, arrive))

    def _arrived(self, number: int, arrive: Callable[[], None]) -> None:
        self._early[number] = arrive
        while (due := self._early.pop(self._received, None)) is not None:
            self._received += 1
            due()


class Call:
    """The client's half and the server's half share only messages. `request`: makes the server's copy of it; None: the
    client sends a stream of them, see `feed`."""

    def __init__(
        self,
        network: Network,
        loop: SimLoop,
        number: int,
        source: Process,
        address: str,
        method: str,
        request: Callable[[], Message] | None,
    ) -> None:
        self._network = network
        self._loop = loop
        self.number = number
        self.source = source
        self.target_name = address.partition(":")[0]
        self.target: Process | None = None
        self.address = address
        self.method = method
        self._request = request
        self._task: asyncio.Task[Any] | None = None
        self._items: deque[Any] = deque()
        self._news: SimFuture | None = None
        self._room: SimFuture | None = None
        self._unread = 0
        self._there = _Way(network, source.name, self.target_name, self.cut)
        self._back = _Way(network, self.target_name, source.name, self.cut)
        self._requests: deque[Any] = deque()
        self._more: SimFuture | None = None
        self._abandoned = False
        self._client_gone = False
        self._ended: Any = None  # what ends the client's half: an exception, or END

    # ---- the client's half

    def start(self) -> None:
        network = self._network
        if network.chance(network.rates.lose_request):
            network.later(network.latency() * 10, self.cut, "the request was lost")
            return
        self._there.post(self._arrive)

    async def feed(self, requests: AsyncIterator[Message]) -> None:
        """Sends a stream of requests. There is no window: who calls limits what has no answer yet."""
        async for request in requests:
            copy = type(request).FromString(request.SerializeToString())
            self._there.post(partial(self._take, copy), self._network.rates.lose_request)
        self._there.post(partial(self._take, END))

    async def next(self) -> Any:
        """The next answer, END at the end. Raises StreamHouseError, NoAnswer."""
        while not self._items:
            if self._ended is END:
                return END
            if self._ended is not None:
                raise self._ended
            self._news = self._loop.create_future()
            await self._news
        self._unread -= 1
        if self._room is not None:
            resolve(self._room, None)
        return self._items.popleft()

    def abandon(self) -> None:
        """The caller does not wait any more; the handler hears of it later, if at all."""
        if not self._abandoned:
            self._abandoned = True
            self._network.send(self.source.name, self.target_name, self.client_died)

    def _end(self, how: Any) -> None:
        if self._ended is None:
            self._ended = how
            self._wake()

    def _wake(self) -> None:
        if self._news is not None:
            resolve(self._news, None)

    def server_died(self) -> None:
        self._end(NoAnswer(f"{self.target_name} reset the connection"))
        self._close()

    def cut(self, why: str) -> None:
        """The connection is given up on both sides."""
        self._end(NoAnswer(f"{self.address}: {why}"))
        self.client_died()

    # ---- the server's half

    def _arrive(self) -> None:
        if self._client_gone:
            return
        found = self._network.find(self.address)
        if found is None:
            self._network.send(self.target_name, self.source.name, self._refused)
            self._close()
            return
        self.target, api = found
        self._task = self.target.spawn(self._serve(api), name=f"{self.method} for {self.source.name}")

    def _refused(self) -> None:
        self._end(NoAnswer(f"nobody listens at {self.address}"))

    def _take(self, request: Any) -> None:
        self._requests.append(request)
        if self._more is not None:
            resolve(self._more, None)

    async def _stream_of_requests(self) -> AsyncIterator[Message]:
        while True:
            while not self._requests:
                self._more = self._loop.create_future()
                await self._more
            request = self._requests.popleft()
            if request is END:
                return
            yield request

    async def _serve(self, api: Any) -> None:
        request = self._request() if self._request is not None else self._stream_of_requests()
        try:
            answer = getattr(api, self.method)(request)
            if hasattr(answer, "__anext__"):
                async with aclosing(answer) as items:
                    async for item in items:
                        await self._push(item)
            else:
                await self._push(await answer)
            self._post(lambda: self._end(END))
        except StreamHouseError as error:
            self._post_error(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary, as in shproto.rpc; here it is a finding
            self._network.defects.append(f"{self.target_name}: {self.method}: {type(error).__name__}: {error}")
            self._post_error(Internal(f"internal error: {type(error).__name__}: {error}"))
        finally:
            self._close()

    async def _push(self, item: Message) -> None:
        while self._unread >= WINDOW_ITEMS:
            self._room = self._loop.create_future()
            await self._room
        self._unread += 1
        copy = type(item).FromString(item.SerializeToString())
        self._post(lambda: self._got(copy))

    def _got(self, item: Message) -> None:
        if self._ended is None:
            self._items.append(item)
            self._wake()

    def _post_error(self, error: StreamHouseError) -> None:
        detail = types_pb2.ErrorDetail.FromString(error.to_detail().SerializeToString())
        self._post(lambda: self._end(StreamHouseError.from_detail(detail)))

    def _post(self, arrive: Callable[[], None]) -> None:
        self._back.post(arrive, self._network.rates.lose_reply)

    def client_died(self) -> None:
        self._client_gone = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
        self._close()

    def _close(self) -> None:
        self._network.closed(self.number)
