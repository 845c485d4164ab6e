"""Moves a producer's batches: from its lanes onto the leaders' streams, and again when that fails.

Owns: the lanes, the streams, retries with their waits, deadlines. Decisions about order and sequence numbers are
core.sequences'. Everything runs on one event loop, in callbacks that never leave a lane half-changed.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shformat import Codec
from shproto.errors import (
    InvalidBatch,
    NotLeader,
    OutcomeUnknown,
    ShuttingDown,
    StreamHouseError,
    Unavailable,
    UnknownPartition,
    UnknownTopic,
)
from shproto.v1 import coordinator_pb2, ingest_pb2
from shruntime.tasks import Backoff, Tasks

from streamhouse.batches import Batch
from streamhouse.core.options import ACKS, ProducerOptions
from streamhouse.core.sequences import Outgoing, in_doubt
from streamhouse.delivery import Delivery
from streamhouse.gatherer import Gatherer, LaneState, Stream, new_backoff
from streamhouse.leader_stream import LeaderStream
from streamhouse.metadata import MetadataCache
from streamhouse.peers import Peers

log = logging.getLogger(__name__)

# After such a silence the leader may have forgotten an idle producer.
QUIET_MS = 60_000
# The leader answers within request_timeout_ms; the answer needs time to travel and wait for those before it.
ANSWER_GRACE_MS = 5_000

# Said by an agent that does not lead the partition, is going away, or cannot be reached.
_ASK_WHO_LEADS = (NotLeader, ShuttingDown, Unavailable, UnknownTopic, UnknownPartition)


@dataclass(slots=True, eq=False)
class Leader:
    """One address: its stream, who waits for room on it, and when it may be tried again."""

    backoff: Backoff
    stream: Stream | None = None
    waiting: deque[LaneState] = field(default_factory=deque)
    retry_at_ms: float = -math.inf
    warned: bool = False  # that it cannot be reached; once, until it answers again


class Sender:
    """`done(batch)` is called once for every batch, after its delivery is resolved or failed."""

    def __init__(
        self, options: ProducerOptions, peers: Peers, metadata: MetadataCache, done: Callable[[Batch], None]
    ) -> None:
        self._options = options
        self._peers = peers
        self._metadata = metadata
        self._done = done
        self._codec = Codec.LZ4 if options.compression == "lz4" else Codec.NONE
        self.unfinished: set[Delivery] = set()
        self.gatherer = Gatherer(options, self._on_opened, self._pump)
        self._leaders: dict[str, Leader] = {}
        self._warned = False  # that the coordinator does not answer; once, until a leader does
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()

    def now_ms(self) -> float:
        return self._loop.time() * 1000

    def _on_opened(self, state: LaneState) -> None:
        gathering = state.gathering
        assert gathering is not None
        self.unfinished.add(gathering.delivery)
        self._watch_deadline(state, gathering.opened_ms)

    # ---- sending

    def _pump(self, state: LaneState) -> None:
        """Sends what may be sent now; otherwise leaves the lane where somebody will pump it again."""
        lane = state.lane
        while not state.parked and lane.open_for_sending and (lane.ready or (state.due and state.gathering)):
            stream = self._route(state)
            if stream is None:
                return
            if not lane.ready:
                self.gatherer.close(state)
            if lane.needs_identity:
                state.parked = True
                self._tasks.spawn("init producer", self._identify(state))
                return
            self._submit(state, stream)

    def _route(self, state: LaneState) -> Stream | None:
        """The leader's stream, if it has room and nothing of the lane is under way elsewhere."""
        topic = self._metadata.cached(state.topic)
        address = topic.leaders[state.partition] if topic and state.partition < topic.partitions else ""
        if not address:
            state.last_error = NotLeader(f"{state.topic}/{state.partition} has no leader at the moment")
            self._retry_after_refresh(state)
            return None
        leader = self._leaders.get(address)
        if leader is None:
            leader = self._leaders[address] = Leader(new_backoff(self._options))
        wait_ms = leader.retry_at_ms - self.now_ms()
        if leader.stream is None and wait_ms > 0:
            self._retry_later(state, wait_ms)
            return None
        stream = leader.stream or self._open_stream(address, leader)
        if state.stream is not stream:
            if state.lane.in_flight_count:
                return None  # pumped again with the last answer from the other stream
            state.stream = stream
            state.lane.doubt()
        if not stream.has_room:
            if not state.queued:
                state.queued = True
                leader.waiting.append(state)
            return None
        return stream

    def _open_stream(self, address: str, leader: Leader) -> Stream:
        stream: Stream = LeaderStream(
            address,
            self._peers.ingest(address),
            self._peers.connect,
            self._options.max_in_flight,
            self._options.request_timeout_ms + ANSWER_GRACE_MS,
            self._on_answer,
            self._on_broken,
        )
        leader.stream = stream
        self._tasks.spawn(f"produce to {address}", stream.run())
        return stream

    def _submit(self, state: LaneState, stream: Stream) -> None:
        now_ms = self.now_ms()
        if now_ms - state.last_sent_ms > QUIET_MS and state.lane.in_flight_count == 0:
            state.lane.doubt()
        state.last_sent_ms = now_ms
        outgoing = state.lane.take()
        batch = outgoing.payload
        try:
            encoded = batch.encode(outgoing.stamp, self._codec)
        except InvalidBatch as error:
            self._failed_try(state, outgoing, error)
            return
        known = self._metadata.cached(state.topic)
        request = ingest_pb2.ProduceRequest(
            topic=state.topic,
            topic_id=known.topic_id if known else b"",
            partition=state.partition,
            acks=ACKS[self._options.acks],
            batch=encoded,
            timeout_ms=self._options.request_timeout_ms,
            trace_context=batch.start_span(outgoing.record_count, self._options.acks, self._options.client_id),
        )
        stream.submit((state, outgoing), request)

    async def _identify(self, state: LaneState) -> None:
        """A producer id of its own for the lane, so that starting over concerns no other partition."""
        try:
            response = await self._peers.coordinator.init_producer(coordinator_pb2.InitProducerRequest())
        except StreamHouseError as error:
            state.last_error = error
            self._retry_later(state, state.backoff.next_ms())
            return
        state.lane.identify(response.producer_id, response.producer_epoch)
        self._unpark(state)

    # ---- answers

    def _on_answer(
        self, stream: Stream, token: tuple[LaneState, Outgoing[Batch]], response: ingest_pb2.ProduceResponse
    ) -> None:
        state, outgoing = token
        leader = self._leaders[stream.address]
        leader.backoff.reset()
        leader.warned = self._warned = False
        if response.HasField("error"):
            self._failed_try(state, outgoing, StreamHouseError.from_detail(response.error))
        else:
            state.lane.acked(outgoing)
            state.backoff.reset()
            state.last_error = None
            if not outgoing.expired:
                outgoing.payload.delivery.resolve(response.base_offset)
                self._finish(outgoing.payload)
        self._pump_waiting(leader)
        self._pump(state)

    def _pump_waiting(self, leader: Leader) -> None:
        """Those that found no room go first, each in its turn."""
        for _ in range(len(leader.waiting)):
            if leader.stream is not None and not leader.stream.has_room:
                return
            state = leader.waiting.popleft()
            state.queued = False
            self._pump(state)

    def _on_broken(
        self,
        stream: Stream,
        sent: list[tuple[LaneState, Outgoing[Batch]]],
        unsent: list[tuple[LaneState, Outgoing[Batch]]],
        error: StreamHouseError,
    ) -> None:
        leader = self._leaders[stream.address]
        leader.stream = None
        leader.retry_at_ms = self.now_ms() + leader.backoff.next_ms()
        if (sent or unsent) and not leader.warned:
            leader.warned = True
            log.warning("the stream to %s broke with %d batches unanswered: %s", stream.address, len(sent), error)
        if not error.retriable:
            error = Unavailable(f"{error.reason}: {error.message}")  # said of the stream, not of a batch
        for state, outgoing in sent:
            self._failed_try(state, outgoing, error)
        for state, outgoing in unsent:
            self._failed_try(state, outgoing, error, sent=False)
        self._pump_waiting(leader)

    def _failed_try(
        self, state: LaneState, outgoing: Outgoing[Batch], error: StreamHouseError, sent: bool = True
    ) -> None:
        state.last_error = error
        kept = state.lane.answered(outgoing, error, sent)
        if not kept and not outgoing.expired:
            self._fail(
                outgoing.payload, _unknown_outcome(state, outgoing, error) if in_doubt(outgoing, error) else error
            )
        if isinstance(error, _ASK_WHO_LEADS):
            self._retry_after_refresh(state)
        elif kept and not state.parked:
            self._retry_later(state, max(error.retry_after_ms, state.backoff.next_ms()))

    def _fail(self, batch: Batch, error: Exception) -> None:
        batch.delivery.fail(error)
        self._finish(batch)

    def _finish(self, batch: Batch) -> None:
        batch.end_span(batch.delivery.error)
        self.unfinished.discard(batch.delivery)
        self._done(batch)

    # ---- waiting and trying again

    def _retry_later(self, state: LaneState, wait_ms: float) -> None:
        state.parked = True
        if state.retry is not None:
            state.retry.cancel()
        state.retry = self._loop.call_later(wait_ms / 1000, self._unpark, state)

    def _unpark(self, state: LaneState) -> None:
        state.parked = False
        state.retry = None
        self._pump(state)

    def _retry_after_refresh(self, state: LaneState) -> None:
        if state.parked:
            return
        state.parked = True
        self._tasks.spawn("find leader", self._refresh(state, self.now_ms()))

    async def _refresh(self, state: LaneState, since_ms: float) -> None:
        await asyncio.sleep(state.backoff.next_ms() / 1000)
        try:
            await self._metadata.refresh(state.topic, since_ms)
            topic = await self._metadata.topic(state.topic)
            if state.partition >= topic.partitions:
                raise UnknownPartition(f"{state.topic} has {topic.partitions} partitions now, no {state.partition}")
        except (UnknownTopic, UnknownPartition) as error:
            self._expire(state, math.inf, error)
        except StreamHouseError as error:
            state.last_error = error
            if not self._warned:
                self._warned = True
                log.warning("the coordinator does not say who leads %s/%d: %s", state.topic, state.partition, error)
        self._unpark(state)

    # ---- deadlines

    def _watch_deadline(self, state: LaneState, opened_ms: float) -> None:
        if state.expiry is None:
            due_s = (opened_ms + self._options.delivery_timeout_ms) / 1000
            state.expiry = self._loop.call_at(due_s, self._deadline, state)

    def _deadline(self, state: LaneState) -> None:
        state.expiry = None
        self._expire(state, self.now_ms() + 1)  # timers may fire a clock tick early
        unfinished = [batch.deadline_ms for batch in state.lane.batches() if not batch.expired]
        if unfinished:
            self._watch_deadline(state, min(unfinished) - self._options.delivery_timeout_ms)
        elif state.gathering is not None:
            self._watch_deadline(state, state.gathering.opened_ms)

    def _expire(self, state: LaneState, now_ms: float, why: StreamHouseError | None = None) -> None:
        """Fails what is past its deadline at `now_ms`, with `why` or with the last error of each."""
        gathering = state.gathering
        if gathering is not None and gathering.opened_ms + self._options.delivery_timeout_ms <= now_ms:
            self.gatherer.close(state)
        for outgoing in state.lane.expire(now_ms):
            self._fail(outgoing.payload, why or self._gave_up(outgoing.last_error or state.last_error))
        self._pump(state)

    def _gave_up(self, error: StreamHouseError | None) -> StreamHouseError:
        waited = f"not acknowledged within delivery_timeout_ms = {self._options.delivery_timeout_ms}"
        if error is None:
            return Unavailable(f"{waited}; no answer from the leader", limit="delivery_timeout_ms")
        last = type(error)(f"{waited}; last error: {error.message}")
        last.details = dict(error.details)
        return last

    async def close(self) -> None:
        """Stops everything; what is unfinished fails."""
        for state in self.gatherer.lanes():
            state.cancel_timers()
            state.parked = True
            self.gatherer.close(state)
            for outgoing in state.lane.expire(math.inf):
                self._fail(outgoing.payload, Unavailable("the producer was closed before the batch was acknowledged"))
        await self._tasks.stop()


def _unknown_outcome(state: LaneState, outgoing: Outgoing[Batch], error: StreamHouseError) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"{state.topic}/{state.partition}: {outgoing.record_count} records may or may not have been written. An "
        "earlier try got no answer, and the leader that was asked again does not have this producer's history: another "
        "agent took over, or the metadata was restored. Sent once more they could be there twice, so they are given "
        f"up. Read the partition once it is settled (the leader's answer was {error.reason}: {error.message})",
        topic=state.topic,
        partition=state.partition,
        record_count=outgoing.record_count,
        refusal=error.reason,
    )
