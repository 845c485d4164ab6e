"""PostgreSQL is away for longer than a lease lasts: a real coordinator and an agent in this process.

Quotes G7 (pressure is visible, never fatal) and what docs/guarantees.md says of an absent PostgreSQL: acks=wal is given
within the reserved range, acks=durable waits; nothing changes hands for it.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from shformat import Records, encode_batch
from shproto.errors import DurableTimeout, NotLeader, StreamHouseError
from shproto.v1 import coordinator_pb2, ingest_pb2, types_pb2
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import build as build_coordinator
from streamhouse_ingest.settings import IngestSettings
from streamhouse_ingest.wiring import IngestService
from streamhouse_ingest.wiring import build as build_ingest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

TTL_MS = 2_000
PATIENCE_S = 60


async def produce(service: IngestService, acks: int) -> ingest_pb2.ProduceResponse:
    batch = encode_batch(Records.from_lists([b"value"], timestamps_ms=0))
    request = ingest_pb2.ProduceRequest(
        topic="orders",
        partition=0,
        batch=batch,
        acks=acks,  # type: ignore[arg-type]
        timeout_ms=500,
    )
    return await service.api.produce(request)


async def produce_when_led(service: IngestService) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert (await produce(service, types_pb2.ACKS_WAL)).base_offset == 0
                return
            except NotLeader:
                await asyncio.sleep(0.05)


async def test_g7_wal_writes_go_on_while_postgresql_is_away_for_longer_than_a_lease(
    storage: dict[str, str], postgres: Any, tmp_path: Path
) -> None:
    settings = CoordinatorSettings.load(
        {},
        pg_dsn=storage["STREAMHOUSE_PG_DSN"],
        session_ttl_ms=TTL_MS,
        heartbeat_interval_ms=200,
        session_sweep_interval_ms=100,
        pg_timeout_ms=500,
        pg_transaction_idle_ms=500,
    )
    coordinator = build_coordinator(settings)
    await coordinator.start()
    agent = build_ingest(
        IngestSettings.load({}, wal_dir=str(tmp_path), lease_margin_ms=500, retry_max_ms=100, shutdown_timeout_ms=50),
        coordinator.api,
    )
    try:
        await coordinator.api.create_topic(coordinator_pb2.CreateTopicRequest(topic="orders", partitions=1))
        await agent.start("127.0.0.1:1")
        await produce_when_led(agent)
        await asyncio.to_thread(postgres.stop)
        loop, offset = asyncio.get_running_loop(), 1
        gone_at = loop.time()
        while loop.time() < gone_at + 3 * TTL_MS / 1000:
            assert (await produce(agent, types_pb2.ACKS_WAL)).base_offset == offset
            offset += 1
            await asyncio.sleep(0.1)
        with pytest.raises(DurableTimeout):
            await produce(agent, types_pb2.ACKS_DURABLE)
        await asyncio.to_thread(postgres.start)
        described = await _describe(coordinator.api)
        assert [(item.epoch, item.status) for item in described.partitions[0].ranges] == [(1, "open")]
        answer = await produce(agent, types_pb2.ACKS_WAL)
        assert (answer.base_offset, answer.epoch) == (offset + 1, 1)
    finally:
        await agent.stop()
        await coordinator.stop()


async def _describe(api: Any) -> Any:
    """As soon as the coordinator answers again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await api.describe_topic(coordinator_pb2.DescribeTopicRequest(topic="orders"))
            except StreamHouseError:
                await asyncio.sleep(0.1)
