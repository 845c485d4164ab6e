"""A PostgreSQL of its own for these tests, and coordinators on it."""

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService, build
from streamhouse_embedded.postgres import EmbeddedPostgres

from services.coordinator.tests import lock_order
from services.coordinator.tests.declared import declare
from services.coordinator.tests.running import running


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """Runs; a test may stop it, and has to start it again."""
    server = EmbeddedPostgres(tmp_path_factory.mktemp("pg") / "data")
    # Some 300 databases are made and dropped, each with checkpoints: on a busy disk a drop waits 2 s for its fsyncs.
    # The tests kill processes, not the machine: what was written survives that without them.
    server._settings |= {"fsync": "off", "full_page_writes": "off"}
    asyncio.run(server.start())
    try:
        yield server
    finally:
        asyncio.run(server.stop())


@pytest.fixture(autouse=True)
def locks_in_order(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test is about: no transaction of it takes its locks in another order than the one written down, and
    PostgreSQL finds no deadlock."""
    violations = lock_order.watch(monkeypatch)
    caplog.set_level(logging.DEBUG, "streamhouse_coordinator.adapters.postgres")
    yield
    assert not violations, f"locks out of order: {sorted(set(violations))}"
    logged = [record.getMessage() for phase in ("setup", "call") for record in caplog.get_records(phase)]
    assert not [line for line in logged if "deadlock detected" in line]


def dsn_of(server: EmbeddedPostgres, database: str) -> str:
    return f"postgresql://postgres@/{database}?host={server.data_dir}&port=5432"


@pytest.fixture
async def new_database(postgres: EmbeddedPostgres) -> AsyncIterator[Callable[[], Awaitable[str]]]:
    """`await new_database()`: the DSN of a fresh database."""
    names: list[str] = []

    async def new() -> str:
        names.append(f"test_{os.urandom(6).hex()}")
        await _execute(postgres, f"CREATE DATABASE {names[-1]}")
        return dsn_of(postgres, names[-1])

    yield new
    for name in names:
        await _execute(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def dsn(new_database: Callable[[], Awaitable[str]]) -> str:
    """A fresh database."""
    return await new_database()


@pytest.fixture
async def tcp_dsn(tmp_path: Path) -> AsyncIterator[str]:
    """The DSN of a server of its own, on TCP and with a password."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = EmbeddedPostgres(tmp_path / "data", port=port)
    yield await server.start()
    await server.stop()


async def _execute(server: EmbeddedPostgres, statement: str) -> None:
    connection = await asyncpg.connect(dsn_of(server, "postgres"))
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the fresh database that has nothing to do with any coordinator."""
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def change_rows(dsn: str) -> AsyncIterator[Callable[..., Awaitable[object]]]:
    """`await change_rows("UPDATE ...", value, ...)`. Leases and claims last for minutes here, whatever the machine has
    to do: a test that needs one to be over says so, and does not wait for it."""
    connection = await asyncpg.connect(dsn)
    yield connection.execute
    await connection.close()


def fast_settings(dsn: str, **changes: object) -> CoordinatorSettings:
    values: dict[str, object] = {
        "pg_dsn": dsn,
        "pg_timeout_ms": 60_000,
        "rpc_timeout_ms": 120_000,
        "pg_transaction_idle_ms": 30_000,
        "session_ttl_ms": 600_000,
        "group_session_timeout_ms": 600_000,
        "heartbeat_interval_ms": 200,
        "session_sweep_interval_ms": 50,
        "range_width_offsets": 1024,
    }
    return CoordinatorSettings.load({}, **(values | changes))


@pytest.fixture
def fast() -> Callable[..., CoordinatorSettings]:
    """`fast(dsn, name=value, ...)`: settings with short intervals."""
    return fast_settings


@pytest.fixture
async def coordinator(dsn: str) -> AsyncIterator[CoordinatorService]:
    async with running(fast_settings(dsn)) as service:
        yield service


@pytest.fixture
async def two_coordinators(dsn: str) -> AsyncIterator[tuple[CoordinatorService, CoordinatorService]]:
    services = build(fast_settings(dsn)), build(fast_settings(dsn))
    await asyncio.gather(*(service.start() for service in services))
    try:
        yield services
    finally:
        for service in services:
            await service.stop()


def segment_ref(
    topic_id: bytes, partition: int, epoch: int, base: int, end: int, **changes: Any
) -> types_pb2.SegmentRef:
    values = {
        "segment_id": str(uuid.uuid4()),
        "record_count": end - base,
        "object_key": f"data/{uuid.uuid4()}",
        "size_bytes": 100,
        "raw_bytes": 200,
    }
    return types_pb2.SegmentRef(
        topic_id=topic_id, partition=partition, epoch=epoch, base_offset=base, end_offset=end, **(values | changes)
    )


class Agent:
    """An ingest agent and its segmenter, as far as the coordinator sees them."""

    def __init__(self, api: CoordinatorApi, name: str, address: str) -> None:
        self.api, self.name, self.address, self.wal_id = api, name, address, uuid.uuid4().bytes
        self.session = pb.OpenSessionResponse()

    async def open(self, ends: Mapping[tuple[bytes, int, int], int] | None = None, **doubts: bool) -> "Agent":
        wal_ends = [
            pb.WalEnd(topic_id=topic_id, partition=partition, epoch=epoch, end_offset=end)
            for (topic_id, partition, epoch), end in (ends or {}).items()
        ]
        self.session = await self.api.open_session(
            pb.OpenSessionRequest(
                agent_id=self.name, role="ingest", address=self.address, wal_id=self.wal_id, wal_ends=wal_ends, **doubts
            )
        )
        return self

    async def grants(self) -> list[pb.RangeGrant]:
        answer = await self.api.get_grants(pb.GetGrantsRequest(session_token=self.session.session_token))
        return list(answer.grants)

    async def leads(self) -> dict[int, pb.RangeGrant]:
        """Open ranges by partition."""
        return {grant.partition: grant for grant in await self.grants() if grant.status in ("open", "moving")}

    async def heartbeat(self, *low: pb.RangeUse) -> pb.HeartbeatResponse:
        return await self.api.heartbeat(pb.HeartbeatRequest(session_token=self.session.session_token, low_ranges=low))

    async def announce(self, *spans: tuple[pb.RangeGrant, int, int], snapshot: bytes = b"") -> str:
        buffer_id = str(uuid.uuid4())
        slices = [
            pb.BufferSlice(
                topic_id=grant.topic_id,
                topic=grant.topic,
                partition=grant.partition,
                epoch=grant.epoch,
                base_offset=base,
                end_offset=end,
                record_count=end - base,
                size_bytes=10,
                producer_snapshot=snapshot,
            )
            for grant, base, end in spans
        ]
        await self.api.announce_buffer(
            pb.AnnounceBufferRequest(session_token=self.session.session_token, buffer_id=buffer_id, slices=slices)
        )
        return buffer_id

    async def write(self, grant: pb.RangeGrant, base: int, end: int, snapshot: bytes = b"", **changes: Any) -> int:
        """Seals, claims, uploads and registers one span; returns the result."""
        buffer_id = await self.announce((grant, base, end), snapshot=snapshot)
        ref = segment_ref(grant.topic_id, grant.partition, grant.epoch, base, end, **changes)
        await declare(self.api, [ref.object_key])
        request = pb.RegisterSegmentsRequest(buffer_id=buffer_id, segments=[ref])
        return (await self.api.register_segments(request)).results[0]

    async def settle(self, *ends: tuple[pb.RangeGrant, int]) -> None:
        wal_ends = [
            pb.WalEnd(topic_id=grant.topic_id, partition=grant.partition, epoch=grant.epoch, end_offset=end)
            for grant, end in ends
        ]
        await self.api.settle_ranges(pb.SettleRangesRequest(session_token=self.session.session_token, ends=wal_ends))

    async def close(self) -> None:
        await self.api.close_session(pb.CloseSessionRequest(session_token=self.session.session_token))


@pytest.fixture
def open_agent() -> Callable[..., Awaitable[Agent]]:
    """`await open_agent(api, name)`: a new agent with its session."""

    async def open_agent(api: CoordinatorApi, name: str, address: str = "127.0.0.1:1") -> Agent:
        return await Agent(api, name, address).open()

    return open_agent


@pytest.fixture
def make_segment() -> Callable[..., types_pb2.SegmentRef]:
    return segment_ref


async def events_of(api: CoordinatorApi, *types: str) -> list[pb.Event]:
    """All events so far."""
    last = (await api.get_head(pb.GetHeadRequest())).events_position
    found: list[pb.Event] = []
    async for event in api.follow_events(pb.FollowEventsRequest(after_position=0)):
        if not types or event.type in types:
            found.append(event)
        if event.position == last:
            break
    return found


@pytest.fixture
def all_events() -> Callable[..., Awaitable[list[pb.Event]]]:
    return events_of
