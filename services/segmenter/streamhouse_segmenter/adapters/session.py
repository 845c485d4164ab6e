"""The worker's session with the coordinator, and the event stream that goes with it.

Owns: the session's token; that it is renewed, and that its stream stands. The stream wakes the worker, and by its break
the coordinator notices a worker that died. Does not own: what is claimed (drain.py, compactor.py).
Invariants: Nothing is claimed while there is no session. The coordinator frees all that a worker has claimed when its
session ends, and when it opens another one.
"""

import logging
from collections.abc import Callable, Sequence

from shcluster.agent_checks import send_heartbeats
from shproto.errors import AgentIdTaken, SessionExpired, StreamHouseError
from shproto.v1 import coordinator_pb2
from shruntime.tasks import Backoff, run_until_first_ends

from streamhouse_segmenter.adapters.feed_waker import follow_events
from streamhouse_segmenter.ports import Ports

log = logging.getLogger(__name__)
RETRY_FIRST_MS = 200
RETRY_MS_MAX = 5_000


class WorkerSession:
    """`start` makes the session wanted, `run` keeps it until cancelled, `close` gives it back. One that was never
    started, as in the embedded platform, keeps nobody from claiming."""

    def __init__(self, ports: Ports, worker_id: str) -> None:
        self._ports = ports
        self._worker_id = worker_id
        self._address = ""
        self._token = ""

    def may_claim(self) -> bool:
        """True unless a session is wanted and not open."""
        return not self._address or bool(self._token)

    def start(self, address: str) -> None:
        """From now on nothing is claimed without a session. `address`: where this process listens."""
        self._address = address

    async def run(self, event_types: Sequence[str], wake: Callable[[], None]) -> None:
        """Opens the session and lives in it; opens another one when it is lost. Wakes the worker at each, and at
        events of these types."""
        while True:
            opened = await self._open()
            self._token = opened.session_token
            log.info("session %s is open", opened.session_id)
            wake()
            try:
                await self._live(opened.heartbeat_interval_ms, event_types, wake)
            except SessionExpired as error:
                log.warning("the session is lost, and with it what was claimed: %s", error.message)
                self._token = ""

    async def _open(self) -> coordinator_pb2.OpenSessionResponse:
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX, self._ports.rng)
        request = coordinator_pb2.OpenSessionRequest(
            agent_id=self._worker_id,
            role="segmenter",
            address=self._address,
            session_token=str(self._ports.new_uuid()),
        )
        while True:
            try:
                return await self._ports.coordinator.open_session(request)
            except AgentIdTaken as error:
                log.error("nothing is claimed: %s", error.message)
            except StreamHouseError as error:
                log.warning("no session yet, nothing is claimed: %s", error.message)
            await self._ports.clock.sleep_ms(backoff.next_ms())

    async def _live(self, heartbeat_interval_ms: int, event_types: Sequence[str], wake: Callable[[], None]) -> None:
        """Renews the session and follows its feed until it is lost. Raises SessionExpired."""
        feed = follow_events(self._ports, event_types, wake, self._token)
        renewals = self._renew(heartbeat_interval_ms, wake)
        await run_until_first_ends({"segmenter heartbeats": renewals, "segmenter feed": feed})

    async def _renew(self, interval_ms: int, wake: Callable[[], None]) -> None:
        """Sends heartbeats until the session is lost. Raises SessionExpired."""
        ports, backoff = self._ports, Backoff(RETRY_FIRST_MS, RETRY_MS_MAX, self._ports.rng)
        # `wake`: the buffers of an agent that answers again may be claimed.
        await send_heartbeats(
            ports.coordinator, self._token, interval_ms, ports.agents, ports.clock, backoff, recovered=wake
        )

    async def close(self) -> None:
        """Gives the session back, best effort: one that cannot be closed expires. `run` must have ended."""
        token, self._token = self._token, ""
        if token:
            try:
                await self._ports.coordinator.close_session(coordinator_pb2.CloseSessionRequest(session_token=token))
            except StreamHouseError as error:
                log.info("session not closed, it expires by itself: %s", error)
