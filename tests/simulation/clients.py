"""Machines with one application over the SDK each: they are stopped, killed, paused and cut off like the services."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from streamhouse_coordinator.core import tables

from tests.simulation.applications import (
    Application,
    Consuming,
    GroupMember,
    Membership,
    Numbering,
    Producing,
    ReadingAll,
    Where,
)
from tests.simulation.history import History
from tests.simulation.loop import Process
from tests.simulation.nodes import Node, SimContext
from tests.simulation.workload import Target

GROUP = "group"


class ClientNode(Node):
    """A new application with each process."""

    service: Application | None

    def __init__(self, context: SimContext, history: History, name: str, rng: random.Random) -> None:
        super().__init__(context, name)
        self.history = history
        self.rng = rng
        self._numbers = count(1)
        self._stopping_process: Process | None = None
        self._skips_think_time = False

    def make(self) -> Application:
        raise NotImplementedError

    def next_name(self) -> str:
        return f"{self.name}.{next(self._numbers)}"

    async def serve(self, process: Process) -> None:
        self.context.network.join(process)
        self.service = self.make()
        if self._skips_think_time:
            self.service.skip_think_time()
        await self.service.run()

    def crash(self, process: Process) -> None:
        super().crash(process)
        self.service = None

    def stop(self) -> None:
        """Once: whoever interrupts it while it closes has to live with what is left open."""
        if self.service is not None and self._stopping_process is not self.process:
            self._stopping_process = self.process
            super().stop()

    def skip_think_time(self) -> None:
        """Lets the application of this node, and those started here later, process batches in no time."""
        self._skips_think_time = True
        if self.service is not None:
            self.service.skip_think_time()

    def come_back(self) -> None:
        """After it was stopped."""
        self.wanted = True
        self.restart()

    def stall(self, seconds: float) -> None:
        """Whatever comes for it meanwhile waits."""
        process, network = self.process, self.context.network
        if process is not None and process.alive and not process.paused:
            self.context.log(self.name, f"stalls for {seconds:.1f} s")
            process.pause()
            network.paused(process)
            network.later(seconds, process.resume)


class ProducerNode(ClientNode):
    kind = "producer"

    def __init__(self, context: SimContext, history: History, name: str, rng: random.Random, target: Target) -> None:
        super().__init__(context, history, name, rng)
        self._target = target
        self._values = count()
        self._is_over = False

    def make(self) -> Application:
        return Producing(self.context.bootstrap, self.history, self.name, self._target, self._values, self.rng)

    def restart(self) -> None:
        if not self._is_over:
            super().restart()

    def finish(self) -> None:
        """Its process ends with what is under way, and none comes after it."""
        self._is_over = True
        if isinstance(self.service, Producing):
            self.service.stopping = True


class WriterNode(ClientNode):
    kind = "writer"

    def __init__(self, context: SimContext, history: History, name: str, rng: random.Random, target: Target) -> None:
        super().__init__(context, history, name, rng)
        self._target = target
        self._is_over = False

    def make(self) -> Application:
        return Numbering(self.context.bootstrap, self.history, self.next_name(), self._target, self.rng)

    def restart(self) -> None:
        if not self._is_over:
            super().restart()

    def finish(self) -> None:
        """Ends the process once the write under way has its outcome; none comes after it."""
        self._is_over = True
        if isinstance(self.service, Numbering):
            self.service.stopping = True


class ConsumerNode(ClientNode):
    def positions(self) -> Mapping[Where, int]:
        return self.service.positions() if isinstance(self.service, Consuming) else {}

    @property
    def reader(self) -> str:
        """The consumer's name in the history."""
        return self.service.name if isinstance(self.service, Consuming) else self.name


class ReaderNode(ConsumerNode):
    kind = "reader"

    def __init__(
        self, context: SimContext, history: History, name: str, rng: random.Random, partitions: Sequence[Where]
    ) -> None:
        super().__init__(context, history, name, rng)
        self._partitions = partitions

    def make(self) -> Application:
        return ReadingAll(self.context.bootstrap, self.history, self.next_name, self.rng, self._partitions)


class MemberNode(ConsumerNode):
    kind = "member"

    def __init__(
        self, context: SimContext, history: History, name: str, rng: random.Random, membership: Membership
    ) -> None:
        super().__init__(context, history, name, rng)
        self._membership = membership

    def make(self) -> Application:
        return GroupMember(self.context.bootstrap, self.history, self.next_name, self.rng, self._membership)


class GroupOwnership:
    """Whether two members read a partition at the same time: never, as long as the group takes both for members."""

    def __init__(self, context: SimContext, blame: Callable[[str, str], None]) -> None:
        self._context = context
        self._blame = blame
        self.members: list[MemberNode] = []

    def polled(self, reader: GroupMember, where: Where) -> None:
        known = self._context.database.memory.tables.get(tables.GROUP_MEMBERS.name, {})
        if (GROUP, reader.member_id) not in known:
            return
        readers = [node.service for node in self.members if isinstance(node.service, GroupMember)]
        for other in readers:
            if other is not reader and other.reads(where) and (GROUP, other.member_id) in known:
                self._blame("two-owners", f"{where[0]}/{where[1]}: {reader.name} and {other.name} are both reading")
