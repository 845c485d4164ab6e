"""SQL services that answer with given Arrow batches, and a coordinator that knows where they are, each on a gRPC port.

`asked` has every request that came, `ended` how the statements ended: "done", "cancelled", or the reason of an error.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from shproto import errors
from shproto.v1 import coordinator_pb2, sql_pb2
from shruntime.server import RpcServer

PATIENCE_S = 60.0

Responses = Callable[[], AsyncIterator[sql_pb2.ExecuteResponse]]
Answer = pa.Table | list[pa.RecordBatch] | errors.StreamHouseError | Responses


def batch(**columns: list[Any] | pa.Array) -> pa.RecordBatch:
    return pa.record_batch(columns)


def arrow_stream(schema: pa.Schema, batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for item in batches:
            writer.write_batch(item)
    return sink.getvalue().to_pybytes()


class SqlService:
    """An answer is a table (as many responses as it has batches), batches (a response each), an error, or a function
    that yields the responses. A statement without an answer is refused."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.refusals: list[errors.StreamHouseError] = []  # raised first, one for each request
        self.asked: list[sql_pb2.ExecuteRequest] = []
        self.ended: asyncio.Queue[str] = asyncio.Queue()
        self.server = RpcServer("127.0.0.1:0", [(sql_pb2.DESCRIPTOR.services_by_name["Sql"], self)])

    @property
    def statements(self) -> list[str]:
        return [request.statement for request in self.asked]

    async def execute(self, request: sql_pb2.ExecuteRequest) -> AsyncIterator[sql_pb2.ExecuteResponse]:
        self.asked.append(request)
        try:
            if self.refusals:
                raise self.refusals.pop(0)
            async for response in self._answer(request.statement):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            self.ended.put_nowait("cancelled")
            raise
        except errors.StreamHouseError as error:
            self.ended.put_nowait(error.reason)
            raise
        self.ended.put_nowait("done")

    async def _answer(self, statement: str) -> AsyncIterator[sql_pb2.ExecuteResponse]:
        answer = self.answers.get(statement)
        if answer is None:
            raise errors.InvalidStatement(f"there is no answer to {statement!r}", line=1, column=1)
        if isinstance(answer, errors.StreamHouseError):
            raise answer
        if callable(answer):
            async for response in answer():
                yield response
            return
        schema = answer.schema if isinstance(answer, pa.Table) else answer[0].schema
        batches = answer.to_batches() if isinstance(answer, pa.Table) else answer
        for item in batches or [None]:
            yield sql_pb2.ExecuteResponse(arrow_stream=arrow_stream(schema, [] if item is None else [item]))
        rows = sum(item.num_rows for item in batches)
        stats = sql_pb2.ExecuteStats(rows=rows, records_scanned=10 * rows, bytes_scanned=2048, elapsed_ms=12)
        yield sql_pb2.ExecuteResponse(stats=stats)

    async def __aenter__(self) -> "SqlService":
        await self.server.start()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.server.stop(0)


class Coordinator:
    """Knows the addresses in `sql_addresses`, and answers nothing else."""

    def __init__(self) -> None:
        self.sql_addresses: list[str] = []
        self.lookups = 0
        self.server = RpcServer("127.0.0.1:0", [(coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"], self)])

    @property
    def address(self) -> str:
        return self.server.address

    def __getattr__(self, name: str) -> Any:
        async def refuse(request: object) -> None:
            raise errors.Internal(f"this coordinator has no {name}")

        return refuse

    async def get_metadata(self, request: coordinator_pb2.GetMetadataRequest) -> coordinator_pb2.GetMetadataResponse:
        self.lookups += 1
        return coordinator_pb2.GetMetadataResponse(sql_addresses=self.sql_addresses)

    async def __aenter__(self) -> "Coordinator":
        await self.server.start()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.server.stop(0)


def endless(schema: pa.Schema, first: list[pa.RecordBatch]) -> Responses:
    """Returns an answer that never ends after its first response."""

    async def respond() -> AsyncIterator[sql_pb2.ExecuteResponse]:
        yield sql_pb2.ExecuteResponse(arrow_stream=arrow_stream(schema, first))
        await asyncio.Event().wait()

    return respond


class PlainPlatform:
    """A coordinator and an SQL service in another thread, as servers would run. `call` runs a coroutine there."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.coordinator, self.service = self.call(self._start())
        self.address: str = self.coordinator.address

    async def _start(self) -> tuple[Coordinator, SqlService]:
        coordinator, service = Coordinator(), SqlService()
        await coordinator.server.start()
        await service.server.start()
        coordinator.sql_addresses.append(service.server.address)
        return coordinator, service

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def ended(self) -> str:
        """Waits for the end of a statement; returns how it ended."""
        return self.call(self.service.ended.get())

    def stop(self) -> None:
        self.call(self.service.server.stop(0))
        self.call(self.coordinator.server.stop(0))


@contextmanager
def plain_platform() -> Iterator[PlainPlatform]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    platform = PlainPlatform(loop)
    try:
        yield platform
    finally:
        platform.stop()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
