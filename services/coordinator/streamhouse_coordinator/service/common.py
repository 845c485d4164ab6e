"""Shared parts of the commands: the lock order, lookups of live rows, and grants after a change of leadership.

Invariant: locks are taken in this order, so that transactions cannot wait for each other in a circle:

1. the cluster lock, or the lock of a group or a buffer: taken by `Store.run`, before `work` begins;
2. rows of the tables of core.tables.LOCK_ORDER, in that order;
3. the event position, by the commit.

- Rows of a table are locked by a single statement, in key order, once per transaction. The holder of the cluster lock
  is exempt where all others lock at most a single row: partitions in several statements, and session leases at any
  time, since a transaction that locks a lease without the cluster lock holds nothing else.
- Rows of the other tables are changed only by the holder of a lock above them (a segment by that of its range or
  partition, a buffer by that of its claim, a member by that of its group), or are inserted under a new key. Rows of
  `reach_reports` are written by their worker's heartbeat alone, in a transaction that locks nothing else; the holder of
  the cluster lock removes outdated rows that are not locked, and waits for none.
- A change of leadership is two transactions: the change with the grants that follow from it, and the moves. The ranges
  to move are known only when the others are locked, and would then be locked out of order.
"""

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from shproto.acks import ACKS_DURABLE
from shproto.errors import SessionExpired, StreamHouseError, UnknownTopic
from shproto.events import BufferSealed, Event, RangeSettled, TopicCreated

from streamhouse_coordinator.core import assignment
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove, Set
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.core.tables import PartitionRowKey, RangeRowKey
from streamhouse_coordinator.ports import In, Lock, Store, Transaction, Where, where, where_keys
from streamhouse_coordinator.settings import CoordinatorSettings

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

RANGE_KEYS = ("topic_id", "partition", "epoch")
# Leadership changes in a single transaction at a time; such commands are rare.
CLUSTER_LOCK = "cluster"
# The row of `sweeps` that records that moves are due.
MOVES_DUE = "moves"
# Reasons for which an agent must lead nothing, as in MoveRequested.
LOG_FULL, CUT_OFF = "log_full", "cut_off"


def new_uuid() -> str:
    return str(uuid.uuid4())


class GroupWaiters:
    """Lets long polls of consumer groups sleep until their group changes.

    Invariant: a change after a ticket was taken sets that ticket, so a caller that takes a ticket, looks at the group
    and then waits misses no change.
    """

    def __init__(self) -> None:
        self._tickets: dict[str, asyncio.Event] = {}

    def ticket(self, group: str) -> asyncio.Event:
        """Returns the event that is set once the group changes; all waiters of the group share it."""
        return self._tickets.setdefault(group, asyncio.Event())

    def changed(self, group: str) -> None:
        """Wakes the waiters of `group`, or of all groups if it is empty."""
        names = [group] if group else list(self._tickets)
        for name in names:
            # Removed: a ticket taken from now on waits for the next change.
            ticket = self._tickets.pop(name, None)
            if ticket is not None:
                ticket.set()


@dataclass(frozen=True, kw_only=True)
class Context:
    """Dependencies of every command. `buffer_sealed` is called with each buffer announced at this coordinator, and its
    trace context: a hint, which may be lost."""

    store: Store
    settings: CoordinatorSettings
    waiters: GroupWaiters = field(default_factory=GroupWaiters)
    buffer_sealed: Callable[[BufferSealed, str], None] = lambda sealed, trace_context: None
    new_id: Callable[[], str] = new_uuid


async def live_session(tx: Transaction, session_id: str) -> t.SessionRow:
    """Returns the session. Raises SessionExpired if there is none."""
    rows = await tx.select(t.SESSIONS, where(session_id=session_id))
    if not rows:
        raise SessionExpired(f"session {session_id!r} is unknown or has ended; open a new one", session_id=session_id)
    return rows[0]


