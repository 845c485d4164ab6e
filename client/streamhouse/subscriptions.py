"""Finds the topics of a subscription; for a pattern again at every interval.

Owns: the subscription of a consumer. Does not own: metadata, partitions, the use of the topics found.
Invariants: topics that match a pattern are reported only while the consumer is subscribed to that very pattern.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

from shcluster.peers import Peers
from shproto.errors import StreamHouseError
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.v1 import coordinator_pb2
from shruntime.tasks import Backoff

from streamhouse.core.subscription import Subscription
from streamhouse.metadata import MetadataCache

log = logging.getLogger(__name__)


class Subscriptions:
    """Subscription of a consumer; the owner runs `run` as a task. `found(partitions by topic)`: called with the topics
    that match the pattern after each search."""

    def __init__(
        self,
        peers: Peers,
        metadata: MetadataCache,
        refresh_interval_ms: int,
        found: Callable[[Mapping[str, int]], None],
    ) -> None:
        self._peers = peers
        self._metadata = metadata
        self._refresh_interval_ms = refresh_interval_ms
        self._found = found
        self._wakes = asyncio.Event()
        self.current = Subscription()

    def replace(self, subscription: Subscription) -> None:
        """Subscribes to these topics instead of the earlier ones."""
        self.current = subscription
        self._wakes.set()

    def refresh_soon(self) -> None:
        """Searches at once for the topics that match the pattern; called when a topic is gone."""
        self._wakes.set()

    async def find(self, subscription: Subscription) -> dict[str, int]:
        """Returns the number of partitions of each topic, by name. Raises UnknownTopic (for a name that no topic has),
        Unavailable."""
        if subscription.pattern is None:
            for topic in subscription.topics:
                await self._metadata.refresh(topic)
            return {topic: (await self._metadata.topic(topic)).partitions for topic in subscription.topics}
        response = await self._peers.coordinator.list_topics(coordinator_pb2.ListTopicsRequest())
        return {item.topic: item.partitions for item in response.topics if subscription.includes(item.topic)}

    async def run(self) -> None:
        """Searches every refresh_interval_ms for the topics that match the pattern, and reports them, until
        cancelled."""
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        failing = ""
        wait_ms: float = self._refresh_interval_ms
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_ms / 1000):
                    await self._wakes.wait()
            self._wakes.clear()
            wait_ms = self._refresh_interval_ms
            asked = self.current
            # Named topics do not change: the error of a name that is gone comes with the next read.
            if asked.pattern is None:
                continue
            try:
                topics = await self.find(asked)
            except StreamHouseError as error:
                if failing != error.reason:  # logged once, not with every try
                    log.warning("cannot find out which topics match %r, trying again: %s", asked.pattern.pattern, error)
                failing = error.reason
                wait_ms = max(error.retry_after_ms, backoff.next_ms())
                continue
            failing = ""
            backoff.reset()
            if asked is self.current:  # `replace` may have come during the request
                self._found(topics)
