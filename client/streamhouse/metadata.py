"""Metadata of topics from the coordinator (partitions, leaders) and addresses of query services.

Owns: the last state of each topic asked for. Does not own: when a state is stale; callers call `refresh`.
Invariants: one refresh of a topic at a time; all callers that need it wait for the same request.
"""

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass

from shcluster.peers import Peers
from shproto.errors import UnknownTopic
from shproto.rpc import being_cancelled, closed_error
from shproto.v1 import coordinator_pb2
from shruntime.tasks import cancel_and_wait


@dataclass(slots=True, eq=False, kw_only=True)
class TopicState:
    """State of a topic. `leaders[partition]` is the leader's address; empty while there is none."""

    topic: str
    topic_id: bytes
    min_acks: int
    leaders: list[str]
    fetched_ms: float

    @property
    def partitions(self) -> int:
        """Number of partitions."""
        return len(self.leaders)


class MetadataCache:
    """Metadata by topic name, fetched on first use."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._topics: dict[str, TopicState] = {}
        self._refreshing: dict[str, asyncio.Future[None]] = {}

    def cached(self, topic: str) -> TopicState | None:
        """Returns the last known state of the topic without a request; None if there is none."""
        return self._topics.get(topic)

    async def topic(self, topic: str) -> TopicState:
        """Returns the last known state of the topic; asks the coordinator on first use. Raises UnknownTopic,
        Unavailable."""
        if topic not in self._topics:
            await self.refresh(topic)
        return self._topics[topic]

    async def refresh(self, topic: str, since_ms: float = math.inf) -> None:
        """Asks the coordinator anew, unless the known state is younger than `since_ms` (on the event loop's clock).
        Raises UnknownTopic (and forgets the topic), Unavailable."""
        known = self._topics.get(topic)
        # All queues of a topic ask after a change of leader: the first answer serves them.
        if known is not None and known.fetched_ms > since_ms:
            return
        running = self._refreshing.get(topic)
        if running is None:
            running = asyncio.ensure_future(self._refresh(topic))
            self._refreshing[topic] = running
            running.add_done_callback(lambda _: self._refreshing.pop(topic, None))
        try:
            await asyncio.shield(running)  # a cancelled caller must not end the request of the others
        except asyncio.CancelledError:
            if running.cancelled() and not being_cancelled():  # `close` has cancelled the refresh, not the caller
                raise closed_error() from None
            raise

    async def _refresh(self, topic: str) -> None:
        # Before the request: the answer may lack a change that was made meanwhile, so it is as old as its request.
        asked_ms = asyncio.get_running_loop().time() * 1000
        try:
            response = await self._peers.coordinator.get_metadata(coordinator_pb2.GetMetadataRequest(topics=[topic]))
        except UnknownTopic:
            # Forgotten, or records would go on to the leaders of a topic that is gone.
            self._topics.pop(topic, None)
            raise
        found = next((item for item in response.topics if item.topic.topic == topic), None)
        if found is None:
            self._topics.pop(topic, None)
            raise UnknownTopic(f"there is no topic {topic!r}", topic=topic)
        self._topics[topic] = _topic_state(found, asked_ms)

    async def sql_addresses(self) -> tuple[str, ...]:
        """Returns the addresses of the SQL services now; empty if none has a session. Raises Unavailable."""
        response = await self._peers.coordinator.get_metadata(coordinator_pb2.GetMetadataRequest())
        return tuple(response.sql_addresses)

    async def query_addresses(self) -> tuple[str, ...]:
        """Returns the addresses of the query services now; empty if no query service has a session. Raises
        Unavailable."""
        response = await self._peers.coordinator.get_metadata(coordinator_pb2.GetMetadataRequest())
        return tuple(response.query_addresses)

    async def close(self) -> None:
        """Cancels and awaits the refreshes that still run."""
        running: Iterable[asyncio.Future[None]] = list(self._refreshing.values())
        await cancel_and_wait(*running)


def _topic_state(metadata: coordinator_pb2.TopicMetadata, fetched_ms: float) -> TopicState:
    leaders = [""] * metadata.topic.partitions
    for leader in metadata.leaders:
        if leader.partition < len(leaders):
            leaders[leader.partition] = leader.address
    return TopicState(
        topic=metadata.topic.topic,
        topic_id=metadata.topic.topic_id,
        min_acks=metadata.topic.min_acks,
        leaders=leaders,
        fetched_ms=fetched_ms,
    )
