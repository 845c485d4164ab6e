"""A gRPC server with health and reflection; hosts one service's API or several."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from typing import Any

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from shproto import forks
from shproto.rpc import CHANNEL_OPTIONS, serve_api

from shruntime.connections import AddressLimit, ConnectionLimits
from shruntime.tasks import Tasks


class ListenError(OSError):
    """The address cannot be listened on."""


class RpcServer:
    """Listens from `start` on; health says NOT_SERVING until `set_serving(True)`."""

    def __init__(
        self,
        listen: str,
        apis: Sequence[tuple[ServiceDescriptor, object]],
        interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
        limits: ConnectionLimits | None = None,
    ) -> None:
        self._listen = listen
        self._apis = apis
        self._interceptors = interceptors
        self._limits = limits or ConnectionLimits()
        self._tasks = Tasks()
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server: grpc.aio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """host:port as bound; valid after `bind` or `start`."""
        return f"{self._listen.rpartition(':')[0]}:{self.port}"

    async def bind(self) -> None:
        """Takes the port, so that `address` is known; calls wait until `start`. Raises ListenError, and RuntimeError in
        a child that was forked after gRPC was used."""
        forks.check()
        server = grpc.aio.server(
            options=(*CHANNEL_OPTIONS, *self._limits.channel_options()), interceptors=list(self._interceptors)
        )
        forks.note(server)
        for descriptor, api in self._apis:
            serve_api(server, descriptor, api)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [descriptor.full_name for descriptor, _ in self._apis]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        await check_listen(self._listen)
        try:
            self.port = server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise ListenError(f"cannot listen on {self._listen}: in use, or not an address of this machine") from error
        self._server = server

    async def start(self) -> None:
        """Serves; binds first if that was not done. Raises ListenError when the port is taken."""
        if self._server is None:
            await self.bind()
        assert self._server is not None, "bind() sets it or raises"
        await self.set_serving(False)
        await self._server.start()
        address_limit = AddressLimit(self.port, self._limits.per_address_max)
        self._tasks.spawn("connections per address", address_limit.run())

    async def set_serving(self, serving: bool) -> None:
        """What health checks are answered, for the server as a whole and for each service."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *(descriptor.full_name for descriptor, _ in self._apis)):
            await self._health.set(name, state)

    async def stop(self, grace_ms: int) -> None:
        """Refuses new calls at once, gives running ones `grace_ms`. Streams that never end are cut then."""
        if self._server is not None:
            await self.set_serving(False)
            await self._server.stop(grace_ms / 1000)
            self._server = None
        await self._tasks.stop()


async def check_listen(listen: str) -> None:
    """Raises ListenError with the reason of the operating system. gRPC would write lines of its own to stderr first,
    and then not say why."""
    host, _, port = listen.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, ValueError) as error:
        raise ListenError(f"cannot listen on {listen}: no such address ({error})") from error
    failures = [failure for family, _, _, _, address in found if (failure := _bind_failure(family, address))]
    taken = [failure for failure in failures if failure.errno == errno.EADDRINUSE]
    # A name may have an address of a family that this machine does not speak; one that works is enough.
    if taken or len(failures) == len(found):
        raise ListenError(f"cannot listen on {listen}: {os.strerror((taken or failures)[0].errno or 0).lower()}")


def _bind_failure(family: int, address: Any) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC does: connections of an earlier process that only wait to be forgotten are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None
