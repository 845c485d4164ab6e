"""The outbox in PostgreSQL: one coordinator publishes at a time, and no transaction is open meanwhile."""

import asyncio
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.adapters.postgres import PostgresStore
from streamhouse_coordinator.core.tables import EventRow
from streamhouse_coordinator.wiring import CoordinatorService

PATIENCE_S = 60
LONG_MS = 600_000

Two = tuple[CoordinatorService, CoordinatorService]


class Broker:
    """Takes events; `silent`: confirms none until it is set free."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.reached = asyncio.Event()
        self.silent = False
        self._confirmed = asyncio.Event()

    async def publish(self, rows: Sequence[EventRow]) -> None:
        self.reached.set()
        if self.silent:
            await self._confirmed.wait()
        self.positions += [row.position for row in rows]

    def confirm(self) -> None:
        self._confirmed.set()


def store_of(service: CoordinatorService) -> PostgresStore:
    return service._store


async def create_topics(service: CoordinatorService, *topics: str) -> None:
    for topic in topics:
        await service.api.create_topic(pb.CreateTopicRequest(topic=topic, partitions=1))


async def drain_all(service: CoordinatorService, broker: Broker) -> list[int]:
    """What the broker got."""
    before = len(broker.positions)
    async with asyncio.timeout(PATIENCE_S):
        while not await store_of(service).drain_outbox(broker.publish, 100, claim_ms=LONG_MS):
            await asyncio.sleep(0.02)
    return broker.positions[before:]


async def outbox_position(service: CoordinatorService) -> int:
    return int((await service.api.get_status(pb.GetStatusRequest())).outbox_position)


async def test_no_transaction_is_open_while_events_are_published(two_coordinators: Two, dsn: str) -> None:
    service, broker = two_coordinators[0], Broker()
    await create_topics(service, "orders")
    observer = await asyncpg.connect(dsn)
    held: list[Any] = []

    async def publish(rows: Sequence[EventRow]) -> None:
        locks = "SELECT pid FROM pg_locks JOIN pg_class ON relation = pg_class.oid WHERE relname = 'outbox'"
        held.extend(await observer.fetch(locks))
        await broker.publish(rows)

    try:
        assert await store_of(service).drain_outbox(publish, 100, claim_ms=LONG_MS)
    finally:
        await observer.close()
    assert not held
    assert await outbox_position(service) == broker.positions[-1]


async def test_one_coordinator_publishes_at_a_time(two_coordinators: Two) -> None:
    first, second = two_coordinators
    broker = Broker()
    broker.silent = True
    await create_topics(first, "orders")
    publishing = asyncio.create_task(store_of(first).drain_outbox(broker.publish, 100, claim_ms=LONG_MS))
    await broker.reached.wait()
    other = Broker()
    assert await store_of(second).drain_outbox(other.publish, 100, claim_ms=LONG_MS) == 0
    broker.confirm()
    published = await publishing
    assert broker.positions == list(range(1, published + 1)) and not other.positions
    await create_topics(first, "payments")
    assert await drain_all(second, other) == list(range(published + 1, other.positions[-1] + 1))


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_events_that_were_not_published_go_to_the_next_one_at_once(two_coordinators: Two, how: str) -> None:
    first, second = two_coordinators
    broker = Broker()
    broker.silent = True
    await create_topics(first, "orders")

    async def fail(rows: Sequence[EventRow]) -> None:
        broker.reached.set()
        raise ConnectionResetError("RabbitMQ is gone")

    publish = broker.publish if how == "cancelled" else fail
    publishing = asyncio.create_task(store_of(first).drain_outbox(publish, 100, claim_ms=LONG_MS))
    await broker.reached.wait()
    publishing.cancel() if how == "cancelled" else None
    with pytest.raises((asyncio.CancelledError, ConnectionResetError)):
        await publishing
    other = Broker()
    assert await store_of(second).drain_outbox(other.publish, 100, claim_ms=LONG_MS) > 0
    assert other.positions[0] == 1


async def test_one_that_hangs_is_overtaken_and_takes_nothing_back(two_coordinators: Two) -> None:
    """Events may be published twice then, never left out."""
    first, second = two_coordinators
    slow, other = Broker(), Broker()
    slow.silent = True
    await create_topics(first, "orders")
    publishing = asyncio.create_task(store_of(first).drain_outbox(slow.publish, 1, claim_ms=1))
    await slow.reached.wait()
    published = await drain_all(second, other)
    assert published[0] == 1
    reached = await outbox_position(second)
    slow.confirm()
    assert await publishing == 1
    assert await outbox_position(second) == reached == published[-1]
