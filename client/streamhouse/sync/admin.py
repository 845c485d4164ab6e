"""The admin for plain code: `streamhouse.Admin` without `await`."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Literal, Self

from shproto.acks import Acks
from shproto.rpc import Interceptors

from streamhouse import admin, cluster, group_admin
from streamhouse.background import BACKGROUND
from streamhouse.core.kafka_names import explains_kafka_arguments, explains_kafka_methods, explains_kafka_names
from streamhouse.core.sync_mismatch import PlainContext
from streamhouse.records import OffsetAndMetadata, TopicPartition


@explains_kafka_methods("Admin")
class Admin(PlainContext):
    """Administers topics, offsets, groups and the cluster; `streamhouse.Admin` explains options and results."""

    @explains_kafka_names("Admin")
    def __init__(
        self,
        bootstrap: str | Sequence[str],
        *,
        request_timeout_ms: int = admin.REQUEST_TIMEOUT_MS,
        retry_timeout_ms: int = admin.RETRY_TIMEOUT_MS,
        telemetry: Interceptors | None = None,
    ) -> None:
        self._inner = admin.Admin(
            bootstrap,
            request_timeout_ms=request_timeout_ms,
            retry_timeout_ms=retry_timeout_ms,
            telemetry=telemetry,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @explains_kafka_arguments("Admin.create_topic")
    def create_topic(
        self,
        topic: str,
        partitions: int = 1,
        *,
        retention_ms: int | None = None,
        retention_bytes: int | None = None,
        min_acks: Acks = "wal",
        unclean_recovery_after_ms: int | None = None,
        if_not_exists: bool = False,
    ) -> cluster.Topic:
        """Creates a topic and returns it; with `if_not_exists` returns an existing topic of that name unchanged. Raises
        TopicExists, InvalidArgument."""
        return BACKGROUND.run(
            self._inner.create_topic(
                topic,
                partitions,
                retention_ms=retention_ms,
                retention_bytes=retention_bytes,
                min_acks=min_acks,
                unclean_recovery_after_ms=unclean_recovery_after_ms,
                if_not_exists=if_not_exists,
            )
        )

    @explains_kafka_arguments("Admin.alter_topic")
    def alter_topic(
        self,
        topic: str,
        *,
        partitions: int | None = None,
        retention_ms: int | Literal["unset"] | None = None,
        retention_bytes: int | Literal["unset"] | None = None,
        min_acks: Acks | None = None,
        unclean_recovery_after_ms: int | Literal["unset"] | None = None,
    ) -> cluster.Topic:
        """Changes settings of a topic and returns the topic with its new settings: None leaves a setting, "unset"
        removes it. Raises UnknownTopic, InvalidArgument."""
        return BACKGROUND.run(
            self._inner.alter_topic(
                topic,
                partitions=partitions,
                retention_ms=retention_ms,
                retention_bytes=retention_bytes,
                min_acks=min_acks,
                unclean_recovery_after_ms=unclean_recovery_after_ms,
            )
        )

    def topic_configs(self, topic: str) -> list[cluster.TopicConfig]:
        """Returns every setting of the topic with its value, its default and how it may be altered. Raises
        UnknownTopic."""
        return BACKGROUND.run(self._inner.topic_configs(topic))

    def list_topics(self) -> list[cluster.Topic]:
        """Returns all topics."""
        return BACKGROUND.run(self._inner.list_topics())

    def describe_topic(self, topic: str) -> cluster.TopicDescription:
        """Returns the topic with its partitions, their leaders, offset ranges and sizes. Raises UnknownTopic."""
        return BACKGROUND.run(self._inner.describe_topic(topic))

    def delete_topic(self, topic: str) -> str:
        """Deletes a topic with its records, and returns its id. Raises UnknownTopic."""
        return BACKGROUND.run(self._inner.delete_topic(topic))

    def delete_producer(self, name: str) -> int:
        """Forgets a named producer, and returns its id. Raises UnknownProducer."""
        return BACKGROUND.run(self._inner.delete_producer(name))

    def delete_records(self, topic: str, partition: int, before_offset: int) -> cluster.DeletedRecords:
        """Deletes the records of a partition below an offset; returns the new start of the log. Raises UnknownTopic,
        UnknownPartition, InvalidArgument."""
        return BACKGROUND.run(self._inner.delete_records(topic, partition, before_offset))

    def status(self) -> cluster.ClusterStatus:
        """Returns the sessions, leases and backlog of the cluster, and failures that need an operator."""
        return BACKGROUND.run(self._inner.status())

    def offsets(
        self, topic: str, at: Literal["earliest", "latest"] | int | datetime, partitions: Iterable[int] | None = None
    ) -> dict[TopicPartition, cluster.FoundOffset]:
        """Returns the offset at which each partition begins or ends, or the first record at or after a time. Raises
        UnknownTopic, UnknownPartition, Unavailable (no query service)."""
        return BACKGROUND.run(self._inner.offsets(topic, at, partitions))

    def group_offsets(self, group: str) -> list[cluster.CommittedOffset]:
        """Returns the committed positions of a group. Raises UnknownGroup."""
        return BACKGROUND.run(self._inner.group_offsets(group))

    def commit_group_offsets(
        self,
        group: str,
        offsets: Mapping[tuple[str, int], int | OffsetAndMetadata],
        *,
        topic_ids: Mapping[str, str] | None = None,
    ) -> None:
        """Sets the positions at which a group without members continues. Raises IllegalGeneration or UnknownMember
        while the group has members, UnknownTopic if a topic does not have the id in `topic_ids`."""
        BACKGROUND.run(self._inner.commit_group_offsets(group, offsets, topic_ids=topic_ids))

    def list_groups(self) -> list[group_admin.Group]:
        """Returns a summary of each consumer group."""
        return BACKGROUND.run(self._inner.list_groups())

    def describe_group(self, group: str) -> group_admin.GroupDescription:
        """Returns the members of a group with their assigned and owned partitions, and its positions and lag. Raises
        UnknownGroup."""
        return BACKGROUND.run(self._inner.describe_group(group))

    def reset_offsets(
        self,
        group: str,
        to: group_admin.ResetTo,
        *,
        topic: str | None = None,
        partition: int | None = None,
        execute: bool = False,
    ) -> list[group_admin.OffsetReset]:
        """Returns the position at which the group would continue, for each partition; sets these positions only with
        `execute`, and then raises GroupNotEmpty while the group has members."""
        return BACKGROUND.run(self._inner.reset_offsets(group, to, topic=topic, partition=partition, execute=execute))

    def delete_group(self, group: str) -> None:
        """Deletes a group with its committed offsets. Raises UnknownGroup, GroupNotEmpty."""
        BACKGROUND.run(self._inner.delete_group(group))

    def orphaned_ranges(self, topic: str, partition: int) -> list[cluster.OffsetRange]:
        """Returns the offset ranges of the partition whose unregistered records only a lost agent has. Raises
        UnknownTopic, UnknownPartition."""
        return BACKGROUND.run(self._inner.orphaned_ranges(topic, partition))

    def declare_lost(
        self, topic: str, partition: int, epochs: Sequence[int], reason: str = ""
    ) -> list[cluster.OffsetRange]:
        """Declares the unregistered records of these orphaned ranges lost, for good. Returns the ranges as they are
        after that. Raises UnknownTopic, UnknownPartition, InvalidArgument for a range that has a leader."""
        return BACKGROUND.run(self._inner.declare_lost(topic, partition, epochs, reason))

    def close(self) -> None:
        """Closes the connections."""
        BACKGROUND.run(self._inner.close())
