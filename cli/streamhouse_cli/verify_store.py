"""Reads every registered segment and compares it with the registry; looks for objects without a registration.

Owns: the order of reads, and the comparison with changes that happened meanwhile. Does not own: the checks
(registry_check.py).
Invariants: nothing is written. A segment that compaction or retention removed meanwhile is no finding.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from shformat import describe_segment
from shproto.convert import range_from_proto, segments_from_proto
from shproto.errors import Unavailable, UnknownTopic
from shproto.model import Range, Segment
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2
from shruntime.tasks import cancel_and_wait
from shstore import ObjectMissing, ObjectStore, RangeBeyondEnd

from streamhouse_cli.registry_check import (
    Finding,
    check_contents,
    check_partition,
    finding,
)

# The prefixes under which segmenters put objects.
DATA_PREFIX, MIXED_PREFIX = "data/", "mixed/"
# Two segments are checked while two more are fetched: as much as one core decodes, at 8 MiB a piece.
SEGMENTS_AT_ONCE = 4
READ_BYTES = 8 * 1024 * 1024
# Keys in a page of an S3 listing.
PAGE_KEYS = 1000


@dataclass(slots=True, kw_only=True)
class VerifyReport:
    """Result of a verification.

    replaced: segments that compaction or retention removed before they were read. young_objects: not
    registered, and so new that they may be registered later. waiting_objects: unreferenced, noticed by a sweep, to be
    deleted by a later sweep. resting_objects: not registered, and left alone by sweeps until resting_until_ms, because
    the metadata was restored. lost_spans: registered as lost, so nothing to read. metadata_rows: rows of the
    coordinator's projections that were compared with its events; 0 if a single topic is verified.
    """

    segments: int = 0
    records: int = 0
    size_bytes: int = 0
    lost_spans: int = 0
    metadata_rows: int = 0
    replaced: int = 0
    objects: int = 0
    young_objects: int = 0
    waiting_objects: int = 0
    resting_objects: int = 0
    resting_until_ms: int = 0
    findings: list[Finding] = field(default_factory=list)

    def rest_until(self, sweep_from_ms: int) -> None:
        """Turns findings of unregistered objects into the count of resting objects, which no sweep deletes before this
        time."""
        unregistered = [finding for finding in self.findings if finding.kind == "unregistered"]
        self.findings = [finding for finding in self.findings if finding.kind != "unregistered"]
        self.resting_objects, self.resting_until_ms = len(unregistered), sweep_from_ms if unregistered else 0


@dataclass(slots=True, kw_only=True)
class _Partition:
    topic: str
    topic_id: str
    number: int
    log_start_offset: int
    ranges: list[Range] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)


class Verifier:
    """Verifies once: call `run` a single time. `started` gets the total of bytes, `progress` the bytes read since."""

    def __init__(
        self,
        coordinator: CoordinatorApi,
        store: ObjectStore,
        *,
        topic: str | None,
        grace_ms: int,
        started: Callable[[int], None],
        progress: Callable[[int], None],
    ) -> None:
        self._coordinator = coordinator
        self._store = store
        self._topic = topic
        self._grace_ms = grace_ms
        self._started = started
        self._progress = progress
        self._report = VerifyReport()

    async def run(self) -> VerifyReport:
        """Reads and compares everything; returns the report. Raises UnknownTopic, Unavailable, StoreError."""
        if self._topic is None:
            await self._compare_projections()
        partitions = await self._registered()
        for part in partitions:
            self._report.findings += check_partition(
                part.topic, part.number, part.log_start_offset, part.ranges, part.segments
            )
        segments = [segment for part in partitions for segment in part.segments if not segment.lost_reason]
        self._report.lost_spans = sum(len(part.segments) for part in partitions) - len(segments)
        self._started(sum(segment.size_bytes for segment in segments))
        await self._read_all(segments)
        await self._look_for_orphans(partitions, {segment.object_key for segment in segments})
        return self._report

    async def _compare_projections(self) -> None:
        """Has the coordinator compare its tables with its events. This comes first: other findings may follow from a
        difference here."""
        async for part in self._coordinator.check_projections(coordinator_pb2.CheckProjectionsRequest()):
            if part.done:
                self._report.metadata_rows = part.rows
                self._report.findings += [_metadata_finding(item) for item in part.differences]
                if more := part.differing_rows - len(part.differences):
                    self._report.findings.append(
                        Finding(kind="metadata", what=f"{more} more rows are not what the events give")
                    )
                return
        raise Unavailable("the coordinator ended its check of the metadata before it had a result")

    async def _registered(self) -> list[_Partition]:
        """Returns the registered partitions and segments, of a consistent snapshot."""
        found: dict[tuple[str, int], _Partition] = {}
        async for part in self._coordinator.get_snapshot(coordinator_pb2.GetSnapshotRequest()):
            for item in part.partitions:
                if self._topic is not None and item.topic.topic != self._topic:
                    continue
                key = (item.topic.topic_id.hex(), item.partition)
                if key not in found:
                    found[key] = _Partition(
                        topic=item.topic.topic,
                        topic_id=key[0],
                        number=item.partition,
                        log_start_offset=item.log_start_offset,
                    )
                found[key].ranges += [range_from_proto(owned) for owned in item.ranges]
                found[key].segments += segments_from_proto(item.segments)
        if self._topic is not None and not found:
            raise UnknownTopic(f"topic {self._topic!r} does not exist", topic=self._topic)
        return list(found.values())

    # ---- segments

    async def _read_all(self, segments: Sequence[Segment]) -> None:
        waiting = iter(segments)
        readers = [asyncio.create_task(self._read_each(waiting)) for _ in range(SEGMENTS_AT_ONCE)]
        try:
            await asyncio.gather(*readers)
        finally:
            await cancel_and_wait(*readers)

    async def _read_each(self, segments: Iterator[Segment]) -> None:
        for segment in segments:
            findings = await self._read(segment)
            # Compaction may have replaced the segment since the snapshot: then nothing is wrong.
            if findings and await self._is_unreferenced([segment.object_key]):
                self._report.replaced += 1
            else:
                self._report.findings += findings
                self._report.segments += 1
                self._report.records += segment.record_count
                self._report.size_bytes += segment.size_bytes
            self._progress(segment.size_bytes)

    async def _read(self, segment: Segment) -> list[Finding]:
        window = SegmentWindow(self._store, segment)
        try:
            described = await asyncio.to_thread(describe_segment, window.read, segment.size_bytes)
        except ObjectMissing:
            return [finding(segment, "missing", "the object is not in the store")]
        except RangeBeyondEnd as error:
            return [finding(segment, "missing", f"the object is too short: {error}")]
        return check_contents(segment, described)

    async def _is_unreferenced(self, keys: Sequence[str]) -> list[str]:
        request = coordinator_pb2.FilterUnreferencedRequest(object_keys=keys)
        return list((await self._coordinator.filter_unreferenced(request)).object_keys)

    # ---- objects

    async def _look_for_orphans(self, partitions: Sequence[_Partition], registered: set[str]) -> None:
        async for page in self._unknown_pages(partitions, registered):
            # A dry run: returns the notes of sweeps, and writes none.
            request = coordinator_pb2.BeginDeletionRequest(
                object_keys=list(page), grace_ms=self._grace_ms, confirm_ms=0, dry_run=True
            )
            for deletion in (await self._coordinator.begin_deletion(request)).objects:
                self._judge_unknown(deletion, *page[deletion.object_key])

    def _judge_unknown(self, deletion: coordinator_pb2.ObjectDeletion, size_bytes: int, age_ms: int) -> None:
        if deletion.verdict == coordinator_pb2.DELETION_VERDICT_REFERENCED:
            return  # registered since
        # A sweep has seen it: it is deleted later without help, so it is no finding.
        if deletion.noticed_ms:
            self._report.waiting_objects += 1
        elif deletion.verdict == coordinator_pb2.DELETION_VERDICT_DECLARED or age_ms < self._grace_ms:
            self._report.young_objects += 1
        else:
            what = f"{size_bytes} bytes, {age_ms // 1000} s old, and no segment lies in it"
            self._report.findings.append(Finding(kind="unregistered", what=what, object_key=deletion.object_key))

    async def _unknown_pages(
        self, partitions: Sequence[_Partition], registered: set[str]
    ) -> AsyncIterator[dict[str, tuple[int, int]]]:
        """Yields pages of objects that were not registered at the start: key -> (size in bytes, age in ms)."""
        # By pages, because a store may list millions of objects.
        page: dict[str, tuple[int, int]] = {}
        for prefix in self._prefixes(partitions):
            async for info in self._store.list(prefix):
                self._report.objects += 1
                if info.key not in registered:
                    page[info.key] = (info.size_bytes, time.time_ns() // 1_000_000 - info.modified_ms)
                if len(page) == PAGE_KEYS:
                    yield page
                    page = {}
        if page:
            yield page

    def _prefixes(self, partitions: Sequence[_Partition]) -> Sequence[str]:
        """Returns the prefixes to list. Objects that several partitions share belong to no topic, and are listed only
        if all topics are verified."""
        if self._topic is None:
            return (DATA_PREFIX, MIXED_PREFIX)
        return sorted({f"{DATA_PREFIX}{part.topic[:246]}.{part.topic_id[:8]}/" for part in partitions})


class SegmentWindow:
    """A segment's bytes for a reader in another thread: fetched in pieces, of which the last two are kept."""

    def __init__(self, store: ObjectStore, segment: Segment) -> None:
        self._store = store
        self._segment = segment
        self._loop = asyncio.get_running_loop()
        self._pieces: list[tuple[int, bytes]] = []

    def read(self, at: int, size_bytes: int) -> memoryview:
        for start, piece in self._pieces:
            if start <= at and at + size_bytes <= start + len(piece):
                return memoryview(piece)[at - start : at - start + size_bytes]
        wanted = min(max(size_bytes, READ_BYTES), self._segment.size_bytes - at)
        fetch = self._store.get(self._segment.object_key, at=self._segment.object_at + at, size_bytes=wanted)
        piece = asyncio.run_coroutine_threadsafe(fetch, self._loop).result()
        self._pieces = [*self._pieces[-1:], (at, piece)]
        return memoryview(piece)[:size_bytes]


def _metadata_finding(item: coordinator_pb2.ProjectionDifference) -> Finding:
    found, expected = item.found_json or "no such row", item.expected_json or "no such row"
    return Finding(kind="metadata", what=f"table {item.table}: {found}; its events give {expected}")
