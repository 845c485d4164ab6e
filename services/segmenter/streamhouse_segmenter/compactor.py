"""Rewrites runs of small segments of a partition as one: fewer requests to read, fewer rows to keep.

Records, offsets and epochs stay the same; the replaced objects become orphans, which the sweep removes once readers
have had time to notice.

Owns: the flag that no further claim is wanted. Does not own: the choice of segments and the registration (the
coordinator), the claim's renewal (claims.py), the deletion of replaced objects (sweeper.py).
Invariants: the merged object is declared before it is uploaded, and registered only after its upload. Each block is
checked against its index entry before it is copied. After `close` no claim is requested.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from shformat import (
    BlockEntry,
    BuiltSegment,
    FormatError,
    SegmentBuilder,
    check_block,
    open_segment,
    run_plan_async,
)
from shproto.errors import Fenced, StreamHouseError
from shproto.v1 import coordinator_pb2, types_pb2
from shruntime.tasks import Backoff, cancel_and_wait, retry
from shstore import REFUSALS, StoreError

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.builder import BuiltObject
from streamhouse_segmenter.claims import ClaimLost, declare_uploads, hold_claim, release_claim
from streamhouse_segmenter.core.compaction import CompactionRefused, check_mergeable, check_merged, check_source
from streamhouse_segmenter.core.keys import data_key
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.settings import SegmenterSettings

log = logging.getLogger(__name__)
# Bytes of blocks per read: S3 reaches its throughput at this size, and it bounds the memory of a read.
READ_BYTES_MAX = 8 * 1024 * 1024
PartT = TypeVar("PartT", types_pb2.SegmentRef, BlockEntry)

# Small segments read at once: a partition with durable acks leaves some 600 a minute, of some 20 ms each.
READS_AT_ONCE = 16


class Compactor:
    """`run` may be called in any number of processes: claims keep them apart."""

    def __init__(
        self, ports: Ports, settings: SegmenterSettings, worker_id: str, may_claim: Callable[[], bool]
    ) -> None:
        self._ports = ports
        self._settings = settings
        self._worker_id = worker_id
        self._may_claim = may_claim
        self._closing = False

    def close(self) -> None:
        """Claims nothing more."""
        self._closing = True

    async def run(self) -> int:
        """Merges until nothing is worth merging or a merge fails; returns the number of replaced segments.

        Raises StreamHouseError if the coordinator does not answer.
        """
        replaced = 0
        while not self._closing and self._may_claim():
            claim = await self._ports.coordinator.claim_compaction(self._request())
            if not claim.found:
                break
            merged = await self._compact(claim)
            # Most failures, as of the store, would meet the next claim as well; the next run looks again.
            if not merged:
                break
            replaced += merged
        return replaced

    def _request(self) -> coordinator_pb2.ClaimCompactionRequest:
        return coordinator_pb2.ClaimCompactionRequest(
            worker_id=self._worker_id,
            claim_ttl_ms=self._settings.claim_ttl_ms,
            # At most half the target, so that a segment that is nearly full is not merged again and again.
            small_bytes_max=min(self._settings.compaction_small_bytes_max, self._settings.merged_bytes_max // 2),
            target_bytes=self._settings.merged_bytes_max,
            segments_min=self._settings.compaction_segments_min,
        )

    async def _compact(self, claim: coordinator_pb2.ClaimCompactionResponse) -> int:
        """Merges the segments of a claim; returns their number, or 0 after a failure, with the claim given back."""
        registering = asyncio.Event()
        work = self._work(claim, registering)
        try:
            return await hold_claim(self._ports, claim.claim_id, self._settings.claim_ttl_ms, work, registering.is_set)
        except (ClaimLost, Fenced) as error:
            log.warning("compaction: %s", error)
        except (StoreError, StreamHouseError, FormatError, CompactionRefused) as error:
            needs_operator = isinstance(error, (FormatError, CompactionRefused, *REFUSALS))
            level = logging.ERROR if needs_operator else logging.WARNING
            log.log(level, "compaction given back: %s", error)
            telemetry.failures.add(1, {"reason": "compaction"})
            # The same segments would be claimed again at once, and fail in the same way.
            retry_ms = self._settings.compaction_interval_ms
            await release_claim(self._ports, claim.claim_id, reason=str(error), retry_after_ms=retry_ms)
        return 0

    async def _work(self, claim: coordinator_pb2.ClaimCompactionResponse, registering: asyncio.Event) -> int:
        check_mergeable(claim.segments, self._settings.segment_build_bytes_max)
        built = await self._merge(claim.segments)
        check_merged(claim.segments, built.info)
        first = claim.segments[0]
        key = data_key(
            first.topic,
            first.topic_id,
            first.partition,
            first.base_offset,
            built.info.epoch,
            self._ports.new_uuid().hex,
        )
        target = BuiltObject(key=key)
        target.append(first.topic, str(self._ports.new_uuid()), built)
        await declare_uploads(self._ports, self._settings, claim.claim_id, [key])
        await self._ports.store.put(target.key, target.parts)
        telemetry.uploaded_bytes.add(target.size_bytes)
        # Before the call: from now on the registration itself may have ended a claim that cannot be renewed.
        registering.set()
        replaced = await self._register(claim, target.segments[0])
        await release_claim(self._ports, claim.claim_id)
        return replaced

    async def _merge(self, segments: Sequence[types_pb2.SegmentRef]) -> BuiltSegment:
        # The last epoch: no block may have a higher one than its segment. Blocks keep their own epochs.
        last = segments[-1]
        builder = SegmentBuilder(
            last.topic_id, last.partition, last.epoch, block_bytes_target=self._settings.block_bytes_target
        )
        for together in _read_together(segments, READS_AT_ONCE):
            bodies = await self._read_whole(together) if together[0].size_bytes <= READ_BYTES_MAX else [None]
            for segment, body in zip(together, bodies, strict=True):
                await self._copy(segment, body, builder)
        return await asyncio.to_thread(builder.finish)

    async def _read_whole(self, segments: Sequence[types_pb2.SegmentRef]) -> list[bytes]:
        """Returns the bytes of small segments, read concurrently: each needs a single short request, not three in
        turn."""
        reads = [
            asyncio.create_task(
                self._ports.store.get(item.object_key, at=item.object_at, size_bytes=item.size_bytes),
                name=f"read {item.object_key}",
            )
            for item in segments
        ]
        try:
            return await asyncio.gather(*reads)
        finally:
            await cancel_and_wait(*reads)

    async def _copy(self, segment: types_pb2.SegmentRef, whole: bytes | None, builder: SegmentBuilder) -> None:
        """Adds every block of a registered segment, each checked against its index entry. `whole`: the segment's
        bytes, or None to read them piece by piece."""

        async def read(at: int, size_bytes: int) -> bytes:
            if whole is not None:
                return whole[at : at + size_bytes]
            return await self._ports.store.get(segment.object_key, at=segment.object_at + at, size_bytes=size_bytes)

        header, index = await run_plan_async(open_segment(segment.size_bytes), read)
        # Before a byte is copied: the object may hold another segment than the registered.
        check_source(segment, header)
        for blocks in _read_together(index, len(index)):
            body = await read(blocks[0].at, blocks[-1].at + blocks[-1].size_bytes - blocks[0].at)
            await asyncio.to_thread(_add_blocks, builder, blocks, body)

    async def _register(self, claim: coordinator_pb2.ClaimCompactionResponse, segment: types_pb2.SegmentRef) -> int:
        request = coordinator_pb2.RegisterCompactionRequest(
            claim_id=claim.claim_id,
            replaced_segment_ids=[replaced.segment_id for replaced in claim.segments],
            segment=segment,
        )
        backoff = Backoff(self._settings.handover_retry_first_ms, self._settings.handover_retry_max_ms, self._ports.rng)

        def is_final(error: StreamHouseError) -> bool:
            if error.retriable:
                log.warning("compaction: registration to be repeated: %s", error)
            return not error.retriable

        # Repeated with the same segment id: if the first try has committed, the answer is REGISTERED again.
        response = await retry(
            lambda: self._ports.coordinator.register_compaction(request),
            backoff,
            is_final,
            self._ports.clock.sleep_ms,
        )
        if response.result != coordinator_pb2.REGISTRATION_RESULT_REGISTERED:
            result = coordinator_pb2.RegistrationResult.Name(response.result)
            log.info("compaction of %d segments came too late (%s), dropped", len(claim.segments), result)
            return 0
        telemetry.compacted_segments.add(len(claim.segments))
        return len(claim.segments)


def _read_together(items: Iterable[PartT], count_max: int) -> Iterator[list[PartT]]:
    """Yields segments, or blocks of a segment, in order: as many together as READ_BYTES_MAX and `count_max` allow,
    at least 1."""
    run: list[PartT] = []
    size_bytes = 0
    for item in items:
        if run and (size_bytes + item.size_bytes > READ_BYTES_MAX or len(run) == count_max):
            yield run
            run, size_bytes = [], 0
        run.append(item)
        size_bytes += item.size_bytes
    if run:
        yield run


def _add_blocks(builder: SegmentBuilder, blocks: Sequence[BlockEntry], body: bytes) -> None:
    view = memoryview(body)
    for block in blocks:
        start = block.at - blocks[0].at
        batch = view[start : start + block.size_bytes]
        check_block(batch, block)
        builder.add(batch)
