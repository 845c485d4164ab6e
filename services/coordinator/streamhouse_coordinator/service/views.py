"""Queries: topics, metadata, status, the snapshot. Changes nothing."""

from collections.abc import AsyncIterator, Collection, Sequence
from typing import TypeVar

from shproto.errors import UnknownTopic
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2

from streamhouse_coordinator import messages
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.core.tables import PartitionRowKey
from streamhouse_coordinator.ports import (
    FAILED_BUFFERS,
    LOST_RANGES,
    LOST_SEGMENTS,
    UNFINISHED,
    Above,
    In,
    Predicate,
    Totals,
    Transaction,
    Where,
    where,
)
from streamhouse_coordinator.service import reach
from streamhouse_coordinator.service.common import Context, newest_ranges, topic_named
from streamhouse_coordinator.settings import CoordinatorSettings

# Segments of a snapshot part: about 250 bytes each, so a part stays below 1 MB.
SNAPSHOT_SEGMENTS = 4000
SNAPSHOT_PARTITIONS = 500
# Failed buffers in a status: the oldest block the others, and an outage may fail thousands.
BUFFER_FAILURES_SHOWN = 20

RowT = TypeVar("RowT", t.RangeRow, t.SegmentRow)

# Ranges that a reader has to know: those with offsets, now or possibly later.
_NOT_EMPTY = Predicate(
    "NOT (status = 'settled' AND end_offset = start_offset)",
    lambda row: not (row.status == t.SETTLED and row.end_offset == row.start_offset),
)


async def list_topics(context: Context) -> list[t.TopicRow]:
    async def work(tx: Transaction) -> list[t.TopicRow]:
        return await tx.select(t.TOPICS, order=("topic",))

    return await context.store.run(work)


async def describe_topic(context: Context, name: str) -> pb.DescribeTopicResponse:
    """Returns the topic with its partitions. Raises UnknownTopic."""

    async def work(tx: Transaction) -> pb.DescribeTopicResponse:
        topic = await topic_named(tx, name)
        of_topic = where(topic_id=topic.topic_id)
        partitions = await tx.select(t.PARTITIONS, of_topic, order=("partition",))
        newest = await newest_ranges(tx, partitions)
        rows = await tx.select(t.RANGES, where(UNFINISHED, topic_id=topic.topic_id))
        rows += await _lost_ranges(tx, partitions)
        unfinished = _by_partition(rows)
        sums = ("size_bytes", "raw_bytes", "record_count")
        # The number of records of a possibly lost span is unknown: its segment has up to the full width of the range.
        readable = where(topic_id=topic.topic_id, lost_reason="")
        stored = {row.group[0]: row for row in await tx.totals(t.SEGMENTS, readable, by=("partition",), sums=sums)}
        lost = _by_partition(
            await tx.select(t.SEGMENTS, where(LOST_SEGMENTS, **of_topic.equals), order=("base_offset",))
        )
        addresses = await _addresses(tx)
        shown = []
        for row in partitions:
            key = (row.topic_id, row.partition)
            last = newest.get(key)
            ranges = {item.epoch: item for item in [*unfinished.get(key, ()), *([last] if last else ())]}
            totals = stored.get(row.partition, Totals(group=(), count=0, sums=(0, 0, 0)))
            offset_ranges = [messages.offset_range(ranges[epoch]) for epoch in sorted(ranges)]
            shown.append(_partition_info(row, last, offset_ranges, totals, addresses, lost.get(key, ())))
        return pb.DescribeTopicResponse(
            topic=messages.topic_info(topic), partitions=shown, events_position=await tx.position()
        )

    return await context.store.run(work)


async def _lost_ranges(tx: Transaction, partitions: Sequence[t.PartitionRow]) -> list[t.RangeRow]:
    """Returns the lost ranges that end above the start of their log."""
    starts = {row.partition: row.log_start_offset for row in partitions}
    lost = await tx.select(t.RANGES, where(LOST_RANGES, topic_id=partitions[0].topic_id)) if partitions else []
    return [row for row in lost if row.end_offset is None or row.end_offset > starts.get(row.partition, 0)]


