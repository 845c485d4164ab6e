"""A worker's session: asked for until it is granted, opened again once it is lost."""

import asyncio
from typing import Any

import pytest
from shcluster.agent_checks import AgentChecks
from shcluster.session import SessionKeeper
from shproto.errors import AgentIdTaken, SessionExpired, StreamHouseError, Unavailable
from shproto.v1 import coordinator_pb2 as pb
from shruntime.clock import ManualClock

pytestmark = pytest.mark.quick

INTERVAL_MS = 1_000


class Coordinator:
    """Grants sessions, unless `opening` has an error for the call; then its first one is raised."""

    def __init__(self) -> None:
        self.opening: list[StreamHouseError] = []
        self.requests: list[pb.OpenSessionRequest] = []
        self.open: set[str] = set()

    async def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        self.requests.append(request)
        self.open.add(request.session_token)  # also where the answer is lost
        if self.opening:
            raise self.opening.pop(0)
        return pb.OpenSessionResponse(session_token=request.session_token, heartbeat_interval_ms=INTERVAL_MS)

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        if request.session_token not in self.open:
            raise SessionExpired("gone")
        return pb.HeartbeatResponse()

    async def close_session(self, request: pb.CloseSessionRequest) -> pb.CloseSessionResponse:
        self.open.remove(request.session_token)
        return pb.CloseSessionResponse()


def keeper_of(coordinator: Coordinator, clock: ManualClock, agent_id: str = "") -> SessionKeeper:
    api: Any = coordinator
    return SessionKeeper(api, clock, AgentChecks(lambda address: api), role="query", agent_id=agent_id)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_try_whose_answer_is_lost_leaves_no_second_session() -> None:
    coordinator, clock = Coordinator(), ManualClock()
    coordinator.opening = [Unavailable("the answer is lost"), AgentIdTaken("in use by a live process")]
    keeper = keeper_of(coordinator, clock)
    assert keeper.may_work(), "none is wanted"
    keeper.start("a:1")
    opening = asyncio.create_task(keeper.open())
    for _ in range(2):
        await settled()
        assert not keeper.may_work()
        clock.advance(60_000)
    await opening
    assert keeper.may_work() and coordinator.open == {keeper.token}
    assert [(item.agent_id, item.role, item.address) for item in coordinator.requests] == [
        ("query@a:1", "query", "a:1")
    ] * 3
    await keeper.close()
    assert not coordinator.open and not keeper.may_work()


async def test_an_id_that_is_taken_is_an_error_once_and_again_after_it_was_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A worker that waited for a night had logged it every two seconds."""
    coordinator, clock = Coordinator(), ManualClock()
    taken, away = AgentIdTaken("in use by a live process"), Unavailable("away")
    coordinator.opening = [taken, taken, taken, away, taken, taken]
    keeper = keeper_of(coordinator, clock)
    keeper.start("a:1")
    opening = asyncio.create_task(keeper.open())
    while coordinator.opening:
        await settled()
        clock.advance(60_000)
    await opening
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == ["no session: in use by a live process"] * 2
    assert len(coordinator.requests) == 7
    await keeper.close()


async def test_a_lost_session_is_followed_by_another_and_so_is_what_runs_beside_it() -> None:
    coordinator, clock = Coordinator(), ManualClock()
    followed: list[str] = []
    running: set[str] = set()
    woken = 0

    def wake() -> None:
        nonlocal woken
        woken += 1

    async def follow(token: str) -> None:
        followed.append(token)
        running.add(token)
        try:
            await asyncio.Event().wait()
        finally:
            running.remove(token)

    keeper = keeper_of(coordinator, clock, "q1")
    keeper.start("a:1")
    keeping = asyncio.create_task(keeper.run(wake, follow))
    await settled()
    first = keeper.token
    assert (followed, woken) == ([first], 1)
    clock.advance(INTERVAL_MS)
    await settled()
    assert keeper.token == first, "renewed"
    coordinator.open.clear()
    clock.advance(INTERVAL_MS)
    await settled()
    assert keeper.token not in ("", first)
    assert (followed, running, woken) == ([first, keeper.token], {keeper.token}, 2)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert not running
