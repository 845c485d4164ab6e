"""An open transaction in PostgreSQL: reads and changes rows, appends events, notifies waiting calls.

Owns: the events appended so far, until `finish` numbers them.
Invariants: the row of `event_position` is the last that a transaction locks, right before its commit. Every other
transaction waits for that row, so the row is held for three statements, and its holder waits for no other transaction.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import asyncpg
from opentelemetry import metrics
from shproto.events import Event
from shruntime.counters import counter

from streamhouse_coordinator.adapters import sql
from streamhouse_coordinator.adapters.wait_queues import overloaded
from streamhouse_coordinator.core.projection import RowOp, coalesce, elsewhere, replayed, row_ops, stamped
from streamhouse_coordinator.core.tables import EVENTS, PROJECTIONS, Table, base_of
from streamhouse_coordinator.ports import EVERYTHING, Above, Lock, Outbox, Totals, Where, where

RowT = TypeVar("RowT")

EVENTS_CHANNEL = "streamhouse_events"
GROUPS_CHANNEL = "streamhouse_groups"
BUFFERS_CHANNEL = "streamhouse_buffers"
# Events of a round of a replay: their row operations are a few MB at most.
REPLAY_BATCH = 1000
# clock_timestamp() is the present time; now() would be the time at which the transaction began, before its waits for
# locks.
NOW_MS = "(extract(epoch from clock_timestamp()) * 1000)::bigint"

_events = counter(
    metrics.get_meter("streamhouse.coordinator"),
    "streamhouse_coordinator_events_total",
    "events appended, by type",
    label="type",
    values=Event.registry,
)


class PostgresTransaction:
    """Implements ports.Transaction on an open transaction of `connection`."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.locked = ""
        self._now_ms: int | None = None
        self._groups: set[str] = set()
        self._sealed: list[str] = []
        self._pending: list[tuple[Event, str]] = []  # with their trace contexts
        self._with_position: list[Callable[[int], Sequence[RowOp]]] = []

    async def now_ms(self) -> int:
        if self._now_ms is None:
            self._now_ms = await self._connection.fetchval(f"SELECT {NOW_MS}")
        assert self._now_ms is not None
        return self._now_ms

    async def lock(self, name: str) -> None:
        """Waits for the named lock, as the first statement; the lock is held until the transaction ends. Raises
        Overloaded if a frozen or very busy coordinator keeps the lock."""
        try:
            # A lock of the transaction: it ends with the commit, also behind a pooler, which would keep a lock of the
            # session. Two names with the same hash only wait for each other.
            await self._connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", name)
        except asyncpg.LockNotAvailableError as error:
            raise overloaded("another coordinator holds the same lock for too long") from error
        self.locked = name

    async def select(
        self,
        table: Table[RowT],
        where: Where = EVERYTHING,
        *,
        order: Sequence[str] = (),
        limit: int | None = None,
        lock: Lock = "",
    ) -> list[RowT]:
        text, arguments = sql.select(table, where, order, limit, lock)
        return [table.row_of(record) for record in await self._connection.fetch(text, *arguments)]

    async def totals(
        self,
        table: Table[Any],
        where: Where,
        *,
        by: Sequence[str] = (),
        sums: Sequence[str] = (),
        maxima: Sequence[str] = (),
    ) -> list[Totals]:
        text, arguments = sql.totals(table, where, by, sums, maxima)
        cut, end = len(by), len(by) + 1 + len(sums)
        rows = [tuple(record) for record in await self._connection.fetch(text, *arguments)]
        return [
            Totals(
                group=row[:cut],
                count=row[cut],
                sums=row[cut + 1 : end],
                maxima=tuple(value for value in row[end:] if value is not None),
            )
            for row in rows
        ]

    async def append(self, events: Sequence[Event], trace_context: str = "") -> None:
        # The time may cost a statement, so it is read only for events without a time of their own.
        if any(stamped(event, 1) is not event for event in events):
            at_ms = await self.now_ms()
            events = [stamped(event, at_ms) for event in events]
        # Applied at once, numbered by finish(): the position, for which all others wait, is held only for the commit.
        await self.apply([op for event in events for op in row_ops(event)])
        self._pending += [(event, trace_context) for event in events]

    def with_position(self, ops: Callable[[int], Sequence[RowOp]]) -> None:
        self._with_position.append(ops)

    async def apply(self, ops: Sequence[RowOp]) -> None:
        for group in coalesce(ops):
            text, arguments = sql.change(group)
            await self._connection.execute(text, *arguments)

    async def position(self) -> int:
        position: int = await self._connection.fetchval("SELECT position FROM event_position")
        return position

    async def outbox(self) -> Outbox:
        return Outbox(*await self._connection.fetchrow("SELECT position, seen_ms FROM outbox"))

    async def note_publisher(self) -> None:
        await self._connection.execute("UPDATE outbox SET seen_ms = $1", await self.now_ms())

    def wake_group(self, group: str) -> None:
        self._groups.add(group)

    def notify_sealed(self, buffer_id: str) -> None:
        self._sealed.append(buffer_id)

    async def finish(self) -> None:
        """Numbers the appended events. Must be called once, right before the commit."""
        # Before the numbering: from there to the commit every other transaction with events waits.
        for channel, payloads in ((GROUPS_CHANNEL, sorted(self._groups)), (BUFFERS_CHANNEL, self._sealed)):
            for payload in payloads:
                await self._connection.execute("SELECT pg_notify($1, $2)", channel, payload)
        if not self._pending:
            position = await self.position() if self._with_position else 0
        else:
            position = await self._number(self._pending)
        await self.apply([op for ops in self._with_position for op in ops(position)])
        self._pending, self._with_position = [], []

    async def _number(self, pending: Sequence[tuple[Event, str]]) -> int:
        """Assigns positions to the events and returns the last. The row of `event_position` stays locked until the
        commit: positions are gapless and in commit order."""
        events = [event for event, _ in pending]
        # The notification travels with the update: a statement less while the row is locked.
        last: int = await self._connection.fetchval(
            "WITH moved AS (UPDATE event_position SET position = position + $1 RETURNING position) "
            "SELECT position FROM moved, LATERAL (SELECT pg_notify($2, moved.position::text)) told",
            len(events),
            EVENTS_CHANNEL,
        )
        await self._connection.execute(
            # max(version) needs no lock of its own: every transaction that appends to the stream waits for the position
            # first.
            f"""INSERT INTO events (position, stream_id, version, type, payload, trace_context, created_ms)
            SELECT $1 + u.nth,
                   u.stream_id,
                   u.nth_of_stream + coalesce((SELECT max(version) FROM events e WHERE e.stream_id = u.stream_id), 0),
                   u.type, u.payload, u.trace_context, {NOW_MS}
            FROM unnest($2::bigint[], $3::text[], $4::bigint[], $5::text[], $6::text[], $7::text[])
                u(nth, stream_id, nth_of_stream, type, payload, trace_context)""",
            last - len(events),
            list(range(1, len(events) + 1)),
            [event.stream_id for event in events],
            nth_of_stream(events),
            [type(event).__name__ for event in events],
            [event.to_json() for event in events],
            [trace_context for _, trace_context in pending],
        )
        for name, count in Counter(type(event).__name__ for event in events).items():
            _events.add(count, {"type": name})
        return last


