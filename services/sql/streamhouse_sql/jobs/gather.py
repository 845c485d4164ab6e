"""Reads the inputs of a job ahead, and cuts the records that have come into micro-batches.

Owns: a feed per partition, the records that are decoded and not taken yet. Does not own: how records are read (shread),
the boundaries once they are journalled.
Invariants: a micro-batch takes a gapless run of each partition, from where the one before has ended. A feed reads no
further while its job holds `sql_gather_bytes_max` of records. A partition is idle only if a read found its end, nothing
has come since, and nothing is waited for that exists.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import pyarrow as pa
from shproto.errors import DataLoss, StreamHouseError, UnknownTopic
from shproto.keys import PartitionKey
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shread.fetch import fetch
from shread.reads import Reads, Want
from shread.scan import ScanRange, scan
from shruntime.tasks import Backoff, cancel_and_wait, sleep_ms

from streamhouse_sql.arrow import schema_of
from streamhouse_sql.core.continuous.model import JobInput
from streamhouse_sql.jobs.micro_batch import (
    RANGES_MAX,
    InputPosition,
    MicroBatch,
    ReadRange,
    check_event_time_partitions,
)
from streamhouse_sql.jobs.patience import until_available
from streamhouse_sql.settings import SqlSettings
from streamhouse_sql.sources import decode_scan

log = logging.getLogger(__name__)

# Longest wait of a read at the end of a partition: a new record ends it, and so does news of why there is none.
POLL_MS = 1_000
# Decoded bytes of a read: less where many partitions share the bytes that a job may hold.
FETCH_BYTES_MAX = 4 * 1024 * 1024
FETCH_BYTES_MIN = 64 * 1024
# Records wait for a micro-batch under way, besides the one that is gathered.
READ_AHEAD_BATCHES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherLimits:
    """Limits of a micro-batch, and the time after which a partition without records is idle."""

    gather_ms: int
    rows_max: int
    bytes_max: int
    idle_after_ms: int

    @classmethod
    def of(cls, settings: SqlSettings) -> Self:
        """Returns the limits of the settings."""
        return cls(
            gather_ms=settings.sql_gather_ms,
            rows_max=settings.sql_gather_rows_max,
            bytes_max=settings.sql_gather_bytes_max,
            idle_after_ms=settings.sql_idle_after_ms,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Records of a micro-batch: a `pyarrow.Table` by name of the input, sorted by partition and offset."""

    ranges: tuple[ReadRange, ...]
    idle: tuple[tuple[str, int], ...]
    inputs: Mapping[str, Any]


