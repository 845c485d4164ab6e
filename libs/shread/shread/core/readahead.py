"""Detects sequential readers, and sizes the download ahead of them."""

from __future__ import annotations

from collections import OrderedDict

from shproto.keys import PartitionKey

# Readers remembered: two per partition of a cluster of 4,000 partitions; each costs about 200 bytes.
READERS_MAX = 8192
# At this count the window is that of the largest setting, 64 chunks; a reader may go on for years.
_DOUBLINGS_MAX = 6


class ReadAhead:
    """Windows that double with every read that continues an earlier read, up to `chunks_max`."""

    def __init__(self, chunks_max: int) -> None:
        self._chunks_max = chunks_max
        self._expected: OrderedDict[tuple[PartitionKey, int], int] = OrderedDict()

    def observe(self, partition: PartitionKey, offset: int, next_offset: int) -> int:
        """Returns the chunks to fetch ahead after a read of [offset, next_offset); 0 for a reader that jumped here."""
        # Reads carry no name of a reader: one that continues is known by its offset.
        streak = self._expected.pop((partition, offset), 0)
        self._expected[partition, next_offset] = streak + 1
        # The first is the reader that has not read for longest, as each read moves its entry to the end.
        if len(self._expected) > READERS_MAX:
            self._expected.popitem(last=False)
        return min(self._chunks_max, 1 << min(streak - 1, _DOUBLINGS_MAX)) if streak else 0
