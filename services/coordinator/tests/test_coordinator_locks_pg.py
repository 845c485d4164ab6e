"""Transactions that want the same rows in PostgreSQL: they wait for each other in one order, never in a circle.

Each test stops one transaction between two of its locks until another one waits for it. Were their orders opposite,
PostgreSQL would end one of them ("deadlock detected"), which the fixture `locks_in_order` looks for.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from shproto.errors import InvalidArgument
from shproto.events import GroupRebalanced, LogStartMoved, RangeExtended
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.ports import Transaction, where
from streamhouse_coordinator.service import outages
from streamhouse_coordinator.service.common import ranges_by_key
from streamhouse_coordinator.wiring import CoordinatorService, build

from services.coordinator.tests.running import running

PATIENCE_S = 60

UntilBlocked = Callable[[int], Awaitable[None]]


@pytest.fixture
async def quiet(dsn: str, fast: Any) -> AsyncIterator[CoordinatorService]:
    """A coordinator that sweeps only when it is told to."""
    service = build(fast(dsn, session_sweep_interval_ms=150_000))
    await service.start()
    yield service
    await service.stop()


@pytest.fixture
async def until_blocked(dsn: str) -> AsyncIterator[UntilBlocked]:
    """`await until_blocked(count)`: so many transactions wait for a lock."""
    connection = await asyncpg.connect(dsn)

    async def wait(count: int) -> None:
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        async with asyncio.timeout(PATIENCE_S):
            while await connection.fetchval(waiting) < count:
                await asyncio.sleep(0.01)

    yield wait
    await connection.close()


class Paused:
    """A transaction that takes a lock, and goes on with its event when it is told to."""

    def __init__(
        self,
        service: CoordinatorService,
        lock: Callable[[Transaction], Awaitable[Any]],
        then: Callable[[Transaction], Awaitable[None]],
        name: str = "",
    ) -> None:
        self._holds, self._go_on = asyncio.Event(), asyncio.Event()
        self.tries = 0

        async def work(tx: Transaction) -> None:
            self.tries += 1
            await lock(tx)
            self._holds.set()
            await self._go_on.wait()
            await then(tx)

        self._task = asyncio.create_task(service.context.store.run(work, lock=name))

    async def holds(self) -> "Paused":
        await self._holds.wait()
        return self

    async def finish(self) -> None:
        self._go_on.set()
        async with asyncio.timeout(PATIENCE_S):
            await self._task


async def test_moves_and_registrations_of_the_same_ranges(
    quiet: CoordinatorService, open_agent: Any, until_blocked: UntilBlocked
) -> None:
    await quiet.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    agent = await open_agent(quiet.api, "a")
    grant = (await agent.leads())[1]  # the one that a second agent would get
    key = (grant.topic_id.hex(), 1, grant.epoch)

    async def extend(tx: Transaction) -> None:
        await tx.append(
            [RangeExtended(topic_id=key[0], partition=key[1], epoch=key[2], limit_offset=grant.limit_offset + 1)]
        )

    paused = await Paused(quiet, lambda tx: ranges_by_key(tx, [key], lock="wait"), extend).holds()
    opening = asyncio.create_task(open_agent(quiet.api, "b"))
    await until_blocked(1)
    await paused.finish()
    await opening
    assert paused.tries == 1
    after = (await agent.leads())[1]
    assert (after.limit_offset, after.status) == (grant.limit_offset + 1, "moving")


async def test_grants_and_retention_of_the_same_partition(
    quiet: CoordinatorService, open_agent: Any, until_blocked: UntilBlocked
) -> None:
    await quiet.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(quiet.api, "a")
    grant = (await agent.leads())[0]
    await agent.write(grant, 0, 5)
    of_partition = where(topic_id=grant.topic_id.hex(), partition=0)

    async def retain(tx: Transaction) -> None:
        await tx.append(
            [
                LogStartMoved(
                    topic_id=grant.topic_id.hex(),
                    partition=0,
                    log_start_offset=5,
                    removed_segment_ids=(),
                    why="retention_ms",
                )
            ]
        )

    paused = await Paused(quiet, lambda tx: tx.select(t.PARTITIONS, of_partition, lock="wait"), retain).holds()
    settling = asyncio.create_task(agent.settle((grant, 5)))  # and is granted the next epoch
    await until_blocked(1)
    await paused.finish()
    await settling
    assert paused.tries == 1
    described = (await quiet.api.describe_topic(pb.DescribeTopicRequest(topic="orders"))).partitions[0]
    assert (described.epoch, described.log_start_offset) == (2, 5)


async def test_leases_moved_after_an_outage_and_everybody_who_writes_them(
    quiet: CoordinatorService,
    open_agent: Any,
    until_blocked: UntilBlocked,
    change_rows: Callable[..., Any],
    dsn: str,
    fast: Any,
) -> None:
    """A sweep holds the agents' leases and waits for a member; the member's group waits for its event's position."""
    await quiet.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    await open_agent(quiet.api, "a")
    member = await quiet.api.join_group(pb.JoinGroupRequest(group="g", topics=["orders"]))
    await change_rows("UPDATE sweeps SET last_ms = last_ms - 6000000")

    async def hold_member(tx: Transaction) -> None:
        await tx.select(t.GROUP_MEMBER_STATE, where(group_name="g", member_id=member.member_id), lock="wait")

    async def rebalance(tx: Transaction) -> None:
        await tx.append([GroupRebalanced("g", 2, {})])

    paused = await Paused(quiet, hold_member, rebalance, "group/g").holds()
    sweeping = asyncio.create_task(outages.extend_leases_after_outage(quiet.context.store, 50))
    await until_blocked(1)
    async with running(fast(dsn, session_sweep_interval_ms=150_000)) as other:  # of one only a call at a time asks
        opening = asyncio.create_task(open_agent(other.api, "b"))
        await until_blocked(2)
        await paused.finish()
        away_ms = await sweeping
        await opening
    assert paused.tries == 1 and away_ms >= 6_000_000


