"""Positions of a consumer in its partitions, and the check that fetched batches continue there.

Owns: positions and the checks on offsets. Does not own: network, time, assignment.
Invariants: an ended cursor never becomes live again. Batches that go backwards, or skip offsets inside an epoch, are an
error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from shformat import Records
from shproto.errors import DataLoss, Internal

from streamhouse.records import RecordBatch, TopicPartition

# Records are made of columns a few at a time: when the turn of a partition ends, only a few were made in vain.
ROWS_FIRST, ROWS_MAX = 16, 256
# Limit of their bytes, which are copied.
ROWS_BYTES_MAX = 256 * 1024


class Position(NamedTuple):
    """A committed position: the next offset to read, in the topic with this id (empty: not known), and a note."""

    offset: int
    topic_id: bytes = b""
    metadata: str = ""


@dataclass(slots=True, eq=False, kw_only=True)
class Cursor:
    """Position in an assigned partition. A seek or a loss of the partition ends the cursor: `live` turns False for
    good.

    fetch_offset: everything below has been received. delivered: everything below was handed to the application.
    committed: last stored position; -1: none. end: where a bounded read stops; None: reads on. bound: highest value
    that `end` may have; None: any. failed: nothing is fetched until the application has seen the error or a pause is
    over. topic_id: id of the topic; empty: not known. received_bytes: decoded bytes received and not consumed.
    restarts: how often fetching began anew at another offset; responses to earlier requests are ignored. paused:
    nothing is fetched or handed over until the application resumes the partition. held: nothing is fetched until
    on_assigned has returned. stopped: paused or not live; a field, because it is read for every record.
    """

    where: TopicPartition
    fetch_offset: int
    delivered: int
    committed: int = -1
    high_watermark: int = -1
    log_start_offset: int = -1
    last_epoch: int = 0
    end: int | None = None
    bound: int | None = None
    topic_id: bytes = b""
    live: bool = True
    failed: bool = False
    failing_since_ms: float | None = None
    received_bytes: int = 0
    restarts: int = 0
    paused: bool = False
    held: bool = False
    stopped: bool = False

    @classmethod
    def at(
        cls, where: TopicPartition, offset: int, committed: int = -1, end: int | None = None, topic_id: bytes = b""
    ) -> "Cursor":
        """Returns a cursor at `offset`, from which nothing is received yet."""
        return cls(where=where, fetch_offset=offset, delivered=offset, committed=committed, end=end, topic_id=topic_id)

    def end_at(self, end: int | None) -> int | None:
        """Returns the end of a read that should stop at `end` (None: nowhere), limited by the cursor's bound."""
        if self.bound is None or end is None:
            return end if self.bound is None else self.bound
        return min(end, self.bound)

    def set_paused(self, paused: bool) -> None:
        """Pauses or resumes the partition."""
        self.paused = paused
        self.stopped = paused or not self.live

    def end_reading(self) -> None:
        """Ends the cursor for good."""
        self.live = False
        self.stopped = True

    @property
    def wants_more(self) -> bool:
        """True if records are to be fetched for the cursor."""
        is_open = self.live and not self.failed and not self.paused and not self.held
        return is_open and (self.end is None or self.fetch_offset < self.end or self.is_beyond)

    @property
    def is_beyond(self) -> bool:
        """True if a bounded read began behind its end, and no server has confirmed yet that such an offset exists."""
        return self.end is not None and self.delivered > self.end and self.high_watermark < self.delivered

    @property
    def at_end(self) -> bool:
        """True if a bounded read has handed over everything."""
        return self.end is not None and self.delivered >= self.end and not self.is_beyond


@dataclass(frozen=True, slots=True)
class BatchSpan:
    """Offsets [base_offset, end_offset) of an encoded batch, and the epoch in which the batch was written."""

    base_offset: int
    end_offset: int
    epoch: int


@dataclass(slots=True, eq=False, kw_only=True)
class Portion:
    """Received records of a partition that are not all handed over. `batch` None: only the position moves (a known
    gap). end_offset: the position after the portion. size_bytes: approximate memory; 0 once consumed. is_handed_over:
    the application has begun to take records."""

    cursor: Cursor
    batch: RecordBatch | None
    end_offset: int
    size_bytes: int = 0
    is_handed_over: bool = False

    def rows(self, count_max: int) -> tuple[RecordBatch | None, bool]:
        """Returns up to `count_max` of the records not handed over yet, or None if no records are left or the cursor
        has ended; and True if these are the last, which come as a single record."""
        rest = self.rest()
        # The last record comes alone: handing it over finishes the portion, and gives its room back, at once.
        if rest is None or len(rest) == 1:
            return rest, rest is not None
        fits = max(1, ROWS_BYTES_MAX * len(rest) // max(1, rest.size_bytes))
        return rest.slice(0, min(count_max, fits, len(rest) - 1)), False

    def rest(self) -> RecordBatch | None:
        """Returns the records not handed over yet; None if there are none, or the cursor has ended."""
        if self.batch is None or not self.cursor.live:
            return None
        start = int(np.searchsorted(self.batch.offsets, self.cursor.delivered))
        return self.batch.slice(start, len(self.batch)) if start < len(self.batch) else None

    def cut_at(self, offset: int) -> None:
        """Drops the records from `offset` on."""
        if self.batch is not None:
            stop = int(np.searchsorted(self.batch.offsets, offset))
            self.batch = self.batch.slice(0, stop) if stop else None
        self.end_offset = min(self.end_offset, offset)


def check_continuity(cursor: Cursor, spans: Sequence[BatchSpan], next_offset: int) -> None:
    """Checks that batches continue at the cursor. Offsets may be skipped only between two epochs' ranges, where the
    epoch changes. Raises Internal for offsets that go backwards, DataLoss for missing records."""
    expected, epoch = cursor.fetch_offset, cursor.last_epoch
    for position, span in enumerate(spans):
        # The server sends whole batches: the first may begin before the cursor.
        begins_before = position == 0 and span.base_offset < expected < span.end_offset
        if span.base_offset < expected and not begins_before:
            raise _backwards(cursor, expected, span.base_offset)
        # An epoch has no gaps; between two epochs the rest of a range may be unused. Epoch 0: not known after a seek.
        if span.base_offset > expected and epoch and span.epoch == epoch:
            raise _skipped(cursor, expected, span.base_offset)
        # Epochs own ascending ranges: an older epoch behind a newer one would be a record that changed its offset.
        if span.epoch < epoch:
            raise _backwards(cursor, expected, span.base_offset, f"; epoch {span.epoch} after {epoch}")
        expected, epoch = span.end_offset, span.epoch
    if next_offset < expected:
        raise _backwards(cursor, expected, next_offset)


def trim(records: Records, offset: int) -> Records:
    """Returns the records from `offset` on."""
    if not len(records) or int(records.offsets[0]) >= offset:
        return records
    return records.slice(int(np.searchsorted(records.offsets, offset)), len(records))


def _backwards(cursor: Cursor, expected: int, got: int, more: str = "") -> Internal:
    topic, partition = cursor.where
    return Internal(
        f"{topic}/{partition}: the server went back from offset {expected} to {got}{more}",
        topic=topic,
        partition=partition,
        expected=expected,
        got=got,
    )


def _skipped(cursor: Cursor, expected: int, got: int) -> DataLoss:
    topic, partition = cursor.where
    return DataLoss(
        f"{topic}/{partition}: the server sent offset {got} where {expected} comes next, without saying why",
        topic=topic,
        partition=partition,
        base_offset=expected,
        end_offset=got,
    )
