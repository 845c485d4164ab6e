"""An HTTP proxy in front of an S3 API that answers as object stores do on bad days, or lies.

Owns: which requests are hit, and what was listed before. Does not own: the network (proxy.py).
Invariants: a request reaches the store whole, once, or not at all; without a fault its answer is passed on unchanged.
No lie makes a store of it that loses what it has said to have: that is not survivable, and nobody promises it.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter, deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import NoReturn
from urllib.parse import parse_qs, urlsplit

HEAD_BYTES_MAX = 64 * 1024
LISTINGS_KEPT_S = 60.0
"""As far back as a stale listing reaches."""

CLOCK_SKEW_MAX = timedelta(minutes=15)
"""S3 refuses what is signed with a clock that is further off."""


class StoreFault(Enum):
    """What becomes of a request.

    SLOW_DOWN, ERROR, DENIED, CONFLICT (of conditional writes): HTTP 503, 500, 403 or 409, nothing is done. UNSENT:
    reset, nothing is done. LOST: done, then reset without an answer. LATE: done, answered after `seconds`. TRUNCATED:
    done, the answer ends in the middle of its body, or of its head if it has none. SHORT: half of a body, and headers
    that say so. FLIPPED: one bit of a body is another. WHOLE: the whole object instead of a range. TRICKLE: the body
    takes `seconds`. STALE: a listing as it was some time before.
    """

    SLOW_DOWN = "503"
    ERROR = "500"
    DENIED = "403"
    CONFLICT = "409"
    UNSENT = "unsent"
    LOST = "lost"
    LATE = "late"
    TRUNCATED = "truncated"
    SHORT = "short"
    FLIPPED = "flipped"
    WHOLE = "whole"
    TRICKLE = "trickle"
    STALE = "stale"


_REFUSALS = {
    StoreFault.SLOW_DOWN: ("503 Slow Down", "SlowDown"),
    StoreFault.ERROR: ("500 Internal Server Error", "InternalError"),
    StoreFault.DENIED: ("403 Forbidden", "AccessDenied"),
    StoreFault.CONFLICT: ("409 Conflict", "ConditionalRequestConflict"),
}
_SKEWED = ("403 Forbidden", "RequestTimeTooSkewed")
_OF_BODIES = (StoreFault.SHORT, StoreFault.FLIPPED, StoreFault.TRICKLE)
TRICKLE_PIECES = 20


@dataclass(frozen=True, slots=True)
class Request:
    """headers: names in lower case."""

    line: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def target(self) -> str:
        """Path and query, as they were sent."""
        return self.line.split(" ")[1]

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key == name), "")

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and "list-type" in parse_qs(urlsplit(self.target).query)

    @property
    def is_read(self) -> bool:
        """Of an object's bytes."""
        return self.method == "GET" and not self.is_listing


@dataclass(frozen=True, slots=True)
class Answer:
    """headers: names in lower case."""

    line: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def is_success(self) -> bool:
        return self.line.split(" ")[1].startswith("2")

    def with_body(self, body: bytes) -> "Answer":
        """Another body, with the length to it."""
        headers = tuple(item for item in self.headers if item[0] != "content-length")
        return replace(self, headers=(*headers, ("content-length", str(len(body)))), body=body)

    def with_header(self, name: str, value: str) -> "Answer":
        return replace(self, headers=tuple((key, value if key == name else held) for key, held in self.headers))

    @property
    def head(self) -> bytes:
        return _head(self.line, self.headers)


def applies(fault: StoreFault, request: Request) -> bool:
    """Returns True if this request can meet this fault."""
    if fault is StoreFault.CONFLICT:
        return bool(request.header("if-none-match"))
    if fault is StoreFault.WHOLE:
        return request.is_read and bool(request.header("range"))
    if fault is StoreFault.STALE:
        return request.is_listing
    return request.is_read if fault in _OF_BODIES else True


