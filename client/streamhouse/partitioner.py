"""Partitions of records: the application's choice, the key's as in Kafka, or for records without a key one that stays
for a batch, and for STICKY_MS where batches are small.

Owns: the partition of each topic that records without a key go to now, and until when. Does not own: batches in the
making (gatherer.py), leaders.
Invariants: while that partition has a batch in the making with room, no other one is chosen.
"""

import random
from functools import lru_cache
from operator import index
from reprlib import repr as short
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray
from shproto.errors import UnknownPartition

from streamhouse.core.murmur2 import partition_of, partitions_of
from streamhouse.core.options import PartitionFunction, partition_number
from streamhouse.core.record_checks import RecordColumns
from streamhouse.gatherer import Gatherer, LaneState
from streamhouse.metadata import TopicState

# Small batches without keys go to the same partition for so long: while two of them are unanswered, the next batch
# gathers more records (sender.SMALL_IN_FLIGHT_MAX). Spread over all partitions, each would be alone in its own.
STICKY_MS = 100

# Keys repeat; 16,384 of them cost 2 MB and save most of the hashing, with the largest that are kept 6 MB.
CACHED_KEY_BYTES_MAX = 256
_partition_of_cached = lru_cache(maxsize=16_384)(partition_of)


def choose(partitioner: PartitionFunction, topic: str, key: bytes | None, partitions: int) -> int | None:
    """Returns the partition that the application chooses; None where it leaves the choice to us. Raises what the
    partitioner raises, TypeError, UnknownPartition."""
    chosen = partitioner(topic, key, partitions)
    if chosen is None:
        return None
    if not isinstance(chosen, SupportsIndex):
        kind = type(chosen).__name__
        raise TypeError(f"the partitioner returned {short(chosen)} ({kind}), must return a partition's number or None")
    number = index(chosen)
    if not 0 <= number < partitions:
        raise UnknownPartition(
            f"the partitioner returned {number}, topic {topic!r} has partitions 0 to {partitions - 1}",
            topic=topic,
            partition=number,
            partitions=partitions,
        )
    return number


def choose_many(
    partitioner: PartitionFunction, topic: str, records: RecordColumns, partitions: int
) -> NDArray[np.int64]:
    """Returns the choice for each record, shape (n,); -1 where it is left to us. Raises what `choose` raises."""
    keys = records.keys if records.keys is not None else [None] * len(records.values)
    choices = (choose(partitioner, topic, key, partitions) for key in keys)
    return np.fromiter((-1 if choice is None else choice for choice in choices), np.int64, len(keys))


class Partitioner:
    """A topic being written to: its lanes, and the partition that records without a key go to for now."""

    __slots__ = ("_batch_bytes", "_sticky", "_sticky_until_s", "gatherer", "lanes", "loop", "state")

    def __init__(self, state: TopicState, gatherer: Gatherer, batch_bytes: int) -> None:
        self.state = state
        self.gatherer = gatherer
        self.loop = gatherer.loop
        self.lanes = [gatherer.lane(state.topic, number) for number in range(state.partitions)]
        self._batch_bytes = batch_bytes
        self._sticky = self._next_sticky()

    def _next_sticky(self) -> int:
        """Chooses a partition that has a leader, or any while none has; returns its number."""
        led = [number for number, address in enumerate(self.state.leaders) if address]
        self._sticky = random.choice(led or range(len(self.lanes)))
        self._sticky_until_s = self.loop.time() + STICKY_MS / 1000
        return self._sticky

    def lane(self, partition: int) -> LaneState:
        """Returns the partition's lane. Raises UnknownPartition, TypeError."""
        if partition.__class__ is not int:
            partition = partition_number(partition)
        if not 0 <= partition < len(self.lanes):
            raise UnknownPartition(
                f"topic {self.state.topic!r} has partitions 0 to {len(self.lanes) - 1}, not {partition}",
                topic=self.state.topic,
                partition=partition,
                partitions=len(self.lanes),
            )
        return self.lanes[partition]

    def lane_of_key(self, key: bytes) -> LaneState:
        partition = _partition_of_cached if len(key) <= CACHED_KEY_BYTES_MAX else partition_of
        return self.lanes[partition(key, len(self.lanes))]

    def sticky_lane(self, size_bytes: int) -> LaneState:
        """Returns the lane whose batch is being gathered without keys; another one once that batch is full, or gone
        after STICKY_MS."""
        if self._begun_sticky() + size_bytes > self._batch_bytes:
            self._next_sticky()
        return self.lanes[self._sticky]

    def sticky_lane_for_all(self, size_bytes: int) -> LaneState | None:
        """Returns the lane whose batch takes so many bytes of records without keys; None if they are more than one
        batch, which go to several partitions."""
        begun = self._begun_sticky()
        return self.lanes[self._sticky] if begun + size_bytes <= self._batch_bytes else None

    def _begun_sticky(self) -> int:
        """Returns the bytes in the sticky partition's batch: 0 without one, where after STICKY_MS another partition has
        its turn."""
        gathering = self.lanes[self._sticky].gathering
        if gathering is not None:
            return gathering.size_bytes
        if self.loop.time() >= self._sticky_until_s:
            self._next_sticky()
        return 0

    def partitions(
        self, records: RecordColumns, start: int, stop: int, chosen: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """Returns the partitions of records start to stop, shape (stop - start,). chosen: for all records, -1 where the
        choice is ours."""
        if chosen is None:
            return self._own_partitions(records, start, stop)
        partitions = chosen[start:stop]
        ours = partitions < 0
        return np.where(ours, self._own_partitions(records, start, stop), partitions) if ours.any() else partitions

    def _own_partitions(self, records: RecordColumns, start: int, stop: int) -> NDArray[np.int64]:
        keys = records.key_column(start, stop)
        if keys is None:
            return self._sticky_partitions(records.sizes[start:stop])
        partitions = partitions_of(keys, len(self.lanes))
        if keys.valid is not None:
            nulls = ~keys.valid
            partitions[nulls] = self._sticky_partitions(records.sizes[start:stop][nulls])
        return partitions

    def _sticky_partitions(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the sticky partition until its batch is full, then others, a batch full each; shape (n,)."""
        begun = self._begun_sticky()
        turns = (np.cumsum(sizes) + begun - 1) // self._batch_bytes
        choices = [self._sticky, *(self._next_sticky() for _ in range(int(turns[-1]) if len(turns) else 0))]
        return np.array(choices, np.int64)[turns]
