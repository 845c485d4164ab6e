"""A gRPC server with health and reflection; hosts one service's API or several.

Owns: the port, gRPC's server, the health status. Does not own: the APIs and their state. Invariants: health is
NOT_SERVING until set_serving(True), and from the start of stop() on. The port of a bound server is known before it
serves.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry import metrics
from shproto import forks
from shproto.rpc import CHANNEL_OPTIONS, CallLimit, CallLimits, serve_api

from shruntime.connections import AddressLimit, ConnectionLimits
from shruntime.memory import MIB
from shruntime.settings import CommonSettings
from shruntime.supervisor import Supervisor
from shruntime.tasks import Tasks

# The size to which gRPC lets a stream's window grow while it knows of no lack of memory.
WINDOW_BYTES_MAX = 16 * MIB

_meter = metrics.get_meter("streamhouse.server")


class ListenError(OSError):
    """The server cannot listen on the address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of connections, calls and streams of a server; the defaults are those of the settings."""

    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    calls_in_flight_max: int = CommonSettings.model_fields["calls_in_flight_max"].default
    streams_open_max: int = CommonSettings.model_fields["streams_open_max"].default
    calls_per_connection_max: int = CommonSettings.model_fields["calls_per_connection_max"].default
    streams_per_connection_max: int = CommonSettings.model_fields["streams_per_connection_max"].default
    calls_pending_max: int = CommonSettings.model_fields["calls_pending_max"].default
    receive_window_bytes: int = WINDOW_BYTES_MAX

    @classmethod
    def of(cls, settings: CommonSettings) -> Self:
        """Returns the limits of the settings, connections as far as this process's file descriptors allow."""
        return cls(
            connections=ConnectionLimits.of(settings),
            calls_in_flight_max=settings.calls_in_flight_max,
            streams_open_max=settings.streams_open_max,
            calls_per_connection_max=settings.calls_per_connection_max,
            streams_per_connection_max=settings.streams_per_connection_max,
            calls_pending_max=settings.calls_pending_max,
            receive_window_bytes=settings.receive_window_bytes,
        )

    def channel_options(self) -> tuple[tuple[str, int], ...]:
        """Returns the part of the limits that gRPC enforces.

        By default gRPC ends calls with CANCELLED once 1,000 to 3,000 are pending, so that a healthy server would turn a
        crowd of clients away; and it lets each connection send 16 MiB ahead, which ten producers of large batches fill:
        480 MiB of `serve` instead of 310 with 1 MiB.
        """
        window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", self.receive_window_bytes))
        return (
            *(window if self.receive_window_bytes < WINDOW_BYTES_MAX else ()),
            *self.connections.channel_options(),
            ("grpc.server.max_pending_requests", self.calls_pending_max),
            ("grpc.server.max_pending_requests_hard_limit", self.calls_pending_max),
        )


class RpcServer:
    """Listens from `start` on; health is NOT_SERVING until `set_serving(True)`."""

    def __init__(
        self,
        listen: str,
        apis: Sequence[tuple[ServiceDescriptor, object]],
        interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
        limits: ServerLimits | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._listen = listen
        self._apis = apis
        self._interceptors = interceptors
        self._limits = limits or ServerLimits()
        self._supervisor = supervisor
        self._tasks = Tasks()
        self.calls = CallLimits(
            CallLimit(
                "calls_in_flight_max",
                self._limits.calls_in_flight_max,
                "calls_per_connection_max",
                self._limits.calls_per_connection_max,
            ),
            CallLimit(
                "streams_open_max",
                self._limits.streams_open_max,
                "streams_per_connection_max",
                self._limits.streams_per_connection_max,
            ),
        )
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server: grpc.aio.Server | None = None
        self._started = False
        self.port = 0

    @property
    def address(self) -> str:
        """host:port as bound; valid after `bind` or `start`."""
        return f"{self._listen.rpartition(':')[0]}:{self.port}"

    async def bind(self) -> None:
        """Takes the port, so that `address` is known; calls wait until `start`. Raises ListenError, and RuntimeError
        in a process that was forked after gRPC was used."""
        forks.check()
        server = grpc.aio.server(
            options=(*CHANNEL_OPTIONS, *self._limits.channel_options()), interceptors=list(self._interceptors)
        )
        forks.note(server)
        for descriptor, api in self._apis:
            serve_api(server, descriptor, api, self.calls)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [descriptor.full_name for descriptor, _ in self._apis]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        await check_listen(self._listen)
        try:
            self.port = server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise ListenError(f"cannot listen on {self._listen}: in use, or not an address of this machine") from error
        self._server = server
        self._measure()

    def _measure(self) -> None:
        calls, streams = self.calls.calls, self.calls.streams
        _meter.create_observable_gauge(
            "streamhouse_server_calls_in_flight",
            [lambda _: [metrics.Observation(calls.in_flight)]],
            description="calls being worked on, long polls included",
        )
        _meter.create_observable_gauge(
            "streamhouse_server_streams_open",
            [lambda _: [metrics.Observation(streams.in_flight)]],
            description="streams that are open",
        )
        _meter.create_observable_counter(
            "streamhouse_server_calls_refused",
            [lambda _: [metrics.Observation(calls.refused + streams.refused)]],
            description="calls and streams refused with OVERLOADED",
        )

    async def start(self) -> None:
        """Serves; binds first if that was not done. Raises ListenError if the port is taken."""
        if self._server is None:
            await self.bind()
        assert self._server is not None, "bind() sets it or raises"
        await self.set_serving(False)
        self._started = True
        await self._server.start()
        address_limit = AddressLimit(self.port, self._limits.connections.per_address_max)
        self._tasks.spawn("connections per address", address_limit.run())

    async def set_serving(self, serving: bool) -> None:
        """Sets the health status, for the server as a whole and for each service, and reports it to the supervisor."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *(descriptor.full_name for descriptor, _ in self._apis)):
            await self._health.set(name, state)
        if self._supervisor is not None:
            self._supervisor.serving(self.address, serving)

    async def stop(self, grace_ms: int) -> None:
        """Refuses new calls at once, gives running calls `grace_ms`, then cuts endless streams."""
        if self._server is not None:
            await self.set_serving(False)
            if not self._started:
                # gRPC gives the port of a server that never started back at the end of the process, not at its stop.
                await self._server.start()
                grace_ms = 0
            await self._server.stop(grace_ms / 1000)
            self._server = None
            self._started = False
        await self._tasks.stop()


async def check_listen(listen: str) -> None:
    """Checks that the address is free; raises ListenError with the reason of the operating system.

    gRPC would write lines of its own to stderr first, without the reason.
    """
    host, _, port = listen.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, ValueError) as error:
        raise ListenError(f"cannot listen on {listen}: no such address ({error})") from error
    failures = [failure for family, _, _, _, address in found if (failure := _bind_failure(family, address))]
    taken = [failure for failure in failures if failure.errno == errno.EADDRINUSE]
    # A name may have an address of a family that this machine does not speak; any that works is enough.
    if taken or len(failures) == len(found):
        raise ListenError(f"cannot listen on {listen}: {os.strerror((taken or failures)[0].errno or 0).lower()}")


def _bind_failure(family: int, address: Any) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC does: connections of an earlier process in TIME_WAIT are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None
