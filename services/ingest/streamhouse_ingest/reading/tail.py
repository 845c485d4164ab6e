"""Serves reads of held logs: the acknowledged tail for query services, slices of sealed buffers for segmenters.

Owns: the limits of an answer in bytes and time. Does not own: the logs and their memory (log/logs.py), the files, the
removal of damaged batches (corrupt_batches.py).
Invariants: an answer has whole, consecutive batches. Damaged offsets are never skipped in silence: a read that begins
in them, or a slice that contains them, ends with an error. The log is looked up again after each wait, because its
batches may be registered and dropped meanwhile.
"""

import asyncio
from collections.abc import AsyncIterator

from shproto.errors import DataLoss, Fenced, Overloaded, StreamHouseError
from shproto.keys import RangeKey
from shproto.v1 import ingest_pb2 as pb
from shruntime.clock import Clock
from shruntime.tasks import done_within

from streamhouse_ingest.log.logs import HeldLog, Logs
from streamhouse_ingest.log.partition_log import PartitionLog
from streamhouse_ingest.ports import SCARCE, BatchReader, WalDamaged, WalFileGone
from streamhouse_ingest.reading.corrupt_batches import CorruptBatches

# gRPC moves messages of 1 MiB at 1-2 GB/s, smaller messages slower; larger messages only cost memory.
SLICE_MESSAGE_BYTES = 1024 * 1024
SCARCE_RETRY_MS = 1_000  # connections that hold the descriptors end by themselves, silent connections within 10 s