async def topic_named(tx: Transaction, name: str, lock: Lock = "") -> t.TopicRow:
    """Returns the topic. Raises UnknownTopic."""
    rows = await tx.select(t.TOPICS, where(topic=name), lock=lock)
    if not rows:
        raise UnknownTopic(f"topic {name!r} does not exist", topic=name)
    return rows[0]


async def ranges_by_key(
    tx: Transaction, keys: Collection[RangeRowKey], lock: Lock = ""
) -> dict[RangeRowKey, t.RangeRow]:
    """Returns the existing ranges among `keys`, by key. All are read, and locked as `lock` says, by a single
    statement in key order."""
    if not keys:
        return {}
    rows = await tx.select(t.RANGES, where_keys(RANGE_KEYS, sorted(keys)), lock=lock)
    return {row.key: row for row in rows}


async def topic_names(tx: Transaction, topic_ids: Collection[str]) -> dict[str, str]:
    """Returns the names of the existing topics among `topic_ids`, by id."""
    if not topic_ids:
        return {}
    return {row.topic_id: row.topic for row in await tx.select(t.TOPICS, where(topic_id=In(set(topic_ids))))}


async def known_topic_ids(tx: Transaction, topic_ids: Collection[str]) -> set[str]:
    """Returns the ids among `topic_ids` of topics that exist or existed in this metadata."""
    if not topic_ids:
        return set()
    of_topics = where(topic_id=In(set(topic_ids)))
    found = [row.topic_id for row in await tx.select(t.TOPICS, of_topics)]
    return {*found, *(row.topic_id for row in await tx.select(t.DELETED_TOPICS, of_topics))}


async def durable_topics(tx: Transaction) -> set[str]:
    """Returns the ids of topics whose producers must use durable acks (min_acks)."""
    rows = await tx.select(t.TOPICS, where(min_acks=ACKS_DURABLE))
    return {row.topic_id for row in rows}


async def newest_ranges(tx: Transaction, partitions: Collection[t.PartitionRow]) -> dict[PartitionRowKey, t.RangeRow]:
    """Returns the range of each partition's newest epoch, by partition; nothing for partitions without an epoch."""
    keys = {(row.topic_id, row.partition, row.epoch) for row in partitions if row.epoch}
    return {key[:2]: row for key, row in (await ranges_by_key(tx, keys)).items()}


async def change_leadership(context: Context, work: Callable[[Transaction], Awaitable[ResultT]]) -> ResultT:
    """Runs a command that calls commit_leadership, under the cluster lock, then makes the moves that are due. Returns
    the command's result, even if the moves are left to a sweep: the command itself is committed."""
    result = await context.store.run(work, lock=CLUSTER_LOCK)
    try:
        # The command is committed. A failure of the moves must not look like its own: the caller would repeat it.
        await make_moves(context)
    except StreamHouseError as error:
        log.warning("partitions that are due to move wait for the next sweep: %s", error.message)
    return result


async def commit_leadership(tx: Transaction, settings: CoordinatorSettings, events: list[Event]) -> int:
    """Appends events that changed leadership, then the grants that follow, records if moves are due, and raises the
    grants_version of every agent's lease. Returns a position before all of these events. The caller holds the cluster
    lock."""
    assert tx.locked == CLUSTER_LOCK
    # Read before the events: an agent that follows the feed from here sees all of them.
    before = await tx.position()
    await tx.append(events)
    sessions = await _ingest_sessions(tx)
    if sessions:
        await _share_out(tx, settings, sessions, events)
    else:
        # Without an agent nothing can move; the next session that opens shares out everything anew.
        await tx.apply([Remove(t.SWEEPS, {"name": MOVES_DUE})])
    # After everything else, because session leases are the last rows in the lock order.
    await _bump_grants_version(tx, sessions)
    return before


