"""Sends a producer's batches: from the partitions' queues to their leaders, and again when that fails.

Owns: the tasks that send, retry and find leaders, one timer per partition, the streams to leaders, batches without an
outcome and failures that the application has not seen. Does not own: order and sequence numbers of a partition
(core/partition_queue.py), the records of a batch.
Invariants: everything runs on one event loop, in callbacks that never leave a queue half-changed. A batch gets one
outcome, and gives its bytes back to the buffer once. A timer of a queue never fires after the queue's next_wake_ms.
"""

import asyncio
import logging
import math
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
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.v1 import coordinator_pb2, ingest_pb2
from shruntime.tasks import Backoff, Tasks

from streamhouse.accumulator import RecordAccumulator
from streamhouse.core.buffer_pool import BufferPool
from streamhouse.core.options import Compression, ProducerOptions
from streamhouse.core.partition_queue import Blocked, PartitionQueue
from streamhouse.core.producer_batch import ProducerBatch, timed_out
from streamhouse.leader_connection import LeaderConnection, Sent
from streamhouse.metadata import MetadataCache

log = logging.getLogger(__name__)

CODECS: dict[Compression, Codec] = {"lz4": Codec.LZ4, "zstd": Codec.ZSTD, "gzip": Codec.GZIP, "none": Codec.NONE}

# The leader answers within request_timeout_ms; the answer needs time to travel and wait for those before it.
ANSWER_GRACE_MS = 5_000

# Failed batches that the application has not asked about are remembered for the next flush, a few hundred bytes each.
UNSEEN_FAILURES_MAX = 1_000
# Resolution of the event loop's timers: they may fire so much early, and no wait is worth less.
CLOCK_TICK_MS = 1

# Errors after which the coordinator is asked who leads: the agent does not lead the partition, is going away, or cannot
# be reached.
_STALE_METADATA = (NotLeader, ShuttingDown, Unavailable, UnknownTopic, UnknownPartition)


@dataclass(slots=True, kw_only=True)
class SendCounts:
    """Counters since the sender was made, under the names of `streamhouse.metrics.ProducerMetrics`."""

    batches_sent: int = 0
    batches_retried: int = 0
    records_sent: int = 0
    bytes_sent: int = 0
    records_acked: int = 0
    records_failed: int = 0