class _Ended(Exception):
    """The connection is over."""


class StoreProxy:
    """Listens on a port of its own for `target` (host:port). `start` and `stop` once each; `touched` counts requests
    that met a fault."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self.touched: Counter[StoreFault] = Counter()
        self._target = target
        self._fault: StoreFault | None = None
        self._share = 1.0
        self._seconds = 0.0
        self._rng = random.Random()
        self._listed: deque[tuple[float, str, Answer]] = deque()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=HEAD_BYTES_MAX)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- faults

    def begin(self, fault: StoreFault, *, share: float = 1.0, seconds: float = 0.0, seed: int = 0) -> None:
        """From now on `share` of the requests that can meet `fault` do. LATE and TRICKLE take `seconds`."""
        self._fault, self._share, self._seconds = fault, share, seconds
        self._rng = random.Random(seed)

    def heal(self) -> None:
        """What was begun to be answered is answered as it was."""
        self._fault = None

    def _fault_of(self, request: Request) -> StoreFault | None:
        fault = self._fault
        if fault is None or not applies(fault, request) or self._rng.random() >= self._share:
            return None
        self.touched[fault] += 1
        return fault

    # ---- connections

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a connection's callback runs in a task"
        self._tasks.add(task)
        try:
            while True:
                await self._exchange(await _read_request(reader), writer)
        except (_Ended, OSError, asyncio.IncompleteReadError):
            pass  # by either side, as a fault or not: whoever waits for an answer sees the connection end
        except asyncio.CancelledError:
            _reset(writer)  # by stop(), which waits for us
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """One request and its answer. Raises _Ended when the connection is over with it."""
        fault = self._fault_of(request)
        refusal = _SKEWED if _is_skewed(request) else _REFUSALS.get(fault) if fault else None
        answer = _refusal(*refusal) if refusal else await self._done(request, fault, writer)
        if request.method == "HEAD":
            answer = replace(answer, body=b"")
        await _send(writer, answer, self._seconds if fault is StoreFault.TRICKLE else 0.0)

    async def _done(self, request: Request, fault: StoreFault | None, writer: asyncio.StreamWriter) -> Answer:
        """What the store answers, or what is made of it. Raises _Ended where the connection ends instead."""
        if fault is StoreFault.UNSENT:
            _cut(writer)
        if fault is StoreFault.WHOLE:
            request = replace(request, headers=tuple(item for item in request.headers if item[0] != "range"))
        try:
            answer = await self._ask(request)
        except (OSError, asyncio.IncompleteReadError):  # it is away: so are we
            _cut(writer)
        if fault is StoreFault.LOST:
            _cut(writer)
        if fault is StoreFault.LATE:
            await asyncio.sleep(self._seconds)
        if fault is StoreFault.TRUNCATED:
            await _send_half(writer, answer)
            raise _Ended
        if request.is_listing:
            return self._listing(request, answer, fault)
        return self._changed(answer, fault) if answer.is_success and answer.body else answer

    def _listing(self, request: Request, answer: Answer, fault: StoreFault | None) -> Answer:
        """The answer to a listing; remembers it."""
        now = asyncio.get_running_loop().time()
        while self._listed and self._listed[0][0] < now - LISTINGS_KEPT_S:
            self._listed.popleft()
        before = [held for _, target, held in self._listed if target == request.target]
        if answer.is_success:
            self._listed.append((now, request.target, answer))
        return self._rng.choice(before) if fault is StoreFault.STALE and before else answer

    def _changed(self, answer: Answer, fault: StoreFault | None) -> Answer:
        if fault is StoreFault.FLIPPED:
            at = self._rng.randrange(len(answer.body))
            flipped = answer.body[at] ^ 1 << self._rng.randrange(8)
            return replace(answer, body=answer.body[:at] + bytes([flipped]) + answer.body[at + 1 :])
        if fault is StoreFault.SHORT:
            body = answer.body[: len(answer.body) // 2]
            return _with_range(answer, len(body)).with_body(body)
        return answer

    async def _ask(self, request: Request) -> Answer:
        """On a connection of its own, so that the store's end of it is the end of the answer."""
        host, _, port = self._target.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=HEAD_BYTES_MAX)
        try:
            headers = tuple(item for item in request.headers if item[0] not in ("connection", "content-length"))
            length = ("content-length", str(len(request.body)))
            writer.write(_head(request.line, (*headers, length, ("connection", "close"))) + request.body)
            await writer.drain()
            line, answered = await _read_head(reader)
            body = b"" if request.method == "HEAD" else await _read_answer_body(reader, dict(answered))
            kept = tuple(item for item in answered if item[0] not in ("connection", "transfer-encoding"))
            answer = Answer(line, kept, body)
            return answer if request.method == "HEAD" else answer.with_body(body)
        finally:
            writer.close()


