"""Announces, claims and registers sealed buffers.

Owns: the transactions over buffers and their claims. Does not own: the decision of a registration
(core/registration.py).
Invariants: a buffer is completed when all of its records are registered or dropped. A claim only avoids double work:
the ranges decide each registration.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from opentelemetry import metrics
from shproto.errors import Fenced, InvalidArgument
from shproto.events import BufferCompleted, BufferSealed, Event, Slice
from shproto.model import Segment
from shruntime.counters import counter, names_of

from streamhouse_coordinator.core import registration
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove, RowOp, Set
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.core.tables import RangeRowKey
from streamhouse_coordinator.ports import AtMost, In, Transaction, where, where_keys
from streamhouse_coordinator.recovery import rollback_detection
from streamhouse_coordinator.service.common import (
    RANGE_KEYS,
    Context,
    live_session,
    ranges_by_key,
    topic_names,
)

log = logging.getLogger(__name__)

# Completed buffers that a claim passes over; the next claim continues.
CLAIM_CANDIDATES = 16

_results = counter(
    metrics.get_meter("streamhouse.coordinator"),
    "streamhouse_coordinator_registrations_total",
    "segments offered for registration, by result",
    label="result",
    values=names_of(registration.Result),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    buffer: t.BufferRow
    claim: t.BufferClaimRow
    address: str
    slices: list[t.BufferSliceRow]
    topics: dict[str, str]


async def announce(
    context: Context, sealed: BufferSealed, snapshots: Mapping[RangeRowKey, bytes], trace_context: str
) -> None:
    """Announces a buffer; announcing again changes nothing. `sealed` comes without agent_id, wal_id and topic names;
    `snapshots`: producers' state at the end of each slice. Raises SessionExpired."""

    async def work(tx: Transaction) -> BufferSealed | None:
        session = await live_session(tx, sealed.session_id)
        _must_be_ingest(session)
        slices = [_slice_row(sealed.buffer_id, item) for item in sealed.slices]
        # A retry: the answer to the first announcement was lost.
        if await tx.select(t.BUFFERS, where(buffer_id=sealed.buffer_id)):
            return None
        # Without locks: if a range ends meanwhile, the claim of the buffer finds nothing left and completes it
        # (_open_claim).
        ranges = await ranges_by_key(tx, {row.range_key for row in slices})
        if not registration.unresolved(slices, ranges):
            # The buffer was announced before and is completed, or no part of it is wanted any more. Either way its
            # agent is notified.
            await tx.append([BufferCompleted(sealed.buffer_id, session.agent_id)], trace_context)
            return None
        names = await topic_names(tx, {row.topic_id for row in slices})
        size_bytes = sum(row.size_bytes for row in slices)
        now_ms = await tx.now_ms()
        ends = {row.range_key: row.end_offset for row in slices}
        buffer = t.BufferRow(
            buffer_id=sealed.buffer_id, session_id=sealed.session_id, agent_id=session.agent_id, wal_id=session.wal_id
        )
        await tx.apply(
            [
                Put(t.BUFFERS, buffer),
                *(Put(t.BUFFER_SLICES, row) for row in slices),
                *(
                    Put(t.PRODUCER_SNAPSHOTS, _snapshot_row(key, ends[key], snapshot))
                    for key, snapshot in snapshots.items()
                    # Nothing would remove a row of a topic that is deleted already.
                    if snapshot and key[0] in names
                ),
                Put(
                    t.BUFFER_CLAIMS,
                    t.BufferClaimRow(
                        buffer_id=sealed.buffer_id,
                        wal_id=session.wal_id,
                        sealed_ms=now_ms,
                        size_bytes=size_bytes,
                        trace_context=trace_context,
                        claim_id="",
                        worker_id="",
                        free_at_ms=0,
                        attempt=0,
                        last_reason="",
                    ),
                ),
            ]
        )
        tx.notify_sealed(sealed.buffer_id)
        named = tuple(replace(item, topic=names.get(item.topic_id, item.topic)) for item in sealed.slices)
        return replace(sealed, agent_id=session.agent_id, wal_id=session.wal_id, slices=named)

    announced = await context.store.run(work, lock=sealed.stream_id)  # a first try may still run
    if announced is not None:
        # After the commit: a segmenter that looks earlier finds nothing to claim.
        context.buffer_sealed(announced, trace_context)


def _slice_row(buffer_id: str, item: Slice) -> t.BufferSliceRow:
    return t.BufferSliceRow(
        buffer_id=buffer_id,
        topic_id=item.topic_id,
        partition=item.partition,
        epoch=item.epoch,
        base_offset=item.base_offset,
        end_offset=item.end_offset,
        record_count=item.record_count,
        size_bytes=item.size_bytes,
    )


