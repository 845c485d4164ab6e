"""One partition's batches on their way to its leader: order, sequence numbers, what is in flight.

Owns: which batch may be sent next and under which sequence number, and what a failure means for the batches
behind it. Does not own: time, the network, encoding. A lane never lets a batch overtake another, and gives a batch a
new sequence number only if no try of it can have been written.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice
from typing import Generic, TypeVar

from shformat import ProducerStamp
from shproto import errors

T = TypeVar("T")

# A leader remembers the last five batches of a producer, so an unknown outcome may concern five at most.
IN_FLIGHT_PER_PARTITION_MAX = 5


class Verdict(Enum):
    """What an error says about the batch that was answered with it."""

    REFUSED = auto()  # not written, may be sent again as it is
    UNKNOWN = auto()  # may have been written; send again, with the same sequence number
    OUT_OF_SEQUENCE = auto()  # not written, and its sequence number does not follow
    FATAL = auto()  # not written, and never will be


# An agent may hear of a new topic late; whether there is one is the coordinator's to say.
_REFUSED = (errors.Overloaded, errors.DiskFull, errors.UnknownTopic, errors.UnknownPartition)
_OUT_OF_SEQUENCE = (errors.SequenceGap, errors.ProducerFenced, errors.UnknownProducer)


def verdict_of(error: errors.StreamHouseError) -> Verdict:
    """Errors that promise nothing count as an unknown outcome: a leader may lose its lease after the write."""
    refused_by_leader = isinstance(error, errors.NotLeader) and error.details.get("outcome") == errors.NOT_WRITTEN
    if refused_by_leader or isinstance(error, _REFUSED):
        return Verdict.REFUSED
    if isinstance(error, _OUT_OF_SEQUENCE):
        return Verdict.OUT_OF_SEQUENCE
    return Verdict.UNKNOWN if error.retriable else Verdict.FATAL


def in_doubt(batch: "Outgoing[T]", error: errors.StreamHouseError) -> bool:
    """Whether a batch given up with `error` may be in the log all the same: an earlier try of it got no answer, and the
    leader that refused this one does not know what the producer wrote."""
    return batch.maybe_written and verdict_of(error) is Verdict.OUT_OF_SEQUENCE


@dataclass(slots=True, eq=False)
class Outgoing(Generic[T]):
    """A closed batch. `payload` is the owner's."""

    payload: T
    record_count: int
    deadline_ms: float
    stamp: ProducerStamp | None = None
    maybe_written: bool = False
    expired: bool = False
    last_error: errors.StreamHouseError | None = None


