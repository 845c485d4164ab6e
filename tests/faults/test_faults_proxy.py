"""The proxy does what its faults say, and nothing while there is none."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from tests.faults.proxy import BOTH, Direction, FaultProxy

Connect = Callable[[], Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
SHORT_S = 0.1
"""Long enough to be sure that nothing comes over loopback."""

PATIENCE_S = 20
"""A SYN without an answer is repeated after 1, 3 and 7 s."""


class Echo:
    """Answers every line with itself; remembers what arrived and how each stream ended."""

    def __init__(self) -> None:
        self.arrived: list[bytes] = []
        self.ends: list[str] = []
        self.closes = True
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while line := await reader.readline():
                self.arrived.append(line)
                writer.write(line)
                await writer.drain()
            self.ends.append("FIN")
        except ConnectionError:
            self.ends.append("RST")
        if self.closes:
            writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """As the kernel does for a process that dies with bytes unread."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.fixture
async def echo() -> AsyncIterator[tuple[Echo, str]]:
    service = Echo()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    yield service, f"{host}:{port}"
    server.close()
    for writer in service.writers:  # close() would wait for bytes that a silent direction does not take
        writer.transport.abort()
    await server.wait_closed()


@pytest.fixture
async def proxy(echo: tuple[Echo, str]) -> AsyncIterator[FaultProxy]:
    made = FaultProxy("test", echo[1])
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def connect(proxy: FaultProxy) -> AsyncIterator[Connect]:
    writers = []

    async def open_one() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = proxy.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        return reader, writer

    yield open_one
    for writer in writers:  # close() would wait for bytes that a silent direction does not take
        writer.transport.abort()


async def says_nothing(reader: asyncio.StreamReader) -> bool:
    try:
        await asyncio.wait_for(reader.readline(), SHORT_S)
    except TimeoutError:
        return True
    return False


async def test_passes_everything_on(proxy: FaultProxy, connect: Connect) -> None:
    reader, writer = await connect()
    lines = [b"%d %s\n" % (number, b"x" * 1000) for number in range(3000)]
    writer.writelines(lines)
    assert [await reader.readline() for _ in lines] == lines
    assert proxy.passed_bytes == dict.fromkeys(BOTH, sum(map(len, lines)))


