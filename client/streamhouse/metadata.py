"""What the coordinator says of topics: partitions, leaders, where to read. Cached; refreshed when it proves stale."""

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass

from shcluster.peers import Peers
from shproto.errors import UnknownTopic
from shproto.rpc import being_cancelled, closed_error
from shproto.v1 import coordinator_pb2


@dataclass(slots=True, eq=False)
class TopicState:
    """`leaders[partition]` is the leader's address; empty while there is none."""

    topic: str
    topic_id: bytes
    min_acks: int
    leaders: list[str]
    fetched_ms: float

    @property
    def partitions(self) -> int:
        return len(self.leaders)


class MetadataCache:
    """One refresh at a time, however many ask for one."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._topics: dict[str, TopicState] = {}
        self._refreshing: dict[str, asyncio.Future[None]] = {}

    def cached(self, topic: str) -> TopicState | None:
        return self._topics.get(topic)

    async def topic(self, topic: str) -> TopicState:
        """Raises UnknownTopic, Unavailable."""
        if topic not in self._topics:
            await self.refresh(topic)
        return self._topics[topic]

    async def refresh(self, topic: str, since_ms: float = math.inf) -> None:
        """Asks the coordinator anew, unless what is known is from after `since_ms` (of the event loop's clock).
        Raises UnknownTopic (and forgets the topic), Unavailable."""
        known = self._topics.get(topic)
        if known is not None and known.fetched_ms > since_ms:
            return
        running = self._refreshing.get(topic)
        if running is None:
            running = asyncio.ensure_future(self._refresh(topic))
            self._refreshing[topic] = running
            running.add_done_callback(lambda _: self._refreshing.pop(topic, None))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            if running.cancelled() and not being_cancelled():  # by `close`
                raise closed_error() from None
            raise

    async def _refresh(self, topic: str) -> None:
        asked_ms = asyncio.get_running_loop().time() * 1000
        try:
            response = await self._peers.coordinator.get_metadata(coordinator_pb2.GetMetadataRequest(topics=[topic]))
        except UnknownTopic:
            self._topics.pop(topic, None)
            raise
        found = next((item for item in response.topics if item.topic.topic == topic), None)
        if found is None:
            self._topics.pop(topic, None)
            raise UnknownTopic(f"there is no topic {topic!r}", topic=topic)
        self._topics[topic] = _topic_state(found, asked_ms)

    async def query_addresses(self) -> tuple[str, ...]:
        """Where to read from now; empty when no query service has a session."""
        response = await self._peers.coordinator.get_metadata(coordinator_pb2.GetMetadataRequest())
        return tuple(response.query_addresses)

    async def close(self) -> None:
        """Cancels and awaits what still runs."""
        running: Iterable[asyncio.Future[None]] = list(self._refreshing.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _topic_state(metadata: coordinator_pb2.TopicMetadata, fetched_ms: float) -> TopicState:
    leaders = [""] * metadata.topic.partitions
    for leader in metadata.leaders:
        if leader.partition < len(leaders):
            leaders[leader.partition] = leader.address
    return TopicState(metadata.topic.topic, metadata.topic.topic_id, metadata.topic.min_acks, leaders, fetched_ms)
