"""The outbox relay with a real RabbitMQ, while that or PostgreSQL cannot be reached."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import asyncpg
import pytest
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.adapters.rabbitmq import EXCHANGE
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService, build

from tests.faults.proxy import BOTH, FaultProxy
from tests.integration.servers import Server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

PATIENCE_S = 60
RELAY = "streamhouse_coordinator.adapters.rabbitmq"


@asynccontextmanager
async def proxy_to(url: str) -> AsyncIterator[tuple[FaultProxy, str]]:
    """A proxy, and the URL through it."""
    place = urlsplit(url).netloc.rpartition("@")[2]
    proxy = FaultProxy("relay", place)
    await proxy.start()
    try:
        yield proxy, url.replace(place, proxy.address)
    finally:
        await proxy.accept()
        await proxy.heal()
        await proxy.stop()


@asynccontextmanager
async def coordinator(**settings: Any) -> AsyncIterator[CoordinatorService]:
    service = build(CoordinatorSettings.load({}, events_poll_interval_ms=50, **settings))
    try:
        await service.start()
        yield service
        assert not service._tasks.failed.is_set(), "a background loop ended"
    finally:
        await service.stop()


@asynccontextmanager
async def subscribed(url: str) -> AsyncIterator[Any]:
    """A queue that gets all events from now on."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange, "#")
        yield queue


async def arrives(queue: Any, text: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            message = await queue.get(fail=False)
            if message is None:
                await asyncio.sleep(0.02)
                continue
            await message.ack()
            if text in message.body.decode():
                return


async def create_topic(service: CoordinatorService, topic: str) -> None:
    await service.api.create_topic(pb.CreateTopicRequest(topic=topic, partitions=1))


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [item.getMessage() for item in caplog.records if item.name == RELAY and item.levelno >= level]


async def test_while_postgresql_is_away_the_connection_to_rabbitmq_stays(
    storage: dict[str, str], rabbitmq: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outage is told once, and so is its end."""
    caplog.set_level(logging.INFO)
    dsn = storage["STREAMHOUSE_PG_DSN"]
    connects = 0
    real_connect = aio_pika.connect

    async def connect(*arguments: Any, **options: Any) -> Any:
        nonlocal connects
        connects += 1
        return await real_connect(*arguments, **options)

    async with (
        subscribed(rabbitmq.url) as queue,
        proxy_to(dsn) as (link, linked_dsn),
        coordinator(pg_dsn=linked_dsn, pg_listen_dsn=dsn, amqp_url=rabbitmq.url) as service,
    ):
        assert service._relay is not None
        tries = 0
        real_drain = service._relay._drain

        async def drain(*arguments: Any) -> int:
            nonlocal tries
            tries += 1
            return await real_drain(*arguments)

        await create_topic(service, "before")
        await arrives(queue, '"before"')
        caplog.clear()
        monkeypatch.setattr(aio_pika, "connect", connect)
        monkeypatch.setattr(service._relay, "_drain", drain)
        await link.refuse()
        tries = 0
        async with asyncio.timeout(PATIENCE_S):
            while tries < 6:
                await asyncio.sleep(0.02)
        assert connects == 0
        assert len(said(caplog, logging.INFO)) == 1, said(caplog, logging.INFO)
        assert "not publishing events for now: PostgreSQL" in said(caplog, logging.WARNING)[0]
        await link.accept()
        async with asyncio.timeout(PATIENCE_S):
            while len(said(caplog, logging.INFO)) == 1:
                await asyncio.sleep(0.02)
        await create_topic(service, "after")
        await arrives(queue, '"after"')
        assert said(caplog, logging.INFO)[1:] == ["ready to publish events to RabbitMQ"]
        assert connects == 0


async def test_a_rabbitmq_that_says_nothing_holds_no_transaction_open(
    storage: dict[str, str], rabbitmq: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it make asyncpg complain of one; events go on once RabbitMQ answers."""
    caplog.set_level(logging.INFO)
    dsn = storage["STREAMHOUSE_PG_DSN"]
    # The last statement of a transaction that waits for RabbitMQ has read the events to publish.
    in_transaction = (
        "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%' "
        "AND query ILIKE '%select%events%'"
    )
    observer = await asyncpg.connect(dsn)
    try:
        async with (
            subscribed(rabbitmq.url) as queue,
            proxy_to(rabbitmq.url) as (link, url),
            coordinator(pg_dsn=dsn, amqp_url=url, amqp_timeout_ms=1_000) as service,
        ):
            await create_topic(service, "before")
            await arrives(queue, '"before"')
            link.hold(*BOTH)
            await create_topic(service, "during")
            waiting: list[Any] = []
            async with asyncio.timeout(PATIENCE_S):
                while not said(caplog, logging.WARNING):
                    waiting += await observer.fetch(in_transaction)
                    await asyncio.sleep(0.01)
            assert not waiting
            await link.heal()
            await arrives(queue, '"during"')
    finally:
        await observer.close()
    assert not [item.getMessage() for item in caplog.records if item.name == "asyncio"]
    assert not [item.getMessage() for item in caplog.records if item.levelno >= logging.ERROR]
