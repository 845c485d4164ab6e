"""Compares the projections with the events inside PostgreSQL, so that neither has to fit into memory here.

Terms: the projections are built again in temporary tables (`rebuilt_<name>`) that end with the transaction. The
snapshot of the transaction shows bases, events and projections as of a single moment, despite commits meanwhile.
"""

from collections.abc import AsyncIterator
from typing import Any

from shproto.errors import Unavailable

from streamhouse_coordinator.adapters import sql
from streamhouse_coordinator.adapters.postgres_transaction import PostgresRebuilding
from streamhouse_coordinator.core.tables import EVENTS, PROJECTIONS, Table, rebuilt_of
from streamhouse_coordinator.ports import DIFFERENCES_MAX, Difference, ProjectionCheck


async def check(connection: Any) -> AsyncIterator[ProjectionCheck]:
    """Yields the progress and then the result. Runs inside a transaction that the caller has begun (REPEATABLE READ)
    and rolls back; see ports.Store."""
    total, missing = await _kept_events(connection)
    for table in PROJECTIONS:
        text = f"CREATE TEMPORARY TABLE {rebuilt_of(table).name} (LIKE {table.name} INCLUDING ALL) ON COMMIT DROP"
        await connection.execute(text)
    rebuilding = PostgresRebuilding(connection, into=rebuilt_of)
    await rebuilding.fill_from_bases()
    yield ProjectionCheck(events_done=0, events_total=total)
    async for count in rebuilding.replay():
        yield ProjectionCheck(events_done=count, events_total=total)
    if rebuilding.unknown_types:
        names = ", ".join(sorted(rebuilding.unknown_types))
        raise Unavailable(f"there are events of types that this coordinator does not know: {names}; ask one that does")
    rows, differing, shown = 0, len(missing), missing
    for table in PROJECTIONS:
        rows += await connection.fetchval(f"SELECT count(*) FROM {table.name}")
        count, differences = await _differences(connection, table)
        differing += count
        shown += differences
    yield ProjectionCheck(
        events_done=total, events_total=total, done=True, rows=rows, differing_rows=differing, differences=tuple(shown)
    )


async def _kept_events(connection: Any) -> tuple[int, list[Difference]]:
    """Returns the expected number of events, and a difference if the table has another number."""
    first, last, count, least, most = await connection.fetchrow(
        "SELECT pruned_position.position + 1, event_position.position, counted.* FROM pruned_position, event_position, "
        "(SELECT count(*), min(position), max(position) FROM events) counted"
    )
    total = last - first + 1
    if count == total and (total == 0 or (least, most) == (first, last)):
        return count, []
    found = f'{{"events": {count}, "first": {least or 0}, "last": {most or 0}}}'
    return count, [Difference(EVENTS.name, found, f'{{"events": {total}, "first": {first}, "last": {last}}}')]


async def _differences(connection: Any, table: Table[Any]) -> tuple[int, list[Difference]]:
    """Returns the number of differing rows, and the first of them."""
    found, expected = (", ".join(f'{side}."{name}"' for name in table.columns) for side in ("found", "expected"))
    keys = sql.names(table.key)
    rows = await connection.fetch(
        # FULL JOIN also finds rows that only one of the tables has; IS DISTINCT FROM compares nulls.
        f"""SELECT to_jsonb(found)::text, to_jsonb(expected)::text, count(*) OVER ()
        FROM {table.name} found FULL JOIN {rebuilt_of(table).name} expected USING ({keys})
        WHERE ({found}) IS DISTINCT FROM ({expected}) ORDER BY {keys} LIMIT {DIFFERENCES_MAX}"""
    )
    count = rows[0][2] if rows else 0
    return count, [Difference(table.name, is_there or "", is_due or "") for is_there, is_due, _ in rows]
