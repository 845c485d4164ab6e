"""The first contact of `produce` and `consume`: a coordinator that knows the topic, and services at their addresses.

Producers and consumers wait minutes for a first answer, as for later answers. A server that was never started, a
misspelt topic, or a service with an address that does not work from here is reported within --retry-timeout-ms.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from streamhouse_cli.ask import open_peers
from streamhouse_cli.options import retry_timeout_ms

if TYPE_CHECKING:
    from shcluster.peers import Peers
    from shproto.errors import StreamHouseError
    from streamhouse.metadata import MetadataCache

LOOK_AGAIN_S = 0.5
# A session whose end moved by so much was renewed; less may be the time that an answer takes.
RENEWED_S = 1.0


async def reach_leaders(bootstrap: str, topic: str) -> int:
    """Returns the topic's number of partitions once every leader can be connected. Raises UnknownTopic, Unavailable.

    A leader without connection is no error while its session may be ending: another agent then takes over, and the
    producer waits for that. An agent that goes on renewing its session is alive, and will not be reached later either.
    """
    loop, ends_s = asyncio.get_running_loop(), dict[str, float]()
    deadline_s = loop.time() + retry_timeout_ms() / 1000
    async with _contact(bootstrap) as (peers, metadata):
        while True:
            await metadata.refresh(topic)
            state = await metadata.topic(topic)
            failures = await _failures(peers, set(state.leaders) - {""})
            if not failures:
                return state.partitions
            sessions = await _session_ends(peers)
            held = [address for address in failures if address in sessions]
            alive = [address for address in held if sessions[address] > ends_s.get(address, math.inf) + RENEWED_S]
            if loop.time() >= deadline_s and alive:
                raise failures[alive[0]]
            if loop.time() >= deadline_s and not held:
                return state.partitions
            for address in held:
                ends_s.setdefault(address, sessions[address])
            await asyncio.sleep(LOOK_AGAIN_S)


async def reach_readers(bootstrap: str, topic: str) -> None:
    """Returns once a query service can be connected. Raises UnknownTopic, Unavailable."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + retry_timeout_ms() / 1000
    async with _contact(bootstrap) as (peers, metadata):
        await metadata.topic(topic)
        while True:
            addresses = await metadata.query_addresses()
            failures = await _failures(peers, addresses)
            if len(failures) < len(addresses):
                return
            if loop.time() >= deadline_s:
                if failures:
                    raise failures[addresses[0]]
                return  # no query service has a session yet: the consumer waits
            await asyncio.sleep(LOOK_AGAIN_S)


@asynccontextmanager
async def _contact(bootstrap: str) -> AsyncIterator[tuple[Peers, MetadataCache]]:
    from streamhouse.admin import REQUEST_TIMEOUT_MS
    from streamhouse.metadata import MetadataCache

    peers = open_peers(bootstrap, REQUEST_TIMEOUT_MS)
    metadata = MetadataCache(peers)
    try:
        yield peers, metadata
    finally:
        await metadata.close()
        await peers.close()


async def _failures(peers: Peers, addresses: Collection[str]) -> dict[str, StreamHouseError]:
    """Returns the errors of addresses that cannot be connected, by address."""
    from shproto.errors import StreamHouseError
    from shruntime.tasks import outcomes

    found: dict[str, StreamHouseError] = {}
    for address, outcome in zip(addresses, await outcomes(*map(peers.connect, addresses)), strict=True):
        if isinstance(outcome, StreamHouseError):
            found[address] = outcome
        elif outcome is not None:
            raise outcome
    return found


async def _session_ends(peers: Peers) -> dict[str, float]:
    """Returns when agents' sessions end if they are not renewed, by address, in seconds of the event loop's clock."""
    from shproto.v1 import coordinator_pb2

    status = await peers.coordinator.get_status(coordinator_pb2.GetStatusRequest())
    now_s = asyncio.get_running_loop().time()
    return {item.address: now_s + item.expires_in_ms / 1000 for item in status.sessions if item.role == "ingest"}