class Sender:
    """Belongs to the event loop of its accumulator. `pool`: the buffer from which the records took their bytes."""

    def __init__(
        self,
        options: ProducerOptions,
        peers: Peers,
        metadata: MetadataCache,
        accumulator: RecordAccumulator,
        pool: BufferPool[asyncio.Future[None]],
    ) -> None:
        self._options = options
        self._peers = peers
        self._metadata = metadata
        self._accumulator = accumulator
        self._pool = pool
        self._loop = accumulator.loop
        self._codec = CODECS[options.compression]
        self.unfinished: set[ProducerBatch] = set()
        self.failures: list[ProducerBatch] = []  # since the last flush; some may have been seen meanwhile
        self.counts = SendCounts()
        self._tasks = Tasks()
        self._timers: dict[PartitionQueue, asyncio.TimerHandle] = {}
        self._backoffs: dict[PartitionQueue, Backoff] = {}
        self._connections: dict[str, LeaderConnection] = {}
        self._warned = False  # that the coordinator does not answer; once, until a leader does

    def _now_ms(self) -> float:
        return self._loop.time() * 1000

    @property
    def unfinished_records(self) -> int:
        """Number of records that are neither acknowledged nor failed."""
        # Copied in one step: `streamhouse.sync` asks from another thread.
        return sum(batch.record_count for batch in list(self.unfinished))

    @property
    def last_error(self) -> StreamHouseError | None:
        """Error of a failed try of any partition in which no try has succeeded since; None without such a partition."""
        queues = self._accumulator.queues()
        return next((queue.last_error for queue in queues if queue.last_error is not None), None)

    # ---- sending

    def opened(self, queue: PartitionQueue) -> None:
        """Takes note of a queue's new open batch, and sends the full batch before."""
        assert queue.open_batch is not None, "a batch was opened"
        self.unfinished.add(queue.open_batch)
        self._wake_at(queue, queue.next_wake_ms())
        self.send_ready(queue)

    def flush(self) -> None:
        """Sends the records collected so far without further lingering."""
        for queue in self._accumulator.queues():
            if queue.open_batch is not None:
                queue.flush()
                self.send_ready(queue)

    def send_ready(self, queue: PartitionQueue) -> None:
        """Sends the queue's batches that may be sent now. The timer, the task or the answer that the next batch waits
        for calls this again."""
        while queue.has_next:
            connection = self._route(queue)
            if connection is None:
                return
            if not queue.is_ready:
                queue.close_open()
            if queue.needs_producer_id:
                queue.block(Blocked.PRODUCER_ID)
                self._tasks.spawn("init producer", self._identify(queue))
                return
            self._submit(queue, connection)

    def _route(self, queue: PartitionQueue) -> LeaderConnection | None:
        """Returns the open connection to the partition's leader if the stream has room and no other stream has batches
        of the queue; otherwise None, and `send_ready` will be called again."""
        topic = self._metadata.cached(queue.topic)
        address = topic.leaders[queue.partition] if topic and queue.partition < topic.partitions else ""
        if not address:
            queue.last_error = NotLeader(f"{queue.topic}/{queue.partition} has no leader at the moment")
            self._retry_after_refresh(queue)
            return None
        connection = self._connection(address)
        wait_ms = connection.wait_ms(self._now_ms())
        if wait_ms > 0:
            self._retry_later(queue, wait_ms)
            return None
        if not connection.is_open:
            self._tasks.spawn(f"produce to {address}", connection.open())
        if not queue.switch_to(connection.stream):
            return None  # the last answer on the other stream comes back here
        if not connection.has_room:
            queue.block(Blocked.STREAM_FULL)
            connection.wait_for_room(queue)
            return None
        return connection

    def _connection(self, address: str) -> LeaderConnection:
        connection = self._connections.get(address)
        if connection is None:
            connection = self._connections[address] = LeaderConnection(
                address,
                self._peers,
                self,
                self._new_backoff(),
                self._options.max_in_flight,
                self._options.request_timeout_ms + ANSWER_GRACE_MS,
            )
        return connection

    def _submit(self, queue: PartitionQueue, connection: LeaderConnection) -> None:
        queue.unblock()
        batch = queue.take(self._now_ms())
        try:
            encoded = batch.encode(self._codec)
        except InvalidBatch as error:
            self._failed_try(queue, batch, error)
            return
        # With the topic's id: a topic created again under the name must refuse records that were meant for the old one.
        known = self._metadata.cached(queue.topic)
        request = ingest_pb2.ProduceRequest(
            topic=queue.topic,
            topic_id=known.topic_id if known else b"",
            partition=queue.partition,
            acks=ACKS[self._options.acks],
            batch=encoded,
            timeout_ms=self._options.request_timeout_ms,
            trace_context=batch.traceparent,
        )
        self._count_try(batch, len(encoded))
        connection.submit((queue, batch), request)

    def _count_try(self, batch: ProducerBatch, size_bytes: int) -> None:
        if batch.is_sent:
            self.counts.batches_retried += 1
            return
        batch.is_sent = True
        self.counts.batches_sent += 1
        self.counts.records_sent += batch.record_count
        self.counts.bytes_sent += size_bytes

    async def _identify(self, queue: PartitionQueue) -> None:
        """Gets a producer id for the queue alone, so that starting over concerns no other partition."""
        try:
            response = await self._peers.coordinator.init_producer(coordinator_pb2.InitProducerRequest())
        except StreamHouseError as error:
            queue.last_error = error
            self._retry_later(queue, self._backoff(queue).next_ms())
            return
        queue.identify(response.producer_id, response.producer_epoch)
        queue.unblock()
        self.send_ready(queue)

    # ---- answers

    def answered(self, connection: LeaderConnection, sent: Sent, response: ingest_pb2.ProduceResponse) -> None:
        """Handles a leader's answer: the batch's outcome or its next try, then sends the batches that have room now."""
        queue, batch = sent
        self._warned = False
        if response.HasField("error"):
            self._failed_try(queue, batch, StreamHouseError.from_detail(response.error))
        else:
            queue.acked(batch)
            queue.last_error = None
            # An acknowledgement ends the series of failures: the next wait is short again.
            self._backoffs.pop(queue, None)
            # Past its deadline the batch has failed already, and its application knows: a late answer changes nothing.
            if not batch.is_decided:
                batch.resolve(response.base_offset)
                self._finish(batch)
        self._send_waiting(connection)
        self.send_ready(queue)

    def broken(
        self, connection: LeaderConnection, sent: list[Sent], unsent: list[Sent], error: StreamHouseError
    ) -> None:
        """Handles the end of a stream: its unanswered batches are tried again, or fail."""
        if (sent or unsent) and not connection.warned:
            connection.warned = True
            log.warning("the stream to %s broke with %d batches unanswered: %s", connection.address, len(sent), error)
        if not error.retriable:
            error = Unavailable(f"{error.reason}: {error.message}")  # of the stream, not of a batch
        for queue, batch in sent:
            self._failed_try(queue, batch, error)
        for queue, batch in unsent:
            self._failed_try(queue, batch, error, sent=False)
        self._send_waiting(connection)

    def _send_waiting(self, connection: LeaderConnection) -> None:
        """Sends from the queues that found no room, each in its turn."""
        for _ in range(connection.waiting_count):  # a queue that finds no room again waits for the next answer
            queue = connection.next_waiting()
            if queue is None:
                return
            self.send_ready(queue)

    def _failed_try(
        self, queue: PartitionQueue, batch: ProducerBatch, error: StreamHouseError, sent: bool = True
    ) -> None:
        queue.last_error = error
        is_kept = queue.answered(batch, error, sent)
        if not is_kept and not batch.is_decided:
            self._fail(batch, batch.refusal(error))
        if isinstance(error, _STALE_METADATA):
            self._retry_after_refresh(queue)
        elif is_kept and not queue.is_blocked:
            self._retry_later(queue, max(error.retry_after_ms, self._backoff(queue).next_ms()))

    def _fail(self, batch: ProducerBatch, error: Exception) -> None:
        batch.fail(error)
        self._finish(batch)

    def _finish(self, batch: ProducerBatch) -> None:
        """Closes the books of a batch that has its outcome."""
        batch.end_spans()
        self.unfinished.discard(batch)
        if batch.error is None:
            self.counts.records_acked += batch.record_count
        else:
            self.counts.records_failed += batch.record_count
            self._remember_failure(batch)
        self.give_back(batch.size_bytes)

    def _remember_failure(self, batch: ProducerBatch) -> None:
        # The application may still see any failure through its future, so the first alone is not enough for a flush.
        if len(self.failures) >= UNSEEN_FAILURES_MAX:
            # Only when the list is full: to look through it at each failure would cost the more, the more fail.
            self.failures = [failure for failure in self.failures if not failure.seen]
        if len(self.failures) < UNSEEN_FAILURES_MAX:
            self.failures.append(batch)

    def give_back(self, size_bytes: int) -> None:
        """Gives bytes back to the buffer, and lets waiting calls go on that have room now."""
        self._pool.give_back(size_bytes)
        for waiter in self._pool.admit():
            if not waiter.done():
                waiter.set_result(None)

    # ---- waiting and trying again

    def _new_backoff(self) -> Backoff:
        # Short enough that a batch gets several tries within its time. A leader change takes seconds: asking once a
        # second finds it soon and costs the coordinator little.
        return Backoff(RETRY_FIRST_MS, min(RETRY_MS_MAX, self._options.delivery_timeout_ms // 4))

    def _backoff(self, queue: PartitionQueue) -> Backoff:
        """Returns the queue's back-off since its last acknowledgement."""
        backoff = self._backoffs.get(queue)
        if backoff is None:
            backoff = self._backoffs[queue] = self._new_backoff()
        return backoff

    def _retry_later(self, queue: PartitionQueue, wait_ms: float) -> None:
        # Of a rest of a nanosecond, as rounding leaves it, the timer would fire at once and find it again.
        queue.block(Blocked.BACKOFF, self._now_ms() + max(wait_ms, CLOCK_TICK_MS))
        self._wake_at(queue, queue.blocked_until_ms)

    def _retry_after_refresh(self, queue: PartitionQueue) -> None:
        if not queue.is_blocked:
            queue.block(Blocked.METADATA)
            self._tasks.spawn("find leader", self._refresh(queue, self._now_ms()))

    async def _refresh(self, queue: PartitionQueue, since_ms: float) -> None:
        """Asks the coordinator for the leader, unless the metadata is younger than `since_ms`; then sends again."""
        await asyncio.sleep(self._backoff(queue).next_ms() / 1000)
        try:
            await self._metadata.refresh(queue.topic, since_ms)
            topic = await self._metadata.topic(queue.topic)
            if queue.partition >= topic.partitions:
                raise UnknownPartition(f"{queue.topic} has {topic.partitions} partitions now, no {queue.partition}")
        except (UnknownTopic, UnknownPartition) as error:
            self._fail_all(queue, error)
        except StreamHouseError as error:
            queue.last_error = error
            if not self._warned:
                self._warned = True
                log.warning("the coordinator does not say who leads %s/%d: %s", queue.topic, queue.partition, error)
        queue.unblock()
        self.send_ready(queue)

    # ---- time

    def _wake_at(self, queue: PartitionQueue, at_ms: float) -> None:
        """Has the queue woken not later than `at_ms`."""
        # An earlier timer is left: to put it off with every batch costs more than a wake-up that finds nothing to do,
        # of which there is at most one per linger_ms.
        if at_ms == math.inf:
            return
        timer = self._timers.get(queue)
        if timer is not None:
            if timer.when() * 1000 <= at_ms:
                return
            timer.cancel()
        self._timers[queue] = self._loop.call_at(at_ms / 1000, self._wake, queue)

    def _wake(self, queue: PartitionQueue) -> None:
        """Timer of a queue: fails expired batches, and sends the batches that may go now."""
        del self._timers[queue]
        self._expire(queue, queue.wake(self._now_ms() + CLOCK_TICK_MS))  # timers may fire a clock tick early
        self.send_ready(queue)
        self._wake_at(queue, queue.next_wake_ms())

    def _expire(self, queue: PartitionQueue, expired: list[ProducerBatch]) -> None:
        for batch in expired:
            last_error = batch.last_error or queue.last_error
            self._fail(batch, timed_out(self._options.delivery_timeout_ms, last_error))

    def _fail_all(self, queue: PartitionQueue, error: StreamHouseError) -> None:
        """Fails every batch of the queue."""
        for batch in queue.expire(math.inf):
            self._fail(batch, error)

    async def close(self) -> None:
        """Stops everything; batches without an outcome fail."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for queue in self._accumulator.queues():
            # First: nothing of the queue may be sent by what its failing batches wake.
            queue.block(Blocked.CLOSED)
            self._fail_all(queue, Unavailable("the producer was closed before the batch was acknowledged"))
        await self._tasks.stop()
