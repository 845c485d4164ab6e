"""A real coordinator over a store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol

from shproto.errors import Unavailable
from shproto.v1 import ingest_pb2
from shruntime.clock import Clock
from shruntime.tasks import Tasks
from streamhouse_coordinator.adapters.memory import MemoryMetadataStore
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.core.tables import HISTORIES
from streamhouse_coordinator.feed import Feed
from streamhouse_coordinator.ports import Store
from streamhouse_coordinator.probe import Probe
from streamhouse_coordinator.service.common import Context
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService


class Notices(Protocol):
    """Hears of commits, as adapters.listener.Listener does."""

    async def run(self) -> None: ...


class Metadata(MemoryMetadataStore):
    """The store of one coordinator, which hears of its commits at once. `history_id`: of its events, if given."""

    def __init__(self, clock: Clock, history_id: str = "") -> None:
        super().__init__(clock)
        if history_id:
            self.tables[HISTORIES.name] = {
                key: replace(row, history_id=history_id) for key, row in self.tables[HISTORIES.name].items()
            }

    async def open(self) -> None:
        """Is open from the start."""

    async def close(self) -> None:
        """Keeps its tables: the next coordinator finds them."""

    def listen(self, feed: Feed, context: Context) -> Notices:
        self._events_changed = feed.wake
        self._group_changed = context.waiters.changed
        self._buffer_sealed = feed.sealed
        return _Heard()


class _Heard:
    async def run(self) -> None:
        await asyncio.Event().wait()


async def nobody_answers(address: str) -> ingest_pb2.DescribeAgentResponse:
    raise Unavailable(f"nothing listens at {address}")


def coordinator_over(
    store: Store,
    settings: CoordinatorSettings,
    listen: Callable[[Feed, Context], Notices],
    describe_agent: Callable[[str], Awaitable[Any]] = nobody_answers,
    *,
    events_batch: int = 0,
    events_cached: int = 0,
) -> CoordinatorService:
    """Returns a coordinator that is not started yet: wiring.build with another store. `events_batch`, `events_cached`:
    where those of the settings are too large; 0: those of the settings."""
    tasks = Tasks()
    context = Context(store=store, settings=settings)
    events = Feed(
        store,
        poll_interval_ms=settings.events_poll_interval_ms,
        batch=events_batch or settings.events_batch,
        cached=events_cached or settings.events_cached,
    )
    return CoordinatorService(
        settings=settings,
        api=CoordinatorApi(context, events, Probe(context, tasks, describe_agent)),
        context=context,
        feed=events,
        _store=store,  # type: ignore[arg-type]
        _listener=listen(events, context),  # type: ignore[arg-type]
        _relay=None,
        _tasks=tasks,
    )
