"""Jobs with state: a worker dies at each point of its work, and the changes still add up to one batch query.

Quotes docs/sql-guarantees.md: the output topic holds exactly the rows that running the journalled micro-batches once,
in order, gives. A row that was written twice, or left out, breaks the chain of changes of its key.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from services.sql.tests.crash_points import AFTER, BEFORE, CrashPoint
from services.sql.tests.job_world import JobWorld, job_world

RECORDS = 400
KEYS = 7
TABLE = (
    "CREATE TABLE events (n BIGINT, k VARCHAR, ts TIMESTAMPTZ, WATERMARK FOR ts AS ts - INTERVAL '1' SECOND) "
    "WITH (topic = 'source')"
)
GROUPS = "INSERT INTO out SELECT k, count(*) AS n, sum(n) AS s FROM events GROUP BY k"
WINDOWS = (
    "INSERT INTO out SELECT window_start, count(*) AS n "
    "FROM TUMBLE(TABLE events, DESCRIPTOR(ts), INTERVAL '10' SECOND) GROUP BY window_start EMIT ON WINDOW CLOSE"
)
POINTS = [
    ("pipeline.step", AFTER, 4),
    ("writer.write", AFTER, 2),
    ("store.put", AFTER, 2),
    ("coordinator.store_sql_checkpoint", AFTER, 2),
    ("coordinator.store_sql_checkpoint", BEFORE, 3),
    ("coordinator.append_sql_journal", AFTER, 5),
    ("pipeline.state", AFTER, 1),
    ("store.delete", BEFORE, 1),
]
QUICK = ("coordinator.store_sql_checkpoint", BEFORE, 3)


def event(n: int) -> dict[str, Any]:
    return {"n": n, "k": f"k{n % KEYS}", "ts": f"2026-01-01 {n // 3600:02d}:{n // 60 % 60:02d}:{n % 60:02d}+00"}


async def begin(world: JobWorld, statement: str) -> None:
    await world.cluster.create_topic("source", 2)
    await world.cluster.create_topic("out", 2)
    await world.create(statement, "out", definitions=[TABLE])
    await produce(world, 0, RECORDS)


async def produce(world: JobWorld, first: int, stop: int) -> None:
    await world.produce("source", [event(n) for n in range(first, stop)], [f"p{n % 19}" for n in range(first, stop)])


async def die_at(world: JobWorld, *where: Any) -> None:
    point = CrashPoint(*where)
    # No partition is idle: the watermark depends on the records alone.
    worker = await world.start_worker(point=point, sql_idle_after_ms=600_000)
    await world.until(point.reached.is_set)
    await worker.kill()
    world.workers.remove(worker)


def points() -> list[Any]:
    return [
        pytest.param(*where, marks=() if where == QUICK else pytest.mark.long, id="-".join(map(str, where)))
        for where in POINTS
    ]


def folded(partitions: list[list[dict[str, Any]]]) -> dict[str, tuple[int, int]]:
    """Returns the last row per key. Each change has to follow the one before it."""
    found: dict[str, tuple[int, int]] = {}
    for rows in partitions:
        for row in rows:
            key, value = row["value"]["k"], (row["value"]["n"], row["value"]["s"])
            match row["op"]:
                case b"+I":
                    assert key not in found, f"{key} is inserted twice"
                    found[key] = value
                case b"-U":
                    assert found.pop(key) == value, f"{key} is taken back as it never was"
                case b"+U":
                    assert key not in found, f"{key} is updated without its row before"
                    found[key] = value
                case other:
                    raise AssertionError(f"{other!r} of {key}: nothing is deleted")
    return found


def of_batch(count: int) -> dict[str, tuple[int, int]]:
    """Returns what one query over all records gives."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for n in range(count):
        sums[f"k{n % KEYS}"][0] += 1
        sums[f"k{n % KEYS}"][1] += n
    return {key: (count, total) for key, (count, total) in sums.items()}


@pytest.mark.parametrize(("operation", "when", "nth"), points())
async def test_a_changelog_adds_up_to_a_batch_query(tmp_path: Path, operation: str, when: str, nth: int) -> None:
    async with job_world(tmp_path) as world:
        await begin(world, GROUPS)
        await die_at(world, operation, when, nth)
        await die_at(world, "pipeline.step", AFTER, 1)
        await world.start_worker(sql_idle_after_ms=600_000)
        await produce(world, RECORDS, RECORDS + 50)

        async def is_complete() -> bool:
            job = await world.job()
            assert job.state == "running", job.reason
            return folded(await world.records("out")) == of_batch(RECORDS + 50)

        await world.until(is_complete)
        keys = {row["value"]["k"]: row["key"] for rows in await world.records("out") for row in rows}
        assert keys["k1"] == b'{"k":"k1"}'


@pytest.mark.parametrize(("operation", "when", "nth"), points())
async def test_each_window_is_written_once(tmp_path: Path, operation: str, when: str, nth: int) -> None:
    async with job_world(tmp_path) as world:
        await begin(world, WINDOWS)
        await die_at(world, "coordinator.append_sql_journal", AFTER, 2)
        await die_at(world, operation, when, 1)
        await world.start_worker(sql_idle_after_ms=600_000)
        # Far ahead in both partitions, so that all windows before are over.
        await produce(world, RECORDS + 600, RECORDS + 610)

        async def is_complete() -> bool:
            job = await world.job()
            assert job.state == "running", job.reason
            return len(await world.values("out")) >= RECORDS // 10

        await world.until(is_complete)
        values = await world.values("out")
        assert len({row["window_start"] for row in values}) == len(values) == RECORDS // 10
        assert {row["n"] for row in values} == {10}
