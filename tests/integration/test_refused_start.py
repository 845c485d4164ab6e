"""An ingest agent under an id that a live one has is refused, and leaves nothing behind that refuses the next start.

Quotes the guarantee: G2 An offset never changes its record and is never given out twice (the log of an agent is never
another one's).
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from streamhouse import Admin, Producer

from tests.integration.processes import ServiceProcess, free_ports

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


class Agents:
    """A coordinator, and ingest agents over it."""

    def __init__(self, storage: Mapping[str, str], work_dir: Path) -> None:
        self._work_dir = work_dir
        self._ports = iter(free_ports(8))
        self.bootstrap = f"127.0.0.1:{next(self._ports)}"
        self._environ = {**storage, "STREAMHOUSE_BOOTSTRAP": self.bootstrap}
        self._coordinator = ServiceProcess(
            "coordinator", ["coordinator"], {**storage, "STREAMHOUSE_LISTEN": self.bootstrap}, work_dir
        )
        self._started = [self._coordinator]

    async def start(self) -> None:
        self._coordinator.start()
        await self._coordinator.wait_serving(self.bootstrap)

    def launch(self, log: str, agent_id: str, wal_dir: str) -> tuple[ServiceProcess, str]:
        address = f"127.0.0.1:{next(self._ports)}"
        settings = {
            "STREAMHOUSE_LISTEN": address,
            "STREAMHOUSE_AGENT_ID": agent_id,
            "STREAMHOUSE_WAL_DIR": str(self._work_dir / wal_dir),
        }
        agent = ServiceProcess(log, ["ingest"], self._environ | settings, self._work_dir)
        self._started.append(agent)
        agent.start()
        return agent, address

    async def serving(self, log: str, agent_id: str, wal_dir: str) -> ServiceProcess:
        agent, address = self.launch(log, agent_id, wal_dir)
        await agent.wait_serving(address)
        return agent

    async def refused(self, log: str, agent_id: str, wal_dir: str) -> str:
        """Returns what it printed."""
        agent, _ = self.launch(log, agent_id, wal_dir)
        async with asyncio.timeout(60):
            while agent.is_running():
                await asyncio.sleep(0.05)
        return agent.log_path.read_text()

    def kill_all(self) -> None:
        for process in reversed(self._started):
            if process.is_running():
                process.kill()


@pytest.fixture
async def agents(storage: dict[str, str], tmp_path: Path) -> AsyncIterator[Agents]:
    made = Agents(storage, tmp_path)
    try:
        await made.start()
        yield made
    finally:
        made.kill_all()


async def test_a_refused_agent_leaves_its_directory_to_the_id_that_is_let_in(agents: Agents, tmp_path: Path) -> None:
    await agents.serving("first", "ingest-0", "first")
    assert "AGENT_ID_TAKEN" in await agents.refused("refused", "ingest-0", "second")
    await agents.serving("second", "ingest-1", "second")


async def test_g2_a_log_stays_its_agents_when_all_its_records_are_in_segments(agents: Agents, tmp_path: Path) -> None:
    first = await agents.serving("first", "ingest-0", "first")
    async with Admin(agents.bootstrap) as admin:
        await admin.create_topic("orders", partitions=1)
    async with Producer(agents.bootstrap) as producer:
        await producer.send_and_wait("orders", b"a record")
    first.kill()
    printed = await agents.refused("refused", "ingest-1", "first")
    assert f"{tmp_path}/first: belongs to agent 'ingest-0', this one is 'ingest-1'" in printed
    assert "delete" not in printed, "it holds a record"
    for file in (tmp_path / "first").glob("*.wal"):
        file.unlink()  # as the trimmer does once a segmenter has uploaded what they hold
    assert "belongs to agent 'ingest-0'" in await agents.refused("trimmed", "ingest-1", "first")
