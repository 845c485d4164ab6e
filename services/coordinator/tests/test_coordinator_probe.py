"""A killed agent's partitions go to others at once, also where the first look at it decides nothing; a live agent's
log is not taken from it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

import pytest
from shproto.errors import Unavailable
from shproto.events import SessionOpened
from shproto.v1 import ingest_pb2
from shruntime.clock import SystemClock
from shruntime.tasks import Tasks
from streamhouse_coordinator.adapters.memory import MemoryMetadataStore
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.sessions import INGEST, SEGMENTER, WalEnds
from streamhouse_coordinator.ports import Transaction, where
from streamhouse_coordinator.probe import Probe
from streamhouse_coordinator.service import sessions
from streamhouse_coordinator.service.common import CLUSTER_LOCK, Context
from streamhouse_coordinator.settings import CoordinatorSettings

ResultT = TypeVar("ResultT")
SESSION = "11111111-1111-1111-1111-111111111111"


class BusyStore(MemoryMetadataStore):
    """Refuses the next `refusals` transactions that change who leads."""

    refusals = 0

    async def run(self, work: Callable[[Transaction], Awaitable[ResultT]], *, lock: str = "") -> ResultT:
        if lock == CLUSTER_LOCK and self.refusals:
            self.refusals -= 1
            raise Unavailable("PostgreSQL takes longer than pg_timeout_ms")
        return await super().run(work, lock=lock)


class Machine:
    """Where the agent listens until `stop`; `accepted` tells of every look at it."""

    def __init__(self) -> None:
        self.accepted = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def listen(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.set()
        writer.close()

    def stop(self) -> None:
        assert self._server is not None
        self._server.close()


async def unreachable(address: str) -> ingest_pb2.DescribeAgentResponse:
    raise Unavailable(f"nothing at {address}")


@asynccontextmanager
async def probing(store: BusyStore, address: str) -> AsyncIterator[Probe]:
    """A session of an agent at `address`, and the probe of its coordinator."""
    context = Context(store=store, settings=CoordinatorSettings.load({}, pg_dsn="postgresql://nowhere/none"))
    opened = SessionOpened(
        session_id=SESSION, agent_id="a", role=INGEST, address=address, wal_id="22" * 16, started_ms=0
    )
    await sessions.open_session(context, opened, WalEnds())
    tasks = Tasks()
    try:
        yield Probe(context, tasks, unreachable)
    finally:
        await tasks.stop()
    assert tasks.error is None


async def ended(store: BusyStore) -> None:
    async with asyncio.timeout(30):
        while await store.run(lambda tx: tx.select(t.SESSIONS, where(session_id=SESSION))):
            await asyncio.sleep(0.01)


async def test_an_agent_that_still_listens_when_its_stream_breaks_is_looked_at_again() -> None:
    """The kernel closes the sockets of a killed process one after the other."""
    store, machine = BusyStore(SystemClock()), Machine()
    async with probing(store, await machine.listen()) as probe:
        probe.follower_gone(SESSION)
        await machine.accepted.wait()
        machine.stop()
        await ended(store)


@pytest.mark.parametrize("refusals", [1, 3])
async def test_a_takeover_that_the_database_refuses_is_tried_again(refusals: int) -> None:
    store, machine = BusyStore(SystemClock()), Machine()
    async with probing(store, await machine.listen()) as probe:
        machine.stop()
        store.refusals = refusals
        probe.follower_gone(SESSION)
        await ended(store)
        assert store.refusals == 0


async def test_an_agent_that_listens_keeps_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamhouse_coordinator.probe.LOOK_AGAIN_MS", (1, 1))
    store, machine = BusyStore(SystemClock()), Machine()
    async with probing(store, await machine.listen()) as probe:
        probe.follower_gone(SESSION)
        async with asyncio.timeout(30):
            while probe._running:
                await asyncio.sleep(0.01)
        assert await store.run(lambda tx: tx.select(t.SESSIONS, where(session_id=SESSION)))
        machine.stop()
        probe.follower_gone(SESSION)
        await ended(store)


def describing(answer: str | BaseException, timeout_ms: int = 10) -> Probe:
    """A probe whose agents answer with this session, or not at all."""

    async def describe(address: str) -> ingest_pb2.DescribeAgentResponse:
        if isinstance(answer, BaseException):
            raise answer
        if not answer:
            await asyncio.sleep(3600)
        return ingest_pb2.DescribeAgentResponse(session_id=answer)

    settings = CoordinatorSettings.load(
        {}, pg_dsn="postgresql://nowhere/none", probe_timeout_ms=timeout_ms, rpc_timeout_ms=60_000
    )
    return Probe(Context(store=BusyStore(SystemClock()), settings=settings), Tasks(), describe)


@pytest.mark.parametrize(
    ("answer", "held"),
    [
        (SESSION, True),
        ("22222222-2222-2222-2222-222222222222", False),
        ("", False),
        (Unavailable("the agent is starting: its log is being replayed"), False),
        (Unavailable("UNAVAILABLE: connection refused"), False),
    ],
)
async def test_an_agent_holds_its_session_only_if_it_says_so(answer: str | BaseException, held: bool) -> None:
    """The same address may be the process that is being started; the same log a copy."""
    session = t.SessionRow(session_id=SESSION, agent_id="a", role=INGEST, address="h:1", wal_id="w", started_ms=0)
    assert await describing(answer).holds(session) is held


async def test_a_worker_holds_its_session_while_it_listens() -> None:
    machine = Machine()
    session = t.SessionRow(
        session_id=SESSION, agent_id="w", role=SEGMENTER, address=await machine.listen(), wal_id="", started_ms=0
    )
    probe = describing(AssertionError("workers are not asked"), timeout_ms=30_000)
    try:
        assert await probe.holds(session)
    finally:
        machine.stop()
    assert not await probe.holds(session)
    assert not await probe.holds(replace(session, address="no address"))
