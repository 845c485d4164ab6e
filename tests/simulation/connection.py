"""What the generated clients run over in the simulation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache
from typing import Any

from google.protobuf.message import Message
from shproto.errors import StreamHouseError, Unavailable

from tests.simulation.call import END, NoAnswer
from tests.simulation.loop import PROCESS
from tests.simulation.network import Network


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
            while (item := await call.next()) is not END:
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


@cache
def _method(path: str) -> str:
    name = path.rpartition("/")[2]
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")


def _copier(request: Message) -> Callable[[], Message]:
    """The server gets bytes of its own."""
    kind, data = type(request), request.SerializeToString()
    return lambda: kind.FromString(data)
