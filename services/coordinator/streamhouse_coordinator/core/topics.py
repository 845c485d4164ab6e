"""Checks and decides the creation and alteration of topics. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shproto.acks import ACKS_DURABLE, ACKS_NAMES
from shproto.errors import InvalidArgument, Overloaded, TopicExists, UnknownPartition
from shproto.events import TopicAltered, TopicCreated

from streamhouse_coordinator.core.names import check_number, check_topic
from streamhouse_coordinator.core.tables import TopicRow

DURATION_MS_MAX = 100 * 366 * 24 * 3600 * 1000  # a hundred years: longer is a mistake in the unit
BYTES_MAX = 2**60

# Settings that may be unset, with their limits.
OPTIONAL_LIMITS = {
    "retention_ms": (1, DURATION_MS_MAX),
    "retention_bytes": (1, BYTES_MAX),
    "unclean_recovery_after_ms": (0, DURATION_MS_MAX),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AlterTopic:
    """Changes of a topic. `settings`: values of OPTIONAL_LIMITS to set, None to unset. In other fields None means
    unchanged."""

    topic: str
    partitions: int | None = None
    min_acks: int | None = None
    settings: Mapping[str, int | None] = field(default_factory=dict)


def check_create(command: TopicCreated, partitions_max: int) -> None:
    """Checks a new topic. Raises InvalidArgument that names the field, its limit and the value."""
    check_topic(command.topic)
    check_number("partitions", command.partitions, 1, partitions_max)
    for name, (least, most) in OPTIONAL_LIMITS.items():
        if (value := getattr(command, name)) is not None:
            check_number(name, value, least, most)
    _check_min_acks(command.min_acks)


def create(command: TopicCreated, same_name: Collection[TopicRow], topic_count: int, topics_max: int) -> TopicCreated:
    """Returns the event of a new topic. Raises TopicExists, or Overloaded if there are too many topics."""
    if same_name:
        raise TopicExists(f"topic {command.topic!r} exists already", topic=command.topic)
    if topic_count >= topics_max:
        raise Overloaded(
            f"{topic_count} topics exist; the limit topics_max is {topics_max}", limit=topics_max, value=topic_count
        )
    return command


def check_alter(command: AlterTopic, partitions_max: int) -> None:
    """Checks an alteration without knowledge of the topic. Raises InvalidArgument that names the field, its limit and
    the value."""
    if command.partitions is None and command.min_acks is None and not command.settings:
        raise InvalidArgument(f"nothing of topic {command.topic!r} is to be altered", field="partitions", value=None)
    if command.partitions is not None:
        check_number("partitions", command.partitions, 1, partitions_max)
    if command.min_acks is not None:
        _check_min_acks(command.min_acks)
    for name, value in command.settings.items():
        if name not in OPTIONAL_LIMITS:
            raise InvalidArgument(
                f"unset names {name!r}, must be of {', '.join(OPTIONAL_LIMITS)}",
                field="unset",
                value=name,
                limit=list(OPTIONAL_LIMITS),
            )
        if value is not None:
            check_number(name, value, *OPTIONAL_LIMITS[name])


def alter(command: AlterTopic, topic: TopicRow) -> TopicAltered | None:
    """Returns the change; None if the topic is as requested. Raises InvalidArgument for fewer partitions, and for a
    change of min_acks to or from durable.

    A range of a durable topic ends at the registered end, even if the log of the leader has more. A change to durable
    would lose records that were acknowledged from the log, and the coordinator does not know which ranges have such
    records.
    """
    before = topic.partitions
    partitions = before if command.partitions is None else command.partitions
    if partitions < before:
        raise InvalidArgument(
            f"topic {topic.topic!r} has {before} partitions and cannot have fewer, got {partitions}",
            field="partitions",
            value=partitions,
            limit=before,
        )
    min_acks = topic.min_acks if command.min_acks is None else command.min_acks
    if min_acks != topic.min_acks and ACKS_DURABLE in (min_acks, topic.min_acks):
        raise InvalidArgument(
            f"min_acks of topic {topic.topic!r} cannot change to or from durable: that is decided when it is created",
            field="min_acks",
            value=min_acks,
            limit=topic.min_acks,
        )
    changes: dict[str, Any] = {"partitions": partitions, "min_acks": min_acks, **command.settings}
    altered = replace(topic, **changes)
    if altered == topic:
        return None
    return TopicAltered(
        topic_id=topic.topic_id,
        topic=topic.topic,
        partitions_before=before,
        partitions=partitions,
        retention_ms=altered.retention_ms,
        retention_bytes=altered.retention_bytes,
        min_acks=min_acks,
        unclean_recovery_after_ms=altered.unclean_recovery_after_ms,
    )


def _check_min_acks(min_acks: int) -> None:
    if min_acks not in ACKS_NAMES:
        raise InvalidArgument(
            f"min_acks must be none, wal or durable, got {min_acks}", field="min_acks", value=min_acks
        )


def check_partition(topic: TopicRow, partition: int) -> None:
    """Checks that the topic has the partition. Raises UnknownPartition."""
    if partition >= topic.partitions:
        raise UnknownPartition(
            f"topic {topic.topic!r} has {topic.partitions} partitions, there is no {partition}",
            topic=topic.topic,
            partition=partition,
            partitions=topic.partitions,
        )
