"""Asks the coordinator where the index may only be a moment behind, before a reader is told that there is nothing."""

from __future__ import annotations

from shproto.errors import StreamHouseError, Unavailable, UnknownPartition, UnknownTopic
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2

from shcluster.index import PartitionIndex
from shcluster.live_index import LiveIndex


class IndexCatchUp:
    """Only refusals come here, so the coordinator is not asked on any usual path. `catch_up_ms`: how long to wait for
    the event feed."""

    def __init__(self, coordinator: CoordinatorApi, index: LiveIndex, catch_up_ms: int) -> None:
        self._coordinator = coordinator
        self._index = index
        self._catch_up_ms = catch_up_ms

    async def find(self, topic: str, partition: int, topic_id: bytes = b"") -> PartitionIndex:
        """The partition of the topic of that name and, if one is given, that id: the index may still have one that was
        deleted, and another one created under its name.

        Raises UnknownTopic, UnknownPartition; Unavailable when the feed does not bring a new topic in time.
        """
        try:
            return self._find(topic, partition, topic_id)
        except (UnknownTopic, UnknownPartition):
            await self._catch_up_or_wait(topic)
        return self._find(topic, partition, topic_id)

    async def _catch_up_or_wait(self, topic: str) -> None:
        """A topic that was created in events that are missing is not unknown: whoever is told so forgets about it."""
        try:
            await self.catch_up(topic)
        except UnknownTopic:
            if not self._index.cluster.missing_position:
                raise
            raise Unavailable(
                f"topic {topic!r} is not in the metadata, which went back: event "
                f"{self._index.cluster.missing_position} was seen, and is not there any more",
                retry_after_ms=1_000,
            ) from None

    def _find(self, topic: str, partition: int, topic_id: bytes) -> PartitionIndex:
        found = self._index.find(topic, partition)
        if topic_id and found.topic_id != topic_id:
            raise UnknownTopic(f"topic {topic!r} was deleted, and another one created under its name", topic=topic)
        return found

    async def catch_up(self, topic: str) -> None:
        """When this returns, the index knows everything that had happened when it was called. Whatever position a
        reader was given before, by whomever, it is in there: a comparison with one partition's state as the coordinator
        knows it would not do, because the index changes while the answer is on its way.

        Raises UnknownTopic; Unavailable when no coordinator answers or the feed does not bring the index there in time.
        """
        try:
            described = await self._coordinator.describe_topic(coordinator_pb2.DescribeTopicRequest(topic=topic))
        except UnknownTopic:
            raise
        except StreamHouseError as error:
            raise Unavailable(f"nobody can say whether the index is behind: {error}") from error
        if not await self._index.reaches(described.events_position, self._catch_up_ms):
            raise Unavailable(
                f"topic {topic!r}: the index is behind the coordinator's event {described.events_position}",
                retry_after_ms=100,
            )