class TailReader:
    """Reads batches from memory, and from the files of the log if memory does not have them any more."""

    def __init__(
        self,
        logs: Logs,
        reader: BatchReader,
        corrupt_batches: CorruptBatches,
        clock: Clock,
        *,
        bytes_max: int,
        wait_ms_max: int,
    ) -> None:
        self._logs = logs
        self._reader = reader
        self._corrupt_batches = corrupt_batches
        self._clock = clock
        self._bytes_max = bytes_max
        self._wait_ms_max = wait_ms_max

    async def read_tail(self, request: pb.ReadTailRequest) -> pb.ReadTailResponse:
        """Returns whole batches from the batch that holds `offset`, or `not_held`; waits up to `max_wait_ms` for the
        next append at the end of the log.

        Raises DataLoss if `offset` lies in a damaged span, Overloaded without a file descriptor.
        """
        deadline_ms = self._clock.monotonic_ms() + min(request.max_wait_ms, self._wait_ms_max)
        held = self._find(request.topic_id, request.partition, request.offset)
        if held is None:
            return pb.ReadTailResponse(not_held=True)
        if request.offset == held.log.next_offset:
            await self._wait_for_more(held, request.offset, deadline_ms)
            held = self._find(request.topic_id, request.partition, request.offset)
            if held is None:
                return pb.ReadTailResponse(not_held=True)
        log = held.log
        bytes_max = min(request.max_bytes or self._bytes_max, self._bytes_max)
        response = pb.ReadTailResponse(high_watermark=log.next_offset, tail_start_offset=log.held_from)
        try:
            batches, next_offset = await self._read(held, request.offset, log.next_offset, bytes_max)
        except WalFileGone:  # registered and trimmed before the read: an empty answer makes the query plan anew
            return pb.ReadTailResponse(high_watermark=log.next_offset, tail_start_offset=log.next_offset)
        if not batches and (gap := log.gap_at(request.offset)) is not None:
            raise _lost(log, gap.base_offset, gap.end_offset, "these records were damaged in the write-ahead log")
        response.batches.extend(batches)
        response.trace_contexts.extend(held.traces_of(request.offset, next_offset))
        return response

    def _find(self, topic_id: bytes, partition: int, offset: int) -> HeldLog | None:
        """Returns the newest log that holds `offset` or ends there, None if no log does."""
        # At the border of two epochs both logs match, and only the newer log grows.
        found = None
        for held in self._logs.of_partition(topic_id, partition):
            if held.log.start_offset <= offset <= held.log.next_offset:
                found = held
        return found

    async def _wait_for_more(self, held: HeldLog, offset: int, deadline_ms: int) -> None:
        while held.log.next_offset == offset and self._logs.get(held.log.key) is held:
            left_ms = deadline_ms - self._clock.monotonic_ms()
            if left_ms <= 0:
                return
            with held.changed() as change:
                if not await done_within(self._clock, change, left_ms):
                    return

    async def pull_slice(self, request: pb.PullSliceRequest) -> AsyncIterator[pb.PullSliceResponse]:
        """Yields the batches of exactly [base_offset, end_offset), in messages of up to SLICE_MESSAGE_BYTES, or of a
        single larger batch.

        Raises Fenced if the offsets are not held, or no longer, DataLoss if they are damaged, Overloaded without a file
        descriptor.
        """
        key = RangeKey(request.topic_id, request.partition, request.epoch)
        offset = request.base_offset
        held = self._logs.get(key)
        if held is None or not held.log.is_boundary(offset) or not held.log.is_boundary(request.end_offset):
            raise self._not_held(held, request, offset)
        while offset < request.end_offset:
            held = self._logs.get(key)
            if held is None:
                raise self._not_held(held, request, offset)
            try:
                batches, next_offset = await self._read(held, offset, request.end_offset, SLICE_MESSAGE_BYTES)
            except WalFileGone as error:
                raise self._not_held(None, request, offset) from error
            if not batches:
                raise self._not_held(held, request, offset)
            yield pb.PullSliceResponse(batches=batches)
            offset = next_offset

    def _not_held(self, held: HeldLog | None, request: pb.PullSliceRequest, offset: int) -> StreamHouseError:
        if held is not None and (gap := held.log.gap_at(offset)) is not None:
            return _lost(held.log, gap.base_offset, gap.end_offset, "damaged in the write-ahead log")
        return Fenced(
            f"offsets {offset} to {request.end_offset} of epoch {request.epoch} are not held here any more",
            partition=request.partition,
            epoch=request.epoch,
            offset=offset,
            buffer_id=request.buffer_id,
        )

    async def _read(self, held: HeldLog, offset: int, end_offset: int, bytes_max: int) -> tuple[list[bytes], int]:
        """Returns consecutive whole batches from the batch that holds `offset`, and their end offset; no batches if
        `offset` is not held. Raises WalFileGone, DataLoss, Overloaded."""
        try:
            return await self._read_around_damage(held, offset, end_offset, bytes_max)
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            raise Overloaded(
                f"{held.log.describe()}: the write-ahead log cannot be opened to be read now: {error.strerror}",
                retry_after_ms=SCARCE_RETRY_MS,
            ) from error

    async def _read_around_damage(
        self, held: HeldLog, offset: int, end_offset: int, bytes_max: int
    ) -> tuple[list[bytes], int]:
        try:
            return await self._try_to_read(held.log, offset, end_offset, bytes_max)
        except WalDamaged as error:
            await self._corrupt_batches.report_corruption(held, error.position)
        try:
            return await self._try_to_read(held.log, offset, end_offset, bytes_max)  # up to the new gap
        except WalDamaged as error:
            raise DataLoss(
                f"{held.log.describe()}: {error}",
                topic=held.log.topic,
                partition=held.log.key.partition,
                file=error.file_name,
                at=error.position.at,
            ) from error

    async def _try_to_read(
        self, log: PartitionLog, offset: int, end_offset: int, bytes_max: int
    ) -> tuple[list[bytes], int]:
        picked = log.read(offset, end_offset, bytes_max)
        # Before the await: registration may drop these batches from the log during the read.
        next_offset = log.end_after(offset, len(picked)) if picked else offset
        missing = [position for position, batch in picked if batch is None]
        # Not in the log's thread: a read from a cold disk must not hold up the next group of appends.
        read = iter(await asyncio.to_thread(self._reader.read, missing) if missing else ())
        return [next(read) if batch is None else batch for _, batch in picked], next_offset


def _lost(log: PartitionLog, base_offset: int, end_offset: int, why: str) -> DataLoss:
    return DataLoss(
        f"{log.describe()}: offsets {base_offset} to {end_offset} are lost: {why}",
        topic=log.topic,
        partition=log.key.partition,
        base_offset=base_offset,
        end_offset=end_offset,
    )