def _snapshot_row(key: RangeRowKey, end_offset: int, snapshot: bytes) -> t.ProducerSnapshotRow:
    topic_id, partition, epoch = key
    return t.ProducerSnapshotRow(
        topic_id=topic_id, partition=partition, epoch=epoch, end_offset=end_offset, snapshot=snapshot
    )


def _must_be_ingest(session: t.SessionRow) -> None:
    if session.role != INGEST:
        raise InvalidArgument(
            f"session {session.session_id} is of role {session.role}; only ingest agents have buffers",
            field="session_id",
            value=session.session_id,
        )


async def claim(context: Context, worker_id: str, ttl_ms: int, except_agents: Collection[str] = ()) -> Claimed | None:
    """Claims the oldest free buffer of an agent that has a session and is not excepted; returns the claim, None if
    there is no such buffer."""
    claim_id = context.new_id()

    async def work(tx: Transaction) -> Claimed | None:
        now_ms = await tx.now_ms()
        sessions = await tx.select(t.SESSIONS, where(role=INGEST))
        # Slices are pulled from the agent itself, so a buffer without a live agent would only cost its worker a
        # timeout.
        agents = {row.wal_id: row for row in sessions if row.agent_id not in except_agents}
        free = where(wal_id=In(agents), free_at_ms=AtMost(now_ms))
        for _ in range(CLAIM_CANDIDATES if agents else 0):
            # Rows that other claims hold are skipped, so workers never wait for each other here.
            rows = await tx.select(t.BUFFER_CLAIMS, free, order=("sealed_ms",), limit=1, lock="skip")
            if not rows:
                return None
            taken = replace(
                rows[0],
                claim_id=claim_id,
                worker_id=worker_id,
                free_at_ms=now_ms + ttl_ms,
                # Counted with the claim: a worker that dies never reports a failure.
                attempt=rows[0].attempt + 1,
            )
            claimed = await _open_claim(tx, taken, agents[taken.wal_id].address)
            if claimed is not None:
                await tx.apply([Put(t.BUFFER_CLAIMS, taken)])
                return claimed
        return None

    return await context.store.run(work)


async def _open_claim(tx: Transaction, taken: t.BufferClaimRow, address: str) -> Claimed | None:
    """Returns the claimed buffer with its unregistered slices; completes the buffer and returns None if nothing is left
    (its ranges were settled, lost or deleted)."""
    buffers = await tx.select(t.BUFFERS, where(buffer_id=taken.buffer_id))
    slices = await _unresolved(tx, taken.buffer_id)
    if buffers and slices:
        names = await topic_names(tx, {item.topic_id for item in slices})
        return Claimed(buffer=buffers[0], claim=taken, address=address, slices=slices, topics=names)
    await _complete(tx, buffers, taken.buffer_id)
    return None


async def _unresolved(
    tx: Transaction, buffer_id: str, ranges: Mapping[RangeRowKey, t.RangeRow] | None = None
) -> list[t.BufferSliceRow]:
    slices = await tx.select(
        t.BUFFER_SLICES, where(buffer_id=buffer_id), order=("topic_id", "partition", "epoch", "base_offset")
    )
    known = dict(ranges or {})
    missing = {item.range_key for item in slices} - set(known)
    return registration.unresolved(slices, known | await ranges_by_key(tx, missing))


async def _complete(tx: Transaction, buffers: Sequence[t.BufferRow], buffer_id: str) -> None:
    await tx.append([BufferCompleted(row.buffer_id, row.agent_id) for row in buffers])
    await tx.apply(done_with([buffer_id]))


def done_with(buffer_ids: Collection[str]) -> list[RowOp]:
    """Returns the operations that remove completed buffers. Uploads for them that are not registered now never will
    be."""
    tables = (t.BUFFER_CLAIMS, t.UPLOAD_INTENTS, t.BUFFERS, t.BUFFER_SLICES)
    return [Remove(table, {"buffer_id": buffer_id}) for table in tables for buffer_id in buffer_ids]


async def renew_claim(context: Context, claim_id: str, ttl_ms: int) -> None:
    """Extends claims of buffers and of compactions. Raises Fenced if the claim is lost."""

    async def work(tx: Transaction) -> None:
        # The rows are selected by claim id and locked: PostgreSQL checks the condition again after a wait, so a claim
        # that another worker has taken meanwhile is not renewed.
        until_ms = await tx.now_ms() + ttl_ms
        ops: list[RowOp] = [
            Set(t.BUFFER_CLAIMS, (row.buffer_id,), {"free_at_ms": until_ms})
            for row in await tx.select(t.BUFFER_CLAIMS, where(claim_id=claim_id), lock="wait")
        ]
        ops += [
            Set(t.COMPACTION_CLAIMS, (row.topic_id, row.partition), {"expires_ms": until_ms})
            for row in await tx.select(t.COMPACTION_CLAIMS, where(claim_id=claim_id), lock="wait")
        ]
        if not ops:
            raise Fenced(f"claim {claim_id!r} is done, or expired and taken by another worker", offered=claim_id)
        await tx.apply(ops)

    await context.store.run(work)


