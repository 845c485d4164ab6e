"""One process dies once, at a step of its own that is given: tried with every step, this is a crash at every await."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.simulation.nemesis import Nemesis
from tests.simulation.nodes import IngestNode, Node, SimContext


@dataclass(frozen=True, slots=True)
class Crash:
    """The process `node` is killed before its `step`-th step; `power`: in the middle of the `step`-th operation of its
    disk its machine goes off."""

    node: str
    step: int
    power: bool = False

    def __str__(self) -> str:
        return f"{self.node}.{'operation' if self.power else 'step'}{self.step}"


class OneCrash(Nemesis):
    def __init__(
        self, context: SimContext, nodes: Sequence[Node], clients: Sequence[Node], rng: random.Random, crash: Crash
    ) -> None:
        super().__init__(context, nodes, clients, rng)
        self._crash = crash

    def begin(self) -> None:
        node = next(node for node in self._nodes if node.name == self._crash.node)
        if not self._crash.power:
            node.dies_at_step = self._crash.step
        else:
            assert isinstance(node, IngestNode), "only they have a disk that matters"
            node.disk.cut_after = self._crash.step

    def died(self, process: object, why: str) -> None:
        self.happened.append(str(self._crash))
        super().died(process, why)