@pytest.mark.long
async def test_everything_at_once_ends_without_a_deadlock(
    two_coordinators: tuple[CoordinatorService, CoordinatorService], open_agent: Any, make_segment: Any
) -> None:
    """Objects of several partitions, agents that come and go, retention and compaction, for some hundred rounds."""
    apis = [service.api for service in two_coordinators]
    await apis[0].create_topic(pb.CreateTopicRequest(topic="orders", partitions=6, retention_bytes=300))
    agents = await asyncio.gather(*(open_agent(apis[nth % 2], f"agent-{nth}") for nth in range(3)))

    async def write(agent: Any) -> None:
        for _ in range(40):
            grants = list(await agent.grants())
            spans = [(grant, grant.registered_end, grant.registered_end + 1) for grant in grants]
            if not spans:
                continue
            buffer_id = await agent.announce(*spans[::-1])
            refs = [make_segment(g.topic_id, g.partition, g.epoch, base, end) for g, base, end in spans[::-1]]
            await agent.api.register_segments(pb.RegisterSegmentsRequest(buffer_id=buffer_id, segments=refs))
            low = [pb.RangeUse(topic_id=g.topic_id, partition=g.partition, epoch=g.epoch, next_offset=end)
                   for g, _, end in spans]  # fmt: skip
            await agent.heartbeat(*low)

    async def lead(agent: Any) -> None:
        for _ in range(20):
            moving = [(g, g.registered_end) for g in await agent.grants() if g.status == "moving"]
            with suppress(InvalidArgument):  # a buffer was announced meanwhile: the next round has its end
                await agent.settle(*moving)

    async def come_and_go(nth: int) -> None:
        for _ in range(10):
            agent = await open_agent(apis[nth], f"visitor-{nth}")
            await agent.settle(*((g, g.registered_end) for g in await agent.grants()))
            await agent.close()

    async def keep(nth: int) -> None:
        for _ in range(40):
            await apis[nth].apply_retention(pb.ApplyRetentionRequest())

    work = [*map(write, agents), *map(lead, agents), *map(come_and_go, range(2)), *map(keep, range(2))]
    async with asyncio.timeout(10 * PATIENCE_S):
        await asyncio.gather(*work)


async def test_rebuilding_waits_for_no_reader_and_no_reader_for_it(
    quiet: CoordinatorService, open_agent: Any, dsn: str
) -> None:
    """A reader that goes through the tables against the order of locks, as a sweep or `status` may."""
    await quiet.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    await open_agent(quiet.api, "a")
    reader = await asyncpg.connect(dsn)
    try:
        async with asyncio.timeout(PATIENCE_S):
            async with reader.transaction():
                assert await reader.fetchval("SELECT count(*) FROM sessions") == 1
                await quiet.context.store.rebuild()
                assert await reader.fetchval("SELECT count(*) FROM topics") == 1
    finally:
        await reader.close()
