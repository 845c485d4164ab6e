"""Asks the coordinator where the index may only be a moment behind, before a reader is told that there is nothing."""

from __future__ import annotations

import asyncio

from shproto.errors import StreamHouseError, Unavailable, UnknownTopic
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2
from shruntime.clock import Clock

from streamhouse_query.core.index import PartitionIndex
from streamhouse_query.live_index import LiveIndex


class Freshness:
    """Only refusals come here, so the coordinator is not asked on any usual path."""

    def __init__(self, coordinator: CoordinatorApi, index: LiveIndex, catch_up_ms: int, clock: Clock) -> None:
        self._coordinator = coordinator
        self._index = index
        self._catch_up_ms = catch_up_ms
        self._clock = clock

    async def find(self, topic: str, partition: int) -> PartitionIndex:
        """Raises UnknownTopic, UnknownPartition; Unavailable when the feed does not bring a new topic in time."""
        try:
            return self._index.find(topic, partition)
        except UnknownTopic:
            topic_id = (await self._describe(topic)).topic.topic_id.hex()
        with self._index.watch((topic_id, 0)) as watch:
            deadline_ms = self._clock.monotonic_ms() + self._catch_up_ms
            while (topic_id, 0) not in self._index.cluster.partitions:
                remaining_ms = deadline_ms - self._clock.monotonic_ms()
                if remaining_ms <= 0:
                    raise Unavailable(f"topic {topic!r} is not known here yet", retry_after_ms=100)
                watch.arm()
                await asyncio.wait((watch.changed,), timeout=remaining_ms / 1000)
        return self._index.find(topic, partition)

    async def is_behind(self, partition: PartitionIndex) -> bool:
        """Whether the coordinator knows of a newer epoch or of more registered records. Raises Unavailable when no
        coordinator answers: a reader that is told that it is beyond the end starts over."""
        try:
            described = await self._describe(partition.topic)
        except StreamHouseError as error:
            raise Unavailable(f"{partition.name}: nobody can say whether the index is behind: {error}") from error
        newest = partition.ranges[-1] if partition.ranges else None
        known = (newest.epoch, newest.registered_end) if newest else (0, 0)
        return any(
            info.partition == partition.partition and (info.epoch, info.registered_end) > known
            for info in described.partitions
        )

    async def _describe(self, topic: str) -> coordinator_pb2.DescribeTopicResponse:
        return await self._coordinator.describe_topic(coordinator_pb2.DescribeTopicRequest(topic=topic))
