"""Opens, renews and ends sessions, and grants and settles the ranges of their agents.

Invariants: a session ends together with its lease. The ranges of an ended session are settled or orphaned in the
transaction that ends it.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile

from shproto.errors import RENEWED, MetadataWentBack, Overloaded, SessionExpired
from shproto.events import BufferCompleted, Event, RangeSettled, SessionOpened

from streamhouse_coordinator.core import sessions
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove, RowOp, Set
from streamhouse_coordinator.core.tables import PartitionRowKey, RangeRowKey
from streamhouse_coordinator.ports import LOST_RANGES, UNFINISHED, AtMost, In, Totals, Transaction, where, where_keys
from streamhouse_coordinator.recovery import after_restore, rollback_detection
from streamhouse_coordinator.recovery.histories import NOTHING_SEEN, Head, check_log, check_seen
from streamhouse_coordinator.service import buffers, outages
from streamhouse_coordinator.service.common import (
    RANGE_KEYS,
    Context,
    change_leadership,
    commit_leadership,
    cut_off_sessions,
    durable_topics,
    known_topic_ids,
    live_session,
    ranges_by_key,
)

log = logging.getLogger(__name__)

SnapshotKey = tuple[str, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A range as its agent has to know it. `snapshot_omitted`: there is a snapshot, which the agent has to request
    again. `at_once`: the range moves without waiting for registration, since segmenters cannot reach the agent."""

    range: t.RangeRow
    topic: t.TopicRow
    producer_snapshot: bytes = b""
    fences: Sequence[t.ProducerFenceRow] = ()
    snapshot_omitted: bool = False
    at_once: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSession:
    """Answer to a process that opened a session. `resumed`: lost ranges of its log, and unfinished ranges that are not
    open. `feed_position`: events that concern the session follow behind it."""

    session_id: str
    resumed: list[Grant]
    feed_position: int
    history: t.HistoryRow
    recovered_topics: Sequence[str] = ()


async def rivals(context: Context, opened: SessionOpened) -> list[t.SessionRow]:
    """Returns the live sessions that opening this session would end: of the same write-ahead log, or of a segmenter
    with the same id at another address. The caller has to probe their processes first: a copy of an agent's disk must
    not settle what the agent has acknowledged since."""

    async def work(tx: Transaction) -> list[t.SessionRow]:
        others = [row for row in await _others(tx, opened) if row.session_id != opened.session_id]
        live = await _live(tx, [row.session_id for row in others], await tx.now_ms()) if others else set()
        return [row for row in others if row.session_id in live and _rivals(row, opened)]

    return await context.store.run(work)


def _rivals(other: t.SessionRow, opened: SessionOpened) -> bool:
    if opened.wal_id:
        return other.wal_id == opened.wal_id
    return opened.role == sessions.SEGMENTER and other.address != opened.address


