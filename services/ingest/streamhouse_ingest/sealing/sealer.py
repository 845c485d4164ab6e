"""Seals open buffers when they are due and announces them to the coordinator, in order, until it has answered.

Owns: the queue of sealed buffers, the announced buffers of the session, the time of the next plan. Does not own: the
buffers (partition_log.py), the plan (sealing.py).
Invariants: buffers are announced in the order in which they were sealed. A sealed buffer is identified by its slices
(log, base and end offset); which of them are registered is read from the logs.
"""

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from opentelemetry import trace
from shproto.errors import StreamHouseError
from shproto.keys import RangeKey
from shproto.limits import SNAPSHOTS_BYTES_MAX
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2 as pb
from shruntime.clock import Clock
from shruntime.tasks import Backoff, ends_within
from shruntime.telemetry import current_traceparent, links_to

from streamhouse_ingest.log.buffer import Buffer
from streamhouse_ingest.log.logs import LINKS_MAX, HeldLog, Logs
from streamhouse_ingest.log.session_id import CurrentSession
from streamhouse_ingest.metrics import IngestMetrics
from streamhouse_ingest.sealing.sealing import SealCandidate, SealLimits, limits_behind, plan_seals

log = logging.getLogger(__name__)
tracer = trace.get_tracer("streamhouse.ingest")

# Limit that, with SNAPSHOTS_BYTES_MAX, keeps an announcement well below the 64 MiB limit of a message.
_SLICES_MAX = 10_000


@dataclass(frozen=True, slots=True)
class SealedBuffer:
    """Slices that share an object, announced under `buffer_id`."""

    buffer_id: str
    slices: tuple[tuple[HeldLog, Buffer], ...]
    trace_context: str


