"""A fetch: plan, read segments, then the tail, wait where nothing is there yet.

Owns: offset, records and deadline of a fetch. Does not own: index, segments, the agents' tails. Invariants: a fetch
ends with enough records, at the deadline, or when the plan says that no record can come. The loop never spins: every
turn reads records, moves the offset, or waits for a change or a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import trace
from shcluster.index import PartitionIndex
from shcluster.live_index import Watch
from shproto.errors import OffsetBeyondEnd, StreamHouseError, Unavailable, UnknownTopic
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.model import Segment
from shproto.v1 import ingest_pb2
from shruntime.tasks import Backoff
from shruntime.telemetry import links_to
from shstore import ObjectMissing

from shread.core.plan import (
    BelowStart,
    BeyondEnd,
    Lost,
    ReadSegment,
    ReadTail,
    SkipTo,
    Step,
    Wait,
    plan,
    went_back_reason,
)
from shread.core.refusals import damaged_tail, object_missing, refusal, with_next_offset
from shread.core.tail import accept_batches, is_of_later_epoch
from shread.counters import tracer
from shread.reads import Fetched, Reads, Want

# A fetch that has records already waits no longer than this for more from an agent.
TAIL_EXTRA_MS_MAX = 100
# A reader that asked for news learns of an agent that has failed for this long; a shorter failure may be a restart.
TELL_FAILURE_MS = 5_000
# Links to appends in an agent's answer.
LINKS_MAX = 32


async def fetch(reads: Reads, want: Want) -> Fetched:
    """Reads the records of `want`, and returns them with the next offset.

    Raises OffsetBelowStart, OffsetBeyondEnd, DataLoss, Unavailable, UnknownTopic (deleted meanwhile).
    """
    with tracer.start_as_current_span("query.fetch") as span:
        fetched = await _Fetch(reads, want).run()
        if span.is_recording():
            span.set_attributes(
                {
                    "messaging.destination.name": want.topic,
                    "messaging.destination.partition.id": str(want.partition.partition),
                    "messaging.streamhouse.offset": want.offset,
                    "messaging.streamhouse.size_bytes": fetched.size_bytes,
                }
            )
    return fetched


class _Fetch:
    """State of a fetch under way."""

    def __init__(self, reads: Reads, want: Want) -> None:
        self._reads = reads
        self._index = reads.index
        self._clock = reads.clock
        self._want = want
        self._offset = want.offset
        self._got = Fetched()
        now_ms = self._clock.monotonic_ms()
        self._deadline_ms = now_ms + want.max_wait_ms
        # Where records are known to exist and only the feed is behind, a reader waits for the feed even with
        # max_wait_ms 0: an empty answer would be wrong.
        self._catch_up_ms = max(self._deadline_ms, now_ms + reads.catch_up_ms)
        self._backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        self._knows_all = False  # whether the index is known to be no older than this fetch
        self._tell_ms = None if want.tell_after_ms is None else now_ms + int(want.tell_after_ms)
        self._held_up_by: Callable[[], str] = str
        self._failing_since_ms: int | None = None

    async def run(self) -> Fetched:
        with self._index.watch(self._want.partition) as watch:
            tell_after_ms = self._want.tell_after_ms
            try:
                async with asyncio.timeout(None if tell_after_ms is None else tell_after_ms / 1000) as guard:
                    await self._read(watch)
            except TimeoutError:
                if not guard.expired():
                    raise
                self._give_up(self._held_up_by())
        return self._finished(self._partition())

    async def _read(self, watch: Watch) -> None:
        """Reads until done. A timeout may end the read at any await, so no step awaits between changes of `_got` and
        `_offset`."""
        done = False
        while not done:
            # Armed before the index is looked at, or a change in between would wake no reader.
            watch.arm()
            partition = self._partition()
            done = await self._take(partition, self._plan(partition), watch)

    def _partition(self) -> PartitionIndex:
        return self._index.get(self._want.partition, self._want.topic)

    def _plan(self, partition: PartitionIndex) -> Step:
        return plan(self._index.cluster, partition, self._offset)

    def _finished(self, partition: PartitionIndex) -> Fetched:
        self._got.next_offset = self._offset
        self._got.high_watermark = self._reads.watermarks.of(partition)
        self._got.log_start_offset = partition.log_start_offset
        return self._got

    async def _take(self, partition: PartitionIndex, step: Step, watch: Watch) -> bool:
        """Carries out a step; returns True if the fetch is done."""
        if self._got.batches and (self._room <= 0 or self._decoded_room == 0):
            return True
        match step:
            case ReadSegment(segment):
                return await self._read_segment(partition, segment, watch)
            case ReadTail():
                return await self._read_tail(partition, step, watch)
            case SkipTo(offset):
                self._offset = offset
                return False
            case Wait(reason):
                return await self._wait(reason, watch)
            case _:
                return await self._refuse(partition, step, watch)

    async def _refuse(self, partition: PartitionIndex, step: BelowStart | BeyondEnd | Lost, watch: Watch) -> bool:
        if self._got.batches:
            return True  # the next fetch raises the error
        if isinstance(step, BeyondEnd) and not self._knows_all:
            # A consumer starts over after this error: never send it for a position that came from another index or
            # agent.
            self._held_up_by = lambda: f"{partition.name}: no coordinator says whether the index is behind"
            await self._reads.index_catch_up.catch_up(partition.topic)
            self._knows_all = True
            return False
        if isinstance(step, BeyondEnd) and self._index.cluster.missing_position:  # an agent's end, of what it knows
            return await self._wait(went_back_reason(self._index.cluster, partition.name, self._offset), watch)
        raise refusal(partition, self._offset, step)

    @property
    def _room(self) -> int:
        return self._want.bytes_max - self._got.size_bytes

    @property
    def _decoded_room(self) -> int | None:
        """Decoded bytes that may still be fetched; None: no limit."""
        limit = self._want.decoded_bytes_max
        return None if limit is None else max(0, limit - self._got.decoded_bytes)

    @property
    def _has_enough(self) -> bool:
        return bool(self._got.batches) and self._got.size_bytes >= self._want.bytes_min

    def _add(self, batches: list[bytes], size_bytes: int, decoded_bytes: int, next_offset: int) -> None:
        if not self._got.batches:
            self._got.found_ms = self._clock.monotonic_ms()
        self._got.batches += batches
        self._got.size_bytes += size_bytes
        self._got.decoded_bytes += decoded_bytes
        self._offset = next_offset
        self._backoff.reset()
        self._failing_since_ms = None

    # ---- waiting

    def _remaining_ms(self, until_ms: int) -> int:
        return max(0, until_ms - self._clock.monotonic_ms())

    async def _changed(self, watch: Watch, wait_ms: float) -> bool:
        """True if the index changed within `wait_ms`."""
        done, _ = await asyncio.wait((watch.changed,), timeout=wait_ms / 1000)
        return bool(done)

    async def _wait(self, reason: str, watch: Watch) -> bool:
        if self._has_enough or self._is_news(reason):
            return self._give_up(reason)
        self._held_up_by = lambda: reason
        if await self._changed(watch, self._remaining_ms(self._deadline_ms)):
            return False
        return self._give_up(reason)

    def _is_news(self, reason: str) -> bool:
        known = self._want.known_reason
        return known is not None and reason != known and not self._got.batches

    def _give_up(self, reason: str) -> bool:
        """Ends the fetch with the records so far; the reason is for a reader without any. Returns True."""
        if reason and not self._got.batches:
            self._got.waiting_reason = reason
            self._reads.counters.unsettled_waits += 1
        return True

    async def _again_soon(self, reason: str, watch: Watch, until_ms: int) -> bool:
        """Waits a little, for a change of the index or for time to pass, before the same step is tried again."""
        remaining_ms = self._remaining_ms(until_ms)
        if self._got.batches or remaining_ms == 0:
            return self._give_up(reason)
        self._held_up_by = lambda: reason
        changed = await self._changed(watch, min(self._backoff.next_ms(), remaining_ms))
        if not changed and self._remaining_ms(until_ms) == 0:
            return self._give_up(reason)  # another try may take longer than the caller waits
        return False

    # ---- registered records

    async def _read_segment(self, partition: PartitionIndex, segment: Segment, watch: Watch) -> bool:
        nothing_yet = not self._got.batches
        self._held_up_by = lambda: self._store_holds_up(partition)
        try:
            run = await self._reads.segments.read_from(
                partition, segment, self._offset, self._room, self._decoded_room, at_least_one=nothing_yet
            )
        except ObjectMissing as error:
            return await self._missing(partition, segment, error)
        except Unavailable as error:  # waited for like any other failure that may pass
            return await self._again_soon(str(error), watch, self._tell_ms or self._deadline_ms)
        except StreamHouseError:
            if nothing_yet:
                raise
            return True  # the next fetch raises the error
        if run.base_offset < self._offset and not nothing_yet:
            return True  # compaction changed the boundaries in between; only a first batch may begin before its offset
        if run.blocks:
            self._reads.ahead(partition.key, segment, self._offset, run.next_offset, run.next_at)
            _link(self._index.traces_of(segment.segment_id))
        self._add(run.blocks, run.size_bytes, run.decoded_bytes, run.next_offset)
        return run.next_offset < segment.end_offset

    def _store_holds_up(self, partition: PartitionIndex) -> str:
        silent = f"it has not answered within {self._want.tell_after_ms:.0f} ms"
        return (
            f"{partition.name}: records from offset {self._offset} on are in the object store, and cannot be read now: "
            f"{self._reads.store_trouble() or silent}"
        )

    async def _missing(self, partition: PartitionIndex, segment: Segment, error: ObjectMissing) -> bool:
        """Returns True if the read ends with the records before the missing object, False if the index no longer has
        the segment. Raises DataLoss if an index that is not behind still has the segment: compaction and retention
        delete objects, and their event may come late, or not at all while this process is cut off from the
        coordinators."""
        if self._got.batches:
            return True
        if self._plan(self._partition()) == ReadSegment(segment):
            self._held_up_by = lambda: f"{partition.name}: {error}, and no coordinator says whether the index is behind"
            await self._reads.index_catch_up.catch_up(partition.topic)
        if self._plan(self._partition()) == ReadSegment(segment):
            self._reads.counters.damaged_spans += 1
            raise object_missing(partition, segment) from error
        return False

    # ---- records that only the agent has

    async def _read_tail(self, partition: PartitionIndex, step: ReadTail, watch: Watch) -> bool:
        self._held_up_by = lambda: step.reason or _silent(partition, step)
        waits = not self._has_enough and not self._is_news(step.reason) and self._remaining_ms(self._deadline_ms) > 0
        # Readers at the end share a single call to the agent; a reader further back asks for its own records.
        if waits and not self._knows_more(partition, step):
            return await self._poll_tail(partition, step, watch)
        request = ingest_pb2.ReadTailRequest(
            topic_id=partition.topic_id,
            partition=partition.partition,
            offset=self._offset,
            max_bytes=self._room,
        )
        self._reads.counters.tail_reads += 1
        asked_ms = self._clock.monotonic_ms()
        try:
            response = await self._ask(step, request, watch)
        except StreamHouseError as error:
            return await self._tail_failed(partition, step, error, watch, asked_ms)
        if response is None:
            return self._has_enough
        return await self._take_tail(partition, step, response, watch)

    def _knows_more(self, partition: PartitionIndex, step: ReadTail) -> bool:
        """True if the agent is known to have records at the offset, so that there is nothing to wait for."""
        newest = step.newest and step.end_offset is None
        return newest and self._reads.watermarks.of(partition) > self._offset

    async def _poll_tail(self, partition: PartitionIndex, step: ReadTail, watch: Watch) -> bool:
        """Waits at the end together with all other readers there; returns True if the fetch is done."""
        polls, place = self._reads.polls, (step.agent_id, step.address, partition.key, self._offset)
        joined_ms = self._clock.monotonic_ms()
        with polls.join(*place) as news:
            while not news.done():
                remaining_ms = self._remaining_ms(self._deadline_ms)
                if remaining_ms == 0:
                    return self._give_up(step.reason if polls.is_answered(*place) else _silent(partition, step))
                await asyncio.wait(
                    (news, watch.changed), timeout=remaining_ms / 1000, return_when=asyncio.FIRST_COMPLETED
                )
                if watch.changed.done() and not news.done():
                    watch.arm()
                    if self._plan(self._partition()) != step:
                        return False
        answer = news.result()
        if isinstance(answer, StreamHouseError):
            return await self._tail_failed(partition, step, answer, watch, joined_ms)
        return await self._take_tail(partition, step, answer, watch)

    async def _ask(
        self, step: ReadTail, request: ingest_pb2.ReadTailRequest, watch: Watch
    ) -> ingest_pb2.ReadTailResponse | None:
        """Returns the agent's answer, or None if the answer became useless: the index changed so that another step is
        due, or there are records enough."""
        asked = asyncio.ensure_future(self._reads.read_tail(step, request))
        timeout_s = TAIL_EXTRA_MS_MAX / 1000 if self._has_enough else None
        try:
            while True:
                done, _ = await asyncio.wait(
                    (asked, watch.changed), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
                if asked in done:
                    return asked.result()
                watch.arm()
                if not done or self._plan(self._partition()) != step:
                    return None
        finally:
            await _ended(asked)

    async def _tail_failed(
        self, partition: PartitionIndex, step: ReadTail, error: StreamHouseError, watch: Watch, since_ms: int
    ) -> bool:
        """Handles a failed call to the agent, which began at `since_ms`. Returns True if the fetch is done."""
        self._reads.counters.tail_errors += 1
        if isinstance(
            error, OffsetBeyondEnd | UnknownTopic
        ):  # of the agent, whose knowledge may be behind, as may the index
            response = ingest_pb2.ReadTailResponse(
                not_held=isinstance(error, UnknownTopic), high_watermark=int(error.details.get("high_watermark", 0))
            )
            return await self._take_tail(partition, step, response, watch)
        if not error.retriable and not self._got.batches:
            raise with_next_offset(error, partition)
        reason = f"{_silent(partition, step)}: {error}"
        if self._failing_since_ms is None:
            self._failing_since_ms = since_ms
        if self._is_news(reason) and self._clock.monotonic_ms() - self._failing_since_ms >= TELL_FAILURE_MS:
            return self._give_up(reason)
        return await self._again_soon(reason, watch, self._deadline_ms)

    async def _take_tail(
        self, partition: PartitionIndex, step: ReadTail, response: ingest_pb2.ReadTailResponse, watch: Watch
    ) -> bool:
        if response.not_held and step.newest and step.end_offset is None and not self._got.batches:
            response = await self._ask_for_end(partition, step) or response
        if response.not_held or response.tail_start_offset > self._offset:
            reason = (
                f"{partition.name}: agent {step.agent_id} has no records of epoch {step.epoch} at offset "
                f"{self._offset} in its log (any more); waiting for the event feed to say where they are"
            )
            return await self._again_soon(reason, watch, self._catch_up_ms)
        if is_of_later_epoch(response.batches, step.epoch):
            reason = f"{partition.name}: epoch {step.epoch} is over; waiting for the event feed to say where it ended"
            return await self._again_soon(reason, watch, self._catch_up_ms)
        if step.newest and step.end_offset is None:
            self._reads.watermarks.learn(partition.key, step.epoch, response.high_watermark)
        _link(response.trace_contexts)
        accepted = accept_batches(
            response.batches,
            self._offset,
            step.epoch,
            step.end_offset,
            bytes_max=self._room,
            decoded_bytes_max=self._decoded_room,
        )
        if isinstance(accepted, str):
            raise damaged_tail(partition, step, self._offset, accepted)
        if accepted.batches:
            self._reads.counters.tail_bytes += accepted.size_bytes
            self._add(accepted.batches, accepted.size_bytes, accepted.decoded_bytes, accepted.next_offset)
            return self._has_enough
        return await self._nothing_in_tail(partition, step, response.high_watermark, watch)

    async def _ask_for_end(self, partition: PartitionIndex, step: ReadTail) -> ingest_pb2.ReadTailResponse | None:
        """Returns the agent's answer at its end, without records, or None.

        Agents answer not_held for an offset beyond their end, too.
        """
        request = ingest_pb2.ReadTailRequest(
            topic_id=partition.topic_id,
            partition=partition.partition,
            offset=partition.ranges[-1].registered_end,
            max_bytes=1,
        )
        try:
            response = await self._reads.read_tail(step, request)
        except StreamHouseError:
            return None
        if response.not_held or response.high_watermark >= self._offset:
            return None
        return ingest_pb2.ReadTailResponse(high_watermark=response.high_watermark)

    async def _nothing_in_tail(
        self, partition: PartitionIndex, step: ReadTail, high_watermark: int, watch: Watch
    ) -> bool:
        if self._has_enough:
            return True
        if high_watermark < self._offset and step.newest and step.end_offset is None:
            return await self._refuse(partition, BeyondEnd(high_watermark), watch)
        if high_watermark > self._offset:
            reason = f"{partition.name}: agent {step.agent_id} has records at offset {self._offset} but sent none"
            return await self._again_soon(reason, watch, self._catch_up_ms)
        if self._is_news(step.reason):
            return self._give_up(step.reason)
        return await self._again_soon(step.reason, watch, self._deadline_ms)


def _link(traceparents: Sequence[str]) -> None:
    """Links the span of a fetch to the spans that wrote the records: appends of the tail, registrations."""
    span = trace.get_current_span()
    if traceparents and span.is_recording():
        for link in links_to(traceparents[:LINKS_MAX]):
            span.add_link(link.context)


def _silent(partition: PartitionIndex, step: ReadTail) -> str:
    return f"{partition.name}: agent {step.agent_id} at {step.address} does not answer"


async def _ended(call: asyncio.Future[Any]) -> None:
    """Cancels a call that is still under way, and waits for the end."""
    if not call.done():
        call.cancel()
        await asyncio.wait((call,))
    if not call.cancelled():
        call.exception()  # retrieved here; the owner of the call has seen it
