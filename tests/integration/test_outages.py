"""What the ack levels are promised to survive of their surroundings: PostgreSQL away, the object store away.

Quotes the table of docs/guarantees.md: `wal` is taken meanwhile and kept; `durable` waits, then a retriable error, and
what is waited for is written once; everything drains when the outside returns (G1, G5, G7).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shproto.errors import StreamHouseError
from streamhouse import Admin, Consumer, Producer

from tests.integration.cluster import Cluster
from tests.integration.servers import Server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

TOPIC, BEFORE, MEANWHILE = "outage", 50, 200
HASTY_MS = 3_000
DEADLINE_S = 120.0
SETTINGS = {
    "STREAMHOUSE_SEAL_AGE_MS": "300",
    "STREAMHOUSE_S3_ATTEMPTS_DEADLINE_MS": "2000",
    "STREAMHOUSE_PG_TIMEOUT_MS": "2000",
}


@contextlib.asynccontextmanager
async def running(storage: dict[str, str], tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(
        {**storage, **SETTINGS}, tmp_path, dict.fromkeys(("coordinator", "ingest", "query", "segmenter"), 1)
    )
    try:
        await cluster.start()
        yield cluster
    finally:
        cluster.kill_all()


async def read_all(bootstrap: str) -> list[bytes | None]:
    async with Consumer(bootstrap, [TOPIC], stop_at_end=True) as consumer, asyncio.timeout(DEADLINE_S):
        return [record.value async for record in consumer]


@pytest.mark.parametrize("away", ["postgres", "s3"])
async def test_wal_writes_go_on_durable_ones_wait_and_everything_drains(
    away: str, storage: dict[str, str], postgres: Server, s3: Server, tmp_path: Path
) -> None:
    server = {"postgres": postgres, "s3": s3}[away]
    async with running(storage, tmp_path) as cluster:
        async with Admin(cluster.bootstrap) as admin:
            await admin.create_topic(TOPIC, 1)
        async with (
            Producer(cluster.bootstrap, linger_ms=0) as wal,
            Producer(cluster.bootstrap, acks="durable", linger_ms=0, delivery_timeout_ms=240_000) as patient,
            Producer(cluster.bootstrap, acks="durable", delivery_timeout_ms=HASTY_MS) as hasty,
        ):
            await (await wal.send_many(TOPIC, [b"before %d" % n for n in range(BEFORE)]))
            for producer in (patient, hasty):
                await (await producer.send(TOPIC, b"before"))
            await asyncio.to_thread(server.stop)
            try:
                waiting = await patient.send(TOPIC, b"waits")
                for n in range(MEANWHILE):
                    await asyncio.wait_for(await wal.send(TOPIC, b"meanwhile %d" % n), DEADLINE_S)
                with pytest.raises(StreamHouseError) as refused:
                    await (await hasty.send(TOPIC, b"gave up"))
                assert refused.value.retriable
                assert not waiting.done(), "a durable write was acknowledged while it could not be registered"
            finally:
                await asyncio.to_thread(server.start)
            await asyncio.wait_for(waiting, DEADLINE_S)
        found = await read_all(cluster.bootstrap)
    expected = [b"before %d" % n for n in range(BEFORE)] + [b"meanwhile %d" % n for n in range(MEANWHILE)]
    assert sorted(value for value in found if value in set(expected)) == sorted(expected)
    assert [found.count(value) for value in (b"before", b"waits")] == [2, 1]
    assert found.count(b"gave up") <= 1
