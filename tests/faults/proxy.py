"""A TCP proxy between two parts, and what a network does to them: delay, silence, cuts, refusals; one way too.

What a held direction receives is delivered after the heal, as TCP's retransmission would: bytes are never taken out
of the middle of a stream. `Answers` are faults of the HTTP server behind it (the object store's).
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Coroutine
from enum import Enum
from itertools import count

Queue = asyncio.Queue[tuple[float, bytes]]
"""What was received, and when."""

CHUNK_BYTES = 64 * 1024
HELD_BYTES_MAX = 8 * 1024 * 1024
"""A held direction stops reading beyond this: then the sender's own buffers fill, as on a real network."""

CONNECT_RETRY_S = 0.05
DRAIN_S = 0.2
"""After an early answer the rest of the request is read for so long; closing at once would destroy the answer."""


class Direction(Enum):
    """UP: from whoever connects to the target; DOWN: back."""

    UP = "up"
    DOWN = "down"


BOTH = (Direction.UP, Direction.DOWN)


class Answers(Enum):
    """What becomes of answers. SLOW_DOWN, ERROR, CONFLICT, DENIED: requests get HTTP 503, 500, 409 or 403 and never
    arrive. LOST: requests arrive, the connection is reset when the answer comes. TRUNCATED: it is reset in the middle
    of the answer's body, or of its head if it has no body."""

    NORMAL = "normal"
    SLOW_DOWN = "503"
    ERROR = "500"
    CONFLICT = "409"
    DENIED = "403"
    LOST = "lost"
    TRUNCATED = "truncated"


_CODES = {
    Answers.SLOW_DOWN: ("503 Slow Down", "SlowDown"),
    Answers.ERROR: ("500 Internal Server Error", "InternalError"),
    Answers.CONFLICT: ("409 Conflict", "ConditionalRequestConflict"),
    Answers.DENIED: ("403 Forbidden", "AccessDenied"),
}


