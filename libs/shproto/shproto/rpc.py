"""Carries service APIs over gRPC: errors, streams, fail-over between replicas. Knows no service.

A service's API is a plain object with one async method per RPC (shproto.services has the Protocols). `serve_api`
puts such an object on a gRPC server; `Connection` lets the generated clients call one. Errors arrive as the
StreamHouseError that was raised on the other side.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from shproto import forks
from shproto.errors import Internal, InvalidArgument, StreamHouseError, Unavailable
from shproto.v1 import types_pb2

log = logging.getLogger(__name__)

ERROR_METADATA_KEY = "streamhouse-error-bin"
# A batch of 16 MiB (the format's limit) or a fetch response of a few batches fits with room.
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
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
    """What telemetry adds to a channel; absent when telemetry is off."""

    def client(self) -> Sequence[grpc.aio.ClientInterceptor]: ...


# ---- the serving side

_caller_gives_up_at: ContextVar[float | None] = ContextVar("caller_gives_up_at", default=None)


def time_left_ms() -> float | None:
    """Returns the ms until the caller of the unary RPC that is being served gives up; None if the caller sets no
    deadline, or is in this process."""
    at = _caller_gives_up_at.get()
    return None if at is None else max(0.0, (at - asyncio.get_running_loop().time()) * 1000)


def serve_api(server: grpc.aio.Server, service: ServiceDescriptor, api: object) -> None:
    """Adds `api` to `server` under the service's full name; every RPC of the service must be a method of `api`."""
    handlers = {method.name: _handler(method, getattr(api, _snake_case(method.name))) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _snake_case(name: str) -> str:
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")


def _handler(method: MethodDescriptor, call: Callable[..., Any]) -> grpc.RpcMethodHandler[Any, Any]:
    codecs = {
        "request_deserializer": GetMessageClass(method.input_type).FromString,
        "response_serializer": GetMessageClass(method.output_type).SerializeToString,
    }
    if method.server_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler if method.client_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(_streaming(call), **codecs)  # type: ignore[arg-type]
    return grpc.unary_unary_rpc_method_handler(_unary(call), **codecs)  # type: ignore[arg-type]


def _unary(call: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if (left_s := context.time_remaining()) is not None:
            _caller_gives_up_at.set(asyncio.get_running_loop().time() + left_s)
        try:
            return await call(request)
        except StreamHouseError as error:
            await _abort(context, error)
        except Exception as error:  # noqa: BLE001 - the boundary: a defect must not leak as UNKNOWN without a log
            await _abort(context, _defect(error))

    return handle


def _streaming(call: Callable[[Any], AsyncIterator[Any]]) -> Callable[[Any, Any], Any]:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
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


def to_streamhouse_error(error: grpc.aio.AioRpcError) -> StreamHouseError:
    """The error raised by the service, or what the transport's status amounts to."""
    detail = _error_detail(error)
    if detail is not None:
        return StreamHouseError.from_detail(types_pb2.ErrorDetail.FromString(detail))
    text = f"{error.code().name}: {error.details()}"
    if error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    ):
        return Unavailable(text)
    if error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT):
        return InvalidArgument(text)
    return Internal(text)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _error_detail(error: grpc.aio.AioRpcError) -> bytes | None:
    metadata: Any = error.trailing_metadata() or ()
    return next((value for key, value in metadata if key == ERROR_METADATA_KEY), None)


def _silence_poller(loop: asyncio.AbstractEventLoop) -> None:
    """Keeps tracebacks that mean nothing off the log, unless the loop has an exception handler. All event loops of a
    process share gRPC's poller: each is woken for every event, and finds that another was faster, or that the event is
    of one that is closed by now."""
    if loop.get_exception_handler() is None:
        loop.set_exception_handler(_on_loop_exception)


def _on_loop_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    too_late = isinstance(error, BlockingIOError) or (isinstance(error, RuntimeError) and "is closed" in str(error))
    if not too_late or "PollerCompletionQueue._handle_events" not in context.get("message", ""):
        loop.default_exception_handler(context)


