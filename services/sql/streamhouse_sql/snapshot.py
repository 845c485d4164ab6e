"""Ranges that a query reads: up to the high watermarks as they are when it starts.

Invariant: a topic that a query reads twice has the same ends in both reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from shcluster.index import PartitionIndex
from shproto.errors import StreamHouseError, Unavailable, UnknownTopic
from shproto.keys import PartitionKey
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shread.lookups import Lookups
from shread.reads import Reads
from shread.scan import ScanRange
from shruntime.tasks import Backoff, cancel_and_wait, retry

from streamhouse_sql.core.binding import Pushdown, TopicScan

# Leaders asked at once.
LOOKUPS_AT_ONCE = 8


class Snapshot:
    """High watermarks of the topics of a statement."""

    def __init__(self, reads: Reads, *, read_wait_ms: int) -> None:
        self._reads = reads
        self._lookups = Lookups(reads)
        self._read_wait_ms = read_wait_ms
        self._slots = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        self._ends: dict[PartitionKey, int] = {}

    async def take(self, scans: Sequence[TopicScan]) -> None:
        """Notes the ends of all partitions that the scans need. Raises Unavailable while an end is unknown for longer
        than `read_wait_ms`; UnknownTopic."""
        wanted = {part.key: part for scan in scans for part in self._partitions(scan)}
        tasks = [asyncio.ensure_future(self._note_end(part)) for part in wanted.values()]
        try:
            for task in tasks:
                await task
        finally:
            await cancel_and_wait(*tasks)

    def ranges(self, scan: TopicScan, timestamp_min_ms: int | None) -> list[ScanRange]:
        """Returns the ranges that a scan reads; `take` came before. Partitions come in their order."""
        found = []
        for partition in self._partitions(scan):
            low = max(partition.log_start_offset, scan.pushdown.offset_min or 0)
            high = self._ends[partition.key]
            if scan.pushdown.offset_max is not None:
                high = min(high, scan.pushdown.offset_max)
            if low < high:
                found.append(
                    ScanRange(
                        partition=partition.key,
                        topic=scan.topic,
                        offset_from=low,
                        offset_to=high,
                        timestamp_min_ms=timestamp_min_ms,
                    )
                )
        return found

    async def _note_end(self, partition: PartitionIndex) -> None:
        clock = self._reads.clock
        deadline_ms = clock.monotonic_ms() + self._read_wait_ms

        def is_final(error: StreamHouseError) -> bool:
            return not isinstance(error, Unavailable) or clock.monotonic_ms() >= deadline_ms

        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        async with self._slots:
            end, _ = await retry(lambda: self._lookups.latest(partition.key, partition.topic), backoff, is_final)
        self._ends[partition.key] = end

    def _partitions(self, scan: TopicScan) -> list[PartitionIndex]:
        cluster = self._reads.index.cluster
        entry = cluster.topics.get(scan.topic)
        if entry is None:
            raise UnknownTopic(f"topic {scan.topic!r} was deleted", topic=scan.topic)
        return [
            cluster.partitions[PartitionKey(entry.topic_id, number)]
            for number in range(entry.partitions)
            if _is_wanted(scan.pushdown, number)
        ]


def _is_wanted(pushdown: Pushdown, partition: int) -> bool:
    return pushdown.partitions is None or partition in pushdown.partitions


def oldest_needed_ms(pushdown: Pushdown, value_of: Callable[[str], int | None]) -> int | None:
    """Returns the timestamp in ms below which no record is needed; None: all may be. `value_of` returns the value of a
    constant."""
    found = [value for text in pushdown.timestamps_min if (value := value_of(text)) is not None]
    # A constant with microseconds is cut down to its ms, so records of that ms are kept: the query's own WHERE decides.
    return max(found, default=None)
