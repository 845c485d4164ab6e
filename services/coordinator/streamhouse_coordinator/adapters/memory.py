"""Store of the metadata in plain dictionaries, for unit tests and simulations. Transactions run one at a time, and are
undone if they fail.

Owns: the rows of all tables, the counter of producer ids. Does not own: the rows that an event changes
(core/projection.py), the time.
Invariants: rows are replaced, never changed in place, so that a copy of the dictionaries is a snapshot. A transaction
that fails or is cancelled leaves the rows as they were before. Notifications are sent only after a transaction has
succeeded. Event positions have no gap.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any, TypeVar, cast

from shproto.events import Event
from shruntime.clock import Clock

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove, RowOp, Set, replayed, row_ops, stamped
from streamhouse_coordinator.ports import (
    DIFFERENCES_MAX,
    EVERYTHING,
    Above,
    AtMost,
    Difference,
    In,
    Lock,
    Outbox,
    ProjectionCheck,
    Totals,
    Transaction,
    Where,
)
from streamhouse_coordinator.recovery.histories import Head, pruned

ResultT = TypeVar("ResultT")
RowT = TypeVar("RowT")

Rows = dict[tuple[object, ...], Any]


def change(tables: dict[str, Rows], op: RowOp) -> None:
    """Applies the operation in the simplest way; the SQL of adapters/sql.py is compared with this."""
    rows = tables.setdefault(op.table.name, {})
    match op:
        case Put(table, row):
            rows[table.key_of(row)] = row
        case Set(_, key, changes):
            if key in rows:
                rows[key] = replace(rows[key], **changes)
        case Remove(_, where):
            for row in _meeting(rows, op.table, Where(equals=where)):
                del rows[op.table.key_of(row)]


def _meeting(rows: Rows, table: t.Table[Any], where: Where) -> list[Any]:
    """Returns the rows that meet all conditions."""
    found = _by_key(rows, table, where)
    for name, wanted in where.equals.items():
        match wanted:
            case In(values):
                found = [row for row in found if getattr(row, name) in values]
            case AtMost(limit):
                found = [row for row in found if (value := getattr(row, name)) is not None and value <= limit]
            case Above(limit):
                found = [row for row in found if (value := getattr(row, name)) is not None and value > limit]
            case _:
                found = [row for row in found if getattr(row, name) == wanted]
    if where.predicate is not None:
        found = [row for row in found if where.predicate.test(row)]
    if where.keys:
        key_rows = set(where.key_rows)
        found = [row for row in found if tuple(getattr(row, name) for name in where.keys) in key_rows]
    if where.after is not None:
        found = [row for row in found if table.key_of(row) > where.after]
    return found


def _by_key(rows: Rows, table: t.Table[Any], where: Where) -> list[Any]:
    """Returns the rows that may meet the conditions: those with the key if the conditions name a key, else all."""
    if where.keys == table.key:
        return [rows[key] for key in dict.fromkeys(where.key_rows) if key in rows]
    if all(name in where.equals for name in table.key):
        values = tuple(where.equals[name] for name in table.key)
        if not any(isinstance(value, In | AtMost | Above) for value in values):
            return [rows[values]] if values in rows else []
    return list(rows.values())


def _amount(value: int | bytes) -> int:
    """Returns the amount that a column's value adds to a sum."""
    return len(value) if isinstance(value, bytes) else value


