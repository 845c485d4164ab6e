"""The session of a worker process (query service, segmenter) with the coordinator.

Owns: the session's token, its renewal, and its replacement once lost. Does not own: the agents that the heartbeats
report, the work of the process while the session lives.
Invariants: an outage of the coordinator ends no session by itself, only SessionExpired does. Each session is requested
with a token of its own, drawn before the first try: a try of which the answer was lost leaves no second session behind.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from shproto.errors import AgentIdTaken, SessionExpired, StreamHouseError
from shproto.limits import RECONNECT_FIRST_MS, RECONNECT_MS_MAX
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2
from shruntime.clock import Clock
from shruntime.tasks import Backoff, retry, run_until_first_ends

from shcluster.agent_checks import AgentChecks, send_heartbeats

log = logging.getLogger(__name__)


class SessionKeeper:
    """Keeper of a session: `start` makes the session wanted, `run` keeps it until cancelled, `close` gives it back. A
    keeper that was never started, as in a process that lives in the coordinator's, wants no session.

    `agent_id`: the worker's name; empty: made from role and address. `agents`: reported by the heartbeats.
    """

    def __init__(
        self, coordinator: CoordinatorApi, clock: Clock, agents: AgentChecks, *, role: str, agent_id: str
    ) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self._agents = agents
        self._role = role
        self._agent_id = agent_id
        self._address = ""
        self._interval_ms = 0
        self.token = ""

    def may_work(self) -> bool:
        """Returns False while a session is wanted and not open: claims belong to a session."""
        return not self._address or bool(self.token)

    def start(self, address: str) -> None:
        """Makes the session wanted. `address`: where this process listens."""
        self._address = address

    async def open(self) -> None:
        """Returns once the session is open; repeats the request until a coordinator grants it."""
        request = coordinator_pb2.OpenSessionRequest(
            agent_id=self._agent_id or f"{self._role}@{self._address}",
            role=self._role,
            address=self._address,
            session_token=str(uuid.uuid4()),
        )
        if self.token:
            return  # `run` begins with `open`, which the caller may have called before
        backoff = Backoff(RECONNECT_FIRST_MS, RECONNECT_MS_MAX)
        opened = await retry(
            lambda: self._coordinator.open_session(request), backoff, _log_refusals(), self._clock.sleep_ms
        )
        self.token, self._interval_ms = opened.session_token, opened.heartbeat_interval_ms
        log.info("session %s of %s %s is open", opened.session_id, self._role, request.agent_id)

    async def run(
        self,
        wake: Callable[[], None] = lambda: None,
        follow: Callable[[str], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """Opens the session and renews it; opens another session once it is lost. Runs until cancelled.

        `wake` is called when a session is open, and when an agent that did not answer does again. `follow(token)` runs
        beside the heartbeats, and is cancelled when the session is lost.
        """
        while True:
            await self.open()
            wake()  # work was refused without a session (`may_work`), and may be waiting
            try:
                if follow is None:
                    await self._renew(wake)
                else:
                    renewals, feed = self._renew(wake), follow(self.token)
                    await run_until_first_ends({f"{self._role} heartbeats": renewals, f"{self._role} feed": feed})
            except SessionExpired as error:
                log.warning("the session is lost: %s", error.message)
                self.token = ""

    async def _renew(self, recovered: Callable[[], None]) -> None:
        """Sends heartbeats until the session is lost. Raises SessionExpired."""
        backoff = Backoff(RECONNECT_FIRST_MS, RECONNECT_MS_MAX)
        await send_heartbeats(
            self._coordinator, self.token, self._interval_ms, self._agents, self._clock, backoff, recovered=recovered
        )

    async def close(self) -> None:
        """Gives the session back, if a coordinator answers: otherwise the session expires. `run` must have ended."""
        token, self.token = self.token, ""  # from now on `may_work` returns False
        if token:
            try:
                await self._coordinator.close_session(coordinator_pb2.CloseSessionRequest(session_token=token))
            except StreamHouseError as error:
                log.info("the session is not closed, and expires by itself: %s", error.message)


def _log_refusals() -> Callable[[StreamHouseError], bool]:
    """Returns a function that logs refusals of a session, and ends no retries: a coordinator comes back, and a name
    that is taken becomes free. A name that stays taken, as long as another process runs, is logged once."""
    was_taken = False

    def log_refusal(error: StreamHouseError) -> bool:
        nonlocal was_taken
        is_taken = isinstance(error, AgentIdTaken)
        if not is_taken:
            log.warning("no session yet: %s", error.message)
        elif not was_taken:
            log.error("no session: %s", error.message)
        was_taken = is_taken
        return False

    return log_refusal
