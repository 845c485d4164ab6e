"""A service's API as its callers reach it: the real one, and the faults of the way there.

A test that needs an odd answer sets one method of the peer, and calls the real one from it.

Owns: whether the service can be reached, what is held up on the way, and the record of calls. Does not own: the
service.
Invariants: a request reaches the service unchanged; an answer that is recorded is the service's own.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from shproto.errors import Unavailable

from tests.platform.by_method import ByMethod


class Held:
    """Unary calls of one method that wait until `release`. `requests`: those that came."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self._released = asyncio.Event()

    def release(self) -> None:
        self._released.set()

    async def wait(self, request: Any) -> None:
        self.requests.append(request)
        await self._released.wait()


class Peer:
    """`down`: calls are refused as Unavailable, with `name` in the message. `calls` counts those that reached the
    service, by method, `refused` the others; `requests` and `answers`: of all unary calls that were answered.
    `slow_ms`: how much later the answers of a unary method come, by method. A name that is no method of the
    service raises KeyError."""

    def __init__(self, api: Any, name: str) -> None:
        self.api = api
        self.name = name
        self.down = False
        self.slow_ms: ByMethod[int] = ByMethod(self._is_method, int)
        self.calls: ByMethod[int] = ByMethod(self._is_method, int)
        self.refused: ByMethod[int] = ByMethod(self._is_method, int)
        self.requests: ByMethod[list[Any]] = ByMethod(self._is_method, list)
        self.answers: ByMethod[list[Any]] = ByMethod(self._is_method, list)
        self._lost_answers: ByMethod[int] = ByMethod(self._is_method, int)
        self._repeated: ByMethod[int] = ByMethod(self._is_method, int)
        self._held_requests: ByMethod[Held] = ByMethod(self._is_method, Held)
        self._held_answers: ByMethod[Held] = ByMethod(self._is_method, Held)

    def _is_method(self, name: str) -> bool:
        return hasattr(self.api, name)

    def lose_answers(self, name: str, count: int = 1) -> None:
        """Loses the next answers of a unary method: the service has done what it was asked for, and the call fails as
        Unavailable."""
        self._lost_answers[name] = count

    def repeat(self, name: str, count: int = 1) -> None:
        """Lets the next calls of a unary method come twice, as a client repeats them at another address after the
        answer was lost: the caller gets the second answer."""
        self._repeated[name] = count

    def hold(self, name: str) -> Held:
        """Holds the requests of a unary method on their way to the service, from now on."""
        self._held_requests[name] = held = Held()
        return held

    def hold_answers(self, name: str) -> Held:
        """Holds the answers of a unary method: the service has done what it was asked for."""
        self._held_answers[name] = held = Held()
        return held

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self.api, name)
        return self._stream(name, method) if inspect.isasyncgenfunction(method) else self._unary(name, method)

    def _unary(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any) -> Any:
            self._must_be_up(name)
            if name in self._held_requests:
                await self._held_requests[name].wait(request)
            self.calls[name] += 1
            if self._repeated[name]:
                self._repeated[name] -= 1
                await method(request)
            answer = await method(request)
            self.requests[name].append(request)
            self.answers[name].append(answer)
            if self._lost_answers[name]:
                self._lost_answers[name] -= 1
                raise Unavailable(f"an answer of {self.name} was lost")
            if name in self._held_answers:
                await self._held_answers[name].wait(request)
            if name in self.slow_ms:
                await asyncio.sleep(self.slow_ms[name] / 1000)
            return answer

        return call

    def _stream(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        async def stream(request: Any) -> AsyncIterator[Any]:
            self._must_be_up(name)
            self.calls[name] += 1
            async with aclosing(method(request)) as items:
                async for item in items:
                    self._must_be_up(name)
                    yield item

        return stream

    def _must_be_up(self, name: str) -> None:
        if self.down:
            self.refused[name] += 1
            raise Unavailable(f"{self.name} is down")
