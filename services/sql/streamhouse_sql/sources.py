"""Topics as tables: record batches are read and decoded ahead of DuckDB, which takes them in its own threads.

Owns: the feeds that a statement has open. Does not own: how records are read (shread), DuckDB.
Invariants: each time that a plan reads a table, it reads the same offsets from the start. At most FEED_STEPS decoded
steps of a feed wait. A feed that failed has its error in `Sources.error`: DuckDB passes on only a text. After `close`
no feed runs, and a thread that still takes from one gets an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import pyarrow as pa
from shformat import FormatError, Records, decode_batches
from shproto.errors import DataLoss
from shread.reads import Reads
from shread.scan import ScanRange, scan
from shruntime.tasks import cancel_and_wait

from streamhouse_sql import telemetry
from streamhouse_sql.ahead import Ahead
from streamhouse_sql.arrow import schema_of, to_arrow
from streamhouse_sql.core.binding import TopicScan
from streamhouse_sql.decoding import decode_table, decoded_schema

# The batch that DuckDB works on comes on top: reading, decoding and computing overlap, and memory stays at some steps.
FEED_STEPS = 2
# Encoded bytes of batches that are decoded together; a segment's block of 1 MiB has more, most often.
GROUP_BYTES = 64 * 1024


class ScanCounts:
    """Counts of a statement."""

    def __init__(self) -> None:
        self.records = 0
        self.size_bytes = 0


class Sources:
    """The tables of a statement. `decoders`: threads that decode."""

    def __init__(self, reads: Reads, decoders: Executor, *, read_wait_ms: int) -> None:
        self._reads = reads
        self._decoders = decoders
        self._read_wait_ms = read_wait_ms
        self._feeds: list[Ahead[list[Any]]] = []
        self._is_closed = False
        self.counts = ScanCounts()
        self.error: BaseException | None = None

    def table(self, ranges: Sequence[ScanRange], topic: TopicScan) -> Table:
        """Returns a table of these ranges of a scan. Its methods are for DuckDB's threads."""
        loop = asyncio.get_running_loop()
        names = topic.columns or ("_offset",)  # count(*) names none
        decode = None if topic.table is None else partial(decode_table, topic.table, columns=topic.fields)

        async def open_feed() -> Ahead[list[Any]]:
            if self._is_closed:
                raise asyncio.CancelledError
            feed = Ahead(self._batches(ranges, names, decode), FEED_STEPS, "sql feed")
            self._feeds.append(feed)
            return feed

        schema = schema_of(names)
        if topic.table is not None:
            schema = decoded_schema(topic.table, schema, topic.fields)
        return Table(schema, open_feed, loop)

    async def close(self) -> None:
        """Ends all feeds."""
        self._is_closed = True
        feeds, self._feeds = self._feeds, []
        await cancel_and_wait(*(feed.task for feed in feeds))

    async def _batches(
        self, ranges: Sequence[ScanRange], columns: Sequence[str], decode: Callable[[Any], Any] | None
    ) -> AsyncGenerator[list[Any]]:
        loop = asyncio.get_running_loop()
        try:
            for wanted in ranges:
                async for batches in scan(self._reads, wanted, max_wait_ms=self._read_wait_ms):
                    size_bytes = sum(map(len, batches))
                    self.counts.size_bytes += size_bytes
                    telemetry.bytes_scanned.add(size_bytes)
                    decoded = await loop.run_in_executor(self._decoders, decode_scan, wanted, batches, columns, decode)
                    records = sum(batch.num_rows for batch in decoded)
                    self.counts.records += records
                    telemetry.records_scanned.add(records)
                    yield decoded
        except Exception as error:
            self.error = self.error or error
            raise


class Table:
    """A topic for DuckDB (ports.Source)."""

    def __init__(self, schema: Any, open_feed: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._schema = schema
        self._open_feed = open_feed
        self._loop = loop

    def __arrow_c_schema__(self) -> Any:
        return self._schema.__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        reader = pa.RecordBatchReader.from_batches(self._schema, self._batches())
        return reader.__arrow_c_stream__(requested_schema)

    def _batches(self) -> Iterator[Any]:
        feed = asyncio.run_coroutine_threadsafe(self._open_feed(), self._loop).result()
        while (step := asyncio.run_coroutine_threadsafe(feed.next(), self._loop).result()) is not None:
            yield from step


def decode_scan(
    wanted: ScanRange, batches: Sequence[bytes], columns: Sequence[str], decode: Callable[[Any], Any] | None = None
) -> list[Any]:
    """Returns the records of the range as `pyarrow.RecordBatch`es, their values decoded by `decode` if it is given.
    Raises DataLoss, StatementFailed, StatementLimit."""
    decoded = []
    for group in _groups(batches):
        try:
            records = decode_batches(group)
        except FormatError as error:  # its CRC was right, so its writer wrote an invalid batch
            raise DataLoss(
                f"{wanted.topic}/{wanted.partition.partition}: records cannot be decoded: {error}",
                topic=wanted.topic,
                partition=wanted.partition.partition,
            ) from error
        records = _within(records, wanted)
        if len(records):
            batch = to_arrow(wanted.topic, wanted.partition.partition, records, columns)
            decoded.append(batch if decode is None else decode(batch))
    return decoded


def _groups(batches: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Yields the batches, small ones together. A large one alone is decoded without a copy: its columns are views into
    what was decompressed, while those of several are joined in new memory. Small ones, as of a leader's tail, cost more
    as batches of their own than as a copy."""
    group: list[bytes] = []
    size_bytes = 0
    for batch in batches:
        if group and size_bytes + len(batch) > GROUP_BYTES:
            yield group
            group, size_bytes = [], 0
        group.append(batch)
        size_bytes += len(batch)
    if group:
        yield group


def _within(records: Records, wanted: ScanRange) -> Records:
    """Returns the records inside of the range's offsets: the first and the last block may hold others."""
    first = int(records.offsets.searchsorted(wanted.offset_from))
    last = int(records.offsets.searchsorted(wanted.offset_to))
    return records if last - first == len(records) else records.slice(first, last)
