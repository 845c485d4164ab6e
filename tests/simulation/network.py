"""Messages between processes, that take their time, get lost, or wait behind a partition; and who listens where.

The calls made of them are in call.py, what the generated clients run over in connection.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from tests.simulation.call import Call, resolve
from tests.simulation.loop import PROCESS, Process, SimLoop

KEEPALIVE_S = 3.0
"""After so long without an answer a connection is given up, on the scale of the simulation's other time-outs."""


@dataclass(slots=True, kw_only=True)
class NetworkRates:
    """Chances per message. slow_s: of how long a slow one takes at most."""

    lose_request: float = 0.0
    lose_reply: float = 0.0
    break_stream: float = 0.0
    slow: float = 0.0
    slow_s: float = 0.0


class Network:
    """Knows who listens where. Links are between names of processes, which are the hosts of their addresses."""

    def __init__(self, loop: SimLoop, rng: random.Random, log: Callable[[str, str], None]) -> None:
        self._loop = loop
        self._rng = rng
        self._log = log
        self._world = loop.world.context
        self._servers: dict[str, tuple[Process, Any]] = {}
        self._blocked: dict[tuple[str, str], int] = {}
        self._held: dict[tuple[str, str], list[Callable[[], None]]] = {}
        self._calls: dict[int, Call] = {}
        self._number = 0
        self.rates = NetworkRates()
        self.defects: list[str] = []

    # ---- who listens, which links are open

    def listen(self, address: str, process: Process, api: Any) -> None:
        self._servers[address] = (process, api)
        self.join(process)

    def join(self, process: Process) -> None:
        """Its peers hear of its end."""
        process.on_death.append(lambda: self._gone(process))

    def block(self, source: str, target: str) -> None:
        """Nothing gets from source to target any more."""
        self._number += 1
        self._blocked[source, target] = self._number
        self.later(KEEPALIVE_S, self._give_up, (source, target), self._number)

    def heal(self) -> None:
        self._blocked.clear()
        held, self._held = self._held, {}
        for link, messages in held.items():
            for arrive in messages:
                self.later(self.latency(), self._at_the_wire, link, arrive)

    def unblock(self, source: str, target: str) -> None:
        self._blocked.pop((source, target), None)
        for arrive in self._held.pop((source, target), ()):
            self.later(self.latency(), self._at_the_wire, (source, target), arrive)

    def is_open(self, source: str, target: str) -> bool:
        return (source, target) not in self._blocked

    def _give_up(self, link: tuple[str, str], number: int) -> None:
        if self._blocked.get(link) == number:
            for call in list(self._calls.values()):
                if link in ((call.source.name, call.target_name), (call.target_name, call.source.name)):
                    call.cut("no keepalive")

    def paused(self, process: Process) -> None:
        """Its peers give their connections up if it stays so."""
        number = process.pauses

        def look() -> None:
            if process.paused and process.alive and process.pauses == number:
                for call in list(self._calls.values()):
                    if process.name in (call.target_name, call.source.name):
                        call.cut("no keepalive")

        self.later(KEEPALIVE_S, look)

    def _gone(self, process: Process) -> None:
        """Its connections are reset, as far as the news gets through."""
        for call in list(self._calls.values()):
            if call.target is process:
                self.send(process.name, call.source.name, call.server_died)
            elif call.source is process:
                self.send(process.name, call.target_name, call.client_died)

    # ---- messages

    def later(self, delay_s: float, function: Callable[..., object], *args: Any) -> None:
        self._loop.call_later(delay_s, function, *args, context=self._world)

    def latency(self) -> float:
        delay = self._rng.uniform(0.0001, 0.001)
        if self.rates.slow and self._rng.random() < self.rates.slow:
            delay += self._rng.uniform(0, self.rates.slow_s)
        return delay

    def send(self, source: str, target: str, arrive: Callable[[], None]) -> None:
        """`arrive` runs when the message is there, which may be never."""
        self.later(self.latency(), self._at_the_wire, (source, target), arrive)

    def _at_the_wire(self, link: tuple[str, str], arrive: Callable[[], None]) -> None:
        if link in self._blocked:
            self._held.setdefault(link, []).append(arrive)
        else:
            arrive()

    def log(self, source: str, text: str) -> None:
        self._log(source, text)

    def chance(self, rate: float) -> bool:
        return bool(rate) and self._rng.random() < rate

    def find(self, address: str) -> tuple[Process, Any] | None:
        found = self._servers.get(address)
        return found if found is not None and found[0].alive else None

    def open_call(self, address: str, method: str, request: Callable[[], Message] | None) -> Call:
        self._number += 1
        call = Call(self, self._loop, self._number, PROCESS.get(), address, method, request)
        self._calls[call.number] = call
        call.start()
        return call

    def closed(self, number: int) -> None:
        self._calls.pop(number, None)

    async def connect(self, host: str, port: int) -> None:
        """Raises ConnectionRefusedError when the process is not there; waits for ever behind a partition."""
        source, address = PROCESS.get(), f"{host}:{port}"
        answer = self._loop.create_future()

        def arrive() -> None:
            found = self.find(address) is not None
            self.send(host, source.name, lambda: resolve(answer, found))

        self.send(source.name, host, arrive)
        if not await answer:
            raise ConnectionRefusedError(f"nobody listens at {address}")
