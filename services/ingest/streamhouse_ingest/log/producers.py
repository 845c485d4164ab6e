"""Idempotent producers of a partition: the last batches of each producer, so that a retry is written once (G5).

Owns: the states of the partition's producers, their limit and their encoding. Does not own: which batches are durable.
Invariants: a state holds 1 to BATCHES_REMEMBERED batches of a single producer epoch. The rules are Kafka's:
- the next batch must start at the sequence after the last batch; a higher sequence is a gap;
- a batch that equals a remembered batch is a duplicate and gets the original offset back;
- a newer producer epoch starts at sequence 0 and forgets the older epoch, an older epoch is fenced;
- a producer without state is accepted at any sequence: the state may have been forgotten (idle producers beyond the
  limit, a takeover without the old leader's log), and a refusal would stop the producer for ever.
fences.py has the rules of producers that fence. Their epochs are above FIRST_EPOCH, and they are never forgotten where
they may write.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from shformat import ProducerStamp

# An idempotent client keeps at most this many batches of a partition in flight, as in Kafka.
BATCHES_REMEMBERED = 5
# The epoch of producers that do not fence, as the coordinator assigns it.
FIRST_EPOCH = 0
# Producers that fence are not forgotten for the sake of others: the coordinator limits them, by 10,000 at most. Beyond
# this many some program draws epochs at random; a snapshot of so many has 6 MB, well below its limit.
_FENCING_MAX = 50_000
# Stands for the epoch of a batch that the coordinator reported.
REPORTED = 0
_SNAPSHOT_VERSION = 1
_HEAD = struct.Struct("<BI")  # version, producers
_PRODUCER = struct.Struct("<qIB")  # producer id, producer epoch, batches
_BATCH = struct.Struct("<qIq")  # base sequence, record count, base offset


class SnapshotError(ValueError):
    """An invalid producer snapshot; the message names the fault and the byte."""


class WrittenBatch(NamedTuple):
    """A batch of a producer. epoch: the epoch whose log holds the batch; REPORTED if the coordinator reported it.
    Fenced records of an epoch can have the same offsets as records of the next epoch: the epoch tells them apart."""

    base_sequence: int
    record_count: int
    base_offset: int
    epoch: int = REPORTED

    @property
    def next_sequence(self) -> int:
        """Sequence number of the record that follows."""
        return self.base_sequence + self.record_count


class ProducerState(NamedTuple):
    """The last batches of a producer epoch, in ascending order; never empty."""

    producer_epoch: int
    batches: tuple[WrittenBatch, ...]

    @property
    def next_sequence(self) -> int:
        """Sequence number of the record that follows."""
        return self.batches[-1].next_sequence


@dataclass(frozen=True, slots=True)
class InSequence:
    """The batch may be written."""


@dataclass(frozen=True, slots=True)
class DuplicateOf:
    """The batch repeats the batch at `base_offset`."""

    base_offset: int


@dataclass(frozen=True, slots=True)
class OutOfSequence:
    """The batch does not follow the last batch: sequence number `expected` has to come next."""

    expected: int


@dataclass(frozen=True, slots=True)
class FencedBy:
    """The producer has been replaced: an instance with the higher epoch `held_epoch` has written."""

    held_epoch: int


@dataclass(frozen=True, slots=True)
class NotFenced:
    """The producer fences, and no fence of its epoch has been answered in this range."""


Verdict = InSequence | DuplicateOf | OutOfSequence | FencedBy | NotFenced
IN_SEQUENCE = InSequence()


def check_sequence(state: ProducerState | None, stamp: ProducerStamp, record_count: int) -> Verdict:
    """Returns the verdict on a batch of `record_count` records from this producer."""
    if state is None:
        return IN_SEQUENCE
    if stamp.producer_epoch < state.producer_epoch:
        return FencedBy(state.producer_epoch)
    if stamp.producer_epoch > state.producer_epoch:
        return IN_SEQUENCE if stamp.base_sequence == 0 else OutOfSequence(0)
    if stamp.base_sequence == state.next_sequence:
        return IN_SEQUENCE
    for batch in state.batches:
        if (batch.base_sequence, batch.record_count) == (stamp.base_sequence, record_count):
            return DuplicateOf(batch.base_offset)
    return OutOfSequence(state.next_sequence)


def after_write(
    state: ProducerState | None, stamp: ProducerStamp, record_count: int, base_offset: int, epoch: int
) -> ProducerState:
    """Returns the state after the batch was written at `base_offset` in `epoch`."""
    written = WrittenBatch(stamp.base_sequence, record_count, base_offset, epoch)
    if state is None or state.producer_epoch != stamp.producer_epoch:
        return ProducerState(stamp.producer_epoch, (written,))
    return ProducerState(stamp.producer_epoch, (*state.batches[1 - BATCHES_REMEMBERED :], written))


class ProducerTable:
    """The producers of a partition, in order of their last write. Beyond `producers_max` the producer whose last write
    is oldest is forgotten, but none that fences where it may write."""

    def __init__(self, producers_max: int) -> None:
        self._producers_max = producers_max
        self._states: dict[int, ProducerState] = {}
        self._fenced: set[int] = set()

    def __len__(self) -> int:
        return len(self._states)

    def get(self, producer_id: int) -> ProducerState | None:
        """Returns the state of a producer, None if it is unknown or forgotten."""
        return self._states.get(producer_id)

    def put(self, producer_id: int, state: ProducerState) -> None:
        """Sets the state of a producer, which becomes the most recent writer."""
        # Removed first: a dictionary keeps the place of a key that is only replaced, and the order is that of the last
        # writes.
        self._states.pop(producer_id, None)
        self._states[producer_id] = state
        # The fences have a limit of their own.
        if len(self._states) - len(self._fenced) > self._producers_max:
            del self._states[next(other for other in self._states if other not in self._fenced)]

    def know(self, producer_id: int, state: ProducerState | None) -> None:
        """Sets the state of a producer that fences to what is certain; None: it has written nothing. It is forgotten
        neither for others nor because of damage from then on."""
        self._fenced.add(producer_id)
        self._states.pop(producer_id, None)
        if state is not None:
            self.put(producer_id, state)

    def merge(self, others: Mapping[int, ProducerState]) -> None:
        """Merges states of a replay or a snapshot; of the same producer the newer batches win."""
        merged = {key: _newer(self._states.get(key), state) for key, state in others.items()}
        every = {**self._states, **merged}
        ordered = sorted(every.items(), key=lambda item: item[1].batches[-1].base_offset)
        # A replay does not know the fences, only the epochs. To forget a producer that fences would be to answer its
        # next fence with too low a sequence.
        fencing = [item for item in ordered if item[1].producer_epoch > FIRST_EPOCH]
        ordinary = [item for item in ordered if item[1].producer_epoch == FIRST_EPOCH]
        kept = dict([*ordinary[-self._producers_max :], *fencing[-_FENCING_MAX:]])
        self._states = {key: state for key, state in ordered if key in kept}

    def forget(self, epoch: int, base_offset: int, end_offset: int, *, damaged: bool = False) -> None:
        """Forgets the batches of `epoch` in [base_offset, end_offset), which were fenced or lost: a retry of them is no
        duplicate, and a later epoch may use their offsets by now. `damaged`: lost in this log."""
        states = self._states
        left = _restricted(
            states, lambda batch: batch.epoch != epoch or not base_offset <= batch.base_offset < end_offset
        )
        # A producer that fences goes on behind a damaged batch, which readers get as DATA_LOSS: were its last sequence
        # to go back, it would write again what is there before the damage, or all of it.
        kept = self._fenced if damaged else ()
        self._states = {key: states[key] if key in kept else left[key] for key in states if key in kept or key in left}

    def snapshot(self, end_offset: int, before: Mapping[int, ProducerState] | None = None) -> bytes:
        """Returns the encoded states of the batches below `end_offset`. `before`: states at that offset of
        producers all of whose remembered batches may lie beyond."""
        states = _restricted(self._states, lambda batch: batch.base_offset < end_offset)
        return encode_snapshot({**(before or {}), **states})

    def snapshot_of(self, epoch: int, base_offset: int, end_offset: int, *, fencing_only: bool = False) -> bytes:
        """Returns the encoded states of the batches of `epoch` in [base_offset, end_offset). `fencing_only`: without
        producers that do not fence."""
        states = _restricted(
            self._states, lambda batch: batch.epoch == epoch and base_offset <= batch.base_offset < end_offset
        )
        if fencing_only:
            states = {key: state for key, state in states.items() if state.producer_epoch > FIRST_EPOCH}
        return encode_snapshot(states)


def _newer(ours: ProducerState | None, theirs: ProducerState) -> ProducerState:
    if ours is None or theirs.producer_epoch > ours.producer_epoch:
        return theirs
    if theirs.producer_epoch < ours.producer_epoch:
        return ours
    # Replay and coordinator may both know a batch: an offset has one batch, so the offset joins the two.
    batches = {batch.base_offset: batch for batch in (*ours.batches, *theirs.batches)}
    last = [batches[offset] for offset in sorted(batches)[-BATCHES_REMEMBERED:]]
    return ProducerState(ours.producer_epoch, tuple(last))


def _restricted(
    states: Mapping[int, ProducerState], wanted: Callable[[WrittenBatch], bool]
) -> dict[int, ProducerState]:
    """Returns the states restricted to wanted batches, without producers that have none."""
    kept = {}
    for producer_id, state in states.items():
        batches = tuple(filter(wanted, state.batches))
        if batches:
            kept[producer_id] = ProducerState(state.producer_epoch, batches)
    return kept


def encode_snapshot(states: Mapping[int, ProducerState]) -> bytes:
    """Returns the encoded states; no bytes if there are no producers.

    Little-endian: version u8, number of producers u32; per producer: id i64, epoch u32, number of batches u8; per
    batch: base sequence i64, record count u32, base offset i64.
    """
    if not states:
        return b""
    parts = [_HEAD.pack(_SNAPSHOT_VERSION, len(states))]
    for producer_id, state in states.items():
        parts.append(_PRODUCER.pack(producer_id, state.producer_epoch, len(state.batches)))
        # Without the epoch, which only tells apart batches in this log: a decoded batch is REPORTED.
        parts.extend(_BATCH.pack(*batch[:3]) for batch in state.batches)
    return b"".join(parts)


def decode_snapshot(data: bytes) -> dict[int, ProducerState]:
    """Returns the merged states of all snapshots in `data`, which are concatenated (possibly none). Raises
    SnapshotError."""
    at, states = 0, dict[int, ProducerState]()
    try:
        while at < len(data):
            version, count = _HEAD.unpack_from(data, at)
            if version != _SNAPSHOT_VERSION:
                raise SnapshotError(
                    f"producer snapshot: version {version} at byte {at}, this agent reads {_SNAPSHOT_VERSION}"
                )
            at += _HEAD.size
            for _ in range(count):
                producer_id, state, at = _decode_producer(data, at)
                states[producer_id] = _newer(states.get(producer_id), state)
    except struct.error as error:
        raise SnapshotError(f"producer snapshot: cut off, {len(data)} bytes") from error
    return states


def _decode_producer(data: bytes, at: int) -> tuple[int, ProducerState, int]:
    """Returns id and state of the producer at byte `at`, and the byte at which the next producer begins. Raises
    SnapshotError, struct.error."""
    producer_id, epoch, batch_count = _PRODUCER.unpack_from(data, at)
    at += _PRODUCER.size
    if not 1 <= batch_count <= BATCHES_REMEMBERED:
        raise SnapshotError(f"producer snapshot: {batch_count} batches at byte {at}")
    batches = tuple(WrittenBatch(*_BATCH.unpack_from(data, at + i * _BATCH.size)) for i in range(batch_count))
    return producer_id, ProducerState(epoch, batches), at + batch_count * _BATCH.size
