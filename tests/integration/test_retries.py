"""G5 with a real coordinator and two agents in this process: a batch that is retried after a crash is not written
again, even if it is neither registered nor announced and another agent leads by then.

Nothing is registered here unless a test does it: there is no segmenter.
"""

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from shformat import ProducerStamp, Records, encode_batch
from shformat.wal import FRAME_MAGIC
from shproto.errors import DurableTimeout, NotLeader, Unavailable
from shproto.v1 import coordinator_pb2, ingest_pb2, types_pb2
from streamhouse_coordinator.core import tables
from streamhouse_coordinator.ports import Transaction
from streamhouse_coordinator.service import sessions
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService
from streamhouse_coordinator.wiring import build as build_coordinator
from streamhouse_ingest.settings import IngestSettings
from streamhouse_ingest.wiring import IngestService
from streamhouse_ingest.wiring import build as build_ingest

from services.coordinator.tests.declared import declare
from services.ingest.tests.ingest_agents import kill

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

TOPIC = "orders"
STAMPS = [ProducerStamp(7, 0, sequence) for sequence in range(3)]
PATIENCE_S = 30


class HardOfHearing:
    """The coordinator, which misses the announcements."""

    def __init__(self, api: Any) -> None:
        self._api = api

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    async def announce_buffer(self, request: object) -> Any:
        raise Unavailable("lost on the way")


class LosesAnAnswer:
    """The coordinator, whose first answer to OpenSession is lost. `between`: awaited before the call is repeated."""

    def __init__(self, api: Any, between: Callable[[str], Awaitable[None]]) -> None:
        self._api = api
        self._between = between
        self.lost: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    async def open_session(self, request: Any) -> Any:
        opened = await self._api.open_session(request)
        if self.lost is None:
            self.lost = opened.session_id
            await self._between(opened.session_id)
            raise Unavailable("the answer was lost on the way")
        return opened


@asynccontextmanager
async def coordinating(server: Any) -> AsyncIterator[CoordinatorService]:
    """On a database of its own: sessions of killed agents would be given partitions until they expire."""
    database = f"retries_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(server.url)
    await connection.execute(f"CREATE DATABASE {database}")
    try:
        async with _coordinating(urlsplit(server.url)._replace(path=f"/{database}").geturl()) as service:
            yield service
    finally:
        await connection.execute(f"DROP DATABASE {database} WITH (FORCE)")
        await connection.close()


@asynccontextmanager
async def _coordinating(dsn: str) -> AsyncIterator[CoordinatorService]:
    settings = CoordinatorSettings.load(
        {},
        pg_dsn=dsn,
        session_ttl_ms=3_000,
        heartbeat_interval_ms=500,
        session_sweep_interval_ms=500,
        pg_timeout_ms=800,
        pg_transaction_idle_ms=800,
    )
    service = build_coordinator(settings)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def start_agent(
    coordinator: CoordinatorService, directory: Path, name: str, address: str, face: Any = None
) -> IngestService:
    settings = IngestSettings.load({}, wal_dir=str(directory / name), agent_id=name, shutdown_timeout_ms=50)
    service = build_ingest(settings, face or HardOfHearing(coordinator.api))
    await service.start(address)
    return service


async def produce(service: IngestService, stamp: ProducerStamp) -> ingest_pb2.ProduceResponse:
    """At the topic's own ack level, as soon as the agent leads."""
    batch = encode_batch(Records.from_lists([b"value"], timestamps_ms=0), producer=stamp)
    request = ingest_pb2.ProduceRequest(topic=TOPIC, partition=0, batch=batch, timeout_ms=500)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await service.api.produce(request)
            except NotLeader:
                await asyncio.sleep(0.05)


async def register(coordinator: CoordinatorService, topic: coordinator_pb2.TopicInfo, base: int, end: int) -> None:
    """As a segmenter does that has heard of the first epoch's records."""
    segment = types_pb2.SegmentRef(
        segment_id=str(uuid.uuid4()),
        topic_id=topic.topic_id,
        partition=0,
        epoch=1,
        base_offset=base,
        end_offset=end,
        record_count=end - base,
        object_key="data/x",
        size_bytes=100,
        raw_bytes=100,
    )
    await declare(coordinator.api, [segment.object_key])
    request = coordinator_pb2.RegisterSegmentsRequest(buffer_id=str(uuid.uuid4()), segments=[segment])
    results = (await coordinator.api.register_segments(request)).results
    assert list(results) == [coordinator_pb2.REGISTRATION_RESULT_REGISTERED]