class MemoryMetadataStore:
    """Implements ports.Store. `events_changed`, `group_changed` and `buffer_sealed` are called after commits, as by
    LISTEN."""

    def __init__(
        self,
        clock: Clock,
        events_changed: Callable[[], None] = lambda: None,
        group_changed: Callable[[str], None] = lambda group: None,
        buffer_sealed: Callable[[str], None] = lambda buffer_id: None,
    ) -> None:
        self.tables: dict[str, Rows] = {
            t.HISTORIES.name: {
                (1,): t.HistoryRow(nth=1, history_id="memory", from_position=0, producer_ids_from=0, created_ms=0)
            },
            t.PRUNED.name: {(True,): t.PrunedRow(only_row=True, position=0)},
        }
        self._clock = clock
        self._events_changed = events_changed
        self._group_changed = group_changed
        self._buffer_sealed = buffer_sealed
        self._alone = asyncio.Lock()
        self._producer_id = 0

    def for_clients(self) -> "MemoryMetadataStore":
        return self

    async def run(self, work: Callable[[Transaction], Awaitable[ResultT]], *, lock: str = "") -> ResultT:
        async with self._alone:
            # Rows are immutable, so copies of the dictionaries are enough to undo.
            before = {name: dict(rows) for name, rows in self.tables.items()}
            transaction = MemoryTransaction(self.tables, self._clock.wall_ms(), lock)
            try:
                result = await work(transaction)
                await transaction.finish()
            # Also after a cancellation: PostgreSQL would roll back, too.
            except BaseException:
                self.tables = before
                raise
        # Outside of the lock, after the commit: a receiver that looks at once must find the change.
        if transaction.appended:
            self._events_changed()
        for group in sorted(transaction.groups):
            self._group_changed(group)
        for buffer_id in transaction.sealed:
            self._buffer_sealed(buffer_id)
        return result

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Transaction]:
        async with self._alone:
            now = {name: dict(rows) for name, rows in self.tables.items()}
        # Outside of the lock: a reader may take long, and the copy does not change.
        yield MemoryTransaction(now, self._clock.wall_ms())

    async def renew_session(self, session_id: str, ttl_ms: int) -> int | None:
        rows = self.tables.get(t.SESSION_LEASES.name, {})
        lease = rows.get((session_id,))
        if lease is None:
            return None
        rows[(session_id,)] = replace(lease, expires_ms=self._clock.wall_ms() + ttl_ms)
        return cast(int, lease.grants_version)

    async def renew_member(self, group: str, member_id: str, generation: int, owned: str) -> int | None:
        rows = self.tables.get(t.GROUP_MEMBER_STATE.name, {})
        state = rows.get((group, member_id))
        member = self.tables.get(t.GROUP_MEMBERS.name, {}).get((group, member_id))
        current = self.tables.get(t.GROUPS.name, {}).get((group,))
        if state is None or member is None or current is None:
            return None
        if not state.complete or state.owned != owned or current.generation != generation:
            return None
        rows[(group, member_id)] = replace(state, expires_ms=self._clock.wall_ms() + member.session_timeout_ms)
        return cast(int, member.session_timeout_ms)

    async def next_producer_id(self) -> int:
        self._producer_id += 1
        return self._producer_id

    async def read_events(self, after_position: int, limit: int) -> list[t.EventRow]:
        log, last = self.tables.get(t.EVENTS.name, {}), position_in(self.tables)
        if after_position < (pruned_position := pruned_in(self.tables)):
            raise pruned(after_position, pruned_position)
        return [log[(position,)] for position in range(after_position + 1, min(after_position + limit, last) + 1)]

    async def head(self) -> Head:
        histories = self.tables[t.HISTORIES.name]
        missing = max((row.position for row in self.tables.get(t.FORKS.name, {}).values()), default=0)
        history_id = histories[(len(histories),)].history_id
        return Head(
            history_id=history_id,
            position=position_in(self.tables),
            missing_position=missing,
            pruned_position=pruned_in(self.tables),
        )

    async def rebuild(self) -> None:
        async with self._alone:
            self.tables |= rebuilt(self.tables)

    async def check_projections(self) -> AsyncIterator[ProjectionCheck]:
        async with self._alone:
            total = len(self.tables.get(t.EVENTS.name, {}))
            differences, count = [], 0
            for name, expected in rebuilt(self.tables).items():
                found = self.tables.get(name, {})
                count += len(found)
                for key in sorted({*found, *expected}, key=repr):
                    if found.get(key) != expected.get(key):
                        sides = (side.get(key) for side in (found, expected))
                        differences.append(Difference(name, *(_json(row) for row in sides)))
        yield ProjectionCheck(
            events_done=total,
            events_total=total,
            done=True,
            rows=count,
            differing_rows=len(differences),
            differences=tuple(differences[:DIFFERENCES_MAX]),
        )


def _json(row: Any) -> str:
    return json.dumps(asdict(row)) if row is not None else ""


