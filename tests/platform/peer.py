"""A service's API as its callers reach it: the real one, and the faults of the way there.

A test that needs an odd answer sets one method of the peer, and calls the real one from it.

Owns: whether the service can be reached, and the record of calls that it answered. Does not own: the service.
Invariants: a request reaches the service unchanged; an answer that is recorded is the service's own.
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from shproto.errors import Unavailable


class Peer:
    """`down`: calls are refused as Unavailable, with `name` in the message. `calls` counts those that
    reached the service, by method; `requests` and `answers`: of all unary calls that were answered."""

    def __init__(self, api: Any, name: str) -> None:
        self.api = api
        self.name = name
        self.down = False
        self.calls: Counter[str] = Counter()
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.answers: dict[str, list[Any]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self.api, name)
        return self._stream(name, method) if inspect.isasyncgenfunction(method) else self._unary(name, method)

    def _unary(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any) -> Any:
            self._must_be_up()
            self.calls[name] += 1
            answer = await method(request)
            self.requests[name].append(request)
            self.answers[name].append(answer)
            return answer

        return call

    def _stream(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        async def stream(request: Any) -> AsyncIterator[Any]:
            self._must_be_up()
            self.calls[name] += 1
            async with aclosing(method(request)) as items:
                async for item in items:
                    self._must_be_up()
                    yield item

        return stream

    def _must_be_up(self) -> None:
        if self.down:
            raise Unavailable(f"{self.name} is down")
