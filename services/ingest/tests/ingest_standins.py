"""A coordinator and a segmenter in memory: the calls an ingest agent makes, with the rules of registration."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from shformat import Records
from shproto import events
from shproto.errors import (
    AWAY,
    RENEWED,
    AgentIdTaken,
    DataLoss,
    Fenced,
    MetadataWentBack,
    Overloaded,
    SessionExpired,
    Unavailable,
    UnknownTopic,
)
from shproto.model import Segment
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_ingest.wiring import IngestService

from services.ingest.tests.ingest_agents import pull

MIB = 1024 * 1024


@dataclass
class Range:
    topic: str
    topic_id: bytes
    partition: int
    epoch: int
    start: int
    limit: int
    registered_end: int
    wal_id: bytes
    agent_id: str
    end: int | None = None
    status: str = "open"
    snapshot: bytes = b""
    lost: list[tuple[int, int]] = field(default_factory=list)

    @property
    def key(self) -> tuple[bytes, int, int]:
        return (self.topic_id, self.partition, self.epoch)

    @property
    def finished(self) -> bool:
        return self.status == "lost" or (self.end is not None and self.registered_end >= self.end)


@dataclass
class SessionState:
    token: str
    session_id: str
    agent_id: str
    wal_id: bytes
    address: str


class CoordinatorStandIn:
    """`down` makes every call fail, `database_away` as for want of PostgreSQL. `busy`:
    heartbeats renew the lease and are refused all the same. `calls` counts them by name.
    `told_bytes_max`: of producer snapshots in one answer."""

    def __init__(self, *, width: int = 2**30, ttl_ms: int = 30_000, heartbeat_ms: int = 10_000) -> None:
        self.width = width
        self.ttl_ms = ttl_ms
        self.heartbeat_ms = heartbeat_ms
        self.told_full: list[bool] = []  # what agents said of the room in their logs
        self.topics: dict[str, pb.TopicInfo] = {}
        self.cut_off_agents: set[str] = set()
        self.ranges: dict[tuple[bytes, int, int], Range] = {}
        self.sessions: dict[str, SessionState] = {}
        self.buffers: dict[str, pb.AnnounceBufferRequest] = {}
        self.events: list[pb.Event] = []
        self.calls: dict[str, int] = {}
        self.down = False
        self.database_away = False
        self.busy = False
        self.told_bytes_max = 2**60
        self.version = 0
        self.history_id = "history"
        self.producer_ids_from = 0
        self.opened: list[pb.OpenSessionRequest] = []
        self._news = asyncio.Event()
        self.feed_error: Exception | None = None

    def _called(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.down:
            raise Unavailable("the coordinator is down")
        if self.database_away:
            raise Unavailable("PostgreSQL does not answer", database=AWAY)
        if self.busy and name == "heartbeat":
            raise Overloaded("too many calls at once", lease=RENEWED)

    def emit(self, event: events.Event) -> None:
        row = pb.Event(
            position=len(self.events) + 1,
            stream_id=event.stream_id,
            type=type(event).__name__,
            payload_json=event.to_json(),
        )
        self.events.append(row)
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()

    def emit_closed(self, session_id: str) -> None:
        """The session ends, and its events say so."""
        session = next(session for session in self.sessions.values() if session.session_id == session_id)
        self.expire_all()
        self.emit(events.SessionClosed(session_id=session_id, agent_id=session.agent_id, role="ingest", why="expired"))

    def break_feeds(self, error: Exception) -> None:
        """Streams of events that run end with this error."""
        self.feed_error = error
        self._news.set()
        self._news = asyncio.Event()

    # ---- topics

    def create(self, topic: str, partitions: int = 1, min_acks: int = types_pb2.ACKS_WAL) -> bytes:
        info = pb.TopicInfo(topic_id=uuid.uuid4().bytes, topic=topic, partitions=partitions, min_acks=min_acks)
        self.topics[topic] = info
        self.assign()
        return info.topic_id

    def delete(self, topic: str) -> None:
        info = self.topics.pop(topic)
        self.ranges = {key: row for key, row in self.ranges.items() if row.topic_id != info.topic_id}
        self.emit(events.TopicDeleted(info.topic_id.hex(), topic, 0))

    async def get_metadata(self, request: pb.GetMetadataRequest) -> pb.GetMetadataResponse:
        self._called("get_metadata")
        response = pb.GetMetadataResponse()
        for topic in request.topics:
            if topic not in self.topics:
                raise UnknownTopic(f"no topic {topic}", topic=topic)
            info = self.topics[topic]
            leaders = [
                pb.LeaderInfo(partition=row.partition, agent_id=row.agent_id, epoch=row.epoch)
                for row in self.ranges.values()
                if row.topic_id == info.topic_id and row.status == "open"
            ]
            response.topics.append(pb.TopicMetadata(topic=info, leaders=leaders))
        return response

    async def describe_topic(self, request: pb.DescribeTopicRequest) -> pb.DescribeTopicResponse:
        self._called("describe_topic")
        if request.topic not in self.topics:
            raise UnknownTopic(f"no topic {request.topic}", topic=request.topic)
        info = self.topics[request.topic]
        partitions = [pb.PartitionInfo(partition=partition) for partition in range(info.partitions)]
        for row in self.ranges.values():
            if row.topic_id == info.topic_id and (row.status == "lost" or not row.finished):
                owned = types_pb2.OffsetRange(
                    epoch=row.epoch,
                    start_offset=row.start,
                    limit_offset=row.limit,
                    registered_end=row.registered_end,
                    status=row.status,
                    agent_id=row.agent_id,
                )
                if row.end is not None:
                    owned.end_offset = row.end
                partitions[row.partition].ranges.append(owned)
            if row.topic_id == info.topic_id:
                registered = [span for span in row.lost if span[1] <= row.registered_end]
                partitions[row.partition].lost.extend(_lost_span(row, *span) for span in sorted(registered))
        return pb.DescribeTopicResponse(topic=info, partitions=partitions)

    # ---- sessions and ranges

    def assign(self) -> None:
        if not self.sessions:
            return
        session = list(self.sessions.values())[-1]
        for info in self.topics.values():
            for partition in range(info.partitions):
                of = [r for r in self.ranges.values() if (r.topic_id, r.partition) == (info.topic_id, partition)]
                last = max(of, key=lambda row: row.epoch, default=None)
                if last is None or last.status in ("settled", "orphaned", "lost"):
                    self._grant(info, partition, last, session)

    def _grant(self, info: pb.TopicInfo, partition: int, last: Range | None, session: SessionState) -> None:
        start = 0 if last is None else last.limit if last.end is None else last.end
        row = Range(
            info.topic,
            info.topic_id,
            partition,
            1 if last is None else last.epoch + 1,
            start,
            start + self.width,
            start,
            session.wal_id,
            session.agent_id,
            snapshot=b"" if last is None else last.snapshot,
        )
        self.ranges[row.key] = row
        hex_id = info.topic_id.hex()
        self.emit(
            events.EpochGranted(
                topic_id=hex_id,
                topic=info.topic,
                partition=partition,
                epoch=row.epoch,
                session_id=session.session_id,
                agent_id=session.agent_id,
                wal_id=session.wal_id.hex(),
                start_offset=row.start,
                limit_offset=row.limit,
            )
        )

    def settle(self, row: Range, end: int, snapshot: bytes = b"") -> None:
        if row.status in ("open", "orphaned", "moving"):
            row.end, row.status = max(end, row.registered_end), "settled"
            row.snapshot += snapshot
            self.emit(
                events.RangeSettled(
                    topic_id=row.topic_id.hex(), partition=row.partition, epoch=row.epoch, end_offset=row.end
                )
            )

    def lose(self, row: Range) -> None:
        row.end, row.status = row.limit, "lost"
        self.emit(
            events.RangeLost(
                topic_id=row.topic_id.hex(),
                partition=row.partition,
                epoch=row.epoch,
                end_offset=row.limit,
                why="operator",
            )
        )

    def move(self, topic: str, partition: int) -> None:
        row = next(r for r in self.ranges.values() if (r.topic, r.partition, r.status) == (topic, partition, "open"))
        row.status = "moving"
        self.emit(
            events.MoveRequested(
                topic_id=row.topic_id.hex(),
                topic=topic,
                partition=partition,
                epoch=row.epoch,
                session_id="",
                agent_id=row.agent_id,
            )
        )

    def cut_off(self, agent_id: str) -> None:
        """Its workers cannot reach it: all it leads moves, without waiting for them."""
        self.cut_off_agents.add(agent_id)
        self.emit(events.AgentCutOff(agent_id=agent_id, session_id="", reporters=("s1", "s2"), since_ms=0, times=1))
        for row in [row for row in self.ranges.values() if row.agent_id == agent_id and row.status == "open"]:
            self.move(row.topic, row.partition)

    async def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        self._called("open_session")
        self.opened.append(request)
        if request.history_id not in ("", self.history_id) or request.seen_position > len(self.events):
            raise MetadataWentBack("went back", history_id=self.history_id, position=len(self.events))
        for other in list(self.sessions.values()):
            if other.agent_id == request.agent_id and other.wal_id != request.wal_id:
                raise AgentIdTaken("taken", agent_id=request.agent_id)
            if other.wal_id == request.wal_id:
                del self.sessions[other.token]
        session = SessionState(str(uuid.uuid4()), str(uuid.uuid4()), request.agent_id, request.wal_id, request.address)
        self.sessions[session.token] = session
        position = len(self.events)
        ends = {(end.topic_id, end.partition, end.epoch): end.end_offset for end in request.wal_ends}
        snapshots = {(end.topic_id, end.partition, end.epoch): end.producer_snapshot for end in request.wal_ends}
        own = [row for row in self.ranges.values() if row.wal_id == request.wal_id and not row.finished]
        if request.torn:
            for row in own:
                row.status = "orphaned" if row.status == "open" else row.status
            self.assign()
        for row in own:
            end = ends.get(row.key, row.limit if request.ends_unknown else row.registered_end)
            self.settle(row, end, snapshots.get(row.key, b""))
        self.buffers.clear()
        self.assign()
        return pb.OpenSessionResponse(
            session_token=session.token,
            session_id=session.session_id,
            ttl_ms=self.ttl_ms,
            heartbeat_interval_ms=self.heartbeat_ms,
            resumed=self._within([grant for grant in self._grants(request.wal_id) if grant.status != "open"]),
            feed_position=position,
            history_id=self.history_id,
            producer_ids_from=self.producer_ids_from,
        )

    def _session(self, token: str) -> SessionState:
        if token not in self.sessions:
            raise SessionExpired("gone")
        return self.sessions[token]

    def expire_all(self) -> None:
        """Every session ends; open ranges are orphaned."""
        self.sessions.clear()
        for row in self.ranges.values():
            if row.status == "open":
                row.status = "orphaned"

    def _grants(self, wal_id: bytes) -> list[pb.RangeGrant]:
        own = [row for row in self.ranges.values() if row.wal_id == wal_id]
        return [self._grant_of(row) for row in own if row.status == "lost" or not row.finished]

    def _within(self, grants: list[pb.RangeGrant]) -> list[pb.RangeGrant]:
        """In an answer: from the first snapshot on that does not fit all are omitted, but never the first one."""
        used, full = 0, False
        for grant in sorted(grants, key=lambda grant: (grant.topic_id, grant.partition, grant.epoch)):
            size_bytes = len(grant.producer_snapshot)
            full = full or (used > 0 and used + size_bytes > self.told_bytes_max)
            used += size_bytes
            if size_bytes and full:
                grant.producer_snapshot, grant.snapshot_omitted = b"", True
        return grants

    def _grant_of(self, row: Range) -> pb.RangeGrant:
        grant = pb.RangeGrant(
            topic_id=row.topic_id,
            topic=row.topic,
            partition=row.partition,
            epoch=row.epoch,
            start_offset=row.start,
            limit_offset=row.limit,
            registered_end=row.registered_end,
            min_acks=self.topics[row.topic].min_acks,
            producer_snapshot=row.snapshot,
            status=row.status,
            at_once=row.status == "moving" and row.agent_id in self.cut_off_agents,
        )
        if row.end is not None:
            grant.end_offset = row.end
        return grant

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        self._called("heartbeat")
        self._session(request.session_token)
        if request.HasField("log_full"):
            self.told_full.append(request.log_full)
        extended = []
        for use in request.low_ranges:
            row = self.ranges[(use.topic_id, use.partition, use.epoch)]
            if row.limit - use.next_offset < self.width // 4:
                row.limit += self.width
            extended.append(self._grant_of(row))
        return pb.HeartbeatResponse(ttl_ms=self.ttl_ms, grants_version=self.version, extended=extended)

    async def get_grants(self, request: pb.GetGrantsRequest) -> pb.GetGrantsResponse:
        self._called("get_grants")
        session = self._session(request.session_token)
        only = {(key.topic_id, key.partition, key.epoch) for key in request.only}
        grants = [
            grant
            for grant in self._grants(session.wal_id)
            if not only or (grant.topic_id, grant.partition, grant.epoch) in only
        ]
        return pb.GetGrantsResponse(grants=self._within(grants), grants_version=self.version, position=len(self.events))

    async def settle_ranges(self, request: pb.SettleRangesRequest) -> pb.SettleRangesResponse:
        self._called("settle_ranges")
        self._session(request.session_token)
        for end in request.ends:
            row = self.ranges[(end.topic_id, end.partition, end.epoch)]
            self.settle(row, end.end_offset, end.producer_snapshot)
        self.assign()
        return pb.SettleRangesResponse()

    async def close_session(self, request: pb.CloseSessionRequest) -> pb.CloseSessionResponse:
        self._called("close_session")
        self.sessions.pop(request.session_token, None)
        for end in request.ends:
            row = self.ranges[(end.topic_id, end.partition, end.epoch)]
            self.settle(row, end.end_offset, end.producer_snapshot)
        for row in self.ranges.values():
            if row.status == "open":
                row.status = "orphaned"
        return pb.CloseSessionResponse()

    # ---- buffers

    async def announce_buffer(self, request: pb.AnnounceBufferRequest) -> pb.AnnounceBufferResponse:
        self._called("announce_buffer")
        self._session(request.session_token)
        self.buffers.setdefault(request.buffer_id, request)
        return pb.AnnounceBufferResponse()

    def complete(self, buffer_id: str) -> None:
        self.buffers.pop(buffer_id, None)
        self.emit(events.BufferCompleted(buffer_id, ""))

    def register(self, key: tuple[bytes, int, int], base: int, end: int, snapshot: bytes = b"", lost: str = "") -> bool:
        """The compare-and-set: False when the span does not begin at registered_end or leaves the range."""
        row = self.ranges.get(key)
        if row is None or base != row.registered_end or end > (row.limit if row.end is None else row.end):
            return False
        row.registered_end = end
        row.snapshot = snapshot or row.snapshot
        for newer in self.ranges.values():  # at its beginning a range has what is newest of an older one
            same = (newer.topic_id, newer.partition) == (row.topic_id, row.partition)
            if same and newer.epoch > row.epoch and newer.status == "open" and newer.registered_end == newer.start:
                newer.snapshot = snapshot or newer.snapshot
        segment = Segment(
            segment_id=str(uuid.uuid4()),
            topic_id=row.topic_id.hex(),
            topic=row.topic,
            partition=row.partition,
            epoch=row.epoch,
            base_offset=base,
            end_offset=end,
            record_count=end - base,
            object_key="",
            object_at=0,
            size_bytes=0,
            raw_bytes=0,
            first_timestamp_ms=0,
            max_timestamp_ms=0,
            lost_reason=lost,
        )
        self.emit(events.SegmentRegistered(segment, ""))
        return True

    async def report_lost(self, request: pb.ReportLostRequest) -> pb.ReportLostResponse:
        self._called("report_lost")
        self._session(request.session_token)
        for span in request.spans:
            row = self.ranges[(span.topic_id, span.partition, span.epoch)]
            if (span.base_offset, span.end_offset) not in row.lost:
                row.lost.append((span.base_offset, span.end_offset))
            self.register(row.key, span.base_offset, span.end_offset, lost=span.reason)
        return pb.ReportLostResponse()

    def fill_holes(self) -> None:
        """Registers the reported holes that registration has reached."""
        for row in self.ranges.values():
            for base, end in row.lost:
                self.register(row.key, base, end, lost="damaged")

    # ---- events

    async def follow_events(self, request: pb.FollowEventsRequest) -> AsyncIterator[pb.Event]:
        self._called("follow_events")
        position = request.after_position
        while True:
            news = self._news
            while position < len(self.events):
                event = self.events[position]
                position += 1
                if not request.types or event.type in request.types:
                    yield event
            await news.wait()
            if self.feed_error is not None:
                error, self.feed_error = self.feed_error, None
                raise error
            if self.down:
                raise Unavailable("the coordinator is down")


class SegmenterStandIn:
    """Pulls announced buffers and registers them; `segments` is the object store: key -> records."""

    def __init__(self, coordinator: CoordinatorStandIn, service: IngestService) -> None:
        self.coordinator = coordinator
        self.service = service
        self.segments: dict[tuple[bytes, int, int, int], Records] = {}

    async def drain(self) -> int:
        """Builds everything announced so far; returns how many buffers."""
        done = 0
        for buffer_id, request in list(self.coordinator.buffers.items()):
            try:
                for part in request.slices:
                    await self._build(buffer_id, part)
            except DataLoss:
                continue  # tried again with the next round, as a segmenter does
            except Fenced:
                pass  # registered meanwhile under another announcement
            self.coordinator.complete(buffer_id)
            done += 1
        return done

    async def _build(self, buffer_id: str, part: pb.BufferSlice) -> None:
        self.coordinator.fill_holes()
        key = (part.topic_id, part.partition, part.epoch)
        records = await pull(self.service, key, part.base_offset, part.end_offset, buffer_id)
        if self.coordinator.register(key, part.base_offset, part.end_offset, part.producer_snapshot):
            self.segments[(*key, part.base_offset)] = records
            self.coordinator.fill_holes()

    async def run(self) -> None:
        while True:
            if not await self.drain():
                await asyncio.sleep(0.005)


def _lost_span(row: Range, base_offset: int, end_offset: int) -> pb.LostSpan:
    return pb.LostSpan(
        topic_id=row.topic_id,
        partition=row.partition,
        epoch=row.epoch,
        base_offset=base_offset,
        end_offset=end_offset,
        reason="damaged",
    )
