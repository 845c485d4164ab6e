"""The retry policy of every store.

Capped exponential back-off with full jitter (a wait drawn evenly between 0 and the cap, so that many clients do not
come back at once), and a deadline over all attempts of a call. Owns: the store's last failure. Does not own: the store.
Invariants: only retriable errors are repeated; a call ends at its deadline with the error of its last attempt.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shruntime.tasks import cancel_and_wait

from shstore.errors import REFUSALS, ObjectExists, StoreError, StoreInvalid, StoreUnavailable
from shstore.port import ObjectInfo, ObjectStore
from shstore.ranges import byte_views, split_views

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

SILENCE_SAID_S = 5.0
"""Of a store that does not answer the first question: as long as a slow one may take over a listing."""

COMPARE_BYTES = 8 * 1024 * 1024
"""Bytes per read when a put of unknown outcome is compared with what is stored: bounds the memory it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Limits and waits of retries. Waits are in ms; `deadline_ms` covers all attempts and waits of a call."""

    base_delay_ms: int = 100
    """Cap of the first wait. It doubles with each further one."""
    throttled_base_delay_ms: int = 500
    """The same after SlowDown: S3 asks for less load, and needs longer to grow its capacity."""
    max_delay_ms: int = 2_000
    """No wait is longer: a store that came back is noticed within 2 s. Asking it once a second costs it nothing."""
    throttled_max_delay_ms: int = 10_000
    """The same after SlowDown: a store that is overloaded recovers sooner if it is asked less."""
    deadline_ms: int = 120_000
    """Two slow attempts (60 s each), or some twenty failing quickly; then the caller's own queue takes over."""

    def __post_init__(self) -> None:
        for name in (
            "base_delay_ms",
            "throttled_base_delay_ms",
            "max_delay_ms",
            "throttled_max_delay_ms",
            "deadline_ms",
        ):
            if getattr(self, name) <= 0:
                raise StoreInvalid(f"retry {name} is {getattr(self, name)}, but must be at least 1")

    def delay_cap_ms(self, failures: int, *, throttled: bool) -> int:
        """Returns the longest wait after the `failures`-th failure in a row (counted from 1)."""
        base_ms, max_ms = self.base_delay_ms, self.max_delay_ms
        if throttled:
            base_ms, max_ms = self.throttled_base_delay_ms, self.throttled_max_delay_ms
        doublings = min(failures - 1, 30)  # beyond 2^30 the cap holds anyway
        return min(base_ms << doublings, max_ms)


