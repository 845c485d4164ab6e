"""Writes a numbered stream of records exactly once, for services and sinks that can make the same records again.

`SequencedWriter` is shcluster's, which services use, too; here it is connected for an application.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from shcluster.peers import Peers
from shcluster.sequenced_writer import Fence, SequencedWriter
from shproto.acks import Acks
from shproto.v1 import coordinator_pb2

__all__ = ["Fence", "SequencedWriter", "new_producer_id", "sequenced_writer"]

# Room for an answer that waits for the object store.
_REQUEST_TIMEOUT_MS = 30_000


async def new_producer_id(bootstrap: str | Sequence[str]) -> int:
    """Returns a producer id that nobody else has. A writer keeps it for good, with the number of its last record."""
    peers = Peers(bootstrap, _REQUEST_TIMEOUT_MS)
    try:
        return (await peers.coordinator.init_producer(coordinator_pb2.InitProducerRequest())).producer_id
    finally:
        await peers.close()


@asynccontextmanager
async def sequenced_writer(
    bootstrap: str | Sequence[str],
    topic: str,
    partition: int,
    *,
    producer_id: int,
    producer_epoch: int,
    acks: Acks = "durable",
    timeout_ms: int = 120_000,
) -> AsyncIterator[SequencedWriter]:
    """Yields a connected writer; closes its connections at the end."""
    peers = Peers(bootstrap, _REQUEST_TIMEOUT_MS)
    try:
        yield SequencedWriter(
            peers,
            topic,
            partition,
            producer_id=producer_id,
            producer_epoch=producer_epoch,
            acks=acks,
            request_timeout_ms=_REQUEST_TIMEOUT_MS,
            timeout_ms=timeout_ms,
        )
    finally:
        await peers.close()
