"""Connections to other services: the coordinators from settings, and agents by their address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from shproto.rpc import Connection, Interceptors

Client = TypeVar("Client")


def connect_to_coordinators(bootstrap: str, timeout_ms: int, interceptors: Interceptors | None = None) -> Connection:
    """Returns a connection to the addresses in `bootstrap`, host:port with commas in between, tried in turn."""
    addresses = [address.strip() for address in bootstrap.split(",") if address.strip()]
    return Connection(addresses, timeout_ms=timeout_ms, interceptors=interceptors)


class Peers(Generic[Client]):
    """Connections by address, made when first asked for and kept until `close`. `timeout_ms`: of each call."""

    def __init__(
        self,
        make_client: Callable[[Connection], Client],
        timeout_ms: int,
        interceptors: Interceptors | None = None,
    ) -> None:
        self._make_client = make_client
        self._timeout_ms = timeout_ms
        self._interceptors = interceptors
        self._connections: dict[str, Connection] = {}

    def __call__(self, address: str) -> Client:
        if address not in self._connections:
            self._connections[address] = Connection(
                [address],
                timeout_ms=self._timeout_ms,
                interceptors=self._interceptors,
                advertised=True,
            )
        return self._make_client(self._connections[address])

    async def close(self) -> None:
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()