async def open_session(
    context: Context, opened: SessionOpened, wal_ends: sessions.WalEnds, seen: Head = NOTHING_SEEN
) -> OpenedSession:
    """Opens a session, or returns the session of its id if this is a retry after a lost answer. `opened` comes without
    started_ms. `seen`: the last event that the agent's log knows of. Raises AgentIdTaken, InvalidArgument,
    MetadataWentBack."""
    session_id, declared = opened.session_id, wal_ends

    async def work(tx: Transaction) -> OpenedSession:
        now_ms = await tx.now_ms()
        histories = await tx.select(t.HISTORIES, order=("nth",))
        # Before any change: metadata without the events that a log has seen would take its ranges for deleted ones.
        check_seen(histories, await tx.position(), seen)
        if opened.role == sessions.INGEST:
            await rollback_detection.check(tx, rollback_detection.COORDINATOR)
        if not seen.history_id and len(histories) == 1:  # after a restore, unknown ranges are inserted
            await _check_log(tx, histories[0], declared)
        # A retry after a lost answer. Opened once more, the session would supersede itself and lose its new grants.
        if rows := await tx.select(t.SESSIONS, where(session_id=session_id)):
            until_ms = now_ms + context.settings.session_ttl_ms
            return await _reopened(tx, sessions.reopened(rows[0], opened), until_ms, histories[-1])
        wal_ends, recovered = declared, list[str]()
        event = replace(opened, started_ms=now_ms)
        others = await _others(tx, opened)
        # Leases before ranges: against the lock order, which the holder of the cluster lock may do for leases.
        live = await _live(tx, [row.session_id for row in others], now_ms)
        ranges_to_split: list[RangeRowKey] = []
        # Only restored metadata can lack topics and epochs that a log knows.
        if opened.wal_id and len(histories) > 1:
            recovered = await after_restore.recover_topics(tx, declared, context.settings.partitions_per_topic_max)
            ranges_to_split = await after_restore.ranges_to_split(tx, declared)
        unfinished = [row.key for row in await _ranges_of(tx, others, opened.wal_id)]
        # Locked by a single statement, as the lock order demands, and read again below, since the split changes ranges.
        await ranges_by_key(tx, {*unfinished, *ranges_to_split}, lock="wait")
        if ranges_to_split:
            wal_ends = await after_restore.split_unrecovered_ranges(tx, opened.agent_id, opened.wal_id, declared)
        ranges = await _ranges_of(tx, others, opened.wal_id)
        known = await _known(tx, [row.key for row in ranges])
        events = sessions.open_session(event, others, live, ranges, wal_ends, known)
        # The worker starts anew, so nothing works on its claims: others need not wait until they run out.
        if opened.role == sessions.SEGMENTER:
            await buffers.free_claims(tx, [opened.agent_id])
        ops: list[RowOp] = [Remove(t.SESSION_LEASES, {"session_id": row.session_id}) for row in others]
        expires_ms = now_ms + context.settings.session_ttl_ms
        await tx.apply(
            [
                *ops,
                Put(
                    t.SESSION_LEASES, t.SessionLeaseRow(session_id=session_id, expires_ms=expires_ms, grants_version=0)
                ),
            ]
        )
        if opened.role == sessions.INGEST:
            position = await commit_leadership(tx, context.settings, events)
            own = [row for row in ranges if row.wal_id == opened.wal_id and row.status in (t.OPEN, t.ORPHANED)]
            # The next epochs have been granted at the limits, so the ranges can settle where the torn log ends.
            if wal_ends.torn:
                orphaned = [replace(row, status=t.ORPHANED) for row in own]
                await tx.append(sessions.settle_all(orphaned, wal_ends, known, session_id))
            # After _known, which reads the acknowledged ends from these buffers.
            await _drop_buffers(tx, opened.wal_id, now_ms)
            await _keep_snapshots(tx, [row.key for row in own], wal_ends)
        else:
            position = await tx.position()
            await tx.append(events)
        return OpenedSession(
            session_id=session_id,
            resumed=await _resumed(tx, opened.wal_id),
            feed_position=position,
            history=histories[-1],
            recovered_topics=recovered,
        )

    try:
        # Under the cluster lock for every role: two processes with the same id have to see each other.
        return await change_leadership(context, work)
    except MetadataWentBack as error:
        # In a transaction of its own: the transaction that failed is rolled back.
        if rollback_detection.proves_rollback(error, seen):
            await rollback_detection.record(context.store, seen, rollback_detection.AGENT)
        raise


async def _check_log(tx: Transaction, history: t.HistoryRow, declared: sessions.WalEnds) -> None:
    """Checks a log without a note of its history. Raises MetadataWentBack."""
    keys = sorted({key[:2] for key in declared.ends})
    if not keys:
        return
    rows = await tx.select(t.PARTITIONS, where_keys(("topic_id", "partition"), keys))
    check_log(
        Head(history_id=history.history_id, position=await tx.position()),
        declared.ends,
        {(row.topic_id, row.partition): row.epoch for row in rows},
        await known_topic_ids(tx, {topic_id for topic_id, _ in keys}),
    )


async def _reopened(tx: Transaction, session: t.SessionRow, expires_ms: int, history: t.HistoryRow) -> OpenedSession:
    """Returns the session in its present state, with a renewed lease. The position is read first: later events are on
    the feed."""
    position = await tx.position()
    renewed = {"expires_ms": expires_ms, "log_full": False}  # an agent with a full log reports that again
    await tx.apply([Set(t.SESSION_LEASES, (session.session_id,), renewed)])
    return OpenedSession(
        session_id=session.session_id,
        resumed=await _resumed(tx, session.wal_id),
        feed_position=position,
        history=history,
    )


async def _resumed(tx: Transaction, wal_id: str) -> list[Grant]:
    return await _with_topics(tx, [row for row in await _ranges_to_grant(tx, wal_id) if row.status != t.OPEN])