class Sealer:
    """Seals and announces buffers, in two tasks: `run` and `announce`."""

    def __init__(
        self,
        logs: Logs,
        coordinator: CoordinatorApi,
        session: CurrentSession,
        clock: Clock,
        limits: SealLimits,
        backoff: Backoff,
        metrics: IngestMetrics,
    ) -> None:
        self._logs = logs
        self._coordinator = coordinator
        self._session = session
        self._clock = clock
        self._limits = limits
        self._backoff = backoff
        self._metrics = metrics
        self._wake = asyncio.Event()
        self._plan_ms: int | None = None
        self._queue: deque[SealedBuffer] = deque()
        self._queued = asyncio.Event()
        self._announced: dict[str, SealedBuffer] = {}

    # ---- when to plan

    def appended(self, held: HeldLog) -> None:
        """Schedules a plan after batches were applied: now if the buffer is full, otherwise at its deadline."""
        buffer = held.log.open
        if buffer is None:
            return
        limits = self._limits_now()
        if buffer.size_bytes >= limits.seal_bytes or self._logs.open_bytes > limits.open_bytes_max:
            self._plan_at(0)
        elif held.durable_since_ms is not None:
            self._plan_at(held.durable_since_ms + limits.durable_linger_ms)
        else:
            self._plan_at(buffer.first_append_ms + limits.seal_age_ms)

    def seal_now(self, helds: Iterable[HeldLog]) -> None:
        """Schedules the sealing of these logs regardless of size and age (leadership transfer, shutdown)."""
        for held in helds:
            if held.log.open is not None:
                held.must_seal = True
                self._plan_at(0)

    def _limits_now(self) -> SealLimits:
        """Returns the limits for the present backlog: buffers to be announced, and announced buffers not completed."""
        return limits_behind(self._limits, len(self._queue) + len(self._announced))

    def _plan_at(self, at_ms: int) -> None:
        if self._plan_ms is None or at_ms < self._plan_ms:
            self._plan_ms = at_ms
            self._wake.set()

    async def run(self) -> None:
        """Seals buffers when they are due, until cancelled."""
        while True:
            self._wake.clear()
            now_ms = self._clock.monotonic_ms()
            if self._plan_ms is not None and self._plan_ms <= now_ms:
                self._plan_ms = self._seal_due(now_ms)
            elif self._plan_ms is None:
                await self._wake.wait()
            else:
                await ends_within(self._clock, self._wake.wait(), self._plan_ms - now_ms)

    # ---- sealing

    def _seal_due(self, now_ms: int) -> int | None:
        plan = plan_seals([_candidate(held) for held in self._logs.dirty.values()], now_ms, self._limits_now())
        for keys in plan.objects:
            self._seal([self._logs.dirty[key] for key in keys])
        return plan.next_plan_ms

    def seal_alone(self, held: HeldLog) -> None:
        """Seals the open buffer of a log at once, into a separate object."""
        self._seal([held])

    def _seal(self, helds: Sequence[HeldLog]) -> None:
        parents = [parent for held in helds for parent in held.traceparents][-LINKS_MAX:]
        for held in helds:
            held.traceparents.clear()
        with tracer.start_as_current_span("ingest.seal", links=links_to(parents)):
            slices = [(held, buffer) for held in helds if (buffer := self._logs.seal(held)) is not None]
            self._enqueue(slices)

    def _enqueue(self, slices: Sequence[tuple[HeldLog, Buffer]]) -> None:
        for part in _within_a_message(slices):
            self._queue.append(SealedBuffer(str(uuid.uuid4()), tuple(part), current_traceparent()))
            self._queued.set()

    def restart(self) -> None:
        """Announces all unregistered buffers anew, because in a new session the coordinator does not know them."""
        self._queue.clear()
        self._announced.clear()
        for held in self._logs:
            # The session settled the ranges of before: their open buffers get no more batches.
            self._logs.seal(held)
            self._logs.take_snapshots(held)
        self.announce_again([(held, buffer) for held in self._logs for buffer in held.log.sealed])

    def completed(self, buffer_id: str) -> None:
        """Forgets a buffer that the coordinator has completed; announces slices anew that are not registered."""
        sealed = self._announced.pop(buffer_id, None)
        if sealed is not None:
            self._plan_at(0)  # with a smaller backlog, open buffers are due sooner
            again = self._still_sealed(sealed)
            if again:
                log.info("buffer %s: %d slices are not registered, announcing them anew", buffer_id, len(again))
            self.announce_again(again)

    def announce_again(self, slices: Sequence[tuple[HeldLog, Buffer]]) -> None:
        """Announces slices under new buffer ids, because their old buffer is gone or changed. Groups them into objects
        of at most object_bytes_max, as a seal does."""
        group: list[tuple[HeldLog, Buffer]] = []
        size_bytes = 0
        for held, buffer in slices:
            if group and size_bytes + buffer.size_bytes > self._limits.object_bytes_max:
                self._enqueue(group)
                group, size_bytes = [], 0
            group.append((held, buffer))
            size_bytes += buffer.size_bytes
        self._enqueue(group)

    # ---- announcing

    async def announce(self) -> None:
        """Announces sealed buffers in order, each until it succeeds; runs until cancelled."""
        while True:
            while not self._queue:
                self._queued.clear()
                await self._queued.wait()
            # Taken out only once announced: a failed announcement is repeated before any later one.
            sealed = self._queue[0]
            # `restart` may have replaced the queue during the call: the head is then another buffer, for the new
            # session.
            if await self._announce_one(sealed) and self._queue and self._queue[0] is sealed:
                self._queue.popleft()

    async def _announce_one(self, sealed: SealedBuffer) -> bool:
        """True if the buffer was announced, or nothing of it is left; False if it must be tried again, after the
        back-off, which has passed then."""
        # The token first, then the slices: the grants of a session that opens meanwhile may register some of them.
        token = await self._session.wait_open()
        request = self._request(token, sealed)
        if not request.slices:
            return True
        self._announced[sealed.buffer_id] = sealed  # before the call: its events may arrive before its answer
        try:
            await self._coordinator.announce_buffer(request)
        except StreamHouseError as error:
            log.warning("announcing buffer %s failed, trying again: %s", sealed.buffer_id, error.message)
            await self._clock.sleep_ms(self._backoff.next_ms())
            return False
        self._backoff.reset()
        self._metrics.sealed.add(1)
        return True

    def _request(self, token: str, sealed: SealedBuffer) -> pb.AnnounceBufferRequest:
        """Returns the request with the slices that are still sealed: an older announcement of the same records may have
        registered all or part of them."""
        return pb.AnnounceBufferRequest(
            session_token=token,
            buffer_id=sealed.buffer_id,
            slices=[_slice(held.log.key, held.log.topic, buffer) for held, buffer in self._still_sealed(sealed)],
            trace_context=sealed.trace_context,
        )

    def _still_sealed(self, sealed: SealedBuffer) -> list[tuple[HeldLog, Buffer]]:
        """Returns the sealed buffers that hold the remaining slices. Walks over each log only once, because a log may
        have thousands of buffers after a long outage of the object store."""
        left: list[tuple[HeldLog, Buffer]] = []
        for held, slices in groupby(sealed.slices, key=lambda item: item[0]):
            known = self._logs.get(held.log.key)
            if known is not None and known is held:
                left += [(known, buffer) for buffer in overlapping(known.log.sealed, [old for _, old in slices])]
        return left

    @property
    def sealed_bytes(self) -> int:
        """Size of all sealed buffers that are not registered yet."""
        return sum(buffer.size_bytes for held in self._logs for buffer in held.log.sealed)


