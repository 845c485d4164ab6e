"""Creating topics: what a user may ask for."""

from collections.abc import Collection

from shproto.errors import InvalidArgument, Overloaded, TopicExists
from shproto.events import TopicCreated

from streamhouse_coordinator.core.names import check_number, check_topic
from streamhouse_coordinator.core.tables import TopicRow

ACKS_NONE, ACKS_WAL, ACKS_DURABLE = 1, 2, 3  # as Acks in the proto
DURATION_MS_MAX = 100 * 366 * 24 * 3600 * 1000  # a hundred years: longer is a mistake in the unit
BYTES_MAX = 2**60


def check_create(command: TopicCreated, partitions_max: int) -> None:
    """Raises InvalidArgument that names the field, its limit and the value."""
    check_topic(command.topic)
    check_number("partitions", command.partitions, 1, partitions_max)
    if command.retention_ms is not None:
        check_number("retention_ms", command.retention_ms, 1, DURATION_MS_MAX)
    if command.retention_bytes is not None:
        check_number("retention_bytes", command.retention_bytes, 1, BYTES_MAX)
    if command.unclean_recovery_after_ms is not None:
        check_number("unclean_recovery_after_ms", command.unclean_recovery_after_ms, 0, DURATION_MS_MAX)
    if command.min_acks not in (ACKS_NONE, ACKS_WAL, ACKS_DURABLE):
        raise InvalidArgument(
            f"min_acks must be none, wal or durable, got {command.min_acks}", field="min_acks", value=command.min_acks
        )


def create(command: TopicCreated, same_name: Collection[TopicRow], topic_count: int, topics_max: int) -> TopicCreated:
    """Raises TopicExists, or Overloaded when there are too many topics."""
    if same_name:
        raise TopicExists(f"topic {command.topic!r} exists already", topic=command.topic)
    if topic_count >= topics_max:
        raise Overloaded(
            f"{topic_count} topics exist; the limit topics_max is {topics_max}", limit=topics_max, value=topic_count
        )
    return command


def durable(topic: TopicRow) -> bool:
    """Whether only records in the object store are acknowledged."""
    return topic.min_acks == ACKS_DURABLE
