"""A platform for ingest agents: what they have announced, ends of their sessions, and a segmenter that drains them."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from shproto import events as ev
from shproto.keys import RangeKey
from shproto.model import Segment
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put
from streamhouse_coordinator.core.registration import Result
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.ports import Transaction
from streamhouse_coordinator.service import buffers
from streamhouse_ingest.log.producers import decode_snapshot
from streamhouse_ingest.wiring import IngestService
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_segmenter.wiring import build

from tests.platform.coordinator_peer import CoordinatorPeer, feeding
from tests.platform.platform import Platform, stored_records


class World(Platform):
    """`coordinator`: as the agent reaches it."""

    def __init__(self, *, heartbeat_ms: int = 10_000, **settings: Any) -> None:
        super().__init__(heartbeat_interval_ms=heartbeat_ms, **settings)
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

    async def lose(self, key: RangeKey, topic: str = "orders") -> None:
        """Declares an orphaned range lost, as an operator does."""
        request = pb.DeclareLostRequest(topic=topic, partition=key.partition, epochs=[key.epoch], reason="test")
        await self.service.api.declare_lost(request)

    def lost(self, key: RangeKey) -> list[tuple[int, int]]:
        """Returns the spans that were reported lost, registered by now or not."""
        waiting = [row for row in self.rows(t.LOST_SPANS) if row.range_key == self.range(key).key]
        registered = [row for row in self.rows(t.SEGMENTS) if row.lost_reason and _range_of(row) == self.range(key).key]
        return sorted((row.base_offset, row.end_offset) for row in [*waiting, *registered])

    def segments_of(self, key: RangeKey) -> list[types_pb2.SegmentRef]:
        """Returns the registered segments that have an object, by offset."""
        of_partition = self.of_partition(key.topic_id, key.partition)
        return [segment for segment in of_partition if segment.epoch == key.epoch and not segment.lost_reason]

    async def stored(self, key: RangeKey) -> list[tuple[int, bytes | None]]:
        """Returns (offset, value) of all records of the registered segments."""
        return [item for segment in self.segments_of(key) for item in await stored_records(self.objects, segment)]

    def producers(self, key: RangeKey, end_offset: int) -> set[int]:
        """Returns the ids of the producers that are known at this end of a range."""
        (row,) = (
            row
            for row in self.rows(t.PRODUCER_SNAPSHOTS)
            if (row.topic_id, row.partition, row.epoch, row.end_offset) == (*self.range(key).key, end_offset)
        )
        return set(decode_snapshot(row.snapshot))

    async def register(self, key: RangeKey, base_offset: int, end_offset: int, snapshot: bytes = b"") -> bool:
        """Offers a segment of these offsets, without an object; returns True if it is registered. `snapshot`: of the
        producers at its end, as its announcement brought it."""
        if snapshot:
            await self.keep_snapshot(key, end_offset, snapshot)
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

    async def complete(self, buffer_id: str) -> None:
        """Completes a buffer of which nothing more is to be registered."""

        async def work(tx: Transaction) -> None:
            await tx.append([ev.BufferCompleted(buffer_id, "")])
            await tx.apply(buffers.done_with([buffer_id]))

        await self.service.context.store.run(work)

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

    async def keep_snapshot(self, key: RangeKey, end_offset: int, snapshot: bytes) -> None:
        """Keeps this state of producers at an offset of a range."""
        row = t.ProducerSnapshotRow(
            topic_id=key.topic_id.hex(),
            partition=key.partition,
            epoch=key.epoch,
            end_offset=end_offset,
            snapshot=snapshot,
        )
        await self.service.context.store.run(lambda tx: tx.apply([Put(t.PRODUCER_SNAPSHOTS, row)]))

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


def _range_of(segment: t.SegmentRow) -> t.RangeRowKey:
    return segment.topic_id, segment.partition, segment.epoch


@asynccontextmanager
async def new_world(**settings: Any) -> AsyncIterator[World]:
    world = World(**settings)
    async with feeding(world):
        yield world


@asynccontextmanager
async def segmenting(world: World, service: IngestService) -> AsyncIterator[None]:
    """Runs a segmenter that pulls from this agent while the block runs."""
    settings = SegmenterSettings(
        worker_id="segmenter", scan_interval_ms=50, handover_retry_first_ms=20, early_retry_first_ms=5
    )
    segmenter = build(settings, world.service.api, world.objects, lambda address: service.api)
    await segmenter.start("127.0.0.1:2")
    try:
        yield
    finally:
        await segmenter.stop()