async def _others(tx: Transaction, opened: SessionOpened) -> list[t.SessionRow]:
    rows = await tx.select(t.SESSIONS, where(agent_id=opened.agent_id, role=opened.role))
    # The same log may have been opened under another agent id.
    if opened.wal_id:
        rows += await tx.select(t.SESSIONS, where(wal_id=opened.wal_id))
    return list({row.session_id: row for row in rows}.values())


async def _live(tx: Transaction, session_ids: Collection[str], now_ms: int) -> set[str]:
    # Locked, so that no heartbeat renews a lease that this transaction has found expired.
    leases = await tx.select(t.SESSION_LEASES, where(session_id=In(session_ids)), lock="wait")
    return {lease.session_id for lease in leases if lease.expires_ms > now_ms}


async def _ranges_of(tx: Transaction, others: Sequence[t.SessionRow], wal_id: str) -> list[t.RangeRow]:
    wal_ids = {row.wal_id for row in others} | {wal_id}
    wal_ids.discard("")
    return await tx.select(t.RANGES, where(UNFINISHED, wal_id=In(wal_ids))) if wal_ids else []


async def _known(tx: Transaction, keys: Collection[RangeRowKey]) -> sessions.AcknowledgedEnds:
    """Returns the announced ends of these ranges, before any buffer is dropped. A single aggregate, however many
    buffers wait."""
    # Announced records of a durable topic are not acknowledged before their registration.
    durable = await durable_topics(tx)
    of_ranges = where_keys(RANGE_KEYS, sorted(key for key in keys if key[0] not in durable))
    rows = await tx.totals(t.BUFFER_SLICES, of_ranges, by=RANGE_KEYS, maxima=("end_offset",)) if keys else []
    announced = {(row.group[0], row.group[1], row.group[2]): row.maxima[0] for row in rows}
    return sessions.AcknowledgedEnds(announced, durable)


async def _drop_buffers(tx: Transaction, wal_id: str, now_ms: int) -> None:
    """Completes the unclaimed buffers of a log that was opened again: the agent seals the records anew."""
    # A buffer that a worker is claiming or registering now is left to that worker.
    free = await tx.select(t.BUFFER_CLAIMS, where(wal_id=wal_id, free_at_ms=AtMost(now_ms)), lock="skip")
    dropped = await tx.select(t.BUFFERS, where(buffer_id=In([row.buffer_id for row in free])))
    await tx.append([BufferCompleted(row.buffer_id, row.agent_id) for row in dropped])
    await tx.apply(buffers.done_with([row.buffer_id for row in free]))


async def heartbeat(
    context: Context, session_id: str, low_ranges: Mapping[RangeRowKey, int], log_full: bool | None = None
) -> tuple[int, list[Grant]]:
    """Renews the lease and extends ranges that run out. `log_full`: the agent's log has no space left, or has space
    again. Returns (grants_version, extended ranges). Raises SessionExpired; Overloaded, with lease = renewed in the
    details if the lease was renewed before."""
    # The lease is renewed first and by itself: the rest may wait for locks, and must not cost the agent its lease.
    version = await context.store.renew_session(session_id, context.settings.session_ttl_ms)
    if version is None:
        raise SessionExpired(f"session {session_id!r} has ended; open a new one", session_id=session_id)
    try:
        if log_full is not None:
            await _note_log_full(context, session_id, log_full)
        return version, await _extended(context, session_id, low_ranges) if low_ranges else []
    except Overloaded as error:
        error.details["lease"] = RENEWED
        raise


async def _extended(context: Context, session_id: str, low_ranges: Mapping[RangeRowKey, int]) -> list[Grant]:
    """Extends ranges that run out, and returns them. Raises SessionExpired."""

    async def work(tx: Transaction) -> list[Grant]:
        session = await live_session(tx, session_id)
        rows = await ranges_by_key(tx, low_ranges.keys(), lock="wait")
        own = {key: row for key, row in rows.items() if row.wal_id == session.wal_id}
        width = context.settings.range_width_offsets
        wider = [sessions.extend(row, low_ranges[key], width) for key, row in own.items()]
        await tx.append([event for event in wider if event is not None])
        # Read again, because append has applied the extensions to the rows.
        rows = await ranges_by_key(tx, own.keys())
        topics = await _topics_of(tx, rows.values())
        # The leader of a range knows its producers, and the answer has to fit into a message.
        return [
            Grant(range=row, topic=topics[row.topic_id], snapshot_omitted=True)
            for row in rows.values()
            if row.topic_id in topics
        ]

    return await context.store.run(work)


