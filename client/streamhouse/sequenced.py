"""Writes a numbered stream of records exactly once, for services and sinks that can make the same records again.

`SequencedWriter` is shcluster's, which services use, too; here it is connected for an application.

Owns: the connections of what is opened here. Does not own: where a stream comes from, the number of its last record.
Invariant: of two writers that take over the same name, the later has the greater epoch.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from shcluster.peers import Peers
from shcluster.sequenced_writer import Fence, SequencedWriter
from shformat import BytesColumn, HeadersColumn
from shproto.acks import Acks
from shproto.errors import InvalidArgument
from shproto.v1 import coordinator_pb2
from shruntime.urls import addresses_of

from streamhouse.retries import Retries

__all__ = [
    "BytesColumn",
    "Fence",
    "HeadersColumn",
    "SequencedProducer",
    "SequencedWriter",
    "new_producer_id",
    "sequenced_writer",
]

# Room for an answer that waits for the object store.
_REQUEST_TIMEOUT_MS = 30_000


async def new_producer_id(bootstrap: str | Sequence[str]) -> int:
    """Returns a producer id that nobody else has. A writer keeps it for good, with the number of its last record."""
    peers = Peers(bootstrap, _REQUEST_TIMEOUT_MS)
    try:
        return (await peers.coordinator.init_producer(coordinator_pb2.InitProducerRequest())).producer_id
    finally:
        await peers.close()


class SequencedProducer:
    """A producer that is taken over by its name. Use it as an async context manager: entering takes the name over, and
    leaving closes the connections of its writers.

    All that take a name over get the same producer id, and an epoch each, greater than any before: what wrote under the
    name can write no more to a partition that this producer has fenced. acks: of all writers. timeout_ms: in which an
    unanswered take-over is repeated, and of each call of a writer.
    """

    def __init__(
        self, bootstrap: str | Sequence[str], name: str, *, acks: Acks = "durable", timeout_ms: int = 120_000
    ) -> None:
        self._bootstrap = bootstrap
        self._name = name
        self._acks = acks
        self._timeout_ms = timeout_ms
        self._peers: Peers | None = None
        self._taken = coordinator_pb2.InitProducerResponse()

    async def __aenter__(self) -> Self:
        if self._peers is not None:
            raise InvalidArgument("this producer was entered before: make another one", field="producer", value="used")
        self._peers = Peers(self._bootstrap, _REQUEST_TIMEOUT_MS)
        try:
            self._taken = await self._take_over(self._peers)
        except BaseException:
            await self._peers.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._peers is not None:
            await self._peers.close()

    async def _take_over(self, peers: Peers) -> coordinator_pb2.InitProducerResponse:
        if not self._name:
            raise InvalidArgument("a producer that is taken over has a name", field="name", value="", limit=1)
        retries = Retries("timeout_ms", self._timeout_ms, addresses_of(self._bootstrap))
        request = coordinator_pb2.InitProducerRequest(name=self._name)
        # Repeatable: a call without an answer may have raised the epoch, and the next one raises it once more.
        return await retries.run(lambda: peers.coordinator.init_producer(request))

    @property
    def producer_id(self) -> int:
        """The id, the same for all that take the name over; 0 before entering."""
        return self._taken.producer_id

    @property
    def producer_epoch(self) -> int:
        """The epoch of this producer, from 1 on; 0 before entering. With the id it may be given to other processes,
        which write other partitions of the same stream through `sequenced_writer`."""
        return self._taken.producer_epoch

    def writer(self, topic: str, partition: int) -> SequencedWriter:
        """Returns a writer to one partition. It has to fence before it writes: only then is the last record known, and
        what had the name before can write no more there. Raises InvalidArgument before entering."""
        if self._peers is None or not self.producer_id:
            raise InvalidArgument("enter the producer first: async with", field="producer", value="not entered")
        return _writer(
            self._peers, topic, partition, self.producer_id, self.producer_epoch, self._acks, self._timeout_ms
        )


def _writer(
    peers: Peers,
    topic: str,
    partition: int,
    producer_id: int,
    producer_epoch: int,
    acks: Acks,
    timeout_ms: int,
) -> SequencedWriter:
    return SequencedWriter(
        peers,
        topic,
        partition,
        producer_id=producer_id,
        producer_epoch=producer_epoch,
        acks=acks,
        request_timeout_ms=_REQUEST_TIMEOUT_MS,
        timeout_ms=timeout_ms,
    )


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
        yield _writer(peers, topic, partition, producer_id, producer_epoch, acks, timeout_ms)
    finally:
        await peers.close()
