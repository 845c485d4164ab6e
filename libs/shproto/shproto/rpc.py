"""Carries service APIs over gRPC: errors, streams, fail-over between replicas. Knows no service.

A service's API is a plain object with one async method per RPC (shproto.services has the Protocols). `serve_api`
puts such an object on a gRPC server; `Connection` lets the generated clients call such a server. Errors arrive as the
StreamHouseError that was raised on the other side.

Owns: channels, the order of addresses and the races between them; the counts of running calls and streams. Does not
own: the services, the server, the limits' values.
Invariants: a call is tried at most once at each address. A closed connection makes no channel again. A call is counted
for its connection until the call ends, and a connection without calls is forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from shproto import forks
from shproto.addresses import AddressOrder
from shproto.errors import Internal, InvalidArgument, Overloaded, ShuttingDown, StreamHouseError, Unavailable
from shproto.limits import MESSAGE_BYTES_MAX
from shproto.v1 import types_pb2

log = logging.getLogger(__name__)

ERROR_METADATA_KEY = "streamhouse-error-bin"
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # A replica that comes back is tried again within a second, not after gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Also how long one attempt may take: a busy machine needs more than the round trip.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A peer that vanished without closing (power, network, a process that hangs) is noticed in about 15 s. The second
    # limit alone does it: gRPC waits a minute for the answer to a ping, whatever keepalive_timeout_ms says.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Two services on one port by accident is an error, not a coin toss.
    ("grpc.so_reuseport", 0),
)

ResponseT = TypeVar("ResponseT", bound=Message)


class Interceptors(Protocol):
    """Interceptors that telemetry adds to a channel; absent when telemetry is off."""

    def client(self) -> Sequence[grpc.aio.ClientInterceptor]: ...


# ---- the serving side

_caller_gives_up_at: ContextVar[float | None] = ContextVar("caller_gives_up_at", default=None)


def time_left_ms() -> float | None:
    """Returns the ms until the deadline of the unary RPC that is being served; None if the caller sets no deadline, or
    is in this process."""
    at = _caller_gives_up_at.get()
    return None if at is None else max(0.0, (at - asyncio.get_running_loop().time()) * 1000)


_caller_connection: ContextVar[str] = ContextVar("caller_connection", default="")


def caller_connection() -> str:
    """Returns the name of the connection over which the RPC being served came; empty if the caller is in this
    process."""
    return _caller_connection.get()


# Wait of refused callers: spread out, so that a crowd does not come back at the same time.
RETRY_AFTER_MS_MIN, RETRY_AFTER_MS_MAX = 200, 1_000


class CallLimit:
    """Limit of the calls of a kind that a server works on at the same time, in total and for each connection. `limit`,
    `connection_limit`: the settings that Overloaded names."""

    def __init__(self, limit: str, calls_max: int, connection_limit: str, per_connection_max: int) -> None:
        self._limit = limit
        self._calls_max = calls_max
        self._connection_limit = connection_limit
        self._per_connection_max = per_connection_max
        self._of: Counter[str] = Counter()
        self.in_flight = 0
        self.refused = 0

    @contextmanager
    def call(self, connection: str) -> Iterator[None]:
        """Counts a call while the body runs. Raises Overloaded beyond a limit."""
        if self.in_flight >= self._calls_max:
            raise self._refusal(self._limit, self._calls_max)
        if self._of[connection] >= self._per_connection_max:
            raise self._refusal(self._connection_limit, self._per_connection_max)
        self.in_flight += 1
        self._of[connection] += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self._of[connection] -= 1
            # Peers have a new name with each connection: kept, they would add up for as long as the server runs.
            if not self._of[connection]:
                del self._of[connection]

    def _refusal(self, limit: str, value: int) -> Overloaded:
        self.refused += 1
        return Overloaded(
            f"this server is at its limit: {limit} = {value}",
            retry_after_ms=random.randint(RETRY_AFTER_MS_MIN, RETRY_AFTER_MS_MAX),
            limit=limit,
            value=value,
        )


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits of a server, shared by its services. Streams have a limit of their own, because they stay open: a client
    that has a stream, and needs a call to go on with it, must not wait for other clients to close their streams."""

    calls: CallLimit
    streams: CallLimit


