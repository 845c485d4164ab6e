"""PostgreSQL as the coordinators see it: one memory store, behind a connection that may be slow, broken or refused.

A transaction is one step (the memory store takes them one at a time), but its beginning and its answer are not: the
answer of one that was committed may be lost. A conflict rolls a transaction back and runs it again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from shproto.errors import Unavailable
from streamhouse_coordinator.adapters.memory import MemoryMetadataStore
from streamhouse_coordinator.core.tables import EventRow
from streamhouse_coordinator.ports import ProjectionCheck, Transaction
from streamhouse_coordinator.recovery.histories import Head

from tests.simulation.clock import SimClock
from tests.simulation.loop import PROCESS
from tests.simulation.network import Network

ResultT = TypeVar("ResultT")
HOST = "postgres"
STATEMENT_TIMEOUT_S = 1.0
RECONNECT_S = 0.2


class _Conflict(Exception):
    """The transaction was chosen to be rolled back."""


@dataclass(slots=True, kw_only=True)
class DatabaseRates:
    """Chances per transaction."""

    refuse: float = 0.0
    lose_answer: float = 0.0
    conflict: float = 0.0
    lose_notification: float = 0.0
    slow: float = 0.0
    slow_s: float = 0.0


class Database:
    """`up`: whether it answers at all."""

    def __init__(self, network: Network, rng: random.Random, clock: SimClock) -> None:
        self.clock = clock
        self.memory = MemoryMetadataStore(clock, self._events_changed, self._group_changed, self._buffer_sealed)
        self.network = network
        self.rng = rng
        self.rates = DatabaseRates()
        self.up = True
        self.listeners: dict[int, Listener] = {}

    def down(self) -> None:
        self.up = False
        for listener in list(self.listeners.values()):
            listener.lost()

    def _events_changed(self) -> None:
        self._notify(lambda listener: listener.events_changed())

    def _group_changed(self, group: str) -> None:
        self._notify(lambda listener: listener.group_changed(group))

    def _buffer_sealed(self, buffer_id: str) -> None:
        self._notify(lambda listener: listener.buffer_sealed(buffer_id))

    def _notify(self, tell: Callable[[Listener], None]) -> None:
        for listener in self.listeners.values():
            if not self.network.chance(self.rates.lose_notification):
                self.network.send(HOST, listener.name, listener.calling(tell))


class Listener:
    """adapters.listener.Listener: a connection of its own that hears of commits."""

    def __init__(
        self,
        database: Database,
        name: str,
        *,
        events_changed: Callable[[], None],
        group_changed: Callable[[str], None],
        buffer_sealed: Callable[[str], None],
    ) -> None:
        self._database = database
        self.name = name
        self.events_changed = events_changed
        self.group_changed = group_changed
        self.buffer_sealed = buffer_sealed
        self._ended: asyncio.Event | None = None

    def calling(self, tell: Callable[[Listener], None]) -> Callable[[], None]:
        """In the coordinator's own process, if it still listens."""
        process, ended = self._process, self._ended

        def arrive() -> None:
            if process.alive and self._ended is ended:
                process.loop.call_soon(tell, self, context=process.context.copy())

        return arrive

    async def run(self) -> None:
        self._process = PROCESS.get()
        database, key = self._database, id(self)

        def forget() -> None:
            database.listeners.pop(key, None)

        self._process.on_death.append(forget)
        while True:
            if database.up and database.network.is_open(self.name, HOST):
                self._ended = asyncio.Event()
                database.listeners[key] = self
                self.events_changed()
                self.group_changed("")
                self.buffer_sealed("")
                await self._ended.wait()
                database.listeners.pop(key, None)
            await asyncio.sleep(RECONNECT_S)

    def lost(self) -> None:
        if self._ended is not None:
            self._ended.set()


class Session:
    """ports.Store over the shared database, for one coordinator."""

    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._name = name

    async def open(self) -> None:
        await self._call(_nothing)

    async def close(self) -> None:
        """Nothing is held open."""

    def for_clients(self) -> Session:
        return self

    async def run(self, work: Callable[[Transaction], Awaitable[ResultT]], *, lock: str = "") -> ResultT:
        return await self._call(lambda: self._transact(work, lock))

    async def _transact(self, work: Callable[[Transaction], Awaitable[ResultT]], lock: str) -> ResultT:
        database = self._database
        if database.network.chance(database.rates.conflict):
            await self._roll_back(work, lock)
        return await database.memory.run(work, lock=lock)

    async def _roll_back(self, work: Callable[[Transaction], Awaitable[Any]], lock: str) -> None:
        async def in_vain(tx: Transaction) -> None:
            await work(tx)
            raise _Conflict

        try:
            await self._database.memory.run(in_vain, lock=lock)
        except _Conflict:
            return

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Transaction]:
        await self._call(_nothing)
        async with self._database.memory.snapshot() as transaction:
            yield transaction

    async def renew_session(self, session_id: str, ttl_ms: int) -> int | None:
        return await self._call(lambda: self._database.memory.renew_session(session_id, ttl_ms))

    async def renew_member(self, group: str, member_id: str, generation: int, owned: str) -> int | None:
        return await self._call(lambda: self._database.memory.renew_member(group, member_id, generation, owned))

    async def next_producer_id(self) -> int:
        return await self._call(self._database.memory.next_producer_id)

    async def read_events(self, after_position: int, limit: int) -> list[EventRow]:
        return await self._call(lambda: self._database.memory.read_events(after_position, limit))

    async def head(self) -> Head:
        return await self._call(self._database.memory.head)

    async def check_projections(self) -> AsyncIterator[ProjectionCheck]:
        async for part in self._database.memory.check_projections():
            yield part

    async def rebuild(self) -> None:
        await self._call(self._database.memory.rebuild)

    async def _call(self, work: Callable[[], Awaitable[ResultT]]) -> ResultT:
        await self._travel()
        result = await work()
        if self._database.network.chance(self._database.rates.lose_answer):
            raise Unavailable("the connection to PostgreSQL broke; the outcome is unknown")
        await self._travel()
        return result

    async def _travel(self) -> None:
        """Raises Unavailable."""
        database = self._database
        rng, rates = database.rng, database.rates
        delay = rng.uniform(0.0001, 0.001)
        if rates.slow and rng.random() < rates.slow:
            delay += rng.uniform(0, rates.slow_s)
        if delay > STATEMENT_TIMEOUT_S:
            await asyncio.sleep(STATEMENT_TIMEOUT_S)
            raise Unavailable("PostgreSQL did not answer in time")
        await asyncio.sleep(delay)
        network = database.network
        if not (network.is_open(self._name, HOST) and network.is_open(HOST, self._name)):
            await asyncio.sleep(STATEMENT_TIMEOUT_S)
            raise Unavailable("PostgreSQL did not answer in time")
        if not database.up or network.chance(rates.refuse):
            raise Unavailable("PostgreSQL refuses connections")


async def _nothing() -> None:
    """To see whether the database is there."""
