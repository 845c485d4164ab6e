"""Chooses partitions of records: the application's choice, or the key's as in Kafka, or for records without a key the
sticky partition, which stays for a batch, and for STICKY_MS where batches are small.

Owns: the sticky partition of each topic, and until when. Does not own: open batches (core/partition_queue.py), leaders.
Invariants: while the sticky partition has an open batch with room, records without a key go nowhere else.
"""

import random
from functools import lru_cache
from operator import index
from reprlib import repr as short
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray
from shformat.murmur2 import partition_of, partitions_of
from shproto.errors import UnknownPartition

from streamhouse.accumulator import RecordAccumulator
from streamhouse.core.arrow_records import ArrowRecords
from streamhouse.core.options import PartitionFunction, partition_number
from streamhouse.core.partition_queue import PartitionQueue
from streamhouse.core.record_checks import RecordColumns
from streamhouse.metadata import TopicState

# Small batches without keys go to the same partition for so long: while two of them are unanswered, the next batch
# gathers more records (partition_queue.SMALL_IN_FLIGHT_MAX). Spread over all partitions, each would be alone in its
# own.
STICKY_MS = 100

# Keys repeat; 16,384 of them cost 2 MB and save most of the hashing, with the largest that are kept 6 MB.
CACHED_KEY_BYTES_MAX = 256
_partition_of_cached = lru_cache(maxsize=16_384)(partition_of)


def choose(partitioner: PartitionFunction, topic: str, key: bytes | None, partitions: int) -> int | None:
    """Returns the partition that the application chooses; None where it leaves the choice to us. Raises TypeError and
    UnknownPartition for any other answer, and passes on the errors of the partitioner."""
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
    partitioner: PartitionFunction, topic: str, records: RecordColumns | ArrowRecords, partitions: int
) -> NDArray[np.int64]:
    """Returns the choice for each record, shape (n,); -1 where it is left to us. Raises the errors of `choose`."""
    keys = records.keys if records.keys is not None else [None] * len(records)
    choices = (choose(partitioner, topic, key, partitions) for key in keys)
    return np.fromiter((-1 if choice is None else choice for choice in choices), np.int64, len(keys))


class Partitioner:
    """A topic being written to: the queues of its partitions, and its sticky partition."""

    __slots__ = ("_batch_bytes", "_sticky", "_sticky_until_s", "loop", "queues", "state")

    def __init__(self, state: TopicState, accumulator: RecordAccumulator, batch_bytes: int) -> None:
        self.state = state
        self.loop = accumulator.loop
        self.queues = [accumulator.queue(state.topic, number) for number in range(state.partitions)]
        self._batch_bytes = batch_bytes
        self._sticky = self._next_sticky()

    def _next_sticky(self) -> int:
        """Chooses a partition that has a leader, or any while none has; returns its number."""
        # A batch for a partition without a leader would wait for the next epoch, while any other partition takes it
        # now.
        led = [number for number, address in enumerate(self.state.leaders) if address]
        self._sticky = random.choice(led or range(len(self.queues)))
        self._sticky_until_s = self.loop.time() + STICKY_MS / 1000
        return self._sticky

    def queue(self, partition: int) -> PartitionQueue:
        """Returns the partition's queue. Raises UnknownPartition, TypeError."""
        if partition.__class__ is not int:
            partition = partition_number(partition)
        if not 0 <= partition < len(self.queues):
            raise UnknownPartition(
                f"topic {self.state.topic!r} has partitions 0 to {len(self.queues) - 1}, not {partition}",
                topic=self.state.topic,
                partition=partition,
                partitions=len(self.queues),
            )
        return self.queues[partition]

    def queue_of_key(self, key: bytes) -> PartitionQueue:
        """Returns the queue of the partition that Kafka would choose."""
        partition = _partition_of_cached if len(key) <= CACHED_KEY_BYTES_MAX else partition_of
        return self.queues[partition(key, len(self.queues))]

    def sticky_queue(self, size_bytes: int) -> PartitionQueue:
        """Returns the sticky partition's queue; of another partition once its batch is full, or gone after
        STICKY_MS."""
        if self._begun_sticky() + size_bytes > self._batch_bytes:
            self._next_sticky()
        return self.queues[self._sticky]

    def sticky_queue_for_all(self, size_bytes: int) -> PartitionQueue | None:
        """Returns the sticky partition's queue if its open batch has room for so many bytes; None otherwise: then the
        records go to several partitions."""
        begun = self._begun_sticky()
        return self.queues[self._sticky] if begun + size_bytes <= self._batch_bytes else None

    def _begun_sticky(self) -> int:
        """Returns the bytes in the sticky partition's open batch, 0 without a batch; then, after STICKY_MS, another
        partition becomes the sticky one."""
        batch = self.queues[self._sticky].open_batch
        if batch is not None:
            return batch.size_bytes
        if self.loop.time() >= self._sticky_until_s:
            self._next_sticky()
        return 0

    def partitions(
        self, records: RecordColumns | ArrowRecords, start: int, stop: int, chosen: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """Returns the partitions of records start to stop, shape (stop - start,). chosen: for all records, -1 where the
        choice is ours."""
        if chosen is None:
            return self._own_partitions(records, start, stop)
        partitions = chosen[start:stop]
        ours = partitions < 0
        return np.where(ours, self._own_partitions(records, start, stop), partitions) if ours.any() else partitions

    def _own_partitions(self, records: RecordColumns | ArrowRecords, start: int, stop: int) -> NDArray[np.int64]:
        keys = records.key_column(start, stop)
        if keys is None:
            return self._sticky_partitions(records.sizes[start:stop])
        partitions = partitions_of(keys, len(self.queues))
        if keys.valid is not None:
            # A null key is no key, as in Kafka: it does not hash.
            nulls = ~keys.valid
            partitions[nulls] = self._sticky_partitions(records.sizes[start:stop][nulls])
        return partitions

    def _sticky_partitions(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the sticky partition until its batch is full, then others, a batch full each; shape (n,)."""
        begun = self._begun_sticky()
        turns = (np.cumsum(sizes) + begun - 1) // self._batch_bytes
        choices = [self._sticky, *(self._next_sticky() for _ in range(int(turns[-1]) if len(turns) else 0))]
        return np.array(choices, np.int64)[turns]
