"""A whole cluster on one port, as `streamhouse serve` runs it: coordinator, ingest, query and segmenter, built from
their real parts over stores in memory; the write-ahead log and the cache are in a directory of the test.

Owns: the services and their server. Does not own: the loop they run on, the directory.
Invariants: services call each other directly; faults concern what comes over the server alone. Nothing happens to
leadership and group members by itself: their leases last for minutes, and no sweeper runs.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

from shformat import decode_batch
from shproto.v1 import coordinator_pb2, query_pb2
from shruntime.server import RpcServer, ServerLimits
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.service import groups
from streamhouse_ingest import wiring as ingest_wiring
from streamhouse_ingest.settings import IngestSettings
from streamhouse_ingest.wiring import IngestService
from streamhouse_query import wiring as query_wiring
from streamhouse_query.settings import QuerySettings
from streamhouse_query.wiring import QueryService
from streamhouse_segmenter import wiring as segmenter_wiring
from streamhouse_segmenter.settings import SegmenterSettings

from tests.platform.coordinator_peer import CoordinatorPeer, background
from tests.platform.faults import Faults
from tests.platform.platform import Platform

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """A group as the coordinator has it. `owned`: names of partitions, by member. `offsets`, `metadata`: those that are
    committed, by (topic, partition)."""

    generation: int = 0
    members: frozenset[str] = frozenset()
    owned: dict[str, frozenset[str]] = field(default_factory=dict)
    offsets: dict[tuple[str, int], int] = field(default_factory=dict)
    metadata: dict[tuple[str, int], str] = field(default_factory=dict)


class Cluster(Platform):
    """`faults`: of the calls that come over the server, and their counts. `address`: host:port, once started."""

    def __init__(
        self, directory: Path, listen: str = "127.0.0.1:0", limits: ServerLimits | None = None, **settings: Any
    ) -> None:
        super().__init__(**({"group_heartbeat_interval_ms": 50} | settings))
        self.coordinator = CoordinatorPeer(self.service.api)
        self.faults = Faults()
        self.directory = directory
        self._peers: list[Any] = []
        self.ingest = self.new_ingest("agent-1")
        self.query = self.new_query("cache")
        self.segmenter = segmenter_wiring.build(_settings()[2], self.coordinator, self.objects, self.ingest_at)
        coordinator = (coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"], self.service.api)
        apis = [coordinator, *self.ingest.apis, *self.query.apis]
        self._apis = [(descriptor, self.faults.served(descriptor, api)) for descriptor, api in apis]
        self._agents: dict[str, IngestService] = {}
        self._limits = limits
        self._running = AsyncExitStack()
        self.server = RpcServer(listen, self._apis, limits=limits)

    def new_ingest(self, agent_id: str) -> IngestService:
        """Returns an agent that is not started yet."""
        values = {"agent_id": agent_id, "wal_dir": str(self.directory / agent_id)}
        peer = CoordinatorPeer(self.service.api)
        self._peers.append(peer)
        return ingest_wiring.build(_settings()[0].model_copy(update=values), peer)

    def new_query(self, cache: str) -> QueryService:
        """Returns a query service that is not started yet."""
        settings = _settings()[1].model_copy(update={"cache_dir": self.directory / cache})
        return query_wiring.build(settings, self.coordinator, self.objects, self.ingest_at)

    def ingest_at(self, address: str) -> Any:
        return self._agents[address].api

    @property
    def address(self) -> str:
        return self.server.address

    async def start(self) -> None:
        """Starts all services and the server; a start that fails stops those that were started."""
        try:
            await self.start_services()
            await self.server.start()
        except BaseException:
            await self.stop()
            raise

    async def start_services(self) -> None:
        """Starts all but the server, which takes its port."""
        await self.server.bind()
        self._agents[self.address] = self.ingest
        await self._running.enter_async_context(background(self.service.feed.run()))
        await self.service.open_session(self.address)
        for service in (self.ingest, self.query, self.segmenter):
            self._running.push_async_callback(service.stop)
            await service.start(self.address)

    async def stop(self) -> None:
        await self.server.stop(0)
        await self._running.aclose()
        await self.service.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.stop()

    async def stop_listening(self) -> None:
        """Ends the server, with its connections; the services stay."""
        await self.server.stop(0)

    async def listen_again(self) -> None:
        """Serves at the address of before."""
        self.server = RpcServer(self.address, self._apis, limits=self._limits)
        await self.server.start()

    def advertise(self, *, leader: str | None = None, readers: Sequence[str] = ()) -> None:
        """Names other addresses in answers to GetMetadata, until that is mended: of all leaders (empty: nobody leads),
        and of query services."""

        def change(request: coordinator_pb2.GetMetadataRequest, answer: coordinator_pb2.GetMetadataResponse) -> None:
            if readers:
                answer.query_addresses[:] = readers
            if leader is not None:
                for found in (item for topic in answer.topics for item in topic.leaders):
                    found.address = leader

        self.faults.change("get_metadata", change)

    # ---- topics and their records

    async def create_topic(self, topic: str = "orders", partitions: int = 1, **settings: Any) -> bytes:
        """Returns the topic's id, once the agent leads all partitions and the query service knows them."""
        topic_id = await super().create_topic(topic, partitions, **settings)
        await self.led(topic)
        return topic_id

    async def led(self, topic: str) -> None:
        """Waits until the agent leads all partitions of the topic."""
        while 0 in self._epochs(topic):
            await asyncio.sleep(0.001)

    async def delete_topic(self, topic: str = "orders") -> None:
        """Returns once no agent leads a partition of the topic: an agent accepts its records until it reads the
        event."""
        partitions = range(self.partitions(topic))
        await super().delete_topic(topic)
        logs = [ingest.agent.running().logs for ingest in self._agents.values()]
        while any(found.led(topic, number) for found in logs for number in partitions):
            await asyncio.sleep(0.001)

    async def recreate_topic(self, topic: str, partitions: int) -> bytes:
        """Deletes the topic, and creates another one under its name before anybody notices. Returns its id."""
        await super().delete_topic(topic)
        return await self.create_topic(topic, partitions)

    async def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        request = coordinator_pb2.DeleteRecordsRequest(topic=topic, partition=partition, before_offset=before_offset)
        await self.service.api.delete_records(request)

    def forget_batches(self, topic: str, partition: int, from_offset: int) -> None:
        """Has the agent forget who wrote the batches of its epoch from an offset on, as a leader that never had
        them."""
        logs, topic_id = self.ingest.agent.running().logs, self._topic(topic).topic_id
        ranges = [row for row in self.rows(t.RANGES) if (row.topic_id, row.partition) == (topic_id, partition)]
        (epoch,) = {row.epoch for row in ranges if row.status == t.OPEN}
        logs.producers((self.topic_id(topic), partition)).forget(epoch, from_offset, 1 << 62)

    async def change_leader(self, topic: str) -> None:
        """Ends the sessions of all agents, as time does. A new agent goes on at the limits of their epochs, since
        nobody knows where those ended; then the others come back, and settle them. Waits until they have."""
        epochs, back = self._epochs(topic), asyncio.Event()
        for peer in self._peers:
            peer.open_session = partial(_once, back, peer.open_session)
        for row in self.rows(t.SESSIONS):
            if row.role == INGEST:
                await self.expire_session(row.session_id)
        other = await self._running.enter_async_context(AgentServer(self, f"agent-{len(self._agents) + 1}"))
        self._agents[other.address] = other.ingest
        back.set()
        while not self._settled(topic, epochs):
            await asyncio.sleep(0.001)

    def _settled(self, topic: str, epochs: Sequence[int]) -> bool:
        """Returns True if agents lead later epochs than these, by partition, and all earlier ones are settled."""
        topic_id, led = self._topic(topic).topic_id, self._epochs(topic)
        rows = [row for row in self.rows(t.RANGES) if row.topic_id == topic_id]
        return all(
            led[number] > before
            and all(row.status == t.SETTLED for row in rows if row.partition == number and row.epoch <= before)
            for number, before in enumerate(epochs)
        )

    def _epochs(self, topic: str) -> list[int]:
        """Returns the epochs that agents lead, by partition; 0: nobody does."""
        logs = [ingest.agent.running().logs for ingest in self._agents.values()]
        led = [[found.led(topic, number) for found in logs] for number in range(self.partitions(topic))]
        return [max((held.log.key.epoch for held in of if held is not None), default=0) for of in led]

    def has_topic(self, topic: str) -> bool:
        return any(row.topic == topic for row in self.rows(t.TOPICS))

    def _topic(self, topic: str) -> t.TopicRow:
        row: t.TopicRow = next(row for row in self.rows(t.TOPICS) if row.topic == topic)
        return row

    def partitions(self, topic: str) -> int:
        return self._topic(topic).partitions

    def topic_id(self, topic: str) -> bytes:
        return bytes.fromhex(self._topic(topic).topic_id)

    async def batches(self, topic: str = "t", partition: int = 0) -> list[bytes]:
        """Returns the encoded batches of the partition, as the query service has them."""
        found: list[bytes] = []
        start = query_pb2.OffsetLookup(topic=topic, partition=partition, spec=query_pb2.OFFSET_SPEC_EARLIEST)
        answer = await self.query.api.lookup_offsets(query_pb2.LookupOffsetsRequest(lookups=[start]))
        request = query_pb2.FetchRequest(topic=topic, partition=partition, offset=answer.offsets[0].offset)
        while True:
            response = await self.query.api.fetch(request)
            found += response.batches
            if response.next_offset == request.offset:
                return found
            request.offset = response.next_offset

    async def records(self, topic: str = "t", partition: int = 0) -> list[tuple[int, bytes | None]]:
        """Returns (offset, value) of every record of the partition."""
        rows = [decode_batch(batch) for batch in await self.batches(topic, partition)]
        return [pair for r in rows for pair in zip(r.offsets.tolist(), r.values.to_list(), strict=True)]

    async def values(self, topic: str = "t") -> list[bytes | None]:
        """Returns the values of all partitions of the topic, one partition after the other."""
        numbers = range(self.partitions(topic))
        return [value for number in numbers for _, value in await self.records(topic, number)]

    async def end(self, topic: str = "t", partition: int = 0) -> int:
        """Returns the offset behind the last record of the partition."""
        last = query_pb2.OffsetLookup(topic=topic, partition=partition, spec=query_pb2.OFFSET_SPEC_LATEST)
        answer = await self.query.api.lookup_offsets(query_pb2.LookupOffsetsRequest(lookups=[last]))
        return answer.offsets[0].offset

    # ---- groups

    def group(self, name: str) -> GroupState:
        """Returns the group as it is now; an empty one if there is none."""
        topics = {row.topic_id: row.topic for row in self.rows(t.TOPICS)}
        committed = [row for row in self.rows(t.GROUP_OFFSETS) if row.group_name == name and row.topic_id in topics]
        return GroupState(
            generation=next((row.generation for row in self.rows(t.GROUPS) if row.group_name == name), 0),
            members=frozenset(row.member_id for row in self.rows(t.GROUP_MEMBERS) if row.group_name == name),
            owned={
                row.member_id: frozenset(json.loads(row.owned))
                for row in self.rows(t.GROUP_MEMBER_STATE)
                if row.group_name == name
            },
            offsets={(topics[row.topic_id], row.partition): row.next_offset for row in committed},
            metadata={(topics[row.topic_id], row.partition): row.metadata for row in committed},
        )

    async def expel(self, group: str, member_id: str | None = None) -> None:
        """Ends the session of the member, or of all, as time does."""
        rows = self.metadata.tables.get(t.GROUP_MEMBER_STATE.name, {})
        gone = {key: row for key, row in rows.items() if row.group_name == group and member_id in (None, row.member_id)}
        rows.update({key: replace(row, expires_ms=0) for key, row in gone.items()})
        await groups.expire_members(self.service.context, group)


