"""Builds an object from announced slices: pulls the batches from the agent and builds the segments back to back.

CPU work runs in threads. Batches that do not match their announcement exactly are refused: see core/plan.py.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from shformat import BuiltSegment, SegmentBuilder
from shproto.errors import Unavailable
from shproto.services import IngestApi
from shproto.v1 import coordinator_pb2, ingest_pb2, types_pb2

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.core.keys import object_key
from streamhouse_segmenter.core.plan import BufferSlice, SliceProgress, describe
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.settings import SegmenterSettings

ItemT = TypeVar("ItemT")


class BuildTooLarge(Exception):
    """The agent sends more than a build may hold (segment_build_bytes_max)."""


@dataclass(slots=True, kw_only=True)
class BuiltObject:
    """An object ready to be put: its bytes in order, and the position of each segment."""

    key: str
    parts: list[bytes] = field(default_factory=list)
    segments: list[types_pb2.SegmentRef] = field(default_factory=list)
    size_bytes: int = 0

    def append(self, topic: str, segment_id: str, built: BuiltSegment) -> None:
        """Appends a segment to the object, at the present end of its bytes."""
        info = built.info
        self.segments.append(
            types_pb2.SegmentRef(
                segment_id=segment_id,
                topic_id=info.topic_id,
                topic=topic,
                partition=info.partition,
                epoch=info.epoch,
                base_offset=info.base_offset,
                end_offset=info.end_offset,
                record_count=info.record_count,
                object_key=self.key,
                object_at=self.size_bytes,
                size_bytes=info.size_bytes,
                raw_bytes=info.raw_bytes,
                first_timestamp_ms=info.first_timestamp_ms,
                max_timestamp_ms=info.max_timestamp_ms,
            )
        )
        self.parts += built.parts
        self.size_bytes += info.size_bytes


class ObjectBuilder:
    """Builds the objects of a claimed buffer."""

    def __init__(self, ports: Ports, settings: SegmenterSettings, claim: coordinator_pb2.ClaimBufferResponse) -> None:
        self._ports = ports
        self._settings = settings
        self._claim = claim

    def new_key(self, slices: Sequence[BufferSlice]) -> str:
        """Returns a new key for the object of these slices; no key is returned twice."""
        day = datetime.fromtimestamp(self._ports.clock.wall_ms() / 1000, UTC).date().isoformat()
        return object_key(slices, day, self._ports.new_uuid().hex)

    async def build(self, key: str, slices: Sequence[BufferSlice]) -> BuiltObject:
        """Returns the object of these slices.

        Raises SliceMismatch, FormatError (a damaged batch), BuildTooLarge, and StreamHouseError from the agent.
        """
        target = BuiltObject(key=key)
        agent = self._ports.ingest_at(self._claim.address)
        for slice_ in slices:
            room_bytes = self._settings.segment_build_bytes_max - target.size_bytes
            # Notes whether the agent answers: a leader that several workers cannot reach loses its partitions (decision
            # 0012).
            with self._ports.agents.calling(self._claim.agent_id, self._claim.address):
                built = await self._build_segment(agent, slice_, room_bytes)
            target.append(slice_.topic, str(self._ports.new_uuid()), built)
        return target

    async def _build_segment(self, agent: IngestApi, slice_: BufferSlice, room_bytes: int) -> BuiltSegment:
        builder = SegmentBuilder(
            slice_.topic_id,
            slice_.partition,
            slice_.epoch,
            block_bytes_target=self._settings.block_bytes_target,
        )
        progress = SliceProgress.of(slice_)
        responses = agent.pull_slice(
            ingest_pb2.PullSliceRequest(
                buffer_id=self._claim.buffer_id,
                topic_id=slice_.topic_id,
                partition=slice_.partition,
                epoch=slice_.epoch,
                base_offset=slice_.base_offset,
                end_offset=slice_.end_offset,
            )
        )
        async for response in each_within(responses, self._settings.rpc_timeout_ms, self._claim.address):
            received_bytes = sum(map(len, response.batches))
            # Before the builder takes them: the announced size is the word of another process.
            if builder.size_bytes + received_bytes > room_bytes:
                limit = self._settings.segment_build_bytes_max
                raise BuildTooLarge(f"{describe(slice_)}: more than segment_build_bytes_max = {limit} bytes")
            telemetry.pulled_bytes.add(received_bytes)
            # In a thread, since CRC and compression of a batch would keep the loop from renewing claims.
            await asyncio.to_thread(_add, builder, progress, response.batches)
        progress.finish()
        return await asyncio.to_thread(builder.finish)


def _add(builder: SegmentBuilder, progress: SliceProgress, batches: Sequence[bytes]) -> None:
    # The builder checks length and CRC of every batch before it takes it.
    progress.take(builder.add(batch) for batch in batches)


async def each_within(items: AsyncIterator[ItemT], timeout_ms: int, address: str) -> AsyncIterator[ItemT]:
    """Yields the items of a stream from `address`; raises Unavailable if the next item takes longer than
    `timeout_ms`."""
    try:
        while True:
            try:
                # For each item: a large slice may take long as a whole, and a silent agent shows between two items.
                async with asyncio.timeout(timeout_ms / 1000):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise Unavailable(f"no answer from {address} within {timeout_ms} ms", address=address) from error
            yield item
    finally:
        # Ends the call at the agent, too, which would go on sending to a reader that is gone.
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()