async def release_claim(context: Context, claim_id: str, reason: str, retry_after_ms: int) -> None:
    """Releases a claim of a buffer or of a compaction; a lost claim is passed over."""

    async def work(tx: Transaction) -> None:
        free_at_ms = await tx.now_ms() + retry_after_ms
        changes = {"claim_id": "", "worker_id": "", "free_at_ms": free_at_ms, "last_reason": reason}
        # By claim id, so that a late release never touches the claim of another worker.
        buffers = await tx.select(t.BUFFER_CLAIMS, where(claim_id=claim_id), lock="wait")
        compactions = await tx.select(t.COMPACTION_CLAIMS, where(claim_id=claim_id), lock="wait")
        await tx.apply([Set(t.BUFFER_CLAIMS, (row.buffer_id,), changes) for row in buffers])
        await tx.apply(
            [_release_compaction(row, free_at_ms=free_at_ms, retry_after_ms=retry_after_ms) for row in compactions]
        )

    await context.store.run(work)


async def free_claims(tx: Transaction, worker_ids: Collection[str]) -> None:
    """Ends all claims of these workers, which are gone or start anew. A worker that goes on does no harm: the ranges
    judge each registration, and the worker stops when a renewal is refused."""
    if not worker_ids:
        return
    now_ms = await tx.now_ms()
    of_workers = where(worker_id=In(worker_ids))
    buffers = await tx.select(t.BUFFER_CLAIMS, of_workers, lock="wait")
    compactions = [row for row in await tx.select(t.COMPACTION_CLAIMS, of_workers, lock="wait") if row.claim_id]
    changes = {"claim_id": "", "worker_id": "", "free_at_ms": now_ms, "last_reason": "its worker is gone"}
    await tx.apply([Set(t.BUFFER_CLAIMS, (row.buffer_id,), changes) for row in buffers])
    await tx.apply([_release_compaction(row, free_at_ms=now_ms, retry_after_ms=0) for row in compactions])
    if buffers or compactions:
        names = ", ".join(sorted(worker_ids))
        log.info("%d buffers and %d compactions of %s are free again", len(buffers), len(compactions), names)


def _release_compaction(row: t.CompactionClaimRow, *, free_at_ms: int, retry_after_ms: int) -> RowOp:
    key = (row.topic_id, row.partition)
    # The row stays until the retry is due and keeps other workers away; without a delay it goes.
    if retry_after_ms:
        return Set(t.COMPACTION_CLAIMS, key, {"claim_id": "", "expires_ms": free_at_ms})
    return Remove(t.COMPACTION_CLAIMS, dict(zip(t.COMPACTION_CLAIMS.key, key, strict=True)))


async def register(
    context: Context, buffer_id: str, segments: Sequence[Segment], trace_context: str
) -> list[registration.Result]:
    """Registers segments; returns a result per segment. Correct without a claim, since the ranges decide. Raises
    MetadataWentBack."""

    async def work(tx: Transaction) -> list[registration.Result]:
        # After a rollback nothing is added to the log before a restore: the positions of the lost events are used
        # again.
        await rollback_detection.check(tx, rollback_detection.COORDINATOR)
        early = await _early_ranges(tx, segments)
        offered = [item for item in segments if registration.key_of(item) not in early]
        answers: Iterator[registration.Result] = iter(())
        if offered:
            done = await _register(tx, buffer_id, offered)
            await _finish(tx, done, buffer_id=buffer_id, trace_context=trace_context)
            answers = iter(done.results)
        return [registration.Result.EARLY if registration.key_of(item) in early else next(answers) for item in segments]

    results = await context.store.run(work)
    for result in results:
        _results.add(1, {"result": result.name.lower()})
    return results


async def _early_ranges(tx: Transaction, segments: Sequence[Segment]) -> set[RangeRowKey]:
    """Returns the ranges in which no segment can be registered yet, without a lock.

    Segments wait for their predecessors by being offered again and again. If each of these tries waited for the range's
    row, the registration that all of them need would wait behind them: with some dozens of waiting buffers, statements
    hit their time limits faster than registrations succeeded, for minutes.
    """
    early = registration.early_ranges(segments, await ranges_by_key(tx, {registration.key_of(it) for it in segments}))
    if not early:
        return early
    holes = await tx.select(t.LOST_SPANS, where_keys(RANGE_KEYS, sorted(early)))
    return early - {span.range_key for span in holes}