class Connection:
    """Calls one service at one of several addresses; goes to the next address when one does not answer.

    Unary calls are tried once at every address before Unavailable is raised: all StreamHouse calls may be
    repeated. `timeout_ms` is the deadline of a unary call, on top of the wait that the request itself asks for.
    """

    def __init__(
        self, addresses: Sequence[str], *, timeout_ms: int = 10_000, interceptors: Interceptors | None = None
    ) -> None:
        if not addresses:
            raise ValueError("no addresses to connect to")
        self.addresses = tuple(addresses)
        self._timeout_ms = timeout_ms
        self._interceptors = interceptors
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._current = 0

    async def connect(self, timeout_ms: int) -> None:
        """Returns once the current address is connected; what is not sent before that was certainly not received.

        Raises Unavailable when connecting fails, or takes longer; then it goes on for the next call to find.
        """
        channel, address = self._channel(), self.addresses[self._current]
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        raise Unavailable(f"cannot connect to {address}", address=address)
                    await channel.wait_for_state_change(state)
        except TimeoutError as error:
            raise Unavailable(f"not connected to {address} within {timeout_ms} ms", address=address) from error

    async def unary(self, path: str, request: Message, response_type: type[ResponseT]) -> ResponseT:
        wait_ms = getattr(request, "max_wait_ms", 0) or getattr(request, "timeout_ms", 0)
        deadline_s = (self._timeout_ms + wait_ms) / 1000
        for attempt in range(len(self.addresses)):
            call = self._channel().unary_unary(
                path,
                request_serializer=_serialize,
                response_deserializer=response_type.FromString,
            )
            try:
                response: ResponseT = await call(request, timeout=deadline_s)
                return response
            except grpc.aio.AioRpcError as error:
                if not self._moved_on(error) or attempt == len(self.addresses) - 1:
                    raise to_streamhouse_error(error) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def unary_stream(
        self, path: str, request: Message, response_type: type[ResponseT]
    ) -> AsyncIterator[ResponseT]:
        call = self._channel().unary_stream(
            path,
            request_serializer=_serialize,
            response_deserializer=response_type.FromString,
        )
        async for response in self._responses(call(request)):
            yield response

    async def stream_stream(
        self,
        path: str,
        requests: AsyncIterator[Message],
        response_type: type[ResponseT],
    ) -> AsyncIterator[ResponseT]:
        call = self._channel().stream_stream(
            path,
            request_serializer=_serialize,
            response_deserializer=response_type.FromString,
        )
        async for response in self._responses(call(requests)):
            yield response

    async def _responses(self, call: Any) -> AsyncIterator[Any]:
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            self._moved_on(error)
            raise to_streamhouse_error(error) from error
        finally:
            call.cancel()

    def _channel(self) -> grpc.aio.Channel:
        """The channel to the current address, made on first use. Raises RuntimeError in a child that was forked after
        gRPC was used."""
        forks.check()
        address = self.addresses[self._current]
        if address not in self._channels:
            interceptors = list(self._interceptors.client()) if self._interceptors else None
            self._channels[address] = grpc.aio.insecure_channel(
                address, options=CHANNEL_OPTIONS, interceptors=interceptors
            )
            forks.note(self._channels[address])
            _silence_poller(asyncio.get_running_loop())
        return self._channels[address]

    def _moved_on(self, error: grpc.aio.AioRpcError) -> bool:
        """Turns to the next address if this one did not answer, or only that what it needs does not: another replica
        may still reach PostgreSQL. Says whether it did."""
        absent = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        if error.code() not in absent or not isinstance(to_streamhouse_error(error), Unavailable):
            return False
        self._current = (self._current + 1) % len(self.addresses)
        return True

    async def close(self) -> None:
        """Cancels what still runs. Raises RuntimeError in a child that was forked after gRPC was used."""
        if self._channels:
            forks.check()
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close(grace=None)
