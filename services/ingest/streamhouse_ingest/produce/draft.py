"""Decides appends, before the write-ahead log has them.

Owns: the effects of a group on a log that is not written yet. Does not own: the log, which changes in apply() only.
Invariants: a decision never changes the log, so that a group whose write failed leaves no trace.
"""

from dataclasses import dataclass

from shformat import ProducerStamp

from streamhouse_ingest.log.fences import check_fenced
from streamhouse_ingest.log.partition_log import BatchAppended, PartitionLog
from streamhouse_ingest.log.producers import (
    DuplicateOf,
    FencedBy,
    InSequence,
    NotFenced,
    OutOfSequence,
    ProducerState,
    Verdict,
    after_write,
    check_sequence,
)


@dataclass(frozen=True, slots=True)
class NotLed:
    """The agent does not append to this log, or no longer."""


@dataclass(frozen=True, slots=True)
class RangeExhausted:
    """The batch does not fit into the epoch's offset range; an extension has been requested."""

    limit_offset: int


Decision = BatchAppended | DuplicateOf | OutOfSequence | FencedBy | NotFenced | NotLed | RangeExhausted


class Draft:
    """Effects of a group of appends on a single log, if the write of the group succeeds."""

    def __init__(self, log: PartitionLog) -> None:
        self._log = log
        self._next_offset = log.next_offset
        self._producers: dict[int, ProducerState] = {}

    def decide(self, record_count: int, stamp: ProducerStamp | None, *, sequenced: bool = False) -> Decision:
        """Returns the offsets of the batch, or the reason not to append it. Later decisions of this draft take a
        BatchAppended as written. `sequenced`: the batch is of a producer that fences."""
        if not self._log.leading:
            return NotLed()
        state = None
        if stamp is not None:
            state = self._producers.get(stamp.producer_id) or self._log.producers.get(stamp.producer_id)
            verdict = self._verdict(state, stamp, record_count, sequenced=sequenced)
            if not isinstance(verdict, InSequence):
                return verdict
        # Never beyond the limit: an epoch of another agent may begin there (G2).
        if self._next_offset + record_count > self._log.limit_offset:
            return RangeExhausted(self._log.limit_offset)
        appended = BatchAppended(self._next_offset, record_count, stamp)
        self._next_offset += record_count
        if stamp is not None:
            self._producers[stamp.producer_id] = after_write(
                state, stamp, record_count, appended.base_offset, self._log.key.epoch
            )
        return appended

    def _verdict(
        self, state: ProducerState | None, stamp: ProducerStamp, record_count: int, *, sequenced: bool
    ) -> Verdict:
        fence = self._log.fences.get(stamp.producer_id)
        # A producer that has fenced here is strict, however its batch comes.
        if sequenced or fence is not None:
            return check_fenced(fence, state, stamp, record_count)
        return check_sequence(state, stamp, record_count)