async def write_and_hand_over(
    coordinator: CoordinatorService, directory: Path, acks: int, stopped: bool, address: str
) -> IngestService:
    """Returns the agent that leads after another one took the batches, died, came back, and died (or stopped) again."""
    first = await start_agent(coordinator, directory, "agent-1", address)
    for stamp in STAMPS:
        if acks == types_pb2.ACKS_DURABLE:
            with pytest.raises(DurableTimeout):
                await produce(first, stamp)
        else:
            await produce(first, stamp)
    await kill(first)
    again = await start_agent(coordinator, directory, "agent-1", address)
    await (again.stop() if stopped else kill(again))
    return await start_agent(coordinator, directory, "agent-2", address)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("acks", [types_pb2.ACKS_WAL, types_pb2.ACKS_DURABLE])
async def test_another_agent_knows_the_retries_of_what_it_never_saw(
    postgres: Any, tmp_path: Path, acks: int, stopped: bool
) -> None:
    # Somebody answers at the agents' address, so that a killed one is not given up before its lease runs out.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        await check_retries(postgres, tmp_path, acks, stopped, address)


async def check_retries(postgres: Any, directory: Path, acks: int, stopped: bool, address: str) -> None:
    async with coordinating(postgres) as coordinator:
        create = coordinator_pb2.CreateTopicRequest(topic=TOPIC, partitions=1, min_acks=acks)
        topic = await coordinator.api.create_topic(create)
        other = await write_and_hand_over(coordinator, directory, acks, stopped, address)
        try:
            if acks == types_pb2.ACKS_DURABLE:
                with pytest.raises(DurableTimeout):
                    await produce(other, STAMPS[0])
            await register(coordinator, topic, 0, len(STAMPS))
            for offset, stamp in enumerate(STAMPS):
                answer = await produce(other, stamp)
                assert (answer.base_offset, answer.duplicate) == (offset, True)
            assert answer.epoch > 1, "not the epoch that wrote them"
        finally:
            await kill(other)


class Died(Exception):
    """The process did."""


@pytest.mark.parametrize("dies", [False, True], ids=["repeated", "died and started again"])
@pytest.mark.parametrize("expired", [False, True], ids=["in time", "expired"])
async def test_a_retry_of_opening_a_session_over_a_damaged_log_declares_nothing_lost_that_was_never_written(
    postgres: Any, tmp_path: Path, expired: bool, dies: bool
) -> None:
    """G6. The ranges that the first try was granted are not among those whose ends the damage hides: also if the lease
    of that session is over by the time the call is repeated, and if it is another process that repeats it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        async with coordinating(postgres) as coordinator:
            await coordinator.api.create_topic(coordinator_pb2.CreateTopicRequest(topic=TOPIC, partitions=1))
            agent = await start_agent(coordinator, tmp_path, "agent-1", address)
            for stamp in STAMPS:
                await produce(agent, stamp)
            await kill(agent)
            damage_the_last_frame_header(tmp_path / "agent-1")

            async def between(session_id: str) -> None:
                if expired:
                    await sessions.end_session(coordinator.context, session_id, "expired")
                if dies:
                    raise Died

            face = LosesAnAnswer(HardOfHearing(coordinator.api), between)
            if dies:
                with pytest.raises(Died):
                    await start_agent(coordinator, tmp_path, "agent-1", address, face)
            agent = await start_agent(coordinator, tmp_path, "agent-1", address, face)
            try:
                answer = await produce(agent, ProducerStamp(8, 0, 0))
                assert (answer.epoch, answer.base_offset) == ((3 if expired else 2), 2**30)
                assert await possibly_lost(coordinator) == [(1, len(STAMPS) - 1, 2**30)]
            finally:
                await kill(agent)


def damage_the_last_frame_header(directory: Path) -> None:
    (path,) = directory.glob("*.wal")
    content = bytearray(path.read_bytes())
    content[content.rindex(FRAME_MAGIC) + 20] ^= 0x01
    path.write_bytes(content)


async def possibly_lost(coordinator: CoordinatorService) -> list[tuple[int, int, int]]:
    """(epoch, base, end) of every span that is, or waits to be, on record as lost."""

    async def work(tx: Transaction) -> list[tuple[int, int, int]]:
        waiting = await tx.select(tables.LOST_SPANS)
        recorded = [row for row in await tx.select(tables.SEGMENTS) if row.lost_reason]
        return sorted((row.epoch, row.base_offset, row.end_offset) for row in [*waiting, *recorded])

    async with asyncio.timeout(PATIENCE_S):
        while not (found := await coordinator.context.store.run(work)):
            await asyncio.sleep(0.02)
    return found
