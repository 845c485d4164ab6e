"""Nemeses of the servers beside the object store: PostgreSQL, RabbitMQ, Redis."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tests.faults.fleet import Fleet
from tests.faults.nemesis import Deed, all_of, nemesis
from tests.integration.standby import PostgresPair


@asynccontextmanager
async def outage(fleet: Fleet, name: str, stop: Callable[[], None], what: str) -> AsyncIterator[Deed]:
    with all_of(fleet, [name]):
        await asyncio.to_thread(stop)
        try:
            yield Deed(f"{name} {what}")
        finally:
            await asyncio.to_thread(fleet.servers[name].start)


@nemesis("postgres-kill")
async def postgres_kill(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    async with outage(fleet, "postgres", fleet.servers["postgres"].kill, "is killed") as deed:
        yield deed


@nemesis("postgres-restart")
async def postgres_restart(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    async with outage(fleet, "postgres", fleet.servers["postgres"].stop, "is stopped") as deed:
        yield deed


@nemesis("postgres-failover")
async def postgres_failover(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """It gets a synchronous standby, and dies; the standby takes its place. The next time it is the other way round."""
    server = fleet.servers["postgres"]
    assert isinstance(server, PostgresPair)
    with all_of(fleet, ["postgres"]):
        await asyncio.to_thread(server.attach_standby)
        server.kill()
        try:
            yield Deed("postgres is killed, to be replaced by its standby")
        finally:
            await asyncio.to_thread(server.start)


@nemesis("rabbitmq")
async def rabbitmq(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    server = fleet.servers["rabbitmq"]
    async with outage(fleet, "rabbitmq", rng.choice((server.stop, server.kill)), "is away") as deed:
        yield deed


@nemesis("redis")
async def redis(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    server = fleet.servers["redis"]
    async with outage(fleet, "redis", rng.choice((server.stop, server.kill)), "is away") as deed:
        yield deed
