"""What the generated clients run over in the simulation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache
from typing import Any

from google.protobuf.message import Message
from shproto.addresses import AddressOrder
from shproto.errors import ShuttingDown, StreamHouseError, Unavailable

from tests.simulation.call import END, Call, NoAnswer
from tests.simulation.loop import PROCESS
from tests.simulation.network import Network


class SimConnection:
    """shproto.rpc.Connection, in the simulation. `timeout_ms` and the walk over the addresses are the same."""

    def __init__(
        self,
        network: Network,
        addresses: Sequence[str],
        *,
        timeout_ms: int = 10_000,
        interceptors: object = None,
        advertised: bool = False,
    ) -> None:
        assert interceptors is None, "telemetry is off"
        self._network = network
        self.addresses = tuple(addresses)
        self._timeout_ms = timeout_ms
        self._order = AddressOrder(len(self.addresses), random.randrange(len(self.addresses)))
        self._connected: set[str] = set()

    async def connect(self, timeout_ms: int) -> None:
        """Raises Unavailable. Who has been connected takes itself for connected until a call fails."""
        address = self.addresses[self._order.current]
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
        tried: list[int] = []
        while True:
            which = self._next(tried)
            try:
                response = await self._once(self.addresses[which], path, request, deadline_s)
            except (Unavailable, ShuttingDown):
                tried.append(which)
                self._order.failed(which, _now_ms())
                if len(tried) == len(self.addresses):
                    raise
            else:
                self._order.answered(which)
                return response

    def _next(self, tried: Sequence[int] = ()) -> int:
        return self._order.ordered(_now_ms(), without=tried)[0]

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
            raise Unavailable(f"{address}: DEADLINE_EXCEEDED", address=address) from None
        except StreamHouseError as error:
            outcome = f"{error.reason}: {error.message}"
            raise
        except NoAnswer as error:
            outcome = f"no answer: {error}"
            self._connected.discard(address)
            raise Unavailable(f"UNAVAILABLE: {error}", address=address) from error
        finally:
            if outcome in ("cancelled", "timeout"):
                call.abandon()
            self._network.log(source, f"-> {address} {method}: {outcome}")

    async def unary_stream(self, path: str, request: Message, response_type: type[Any]) -> AsyncIterator[Any]:
        tried: list[int] = []
        while True:
            which, begun = self._next(tried), False
            try:
                async for item in self._items(which, self._open(which, path, _copier(request))):
                    begun = True
                    yield item
                return
            except (Unavailable, ShuttingDown):
                tried.append(which)
                if begun or len(tried) == len(self.addresses):
                    raise

    async def stream_stream(
        self, path: str, requests: AsyncIterator[Message], response_type: type[Any]
    ) -> AsyncIterator[Any]:
        which = self._next()
        call = self._open(which, path, None)
        feeding = asyncio.create_task(call.feed(requests))
        try:
            async for item in self._items(which, call):
                yield item
        finally:
            feeding.cancel()
            (ended,) = await asyncio.gather(feeding, return_exceptions=True)
            if isinstance(ended, Exception):
                raise ended  # a defect of whoever makes the requests

    def _open(self, which: int, path: str, request: Callable[[], Message] | None) -> Call:
        address, method = self.addresses[which], _method(path)
        call = self._network.open_call(address, method, request)
        self._network.log(PROCESS.get().name, f"-> {address} {method}: begins")
        return call

    async def _items(self, which: int, call: Call) -> AsyncIterator[Any]:
        try:
            while (item := await call.next()) is not END:
                yield item
                if self._network.chance(self._network.rates.break_stream):
                    raise NoAnswer(f"{call.address}: the stream broke")
        except NoAnswer as error:
            self._connected.discard(call.address)
            self._order.failed(which, _now_ms())
            self._network.log(PROCESS.get().name, f"-> {call.address} {call.method}: {error}")
            raise Unavailable(f"UNAVAILABLE: {error}", address=call.address) from error
        except (Unavailable, ShuttingDown):
            self._order.failed(which, _now_ms())
            raise
        finally:
            call.abandon()

    async def close(self) -> None:
        """Nothing is held open."""


def _now_ms() -> float:
    return asyncio.get_running_loop().time() * 1000


@cache
def _method(path: str) -> str:
    name = path.rpartition("/")[2]
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")


def _copier(request: Message) -> Callable[[], Message]:
    """The server gets bytes of its own."""
    kind, data = type(request), request.SerializeToString()
    return lambda: kind.FromString(data)