class Lane(Generic[T]):
    """The way of one partition's batches. Without idempotence one batch at a time is in flight, for order."""

    def __init__(self, idempotent: bool) -> None:
        self._idempotent = idempotent
        self._in_flight_max = IN_FLIGHT_PER_PARTITION_MAX if idempotent else 1
        self._queue: deque[Outgoing[T]] = deque()
        self._in_flight: deque[Outgoing[T]] = deque()
        self._returned: deque[Outgoing[T]] = deque()
        self._identity: tuple[int, int] | None = None
        self._next_sequence = 0
        # Something came back or failed: nothing is sent until all in flight are answered, then in order.
        self._draining = False
        # A sequence number was used up and not written: what follows needs another producer id.
        self._hole = False
        # The leader is known to remember this producer: it acknowledged a batch since the last change. A leader
        # that does not would take a second batch after refusing the first, so until then one goes alone.
        self._proven = False

    @property
    def idle(self) -> bool:
        """Nothing is waiting or in flight."""
        return not (self._queue or self._in_flight or self._returned)

    @property
    def in_flight_count(self) -> int:
        return len(self._in_flight)

    @property
    def open_for_sending(self) -> bool:
        """Whether a batch, if there is one, may be sent now."""
        together = self._proven and not self._mixes_ids
        return not self._draining and len(self._in_flight) < (self._in_flight_max if together else 1)

    @property
    def _mixes_ids(self) -> bool:
        """Whether the next batch or one in flight keeps the number of an older producer id: numbers of two ids do not
        tell the leader which of the batches comes first."""
        stamps = [batch.stamp for batch in (*self._in_flight, *islice(self._queue, 1))]
        return any(stamp is not None and not self._is_present(stamp) for stamp in stamps)

    @property
    def ready(self) -> bool:
        """Whether `take` has a batch to give."""
        return bool(self._queue) and self.open_for_sending

    @property
    def needs_identity(self) -> bool:
        """Whether the next batch waits for `identify`."""
        return self._idempotent and self._identity is None and bool(self._queue) and self._queue[0].stamp is None

    def batches(self) -> Iterable[Outgoing[T]]:
        """Everything unfinished, in order."""
        return [*self._in_flight, *self._returned, *self._queue]

    def identify(self, producer_id: int, producer_epoch: int) -> None:
        """From here on batches are numbered from 0 under this producer id."""
        self._identity = (producer_id, producer_epoch)
        self._next_sequence = 0

    def doubt(self) -> None:
        """Another leader or stream, or a long silence: the leader may not remember this producer."""
        self._proven = False

    def append(self, batch: Outgoing[T]) -> None:
        self._queue.append(batch)

    def take(self) -> Outgoing[T]:
        """The next batch to send, numbered, now in flight. Only when `ready` and not `needs_identity`."""
        assert self.ready and not self.needs_identity, "nothing may be sent now"
        batch = self._queue.popleft()
        if self._identity is not None and batch.stamp is None and self._idempotent:
            batch.stamp = ProducerStamp(*self._identity, self._next_sequence)
            self._next_sequence += batch.record_count
        self._in_flight.append(batch)
        return batch

    def acked(self, batch: Outgoing[T]) -> None:
        self._in_flight.remove(batch)
        # One under an older producer id says nothing about the present one.
        self._proven = self._proven or self._is_present(batch.stamp)
        self._settle()

    def answered(self, batch: Outgoing[T], error: errors.StreamHouseError, sent: bool = True) -> bool:
        """`batch` was answered with `error`, or its stream broke with it (`sent`: after the batch had left).

        True: it waits to be sent again. False: it is out of the lane, fail it with `error`.
        """
        batch.last_error = error
        verdict = verdict_of(error) if sent else Verdict.REFUSED
        follows_trouble = self._draining
        self._in_flight.remove(batch)
        self._draining = True
        self._proven = False
        if verdict is Verdict.UNKNOWN:
            batch.maybe_written = True
        keep = not batch.expired and verdict is not Verdict.FATAL
        if verdict is Verdict.OUT_OF_SEQUENCE and not follows_trouble:
            # Not the echo of a batch ahead of it: the leader's history and ours differ. If an earlier try may
            # stand in another leader's log, a new number could write the records twice.
            self._hole = True
            keep = keep and not batch.maybe_written
        if keep:
            self._returned.append(batch)
        else:
            self._hole = self._hole or batch.stamp is not None
        self._settle()
        return keep

    def expire(self, now_ms: float) -> list[Outgoing[T]]:
        """Gives up every batch past its deadline: fail those returned. One that is in flight keeps its place
        until it is answered, so that nothing is sent around it."""
        gone = [batch for batch in self.batches() if batch.deadline_ms <= now_ms and not batch.expired]
        for batch in gone:
            batch.expired = True
            if batch.stamp is not None:
                self._draining = True
                self._hole = self._hole or batch not in self._in_flight
        self._queue = deque(batch for batch in self._queue if not batch.expired)
        self._returned = deque(batch for batch in self._returned if not batch.expired)
        self._settle()
        return gone

    def _is_present(self, stamp: ProducerStamp | None) -> bool:
        """Whether it is of the producer id that new batches get."""
        return stamp is not None and (stamp.producer_id, stamp.producer_epoch) == self._identity

    def _settle(self) -> None:
        """Once nothing is in flight, what came back goes first again."""
        if not self._draining or self._in_flight:
            return
        self._queue.extendleft(reversed(self._returned))
        self._returned.clear()
        self._draining = False
        if self._hole:
            self._hole = False
            self._identity = None
            self._proven = False
            for batch in self._queue:
                if not batch.maybe_written:
                    batch.stamp = None
