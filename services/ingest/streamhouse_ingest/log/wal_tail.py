"""Decides what the end of the last file of a write-ahead log is: an unfinished write, a torn one, or damage.

Terms: a group is what is written and synced together. The tail is all that no later group proves synced: it begins with
a damaged span. docs/formats/wal.md ("The end of the last file") has the cases.
"""

from enum import Enum, auto

from shformat import FRAME_HEADER_SIZE, DamagedSpan
from shformat.batch_header import Buffer

_SECTOR_BYTES = 512


class Tail(Enum):
    UNFINISHED = auto()
    """No sync of it ever returned: it is cut off."""

    TORN = auto()
    """Sectors are missing: a torn write most likely, possibly damage. It counts as neither written nor lost, and no
    offset is used again."""

    DAMAGED = auto()
    """Everything that was written is there, and is not what was written."""


def judge_tail(buffer: Buffer, first: DamagedSpan, ahead_bytes: int) -> Tail:
    """Returns what the tail that begins with `first` is.

    `buffer` is the whole file; `ahead_bytes` stands in its header, 0 where groups were appended at the file's end.
    """
    if ahead_bytes:
        return _judge_written_ahead(buffer, first, ahead_bytes)
    if _is_cut_off(first, len(buffer)):
        return Tail.UNFINISHED
    return Tail.TORN if _lost_a_sector(buffer, first.at, len(buffer)) else Tail.DAMAGED


def _judge_written_ahead(buffer: Buffer, first: DamagedSpan, ahead_bytes: int) -> Tail:
    # The first byte of a group is written last, by a call of its own. While it is missing, the call before it did not
    # come to its end (a kill), or the sector has not reached the disk: the group was not acknowledged in either case.
    if not buffer[first.at]:
        zeros_end = first.at + ahead_bytes + 1
        is_longer = zeros_end <= len(buffer) and _is_zeros(buffer[first.at : zeros_end])
        return Tail.TORN if is_longer else Tail.UNFINISHED
    if _is_cut_off(first, len(buffer)):
        return Tail.UNFINISHED
    # Only as far as the frame goes: behind it are zeros anyway.
    return Tail.TORN if _lost_a_sector(buffer, first.at, _end_of_frame(buffer, first)) else Tail.DAMAGED


def _end_of_frame(buffer: Buffer, first: DamagedSpan) -> int:
    """Returns where the frame ends that the span begins with, as far as anybody can say: its header may be damaged."""
    if first.lost is not None:
        return first.at + first.lost.size_bytes
    return first.at + max(first.size_bytes, FRAME_HEADER_SIZE)


def _is_cut_off(first: DamagedSpan, size_bytes: int) -> bool:
    """The file ends within the frame: so far the write came. Nothing that was synced can look like this."""
    frame_bytes = FRAME_HEADER_SIZE if first.lost is None else first.lost.size_bytes
    return first.at + frame_bytes > size_bytes


def _lost_a_sector(buffer: Buffer, at: int, end: int) -> bool:
    """True if a sector with bytes from `at` to `end` holds nothing but zeros, as far as it lies behind `at` and before
    the file's end."""
    while at < end:
        sector_end = at - at % _SECTOR_BYTES + _SECTOR_BYTES
        if _is_zeros(buffer[at:sector_end]):
            return True
        at = sector_end
    return False


def _is_zeros(data: Buffer) -> bool:
    return not bytes(data).strip(b"\0")
