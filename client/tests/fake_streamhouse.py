"""A small honest StreamHouse on one gRPC port: the three APIs over an in-memory log, with faults to switch on.

Honest: batches are validated and stamped, sequences are checked with the rules of the real agent (last five batches
remembered, unknown producers accepted), answers come in order, groups rebalance and commits are fenced by the rules of
the real coordinator.
"""

import asyncio
import contextlib
import itertools
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from shformat import decode_batch, read_batch_header, stamp_batch, validate_batch
from shproto import errors
from shproto.v1 import coordinator_pb2, ingest_pb2, query_pb2, types_pb2
from shruntime.server import RpcServer, ServerLimits
from streamhouse_coordinator.core import groups as rules

WAIT_MAX_MS = 200


@dataclass
class Faults:
    """What goes wrong, as countdowns: set a number, it is used up."""

    not_leader: int = 0
    overloaded: int = 0
    retry_after_ms: int = 20
    # After this many batches (None: never) the stream ends; the batch is written or not, but not acknowledged.
    cut_after: int | None = None
    cut_writes: bool = True
    answer_delay_ms: int = 0
    hold: asyncio.Event | None = None  # batches that have come are taken once it is set
    refuse_batch: errors.StreamHouseError | None = None
    refuse_all: errors.StreamHouseError | None = None  # until set back
    silent: bool = False  # takes requests, never answers
    metadata_down: bool = False
    metadata_hangs: bool = False
    subscribe_cut_after: int | None = None  # responses
    no_leader: bool = False
    lookups_refused: int = 0  # of offsets, as by a server that is too busy
    reader: str = ""  # addresses, with commas, that are said to serve reads instead of this one
    leader: str = ""  # an address that is said to lead instead of this one
    session_ends_s: float | None = None  # of the event loop's clock; None: the leader's session is renewed all the time
    latest_behind: int = 0  # records by which lookups of the end are out of date
    lookups_down: bool = False
    heartbeats_down: bool = False
    join_down: bool = False
    refuse_commits: list[errors.StreamHouseError] = field(default_factory=list)
    windows_unknown: bool = False  # as a query service of before there were any
    fetch_error: dict[tuple[str, int], errors.StreamHouseError] = field(default_factory=dict)


@dataclass
class StoredBatch:
    data: bytes
    base_offset: int
    end_offset: int


class PartitionLog:
    """`gaps` maps the end of one epoch's offsets to the start of the next one's."""

    def __init__(self) -> None:
        self.batches: list[StoredBatch] = []
        self.start_offset = 0
        self.next_offset = 0
        self.epoch = 1
        self.gaps: dict[int, int] = {}
        self.producers: dict[int, list[tuple[int, int, int]]] = {}

    def append(self, data: bytes) -> tuple[int, bool]:
        header = validate_batch(data)
        stamp = header.producer
        if stamp is not None and stamp.producer_id in self.producers:
            known = self.producers[stamp.producer_id]
            for sequence, count, base in known:
                if (sequence, count) == (stamp.base_sequence, header.record_count):
                    return base, True
            expected = known[-1][0] + known[-1][1]
            if stamp.base_sequence != expected:
                raise errors.SequenceGap("gap", expected=expected, got=stamp.base_sequence)
        base = self.next_offset
        self.next_offset = base + header.record_count
        self.batches.append(StoredBatch(bytes(stamp_batch(data, base, self.epoch)), base, self.next_offset))
        if stamp is not None:
            known = self.producers.setdefault(stamp.producer_id, [])
            known.append((stamp.base_sequence, header.record_count, base))
            del known[:-5]
        return base, False

    def new_epoch(self, start_offset: int) -> None:
        if start_offset != self.next_offset:
            self.gaps[self.next_offset] = start_offset
        self.epoch += 1
        self.next_offset = start_offset

    def read(self, offset: int, max_bytes: int) -> tuple[list[bytes], int]:
        """Whole batches from `offset` on, up to `max_bytes` decoded and the next gap of epochs; the next offset."""
        if offset < self.start_offset:
            raise errors.OffsetBelowStart("below", offset=offset, log_start_offset=self.start_offset)
        if offset > self.next_offset:
            raise errors.OffsetBeyondEnd("beyond", offset=offset, high_watermark=self.next_offset)
        found: list[bytes] = []
        size = 0
        for batch in self.batches:
            if batch.end_offset <= offset:
                continue
            size += read_batch_header(batch.data).decoded_bytes
            if found and (batch.base_offset != offset or size > max_bytes):
                break
            if not found and batch.base_offset > offset:
                break
            found.append(batch.data)
            offset = batch.end_offset
        end, start = next(((end, start) for end, start in self.gaps.items() if end <= offset < start), (0, 0))
        return found, start if end and offset >= end else offset

    def records(self) -> list[tuple[int, bytes | None]]:
        rows: list[tuple[int, bytes | None]] = []
        for batch in self.batches:
            columns = decode_batch(batch.data)
            rows.extend(zip(columns.offsets.tolist(), columns.values.to_list(), strict=True))
        return rows


