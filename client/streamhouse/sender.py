"""Moves a producer's batches: from its lanes onto the leaders' streams, and again when that fails.

Owns: the lanes, retries with their waits, deadlines. Decisions about order and sequence numbers are
core.sequences'. Everything runs on one event loop, in callbacks that never leave a lane half-changed.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from shcluster.peers import Peers
from shformat import Codec
from shproto.acks import ACKS
from shproto.errors import (
    InvalidBatch,
    NotLeader,
    ShuttingDown,
    StreamHouseError,
    Unavailable,
    UnknownPartition,
    UnknownTopic,
)
from shproto.v1 import coordinator_pb2, ingest_pb2
from shruntime.tasks import Tasks

from streamhouse.batches import Batch
from streamhouse.core.given_up import refused, timed_out
from streamhouse.core.options import Compression, ProducerOptions
from streamhouse.core.sequences import Outgoing
from streamhouse.delivery import Delivery
from streamhouse.gatherer import Gatherer, LaneState, Stream
from streamhouse.leaders import Leaders, Sent
from streamhouse.metadata import MetadataCache

log = logging.getLogger(__name__)

CODECS: dict[Compression, Codec] = {"lz4": Codec.LZ4, "zstd": Codec.ZSTD, "gzip": Codec.GZIP, "none": Codec.NONE}

# Batches of a partition that go before they are full, unanswered at a time; more records gather in the next one, for up
# to GROW_MS_MAX. Without it a stream of 100,000 records/s and linger_ms=0 became 350 to 450 batches/s on two cores, as
# many as these can do, and each waited behind seven others: p99 from send to receive 50 ms, with it 31 ms. An answer
# to a durable batch takes seconds, whatever is sent meanwhile.
SMALL_IN_FLIGHT_MAX = 2

# After such a silence the leader may have forgotten an idle producer.
QUIET_MS = 60_000

# Said by an agent that does not lead the partition, is going away, or cannot be reached.
_ASK_WHO_LEADS = (NotLeader, ShuttingDown, Unavailable, UnknownTopic, UnknownPartition)


@dataclass(slots=True)
class SendCounts:
    """Counters since the sender was made; `streamhouse.metrics.ProducerMetrics` says of what."""

    batches_sent: int = 0
    batches_retried: int = 0
    records_sent: int = 0
    bytes_sent: int = 0
    records_acked: int = 0
    records_failed: int = 0


class Sender:
    """`done(batch)` is called once for every batch, after its delivery is resolved or failed."""

    def __init__(
        self, options: ProducerOptions, peers: Peers, metadata: MetadataCache, done: Callable[[Batch], None]
    ) -> None:
        self._options = options
        self._peers = peers
        self._metadata = metadata
        self._done = done
        self._codec = CODECS[options.compression]
        self._small_in_flight_max = options.max_in_flight if options.acks == "durable" else SMALL_IN_FLIGHT_MAX
        self.unfinished: set[Delivery] = set()
        self.counts = SendCounts()
        self.gatherer = Gatherer(options, self._on_opened, self._pump)
        self._tasks = Tasks()
        self._leaders = Leaders(options, peers, self._tasks, self._on_answer, self._on_broken)
        self._warned = False  # that the coordinator does not answer; once, until a leader does
        self._loop = asyncio.get_running_loop()

    def now_ms(self) -> float:
        return self._loop.time() * 1000

    @property
    def unfinished_records(self) -> int:
        """Number of records that are neither acknowledged nor failed."""
        # Copied in one step: `streamhouse.sync` asks from another thread.
        return sum(delivery.record_count for delivery in list(self.unfinished))

    @property
    def last_error(self) -> StreamHouseError | None:
        """The error of a try that nothing has succeeded since, of any partition."""
        return next((state.last_error for state in self.gatherer.lanes() if state.last_error is not None), None)

    def _on_opened(self, state: LaneState) -> None:
        gathering = state.gathering
        assert gathering is not None
        self.unfinished.add(gathering.delivery)
        self._watch_deadline(state, gathering.deadline_ms)

    # ---- sending

    def _pump(self, state: LaneState) -> None:
        """Sends what may be sent now; otherwise leaves the lane where somebody will pump it again."""
        lane = state.lane
        while not state.parked and lane.open_for_sending and (lane.ready or self._may_close(state)):
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

    def _may_close(self, state: LaneState) -> bool:
        """Returns True if the batch in the making may go now, though it is not full."""
        return state.due and state.gathering is not None and state.lane.in_flight_count < self._small_in_flight_max

    def _route(self, state: LaneState) -> Stream | None:
        """The leader's stream, if it has room and nothing of the lane is under way elsewhere."""
        topic = self._metadata.cached(state.topic)
        address = topic.leaders[state.partition] if topic and state.partition < topic.partitions else ""
        if not address:
            state.last_error = NotLeader(f"{state.topic}/{state.partition} has no leader at the moment")
            self._retry_after_refresh(state)
            return None
        leader = self._leaders.at(address)
        wait_ms = leader.wait_ms(self.now_ms())
        if wait_ms > 0:
            self._retry_later(state, wait_ms)
            return None
        stream = self._leaders.open_stream(leader)
        if state.stream is not stream:
            if state.lane.in_flight_count:
                return None  # pumped again with the last answer from the other stream
            state.stream = stream
            state.lane.doubt()
        if not stream.has_room:
            leader.wait_for_room(state)
            return None
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
            trace_context=batch.traceparent,
        )
        self._count_try(batch, outgoing.record_count, len(encoded))
        stream.submit((state, outgoing), request)

    def _count_try(self, batch: Batch, record_count: int, size_bytes: int) -> None:
        if batch.is_sent:
            self.counts.batches_retried += 1
            return
        batch.is_sent = True
        self.counts.batches_sent += 1
        self.counts.records_sent += record_count
        self.counts.bytes_sent += size_bytes

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

    def _on_answer(self, stream: Stream, token: Sent, response: ingest_pb2.ProduceResponse) -> None:
        state, outgoing = token
        leader = self._leaders.at(stream.address)
        leader.answered()
        self._warned = False
        if response.HasField("error"):
            self._failed_try(state, outgoing, StreamHouseError.from_detail(response.error))
        else:
            state.lane.acked(outgoing)
            state.backoff.reset()
            state.last_error = None
            if not outgoing.expired:
                outgoing.payload.delivery.resolve(response.base_offset)
                self._finish(outgoing.payload)
        leader.pump_waiting(self._pump)
        self._pump(state)

    def _on_broken(
        self,
        stream: Stream,
        sent: list[Sent],
        unsent: list[Sent],
        error: StreamHouseError,
    ) -> None:
        leader = self._leaders.at(stream.address)
        leader.broke(self.now_ms())
        if (sent or unsent) and not leader.warned:
            leader.warned = True
            log.warning("the stream to %s broke with %d batches unanswered: %s", stream.address, len(sent), error)
        if not error.retriable:
            error = Unavailable(f"{error.reason}: {error.message}")  # said of the stream, not of a batch
        for state, outgoing in sent:
            self._failed_try(state, outgoing, error)
        for state, outgoing in unsent:
            self._failed_try(state, outgoing, error, sent=False)
        leader.pump_waiting(self._pump)

    def _failed_try(
        self, state: LaneState, outgoing: Outgoing[Batch], error: StreamHouseError, sent: bool = True
    ) -> None:
        state.last_error = error
        kept = state.lane.answered(outgoing, error, sent)
        if not kept and not outgoing.expired:
            self._fail(outgoing.payload, refused(state.topic, state.partition, outgoing, error))
        if isinstance(error, _ASK_WHO_LEADS):
            self._retry_after_refresh(state)
        elif kept and not state.parked:
            self._retry_later(state, max(error.retry_after_ms, state.backoff.next_ms()))

    def _fail(self, batch: Batch, error: Exception) -> None:
        batch.delivery.fail(error)
        self._finish(batch)

    def _finish(self, batch: Batch) -> None:
        batch.end_spans()
        self.unfinished.discard(batch.delivery)
        if batch.delivery.error is None:
            self.counts.records_acked += batch.delivery.record_count
        else:
            self.counts.records_failed += batch.delivery.record_count
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

    def _watch_deadline(self, state: LaneState, deadline_ms: float) -> None:
        if state.expiry is None:
            state.expiry = self._loop.call_at(deadline_ms / 1000, self._deadline, state)

    def _deadline(self, state: LaneState) -> None:
        state.expiry = None
        self._expire(state, self.now_ms() + 1)  # timers may fire a clock tick early
        unfinished = [batch.deadline_ms for batch in state.lane.batches() if not batch.expired]
        if unfinished:
            self._watch_deadline(state, min(unfinished))
        elif state.gathering is not None:
            self._watch_deadline(state, state.gathering.deadline_ms)

    def _expire(self, state: LaneState, now_ms: float, why: StreamHouseError | None = None) -> None:
        """Fails what is past its deadline at `now_ms`, with `why` or with the last error of each."""
        gathering = state.gathering
        if gathering is not None and gathering.deadline_ms <= now_ms:
            self.gatherer.close(state)
        for outgoing in state.lane.expire(now_ms):
            last_error = outgoing.last_error or state.last_error
            self._fail(outgoing.payload, why or timed_out(self._options.delivery_timeout_ms, last_error))
        self._pump(state)

    async def close(self) -> None:
        """Stops everything; what is unfinished fails."""
        for state in self.gatherer.lanes():
            state.cancel_timers()
            state.parked = True
            self.gatherer.close(state)
            for outgoing in state.lane.expire(math.inf):
                self._fail(outgoing.payload, Unavailable("the producer was closed before the batch was acknowledged"))
        await self._tasks.stop()
