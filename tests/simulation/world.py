"""One simulation: a cluster, its clients, its bad luck; then healing, and the proof that nothing was lost."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from shproto.errors import StreamHouseError, TopicExists
from shproto.v1 import coordinator_pb2, types_pb2
from shstore import MemoryStore

from tests.faults import history as h
from tests.faults.checker import check
from tests.faults.checks import Anomaly
from tests.simulation.cache import SimChunkCache
from tests.simulation.chance import seeded
from tests.simulation.clock import SimClock
from tests.simulation.crash import Crash, OneCrash
from tests.simulation.crowd import EVERYBODY, Company, Crowd
from tests.simulation.database import Database
from tests.simulation.ending import Ending
from tests.simulation.history import History, RecordingConnection
from tests.simulation.loop import Process, SimLoop, SimTask, Stuck
from tests.simulation.nemesis import Nemesis, RandomNemesis
from tests.simulation.network import Network
from tests.simulation.nodes import (
    CoordinatorNode,
    IngestNode,
    Node,
    QueryNode,
    SegmenterNode,
    SimContext,
)
from tests.simulation.patches import LogHandler, patched
from tests.simulation.profiles import ORDINARY, PROFILES, Profile, drawn
from tests.simulation.store import StoreRates
from tests.simulation.workload import Target

FIRST_START_S = 1.0
RANGE_WIDTHS_OFFSETS = (16, 64)
"""So narrow that a range is extended several times in a run."""
SMALL_MESSAGES_SHARE = 0.3
"""Of the runs: in these no two partitions' producers fit into one message."""
CRASH_S = 2.5
"""Of a run in which one process dies once: every step of it is one run, so it is short."""
UNWIND_ROUNDS = 200


@dataclass(kw_only=True)
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
    def __init__(self, seed: int, rng: random.Random, profile: Profile, crash: Crash | None = None) -> None:
        self.result = Result(seed=seed)
        self.judged = False
        self.rng = rng
        self.loop = SimLoop(random.Random(rng.getrandbits(64)))
        self.network = Network(self.loop, random.Random(rng.getrandbits(64)), self.log)
        clock = SimClock(self.loop)
        database = Database(self.network, random.Random(rng.getrandbits(64)), clock)
        objects = MemoryStore(now_ms=clock.wall_ms)
        self.context = SimContext(
            loop=self.loop,
            network=self.network,
            database=database,
            objects=objects,
            store_rates=StoreRates(),
            rng=random.Random(rng.getrandbits(64)),
            log=self.log,
        )
        self.context.range_width_offsets = rng.choice(RANGE_WIDTHS_OFFSETS)
        self.history = History(self.loop.time)
        self.nodes = self._make_nodes(profile, crash is not None)
        self.context.bootstrap = [node.address for node in self.nodes if isinstance(node, CoordinatorNode)]
        self.targets = [Target("plain", 2, "wal"), Target("safe", 1, "durable")]
        company = EVERYBODY if crash is not None else _company(rng, profile)
        stream = Target("stream", rng.choice((1, 2)), rng.choice(("wal", "durable"))) if company.writers else None
        self.targets += [] if stream is None else [stream]
        own_luck = random.Random(rng.getrandbits(64))
        self.crowd = Crowd(self.context, self.history, self.targets, self.nodes, own_luck, company, self.blame, stream)
        self.faults_s = CRASH_S if crash is not None else FIRST_START_S + rng.uniform(*profile.faults_s)
        luck = random.Random(rng.getrandbits(64))
        self.nemesis: Nemesis = (
            OneCrash(self.context, self.nodes, self.crowd.nodes, luck, crash)
            if crash is not None
            else RandomNemesis(self.context, self.nodes, self.crowd.nodes, luck, self.faults_s, profile.often)
        )
        self.loop.died = self.nemesis.died
        self.loop.connect = self.network.connect
        self.loop.executor_delay = self._executor_delay
        self.loop.set_exception_handler(self._unhandled)
        self.client = Process(self.loop, "client")

    def _make_nodes(self, profile: Profile, few: bool) -> list[Node]:
        """As many as it takes for each to have somebody to take over from; `few`: only of the ingest agents."""
        counts: tuple[tuple[type[Node], int], ...] = (
            (CoordinatorNode, 1 if few else self.rng.choice((1, 2))),
            (IngestNode, 2 if few else self.rng.choice((2, 3))),
            (SegmenterNode, 1 if few else self.rng.choice((1, 2))),
            (QueryNode, 1 if few else max(profile.queries_min, self.rng.choice((1, 2)))),
        )
        return [kind(self.context, f"{kind.kind}-{number}") for kind, many in counts for number in range(many)]

    def _executor_delay(self, process: Process, own: bool) -> float:
        return self.rng.uniform(0.0001, 0.002) if own else 0.0001

    def log(self, who: str, text: str) -> None:
        if self.judged:
            return
        self.result.log.append(f"{self.loop.time():12.6f} {who:14} {text}")

    def blame(self, kind: str, text: str) -> None:
        if self.judged:
            return
        self.log("anomaly", f"{kind}: {text}")
        self.result.anomalies.append(Anomaly(kind, text))

    def _unhandled(self, loop: Any, context: dict[str, Any]) -> None:
        self.blame("unhandled", f"{context.get('message')}: {context.get('exception')!r} {context.get('task')}")

    # ---- the run

    async def run(self) -> None:
        self.nemesis.begin()
        for node in self.nodes:
            node.wanted = True
            self.network.later(self.rng.uniform(0, 0.5), node.restart)
        await self._create_topics()
        self.crowd.start()
        await asyncio.sleep(max(0.0, self.faults_s - self.loop.time()))
        self.log("world", "heals")
        self.nemesis.heal()
        await asyncio.sleep(self.rng.uniform(0, 1.5))
        await self.crowd.stop_producing()
        await Ending(self.context, self.nodes, self.targets, self.crowd, self.history, self.blame).run()

    async def _create_topics(self) -> None:
        coordinator = self.context.coordinator()
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
                except TopicExists:
                    break  # by a call whose answer was lost
                except StreamHouseError:
                    await asyncio.sleep(0.2)
            self.history.write(h.Topic(target.topic, target.partitions, target.min_acks))

    # ---- after it

    def judge(self) -> None:
        report = check(self.history.events)
        for anomaly in report.anomalies:
            self.blame(anomaly.kind, anomaly.text)
        for defect in self.network.defects:
            self.blame("defect", defect)
        for node in [*self.nodes, *self.crowd.nodes]:
            for why in node.deaths:
                if not _may_end(node, why):
                    self.blame("died", f"{node.name}: {why}")
        result = self.result
        result.events = list(self.history.events)
        result.acknowledged = report.acknowledged_records
        result.faults = len(self.nemesis.happened)
        result.steps, result.virtual_s = self.loop.steps, self.loop.time()
        self.log("world", f"{result.acknowledged} records acknowledged, {report.polled_records} polled")
        self.judged = True

    def unwind(self) -> None:
        """Ends every task, also of the dead, with nothing left that could matter."""
        self.loop.set_exception_handler(lambda loop, context: None)
        self.loop.died = lambda process, why: None
        for process in self.loop.processes:
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

    def _tasks(self) -> list[SimTask]:
        processes = self.loop.processes
        return [task for process in processes for task in process.tasks.values() if not task.done()]


