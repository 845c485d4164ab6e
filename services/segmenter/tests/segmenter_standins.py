"""An honest coordinator and an honest agent in a few lines: registration is the compare-and-set of the design.
Faults are asked for by the tests; nothing here pretends that something worked."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from shformat import Records, decode_batch, encode_batch, open_segment, read_batch_header, read_block, run_plan_async
from shproto.errors import Fenced, Unavailable
from shproto.v1 import coordinator_pb2 as c
from shproto.v1 import ingest_pb2, types_pb2
from shstore import ObjectStore

RangeKey = tuple[bytes, int, int]
TOPIC_ID = uuid.UUID(int=0x0123456789ABCDEF0123456789ABCDEF).bytes


@dataclass
class Range:
    registered_end: int
    end_offset: int | None = None
    gone: bool = False


@dataclass
class Buffer:
    buffer_id: str
    address: str
    slices: list[c.BufferSlice]
    fenced: set[int] = field(default_factory=set)
    attempts: int = 0
    claim_id: str = ""
    held_back: bool = False


@dataclass
class Deletion:
    noticed_ms: int
    begun: bool = False


class StandInCoordinator:
    """Claims never run out by time here: `expire_claims` does it. `now_ms` is PostgreSQL's clock."""

    def __init__(self, now_ms: Callable[[], int] = lambda: 0) -> None:
        self._now_ms = now_ms
        self.intents: dict[str, tuple[str, int]] = {}
        self.deletions: dict[str, Deletion] = {}
        self.ranges: dict[RangeKey, Range] = {}
        self.segments: dict[str, types_pb2.SegmentRef] = {}
        self.buffers: dict[str, Buffer] = {}
        self.claims: set[str] = set()
        self.compactions: dict[str, list[str]] = {}
        self.released: list[c.ReleaseClaimRequest] = []
        self.results: list[int] = []
        self.events: list[c.Event] = []
        self.sessions: set[str] = set()
        self.down = False
        self.retention_calls = 0
        self.pruned = 0
        self.marked: dict[int, c.Event] = {}
        self._news = asyncio.Condition()

    def __getattr__(self, name: str) -> Any:
        """RPCs that a segmenter never calls."""

        async def refuse(request: object) -> object:
            raise Unavailable(f"{name} is not part of the stand-in")

        if name.startswith("_"):
            raise AttributeError(name)
        return refuse

    # ---- what tests do to it

    def announce(self, buffer_id: str, address: str, slices: list[c.BufferSlice]) -> None:
        self.buffers[buffer_id] = Buffer(buffer_id, address, slices)
        for item in slices:
            self.ranges.setdefault(key_of(item), Range(item.base_offset))
        self.record("BufferSealed", f"buffer/{buffer_id}")

    def record(self, type_name: str, stream_id: str) -> None:
        position = len(self.events) + 1
        self.events.append(
            c.Event(position=position, stream_id=stream_id, version=1, type=type_name, payload_json="{}")
        )

    async def tell(self) -> None:
        """Wakes the followers of the feed."""
        async with self._news:
            self._news.notify_all()

    def expire_claims(self) -> None:
        self.claims.clear()
        self.compactions.clear()
        for buffer in self.buffers.values():
            buffer.claim_id = ""
            buffer.held_back = False

    @property
    def waiting(self) -> list[str]:
        return [buffer.buffer_id for buffer in self.buffers.values() if self._open_slices(buffer)]

    def _up(self) -> None:
        if self.down:
            raise Unavailable("the coordinator is down")

    # ---- buffers

    def _open_slices(self, buffer: Buffer) -> list[c.BufferSlice]:
        return [
            item
            for number, item in enumerate(buffer.slices)
            if number not in buffer.fenced and self.ranges[key_of(item)].registered_end < item.end_offset
        ]

    async def claim_buffer(self, request: c.ClaimBufferRequest) -> c.ClaimBufferResponse:
        self._up()
        for buffer in self.buffers.values():
            if buffer.claim_id in self.claims or buffer.held_back or not self._open_slices(buffer):
                continue
            buffer.attempts += 1
            buffer.claim_id = str(uuid.uuid4())
            self.claims.add(buffer.claim_id)
            return c.ClaimBufferResponse(
                found=True,
                buffer_id=buffer.buffer_id,
                claim_id=buffer.claim_id,
                agent_id="agent",
                address=buffer.address,
                slices=self._open_slices(buffer),
                attempt=buffer.attempts,
            )
        return c.ClaimBufferResponse()

    async def renew_claim(self, request: c.RenewClaimRequest) -> c.RenewClaimResponse:
        self._up()
        if request.claim_id not in self.claims | self.compactions.keys():
            raise Fenced("the claim has run out")
        return c.RenewClaimResponse()

    async def release_claim(self, request: c.ReleaseClaimRequest) -> c.ReleaseClaimResponse:
        self._up()
        if request.claim_id not in self.claims | self.compactions.keys():
            raise Fenced("the claim has run out")
        self.released.append(request)
        self.claims.discard(request.claim_id)
        self.compactions.pop(request.claim_id, None)
        return c.ReleaseClaimResponse()

    async def declare_uploads(self, request: c.DeclareUploadsRequest) -> c.DeclareUploadsResponse:
        self._up()
        if request.claim_id not in self.claims | self.compactions.keys():
            raise Fenced("the claim has run out")
        self.intents |= {key: (request.claim_id, self._now_ms()) for key in request.object_keys}
        return c.DeclareUploadsResponse()

    async def register_segments(self, request: c.RegisterSegmentsRequest) -> c.RegisterSegmentsResponse:
        self._up()
        results = [self._register(segment) for segment in request.segments]
        self.results += results
        buffer = self.buffers[request.buffer_id]
        for segment, result in zip(request.segments, results, strict=True):
            if result == c.REGISTRATION_RESULT_FENCED:
                spans = [(key_of(item), item.base_offset) for item in buffer.slices]
                buffer.fenced.add(spans.index((key_of(segment), segment.base_offset)))
        if not self._open_slices(buffer):
            self.claims.discard(buffer.claim_id)
            self.intents = {key: intent for key, intent in self.intents.items() if intent[0] != buffer.claim_id}
        return c.RegisterSegmentsResponse(results=results)

    def _register(self, segment: types_pb2.SegmentRef) -> "c.RegistrationResult.ValueType":
        range_ = self.ranges.get(key_of(segment))
        if range_ is None or range_.gone:
            return c.REGISTRATION_RESULT_FENCED
        if segment.segment_id in self.segments:
            return c.REGISTRATION_RESULT_REGISTERED
        if segment.end_offset <= range_.registered_end:
            return c.REGISTRATION_RESULT_COVERED
        if segment.base_offset > range_.registered_end:
            return c.REGISTRATION_RESULT_EARLY
        if segment.base_offset < range_.registered_end:
            return c.REGISTRATION_RESULT_FENCED
        if range_.end_offset is not None and segment.end_offset > range_.end_offset:
            return c.REGISTRATION_RESULT_FENCED
        if segment.object_key not in self.intents:
            return c.REGISTRATION_RESULT_WITHDRAWN
        self.segments[segment.segment_id] = segment
        range_.registered_end = segment.end_offset
        self.record("SegmentRegistered", f"partition/{segment.topic_id.hex()}/{segment.partition}")
        return c.REGISTRATION_RESULT_REGISTERED

    # ---- housekeeping

    async def claim_compaction(self, request: c.ClaimCompactionRequest) -> c.ClaimCompactionResponse:
        self._up()
        partitions = {(segment.topic_id, segment.partition) for segment in self.segments.values()}
        for partition in sorted(partitions):
            small = [s for s in self.of_partition(*partition) if s.size_bytes < request.small_bytes_max]
            if len(small) >= request.segments_min and not self.compactions:
                claim_id = str(uuid.uuid4())
                self.compactions[claim_id] = [segment.segment_id for segment in small]
                return c.ClaimCompactionResponse(found=True, claim_id=claim_id, segments=small)
        return c.ClaimCompactionResponse()

    async def register_compaction(self, request: c.RegisterCompactionRequest) -> c.RegisterCompactionResponse:
        self._up()
        if request.segment.segment_id in self.segments:
            return c.RegisterCompactionResponse(result=c.REGISTRATION_RESULT_REGISTERED)
        if not set(request.replaced_segment_ids) <= self.segments.keys():
            return c.RegisterCompactionResponse(result=c.REGISTRATION_RESULT_COVERED)
        if request.segment.object_key not in self.intents:
            return c.RegisterCompactionResponse(result=c.REGISTRATION_RESULT_WITHDRAWN)
        for segment_id in request.replaced_segment_ids:
            del self.segments[segment_id]
        self.segments[request.segment.segment_id] = request.segment
        del self.intents[request.segment.object_key]
        return c.RegisterCompactionResponse(result=c.REGISTRATION_RESULT_REGISTERED)

    async def apply_retention(self, request: c.ApplyRetentionRequest) -> c.ApplyRetentionResponse:
        self._up()
        self.retention_calls += 1
        return c.ApplyRetentionResponse()

    async def filter_unreferenced(self, request: c.FilterUnreferencedRequest) -> c.FilterUnreferencedResponse:
        self._up()
        used = {segment.object_key for segment in self.segments.values()}
        return c.FilterUnreferencedResponse(object_keys=[key for key in request.object_keys if key not in used])

    async def begin_deletion(self, request: c.BeginDeletionRequest) -> c.BeginDeletionResponse:
        self._up()
        objects = [self._judge(key, request) for key in request.object_keys]
        return c.BeginDeletionResponse(objects=objects, now_ms=self._now_ms())

    def _judge(self, key: str, request: c.BeginDeletionRequest) -> c.ObjectDeletion:
        now_ms = self._now_ms()
        claim_id, declared_ms = self.intents.get(key, ("", now_ms))
        held = claim_id in self.claims | self.compactions.keys()
        found = self.deletions.get(key)
        if key in {segment.object_key for segment in self.segments.values()}:
            verdict = c.DELETION_VERDICT_REFERENCED
        elif claim_id and (held or now_ms - declared_ms < request.grace_ms):
            verdict = c.DELETION_VERDICT_DECLARED
        elif (found and found.begun) or now_ms - (found.noticed_ms if found else now_ms) >= request.confirm_ms:
            verdict = c.DELETION_VERDICT_BEGUN
        else:
            verdict = c.DELETION_VERDICT_NOTICED
        if not request.dry_run and verdict in (c.DELETION_VERDICT_BEGUN, c.DELETION_VERDICT_NOTICED):
            row = self.deletions.setdefault(key, Deletion(now_ms))
            row.begun = row.begun or verdict == c.DELETION_VERDICT_BEGUN
            if row.begun:
                self.intents.pop(key, None)
        return c.ObjectDeletion(
            object_key=key,
            verdict=verdict,
            noticed_ms=found.noticed_ms if found else 0,
            declared_ms=declared_ms if claim_id else 0,
            worker_id="w1" if claim_id else "",
        )

    async def finish_deletion(self, request: c.FinishDeletionRequest) -> c.FinishDeletionResponse:
        self._up()
        for key in request.object_keys:
            self.deletions.pop(key, None)
        return c.FinishDeletionResponse()

    async def list_deletions(self, request: c.ListDeletionsRequest) -> c.ListDeletionsResponse:
        self._up()
        now_ms = self._now_ms()
        noticed = [key for key, row in self.deletions.items() if now_ms - row.noticed_ms >= request.confirm_ms]
        stale = [key for key, (_, declared_ms) in self.intents.items() if now_ms - declared_ms >= request.grace_ms]
        return c.ListDeletionsResponse(object_keys=list(dict.fromkeys(noticed + stale))[: request.limit])

    # ---- sessions and the feed

    async def get_head(self, request: c.GetHeadRequest) -> c.GetHeadResponse:
        self._up()
        at = request.event_position
        event = self.marked.get(at) or (self.events[at - 1] if self.pruned < at <= len(self.events) else None)
        return c.GetHeadResponse(events_position=len(self.events), pruned_position=self.pruned, event=event)

    async def mark_history(self, request: c.MarkHistoryRequest) -> c.MarkHistoryResponse:
        self._up()
        if not self.events:
            return c.MarkHistoryResponse()
        self.marked[len(self.events)] = self.events[-1]
        return c.MarkHistoryResponse(event=self.events[-1])

    async def follow_events(self, request: c.FollowEventsRequest) -> AsyncIterator[c.Event]:
        self._up()
        position = request.after_position
        while True:
            for event in self.events[position:]:
                position = event.position
                if not request.types or event.type in request.types:
                    yield event
            async with self._news:
                await self._news.wait_for(lambda seen=position: len(self.events) > seen)

    async def open_session(self, request: c.OpenSessionRequest) -> c.OpenSessionResponse:
        self._up()
        token = str(uuid.uuid4())
        self.sessions.add(f"{request.role}/{request.agent_id}")
        return c.OpenSessionResponse(session_token=token, ttl_ms=30_000, heartbeat_interval_ms=1_000)

    async def heartbeat(self, request: c.HeartbeatRequest) -> c.HeartbeatResponse:
        self._up()
        return c.HeartbeatResponse(ttl_ms=30_000)

    async def close_session(self, request: c.CloseSessionRequest) -> c.CloseSessionResponse:
        self._up()
        self.sessions.clear()
        return c.CloseSessionResponse()

    # ---- what tests ask

    def of_partition(self, topic_id: bytes, partition: int) -> list[types_pb2.SegmentRef]:
        found = [s for s in self.segments.values() if (s.topic_id, s.partition) == (topic_id, partition)]
        return sorted(found, key=lambda segment: segment.base_offset)


