"""Connections to other services: the coordinators from settings, and agents by their address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from shproto.rpc import Connection

from shruntime.settings import CommonSettings
from shruntime.telemetry import Telemetry

Client = TypeVar("Client")


def connect_to_coordinators(settings: CommonSettings, telemetry: Telemetry) -> Connection:
    """A connection to the addresses in `bootstrap`, tried in turn."""
    addresses = [address.strip() for address in settings.bootstrap.split(",") if address.strip()]
    return Connection(addresses, timeout_ms=settings.rpc_timeout_ms, interceptors=telemetry)


class Peers(Generic[Client]):
    """One client per address, made when first asked for and kept until `close`."""

    def __init__(
        self, make_client: Callable[[Connection], Client], settings: CommonSettings, telemetry: Telemetry
    ) -> None:
        self._make_client = make_client
        self._settings = settings
        self._telemetry = telemetry
        self._connections: dict[str, Connection] = {}

    def __call__(self, address: str) -> Client:
        if address not in self._connections:
            self._connections[address] = Connection(
                [address],
                timeout_ms=self._settings.rpc_timeout_ms,
                interceptors=self._telemetry,
                advertised=True,
            )
        return self._make_client(self._connections[address])

    async def close(self) -> None:
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()
