"""Jobs through `kill -9` of the processes that run them, in a loop: the output equals a batch query over the input.

Quotes docs/sql-guarantees.md: the output topic holds exactly the rows that running the journalled micro-batches once,
in order, gives, whatever dies when.
"""

import asyncio
import json
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from streamhouse import Admin, Producer, Sql
from streamhouse.errors import StreamHouseError

from tests.integration.processes import EmbeddedProcess, ServiceProcess, free_ports

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SEED = int(os.environ.get("STREAMHOUSE_TEST_SEED", random.SystemRandom().randrange(2**32)))
KEYS = 50
BATCH = 500
DECLARE = "CREATE TABLE events (n BIGINT, k VARCHAR) WITH (topic = 'source')"
QUERY = "SELECT k, count(*) AS c, sum(n)::BIGINT AS s FROM events GROUP BY k"
STATEMENTS = (
    DECLARE,
    f"CREATE MATERIALIZED VIEW totals AS {QUERY}",
    "CREATE SINK copies INTO copy AS SELECT n FROM events",
)
FAST = {
    "STREAMHOUSE_SQL_CHECKPOINT_INTERVAL_MS": "500",
    "STREAMHOUSE_SQL_GATHER_ROWS_MAX": "300",
    "STREAMHOUSE_SESSION_TTL_MS": "8000",
    "STREAMHOUSE_PG_TIMEOUT_MS": "2000",
    "STREAMHOUSE_HEARTBEAT_INTERVAL_MS": "1000",
}


class Writer:
    """Writes numbered records as long as the platform answers. Records of a batch that got no answer may be there."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.number = 0

    async def run(self) -> None:
        while True:
            try:
                async with Producer(self._address, acks="durable", delivery_timeout_ms=5_000) as producer:
                    while True:
                        numbers = range(self.number, self.number + BATCH)
                        self.number += BATCH
                        values = [json.dumps({"n": n, "k": f"k{n % KEYS}"}).encode() for n in numbers]
                        keys = [b"k%d" % (n % KEYS) for n in numbers]
                        await (await producer.send_many("source", values, keys=keys))
                        await asyncio.sleep(0.05)
            except StreamHouseError:
                await asyncio.sleep(0.2)


async def eventually(check: Callable[[], Awaitable[bool]], timeout_s: float = 120) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                if await check():
                    return
            except StreamHouseError:
                pass  # a process that was killed is not back yet
            await asyncio.sleep(0.2)


async def rows(address: str, text: str) -> list[dict[str, Any]]:
    async with Sql(address) as sql:
        found: list[dict[str, Any]] = await sql(text).to_pylist()
        return found


async def through_kills(tmp_path: Path, rounds: int) -> None:
    rng = random.Random(SEED)
    print(f"STREAMHOUSE_TEST_SEED={SEED}")
    data = tmp_path / "data"
    server = EmbeddedProcess(data, tmp_path, FAST)
    await server.start_serving()
    worker_address = f"127.0.0.1:{free_ports(1)[0]}"
    worker = ServiceProcess(
        "sql-worker",
        ["sql-worker"],
        {
            **FAST,
            "STREAMHOUSE_BOOTSTRAP": server.address,
            "STREAMHOUSE_LISTEN": worker_address,
            "STREAMHOUSE_STORE_DIR": str(data / "objects"),
            "STREAMHOUSE_CACHE_DIR": str(tmp_path / "cache"),
            "STREAMHOUSE_SQL_TEMP_DIR": str(tmp_path / "spill"),
            "STREAMHOUSE_SQL_PG_LISTEN": "",
            "STREAMHOUSE_PROMETHEUS_LISTEN": "",
        },
        tmp_path,
    )
    worker.start()
    writing: asyncio.Task[None] | None = None
    try:
        async with Admin(server.address) as admin:
            await admin.create_topic("source", partitions=3)
            await admin.create_topic("copy", partitions=2, min_acks="durable")
        for statement in STATEMENTS:
            await rows(server.address, statement)
        writer = Writer(server.address)
        writing = asyncio.create_task(writer.run())
        for number in range(rounds):
            await asyncio.sleep(rng.uniform(1.0, 4.0))
            if rng.random() < 0.5 or number == 0:
                worker.kill()
                worker.start()
            else:
                server.kill()
                await server.start_serving()
        goal = writer.number + 10 * BATCH

        async def has_gone_on() -> bool:
            return writer.number >= goal

        await eventually(has_gone_on)
        writing.cancel()
        await asyncio.wait([writing])
        jobs = []

        async def is_equal() -> bool:
            jobs[:] = await rows(server.address, "SHOW JOBS")
            assert {job["state"] for job in jobs} == {"running"}, jobs
            written = await rows(server.address, "SELECT n FROM events ORDER BY n")
            copied = "SELECT (_value ->> '$.n')::BIGINT AS n FROM copy ORDER BY n"
            found = await rows(server.address, copied)
            assert len(found) <= len(written), "a record is there twice"
            totals = await rows(server.address, "SELECT k, c, s::BIGINT AS s FROM totals ORDER BY k")
            return found == written and totals == await rows(server.address, f"{QUERY} ORDER BY k")

        await eventually(is_equal)
        assert all(job["epoch"] > 1 for job in jobs), "each was taken over"
    finally:
        if writing is not None:
            writing.cancel()
        await worker.stop()
        await server.stop()


async def test_the_output_equals_a_batch_query_through_kills(tmp_path: Path) -> None:
    await through_kills(tmp_path, 8)