class _Feed:
    """A partition of an input. `position`: behind the records that were taken. `reason`: why records that exist do not
    come now; empty: nothing is in the way."""

    def __init__(self, source: JobInput, key: PartitionKey, position: int) -> None:
        self.source = source
        self.key = key
        self.position = position
        self.next_offset = position  # of the read
        self.high_watermark = position
        self.chunks: deque[tuple[Any, int]] = deque()  # record batch, offset behind its range
        self.rows = 0
        self.size_bytes = 0
        self.reason = ""
        self.is_new = True
        self.at_end_since_ms: int | None = None

    def add(self, batches: Sequence[Any], next_offset: int) -> None:
        """Adds a read's records; the last chunk covers offsets without records, too."""
        self.next_offset = next_offset
        for at, batch in enumerate(batches):
            is_last = at == len(batches) - 1
            end = next_offset if is_last else int(batches[at + 1].column("_offset")[0].as_py())
            self._append(batch, end)

    def _append(self, batch: Any, end: int) -> None:
        self.chunks.append((batch, end))
        self.rows += batch.num_rows
        self.size_bytes += batch.nbytes

    def take(self, rows_max: int, bytes_max: int) -> tuple[list[Any], int]:
        """Takes whole chunks up to the limits, and a part of one where none fits. Returns their record batches and the
        offset behind them; there is something to take."""
        taken: list[Any] = []
        rows = size_bytes = 0
        end = self.position
        while self.chunks:
            batch, chunk_end = self.chunks[0]
            fits = rows + batch.num_rows <= rows_max and size_bytes + batch.nbytes <= bytes_max
            if not fits and taken:
                break
            if not fits:
                batch, chunk_end = self._cut(max(1, min(rows_max, batch.num_rows * bytes_max // max(1, batch.nbytes))))
            self.chunks.popleft()
            self.rows -= batch.num_rows
            self.size_bytes -= batch.nbytes
            rows += batch.num_rows
            size_bytes += batch.nbytes
            taken.append(batch)
            end = chunk_end
        self.position = end
        return taken, end

    def _cut(self, rows: int) -> tuple[Any, int]:
        """Cuts the first chunk behind `rows` rows, if it has more; returns the first part."""
        batch, end = self.chunks[0]
        if batch.num_rows <= rows:
            return batch, end
        rest = batch.slice(rows)
        self.chunks[0] = (rest, end)
        first = batch.slice(0, rows), int(rest.column("_offset")[0].as_py())
        self.size_bytes += first[0].nbytes + rest.nbytes - batch.nbytes
        self.chunks.appendleft(first)
        return first

    @property
    def lag(self) -> int:
        """Records that were not taken yet, as far as the end is known."""
        return max(0, self.high_watermark - self.next_offset) + self.rows


class Gather:
    """Inputs of a job, from `inputs` on. `failed`, awaited beside, raises the error of a feed."""

    def __init__(
        self,
        reads: Reads,
        decoders: Executor,
        sources: Sequence[JobInput],
        inputs: Mapping[str, InputPosition],
        limits: GatherLimits,
    ) -> None:
        self._reads = reads
        self._decoders = decoders
        self._sources = sources
        self._limits = limits
        self._feeds: dict[tuple[str, int], _Feed] = {}
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._inputs = dict(inputs)
        self._idle: tuple[tuple[str, int], ...] = ()

    async def close(self) -> None:
        """Ends all reads."""
        await cancel_and_wait(*self._tasks.values())

    @property
    def lag_records(self) -> int:
        """Records that were written to the inputs and not taken yet, as far as is known."""
        return sum(feed.lag for feed in self._feeds.values())

    @property
    def trouble(self) -> str:
        """Reason for which records that exist do not come, of one partition; empty: none."""
        return next((feed.reason for feed in self._feeds.values() if feed.reason), "")

    async def next(self) -> Gathered:
        """Returns the next records, once there are any, or once other partitions are idle than before. Raises the
        errors of reading: DataLoss, OffsetBelowStart, UnknownTopic, StatementFailed; StatementLimit."""
        while True:
            self._open_feeds()
            self._changed.clear()
            self._raise_errors()
            if any(feed.chunks for feed in self._feeds.values()):
                await self._wait_for_more()
                return self._take()
            idle = self._idle_now()
            if idle != self._idle:
                self._idle = idle
                return Gathered(ranges=(), idle=idle, inputs={})
            await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        """Returns when a feed has records or another state, or a partition may have become idle."""
        now_ms = self._reads.clock.monotonic_ms()
        due = [
            feed.at_end_since_ms + self._limits.idle_after_ms - now_ms
            for feed in self._feeds.values()
            if feed.source.has_watermark and feed.at_end_since_ms is not None
        ]
        later = [wait_ms for wait_ms in due if wait_ms > 0]
        try:
            # New partitions of a topic are looked for, too.
            async with asyncio.timeout(min([*later, POLL_MS]) / 1000):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _wait_for_more(self) -> None:
        """Waits for a micro-batch worth its fixed cost."""
        clock, limits = self._reads.clock, self._limits
        deadline_ms = clock.monotonic_ms() + limits.gather_ms
        while (left_ms := deadline_ms - clock.monotonic_ms()) > 0:
            rows = sum(feed.rows for feed in self._feeds.values())
            size_bytes = sum(feed.size_bytes for feed in self._feeds.values())
            if rows >= limits.rows_max or size_bytes >= limits.bytes_max:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(left_ms / 1000):
                    await self._changed.wait()
            except TimeoutError:
                return
            self._raise_errors()

    def _take(self) -> Gathered:
        ready = [feed for feed in self._feeds.values() if feed.chunks]
        # The emptiest first: the rest of their share is for the others.
        ready.sort(key=lambda feed: (feed.rows, feed.source.name, feed.key.partition))
        ready = ready[-RANGES_MAX:]
        rows_left, bytes_left = self._limits.rows_max, self._limits.bytes_max
        ranges: list[ReadRange] = []
        taken: list[tuple[str, int, list[Any]]] = []
        for at, feed in enumerate(ready):
            others = len(ready) - at
            start = feed.position
            batches, end = feed.take(max(1, rows_left // others), max(1, bytes_left // others))
            rows = sum(batch.num_rows for batch in batches)
            rows_left -= rows
            bytes_left -= sum(batch.nbytes for batch in batches)
            ranges.append(
                ReadRange(
                    input=feed.source.name,
                    partition=feed.key.partition,
                    offset_from=start,
                    offset_to=end,
                    records=rows,
                )
            )
            taken.append((feed.source.name, feed.key.partition, batches))
        self._taken.set()
        self._idle = self._idle_now()
        ranges.sort(key=lambda item: (item.input, item.partition))
        return Gathered(ranges=tuple(ranges), idle=self._idle, inputs=_tables(self._sources, taken))

    def _idle_now(self) -> tuple[tuple[str, int], ...]:
        now_ms = self._reads.clock.monotonic_ms()
        return tuple(
            sorted(
                place
                for place, feed in self._feeds.items()
                if feed.source.has_watermark
                and feed.at_end_since_ms is not None
                and not feed.chunks
                and now_ms - feed.at_end_since_ms >= self._limits.idle_after_ms
            )
        )

    # ---- feeds

    def _open_feeds(self) -> None:
        """Opens a feed for each partition that has none; a topic may get more. Raises UnknownTopic, StatementLimit."""
        topics = self._reads.index.topics()
        event_time = [source.topic for source in self._sources if source.has_watermark and source.topic in topics]
        check_event_time_partitions(sum(topics[topic].partitions for topic in event_time))
        for source in self._sources:
            entry = topics.get(source.topic)
            place = self._inputs[source.name]
            if entry is None or entry.topic_id.hex() != place.topic_id:
                raise UnknownTopic(f"topic {source.topic!r}, which the job reads, was deleted", topic=source.topic)
            for number in range(entry.partitions):
                if (source.name, number) in self._feeds:
                    continue
                key = PartitionKey(entry.topic_id, number)
                start = place.offsets.get(number)
                if start is None and number < place.first_partitions:
                    start = self._reads.index.get(key, source.topic).log_start_offset
                # A partition that came since is read from its first record, however late: records that retention
                # has taken from it are reported, not skipped.
                feed = self._feeds[source.name, number] = _Feed(source, key, start or 0)
                self._tasks[source.name, number] = asyncio.create_task(
                    self._read(feed), name=f"job input {source.topic}/{number}"
                )

    def _raise_errors(self) -> None:
        for task in self._tasks.values():
            if task.done():
                task.result()

    async def _read(self, feed: _Feed) -> None:
        """Reads a partition ahead. Ends with an error that no later read mends."""
        try:
            backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
            while True:
                await self._room()
                try:
                    await self._read_once(feed)
                    backoff.reset()
                except StreamHouseError as error:
                    if not error.retriable:
                        raise
                    feed.reason, feed.at_end_since_ms = error.message, None
                    await sleep_ms(backoff.next_ms())
        finally:
            self._changed.set()

    async def _room(self) -> None:
        while sum(feed.size_bytes for feed in self._feeds.values()) >= READ_AHEAD_BATCHES * self._limits.bytes_max:
            self._taken.clear()
            await self._taken.wait()

    async def _read_once(self, feed: _Feed) -> None:
        share = READ_AHEAD_BATCHES * self._limits.bytes_max // max(1, len(self._feeds))
        bytes_max = min(FETCH_BYTES_MAX, max(FETCH_BYTES_MIN, share))
        want = Want(
            partition=feed.key,
            topic=feed.source.topic,
            offset=feed.next_offset,
            bytes_max=bytes_max,
            bytes_min=1,
            # The first read only looks, so that it is known at once where the end is.
            max_wait_ms=0 if feed.is_new else POLL_MS,
            known_reason=feed.reason,
            decoded_bytes_max=bytes_max,
        )
        fetched = await fetch(self._reads, want)
        feed.is_new = False
        batches: list[Any] = []
        if fetched.batches:
            wanted = ScanRange(
                partition=feed.key,
                topic=feed.source.topic,
                offset_from=feed.next_offset,
                offset_to=fetched.next_offset,
            )
            loop = asyncio.get_running_loop()
            batches = await loop.run_in_executor(
                self._decoders, decode_scan, wanted, fetched.batches, feed.source.columns
            )
        feed.add(batches, fetched.next_offset)
        feed.next_offset = fetched.next_offset
        feed.high_watermark = max(feed.high_watermark, fetched.high_watermark, fetched.next_offset)
        feed.reason = fetched.waiting_reason
        if feed.reason or batches or fetched.next_offset < fetched.high_watermark:
            feed.at_end_since_ms = None
        if not feed.reason and fetched.next_offset >= fetched.high_watermark and feed.at_end_since_ms is None:
            feed.at_end_since_ms = self._reads.clock.monotonic_ms()
        self._changed.set()


async def read_again(
    reads: Reads,
    decoders: Executor,
    sources: Sequence[JobInput],
    places: Mapping[str, InputPosition],
    batch: MicroBatch,
) -> dict[str, Any]:
    """Returns the records of a micro-batch that was journalled, as `Gather.next` gave them. Waits for records that
    exist and cannot be read now. Raises DataLoss if there are others than then, and the errors of reading."""
    by_name = {source.name: source for source in sources}
    taken: list[tuple[str, int, list[Any]]] = []
    for item in batch.ranges:
        source = by_name[item.input]
        wanted = ScanRange(
            partition=PartitionKey(bytes.fromhex(places[item.input].topic_id), item.partition),
            topic=source.topic,
            offset_from=item.offset_from,
            offset_to=item.offset_to,
        )
        batches = await until_available(
            partial(_scanned, reads, decoders, wanted, source.columns),
            lambda error: log.info("micro-batch %d waits for its records: %s", batch.number, error.message),
        )
        records = sum(found.num_rows for found in batches)
        if records != item.records:
            raise DataLoss(
                f"{source.topic}/{item.partition}: offsets {item.offset_from} to {item.offset_to} had {item.records} "
                f"records when micro-batch {batch.number} was begun, and have {records} now",
                topic=source.topic,
                partition=item.partition,
            )
        taken.append((item.input, item.partition, batches))
    return _tables(sources, taken)


async def _scanned(reads: Reads, decoders: Executor, wanted: ScanRange, columns: Sequence[str]) -> list[Any]:
    loop = asyncio.get_running_loop()
    batches: list[Any] = []
    async for encoded in scan(reads, wanted, max_wait_ms=POLL_MS):
        batches += await loop.run_in_executor(decoders, decode_scan, wanted, encoded, columns)
    return batches


def _tables(sources: Sequence[JobInput], taken: Sequence[tuple[str, int, list[Any]]]) -> dict[str, Any]:
    """Returns the tables by name of the input, sorted by partition and offset."""
    tables = {}
    for source in sources:
        parts = sorted(((partition, batches) for name, partition, batches in taken if name == source.name))
        batches = [batch for _, found in parts for batch in found]
        if batches:
            tables[source.name] = pa.Table.from_batches(batches, schema=schema_of(source.columns))
    return tables
