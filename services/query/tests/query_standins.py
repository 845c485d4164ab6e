"""A coordinator and ingest agents small enough to read, that keep the promises the query service relies on."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from shformat import Records, SegmentBuilder, encode_batch, read_batch_header, stamp_batch
from shproto import events as ev
from shproto.errors import MetadataWentBack, SessionExpired, Unavailable, UnknownTopic
from shproto.model import Segment
from shproto.v1 import coordinator_pb2, ingest_pb2, types_pb2
from shstore import MemoryStore, ObjectStore

RANGE_WIDTH = 1 << 30


@dataclass
class Range:
    epoch: int
    start: int
    limit: int
    agent_id: str
    registered_end: int
    status: str = "open"
    end: int | None = None


@dataclass
class Partition:
    log_start: int = 0
    ranges: list[Range] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)


class StandInCoordinator:
    """Keeps its own state beside the events, so that a snapshot is not made by the code under test."""

    def __init__(self) -> None:
        self.events: list[coordinator_pb2.Event] = []
        self.topics: dict[str, ev.TopicCreated] = {}
        self.partitions: dict[tuple[str, int], Partition] = {}
        self.sessions: dict[str, ev.SessionOpened] = {}
        self.history_id = "first"
        self.missing_position = 0
        self.down = False
        self.feed_paused = False
        self.snapshots_given = 0
        self.reached: dict[str, bool] = {}  # what query services said of agents last
        self.cut_streams = 0
        self._changed = asyncio.Condition()

    async def emit(self, *events: ev.Event) -> None:
        for event in events:
            self.events.append(
                coordinator_pb2.Event(
                    position=len(self.events) + 1,
                    stream_id=event.stream_id,
                    type=type(event).__name__,
                    payload_json=event.to_json(),
                )
            )
        await self.wake()

    async def wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def cut(self) -> None:
        """Breaks all event streams that are open."""
        self.cut_streams += 1
        await self.wake()

    # ---- what the query service calls

    async def follow_events(self, request: coordinator_pb2.FollowEventsRequest) -> AsyncIterator[coordinator_pb2.Event]:
        cuts, position = self.cut_streams, request.after_position
        if request.history_id != self.history_id:
            raise MetadataWentBack(f"followed is {request.history_id!r}, this is {self.history_id!r}")
        while True:
            self._must_be_up()
            await self._news(position, cuts)
            if self.cut_streams != cuts:
                raise Unavailable("stream cut")
            self._must_be_up()
            for event in self.events[position:]:
                yield event
            position = len(self.events)

    async def _news(self, position: int, cuts: int) -> None:
        """Until there is something to send after `position`, or the stream is to end."""
        async with self._changed:
            while self.cut_streams == cuts and not self.down:
                if len(self.events) > position and not self.feed_paused:
                    return
                await self._changed.wait()

    async def get_snapshot(
        self, request: coordinator_pb2.GetSnapshotRequest
    ) -> AsyncIterator[coordinator_pb2.SnapshotPart]:
        self._must_be_up()
        self.snapshots_given += 1
        position = len(self.events)
        sessions = [
            coordinator_pb2.SessionInfo(
                agent_id=item.agent_id, role=item.role, address=item.address, session_id=item.session_id
            )
            for item in self.sessions.values()
        ]
        yield coordinator_pb2.SnapshotPart(position=position, history_id=self.history_id, sessions=sessions)
        for created in self.topics.values():
            for number in range(created.partitions):
                partition = self.partitions[created.topic_id, number]
                # In two parts, as a large partition comes.
                half = len(partition.segments) // 2
                for segments in (partition.segments[:half], partition.segments[half:]):
                    part = coordinator_pb2.SnapshotPartition(
                        topic=_topic_info(created),
                        partition=number,
                        log_start_offset=partition.log_start,
                        ranges=[_offset_range(item) for item in partition.ranges],
                        segments=[segment_ref(item) for item in segments],
                    )
                    yield coordinator_pb2.SnapshotPart(position=position, history_id=self.history_id, partitions=[part])

    async def get_head(self, request: coordinator_pb2.GetHeadRequest) -> coordinator_pb2.GetHeadResponse:
        self._must_be_up()
        return coordinator_pb2.GetHeadResponse(
            events_position=len(self.events), history_id=self.history_id, missing_position=self.missing_position
        )

    async def describe_topic(
        self, request: coordinator_pb2.DescribeTopicRequest
    ) -> coordinator_pb2.DescribeTopicResponse:
        self._must_be_up()
        if request.topic not in self.topics:
            raise UnknownTopic(f"there is no topic {request.topic!r}")
        created = self.topics[request.topic]
        infos = [
            coordinator_pb2.PartitionInfo(
                partition=number,
                epoch=item.ranges[-1].epoch if item.ranges else 0,
                registered_end=item.ranges[-1].registered_end if item.ranges else 0,
            )
            for number in range(created.partitions)
            for item in [self.partitions[created.topic_id, number]]
        ]
        return coordinator_pb2.DescribeTopicResponse(
            topic=_topic_info(created), partitions=infos, events_position=len(self.events)
        )

    async def open_session(self, request: coordinator_pb2.OpenSessionRequest) -> coordinator_pb2.OpenSessionResponse:
        self._must_be_up()
        session_id = str(uuid.uuid4())
        await self.add_session(
            ev.SessionOpened(
                session_id=session_id,
                agent_id=request.agent_id,
                role=request.role,
                address=request.address,
                wal_id=request.wal_id.hex(),
                started_ms=0,
            )
        )
        return coordinator_pb2.OpenSessionResponse(
            session_token=session_id, session_id=session_id, ttl_ms=300, heartbeat_interval_ms=20
        )

    async def heartbeat(self, request: coordinator_pb2.HeartbeatRequest) -> coordinator_pb2.HeartbeatResponse:
        self._must_be_up()
        if request.session_token not in self.sessions:
            raise SessionExpired("no such session")
        self.reached.update({item.agent_id: item.reached for item in request.agents})
        check = [
            coordinator_pb2.AgentAddress(agent_id=opened.agent_id, address=opened.address)
            for opened in self.sessions.values()
            if self.reached.get(opened.agent_id) is False
        ]
        return coordinator_pb2.HeartbeatResponse(ttl_ms=300, check=check)

    async def close_session(self, request: coordinator_pb2.CloseSessionRequest) -> coordinator_pb2.CloseSessionResponse:
        await self.end_session(request.session_token, "closed")
        return coordinator_pb2.CloseSessionResponse()

    async def add_session(self, opened: ev.SessionOpened) -> None:
        self.sessions[opened.session_id] = opened
        await self.emit(opened)

    async def end_session(self, session_id: str, why: str) -> None:
        opened = self.sessions.pop(session_id)
        await self.emit(ev.SessionClosed(session_id=session_id, agent_id=opened.agent_id, role=opened.role, why=why))

    def _must_be_up(self) -> None:
        if self.down:
            raise Unavailable("no coordinator")


class StandInAgent:
    """Answers ReadTail as the ingest service does: from acknowledged batches per epoch."""

    def __init__(self, agent_id: str) -> None:
        self.agent_id = agent_id
        self.wal_id = uuid.uuid5(uuid.NAMESPACE_DNS, agent_id).hex
        self.address = f"{agent_id}:1"
        self.logs: dict[tuple[str, int, int], list[bytes]] = {}
        self.starts: dict[tuple[str, int, int], int] = {}
        self.held_from: dict[tuple[str, int, int], int] = {}
        self.down = False
        self.hangs = False
        self.calls = 0
        self.calls_waiting = 0
        self._changed = asyncio.Condition()

    def hold(self, topic_id: str, partition: int, epoch: int, start: int) -> None:
        key = (topic_id, partition, epoch)
        self.logs[key], self.starts[key], self.held_from[key] = [], start, start

    def next_offset(self, key: tuple[str, int, int]) -> int:
        batches = self.logs[key]
        return read_batch_header(batches[-1]).end_offset if batches else self.starts[key]

    async def append(self, topic_id: str, partition: int, epoch: int, batch: bytes) -> int:
        key = (topic_id, partition, epoch)
        base = self.next_offset(key)
        self.logs[key].append(bytes(stamp_batch(batch, base, epoch)))
        async with self._changed:
            self._changed.notify_all()
        return base

    def find(self, topic_id: str, partition: int, offset: int) -> tuple[str, int, int] | None:
        found = None
        for key, start in sorted(self.starts.items()):
            if key[:2] == (topic_id, partition) and start <= offset <= self.next_offset(key):
                found = key
        return found

    async def describe_agent(self, request: ingest_pb2.DescribeAgentRequest) -> ingest_pb2.DescribeAgentResponse:
        if self.down:
            raise Unavailable("connection refused", address=self.address)
        if self.hangs:
            await asyncio.Event().wait()
        return ingest_pb2.DescribeAgentResponse()

    async def read_tail(self, request: ingest_pb2.ReadTailRequest) -> ingest_pb2.ReadTailResponse:
        self.calls += 1
        if self.down:
            raise Unavailable("connection refused", address=self.address)
        if self.hangs:
            await asyncio.Event().wait()
        topic_id = request.topic_id.hex()
        key = self.find(topic_id, request.partition, request.offset)
        if key is None:
            return ingest_pb2.ReadTailResponse(not_held=True)
        if request.max_wait_ms and self.next_offset(key) == request.offset:
            async with self._changed:
                self.calls_waiting += 1
                try:
                    async with asyncio.timeout(request.max_wait_ms / 1000):
                        await self._changed.wait_for(lambda: self.next_offset(key) > request.offset)
                except TimeoutError:
                    pass
                finally:
                    self.calls_waiting -= 1
        response = ingest_pb2.ReadTailResponse(
            high_watermark=self.next_offset(key), tail_start_offset=self.held_from[key]
        )
        size = 0
        for batch in self.logs[key]:
            header = read_batch_header(batch)
            if header.end_offset <= request.offset or header.base_offset < self.held_from[key]:
                continue
            if response.batches and size + len(batch) > request.max_bytes:
                break
            if request.offset < self.held_from[key]:
                break
            response.batches.append(batch)
            size += len(batch)
        return response


class StandInPlatform:
    """Both, and the moves that a test makes."""

    def __init__(self, store: ObjectStore | None = None) -> None:
        self.coordinator = StandInCoordinator()
        self.store: ObjectStore = store or MemoryStore()
        self.agents: dict[str, StandInAgent] = {}

    def ingest_at(self, address: str) -> StandInAgent:
        return self.agents[address.removesuffix(":1")]

    async def create_topic(self, topic: str = "orders", partitions: int = 1, *, durable: bool = False) -> str:
        topic_id = uuid.uuid4().hex
        acks = types_pb2.ACKS_DURABLE if durable else types_pb2.ACKS_WAL
        created = ev.TopicCreated(
            topic_id=topic_id,
            topic=topic,
            partitions=partitions,
            retention_ms=None,
            retention_bytes=None,
            min_acks=acks,
            unclean_recovery_after_ms=None,
            created_ms=0,
        )
        self.coordinator.topics[topic] = created
        for number in range(partitions):
            self.coordinator.partitions[topic_id, number] = Partition()
        await self.coordinator.emit(created)
        return topic_id

    async def add_partitions(self, topic: str, partitions: int) -> None:
        before = self.coordinator.topics[topic]
        self.coordinator.topics[topic] = replace(before, partitions=partitions)
        for number in range(before.partitions, partitions):
            self.coordinator.partitions[before.topic_id, number] = Partition()
        await self.coordinator.emit(
            ev.TopicAltered(
                topic_id=before.topic_id,
                topic=topic,
                partitions_before=before.partitions,
                partitions=partitions,
                retention_ms=None,
                retention_bytes=None,
                min_acks=before.min_acks,
                unclean_recovery_after_ms=None,
            )
        )

    async def delete_topic(self, topic: str) -> None:
        created = self.coordinator.topics.pop(topic)
        await self.coordinator.emit(ev.TopicDeleted(created.topic_id, topic, 0))

    def partition(self, topic: str = "orders", number: int = 0) -> Partition:
        return self.coordinator.partitions[self.coordinator.topics[topic].topic_id, number]

    async def start_agent(self, agent_id: str) -> StandInAgent:
        agent = self.agents.setdefault(agent_id, StandInAgent(agent_id))
        opened = ev.SessionOpened(
            session_id=f"session-{uuid.uuid4()}",
            agent_id=agent_id,
            role="ingest",
            address=agent.address,
            wal_id=agent.wal_id,
            started_ms=0,
        )
        await self.coordinator.add_session(opened)
        return agent

    async def stop_agent(self, agent_id: str) -> None:
        for session in list(self.coordinator.sessions.values()):
            if session.agent_id == agent_id:
                await self.coordinator.end_session(session.session_id, "expired")

    async def grant(self, agent_id: str, topic: str = "orders", number: int = 0, *, start: int | None = None) -> int:
        """The next epoch, from where the previous range ends or else from its limit; the epoch."""
        topic_id = self.coordinator.topics[topic].topic_id
        ranges = self.partition(topic, number).ranges
        epoch = ranges[-1].epoch + 1 if ranges else 1
        if start is None:
            start = (ranges[-1].end if ranges[-1].end is not None else ranges[-1].limit) if ranges else 0
        ranges.append(Range(epoch, start, start + RANGE_WIDTH, agent_id, start))
        agent = self.agents[agent_id]
        agent.hold(topic_id, number, epoch, start)
        await self.coordinator.emit(
            ev.EpochGranted(
                topic_id=topic_id,
                topic=topic,
                partition=number,
                epoch=epoch,
                session_id="",
                agent_id=agent_id,
                wal_id=agent.wal_id,
                start_offset=start,
                limit_offset=start + RANGE_WIDTH,
            )
        )
        return epoch

    async def produce(
        self,
        values: Sequence[bytes | None],
        topic: str = "orders",
        number: int = 0,
        *,
        timestamps_ms: int | Sequence[int] = 0,
        epoch: int | None = None,
    ) -> int:
        """The base offset."""
        item = self._range(topic, number, epoch)
        batch = encode_batch(Records.from_lists(list(values), timestamps_ms=timestamps_ms))
        topic_id = self.coordinator.topics[topic].topic_id
        return await self.agents[item.agent_id].append(topic_id, number, item.epoch, batch)

    def _range(self, topic: str, number: int, epoch: int | None) -> Range:
        ranges = self.partition(topic, number).ranges
        return ranges[-1] if epoch is None else next(item for item in ranges if item.epoch == epoch)

    def _key(self, topic: str, number: int, epoch: int) -> tuple[str, int, int]:
        return self.coordinator.topics[topic].topic_id, number, epoch

    async def register(
        self,
        topic: str = "orders",
        number: int = 0,
        *,
        epoch: int | None = None,
        block_bytes_target: int = 1 << 20,
        give_up: bool = True,
    ) -> Segment:
        """Everything that is produced and not registered becomes one segment; the agent gives it up."""
        item = self._range(topic, number, epoch)
        key = self._key(topic, number, item.epoch)
        agent = self.agents[item.agent_id]
        batches = [b for b in agent.logs[key] if read_batch_header(b).base_offset >= item.registered_end]
        segment = await self.store_segment(topic, number, item.epoch, batches, block_bytes_target)
        if give_up:
            agent.held_from[key] = segment.end_offset
        await self.register_segment(segment, number)
        return segment

    async def store_segment(
        self, topic: str, number: int, epoch: int, batches: Sequence[bytes], block_bytes_target: int = 1 << 20
    ) -> Segment:
        topic_id = self.coordinator.topics[topic].topic_id
        builder = SegmentBuilder(bytes.fromhex(topic_id), number, epoch, block_bytes_target=block_bytes_target)
        for batch in batches:
            builder.add(batch)
        built = builder.finish()
        info = built.info
        object_key = f"data/{topic}/{number}/{info.base_offset:020}-{epoch}-{uuid.uuid4().hex[:8]}.seg"
        await self.store.put(object_key, built.parts)
        return Segment(
            segment_id=str(uuid.uuid4()),
            topic_id=topic_id,
            topic=topic,
            partition=number,
            epoch=epoch,
            base_offset=info.base_offset,
            end_offset=info.end_offset,
            record_count=info.record_count,
            object_key=object_key,
            object_at=0,
            size_bytes=info.size_bytes,
            raw_bytes=info.raw_bytes,
            first_timestamp_ms=info.first_timestamp_ms,
            max_timestamp_ms=info.max_timestamp_ms,
        )

    async def register_segment(self, segment: Segment, number: int = 0) -> None:
        partition = self.coordinator.partitions[segment.topic_id, number]
        partition.segments.append(segment)
        partition.segments.sort(key=lambda item: item.base_offset)
        self._range(segment.topic, number, segment.epoch).registered_end = segment.end_offset
        await self.coordinator.emit(ev.SegmentRegistered(segment, "buffer"))

    async def lose_span(self, end_offset: int, reason: str, topic: str = "orders", number: int = 0) -> None:
        """The agent found a hole in its log from registered_end on."""
        item = self._range(topic, number, None)
        segment = Segment(
            segment_id=str(uuid.uuid4()), topic_id=self._key(topic, number, 0)[0], topic=topic, partition=number,
            epoch=item.epoch, base_offset=item.registered_end, end_offset=end_offset, record_count=0, object_key="",
            object_at=0, size_bytes=0, raw_bytes=0, first_timestamp_ms=0, max_timestamp_ms=0, lost_reason=reason,
        )  # fmt: skip
        await self.register_segment(segment, number)

    async def orphan(self, topic: str = "orders", number: int = 0, *, epoch: int | None = None) -> None:
        item = self._range(topic, number, epoch)
        item.status = "orphaned"
        topic_id = self.coordinator.topics[topic].topic_id
        await self.coordinator.emit(ev.RangeOrphaned(topic_id=topic_id, partition=number, epoch=item.epoch))

    async def settle(
        self, topic: str = "orders", number: int = 0, *, epoch: int | None = None, end: int | None = None
    ) -> None:
        """At what the agent holds, or at `end`."""
        item = self._range(topic, number, epoch)
        key = self._key(topic, number, item.epoch)
        item.status = "settled"
        item.end = self.agents[item.agent_id].next_offset(key) if end is None else end
        await self.coordinator.emit(
            ev.RangeSettled(topic_id=key[0], partition=number, epoch=item.epoch, end_offset=item.end)
        )

    async def lose_range(self, end: int, topic: str = "orders", number: int = 0, *, epoch: int | None = None) -> None:
        item = self._range(topic, number, epoch)
        item.status, item.end = "lost", end
        topic_id = self.coordinator.topics[topic].topic_id
        await self.coordinator.emit(
            ev.RangeLost(topic_id=topic_id, partition=number, epoch=item.epoch, end_offset=end, why="operator")
        )

    async def compact(self, merged: Segment, replaced: Sequence[Segment], number: int = 0) -> None:
        gone = {item.segment_id for item in replaced}
        partition = self.coordinator.partitions[merged.topic_id, number]
        kept = [item for item in partition.segments if item.segment_id not in gone]
        partition.segments = sorted([*kept, merged], key=lambda item: item.base_offset)
        await self.coordinator.emit(ev.SegmentsCompacted(merged, tuple(gone)))

    async def retain_from(self, offset: int, topic: str = "orders", number: int = 0) -> None:
        partition = self.partition(topic, number)
        gone = [item for item in partition.segments if item.end_offset <= offset]
        partition.segments = [item for item in partition.segments if item.end_offset > offset]
        partition.log_start = offset
        topic_id = self.coordinator.topics[topic].topic_id
        await self.coordinator.emit(
            ev.LogStartMoved(
                topic_id=topic_id,
                partition=number,
                log_start_offset=offset,
                removed_segment_ids=tuple(item.segment_id for item in gone),
                why="time",
            )
        )


def values_of(count: int, start: int = 0, size_bytes: int = 20) -> list[bytes | None]:
    """Values that differ and do not compress to nothing."""
    return [
        uuid.uuid5(uuid.NAMESPACE_URL, str(n)).bytes.hex().encode()[:size_bytes] for n in range(start, start + count)
    ]


def _topic_info(created: ev.TopicCreated) -> coordinator_pb2.TopicInfo:
    return coordinator_pb2.TopicInfo(
        topic_id=bytes.fromhex(created.topic_id),
        topic=created.topic,
        partitions=created.partitions,
        min_acks=types_pb2.Acks.ValueType(created.min_acks),
    )


def _offset_range(item: Range) -> types_pb2.OffsetRange:
    return types_pb2.OffsetRange(
        epoch=item.epoch,
        start_offset=item.start,
        limit_offset=item.limit,
        registered_end=item.registered_end,
        end_offset=item.end,
        status=item.status,
        agent_id=item.agent_id,
        wal_id=uuid.uuid5(uuid.NAMESPACE_DNS, item.agent_id).bytes,
    )


def segment_ref(segment: Segment) -> types_pb2.SegmentRef:
    return types_pb2.SegmentRef(
        **{name: getattr(segment, name) for name in Segment.__slots__ if name != "topic_id"},
        topic_id=bytes.fromhex(segment.topic_id),
    )


__all__ = ["StandInAgent", "StandInPlatform", "replace", "segment_ref", "values_of"]
