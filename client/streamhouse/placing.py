"""Which partition a record goes to: its key's as in Kafka, or for those without keys one that stays for a batch."""

import random
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from shproto.errors import UnknownPartition

from streamhouse.core.murmur2 import partition_of, partitions_of
from streamhouse.core.options import partition_number
from streamhouse.core.outgoing import ManyRecords
from streamhouse.gatherer import Gatherer, LaneState
from streamhouse.metadata import TopicState

# Keys repeat; 16,384 of them cost 2 MB and save most of the hashing, with the largest that are kept 6 MB.
CACHED_KEY_BYTES_MAX = 256
_partition_of_cached = lru_cache(maxsize=16_384)(partition_of)


class TopicLanes:
    """A topic being written to: its lanes, and the partition that records without a key go to for now."""

    __slots__ = ("_batch_bytes", "_sticky", "gatherer", "lanes", "loop", "state")

    def __init__(self, state: TopicState, gatherer: Gatherer, batch_bytes: int) -> None:
        self.state = state
        self.gatherer = gatherer
        self.loop = gatherer.loop
        self.lanes = [gatherer.lane(state.topic, number) for number in range(state.partitions)]
        self._batch_bytes = batch_bytes
        self._sticky = self._next_sticky()

    def _next_sticky(self) -> int:
        """Any partition that has a leader; any at all while none has."""
        led = [number for number, address in enumerate(self.state.leaders) if address]
        self._sticky = random.choice(led or range(len(self.lanes)))
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
        """The lane whose batch is being gathered without keys; another one once that batch has gone."""
        lane = self.lanes[self._sticky]
        gathering = lane.gathering
        if gathering is None or gathering.size_bytes + size_bytes > self._batch_bytes:
            lane = self.lanes[self._next_sticky()]
        return lane

    def partitions(self, records: ManyRecords, start: int, stop: int) -> NDArray[np.int64]:
        """Of records start to stop, shape (stop - start,)."""
        keys = records.key_column(start, stop)
        if keys is None:
            return self._sticky_partitions(records.sizes[start:stop])
        partitions = partitions_of(keys, len(self.lanes))
        if keys.valid is not None:
            nulls = ~keys.valid
            partitions[nulls] = self._sticky_partitions(records.sizes[start:stop][nulls])
        return partitions

    def _sticky_partitions(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sticky partition until its batch is full, then another one, a batch full each."""
        gathering = self.lanes[self._sticky].gathering
        if gathering is None:
            self._next_sticky()
        begun = gathering.size_bytes if gathering is not None else 0
        turns = (np.cumsum(sizes) + begun - 1) // self._batch_bytes
        choices = [self._sticky, *(self._next_sticky() for _ in range(int(turns[-1]) if len(turns) else 0))]
        return np.array(choices, np.int64)[turns]