def key_of(item: c.BufferSlice | types_pb2.SegmentRef) -> RangeKey:
    return item.topic_id, item.partition, item.epoch


class StandInAgent:
    """Holds acknowledged batches, as an agent's log does."""

    def __init__(self) -> None:
        self.batches: dict[RangeKey, list[bytes]] = {}
        self.down = False
        self.tamper: Callable[[list[bytes]], list[bytes]] = lambda batches: batches
        self.pulls = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        async def refuse(request: object) -> object:
            raise Unavailable(f"{name} is not part of the stand-in")

        return refuse

    def append(self, partition: int, counts: list[int], *, epoch: int = 1, topic_id: bytes = TOPIC_ID) -> c.BufferSlice:
        """Writes batches of so many records each and seals them: the slice."""
        held = self.batches.setdefault((topic_id, partition, epoch), [])
        base = read_batch_header(held[-1]).end_offset if held else 0
        next_offset, size_bytes = base, 0
        for count in counts:
            batch = encode_batch(records_of(partition, next_offset, count), base_offset=next_offset, epoch=epoch)
            held.append(batch)
            next_offset += count
            size_bytes += len(batch)
        return c.BufferSlice(
            topic_id=topic_id,
            topic="orders",
            partition=partition,
            epoch=epoch,
            base_offset=base,
            end_offset=next_offset,
            record_count=next_offset - base,
            size_bytes=size_bytes,
        )

    async def pull_slice(self, request: ingest_pb2.PullSliceRequest) -> AsyncIterator[ingest_pb2.PullSliceResponse]:
        self.pulls += 1
        if self.down:
            raise Unavailable("the agent is down")
        held = self.batches[(request.topic_id, request.partition, request.epoch)]
        wanted = [b for b in held if request.base_offset <= read_batch_header(b).base_offset < request.end_offset]
        for batch in self.tamper(wanted):
            yield ingest_pb2.PullSliceResponse(batches=[batch])