def serve_api(server: grpc.aio.Server, service: ServiceDescriptor, api: object, limits: CallLimits) -> None:
    """Adds `api` to `server` under the service's full name; every RPC of the service must be a method of `api`."""
    handlers = {
        method.name: _handler(method, getattr(api, _snake_case(method.name)), limits) for method in service.methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _snake_case(name: str) -> str:
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")


def _handler(method: MethodDescriptor, call: Callable[..., Any], limits: CallLimits) -> grpc.RpcMethodHandler[Any, Any]:
    codecs = {
        "request_deserializer": GetMessageClass(method.input_type).FromString,
        "response_serializer": GetMessageClass(method.output_type).SerializeToString,
    }
    if method.server_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler if method.client_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(_streaming(call, limits.streams), **codecs)  # type: ignore[arg-type]
    return grpc.unary_unary_rpc_method_handler(_unary(call, limits.calls), **codecs)  # type: ignore[arg-type]


def _unary(call: Callable[[Any], Any], limit: CallLimit) -> Callable[[Any, Any], Any]:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if (left_s := context.time_remaining()) is not None:
            _caller_gives_up_at.set(asyncio.get_running_loop().time() + left_s)
        connection = context.peer()
        _caller_connection.set(connection)
        try:
            with limit.call(connection):
                return await call(request)
        except StreamHouseError as error:
            await _abort(context, error)
        except Exception as error:  # noqa: BLE001 - the boundary: a defect must not leak as UNKNOWN without a log
            await _abort(context, _defect(error))

    return handle


def _streaming(call: Callable[[Any], AsyncIterator[Any]], limit: CallLimit) -> Callable[[Any, Any], Any]:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        connection = context.peer()
        _caller_connection.set(connection)
        try:
            with limit.call(connection):
                async for response in call(request):
                    yield response
        except StreamHouseError as error:
            await _abort(context, error)
        except Exception as error:  # noqa: BLE001 - the boundary, as above
            await _abort(context, _defect(error))

    return handle


def _defect(error: Exception) -> StreamHouseError:
    log.exception("a call failed with a defect")
    return Internal(f"internal error: {type(error).__name__}: {error}")


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: StreamHouseError) -> None:
    metadata = ((ERROR_METADATA_KEY, error.to_detail().SerializeToString()),)
    await context.abort(error.status, error.message, trailing_metadata=metadata)


# ---- the calling side

# Time that an address has to itself before the next is tried beside it, as RFC 8305 recommends. A connection takes
# milliseconds; an address at which no server answers takes gRPC's 5 s to fail.
HEAD_START_MS = 250

ADVERTISED_HINT = "; the service advertises this address: if it cannot be reached there, set its STREAMHOUSE_ADVERTISE"

# gRPC's messages for a call that was never sent, because there was no connection; the group is the cause.
_NO_CONNECTION = (
    re.compile(
        r"failed to connect to all addresses; last error: [A-Z_]+: (?:\S+: )?(?:Failed to connect to .*?: )?(.+)"
    ),
    re.compile(r"errors resolving .*: (.+?)\]?"),
    re.compile(r"DNS resolution failed .*?: (.+)"),
)
# gRPC's messages for the first bytes of a server with another protocol.
_OTHER_PROTOCOL = re.compile(r"Expected SETTINGS frame|http1\.x server")
# Our services send an ErrorDetail with every refusal; such a status without it is of another server, or of a proxy.
_OTHER_SERVER = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
)
# grpc.aio's details of a stream that the server ended while a request was being sent; the server's own status is lost
# then (`_StreamRequestMixin._write` of grpcio sets this one in its place).
_ENDED_WHILE_SENDING = "Internal error from Core"


def _service_error(error: grpc.aio.AioRpcError) -> StreamHouseError | None:
    """Returns the error that the service raised; None if the status is the transport's own, or another server's."""
    metadata: Any = error.trailing_metadata() or ()
    detail = next((value for key, value in metadata if key == ERROR_METADATA_KEY), None)
    return None if detail is None else StreamHouseError.from_detail(types_pb2.ErrorDetail.FromString(detail))


def _transport_error(error: grpc.aio.AioRpcError, address: str, path: str, hint: str) -> StreamHouseError:
    """Returns the error for a status without a service's error. The error names the address, and gives `hint` if there
    was no connection."""
    code, details = error.code(), error.details() or ""
    text = f"{address}: {code.name}: {details}"
    if code in _OTHER_SERVER:
        return _foreign(
            f"{address} is another server, or of another version: {code.name} for {path}: {details}", address
        )
    if code is grpc.StatusCode.UNAVAILABLE and (cause := _connect_failure(details)):
        if _OTHER_PROTOCOL.search(cause):
            return _foreign(f"{address} is no gRPC server: {cause}", address)
        return _unreachable(address, cause, hint)
    if code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,  # of a stream that gRPC removed, and of a server with a defect
    ):
        return Unavailable(text, address=address)
    if code is grpc.StatusCode.INTERNAL and details == _ENDED_WHILE_SENDING:
        return Unavailable(f"{address}: ended the stream while a request was sent", address=address)
    if code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT):
        return InvalidArgument(text)
    return Internal(text)


