"""What goes wrong, drawn from the seed: which kinds of faults this run has, how often, when, to whom.

Each run has only some of the kinds, so that also rare combinations get time to themselves (swarm testing,
https://www.cs.utah.edu/~regehr/papers/swarm12.pdf).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from shstore.faulty import FaultKind

from tests.simulation import database as db
from tests.simulation import network as net
from tests.simulation.clients import MemberNode, WriterNode
from tests.simulation.nodes import CoordinatorNode, IngestNode, Node, QueryNode, SimContext
from tests.simulation.store import HOST as STORE

KIND_CHANCE = 0.3
CLIENT_SHARE = 0.25
"""Of the faults of machines and links, where there are clients with machines of their own."""
FAULT_EVERY_S = (0.1, 1.5)
WALL_JUMP_MS = 60_000
"""Far beyond leases, claims and the orphans' grace: no safety property rests on clocks."""
DATABASE_JUMP_MS = (-1_500, 4_000)
"""Nothing but leases and claims hangs on it: more than any of them lasts."""
OFTEN_CHANCE = 0.5
"""Chance that a fault is of a kind that the run's profile asks for."""
FEED_BEHIND_S = 2.5
"""At most, and below network.KEEPALIVE_S: the connection outlives it, so that the feed goes on where it was."""
PAUSE_CHANCE = 0.75
"""Chance that a member is paused, rather than cut off: it then more often commits before it hears anything."""
MEMBER_OUT_S = (3.0, 5.0)
"""Beyond a session of 1.5 s, the sweep that ends it, and the next commit of the member that takes over."""
ZOMBIE_S = (0.5, 6.0)
"""Time in which the others take the stream over, and write on."""
LEASE_OUT_S = (2.5, 6.0)
"""Beyond a lease of 2.5 s."""
MEMBER_IN_S = 1.0
"""Between two of these: to join, to read, and to have something to commit."""


class Nemesis:
    """`begin` starts it, `heal` ends every fault. `happened`: the faults, in words."""

    def __init__(self, context: SimContext, nodes: Sequence[Node], clients: Sequence[Node], rng: random.Random) -> None:
        self._context = context
        self._services = nodes
        self._clients = clients
        self._nodes = [*nodes, *clients]
        self._agents = [node for node in nodes if isinstance(node, IngestNode)]
        self._rng = rng
        self.happened: list[str] = []

    def begin(self) -> None:
        """Before the first process starts."""
        raise NotImplementedError

    def heal(self) -> None:
        """No fault any more; every node runs."""
        context = self._context
        context.network.rates = net.NetworkRates()
        context.database.rates = db.DatabaseRates()
        context.database.up = True
        context.store_rates.faults = {}
        context.store_rates.late = 0
        context.network.heal()
        for agent in self._agents:
            agent.disk.free_bytes = None
            agent.disk.fail_fsyncs = 0
            agent.disk.cut_after = None
        for node in self._nodes:
            node.dies_at_step = None
            if node.process is not None:
                node.process.steps_left = None
                node.process.resume()
            node.wanted = True
            node.restart()

    def died(self, process: object, why: str) -> None:
        """A process met the death that was prepared for it."""
        node = next(node for node in self._nodes if node.process is process)
        self._context.log(node.name, why)
        if "power" in why:
            node.lose_power()
        else:
            node.kill()
        self._revive(node)

    def _note(self, what: str) -> None:
        self.happened.append(what)
        self._context.log("nemesis", what)

    def _later(self, delay_s: float, function: Callable[[], object]) -> None:
        self._context.network.later(delay_s, function)

    def _for(self, longest_s: float) -> float:
        """How long a fault lasts: mostly short, sometimes beyond every time-out."""
        return self._rng.choice((0.2, 1.0, longest_s)) * self._rng.uniform(0.1, 1)

    def _revive(self, node: Node, longest_s: float = 5) -> None:
        node.wanted = False

        def revive() -> None:
            node.wanted = True
            node.restart()

        self._later(self._for(longest_s), revive)


