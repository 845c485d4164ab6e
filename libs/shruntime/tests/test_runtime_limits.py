"""A crowd of callers: a server that is well turns nobody away without saying when to come again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from shproto.errors import Overloaded, Unavailable
from shproto.rpc import RETRY_AFTER_MS_MAX, RETRY_AFTER_MS_MIN, Connection
from shproto.services import QueryClient
from shproto.v1 import query_pb2
from shruntime.server import RpcServer, ServerLimits
from shruntime.settings import CommonSettings

SERVICE = query_pb2.DESCRIPTOR.services_by_name["Query"]
CROWD = 4_000
PATIENCE_S = 30


class HeldQuery:
    """Holds its calls and streams until `release` is set."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.held = 0

    async def fetch(self, request: query_pb2.FetchRequest) -> query_pb2.FetchResponse:
        self.held += 1
        await self.release.wait()
        return query_pb2.FetchResponse(next_offset=request.offset)

    async def subscribe(
        self, requests: AsyncIterator[query_pb2.SubscribeRequest]
    ) -> AsyncIterator[query_pb2.FetchResponse]:
        yield query_pb2.FetchResponse()
        self.held += 1
        await self.release.wait()

    async def lookup_offsets(self, request: query_pb2.LookupOffsetsRequest) -> query_pb2.LookupOffsetsResponse:
        return query_pb2.LookupOffsetsResponse()

    async def describe_query(self, request: query_pb2.DescribeQueryRequest) -> query_pb2.DescribeQueryResponse:
        return query_pb2.DescribeQueryResponse()


async def one_request() -> AsyncIterator[query_pb2.SubscribeRequest]:
    yield query_pb2.SubscribeRequest()


async def no_request() -> AsyncIterator[query_pb2.SubscribeRequest]:
    """Sends nothing until it is cancelled: gRPC loses the status of a stream that is ended while it sends."""
    await asyncio.Event().wait()
    yield query_pb2.SubscribeRequest()


async def many_requests() -> AsyncIterator[query_pb2.SubscribeRequest]:
    for _ in range(200):
        yield query_pb2.SubscribeRequest()


async def started(api: HeldQuery, limits: ServerLimits) -> tuple[RpcServer, QueryClient]:
    server = RpcServer("127.0.0.1:0", [(SERVICE, api)], limits=limits)
    await server.start()
    return server, QueryClient(Connection([server.address], timeout_ms=120_000))


async def until(measured: Callable[[], object], expected: object) -> None:
    """Waits for the number. Fails with the one that it stayed at."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while measured() != expected:
                await asyncio.sleep(0.01)
    assert measured() == expected


@pytest.mark.long
async def test_thousands_of_calls_at_once_are_all_answered() -> None:
    """gRPC's default ends calls with CANCELLED from 1,000 on that nobody has looked at."""
    api = HeldQuery()
    api.release.set()
    server, client = await started(api, ServerLimits())
    try:
        answers = await asyncio.gather(
            *[client.fetch(query_pb2.FetchRequest(offset=number)) for number in range(CROWD)]
        )
        assert [answer.next_offset for answer in answers] == list(range(CROWD))
    finally:
        await client.close()
        await server.stop(0)


async def test_calls_beyond_the_limit_are_told_when_to_come_again() -> None:
    api = HeldQuery()
    server, client = await started(api, ServerLimits(calls_in_flight_max=2, streams_open_max=1))
    try:
        held = [asyncio.create_task(client.fetch(query_pb2.FetchRequest())) for _ in range(2)]
        stream = client.subscribe(one_request())
        await anext(stream)
        await until(lambda: api.held, 3)
        with pytest.raises(Overloaded, match="calls_in_flight_max = 2") as caught:
            await client.fetch(query_pb2.FetchRequest())
        assert caught.value.details == {"limit": "calls_in_flight_max", "value": "2"}
        assert RETRY_AFTER_MS_MIN <= caught.value.retry_after_ms <= RETRY_AFTER_MS_MAX
        with pytest.raises(Overloaded, match="streams_open_max = 1"):
            await anext(client.subscribe(no_request()))
        assert (server.calls.calls.in_flight, server.calls.calls.refused) == (2, 1)
        assert (server.calls.streams.in_flight, server.calls.streams.refused) == (1, 1)
        api.release.set()
        await asyncio.gather(*held)
        assert [answer async for answer in stream] == []
        await client.fetch(query_pb2.FetchRequest())
        assert server.calls.calls.in_flight == 0
    finally:
        await client.close()
        await server.stop(0)


