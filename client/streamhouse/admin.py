"""Administration of topics, offsets, groups and the cluster, for operators and scripts. Answers are plain
dataclasses."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Literal, Self

from shcluster.peers import Peers
from shproto.acks import ACKS, Acks
from shproto.errors import TopicExists, Unavailable, UnknownGroup, UnknownPartition
from shproto.rpc import Interceptors
from shproto.v1 import coordinator_pb2, query_pb2, types_pb2
from shruntime.urls import addresses_of

from streamhouse.cluster import (
    BufferFailure,
    ClusterStatus,
    CommittedOffset,
    DeletedRecords,
    FoundOffset,
    OffsetRange,
    Topic,
    TopicConfig,
    TopicDescription,
    UnreachableAgent,
    configs_of,
    lease_of,
    partition_of,
    range_of,
    session_of,
    topic_of,
)
from streamhouse.core.kafka_names import explains_kafka_arguments, explains_kafka_methods, explains_kafka_names
from streamhouse.core.options import (
    LastRecords,
    Place,
    check_request_timeout,
    check_retry_timeout,
    check_topic,
    committed_positions,
    looked_up_place,
    offset_number,
    partition_number,
)
from streamhouse.core.sync_mismatch import AsyncContext
from streamhouse.core.times import ms_of
from streamhouse.group_admin import (
    Group,
    GroupDescription,
    OffsetReset,
    ResetTo,
    description_of,
    group_of,
    reset_of,
    topic_ids_of,
)
from streamhouse.metadata import MetadataCache
from streamhouse.records import OffsetAndMetadata, TopicPartition
from streamhouse.retries import Retries

# Creating a topic or listing one with many partitions touches PostgreSQL; beyond 10 s something is wrong.
REQUEST_TIMEOUT_MS = 10_000
# Kafka's default for an admin's calls: a rolling restart fits.
RETRY_TIMEOUT_MS = 60_000
# Half of the lookups that a query service accepts in one request.
LOOKUPS_MAX = 500


@explains_kafka_methods("Admin")
class Admin(AsyncContext):
    """Administers topics, offsets, groups and the cluster. An async context manager.

    request_timeout_ms: limit of a single try. retry_timeout_ms: how long a call is retried while no server answers or
    the server is overloaded; after that every method raises Unavailable or Overloaded. Creating a topic, and deleting a
    topic or a group, raises Unavailable at once if the answer to a try was lost: a second try could not tell which try
    took effect.
    """

    @explains_kafka_names("Admin")
    def __init__(
        self,
        bootstrap: str | Sequence[str],
        *,
        request_timeout_ms: int = REQUEST_TIMEOUT_MS,
        retry_timeout_ms: int = RETRY_TIMEOUT_MS,
        telemetry: Interceptors | None = None,
    ) -> None:
        check_request_timeout(request_timeout_ms)
        check_retry_timeout(retry_timeout_ms)
        addresses = addresses_of(bootstrap)
        retries = Retries("retry_timeout_ms", retry_timeout_ms, addresses)
        self._peers = Peers(addresses, request_timeout_ms, telemetry, retries.over)
        self._metadata = MetadataCache(self._peers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._metadata.close()
        await self._peers.close()

    # ---- topics

    @explains_kafka_arguments("Admin.create_topic")
    async def create_topic(
        self,
        topic: str,
        partitions: int = 1,
        *,
        retention_ms: int | None = None,
        retention_bytes: int | None = None,
        min_acks: Acks = "wal",
        unclean_recovery_after_ms: int | None = None,
        if_not_exists: bool = False,
    ) -> Topic:
        """Creates a topic and returns it; with `if_not_exists` returns an existing topic of that name unchanged.
        Retention None keeps records for ever; retention_bytes is per partition. Raises TopicExists, InvalidArgument
        (name, partitions, retention or min_acks out of their limits)."""
        check_topic(partitions, min_acks, retention_ms, retention_bytes, unclean_recovery_after_ms)
        request = coordinator_pb2.CreateTopicRequest(
            topic=topic,
            partitions=partitions,
            retention_ms=retention_ms,
            retention_bytes=retention_bytes,
            min_acks=ACKS[min_acks],
            unclean_recovery_after_ms=unclean_recovery_after_ms,
        )
        try:
            return topic_of(await self._peers.coordinator.create_topic(request))
        # After the refusal, not before the request: between a look and a creation another client could create the
        # topic.
        except TopicExists:
            if not if_not_exists:
                raise
        return (await self.describe_topic(topic)).topic

    @explains_kafka_arguments("Admin.alter_topic")
    async def alter_topic(
        self,
        topic: str,
        *,
        partitions: int | None = None,
        retention_ms: int | Literal["unset"] | None = None,
        retention_bytes: int | Literal["unset"] | None = None,
        min_acks: Acks | None = None,
        unclean_recovery_after_ms: int | Literal["unset"] | None = None,
    ) -> Topic:
        """Changes settings of a topic and returns the topic with its new settings: None leaves a setting, "unset"
        removes it. The number of partitions can only grow, and keys are spread over all partitions from then on. Raises
        UnknownTopic, InvalidArgument (also for a min_acks that would become, or stop being, durable)."""
        settings = {
            "retention_ms": retention_ms,
            "retention_bytes": retention_bytes,
            "unclean_recovery_after_ms": unclean_recovery_after_ms,
        }
        values = {name: None if value == "unset" else value for name, value in settings.items()}
        check_topic(1 if partitions is None else partitions, "wal" if min_acks is None else min_acks, **values)
        request = coordinator_pb2.AlterTopicRequest(
            topic=topic,
            partitions=partitions,
            min_acks=types_pb2.ACKS_UNSPECIFIED if min_acks is None else ACKS[min_acks],
            unset=[name for name, value in settings.items() if value == "unset"],
            **values,
        )
        return topic_of(await self._peers.coordinator.alter_topic(request))

    async def topic_configs(self, topic: str) -> list[TopicConfig]:
        """Returns every setting of the topic with its value, its default and how it may be altered. Raises
        UnknownTopic."""
        request = coordinator_pb2.GetMetadataRequest(topics=[topic])
        response = await self._peers.coordinator.get_metadata(request)
        return configs_of(topic_of(response.topics[0].topic))

    async def list_topics(self) -> list[Topic]:
        """Returns all topics."""
        response = await self._peers.coordinator.list_topics(coordinator_pb2.ListTopicsRequest())
        return [topic_of(info) for info in response.topics]

    async def describe_topic(self, topic: str) -> TopicDescription:
        """Returns the topic with its partitions, their leaders, offset ranges and sizes. Raises UnknownTopic."""
        response = await self._peers.coordinator.describe_topic(coordinator_pb2.DescribeTopicRequest(topic=topic))
        return TopicDescription(topic_of(response.topic), tuple(partition_of(info) for info in response.partitions))

    async def delete_topic(self, topic: str) -> str:
        """Deletes a topic with its records, and returns its id. Raises UnknownTopic."""
        response = await self._peers.coordinator.delete_topic(coordinator_pb2.DeleteTopicRequest(topic=topic))
        return response.topic_id.hex()

    async def delete_producer(self, name: str) -> int:
        """Forgets a named producer, and returns its id. The next that takes the name over gets another id, whose stream
        begins at sequence 0 everywhere. Raises UnknownProducer."""
        response = await self._peers.coordinator.delete_producer(coordinator_pb2.DeleteProducerRequest(name=name))
        return response.producer_id

    async def delete_records(self, topic: str, partition: int, before_offset: int) -> DeletedRecords:
        """Deletes the records of a partition below an offset: they cannot be read any more, and objects that hold
        nothing else are deleted later. Returns the new start of the log. Idempotent. Raises UnknownTopic,
        UnknownPartition, InvalidArgument (some records below are not in segments yet)."""
        request = coordinator_pb2.DeleteRecordsRequest(
            topic=topic,
            partition=partition_number(partition),
            before_offset=offset_number("before_offset", before_offset),
        )
        answer = await self._peers.coordinator.delete_records(request)
        return DeletedRecords(
            log_start_offset=answer.log_start_offset,
            segments_removed=answer.segments_removed,
            bytes_removed=answer.bytes_removed,
        )

    # ---- the cluster

    async def status(self) -> ClusterStatus:
        """Returns the sessions, leases and backlog of the cluster, and failures that need an operator."""
        response = await self._peers.coordinator.get_status(coordinator_pb2.GetStatusRequest())
        return ClusterStatus(
            sessions=tuple(session_of(info) for info in response.sessions),
            leases=tuple(lease_of(info) for info in response.leases),
            buffers_waiting=response.buffers_waiting,
            buffers_claimed=response.buffers_claimed,
            buffers_waiting_bytes=response.buffers_waiting_bytes,
            events_position=response.events_position,
            outbox_position=response.outbox_position,
            missing_position=response.missing_position,
            buffer_failures=tuple(
                BufferFailure(
                    buffer_id=item.buffer_id,
                    agent_id=item.agent_id,
                    attempt=item.attempt,
                    reason=item.reason,
                    size_bytes=item.size_bytes,
                )
                for item in response.buffer_failures
            ),
            unreachable_agents=tuple(
                UnreachableAgent(
                    agent_id=item.agent_id,
                    address=item.address,
                    cut_off=item.cut_off,
                    failing=tuple(item.failing),
                    reaching=tuple(item.reaching),
                    since_ms=item.since_ms,
                )
                for item in response.unreachable_agents
            ),
        )

    # ---- offsets

    async def offsets(
        self, topic: str, at: Literal["earliest", "latest"] | int | datetime, partitions: Iterable[int] | None = None
    ) -> dict[TopicPartition, FoundOffset]:
        """Returns the offset at which each partition begins ("earliest") or ends ("latest"), or the first record at or
        after a time (datetime, or milliseconds since 1970-01-01 UTC). Raises UnknownTopic, UnknownPartition,
        Unavailable (no query service)."""
        at = looked_up_place("at", at, "milliseconds since 1970")
        await self._metadata.refresh(topic)  # the name may belong to another topic now
        state = await self._metadata.topic(topic)
        if partitions is None:
            partitions = range(state.partitions)
        addresses = await self._metadata.query_addresses()
        if not addresses:
            raise Unavailable("no query service has a session with the coordinator")
        lookups = [lookup_of(topic, partition, state.topic_id, at) for partition in partitions]
        request = query_pb2.LookupOffsetsRequest(lookups=lookups)
        response = await self._peers.query(addresses).lookup_offsets(request)
        return {
            TopicPartition(found.topic, found.partition): FoundOffset(found.offset, found.timestamp_ms)
            for found in response.offsets
        }

    async def group_offsets(self, group: str) -> list[CommittedOffset]:
        """Returns the committed positions of a group. Raises UnknownGroup."""
        request = coordinator_pb2.FetchOffsetsRequest(group=group)
        response = await self._peers.coordinator.fetch_offsets(request)
        return [
            CommittedOffset(
                topic=found.topic,
                partition=found.partition,
                offset=found.offset,
                metadata=found.metadata,
                committed_ms=found.committed_ms,
                topic_id=found.topic_id.hex(),
            )
            for found in response.offsets
            if found.offset >= 0
        ]

    async def commit_group_offsets(
        self,
        group: str,
        offsets: Mapping[tuple[str, int], int | OffsetAndMetadata],
        *,
        topic_ids: Mapping[str, str] | None = None,
    ) -> None:
        """Sets the positions at which a group without members continues: (topic, partition) -> offset. Raises
        IllegalGeneration or UnknownMember while the group has members, InvalidArgument for offsets of another shape.

        `topic_ids`: by name, the ids of the topics that the offsets belong to, as Topic and CommittedOffset have them.
        If a name belongs to another topic by now, raises UnknownTopic and sets nothing. A name without an id means the
        current topic of that name.
        """
        positions = committed_positions(offsets)
        ids = topic_ids_of(topic_ids or {}, {topic for topic, _ in positions})
        commits = [
            coordinator_pb2.OffsetCommit(
                topic=topic, partition=partition, offset=offset, metadata=metadata, topic_id=ids.get(topic, b"")
            )
            for (topic, partition), (offset, metadata) in positions.items()
        ]
        await self._peers.coordinator.commit_offsets(coordinator_pb2.CommitOffsetsRequest(group=group, offsets=commits))

    # ---- consumer groups, for operators

    async def list_groups(self) -> list[Group]:
        """Returns a summary of each consumer group."""
        response = await self._peers.coordinator.list_groups(coordinator_pb2.ListGroupsRequest())
        return [group_of(info) for info in response.groups]

    async def describe_group(self, group: str) -> GroupDescription:
        """Returns the members of a group with their assigned and owned partitions, and its positions and lag. Raises
        UnknownGroup."""
        request = coordinator_pb2.DescribeGroupRequest(group=group)
        response = await self._peers.coordinator.describe_group(request)
        partitions = [TopicPartition(item.topic, item.partition) for item in response.partitions]
        try:
            ends = await self._offsets_at("latest", partitions)
        except Unavailable:
            ends = {}  # members and positions are needed most while no query service answers
        return description_of(response, ends)

    async def reset_offsets(
        self, group: str, to: ResetTo, *, topic: str | None = None, partition: int | None = None, execute: bool = False
    ) -> list[OffsetReset]:
        """Returns the position at which the group would continue, an entry per partition: all partitions that the group
        has committed, or all of `topic`, or only its `partition`. With `execute` also sets these positions; then raises
        GroupNotEmpty while the group has members.

        Raises UnknownGroup (unless a topic is named), UnknownTopic, UnknownPartition, Unavailable.
        """
        to = looked_up_place("to", to, "an offset")
        committed = await self._committed(group, required=topic is None)
        if topic is None:
            partitions = [where for where in committed if partition is None or where.partition == partition]
        elif partition is None:
            partitions = [TopicPartition(topic, n) for n in range((await self._metadata.topic(topic)).partitions)]
        else:
            partitions = [TopicPartition(topic, partition)]
        starts = await self._offsets_at("earliest", partitions)
        topics = {name: await self._metadata.topic(name) for name in {where.topic for where in partitions}}
        ends = await self._offsets_at("latest", partitions)
        wanted = await self._wanted(to, partitions, starts, ends)
        plan = [
            reset_of(where, committed.get(where), wanted[where], starts[where], ends[where]) for where in partitions
        ]
        if execute and plan:
            commits = [
                coordinator_pb2.OffsetCommit(
                    # With the id of the topic read above: the coordinator refuses the reset if the name belongs to
                    # another topic by now.
                    topic=r.topic,
                    partition=r.partition,
                    offset=r.offset,
                    topic_id=topics[r.topic].topic_id,
                )
                for r in plan
            ]
            request = coordinator_pb2.ResetOffsetsRequest(group=group, offsets=commits)
            await self._peers.coordinator.reset_offsets(request)
        return plan

    async def _committed(self, group: str, *, required: bool) -> dict[TopicPartition, int]:
        try:
            offsets = await self.group_offsets(group)
        except UnknownGroup:
            if required:
                raise
            return {}
        return {TopicPartition(item.topic, item.partition): item.offset for item in offsets}

    async def _wanted(
        self,
        to: ResetTo,
        partitions: Sequence[TopicPartition],
        starts: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
    ) -> Mapping[TopicPartition, int]:
        if to == "earliest":
            return starts
        if to == "latest":
            return ends
        if isinstance(to, datetime):
            return await self._offsets_at(to, partitions)
        return dict.fromkeys(partitions, int(to))

    async def _offsets_at(
        self, at: Literal["earliest", "latest"] | datetime, partitions: Iterable[TopicPartition]
    ) -> dict[TopicPartition, int]:
        by_topic: dict[str, list[int]] = {}
        for where in partitions:
            by_topic.setdefault(where.topic, []).append(where.partition)
        found: dict[TopicPartition, int] = {}
        for topic, numbers in by_topic.items():
            for first in range(0, len(numbers), LOOKUPS_MAX):
                answers = await self.offsets(topic, at, numbers[first : first + LOOKUPS_MAX])
                found |= {where: answer.offset for where, answer in answers.items()}
        return found

    async def delete_group(self, group: str) -> None:
        """Deletes a group with its committed offsets. Raises UnknownGroup, GroupNotEmpty."""
        await self._peers.coordinator.delete_group(coordinator_pb2.DeleteGroupRequest(group=group))

    # ---- ranges whose agent is gone

    async def orphaned_ranges(self, topic: str, partition: int) -> list[OffsetRange]:
        """Returns the offset ranges of the partition whose unregistered records only a lost agent has; readers wait for
        them. Raises UnknownTopic, UnknownPartition."""
        described = await self.describe_topic(topic)
        if partition >= len(described.partitions):
            raise UnknownPartition(
                f"topic {topic!r} has {len(described.partitions)} partitions, there is no {partition}",
                topic=topic,
                partition=partition,
                partitions=len(described.partitions),
            )
        return [owned for owned in described.partitions[partition].ranges if owned.status == "orphaned"]

    async def declare_lost(
        self, topic: str, partition: int, epochs: Sequence[int], reason: str = ""
    ) -> list[OffsetRange]:
        """Declares the unregistered records of these orphaned ranges lost, for good: records of a returning agent are
        refused. Returns the ranges as they are after that; a range that was settled meanwhile stays settled. Raises
        UnknownTopic, UnknownPartition, InvalidArgument for a range that has a leader."""
        request = coordinator_pb2.DeclareLostRequest(topic=topic, partition=partition, epochs=epochs, reason=reason)
        response = await self._peers.coordinator.declare_lost(request)
        return [range_of(info) for info in response.ranges]


def lookup_of(topic: str, partition: int, topic_id: bytes, at: Place) -> query_pb2.OffsetLookup:
    """Returns the request for the offset of a position. Raises InvalidArgument for a datetime without a time zone."""
    lookup = query_pb2.OffsetLookup(topic=topic, partition=partition, topic_id=topic_id)
    if at == "earliest":
        lookup.spec = query_pb2.OFFSET_SPEC_EARLIEST
    elif at == "latest":
        lookup.spec = query_pb2.OFFSET_SPEC_LATEST
    elif isinstance(at, LastRecords):
        lookup.spec = query_pb2.OFFSET_SPEC_LAST_RECORDS
        lookup.record_count = at.count
    else:
        lookup.spec = query_pb2.OFFSET_SPEC_TIMESTAMP
        lookup.timestamp_ms = ms_of("time", at) if isinstance(at, datetime) else int(at)
    return lookup
