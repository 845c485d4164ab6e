"""Calls between processes, as messages that take their time, get lost, or wait behind a partition.

`SimConnection` has the interface of shproto.rpc.Connection, so the generated clients run over it. A call's handler is a
task of the process that serves it: it ends with that process, and is cancelled when its caller is gone.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from shproto.errors import Internal, StreamHouseError, Unavailable
from shproto.v1 import types_pb2

from tests.simulation.loop import PROCESS, Process, SimFuture, SimLoop

KEEPALIVE_S = 3.0
"""After so long without an answer a connection is given up, on the scale of the simulation's other time-outs."""

WINDOW_ITEMS = 16
"""Messages of a stream that its reader has not taken: HTTP/2's flow control."""


class NoAnswer(Exception):
    """The transport failed; nobody knows what became of the call."""


@dataclass(slots=True)
class Rates:
    """Chances per message. slow_s: of how long a slow one takes at most."""

    lose_request: float = 0.0
    lose_reply: float = 0.0
    break_stream: float = 0.0
    slow: float = 0.0
    slow_s: float = 0.0


class Network:
    """Knows who listens where. Links are between names of processes, which are the hosts of their addresses."""

    def __init__(self, loop: SimLoop, rng: random.Random, log: Callable[[str, str], None]) -> None:
        self._loop = loop
        self._rng = rng
        self._log = log
        self._world = loop.world.context
        self._servers: dict[str, tuple[Process, Any]] = {}
        self._blocked: dict[tuple[str, str], int] = {}
        self._held: dict[tuple[str, str], list[Callable[[], None]]] = {}
        self._calls: dict[int, _Call] = {}
        self._number = 0
        self.rates = Rates()
        self.defects: list[str] = []

    # ---- who listens, which links are open

    def listen(self, address: str, process: Process, api: Any) -> None:
        self._servers[address] = (process, api)
        process.on_death.append(lambda: self._gone(process))

    def block(self, source: str, target: str) -> None:
        """Nothing gets from source to target any more."""
        self._number += 1
        self._blocked[source, target] = self._number
        self.later(KEEPALIVE_S, self._give_up, (source, target), self._number)

    def heal(self) -> None:
        self._blocked.clear()
        held, self._held = self._held, {}
        for messages in held.values():
            for message in messages:
                self.later(self.latency(), message)

    def unblock(self, source: str, target: str) -> None:
        self._blocked.pop((source, target), None)
        for message in self._held.pop((source, target), ()):
            self.later(self.latency(), message)

    def is_open(self, source: str, target: str) -> bool:
        return (source, target) not in self._blocked

    def _give_up(self, link: tuple[str, str], number: int) -> None:
        if self._blocked.get(link) == number:
            for call in list(self._calls.values()):
                if link in ((call.source.name, call.target_name), (call.target_name, call.source.name)):
                    call.cut("no keepalive")

    def paused(self, process: Process) -> None:
        """Its peers give their connections up if it stays so."""
        number = process.pauses

        def look() -> None:
            if process.paused and process.alive and process.pauses == number:
                for call in list(self._calls.values()):
                    if process.name in (call.target_name, call.source.name):
                        call.cut("no keepalive")

        self.later(KEEPALIVE_S, look)

    def _gone(self, process: Process) -> None:
        """Its connections are reset, as far as the news gets through."""
        for call in list(self._calls.values()):
            if call.target is process:
                self.send(process.name, call.source.name, call.server_died)
            elif call.source is process:
                self.send(process.name, call.target_name, call.client_died)

    # ---- messages

    def later(self, delay_s: float, function: Callable[..., None], *args: Any) -> None:
        self._loop.call_later(delay_s, function, *args, context=self._world)

    def latency(self) -> float:
        delay = self._rng.uniform(0.0001, 0.001)
        if self.rates.slow and self._rng.random() < self.rates.slow:
            delay += self._rng.uniform(0, self.rates.slow_s)
        return delay

    def send(self, source: str, target: str, arrive: Callable[[], None]) -> None:
        """`arrive` runs when the message is there, which may be never."""

        def at_the_wire() -> None:
            if self.is_open(source, target):
                arrive()
            else:
                self._held.setdefault((source, target), []).append(at_the_wire)

        self.later(self.latency(), at_the_wire)

    def log(self, source: str, text: str) -> None:
        self._log(source, text)

    def chance(self, rate: float) -> bool:
        return bool(rate) and self._rng.random() < rate

    def find(self, address: str) -> tuple[Process, Any] | None:
        found = self._servers.get(address)
        return found if found is not None and found[0].alive else None

    def open_call(self, address: str, method: str, request: Any) -> _Call:
        self._number += 1
        call = _Call(self, self._loop, self._number, PROCESS.get(), address, method, request)
        self._calls[call.number] = call
        call.start()
        return call

    def closed(self, number: int) -> None:
        self._calls.pop(number, None)

    async def connect(self, host: str, port: int) -> None:
        """Raises ConnectionRefusedError when the process is not there; waits for ever behind a partition."""
        source, address = PROCESS.get(), f"{host}:{port}"
        answer = self._loop.create_future()

        def arrive() -> None:
            found = self.find(address) is not None
            self.send(host, source.name, lambda: _resolve(answer, found))

        self.send(source.name, host, arrive)
        if not await answer:
            raise ConnectionRefusedError(f"nobody listens at {address}")


