"""Batches of one partition on their way to its leader: order, sequence numbers, waiting; pure.

Owns: the open batch, the batches queued, in flight and to be retried; their sequence numbers; the reason why nothing
may be sent. Does not own: timers (the caller passes the time), the network, encoding.
Invariants: a batch never overtakes another of its partition. A batch gets a new sequence number only if no try of it
can have been written. Batches of one partition are never in flight on two streams, nor under two producer ids.
"""

import math
from collections import deque
from collections.abc import Iterable
from enum import Enum, auto
from itertools import islice

from shformat import ProducerStamp
from shproto import errors

from streamhouse.core.producer_batch import BatchState, Outcome, ProducerBatch, outcome_of

# A leader remembers the last five batches of a producer, so an unknown outcome may concern five at most.
IN_FLIGHT_PER_PARTITION_MAX = 5
# Batches of a partition that go before they are full, unanswered at a time; more records gather in the next one, for up
# to GROW_MS_MAX. Without this limit a stream of 100,000 records/s and linger_ms=0 became 350 to 450 batches/s on two
# cores, as many as these can do, and each waited behind seven others: p99 from send to receive was 50 ms instead of 31.
SMALL_IN_FLIGHT_MAX = 2
# A batch whose linger has expired and that may not go yet (no room, or SMALL_IN_FLIGHT_MAX are unanswered) grows for so
# long; then the batch is closed, and only its deadline counts.
GROW_MS_MAX = 1_000
# After such a silence the leader may have forgotten an idle producer.
QUIET_MS = 60_000


class Blocked(Enum):
    """Reason why a partition sends nothing. While STREAM_FULL the queue is looked at all the same: the partition may
    have another leader by then, with room."""

    BACKOFF = auto()  # until a time
    METADATA = auto()  # until the leader is known
    PRODUCER_ID = auto()  # until the coordinator answers
    STREAM_FULL = auto()  # until the leader answers
    CLOSED = auto()  # for good


