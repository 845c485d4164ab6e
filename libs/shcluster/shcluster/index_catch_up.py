"""Lets the index catch up with the coordinator before a reader is refused: the index may be a moment behind.

Invariant: a reader gets UnknownTopic or UnknownPartition only if the coordinator does not know it either.
"""

from __future__ import annotations

from shproto.errors import StreamHouseError, Unavailable, UnknownPartition, UnknownTopic
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2

from shcluster.index import PartitionIndex
from shcluster.live_index import LiveIndex


class IndexCatchUp:
    """Asks the coordinator for its position, and waits up to `catch_up_ms` for the event feed to bring the index there.
    Only reads that would be refused do so: reads that succeed cost the coordinator nothing."""

    def __init__(self, coordinator: CoordinatorApi, index: LiveIndex, catch_up_ms: int) -> None:
        self._coordinator = coordinator
        self._index = index
        self._catch_up_ms = catch_up_ms

    async def find(self, topic: str, partition: int, topic_id: bytes = b"") -> PartitionIndex:
        """Returns the partition by the name of its topic and, if given, the id: a topic may have been deleted and
        created again under the name.

        Raises UnknownTopic, UnknownPartition; Unavailable if the feed does not bring a new topic in time.
        """
        try:
            return self._find(topic, partition, topic_id)
        except (UnknownTopic, UnknownPartition):
            await self._catch_up_or_wait(topic)
        return self._find(topic, partition, topic_id)

    async def _catch_up_or_wait(self, topic: str) -> None:
        """Catches up. Raises Unavailable in place of UnknownTopic while events are missing from the metadata: the topic
        may have been created in one of them, and a client that is told UnknownTopic forgets the topic."""
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
        """Returns once the index knows all events from before the call, so that any position that a reader was given
        before is in the index. Positions are compared, not the partition's state: the index changes while the
        coordinator's answer is on its way.

        Raises UnknownTopic; Unavailable if no coordinator answers or the feed does not bring the index there in time.
        """
        try:
            described = await self._coordinator.describe_topic(coordinator_pb2.DescribeTopicRequest(topic=topic))
        except UnknownTopic:
            raise
        except StreamHouseError as error:
            raise Unavailable(f"no coordinator says whether the index is behind: {error}") from error
        if not await self._index.reaches(described.events_position, self._catch_up_ms):
            raise Unavailable(
                f"topic {topic!r}: the index is behind the coordinator's event {described.events_position}",
                retry_after_ms=100,
            )

    async def catch_up_to_head(self) -> None:
        """Returns once the index knows all events from before the call. Raises Unavailable if no coordinator answers,
        or the feed does not bring the index there in time."""
        try:
            head = await self._coordinator.get_head(coordinator_pb2.GetHeadRequest())
        except StreamHouseError as error:
            raise Unavailable(f"nobody can say whether the index is behind: {error}") from error
        if not await self._index.reaches(head.events_position, self._catch_up_ms):
            raise Unavailable(f"the index is behind the coordinator's event {head.events_position}", retry_after_ms=100)