class RetryingStore:
    """Wraps `store`; `rng` draws the jitter, `monotonic` (seconds) and `sleep` are the clock."""

    def __init__(
        self,
        store: ObjectStore,
        policy: RetryPolicy | None = None,
        *,
        rng: random.Random | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._policy = policy or RetryPolicy()
        self._rng = rng or random.Random()
        self._monotonic = monotonic
        self._sleep = sleep
        self._trouble: StoreError | None = None

    @property
    def trouble(self) -> str:
        """Message of the store's last failure; empty if the store has answered since. Retried calls report nothing
        else."""
        return str(self._trouble or "")

    async def put(self, key: str, parts: Sequence[bytes | memoryview], *, if_absent: bool = True) -> ObjectInfo:
        """Puts as ObjectStore.put does, and returns the object's info.

        An object found on a repeated put-if-absent with the same bytes is this put's own: the earlier attempt had
        arrived, only its reply was lost.
        """
        attempts = 0

        async def put_once() -> ObjectInfo:
            nonlocal attempts
            attempts += 1
            try:
                return await self._store.put(key, parts, if_absent=if_absent)
            except ObjectExists:
                if attempts > 1 and (stored := await self._stored_same(key, parts)):
                    return stored
                raise

        return await self._retried(f"put {key!r}", put_once)

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        return await self._retried(f"get {key!r}", lambda: self._store.get(key, at=at, size_bytes=size_bytes))

    async def head(self, key: str) -> ObjectInfo:
        return await self._retried(f"head {key!r}", lambda: self._store.head(key))

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """Lists as ObjectStore.list does; yields on from the last key after an error."""
        last = start_after
        backoff = self._new_backoff(f"list {prefix!r}")
        while True:
            try:
                async for info in self._store.list(prefix, start_after=last):
                    last = info.key
                    self._trouble = None
                    yield info
                    # A listing as a whole may take longer than a call: the deadline counts from the last key.
                    backoff = self._new_backoff(f"list {prefix!r}")
                self._trouble = None  # also if nothing was found
                return
            except StoreError as exc:
                self._note(exc)
                await backoff.wait(exc)

    async def delete(self, keys: Sequence[str]) -> None:
        await self._retried(f"delete {len(keys)} objects", lambda: self._store.delete(keys))

    async def check(self) -> None:
        await self._retried("check the store", self._store.check)

    async def wait_until_usable(self) -> None:
        """Waits, without a limit, until the store answers `check`; logs the reason of the wait.

        Raises REFUSALS, which waiting does not mend: wrong credentials, a missing bucket, an unusable directory.
        """
        failures = 0
        while True:
            try:
                await self._check_aloud()
            except REFUSALS:
                raise
            except StoreError as error:
                failures += 1
                _log.warning("waiting for the object store: %s", error)
                await self._sleep(self._rng.uniform(0, self._policy.delay_cap_ms(failures, throttled=False)) / 1000)
            else:
                if failures:
                    _log.info("the object store answers")
                return

    async def _check_aloud(self) -> None:
        """Checks once, and logs that the store is silent long before the attempt's time limit."""
        asking = asyncio.ensure_future(self._store.check())
        try:
            await asyncio.wait((asking,), timeout=SILENCE_SAID_S)
            if not asking.done():
                _log.warning("waiting for the object store: it has not answered for %g s", SILENCE_SAID_S)
            await asking
        finally:
            await cancel_and_wait(asking)

    async def close(self) -> None:
        await self._store.close()

    def _new_backoff(self, action: str) -> _Backoff:
        return _Backoff(action, self._policy, self._rng, self._monotonic, self._sleep)

    async def _retried(self, action: str, call: Callable[[], Awaitable[Result]]) -> Result:
        backoff = self._new_backoff(action)
        while True:
            try:
                # The deadline ends attempts that hang, not only the waits between attempts.
                async with asyncio.timeout(backoff.remaining_s()):
                    result = await call()
            except TimeoutError:
                self._trouble = backoff.gave_up()
                raise self._trouble from None
            except StoreError as exc:
                self._note(exc)
                await backoff.wait(exc)
            else:
                self._trouble = None
                return result

    def _note(self, error: StoreError) -> None:
        """Records a failure to answer or a refusal as trouble; an answer such as a missing object clears it."""
        self._trouble = error if error.retriable or isinstance(error, REFUSALS) else None

    async def _stored_same(self, key: str, parts: Sequence[bytes | memoryview]) -> ObjectInfo | None:
        """Returns the info of the object under `key` if it holds exactly these bytes, else None."""
        views, size_bytes = byte_views(parts)
        info = await self._store.head(key)
        if info.size_bytes != size_bytes:
            return None
        at = 0
        for piece in split_views(views, COMPARE_BYTES):
            expected = b"".join(piece)
            if await self._store.get(key, at=at, size_bytes=len(expected)) != expected:
                return None
            at += len(expected)
        return info


class _Backoff:
    """The waits of a call, and its deadline."""

    def __init__(
        self,
        action: str,
        policy: RetryPolicy,
        rng: random.Random,
        monotonic: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._action = action
        self._policy = policy
        self._rng = rng
        self._monotonic = monotonic
        self._sleep = sleep
        self._deadline = monotonic() + policy.deadline_ms / 1000
        self._failures = 0
        self._last: StoreError | None = None

    def remaining_s(self) -> float:
        return max(0.0, self._deadline - self._monotonic())

    async def wait(self, exc: StoreError) -> None:
        """Waits before the next attempt. Raises `exc` itself if it cannot be retried, or the deadline error."""
        if not exc.retriable:
            raise exc
        self._failures += 1
        self._last = exc
        throttled = isinstance(exc, StoreUnavailable) and exc.throttled
        delay_s = self._rng.uniform(0, self._policy.delay_cap_ms(self._failures, throttled=throttled)) / 1000
        # The wait would end behind the deadline: the caller hears of it now.
        if delay_s >= self.remaining_s():
            raise self.gave_up() from exc
        await self._sleep(delay_s)

    def gave_up(self) -> StoreError:
        """Returns the error of a call whose deadline passed: of the last attempt's own kind if there was an attempt."""
        tried = f"could not {self._action} in {self._policy.deadline_ms} ms and {self._failures} failures"
        throttled = isinstance(self._last, StoreUnavailable) and self._last.throttled
        return StoreUnavailable(f"{tried}; last: {self._last}", throttled=throttled)