async def test_a_stream_that_is_refused_while_it_sends_may_be_tried_again() -> None:
    """Most of these end with grpc.aio's "Internal error from Core" in the place of the server's status."""
    api = HeldQuery()
    server, client = await started(api, ServerLimits(streams_open_max=1))
    try:
        stream = client.subscribe(one_request())
        await anext(stream)
        for _ in range(50):
            with pytest.raises((Overloaded, Unavailable)):
                await anext(client.subscribe(many_requests()))
        await until(lambda: (server.calls.streams.in_flight, server.calls.streams.refused), (1, 50))
        api.release.set()
        assert [answer async for answer in stream] == []
    finally:
        await client.close()
        await server.stop(0)


async def test_a_call_whose_caller_is_gone_counts_no_longer() -> None:
    api = HeldQuery()
    server, client = await started(api, ServerLimits())
    try:
        held = asyncio.create_task(client.fetch(query_pb2.FetchRequest()))
        stream = client.subscribe(one_request())
        await anext(stream)
        await until(lambda: (server.calls.calls.in_flight, server.calls.streams.in_flight), (1, 1))
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: (server.calls.calls.in_flight, server.calls.streams.in_flight), (0, 0))
    finally:
        await client.close()
        await server.stop(0)


async def test_streams_leave_room_for_the_calls_that_their_owners_need() -> None:
    api = HeldQuery()
    server, client = await started(api, ServerLimits(calls_in_flight_max=1, streams_open_max=1))
    try:
        stream = client.subscribe(one_request())
        await anext(stream)
        await client.lookup_offsets(query_pb2.LookupOffsetsRequest())
    finally:
        await client.close()
        await server.stop(0)


def test_the_limits_come_from_the_settings() -> None:
    given = CommonSettings(calls_in_flight_max=7, streams_open_max=9, calls_pending_max=8)
    limits = ServerLimits.of(given)
    assert (limits.calls_in_flight_max, limits.streams_open_max) == (7, 9)
    assert {
        ("grpc.server.max_pending_requests", 8),
        ("grpc.server.max_pending_requests_hard_limit", 8),
    } <= set(limits.channel_options())


async def test_one_connection_does_not_take_the_calls_and_streams_of_all() -> None:
    api = HeldQuery()
    limits = ServerLimits(calls_per_connection_max=2, streams_per_connection_max=1)
    server = RpcServer("127.0.0.1:0", [(SERVICE, api)], limits=limits)
    await server.start()
    # A port of its own for each: channels with the same target and options share a connection.
    clients = [QueryClient(Connection([address])) for address in (server.address, f"localhost:{server.port}")]
    held = [asyncio.create_task(client.fetch(query_pb2.FetchRequest())) for client in clients for _ in range(2)]
    streams = [client.subscribe(one_request()) for client in clients]
    try:
        for stream in streams:
            await anext(stream)
        await until(lambda: api.held, 6)
        for client in clients:
            with pytest.raises(Overloaded, match="calls_per_connection_max = 2") as caught:
                await client.fetch(query_pb2.FetchRequest())
            assert caught.value.details == {"limit": "calls_per_connection_max", "value": "2"}
            with pytest.raises(Overloaded, match="streams_per_connection_max = 1"):
                await anext(client.subscribe(one_request()))
        api.release.set()
        await asyncio.gather(*held)
        assert (await clients[0].fetch(query_pb2.FetchRequest(offset=4))).next_offset == 4
    finally:
        for client in clients:
            await client.close()
        await server.stop(0)
    assert (server.calls.calls.in_flight, server.calls.streams.in_flight) == (0, 0)
