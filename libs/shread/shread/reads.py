"""Request and result of a read, and the parts that all reads of a process share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shcluster.agent_checks import AgentChecks
from shcluster.index_catch_up import IndexCatchUp
from shcluster.live_index import LiveIndex
from shproto.keys import PartitionKey
from shproto.model import Segment
from shproto.services import IngestApi
from shproto.v1 import ingest_pb2
from shruntime.clock import Clock

from shread.core.plan import ReadSegment, ReadTail, plan
from shread.core.readahead import ReadAhead
from shread.core.watermarks import Watermarks
from shread.counters import Counters
from shread.segment_reader import SegmentReader
from shread.tail_polls import TailPolls


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """Request for records.

    `decoded_bytes_max`: of the batches once decoded (None: no limit); at least one batch is fetched in any case.
    `known_reason`: the waiting reason that the reader has; any other reason ends the wait at once (None: only
    max_wait_ms ends it). `tell_after_ms`: after this time a fetch without records ends with the reason (None: the
    wait goes on).
    """

    partition: PartitionKey
    topic: str
    offset: int
    bytes_max: int
    bytes_min: int = 0
    max_wait_ms: int = 0
    known_reason: str | None = None
    decoded_bytes_max: int | None = None
    tell_after_ms: float | None = None


@dataclass(slots=True, kw_only=True)
class Fetched:
    """Whole encoded batches; the first may begin before the requested offset. decoded_bytes: their size decoded, by
    their headers; found_ms: time of the first batch, by the monotonic clock."""

    batches: list[bytes] = field(default_factory=list)
    size_bytes: int = 0
    decoded_bytes: int = 0
    next_offset: int = 0
    high_watermark: int = 0
    log_start_offset: int = 0
    waiting_reason: str = ""
    found_ms: int = 0


@dataclass(slots=True, kw_only=True)
class Reads:
    """Parts shared by all fetches, subscriptions and look-ups.

    `agents`: knows the agents that do not answer. `catch_up_ms`: longest wait for the event feed where records are
    known to exist. `store_trouble`: the object store's present failure, or an empty text.
    """

    index: LiveIndex
    segments: SegmentReader
    ingest_at: Callable[[str], IngestApi]
    agents: AgentChecks
    index_catch_up: IndexCatchUp
    readahead: ReadAhead
    polls: TailPolls
    catch_up_ms: int
    clock: Clock
    counters: Counters
    watermarks: Watermarks = field(default_factory=Watermarks)
    store_trouble: Callable[[], str] = lambda: ""

    async def read_tail(self, step: ReadTail, request: ingest_pb2.ReadTailRequest) -> ingest_pb2.ReadTailResponse:
        """Returns the agent's answer. Raises the agent's StreamHouseError, or Unavailable; `agents` records the
        outcome."""
        with self.agents.calling(step.agent_id, step.address, request.max_wait_ms):
            return await self.ingest_at(step.address).read_tail(request)

    def is_registered(self, want: Want) -> bool:
        """True if a segment holds the offset, so that a fetch has something to return at once."""
        partition = self.index.get(want.partition, want.topic)
        return isinstance(plan(self.index.cluster, partition, want.offset), ReadSegment)

    def ahead(self, key: PartitionKey, segment: Segment, offset: int, next_offset: int, at: int) -> None:
        """Starts downloads for a sequential reader after a read of [offset, next_offset) that ended at byte `at` of
        the segment's object, also in the following segment."""
        chunks = self.readahead.observe(key, offset, next_offset)
        if chunks:
            chunks -= self.segments.prefetch(segment, at, chunks)
        partition = self.index.cluster.partitions.get(key)
        following = partition.segment_after(segment.end_offset) if partition and chunks > 0 else None
        if following is not None and not following.lost_reason:
            self.segments.prefetch(following, following.object_at, chunks)
