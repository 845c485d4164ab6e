"""A TCP proxy between two parts, and what a network does to them: delay, silence, cuts, refusals; one way too.

Owns: the listening socket, the connections through it, and their faults. Does not own: what the bytes say
(store_proxy.py, postgres_proxy.py).
Invariants: bytes of one direction arrive in order, and none is taken out of the middle of a stream. The end of a
stream, orderly (FIN) or not (RST), arrives behind its bytes, and like them not while the direction is silent; after the
heal they arrive, as TCP's retransmission would have it. A connection that is opened while either direction is silent is
established after the heal, not before: neither a SYN nor the answer to it gets through.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from enum import Enum
from itertools import count
from typing import Protocol

from tests.integration.processes import bound_socket

CHUNK_BYTES = 64 * 1024
HELD_BYTES_MAX = 8 * 1024 * 1024
"""A held direction stops reading beyond this: then the sender's own buffers fill, as on a real network."""

BACKLOG = 100


class Direction(Enum):
    """UP: from whoever connects to the target; DOWN: back."""

    UP = "up"
    DOWN = "down"


BOTH = (Direction.UP, Direction.DOWN)


class End(Enum):
    """How a stream ends."""

    ORDERLY = "FIN"
    RESET = "RST"


class Refused(Exception):
    """The connection is over: `answer` is the last that its client hears."""

    def __init__(self, answer: bytes) -> None:
        super().__init__("the server refuses the connection")
        self.answer = answer


class Session(Protocol):
    """One connection as its server sees it: may answer in the server's place. Sees all bytes, in any pieces."""

    def up(self, data: bytes) -> tuple[bytes, bytes]:
        """Returns (what goes on to the server, what the client is answered). Raises Refused."""

    def down(self, data: bytes) -> None: ...


