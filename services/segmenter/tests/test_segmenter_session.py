"""The worker's session: nothing is claimed without one, it outlives failed heartbeats, and its feed wakes the
worker."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from shproto.errors import AgentIdTaken, SessionExpired, Unavailable
from shproto.events import BufferSealed, Event, SessionClosed
from shproto.v1 import coordinator_pb2 as c
from shproto.v1 import ingest_pb2
from shruntime.clock import SystemClock
from shstore import MemoryStore
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_segmenter.wiring import SegmenterService, build

from services.segmenter.tests.segmenter_world import World, new_world
from tests.platform.log_agent import LogAgent
from tests.platform.peer import Peer

NEVER_MS = 3_600_000


class Coordinator(Peer):
    """Answers to sessions by script; the last answer counts for all further calls. Everything else is the real one."""

    def __init__(self, world: World) -> None:
        super().__init__(world.service.api, "the coordinator")
        self.world = world
        self.opening: list[Exception | None] = [None]
        self.heartbeats: list[Exception | None] = [None]
        self.tokens: list[str] = []
        self.closed: list[str] = []
        self.follows: list[c.FollowEventsRequest] = []
        self.claims_asked = 0
        self.beats = 0
        self.heard: list[c.HeartbeatRequest] = []
        self.claims: list[c.ClaimBufferRequest] = []
        self.asked_to_check: list[c.AgentAddress] = []

    async def open_session(self, request: c.OpenSessionRequest) -> c.OpenSessionResponse:
        self.tokens.append(request.session_token)
        if (error := _next(self.opening)) is not None:
            raise error
        return c.OpenSessionResponse(session_token=request.session_token, session_id="s", heartbeat_interval_ms=5)

    async def heartbeat(self, request: c.HeartbeatRequest) -> c.HeartbeatResponse:
        self.beats += 1
        self.heard.append(request)
        if (error := _next(self.heartbeats)) is not None:
            raise error
        return c.HeartbeatResponse(check=self.asked_to_check)

    async def close_session(self, request: c.CloseSessionRequest) -> c.CloseSessionResponse:
        self.closed.append(request.session_token)
        return c.CloseSessionResponse()

    async def claim_buffer(self, request: c.ClaimBufferRequest) -> c.ClaimBufferResponse:
        self.claims_asked += 1
        self.claims.append(request)
        return await self.api.claim_buffer(request)  # type: ignore[no-any-return]

    async def follow_events(self, request: c.FollowEventsRequest) -> AsyncIterator[c.Event]:
        self.follows.append(request)
        async for event in self.api.follow_events(request):
            yield event

    async def emit(self, event: Event) -> None:
        await self.world.service.context.store.run(lambda tx: tx.append([event]))


@pytest.fixture
async def coordinator() -> AsyncIterator[Coordinator]:
    world = await new_world(clock=SystemClock())
    await world.start()
    yield Coordinator(world)
    await world.stop()


class SilentAgent(Peer):
    """Behind a link that was cut, while it is `silent`."""

    def __init__(self, held: LogAgent) -> None:
        super().__init__(held, "the agent")
        self.silent = True

    async def describe_agent(self, request: ingest_pb2.DescribeAgentRequest) -> ingest_pb2.DescribeAgentResponse:
        if self.silent:
            raise Unavailable("a:1: DEADLINE_EXCEEDED", address="a:1")
        return ingest_pb2.DescribeAgentResponse()

    async def pull_slice(self, request: ingest_pb2.PullSliceRequest) -> AsyncIterator[ingest_pb2.PullSliceResponse]:
        if self.silent:
            raise Unavailable("a:1: DEADLINE_EXCEEDED", address="a:1")
        async for response in self.api.pull_slice(request):
            yield response


def _next(script: list[Exception | None]) -> Exception | None:
    return script.pop(0) if len(script) > 1 else script[0]


async def until(met: Any) -> None:
    async with asyncio.timeout(30):
        while not met():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running(
    coordinator: Coordinator, *, follow_feed: bool = True, agent: Any = None
) -> AsyncIterator[SegmenterService]:
    agent = agent or coordinator.world.agent
    api: Any = coordinator
    settings = SegmenterSettings(worker_id="w1", scan_interval_ms=NEVER_MS)
    service = build(settings, api, MemoryStore(), lambda address: agent)
    service.follow_feed = follow_feed
    await service.start("127.0.0.1:1")
    try:
        yield service
    finally:
        await service.stop()
    assert service.tasks.error is None


async def test_nothing_is_claimed_before_the_session_is_open(coordinator: Coordinator) -> None:
    taken = AgentIdTaken("the id of segmenter 'w1' is in use by a live process", agent_id="w1")
    coordinator.opening = [Unavailable("no coordinator"), taken, None]
    async with running(coordinator) as service:
        await until(lambda: len(coordinator.tokens) == 2)
        assert coordinator.claims_asked == 0 and not service.session.may_work()
        await until(lambda: coordinator.claims_asked)
        assert len(set(coordinator.tokens)) == 1, "one session is wanted, however often it is asked for"
    assert coordinator.closed == coordinator.tokens[-1:]


async def test_a_failed_heartbeat_keeps_the_session_and_its_claims(coordinator: Coordinator) -> None:
    coordinator.heartbeats = [Unavailable("away"), Unavailable("away"), None]
    async with running(coordinator) as service:
        await until(lambda: coordinator.beats > 3)
        assert service.session.may_work()
        assert len(coordinator.tokens) == 1 and not coordinator.closed


async def test_a_lost_session_is_followed_by_another(coordinator: Coordinator) -> None:
    coordinator.heartbeats = [SessionExpired("gone"), None]
    async with running(coordinator):
        await until(lambda: len(coordinator.tokens) == 2 and coordinator.beats > 2)
        assert len(set(coordinator.tokens)) == 2
        await until(lambda: len(coordinator.follows) >= 2)
        assert [request.session_token for request in coordinator.follows] == coordinator.tokens, "watched by its stream"


async def test_a_worker_that_is_gone_wakes_the_others(coordinator: Coordinator) -> None:
    """What it had claimed is free, and no event of the buffers says so."""
    async with running(coordinator, follow_feed=False):
        await until(lambda: coordinator.follows and coordinator.claims_asked)
        assert list(coordinator.follows[0].types) == [SessionClosed.__name__], "RabbitMQ tells of buffers"
        await until(lambda: coordinator.beats > 1)
        asked = coordinator.claims_asked
        await coordinator.emit(SessionClosed(session_id="q", agent_id="q1", role="query", why="expired"))
        await coordinator.emit(SessionClosed(session_id="x", agent_id="w2", role="segmenter", why="unreachable"))
        await until(lambda: coordinator.claims_asked > asked)


async def test_it_says_which_agents_it_cannot_reach_and_asks_for_no_buffers_of_theirs(coordinator: Coordinator) -> None:
    coordinator.asked_to_check = [c.AgentAddress(agent_id="a", address="a:1")]
    agent = SilentAgent(coordinator.world.held)
    async with running(coordinator, agent=agent) as service:
        await until(lambda: any(request.agents for request in coordinator.heard))
        first = next(request for request in coordinator.heard if request.agents)
        assert first.checks_agents and [(item.agent_id, item.reached) for item in first.agents] == [("a", False)]
        service.wake()
        await until(lambda: list(coordinator.claims[-1].except_agents) == ["a"])
        agent.silent = False
        asked = len(coordinator.claims)
        await until(lambda: [item.reached for item in coordinator.heard[-1].agents] == [True])
        await until(lambda: len(coordinator.claims) > asked and not coordinator.claims[-1].except_agents)


async def test_a_pull_that_gets_no_answer_is_a_doubt(coordinator: Coordinator) -> None:
    async with running(coordinator, agent=SilentAgent(coordinator.world.held)):
        await until(lambda: coordinator.claims)
        await coordinator.world.seal("b1", coordinator.world.append(0, [10]))
        await until(lambda: any(request.agents for request in coordinator.heard))
        assert [item.reached for item in coordinator.heard[-1].agents] == [False]


async def test_without_an_address_it_lives_in_the_coordinators_process(coordinator: Coordinator) -> None:
    api: Any = coordinator
    service = build(
        SegmenterSettings(worker_id="w1", scan_interval_ms=NEVER_MS), api, MemoryStore(), lambda address: api
    )
    await service.start()
    await until(lambda: coordinator.follows and coordinator.claims_asked)
    assert BufferSealed.__name__ in coordinator.follows[0].types and not coordinator.tokens
    await service.stop()