def _partition_info(
    row: t.PartitionRow,
    last: t.RangeRow | None,
    ranges: Sequence[types_pb2.OffsetRange],
    totals: Totals,
    addresses: dict[str, str],
    lost: Sequence[t.SegmentRow],
) -> pb.PartitionInfo:
    led = last is not None and last.status == t.OPEN
    return pb.PartitionInfo(
        partition=row.partition,
        leader_agent_id=last.agent_id if last is not None and led else "",
        leader_address=addresses.get(last.session_id, "") if last is not None and led else "",
        epoch=row.epoch,
        log_start_offset=row.log_start_offset,
        registered_end=last.registered_end if last is not None else 0,
        segment_count=totals.count,
        size_bytes=totals.sums[0],
        raw_bytes=totals.sums[1],
        record_count=totals.sums[2],
        ranges=ranges,
        lost=map(messages.lost_segment, lost),
    )


def _by_partition(rows: Sequence[RowT]) -> dict[PartitionRowKey, list[RowT]]:
    grouped: dict[PartitionRowKey, list[RowT]] = {}
    for row in rows:
        grouped.setdefault((row.topic_id, row.partition), []).append(row)
    return grouped


async def _live_sessions(tx: Transaction, **equals: object) -> list[tuple[t.SessionRow, int]]:
    """Returns the sessions with a valid lease, and the remaining ms."""
    now_ms = await tx.now_ms()
    leases = {row.session_id: row for row in await tx.select(t.SESSION_LEASES, where(expires_ms=Above(now_ms)))}
    rows = await tx.select(t.SESSIONS, Where(equals=equals), order=("agent_id", "started_ms"))
    return [(row, leases[row.session_id].expires_ms - now_ms) for row in rows if row.session_id in leases]


async def _addresses(tx: Transaction) -> dict[str, str]:
    """Returns the address of each live ingest session."""
    return {row.session_id: row.address for row, _ in await _live_sessions(tx, role=INGEST)}


async def get_metadata(context: Context, names: Collection[str]) -> pb.GetMetadataResponse:
    """Returns the partitions and leaders of topics. Raises UnknownTopic if a topic does not exist."""

    async def work(tx: Transaction) -> pb.GetMetadataResponse:
        sessions = [row for row, _ in await _live_sessions(tx)]
        addresses = {row.session_id: row.address for row in sessions if row.role == INGEST}
        topics = await tx.select(t.TOPICS, where(topic=In(names)), order=("topic",)) if names else []
        if missing := set(names) - {row.topic for row in topics}:
            raise UnknownTopic(f"topic {min(missing)!r} does not exist", topic=min(missing))
        partitions = await tx.select(
            t.PARTITIONS, where(topic_id=In([row.topic_id for row in topics])), order=("topic_id", "partition")
        )
        newest = await newest_ranges(tx, partitions)
        return pb.GetMetadataResponse(
            topics=[_topic_metadata(topic, partitions, newest, addresses) for topic in topics],
            query_addresses=_addresses_of(sessions, "query"),
            sql_addresses=_addresses_of(sessions, "sql"),
            coordinator_addresses=_addresses_of(sessions, "coordinator"),
        )

    return await context.store.run(work)


def _addresses_of(sessions: Sequence[t.SessionRow], role: str) -> list[str]:
    return sorted({row.address for row in sessions if row.role == role and row.address})


def _topic_metadata(
    topic: t.TopicRow,
    partitions: Sequence[t.PartitionRow],
    newest: dict[PartitionRowKey, t.RangeRow],
    addresses: dict[str, str],
) -> pb.TopicMetadata:
    leaders = []
    for row in partitions:
        if row.topic_id == topic.topic_id:
            last = newest.get((row.topic_id, row.partition))
            # Clients get no leader whose lease has run out: it may be gone, and the next is not granted yet.
            led = last is not None and last.status == t.OPEN and last.session_id in addresses
            leaders.append(
                pb.LeaderInfo(
                    partition=row.partition,
                    agent_id=last.agent_id if last is not None and led else "",
                    address=addresses[last.session_id] if last is not None and led else "",
                    epoch=row.epoch,
                )
            )
    return pb.TopicMetadata(topic=messages.topic_info(topic), leaders=leaders)