def _candidate(held: HeldLog) -> SealCandidate:
    buffer = held.log.open
    assert buffer is not None, "dirty means that there is an open buffer"
    return SealCandidate(
        key=held.log.key,
        size_bytes=buffer.size_bytes,
        first_append_ms=buffer.first_append_ms,
        durable_since_ms=held.durable_since_ms,
        must=held.must_seal,
    )


def _within_a_message(slices: Sequence[tuple[HeldLog, Buffer]]) -> Iterator[list[tuple[HeldLog, Buffer]]]:
    """Yields the slices in runs that fit into an announcement: a request refused for its size would block the queue.

    A log with producers that fence has one slice in each: the coordinator keeps the state at the end of a log's last
    slice, and registration may stop, for good, at the end of any.
    """
    run: list[tuple[HeldLog, Buffer]] = []
    alone: set[HeldLog] = set()
    room_bytes = SNAPSHOTS_BYTES_MAX
    for held, buffer in slices:
        if run and (buffer.snapshot_bytes > room_bytes or len(run) == _SLICES_MAX or held in alone):
            yield run
            run, room_bytes = [], SNAPSHOTS_BYTES_MAX
            alone.clear()
        if held.log.has_fencing:
            alone.add(held)
        run.append((held, buffer))
        room_bytes -= buffer.snapshot_bytes
    if run:
        yield run


def overlapping(buffers: Iterable[Buffer], olds: Sequence[Buffer]) -> Iterator[Buffer]:
    """Yields the buffers that share offsets with any of `olds`. Both ascend and do not overlap within themselves."""
    at = 0
    for buffer in buffers:
        while at < len(olds) and olds[at].end_offset <= buffer.base_offset:
            at += 1
        if at == len(olds):
            return
        if olds[at].base_offset < buffer.end_offset:
            yield buffer


def _slice(key: RangeKey, topic: str, buffer: Buffer) -> pb.BufferSlice:
    return pb.BufferSlice(
        topic_id=key.topic_id,
        topic=topic,
        partition=key.partition,
        epoch=key.epoch,
        base_offset=buffer.base_offset,
        end_offset=buffer.end_offset,
        record_count=buffer.record_count,
        size_bytes=buffer.size_bytes,
        producer_snapshot=buffer.snapshot or b"",
    )
