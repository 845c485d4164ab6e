"""Consumer groups: members, generations, committed offsets.

Invariant: a change of a group holds the group's lock, so a group changes in a single transaction at a time. Heartbeats
without a change take no lock.
"""

import asyncio
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from shproto.errors import Overloaded, StreamHouseError, UnknownGroup, UnknownMember, UnknownTopic
from shproto.events import Event, GroupMemberJoined, GroupMemberLeft, GroupRebalanced

from streamhouse_coordinator.core import groups
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove
from streamhouse_coordinator.core.topics import check_partition
from streamhouse_coordinator.ports import AtMost, In, Transaction, where
from streamhouse_coordinator.service import outages
from streamhouse_coordinator.service.common import Context

log = logging.getLogger(__name__)

Names = frozenset[groups.PartitionName]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    member_id: str
    generation: int
    assigned: Names
    session_timeout_ms: int
    pending: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A committed offset. `topic_id`: id of the topic that was read; empty: of the topic that has the name now."""

    topic: str
    partition: int
    next_offset: int
    metadata: str
    topic_id: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A group, its members' rows, and the number of partitions of each topic they read."""

    group: groups.Group
    members: dict[str, t.GroupMemberRow]
    partitions: dict[str, int]


def _encode(names: Collection[str]) -> str:
    return json.dumps(sorted(names), separators=(",", ":"))


def lock_of(name: str) -> str:
    """Returns the name of the lock that every change of the group holds."""
    return f"group/{name}"


async def load(tx: Transaction, name: str) -> Loaded:
    """Returns the group as it is; the caller holds the group's lock."""
    assert tx.locked == lock_of(name)
    rows = await tx.select(t.GROUPS, where(group_name=name))
    members = {row.member_id: row for row in await tx.select(t.GROUP_MEMBERS, where(group_name=name))}
    states = await tx.select(t.GROUP_MEMBER_STATE, where(group_name=name))
    topics = {member_id: frozenset(json.loads(row.topics)) for member_id, row in members.items()}
    read = {topic for wanted in topics.values() for topic in wanted}
    assignment = json.loads(rows[0].assignment) if rows else {}
    group = groups.Group(
        name=name,
        generation=rows[0].generation if rows else 0,
        topics=topics,
        owned={row.member_id: frozenset(json.loads(row.owned)) for row in states if row.member_id in members},
        target={member_id: frozenset(names) for member_id, names in assignment.items()},
    )
    return Loaded(group, members, await _partitions(tx, read))


async def _partitions(tx: Transaction, topics: Collection[str]) -> dict[str, int]:
    if not topics:
        return {}
    return {row.topic: row.partitions for row in await tx.select(t.TOPICS, where(topic=In(topics)))}


async def _change_members(
    tx: Transaction, loaded: Loaded, joined: Sequence[GroupMemberJoined], left: Sequence[GroupMemberLeft]
) -> Loaded:
    """Appends the joins and leaves with the new generation, and wakes the other members. Returns the group
    afterwards."""
    group = loaded.group
    topics = {member: wanted for member, wanted in group.topics.items() if member not in {e.member_id for e in left}}
    topics |= {event.member_id: frozenset(event.topics) for event in joined}
    partitions = await _partitions(tx, {topic for wanted in topics.values() for topic in wanted})
    target = groups.rebalance(topics, partitions, group.target)
    events: list[Event] = [*joined, *left, GroupRebalanced(group.name, group.generation + 1, target)]
    await tx.append(events)
    await tx.apply(
        [Remove(t.GROUP_MEMBER_STATE, {"group_name": group.name, "member_id": event.member_id}) for event in left]
    )
    tx.wake_group(group.name)
    return await load(tx, group.name)


async def join(
    context: Context,
    name: str,
    member_id: str,
    topics: Sequence[str],
    client_id: str,
    session_timeout_ms: int,
    reported: Names = frozenset(),
) -> Assignment:
    """Adds a member, or changes its topics; returns its assignment. Raises Overloaded.

    `reported`: partitions that a known member still works on. A change of topics moves partitions as any rebalance
    does: the next owner waits until the member has released them.
    """
    member_id = member_id or f"{client_id or 'member'}-{context.new_id()}"
    timeout_ms = session_timeout_ms or context.settings.group_session_timeout_ms
    event = GroupMemberJoined(
        group=name,
        member_id=member_id,
        client_id=client_id,
        topics=tuple(sorted(set(topics))),
        session_timeout_ms=timeout_ms,
    )

    async def work(tx: Transaction) -> Assignment:
        loaded = await load(tx, name)
        known = loaded.members.get(member_id)
        if known is None and len(loaded.members) >= context.settings.group_members_max:
            limit = context.settings.group_members_max
            raise Overloaded(f"group {name!r} has {limit} members, the limit group_members_max", limit=limit)
        # A repeated join with the same topics, as after a lost answer, starts no new generation.
        same = known is not None and tuple(json.loads(known.topics)) == event.topics
        if not same or groups.outdated(loaded.group, loaded.partitions):
            loaded = await _change_members(tx, loaded, [event], [])
        return await _assign(tx, loaded, member_id, reported)

    return await context.store.run(work, lock=lock_of(name))