def _half(answer: bytes) -> bytes:
    head, separator, body = answer.partition(b"\r\n\r\n")
    if b"content-length: 0" in head.lower().split(b"\r\n"):
        return head[: len(head) // 2]
    return head + separator + body[: len(body) // 2]


class _Pipe:
    """One connection, both ways. Ends with either side."""

    def __init__(self, proxy: "FaultProxy", near: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self.proxy = proxy
        self.near_reader, self.near_writer = near
        self.far_writer: asyncio.StreamWriter | None = None

    async def run(self) -> None:
        try:
            await self.proxy.passes(Direction.UP)  # a SYN does not get through a partition either
            target = await asyncio.open_connection(*self.proxy.target)
        except OSError:
            self.reset()
            return
        far_reader, self.far_writer = target
        work = [
            *self._way(self.near_reader, self.far_writer, Direction.UP),
            *self._way(far_reader, self.near_writer, Direction.DOWN),
        ]
        tasks = [asyncio.create_task(part) for part in work]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.close()

    def _way(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction
    ) -> tuple[Coroutine[None, None, None], Coroutine[None, None, None]]:
        """Reads ahead of what it sends, so that a delay costs no throughput."""
        queue: Queue = asyncio.Queue(HELD_BYTES_MAX // CHUNK_BYTES)
        return self._receive(reader, queue), self._send(queue, writer, way)

    async def _receive(self, reader: asyncio.StreamReader, queue: Queue) -> None:
        """Until the end of the stream, which goes into the queue as an empty chunk."""
        data = b"-"
        while data:
            data = await reader.read(CHUNK_BYTES)
            await queue.put((asyncio.get_running_loop().time(), data))

    async def _send(self, queue: Queue, writer: asyncio.StreamWriter, way: Direction) -> None:
        loop = asyncio.get_running_loop()
        while True:
            received_at, data = await queue.get()
            if not data:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            await asyncio.sleep(received_at + self.proxy.delay_ms[way] / 1000 - loop.time())
            await self.proxy.passes(way)
            if way is Direction.UP and self.proxy.answers in _CODES:
                await self._answer(*_CODES[self.proxy.answers])
            if way is Direction.DOWN:
                data = self._spoil(data, writer)
            writer.write(data)
            await writer.drain()
            self.proxy.passed_bytes[way] += len(data)

    async def _answer(self, status: str, code: str) -> None:
        """An answer of our own to the request that begins; then the connection ends."""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        self.near_writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        await self.near_writer.drain()
        await asyncio.sleep(DRAIN_S)
        raise ConnectionResetError("answered by the proxy")

    def _spoil(self, data: bytes, writer: asyncio.StreamWriter) -> bytes:
        """Raises ConnectionResetError where the fault ends the connection."""
        if self.proxy.answers is Answers.LOST:
            heads = data.split(b"\r\n\r\n")
            if heads.pop() == b"" and all(head.startswith(b"HTTP/1.1 100 ") for head in heads):
                return data  # the client sends its body only when it is told to continue
            self.reset()
            raise ConnectionResetError("the answer is lost")
        if self.proxy.answers is Answers.TRUNCATED:
            writer.write(_half(data))
            raise ConnectionResetError("the answer is truncated")
        return data

    def reset(self) -> None:
        """RST to both sides: what is under way is lost."""
        for writer in (self.near_writer, self.far_writer):
            if writer is not None:
                raw = writer.get_extra_info("socket")
                if raw is not None:
                    with contextlib.suppress(OSError):
                        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

    def close(self) -> None:
        for writer in (self.near_writer, self.far_writer):
            if writer is not None:
                writer.close()


class FaultProxy:
    """Listens on a port of its own for `target` (host:port). All faults may change while connections are open.

    `start` and `stop` once each; `address` is known from the start on and stays the same.
    """

    def __init__(self, name: str, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.name = name
        self.target = (host, int(port))
        self.address = ""
        self.delay_ms = dict.fromkeys(BOTH, 0)
        self.passed_bytes = dict.fromkeys(BOTH, 0)
        self.answers = Answers.NORMAL
        self._open = {way: asyncio.Event() for way in BOTH}
        self._server: asyncio.Server | None = None
        self._pipes: dict[int, tuple[_Pipe, asyncio.Task[None]]] = {}
        self._numbers = count()
        for event in self._open.values():
            event.set()

    async def start(self) -> None:
        await self._listen(0)

    async def _listen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        name = self._server.sockets[0].getsockname()
        self.address = f"{name[0]}:{name[1]}"

    async def stop(self) -> None:
        await self.refuse()
        for _, task in list(self._pipes.values()):
            task.cancel()
        await asyncio.gather(*(task for _, task in self._pipes.values()), return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(self._numbers)
        task = asyncio.current_task()
        assert task is not None
        pipe = _Pipe(self, (reader, writer))
        self._pipes[number] = (pipe, task)
        try:
            await pipe.run()
        except asyncio.CancelledError:
            pipe.reset()  # by stop(), which waits for us; asyncio's own callback would complain of the cancellation
        finally:
            pipe.close()
            del self._pipes[number]

    # ---- faults

    async def passes(self, way: Direction) -> None:
        """Returns once bytes may go this way."""
        await self._open[way].wait()

    def hold(self, *ways: Direction) -> None:
        """Silence: bytes that go this way arrive after `heal`; connections stay open."""
        for way in ways:
            self._open[way].clear()

    def delay(self, way: Direction, ms: int) -> None:
        self.delay_ms[way] = ms

    def cut(self) -> None:
        """Resets every connection there is; new ones are fine."""
        for pipe, task in list(self._pipes.values()):
            pipe.reset()
            task.cancel()

    async def refuse(self) -> None:
        """As if the process were not there: connections are reset, new ones refused."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self.cut()

    async def accept(self) -> None:
        """Ends `refuse`."""
        if self._server is None:
            await self._listen(int(self.address.rpartition(":")[2]))

    async def heal(self) -> None:
        """Ends everything."""
        for event in self._open.values():
            event.set()
        self.delay_ms = dict.fromkeys(BOTH, 0)
        self.answers = Answers.NORMAL
        await self.accept()