def _resolve(future: SimFuture, value: Any) -> None:
    if not future.done():
        future.set_result(value)


class _Call:
    """One call, unary or with a stream of answers. The client's half and the server's half share only messages."""

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
        self._ended: Any = None  # what ends the client's half: an exception, or _END

    # ---- the client's half

    def start(self) -> None:
        network = self._network
        if network.chance(network.rates.lose_request):
            network.later(network.latency() * 10, self.cut, "the request was lost")
            return
        network.send(self.source.name, self.target_name, self._arrive)

    async def next(self) -> Any:
        """The next answer, _END at the end. Raises StreamHouseError, NoAnswer."""
        while not self._items:
            if self._ended is _END:
                return _END
            if self._ended is not None:
                raise self._ended
            self._news = self._loop.create_future()
            await self._news
        self._unread -= 1
        if self._room is not None:
            _resolve(self._room, None)
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
            _resolve(self._news, None)

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
            self._post(lambda: self._end(_END))
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


_END = object()


class SimConnection:
    """shproto.rpc.Connection, in the simulation. `timeout_ms` and the walk over the addresses are the same."""

    def __init__(self, network: Network, addresses: Sequence[str], *, timeout_ms: int = 10_000) -> None:
        self._network = network
        self._addresses = tuple(addresses)
        self._timeout_ms = timeout_ms
        self._current = 0

    async def unary(self, path: str, request: Message, response_type: type[Any]) -> Any:
        wait_ms = getattr(request, "max_wait_ms", 0) or getattr(request, "timeout_ms", 0)
        deadline_s = (self._timeout_ms + wait_ms) / 1000
        for attempt in range(len(self._addresses)):
            address = self._addresses[self._current]
            try:
                return await self._once(address, path, request, deadline_s)
            except NoAnswer as error:
                self._current = (self._current + 1) % len(self._addresses)
                if attempt == len(self._addresses) - 1:
                    raise Unavailable(f"UNAVAILABLE: {error}") from error
        raise AssertionError("unreachable")

    async def _once(self, address: str, path: str, request: Message, deadline_s: float) -> Any:
        source, method = PROCESS.get().name, _method(path)
        call = self._network.open_call(address, method, _copier(request))
        outcome = "cancelled"
        try:
            async with asyncio.timeout(deadline_s):
                response = await call.next()
            outcome = "ok"
            return response
        except TimeoutError:
            outcome = "timeout"
            raise NoAnswer(f"{address}: DEADLINE_EXCEEDED") from None
        except StreamHouseError as error:
            outcome = f"{error.reason}: {error.message}"
            raise
        except NoAnswer as error:
            outcome = f"no answer: {error}"
            raise
        finally:
            if outcome in ("cancelled", "timeout"):
                call.abandon()
            self._network.log(source, f"-> {address} {method}: {outcome}")

    async def unary_stream(self, path: str, request: Message, response_type: type[Any]) -> AsyncIterator[Any]:
        async for item in self._stream(path, _copier(request)):
            yield item

    async def stream_stream(
        self, path: str, requests: AsyncIterator[Message], response_type: type[Any]
    ) -> AsyncIterator[Any]:
        async for item in self._stream(path, lambda: requests):
            yield item

    async def _stream(self, path: str, request: Callable[[], Any]) -> AsyncIterator[Any]:
        address, source, method = self._addresses[self._current], PROCESS.get().name, _method(path)
        call = self._network.open_call(address, method, request)
        self._network.log(source, f"-> {address} {method}: begins")
        try:
            while (item := await call.next()) is not _END:
                yield item
                if self._network.chance(self._network.rates.break_stream):
                    raise NoAnswer(f"{address}: the stream broke")
        except NoAnswer as error:
            self._current = (self._current + 1) % len(self._addresses)
            self._network.log(source, f"-> {address} {method}: {error}")
            raise Unavailable(f"UNAVAILABLE: {error}") from error
        finally:
            call.abandon()

    async def close(self) -> None:
        """Nothing is held open."""


def _method(path: str) -> str:
    name = path.rpartition("/")[2]
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")


def _copier(request: Message) -> Callable[[], Message]:
    """The server gets bytes of its own."""
    kind, data = type(request), request.SerializeToString()
    return lambda: kind.FromString(data)
