"""One call over the simulated network, unary or with a stream of answers.

A call's handler is a task of the process that serves it: it ends with that process, and is cancelled when its caller is
gone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import aclosing
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


class Call:
    """The client's half and the server's half share only messages."""

    def __init__(
        self, network: Network, loop: SimLoop, number: int, source: Process, address: str, method: str, request: Any
    ) -> None:
        self._network = network
        self._loop = loop
        self.number = number
        self.source = source
        self.target_name = address.partition(":")[0]
        self.target: Process | None = None
        self._address = address
        self.method = method
        self._request = request
        self._task: asyncio.Task[Any] | None = None
        self._items: deque[Any] = deque()
        self._news: SimFuture | None = None
        self._room: SimFuture | None = None
        self._unread = 0
        self._sent = 0
        self._received = 0
        self._early: dict[int, Callable[[], None]] = {}
        self._abandoned = False
        self._client_gone = False
        self._ended: Any = None  # what ends the client's half: an exception, or END

    # ---- the client's half

    def start(self) -> None:
        network = self._network
        if network.chance(network.rates.lose_request):
            network.later(network.latency() * 10, self.cut, "the request was lost")
            return
        network.send(self.source.name, self.target_name, self._arrive)

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
        self._end(NoAnswer(f"{self._address}: {why}"))
        self.client_died()

    # ---- the server's half

    def _arrive(self) -> None:
        if self._client_gone:
            return
        found = self._network.find(self._address)
        if found is None:
            self._network.send(self.target_name, self.source.name, self._refused)
            self._close()
            return
        self.target, api = found
        self._task = self.target.spawn(self._serve(api), name=f"{self.method} for {self.source.name}")

    def _refused(self) -> None:
        self._end(NoAnswer(f"nobody listens at {self._address}"))

    async def _serve(self, api: Any) -> None:
        try:
            answer = getattr(api, self.method)(self._request())
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
        """To the client, where `arrive` runs in the order of the posts, as over TCP."""
        network, number = self._network, self._sent
        self._sent += 1
        if network.chance(network.rates.lose_reply):
            network.later(network.latency(), self.cut, "the connection broke")
            return

        def there() -> None:
            self._early[number] = arrive
            while (due := self._early.pop(self._received, None)) is not None:
                self._received += 1
                due()

        network.send(self.target_name, self.source.name, there)

    def client_died(self) -> None:
        self._client_gone = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
        self._close()

    def _close(self) -> None:
        self._network.closed(self.number)
