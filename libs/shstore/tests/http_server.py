"""HTTP servers of a test's own: they answer as told, or stand between a client and a real S3 server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answering(reply: bytes) -> Answer:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)

    return answer


def forwarding(target: str, marker: bytes, on_marker: Callable[[], Awaitable[None]]) -> Answer:
    """Pass each request on; one whose first line contains `marker` is cut after `on_marker()`."""

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        if marker in first_line(request):
            await on_marker()
            return
        writer.write(await forwarded(target, request))

    return answer


class Wire:
    """Passes requests on to `target`, and loses what comes back where it is told to.

    `lost`, `cut`: of a request whose first line contains one of these, once each, nothing of the reply arrives, or its
    head and half of its body. `requests`: the first lines of all there were, `heads` with the headers.
    """

    def __init__(self, target: str) -> None:
        self.lost: list[bytes] = []
        self.cut: list[bytes] = []
        self.requests: list[bytes] = []
        self.heads: list[bytes] = []
        self._target = target

    async def answer(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        self.requests.append(first_line(request))
        self.heads.append(request.partition(b"\r\n\r\n")[0].lower())
        reply = await forwarded(self._target, request)  # whatever becomes of the reply, the request took effect
        if self._due(self.lost, request):
            return
        if self._due(self.cut, request):
            head, separator, body = reply.partition(b"\r\n\r\n")
            assert len(body) > 1, "there is nothing to cut"
            reply = head + separator + body[: len(body) // 2]
        writer.write(reply)

    def count(self, marker: bytes) -> int:
        return sum(marker in line for line in self.requests)

    def _due(self, markers: list[bytes], request: bytes) -> bool:
        for marker in markers:
            if marker in first_line(request):
                markers.remove(marker)
                return True
        return False


def first_line(request: bytes) -> bytes:
    return request.split(b"\r\n", 1)[0]


async def forwarded(target: str, request: bytes) -> bytes:
    """The whole reply of the server at `target`."""
    host, port = target.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if headers.get(b"expect") == b"100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return head + await reader.readexactly(int(headers.get(b"content-length", b"0")))


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """An HTTP server on a free port that gives each connection's one request to `answer`, then hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(await read_request(reader, writer), writer)

    async with listening(serve) as endpoint:
        yield endpoint


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[str]:
    """A server on a free port that gives each connection to `serve`, then hangs up."""
    connections: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        connections.add(task)
        try:
            await serve(reader, writer)
        except (asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
            return  # the test is over, or the client hung up first
        finally:
            connections.discard(task)
            writer.close()

    socket = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1 << 20)
    try:
        yield f"http://127.0.0.1:{socket.sockets[0].getsockname()[1]}"
    finally:
        socket.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
