"""Consumer groups as operators see them: dataclasses, made of the coordinator's messages, and how lag and new positions
are computed."""

import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from shproto.errors import InvalidArgument
from shproto.v1 import coordinator_pb2

from streamhouse.core.lag import lag_behind
from streamhouse.records import TopicPartition

# Target of `Admin.reset_offsets`: an end of each partition, an offset, or a time.
ResetTo = Literal["earliest", "latest"] | int | datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Summary of a consumer group. state: empty | rebalancing | stable."""

    group: str
    state: str
    generation: int
    members: int
    committed_partitions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMember:
    """A member of a group. assigned: its partitions in the newest generation. owned: partitions that it works on until
    it gives them up."""

    member_id: str
    client_id: str
    topics: tuple[str, ...]
    assigned: tuple[TopicPartition, ...]
    owned: tuple[TopicPartition, ...]
    session_timeout_ms: int
    expires_in_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPosition:
    """Position of a group in a partition. offset None: nothing is committed, so there is no lag.

    lag: records from there to the end; a lower bound unless lag_exact, while a lost agent may hold further records.
    end_offset None: no query service answered.
    """

    topic: str
    partition: int
    member_id: str
    offset: int | None
    log_start_offset: int
    end_offset: int | None
    lag: int | None
    lag_exact: bool
    metadata: str
    committed_ms: int


@dataclass(frozen=True, slots=True)
class GroupDescription:
    """A group with its members and its position in each partition."""

    group: Group
    members: tuple[GroupMember, ...]
    positions: tuple[GroupPosition, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetReset:
    """New position of a group in a partition, `offset`. before None: nothing was committed. clamped: the offset asked
    for lies outside of [log_start_offset, end_offset], and `offset` is the nearest inside."""

    topic: str
    partition: int
    before: int | None
    offset: int
    log_start_offset: int
    end_offset: int
    clamped: bool


def group_of(info: coordinator_pb2.GroupSummary) -> Group:
    """Returns the summary of a group from the coordinator's message."""
    return Group(
        group=info.group,
        state=info.state,
        generation=info.generation,
        members=info.members,
        committed_partitions=info.committed_partitions,
    )


def description_of(info: coordinator_pb2.DescribeGroupResponse, ends: Mapping[TopicPartition, int]) -> GroupDescription:
    """Returns the description of a group. `ends`: end offsets of the partitions, as far as they are known."""
    return GroupDescription(
        group_of(info.summary),
        tuple(_member(item) for item in info.members),
        tuple(_position(item, ends.get(TopicPartition(item.topic, item.partition))) for item in info.partitions),
    )


def _member(info: coordinator_pb2.GroupMember) -> GroupMember:
    return GroupMember(
        member_id=info.member_id,
        client_id=info.client_id,
        topics=tuple(info.topics),
        assigned=_partitions(info.assigned),
        owned=_partitions(info.owned),
        session_timeout_ms=info.session_timeout_ms,
        expires_in_ms=info.expires_in_ms,
    )


def _partitions(items: Iterable[coordinator_pb2.TopicPartition]) -> tuple[TopicPartition, ...]:
    return tuple(TopicPartition(item.topic, item.partition) for item in items)


def _position(info: coordinator_pb2.GroupPartition, end: int | None) -> GroupPosition:
    committed = info.offset if info.offset >= 0 else None
    lag = None
    if committed is not None and end is not None:
        position = max(committed, info.log_start_offset)
        lag = lag_behind(position, end, info.newest_start_offset, info.older_records, info.exact)
    return GroupPosition(
        topic=info.topic,
        partition=info.partition,
        member_id=info.member_id,
        offset=committed,
        log_start_offset=info.log_start_offset,
        end_offset=end,
        lag=None if lag is None else lag.records,
        lag_exact=lag is None or lag.exact,
        metadata=info.metadata,
        committed_ms=info.committed_ms,
    )


def reset_of(where: TopicPartition, before: int | None, wanted: int, log_start: int, end: int) -> OffsetReset:
    """Returns the new position: `wanted`, or the nearest offset that the log has."""
    offset = min(max(wanted, log_start), max(end, log_start))
    return OffsetReset(
        topic=where.topic,
        partition=where.partition,
        before=before,
        offset=offset,
        log_start_offset=log_start,
        end_offset=end,
        clamped=offset != wanted,
    )


def topic_ids_of(topic_ids: Mapping[str, str], topics: Collection[str]) -> dict[str, bytes]:
    """Returns topic ids as bytes from their 32 hex digits. Raises InvalidArgument for text that is no id, or a topic
    that is not in `topics`."""
    found = {}
    for topic, topic_id in topic_ids.items():
        if topic not in topics:
            raise InvalidArgument(f"topic_ids names topic {topic!r}, offsets do not", field="topic_ids", value=topic)
        try:
            found[topic] = uuid.UUID(hex=topic_id).bytes
        except ValueError as error:
            raise InvalidArgument(
                f"topic_ids has {topic_id[:100]!r} for topic {topic!r}, which is no topic id: 32 hex digits",
                field="topic_ids",
                value=topic_id[:100],
            ) from error
    return found
