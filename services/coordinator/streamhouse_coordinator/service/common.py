"""What the commands share: the lock order, what is live, what to do after leadership changed.

Locks are taken in this order, so that transactions cannot wait for each other in a circle: the cluster lock or a
group's lock, topic rows, partition rows, range rows, buffer claims, compaction claims, upload intents, deletions, then
(in append) the event position.
"""

import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from shproto.errors import SessionExpired, UnknownTopic
from shproto.events import Event, MoveRequested

from streamhouse_coordinator.core import assignment, topics
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Set
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.ports import In, Lock, Store, Transaction, Where, where, where_keys
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.waiters import GroupWaiters

RangeKey = tuple[str, int, int]
RANGE_KEYS = ("topic_id", "partition", "epoch")
# Who may lead what changes in one transaction at a time; such commands are rare.
CLUSTER_LOCK = "cluster"


def new_uuid() -> str:
    return str(uuid.uuid4())


@dataclass(frozen=True)
class Context:
    """What every command needs."""

    store: Store
    settings: CoordinatorSettings
    waiters: GroupWaiters = field(default_factory=GroupWaiters)
    new_id: Callable[[], str] = new_uuid


async def live_session(tx: Transaction, session_id: str) -> t.SessionRow:
    """Raises SessionExpired."""
    rows = await tx.select(t.SESSIONS, where(session_id=session_id))
    if not rows:
        raise SessionExpired(f"session {session_id!r} is unknown or has ended; open a new one", session_id=session_id)
    return rows[0]


async def topic_named(tx: Transaction, name: str, lock: Lock = "") -> t.TopicRow:
    """Raises UnknownTopic."""
    rows = await tx.select(t.TOPICS, where(topic=name), lock=lock)
    if not rows:
        raise UnknownTopic(f"topic {name!r} does not exist", topic=name)
    return rows[0]


async def ranges_by_key(tx: Transaction, keys: Collection[RangeKey], lock: Lock = "") -> dict[RangeKey, t.RangeRow]:
    if not keys:
        return {}
    rows = await tx.select(t.RANGES, where_keys(RANGE_KEYS, sorted(keys)), lock=lock)
    return {row.key: row for row in rows}


async def topic_names(tx: Transaction, topic_ids: Collection[str]) -> dict[str, str]:
    if not topic_ids:
        return {}
    return {row.topic_id: row.topic for row in await tx.select(t.TOPICS, where(topic_id=In(set(topic_ids))))}


async def durable_topics(tx: Transaction) -> set[str]:
    rows = await tx.select(t.TOPICS, where(min_acks=topics.ACKS_DURABLE))
    return {row.topic_id for row in rows}


async def newest_ranges(tx: Transaction, partitions: Collection[t.PartitionRow]) -> dict[tuple[str, int], t.RangeRow]:
    keys = {(row.topic_id, row.partition, row.epoch) for row in partitions if row.epoch}
    return {key[:2]: row for key, row in (await ranges_by_key(tx, keys)).items()}


async def commit_leadership(tx: Transaction, settings: CoordinatorSettings, events: list[Event]) -> int:
    """Appends events that changed who leads what, then the grants and moves that follow, and tells every agent's
    lease. Returns the position before all of them. The caller holds the cluster lock."""
    before = await tx.position()
    await tx.append(events)
    sessions = await tx.select(t.SESSIONS, where(role=INGEST), order=("agent_id",))
    version = await tx.append(await _follow_up(tx, settings, sessions, events))
    await tx.apply([Set(t.SESSION_LEASES, (row.session_id,), {"grants_version": version}) for row in sessions])
    return before


async def _follow_up(
    tx: Transaction, settings: CoordinatorSettings, sessions: Sequence[t.SessionRow], events: Sequence[Event]
) -> list[Event]:
    """Grants and moves that are due. Costs by what changed: of all the other partitions only numbers are read."""
    if not sessions:
        return []
    total = (await tx.totals(t.PARTITIONS, where()))[0].count
    led = await tx.totals(t.RANGES, where(status=t.OPEN), by=("session_id", "moving"))
    loads = {row.session_id: 0 for row in sessions} | {
        session_id: found.count for found in led for session_id, moving in [found.group] if not moving
    }
    touched = assignment.left_without_leader(events)
    waiting = await _without_leader(tx, set(touched), total - sum(found.count for found in led))
    names = await topic_names(tx, {row.topic_id for row in waiting})
    latest = await newest_ranges(tx, waiting)
    grants = assignment.grant(names, waiting, latest, loads, sessions, total, settings.range_width_offsets)
    for event in grants:
        loads[event.session_id] += 1
    return [*grants, *await _moves(tx, assignment.excess(loads, sessions, total))]


async def _without_leader(tx: Transaction, touched: Collection[tuple[str, int]], count: int) -> list[t.PartitionRow]:
    """The `count` partitions that nobody leads: most often those just `touched`; else all have to be looked through."""
    if not count:
        return []
    waiting = await _leaderless_of(tx, where_keys(("topic_id", "partition"), sorted(touched))) if touched else []
    return waiting if len(waiting) == count else await _leaderless_of(tx, where())


async def _leaderless_of(tx: Transaction, which: Where) -> list[t.PartitionRow]:
    partitions = await tx.select(t.PARTITIONS, which)
    led = {key for key, row in (await newest_ranges(tx, partitions)).items() if row.status == t.OPEN}
    return [row for row in partitions if (row.topic_id, row.partition) not in led]


async def _moves(tx: Transaction, over: dict[str, int]) -> list[MoveRequested]:
    if not over:
        return []
    held = await tx.select(t.RANGES, where(session_id=In(over), status=t.OPEN, moving=False))
    return assignment.move(await topic_names(tx, {row.topic_id for row in held}), held, over)