class PartitionQueue:
    """Queue of a partition. Without idempotence one batch at a time is in flight, for order. `small_in_flight_max`:
    number of unanswered batches from which on the open batch waits until it is full."""

    __slots__ = (
        "_close_ms",
        "_draining",
        "_expiry_ms",
        "_has_gap",
        "_idempotent",
        "_in_flight",
        "_in_flight_max",
        "_last_sent_ms",
        "_linger_expired",
        "_linger_until_ms",
        "_next_sequence",
        "_producer",
        "_queued",
        "_small_in_flight_max",
        "_stream",
        "_to_retry",
        "blocked",
        "blocked_until_ms",
        "last_error",
        "leader_confirmed",
        "open_batch",
        "partition",
        "topic",
    )

    def __init__(
        self, topic: str, partition: int, *, idempotent: bool, small_in_flight_max: int = SMALL_IN_FLIGHT_MAX
    ) -> None:
        self.topic = topic
        self.partition = partition
        self._idempotent = idempotent
        self._in_flight_max = IN_FLIGHT_PER_PARTITION_MAX if idempotent else 1
        self._small_in_flight_max = small_in_flight_max
        self.open_batch: ProducerBatch | None = None
        self._linger_until_ms = self._close_ms = math.inf  # of the open batch
        self._linger_expired = False  # the open batch may go
        self._queued: deque[ProducerBatch] = deque()
        self._in_flight: deque[ProducerBatch] = deque()
        self._to_retry: deque[ProducerBatch] = deque()
        self._expiry_ms = math.inf  # not later than the first deadline
        self.blocked: Blocked | None = None
        self.blocked_until_ms = math.inf
        self.last_error: errors.StreamHouseError | None = None
        self._stream: object = None
        self._last_sent_ms = -math.inf
        self._producer: tuple[int, int] | None = None  # id and epoch of new batches
        self._next_sequence = 0
        # A try failed: nothing is sent until all in flight are answered, then in order.
        self._draining = False
        # A sequence number was used up and not written: the next batches need another producer id.
        self._has_gap = False
        # The leader is known to remember this producer: a batch was acknowledged since the last change. A leader
        # that does not would take a second batch after refusing the first, so until then each batch goes alone.
        self.leader_confirmed = False

    # ---- the open batch

    def open(self, batch: ProducerBatch, now_ms: float, linger_ms: float) -> None:
        """Begins a batch; the open batch before is full and moves into the queue."""
        self.close_open()
        self.open_batch = batch
        self._linger_expired = False
        self._linger_until_ms = now_ms + linger_ms
        self._close_ms = self._linger_until_ms + GROW_MS_MAX
        self._expiry_ms = min(self._expiry_ms, batch.deadline_ms)

    def close_open(self) -> None:
        """Puts the open batch, if any, into the queue."""
        if (batch := self.open_batch) is not None:
            batch.move_to(BatchState.CLOSED)
            self._queued.append(batch)
            self.open_batch = None

    def flush(self) -> None:
        """Lets the open batch go as if its linger had expired."""
        self._linger_expired = True

    # ---- time

    def block(self, reason: Blocked, until_ms: float = math.inf) -> None:
        """Notes why nothing is sent until `unblock` or the time; STREAM_FULL alone blocks nothing, see Blocked."""
        self.blocked, self.blocked_until_ms = reason, until_ms

    def unblock(self) -> None:
        """Forgets the reason why nothing was sent."""
        self.blocked, self.blocked_until_ms = None, math.inf

    @property
    def is_blocked(self) -> bool:
        """True while nothing may be sent, whichever agent leads."""
        return self.blocked is not None and self.blocked is not Blocked.STREAM_FULL

    def next_wake_ms(self) -> float:
        """Returns when `wake` has something to do; infinity if only an answer or a record changes anything."""
        at_ms = min(self._expiry_ms, self.blocked_until_ms)
        if self.open_batch is None:
            return at_ms
        return min(at_ms, self._close_ms if self._linger_expired else self._linger_until_ms)

    def wake(self, now_ms: float) -> list[ProducerBatch]:
        """Ends the block and the linger of the open batch if their time has come. Returns the expired batches, to be
        failed."""
        if now_ms >= self.blocked_until_ms:
            self.unblock()
        if self.open_batch is not None and now_ms >= self._linger_until_ms:
            self._linger_expired = True
            if now_ms >= self._close_ms:
                self.close_open()
        return self.expire(now_ms) if now_ms >= self._expiry_ms else []

    def expire(self, now_ms: float) -> list[ProducerBatch]:
        """Returns every batch past the deadline, EXPIRED now, to be failed. A batch in flight keeps its place until the
        answer comes, so that no other batch is sent around it."""
        if self.open_batch is not None and self.open_batch.deadline_ms <= now_ms:
            self.close_open()
        expired = [batch for batch in self.batches() if batch.deadline_ms <= now_ms and not batch.is_decided]
        for batch in expired:
            # A numbered batch that is never sent again leaves a gap; while in flight, its answer decides that.
            if batch.stamp is not None:
                self._draining = True
                self._has_gap = self._has_gap or batch.state is not BatchState.IN_FLIGHT
            batch.move_to(BatchState.EXPIRED)
        self._queued = deque(batch for batch in self._queued if not batch.is_decided)
        self._to_retry = deque(batch for batch in self._to_retry if not batch.is_decided)
        self._drained()
        left = [batch.deadline_ms for batch in self.batches() if not batch.is_decided]
        if self.open_batch is not None:
            left.append(self.open_batch.deadline_ms)
        self._expiry_ms = min(left, default=math.inf)
        return expired

    # ---- sending

    @property
    def is_idle(self) -> bool:
        """True while nothing is queued or in flight."""
        return not (self._queued or self._in_flight or self._to_retry)

    def batches(self) -> Iterable[ProducerBatch]:
        """Returns every closed batch that is not answered for good, in order."""
        return [*self._in_flight, *self._to_retry, *self._queued]

    @property
    def may_send(self) -> bool:
        """True if the next batch may be sent now, whenever there is a next batch."""
        together = self.leader_confirmed and not self._mixes_ids
        return not self._draining and len(self._in_flight) < (self._in_flight_max if together else 1)

    @property
    def _mixes_ids(self) -> bool:
        """True if the next batch or a batch in flight keeps the number of an older producer id: numbers of two ids do
        not tell the leader which of the batches comes first."""
        stamps = [batch.stamp for batch in (*self._in_flight, *islice(self._queued, 1))]
        return any(stamp is not None and not self._is_present(stamp) for stamp in stamps)

    @property
    def is_ready(self) -> bool:
        """True if `take` has a batch to give."""
        return bool(self._queued) and self.may_send

    @property
    def has_next(self) -> bool:
        """True if a batch can be sent now: a queued batch, or the open batch if it may go before it is full."""
        if self.is_blocked or not self.may_send:
            return False
        may_close = (
            self._linger_expired and self.open_batch is not None and len(self._in_flight) < self._small_in_flight_max
        )
        return bool(self._queued) or may_close

    @property
    def needs_producer_id(self) -> bool:
        """True if the next batch waits for `identify`."""
        return self._idempotent and self._producer is None and bool(self._queued) and self._queued[0].stamp is None

    def identify(self, producer_id: int, producer_epoch: int) -> None:
        """Numbers batches from 0 under this producer id from here on."""
        self._producer = (producer_id, producer_epoch)
        self._next_sequence = 0

    def switch_to(self, stream: object) -> bool:
        """Sends over `stream` from here on. Returns False, and changes nothing, while another stream has batches in
        flight."""
        if stream != self._stream:
            # Two streams have no order between them: a batch on the new stream could overtake one on the old.
            if self._in_flight:
                return False
            self._stream = stream
            self.leader_confirmed = False
        return True

    def take(self, now_ms: float) -> ProducerBatch:
        """Returns the next batch to send, numbered, now in flight. Only when `is_ready` and not `needs_producer_id`."""
        assert self.is_ready and not self.needs_producer_id, "nothing may be sent now"
        if now_ms - self._last_sent_ms > QUIET_MS and not self._in_flight:
            self.leader_confirmed = False
        self._last_sent_ms = now_ms
        batch = self._queued.popleft()
        batch.move_to(BatchState.IN_FLIGHT)
        if self._producer is not None and batch.stamp is None and self._idempotent:
            batch.stamp = ProducerStamp(*self._producer, self._next_sequence)
            self._next_sequence += batch.record_count
        self._in_flight.append(batch)
        return batch

    # ---- answers

    def acked(self, batch: ProducerBatch) -> None:
        """Takes an acknowledged batch out of the queue."""
        self._in_flight.remove(batch)
        # An acknowledgement under an older producer id says nothing about the present one.
        self.leader_confirmed = self.leader_confirmed or self._is_present(batch.stamp)
        self._drained()

    def answered(self, batch: ProducerBatch, error: errors.StreamHouseError, sent: bool = True) -> bool:
        """Handles a try that was answered with `error`, or whose stream broke with it (`sent`: after the batch had
        left). Returns True if the batch waits to be sent again; False if the queue has dropped the batch: fail it with
        `error`, unless the outcome is decided."""
        batch.last_error = error
        outcome = outcome_of(error) if sent else Outcome.NOT_WRITTEN
        follows_trouble = self._draining
        self._in_flight.remove(batch)
        self._draining = True
        self.leader_confirmed = False
        if outcome is Outcome.UNKNOWN:
            batch.maybe_written = True
        keep = not batch.is_decided and outcome is not Outcome.FATAL
        if outcome is Outcome.OUT_OF_SEQUENCE and not follows_trouble:
            # Not the echo of an earlier batch: the leader's history and ours differ. If an earlier try may
            # stand in another leader's log, a new number could write the records twice.
            self._has_gap = True
            keep = keep and not batch.maybe_written
        if keep:
            batch.move_to(BatchState.CLOSED)
            self._to_retry.append(batch)
        else:
            self._has_gap = self._has_gap or batch.stamp is not None
        self._drained()
        return keep

    def _is_present(self, stamp: ProducerStamp | None) -> bool:
        """Returns True for a stamp of the producer id that new batches get."""
        return stamp is not None and (stamp.producer_id, stamp.producer_epoch) == self._producer

    def _drained(self) -> None:
        """Once nothing is in flight after a failed try: batches to be retried go first again."""
        if not self._draining or self._in_flight:
            return
        # In front of the queued batches, which are younger: none of them overtakes.
        self._queued.extendleft(reversed(self._to_retry))
        self._to_retry.clear()
        self._draining = False
        if self._has_gap:
            self._has_gap = False
            # A new id, not a new number: the leader takes any first sequence of an id that it does not know.
            self._producer = None
            self.leader_confirmed = False
            for batch in self._queued:
                # A batch that may be in a log keeps its number: under another the leader could not tell that it has it.
                if not batch.maybe_written:
                    batch.stamp = None
