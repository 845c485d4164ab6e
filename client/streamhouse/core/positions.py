"""Where a consumer is in each partition, and whether what the server sends follows on.

Owns: positions and the checks on offsets. Does not own: the network, time, who is assigned what.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from shformat import Records
from shproto.errors import DataLoss, Internal

from streamhouse.core.accumulator import RECORD_OVERHEAD_BYTES
from streamhouse.records import Record, RecordBatch, TopicPartition


class Position(NamedTuple):
    """The next offset to read in a partition of the topic with this id (empty: not known)."""

    offset: int
    topic_id: bytes = b""


@dataclass(slots=True, eq=False)
class Cursor:
    """One assigned partition. A seek or a loss of the partition ends the cursor: `live` turns False for good.

    fetch_offset: everything below has been received. delivered: everything below was handed to the application.
    taken: everything below the application has done with (it asked for more since). committed: last stored; -1 never.
    end: where a bounded read stops; None reads on. failed: nothing is fetched, until the
    application has seen the error or a pause is over. topic_id: which topic of that name; empty: not known.
    """

    where: TopicPartition
    fetch_offset: int
    delivered: int
    taken: int
    committed: int = -1
    high_watermark: int = -1
    log_start_offset: int = -1
    last_epoch: int = 0
    end: int | None = None
    topic_id: bytes = b""
    live: bool = True
    failed: bool = False
    failing_since_ms: float | None = None

    @classmethod
    def at(
        cls, where: TopicPartition, offset: int, committed: int = -1, end: int | None = None, topic_id: bytes = b""
    ) -> "Cursor":
        return cls(where, offset, offset, offset, committed=committed, end=end, topic_id=topic_id)

    @property
    def wants_more(self) -> bool:
        """Whether to fetch for it."""
        return self.live and not self.failed and (self.end is None or self.fetch_offset < self.end or self.is_beyond)

    @property
    def is_beyond(self) -> bool:
        """Whether a bounded read began behind its end, and no server has said yet that there is such an offset."""
        return self.end is not None and self.delivered > self.end and self.high_watermark < self.delivered

    @property
    def at_end(self) -> bool:
        """Whether a bounded read has handed over everything."""
        return self.end is not None and self.delivered >= self.end and not self.is_beyond


@dataclass(frozen=True, slots=True)
class BatchSpan:
    """What one encoded batch's header says: offsets [base_offset, end_offset), written in `epoch`."""

    base_offset: int
    end_offset: int
    epoch: int


@dataclass(slots=True, eq=False)
class Portion:
    """Received and not handed over yet. `batch` None: only the position moves (a known gap). end_offset: the
    position after it. broken_off: an exception came between two of its records, Ctrl-C for example."""

    cursor: Cursor
    batch: RecordBatch | None
    end_offset: int
    broken_off: bool = False

    @property
    def size_bytes(self) -> int:
        """In memory, about: a record without key and value has an offset, a timestamp and lengths all the same."""
        batch = self.batch
        return batch.size_bytes + len(batch) * RECORD_OVERHEAD_BYTES if batch is not None else 0

    def records(self) -> Iterator[Record]:
        """One by one, with the positions kept; stops early once the cursor is no longer live."""
        cursor = self.cursor
        try:
            if self.batch is not None:
                for record in self.batch:
                    if not cursor.live:
                        return
                    after = record.offset + 1
                    cursor.delivered = after
                    yield record
                    cursor.taken = after
        except GeneratorExit:
            raise  # nobody wants the others as records
        except BaseException:
            self.broken_off = True
            cursor.delivered = cursor.taken  # whether the application got the last one is not known
            raise
        self.finish()

    def finish(self) -> None:
        """The application has done with all of it."""
        if self.cursor.live:
            self.cursor.delivered = self.cursor.taken = self.end_offset

    def rest(self) -> RecordBatch | None:
        """What of it was not handed over yet."""
        if self.batch is None or not self.cursor.live:
            return None
        start = int(np.searchsorted(self.batch.offsets, self.cursor.delivered))
        return self.batch.slice(start, len(self.batch)) if start < len(self.batch) else None

    def resume(self) -> None:
        """After it was broken off: what `records` gives from now on."""
        self.broken_off = False
        self.batch = self.rest()

    def cut_at(self, offset: int) -> "Portion":
        """Only what lies below `offset`."""
        batch = self.batch
        if batch is not None:
            stop = int(np.searchsorted(batch.offsets, offset))
            batch = batch.slice(0, stop) if stop else None
        return Portion(self.cursor, batch, min(self.end_offset, offset))


def check_continuity(cursor: Cursor, spans: Sequence[BatchSpan], next_offset: int) -> None:
    """Batches must go on where the cursor is. Offsets may only be passed over where the epoch changes, between two
    epochs' ranges. Raises Internal for offsets that go backwards, DataLoss for records that are missing."""
    expected, epoch = cursor.fetch_offset, cursor.last_epoch
    for position, span in enumerate(spans):
        begins_before = position == 0 and span.base_offset < expected < span.end_offset
        if span.base_offset < expected and not begins_before:
            raise _backwards(cursor, expected, span.base_offset)
        if span.base_offset > expected and epoch and span.epoch == epoch:
            raise _skipped(cursor, expected, span.base_offset)
        if span.epoch < epoch:
            raise _backwards(cursor, expected, span.base_offset, f"; epoch {span.epoch} after {epoch}")
        expected, epoch = span.end_offset, span.epoch
    if next_offset < expected:
        raise _backwards(cursor, expected, next_offset)


def trim(records: Records, offset: int) -> Records:
    """Without the records below `offset`."""
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
