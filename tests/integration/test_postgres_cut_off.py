"""A coordinator that is cut off from PostgreSQL in the middle of a transaction, with locks that all others wait for."""

import asyncio
from typing import Any
from urllib.parse import urlsplit

import pytest
from shproto.errors import StreamHouseError
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.adapters.postgres_transaction import PostgresTransaction
from streamhouse_coordinator.ports import Transaction
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService, build

from services.coordinator.tests.conftest import Agent
from tests.faults.proxy import BOTH, FaultProxy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

PATIENCE_S = 60
"""How long the cut lasts at most. PostgreSQL ends the transaction after pg_transaction_idle_ms, 2 s by default."""


async def test_durable_acks_go_on_while_a_coordinator_is_cut_off_in_a_transaction(storage: dict[str, str]) -> None:
    dsn = storage["STREAMHOUSE_PG_DSN"]
    place = urlsplit(dsn).netloc.rpartition("@")[2]
    proxy = FaultProxy("postgres", place)
    await proxy.start()
    cut_off = build(CoordinatorSettings.load({}, pg_dsn=dsn.replace(place, proxy.address)))
    other = build(CoordinatorSettings.load({}, pg_dsn=dsn))
    holding: list[asyncio.Task[Any]] = []
    try:
        await cut_off.start()
        await other.start()
        await other.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
        agent = await Agent(other.api, "agent", "127.0.0.1:1").open()
        (grant,) = (await agent.leads()).values()
        await register(agent, grant, 0)
        holding.append(await holds_the_position(cut_off))
        # What others ask of the coordinator waits for the same lock; each of these is cut off with it, too.
        holding += [asyncio.create_task(create_topic(cut_off, f"t{nth}")) for nth in range(5)]
        await asyncio.sleep(0.2)
        proxy.hold(*BOTH)
        async with asyncio.timeout(PATIENCE_S):
            for offset in range(1, 4):
                await register(agent, grant, offset)
        assert not holding[0].done(), "it is still cut off"
    finally:
        for task in holding:
            task.cancel()
        if holding:
            await asyncio.wait(holding)
        await proxy.heal()
        await other.stop()
        await cut_off.stop()
        await proxy.stop()


async def holds_the_position(service: CoordinatorService) -> asyncio.Task[None]:
    """A transaction that has given its events their positions, and not committed yet."""
    holds = asyncio.Event()

    async def hold(tx: Transaction) -> None:
        assert isinstance(tx, PostgresTransaction)
        await tx._connection.execute("UPDATE event_position SET position = position")
        holds.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(service.context.store.run(hold))
    await holds.wait()
    return task


async def create_topic(service: CoordinatorService, name: str) -> None:
    try:
        await service.api.create_topic(pb.CreateTopicRequest(topic=name, partitions=1))
    except StreamHouseError:
        return


async def register(agent: Agent, grant: pb.RangeGrant, offset: int) -> None:
    """Until it is registered, as a segmenter does: then whoever waits for a durable acknowledgement gets it."""
    while True:
        try:
            result = await agent.write(grant, offset, offset + 1)
        except StreamHouseError:
            await asyncio.sleep(0.1)
        else:
            assert result in (pb.REGISTRATION_RESULT_REGISTERED, pb.REGISTRATION_RESULT_COVERED)
            return