async def test_the_end_of_a_stream_is_passed_on(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(b"last\n")
    writer.write_eof()
    assert await reader.readline() == b"last\n"
    assert await reader.read() == b""


async def test_delays_one_way(proxy: FaultProxy, connect: Connect) -> None:
    reader, writer = await connect()
    proxy.delay(Direction.DOWN, 150)
    started = asyncio.get_running_loop().time()
    writer.write(b"a\n")
    await reader.readline()
    assert asyncio.get_running_loop().time() - started >= 0.15


async def test_holds_requests_and_delivers_them_after_the_heal(
    echo: tuple[Echo, str], proxy: FaultProxy, connect: Connect
) -> None:
    reader, writer = await connect()
    proxy.hold(Direction.UP)
    writer.write(b"held\n")
    assert await says_nothing(reader)
    assert echo[0].arrived == []
    await proxy.heal()
    assert await reader.readline() == b"held\n"


async def test_holds_answers_only(echo: tuple[Echo, str], proxy: FaultProxy, connect: Connect) -> None:
    reader, writer = await connect()
    proxy.hold(Direction.DOWN)
    writer.write(b"arrives\n")
    assert await says_nothing(reader)
    assert echo[0].arrived == [b"arrives\n"]
    await proxy.heal()
    assert await reader.readline() == b"arrives\n"


@pytest.mark.parametrize("way", BOTH)
async def test_a_new_connection_gets_no_answer_while_either_direction_is_silent(
    echo: tuple[Echo, str], proxy: FaultProxy, connect: Connect, way: Direction
) -> None:
    proxy.hold(way)
    connecting = asyncio.create_task(connect())
    await asyncio.sleep(SHORT_S)
    assert not connecting.done(), "the SYN got through"
    assert echo[0].writers == []
    await proxy.heal()
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await connecting
        writer.write(b"x\n")
        assert await reader.readline() == b"x\n"
    assert len(echo[0].writers) == 1, "the proxy's own connection reached the target"


@pytest.mark.parametrize("end", ["FIN", "RST"])
async def test_the_end_of_a_stream_does_not_pass_a_silent_direction(
    echo: tuple[Echo, str], proxy: FaultProxy, connect: Connect, end: str
) -> None:
    reader, writer = await connect()
    writer.write(b"1\n")
    await reader.readline()
    proxy.hold(Direction.UP)
    if end == "RST":
        reset(writer)
    else:
        writer.close()
    await asyncio.sleep(SHORT_S)
    assert echo[0].ends == []
    await proxy.heal()
    await until(lambda: echo[0].ends == [end])


async def test_a_sender_to_a_dead_peer_hears_of_it_only_by_the_way_back(
    echo: tuple[Echo, str], proxy: FaultProxy, connect: Connect
) -> None:
    _, writer = await connect()
    await until(lambda: echo[0].writers)
    proxy.hold(Direction.UP)
    reset(writer)
    far = echo[0].writers[0]
    for _ in range(3):  # to a peer that answers with RST, which is lost
        far.write(b"anybody?\n")
        await far.drain()
        await asyncio.sleep(SHORT_S / 3)
    assert echo[0].ends == []
    await proxy.heal()
    await until(lambda: echo[0].ends == ["RST"])


async def test_a_side_that_has_closed_answers_more_bytes_with_a_reset(
    echo: tuple[Echo, str], proxy: FaultProxy, connect: Connect
) -> None:
    echo[0].closes = False
    _, writer = await connect()
    writer.close()
    await until(lambda: echo[0].ends == ["FIN"])
    far = echo[0].writers[0]
    with pytest.raises(ConnectionError):
        async with asyncio.timeout(PATIENCE_S):
            while True:
                far.write(b"more\n")
                await far.drain()
                await asyncio.sleep(0.01)


async def test_a_process_that_dies_behind_a_silent_direction_is_not_heard_of(
    proxy: FaultProxy, connect: Connect
) -> None:
    reader, writer = await connect()
    writer.write(b"1\n")
    await reader.readline()
    proxy.hold(Direction.DOWN)
    await proxy.refuse()
    assert await says_nothing(reader)
    connecting = asyncio.create_task(connect())
    await asyncio.sleep(SHORT_S)
    assert not connecting.done(), "a refusal got through"
    await proxy.heal()
    with pytest.raises(ConnectionError):
        await reader.read()
    with pytest.raises(ConnectionRefusedError):
        async with asyncio.timeout(PATIENCE_S):
            await connecting


async def test_counts_what_is_held(proxy: FaultProxy, connect: Connect) -> None:
    reader, writer = await connect()
    proxy.hold(Direction.UP)
    writer.write(b"12345678\n")
    await until(lambda: proxy.held_bytes[Direction.UP])
    await proxy.heal()
    await reader.readline()
    assert proxy.held_bytes == {Direction.UP: 9, Direction.DOWN: 0}


async def test_cuts_what_is_open_and_takes_new_connections(proxy: FaultProxy, connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(b"1\n")
    assert await reader.readline() == b"1\n"
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await reader.readline()
    reader, writer = await connect()
    writer.write(b"2\n")
    assert await reader.readline() == b"2\n"


async def test_refuses_and_accepts_again_on_the_same_port(proxy: FaultProxy, connect: Connect) -> None:
    reader, _ = await connect()
    await asyncio.sleep(0)
    address = proxy.address
    await proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await connect()
    with pytest.raises(ConnectionResetError):
        await reader.readline()
    await proxy.accept()
    assert proxy.address == address
    reader, writer = await connect()
    writer.write(b"again\n")
    assert await reader.readline() == b"again\n"


async def test_a_target_that_is_not_there_resets(proxy: FaultProxy, connect: Connect) -> None:
    proxy.target = ("127.0.0.1", 1)
    reader, _ = await connect()
    with pytest.raises(ConnectionResetError):
        await reader.readline()
