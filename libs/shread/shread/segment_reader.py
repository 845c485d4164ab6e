"""Blocks of registered segments, checked before they are returned.

Owns: the segments' indexes in memory, the least recently used of which leave first. Does not own: chunks, their caches.
Invariants: damage is looked at twice: a damaged chunk of a cache is dropped and fetched again; damage in the object
store is DataLoss.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from shcluster.index import PartitionIndex
from shformat import BlockEntry, FormatError, SegmentHeader, SegmentIndex, check_block, open_segment, run_plan_async
from shproto.errors import DataLoss, Unavailable
from shproto.model import Segment
from shstore import ObjectMissing, RangeBeyondEnd, StoreError

from shread.chunk_reader import ChunkReader, Span
from shread.core.lru import LruLimit
from shread.core.plan import next_readable
from shread.counters import Counters

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRun:
    """Consecutive blocks, each an encoded batch, the first from base_offset on; a reader goes on at next_offset, and
    in the object at byte next_at."""

    blocks: list[bytes]
    size_bytes: int
    decoded_bytes: int
    base_offset: int
    next_offset: int
    next_at: int


class SegmentReader:
    """Keeps the indexes of recently read segments, up to `index_entries_max` block entries in all.

    `extent`: bytes of an object that are known to exist. All reads raise DataLoss for damage in the store,
    ObjectMissing (the caller knows whether the index has moved on), Unavailable.
    """

    def __init__(
        self, chunks: ChunkReader, extent: Callable[[str], int], index_entries_max: int, counters: Counters
    ) -> None:
        self._chunks = chunks
        self._extent = extent
        self._counters = counters
        self._limit: LruLimit[str] = LruLimit(index_entries_max)
        self._indexes: dict[str, SegmentIndex] = {}

    async def open(self, partition: PartitionIndex, segment: Segment) -> SegmentIndex:
        """Returns the block index of a segment."""
        if self._limit.touch(segment.segment_id):
            return self._indexes[segment.segment_id]
        index = await self._checked(partition, segment, lambda: self._open(partition, segment))
        self._indexes[segment.segment_id] = index
        for gone in self._limit.admit(segment.segment_id, len(index)):
            self._indexes.pop(gone, None)
        return index

    async def read_from(
        self,
        partition: PartitionIndex,
        segment: Segment,
        offset: int,
        bytes_max: int,
        decoded_bytes_max: int | None = None,
        *,
        at_least_one: bool,
    ) -> BlockRun:
        """Returns the block that holds `offset` (or the next record), and the blocks that follow up to `bytes_max`, and
        decoded up to `decoded_bytes_max` (None: no limit).

        Without any block, next_offset is `offset` if the first did not fit; else no block is left.
        """
        index = await self.open(partition, segment)
        first = index.find(offset)
        entries = _choose(index, first, bytes_max, decoded_bytes_max, at_least_one)
        stop = first + len(entries)
        is_end = stop == len(index)
        if not entries:
            return BlockRun(
                blocks=[],
                size_bytes=0,
                decoded_bytes=0,
                base_offset=offset,
                next_offset=segment.end_offset if is_end else offset,
                next_at=segment.object_at,
            )
        try:
            blocks = await self.read_blocks(partition, segment, entries)
        except DataLoss as error:
            # The records before the damage are intact: the reader gets them, and meets the damage with its next read.
            intact = [entry for entry in entries if entry.end_offset <= int(error.details["base_offset"])]
            if not intact:
                raise
            entries, is_end = intact, False
            blocks = await self.read_blocks(partition, segment, entries)
        last = entries[-1]
        return BlockRun(
            blocks=blocks,
            size_bytes=sum(entry.size_bytes for entry in entries),
            decoded_bytes=sum(entry.decoded_bytes for entry in entries),
            base_offset=entries[0].first_offset,
            next_offset=segment.end_offset if is_end else last.end_offset,
            next_at=segment.object_at + last.at + last.size_bytes,
        )

    async def read_blocks(self, partition: PartitionIndex, segment: Segment, entries: list[BlockEntry]) -> list[bytes]:
        """Returns these blocks, checked against the index. DataLoss names the first damaged block."""
        spans = [Span(segment.object_at + entry.at, entry.size_bytes) for entry in entries]

        def check(blocks: list[bytes]) -> None:
            for entry, block in zip(entries, blocks, strict=True):
                check_block(block, entry)

        extent = self._known_extent(segment)
        return await self._checked(
            partition, segment, lambda: self._chunks.read(segment.object_key, extent, spans, check), entries
        )

    def prefetch(self, segment: Segment, at: int, chunks: int) -> int:
        """Fetches ahead from byte `at` of the object; returns how many of the chunks lie in this segment."""
        extent = self._known_extent(segment)
        return self._chunks.prefetch(
            segment.object_key, min(extent, segment.object_at + segment.size_bytes), at, chunks
        )

    async def _open(self, partition: PartitionIndex, segment: Segment) -> SegmentIndex:
        async def read(at: int, size_bytes: int) -> bytes:
            span = Span(segment.object_at + at, size_bytes)
            return (await self._chunks.read(segment.object_key, self._known_extent(segment), [span]))[0]

        header, index = await run_plan_async(open_segment(segment.size_bytes), read)
        _must_be(partition, segment, header)
        return index

    def _known_extent(self, segment: Segment) -> int:
        return max(self._extent(segment.object_key), segment.object_at + segment.size_bytes)

    async def _checked(
        self,
        partition: PartitionIndex,
        segment: Segment,
        read: Callable[[], Awaitable[T]],
        entries: list[BlockEntry] | None = None,
    ) -> T:
        """Returns the result of `read`, repeated from the store if the first is damaged. `entries`: the blocks that are
        read."""
        spans = [Span(segment.object_at + entry.at, entry.size_bytes) for entry in entries or ()]
        try:
            try:
                return await read()
            except FormatError as damage:
                log.warning("%s: damaged in the cache, fetching it again: %s", _name(partition, segment), damage)
                await self._chunks.drop(segment.object_key, spans or [Span(segment.object_at, segment.size_bytes)])
                # From the object store now, past all caches: if it is damaged again, the object is.
                return await read()
        except FormatError as error:
            raise self._data_loss(partition, segment, entries, error.what, segment.object_at + error.at) from error
        except RangeBeyondEnd as error:
            raise self._data_loss(partition, segment, entries, str(error), error.object_size_bytes) from error
        except ObjectMissing:
            raise  # no loss yet: compaction may have replaced the segment since the index was read
        except StoreError as error:
            raise Unavailable(f"{_name(partition, segment)} cannot be read now: {error}") from error

    def _data_loss(
        self, partition: PartitionIndex, segment: Segment, entries: list[BlockEntry] | None, what: str, at: int
    ) -> DataLoss:
        self._counters.damaged_spans += 1
        hit = [entry for entry in entries or () if segment.object_at + entry.at + entry.size_bytes > at]
        end_offset = hit[0].end_offset if hit else segment.end_offset
        error = DataLoss(
            f"{_name(partition, segment)} is damaged at byte {at}: {what}",
            topic=partition.topic,
            partition=partition.partition,
            base_offset=hit[0].first_offset if hit else segment.base_offset,
            end_offset=end_offset,
            object_key=segment.object_key,
            at=at,
            next_offset=next_readable(partition, end_offset),
        )
        log.error("%s", error)
        return error


def _choose(
    index: SegmentIndex, first: int, bytes_max: int, decoded_bytes_max: int | None, at_least_one: bool
) -> list[BlockEntry]:
    entries: list[BlockEntry] = []
    total = decoded = 0
    for position in range(first, len(index)):
        entry = index[position]
        total += entry.size_bytes
        decoded += entry.decoded_bytes
        too_much = total > bytes_max or (decoded_bytes_max is not None and decoded > decoded_bytes_max)
        if too_much and (entries or not at_least_one):
            break
        entries.append(entry)
    return entries


def _must_be(partition: PartitionIndex, segment: Segment, header: SegmentHeader) -> None:
    """Refuses an object that holds another segment than the registered with FormatError."""
    found = (header.topic_id, header.partition, header.base_offset, header.end_offset)
    expected = (partition.topic_id, partition.partition, segment.base_offset, segment.end_offset)
    if found != expected:
        raise FormatError(f"the segment's header says {found}, registered is {expected}")


def _name(partition: PartitionIndex, segment: Segment) -> str:
    offsets = f"offsets {segment.base_offset} to {segment.end_offset}"
    return f"{partition.name} {offsets} in {segment.object_key}, byte {segment.object_at}"
