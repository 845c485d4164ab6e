"""The tasks that live as long as a session end together, and nothing is passed over when they do."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shproto.errors import SessionExpired
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.ports import Seen

from services.ingest.tests.ingest_agents import eventually, kill, started
from services.ingest.tests.ingest_world import World, new_world


class Held:
    """Heartbeats wait for `gate` once `holding`, and are refused then."""

    def __init__(self, world: World) -> None:
        self.holding = False
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()
        self._heartbeat = world.coordinator.heartbeat
        world.coordinator.heartbeat = self.heartbeat

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        if self.holding:
            self.waiting.set()
            await self.gate.wait()
            raise SessionExpired("gone")
        return await self._heartbeat(request)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with new_world(heartbeat_ms=10) as world:
        yield world


def running_of_session() -> list[str]:
    names = ("heartbeats", "grants", "session")
    return sorted(task.get_name() for task in asyncio.all_tasks() if task.get_name() in names)


@pytest.mark.parametrize("loss", ["heartbeat", "grants", "feed", "closed"])
async def test_a_session_ends_as_a_whole_and_another_one_begins(tmp_path: Path, loss: str) -> None:
    async with new_world(heartbeat_ms=10 if loss == "heartbeat" else 20_000) as world:
        await world.create_topic(partitions=2)
        await _lose_session(tmp_path, world, loss)


async def _lose_session(tmp_path: Path, world: World, loss: str) -> None:
    coordinator = world.coordinator
    service = await started(tmp_path, coordinator)
    running = service.agent.running()
    await eventually(lambda: running.logs.led("orders", 1) is not None)
    first = running.current_session.session_id
    coordinator.feed_paused = loss != "closed"  # only then do its events say so
    await world.expire_all()
    if loss == "grants":
        running.grants.request_all()
    if loss == "feed":
        coordinator.cut(SessionExpired("gone"))
    await eventually(lambda: running.current_session.session_id not in ("", first))
    await eventually(lambda: running.logs.led("orders", 1) is not None)
    assert running_of_session() == ["grants", "heartbeats", "session"]
    assert service.tasks.error is None
    await kill(service)


async def test_a_session_that_is_lost_while_the_agent_stops_is_not_opened_again(tmp_path: Path, world: World) -> None:
    """The loss and the cancellation come in the same turn of the loop; `stop` waits for the task to end."""
    held = Held(world)
    service = await started(tmp_path, world.coordinator)
    following = service.agent._following
    assert following is not None
    held.holding = True
    await held.waiting.wait()
    held.gate.set()
    following.cancel()
    await asyncio.wait([following], timeout=60)
    assert following.cancelled()
    assert world.coordinator.calls["open_session"] == 1 and running_of_session() == []
    await kill(service)


async def test_what_ends_the_agent_is_raised_alone(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a group of errors: whoever runs the agent tells a full disk from a taken id by the class."""
    held = Held(world)
    service = await started(tmp_path, world.coordinator)
    following = service.agent._following
    assert following is not None
    held.holding = True
    await held.waiting.wait()

    def fail(directory: WalDirectory, seen: Seen) -> None:
        raise OSError(errno.EIO, "a disk that dies")

    monkeypatch.setattr(WalDirectory, "note_history", fail)
    await world.create_topic()
    await asyncio.wait([following], timeout=60)
    assert isinstance(service.tasks.error, OSError) and service.tasks.error.errno == errno.EIO
    assert running_of_session() == []
    await kill(service)
