"""Reads all files of a write-ahead log back at start-up: memory-mapped, one pass, keeping positions only."""

import logging
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

from shformat import (
    FRAME_HEADER_SIZE,
    WAL_FILE_HEADER_SIZE,
    DamagedSpan,
    FormatError,
    WalFrame,
    decode_wal_file_header,
    read_batch_header,
    scan_frames,
)

from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.core.buffer import WalPosition
from streamhouse_ingest.core.partition_log import LogKey
from streamhouse_ingest.core.replay import Replay
from streamhouse_ingest.core.wal_index import WalIndex
from streamhouse_ingest.ports import WrongIdentity

log = logging.getLogger(__name__)

_SECTOR_BYTES = 512
_OTHER_FILE = "the header says it is file"


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was found, the files it lies in, the sequence of the next file."""

    replay: Replay
    index: WalIndex
    next_sequence: int


def replay_directory(directory: WalDirectory, buffer_bytes_max: int) -> Replayed:
    """Reads every file. A torn tail of the last one is cut off; all other damage ends up in `replay.damage`.

    Raises WrongIdentity when a file belongs to another log, OSError.
    """
    replay, index = Replay(buffer_bytes_max), WalIndex()
    sequences = directory.sequences()
    for i, sequence in enumerate(sequences):
        missing_from = sequences[i - 1] + 1 if i else sequence
        for missing in range(missing_from, sequence):
            reason = f"{directory.file_path(missing)} is missing"
            replay.damaged(missing, 0, 0, reason, hides=_hides(directory, missing))
        _replay_file(directory, sequence, sequence == sequences[-1], replay, index)
    if directory.unsynced:
        log.warning("%s: it was not synced before every ack; offsets go on beyond the old ranges", directory.path)
        replay.torn()
    # The last file may just have been removed: a number left out would be a missing file at the next start.
    return Replayed(replay, index, max(directory.sequences(), default=sequences[-1] - 1 if sequences else 0) + 1)


def _hides(directory: WalDirectory, sequence: int) -> bool:
    """Whether damage in this file concerns ranges whose ends are not declared yet."""
    return sequence >= directory.settled_before()


def _replay_file(directory: WalDirectory, sequence: int, is_last: bool, replay: Replay, index: WalIndex) -> None:
    fd = os.open(directory.file_path(sequence), os.O_RDWR | os.O_CLOEXEC)
    try:
        size_bytes = os.fstat(fd).st_size
        good_end = size_bytes
        if size_bytes:
            with mmap.mmap(fd, size_bytes, access=mmap.ACCESS_READ) as buffer:
                good_end = _replay_frames(directory, sequence, buffer, is_last, replay, index)
        elif not is_last:
            replay.damaged(sequence, 0, 0, "the file is empty", hides=_hides(directory, sequence))
        if is_last and good_end < size_bytes:
            log.warning(
                "%s: torn tail of %d bytes cut off at byte %d",
                directory.file_path(sequence),
                size_bytes - good_end,
                good_end,
            )
            os.ftruncate(fd, good_end)
        if is_last:
            # A process that was killed may have written without syncing; retries are answered from what is found.
            os.fsync(fd)
    finally:
        os.close(fd)
    if good_end <= WAL_FILE_HEADER_SIZE and is_last:
        directory.file_path(sequence).unlink()  # created, but no group was ever written to it
        directory.sync()
    else:
        index.resize(sequence, good_end)


def _replay_frames(
    directory: WalDirectory, sequence: int, buffer: mmap.mmap, is_last: bool, replay: Replay, index: WalIndex
) -> int:
    """Adds the file's frames; returns where its good part ends."""
    header_damage = _check_header(directory, sequence, buffer)
    if header_damage is not None and is_last and len(buffer) <= WAL_FILE_HEADER_SIZE:
        return 0  # only just created: nothing is written before the header is synced
    if header_damage is not None:
        other_file = header_damage.startswith(_OTHER_FILE) and _hides(directory, sequence)
        replay.damaged(sequence, 0, WAL_FILE_HEADER_SIZE, header_damage, hides=other_file)
    tail: list[DamagedSpan] = []  # damage that no valid frame follows, so far
    for item in scan_frames(buffer):
        if isinstance(item, DamagedSpan):
            tail.append(item)
            continue
        _report(directory, sequence, tail, replay)
        tail.clear()
        _add(buffer, sequence, item, replay, index)
    if is_last and tail and _is_cut_off(tail, len(buffer)):
        return tail[0].at
    if is_last and tail and _lost_a_sector(buffer, tail[0].at):
        _report_torn(directory, sequence, tail[0], len(buffer), replay)
    else:
        _report(directory, sequence, tail, replay)
    return len(buffer)


