"""Operators' commands on consumer groups: list, describe, reset and delete."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shproto.errors import UnknownGroup
from shproto.events import GroupDeleted, OffsetChange, OffsetsReset

from streamhouse_coordinator.core import groups
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove
from streamhouse_coordinator.core.tables import PartitionRowKey
from streamhouse_coordinator.ports import EVERYTHING, In, Transaction, where
from streamhouse_coordinator.service.common import Context
from streamhouse_coordinator.service.groups import Commit, Loaded, load, lock_of, offset_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A consumer group in a list. state: empty | rebalancing | stable"""

    group: str
    state: str
    generation: int
    members: int
    committed_partitions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A member of a described group."""

    row: t.GroupMemberRow
    topics: list[str]
    assigned: list[str]
    owned: list[str]
    expires_in_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPosition:
    """Position of a group in a partition. `older_records`, `exact`: see core.groups.records_before."""

    topic: str
    partition: int
    member_id: str
    offset: t.GroupOffsetRow | None
    log_start_offset: int
    newest_start_offset: int
    older_records: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Description:
    summary: Summary
    members: list[Member]
    positions: list[GroupPosition]


async def list_groups(context: Context) -> list[Summary]:
    """Returns every group that has members, had members, or has commits; by name."""
    # Members, states and offsets have to be of the same moment: a rebalance in between would show owners without a
    # member.
    async with context.store.snapshot() as tx:
        rows = {row.group_name: row for row in await tx.select(t.GROUPS)}
        members: dict[str, list[t.GroupMemberRow]] = {}
        for member in await tx.select(t.GROUP_MEMBERS):
            members.setdefault(member.group_name, []).append(member)
        states: dict[str, list[t.GroupMemberStateRow]] = {}
        for state in await tx.select(t.GROUP_MEMBER_STATE):
            states.setdefault(state.group_name, []).append(state)
        counts = await tx.totals(t.GROUP_OFFSETS, EVERYTHING, by=("group_name",))
    commits = {row.group[0]: row.count for row in counts}
    return [
        _summary(_group(name, rows.get(name), members.get(name, []), states.get(name, [])), commits.get(name, 0))
        for name in sorted(rows.keys() | commits.keys())
    ]


def _group(
    name: str,
    row: t.GroupRow | None,
    members: Sequence[t.GroupMemberRow],
    states: Sequence[t.GroupMemberStateRow],
) -> groups.Group:
    assignment = json.loads(row.assignment) if row is not None else {}
    topics = {member.member_id: frozenset(json.loads(member.topics)) for member in members}
    owned = {state.member_id: frozenset(json.loads(state.owned)) for state in states if state.member_id in topics}
    target = {member_id: frozenset(names) for member_id, names in assignment.items()}
    return groups.Group(
        name=name, generation=row.generation if row is not None else 0, topics=topics, owned=owned, target=target
    )


def _summary(group: groups.Group, committed_partitions: int) -> Summary:
    state = groups.state_of(group)
    return Summary(
        group=group.name,
        state=state,
        generation=group.generation,
        members=len(group.topics),
        committed_partitions=committed_partitions,
    )


async def describe_group(context: Context, name: str) -> Description:
    """Returns the group, its members and its positions. Raises UnknownGroup."""
    async with context.store.snapshot() as tx:
        rows = await tx.select(t.GROUPS, where(group_name=name))
        commits = await tx.select(t.GROUP_OFFSETS, where(group_name=name))
        if not rows and not commits:
            raise _unknown(name)
        members = await tx.select(t.GROUP_MEMBERS, where(group_name=name), order=("member_id",))
        states = await tx.select(t.GROUP_MEMBER_STATE, where(group_name=name))
        group = _group(name, rows[0] if rows else None, members, states)
        expiry = {row.member_id: row.expires_ms - await tx.now_ms() for row in states}
        positions = await _positions(tx, group, commits)
    shown = [_member(group, row, expiry.get(row.member_id, 0)) for row in members]
    return Description(_summary(group, len(commits)), shown, positions)


def _unknown(name: str) -> UnknownGroup:
    return UnknownGroup(f"group {name!r} has no members and no committed offsets", group=name)


def _member(group: groups.Group, row: t.GroupMemberRow, expires_in_ms: int) -> Member:
    assigned = sorted(group.target.get(row.member_id, ()), key=groups.split_name)
    owned = sorted(group.owned.get(row.member_id, ()), key=groups.split_name)
    return Member(
        row=row, topics=sorted(group.topics[row.member_id]), assigned=assigned, owned=owned, expires_in_ms=expires_in_ms
    )


async def _positions(
    tx: Transaction, group: groups.Group, commits: Collection[t.GroupOffsetRow]
) -> list[GroupPosition]:
    read = {topic for wanted in group.topics.values() for topic in wanted}
    topics = {row.topic_id: row for row in await tx.select(t.TOPICS, where(topic=In(read)))}
    committed_ids = In({row.topic_id for row in commits})
    topics |= {row.topic_id: row for row in await tx.select(t.TOPICS, where(topic_id=committed_ids))}
    committed = {(row.topic_id, row.partition): row for row in commits if row.topic_id in topics}
    keys = set(committed) | {
        (row.topic_id, partition) for row in topics.values() if row.topic in read for partition in range(row.partitions)
    }
    partitions = await tx.select(t.PARTITIONS, where(topic_id=In(topics)))
    ranges: dict[PartitionRowKey, list[t.RangeRow]] = {}
    for item in await tx.select(t.RANGES, where(topic_id=In(topics)), order=t.RANGES.key):
        ranges.setdefault((item.topic_id, item.partition), []).append(item)
    holders = {name: member_id for member_id, names in group.owned.items() for name in names}
    found = [
        _position(topics[row.topic_id].topic, row, committed.get(key), ranges.get(key, []), holders)
        for row in partitions
        if (key := (row.topic_id, row.partition)) in keys
    ]
    return sorted(found, key=lambda item: (item.topic, item.partition))


def _position(
    topic: str,
    row: t.PartitionRow,
    commit: t.GroupOffsetRow | None,
    ranges: Sequence[t.RangeRow],
    holders: Mapping[str, str],
) -> GroupPosition:
    start = row.log_start_offset
    records, exact = groups.records_before(ranges[:-1], max(start, commit.next_offset if commit else 0))
    newest_start = max(start, ranges[-1].start_offset) if ranges else start
    member_id = holders.get(groups.name_of(topic, row.partition), "")
    return GroupPosition(
        topic=topic,
        partition=row.partition,
        member_id=member_id,
        offset=commit,
        log_start_offset=start,
        newest_start_offset=newest_start,
        older_records=records,
        exact=exact,
    )


async def reset_offsets(context: Context, name: str, commits: Sequence[Commit]) -> None:
    """Resets all offsets or none. Raises GroupNotEmpty, UnknownTopic, UnknownPartition."""

    async def work(tx: Transaction) -> None:
        loaded = await load(tx, name)
        groups.check_empty(loaded.group, "reset its offsets")
        # As with a commit: keeps the topic from being deleted before the offsets are written.
        rows = await tx.select(t.TOPICS, where(topic=In({item.topic for item in commits})), lock="share")
        topics = {row.topic: row for row in rows}
        now_ms = await tx.now_ms()
        after = [offset_row(name, topics, item, now_ms) for item in commits]
        before = {t.GROUP_OFFSETS.key_of(row): row for row in await tx.select(t.GROUP_OFFSETS, where(group_name=name))}
        changes = []
        for item, row in zip(commits, after, strict=True):
            held = before.get(t.GROUP_OFFSETS.key_of(row))
            previous = held.next_offset if held is not None else -1
            # An operator who repeats a reset causes no further event.
            if previous != row.next_offset:
                changes.append(
                    OffsetChange(
                        topic_id=row.topic_id,
                        topic=item.topic,
                        partition=row.partition,
                        offset_before=previous,
                        offset=row.next_offset,
                    )
                )
        if changes:
            await tx.append([OffsetsReset(name, tuple(changes))])
        await tx.apply([Put(t.GROUP_OFFSETS, row) for row in after])

    await context.store.run(work, lock=lock_of(name))


async def delete_group(context: Context, name: str) -> None:
    """Deletes the group and its committed offsets. Raises GroupNotEmpty, UnknownGroup."""

    async def work(tx: Transaction) -> None:
        loaded = await load(tx, name)
        groups.check_empty(loaded.group, "delete it")
        if not await _exists(tx, loaded):
            raise _unknown(name)
        await tx.append([GroupDeleted(name)])
        await tx.apply([Remove(table, {"group_name": name}) for table in (t.GROUP_OFFSETS, t.GROUP_MEMBER_STATE)])

    await context.store.run(work, lock=lock_of(name))


async def _exists(tx: Transaction, loaded: Loaded) -> bool:
    of_group = where(group_name=loaded.group.name)
    return bool(await tx.select(t.GROUPS, of_group) or await tx.select(t.GROUP_OFFSETS, of_group, limit=1))
