"""Which ingest agents this process cannot reach, for its heartbeats to say.

Owns: the agents in doubt, and what is known of each. Does not own: connections, heartbeats.
Invariants: An agent is in doubt from the first call that it did not answer, or from the coordinator's word that another
process has doubts, until it answers a check and nobody doubts it any more, or its session is over: an agent that is
gone for good is checked no longer than that. An error of the agent is an answer. A call that its caller gave up says
nothing by itself: the next check does.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from shproto.errors import StreamHouseError, Unavailable
from shproto.services import IngestApi
from shproto.v1 import coordinator_pb2, ingest_pb2

log = logging.getLogger(__name__)

# An agent that is there answers within milliseconds; a round trip to another region and a busy machine are in it.
CHECK_TIMEOUT_MS = 3_000
# A call that its caller ends after so long without an answer is worth a check, and no more: a busy agent is late, too.
LATE_MS = 1_000
# Checked at once, so that those that do not answer take one timeout, not as many as there are.
CHECKS_AT_ONCE = 64


def is_silence(error: BaseException) -> bool:
    """True if a call got no answer from the process it was meant for: such errors name its address."""
    return isinstance(error, Unavailable) and "address" in error.details


class AgentChecks:
    """`calling` notes what calls come to; `check` asks the agents in doubt, and gives what to report."""

    def __init__(self, ingest_at: Callable[[str], IngestApi]) -> None:
        self._ingest_at = ingest_at
        self._addresses: dict[str, str] = {}
        self._unreachable: set[str] = set()
        self._suspects: dict[str, str] = {}

    @property
    def unreachable(self) -> frozenset[str]:
        """Ids of the agents that did not answer when they were last called."""
        return frozenset(self._unreachable)

    @contextmanager
    def calling(self, agent_id: str, address: str, wait_ms: int = 0) -> Iterator[None]:
        """Notes what the call in its body comes to, and changes nothing about it. `wait_ms`: for how long the agent was
        asked to wait before it answers."""
        loop = asyncio.get_running_loop()
        late_at = loop.time() + (wait_ms + LATE_MS) / 1000
        try:
            yield
        except StreamHouseError as error:
            self.failed(agent_id, address) if is_silence(error) else self.answered(agent_id)
            raise
        except (TimeoutError, asyncio.CancelledError):
            if loop.time() >= late_at:
                self._suspects[agent_id] = address
            raise
        self.answered(agent_id)

    def failed(self, agent_id: str, address: str) -> None:
        """A call to the agent got no answer."""
        if agent_id not in self._unreachable:
            log.warning("agent %s at %s does not answer", agent_id, address)
        self._addresses[agent_id] = address
        self._unreachable.add(agent_id)

    def answered(self, agent_id: str) -> None:
        """A call to the agent got an answer."""
        if agent_id in self._unreachable:
            log.info("agent %s answers again", agent_id)
            self._unreachable.discard(agent_id)

    def doubted(self, addresses: Mapping[str, str], reported: Iterable[coordinator_pb2.AgentReach] = ()) -> bool:
        """Notes the agents that the coordinator wants checked, by agent id. Forgets the others once they answer, and at
        once those of `reported`, the reports that the coordinator has just answered: it names every agent that was
        reported as unreachable and has a session. Returns True if an agent was not in doubt before."""
        new = addresses.keys() - self._addresses.keys()
        for item in reported:
            if item.agent_id in self._unreachable and item.agent_id not in addresses:
                log.info("agent %s has no session any more, and is not checked", item.agent_id)
                self._unreachable.discard(item.agent_id)
        kept = {name: address for name, address in self._addresses.items() if name in self._unreachable}
        self._addresses = kept | dict(addresses)
        return bool(new)

    async def check(self) -> list[coordinator_pb2.AgentReach]:
        """Asks the agents in doubt. Returns what to report of them, the others having nothing to be said of."""
        turn = asyncio.Semaphore(CHECKS_AT_ONCE)
        addresses, self._suspects = self._suspects | self._addresses, {}
        names = sorted(addresses)
        checks = [
            asyncio.create_task(self._check(name, addresses[name], turn), name=f"check of agent {name}")
            for name in names
        ]
        try:
            await asyncio.gather(*checks)
        finally:
            for task in checks:
                task.cancel()
            await asyncio.gather(*checks, return_exceptions=True)
        return [coordinator_pb2.AgentReach(agent_id=name, reached=name not in self._unreachable) for name in names]

    async def _check(self, agent_id: str, address: str, turn: asyncio.Semaphore) -> None:
        async with turn:
            try:
                async with asyncio.timeout(CHECK_TIMEOUT_MS / 1000):
                    await self._ingest_at(address).describe_agent(ingest_pb2.DescribeAgentRequest())
            except TimeoutError:
                self.failed(agent_id, address)
            except StreamHouseError as error:
                self.failed(agent_id, address) if is_silence(error) else self.answered(agent_id)
            else:
                self.answered(agent_id)
