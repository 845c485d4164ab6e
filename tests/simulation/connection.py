"""What the generated clients run over in the simulation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache
from typing import Any

from google.protobuf.message import Message
from shproto.errors import StreamHouseError, Unavailable

from tests.simulation.call import END, Call, NoAnswer
from tests.simulation.loop import PROCESS
from tests.simulation.network import Network


class SimConnection:
    """shproto.rpc.Connection, in the simulation. `timeout_ms` and the walk over the addresses are the same."""

    def __init__(
        self, network: Network, addresses: Sequence[str], *, timeout_ms: int = 10_000, interceptors: object = None
    ) -> None:
        assert interceptors is None, "telemetry is off"
        self._network = network
        self.addresses = tuple(addresses)
        self._timeout_ms = timeout_ms
        self._current = 0
        self._connected: set[str] = set()

    async def connect(self, timeout_ms: int) -> None:
        """Raises Unavailable. Who has been connected takes itself for connected until a call fails."""
        address = self.addresses[self._current]
        if address in self._connected:
            return
        host, _, port = address.partition(":")
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await self._network.connect(host, int(port))
        except (TimeoutError, ConnectionRefusedError) as error:
            raise Unavailable(f"cannot connect to {address}", address=address) from error
        self._connected.add(address)

    async def unary(self, path: str, request: Message, response_type: type[Any]) -> Any:
        wait_ms = getattr(request, "max_wait_ms", 0) or getattr(request, "timeout_ms", 0)
        deadline_s = (self._timeout_ms + wait_ms) / 1000
        for attempt in range(len(self.addresses)):
            try:
                return await self._once(self.addresses[self._current], path, request, deadline_s)
            except Unavailable:
                self._move_on()
                if attempt == len(self.addresses) - 1:
                    raise
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
            raise Unavailable(f"{address}: DEADLINE_EXCEEDED") from None
        except StreamHouseError as error:
            outcome = f"{error.reason}: {error.message}"
            raise
        except NoAnswer as error:
            outcome = f"no answer: {error}"
            self._connected.discard(address)
            raise Unavailable(f"UNAVAILABLE: {error}") from error
        finally:
            if outcome in ("cancelled", "timeout"):
                call.abandon()
            self._network.log(source, f"-> {address} {method}: {outcome}")

    def _move_on(self) -> None:
        self._current = (self._current + 1) % len(self.addresses)

    async def unary_stream(self, path: str, request: Message, response_type: type[Any]) -> AsyncIterator[Any]:
        call = self._open(path, _copier(request))
        async for item in self._items(call):
            yield item

    async def stream_stream(
        self, path: str, requests: AsyncIterator[Message], response_type: type[Any]
    ) -> AsyncIterator[Any]:
        call = self._open(path, None)
        feeding = asyncio.create_task(call.feed(requests))
        try:
            async for item in self._items(call):
                yield item
        finally:
            feeding.cancel()
            (ended,) = await asyncio.gather(feeding, return_exceptions=True)
            if isinstance(ended, Exception):
                raise ended  # a defect of whoever makes the requests

    def _open(self, path: str, request: Callable[[], Message] | None) -> Call:
        address, method = self.addresses[self._current], _method(path)
        call = self._network.open_call(address, method, request)
        self._network.log(PROCESS.get().name, f"-> {address} {method}: begins")
        return call

    async def _items(self, call: Call) -> AsyncIterator[Any]:
        try:
            while (item := await call.next()) is not END:
                yield item
                if self._network.chance(self._network.rates.break_stream):
                    raise NoAnswer(f"{call.address}: the stream broke")
        except NoAnswer as error:
            self._connected.discard(call.address)
            self._move_on()
            self._network.log(PROCESS.get().name, f"-> {call.address} {call.method}: {error}")
            raise Unavailable(f"UNAVAILABLE: {error}") from error
        except Unavailable:
            self._move_on()
            raise
        finally:
            call.abandon()

    async def close(self) -> None:
        """Nothing is held open."""


@cache
def _method(path: str) -> str:
    name = path.rpartition("/")[2]
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")


def _copier(request: Message) -> Callable[[], Message]:
    """The server gets bytes of its own."""
    kind, data = type(request), request.SerializeToString()
    return lambda: kind.FromString(data)
