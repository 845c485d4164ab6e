"""A served API behaves over the network as it does in process: errors, streams, fail-over, health, reflection."""

import asyncio
import gc
from collections.abc import AsyncIterator

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from shproto.errors import AWAY, Internal, OffsetBeyondEnd, StreamHouseError, Unavailable
from shproto.rpc import Connection, time_left_ms
from shproto.services import QueryClient
from shproto.v1 import query_pb2
from shruntime.server import ListenError, RpcServer, check_listen
from shruntime.telemetry import Telemetry

SERVICE = query_pb2.DESCRIPTOR.services_by_name["Query"]


class EchoQuery:
    """Answers with the offset asked; refuses 13, breaks at 99."""

    async def fetch(self, request: query_pb2.FetchRequest) -> query_pb2.FetchResponse:
        if request.offset == 13:
            raise OffsetBeyondEnd("offset 13 is beyond the end", retry_after_ms=7, offset=13, high_watermark=5)
        if request.offset == 99:
            raise ZeroDivisionError("a defect")
        if request.offset == 77:
            return query_pb2.FetchResponse(next_offset=int(time_left_ms() or -1))
        return query_pb2.FetchResponse(next_offset=request.offset)

    async def subscribe(
        self, requests: AsyncIterator[query_pb2.SubscribeRequest]
    ) -> AsyncIterator[query_pb2.FetchResponse]:
        async for request in requests:
            for position in request.positions:
                yield await self.fetch(query_pb2.FetchRequest(offset=position.offset))

    async def lookup_offsets(self, request: query_pb2.LookupOffsetsRequest) -> query_pb2.LookupOffsetsResponse:
        return query_pb2.LookupOffsetsResponse()

    async def describe_query(self, request: query_pb2.DescribeQueryRequest) -> query_pb2.DescribeQueryResponse:
        return query_pb2.DescribeQueryResponse()


class EndlessQuery(EchoQuery):
    async def subscribe(
        self, requests: AsyncIterator[query_pb2.SubscribeRequest]
    ) -> AsyncIterator[query_pb2.FetchResponse]:
        while True:
            yield query_pb2.FetchResponse(batches=[bytes(1 << 20)])


async def one(request: query_pb2.SubscribeRequest) -> AsyncIterator[query_pb2.SubscribeRequest]:
    yield request


async def test_a_cut_stream_of_a_traced_server_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    server = RpcServer("127.0.0.1:0", [(SERVICE, EndlessQuery())], Telemetry(enabled=True).server())
    await server.start()
    try:
        for _ in range(5):
            connection = Connection([server.address])
            stream = QueryClient(connection).subscribe(one(query_pb2.SubscribeRequest()))
            assert await anext(stream)
            await asyncio.sleep(0.05)  # nobody reads: the server waits in a write, its generator at a yield
            await connection.close()
            await asyncio.sleep(0.05)
            gc.collect()
    finally:
        await server.stop(grace_ms=0)
    assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    server = RpcServer("127.0.0.1:0", [(SERVICE, EchoQuery())])
    await server.start()
    yield server
    await server.stop(0)


@pytest.fixture
async def client(server: RpcServer) -> AsyncIterator[QueryClient]:
    client = QueryClient(Connection([server.address]))
    yield client
    await client.close()


async def test_an_error_keeps_its_class_message_and_numbers(client: QueryClient) -> None:
    with pytest.raises(OffsetBeyondEnd, match="offset 13 is beyond the end") as caught:
        await client.fetch(query_pb2.FetchRequest(offset=13))
    assert caught.value.details == {"offset": "13", "high_watermark": "5"}
    assert caught.value.retry_after_ms == 7


async def test_a_service_knows_when_its_caller_gives_up(server: RpcServer) -> None:
    client = QueryClient(Connection([server.address], timeout_ms=500_000))
    left_ms = (await client.fetch(query_pb2.FetchRequest(offset=77, max_wait_ms=100_000))).next_offset
    # gRPC sends whole seconds of a deadline this far away, and rounds up.
    assert 500_000 < left_ms <= 601_000
    assert time_left_ms() is None, "of nobody here"
    await client.close()
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary(
            "/streamhouse.v1.Query/Fetch",
            request_serializer=query_pb2.FetchRequest.SerializeToString,
            response_deserializer=query_pb2.FetchResponse.FromString,
        )
        assert (await call(query_pb2.FetchRequest(offset=77))).next_offset == -1, "it waits for ever"