async def _share_out(
    tx: Transaction, settings: CoordinatorSettings, sessions: Sequence[t.SessionRow], events: Sequence[Event]
) -> None:
    touched = set(assignment.left_without_leader(events))
    created = {event.topic_id for event in events if isinstance(event, TopicCreated)}
    # A new topic unbalances no other and is shared out alone, so that ten thousand topics can be created in a row.
    alone = created if 0 < len(created) == len(events) else None
    load = await _load_of(tx, alone)
    waiting = await _without_leader(tx, touched, load.leaderless)
    able = assignment.able_to_lead(sessions, load.unable)
    shares = assignment.share(load.sizes, load.led, able, load.others)
    names = await topic_names(tx, {row.topic_id for row in waiting})
    # After the events are applied: where they settled a range, the next epoch starts at the true end, without a gap.
    latest = await newest_ranges(tx, waiting)
    width = settings.range_width_offsets
    await tx.append(assignment.grant(shares, names, waiting, latest, load.by_session, able, width))
    if shares.surplus or await _at_once(tx, load.cut_off(able)):
        await tx.apply([Put(t.SWEEPS, t.SweepRow(MOVES_DUE, await tx.now_ms()))])
    elif alone is None:  # all topics were looked at
        await tx.apply([Remove(t.SWEEPS, {"name": MOVES_DUE})])


async def make_moves(context: Context) -> None:
    """Asks leaders above their share to hand partitions over, if a change of leadership recorded that. At most
    moves_per_sweep_max at a time: the next sweep continues."""

    async def are_due(tx: Transaction) -> bool:
        return bool(await tx.select(t.SWEEPS, where(name=MOVES_DUE)))

    async def work(tx: Transaction) -> None:
        # Looked up again under the lock: another coordinator may have made the moves while this call waited.
        if not await are_due(tx):
            return
        settled: list[Event] = []
        sessions = await _ingest_sessions(tx)
        if sessions:
            load = await _load_of(tx)
            able = assignment.able_to_lead(sessions, load.unable)
            surplus = assignment.share(load.sizes, load.led, able).surplus
            at_once = await _at_once(tx, load.cut_off(able))
            moves, settled = await _moves(tx, surplus, load.unable, at_once, context.settings.moves_per_sweep_max)
            await tx.append(moves)
        await commit_leadership(tx, context.settings, settled)  # records if more moves are due

    if await context.store.run(are_due):  # usually none are, and the lock is contended
        await context.store.run(work, lock=CLUSTER_LOCK)


async def _bump_grants_version(tx: Transaction, sessions: Sequence[t.SessionRow]) -> None:
    """Sets the leases' grants_version to the position of this transaction; agents see the version with their next
    heartbeat."""
    ids = [row.session_id for row in sessions]
    # Locked now, since the commit sets the version while it holds the event position, and may then wait for no row.
    await tx.select(t.SESSION_LEASES, where(session_id=In(ids)), lock="wait")
    tx.with_position(lambda position: [Set(t.SESSION_LEASES, (id_,), {"grants_version": position}) for id_ in ids])


async def _ingest_sessions(tx: Transaction) -> list[t.SessionRow]:
    return await tx.select(t.SESSIONS, where(role=INGEST), order=("agent_id",))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """Load of the agents. `sizes`: partitions by topic_id. `led`: by (topic_id, session_id), led partitions that are
    not on the move. `others`: by session_id, led partitions of other topics. `leaderless`: number of partitions in
    `sizes` without a leader. `unable`: by session_id, the reason for which an agent must lead nothing while others
    can."""

    sizes: dict[str, int]
    led: dict[tuple[str, str], int]
    others: dict[str, int]
    leaderless: int
    unable: dict[str, str]

    def cut_off(self, able: Sequence[t.SessionRow]) -> set[str]:
        """Returns the sessions of cut-off agents that another agent can replace."""
        return {session_id for session_id, why in self.unable.items() if why == CUT_OFF} - {
            row.session_id for row in able
        }

    @property
    def by_session(self) -> dict[str, int]:
        """Number of led partitions that are not on the move, by session_id."""
        total = Counter(self.others)
        for (_, session_id), count in self.led.items():
            total[session_id] += count
        return total