def position_in(tables: dict[str, Rows]) -> int:
    """Returns the position of the last event; events are in order."""
    log = tables.get(t.EVENTS.name, {})
    return next(reversed(log.values())).position if log else pruned_in(tables)


def pruned_in(tables: dict[str, Rows]) -> int:
    return cast(int, tables[t.PRUNED.name][(True,)].position)


def rebuilt(tables: dict[str, Rows]) -> dict[str, Rows]:
    """Returns the projections that follow from the bases and every kept event."""
    fresh = {table.name: dict(tables.get(t.base_of(table).name, {})) for table in t.PROJECTIONS}
    for row in tables.get(t.EVENTS.name, {}).values():
        event = replayed(row)
        for op in row_ops(event) if event is not None else ():
            change(fresh, op)
    return fresh


class MemoryTransaction:
    """Implements ports.Transaction."""

    def __init__(self, tables: dict[str, Rows], now_ms: int, locked: str = "") -> None:
        self._tables = tables
        self.locked = locked
        self._now_ms = now_ms
        self._pending: list[tuple[Event, str]] = []
        self._with_position: list[Callable[[int], Sequence[RowOp]]] = []
        self.appended = False
        self.groups: set[str] = set()
        self.sealed: list[str] = []

    async def now_ms(self) -> int:
        return self._now_ms

    async def select(
        self,
        table: t.Table[RowT],
        where: Where = EVERYTHING,
        *,
        order: Sequence[str] = (),
        limit: int | None = None,
        lock: Lock = "",
    ) -> list[RowT]:
        rows = _meeting(self._tables.get(table.name, {}), table, where)
        if order:
            rows.sort(key=lambda row: tuple(getattr(row, name) for name in order))
        return rows[:limit]

    async def totals(
        self,
        table: t.Table[Any],
        where: Where,
        *,
        by: Sequence[str] = (),
        sums: Sequence[str] = (),
        maxima: Sequence[str] = (),
    ) -> list[Totals]:
        groups: dict[tuple[Any, ...], list[Any]] = {} if by else {(): []}
        for row in await self.select(table, where):
            groups.setdefault(tuple(getattr(row, name) for name in by), []).append(row)
        return [
            Totals(
                group=group,
                count=len(rows),
                sums=tuple(sum(_amount(getattr(row, name)) for row in rows) for name in sums),
                maxima=tuple(max(getattr(row, name) for row in rows) for name in maxima) if rows else (),
            )
            for group, rows in groups.items()
        ]

    async def append(self, events: Sequence[Event], trace_context: str = "") -> None:
        events = [stamped(event, self._now_ms) for event in events]
        for event in events:
            await self.apply(row_ops(event))
        self._pending += [(event, trace_context) for event in events]

    def with_position(self, ops: Callable[[int], Sequence[RowOp]]) -> None:
        self._with_position.append(ops)

    async def finish(self) -> None:
        """Numbers the appended events, as a commit does."""
        log = self._tables.setdefault(t.EVENTS.name, {})
        for event, trace_context in self._pending:
            before = (row.version for row in reversed(log.values()) if row.stream_id == event.stream_id)
            version = 1 + next(before, 0)
            payload, kind, position = event.to_json(), type(event).__name__, await self.position() + 1
            row = t.EventRow(
                position=position,
                stream_id=event.stream_id,
                version=version,
                type=kind,
                payload=payload,
                trace_context=trace_context,
                created_ms=self._now_ms,
            )
            log[(position,)] = row
        self.appended = bool(self._pending)
        position = await self.position()
        await self.apply([op for ops in self._with_position for op in ops(position)])

    async def apply(self, ops: Sequence[RowOp]) -> None:
        for op in ops:
            change(self._tables, op)

    async def position(self) -> int:
        return position_in(self._tables)

    async def outbox(self) -> Outbox:
        return Outbox(position=0, seen_ms=0)

    async def note_publisher(self) -> None:
        """Records nothing: events in memory have no publisher."""

    def wake_group(self, group: str) -> None:
        self.groups.add(group)

    def notify_sealed(self, buffer_id: str) -> None:
        self.sealed.append(buffer_id)