async def _note_log_full(context: Context, session_id: str, full: bool) -> None:
    """Lets other agents lead the session's partitions while the log is full, and returns the session's share
    afterwards. Raises SessionExpired."""

    async def work(tx: Transaction) -> str:
        session = await live_session(tx, session_id)
        await tx.apply([Set(t.SESSION_LEASES, (session_id,), {"log_full": full})])
        # Without an event of its own: the flag alone changes what each agent's share of the partitions is.
        await commit_leadership(tx, context.settings, [])
        return session.agent_id

    agent_id = await change_leadership(context, work)
    if full:
        log.warning("the write-ahead log of agent %s has no room: others are to lead its partitions", agent_id)
    else:
        log.info("the write-ahead log of agent %s has room again", agent_id)


async def get_grants(
    context: Context, session_id: str, only: Collection[RangeRowKey] = ()
) -> tuple[int, list[Grant], int]:
    """Returns the unfinished ranges of the session's log and the lost ones, all or those among `only`; the
    grants_version that they are as of; and a position that is not before any of them. Raises SessionExpired."""

    async def work(tx: Transaction) -> tuple[int, list[Grant], int]:
        session = await live_session(tx, session_id)
        # The version is read first: a change in between makes the agent ask once more, never once too few.
        leases = await tx.select(t.SESSION_LEASES, where(session_id=session_id))
        ranges = await (_ranges_among(tx, session.wal_id, only) if only else _ranges_to_grant(tx, session.wal_id))
        grants = await _with_topics(tx, ranges)
        # Segmenters do not reach a cut-off agent, so a move that waits for registration would never end (decision
        # 0012).
        if session_id in await cut_off_sessions(tx):
            grants = [replace(grant, at_once=grant.range.moving) for grant in grants]
        return (leases[0].grants_version if leases else 0), grants, await tx.position()

    return await context.store.run(work)


async def _ranges_to_grant(tx: Transaction, wal_id: str) -> list[t.RangeRow]:
    if not wal_id:
        return []
    unfinished = await tx.select(t.RANGES, where(UNFINISHED, wal_id=wal_id), order=RANGE_KEYS)
    # Lost ranges are included so that the agent can tell records it may drop as lost from registered ones.
    lost = await tx.select(t.RANGES, where(LOST_RANGES, wal_id=wal_id), order=RANGE_KEYS)
    return [*unfinished, *lost]


async def _ranges_among(tx: Transaction, wal_id: str, keys: Collection[RangeRowKey]) -> list[t.RangeRow]:
    rows = await tx.select(t.RANGES, where_keys(RANGE_KEYS, sorted(keys), wal_id=wal_id), order=RANGE_KEYS)
    return [row for row in rows if row.unfinished or row.status == t.LOST]


async def _with_topics(tx: Transaction, ranges: Sequence[t.RangeRow]) -> list[Grant]:
    """Returns grants in the order of `ranges`, without ranges of deleted topics. Producer snapshots are included as far
    as they fit into a message; the rest is omitted."""
    topics = await _topics_of(tx, ranges)
    named = [row for row in ranges if row.topic_id in topics]
    # The agent drops the records of a lost range, and needs no producers' state.
    going_on = [row for row in named if row.status != t.LOST]
    stored = await _stored_snapshots(tx, {row.key[:2] for row in going_on})
    # Ranges are read after the snapshots: a registration in between removes outdated snapshots.
    now = await ranges_by_key(tx, {row.key for row in going_on})
    fences = await _fences(tx, {row.key[:2] for row in going_on})
    newest = {row.key: sessions.newest_for(now.get(row.key, row), stored.get(row.key[:2], ())) for row in going_on}
    wanted = {key: snapshot.key for key, snapshot in newest.items() if snapshot is not None}
    reported = await _fitting_snapshots(
        tx, wanted, [snapshot.size_bytes for snapshot in newest.values() if snapshot is not None]
    )
    return [
        Grant(
            range=row,
            topic=topics[row.topic_id],
            producer_snapshot=reported.get(row.key, b""),
            fences=fences.get(row.key[:2], ()),
            snapshot_omitted=row.key in wanted and row.key not in reported,
        )
        for row in named
    ]


