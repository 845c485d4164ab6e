"""A platform with agents whose tails are read, and the moves that a test makes.

Topics and the sessions of query services are the coordinator's own. Who leads a partition, what an agent has lost and
what is registered is said by the test: each such fact is an event in a transaction of the coordinator's store, from
which its tables, snapshots and feed follow.
"""

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from shformat import Records, SegmentBuilder, encode_batch, read_batch_header, stamp_batch
from shproto import events as ev
from shproto.errors import Unavailable
from shproto.keys import RangeKey
from shproto.model import Segment
from shproto.v1 import coordinator_pb2, ingest_pb2
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.assignment import start_of_next
from streamhouse_coordinator.core.sessions import INGEST

from tests.platform.coordinator_peer import CoordinatorPeer
from tests.platform.log_agent import LogAgent
from tests.platform.platform import Platform

RANGE_WIDTH = 1 << 30


class TailAgent(LogAgent):
    """Answers ReadTail as the ingest service does. `starts`: of the ranges it knows. `held_from`: it has given up
    what lies below. `down`: it refuses calls; `hangs`: it answers none."""

    def __init__(self, coordinator: Any, agent_id: str) -> None:
        super().__init__(coordinator, agent_id)
        self.wal_id = uuid.uuid5(uuid.NAMESPACE_DNS, agent_id).hex
        self.starts: dict[RangeKey, int] = {}
        self.held_from: dict[RangeKey, int] = {}
        self.down = False
        self.hangs = False
        self.calls = 0
        self.calls_waiting = 0
        self._changed = asyncio.Condition()

    def hold(self, key: RangeKey, start: int) -> None:
        self.batches[key], self.starts[key], self.held_from[key] = [], start, start

    def next_offset(self, key: RangeKey) -> int:
        batches = self.batches[key]
        return read_batch_header(batches[-1]).end_offset if batches else self.starts[key]

    async def acknowledge(self, key: RangeKey, batch: bytes) -> int:
        """Returns the base offset that the batch was given."""
        base = self.next_offset(key)
        self.batches[key].append(bytes(stamp_batch(batch, base, key[2])))
        async with self._changed:
            self._changed.notify_all()
        return base

    async def describe_agent(self, request: ingest_pb2.DescribeAgentRequest) -> ingest_pb2.DescribeAgentResponse:
        await self._must_answer()
        return ingest_pb2.DescribeAgentResponse()

    async def read_tail(self, request: ingest_pb2.ReadTailRequest) -> ingest_pb2.ReadTailResponse:
        self.calls += 1
        await self._must_answer()
        key = self._find(request.topic_id, request.partition, request.offset)
        if key is None:
            return ingest_pb2.ReadTailResponse(not_held=True)
        if request.max_wait_ms and self.next_offset(key) == request.offset:
            await self._grown(key, request.offset, request.max_wait_ms)
        held_from = self.held_from[key]
        response = ingest_pb2.ReadTailResponse(high_watermark=self.next_offset(key), tail_start_offset=held_from)
        if request.offset < held_from:
            return response
        size_bytes = 0
        for batch in self.batches[key]:
            header = read_batch_header(batch)
            if header.end_offset <= request.offset or header.base_offset < held_from:
                continue
            size_bytes += len(batch)
            if response.batches and size_bytes > request.max_bytes:
                break
            response.batches.append(batch)
        return response

    async def _must_answer(self) -> None:
        if self.down:
            raise Unavailable("connection refused", address=self.address)
        if self.hangs:
            await asyncio.Event().wait()

    def _find(self, topic_id: bytes, partition: int, offset: int) -> RangeKey | None:
        """Returns the newest range with the offset in it or at its end."""
        of_partition = [(key, start) for key, start in sorted(self.starts.items()) if key[:2] == (topic_id, partition)]
        found = [key for key, start in of_partition if start <= offset <= self.next_offset(key)]
        return found[-1] if found else None

    async def _grown(self, key: RangeKey, offset: int, max_wait_ms: int) -> None:
        async with self._changed:
            self.calls_waiting += 1
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(max_wait_ms / 1000):
                        await self._changed.wait_for(lambda: self.next_offset(key) > offset)
            finally:
                self.calls_waiting -= 1


