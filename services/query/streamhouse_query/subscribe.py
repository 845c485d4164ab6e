"""One subscription: many partitions, read by turns, pushed as they come.

Each partition has at most one fetch under way. Fetches that may return much hold a share of the byte budget until
the subscriber has taken what they got; a partition at its end waits with a small fetch that holds none.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from shproto.errors import Internal, StreamHouseError
from shproto.v1.query_pb2 import FetchResponse

from streamhouse_query.fetch import fetch
from streamhouse_query.reads import Fetched, Reads, Want

log = logging.getLogger(__name__)

# What a partition that waits at its end may get at once, apart from one batch of any size. What is beyond comes with
# the next fetch, under the budget.
WAITING_BYTES_MAX = 64 * 1024


class ByteBudget:
    """Bytes lent to fetches, first come first served."""

    def __init__(self, bytes_max: int) -> None:
        self._free = bytes_max
        self._bytes_max = bytes_max
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size_bytes: int) -> int:
        """Waits for its turn; the bytes lent, which is no more than the whole budget."""
        size_bytes = min(size_bytes, self._bytes_max)
        if not self._waiting and size_bytes <= self._free:
            self._free -= size_bytes
            return size_bytes
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(size_bytes)  # lent in the very moment of the cancellation
            raise
        return size_bytes

    def give(self, size_bytes: int) -> None:
        self._free += size_bytes
        while self._waiting:
            wanted, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
            elif wanted <= self._free:
                self._waiting.popleft()
                self._free -= wanted
                turn.set_result(None)
            else:
                return


@dataclass(frozen=True, slots=True)
class Source:
    """One partition of a subscription. `resolve` finds it (StreamHouseError if it is not there), `respond` makes the
    response of what was fetched; its next_offset says where to go on."""

    resolve: Callable[[], Awaitable[Want]]
    respond: Callable[[Want, Fetched], FetchResponse]
    refuse: Callable[[StreamHouseError], FetchResponse]


@dataclass(frozen=True, slots=True)
class _Delivery:
    response: FetchResponse
    lent_bytes: int = 0
    taken: asyncio.Event | None = None
    is_last: bool = False


class Subscription:
    """`responses` ends when every partition has failed; closing it ends all fetches."""

    def __init__(self, reads: Reads, sources: Sequence[Source], *, buffer_bytes: int, heartbeat_ms: int) -> None:
        self._reads = reads
        self._sources = sources
        self._budget = ByteBudget(buffer_bytes)
        self._heartbeat_ms = heartbeat_ms
        self._ready: asyncio.Queue[_Delivery] = asyncio.Queue()  # bounded by the budget, and by one more per partition

    async def responses(self) -> AsyncGenerator[FetchResponse, None]:
        pumps = [
            asyncio.create_task(self._pump(source), name=f"subscription {number}")
            for number, source in enumerate(self._sources)
        ]
        try:
            running = len(pumps)
            while running:
                delivery = await self._ready.get()
                yield delivery.response
                self._budget.give(delivery.lent_bytes)
                if delivery.taken is not None:
                    delivery.taken.set()
                running -= delivery.is_last
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, source: Source) -> None:
        try:
            await self._read_on(source, await source.resolve())
        except StreamHouseError as error:
            self._ready.put_nowait(_Delivery(source.refuse(error), is_last=True))
        except Exception as error:
            log.exception("a partition of a subscription failed with a defect")
            refusal = source.refuse(Internal(f"internal error: {type(error).__name__}: {error}"))
            self._ready.put_nowait(_Delivery(refusal, is_last=True))

    async def _read_on(self, source: Source, want: Want) -> None:
        want = replace(want, known_reason="")
        has_more, has_told = False, False
        while True:
            if has_more or self._reads.is_registered(want):
                response = await self._read(source, want)
            else:
                # The first time at the end is told at once, then only news and heartbeats.
                response = await self._await_more(source, want, self._heartbeat_ms if has_told else 0)
                has_told = True
            has_records = bool(response.batches or response.records)
            has_more = has_records and response.next_offset < response.high_watermark
            want = replace(want, offset=response.next_offset, known_reason=response.waiting_reason)

    async def _read(self, source: Source, want: Want) -> FetchResponse:
        """What is there, under the budget; nothing is said when it is nothing."""
        lent_bytes = await self._budget.take(want.bytes_max)
        try:
            fetched = await fetch(self._reads, replace(want, max_wait_ms=0, known_reason=None))
            response = source.respond(want, fetched)
        except BaseException:
            self._budget.give(lent_bytes)
            raise
        held_bytes = min(lent_bytes, fetched.size_bytes)
        self._budget.give(lent_bytes - held_bytes)
        if fetched.batches:
            self._ready.put_nowait(_Delivery(response, held_bytes))
        return response

    async def _await_more(self, source: Source, want: Want, wait_ms: int) -> FetchResponse:
        """What comes, or the word that nothing does; ends when the subscriber has taken it."""
        bytes_max = min(want.bytes_max, WAITING_BYTES_MAX)
        fetched = await fetch(self._reads, replace(want, bytes_max=bytes_max, max_wait_ms=wait_ms))
        response = source.respond(want, fetched)
        taken = asyncio.Event()
        self._ready.put_nowait(_Delivery(response, taken=taken))
        await taken.wait()
        return response
