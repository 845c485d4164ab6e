"""A platform for ingest agents: what they have announced, ends of their sessions, and a segmenter that drains them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_ingest.wiring import IngestService
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_segmenter.wiring import build

from tests.platform.coordinator_peer import CoordinatorPeer, feeding
from tests.platform.platform import Platform


class World(Platform):
    """`coordinator`: as the agent reaches it."""

    def __init__(self, *, heartbeat_ms: int = 10_000) -> None:
        super().__init__(heartbeat_interval_ms=heartbeat_ms)
        self.coordinator: CoordinatorPeer = CoordinatorPeer(self.service.api)

    @property
    def buffers(self) -> dict[str, pb.AnnounceBufferRequest]:
        """The announced buffers that are not registered in full, by id."""
        waiting = {row.buffer_id for row in self.rows(t.BUFFERS)}
        announced = self.coordinator.requests["announce_buffer"]
        return {request.buffer_id: request for request in announced if request.buffer_id in waiting}

    async def expire_all(self) -> None:
        """Ends the sessions of all agents; their open ranges are orphaned."""
        for row in self.rows(t.SESSIONS):
            if row.role == INGEST:
                await self.expire_session(row.session_id)

    def allocate_producer_ids_from(self, producer_id: int) -> None:
        """Makes ids below of another history than this one, as a restore does."""
        histories = self.metadata.tables[t.HISTORIES.name]
        histories.update({key: replace(row, producer_ids_from=producer_id) for key, row in histories.items()})


@asynccontextmanager
async def new_world(heartbeat_ms: int = 10_000) -> AsyncIterator[World]:
    world = World(heartbeat_ms=heartbeat_ms)
    async with feeding(world):
        yield world


@asynccontextmanager
async def segmenting(world: World, service: IngestService) -> AsyncIterator[None]:
    """Runs a segmenter that pulls from this agent while the block runs."""
    settings = SegmenterSettings(worker_id="segmenter", scan_interval_ms=50)
    segmenter = build(settings, world.service.api, world.objects, lambda address: service.api)
    await segmenter.start("127.0.0.1:2")
    try:
        yield
    finally:
        await segmenter.stop()