def _is_cut_off(tail: Sequence[DamagedSpan], size_bytes: int) -> bool:
    """The file ends within a frame: so far the write came. Nothing that was synced can look like this."""
    first = tail[0]
    if first.lost is None:
        return first.size_bytes < FRAME_HEADER_SIZE
    return first.at + first.lost.size_bytes > size_bytes


def _lost_a_sector(buffer: mmap.mmap, at: int) -> bool:
    """Whether a sector holds nothing but zeros, as far as it lies behind byte `at` and before the file's end."""
    while at < len(buffer):
        end = at - at % _SECTOR_BYTES + _SECTOR_BYTES
        if not buffer[at:end].strip(b"\0"):
            return True
        at = end
    return False


def _report_torn(directory: WalDirectory, sequence: int, first: DamagedSpan, size_bytes: int, replay: Replay) -> None:
    """A power failure can leave the size of the last write and only some of its sectors. It stays in the file: it is
    looked at again at every start until a session has been opened."""
    if _hides(directory, sequence):
        path = directory.file_path(sequence)
        left = size_bytes - first.at
        log.warning("%s: the last %d bytes, from byte %d on, look like a torn write: ignored", path, left, first.at)
        replay.torn()


def _check_header(directory: WalDirectory, sequence: int, buffer: mmap.mmap) -> str | None:
    """What is wrong with the file's header. Raises WrongIdentity when it is sound and names another log."""
    try:
        header = decode_wal_file_header(buffer)
    except FormatError as error:
        return error.what
    if header.wal_id != directory.wal_id:
        raise WrongIdentity(
            f"{directory.file_path(sequence)}: belongs to log {header.wal_id.hex()}, this is {directory.wal_id.hex()}"
        )
    return None if header.sequence == sequence else f"{_OTHER_FILE} {header.sequence}"


def _add(buffer: mmap.mmap, sequence: int, frame: WalFrame, replay: Replay, index: WalIndex) -> None:
    key = LogKey(frame.topic_id, frame.partition, frame.epoch)
    try:
        header = read_batch_header(buffer, frame.batch_at)
    except FormatError as error:
        replay.damaged(sequence, frame.at, frame.size_bytes, error.what)
        replay.lost(key, frame.base_offset, frame.record_count)
        return
    position = WalPosition(sequence, frame.batch_at, frame.batch_size_bytes)
    replay.add(key, frame.base_offset, header, position)
    index.note(sequence, key, frame.base_offset + header.record_count)


def _report(directory: WalDirectory, sequence: int, spans: list[DamagedSpan], replay: Replay) -> None:
    path = directory.file_path(sequence)
    for span in spans:
        log.error("%s: %d damaged bytes at byte %d: %s", path, span.size_bytes, span.at, span.reason)
        # A span of another size than its frame's ends, or begins again, where nobody can say what followed.
        hides = span.lost is None or span.lost.size_bytes != span.size_bytes
        replay.damaged(sequence, span.at, span.size_bytes, span.reason, hides=hides and _hides(directory, sequence))
        if span.lost is not None:
            key = LogKey(span.lost.topic_id, span.lost.partition, span.lost.epoch)
            replay.lost(key, span.lost.base_offset, span.lost.record_count)
