"""What becomes of connections that are too many, or silent: gRPC's own limits, and the one per address beside it."""

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from shproto.rpc import Connection
from shproto.services import QueryClient
from shproto.v1 import query_pb2
from shruntime import connections, descriptors
from shruntime.connections import AddressLimit, ConnectionLimits
from shruntime.descriptors import connections_allowed, raise_descriptor_limit
from shruntime.server import RpcServer, ServerLimits
from shruntime.settings import CommonSettings

from libs.shruntime.tests.test_runtime_server import SERVICE, EchoQuery

PATIENCE_S = 30


@contextlib.asynccontextmanager
async def serving(**limits: int) -> AsyncIterator[RpcServer]:
    server = RpcServer(
        "127.0.0.1:0", [(SERVICE, EchoQuery())], limits=ServerLimits(connections=ConnectionLimits(**limits))
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


@contextlib.contextmanager
def silent(server: RpcServer, count: int, source: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    """Connections that never say a word."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            opened.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 5, (source, 0))))
            opened[-1].setblocking(False)
        yield opened


def is_open(connection: socket.socket) -> bool:
    try:
        while connection.recv(4096):  # the server's first words
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


async def until_open(opened: list[socket.socket], count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while sum(map(is_open, opened)) != count:
            await asyncio.sleep(0.01)


async def first_words(connection: socket.socket) -> None:
    """Returns once the server has accepted the connection, not only its backlog."""
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.get_running_loop().sock_recv(connection, 1)


async def answers(server: RpcServer) -> None:
    client = QueryClient(Connection([server.address]))
    try:
        assert (await client.fetch(query_pb2.FetchRequest(offset=4))).next_offset == 4
    finally:
        await client.close()


@pytest.mark.long
async def test_g7_connections_beyond_the_limit_of_all_are_closed_and_silent_ones_time_out() -> None:
    async with serving(connections_max=5, handshake_timeout_ms=5_000) as server:
        with silent(server, 20) as opened:
            await until_open(opened, 5)
            await until_open(opened, 0)
            await answers(server)


async def test_g7_one_address_cannot_shut_out_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(handshake_timeout_ms=600_000) as server:
        limit = AddressLimit(server.port, 5)
        with silent(server, 5) as first, silent(server, 3, "127.0.0.2") as others:
            assert await asyncio.to_thread(limit.enforce) == {}
            with silent(server, 7) as more:
                await asyncio.gather(*map(first_words, more))
                assert await asyncio.to_thread(limit.enforce) == {"127.0.0.1": 7}
                await until_open(more, 0)
                async with asyncio.timeout(PATIENCE_S):
                    while await asyncio.to_thread(limit.enforce):  # the server closes them later than they end here
                        await asyncio.sleep(0.01)
            assert all(map(is_open, first + others)), "those that came first stay"
            await answers(server)


async def test_the_limit_per_address_is_kept_while_a_server_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LOOK_INTERVAL_S", 0.05)
    async with serving(per_address_max=6, handshake_timeout_ms=600_000) as server:
        with silent(server, 20) as opened:
            await until_open(opened, 6)


async def test_sockets_of_others_are_left_alone() -> None:
    """The process's clients, and its other servers."""
    async with serving(handshake_timeout_ms=600_000) as server, serving(handshake_timeout_ms=600_000) as other:
        with silent(server, 3) as opened, silent(other, 8) as elsewhere:
            await asyncio.gather(*map(first_words, [*opened, *elsewhere]))
            assert await asyncio.to_thread(AddressLimit(server.port, 2).enforce) == {"127.0.0.1": 1}
            await until_open(opened, 2)
            assert all(map(is_open, elsewhere))


async def test_a_connection_that_no_descriptor_is_left_to_look_at_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was taken for a socket of others, and never counted."""

    def no_descriptor(descriptor: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with serving(handshake_timeout_ms=600_000) as server:
        limit = AddressLimit(server.port, 2)
        with silent(server, 3) as opened:
            await asyncio.gather(*map(first_words, opened))
            with monkeypatch.context() as patched:
                patched.setattr(os, "dup", no_descriptor)
                assert limit.enforce() == {}
            assert await asyncio.to_thread(limit.enforce) == {"127.0.0.1": 1}


def test_a_descriptor_that_was_given_to_a_file_is_not_kept(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        before = len(list(Path("/proc/self/fd").iterdir()))
        assert connections._hold(file.fileno(), os.fstat(file.fileno()).st_ino) is None
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@contextlib.contextmanager
def open_files(soft: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_of_open_files_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open_files(512):
        assert raise_descriptor_limit() == hard == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    monkeypatch.setattr(descriptors, "DESCRIPTORS_MAX", 600)
    with open_files(512):
        assert raise_descriptor_limit() == 600
        assert raise_descriptor_limit() == 600


@pytest.mark.parametrize(
    ("soft", "asked", "allowed"), [(1024, 10_000, 768), (1024, 500, 500), (300, 10_000, 150), (20_000, 10_000, 10_000)]
)
def test_connections_leave_descriptors_for_files(
    soft: int, asked: int, allowed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, 20_000))
    assert connections_allowed(asked) == allowed
    limits = ConnectionLimits.of(CommonSettings(connections_max=asked))
    assert limits == ConnectionLimits(connections_max=allowed, per_address_max=min(5_000, allowed // 2))
    assert bool(caplog.records) == (allowed < asked)
