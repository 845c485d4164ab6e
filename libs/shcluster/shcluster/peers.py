"""Connections to the services, by address, made on first use and closed together.

Owns: a connection for each set of addresses. Does not own: the calls, the knowledge of addresses.
Invariant: once closed, no connection is open and none is made.
"""

from collections.abc import Callable, Sequence

from shproto.errors import InvalidArgument
from shproto.rpc import Caller, Connection, Interceptors
from shproto.services import (
    CoordinatorApi,
    CoordinatorClient,
    IngestApi,
    IngestClient,
    QueryApi,
    QueryClient,
    SqlApi,
    SqlClient,
)
from shruntime.urls import addresses_of

# A handshake takes milliseconds. An agent that hangs accepts connections and says nothing: a producer that waits for it
# does better to look for the leader again. A handshake that takes longer is done by the next try.
CONNECT_TIMEOUT_MS = 1_000


class Peers:
    """Connections to coordinators at the addresses in `bootstrap`, and to other services at the addresses that they
    advertise. Once closed, asking for a service raises InvalidArgument.

    `timeout_ms`: of each call. `interceptors`: of every channel. `wrap`: returns the caller to use in place of a
    connection; the SDK repeats calls there.
    """

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        timeout_ms: int,
        interceptors: Interceptors | None = None,
        wrap: Callable[[Caller], Caller] | None = None,
    ) -> None:
        self._timeout_ms = timeout_ms
        self._interceptors = interceptors
        self._wrap = wrap
        self._connections: dict[tuple[tuple[str, ...], bool], Connection] = {}
        self._bootstrap = addresses_of(bootstrap)
        self._closed = False

    @property
    def coordinator(self) -> CoordinatorApi:
        """API of the coordinators: calls fail over between them."""
        return CoordinatorClient(self._caller(self._bootstrap, advertised=False))

    def ingest(self, address: str) -> IngestApi:
        """Returns the API of the ingest agent at `address`."""
        return IngestClient(self._caller((address,)))

    async def connect(self, address: str) -> None:
        """Returns once connected to an agent. Raises Unavailable."""
        await self._connect((address,)).connect(CONNECT_TIMEOUT_MS)

    def query(self, addresses: Sequence[str]) -> QueryApi:
        """Returns the query services at `addresses` as one: calls fail over between them."""
        return QueryClient(self._caller(tuple(addresses)))

    def sql(self, address: str) -> SqlApi:
        """Returns the API of the SQL service at `address`."""
        return SqlClient(self._caller((address,)))

    def _caller(self, addresses: tuple[str, ...], *, advertised: bool = True) -> Caller:
        connection = self._connect(addresses, advertised=advertised)
        return connection if self._wrap is None else self._wrap(connection)

    def _connect(self, addresses: tuple[str, ...], *, advertised: bool = True) -> Connection:
        if self._closed:  # a connection made now would never be closed
            raise InvalidArgument("the client is closed", field="client", value="closed")
        key = addresses, advertised
        connection = self._connections.get(key)
        if connection is None:
            connection = self._connections[key] = Connection(
                addresses,
                timeout_ms=self._timeout_ms,
                interceptors=self._interceptors,
                advertised=advertised,
            )
        return connection

    async def close(self) -> None:
        """Closes all connections for good; calls that still run on them fail with Unavailable."""
        self._closed = True
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()
