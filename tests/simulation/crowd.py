"""Who uses the cluster in a run: clients written by hand, applications over the SDK, or some of both, as drawn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.simulation.applications import SESSION_TIMEOUT_MS, Membership
from tests.simulation.clients import (
    GROUP,
    ClientNode,
    ConsumerNode,
    GroupOwnership,
    MemberNode,
    ProducerNode,
    ReaderNode,
    WriterNode,
)
from tests.simulation.history import History
from tests.simulation.loop import Process
from tests.simulation.nodes import Node, QueryNode, SimContext
from tests.simulation.workload import Producer, Reader, Target

PRODUCERS = 4
SDK_PRODUCERS = 2
SDK_CHANCE = 0.5
GROUP_CHANCE = 0.5
CHURN_EVERY_S = (0.5, 4.0)
"""How often a member leaves, dies or stalls, besides what the faults do to it."""
AWAY_S = 2.0
STALL_CHANCE = 0.3
STALL_S = 6.0
"""At most; the members' sessions last 1.5 to 4 s."""
POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """Which clients are over the SDK. members: of the group; 0: there is none. roaming_readers: those written by hand
    ask another query service each time. churn: members come and go. writers: of the numbered stream, in turns."""

    sdk_producers: int
    sdk_reader: bool
    members: int
    roaming_readers: bool = False
    sessions_ms: Sequence[int] = SESSION_TIMEOUT_MS
    churn: bool = True
    writers: int = 0

    @classmethod
    def draw(cls, rng: random.Random) -> Company:
        producers = SDK_PRODUCERS if rng.random() < SDK_CHANCE else 0
        return cls(
            sdk_producers=producers,
            sdk_reader=rng.random() < SDK_CHANCE / 2,
            members=rng.choice((2, 3)) if rng.random() < GROUP_CHANCE else 0,
        )


EVERYBODY = Company(sdk_producers=SDK_PRODUCERS, sdk_reader=False, members=2)


class Crowd:
    """`nodes`: those with a machine of their own. stream: the target that only writers of numbered records have."""

    def __init__(
        self,
        context: SimContext,
        history: History,
        targets: Sequence[Target],
        services: Sequence[Node],
        rng: random.Random,
        company: Company,
        blame: Callable[[str, str], None],
        stream: Target | None = None,
    ) -> None:
        self._context = context
        self._history = history
        self._targets = targets
        self._rng = rng
        self._company = company
        self._ownership = GroupOwnership(context, blame)
        self._plain_targets = [target for target in targets if target is not stream]
        self._writers = [] if stream is None else [self._writer(number, stream) for number in range(company.writers)]
        self._queries = [node.address for node in services if isinstance(node, QueryNode)]
        self._partitions = [(target.topic, number) for target in targets for number in range(target.partitions)]
        self._sdk_producers = [self._sdk_producer(number) for number in range(company.sdk_producers)]
        self._producers = [self._producer(number) for number in range(company.sdk_producers, PRODUCERS)]
        self._readers = [] if company.sdk_reader else [self._reader(*where) for where in self._partitions]
        self._sdk_readers = [self._sdk_reader()] if company.sdk_reader else []
        self._ownership.members += [self._member(number) for number in range(company.members)]
        self._producing: list[asyncio.Task[None]] = []
        self._is_over = False

    # ---- who

    def _own_luck(self) -> random.Random:
        return random.Random(self._rng.getrandbits(64))

    def _producer(self, number: int) -> Producer:
        idempotent = number < 2 or self._rng.random() < 0.3
        return Producer(
            self._context, self._history, f"producer-{number}", self._target(number), self._own_luck(), idempotent
        )

    def _target(self, number: int) -> Target:
        return self._plain_targets[number % len(self._plain_targets)]

    def _writer(self, number: int, stream: Target) -> WriterNode:
        return WriterNode(self._context, self._history, f"writer-{number}", self._own_luck(), stream)

    def _sdk_producer(self, number: int) -> ProducerNode:
        return ProducerNode(self._context, self._history, f"producer-{number}", self._own_luck(), self._target(number))

    def _reader(self, topic: str, partition: int) -> Reader:
        name, roams = f"reader-{topic}-{partition}", self._company.roaming_readers
        return Reader(self._context, self._history, name, topic, partition, self._queries, roams)

    def _sdk_reader(self) -> ReaderNode:
        return ReaderNode(self._context, self._history, "reader-0", self._own_luck(), self._partitions)

    def _member(self, number: int) -> MemberNode:
        """The first one reads all topics, so that the group does."""
        topics = [target.topic for target in self._targets]
        if number and self._rng.random() < 0.2:
            topics = [self._rng.choice(topics)]
        membership = Membership(
            group=GROUP, topics=topics, polled=self._ownership.polled, sessions_ms=self._company.sessions_ms
        )
        return MemberNode(self._context, self._history, f"member-{number}", self._own_luck(), membership)

    @property
    def nodes(self) -> list[ClientNode]:
        return [*self._sdk_producers, *self._writers, *self._sdk_readers, *self._ownership.members]

    @property
    def readers(self) -> list[Reader | ConsumerNode]:
        """Those that read every partition they have from its beginning to its end."""
        return [*self._readers, *self._sdk_readers]

    @property
    def has_group(self) -> bool:
        return bool(self._ownership.members)

    # ---- what they do

    def start(self) -> None:
        for node in self.nodes:
            node.wanted = True
            self._context.network.later(self._rng.uniform(0, 1), node.restart)
        self._producing = [self._process().spawn(producer.run()) for producer in self._producers]
        for reader in self._readers:
            self._process().spawn(reader.run())
        if self.has_group and self._company.churn:
            self._process().spawn(self._come_and_go(), name="members come and go")

    def _process(self) -> Process:
        return Process(self._context.loop, "client")

    async def _come_and_go(self) -> None:
        rng = self._rng
        while True:
            await asyncio.sleep(rng.uniform(*CHURN_EVERY_S))
            if self._is_over:
                return
            member = rng.choice(self._ownership.members)
            if rng.random() < STALL_CHANCE:
                member.stall(rng.uniform(0, STALL_S))
            else:
                rng.choice((member.stop, member.stop, member.kill))()
                self._context.network.later(rng.uniform(0, AWAY_S), member.come_back)

    async def stop_producing(self) -> None:
        """Returns when nothing is under way any more; from here on members stay."""
        self._is_over = True
        for producer in self._producers:
            producer.stopping = True
        sending: list[ProducerNode | WriterNode] = [*self._sdk_producers, *self._writers]
        for node in sending:
            node.finish()
        await asyncio.gather(*self._producing)
        while any(node.up for node in sending):
            await asyncio.sleep(POLL_S)

    def skip_think_time(self) -> None:
        """Lets slow consumers catch up with the others."""
        for node in self.nodes:
            node.skip_think_time()