class World(Platform):
    """`agents`: by id. `store`: the object store. Of the coordinator's background work only the feed runs: nothing
    happens to leadership that the test does not say."""

    def __init__(self, store: Any = None) -> None:
        super().__init__(
            objects=store, heartbeat_interval_ms=20, events_poll_interval_ms=100, range_width_offsets=RANGE_WIDTH
        )
        self.coordinator = CoordinatorPeer(self.service.api)
        self.store: Any = self.objects
        self.agents: dict[str, TailAgent] = {}

    def ingest_at(self, address: str) -> TailAgent:
        return self.agents[address.removesuffix(":1")]

    # ---- topics

    def topic_id(self, topic: str = "orders") -> bytes:
        return bytes.fromhex(next(row.topic_id for row in self.rows(t.TOPICS) if row.topic == topic))

    async def add_partitions(self, topic: str, partitions: int) -> None:
        await self.service.api.alter_topic(coordinator_pb2.AlterTopicRequest(topic=topic, partitions=partitions))

    # ---- agents

    async def start_agent(self, agent_id: str) -> TailAgent:
        """Opens a session in which nothing is granted to the agent yet, and which nothing but `stop_agent` ends."""
        agent = self.agents.setdefault(agent_id, TailAgent(self.coordinator, agent_id))
        opened = ev.SessionOpened(
            session_id=f"session-{uuid.uuid4()}",
            agent_id=agent_id,
            role=INGEST,
            address=agent.address,
            wal_id=agent.wal_id,
            started_ms=0,
        )
        await self.commit(opened)
        return agent

    def sessions_of(self, agent_id: str) -> list[t.SessionRow]:
        return [row for row in self.rows(t.SESSIONS) if row.agent_id == agent_id]

    async def stop_agent(self, agent_id: str) -> None:
        """Ends the agent's session; `orphan` is what follows for its ranges, so that readers see either."""
        for session in self.sessions_of(agent_id):
            await self.commit(
                ev.SessionClosed(session_id=session.session_id, agent_id=agent_id, role=INGEST, why="expired")
            )

    @property
    def reached(self) -> dict[str, bool]:
        """The last word of query services about each agent."""
        requests = self.coordinator.requests["heartbeat"]
        return {item.agent_id: item.reached for request in requests for item in request.agents}

    # ---- leadership

    async def grant(self, agent_id: str, topic: str = "orders", number: int = 0, *, start: int | None = None) -> int:
        """Lets the agent lead with the next epoch, from `start` or else where the coordinator would begin it; the agent
        may lead already, as of a topic created while it was there. Returns the epoch."""
        agent, topic_id = self.agents[agent_id], self.topic_id(topic)
        row = next(reversed(self._ranges(topic, number)), None)
        led = row is not None and row.status == t.OPEN and row.agent_id == agent_id
        if row is None or not led or (topic_id, number, row.epoch) in agent.starts:
            start_offset = start_of_next(row) if start is None else start
            await self.commit(
                ev.EpochGranted(
                    topic_id=topic_id.hex(),
                    topic=topic,
                    partition=number,
                    epoch=row.epoch + 1 if row is not None else 1,
                    session_id=next((s.session_id for s in self.sessions_of(agent_id)), ""),
                    agent_id=agent_id,
                    wal_id=agent.wal_id,
                    start_offset=start_offset,
                    limit_offset=start_offset + RANGE_WIDTH,
                )
            )
            row = self._range(topic, number)
        agent.hold(RangeKey(topic_id, number, row.epoch), row.start_offset)
        return row.epoch

    def _ranges(self, topic: str, number: int) -> list[t.RangeRow]:
        """Returns the partition's ranges, the newest last."""
        topic_id = self.topic_id(topic).hex()
        return sorted(
            (row for row in self.rows(t.RANGES) if row.key[:2] == (topic_id, number)), key=lambda row: row.key
        )

    def _range(self, topic: str, number: int, epoch: int | None = None) -> t.RangeRow:
        return next(row for row in reversed(self._ranges(topic, number)) if epoch in (None, row.epoch))

    async def orphan(self, topic: str = "orders", number: int = 0, *, epoch: int | None = None) -> None:
        row = self._range(topic, number, epoch)
        await self.commit(ev.RangeOrphaned(topic_id=row.topic_id, partition=number, epoch=row.epoch))

    async def settle(
        self, topic: str = "orders", number: int = 0, *, epoch: int | None = None, end: int | None = None
    ) -> None:
        """Settles the range where the agent's log ends, or at `end`."""
        row = self._range(topic, number, epoch)
        end_offset = self.agents[row.agent_id].next_offset(_key(row)) if end is None else end
        await self.commit(
            ev.RangeSettled(topic_id=row.topic_id, partition=number, epoch=row.epoch, end_offset=end_offset)
        )

    async def lose_range(self, end: int, topic: str = "orders", number: int = 0, *, epoch: int | None = None) -> None:
        row = self._range(topic, number, epoch)
        await self.commit(
            ev.RangeLost(topic_id=row.topic_id, partition=number, epoch=row.epoch, end_offset=end, why="operator")
        )

    # ---- records

    async def produce(
        self,
        values: Sequence[bytes | None],
        topic: str = "orders",
        number: int = 0,
        *,
        timestamps_ms: int | Sequence[int] = 0,
        epoch: int | None = None,
    ) -> int:
        """Returns the base offset."""
        records = Records.from_lists(list(values), timestamps_ms=timestamps_ms)
        return await self.produce_records(records, topic, number, epoch=epoch)

    async def produce_records(
        self, records: Records, topic: str = "orders", number: int = 0, *, epoch: int | None = None
    ) -> int:
        """Returns the base offset."""
        row = self._range(topic, number, epoch)
        return await self.agents[row.agent_id].acknowledge(_key(row), encode_batch(records))

    async def register(
        self,
        topic: str = "orders",
        number: int = 0,
        *,
        epoch: int | None = None,
        block_bytes_target: int = 1 << 20,
    ) -> Segment:
        """Makes one segment of all that is not registered; the agent gives it up."""
        row = self._range(topic, number, epoch)
        agent = self.agents[row.agent_id]
        batches = [b for b in agent.batches[_key(row)] if read_batch_header(b).base_offset >= row.registered_end]
        segment = await self.store_segment(topic, number, row.epoch, batches, block_bytes_target)
        agent.held_from[_key(row)] = segment.end_offset
        await self.register_segment(segment)
        return segment

    async def store_segment(
        self, topic: str, number: int, epoch: int, batches: Sequence[bytes], block_bytes_target: int = 1 << 20
    ) -> Segment:
        """Returns a segment that is stored and not registered."""
        topic_id = self.topic_id(topic)
        builder = SegmentBuilder(topic_id, number, epoch, block_bytes_target=block_bytes_target)
        for batch in batches:
            builder.add(batch)
        built = builder.finish()
        info = built.info
        object_key = f"data/{topic}/{number}/{info.base_offset:020}-{epoch}-{uuid.uuid4().hex[:8]}.seg"
        await self.store.put(object_key, built.parts)
        return Segment(
            segment_id=str(uuid.uuid4()),
            topic_id=topic_id.hex(),
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

    async def register_segment(self, segment: Segment) -> None:
        await self.commit(ev.SegmentRegistered(segment, "buffer"))

    async def lose_span(self, end_offset: int, reason: str, topic: str = "orders", number: int = 0) -> None:
        """Reports a hole in the agent's log, from what is registered on."""
        row = self._range(topic, number)
        lost = Segment(
            segment_id=str(uuid.uuid4()), topic_id=row.topic_id, topic=topic, partition=number,
            epoch=row.epoch, base_offset=row.registered_end, end_offset=end_offset, record_count=0, object_key="",
            object_at=0, size_bytes=0, raw_bytes=0, first_timestamp_ms=0, max_timestamp_ms=0, lost_reason=reason,
        )  # fmt: skip
        await self.register_segment(lost)

    async def compact(self, merged: Segment, replaced: Sequence[Segment]) -> None:
        await self.commit(ev.SegmentsCompacted(merged, tuple(item.segment_id for item in replaced)))

    async def retain_from(self, offset: int, topic: str = "orders", number: int = 0) -> None:
        topic_id = self.topic_id(topic)
        gone = [item.segment_id for item in self.of_partition(topic_id, number) if item.end_offset <= offset]
        await self.commit(
            ev.LogStartMoved(
                topic_id=topic_id.hex(),
                partition=number,
                log_start_offset=offset,
                removed_segment_ids=tuple(gone),
                why="retention_ms",
            )
        )

    # ---- events of other histories and versions

    def begin_history(self, history_id: str) -> None:
        """Lets the metadata go on in another history, as a restore does."""
        histories = self.metadata.tables[t.HISTORIES.name]
        nth = len(histories) + 1
        histories[(nth,)] = t.HistoryRow(
            nth=nth, history_id=history_id, from_position=self.position, producer_ids_from=0, created_ms=0
        )
        self.metadata.tables.pop(t.FORKS.name, None)

    def append_row(self, kind: str, payload: str) -> None:
        """Appends an event that this version would not write."""
        position = self.position + 1
        self.metadata.tables[t.EVENTS.name][(position,)] = t.EventRow(
            position=position, stream_id="test", version=1, type=kind, payload=payload, trace_context="", created_ms=0
        )
        self.service.feed.wake()


def _key(row: t.RangeRow) -> RangeKey:
    return RangeKey(bytes.fromhex(row.topic_id), row.partition, row.epoch)


def values_of(count: int, start: int = 0, size_bytes: int = 20) -> list[bytes | None]:
    """Returns values that differ and do not compress to nothing."""
    return [
        uuid.uuid5(uuid.NAMESPACE_URL, str(n)).bytes.hex().encode()[:size_bytes] for n in range(start, start + count)
    ]
