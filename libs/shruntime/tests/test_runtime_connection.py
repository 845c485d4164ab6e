"""A connection to several addresses: what is silent, foreign or away at one of them costs the caller little."""

import asyncio
import http.server
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

import grpc
import grpc.aio
import pytest
from shproto import rpc
from shproto.errors import AWAY, OffsetBeyondEnd, ShuttingDown, StreamHouseError, Unavailable
from shproto.rpc import Connection
from shproto.services import CoordinatorClient
from shproto.v1 import coordinator_pb2
from shruntime.server import RpcServer

SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]
GET_HEAD = coordinator_pb2.GetHeadRequest()
PATIENCE_S = 30


class Replica:
    """Answers that the events are at position 4; once `release` is set it raises `fault` instead. Its stream has
    `after` items before that."""

    def __init__(self, fault: StreamHouseError | None = None, after: int = 0) -> None:
        self.fault = fault
        self.after = after
        self.release = asyncio.Event()
        self.calls = 0

    def __getattr__(self, name: str) -> Callable[[object], Awaitable[None]]:
        """The other RPCs of the service."""

        async def refuse(request: object) -> None:
            raise NotImplementedError(name)

        return refuse

    async def get_head(self, request: coordinator_pb2.GetHeadRequest) -> coordinator_pb2.GetHeadResponse:
        self.calls += 1
        if self.fault is not None:
            await self.release.wait()
            raise self.fault
        return coordinator_pb2.GetHeadResponse(events_position=4)

    async def get_snapshot(
        self, request: coordinator_pb2.GetSnapshotRequest
    ) -> AsyncIterator[coordinator_pb2.SnapshotPart]:
        self.calls += 1
        for number in range(self.after):
            yield coordinator_pb2.SnapshotPart(position=number)
        if self.fault is not None:
            raise self.fault
        yield coordinator_pb2.SnapshotPart(position=100)


async def snapshot_of(client: CoordinatorClient) -> list[int]:
    return [part.position async for part in client.get_snapshot(coordinator_pb2.GetSnapshotRequest())]


