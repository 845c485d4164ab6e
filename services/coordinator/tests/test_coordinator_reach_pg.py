"""A leader that its workers cannot reach gives its partitions to others, against a real PostgreSQL."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
from shproto.errors import InvalidArgument
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.service import reach
from streamhouse_coordinator.wiring import CoordinatorService

from services.coordinator.tests.running import running, until

pytestmark = pytest.mark.long

HOURS_MS = 3_600_000


@pytest.fixture
async def service(dsn: str, fast: Callable[..., Any]) -> AsyncIterator[CoordinatorService]:
    """It sweeps only when it is told to."""
    async with running(fast(dsn, session_sweep_interval_ms=150_000)) as started:
        yield started


@pytest.fixture
async def api(dsn: str, fast: Callable[..., Any]) -> AsyncIterator[CoordinatorApi]:
    """Reports count for hours, whatever the machine has to do meanwhile."""
    settings = fast(
        dsn, heartbeat_interval_ms=200_000, cut_off_after_ms=100, cut_off_hold_ms=100, moves_per_sweep_max=2
    )
    async with running(settings) as service:
        yield service.api


class Worker:
    """A segmenter or query service, as far as the coordinator hears of it."""

    def __init__(self, api: CoordinatorApi, name: str, role: str) -> None:
        self.api, self.name, self.role, self.token = api, name, role, ""

    async def open(self) -> "Worker":
        request = pb.OpenSessionRequest(agent_id=self.name, role=self.role, address="127.0.0.1:1")
        self.token = (await self.api.open_session(request)).session_token
        return self

    async def says(self, **reached: bool) -> list[str]:
        """Returns the agents that it is to check."""
        agents = [pb.AgentReach(agent_id=name, reached=value) for name, value in reached.items()]
        request = pb.HeartbeatRequest(session_token=self.token, checks_agents=True, agents=agents)
        return [item.agent_id for item in (await self.api.heartbeat(request)).check]


async def workers(api: CoordinatorApi) -> list[Worker]:
    return [
        await Worker(api, name, role).open()
        for name, role in (("s1", "segmenter"), ("s2", "segmenter"), ("q", "query"))
    ]


async def doubts(api: CoordinatorApi) -> dict[str, pb.UnreachableAgent]:
    return {item.agent_id: item for item in (await api.get_status(pb.GetStatusRequest())).unreachable_agents}


async def test_an_agent_that_its_workers_cannot_reach_gives_its_partitions_to_others(
    api: CoordinatorApi, open_agent: Any, all_events: Any
) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=6))
    a, b = await open_agent(api, "a"), await open_agent(api, "b")
    await hand_over(a, b)
    assert len(await a.leads()) == len(await b.leads()) == 3
    s1, s2, q = await workers(api)
    assert await q.says() == [], "nobody doubts anybody"
    assert await s1.says(a=False) == ["a"]
    assert await s2.says() == ["a"], "it is asked to check"
    assert await s2.says(a=True) == ["a"] and await q.says(a=True) == ["a"]
    shown = (await doubts(api))["a"]
    assert (shown.cut_off, list(shown.failing), list(shown.reaching)) == (False, ["s1"], ["q", "s2"])
    await s2.says(a=False)

    async def is_out() -> bool:
        return (await doubts(api))["a"].cut_off

    await until(is_out)
    (cut_off,) = await all_events(api, "AgentCutOff")
    assert '"agent_id":"a"' in cut_off.payload_json and '"reporters":["s1","s2"]' in cut_off.payload_json

    async def all_moving() -> bool:
        return all(grant.status == "moving" and grant.at_once for grant in await a.grants())

    await until(all_moving)
    moves = await all_events(api, "MoveRequested")
    assert sum('"why":"cut_off"' in event.payload_json for event in moves) == 3
    await a.settle(*((grant, grant.start_offset + 7) for grant in await a.grants()))
    assert not await a.leads() and len(await b.leads()) == 6
    assert sorted(grant.start_offset for grant in (await b.leads()).values()) == [0, 0, 0, 7, 7, 7], "no gap"
    for worker in (s1, s2):
        await worker.says(a=True)

    async def all_well() -> bool:
        return not await doubts(api)

    await until(all_well)
    await hand_over(b, a)
    assert len(await a.leads()) == len(await b.leads()) == 3


async def hand_over(source: Any, target: Any) -> None:
    """Until both lead the same number of partitions."""

    async def even() -> bool:
        moving = [grant for grant in await source.grants() if grant.status == "moving"]
        await source.settle(*((grant, grant.start_offset) for grant in moving))
        return len(await source.leads()) == len(await target.leads())

    await until(even)


async def test_where_only_durable_records_count_others_go_on_at_once(api: CoordinatorApi, open_agent: Any) -> None:
    """Also from a range that has been on the move for long, and waits for segmenters that cannot reach its agent."""
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2, min_acks=types_pb2.ACKS_DURABLE))
    a = await open_agent(api, "a")
    for grant in (await a.leads()).values():
        await a.write(grant, 0, 10)
        await a.announce((grant, 10, 15))
    b = await open_agent(api, "b")
    assert [grant.status for grant in (await a.leads()).values()].count("moving") == 1
    for worker in await workers(api):
        await worker.says(a=False)

    async def taken_over() -> bool:
        return len(await b.leads()) == 2

    await until(taken_over)
    assert not await a.leads()
    assert {grant.start_offset for grant in (await b.leads()).values()} == {10}, "what is registered"


async def test_a_worker_is_not_given_buffers_of_agents_that_it_cannot_reach(
    api: CoordinatorApi, open_agent: Any
) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    a = await open_agent(api, "a")
    await a.announce((next(iter((await a.leads()).values())), 0, 10))
    request = pb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=HOURS_MS // 10, except_agents=["a", "gone"])
    assert not (await api.claim_buffer(request)).found
    del request.except_agents[:]
    assert (await api.claim_buffer(request)).found


@pytest.mark.smoke
async def test_agents_do_not_judge_each_other(api: CoordinatorApi, open_agent: Any) -> None:
    a = await open_agent(api, "a")
    reach = [pb.AgentReach(agent_id="a", reached=False)]
    request = pb.HeartbeatRequest(session_token=a.session.session_token, checks_agents=True, agents=reach)
    with pytest.raises(InvalidArgument, match="only segmenter, query, sql check agents"):
        await api.heartbeat(request)


async def test_no_sweep_waits_for_a_worker_that_reports(service: CoordinatorService, open_agent: Any, dsn: str) -> None:
    """Rows of reports are written by many; a sweep that waited for one, holding another, could meet a deadlock."""
    api = service.api
    a = await open_agent(api, "a")
    await open_agent(api, "b")
    s1, s2, _ = await workers(api)
    await s1.says(a=False)
    await s2.says(a=True)
    await a.close()  # nobody needs reports of its session any more
    holder = await asyncpg.connect(dsn)
    count = "SELECT count(*) FROM reach_reports"
    try:
        async with holder.transaction():
            await holder.execute("SELECT * FROM reach_reports WHERE NOT reached FOR UPDATE")
            await reach.apply(service.context)
            assert await holder.fetchval(count) == 1
        await reach.apply(service.context)
        assert await holder.fetchval(count) == 0
    finally:
        await holder.close()
