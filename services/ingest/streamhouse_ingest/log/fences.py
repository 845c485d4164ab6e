"""Rules of producers that fence: their sequences go on across producer epochs, and nothing is guessed. Pure.

A producer that fences is strict, unlike those of producers.py. In each range of the partition it has to be fenced
before a batch is taken; the fence brings all that older ranges know of it, so that the last sequence is certain:
- a batch of the fenced epoch must begin at the sequence after the last one, whichever epoch wrote that;
- a batch that equals a remembered batch is a duplicate and gets the original offset back;
- a batch of an older epoch is fenced, one of an epoch that has not fenced here is refused.
"""

from collections.abc import Iterable
from typing import NamedTuple

from shformat import ProducerStamp

from streamhouse_ingest.log.producers import (
    IN_SEQUENCE,
    DuplicateOf,
    FencedBy,
    NotFenced,
    OutOfSequence,
    ProducerState,
    Verdict,
)


class Fence(NamedTuple):
    """Fence of a producer in a range. Older epochs are refused from the start; batches of `producer_epoch` are taken
    once the fence is open, which is when it is answered."""

    producer_epoch: int
    is_open: bool


def check_fenced(fence: Fence | None, state: ProducerState | None, stamp: ProducerStamp, record_count: int) -> Verdict:
    """Returns the verdict on a batch of `record_count` records from a producer that fences. `state` None: it has
    written nothing to the partition."""
    if fence is None or stamp.producer_epoch > fence.producer_epoch:
        return NotFenced()
    if stamp.producer_epoch < fence.producer_epoch:
        return FencedBy(fence.producer_epoch)
    if not fence.is_open:
        return NotFenced()
    expected = 0 if state is None else state.next_sequence
    if stamp.base_sequence == expected:
        return IN_SEQUENCE
    for batch in () if state is None else state.batches:
        if (batch.base_sequence, batch.record_count) == (stamp.base_sequence, record_count):
            return DuplicateOf(batch.base_offset)
    return OutOfSequence(expected)


def latest(states: Iterable[ProducerState]) -> ProducerState | None:
    """Returns the state that goes furthest of a producer that fences, None if there is none: its sequences only grow,
    from range to range."""
    return max(states, key=lambda state: state.next_sequence, default=None)


def within(state: ProducerState, start_offset: int, end_offset: int) -> ProducerState | None:
    """Returns the state with the batches in [start_offset, end_offset) alone, None if there are none."""
    batches = tuple(batch for batch in state.batches if start_offset <= batch.base_offset < end_offset)
    return ProducerState(state.producer_epoch, batches) if batches else None
