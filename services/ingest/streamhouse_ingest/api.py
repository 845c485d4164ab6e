"""The RPC methods of the Ingest service: limits requests in flight and passes them to the parts of the agent.

Owns: the unanswered requests of each produce stream. Does not own: the byte limit of connections
(produce/in_flight.py), the agent and its parts.
Invariants: responses of a stream leave in the order of its requests. A request of a stream counts from its admission
until its response was taken; its bytes are given back to the connection exactly once, also if the stream is cut.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from shproto.errors import StreamHouseError
from shproto.rpc import caller_connection
from shproto.v1 import ingest_pb2 as pb
from shruntime.tasks import cancel_and_wait

from streamhouse_ingest.agent import Agent
from streamhouse_ingest.produce.in_flight import ConnectionByteLimit
from streamhouse_ingest.produce.service import PendingProduce, ProduceService


class IngestApi:
    """Implements shproto.services.IngestApi."""

    def __init__(
        self, agent: Agent, *, requests_in_flight_max: int, bytes_in_flight_max: int, connection_bytes_max: int
    ) -> None:
        self._agent = agent
        self._requests_in_flight_max = requests_in_flight_max
        self._bytes_in_flight_max = bytes_in_flight_max
        self._in_flight = ConnectionByteLimit(connection_bytes_max)

    async def produce(self, request: pb.ProduceRequest) -> pb.ProduceResponse:
        produce = self._agent.running().produce
        with self._in_flight.hold(caller_connection(), request.ByteSize()):
            return await produce.produce(request)

    async def produce_stream(self, requests: AsyncIterator[pb.ProduceRequest]) -> AsyncIterator[pb.ProduceResponse]:
        """Yields a response per request, in the order of the requests; the error of a request is in its response."""
        produce = self._agent.running().produce
        connection = caller_connection()
        in_flight = _InFlightRequests(self._requests_in_flight_max, self._bytes_in_flight_max)
        feeder = asyncio.ensure_future(self._feed(produce, requests, in_flight, connection))
        try:
            while (item := await in_flight.next()) is not None:
                yield await _answer(produce, item)
                self._in_flight.give_back(connection, in_flight.release())
            # Raises the error that ended the requests, behind all answers.
            await feeder
        finally:
            # The feeder first: it may be about to take more of the connection's bytes.
            await cancel_and_wait(feeder)
            for size_bytes in in_flight.sizes_bytes:
                self._in_flight.give_back(connection, size_bytes)

    async def _feed(
        self,
        produce: ProduceService,
        requests: AsyncIterator[pb.ProduceRequest],
        in_flight: "_InFlightRequests",
        connection: str,
    ) -> None:
        try:
            async for request in requests:
                # The stream's own limit first: a stream that waits for its answers must not hold bytes that other
                # streams of the connection could use.
                await in_flight.wait_for_room()
                size_bytes = request.ByteSize()
                await self._in_flight.take(connection, size_bytes)
                in_flight.admit(size_bytes)
                try:
                    in_flight.put(await produce.accept(request))
                except StreamHouseError as error:  # answered in its turn, as the other requests of the stream go on
                    in_flight.put(_refused(request.topic, request.partition, error))
                del request  # its copy of the batch would stay in memory until the next request arrives
        finally:
            # Also after an error of the stream: requests that were accepted are still answered.
            in_flight.close()

    async def fence_producer(self, request: pb.FenceProducerRequest) -> pb.FenceProducerResponse:
        return await self._agent.running().fencing.fence(request)

    async def read_tail(self, request: pb.ReadTailRequest) -> pb.ReadTailResponse:
        return await self._agent.running().tail.read_tail(request)

    async def pull_slice(self, request: pb.PullSliceRequest) -> AsyncIterator[pb.PullSliceResponse]:
        async for response in self._agent.running().tail.pull_slice(request):
            yield response

    async def describe_agent(self, request: pb.DescribeAgentRequest) -> pb.DescribeAgentResponse:
        return self._agent.describe()


async def _answer(produce: ProduceService, item: PendingProduce | pb.ProduceResponse) -> pb.ProduceResponse:
    if isinstance(item, pb.ProduceResponse):
        return item
    try:
        return await produce.answer(item)
    except StreamHouseError as error:
        return _refused(item.topic, item.partition, error)


def _refused(topic: str, partition: int, error: StreamHouseError) -> pb.ProduceResponse:
    return pb.ProduceResponse(topic=topic, partition=partition, base_offset=-1, error=error.to_detail())


class _InFlightRequests:
    """Unanswered requests of a stream, in order, limited in number and bytes. `sizes_bytes`: size of each."""

    def __init__(self, requests_max: int, bytes_max: int) -> None:
        self._requests_max = requests_max
        self._bytes_max = bytes_max
        self.sizes_bytes: deque[int] = deque()
        self._bytes = 0
        self._items: deque[PendingProduce | pb.ProduceResponse] = deque()
        self._closed = False
        self._moved = asyncio.Event()

    async def wait_for_room(self) -> None:
        """Waits until another request may be admitted; that request may exceed the limit of bytes once."""
        while len(self.sizes_bytes) >= self._requests_max or self._bytes >= self._bytes_max:
            await self._wait()

    def admit(self, size_bytes: int) -> None:
        """Counts a request; the caller calls `put` with its outcome afterwards."""
        self.sizes_bytes.append(size_bytes)
        self._bytes += size_bytes

    def put(self, item: PendingProduce | pb.ProduceResponse) -> None:
        """Queues the outcome of the request admitted last."""
        self._items.append(item)
        self._moved.set()

    def release(self) -> int:
        """Releases the oldest request, which is answered; returns its size in bytes."""
        size_bytes = self.sizes_bytes.popleft()
        self._bytes -= size_bytes
        self._moved.set()
        return size_bytes

    async def next(self) -> "PendingProduce | pb.ProduceResponse | None":
        """Returns the next outcome to answer with; None once the stream has ended and all requests are answered."""
        while not self._items:
            if self._closed:
                return None
            await self._wait()
        return self._items.popleft()

    def close(self) -> None:
        self._closed = True
        self._moved.set()

    async def _wait(self) -> None:
        self._moved.clear()
        await self._moved.wait()
