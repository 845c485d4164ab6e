"""Ingest agents that this process cannot reach, for its heartbeats to say.

Owns: the suspected agents, their last state, and the heartbeats that report it. Does not own: connections, the session
that the heartbeats renew.
Invariants: An agent is suspected from the first call that it did not answer, or from the coordinator's request to check
it, until it answers a check and the coordinator no longer asks, or its session is over: an agent that is gone for good
is checked no longer than that. An error of the agent is an answer. A call that its caller cancelled shows nothing by
itself: the next check does. A round of checks is bounded, so that heartbeats come in time for any number of silent
agents: agents left out come first in the next round.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from shproto.errors import SessionExpired, StreamHouseError, Unavailable
from shproto.services import CoordinatorApi, IngestApi
from shproto.v1 import coordinator_pb2, ingest_pb2
from shruntime.clock import Clock
from shruntime.tasks import Backoff, cancel_and_wait

log = logging.getLogger(__name__)

# An agent that is there answers within milliseconds; a round trip to another region and a busy machine are in it.
CHECK_TIMEOUT_MS = 3_000
# A call that its caller cancels after this time without an answer is reason for a check, not proof: a busy agent is
# late, too.
LATE_MS = 1_000
# Checked at the same time, so that silent agents take a single timeout together.
CHECKS_AT_ONCE = 64


def is_silence(error: BaseException) -> bool:
    """True if a call got no answer from the process it was meant for: such errors name its address."""
    return isinstance(error, Unavailable) and "address" in error.details


class AgentChecks:
    """Suspected agents: `calling` notes the outcome of calls, `check` asks the suspected agents and returns the
    reports."""

    def __init__(self, ingest_at: Callable[[str], IngestApi]) -> None:
        self._ingest_at = ingest_at
        self._addresses: dict[str, str] = {}
        self._unreachable: set[str] = set()
        self._late: dict[str, str] = {}
        self._round = 0
        self._rounds: dict[str, int] = {}  # last round in which an agent was checked, by agent id

    @property
    def unreachable(self) -> frozenset[str]:
        """Ids of the agents that did not answer when they were last called."""
        return frozenset(self._unreachable)

    @contextmanager
    def calling(self, agent_id: str, address: str, wait_ms: int = 0) -> Iterator[None]:
        """Notes the outcome of the call in the body, and passes it on. `wait_ms`: time that the agent was asked to wait
        before it answers."""
        loop = asyncio.get_running_loop()
        late_at = loop.time() + (wait_ms + LATE_MS) / 1000
        try:
            yield
        except StreamHouseError as error:
            self.failed(agent_id, address) if is_silence(error) else self.answered(agent_id)
            raise
        except (TimeoutError, asyncio.CancelledError):
            if loop.time() >= late_at:
                self._late[agent_id] = address
            raise
        self.answered(agent_id)

    def failed(self, agent_id: str, address: str) -> None:
        """Notes a call to the agent that got no answer."""
        if agent_id not in self._unreachable:
            log.warning("agent %s at %s does not answer", agent_id, address)
        self._addresses[agent_id] = address
        self._unreachable.add(agent_id)

    def answered(self, agent_id: str) -> None:
        """Notes an answer of the agent, errors included."""
        if agent_id in self._unreachable:
            log.info("agent %s answers again", agent_id)
            self._unreachable.discard(agent_id)

    def set_asked(self, addresses: Mapping[str, str], reported: Iterable[coordinator_pb2.AgentReach] = ()) -> bool:
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

    async def check(self, within_ms: float | None = None) -> list[coordinator_pb2.AgentReach]:
        """Asks the suspected agents, for at most `within_ms` or two timeouts of a check, whichever is longer (None: no
        limit). Returns the reports: an agent left out for lack of time is reported if it was unreachable before."""
        turn = asyncio.Semaphore(CHECKS_AT_ONCE)
        addresses, self._late = self._late | self._addresses, {}
        names = sorted(addresses, key=lambda name: (self._rounds.get(name, 0), name))
        checks = [
            asyncio.create_task(self._check(name, addresses[name], turn), name=f"check of agent {name}")
            for name in names
        ]
        try:
            timeout_s = None if within_ms is None else max(within_ms, 2 * CHECK_TIMEOUT_MS) / 1000
            async with asyncio.timeout(timeout_s) as guard:
                await asyncio.gather(*checks)
        except TimeoutError:
            if not guard.expired():
                raise
        finally:
            await cancel_and_wait(*checks)
        asked = {name for name, task in zip(names, checks, strict=True) if not task.cancelled()}
        self._round += 1
        self._rounds = {name: self._round if name in asked else self._rounds.get(name, 0) for name in names}
        self._late |= {name: addresses[name] for name in names if name not in asked | self._addresses.keys()}
        return [
            coordinator_pb2.AgentReach(agent_id=name, reached=name not in self._unreachable)
            for name in sorted(asked | self._unreachable.intersection(names))
        ]

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


async def send_heartbeats(
    coordinator: CoordinatorApi,
    session_token: str,
    interval_ms: int,
    agents: AgentChecks,
    clock: Clock,
    backoff: Backoff,
    *,
    recovered: Callable[[], None] | None = None,
) -> None:
    """Renews a worker's session every `interval_ms`, and reports the suspected agents with each heartbeat. Checks come
    after the heartbeat, so that they do not delay it. Calls `recovered` when an unreachable agent answers again. Raises
    SessionExpired; repeats the heartbeat after other failures."""
    found: list[coordinator_pb2.AgentReach] = []
    wait_ms: float = interval_ms
    while True:
        await clock.sleep_ms(wait_ms)
        request = coordinator_pb2.HeartbeatRequest(session_token=session_token, checks_agents=True, agents=found)
        try:
            response = await coordinator.heartbeat(request)
        except SessionExpired:
            raise
        except StreamHouseError as error:
            log.warning("no coordinator takes the heartbeat: %s", error.message)
            wait_ms = min(backoff.next_ms(), interval_ms)
            continue
        backoff.reset()
        before, started_ms = agents.unreachable, clock.monotonic_ms()
        is_new = agents.set_asked({item.agent_id: item.address for item in response.check}, found)
        found = await agents.check(interval_ms / 2)
        wait_ms = 0 if is_new else max(0, interval_ms - (clock.monotonic_ms() - started_ms))
        if recovered is not None and before - agents.unreachable:
            recovered()
