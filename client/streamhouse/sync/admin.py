"""The admin for plain code."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Literal, Self

from shproto.rpc import Interceptors

from streamhouse import admin, cluster, group_admin
from streamhouse.background import BACKGROUND
from streamhouse.core.kafka_names import explains_kafka_arguments, explains_kafka_methods, explains_kafka_names
from streamhouse.core.options import Acks
from streamhouse.core.sync_mismatch import PlainContext
from streamhouse.records import OffsetAndMetadata, TopicPartition


@explains_kafka_methods("Admin")
class Admin(PlainContext):
    """Topics, offsets, status; see `streamhouse.Admin`."""

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
        """Returns the topic created; with `if_not_exists` one that there is. Raises TopicExists, InvalidArgument."""
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
        """Returns the topic as it is then; what is None stays, "unset" removes a setting. Raises UnknownTopic,
        InvalidArgument."""
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
        """Returns every setting of the topic with its default, and how it may be altered. Raises UnknownTopic."""
        return BACKGROUND.run(self._inner.topic_configs(topic))

    def list_topics(self) -> list[cluster.Topic]:
        return BACKGROUND.run(self._inner.list_topics())

    def describe_topic(self, topic: str) -> cluster.TopicDescription:
        """Raises UnknownTopic."""
        return BACKGROUND.run(self._inner.describe_topic(topic))

    def delete_topic(self, topic: str) -> str:
        """The deleted topic's id. Raises UnknownTopic."""
        return BACKGROUND.run(self._inner.delete_topic(topic))

    def delete_records(self, topic: str, partition: int, before_offset: int) -> cluster.DeletedRecords:
        """Deletes the records of a partition below an offset; returns where the log starts then. Raises UnknownTopic,
        UnknownPartition, InvalidArgument."""
        return BACKGROUND.run(self._inner.delete_records(topic, partition, before_offset))

    def status(self) -> cluster.ClusterStatus:
        return BACKGROUND.run(self._inner.status())

    def offsets(
        self, topic: str, at: Literal["earliest", "latest"] | int | datetime, partitions: Iterable[int] | None = None
    ) -> dict[TopicPartition, cluster.FoundOffset]:
        """Where each partition begins, ends, or has its first record at or after a time."""
        return BACKGROUND.run(self._inner.offsets(topic, at, partitions))

    def group_offsets(self, group: str) -> list[cluster.CommittedOffset]:
        """What the group has committed. Raises UnknownGroup."""
        return BACKGROUND.run(self._inner.group_offsets(group))

    def commit_group_offsets(
        self,
        group: str,
        offsets: Mapping[tuple[str, int], int | OffsetAndMetadata],
        *,
        topic_ids: Mapping[str, str] | None = None,
    ) -> None:
        """Sets where a group without members goes on. Raises UnknownTopic where another topic than that of `topic_ids`
        has the name."""
        BACKGROUND.run(self._inner.commit_group_offsets(group, offsets, topic_ids=topic_ids))

    def list_groups(self) -> list[group_admin.Group]:
        return BACKGROUND.run(self._inner.list_groups())

    def describe_group(self, group: str) -> group_admin.GroupDescription:
        """Members, what they work on, positions and lag. Raises UnknownGroup."""
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
        """Where the group would go on; only with `execute` it does. Raises GroupNotEmpty then, while it has members."""
        return BACKGROUND.run(self._inner.reset_offsets(group, to, topic=topic, partition=partition, execute=execute))

    def delete_group(self, group: str) -> None:
        """With its committed offsets. Raises UnknownGroup, GroupNotEmpty."""
        BACKGROUND.run(self._inner.delete_group(group))

    def orphaned_ranges(self, topic: str, partition: int) -> list[cluster.OffsetRange]:
        """What readers of the partition wait for, and only an agent that is gone has."""
        return BACKGROUND.run(self._inner.orphaned_ranges(topic, partition))

    def declare_lost(
        self, topic: str, partition: int, epochs: Sequence[int], reason: str = ""
    ) -> list[cluster.OffsetRange]:
        """Gives up what is not registered of these orphaned ranges, for good."""
        return BACKGROUND.run(self._inner.declare_lost(topic, partition, epochs, reason))

    def close(self) -> None:
        BACKGROUND.run(self._inner.close())