@dataclass
class Group:
    """`members`: their topics. `owned`, `target`: names of partitions, by member."""

    generation: int = 0
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    owned: dict[str, frozenset[str]] = field(default_factory=dict)
    target: dict[str, frozenset[str]] = field(default_factory=dict)
    offsets: dict[tuple[str, int], int] = field(default_factory=dict)
    metadata: dict[tuple[str, int], str] = field(default_factory=dict)


class FakeStreamHouse:
    def __init__(self, listen: str = "127.0.0.1:0", limits: ServerLimits | None = None) -> None:
        self.faults = Faults()
        self.logs: dict[tuple[str, int], PartitionLog] = {}
        self.topics: dict[str, coordinator_pb2.TopicInfo] = {}
        self.groups: dict[str, Group] = defaultdict(Group)
        self.calls: Counter[str] = Counter()
        self.lives: Counter[str] = Counter()
        self.waiting: dict[tuple[str, int], str] = {}
        self.produced: list[ingest_pb2.ProduceRequest] = []
        self.commits: list[coordinator_pb2.CommitOffsetsRequest] = []
        self._ids = itertools.count(1)
        self._changed = asyncio.Event()
        services = [
            (coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"], self),
            (ingest_pb2.DESCRIPTOR.services_by_name["Ingest"], self),
            (query_pb2.DESCRIPTOR.services_by_name["Query"], self),
        ]
        self.server = RpcServer(listen, services, limits=limits)

    @property
    def address(self) -> str:
        return self.server.address

    async def __aenter__(self) -> "FakeStreamHouse":
        await self.server.start()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.server.stop(0)

    def __getattr__(self, name: str):
        """RPCs that the client never makes."""

        async def refuse(request: object) -> None:
            raise errors.Internal(f"the fake has no {name}")

        return refuse

    def add_topic(self, topic: str, partitions: int, min_acks: int = types_pb2.ACKS_WAL) -> None:
        """One of a name that was there before is another topic: another id, nothing committed."""
        life = bytes([self.lives[topic]])
        self.lives[topic] += 1
        for group in self.groups.values():
            group.offsets = {where: offset for where, offset in group.offsets.items() if where[0] != topic}
        self.topics[topic] = coordinator_pb2.TopicInfo(
            topic_id=topic.encode().ljust(15, b"\0") + life, topic=topic, partitions=partitions, min_acks=min_acks
        )
        self.logs.update({(topic, number): PartitionLog() for number in range(partitions)})

    def log(self, topic: str, partition: int) -> PartitionLog:
        return self.logs[topic, partition]

    def wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _topic(self, topic: str, topic_id: bytes = b"") -> coordinator_pb2.TopicInfo:
        if topic not in self.topics or topic_id not in (b"", self.topics[topic].topic_id):
            raise errors.UnknownTopic(f"no topic {topic}", topic=topic)
        return self.topics[topic]

    # ---- coordinator

    async def create_topic(self, request: coordinator_pb2.CreateTopicRequest) -> coordinator_pb2.TopicInfo:
        if request.topic in self.topics:
            raise errors.TopicExists(f"{request.topic} exists")
        self.add_topic(request.topic, request.partitions, request.min_acks)
        if request.HasField("retention_ms"):
            self.topics[request.topic].retention_ms = request.retention_ms
        self._refresh_readers()
        return self.topics[request.topic]

    async def alter_topic(self, request: coordinator_pb2.AlterTopicRequest) -> coordinator_pb2.TopicInfo:
        info = self._topic(request.topic)
        for name in request.unset:
            info.ClearField(name)
        for name in ("retention_ms", "retention_bytes", "unclean_recovery_after_ms"):
            if request.HasField(name):
                setattr(info, name, getattr(request, name))
        if request.min_acks:
            info.min_acks = request.min_acks
        if request.HasField("partitions"):
            new = range(info.partitions, request.partitions)
            self.logs.update({(request.topic, number): PartitionLog() for number in new})
            info.partitions = request.partitions
        return info

    async def delete_records(
        self, request: coordinator_pb2.DeleteRecordsRequest
    ) -> coordinator_pb2.DeleteRecordsResponse:
        self._topic(request.topic)
        log = self.logs[request.topic, request.partition]
        log.start_offset = max(log.start_offset, request.before_offset)
        return coordinator_pb2.DeleteRecordsResponse(log_start_offset=log.start_offset)

    async def delete_topic(self, request: coordinator_pb2.DeleteTopicRequest) -> coordinator_pb2.DeleteTopicResponse:
        info = self._topic(request.topic)
        del self.topics[request.topic]
        self._refresh_readers()
        return coordinator_pb2.DeleteTopicResponse(topic_id=info.topic_id)

    async def list_topics(self, request: coordinator_pb2.ListTopicsRequest) -> coordinator_pb2.ListTopicsResponse:
        return coordinator_pb2.ListTopicsResponse(topics=self.topics.values())

    async def describe_topic(
        self, request: coordinator_pb2.DescribeTopicRequest
    ) -> coordinator_pb2.DescribeTopicResponse:
        info = self._topic(request.topic)
        response = coordinator_pb2.DescribeTopicResponse(topic=info)
        for number in range(info.partitions):
            log = self.log(request.topic, number)
            newest = max(log.gaps.values(), default=0)
            part = response.partitions.add(
                partition=number,
                leader_agent_id="agent-1",
                leader_address=self.address,
                epoch=log.epoch,
                log_start_offset=log.start_offset,
                registered_end=newest,
                record_count=sum(b.end_offset - b.base_offset for b in log.batches if b.end_offset <= newest),
            )
            part.ranges.add(
                epoch=log.epoch, start_offset=newest, limit_offset=newest + 2**30, registered_end=newest, status="open"
            )
        return response

    async def get_metadata(self, request: coordinator_pb2.GetMetadataRequest) -> coordinator_pb2.GetMetadataResponse:
        self.calls["get_metadata"] += 1
        if self.faults.metadata_hangs:
            await asyncio.Event().wait()
        if self.faults.metadata_down:
            raise errors.Unavailable("no PostgreSQL")
        response = coordinator_pb2.GetMetadataResponse(
            query_addresses=(self.faults.reader or self.address).split(","), coordinator_addresses=[self.address]
        )
        for topic in request.topics:
            info = self._topic(topic)
            leader = "" if self.faults.no_leader else self.faults.leader or self.address
            leaders = [
                coordinator_pb2.LeaderInfo(partition=number, agent_id="agent-1", address=leader, epoch=1)
                for number in range(info.partitions)
            ]
            response.topics.append(coordinator_pb2.TopicMetadata(topic=info, leaders=leaders))
        return response

    async def init_producer(self, request: coordinator_pb2.InitProducerRequest) -> coordinator_pb2.InitProducerResponse:
        self.calls["init_producer"] += 1
        return coordinator_pb2.InitProducerResponse(producer_id=next(self._ids), producer_epoch=0)

    async def get_status(self, request: coordinator_pb2.GetStatusRequest) -> coordinator_pb2.GetStatusResponse:
        leader = self.faults.leader or self.address
        session = coordinator_pb2.SessionInfo(agent_id="agent-1", role="ingest", address=leader, expires_in_ms=30_000)
        if self.faults.session_ends_s is not None:
            left_s = self.faults.session_ends_s - asyncio.get_running_loop().time()
            session.expires_in_ms = max(0, round(left_s * 1000))
        return coordinator_pb2.GetStatusResponse(sessions=[session], events_position=7)

    # ---- ingest

    async def produce_stream(
        self, requests: AsyncIterator[ingest_pb2.ProduceRequest]
    ) -> AsyncIterator[ingest_pb2.ProduceResponse]:
        self.calls["produce_stream"] += 1
        async for request in requests:
            self.calls["produce"] += 1
            self.produced.append(request)
            faults = self.faults
            if faults.silent:
                continue
            if faults.hold is not None:
                await faults.hold.wait()
            if faults.answer_delay_ms:
                await asyncio.sleep(faults.answer_delay_ms / 1000)
            if faults.cut_after is not None:
                faults.cut_after -= 1
                if faults.cut_after < 0:
                    faults.cut_after = None
                    if faults.cut_writes:
                        self._append(request)
                    raise errors.Unavailable("cut")
            yield self._append(request)

    def _append(self, request: ingest_pb2.ProduceRequest) -> ingest_pb2.ProduceResponse:
        response = ingest_pb2.ProduceResponse(topic=request.topic, partition=request.partition, epoch=1)
        try:
            self._topic(request.topic, request.topic_id)
            self._trip()
            log = self.log(request.topic, request.partition)
            base, duplicate = log.append(request.batch)
            response.base_offset = -1 if request.acks == types_pb2.ACKS_NONE else base
            response.record_count = read_batch_header(request.batch).record_count
            response.duplicate = duplicate
            self.calls["duplicates"] += duplicate
            self.wake()
        except errors.StreamHouseError as error:
            response.error.CopyFrom(error.to_detail())
        return response

    def _trip(self) -> None:
        faults = self.faults
        if faults.not_leader:
            faults.not_leader -= 1
            raise errors.NotLeader("not me")
        if faults.overloaded:
            faults.overloaded -= 1
            raise errors.Overloaded("full", retry_after_ms=faults.retry_after_ms)
        if faults.refuse_all is not None:
            raise faults.refuse_all
        if faults.refuse_batch is not None:
            refusal, faults.refuse_batch = faults.refuse_batch, None
            raise refusal

    # ---- query

    async def subscribe(
        self, requests: AsyncIterator[query_pb2.SubscribeRequest]
    ) -> AsyncIterator[query_pb2.FetchResponse]:
        self.calls["subscribe"] += 1
        request = await anext(requests)
        windows = {
            number: position.window_bytes
            for number, position in enumerate(request.positions)
            if position.HasField("window_bytes") and not self.faults.windows_unknown
        }
        numbers = {(p.topic, p.partition): number for number, p in enumerate(request.positions)}
        updating = asyncio.create_task(self._update_windows(requests, windows))
        try:
            async with aclosing(self._responses(request, windows, numbers)) as responses:
                async for response in responses:
                    yield response
        finally:
            updating.cancel()
            await asyncio.gather(updating, return_exceptions=True)

    async def _update_windows(
        self, requests: AsyncIterator[query_pb2.SubscribeRequest], windows: dict[int, int]
    ) -> None:
        async for request in requests:
            for update in request.window_updates:
                if update.position in windows:
                    windows[update.position] += update.size_bytes
            self.wake()

    async def _responses(
        self, request: query_pb2.SubscribeRequest, windows: dict[int, int], numbers: dict[tuple[str, int], int]
    ) -> AsyncGenerator[query_pb2.FetchResponse, None]:
        positions = {(p.topic, p.partition): p.offset for p in request.positions}
        ids = {(p.topic, p.partition): p.topic_id for p in request.positions}
        told: dict[tuple[str, int], tuple[int, str]] = {}
        while positions:
            changed = self._changed
            idle = True
            for where in list(positions):
                number = numbers[where]
                if windows.get(number, 1) <= 0:
                    continue
                max_bytes = min(request.max_bytes or 1 << 20, windows.get(number, 1 << 62))
                response = self._fetch(where, ids[where], positions[where], max_bytes)
                if response.HasField("error"):
                    del positions[where]
                    yield response
                    continue
                news = (response.high_watermark, response.waiting_reason)
                if response.next_offset == positions[where] and told.get(where) == news:
                    continue
                if number in windows:
                    windows[number] -= sum(read_batch_header(batch).decoded_bytes for batch in response.batches)
                idle = idle and response.next_offset == positions[where]
                positions[where], told[where] = response.next_offset, news
                if self.faults.subscribe_cut_after is not None:
                    self.faults.subscribe_cut_after -= 1
                    if self.faults.subscribe_cut_after < 0:
                        self.faults.subscribe_cut_after = None
                        raise errors.Unavailable("cut")
                yield response
            if idle:
                await changed.wait()

    def _fetch(self, where: tuple[str, int], topic_id: bytes, offset: int, max_bytes: int) -> query_pb2.FetchResponse:
        response = query_pb2.FetchResponse(topic=where[0], partition=where[1], next_offset=offset)
        try:
            if where in self.faults.fetch_error:
                raise self.faults.fetch_error.pop(where)
            self._topic(where[0], topic_id)
            log = self.log(*where)
            response.high_watermark, response.log_start_offset = log.next_offset, log.start_offset
            response.waiting_reason = self.waiting.get(where, "")
            batches, response.next_offset = log.read(offset, max_bytes)
            response.batches.extend(batches)
        except errors.StreamHouseError as error:
            response.error.CopyFrom(error.to_detail())
        return response

    async def lookup_offsets(self, request: query_pb2.LookupOffsetsRequest) -> query_pb2.LookupOffsetsResponse:
        response = query_pb2.LookupOffsetsResponse()
        if self.faults.lookups_refused:
            self.faults.lookups_refused -= 1
            raise errors.Overloaded("too many calls", retry_after_ms=1)
        if self.faults.lookups_down:
            raise errors.Unavailable("no leader answers")
        for lookup in request.lookups:
            self._topic(lookup.topic, lookup.topic_id)
            log = self.log(lookup.topic, lookup.partition)
            offset, timestamp_ms = log.next_offset - self.faults.latest_behind, -1
            if lookup.spec == query_pb2.OFFSET_SPEC_EARLIEST:
                offset = log.start_offset
            elif lookup.spec == query_pb2.OFFSET_SPEC_LAST_RECORDS:
                offset = next(iter([found for found, _ in log.records()][-lookup.record_count :]), offset)
            elif lookup.spec == query_pb2.OFFSET_SPEC_TIMESTAMP:
                rows = [decode_batch(batch.data) for batch in log.batches]
                pairs = [p for r in rows for p in zip(r.offsets.tolist(), r.timestamps_ms.tolist(), strict=True)]
                offset, timestamp_ms = next((p for p in pairs if p[1] >= lookup.timestamp_ms), (log.next_offset, -1))
            response.offsets.add(
                topic=lookup.topic, partition=lookup.partition, offset=offset, timestamp_ms=timestamp_ms
            )
        return response

    # ---- groups

    async def join_group(self, request: coordinator_pb2.JoinGroupRequest) -> coordinator_pb2.GroupAssignment:
        self.calls["join_group"] += 1
        if self.faults.join_down:
            raise errors.Unavailable("no PostgreSQL")
        group = self.groups[request.group]
        member_id = request.member_id or f"member-{next(self._ids)}"
        if group.members.get(member_id) != tuple(request.topics) or self._is_outdated(group):
            group.members[member_id] = tuple(request.topics)
            self._rebalance(group)
        return self._assignment(group, member_id, frozenset(rules.name_of(w.topic, w.partition) for w in request.owned))

    def _partitions(self, group: Group) -> dict[str, int]:
        read = {topic for topics in group.members.values() for topic in topics}
        return {topic: info.partitions for topic, info in self.topics.items() if topic in read}

    def _state(self, group: Group) -> rules.Group:
        return rules.Group(
            name="", generation=group.generation, topics=group.members, owned=group.owned, target=group.target
        )

    def _is_outdated(self, group: Group) -> bool:
        return rules.outdated(self._state(group), self._partitions(group))

    def _refresh_readers(self) -> None:
        for group in self.groups.values():
            if group.members and self._is_outdated(group):
                self._rebalance(group)

    def _rebalance(self, group: Group) -> None:
        group.generation += 1
        group.owned = {member: owned for member, owned in group.owned.items() if member in group.members}
        target = rules.rebalance(group.members, self._partitions(group), group.target)
        group.target = {member: frozenset(names) for member, names in target.items()}
        self.wake()

    def _assignment(
        self, group: Group, member_id: str, reported: frozenset[str] | None = None
    ) -> coordinator_pb2.GroupAssignment:
        state = self._state(group)
        given, pending = rules.available(state, member_id)
        owned = rules.owned_after(state, member_id, reported, given)
        if group.owned.get(member_id, frozenset()) - owned:
            self.wake()
        group.owned[member_id] = owned
        return coordinator_pb2.GroupAssignment(
            member_id=member_id,
            generation=group.generation,
            assigned=[
                coordinator_pb2.TopicPartition(topic=topic, partition=number)
                for topic, number in sorted(map(rules.split_name, given))
            ],
            heartbeat_interval_ms=50,
            session_timeout_ms=1000,
            pending=pending,
        )

    async def heartbeat_group(self, request: coordinator_pb2.HeartbeatGroupRequest) -> coordinator_pb2.GroupAssignment:
        self.calls["heartbeat_group"] += 1
        if self.faults.heartbeats_down:
            raise errors.Unavailable("no PostgreSQL")
        group = self.groups[request.group]
        if request.member_id not in group.members:
            raise errors.UnknownMember(request.member_id)
        reported: frozenset[str] | None = frozenset(rules.name_of(w.topic, w.partition) for w in request.owned)
        told = reported
        deadline = asyncio.get_running_loop().time() + min(request.max_wait_ms, WAIT_MAX_MS) / 1000
        while True:
            changed = self._changed
            answer = self._assignment(group, request.member_id, reported)
            reported = None  # said once
            assigned = {rules.name_of(w.topic, w.partition) for w in answer.assigned}
            wait_s = deadline - asyncio.get_running_loop().time()
            if group.generation != request.generation or assigned - told or wait_s <= 0:
                return answer
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), wait_s)
            # Also after a timeout: the member may have been expelled in the moment before.
            if request.member_id not in group.members:
                raise errors.UnknownMember(request.member_id)

    def expel(self, group: str, member_id: str | None = None) -> None:
        """Forgets the member, or all, as after their sessions expired."""
        if member_id is None:
            self.groups[group].members.clear()
        else:
            self.groups[group].members.pop(member_id, None)
        self._rebalance(self.groups[group])

    async def leave_group(self, request: coordinator_pb2.LeaveGroupRequest) -> coordinator_pb2.LeaveGroupResponse:
        self.calls["leave_group"] += 1
        group = self.groups[request.group]
        group.members.pop(request.member_id, None)
        self._rebalance(group)
        return coordinator_pb2.LeaveGroupResponse()

    async def commit_offsets(
        self, request: coordinator_pb2.CommitOffsetsRequest
    ) -> coordinator_pb2.CommitOffsetsResponse:
        group = self.groups[request.group]
        if self.faults.refuse_commits:
            raise self.faults.refuse_commits.pop(0)
        names = [rules.name_of(item.topic, item.partition) for item in request.offsets]
        rules.check_commit(self._state(group), request.member_id, request.generation, names)
        for item in request.offsets:
            self._topic(item.topic, item.topic_id)
        self.commits.append(request)
        group.offsets.update({(o.topic, o.partition): o.offset for o in request.offsets})
        group.metadata.update({(o.topic, o.partition): o.metadata for o in request.offsets})
        return coordinator_pb2.CommitOffsetsResponse()

    async def list_groups(self, request: coordinator_pb2.ListGroupsRequest) -> coordinator_pb2.ListGroupsResponse:
        infos = [
            coordinator_pb2.GroupSummary(group=name, generation=group.generation, members=len(group.members))
            for name, group in self.groups.items()
        ]
        return coordinator_pb2.ListGroupsResponse(groups=infos)

    async def fetch_offsets(self, request: coordinator_pb2.FetchOffsetsRequest) -> coordinator_pb2.FetchOffsetsResponse:
        if request.group not in self.groups:
            raise errors.UnknownGroup(request.group)
        offsets = self.groups[request.group].offsets
        wanted = [(where.topic, where.partition) for where in request.partitions] or list(offsets)
        response = coordinator_pb2.FetchOffsetsResponse()
        for topic, number in wanted:
            found = response.offsets.add(topic=topic, partition=number, offset=offsets.get((topic, number), -1))
            found.topic_id = self.topics[topic].topic_id if found.offset >= 0 else b""
            found.metadata = self.groups[request.group].metadata.get((topic, number), "") if found.offset >= 0 else ""
        return response