async def _register(tx: Transaction, buffer_id: str, segments: Sequence[Segment]) -> registration.Registration:
    keys = {registration.key_of(item) for item in segments}
    ranges = await ranges_by_key(tx, keys, lock="wait")
    # After the ranges are locked: the first try of this call may have committed during the wait.
    known = await tx.select(t.SEGMENTS, where(segment_id=In([item.segment_id for item in segments])))
    lost = await tx.select(t.LOST_SPANS, where_keys(RANGE_KEYS, sorted(keys)))
    names = await topic_names(tx, {item.topic_id for item in segments} | {row.topic_id for row in lost})
    named = [replace(item, topic=names.get(item.topic_id, item.topic)) for item in segments]
    # The claim row stands for the buffer: a transaction that completes a buffer holds that row. The intents' rows stand
    # for the objects: a transaction that begins a deletion holds them.
    await tx.select(t.BUFFER_CLAIMS, where(buffer_id=buffer_id), lock="wait")
    keys_offered = {item.object_key for item in segments}
    intents = await tx.select(t.UPLOAD_INTENTS, where(object_key=In(keys_offered)), lock="wait")
    declared = {row.object_key for row in intents}
    return registration.register(
        named,
        ranges=ranges,
        known_ids={row.segment_id for row in known},
        lost=lost,
        topics=names,
        buffer_id=buffer_id,
        declared=declared,
    )


async def _finish(tx: Transaction, done: registration.Registration, *, buffer_id: str, trace_context: str) -> None:
    ops: list[RowOp] = [
        Remove(t.LOST_SPANS, {name: getattr(span, name) for name in t.LOST_SPANS.key}) for span in done.lost_done
    ]
    ops += await _outdated_snapshots(tx, done)
    buffers = await tx.select(t.BUFFERS, where(buffer_id=buffer_id))
    # With the ranges as the events leave them, since these are appended below.
    completed = bool(buffers) and not await _unresolved(tx, buffer_id, done.ranges)
    if completed:
        ops += done_with([buffer_id])
    events = registration.of_buffer(done.events, buffers[0], completed) if buffers else list[Event](done.events)
    await tx.append(events, trace_context)
    await tx.apply(ops)


async def _outdated_snapshots(tx: Transaction, done: registration.Registration) -> list[RowOp]:
    """Returns the operations that remove outdated producer snapshots: of each range only the newest registered snapshot
    counts, and those beyond."""
    moved = {registration.key_of(event.segment) for event in done.events}
    rows = await tx.select(t.PRODUCER_SNAPSHOTS, where_keys(RANGE_KEYS, sorted(moved)))
    newest: dict[RangeRowKey, int] = {}
    for row in rows:
        key = (row.topic_id, row.partition, row.epoch)
        if row.end_offset <= done.ranges[key].registered_end:
            newest[key] = max(newest.get(key, 0), row.end_offset)
    return [
        Remove(t.PRODUCER_SNAPSHOTS, {name: getattr(row, name) for name in t.PRODUCER_SNAPSHOTS.key})
        for row in rows
        if row.end_offset < newest.get((row.topic_id, row.partition, row.epoch), 0)
    ]


async def report_lost(context: Context, session_id: str, spans: Sequence[t.LostSpanRow]) -> None:
    """Records holes of a log as lost spans. A hole beyond the registered end waits. Raises SessionExpired,
    InvalidArgument for a span of another log."""

    async def work(tx: Transaction) -> None:
        session = await live_session(tx, session_id)
        ranges = await ranges_by_key(tx, {span.range_key for span in spans}, lock="wait")
        for span in spans:
            row = ranges.get(span.range_key)
            # Another log may still have the records: only the log of the range can say that they are gone.
            if row is not None and row.wal_id != session.wal_id:
                raise InvalidArgument(
                    f"epoch {span.epoch} of partition {span.partition} belongs to another write-ahead log",
                    field="spans",
                    value=span.epoch,
                )
        await tx.apply([Put(t.LOST_SPANS, span) for span in spans])
        names = await topic_names(tx, {span.topic_id for span in spans})
        waiting = await tx.select(t.LOST_SPANS, where_keys(RANGE_KEYS, sorted(ranges)))
        # Without a segment: a hole at the end of what is registered would otherwise wait for the next registration,
        # which may never come.
        done = registration.register(
            [], ranges=ranges, known_ids=(), lost=waiting, topics=names, buffer_id="", declared=()
        )
        await _finish(tx, done, buffer_id="", trace_context="")
        gone = [span for span in spans if span.range_key not in ranges]
        await tx.apply(
            [Remove(t.LOST_SPANS, {name: getattr(span, name) for name in t.LOST_SPANS.key}) for span in gone]
        )

    await context.store.run(work)


async def backlog(tx: Transaction) -> tuple[int, int]:
    """Returns the number of sealed buffers that are not registered yet, and their bytes."""
    every = (await tx.totals(t.BUFFER_CLAIMS, where(), sums=("size_bytes",)))[0]
    return every.count, every.sums[0]