async def _once(event: asyncio.Event, call: Callable[[Any], Any], request: Any) -> Any:
    """Calls once the event is set."""
    await event.wait()
    return await call(request)


class AgentServer:
    """Another agent of the cluster, on a port of its own."""

    def __init__(self, cluster: Cluster, agent_id: str) -> None:
        self.ingest = cluster.new_ingest(agent_id)
        self._server = RpcServer("127.0.0.1:0", self.ingest.apis)

    @property
    def address(self) -> str:
        return self._server.address

    async def __aenter__(self) -> Self:
        await self._server.start()
        await self.ingest.start(self.address)
        return self

    async def __aexit__(self, *args: object) -> None:
        await self._server.stop(0)
        await self.ingest.stop()


class QueryServer:
    """Another query service of the cluster, on a port of its own. `faults`: of the calls that come over it."""

    def __init__(self, cluster: Cluster) -> None:
        self._query = cluster.new_query("cache of another")
        self.faults = Faults()
        served = [(descriptor, self.faults.served(descriptor, api)) for descriptor, api in self._query.apis]
        self._server = RpcServer("127.0.0.1:0", served)

    async def __aenter__(self) -> Self:
        await self._server.start()
        await self._query.start(self._server.address)
        return self

    async def stop(self) -> None:
        await self._server.stop(0)
        await self._query.stop()

    async def __aexit__(self, *args: object) -> None:
        await self.stop()


