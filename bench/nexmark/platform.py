"""Queries of Nexmark as jobs of `streamhouse serve`: JSON from its log, results back into it, exactly once."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from streamhouse import Admin, Producer, Sql
from streamhouse_cli.serve_process import ServeProcess
from streamhouse_cli.status import collect_status

from bench.common import Wrong, tree_cpu_s
from bench.nexmark.generator import EPOCH, KINDS, SHARES, START_MS, Nexmark, json_values, side_input
from bench.nexmark.queries import TOPICS, declarations, statement

POLL_S = 0.5
# Records of a send: some hundred KB.
SEND_RECORDS = 2_000
# A job that makes no progress for so long has failed.
PATIENCE_S = 300.0


@contextmanager
def platform(folder: Path) -> Iterator[ServeProcess]:
    """A platform on an empty directory below `folder`."""
    with ServeProcess(folder / "data", folder / "serve.log", {"STREAMHOUSE_LOG_LEVEL": "WARNING"}) as process:
        yield process


async def declare(address: str) -> None:
    """Makes the topics and declares the tables."""
    async with Admin(address) as admin:
        for topic in TOPICS:
            await admin.create_topic(topic, partitions=1)
    async with Sql(address) as sql:
        for declaration in declarations():
            await sql(declaration).to_arrow()


async def fill(address: str, nexmark: Nexmark, first: int, end: int) -> None:
    """Sends events `first` to `end`, multiples of EPOCH, and with the first also the side input. Waits until all of
    them are in segments."""
    async with Producer(address) as producer:
        for topic, rows in _rows(nexmark, first, end):
            values = json_values(rows)
            times = rows["dateTime"].combine_chunks() if "dateTime" in rows.column_names else None
            for at in range(0, rows.num_rows, SEND_RECORDS):
                stamps = START_MS if times is None else times.slice(at, SEND_RECORDS)
                await producer.send_columns(topic, values.slice(at, SEND_RECORDS), timestamps_ms=stamps)
        await producer.flush()
    while not all(
        partition["registered_end"] == partition["end_offset"]
        for partition in (await collect_status(address))["partitions"]
    ):
        await asyncio.sleep(POLL_S)


def _rows(nexmark: Nexmark, first: int, end: int) -> Iterator[tuple[str, pa.Table]]:
    if first == 0:
        yield "side_input", side_input()
    for kind in KINDS:
        skipped = first // EPOCH * SHARES[kind]
        for rows in nexmark.blocks(kind, end):
            yield kind, rows.slice(skipped)
            skipped = max(0, skipped - rows.num_rows)


async def run_query(process: ServeProcess, name: str) -> dict[str, float]:
    """Runs a query as a job until it has read all events, and drops it. Returns the CPU seconds of the platform,
    all of its processes, and the seconds, planning included, as `cpu_s` and `seconds`. Raises Wrong if it fails."""
    target = re.search(r"INSERT INTO (\w+)", statement(name))
    assert target is not None
    topic = target[1]
    async with Admin(process.address) as admin, Sql(process.address) as sql:
        if topic not in {found.topic for found in await admin.list_topics()}:
            await admin.create_topic(topic, partitions=1)
        cpu_s, began_s = tree_cpu_s(process.pid), time.monotonic()
        await sql(statement(name)).to_arrow()
        job = await _caught_up(sql, topic)
        figures = {"cpu_s": tree_cpu_s(process.pid) - cpu_s, "seconds": time.monotonic() - began_s}
        await sql(f"DROP JOB {job}").to_arrow()
    return figures


async def _caught_up(sql: Sql, topic: str) -> str:
    """Returns the name of the job that writes a topic, once it has read its inputs."""
    moved_s, seen = time.monotonic(), None
    while True:
        (job,) = [row for row in await sql("SHOW JOBS").to_pylist() if row["topic"] == topic]
        if job["state"] not in ("running", "created"):
            raise Wrong(f"{job['name']} is {job['state']}: {job['reason']}")
        place = (job["micro_batches"], job["lag_records"])
        if place != seen:
            moved_s, seen = time.monotonic(), place
        elif job["micro_batches"] and job["lag_records"] == 0:
            return str(job["name"])
        if time.monotonic() - moved_s > PATIENCE_S:
            raise Wrong(f"{job['name']} makes no progress: {job}")
        await asyncio.sleep(POLL_S)
