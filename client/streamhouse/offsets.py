"""Offsets as a consumer asks for them: start and end of partitions, committed positions of its group, lag."""

from collections.abc import Collection, Mapping

from shcluster.peers import Peers
from shproto.errors import Unavailable, UnknownGroup
from shproto.v1 import coordinator_pb2, query_pb2

from streamhouse.admin import lookup_of
from streamhouse.core.lag import Lag, lag_of
from streamhouse.core.options import Place
from streamhouse.core.positions import Position
from streamhouse.metadata import MetadataCache
from streamhouse.reader import POSITIONS_MAX
from streamhouse.records import OffsetAndMetadata, TopicPartition


def commits_of(positions: Mapping[TopicPartition, Position]) -> list[coordinator_pb2.OffsetCommit]:
    """Returns the positions as messages of a commit request."""
    return [
        coordinator_pb2.OffsetCommit(
            topic=topic,
            partition=partition,
            offset=position.offset,
            topic_id=position.topic_id,
            metadata=position.metadata,
        )
        for (topic, partition), position in positions.items()
    ]


class Offsets:
    """Asks the coordinator and the query services; keeps no state."""

    def __init__(self, peers: Peers, metadata: MetadataCache, group: str | None) -> None:
        self._peers = peers
        self._metadata = metadata
        self._group = group

    async def current_topic_ids(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, bytes]:
        """Returns by partition the topic id that the coordinator has now: a query service may still know a deleted
        topic of the same name. Raises UnknownTopic, Unavailable."""
        for topic in {where.topic for where in partitions}:
            await self._metadata.refresh(topic)
        return {where: (await self._metadata.topic(where.topic)).topic_id for where in partitions}

    async def look_up(self, at: Place, partitions: Mapping[TopicPartition, bytes]) -> dict[TopicPartition, int]:
        """Returns the offset of `at` in each of the partitions. `partitions`: by partition the id of its topic; empty:
        not known. Raises UnknownTopic, Unavailable."""
        lookups = [lookup_of(*where, topic_id, at) for where, topic_id in partitions.items()]
        if not lookups:
            return {}
        addresses = await self._metadata.query_addresses()
        if not addresses:
            raise Unavailable("no query service has a session with the coordinator")
        query, offsets = self._peers.query(addresses), {}
        # A request with more positions than a service accepts would be refused as a whole.
        for first in range(0, len(lookups), POSITIONS_MAX):
            request = query_pb2.LookupOffsetsRequest(lookups=lookups[first : first + POSITIONS_MAX])
            response = await query.lookup_offsets(request)
            offsets.update({TopicPartition(found.topic, found.partition): found.offset for found in response.offsets})
        return offsets

    async def committed(self, partitions: Mapping[TopicPartition, bytes]) -> dict[TopicPartition, OffsetAndMetadata]:
        """Returns the group's committed positions in partitions of topics with these ids, without partitions that have
        none. Raises Unavailable."""
        if self._group is None or not partitions:
            return {}
        request = coordinator_pb2.FetchOffsetsRequest(
            group=self._group,
            partitions=[coordinator_pb2.TopicPartition(topic=w.topic, partition=w.partition) for w in partitions],
        )
        try:
            response = await self._peers.coordinator.fetch_offsets(request)
        # A group exists from its first member or commit on: until then nothing is committed.
        except UnknownGroup:
            return {}
        found = {TopicPartition(item.topic, item.partition): item for item in response.offsets if item.offset >= 0}
        return {
            where: OffsetAndMetadata(found[where].offset, found[where].metadata)
            for where, topic_id in partitions.items()
            if where in found and found[where].topic_id in (topic_id, b"")  # empty: the coordinator is an older version
        }

    async def commit(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Commits for a group without members. Raises IllegalGeneration if the group has members, UnknownTopic."""
        request = coordinator_pb2.CommitOffsetsRequest(group=self._group or "", offsets=commits_of(positions))
        await self._peers.coordinator.commit_offsets(request)

    async def lag(
        self, positions: Mapping[TopicPartition, int], topic_ids: Mapping[TopicPartition, bytes]
    ) -> dict[TopicPartition, Lag]:
        """Returns the number of records from each position to the end of its partition. Raises UnknownTopic,
        Unavailable."""
        ends = await self.look_up("latest", {where: topic_ids[where] for where in positions})
        lags = {}
        for topic in sorted({where.topic for where in positions}):
            request = coordinator_pb2.DescribeTopicRequest(topic=topic)
            for info in (await self._peers.coordinator.describe_topic(request)).partitions:
                where = TopicPartition(topic, info.partition)
                if where in positions:
                    newest = max((part.start_offset for part in info.ranges), default=info.log_start_offset)
                    lags[where] = lag_of(
                        positions[where],
                        info.log_start_offset,
                        ends[where],
                        newest,
                        info.registered_end,
                        info.record_count,
                    )
        return lags