async def get_status(context: Context) -> pb.GetStatusResponse:
    async def work(tx: Transaction) -> pb.GetStatusResponse:
        sessions = await _live_sessions(tx)
        full = {row.session_id for row in await tx.select(t.SESSION_LEASES, where(log_full=True))}
        partitions = await tx.select(t.PARTITIONS, order=("topic_id", "partition"))
        # Names are read last: a topic created in between has no partitions here; a deleted topic is left out.
        names = {row.topic_id: row.topic for row in await tx.select(t.TOPICS)}
        partitions = [row for row in partitions if row.topic_id in names]
        newest = await newest_ranges(tx, partitions)
        rows = await tx.select(t.RANGES, where(UNFINISHED), order=t.RANGES.key)
        unfinished = _by_partition(rows)
        waiting = await tx.totals(t.BUFFER_CLAIMS, where(claim_id=""), sums=("size_bytes",))
        every = await tx.totals(t.BUFFER_CLAIMS, where(), sums=("size_bytes",))
        return pb.GetStatusResponse(
            sessions=[
                messages.session_info(row, expires_in_ms, log_full=row.session_id in full)
                for row, expires_in_ms in sessions
            ],
            leases=[_lease(row, names[row.topic_id], newest, unfinished) for row in partitions],
            buffers_waiting=waiting[0].count,
            buffers_claimed=every[0].count - waiting[0].count,
            buffers_waiting_bytes=every[0].sums[0],
            events_position=await tx.position(),
            outbox_position=(await tx.outbox()).position,
            history_id=await _history_id(tx),
            missing_position=max((row.position for row in await tx.select(t.FORKS)), default=0),
            buffer_failures=await _buffer_failures(tx),
            unreachable_agents=await _unreachable_agents(tx, context.settings),
        )

    return await context.store.run(work)


async def _unreachable_agents(tx: Transaction, settings: CoordinatorSettings) -> list[pb.UnreachableAgent]:
    """Returns the agents that a worker cannot reach, and the cut-off agents."""
    found = await reach.look(tx)
    if found is None:
        return []
    now_ms = await tx.now_ms()
    return [
        pb.UnreachableAgent(
            agent_id=agent.agent_id,
            address=agent.address,
            cut_off=found.is_cut_off_now(agent),
            failing=sorted(row.agent_id for row in reports.failing),
            reaching=sorted(row.agent_id for row in reports.reaching),
            since_ms=reports.failing_since_ms,
        )
        for agent in found.agents
        for reports in [found.reach_of(agent, now_ms, settings)]
        if reports.failing or found.is_cut_off_now(agent)
    ]


async def _buffer_failures(tx: Transaction) -> list[pb.BufferFailure]:
    """Returns the oldest buffers with a failed hand-over, at most BUFFER_FAILURES_SHOWN."""
    claims = await tx.select(t.BUFFER_CLAIMS, where(FAILED_BUFFERS), order=("sealed_ms",), limit=BUFFER_FAILURES_SHOWN)
    buffers = await tx.select(t.BUFFERS, where(buffer_id=In([row.buffer_id for row in claims])))
    agents = {row.buffer_id: row.agent_id for row in buffers}
    return [
        pb.BufferFailure(
            buffer_id=row.buffer_id,
            agent_id=agents.get(row.buffer_id, ""),
            attempt=row.attempt,
            reason=row.last_reason,
            size_bytes=row.size_bytes,
        )
        for row in claims
    ]


def _lease(
    row: t.PartitionRow,
    topic: str,
    newest: dict[PartitionRowKey, t.RangeRow],
    unfinished: dict[PartitionRowKey, list[t.RangeRow]],
) -> pb.LeaseInfo:
    key = (row.topic_id, row.partition)
    last = newest.get(key)
    led = last is not None and last.status == t.OPEN
    # Includes the newest range if no agent was there to take over.
    waited_for = [item for item in unfinished.get(key, ()) if item.epoch < row.epoch or item.status == t.ORPHANED]
    return pb.LeaseInfo(
        topic=topic,
        partition=row.partition,
        agent_id=last.agent_id if last is not None and led else "",
        epoch=row.epoch,
        status="unassigned" if last is None or not led else "moving" if last.moving else "active",
        log_start_offset=row.log_start_offset,
        registered_end=last.registered_end if last is not None else 0,
        unsettled=map(messages.offset_range, waited_for),
    )


