"""A subscription: many partitions, read by turns, pushed as records arrive.

Owns: records fetched and not yet taken by the subscriber, the windows of the partitions. Does not own: reading.
Invariants: each partition has at most one fetch under way. Fetches that may return much hold a share of the byte budget
until the subscriber has taken their records; a partition at its end waits with a small fetch that holds none. A
partition of which the window is used up is not fetched, so no bytes are held for it either. Fetched records leave by
turns, a response of each partition that has any.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from shproto.errors import Internal, InvalidArgument, StreamHouseError
from shproto.v1.query_pb2 import FetchResponse, SubscribeRequest, WindowUpdate
from shruntime.byte_budget import ByteBudget
from shruntime.round_robin import RoundRobinQueue
from shruntime.tasks import cancel_and_wait

from shread.counters import delivery_duration_ms
from shread.fetch import fetch
from shread.reads import Fetched, Reads, Want

log = logging.getLogger(__name__)

# Bytes for a partition that waits at its end, apart from a first batch of any size. The rest comes with the next fetch,
# under the budget.
WAITING_BYTES_MAX = 64 * 1024
# After this time, or a heartbeat if that is shorter, a subscriber without records is sent the reason.
TELL_AFTER_MS_MAX = 5_000
HEARTBEAT_SPREAD = 0.85


class BudgetReservation:
    """Bytes taken from several budgets, in their order; unused bytes are given back at once, the rest at the end. A
    shared budget comes last, so that no reservation holds shared bytes while waiting for a budget of its own."""

    def __init__(self, lent: Sequence[tuple[ByteBudget, int]]) -> None:
        self._lent = list(lent)

    @classmethod
    async def reserve(cls, budgets: Sequence[ByteBudget], size_bytes: int) -> BudgetReservation:
        """Waits for `size_bytes` of each budget, in turn, and returns the reservation. Gives all back if cancelled."""
        lent: list[tuple[ByteBudget, int]] = []
        try:
            for budget in budgets:
                lent.append((budget, await budget.take(size_bytes)))
        except BaseException:
            cls(lent).release()
            raise
        return cls(lent)

    def release(self, keep_bytes: int = 0) -> None:
        """Gives back all but `keep_bytes`, or keeps everything if less was lent."""
        for number, (budget, size_bytes) in enumerate(self._lent):
            kept = min(size_bytes, keep_bytes)
            self._lent[number] = (budget, kept)
            budget.give_back(size_bytes - kept)


class Window:
    """Decoded bytes of a partition that may be sent before the subscriber reports consumption. A response may exceed
    them, as a batch is sent whole. None: no limit but gRPC's flow control."""

    def __init__(self, size_bytes: int | None = None) -> None:
        self.free_bytes = size_bytes
        self._opened = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """True if another response may be sent."""
        return self.free_bytes is None or self.free_bytes > 0

    def limit(self, size_bytes: int) -> int:
        """Returns the part of `size_bytes` that fits into the window."""
        return size_bytes if self.free_bytes is None else min(size_bytes, self.free_bytes)

    def use(self, size_bytes: int) -> None:
        """Takes sent bytes from the window."""
        if self.free_bytes is not None:
            self.free_bytes -= size_bytes

    def add(self, size_bytes: int) -> None:
        """Adds consumed bytes. Raises InvalidArgument without a window."""
        if self.free_bytes is None:
            raise InvalidArgument("an update of a window, of a position that was given none", field="window_updates")
        self.free_bytes += size_bytes
        if self.is_open:
            self._opened.set()

    async def wait_open(self) -> None:
        """Returns once anything may be sent."""
        while not self.is_open:
            self._opened.clear()
            await self._opened.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A partition of a subscription. `resolve` finds the partition (StreamHouseError if missing), `respond` makes the
    response of fetched records, with the next_offset to go on at."""

    resolve: Callable[[], Awaitable[Want]]
    respond: Callable[[Want, Fetched], Awaitable[FetchResponse]]
    refuse: Callable[[StreamHouseError], FetchResponse]
    window: Window = field(default_factory=Window)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delivery:
    """A response to be sent. `since_ms`: time at which the records existed and were requested; None without records."""

    response: FetchResponse
    since_ms: int | None = None
    reservation: BudgetReservation | None = None
    taken: asyncio.Event | None = None
    is_last: bool = False


class SubscribeStream:
    """Pushes the records of several partitions. `responses` ends when every partition has failed; closing `responses`
    ends all fetches."""

    def __init__(
        self, reads: Reads, sources: Sequence[Source], *, budgets: Sequence[ByteBudget], heartbeat_ms: int
    ) -> None:
        """Takes read-ahead from each of `budgets`."""
        self._reads = reads
        self._sources = sources
        self._budgets = budgets
        self._heartbeat_ms = heartbeat_ms
        self._tell_after_ms = min(heartbeat_ms, TELL_AFTER_MS_MAX)
        # Bounded by the budget, and by another response per partition.
        self._ready: RoundRobinQueue[int, _Delivery] = RoundRobinQueue()
        self._news = asyncio.Event()
        self._failure: StreamHouseError | None = None

    async def responses(self, requests: AsyncIterator[SubscribeRequest]) -> AsyncGenerator[FetchResponse, None]:
        """Yields responses of all partitions, by turns. `requests`: updates of windows, after the first request.

        Raises InvalidArgument for any other request.
        """
        tasks = [
            asyncio.create_task(self._pump(number), name=f"subscription {number}")
            for number in range(len(self._sources))
        ]
        tasks.append(asyncio.create_task(self._update_windows(requests), name="subscription windows"))
        try:
            running = len(self._sources)
            while running:
                delivery = await self._next()
                # Before the yield: a subscriber that has all records ends the stream with the last response.
                if delivery.since_ms is not None:
                    delivery_duration_ms.record(self._reads.clock.monotonic_ms() - delivery.since_ms)
                yield delivery.response
                # The generator goes on once gRPC has taken the response: until then its bytes are held here.
                if delivery.reservation is not None:
                    delivery.reservation.release()
                if delivery.taken is not None:
                    delivery.taken.set()
                running -= delivery.is_last
        finally:
            await cancel_and_wait(*tasks)

    async def _next(self) -> _Delivery:
        while True:
            if self._failure is not None:
                raise self._failure
            if self._ready:
                return self._ready.take()[1]
            self._news.clear()
            await self._news.wait()

    def _deliver(self, number: int, delivery: _Delivery) -> None:
        self._ready.put(number, delivery)
        self._news.set()

    async def _update_windows(self, requests: AsyncIterator[SubscribeRequest]) -> None:
        """Applies updates until the subscriber sends no more. Any other request ends the subscription with an error."""
        try:
            async for request in requests:
                if request.positions:
                    raise InvalidArgument("positions are in the first message only", field="positions")
                for update in request.window_updates:
                    self._update(update)
        except StreamHouseError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the requests of a subscription failed with a defect")
            self._fail(Internal(f"internal error: {type(error).__name__}: {error}"))

    def _update(self, update: WindowUpdate) -> None:
        if update.position >= len(self._sources):
            raise InvalidArgument(
                f"window_updates names position {update.position}, must be 0 to {len(self._sources) - 1}",
                field="window_updates",
                value=update.position,
                limit=len(self._sources) - 1,
            )
        self._sources[update.position].window.add(update.size_bytes)

    def _fail(self, error: StreamHouseError) -> None:
        self._failure = error
        self._news.set()

    async def _pump(self, number: int) -> None:
        source = self._sources[number]
        try:
            await self._read_on(number, await source.resolve())
        except StreamHouseError as error:
            self._deliver(number, _Delivery(response=source.refuse(error), is_last=True))
        except Exception as error:
            log.exception("a partition of a subscription failed with a defect")
            refusal = source.refuse(Internal(f"internal error: {type(error).__name__}: {error}"))
            self._deliver(number, _Delivery(response=refusal, is_last=True))

    async def _read_on(self, number: int, want: Want) -> None:
        window = self._sources[number].window
        want = replace(want, known_reason="")
        has_more, has_told = False, False
        # Of the latest fetch: an agent knows only encoded sizes, so without the ratio each read of the tail would bring
        # that many times the bytes that can be sent.
        ratio = 1.0
        while True:
            await window.wait_open()
            decoded_bytes_max = window.limit(want.bytes_max)
            bytes_max = max(1, int(decoded_bytes_max / ratio))
            limited = replace(want, bytes_max=bytes_max, decoded_bytes_max=decoded_bytes_max)
            if has_more or self._reads.is_registered(want):
                fetched, response = await self._read(number, want, limited)
            else:
                # The first arrival at the end is sent at once, later only news and heartbeats, at times spread out:
                # readers that came together would otherwise stay together.
                wait_ms = int(self._heartbeat_ms * random.uniform(HEARTBEAT_SPREAD, 1)) if has_told else 0
                fetched, response = await self._await_more(number, want, replace(limited, max_wait_ms=wait_ms))
                has_told = True
            window.use(fetched.decoded_bytes)
            if fetched.size_bytes:
                ratio = max(1.0, fetched.decoded_bytes / fetched.size_bytes)
            has_records = bool(response.batches or response.records)
            has_more = has_records and response.next_offset < response.high_watermark
            want = replace(want, offset=response.next_offset, known_reason=response.waiting_reason)

    async def _read(self, number: int, want: Want, limited: Want) -> tuple[Fetched, FetchResponse]:
        """Reads under the budgets; returns the records with their response. If nothing comes for a while, the
        subscriber is sent the reason."""
        reservation = await BudgetReservation.reserve(self._budgets, limited.bytes_max)
        reported = replace(limited, max_wait_ms=0, known_reason=None, tell_after_ms=self._tell_after_ms)
        asked_ms = self._reads.clock.monotonic_ms()
        try:
            fetched = await fetch(self._reads, reported)
            response = await self._sources[number].respond(want, fetched)
        except BaseException:
            reservation.release()
            raise
        reservation.release(keep_bytes=fetched.size_bytes)
        if fetched.batches:
            self._deliver(number, _Delivery(response=response, since_ms=asked_ms, reservation=reservation))
        elif response.waiting_reason not in ("", want.known_reason):
            await self._deliver_and_wait(number, response, None)
        return fetched, response

    async def _await_more(self, number: int, want: Want, limited: Want) -> tuple[Fetched, FetchResponse]:
        """Returns the next records with their response, or the heartbeat without; ends when the subscriber has taken
        it."""
        small = replace(
            limited,
            bytes_max=min(limited.bytes_max, WAITING_BYTES_MAX),
            tell_after_ms=limited.max_wait_ms + self._tell_after_ms,
        )
        asked_ms = self._reads.clock.monotonic_ms()
        fetched = await fetch(self._reads, small)
        response = await self._sources[number].respond(want, fetched)
        # The wait for new records is not part of the delivery.
        since_ms = fetched.found_ms if small.max_wait_ms else asked_ms
        await self._deliver_and_wait(number, response, since_ms if fetched.batches else None)
        return fetched, response

    async def _deliver_and_wait(self, number: int, response: FetchResponse, since_ms: int | None) -> None:
        """Returns once the subscriber has taken the response."""
        taken = asyncio.Event()
        self._deliver(number, _Delivery(response=response, since_ms=since_ms, taken=taken))
        await taken.wait()
