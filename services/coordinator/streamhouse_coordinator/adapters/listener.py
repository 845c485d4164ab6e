"""Receives PostgreSQL's notifications on a separate connection, straight to the server, since a transaction pooler
forgets LISTEN. Notifications only save time: all receivers poll as well.

Owns: the connection that listens. Does not own: how the connection is made, the polls of the receivers.
Invariants: at most one connection listens at a time, and each is terminated when listening ends. Every receiver
is called after each connect, since commits before that were not heard of. An open connection is probed every PROBE_S.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from shruntime.tasks import Backoff

from streamhouse_coordinator.adapters.postgres_errors import FAILURES
from streamhouse_coordinator.adapters.postgres_transaction import BUFFERS_CHANNEL, EVENTS_CHANNEL, GROUPS_CHANNEL

log = logging.getLogger(__name__)

LISTEN_RETRY_FIRST_MS, LISTEN_RETRY_MS_MAX = 50, 5_000

PROBE_S = 10.0
"""How long a connection may be silent before it is asked whether it is there: that of a server whose machine is gone is
never closed, and nothing would be heard from the one that took its place."""


class Listener:
    """Calls `events_changed` after commits with events, `group_changed` with the name of a changed group,
    `buffer_sealed` with the id of a sealed buffer. After a reconnect, anything may have changed: `group_changed("")`,
    `buffer_sealed("")`. `connect` makes a long-lived connection. `works`: False if LISTEN has no effect; known once the
    store is open."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Any]],
        *,
        events_changed: Callable[[], None],
        group_changed: Callable[[str], None],
        buffer_sealed: Callable[[str], None],
        works: Callable[[], bool] = lambda: True,
    ) -> None:
        self._connect = connect
        self._works = works
        self._hears = True
        self._events_changed = events_changed
        self._group_changed = group_changed
        self._buffer_sealed = buffer_sealed

    async def run(self) -> None:
        """Listens for ever; reconnects whenever the connection ends."""
        if not self._works():
            log.warning(
                "LISTEN does not work through the pooler that pg_dsn leads to, so events are polled; name the server "
                "itself in pg_listen_dsn to hear of them at once"
            )
            return
        backoff = Backoff(LISTEN_RETRY_FIRST_MS, LISTEN_RETRY_MS_MAX)
        while True:
            try:
                await self._listen(backoff)
            # Reported once per outage; further tries only at DEBUG.
            except FAILURES as error:
                log.log(logging.INFO if self._hears else logging.DEBUG, "cannot listen: %s", error)
                self._hears = False
            await asyncio.sleep(backoff.next_ms() / 1000)

    async def _listen(self, backoff: Backoff) -> None:
        connection = await self._connect()
        ended = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: ended.set())
            await connection.add_listener(EVENTS_CHANNEL, self._on_event)
            await connection.add_listener(GROUPS_CHANNEL, self._on_group)
            await connection.add_listener(BUFFERS_CHANNEL, self._on_buffer)
            # After LISTEN has worked: a server that takes connections and then fails must not be asked without a pause.
            backoff.reset()
            self._hears = True
            self._events_changed()
            self._group_changed("")
            self._buffer_sealed("")
            while not await _within(PROBE_S, ended):
                await connection.execute("SELECT", timeout=PROBE_S)
        finally:
            # Not close(), which would wait for the answer of a server that may be gone.
            connection.terminate()

    def _on_event(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        self._events_changed()

    def _on_group(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        self._group_changed(payload)

    def _on_buffer(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        self._buffer_sealed(payload)


async def _within(seconds: float, event: asyncio.Event) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
