"""Faults of the way between clients and services that share a server: calls that fail, hang, wait or are cut, answers
that are lost or changed. The services behind are the real ones.

A unary call and a stream have one name, their method's. The requests of a produce stream have a name of their own,
`produce`: they fail one by one, in their answers.

Owns: which faults are switched on, the counts of calls and requests. Does not own: the services.
Invariants: a request that no fault concerns reaches the service unchanged, and its answer the client. The answers of a
produce stream are in the order of its requests, also where some come from a fault.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from shproto.errors import StreamHouseError, Unavailable
from shproto.v1 import ingest_pb2, query_pb2
from shruntime.tasks import cancel_and_wait

from tests.platform.by_method import ByMethod

PRODUCE = "produce"


@dataclass(kw_only=True)
class _Fault:
    """`errors`: of the next calls. `error`: of all calls behind them. `after`: calls or responses until a cut."""

    errors: list[StreamHouseError] = field(default_factory=list)
    error: StreamHouseError | None = None
    hangs: bool = False
    held: asyncio.Event | None = None
    delay_ms: float = 0
    after: float = math.inf
    request_arrives: bool = True
    change: Callable[[Any, Any], Any] | None = None
    handler: Callable[[Any, Callable[[Any], Any]], Any] | None = None

    async def wait(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.held is not None:
            await self.held.wait()
        if self.delay_ms:
            await asyncio.sleep(self.delay_ms / 1000)

    def next_error(self) -> StreamHouseError | None:
        return self.errors.pop(0) if self.errors else self.error

    def is_cut(self) -> bool:
        """Counts a call or response; returns True if it is the one to be cut."""
        self.after -= 1
        if self.after >= 0:
            return False
        self.after = math.inf
        return True


class Faults:
    """`calls`: calls that have come, by method. `requests`: those of unary methods and of `produce` that have come;
    `answered`: those of unary methods that the service has answered. `duplicates`: batches of produce streams that the
    service knew. A name of no method that is served raises KeyError."""

    def __init__(self) -> None:
        self._methods = {PRODUCE}
        self.duplicates = 0
        self.calls: ByMethod[int] = ByMethod(self._is_method, int)
        self.requests: ByMethod[list[Any]] = ByMethod(self._is_method, list)
        self.answered: ByMethod[list[Any]] = ByMethod(self._is_method, list)
        self._of: ByMethod[_Fault] = ByMethod(self._is_method, _Fault)

    def _is_method(self, name: str) -> bool:
        return name in self._methods

    # ---- switches, by method

    def fail(self, method: str, error: StreamHouseError, times: int | None = None) -> None:
        """Refuses the next calls with the error; None: all, until `mend`."""
        if times is None:
            self._of[method].error = error
        else:
            self._of[method].errors += [error] * times

    def failing(self, method: str) -> int:
        """Returns how many calls are still to fail, of those for which a number was given."""
        return len(self._of[method].errors)

    def hang(self, method: str) -> None:
        """Answers no call that comes from now on."""
        self._of[method].hangs = True

    def hold(self, method: str) -> asyncio.Event:
        """Keeps calls that come from their service until the event is set, which is returned."""
        self._of[method].held = held = asyncio.Event()
        return held

    def delay(self, method: str, delay_ms: float) -> None:
        """Keeps each call from its service for this long."""
        self._of[method].delay_ms = delay_ms

    def cut(self, method: str, after: int = 0, *, request_arrives: bool = True) -> None:
        """Breaks the connection under one call: of a unary method and of `produce` after so many calls that are
        answered, instead of the next answer, whose request reaches the service or not; of a stream after so many
        responses."""
        fault = self._of[method]
        fault.after, fault.request_arrives = after, request_arrives

    def change(self, method: str, change: Callable[[Any, Any], Any]) -> None:
        """Calls `change` with each request and each of its answers, which may be changed in place."""
        self._of[method].change = change

    def wrap(self, method: str, handler: Callable[[Any, Callable[[Any], Any]], Any]) -> None:
        """Has `handler` answer, which gets the request, or iterator of requests, and the service's method."""
        self._of[method].handler = handler

    def fail_partition(self, error: StreamHouseError) -> None:
        """Answers the next subscription, to one partition, with the failure of the partition."""

        async def fail(requests: Any, call: Callable[[Any], Any]) -> AsyncIterator[query_pb2.FetchResponse]:
            self.mend("subscribe")
            (position,) = (await anext(requests)).positions
            response = query_pb2.FetchResponse(topic=position.topic, partition=position.partition)
            response.error.CopyFrom(error.to_detail())
            yield response

        self.wrap("subscribe", fail)

    def mend(self, method: str) -> None:
        """Ends all faults of the method."""
        if method in self._of:
            del self._of[method]

    # ---- calls

    def served(self, descriptor: ServiceDescriptor, api: Any) -> Any:
        """Returns the API with the faults in front."""
        self._methods |= {_snake_case(method.name) for method in descriptor.methods}
        return _Served(self, descriptor, api)

    async def unary(self, method: str, call: Callable[[Any], Awaitable[Any]], request: Any) -> Any:
        self.calls[method] += 1
        self.requests[method].append(request)
        fault = self._of[method]
        await fault.wait()
        if error := fault.next_error():
            raise error
        cut = fault.is_cut()
        if cut and not fault.request_arrives:
            raise Unavailable("cut")
        answer = await (call(request) if fault.handler is None else fault.handler(request, call))
        if cut:
            raise Unavailable("cut")
        if self._of[method].change is not None:
            self._of[method].change(request, answer)  # type: ignore[misc]
        self.answered[method].append(request)
        return answer

    async def stream(self, method: str, call: Callable[[Any], AsyncIterator[Any]], request: Any) -> AsyncIterator[Any]:
        self.calls[method] += 1
        fault = self._of[method]
        await fault.wait()
        if error := fault.next_error():
            raise error
        responses: Any = call(request) if fault.handler is None else fault.handler(request, call)
        async with aclosing(responses):
            async for response in responses:
                fault = self._of[method]
                if fault.is_cut():
                    raise Unavailable("cut")
                if fault.change is not None:
                    fault.change(request, response)
                yield response

    async def produce_stream(
        self, call: Callable[[Any], AsyncIterator[Any]], requests: AsyncIterator[ingest_pb2.ProduceRequest]
    ) -> AsyncIterator[ingest_pb2.ProduceResponse]:
        """Yields the service's answers, and in their turn those of requests that a fault refuses."""
        self.calls["produce_stream"] += 1
        # A turn of each request: its refusal, the error that cuts the stream before or after its answer, or None for
        # an answer of the service.
        turns: asyncio.Queue[Any] = asyncio.Queue()
        answers: asyncio.Queue[Any] = asyncio.Queue()

        async def forwarded() -> AsyncIterator[ingest_pb2.ProduceRequest]:
            async for request in requests:
                self.calls[PRODUCE] += 1
                self.requests[PRODUCE].append(request)
                fault = self._of[PRODUCE]
                if fault.hangs:
                    continue
                await fault.wait()
                if fault.is_cut():
                    turns.put_nowait(_Cut(answered=fault.request_arrives))
                    if not fault.request_arrives:
                        return
                elif error := fault.next_error():
                    response = ingest_pb2.ProduceResponse(topic=request.topic, partition=request.partition)
                    response.error.CopyFrom(error.to_detail())
                    turns.put_nowait(response)
                    continue
                else:
                    turns.put_nowait(None)
                yield request
            turns.put_nowait(_END)

        async def pump() -> None:
            try:
                async with aclosing(call(forwarded())) as found:  # type: ignore[type-var]
                    async for answer in found:
                        answers.put_nowait(answer)
            except Exception as error:  # noqa: BLE001 - a defect of the service, too: the reader would wait for ever
                turns.put_nowait(error)
                answers.put_nowait(error)

        pumping = asyncio.create_task(pump())
        try:
            while (turn := await turns.get()) is not _END:
                if isinstance(turn, ingest_pb2.ProduceResponse):
                    yield turn
                    continue
                if isinstance(turn, Exception):
                    raise turn
                if turn is not None and not turn.answered:
                    raise Unavailable("cut")
                answer = await answers.get()
                if isinstance(answer, Exception):
                    raise answer
                if turn is not None:
                    raise Unavailable("cut")
                self.duplicates += answer.duplicate
                yield answer
        finally:
            await cancel_and_wait(pumping)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


_END = object()


@dataclass
class _Cut:
    answered: bool


class _Served:
    def __init__(self, faults: Faults, descriptor: ServiceDescriptor, api: Any) -> None:
        self._faults = faults
        self._api = api
        self._streams = {_snake_case(method.name) for method in descriptor.methods if method.server_streaming}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        method, faults = getattr(self._api, name), self._faults
        if name == "produce_stream":
            return lambda requests: faults.produce_stream(method, requests)
        if name in self._streams:
            return lambda request: faults.stream(name, method, request)
        return lambda request: faults.unary(name, method, request)