async def _fences(
    tx: Transaction, partitions: Collection[PartitionRowKey]
) -> dict[PartitionRowKey, list[t.ProducerFenceRow]]:
    """Returns the fences by partition. All fences of older leaders are there once a range exists: each was kept under
    the lock with which the leader's range ended."""
    by_partition: dict[PartitionRowKey, list[t.ProducerFenceRow]] = {}
    if partitions:
        for row in await tx.select(t.PRODUCER_FENCES, where_keys(("topic_id", "partition"), sorted(partitions))):
            by_partition.setdefault((row.topic_id, row.partition), []).append(row)
    return by_partition


async def _topics_of(tx: Transaction, ranges: Collection[t.RangeRow]) -> dict[str, t.TopicRow]:
    """Returns the existing topics of these ranges by id."""
    topic_ids = {row.topic_id for row in ranges}
    rows = await tx.select(t.TOPICS, where(topic_id=In(topic_ids))) if topic_ids else []
    return {row.topic_id: row for row in rows}


async def _fitting_snapshots(
    tx: Transaction, wanted: Mapping[RangeRowKey, SnapshotKey], sizes_bytes: Sequence[int]
) -> dict[RangeRowKey, bytes]:
    """Returns the bytes of the leading snapshots in `wanted` that fit into an answer; only these bytes are read. A
    snapshot that a registration replaces meanwhile is left to the next answer, and so are all later ones."""
    fitting = dict(islice(wanted.items(), sessions.reported_count(sizes_bytes)))
    if not fitting:
        return {}
    keys = t.PRODUCER_SNAPSHOTS.key
    rows = await tx.select(t.PRODUCER_SNAPSHOTS, where_keys(keys, sorted(set(fitting.values()))))
    found = {t.PRODUCER_SNAPSHOTS.key_of(row): row.snapshot for row in rows}
    there = takewhile(lambda item: item[1] in found, fitting.items())
    return {range_key: found[snapshot_key] for range_key, snapshot_key in there}


async def _stored_snapshots(
    tx: Transaction, partitions: Collection[PartitionRowKey]
) -> dict[PartitionRowKey, list[sessions.StoredSnapshot]]:
    """Returns the usable snapshots by partition, without their bytes: for all partitions of an agent these may exceed a
    process's memory."""
    if not partitions:
        return {}
    of_partitions = where_keys(("topic_id", "partition"), sorted(partitions))
    rows = await tx.totals(t.PRODUCER_SNAPSHOTS, of_partitions, by=t.PRODUCER_SNAPSHOTS.key, sums=("snapshot",))
    return await _usable(tx, [_stored_snapshot(row) for row in rows])


def _stored_snapshot(totals: Totals) -> sessions.StoredSnapshot:
    topic_id, partition, epoch, end_offset = totals.group
    (size_bytes,) = totals.sums
    return sessions.StoredSnapshot(
        topic_id=topic_id, partition=partition, epoch=epoch, end_offset=end_offset, size_bytes=size_bytes
    )


async def _snapshots(
    tx: Transaction, partitions: Collection[PartitionRowKey]
) -> dict[PartitionRowKey, list[t.ProducerSnapshotRow]]:
    rows = await tx.select(t.PRODUCER_SNAPSHOTS, where_keys(("topic_id", "partition"), sorted(partitions)))
    return await _usable(tx, rows)


async def _usable(
    tx: Transaction, rows: Sequence[sessions.SnapshotT]
) -> dict[PartitionRowKey, list[sessions.SnapshotT]]:
    """Returns the usable snapshots by partition."""
    ranges = await ranges_by_key(tx, {(row.topic_id, row.partition, row.epoch) for row in rows})
    by_partition: dict[PartitionRowKey, list[sessions.SnapshotT]] = {}
    for row in rows:
        if sessions.usable(row, ranges.get((row.topic_id, row.partition, row.epoch))):
            by_partition.setdefault((row.topic_id, row.partition), []).append(row)
    return by_partition


