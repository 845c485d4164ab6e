"""One simulation: a cluster, its clients, its bad luck; then healing, and the proof that nothing was lost."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from shproto.errors import StreamHouseError
from shproto.services import CoordinatorClient, QueryClient
from shproto.v1 import coordinator_pb2, query_pb2, types_pb2
from shstore import MemoryStore
from streamhouse_ingest import wiring as ingest_wiring
from streamhouse_ingest.adapters import wal, wal_directory, wal_replay
from streamhouse_query import wiring as query_wiring

from tests.faults import history as h
from tests.faults.checker import check
from tests.faults.checks import Anomaly
from tests.simulation.cache import SimChunkCache
from tests.simulation.chance import seeded
from tests.simulation.database import Database
from tests.simulation.disk import FcntlModule, Machines, MmapModule, SimPath
from tests.simulation.loop import PROCESS as PROCESS_VAR
from tests.simulation.loop import Process, SimLoop, Stuck
from tests.simulation.nemesis import Nemesis
from tests.simulation.network import Network
from tests.simulation.nodes import (
    CoordinatorNode,
    IngestNode,
    Node,
    QueryNode,
    SegmenterNode,
    SimClock,
    Surroundings,
)
from tests.simulation.store import Rates as StoreRates
from tests.simulation.workload import READ_BYTES, History, Producer, Reader, Target, records_of

FAULTS_S = (3.0, 12.0)
"""How long the cluster has to stand faults. Long enough for leases (2.5 s) to run out several times."""
SETTLE_S = 90.0
"""How long everything may take to be registered and swept after healing: the orphans' grace is 8 s of it."""
FIRST_START_S = 1.0
POLL_S = 0.5
UNWIND_ROUNDS = 200


@dataclass
class Result:
    """What a seed showed. `log` is the same for the same seed, byte for byte."""

    seed: int
    log: list[str] = field(default_factory=list)
    anomalies: list[Anomaly] = field(default_factory=list)
    events: list[h.Event] = field(default_factory=list)
    steps: int = 0
    virtual_s: float = 0.0
    acknowledged: int = 0
    faults: int = 0