@cache
def _settings() -> tuple[IngestSettings, QuerySettings, SegmenterSettings]:
    """Returns the settings of all clusters; to read them takes as long as to start one."""
    # Agents end without a drain, whose segments nobody would read.
    ingest = IngestSettings.load({}, wal_fsync="never", wal_file_bytes=16 * MIB, shutdown_timeout_ms=1)
    return ingest, QuerySettings.load({}), SegmenterSettings.load({}, worker_id="segmenter")


class ThreadedCluster:
    """A cluster whose loop runs in another thread, for plain code: coroutines of the cluster are plain calls.
    `awaited`: the same cluster for code of another loop, which awaits them."""

    def __init__(self, cluster: Cluster, loop: asyncio.AbstractEventLoop) -> None:
        self._cluster = cluster
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cluster, name)
        if not inspect.iscoroutinefunction(value):
            return value
        call: Callable[..., Any] = value
        return lambda *args, **settings: asyncio.run_coroutine_threadsafe(call(*args, **settings), self._loop).result()

    @property
    def awaited(self) -> Any:
        return _Awaited(self)


class _Awaited:
    def __init__(self, cluster: ThreadedCluster) -> None:
        self._cluster = cluster

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cluster, name)
        return partial(asyncio.to_thread, value) if inspect.isfunction(value) else value


@contextmanager
def in_thread(directory: Path) -> Iterator[ThreadedCluster]:
    """Runs a cluster in another thread while the block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def started() -> Cluster:
        cluster = Cluster(directory)
        await cluster.start()
        return cluster

    try:
        cluster = ThreadedCluster(asyncio.run_coroutine_threadsafe(started(), loop).result(), loop)
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