async def _assign(tx: Transaction, loaded: Loaded, member_id: str, reported: Names | None) -> Assignment:
    """Returns the partitions that the member may work on now; records them as owned, and its heartbeat."""
    group, member = loaded.group, loaded.members[member_id]
    assigned, pending = groups.available(group, member_id)
    owned = groups.owned_after(group, member_id, reported, assigned)
    complete = not pending and owned == group.target.get(member_id, frozenset())
    expires_ms = await tx.now_ms() + member.session_timeout_ms
    state = t.GroupMemberStateRow(
        group_name=group.name, member_id=member_id, expires_ms=expires_ms, owned=_encode(owned), complete=complete
    )
    await tx.apply([Put(t.GROUP_MEMBER_STATE, state)])
    if group.owned.get(member_id, frozenset()) - owned:
        tx.wake_group(group.name)  # another member may be waiting for a released partition
    return Assignment(
        member_id=member_id,
        generation=group.generation,
        assigned=assigned,
        session_timeout_ms=member.session_timeout_ms,
        pending=pending,
    )


async def heartbeat(
    context: Context, name: str, member_id: str, generation: int, owned: Names, max_wait_ms: int
) -> Assignment:
    """Records a member's heartbeat and the partitions it works on; waits up to `max_wait_ms` for a change. Returns its
    assignment. Raises UnknownMember."""
    # Taken before the look, so that a change in between ends the wait at once.
    ticket = context.waiters.ticket(name)
    done = await _heartbeat(context, name, member_id, generation, owned)
    # Well before the member would expire, since a waiting member sends no heartbeat.
    wait_ms = min(max_wait_ms, done.session_timeout_ms // 2)
    if wait_ms <= 0 or done.generation != generation or done.assigned - owned:
        return done
    try:
        async with asyncio.timeout(wait_ms / 1000):
            await ticket.wait()
    except TimeoutError:
        return done
    # The member has said nothing during the wait: owned=None keeps its last report.
    return await context.store.run(lambda tx: _speak(tx, name, member_id, owned=None), lock=lock_of(name))


async def _heartbeat(context: Context, name: str, member_id: str, generation: int, owned: Names) -> Assignment:
    """Returns the assignment: by updating a single row if nothing has changed since the last heartbeat, else with the
    group's lock."""
    timeout_ms = await context.store.renew_member(name, member_id, generation, _encode(owned))
    if timeout_ms is not None:
        return Assignment(
            member_id=member_id, generation=generation, assigned=owned, session_timeout_ms=timeout_ms, pending=False
        )
    return await context.store.run(lambda tx: _speak(tx, name, member_id, owned=owned), lock=lock_of(name))


async def _speak(tx: Transaction, name: str, member_id: str, *, owned: Names | None) -> Assignment:
    loaded = await load(tx, name)
    if member_id not in loaded.members:
        raise UnknownMember(f"group {name!r} has no member {member_id!r}; join again", group=name, member_id=member_id)
    return await _assign(tx, loaded, member_id, owned)


async def leave(context: Context, name: str, member_id: str) -> None:
    """Removes a member; has no effect if the member has left already."""

    async def work(tx: Transaction) -> None:
        loaded = await load(tx, name)
        if member_id in loaded.members:
            await _change_members(tx, loaded, [], [GroupMemberLeft(name, member_id, "left")])

    await context.store.run(work, lock=lock_of(name))


async def groups_with_expired(tx: Transaction) -> list[str]:
    """Returns the groups with expired members, by the database's clock."""
    rows = await tx.select(t.GROUP_MEMBER_STATE, where(expires_ms=AtMost(await tx.now_ms())))
    return sorted({row.group_name for row in rows})


async def expire_members(context: Context, group: str) -> int:
    """Removes expired members of the group; returns their number. Removes none after an outage, until a sweep has
    extended the leases."""

    async def work(tx: Transaction) -> int:
        if await outages.was_outage(tx, context.settings.session_sweep_interval_ms):
            return 0
        loaded = await load(tx, group)
        expired = where(group_name=group, expires_ms=AtMost(await tx.now_ms()))
        # Locked, because heartbeats take no lock of the group: a heartbeat either comes before this, or finds the
        # member gone.
        rows = await tx.select(t.GROUP_MEMBER_STATE, expired, lock="wait")
        left = [GroupMemberLeft(group, row.member_id, "expired") for row in rows if row.member_id in loaded.members]
        if left:
            await _change_members(tx, loaded, [], left)
        return len(left)

    return await context.store.run(work, lock=lock_of(group))


async def topic_changed(context: Context, topic: str) -> None:
    """Gives a new generation to the groups that read a topic that was created or deleted. After a failure the groups
    get theirs with the next heartbeat: the topic's own change is done and must not be reported as failed."""
    try:
        await _refresh_readers(context, topic)
    except StreamHouseError as error:
        log.warning("groups that read topic %r are rebalanced later: %s", topic, error.message)


async def _refresh_readers(context: Context, topic: str) -> None:

    async def readers(tx: Transaction) -> set[str]:
        # All members are read, since their topics are JSON inside the rows; topics come and go rarely.
        rows = await tx.select(t.GROUP_MEMBERS)
        return {row.group_name for row in rows if topic in json.loads(row.topics)}

    async def refresh(name: str, tx: Transaction) -> None:
        loaded = await load(tx, name)
        if groups.outdated(loaded.group, loaded.partitions):
            await _change_members(tx, loaded, [], [])

    for name in sorted(await context.store.run(readers)):
        # A transaction per group: no call holds the locks of many groups.
        await context.store.run(partial(refresh, name), lock=lock_of(name))


# ---- committed offsets


async def commit(context: Context, name: str, member_id: str, generation: int, commits: Sequence[Commit]) -> None:
    """Commits all offsets or none. Raises UnknownMember, IllegalGeneration, UnknownTopic, UnknownPartition."""

    async def work(tx: Transaction) -> None:
        loaded = await load(tx, name)
        named = [groups.name_of(item.topic, item.partition) for item in commits]
        groups.check_commit(loaded.group, member_id, generation, named)
        # Shared with other commits; prevents the topic from being deleted in between.
        rows = await tx.select(t.TOPICS, where(topic=In({item.topic for item in commits})), lock="share")
        topics = {row.topic: row for row in rows}
        now_ms = await tx.now_ms()
        await tx.apply([Put(t.GROUP_OFFSETS, offset_row(name, topics, item, now_ms)) for item in commits])

    await context.store.run(work, lock=lock_of(name))


def offset_row(name: str, topics: Mapping[str, t.TopicRow], item: Commit, now_ms: int) -> t.GroupOffsetRow:
    """Returns the row of a commit. Raises UnknownTopic, also for a position in a deleted topic of the name;
    UnknownPartition."""
    topic = topics.get(item.topic)
    if topic is None:
        raise UnknownTopic(f"topic {item.topic!r} does not exist", topic=item.topic)
    if item.topic_id and item.topic_id != topic.topic_id:
        raise UnknownTopic(
            f"topic {item.topic!r} was deleted, and another one created under its name", topic=item.topic
        )
    check_partition(topic, item.partition)
    return t.GroupOffsetRow(
        group_name=name,
        topic_id=topic.topic_id,
        partition=item.partition,
        next_offset=item.next_offset,
        metadata=item.metadata,
        committed_ms=now_ms,
    )


async def fetch_offsets(
    context: Context, name: str, wanted: Collection[tuple[str, int]]
) -> list[tuple[str, int, t.GroupOffsetRow | None]]:
    """Returns (topic, partition, committed offset) of the requested partitions, or of all partitions with commits.
    Raises UnknownGroup if all are requested of a group that never had members or commits."""

    async def work(tx: Transaction) -> list[tuple[str, int, t.GroupOffsetRow | None]]:
        rows = await tx.select(t.GROUP_OFFSETS, where(group_name=name))
        if not rows and not wanted and not await tx.select(t.GROUPS, where(group_name=name)):
            raise UnknownGroup(f"group {name!r} has no members and no committed offsets", group=name)
        ids = {row.topic_id for row in rows}
        topics = {row.topic_id: row.topic for row in await tx.select(t.TOPICS, where(topic_id=In(ids)))}
        found = {(topics[row.topic_id], row.partition): row for row in rows if row.topic_id in topics}
        return [(*key, found.get(key)) for key in wanted or sorted(found)]

    return await context.store.run(work)
