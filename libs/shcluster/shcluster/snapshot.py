"""Builds the index from the parts of the coordinator's snapshot. Pure."""

from __future__ import annotations

from shproto.acks import ACKS_DURABLE
from shproto.convert import range_from_proto, segments_from_proto
from shproto.keys import PartitionKey
from shproto.v1 import coordinator_pb2

from shcluster.index import (
    AgentSession,
    ClusterIndex,
    IndexMismatch,
    SqlTable,
    TopicEntry,
)


class SnapshotBuilder:
    """Index in the making: `cluster` is complete once all parts are added."""

    def __init__(self) -> None:
        self.cluster = ClusterIndex()
        self._parts = 0

    def add(self, part: coordinator_pb2.SnapshotPart) -> None:
        """Adds a part. Raises IndexMismatch if the part is of another snapshot than those before, or contradicts
        itself."""
        cluster = self.cluster
        if self._parts and (part.position, part.history_id) != (cluster.position, cluster.history_id):
            raise IndexMismatch(
                f"snapshot part of event {part.position} of history {part.history_id!r} among parts of "
                f"{cluster.position} of {cluster.history_id!r}"
            )
        self._parts += 1
        cluster.position, cluster.history_id = part.position, part.history_id
        for session in part.sessions:
            self.cluster.sessions[session.session_id] = AgentSession(
                session_id=session.session_id, agent_id=session.agent_id, role=session.role, address=session.address
            )
        for table in part.sql_tables:
            self.cluster.sql_tables[table.table] = SqlTable(table.table_id, table.table, table.definition)
        for partition in part.partitions:
            try:
                self._add_partition(partition)
            except (KeyError, ValueError) as error:  # a partition beyond its topic's, an unknown status
                name = f"{partition.topic.topic}/{partition.partition}"
                raise IndexMismatch(f"snapshot of {name} cannot be read: {error!r}") from error

    def _add_partition(self, partition: coordinator_pb2.SnapshotPartition) -> None:
        topic = partition.topic
        topic_id = topic.topic_id
        if topic.topic not in self.cluster.topics:
            durable_only = topic.min_acks == ACKS_DURABLE
            self.cluster.add_topic(
                TopicEntry(topic_id=topic_id, topic=topic.topic, partitions=topic.partitions, durable_only=durable_only)
            )
        self.cluster.load_partition(
            PartitionKey(topic_id, partition.partition),
            partition.log_start_offset,
            [range_from_proto(item) for item in partition.ranges],
            list(segments_from_proto(partition.segments)),
        )
