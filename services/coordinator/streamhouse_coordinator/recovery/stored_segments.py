"""Lists the segments in the object store, and reads the header and index of those that the backup does not name."""

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shformat import FormatError, last_segment_size, open_segment, run_plan_async
from shformat.segment import SegmentHeader
from shformat.segment_index import SegmentIndex
from shproto.model import Segment
from shstore import ObjectMissing, ObjectStore

from streamhouse_coordinator.core.tables import PartitionRowKey
from streamhouse_coordinator.recovery.segment_selection import EpochSpan, SegmentCandidate
from streamhouse_coordinator.segment_keys import SEGMENT_PREFIXES

# Header, index and footer of an object are three requests of some 30 ms; a listing brings a thousand keys a page.
READS_AT_ONCE = 16
TAIL_BYTES = 32 * 1024
# Segment ids follow from the place, so that a second restore finds the same ids.
_IDS = uuid.UUID("8b1c4a5e-0f6d-4f0e-9d43-6f1f5c7f2a10")


@dataclass(frozen=True, slots=True)
class Damaged:
    """An unreadable object. `at`: the byte down to which the object could be read from its end."""

    object_key: str
    at: int
    what: str


@dataclass(slots=True)
class Stored:
    """Content of the store. `sizes`: bytes of every object, by key. `found`: segments that the backup does not name."""

    sizes: dict[str, int] = field(default_factory=dict)
    found: list[SegmentCandidate] = field(default_factory=list)
    damaged: list[Damaged] = field(default_factory=list)


async def scan(store: ObjectStore, known_ends: Mapping[str, int], progress: Callable[[str, int, int], None]) -> Stored:
    """Returns the objects with segments. `known_ends`: by key, the bytes of each object that segments of the backup
    account for; only objects of another size are read. Raises StoreError."""
    stored = Stored()
    for prefix in SEGMENT_PREFIXES:
        async for info in store.list(prefix):
            stored.sizes[info.key] = info.size_bytes
            if len(stored.sizes) % 1000 == 0:
                progress("objects listed", len(stored.sizes), 0)
    # An object of the expected size holds nothing new: a restore reads some of a million objects, not all of them.
    todo = [key for key, size_bytes in stored.sizes.items() if known_ends.get(key) != size_bytes]
    # Shared by all readers: each takes the next key.
    waiting = iter(todo)
    done = 0

    async def read_each() -> None:
        nonlocal done
        for key in waiting:
            await _read_object(store, key, stored)
            done += 1
            progress("objects read", done, len(todo))

    async with asyncio.TaskGroup() as readers:
        for _ in range(min(READS_AT_ONCE, len(todo))):
            readers.create_task(read_each())
    stored.found.sort(key=lambda item: (item.segment.object_key, item.segment.object_at))
    return stored


async def _read_object(store: ObjectStore, key: str, stored: Stored) -> None:
    """Reads an object from its end, segment by segment: a segment's footer has the length of the segment."""
    end = stored.sizes[key]
    while end > 0:
        try:
            candidate = await _last_segment(store, key, end)
        except FormatError as error:
            stored.damaged.append(Damaged(key, end, str(error)))
            return
        except ObjectMissing:  # deleted since the listing
            del stored.sizes[key]
            return
        stored.found.append(candidate)
        end = candidate.segment.object_at


async def _last_segment(store: ObjectStore, key: str, end: int) -> SegmentCandidate:
    tail_at = max(0, end - TAIL_BYTES)
    tail = await store.get(key, at=tail_at, size_bytes=end - tail_at)
    size_bytes = last_segment_size(tail, end)
    start = end - size_bytes

    async def read(at: int, size_bytes: int) -> bytes:
        first = start + at - tail_at
        if first >= 0:
            return tail[first : first + size_bytes]
        return await store.get(key, at=start + at, size_bytes=size_bytes)

    header, index = await run_plan_async(open_segment(size_bytes), read)
    return SegmentCandidate(_segment(key, start, size_bytes, header, index), _spans(index))


def _segment(key: str, at: int, size_bytes: int, header: SegmentHeader, index: SegmentIndex) -> Segment:
    blocks = list(index)
    return Segment(
        segment_id=str(uuid.uuid5(_IDS, f"{key}@{at}")),
        topic_id=header.topic_id.hex(),
        topic="",
        partition=header.partition,
        epoch=header.epoch,
        base_offset=header.base_offset,
        end_offset=header.end_offset,
        record_count=header.record_count,
        object_key=key,
        object_at=at,
        size_bytes=size_bytes,
        raw_bytes=index.raw_bytes,
        first_timestamp_ms=blocks[0].first_timestamp_ms,
        max_timestamp_ms=max(block.max_timestamp_ms for block in blocks),
    )


def _spans(index: SegmentIndex) -> tuple[EpochSpan, ...]:
    spans: list[EpochSpan] = []
    for block in index:
        if spans and spans[-1].epoch == block.epoch:
            spans[-1] = EpochSpan(block.epoch, spans[-1].base_offset, block.end_offset)
        else:
            spans.append(EpochSpan(block.epoch, block.first_offset, block.end_offset))
    return tuple(spans)


def topic_name(keys: Iterable[str], topic_id: str) -> str:
    """Returns the name in the keys of a topic's objects, `data/<name>.<id>/…`; empty if no key has that form."""
    for key in keys:
        folder = key.split("/")[1] if key.startswith("data/") else ""
        name, _, digits = folder.rpartition(".")
        if name and digits == topic_id[:8]:
            return name
    return ""


def by_partition(candidates: Sequence[SegmentCandidate]) -> dict[PartitionRowKey, list[SegmentCandidate]]:
    """Returns the candidates by partition, each list in their order."""
    found: dict[PartitionRowKey, list[SegmentCandidate]] = {}
    for item in candidates:
        found.setdefault((item.segment.topic_id, item.segment.partition), []).append(item)
    return found