class World:
    def __init__(self, seed: int, rng: random.Random) -> None:
        self.result = Result(seed)
        self.judged = False
        self.rng = rng
        self.loop = SimLoop(random.Random(rng.getrandbits(64)))
        self.network = Network(self.loop, random.Random(rng.getrandbits(64)), self.log)
        clock = SimClock(self.loop)
        database = Database(self.network, random.Random(rng.getrandbits(64)), clock)
        objects = MemoryStore(now_ms=clock.wall_ms)
        self.around = Surroundings(
            self.loop, self.network, database, objects, StoreRates(), random.Random(rng.getrandbits(64)), self.log
        )
        self.history = History(self.loop.time)
        self.nodes = self._make_nodes()
        self.around.bootstrap = [node.address for node in self.nodes if isinstance(node, CoordinatorNode)]
        self.targets = [Target("plain", 2, "wal"), Target("safe", 1, "durable")]
        self.faults_s = FIRST_START_S + rng.uniform(*FAULTS_S)
        self.nemesis = Nemesis(self.around, self.nodes, random.Random(rng.getrandbits(64)), self.faults_s)
        self.loop.died = self.nemesis.died
        self.loop.connect = self.network.connect
        self.loop.executor_delay = self._executor_delay
        self.loop.set_exception_handler(self._unhandled)
        self.client = Process(self.loop, "client")

    def _make_nodes(self) -> list[Node]:
        counts: tuple[tuple[type[Node], int], ...] = (
            (CoordinatorNode, 2),
            (IngestNode, self.rng.choice((2, 3))),
            (SegmenterNode, 2),
            (QueryNode, self.rng.choice((1, 2))),
        )
        return [kind(self.around, f"{kind.kind}-{number}") for kind, many in counts for number in range(many)]

    def _executor_delay(self, process: Process, own: bool) -> float:
        return self.rng.uniform(0.0001, 0.002) if own else 0.0001

    def log(self, who: str, text: str) -> None:
        if self.judged:
            return
        self.result.log.append(f"{self.loop.time():12.6f} {who:14} {text}")

    def blame(self, kind: str, text: str) -> None:
        self.log("anomaly", f"{kind}: {text}")
        self.result.anomalies.append(Anomaly(kind, text))

    def _unhandled(self, loop: Any, context: dict[str, Any]) -> None:
        self.blame("unhandled", f"{context.get('message')}: {context.get('exception')!r} {context.get('task')}")

    # ---- the run

    async def run(self) -> None:
        for node in self.nodes:
            self.network.later(self.rng.uniform(0, 0.5), node.start)
        await self._create_topics()
        producers = self._producers()
        readers = self._readers()
        producing = [Process(self.loop, "client").spawn(producer.run()) for producer in producers]
        for reader in readers:
            Process(self.loop, "client").spawn(reader.run())
        self.nemesis.begin()
        await asyncio.sleep(max(0.0, self.faults_s - self.loop.time()))
        self.log("world", "heals")
        self.nemesis.heal()
        await asyncio.sleep(self.rng.uniform(0, 3))
        for producer in producers:
            producer.stopping = True
        await asyncio.gather(*producing)
        await self._settle(readers)

    async def _create_topics(self) -> None:
        coordinator = self.around.coordinator()
        for target in self.targets:
            request = coordinator_pb2.CreateTopicRequest(
                topic=target.topic,
                partitions=target.partitions,
                min_acks=types_pb2.ACKS_DURABLE if target.min_acks == "durable" else types_pb2.ACKS_WAL,
            )
            while True:
                try:
                    await coordinator.create_topic(request)
                    break
                except StreamHouseError:
                    await asyncio.sleep(0.2)
            self.history.write(h.Topic(target.topic, target.partitions, target.min_acks))

    def _producers(self) -> list[Producer]:
        producers = []
        for number in range(4):
            target = self.targets[number % len(self.targets)]
            rng = random.Random(self.rng.getrandbits(64))
            idempotent = number < 2 or self.rng.random() < 0.3
            producers.append(Producer(self.around, self.history, f"producer-{number}", target, rng, idempotent))
        return producers

    def _readers(self) -> list[Reader]:
        queries = [node.address for node in self.nodes if isinstance(node, QueryNode)]
        return [
            Reader(self.around, self.history, f"reader-{target.topic}-{partition}", target.topic, partition, queries)
            for target in self.targets
            for partition in range(target.partitions)
        ]

    # ---- the end

    async def _settle(self, readers: list[Reader]) -> None:
        deadline = self.loop.time() + SETTLE_S
        snapshot = await self._registered(deadline)
        if snapshot is None:
            return
        if not await self._read_everything(deadline):
            return
        await self._swept(deadline)
        snapshot = await self._registered(deadline)
        if snapshot is None:
            return
        while self._behind(readers) and self.loop.time() < deadline:
            await asyncio.sleep(POLL_S)
        for reader in readers:
            self.history.write(h.Position(reader.name, *reader.where, reader.offset))
        self._record(snapshot)
        self.history.write(h.End())

    def _behind(self, readers: list[Reader]) -> bool:
        return any(reader.offset < self.ends.get(reader.where, 0) for reader in readers)

    async def _registered(self, deadline: float) -> dict[tuple[str, int], Any] | None:
        """The metadata once nothing is unregistered; None if that never comes."""
        why = ["nothing was asked yet"]
        while self.loop.time() < deadline:
            try:
                snapshot = await take_snapshot(self.around.coordinator())
                why = self._unfinished(snapshot)
            except StreamHouseError as error:
                why = [f"no answer: {error.reason}: {error.message}"]
            if not why:
                return snapshot
            await asyncio.sleep(POLL_S)
        self.blame("not-settled", "; ".join(why))
        return None

    def _unfinished(self, snapshot: dict[tuple[str, int], Any]) -> list[str]:
        missing = []
        for (topic, partition), part in sorted(snapshot.items()):
            for item in part.ranges:
                open_end = item.status == "open" and item is part.ranges[-1]
                if not open_end and not (item.HasField("end_offset") and item.registered_end >= item.end_offset):
                    missing.append(
                        f"{topic}/{partition} epoch {item.epoch} of {item.agent_id} is {item.status}, registered to "
                        f"{item.registered_end} of {item.end_offset if item.HasField('end_offset') else '?'}"
                    )
        for node in self.nodes:
            if isinstance(node, IngestNode):
                try:
                    unregistered = node.describe() if node.up and node.service else -1
                except StreamHouseError as error:
                    missing.append(f"{node.name}: {error.message}")
                else:
                    if unregistered:
                        missing.append(f"{node.name} holds {unregistered} bytes that are not registered")
        return missing

    async def _read_everything(self, deadline: float) -> bool:
        self.ends: dict[tuple[str, int], int] = {}
        for node in self.nodes:
            if isinstance(node, QueryNode):
                for target in self.targets:
                    for partition in range(target.partitions):
                        if not await self._read_back(node, target.topic, partition, deadline):
                            return False
        return True

    async def _read_back(self, node: Node, topic: str, partition: int, deadline: float) -> bool:
        query, offset, why = QueryClient(self.around.connection([node.address])), 0, ""
        while self.loop.time() < deadline:
            request = query_pb2.FetchRequest(topic=topic, partition=partition, offset=offset, max_bytes=READ_BYTES)
            try:
                response = await query.fetch(request)
                why = response.waiting_reason
            except StreamHouseError as error:
                why = f"{error.reason}: {error.message}"
            if why:
                await asyncio.sleep(POLL_S)
                continue
            offsets, values = records_of(response, offset)
            self.history.write(h.ReadBack(node.name, topic, partition, h.spans_of(offsets), values))
            if response.next_offset == offset and offset >= response.high_watermark:
                self.ends[topic, partition] = max(offset, self.ends.get((topic, partition), 0))
                return True
            offset = response.next_offset
        self.blame("unreadable", f"{topic}/{partition} at {offset} by {node.name}: {why}")
        return False

    async def _swept(self, deadline: float) -> None:
        """Until the sweep has left only what is referred to; what it leaves is the checker's to find."""
        coordinator = self.around.coordinator()
        while self.loop.time() < deadline:
            try:
                snapshot = await take_snapshot(coordinator)
            except StreamHouseError:
                await asyncio.sleep(POLL_S)
                continue
            referred = {segment.object_key for part in snapshot.values() for segment in part.segments}
            if self._object_keys() <= referred:
                return
            await asyncio.sleep(1)

    def _object_keys(self) -> set[str]:
        return {key for key in self.around.objects._objects if key.startswith(("data/", "mixed/"))}

    def _record(self, snapshot: dict[tuple[str, int], Any]) -> None:
        for (topic, partition), part in sorted(snapshot.items()):
            for item in part.ranges:
                end = item.end_offset if item.HasField("end_offset") else -1
                self.history.write(
                    h.Range(
                        topic, partition, item.epoch, item.start_offset, item.limit_offset, item.registered_end, end,
                        item.status,
                    )
                )  # fmt: skip
            for ref in part.segments:
                key = "" if ref.lost_reason else ref.object_key
                self.history.write(
                    h.Segment(
                        ref.segment_id, topic, partition, ref.epoch, ref.base_offset, ref.end_offset, key,
                        ref.object_at, ref.size_bytes,
                    )
                )  # fmt: skip
        for key in sorted(self._object_keys()):
            self.history.write(h.StoredObject(key, self.around.objects._objects[key][0].size_bytes))

    # ---- after it

    def judge(self) -> None:
        report = check(self.history.events)
        for anomaly in report.anomalies:
            self.blame(anomaly.kind, anomaly.text)
        for defect in self.network.defects:
            self.blame("defect", defect)
        for node in self.nodes:
            for why in node.deaths:
                if not _may_end(node, why):
                    self.blame("died", f"{node.name}: {why}")
        result = self.result
        result.events = self.history.events
        result.acknowledged = report.acknowledged_records
        result.faults = len(self.nemesis.happened)
        result.steps, result.virtual_s = self.loop.steps, self.loop.time()
        self.log("world", f"{result.acknowledged} records acknowledged, {report.polled_records} polled")
        self.judged = True

    def unwind(self) -> None:
        """Ends every task, also of the dead, with nothing left that could matter."""
        self.loop.set_exception_handler(lambda loop, context: None)
        self.loop.died = lambda process, why: None
        for process in {task.process: None for task in self._tasks()}:
            process.alive, process.paused, process.steps_left = True, False, None
            self.loop.release(process)
        for _ in range(UNWIND_ROUNDS):
            tasks = self._tasks()
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(_a_moment())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())

    def _tasks(self) -> list[Any]:
        return sorted((task for task in asyncio.all_tasks(self.loop)), key=lambda task: task.number)


