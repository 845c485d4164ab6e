"""Probes the process that holds a session: if the process is gone, others need not wait for the lease to run out; if
the process is there, no other may take the session.

No safety depends on a probe: an agent that is wrongly found gone finds its ranges orphaned and opens a new session.

Owns: the running probes, by session. Does not own: sessions, leases.
Invariants: at most a single probe per session; a stream that breaks again restarts the pauses of its probe. Only a
refused connection ends a session.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from shproto.errors import StreamHouseError
from shproto.v1 import ingest_pb2
from shruntime.tasks import Tasks

from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.core.tables import SESSIONS, SessionRow
from streamhouse_coordinator.ports import Transaction, where
from streamhouse_coordinator.service import sessions
from streamhouse_coordinator.service.common import Context

log = logging.getLogger(__name__)

# Pauses after an undecided look: the connections of a dying process may break a moment before the port closes, and a
# busy database may refuse the takeover of thousands of partitions. About six seconds in all; after that only the lease
# decides.
LOOK_AGAIN_MS = (100, 200, 400, 800, 1_600, 3_200)

DescribeAgent = Callable[[str], Awaitable[ingest_pb2.DescribeAgentResponse]]


class Probe:
    """Probes sessions. `describe_agent` asks the ingest agent at an address."""

    def __init__(self, context: Context, tasks: Tasks, describe_agent: DescribeAgent) -> None:
        self._context = context
        self._tasks = tasks
        self._describe_agent = describe_agent
        self._running: dict[str, asyncio.Event] = {}  # by session; set when its stream broke again

    def follower_gone(self, session_id: str) -> None:
        """Starts a probe of a session after the break of an event stream."""
        if session_id in self._running:
            self._running[session_id].set()
        else:
            self._running[session_id] = asyncio.Event()
            self._tasks.spawn(f"probe {session_id}", self._probe(session_id, self._running[session_id]))

    async def _probe(self, session_id: str, broke_again: asyncio.Event) -> None:
        try:
            looks = 0
            while not await self._ended(session_id) and looks < len(LOOK_AGAIN_MS):
                try:
                    async with asyncio.timeout(LOOK_AGAIN_MS[looks] / 1000):
                        await broke_again.wait()
                    broke_again.clear()
                    looks = 0
                except TimeoutError:
                    looks += 1
        finally:
            # Also after a cancellation: otherwise the session would never be probed again.
            del self._running[session_id]

    async def _ended(self, session_id: str) -> bool:
        """Looks once; returns True if the session has ended, now or before."""
        try:
            address = await self._context.store.run(lambda tx: _address(tx, session_id))
            if not address:
                return True
            if not await self._refused(address):
                return False
            log.warning("the agent of session %s at %s is gone: its leases go to others", session_id, address)
            await sessions.end_session(self._context, session_id, "unreachable")
        except StreamHouseError as error:
            log.warning("cannot end session %s before it expires: %s", session_id, error.message)
            return False
        return True

    async def _refused(self, address: str) -> bool:
        """Returns True if the connection is refused, which shows that the machine runs and the process does not. No
        other failure shows this."""
        try:
            await self._connect(address)
        except ConnectionRefusedError:
            return True
        except (OSError, TimeoutError, ValueError) as error:
            log.info("not known if the agent at %s is alive: %s", address, error)
        return False

    async def _connect(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        async with asyncio.timeout(self._context.settings.probe_timeout_ms / 1000):
            _, writer = await asyncio.open_connection(host, int(port))
        writer.close()

    async def holds(self, session: SessionRow) -> bool:
        """Asks once; returns True if a process answers for this very session, or, for roles other than ingest, listens
        at the session's address. Returns False also if no answer comes within probe_timeout_ms."""
        try:
            if session.role != INGEST:
                await self._connect(session.address)
                return True
            async with asyncio.timeout(self._context.settings.probe_timeout_ms / 1000):
                described = await self._describe_agent(session.address)
            return described.session_id == session.session_id
        except (StreamHouseError, OSError, TimeoutError, ValueError) as error:
            log.info("no process at %s has session %s: %s", session.address, session.session_id, error)
            return False


async def _address(tx: Transaction, session_id: str) -> str:
    rows = await tx.select(SESSIONS, where(session_id=session_id))
    return rows[0].address if rows else ""
