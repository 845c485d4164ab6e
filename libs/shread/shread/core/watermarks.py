"""Latest known acknowledged end of each partition, from the leaders' answers."""

from __future__ import annotations

from shcluster.index import PartitionIndex
from shproto.keys import PartitionKey


class Watermarks:
    """Keeps epoch and high watermark per partition. Invariant: both only grow."""

    def __init__(self) -> None:
        self._seen: dict[PartitionKey, tuple[int, int]] = {}

    def learn(self, key: PartitionKey, epoch: int, high_watermark: int) -> None:
        """Notes an answer of the leader in `epoch`; an older answer changes nothing."""
        self._seen[key] = max(self._seen.get(key, (0, 0)), (epoch, high_watermark))

    def of(self, partition: PartitionIndex) -> int:
        """Returns the partition's high watermark, as far as known here."""
        epoch, offset = self._seen.get(partition.key, (0, 0))
        newest = partition.ranges[-1] if partition.ranges else None
        # The end of an older epoch says nothing of the newest range, which begins beyond it.
        if newest is None or newest.end_offset is not None or newest.epoch != epoch:
            return partition.known_end
        return max(offset, partition.known_end)