async def _keep_snapshots(tx: Transaction, settled: Collection[RangeRowKey], declared: sessions.WalEnds) -> None:
    """Stores the agent's report on producers of unregistered records, once the ranges `settled` are settled."""
    keys = [key for key in settled if key in declared.snapshots]
    if keys:
        rows = list((await ranges_by_key(tx, keys)).values())
        known = await _snapshots(tx, {key[:2] for key in keys})
        kept = sessions.settled_snapshots(rows, declared, known)
        await tx.apply([Put(t.PRODUCER_SNAPSHOTS, row) for row in kept])


async def settle_ranges(context: Context, session_id: str, declared: sessions.WalEnds) -> None:
    """Settles ranges at the ends that their leader declares. Raises SessionExpired, InvalidArgument."""

    async def work(tx: Transaction) -> None:
        session = await live_session(tx, session_id)
        rows = await ranges_by_key(tx, declared.ends.keys(), lock="wait")
        # The announced ends are read under the locks of the ranges, so no registration is in between.
        events = sessions.settle(session, rows, declared.ends, await _known(tx, rows))
        if events:
            await commit_leadership(tx, context.settings, list[Event](events))
            await _keep_snapshots(tx, [_key(event) for event in events], declared)

    await change_leadership(context, work)


async def end_session(context: Context, session_id: str, why: str, declared: sessions.WalEnds | None = None) -> None:
    """Ends the session if it exists, and settles its ranges as `declared` where known. why: closed | unreachable

    Raises InvalidArgument for ends that settle_ranges() refuses.
    """

    async def work(tx: Transaction) -> None:
        if declared is not None and declared.ends:
            await _settle_before_end(tx, session_id, declared)
        await _end(tx, context, [session_id], why)

    await change_leadership(context, work)


async def _settle_before_end(tx: Transaction, session_id: str, declared: sessions.WalEnds) -> None:
    """Settles declared ranges without granting anything yet: the grants follow once the session is gone."""
    for session in await tx.select(t.SESSIONS, where(session_id=session_id)):
        led = await tx.select(t.RANGES, where(session_id=session_id, status=t.OPEN))
        # The ranges that the end of the session needs are locked here, too.
        locked = await ranges_by_key(tx, {*declared.ends, *(row.key for row in led)}, lock="wait")
        rows = {key: row for key, row in locked.items() if key in declared.ends}
        events = sessions.settle(session, rows, declared.ends, await _known(tx, rows))
        await tx.append(events)
        await _keep_snapshots(tx, [_key(event) for event in events], declared)


def _key(event: RangeSettled) -> RangeRowKey:
    return event.topic_id, event.partition, event.epoch


async def _end(tx: Transaction, context: Context, session_ids: Sequence[str], why: str) -> None:
    rows = await tx.select(t.SESSIONS, where(session_id=In(session_ids)))
    durable = await durable_topics(tx)
    # Ranges before claims, claims before leases: the lock order of service/common.py.
    open_ranges = await tx.select(t.RANGES, where(session_id=In(session_ids), status=t.OPEN), lock="wait")
    events: list[Event] = []
    for row in rows:
        held = [item for item in open_ranges if item.session_id == row.session_id]
        events += sessions.end_session(row, held, durable, why)
    await buffers.free_claims(tx, [row.agent_id for row in rows if row.role == sessions.SEGMENTER])
    await tx.apply([Remove(t.SESSION_LEASES, {"session_id": session_id}) for session_id in session_ids])
    # Workers lead nothing: their end leaves every share as it is.
    if any(row.role == sessions.INGEST for row in rows):
        await commit_leadership(tx, context.settings, events)
    else:
        await tx.append(events)


async def any_expired(tx: Transaction) -> bool:
    """Returns True if a lease has run out by the database's clock."""
    return bool(await tx.select(t.SESSION_LEASES, where(expires_ms=AtMost(await tx.now_ms())), limit=1))


async def expire_sessions(context: Context) -> int:
    """Ends the sessions with an expired lease, by the database's clock; returns their number. Ends none after an
    outage, until a sweep has extended the leases."""

    async def work(tx: Transaction) -> int:
        if await outages.was_outage(tx, context.settings.session_sweep_interval_ms):
            return 0
        # Locked, so that no heartbeat renews a lease that is ended here. The lock order allows it before the ranges,
        # because the caller holds the cluster lock.
        expired = await tx.select(t.SESSION_LEASES, where(expires_ms=AtMost(await tx.now_ms())), lock="wait")
        await _end(tx, context, [row.session_id for row in expired], "expired")
        return len(expired)

    return await change_leadership(context, work)