async def test_a_defect_is_internal_not_silence(client: QueryClient) -> None:
    with pytest.raises(Internal, match="ZeroDivisionError"):
        await client.fetch(query_pb2.FetchRequest(offset=99))


async def test_a_stream_delivers_until_its_error(client: QueryClient) -> None:
    request = query_pb2.SubscribeRequest(positions=[query_pb2.FetchPosition(offset=n) for n in (1, 2, 13, 4)])
    seen = []
    with pytest.raises(OffsetBeyondEnd):
        async for response in client.subscribe(one(request)):
            seen.append(response.next_offset)
    assert seen == [1, 2]


async def test_who_sends_one_request_where_a_stream_of_them_is_taken_is_understood(server: RpcServer) -> None:
    """As clients did before Subscribe took updates of windows, and as any simple one does."""
    request = query_pb2.SubscribeRequest(positions=[query_pb2.FetchPosition(offset=n) for n in (1, 2)])
    connection = Connection([server.address])
    path = "/streamhouse.v1.Query/Subscribe"
    responses = connection.unary_stream(path, request, query_pb2.FetchResponse)
    assert [response.next_offset async for response in responses] == [1, 2]
    await connection.close()


async def test_the_next_address_is_tried(server: RpcServer) -> None:
    client = QueryClient(Connection(["127.0.0.1:1", server.address]))
    assert (await client.fetch(query_pb2.FetchRequest(offset=4))).next_offset == 4
    await client.close()


async def test_the_next_address_is_tried_too_where_what_the_first_one_needs_is_away(server: RpcServer) -> None:
    """A coordinator that cannot reach PostgreSQL, say."""

    class Cut(EchoQuery):
        async def fetch(self, request: query_pb2.FetchRequest) -> query_pb2.FetchResponse:
            raise Unavailable("PostgreSQL does not answer", database=AWAY)

    cut = RpcServer("127.0.0.1:0", [(SERVICE, Cut())])
    await cut.start()
    client = QueryClient(Connection([cut.address, server.address]))
    assert (await client.fetch(query_pb2.FetchRequest(offset=4))).next_offset == 4
    only = QueryClient(Connection([cut.address]))
    with pytest.raises(Unavailable, match="PostgreSQL does not answer") as caught:
        await only.fetch(query_pb2.FetchRequest(offset=4))
    assert caught.value.details == {"database": AWAY}
    for opened in (client, only):
        await opened.close()
    await cut.stop(0)


async def test_nobody_there_is_unavailable() -> None:
    client = QueryClient(Connection(["127.0.0.1:1"]))
    with pytest.raises(Unavailable):
        await client.fetch(query_pb2.FetchRequest())
    await client.close()


async def test_health_says_when_it_serves(server: RpcServer) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE.full_name)
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.set_serving(True)
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_service(server: RpcServer) -> None:
    import asyncio

    def services() -> list[str]:
        with grpc.insecure_channel(server.address) as channel:
            return list(ProtoReflectionDescriptorDatabase(channel).get_services())

    assert SERVICE.full_name in await asyncio.to_thread(services)


async def test_a_taken_port_is_one_clear_error(server: RpcServer, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ListenError, match=f"cannot listen on {server.address}: address already in use"):
        await RpcServer(server.address, [(SERVICE, EchoQuery())]).start()
    assert capfd.readouterr().err == ""  # gRPC's own lines


@pytest.mark.parametrize(
    ("listen", "said"),
    [("192.0.2.1:0", "cannot assign requested address"), ("no-such-host.invalid:0", "no such address")],
)
async def test_an_address_of_nobody_here_is_one_clear_error(
    listen: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ListenError, match=f"cannot listen on {listen}: {said}"):
        await RpcServer(listen, [(SERVICE, EchoQuery())]).start()
    assert capfd.readouterr().err == ""


async def test_a_server_that_never_started_gives_its_port_back() -> None:
    server = RpcServer("127.0.0.1:0", ())
    await server.bind()
    listen = server.address
    with pytest.raises(ListenError):
        await check_listen(listen)
    await server.stop(60_000)
    await check_listen(listen)


async def test_a_name_with_several_addresses_is_listened_on() -> None:
    server = RpcServer("localhost:0", [(SERVICE, EchoQuery())])
    await server.start()
    assert server.port > 0
    await server.stop(0)


def test_an_error_of_a_newer_server_is_still_an_error() -> None:
    detail = OffsetBeyondEnd("x").to_detail()
    detail.reason = "FROM_THE_FUTURE"
    assert type(StreamHouseError.from_detail(detail)) is StreamHouseError