# ---- snapshot


async def get_snapshot(context: Context) -> AsyncIterator[pb.SnapshotPart]:
    """Yields everything that a reader's index holds, as of a single event, in parts of bounded size.

    Includes the sessions that no event has ended, even with an expired lease: after an outage such a session may go on,
    and no event would return the session to the index.
    """
    # A snapshot for all parts: a reader follows the feed from `position`, and every part must be as of that event.
    async with context.store.snapshot() as tx:
        position = await tx.position()
        remaining_ms = {row.session_id: ms for row, ms in await _live_sessions(tx)}
        sessions = await tx.select(t.SESSIONS, order=("agent_id", "started_ms"))
        history_id = await _history_id(tx)
        yield pb.SnapshotPart(
            position=position,
            history_id=history_id,
            sessions=[messages.session_info(row, remaining_ms.get(row.session_id, 0)) for row in sessions],
        )
        for row in await tx.select(t.SQL_TABLES, order=("table_name",)):
            yield pb.SnapshotPart(position=position, history_id=history_id, sql_tables=[messages.sql_table_info(row)])
        for topic in await tx.select(t.TOPICS, order=("topic_id",)):
            async for part in _topic_parts(tx, topic, position):
                part.history_id = history_id
                yield part


async def _history_id(tx: Transaction) -> str:
    return (await tx.select(t.HISTORIES, order=("nth",)))[-1].history_id


async def _topic_parts(tx: Transaction, topic: t.TopicRow, position: int) -> AsyncIterator[pb.SnapshotPart]:
    for first in range(0, topic.partitions, SNAPSHOT_PARTITIONS):
        some = where(topic_id=topic.topic_id, partition=In(range(first, first + SNAPSHOT_PARTITIONS)))
        rows = {row.partition: row for row in await tx.select(t.PARTITIONS, some, order=("partition",))}
        kept = {row.key: row for row in await tx.select(t.RANGES, Where(equals=some.equals, predicate=_NOT_EMPTY))}
        kept |= {row.key: row for row in (await newest_ranges(tx, rows.values())).values()}
        ranges = _by_partition([kept[key] for key in sorted(kept)])
        yield pb.SnapshotPart(
            position=position,
            partitions=[
                _snapshot_partition(topic, row, ranges.get((row.topic_id, row.partition), [])) for row in rows.values()
            ],
        )
        # Counted first, so that partitions without segments cost no statement of their own.
        counts = await tx.totals(t.SEGMENTS, some, by=("partition",))
        for count in sorted(counts, key=lambda item: item.group):
            async for part in _segment_parts(tx, topic, rows[count.group[0]], position):
                yield part


def _snapshot_partition(topic: t.TopicRow, row: t.PartitionRow, ranges: Sequence[t.RangeRow]) -> pb.SnapshotPartition:
    start = row.log_start_offset
    shown = [item for item in ranges if item.end_offset is None or item.end_offset > start or item.epoch == row.epoch]
    return pb.SnapshotPartition(
        topic=messages.topic_info(topic),
        partition=row.partition,
        log_start_offset=start,
        ranges=[messages.offset_range(item) for item in shown],
    )


async def _segment_parts(
    tx: Transaction, topic: t.TopicRow, row: t.PartitionRow, position: int
) -> AsyncIterator[pb.SnapshotPart]:
    after = -1
    while True:
        # Pages by offset: a page costs the same wherever it begins.
        some = where(topic_id=row.topic_id, partition=row.partition, base_offset=Above(after))
        segments = await tx.select(t.SEGMENTS, some, order=("base_offset",), limit=SNAPSHOT_SEGMENTS)
        if not segments:
            return
        refs: list[types_pb2.SegmentRef] = [messages.segment_ref(item, topic.topic) for item in segments]
        part = pb.SnapshotPartition(
            topic=messages.topic_info(topic),
            partition=row.partition,
            log_start_offset=row.log_start_offset,
            segments=refs,
        )
        yield pb.SnapshotPart(position=position, partitions=[part])
        after = segments[-1].base_offset
