"""The tasks that live as long as a session end together, and nothing is passed over when they do."""

import asyncio
import errno
from pathlib import Path

import pytest
from shproto.errors import SessionExpired
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.ports import Seen

from services.ingest.tests.ingest_agents import eventually, kill, started
from services.ingest.tests.ingest_standins import CoordinatorStandIn


class Held(CoordinatorStandIn):
    """Heartbeats wait for `gate` once `holding`, and are refused then."""

    def __init__(self) -> None:
        super().__init__(heartbeat_ms=5)
        self.holding = False
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        if self.holding:
            self.waiting.set()
            await self.gate.wait()
            raise SessionExpired("gone")
        return await super().heartbeat(request)


def running_of_session() -> list[str]:
    names = ("heartbeats", "grants", "session")
    return sorted(task.get_name() for task in asyncio.all_tasks() if task.get_name() in names)


@pytest.mark.parametrize("loss", ["heartbeat", "grants", "feed", "closed"])
async def test_a_session_ends_as_a_whole_and_another_one_begins(tmp_path: Path, loss: str) -> None:
    coordinator = CoordinatorStandIn(heartbeat_ms=5 if loss == "heartbeat" else 20_000)
    coordinator.create("orders", 2)
    service = await started(tmp_path, coordinator)
    running = service.agent.running()
    await eventually(lambda: running.logs.led("orders", 1) is not None)
    first = running.current_session.session_id
    if loss == "closed":
        coordinator.emit_closed(first)
    else:
        coordinator.expire_all()
    if loss == "grants":
        running.grants.want_all()
    if loss == "feed":
        coordinator.break_feeds(SessionExpired("gone"))
    await eventually(lambda: running.current_session.session_id not in ("", first))
    await eventually(lambda: running.logs.led("orders", 1) is not None)
    assert running_of_session() == ["grants", "heartbeats", "session"]
    assert service.tasks.error is None
    await kill(service)


async def test_a_session_that_is_lost_while_the_agent_stops_is_not_opened_again(tmp_path: Path) -> None:
    """The loss and the cancellation come in the same turn of the loop; `stop` waits for the task to end."""
    coordinator = Held()
    service = await started(tmp_path, coordinator)
    following = service.agent._following
    assert following is not None
    coordinator.holding = True
    await coordinator.waiting.wait()
    coordinator.gate.set()
    following.cancel()
    await asyncio.wait([following], timeout=10)
    assert following.cancelled()
    assert coordinator.calls["open_session"] == 1 and running_of_session() == []
    await kill(service)


async def test_what_ends_the_agent_is_raised_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a group of errors: whoever runs the agent tells a full disk from a taken id by the class."""
    coordinator = Held()
    service = await started(tmp_path, coordinator)
    following = service.agent._following
    assert following is not None
    coordinator.holding = True
    await coordinator.waiting.wait()

    def fail(directory: WalDirectory, seen: Seen) -> None:
        raise OSError(errno.EIO, "a disk that dies")

    monkeypatch.setattr(WalDirectory, "note_history", fail)
    coordinator.create("orders")
    await asyncio.wait([following], timeout=10)
    assert isinstance(service.tasks.error, OSError) and service.tasks.error.errno == errno.EIO
    assert running_of_session() == []
    await kill(service)