def _connect_failure(details: str) -> str | None:
    """Returns why there was no connection; None if there was one."""
    matches = (pattern.fullmatch(details) for pattern in _NO_CONNECTION)
    return next((match[1] for match in matches if match), None)


def _foreign(text: str, address: str) -> Unavailable:
    error = Unavailable(text, address=address)
    error.maybe_done, error.permanent = False, True
    return error


def _unreachable(address: str, cause: str, hint: str) -> Unavailable:
    error = Unavailable(f"cannot connect to {address}: {cause}{hint}", address=address)
    error.maybe_done = False
    return error


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def closed_error() -> Unavailable:
    """Returns the error of a call of which the client was closed meanwhile."""
    error = Unavailable("the connection is closed")
    error.permanent = True
    return error


def being_cancelled() -> bool:
    """Returns True if the current task is being cancelled, so that a CancelledError is meant for the task, not the
    call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Endpoint:
    """An address and its channel, made on first use. As a context manager, counts a use of the channel."""

    def __init__(self, address: str, interceptors: Interceptors | None) -> None:
        self.address = address
        self._interceptors = interceptors
        self._channel: grpc.aio.Channel | None = None
        self._uses = 0
        self.closed = False
        self.was_reached = False

    def __enter__(self) -> grpc.aio.Channel:
        """Returns the channel. Raises Unavailable once closed, since a channel made then would never be closed, and
        RuntimeError in a child that was forked after gRPC was used."""
        forks.check()
        if self.closed:
            error = closed_error()
            error.maybe_done = False
            raise error
        if self._channel is None:
            interceptors = list(self._interceptors.client()) if self._interceptors else None
            self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS, interceptors=interceptors)
            forks.note(self._channel)
            _silence_poller(asyncio.get_running_loop())
        self._uses += 1
        return self._channel

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._uses -= 1
        # gRPC raises CancelledError for calls ended by closing the channel: their tasks are not cancelled, and must not
        # look so.
        if isinstance(error, asyncio.CancelledError) and self.closed and not being_cancelled():
            raise closed_error() from error

    @property
    def is_connected(self) -> bool:
        """True if a call can be sent at once. Raises RuntimeError in a forked child."""
        forks.check()
        return self._channel is not None and self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def connected(self) -> bool:
        """Returns True once connected, False once connecting has failed: gRPC goes on trying, for the next call."""
        with self as channel:
            while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                    return False
                await channel.wait_for_state_change(state)
            self.was_reached = True
            return True

    async def failure(self) -> str:
        """Returns why there is no connection; empty if there is a connection by now. Makes a call: gRPC tells the cause
        only as the error of a call."""
        with self as channel:
            try:
                check = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
                await check(b"", timeout=1)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    details = error.details() or ""
                    return _connect_failure(details) or details
            return ""

    async def close_unused(self) -> None:
        """Closes the channel unless a call uses it, so that gRPC does not go on connecting to an address that was
        left."""
        if self._uses == 0:
            await self._close_channel()

    async def close(self) -> None:
        """Closes the channel for good; cancels calls that still run on it. Raises RuntimeError in a forked child."""
        self.closed = True
        await self._close_channel()

    async def _close_channel(self) -> None:
        if self._channel is not None:
            forks.check()
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(grace=None)


class Caller(Protocol):
    """Interface of the generated clients to a `Connection`, or to a stand-in."""

    async def unary(self, path: str, request: Message, response_type: type[ResponseT]) -> ResponseT: ...
    def unary_stream(self, path: str, request: Message, response_type: type[ResponseT]) -> AsyncIterator[ResponseT]: ...
    def stream_stream(
        self, path: str, requests: AsyncIterator[Message], response_type: type[ResponseT]
    ) -> AsyncIterator[ResponseT]: ...
    async def close(self) -> None: ...


class _Failure(NamedTuple):
    """Error of a call at one address."""

    error: StreamHouseError
    by_service: bool


def _silence_poller(loop: asyncio.AbstractEventLoop) -> None:
    """Keeps meaningless tracebacks out of the log, unless the loop has an exception handler. All event loops of a
    process share gRPC's poller: each loop is woken for every event, and finds that another loop was faster, or that the
    event is of a loop that is closed by now."""
    if loop.get_exception_handler() is None:
        loop.set_exception_handler(_on_loop_exception)


def _on_loop_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    too_late = isinstance(error, BlockingIOError) or (isinstance(error, RuntimeError) and "is closed" in str(error))
    if not too_late or "PollerCompletionQueue._handle_events" not in context.get("message", ""):
        loop.default_exception_handler(context)


class Connection:
    """Calls a service at several addresses; goes to the next address when an address does not answer.

    Addresses are connected side by side, each HEAD_START_MS after the address before, and the first to be connected is
    kept. The address at position `first` is tried first, by default a random one: clients with the same list spread
    over the list. A unary call, and a stream without an answer so far, is tried once at every address before
    Unavailable is raised with the messages of all: all StreamHouse calls may be repeated. An answer of another server
    counts as none.
    `timeout_ms` is the deadline of a unary call at an address, on top of the wait that the request itself asks for.
    `advertised`: the addresses come from services, not from the user; errors say so of addresses that were never
    reached. An address that was reached is right: the service there is away, as in a restart.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        timeout_ms: int = 10_000,
        interceptors: Interceptors | None = None,
        advertised: bool = False,
        first: int | None = None,
    ) -> None:
        if not addresses:
            raise ValueError("no addresses to connect to")
        self.addresses = tuple(addresses)
        self._timeout_ms = timeout_ms
        self._advertised = advertised
        self._endpoints = [_Endpoint(address, interceptors) for address in self.addresses]
        count = len(self.addresses)
        self._order = AddressOrder(count, random.randrange(count) if first is None else first)
        self._races: set[asyncio.Task[bool]] = set()

    async def connect(self, timeout_ms: int) -> None:
        """Returns once the current address is connected; a call that is not sent before was certainly not received.

        Raises Unavailable if connecting fails or takes longer; gRPC then goes on connecting, for the next call.
        """
        endpoint = self._endpoints[self._order.current]
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                if await endpoint.connected():
                    return
        except TimeoutError as error:
            raise _unreachable(
                endpoint.address, f"no connection within {timeout_ms} ms", self._hint(endpoint)
            ) from error
        if cause := await endpoint.failure():
            raise _unreachable(endpoint.address, cause, self._hint(endpoint))

    def _hint(self, endpoint: _Endpoint) -> str:
        return ADVERTISED_HINT if self._advertised and not endpoint.was_reached else ""

    async def unary(self, path: str, request: Message, response_type: type[ResponseT]) -> ResponseT:
        """Returns the answer. Raises the service's error, or Unavailable."""
        wait_ms = getattr(request, "max_wait_ms", 0) or getattr(request, "timeout_ms", 0)
        deadline_s = (self._timeout_ms + wait_ms) / 1000
        failures: dict[int, _Failure] = {}
        while True:
            which = await self._choose(failures)
            try:
                with self._endpoints[which] as channel:
                    call = channel.unary_unary(
                        path, request_serializer=_serialize, response_deserializer=response_type.FromString
                    )
                    response: ResponseT = await call(request, timeout=deadline_s)
            except grpc.aio.AioRpcError as error:
                await self._note_failure(which, error, path, failures)
            else:
                self._order.answered(which)
                self._endpoints[which].was_reached = True
                return response

    async def unary_stream(
        self, path: str, request: Message, response_type: type[ResponseT]
    ) -> AsyncIterator[ResponseT]:
        """Yields the answers. Raises the service's error, or Unavailable; without an answer so far, only after a try at
        every address."""
        failures: dict[int, _Failure] = {}
        while True:
            which = await self._choose(failures)
            begun = False
            try:
                with self._endpoints[which] as channel:
                    call = channel.unary_stream(
                        path, request_serializer=_serialize, response_deserializer=response_type.FromString
                    )(request)
                    try:
                        async for response in call:
                            begun = self._endpoints[which].was_reached = True
                            yield response
                    finally:
                        # Also for a caller that stops early: the service would go on sending.
                        call.cancel()
                return
            except grpc.aio.AioRpcError as error:
                await self._note_failure(which, error, path, failures, last=begun)

    async def stream_stream(
        self,
        path: str,
        requests: AsyncIterator[Message],
        response_type: type[ResponseT],
    ) -> AsyncIterator[ResponseT]:
        """Yields the answers to `requests`, which are iterated once and sent to a single address. Raises the service's
        error, or Unavailable."""
        which = await self._choose({})
        try:
            with self._endpoints[which] as channel:
                call = channel.stream_stream(
                    path, request_serializer=_serialize, response_deserializer=response_type.FromString
                )(requests)
                try:
                    async for response in call:
                        self._endpoints[which].was_reached = True
                        yield response
                finally:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            await self._note_failure(which, error, path, {}, last=True)

    # ---- which address

    async def _choose(self, failures: Mapping[int, _Failure]) -> int:
        """Returns the address to call: the current address if connected, else the first that connects. If none
        connects, returns the first in order, so that the failure of the call there says why."""
        order = self._order.ordered(_now_ms(), without=failures)
        first = order[0]
        if len(order) == 1 or self._endpoints[first].is_connected:
            return first
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                winner = await self._race(order)
        except TimeoutError:
            return first
        if winner is None:
            return first
        for slower in order[: order.index(winner)]:
            # They lost despite their head start, so the next calls do not wait for them either.
            self._order.failed(slower, _now_ms())
            await self._endpoints[slower].close_unused()
        return winner

    async def _race(self, order: Sequence[int]) -> int | None:
        """Connects the addresses side by side, each after a head start of the address before, or once that has failed.
        Returns the first that is connected; None once all have failed."""
        to_begin = deque(order)
        running: dict[asyncio.Task[bool], int] = {}
        try:
            while to_begin or running:
                if to_begin:
                    which = to_begin.popleft()
                    task = asyncio.create_task(self._endpoints[which].connected())
                    running[task] = which
                    self._races.add(task)
                    task.add_done_callback(self._races.discard)
                head_start_s = HEAD_START_MS / 1000 if to_begin else None
                done, _ = await asyncio.wait(running, timeout=head_start_s, return_when=asyncio.FIRST_COMPLETED)
                connected = [running[task] for task in done if not task.cancelled() and task.result()]
                if connected:
                    return min(connected, key=order.index)
                for task in done:
                    del running[task]
            return None
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)

    async def _note_failure(
        self,
        which: int,
        raw: grpc.aio.AioRpcError,
        path: str,
        failures: dict[int, _Failure],
        *,
        last: bool = False,
    ) -> None:
        """Adds the error to `failures` if another address may answer differently: no answer came, or the service lacks
        something it needs (another replica may still reach PostgreSQL). Raises every other error, and the merged error
        if no address is left."""
        endpoint = self._endpoints[which]
        service_error = _service_error(raw)
        endpoint.was_reached = endpoint.was_reached or service_error is not None
        error = service_error or _transport_error(raw, endpoint.address, path, self._hint(endpoint))
        if not isinstance(error, (Unavailable, ShuttingDown)) or endpoint.closed:
            raise error from raw
        self._order.failed(which, _now_ms())
        failures[which] = _Failure(error, by_service=service_error is not None)
        if last or len(failures) == len(self.addresses):
            raise self._no_answer(failures) from raw
        await endpoint.close_unused()

    def _no_answer(self, failures: Mapping[int, _Failure]) -> StreamHouseError:
        """Returns a single error for the errors of all addresses, with the details of a service's own error if there is
        any: that PostgreSQL is away says more than that another replica is."""
        found = list(failures.values())
        if len(found) == 1:
            return found[0].error
        chosen = next((failure for failure in found if failure.by_service), found[-1]).error
        message = "; ".join(
            f"{self.addresses[which]}: {failure.error.message}" if failure.by_service else failure.error.message
            for which, failure in failures.items()
        )
        merged = type(chosen)(message, retry_after_ms=chosen.retry_after_ms, **chosen.details)
        if isinstance(merged, Unavailable):
            # A single attempt that may have been received makes the outcome of the whole call uncertain.
            merged.maybe_done = any(getattr(failure.error, "maybe_done", True) for failure in found)
            merged.permanent = all(getattr(failure.error, "permanent", False) for failure in found)
        return merged

    async def close(self) -> None:
        """Closes all channels; calls that still run are cancelled. Raises RuntimeError in a child that was forked after
        gRPC was used."""
        for race in list(self._races):
            race.cancel()
        for endpoint in self._endpoints:
            await endpoint.close()


def _now_ms() -> float:
    return asyncio.get_running_loop().time() * 1000