# ---- HTTP/1.1, as far as S3 clients and servers use it


def _head(line: str, headers: tuple[tuple[str, str], ...]) -> bytes:
    return "\r\n".join([line, *(f"{name}: {value}" for name, value in headers), "", ""]).encode("latin-1")


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, tuple[tuple[str, str], ...]]:
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *fields = text.removesuffix("\r\n\r\n").split("\r\n")
    pairs = (field.partition(":") for field in fields)
    return line, tuple((name.strip().lower(), value.strip()) for name, _, value in pairs)


async def _read_request(reader: asyncio.StreamReader) -> Request:
    line, headers = await _read_head(reader)
    found = dict(headers)
    assert "transfer-encoding" not in found and "expect" not in found, f"not understood: {line} {found}"
    return Request(line, headers, await reader.readexactly(int(found.get("content-length", 0))))


async def _read_answer_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") == "chunked":
        return await _read_chunks(reader)
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read()


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    chunks = []
    while size_bytes := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        chunks.append(await reader.readexactly(size_bytes))
        await reader.readexactly(2)
    return b"".join(chunks)


def _refusal(status: str, code: str) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    return Answer(f"HTTP/1.1 {status}", (("content-type", "application/xml"),), b"").with_body(body)


def _with_range(answer: Answer, size_bytes: int) -> Answer:
    """`Content-Range: bytes FIRST-LAST/SIZE` of an answer that has only `size_bytes`."""
    held = dict(answer.headers).get("content-range", "")
    if not held:
        return answer
    span, _, whole = held.removeprefix("bytes ").partition("/")
    first = int(span.partition("-")[0])
    return answer.with_header("content-range", f"bytes {first}-{first + size_bytes - 1}/{whole}")


def _is_skewed(request: Request) -> bool:
    """True if a request was signed by a clock that S3 does not accept."""
    with contextlib.suppress(ValueError):
        signed = datetime.strptime(request.header("x-amz-date"), "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return abs(datetime.now(UTC) - signed) > CLOCK_SKEW_MAX
    return False


async def _send(writer: asyncio.StreamWriter, answer: Answer, seconds: float = 0.0) -> None:
    """The head at once, the body within `seconds`."""
    writer.write(answer.head)
    if not seconds:
        writer.write(answer.body)
    else:
        step = -(-len(answer.body) // TRICKLE_PIECES)
        for at in range(0, len(answer.body), step or 1):
            await writer.drain()
            await asyncio.sleep(seconds / TRICKLE_PIECES)
            writer.write(answer.body[at : at + step])
    await writer.drain()


async def _send_half(writer: asyncio.StreamWriter, answer: Answer) -> None:
    """Half of the body; of the head, if there is no body."""
    writer.write(
        answer.head + answer.body[: len(answer.body) // 2] if answer.body else answer.head[: len(answer.head) // 2]
    )
    await writer.drain()


def _cut(writer: asyncio.StreamWriter) -> NoReturn:
    _reset(writer)
    raise _Ended


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
