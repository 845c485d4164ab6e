"""Prunes events that are no longer needed; docs/decisions/0013 says why this is safe.

A follower needs events for as long as it is away; a mark in the object store needs a single event, which is kept apart.
Backups have the bases and the events behind them.
"""

from opentelemetry import metrics
from shruntime.counters import counter

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove
from streamhouse_coordinator.core.pruning import Needs, prunable, pruning
from streamhouse_coordinator.ports import Above, Transaction, where
from streamhouse_coordinator.service.common import Context

# Events of a transaction: a few hundred row operations on the bases, some ms. Other transactions do not wait for its
# locks.
BATCH = 500
# Batches of a run, so that other periodic work gets its turn while a long history is pruned for the first time.
BATCHES = 20
# Marks to keep: segmenters make at most a mark per minute, and a store holds one of the last.
MARKS_KEPT = 10_000

_meter = metrics.get_meter("streamhouse.coordinator")
_kept = _meter.create_gauge(
    "streamhouse_coordinator_events_kept", description="events in PostgreSQL, from the oldest that is kept"
)
_pruned = counter(_meter, "streamhouse_coordinator_events_pruned_total", "events pruned")


async def prune(context: Context) -> int:
    """Prunes due events, a bounded number; returns the number. Among several coordinators a single one prunes at a
    time."""
    if context.settings.amqp_url:  # also while RabbitMQ is away
        await context.store.run(lambda tx: tx.note_publisher())
    count = 0
    for _ in range(BATCHES):
        pruned = await context.store.run(lambda tx: _prune_batch(tx, context))
        count += pruned
        if pruned < BATCH:
            break
    _pruned.add(count)
    head = await context.store.head()
    _kept.set(head.position - head.pruned_position)
    return count


async def _prune_batch(tx: Transaction, context: Context) -> int:
    held = await tx.select(t.PRUNED, lock="skip")
    if not held:
        return 0  # another coordinator prunes
    needs = await _needs(tx, context)
    after = where(position=Above(held[0].position))
    rows = prunable(await tx.select(t.EVENTS, after, order=("position",), limit=BATCH), needs)
    if rows:
        await tx.apply(pruning(rows))
    return len(rows)


async def _needs(tx: Transaction, context: Context) -> Needs:
    settings, now_ms = context.settings, await tx.now_ms()
    outbox = await tx.outbox()
    unpublished_before_ms = now_ms - settings.outbox_retention_ms
    return Needs(
        before_ms=now_ms - settings.events_retention_ms,
        up_to=await tx.position() - settings.events_kept_min,
        # A relay that has not run for outbox_retention_ms keeps no events any more; seen_ms 0 means that none ever ran.
        published=outbox.position if outbox.seen_ms >= max(1, unpublished_before_ms) else None,
        unpublished_before_ms=unpublished_before_ms,
    )


async def mark(context: Context) -> t.HistoryMarkRow | None:
    """Returns the identity of the last event, and stores it for as long as a mark of it may be looked up; None if there
    are no events. The same event may be marked again."""

    async def work(tx: Transaction) -> t.HistoryMarkRow | None:
        rows = await tx.select(t.EVENTS, where(position=await tx.position()))
        if not rows:
            return None
        row = mark_of(rows[0])
        excess = (await tx.totals(t.HISTORY_MARKS, where()))[0].count + 1 - MARKS_KEPT
        oldest = await tx.select(t.HISTORY_MARKS, order=("position",), limit=excess) if excess > 0 else []
        await tx.apply(
            [Put(t.HISTORY_MARKS, row), *(Remove(t.HISTORY_MARKS, {"position": m.position}) for m in oldest)]
        )
        return row

    return await context.store.run(work)


async def marked(context: Context, position: int) -> t.HistoryMarkRow | None:
    """Returns the identity of the event at `position`; None if there is none, or if the event was pruned and never
    marked."""

    async def work(tx: Transaction) -> t.HistoryMarkRow | None:
        # The event is read first: an event that is pruned in between was marked before.
        events = await tx.select(t.EVENTS, where(position=position))
        marks = await tx.select(t.HISTORY_MARKS, where(position=position))
        return mark_of(events[0]) if events else marks[0] if marks else None

    return await context.store.run(work)


def mark_of(event: t.EventRow) -> t.HistoryMarkRow:
    """Returns the identity of an event."""
    return t.HistoryMarkRow(
        position=event.position,
        stream_id=event.stream_id,
        version=event.version,
        type=event.type,
        created_ms=event.created_ms,
    )
