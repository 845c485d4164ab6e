"""The object store as one process sees it: the shared objects, its own bad luck."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from shstore import MemoryStore, ObjectInfo, RetryingStore, RetryPolicy, StoreUnavailable
from shstore.errors import ObjectExists
from shstore.faulty import Fault, FaultKind, FaultyStore, Operation, applies

from tests.simulation.network import Network

HOST = "s3"
ATTEMPTS_DEADLINE_MS = 2_500
TIMEOUT_MS = 800


@dataclass(slots=True, kw_only=True)
class StoreRates:
    """Chances per request. late: a put that fails takes effect all the same, some time after its caller gave up;
    under_way: how many of these are still to arrive."""

    faults: dict[FaultKind, float] = field(default_factory=dict)
    slow_ms: int = 0
    late: float = 0.0
    under_way: int = 0


class StoreFaults:
    """shstore.faulty.FaultSource with rates that change; every call takes some time."""

    def __init__(self, rng: random.Random, rates: StoreRates) -> None:
        self._rng = rng
        self._rates = rates

    def next(self, operation: Operation) -> Fault:
        drawn = self._rng.random()
        for kind, rate in self._rates.faults.items():
            if drawn < rate and applies(kind, operation):
                return Fault(kind, self._latency_ms(kind), after_items=self._rng.randrange(3))
            drawn -= rate
        return Fault(FaultKind.LATENCY, 1 + self._rng.randrange(10))

    def _latency_ms(self, kind: FaultKind) -> int:
        if kind in (FaultKind.TIMEOUT_DONE, FaultKind.TIMEOUT_NOT_DONE):
            return TIMEOUT_MS
        return 1 + self._rng.randrange(self._rates.slow_ms) if kind is FaultKind.LATENCY and self._rates.slow_ms else 5


class NetworkedStore:
    """An ObjectStore across the network: unreachable behind a partition, and puts may arrive late."""

    def __init__(self, store: MemoryStore, network: Network, name: str, rates: StoreRates, rng: random.Random) -> None:
        self._store = store
        self._network = network
        self._name = name
        self._rates = rates
        self._rng = rng

    async def _reach(self) -> None:
        if not (self._network.is_open(self._name, HOST) and self._network.is_open(HOST, self._name)):
            await asyncio.sleep(TIMEOUT_MS / 1000)
            raise StoreUnavailable("the store does not answer")

    async def put(self, key: str, parts: Sequence[bytes | memoryview], *, if_absent: bool = True) -> ObjectInfo:
        await self._reach()
        if self._network.chance(self._rates.late):
            copies = [bytes(part) for part in parts]
            self._rates.under_way += 1
            self._network.later(self._rng.uniform(0, 4), self._arrive, key, copies, if_absent)
            raise StoreUnavailable("no answer to a put that is still on its way")
        return await self._store.put(key, parts, if_absent=if_absent)

    def _arrive(self, key: str, parts: list[bytes], if_absent: bool) -> None:
        """The memory store's calls never wait, so one step runs them."""
        self._rates.under_way -= 1
        try:
            self._store.put(key, parts, if_absent=if_absent).send(None)
        except (StopIteration, ObjectExists):
            return

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        await self._reach()
        return await self._store.get(key, at=at, size_bytes=size_bytes)

    async def head(self, key: str) -> ObjectInfo:
        await self._reach()
        return await self._store.head(key)

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        await self._reach()
        async for info in self._store.list(prefix, start_after=start_after):
            yield info

    async def delete(self, keys: Sequence[str]) -> None:
        await self._reach()
        await self._store.delete(keys)

    async def check(self) -> None:
        await self._reach()

    async def close(self) -> None:
        """Nothing is held open."""


def store_of(
    store: MemoryStore,
    network: Network,
    name: str,
    rates: StoreRates,
    rng: random.Random,
    loop: asyncio.AbstractEventLoop,
) -> RetryingStore:
    """What a service is given."""
    networked = NetworkedStore(store, network, name, rates, rng)
    faulty = FaultyStore(networked, StoreFaults(rng, rates))
    return RetryingStore(faulty, RetryPolicy(deadline_ms=ATTEMPTS_DEADLINE_MS), rng=rng, monotonic=loop.time)
