"""Watches a window query while the flights come in once more, in the order of their departure, and compares its last
rows with the records as sent. The file has the months as 1, 10, 11, 12, 2, …: most flights would be late."""

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from check import Mismatch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from streamhouse import Admin, Producer, Sql

TOPIC = "departures"
PARTITIONS = 4
# Few enough in flight that a partition is never far behind the others: 8,000 flights are nine days. A window is open
# for two weeks more, so that no flight is late, however slow a machine is.
CHUNK_RECORDS = 1_000
CHUNKS_IN_FLIGHT = 8
DECLARED = """
CREATE TABLE departing (dep_delay DOUBLE, time_hour TIMESTAMP,
    WATERMARK FOR time_hour AS time_hour - INTERVAL '14' DAY)
WITH (topic = 'departures', format = 'json')"""
BY_WINDOW = """
SELECT window_start, count(*) AS flights, avg(dep_delay) AS delay_min
FROM TUMBLE(TABLE departing, DESCRIPTOR(time_hour), INTERVAL '30' DAY)
GROUP BY window_start, window_end EMIT CHANGES"""
WINDOW = timedelta(days=30)
DRAWS_PER_S = 10
STALL_TIMEOUT_S = 60.0

Rows = dict[datetime, tuple[int, float | None]]


async def watch(address: str, values: Sequence[bytes], keys: Sequence[bytes | None], console: Console) -> None:
    """Draws the result as it changes; where there is no terminal, only the last one. Raises Mismatch,
    StreamHouseError."""
    flights = [json.loads(value) for value in values]
    order = sorted(range(len(flights)), key=lambda at: flights[at]["time_hour"])
    values, keys = [values[at] for at in order], [keys[at] for at in order]
    rows: Rows = {}
    async with Admin(address) as admin, Sql(address) as sql:
        await admin.create_topic(TOPIC, partitions=PARTITIONS)
        await sql(DECLARED).to_arrow()
        with Live(console=console, auto_refresh=False) as live:
            sending = asyncio.create_task(_send(address, values, keys))
            try:
                await _follow(sql, rows, live, len(values))
                await sending
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
    _compare(rows, _expected(flights))


async def _send(address: str, values: Sequence[bytes], keys: Sequence[bytes | None]) -> None:
    room = asyncio.Semaphore(CHUNKS_IN_FLIGHT)

    async def acknowledged(result: Any) -> None:
        try:
            await result
        finally:
            room.release()

    async with Producer(address, acks="wal", compression="lz4") as producer, asyncio.TaskGroup() as tasks:
        for start in range(0, len(values), CHUNK_RECORDS):
            await room.acquire()
            stop = start + CHUNK_RECORDS
            tasks.create_task(acknowledged(await producer.send_many(TOPIC, values[start:stop], keys=keys[start:stop])))


async def _follow(sql: Sql, rows: Rows, live: Live, count: int) -> None:
    """Applies the changes of the query until it has counted all flights. Raises Mismatch if no more are counted."""
    loop = asyncio.get_running_loop()
    drawn_s = -math.inf
    changes = aiter(sql(BY_WINDOW))
    try:
        while (counted := sum(flights for flights, _ in rows.values())) < count:
            try:
                batch = await asyncio.wait_for(anext(changes), STALL_TIMEOUT_S)
            except TimeoutError as error:
                raise Mismatch(f"the window query counts {counted:,} flights, not {count:,}") from error
            for change in batch.to_pylist():
                if change["_op"] in ("+I", "+U"):
                    rows[change["window_start"]] = change["flights"], change["delay_min"]
                elif change["_op"] == "-D":
                    del rows[change["window_start"]]
            if loop.time() - drawn_s >= 1 / DRAWS_PER_S:
                live.update(_table(rows, count), refresh=live.console.is_terminal)
                drawn_s = loop.time()
    finally:
        live.update(_table(rows, count), refresh=live.console.is_terminal)
        await changes.aclose()


def _table(rows: Rows, count: int) -> Table:
    counted = sum(flights for flights, _ in rows.values())
    title = f"live: {counted:,} of {count:,} flights have come in"
    if counted == count:
        title = "live by a window query, and compared"
    table = Table(title=title, title_style="bold green")
    table.add_column("30 days from")
    table.add_column("flights", justify="right")
    table.add_column("late on average", justify="right")
    for start, (flights, delay_min) in sorted(rows.items()):
        table.add_row(f"{start:%d %B %Y}", f"{flights:,}", "" if delay_min is None else f"{delay_min:.1f} min")
    return table


def _expected(flights: Sequence[dict[str, Any]]) -> Rows:
    delays: dict[datetime, list[float | None]] = defaultdict(list)
    since = datetime(1970, 1, 1, tzinfo=UTC)
    for flight in flights:
        hour = datetime.fromisoformat(flight["time_hour"]).replace(tzinfo=UTC)
        delays[(since + (hour - since) // WINDOW * WINDOW).replace(tzinfo=None)].append(flight["dep_delay"])
    found: Rows = {}
    for start, all_delays in delays.items():
        known = [delay for delay in all_delays if delay is not None]
        found[start] = len(all_delays), sum(known) / len(known) if known else None
    return found


def _compare(rows: Rows, expected: Rows) -> None:
    for start in sorted(rows.keys() | expected.keys()):
        flights, delay_min = rows.get(start, (0, None))
        expected_flights, expected_min = expected.get(start, (0, None))
        same = delay_min == expected_min or math.isclose(delay_min or 0.0, expected_min or 0.0)
        if flights != expected_flights or not same:
            raise Mismatch(
                f"the 30 days from {start:%d %B %Y}: the window query says {flights:,} flights, {delay_min} min late, "
                f"not {expected_flights:,} and {expected_min}"
            )
