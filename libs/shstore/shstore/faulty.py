"""Wraps a store and injects faults of object stores, from an explicit script or drawn from a seed.

For tests of everything that uses a store; the same seed and calls give the same faults.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol, TypeAlias

from shstore.errors import BodyTruncated, StoreUnavailable
from shstore.port import ObjectInfo, ObjectStore

Operation: TypeAlias = Literal["put", "get", "head", "list", "delete", "check"]


class FaultKind(StrEnum):
    """Kinds of faults. All but LATENCY and TRUNCATED_BODY raise StoreUnavailable."""

    UNAVAILABLE = "unavailable"
    """5xx; nothing was done."""
    THROTTLED = "throttled"
    """SlowDown; nothing was done."""
    TIMEOUT_NOT_DONE = "timeout_not_done"
    """No reply in time; the request never arrived."""
    TIMEOUT_DONE = "timeout_done"
    """No reply in time; the request took effect all the same."""
    LOST_REPLY = "lost_reply"
    """The connection broke after the request took effect."""
    TRUNCATED_BODY = "truncated_body"
    """A get's body ends early (BodyTruncated), a put's never arrives whole (nothing is stored)."""
    CONFLICT = "conflict"
    """409 ConditionalRequestConflict on a put-if-absent: another conditional request is under way."""
    LATENCY = "latency"
    """Only slow: the call works after `Fault.latency_ms`."""


_READS: tuple[Operation, ...] = ("get", "head", "list", "check")
_DONE = (FaultKind.TIMEOUT_DONE, FaultKind.LOST_REPLY)


def applies(kind: FaultKind, operation: Operation) -> bool:
    """True if this operation can meet this kind of fault."""
    if kind in _DONE:
        return operation not in _READS
    if kind is FaultKind.TRUNCATED_BODY:
        return operation in ("get", "put")
    return kind is not FaultKind.CONFLICT or operation == "put"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one call. `latency_ms` delays the call first, for every kind; `after_items`: items that a list
    yields before the fault."""

    kind: FaultKind
    latency_ms: int = 0
    after_items: int = 0


class FaultSource(Protocol):
    """Chooses a fault for each call."""

    def next(self, operation: Operation) -> Fault | None:
        """Returns the fault of this call, or None for a call without a fault."""
        ...


class ScriptedFaults:
    """The n-th call (of `operation`, or of any) gets the n-th entry; None and the end of the script mean no fault."""

    def __init__(self, script: Iterable[Fault | FaultKind | None], *, operation: Operation | None = None) -> None:
        self._script = deque(Fault(step) if isinstance(step, FaultKind) else step for step in script)
        self._operation = operation

    def next(self, operation: Operation) -> Fault | None:
        """Returns the next entry of the script. Raises ValueError if the operation cannot meet that fault."""
        if not self._script or self._operation not in (None, operation):
            return None
        fault = self._script.popleft()
        if fault is not None and not applies(fault.kind, operation):
            raise ValueError(f"a {operation} cannot fail by {fault.kind}")
        return fault

    @property
    def remaining(self) -> int:
        """Number of unused entries: a test that expects all of its faults asserts 0."""
        return len(self._script)


class RandomFaults:
    """Each call draws from `rates` (probability per kind, together at most 1); kinds that cannot occur are skipped."""

    def __init__(self, rng: random.Random, rates: Mapping[FaultKind, float], *, latency_ms_max: int = 20) -> None:
        if min(rates.values(), default=0) < 0 or sum(rates.values()) > 1 + 1e-9:
            raise ValueError(f"fault rates must be probabilities with a sum of at most 1, got {dict(rates)}")
        self._rng = rng
        self._rates = dict(rates)
        self._latency_ms_max = latency_ms_max

    def next(self, operation: Operation) -> Fault | None:
        drawn, latency_ms = self._rng.random(), self._rng.randint(0, self._latency_ms_max)
        for kind, rate in self._rates.items():
            if drawn < rate:
                latency_ms = latency_ms if kind is FaultKind.LATENCY else 0
                return Fault(kind, latency_ms) if applies(kind, operation) else None
            drawn -= rate
        return None


class FaultyStore:
    """`store` with the faults of `faults`. While `down` is set every call fails."""

    def __init__(
        self,
        store: ObjectStore,
        faults: FaultSource | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._faults = faults or ScriptedFaults(())
        self._sleep = sleep
        self.down = False
        self.injected: list[tuple[Operation, FaultKind]] = []
        """What was injected so far, in order (without `down`)."""

    async def put(self, key: str, parts: Sequence[bytes | memoryview], *, if_absent: bool = True) -> ObjectInfo:
        fault = await self._before("put")
        info = await self._store.put(key, parts, if_absent=if_absent)
        _after("put", fault)
        return info

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        fault = await self._before("get")
        body = await self._store.get(key, at=at, size_bytes=size_bytes)
        if fault and fault.kind is FaultKind.TRUNCATED_BODY and body:
            raise BodyTruncated(key, expected_bytes=len(body), got_bytes=len(body) // 2)
        return body

    async def head(self, key: str) -> ObjectInfo:
        await self._before("head")
        return await self._store.head(key)

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        fault = await self._choose("list")
        given = 0
        async for info in self._store.list(prefix, start_after=start_after):
            if fault and fault.kind is not FaultKind.LATENCY and given == fault.after_items:
                break
            yield info
            given += 1
        _before_effect("list", fault)

    async def delete(self, keys: Sequence[str]) -> None:
        fault = await self._before("delete")
        await self._store.delete(keys)
        _after("delete", fault)

    async def check(self) -> None:
        await self._before("check")
        await self._store.check()

    async def close(self) -> None:
        await self._store.close()

    async def _before(self, operation: Operation) -> Fault | None:
        fault = await self._choose(operation)
        _before_effect(operation, fault)
        return fault

    async def _choose(self, operation: Operation) -> Fault | None:
        if self.down:
            raise StoreUnavailable(f"injected: the store is down ({operation})")
        fault = self._faults.next(operation)
        if fault:
            self.injected.append((operation, fault.kind))
            if fault.latency_ms:
                await self._sleep(fault.latency_ms / 1000)
        return fault


def _before_effect(operation: Operation, fault: Fault | None) -> None:
    if fault is None or fault.kind is FaultKind.LATENCY or fault.kind in _DONE:
        return
    if fault.kind is FaultKind.TRUNCATED_BODY and operation == "get":
        return  # get() cuts the body itself
    throttled = fault.kind is FaultKind.THROTTLED
    raise StoreUnavailable(f"injected: {fault.kind} on {operation}", throttled=throttled)


def _after(operation: Operation, fault: Fault | None) -> None:
    if fault and fault.kind in _DONE:
        raise StoreUnavailable(f"injected: {fault.kind} on {operation}")
