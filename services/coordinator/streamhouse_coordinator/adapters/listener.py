"""PostgreSQL's LISTEN on a connection of its own. Only makes things faster: whoever is woken also polls."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import asyncpg
from shruntime.tasks import Backoff

from streamhouse_coordinator.adapters.postgres import PostgresStore
from streamhouse_coordinator.adapters.postgres_transaction import EVENTS_CHANNEL, GROUPS_CHANNEL

log = logging.getLogger(__name__)

RECONNECT_FIRST_MS, RECONNECT_MAX_MS = 50, 5_000

PROBE_S = 10.0
"""How long a connection may be silent before it is asked whether it is there: that of a server whose machine is gone is
never closed, and nothing would be heard from the one that took its place."""


class Listener:
    """Calls `events_changed` after commits with events, `group_changed` with the name of a group that changed.
    After a reconnect, everything may have changed: `group_changed("")`."""

    def __init__(
        self, store: PostgresStore, *, events_changed: Callable[[], None], group_changed: Callable[[str], None]
    ) -> None:
        self._store = store
        self._events_changed = events_changed
        self._group_changed = group_changed

    async def run(self) -> None:
        """Listens for ever; reconnects whenever the connection ends."""
        backoff = Backoff(RECONNECT_FIRST_MS, RECONNECT_MAX_MS)
        while True:
            try:
                await self._listen(backoff)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.debug("cannot listen: %s", error)
            await asyncio.sleep(backoff.next_ms() / 1000)

    async def _listen(self, backoff: Backoff) -> None:
        connection = await self._store.connect()
        ended = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: ended.set())
            await connection.add_listener(EVENTS_CHANNEL, self._on_event)
            await connection.add_listener(GROUPS_CHANNEL, self._on_group)
            backoff.reset()
            self._events_changed()
            self._group_changed("")
            while not await _within(PROBE_S, ended):
                await connection.execute("SELECT", timeout=PROBE_S)
        finally:
            connection.terminate()

    def _on_event(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        self._events_changed()

    def _on_group(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        self._group_changed(payload)


async def _within(seconds: float, event: asyncio.Event) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
