"""The session that lets clients find this query service.

Owns: the session's token, when it is renewed. Does not own: the agents that it reports.
Invariants: there is a token from the end of open() to close(), except between a session's loss and the next one. An
outage of the coordinator ends no session by itself: only SessionExpired does.
"""

from __future__ import annotations

import logging

from shproto.errors import SessionExpired, StreamHouseError
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2
from shruntime.clock import Clock
from shruntime.tasks import Backoff

from shcluster.agent_checks import AgentChecks, send_heartbeats

log = logging.getLogger(__name__)

RETRY_FIRST_MS = 100
RETRY_MS_MAX = 2_000


class SessionKeeper:
    """`open` once, then `run` for ever; a session that was lost is opened again. Its heartbeats say which `agents` do
    not answer."""

    def __init__(self, coordinator: CoordinatorApi, agent_id: str, clock: Clock, agents: AgentChecks) -> None:
        self._coordinator = coordinator
        self._agent_id = agent_id
        self._clock = clock
        self._agents = agents
        self._address = ""
        self._interval_ms = 0
        self.token = ""

    async def open(self, address: str) -> None:
        """Waits for a coordinator that grants the session."""
        self._address = address
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        while not self.token:
            try:
                await self._open()
            except StreamHouseError as error:
                log.warning("no session yet: %s", error)
                await self._clock.sleep_ms(backoff.next_ms())

    async def run(self) -> None:
        """Sends heartbeats, and opens another session where one is lost."""
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        while True:
            try:
                await send_heartbeats(
                    self._coordinator, self.token, self._interval_ms, self._agents, self._clock, backoff
                )
            except SessionExpired:
                log.warning("the session expired; opening a new one")
                self.token = ""
                await self.open(self._address)

    async def close(self) -> None:
        """Best effort: a session that cannot be closed expires."""
        if not self.token:
            return
        try:
            await self._coordinator.close_session(coordinator_pb2.CloseSessionRequest(session_token=self.token))
        except StreamHouseError as error:
            log.info("the session could not be closed and will expire: %s", error)
        self.token = ""

    async def _open(self) -> None:
        agent_id = self._agent_id or f"query@{self._address}"
        response = await self._coordinator.open_session(
            coordinator_pb2.OpenSessionRequest(agent_id=agent_id, role="query", address=self._address)
        )
        self.token = response.session_token
        self._interval_ms = response.heartbeat_interval_ms