async def _load_of(tx: Transaction, topic_ids: Collection[str] | None = None) -> _Load:
    """Returns the load of all topics, or of `topic_ids`. The cost depends on the number of topics and sessions:
    partitions are only counted."""
    of_topics: dict[str, object] = {} if topic_ids is None else {"topic_id": In(topic_ids)}
    sizes = {
        row.group[0]: row.count for row in await tx.totals(t.PARTITIONS, Where(equals=of_topics), by=("topic_id",))
    }
    by = ("topic_id", "session_id", "moving")
    rows = await tx.totals(t.RANGES, Where(equals={"status": t.OPEN, **of_topics}), by=by)
    led = {(row.group[0], row.group[1]): row.count for row in rows if not row.group[2]}
    leaderless = sum(sizes.values()) - sum(row.count for row in rows)
    others: Counter[str] = Counter()
    if topic_ids is not None:
        every = await tx.totals(t.RANGES, where(status=t.OPEN, moving=False), by=("session_id",))
        others.update({row.group[0]: row.count for row in every})
        for (_, session_id), count in led.items():
            others[session_id] -= count
    unable = {row.session_id: LOG_FULL for row in await tx.select(t.SESSION_LEASES, where(log_full=True))}
    unable |= dict.fromkeys(await cut_off_sessions(tx), CUT_OFF)
    return _Load(sizes=sizes, led=led, others=others, leaderless=leaderless, unable=unable)


async def cut_off_sessions(tx: Transaction) -> set[str]:
    """Returns the sessions of agents that the workers cannot reach."""
    return {row.session_id for row in await tx.select(t.CUT_OFFS, where(reachable_ms=0))}


async def _without_leader(tx: Transaction, touched: Collection[PartitionRowKey], count: int) -> list[t.PartitionRow]:
    """Returns the `count` partitions without a leader: usually those just `touched`; else all partitions are
    searched."""
    if not count:
        return []
    waiting = await _leaderless_of(tx, where_keys(("topic_id", "partition"), sorted(touched))) if touched else []
    return waiting if len(waiting) == count else await _leaderless_of(tx, where())


async def _leaderless_of(tx: Transaction, which: Where) -> list[t.PartitionRow]:
    partitions = await tx.select(t.PARTITIONS, which)
    led = {key for key, row in (await newest_ranges(tx, partitions)).items() if row.status == t.OPEN}
    return [row for row in partitions if (row.topic_id, row.partition) not in led]


async def _at_once(tx: Transaction, cut_off: Collection[str]) -> set[RangeRowKey]:
    """Returns the ranges of these sessions in durable topics: they can settle at the registered end without waiting for
    the agent."""
    durable = await durable_topics(tx) if cut_off else set()
    if not durable:
        return set()
    rows = await tx.select(t.RANGES, where(session_id=In(cut_off), topic_id=In(durable), status=t.OPEN))
    return {row.key for row in rows}


async def _moves(
    tx: Transaction,
    surplus: Mapping[tuple[str, str], int],
    why: Mapping[str, str],
    at_once: Collection[RangeRowKey],
    most: int,
) -> tuple[list[Event], list[Event]]:
    """Returns the moves of surplus partitions, and the ends of the ranges settled `at_once`, at most `most` together.
    The caller holds the cluster lock and no range: the affected ranges are locked here."""
    of_surplus = where_keys(("topic_id", "session_id"), sorted(surplus), status=t.OPEN, moving=False)
    held = [row for row in await tx.select(t.RANGES, of_surplus) if row.key not in at_once] if surplus else []
    moves = assignment.move(await topic_names(tx, {row.topic_id for row in held}), held, surplus, why)
    moves = moves[: max(0, most - len(at_once))]
    ending = set(sorted(at_once)[:most])
    moving = {(event.topic_id, event.partition, event.epoch) for event in moves}
    # Locked by a single statement in key order. registered_end is taken from these rows: registration needs no cluster
    # lock and may have gone on since the first read.
    rows = await ranges_by_key(tx, moving | ending, lock="wait")
    ends = [
        RangeSettled(topic_id=row.topic_id, partition=row.partition, epoch=row.epoch, end_offset=row.registered_end)
        for key, row in sorted(rows.items())
        if key in ending
    ]
    return list(moves), list(ends)