async def _a_moment() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def _may_end(node: Node, why: str) -> bool:
    """Ends that the faults explain: a disk that failed, an agent whose old session was still there."""
    return isinstance(node, IngestNode) and why.startswith(("WalBroken", "OSError", "stop: WalBroken", "stop: OSError"))


async def take_snapshot(coordinator: CoordinatorClient) -> dict[tuple[str, int], Any]:
    """Per partition its ranges and all its segments. Raises StreamHouseError."""
    found: dict[tuple[str, int], Any] = {}
    async for part in coordinator.get_snapshot(coordinator_pb2.GetSnapshotRequest()):
        for item in part.partitions:
            where = (item.topic.topic, item.partition)
            if where in found:
                found[where].segments.extend(item.segments)
            else:
                found[where] = item
    return found


class _LogHandler(logging.Handler):
    """Log records of the services, into the simulation's log. A defect that was caught and logged is an anomaly."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        process = PROCESS_VAR.get(self._world.loop.world)
        text = f"{record.levelname} {record.name}: {record.getMessage()}"
        self._world.log(process.name, text)
        if record.exc_info and record.exc_info[1] is not None:
            self._world.blame("defect", f"{process.name}: {text}: {record.exc_info[1]!r}")


@contextmanager
def _surroundings(world: World) -> Iterator[None]:
    """The services' modules meet the simulated machines instead of the real one."""
    machines = Machines(world.loop)
    handler = _LogHandler(world)
    root = logging.getLogger()
    level = root.level
    disks = {f"/{node.name}": node.disk for node in world.nodes if isinstance(node, IngestNode)}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ingest_wiring, "Path", lambda path: SimPath(disks[path])))
        for module in (wal, wal_directory, wal_replay):
            stack.enter_context(mock.patch.object(module, "os", machines))
        stack.enter_context(mock.patch.object(wal_directory, "fcntl", FcntlModule(machines)))
        stack.enter_context(mock.patch.object(wal_directory, "open", machines.open_text, create=True))
        stack.enter_context(mock.patch.object(wal_replay, "mmap", MmapModule(machines)))
        stack.enter_context(mock.patch.object(query_wiring, "DiskCache", SimChunkCache))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            root.removeHandler(handler)
            root.setLevel(level)


def simulate(seed: int) -> Result:
    """One seed, from the first start to the verdict."""
    SimChunkCache.disks.clear()
    with seeded(seed) as rng:
        world = World(seed, rng)
        with _surroundings(world):
            try:
                world.loop.run_until_complete(world.loop.create_task(world.run(), context=world.client.context))
            except Stuck as error:
                world.blame("stuck", str(error))
            except Exception as error:
                world.blame("simulation", f"{type(error).__name__}: {error}")
                logging.getLogger(__name__).debug("", exc_info=error)
            world.judge()
        world.unwind()
        world.loop.close()
    return world.result
