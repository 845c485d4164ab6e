"""Asks for the flights by SQL, and compares the answers with those computed from the records as they were sent."""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import Any

from check import Mismatch
from rich.table import Table
from streamhouse import Sql

DECLARED = """
CREATE TABLE flights (carrier VARCHAR, origin VARCHAR, dep_delay DOUBLE, time_hour TIMESTAMP,
    WATERMARK FOR time_hour AS time_hour - INTERVAL '5' MINUTE)
WITH (topic = 'flights', format = 'json')"""
BY_CARRIER = """
SELECT carrier, count(*) AS flights, round(avg(dep_delay), 1) AS delay_min
FROM flights GROUP BY carrier ORDER BY flights DESC, carrier LIMIT 5"""
BY_DAY = """
SELECT window_start, count(*) AS flights
FROM TUMBLE(TABLE flights, DESCRIPTOR(time_hour), INTERVAL '1' DAY)
GROUP BY window_start ORDER BY flights DESC, window_start"""
DAYS_SHOWN = 3


async def ask(address: str, values: Sequence[bytes]) -> Table:
    """Runs the statements; returns what they gave as a table for the terminal. Raises Mismatch, StreamHouseError."""
    async with Sql(address) as sql:
        await sql(DECLARED).to_arrow()
        carriers = await sql(BY_CARRIER).to_pylist()
        days = await sql(BY_DAY).to_pylist()
    flights = [json.loads(value) for value in values]
    _check("flights by carrier", {row["carrier"]: row["flights"] for row in carriers}, _by_carrier(flights))
    _check("flights by day", {row["window_start"].date(): row["flights"] for row in days}, _by_day(flights))
    shown = Table(title="asked by SQL, and compared", title_style="bold green", show_header=False)
    shown.add_column()
    shown.add_column(justify="right")
    for row in carriers:
        shown.add_row(
            f"carrier {row['carrier']}", f"{row['flights']:,} flights, {row['delay_min']} min late on average"
        )
    for row in days[:DAYS_SHOWN]:
        shown.add_row(f"{row['window_start']:%d %B}", f"{row['flights']:,} flights")
    return shown


def _by_carrier(flights: Sequence[dict[str, Any]]) -> dict[str, int]:
    counts = Counter(flight["carrier"] for flight in flights)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5])


def _by_day(flights: Sequence[dict[str, Any]]) -> dict[date, int]:
    return dict(Counter(date.fromisoformat(flight["time_hour"][:10]) for flight in flights))


def _check(what: str, answered: dict[Any, int], expected: dict[Any, int]) -> None:
    if answered != expected:
        different = next(key for key in expected.keys() | answered.keys() if expected.get(key) != answered.get(key))
        raise Mismatch(f"{what}: {different} has {answered.get(different)}, not {expected.get(different)}")
