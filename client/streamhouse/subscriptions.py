"""Finds the topics of a subscription, again and again where it is a pattern.

Owns: the subscription of a consumer. Does not own: metadata, partitions, what becomes of the topics that are found.
Invariants: topics that a pattern matched are reported only while the consumer is subscribed to that very pattern.
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
    """`find` at once, and `run` as a task of the owner. `found(partitions by topic)`: told of the topics that a pattern
    matches, each time it is looked."""

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
        """Subscribes to these topics instead of those before."""
        self.current = subscription
        self._wakes.set()

    def refresh_soon(self) -> None:
        """Looks at once which topics a pattern matches: one of them is gone."""
        self._wakes.set()

    async def find(self, subscription: Subscription) -> dict[str, int]:
        """Returns the number of partitions of each topic, by name. Raises UnknownTopic (a name without a topic),
        Unavailable."""
        if subscription.pattern is None:
            for topic in subscription.topics:
                await self._metadata.refresh(topic)
            return {topic: (await self._metadata.topic(topic)).partitions for topic in subscription.topics}
        response = await self._peers.coordinator.list_topics(coordinator_pb2.ListTopicsRequest())
        return {item.topic: item.partitions for item in response.topics if subscription.includes(item.topic)}

    async def run(self) -> None:
        """Looks every refresh_interval_ms which topics a pattern matches, and reports them, until cancelled."""
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
            if asked.pattern is None:
                continue
            try:
                topics = await self.find(asked)
            except StreamHouseError as error:
                if failing != error.reason:  # told once, not with every try
                    log.warning("cannot find out which topics match %r, trying again: %s", asked.pattern.pattern, error)
                failing = error.reason
                wait_ms = max(error.retry_after_ms, backoff.next_ms())
                continue
            failing = ""
            backoff.reset()
            if asked is self.current:
                self._found(topics)