def records_of(partition: int, base: int, count: int) -> Records:
    values = [f"value {partition}/{base + number}".encode() * 3 for number in range(count)]
    return Records.from_lists(values, keys=[str(base + number).encode() for number in range(count)], timestamps_ms=base)


async def stored_records(store: ObjectStore, segment: types_pb2.SegmentRef) -> list[tuple[int, bytes | None]]:
    """(offset, value) of every record of a registered segment, read back from the store."""

    async def read(at: int, size_bytes: int) -> bytes:
        return await store.get(segment.object_key, at=segment.object_at + at, size_bytes=size_bytes)

    header, index = await run_plan_async(open_segment(segment.size_bytes), read)
    assert (header.topic_id, header.partition) == (segment.topic_id, segment.partition)
    found: list[tuple[int, bytes | None]] = []
    for entry in index:
        records = decode_batch(await run_plan_async(read_block(entry), read))
        found += zip(records.offsets.tolist(), records.values.to_list(), strict=True)
    return found


async def assert_all_stored(coordinator: StandInCoordinator, store: ObjectStore, agent: StandInAgent) -> None:
    """Every acknowledged record is in exactly one registered segment, at its offset, byte for byte."""
    for (topic_id, partition, _), batches in agent.batches.items():
        sent = [decode_batch(batch) for batch in batches]
        expected = [pair for r in sent for pair in zip(r.offsets.tolist(), r.values.to_list(), strict=True)]
        segments = coordinator.of_partition(topic_id, partition)
        found = [pair for segment in segments for pair in await stored_records(store, segment)]
        assert found == expected, f"partition {partition}"
