"""What a query service sent for one partition, turned into portions for the application.

Owns: decoding, joining small batches, what an error says about where records go on. Does not own: the cursor, which
moves only once all of an answer is good.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

from shformat import FormatError, Records, decode_batch, read_batch_header
from shproto.errors import DataLoss

from streamhouse.core.positions import BatchSpan, Cursor, Portion, check_continuity, trim
from streamhouse.records import RecordBatch, TopicPartition

# Batches smaller than this on average are joined: handing one over costs about as much as copying 64 KiB.
SMALL_BATCH_BYTES = 64 * 1024


def portions_of(cursor: Cursor, encoded: Sequence[bytes], next_offset: int) -> tuple[list[Portion], int]:
    """What follows at the cursor, up to `next_offset`, and the epoch of the last batch (0 without one).

    Raises DataLoss for bytes that are no batch and records that are missing, Internal for offsets that go backwards.
    """
    offset = cursor.fetch_offset
    spans, parts = _decode(cursor, encoded)
    check_continuity(cursor, spans, next_offset)
    portions = [Portion(cursor, batch, end) for batch, end in _batches(cursor.where, parts, offset)]
    if next_offset > (portions[-1].end_offset if portions else offset):
        portions.append(Portion(cursor, None, next_offset))
    return portions, spans[-1].epoch if spans else 0


def end_of_loss(error: DataLoss, cursor: Cursor) -> int:
    """Where records go on after a loss; 0 when the error does not say, or nothing further on."""
    for name in ("next_offset", "end_offset"):
        digits = error.details.get(name, "")
        if digits.isdecimal() and int(digits) > cursor.fetch_offset:
            return int(digits)
    return 0


def _decode(cursor: Cursor, encoded: Iterable[bytes]) -> tuple[list[BatchSpan], list[Records]]:
    """Raises DataLoss for bytes that are no batch: damaged on their way, or in the store."""
    spans, parts = [], []
    for data in encoded:
        try:
            header = read_batch_header(data)
            parts.append(decode_batch(data))
        except FormatError as error:
            topic, partition = cursor.where
            raise DataLoss(
                f"{topic}/{partition}: what was received for offset {cursor.fetch_offset} is damaged: {error}",
                topic=topic,
                partition=partition,
                base_offset=cursor.fetch_offset,
                at=error.at,
            ) from error
        spans.append(BatchSpan(header.base_offset, header.end_offset, header.epoch))
    return spans, parts


def _batches(where: TopicPartition, parts: list[Records], offset: int) -> Iterable[tuple[RecordBatch, int]]:
    """(batch, end offset): the first trimmed to `offset`, small neighbours joined."""
    if not parts:
        return
    parts[0] = trim(parts[0], offset)
    for small, group in groupby(parts, lambda part: part.size_bytes < SMALL_BATCH_BYTES):
        for records in [Records.concat(list(group))] if small else group:
            if len(records):
                yield RecordBatch(*where, records), int(records.offsets[-1]) + 1
