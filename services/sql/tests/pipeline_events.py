"""Events for pipelines: keys, numbers, and times that come late now and then."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from services.sql.tests.pipeline_world import EPOCH_MS, Cut, Log, declared

START = datetime(2026, 1, 1)
TABLES = declared(
    "CREATE TABLE events (k VARCHAR, n BIGINT, x DOUBLE, d DECIMAL(12, 2), s VARCHAR, ok BOOLEAN, ts TIMESTAMP, "
    "WATERMARK FOR ts AS ts - INTERVAL '2' SECOND) WITH (topic = 'events')",
    "CREATE TABLE zoned (k VARCHAR, n BIGINT, at TIMESTAMPTZ METADATA FROM 'timestamp', "
    "WATERMARK FOR at AS at - INTERVAL '2' SECOND) WITH (topic = 'events')",
    "CREATE TABLE prices (k VARCHAR, price BIGINT, ts TIMESTAMP, "
    "WATERMARK FOR ts AS ts - INTERVAL '2' SECOND) WITH (topic = 'prices')",
    "CREATE TABLE plain (k VARCHAR, n BIGINT) WITH (topic = 'events')",
)


def event(rng: random.Random, at: datetime, keys: int) -> dict[str, Any]:
    """Returns the value of an event. Numbers have few bits, so that sums are exact in any order."""
    return {
        "k": rng.choice([None, *(f"key{number}" for number in range(keys))]),
        "n": rng.choice([None, *range(-3, 12)]),
        "x": rng.choice([None, rng.randrange(-80, 80) / 4]),
        "d": rng.choice([None, f"{rng.randrange(-500, 500) / 100:.2f}"]),
        "s": rng.choice([None, "", "a", "b", "ä'\""]),
        "ok": rng.choice([None, True, False]),
        "ts": rng.choice([at.isoformat(sep=" ")] * 20 + [None]),
    }


def events(
    seed: int,
    count: int = 150,
    *,
    keys: int = 4,
    late: float = 0.15,
    span_s: int = 60,
    partitions: Mapping[str, int] = {"events": 3, "prices": 2},
) -> Log:
    """Returns random events, about in the order of their times; some come much later than they should."""
    rng = random.Random(seed)
    log = Log(partitions)
    for at in range(count):
        time_ms = int(span_s * 1000 * at / count) + rng.randrange(-1500, 1500)
        if rng.random() < late:
            time_ms -= rng.randrange(20_000)
        time_ms = round(time_ms, -2)  # ties
        topic = rng.choice(["events"] * 4 + ["prices"]) if "prices" in partitions else "events"
        when = START + timedelta(milliseconds=time_ms)
        value = event(rng, when, keys)
        if topic == "prices":
            value = {"k": value["k"], "price": rng.randrange(10), "ts": value["ts"]}
        log.add(topic, rng.randrange(partitions[topic]), value, EPOCH_MS + time_ms)
    return log


def ended(log: Log, cuts: list[Cut], *, after_s: int = 86_400) -> list[Cut]:
    """Returns micro-batches behind which all windows of the events have ended: a record of each partition of a later
    time comes last. Adds these records to the log."""
    ranges = {}
    for topic, count in log.partitions.items():
        for number in range(count):
            when = START + timedelta(seconds=after_s)
            first = log.end(topic, number)
            log.add(topic, number, {"k": "end", "ts": when.isoformat(sep=" ")}, EPOCH_MS + after_s * 1000)
            ranges[topic, number] = (first, first + 1)
    return [*cuts, Cut(ranges, (), cuts[-1].now_us + 1_000_000 if cuts else 0)]


def us(value: datetime) -> int:
    """Returns a timestamp in microseconds."""
    return int(
        (value.replace(tzinfo=value.tzinfo or UTC) - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1)
    )


def has_ended(row: Mapping[str, Any], watermark_us: int) -> bool:
    """True for a row of a window that has ended."""
    return us(row["window_end"]) <= watermark_us


def session_has_ended(row: Mapping[str, Any], watermark_us: int) -> bool:
    """True for a row of a session that has ended: a row at exactly its end would still be in it."""
    return us(row["window_end"]) < watermark_us