class PostgresRebuilding(PostgresTransaction):
    """A transaction that fills empty tables with the rows that the projections should have: the projections themselves,
    or other tables with the same columns (`into`). No other transaction sees or changes these tables."""

    def __init__(self, connection: Any, into: Callable[[Table[Any]], Table[Any]] = lambda table: table) -> None:
        super().__init__(connection)
        self._into = into
        self.unknown_types: set[str] = set()  # of events that were skipped

    async def fill_from_bases(self) -> None:
        """Copies the rows of the bases into the tables."""
        for table in PROJECTIONS:
            columns = sql.names(table.columns)
            into, base = self._into(table).name, base_of(table).name
            await self._connection.execute(f"INSERT INTO {into} ({columns}) SELECT {columns} FROM {base}")

    async def replay(self) -> AsyncIterator[int]:
        """Applies every kept event; yields the number of applied events now and then."""
        after = count = 0
        while rows := await self.select(EVENTS, where(position=Above(after)), order=("position",), limit=REPLAY_BATCH):
            events = [replayed(row) for row in rows]
            self.unknown_types |= {row.type for row, event in zip(rows, events, strict=True) if event is None}
            ops = (op for event in events if event is not None for op in row_ops(event))
            await self.apply([elsewhere(op, self._into) for op in ops])
            after, count = rows[-1].position, count + len(rows)
            yield count


def nth_of_stream(events: Sequence[Event]) -> list[int]:
    """Returns, for each event, the number of events of the stream up to and including the event."""
    counts: dict[str, int] = {}
    numbers = []
    for event in events:
        counts[event.stream_id] = counts.get(event.stream_id, 0) + 1
        numbers.append(counts[event.stream_id])
    return numbers
