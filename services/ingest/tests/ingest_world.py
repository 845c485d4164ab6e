"""A platform for ingest agents: what they have announced, ends of their sessions, and a segmenter that drains them."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from shproto import events as ev
from shproto.keys import RangeKey
from shproto.model import Segment
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put
from streamhouse_coordinator.core.registration import Result
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.service import buffers
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

    def range(self, key: RangeKey) -> t.RangeRow:
        row: t.RangeRow = self.metadata.tables[t.RANGES.name][key.topic_id.hex(), key.partition, key.epoch]
        return row

    async def settle(self, key: RangeKey, end_offset: int) -> None:
        await self.commit(
            ev.RangeSettled(
                topic_id=key.topic_id.hex(), partition=key.partition, epoch=key.epoch, end_offset=end_offset
            )
        )

    async def register(self, key: RangeKey, base_offset: int, end_offset: int) -> bool:
        """Offers a segment of these offsets, without an object; returns True if it is registered."""
        segment = Segment(
            segment_id=str(uuid.uuid4()), topic_id=key.topic_id.hex(), topic="", partition=key.partition,
            epoch=key.epoch, base_offset=base_offset, end_offset=end_offset, record_count=end_offset - base_offset,
            object_key=str(uuid.uuid4()), object_at=0, size_bytes=1, raw_bytes=1, first_timestamp_ms=0,
            max_timestamp_ms=0,
        )  # fmt: skip
        declared = t.UploadIntentRow(
            object_key=segment.object_key, claim_id="", buffer_id="", worker_id="", declared_ms=self.clock.wall_ms()
        )
        await self.service.context.store.run(lambda tx: tx.apply([Put(t.UPLOAD_INTENTS, declared)]))
        return await buffers.register(self.service.context, "", [segment], "") == [Result.REGISTERED]

    async def move(self, key: RangeKey) -> None:
        """Asks the leader to hand the partition over."""
        row = self.range(key)
        await self.commit(
            ev.MoveRequested(
                topic_id=row.topic_id,
                topic="",
                partition=row.partition,
                epoch=row.epoch,
                session_id=row.session_id,
                agent_id=row.agent_id,
            )
        )

    async def cut_off(self, key: RangeKey) -> None:
        """Asks the leader to hand the partition over at once: its workers cannot reach it."""
        row = self.range(key)
        await self.commit(
            ev.AgentCutOff(
                agent_id=row.agent_id, session_id=row.session_id, reporters=("s1", "s2"), since_ms=0, times=1
            )
        )
        await self.move(key)

    async def keep_snapshots(self, snapshot: bytes) -> None:
        """Keeps this state of producers at the beginning of every range."""
        rows = [
            t.ProducerSnapshotRow(
                topic_id=row.topic_id,
                partition=row.partition,
                epoch=row.epoch,
                end_offset=row.start_offset,
                snapshot=snapshot,
            )
            for row in self.rows(t.RANGES)
        ]
        await self.service.context.store.run(lambda tx: tx.apply([Put(t.PRODUCER_SNAPSHOTS, row) for row in rows]))

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
