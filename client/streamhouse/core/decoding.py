"""Decodes the response of a query service for a partition into portions for the application.

Owns: decoding, the joining of small neighbouring batches, the offset after a loss. Does not own: the cursor, which its
owner moves only over batches that passed the checks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shformat import BatchHeader, FormatError, Records, decode_batch, read_batch_header
from shproto.errors import DataLoss

from streamhouse.core.positions import BatchSpan, Cursor, Portion, check_continuity, trim
from streamhouse.records import RecordBatch

# Smaller batches are joined with their neighbours: handing a batch over costs about as much as copying 64 KiB.
SMALL_BATCH_BYTES = 64 * 1024
# Limit of a joined portion: about a block of a segment, the size in which larger batches arrive.
JOINED_BYTES_MAX = 1024 * 1024


@dataclass(slots=True, eq=False, kw_only=True)
class Encoded:
    """Batches that become one portion. decoded_bytes: their size once decoded, by their headers. end_offset, epoch: of
    the last batch."""

    batches: list[bytes]
    decoded_bytes: int
    end_offset: int
    epoch: int


def check_response(cursor: Cursor, encoded: Sequence[bytes], next_offset: int) -> list[Encoded]:
    """Returns the batches that continue at the cursor, up to `next_offset`. Decodes nothing: decoded, they may be
    hundreds of times as large.

    Raises DataLoss for bytes that are no batch and for missing records, Internal for offsets that go backwards.
    """
    headers = [_header(cursor, data) for data in encoded]
    # The checks come before any decoding: nothing of a response with a gap is handed over.
    spans = [BatchSpan(header.base_offset, header.end_offset, header.epoch) for header in headers]
    check_continuity(cursor, spans, next_offset)
    found: list[Encoded] = []
    joinable = False
    for data, header in zip(encoded, headers, strict=True):
        small = header.uncompressed_bytes < SMALL_BATCH_BYTES
        if small and joinable and found[-1].decoded_bytes + header.decoded_bytes <= JOINED_BYTES_MAX:
            joined = found[-1]
            joined.batches.append(data)
            joined.decoded_bytes += header.decoded_bytes
            joined.end_offset, joined.epoch = header.end_offset, header.epoch
        else:
            found.append(
                Encoded(
                    batches=[data], decoded_bytes=header.decoded_bytes, end_offset=header.end_offset, epoch=header.epoch
                )
            )
        joinable = small
    return found


def decode(cursor: Cursor, encoded: Encoded) -> Portion:
    """Returns the records from the cursor on. Raises DataLoss for damaged bytes."""
    parts = []
    for data in encoded.batches:
        try:
            parts.append(decode_batch(data))
        except FormatError as error:
            raise _damaged(cursor, error) from error
    parts[0] = trim(parts[0], cursor.fetch_offset)
    records = Records.concat(parts)
    batch = RecordBatch(*cursor.where, records) if len(records) else None
    return Portion(cursor=cursor, batch=batch, end_offset=encoded.end_offset, size_bytes=encoded.decoded_bytes)


def _header(cursor: Cursor, data: bytes) -> BatchHeader:
    try:
        return read_batch_header(data)
    except FormatError as error:
        raise _damaged(cursor, error) from error


def _damaged(cursor: Cursor, error: FormatError) -> DataLoss:
    """Returns the error for bytes that were damaged on their way, or in the store."""
    topic, partition = cursor.where
    return DataLoss(
        f"{topic}/{partition}: what was received for offset {cursor.fetch_offset} is damaged: {error}",
        topic=topic,
        partition=partition,
        base_offset=cursor.fetch_offset,
        at=error.at,
    )


def end_of_loss(error: DataLoss, cursor: Cursor) -> int:
    """Returns the offset at which records continue after a loss; 0 if the error has none beyond the cursor."""
    for name in ("next_offset", "end_offset"):
        digits = error.details.get(name, "")
        if digits.isdecimal() and int(digits) > cursor.fetch_offset:
            return int(digits)
    return 0
