"""What the commands share: the lock order, what is live, what to do after leadership changed.

Locks are taken in this order, so that transactions cannot wait for each other in a circle: the cluster lock or a
group's lock, topic rows, partition rows, range rows, buffer claims, compaction claims, upload intents, deletions, then
(in append) the event position.
"""

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from shproto.errors import SessionExpired, UnknownTopic
from shproto.events import Event

from streamhouse_coordinator.core import assignment, topics
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Set
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.ports import In, Lock, Store, Transaction, where, where_keys
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
    partitions = await tx.select(t.PARTITIONS)
    latest = await newest_ranges(tx, partitions)
    sessions = await tx.select(t.SESSIONS, where(role=INGEST), order=("agent_id",))
    names = {row.topic_id: row.topic for row in await tx.select(t.TOPICS)}
    follow_up = assignment.assign(names, partitions, latest, sessions, settings.range_width_offsets)
    version = await tx.append(follow_up)
    await tx.apply([Set(t.SESSION_LEASES, (row.session_id,), {"grants_version": version}) for row in sessions])
    return before
