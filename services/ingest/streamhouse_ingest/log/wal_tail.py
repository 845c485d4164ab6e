"""Judges the end of the last file of a write-ahead log: an unfinished write, a torn write, or damage.

Terms: a group is the frames written and synced together. The tail is the part of the file that no later group proves
synced; its beginning is a damaged span. docs/formats/wal.md ("The end of the last file") has the cases.
"""

from enum import Enum, auto

from shformat import FRAME_HEADER_SIZE, DamagedSpan
from shformat.batch_header import Buffer

_SECTOR_BYTES = 512


class Tail(Enum):
    """Kinds of the end of the last file."""

    UNFINISHED = auto()
    """No sync of these bytes ever returned: the tail is cut off."""

    TORN = auto()
    """Sectors are missing: most likely a torn write, possibly damage. The tail counts as neither written nor lost, and
    its offsets are never used again."""

    DAMAGED = auto()
    """All sectors were written, and their content has changed since."""


def judge_tail(buffer: Buffer, first: DamagedSpan, ahead_bytes: int) -> Tail:
    """Returns the kind of the tail that begins with `first`.

    `buffer` is the whole file; `ahead_bytes` comes from its header, 0 if groups were appended at the end of the file.
    """
    if ahead_bytes:
        return _judge_written_ahead(buffer, first, ahead_bytes)
    if _is_cut_off(first, len(buffer)):
        return Tail.UNFINISHED
    return Tail.TORN if _lost_a_sector(buffer, first.at, len(buffer)) else Tail.DAMAGED


def _judge_written_ahead(buffer: Buffer, first: DamagedSpan, ahead_bytes: int) -> Tail:
    # The first byte of a group is written last, by a separate call. If that byte is zero, either the call for the rest
    # of the group did not finish (a kill), or the sector never reached the disk: the group was not acknowledged.
    if not buffer[first.at]:
        zeros_end = first.at + ahead_bytes + 1
        is_longer = zeros_end <= len(buffer) and _is_zeros(buffer[first.at : zeros_end])
        return Tail.TORN if is_longer else Tail.UNFINISHED
    if _is_cut_off(first, len(buffer)):
        return Tail.UNFINISHED
    # Sectors behind the frame are not looked at: space ahead is zeros anyway.
    return Tail.TORN if _lost_a_sector(buffer, first.at, _end_of_frame(buffer, first)) else Tail.DAMAGED


def _end_of_frame(buffer: Buffer, first: DamagedSpan) -> int:
    """Returns the end of the frame at the start of the span; an estimate if the frame header is damaged, too."""
    if first.lost is not None:
        return first.at + first.lost.size_bytes
    return first.at + max(first.size_bytes, FRAME_HEADER_SIZE)


def _is_cut_off(first: DamagedSpan, size_bytes: int) -> bool:
    """True if the file ends within the frame, where the write was interrupted. No synced group can look like this."""
    frame_bytes = FRAME_HEADER_SIZE if first.lost is None else first.lost.size_bytes
    return first.at + frame_bytes > size_bytes


def _lost_a_sector(buffer: Buffer, at: int, end: int) -> bool:
    """True if a sector that overlaps [at, end) holds only zeros. Of the first sector only the bytes from `at` on count,
    of a sector at the end of the file only the bytes that exist."""
    while at < end:
        sector_end = at - at % _SECTOR_BYTES + _SECTOR_BYTES
        if _is_zeros(buffer[at:sector_end]):
            return True
        at = sector_end
    return False


def _is_zeros(data: Buffer) -> bool:
    return not bytes(data).strip(b"\0")