class RandomNemesis(Nemesis):
    """Faults one after the other until `until_s`; every other one is of the kinds `often`, if there are any."""

    def __init__(
        self,
        context: SimContext,
        nodes: Sequence[Node],
        clients: Sequence[Node],
        rng: random.Random,
        until_s: float,
        often: Sequence[Callable[[RandomNemesis], None]] = (),
    ) -> None:
        super().__init__(context, nodes, clients, rng)
        self._until_s = until_s
        every: tuple[Callable[[], None], ...] = (
            self.kill, self.kill_soon, self.power_cut, self.power_cut_at_operation, self.stop, self.pause,
            self.partition, self.isolate, self.wall_clock, self.database_clock, self.database_down, self.disk_full,
            self.fsync_fails, self.store_down,
        )  # fmt: skip
        self._kinds = [kind for kind in every if rng.random() < KIND_CHANCE]
        self._every_s = rng.uniform(*FAULT_EVERY_S)
        self._often = often
        self._member_back_s = 0.0

    def begin(self) -> None:
        self._set_rates()
        if self._kinds or self._often:
            self._later(self._rng.uniform(0, 2), self._next)

    def _next(self) -> None:
        if self._context.loop.time() < self._until_s:
            if self._often and (not self._kinds or self._rng.random() < OFTEN_CHANCE):
                self._rng.choice(self._often)(self)
            else:
                self._rng.choice(self._kinds)()
            self._later(self._rng.expovariate(1 / self._every_s), self._next)

    def _set_rates(self) -> None:
        """How calls fare all through the run."""
        rng = self._rng

        def rate(most: float) -> float:
            return rng.choice((0.0, 0.0, rng.uniform(0, most)))

        self._context.network.rates = net.NetworkRates(
            lose_request=rate(0.05),
            lose_reply=rate(0.05),
            break_stream=rate(0.02),
            slow=rate(0.1),
            slow_s=rng.choice((0.05, 0.5, 3.0)),
        )
        self._context.database.rates = db.DatabaseRates(
            refuse=rate(0.05),
            lose_answer=rate(0.05),
            conflict=rate(0.1),
            lose_notification=rate(0.5),
            slow=rate(0.05),
            slow_s=rng.choice((0.05, 0.5, 3.0)),
        )
        store = self._context.store_rates
        store.faults = {kind: rate(0.15) for kind in FaultKind}
        store.slow_ms = rng.choice((10, 100, 3_000))
        store.late = rate(0.1)

    # ---- processes and machines

    def _victim(self) -> Node:
        """Mostly one of the services: they have more to lose."""
        return self._rng.choice(self._clients if self._hits_client() else self._services)

    def _hits_client(self) -> bool:
        return bool(self._clients) and self._rng.random() < CLIENT_SHARE

    def kill(self) -> None:
        node = self._victim()
        if node.up:
            self._note(f"kill {node.name}")
            node.kill()
            self._revive(node)

    def kill_soon(self) -> None:
        """Between any two steps of a process: at any await."""
        node = self._victim()
        if node.process is not None and node.up:
            steps = self._rng.randrange(1, 400)
            self._note(f"kill {node.name} in {steps} steps")
            node.process.steps_left = steps

    def power_cut(self) -> None:
        node = self._rng.choice([*self._services, *self._agents])  # mostly of one that has something to lose
        self._note(f"power cut of {node.name}")
        node.lose_power()
        self._revive(node)

    def power_cut_at_operation(self) -> None:
        """In the middle of a write, before a sync, after a create."""
        agent = self._rng.choice(self._agents)
        if agent.up:
            agent.disk.cut_after = self._rng.randrange(1, 12)
            self._note(f"power cut of {agent.name} at its {agent.disk.cut_after}. disk operation")

    def stop(self) -> None:
        node = self._victim()
        if node.up:
            self._note(f"stop {node.name}")
            node.stop()
            self._revive(node, 3)

    def pause(self) -> None:
        node = self._victim()
        process = node.process
        if process is not None and process.alive and not process.paused:
            seconds = self._for(9)
            self._note(f"pause {node.name} for {seconds:.1f} s")
            process.pause()
            self._context.network.paused(process)
            self._later(seconds, process.resume)

    def wall_clock(self) -> None:
        node = self._rng.choice(self._services)
        node.clock.offset_ms = self._rng.randrange(-WALL_JUMP_MS, WALL_JUMP_MS)
        self._note(f"wall clock of {node.name} {node.clock.offset_ms:+d} ms")

    def database_clock(self) -> None:
        """Forward: every lease has run out at once."""
        clock = self._context.database.clock
        clock.offset_ms = self._rng.randrange(*DATABASE_JUMP_MS)
        self._note(f"clock of the database {clock.offset_ms:+d} ms")

    # ---- network

    def _names(self) -> list[str]:
        return [node.name for node in self._services] + [STORE, db.HOST]

    def _cut(self, links: list[tuple[str, str]], seconds: float) -> None:
        network = self._context.network

        def unblock() -> None:
            for source, target in links:
                network.unblock(source, target)

        for source, target in links:
            network.block(source, target)
        self._later(seconds, unblock)

    def partition(self) -> None:
        """Two machines, one way or both."""
        one, other = self._rng.sample(self._names(), 2)
        if self._hits_client():
            one = self._rng.choice(self._clients).name
        seconds, both = self._for(10), self._rng.random() < 0.5
        self._note(f"partition {one} -{'-' if both else '>'} {other} for {seconds:.1f} s")
        self._cut([(one, other), (other, one)] if both else [(one, other)], seconds)

    def isolate(self) -> None:
        """One machine from all others."""
        name = self._rng.choice(self._clients).name if self._hits_client() else self._rng.choice(self._names())
        seconds = self._for(9)
        self._note(f"isolate {name} for {seconds:.1f} s")
        names = [*self._names(), *(client.name for client in self._clients)]
        others = [other for other in names if other != name]
        self._cut([link for other in others for link in ((name, other), (other, name))], seconds)

    # ---- for profiles

    def hold_back_feed(self) -> None:
        """Keeps from a query service what some coordinators send it for a while; then all of it arrives."""
        query = self._rng.choice([node for node in self._services if isinstance(node, QueryNode)])
        coordinators = [node for node in self._services if isinstance(node, CoordinatorNode)]
        held_back = self._rng.sample(coordinators, self._rng.randrange(1, len(coordinators) + 1))
        seconds = self._rng.uniform(0.1, FEED_BEHIND_S)
        self._note(f"hold back {', '.join(node.name for node in held_back)} -> {query.name} for {seconds:.1f} s")
        self._cut([(node.name, query.name) for node in held_back], seconds)

    def put_member_out(self) -> None:
        """Makes the group end a member's session and keeps the member from hearing of it: it stands still, or reaches
        the query services but no coordinator. One member at a time, so that another one reads on."""
        now_s = self._context.loop.time()
        if now_s < self._member_back_s:
            return
        members = [node for node in self._clients if isinstance(node, MemberNode) and node.up and node.positions()]
        if not members:
            return
        member, seconds = self._rng.choice(members), self._rng.uniform(*MEMBER_OUT_S)
        self._member_back_s = now_s + seconds + MEMBER_IN_S
        if self._rng.random() < PAUSE_CHANCE:
            self._note(f"pause {member.name} for {seconds:.1f} s")
            member.stall(seconds)
        else:
            self._note(f"cut {member.name} off from the coordinators for {seconds:.1f} s")
            coordinators = [node.name for node in self._services if isinstance(node, CoordinatorNode)]
            self._cut([link for name in coordinators for link in ((member.name, name), (name, member.name))], seconds)

    def disturb_writer(self) -> None:
        """Kills or pauses a writer of the numbered stream: at any of its steps, or for long enough that another one has
        fenced when it goes on."""
        writers = [node for node in self._clients if isinstance(node, WriterNode) and node.up]
        if not writers:
            return
        writer = self._rng.choice(writers)
        if self._rng.random() < 0.5:
            assert writer.process is not None
            steps = self._rng.randrange(1, 200)
            self._note(f"kill {writer.name} in {steps} steps")
            writer.process.steps_left = steps
        else:
            seconds = self._rng.uniform(*ZOMBIE_S)
            self._note(f"pause {writer.name} for {seconds:.1f} s")
            writer.stall(seconds)

    def move_leader(self) -> None:
        """Makes the partitions of an agent move: it stops, dies, or stands still beyond its lease."""
        agent = self._rng.choice(self._agents)
        process = agent.process
        if not agent.up or process is None or process.paused:
            return
        how = self._rng.choice(("stop", "kill", "pause"))
        self._note(f"{how} {agent.name}, whose partitions move")
        if how == "pause":
            process.pause()
            self._context.network.paused(process)
            self._later(self._rng.uniform(*LEASE_OUT_S), process.resume)
        else:
            (agent.stop if how == "stop" else agent.kill)()
            self._revive(agent, LEASE_OUT_S[1])

    # ---- disks and servers

    def disk_full(self) -> None:
        agent, seconds = self._rng.choice(self._agents), self._for(6)
        agent.disk.free_bytes = self._rng.choice((0, 100, 2_000))
        self._note(f"disk of {agent.name} has {agent.disk.free_bytes} bytes left for {seconds:.1f} s")

        def room() -> None:
            agent.disk.free_bytes = None

        self._later(seconds, room)

    def fsync_fails(self) -> None:
        agent = self._rng.choice(self._agents)
        agent.disk.fail_fsyncs = 1
        self._note(f"next fsync of {agent.name} fails")

    def database_down(self) -> None:
        seconds = self._for(6)
        self._note(f"database down for {seconds:.1f} s")
        self._context.database.down()

        def up() -> None:
            self._context.database.up = True

        self._later(seconds, up)

    def store_down(self) -> None:
        rates, seconds = self._context.store_rates, self._for(6)
        before = rates.faults
        if FaultKind.UNAVAILABLE in before and before[FaultKind.UNAVAILABLE] == 1:
            return
        self._note(f"store down for {seconds:.1f} s")
        rates.faults = {FaultKind.UNAVAILABLE: 1}

        def up() -> None:
            rates.faults = before

        self._later(seconds, up)
