"""pgbouncer with pool_mode=transaction between coordinators and PostgreSQL: each transaction may run on another
connection, of which there are few."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from shproto.errors import Unavailable
from shproto.v1 import coordinator_pb2 as pb
from shstore import MemoryStore
from streamhouse_coordinator.adapters.postgres_connections import Listening
from streamhouse_coordinator.adapters.postgres_transaction import PostgresTransaction
from streamhouse_coordinator.ports import Transaction
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService, build, take_backup

from services.coordinator.tests.conftest import Agent
from tests.integration import servers

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

PATIENCE_S = 60
SERVER_CONNECTIONS = 2


@pytest.fixture
def pooled(storage: dict[str, str]) -> Iterator[str]:
    with servers.pgbouncer(storage["STREAMHOUSE_PG_DSN"], pool_size=SERVER_CONNECTIONS) as dsn:
        yield dsn


@asynccontextmanager
async def coordinators(count: int, dsn: str, **changes: Any) -> AsyncIterator[list[CoordinatorService]]:
    values = {"session_ttl_ms": 600_000, "events_poll_interval_ms": 100, "pg_dsn": dsn}
    services = [build(CoordinatorSettings.load({}, **values | changes)) for _ in range(count)]
    try:
        await asyncio.gather(*(service.start() for service in services))
        yield services
        assert not [service for service in services if service._tasks.failed.is_set()], "a background loop ended"
    finally:
        for service in services:
            await service.stop()


async def use(services: list[CoordinatorService], rounds: int) -> None:
    """Many transactions at once, by every coordinator."""
    await services[0].api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=4))
    agents = [await Agent(service.api, f"agent-{nth}", "127.0.0.1:1").open() for nth, service in enumerate(services)]
    for agent in agents:  # so that the partitions are shared
        await agent.settle(*((g, 0) for g in await agent.grants() if g.status == "moving"))

    async def write(agent: Agent) -> None:
        for grant in (await agent.leads()).values():
            for offset in range(rounds):
                assert await agent.write(grant, offset, offset + 1) == pb.REGISTRATION_RESULT_REGISTERED
                await agent.heartbeat()

    async def read(service: CoordinatorService) -> None:
        for _ in range(rounds):
            await service.api.get_status(pb.GetStatusRequest())
            await service.api.describe_topic(pb.DescribeTopicRequest(topic="orders"))
            assert [part async for part in service.api.get_snapshot(pb.GetSnapshotRequest())]
            await service.api.init_producer(pb.InitProducerRequest())

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*map(write, agents), *map(read, services))


async def followed(service: CoordinatorService, until: int) -> list[int]:
    positions = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in service.api.follow_events(pb.FollowEventsRequest(after_position=0)):
            positions.append(event.position)
            if event.position == until:
                break
    return positions


@pytest.mark.parametrize("setting", ["auto", "transaction"])
async def test_everything_works_through_a_pooler(pooled: str, setting: str) -> None:
    async with coordinators(2, pooled, pg_pooler=setting) as services:
        await use(services, rounds=10)
        head = (await services[0].api.get_head(pb.GetHeadRequest())).events_position
        assert await followed(services[1], head) == list(range(1, head + 1))

        async def show(tx: Transaction) -> str:
            assert isinstance(tx, PostgresTransaction)
            value: str = await tx._connection.fetchval("SELECT current_setting('statement_timeout')")
            return value

        assert await services[0].context.store.run(show) == "4s", "the limits are those of each transaction"
    manifest = await take_backup(pooled, MemoryStore())
    assert manifest.position >= head


async def test_events_are_heard_of_at_once_past_the_pooler(
    pooled: str, storage: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """With a minute between polls, an event that arrives at all was announced by PostgreSQL."""
    direct = storage["STREAMHOUSE_PG_DSN"]
    async with coordinators(1, pooled, events_poll_interval_ms=60_000, pg_listen_dsn=direct) as (service,):
        stream = service.api.follow_events(pb.FollowEventsRequest(after_position=0))
        for number in range(3):
            coming = asyncio.create_task(anext(stream))
            await service.api.create_topic(pb.CreateTopicRequest(topic=f"t{number}", partitions=1))
            async with asyncio.timeout(PATIENCE_S):
                assert f'"t{number}"' in (await coming).payload_json
        await stream.aclose()
    assert "LISTEN does not work" not in caplog.text


async def test_without_it_polling_is_said(pooled: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with coordinators(1, pooled):
            async with asyncio.timeout(PATIENCE_S):
                while "LISTEN does not work through the pooler" not in caplog.text:
                    await asyncio.sleep(0.02)


async def test_a_way_past_the_pooler_that_leads_into_one_is_said_once(
    pooled: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not with every connection that breaks."""
    connections = Listening(pooled, timeout_ms=5_000, past_pooler=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            await (await connections.connect()).close()
    assert caplog.text.count("pg_listen_dsn leads to a pooler") == 1


async def test_a_way_past_the_pooler_that_leads_into_one_is_said(
    pooled: str, storage: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """LISTEN succeeds there, and nothing is heard: events come by polling."""
    said = "pg_listen_dsn leads to a pooler"
    with caplog.at_level(logging.WARNING):
        async with coordinators(1, pooled, pg_listen_dsn=pooled) as (service,):
            await use([service], rounds=1)
            async with asyncio.timeout(PATIENCE_S):
                while said not in caplog.text:
                    await asyncio.sleep(0.02)
            await followed(service, (await service.api.get_head(pb.GetHeadRequest())).events_position)
        caplog.clear()
        async with coordinators(1, pooled, pg_listen_dsn=storage["STREAMHOUSE_PG_DSN"]) as (service,):
            await service.api.create_topic(pb.CreateTopicRequest(topic="payments", partitions=1))
            await followed(service, (await service.api.get_head(pb.GetHeadRequest())).events_position)
    assert said not in caplog.text


async def test_a_pooler_that_is_taken_for_a_server_ends_nothing(pooled: str) -> None:
    """Statements that were prepared on one connection and run on another fail; the error says which setting helps."""
    async with coordinators(2, pooled, pg_pooler="none") as services:
        failures = []
        for _ in range(20):
            calls = [service.api.get_status(pb.GetStatusRequest()) for service in services for _ in range(5)]
            failures += [
                item for item in await asyncio.gather(*calls, return_exceptions=True) if isinstance(item, Exception)
            ]
        assert failures, "nothing went wrong: the setting would not be needed"
        assert all(isinstance(error, Unavailable) for error in failures), failures
        assert any("pg_pooler = transaction" in str(error) for error in failures), failures