async def _a_moment() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def _company(rng: random.Random, profile: Profile) -> Company:
    """Returns the clients that the profile asks for, drawn where it asks for none."""
    company = Company.draw(rng)
    return replace(
        company,
        sdk_reader=company.sdk_reader and not profile.roaming_readers,
        roaming_readers=profile.roaming_readers,
        members=max(profile.members_min, company.members),
        sessions_ms=profile.sessions_ms,
        churn=profile.churn,
        writers=profile.writers,
    )


def _may_end(node: Node, why: str) -> bool:
    """Ends that the faults explain: a disk that failed. One that is full explains none (G7)."""
    return isinstance(node, IngestNode) and any(cause in why for cause in ("WalBroken", "[Errno 5]"))


def simulate(seed: int, crash: Crash | None = None, profile: str = "") -> Result:
    """Runs one seed, from the first start to the verdict, and returns what it showed. With a `crash` that is all that
    goes wrong, in a short run. `profile`: of profiles.py; empty: as drawn for the seed."""
    profile = profile or (ORDINARY if crash is not None else drawn(seed))
    SimChunkCache.disks.clear()
    with seeded(seed) as rng:
        world = World(seed, rng, PROFILES[profile], crash)
        world.log("world", f"profile {profile}")
        disks = {f"/{node.name}": node.disk for node in world.nodes if isinstance(node, IngestNode)}
        connection = partial(RecordingConnection, world.network, world.history)
        small_messages = random.Random(seed).random() < SMALL_MESSAGES_SHARE  # of its own source
        handler = LogHandler(world.loop, world.log, world.blame)
        with patched(world.loop, disks, connection, handler, small_messages):
            try:
                world.loop.run_until_complete(world.loop.create_task(world.run(), context=world.client.context))
            except Stuck as error:
                world.blame("stuck", str(error))
            except Exception as error:
                world.blame("simulation", f"{type(error).__name__}: {error}")
                logging.getLogger(__name__).debug("", exc_info=error)
            world.judge()
            world.unwind()  # with machines of the simulation still: what is closed now are their files
        world.loop.close()
    return world.result