class _Flow:
    """One direction of a connection: from `reader`'s side to `writer`'s. Reads ahead of what it delivers, so that a
    delay costs no throughput."""

    def __init__(
        self, proxy: "FaultProxy", way: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self.way = way
        self._reader = reader
        self._writer = writer
        self._queue: asyncio.Queue[tuple[float, bytes | End]] = asyncio.Queue(HELD_BYTES_MAX // CHUNK_BYTES)
        self._is_receiver_gone = False

    async def put(self, item: bytes | End) -> None:
        await self._queue.put((asyncio.get_running_loop().time(), item))

    async def receive(self) -> None:
        """Takes what the sender sends, and how it ends."""
        end = End.ORDERLY
        try:
            while data := await self._reader.read(CHUNK_BYTES):
                await self.put(data)
        except OSError:
            end = End.RESET
        await self.put(end)

    async def next(self) -> bytes | End:
        """Returns the next item once it is due and the direction passes it."""
        received_at, item = await self._queue.get()
        await asyncio.sleep(received_at + self._proxy.delay_ms[self.way] / 1000 - asyncio.get_running_loop().time())
        if not self._proxy.is_open(self.way):
            self._proxy.held_bytes[self.way] += len(item) if isinstance(item, bytes) else 0
            await self._proxy.passes(self.way)
        return item

    async def hand_over(self, data: bytes) -> None:
        """Writes to the receiver. Raises ConnectionResetError the first time that it is gone; later data is dropped."""
        if self._is_receiver_gone:
            return
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            self._is_receiver_gone = True
            raise ConnectionResetError("the receiver is gone") from error
        self._proxy.passed_bytes[self.way] += len(data)

    def end(self) -> None:
        """Tells the receiver that nothing follows."""
        if self._writer.can_write_eof():
            self._writer.write_eof()


class _Pipe:
    """One connection. Over when both sides were told that the other has ended, or one that it was reset."""

    def __init__(self, proxy: "FaultProxy", near: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self.proxy = proxy
        self.near_reader, self.near_writer = near
        self.far_writer: asyncio.StreamWriter | None = None
        self._ended_ways = 0

    async def run(self) -> None:
        try:
            await self.proxy.passes(Direction.UP)
            far_reader, self.far_writer = await asyncio.open_connection(*self.proxy.target)
        except OSError:
            self.reset()
            return
        up = _Flow(self.proxy, Direction.UP, self.near_reader, self.far_writer)
        down = _Flow(self.proxy, Direction.DOWN, far_reader, self.near_writer)
        session = self.proxy.session() if self.proxy.session is not None else None
        delivering = (self._deliver(up, down, session), self._deliver(down, up, session))
        tasks = [asyncio.create_task(part) for part in (up.receive(), down.receive(), *delivering)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(isinstance(task.exception(), ConnectionResetError) for task in done):
                self.reset()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.close()

    async def _deliver(self, flow: _Flow, back: _Flow, session: Session | None) -> None:
        """Raises ConnectionResetError when the connection is to be reset, EOFError when it is over."""
        while True:
            item = await flow.next()
            if item is End.RESET:
                raise ConnectionResetError("by the sender")
            if item is End.ORDERLY:
                flow.end()
                self._ended_ways += 1
                if self._ended_ways == len(BOTH):
                    raise EOFError("both sides have ended")
                continue
            assert isinstance(item, bytes)
            data = await self._through(session, flow.way, item) if session is not None else item
            try:
                await flow.hand_over(data)
            except ConnectionResetError:
                await back.put(End.RESET)  # the receiver's own RST travels back as everything does

    async def _through(self, session: Session, way: Direction, data: bytes) -> bytes:
        """What goes on of `data`. Raises EOFError where the server's answer would be the end."""
        if way is Direction.DOWN:
            session.down(data)
            return data
        try:
            onward, answer = session.up(data)
        except Refused as refusal:
            self.near_writer.write(refusal.answer)
            await self.near_writer.drain()
            raise EOFError("refused") from refusal
        self.near_writer.write(answer)
        return onward

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


class _Listening(Enum):
    """OPEN: connections are taken. DEAF: a SYN gets no answer, and is repeated by its sender until the heal. CLOSED:
    connections are refused."""

    OPEN = "open"
    DEAF = "deaf"
    CLOSED = "closed"


class FaultProxy:
    """Listens on a port of its own for `target` (host:port). All faults may change while connections are open.

    `start` and `stop` once each; `address` is known from the start on and stays the same.
    """

    def __init__(self, name: str, target: str, session: Callable[[], Session] | None = None) -> None:
        """`session` makes what looks into each connection; None: nobody does."""
        host, _, port = target.rpartition(":")
        self.session = session
        self.name = name
        self.target = (host, int(port))
        self.address = ""
        self.delay_ms = dict.fromkeys(BOTH, 0)
        self.passed_bytes = dict.fromkeys(BOTH, 0)
        self.held_bytes = dict.fromkeys(BOTH, 0)
        self._open = {way: asyncio.Event() for way in BOTH}
        self._is_refusing = False
        self._listening = _Listening.CLOSED
        self._port: socket.socket | None = None
        self._socket: socket.socket | None = None
        self._plug: socket.socket | None = None
        self._plugged_by: tuple[str, int] | None = None
        self._pipes: dict[int, tuple[_Pipe | None, asyncio.Task[None]]] = {}
        self._numbers = count()
        for event in self._open.values():
            event.set()

    async def start(self) -> None:
        self._port = bound_socket(("127.0.0.1", 0))  # stays ours while nothing listens there
        host, port = self._port.getsockname()
        self.address = f"{host}:{port}"
        self._listen()

    async def stop(self) -> None:
        self._turn(_Listening.CLOSED)
        if self._port is not None:
            self._port.close()
            self._port = None
        await asyncio.gather(*(task for _, task in self._pipes.values()), return_exceptions=True)

    # ---- connections

    def _listen(self) -> None:
        """Makes the socket do what the faults say."""
        if not all(event.is_set() for event in self._open.values()):
            self._turn(_Listening.DEAF)
        else:
            self._turn(_Listening.CLOSED if self._is_refusing else _Listening.OPEN)

    def _turn(self, how: _Listening) -> None:
        if self._port is None or how is self._listening:
            return
        loop = asyncio.get_running_loop()
        if self._plug is not None:
            self._plug.close()
            self._plug = None
        if self._socket is None:
            self._socket = bound_socket(self._port.getsockname())
        loop.remove_reader(self._socket)
        if how is _Listening.OPEN:
            self._socket.listen(BACKLOG)
            loop.add_reader(self._socket, self._accept)
        elif how is _Listening.DEAF:
            # A full queue of connections that nobody accepts: Linux drops the SYN of the next one. One fills it.
            self._socket.listen(0)
            self._plug = socket.socket()
            self._plug.setblocking(False)
            self._plug.connect_ex(self._socket.getsockname())
            self._plugged_by = self._plug.getsockname()
        else:
            self._socket.close()
            self._socket = None
            self.cut()
        self._listening = how

    def _accept(self) -> None:
        assert self._socket is not None, "only an open socket has a reader"
        try:
            near, peer = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # reset before it was taken
        if peer == self._plugged_by:
            near.close()
            return
        near.setblocking(False)
        number = next(self._numbers)
        self._pipes[number] = (None, asyncio.create_task(self._carry(number, near), name=f"{self.name} {number}"))

    async def _carry(self, number: int, near: socket.socket) -> None:
        try:
            streams = await asyncio.open_connection(sock=near)
        except BaseException:
            near.close()
            del self._pipes[number]
            raise
        pipe = _Pipe(self, streams)
        self._pipes[number] = (pipe, self._pipes[number][1])
        try:
            await pipe.run()
        except asyncio.CancelledError:
            pipe.reset()
            raise
        finally:
            pipe.close()
            del self._pipes[number]

    # ---- faults

    def is_open(self, way: Direction) -> bool:
        return self._open[way].is_set()

    async def passes(self, way: Direction) -> None:
        """Returns once bytes may go this way."""
        await self._open[way].wait()

    def hold(self, *ways: Direction) -> None:
        """Silence: what goes this way arrives after `heal`; connections stay open, new ones get no answer."""
        for way in ways:
            self._open[way].clear()
        self._listen()

    def delay(self, way: Direction, ms: int) -> None:
        self.delay_ms[way] = ms

    def cut(self) -> None:
        """Resets every connection there is; new ones are fine."""
        for pipe, task in list(self._pipes.values()):
            if pipe is not None:
                pipe.reset()
            task.cancel()

    async def refuse(self) -> None:
        """As if the process were not there: connections are reset, new ones refused. Behind a silent direction that is
        not heard of before the heal."""
        self._is_refusing = True
        self._listen()

    async def accept(self) -> None:
        """Ends `refuse`."""
        self._is_refusing = False
        self._listen()

    async def heal(self) -> None:
        """Ends what the network does. `refuse` goes on: a process that is not there does not come back by it."""
        for event in self._open.values():
            event.set()
        self.delay_ms = dict.fromkeys(BOTH, 0)
        self._listen()