Serve = Callable[[Replica], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    servers: list[RpcServer] = []

    async def start(api: Replica) -> str:
        server = RpcServer("127.0.0.1:0", [(SERVICE, api)])
        servers.append(server)
        await server.start()
        return server.address

    yield start
    for server in servers:
        await server.stop(0)


@contextmanager
def silence() -> Iterator[str]:
    """An address that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"127.0.0.1:{silent.getsockname()[1]}"


@contextmanager
def web_server() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def refusing() -> Iterator[str]:
    """An address that is taken, and that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
async def other_server() -> AsyncIterator[str]:
    """A gRPC server of something else."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Connection]]:
    opened: list[Connection] = []

    def make(*addresses: str, first: int | None = 0, **options: int) -> Connection:
        opened.append(Connection(addresses, first=first, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for connection in opened:
        await connection.close()


Connect = Callable[..., Connection]


async def test_calls_that_fail_together_all_go_to_the_next_address(serve: Serve, connect: Connect) -> None:
    """Each failure used to advance the connection by one: of calls that failed together half went back."""
    away, well = Replica(Unavailable("PostgreSQL does not answer", database=AWAY)), Replica()
    client = CoordinatorClient(connect(await serve(away), await serve(well)))
    calls = [asyncio.create_task(client.get_head(GET_HEAD)) for _ in range(8)]
    async with asyncio.timeout(PATIENCE_S):
        while away.calls < 8:
            await asyncio.sleep(0.01)
    away.release.set()
    assert [response.events_position for response in await asyncio.gather(*calls)] == [4] * 8
    assert (away.calls, well.calls) == (8, 8)
    await client.get_head(GET_HEAD)
    assert (away.calls, well.calls) == (8, 9)  # it is remembered


async def test_clients_that_are_given_the_same_addresses_spread_over_them(serve: Serve, connect: Connect) -> None:
    replicas = [Replica(), Replica()]
    addresses = [await serve(replica) for replica in replicas]
    for _ in range(40):
        client = CoordinatorClient(connect(*addresses, first=None))
        for _ in range(2):
            await client.get_head(GET_HEAD)
    assert sum(replica.calls for replica in replicas) == 80
    assert all(replica.calls and replica.calls % 2 == 0 for replica in replicas)  # each client stays where it is


async def test_a_silent_address_costs_a_head_start_and_not_its_own_timeout(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = [item for item in rpc.CHANNEL_OPTIONS if item[0] != "grpc.min_reconnect_backoff_ms"]
    monkeypatch.setattr(rpc, "CHANNEL_OPTIONS", (*slow, ("grpc.min_reconnect_backoff_ms", 120_000)))
    with silence() as silent:
        client = CoordinatorClient(connect(silent, await serve(Replica()), timeout_ms=120_000))
        async with asyncio.timeout(60):
            assert (await client.get_head(GET_HEAD)).events_position == 4


@pytest.mark.parametrize("kind", ["another gRPC server", "a web server", "nobody"])
async def test_what_is_no_service_is_passed_over(
    kind: str, serve: Serve, connect: Connect, other_server: str, refusing: str
) -> None:
    with web_server() as web:
        first = {"another gRPC server": other_server, "a web server": web, "nobody": refusing}[kind]
        client = CoordinatorClient(connect(first, await serve(Replica())))
        assert (await client.get_head(GET_HEAD)).events_position == 4
        assert await snapshot_of(client) == [100]


async def test_a_server_with_a_defect_is_passed_over_and_may_be_better_later(serve: Serve, connect: Connect) -> None:
    class Defect(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:  # type: ignore[type-arg]
            async def answer(request: bytes, context: object) -> bytes:
                raise RuntimeError("a defect")

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Defect(),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        client = CoordinatorClient(connect(address, await serve(Replica())))
        assert (await client.get_head(GET_HEAD)).events_position == 4
        with pytest.raises(Unavailable, match=f"{address}: UNKNOWN: .*a defect") as caught:
            await CoordinatorClient(connect(address)).get_head(GET_HEAD)
        assert caught.value.maybe_done and not caught.value.permanent
    finally:
        await server.stop(None)


async def test_wrong_servers_are_named(connect: Connect, other_server: str, refusing: str) -> None:
    with web_server() as web:
        with pytest.raises(Unavailable) as caught:
            await CoordinatorClient(connect(other_server, web)).get_head(GET_HEAD)
        assert f"{other_server} is another server, or of another version" in caught.value.message
        assert f"{web} is no gRPC server" in caught.value.message
        assert caught.value.permanent and not caught.value.maybe_done
    with pytest.raises(Unavailable) as caught:
        await CoordinatorClient(connect(other_server, refusing)).get_head(GET_HEAD)
    assert f"cannot connect to {refusing}: Connection refused" in caught.value.message
    assert not caught.value.permanent and not caught.value.maybe_done


async def test_a_name_that_cannot_be_resolved_is_named_with_the_cause(connect: Connect) -> None:
    with pytest.raises(Unavailable, match=r"cannot connect to no-such-host\.invalid:7070: \S") as caught:
        await CoordinatorClient(connect("no-such-host.invalid:7070")).get_head(GET_HEAD)
    assert "errors resolving" not in caught.value.message and not caught.value.maybe_done


async def test_an_advertised_address_that_does_not_work_names_the_setting(connect: Connect, refusing: str) -> None:
    connection = connect(refusing, advertised=True)
    with pytest.raises(Unavailable, match=f"cannot connect to {refusing}: Connection refused; .*STREAMHOUSE_ADVERTISE"):
        await CoordinatorClient(connection).get_head(GET_HEAD)
    with pytest.raises(Unavailable, match=f"cannot connect to {refusing}: Connection refused; .*STREAMHOUSE_ADVERTISE"):
        await connection.connect(60_000)


@pytest.mark.parametrize("how", ["call", "stream", "connect", "refusal"])
async def test_an_advertised_address_that_worked_is_not_doubted_when_its_service_is_away(
    connect: Connect, how: str
) -> None:
    api = Replica(OffsetBeyondEnd("5 is beyond the end", offset=5, high_watermark=4) if how == "refusal" else None)
    api.release.set()
    server = RpcServer("127.0.0.1:0", [(SERVICE, api)])
    await server.start()
    connection = connect(server.address, advertised=True)
    client = CoordinatorClient(connection)
    try:
        if how == "stream":
            assert await snapshot_of(client) == [100]
        elif how == "connect":
            await connection.connect(60_000)
        elif how == "refusal":
            with pytest.raises(OffsetBeyondEnd):
                await client.get_head(GET_HEAD)
        else:
            await client.get_head(GET_HEAD)
    finally:
        await server.stop(0)
    async with asyncio.timeout(PATIENCE_S):
        while True:  # a call that is under way as the server goes has words of its own
            with pytest.raises(Unavailable) as caught:
                await client.get_head(GET_HEAD)
            if "cannot connect to" in caught.value.message:
                break
    assert "STREAMHOUSE_ADVERTISE" not in caught.value.message


async def test_the_word_of_a_service_weighs_more_than_the_absence_of_others(
    serve: Serve, connect: Connect, refusing: str
) -> None:
    away = Replica(Unavailable("PostgreSQL does not answer", retry_after_ms=7, database=AWAY))
    away.release.set()
    address = await serve(away)
    for addresses in ([address, refusing], [refusing, address]):
        with pytest.raises(Unavailable) as caught:
            await CoordinatorClient(connect(*addresses)).get_head(GET_HEAD)
        assert caught.value.details == {"database": AWAY}
        assert caught.value.retry_after_ms == 7 and caught.value.maybe_done
        assert f"{address}: PostgreSQL does not answer" in caught.value.message
        assert f"cannot connect to {refusing}" in caught.value.message


async def test_a_stream_that_has_not_begun_goes_to_the_next_address(
    serve: Serve, connect: Connect, refusing: str
) -> None:
    """As `verify` reads its snapshot."""
    stopping = await serve(Replica(ShuttingDown("this service is stopping; ask another one")))
    well = await serve(Replica())
    client = CoordinatorClient(connect(refusing, stopping, well))
    assert await snapshot_of(client) == [100]


async def test_a_stream_that_has_begun_is_not_begun_again_elsewhere(serve: Serve, connect: Connect) -> None:
    breaking, well = Replica(Unavailable("gone"), after=2), Replica()
    client = CoordinatorClient(connect(await serve(breaking), await serve(well)))
    seen = []
    with pytest.raises(Unavailable, match="gone"):
        async for part in client.get_snapshot(coordinator_pb2.GetSnapshotRequest()):
            seen.append(part.position)
    assert (seen, well.calls) == ([0, 1], 0)
    assert await snapshot_of(client) == [100]


async def test_a_closed_connection_says_so(serve: Serve, connect: Connect, refusing: str) -> None:
    for addresses in ([await serve(Replica())], [refusing, await serve(Replica())]):
        connection = connect(*addresses)
        await connection.close()
        with pytest.raises(Unavailable, match="the connection is closed") as caught:
            await CoordinatorClient(connection).get_head(GET_HEAD)
        assert caught.value.permanent
        with pytest.raises(Unavailable, match="the connection is closed"):
            await connection.connect(1_000)


async def test_calls_under_way_fail_and_are_not_cancelled_when_the_connection_is_closed(
    serve: Serve, connect: Connect
) -> None:
    """gRPC cancels the calls of a channel that is closed; their tasks looked as if somebody had cancelled them."""
    replica = Replica(Unavailable("never said"))
    address = await serve(replica)
    connection = connect(address)
    calls = [asyncio.create_task(CoordinatorClient(connection).get_head(GET_HEAD)) for _ in range(2)]
    async with asyncio.timeout(PATIENCE_S):
        while replica.calls < 2:
            await asyncio.sleep(0.01)
    calls[0].cancel()
    await asyncio.wait(calls[:1])
    await connection.close()
    with pytest.raises(Unavailable, match="the connection is closed") as caught:
        await calls[1]
    assert calls[0].cancelled() and caught.value.permanent and caught.value.maybe_done


async def test_calls_that_wait_for_a_connection_end_when_it_is_closed(connect: Connect) -> None:
    """They used to go on, and to open a channel that nobody closed."""
    with silence() as one, silence() as other:
        connection = connect(one, other, timeout_ms=120_000)
        waiting = asyncio.create_task(CoordinatorClient(connection).get_head(GET_HEAD))
        async with asyncio.timeout(PATIENCE_S):
            while len(connection._races) < 2:
                await asyncio.sleep(0.01)
        await connection.close()
        with pytest.raises(Unavailable, match="the connection is closed"):
            await waiting
    assert [endpoint._channel for endpoint in connection._endpoints] == [None, None]


async def test_a_refusal_is_final_wherever_it_comes_from(serve: Serve, connect: Connect) -> None:
    refused, well = Replica(OffsetBeyondEnd("beyond", offset=4)), Replica()
    refused.release.set()
    client = CoordinatorClient(connect(await serve(refused), await serve(well)))
    with pytest.raises(OffsetBeyondEnd):
        await client.get_head(GET_HEAD)
    assert well.calls == 0
