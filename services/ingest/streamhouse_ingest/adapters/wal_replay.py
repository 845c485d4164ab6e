"""Reads all files of a write-ahead log back at start-up: memory-mapped, in a single pass, keeping positions only.

Terms: a group is the frames written and synced together. The tail of a file begins with damage behind which no frame
proves that the damaged bytes were synced. docs/formats/wal.md has the rules.
"""

import contextlib
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from shformat import (
    FRAME_HEADER_SIZE,
    WAL_FILE_HEADER_SIZE,
    DamagedSpan,
    FormatError,
    SpaceAhead,
    WalFrame,
    decode_wal_file_header,
    read_batch_headers,
    scan_frames,
)
from shproto.keys import RangeKey

from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.log.replay import Replay, frames_by_log
from streamhouse_ingest.log.wal_index import WalIndex
from streamhouse_ingest.log.wal_tail import Tail, judge_tail
from streamhouse_ingest.ports import WrongIdentity

log = logging.getLogger(__name__)

_OTHER_FILE = "the header says it is file"
# Files are tested for unreadable pages in steps of this many bytes; a step that fails is tested page by page.
_TRY_BYTES = 1024 * 1024
_PAGE_BYTES = 4096

# Frames added to the replay per call: enough that the fixed cost of a call is negligible; the objects take about 2 MB.
_FRAMES_TOGETHER = 4096

FileBytes = mmap.mmap | bytearray
ScannedItem = WalFrame | DamagedSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Result of a replay: its findings, the files with their end offsets, the sequence number of the next file, and the
    size of the file before that (0 if none)."""

    replay: Replay
    index: WalIndex
    next_sequence: int
    previous_size_bytes: int


def replay_directory(directory: WalDirectory, buffer_bytes_max: int) -> Replayed:
    """Reads every file and returns the findings. Cuts an unfinished write off the last file and removes that file if no
    group was ever written to it; all damage, missing files included, is in `replay.damage`.

    Raises WrongIdentity if a file belongs to another log, WalDirectoryError for a file name that is no sequence number,
    OSError.
    """
    sequences = directory.sequences()
    if not sequences:
        directory.forget_files()
    files = _Files(directory, buffer_bytes_max)
    for i, sequence in enumerate(sequences):
        for missing in range(sequences[i - 1] + 1 if i else sequence, sequence):
            files.missing(missing)
        # In the order of writing: a frame that overlaps offsets read before it is damage.
        files.read(sequence, is_last=sequence == sequences[-1])
    if directory.unsynced:
        log.warning("%s: it was not synced before every ack; offsets go on beyond the old ranges", directory.path)
        files.replay.torn()
    # The last file may have been removed above, then its number is used again: a skipped number would be reported as a
    # missing file at the next start.
    next_sequence = max(directory.sequences(), default=sequences[-1] - 1 if sequences else 0) + 1
    return Replayed(
        replay=files.replay,
        index=files.index,
        next_sequence=next_sequence,
        previous_size_bytes=files.index.size_of(next_sequence - 1),
    )


class _Files:
    """Reads the files in ascending order and collects `replay` and `index`."""

    def __init__(self, directory: WalDirectory, buffer_bytes_max: int) -> None:
        self._directory = directory
        self._settled_before = directory.settled_before()
        self._cut_short = False  # the file read last is shorter than the header of the next file declares
        self.replay = Replay(buffer_bytes_max)
        self.index = WalIndex()

    def missing(self, sequence: int) -> None:
        """Reports a file that should lie between two others as damage."""
        path = self._directory.file_path(sequence)
        self.replay.damaged(sequence, 0, 0, f"{path} is missing", hides=self._hides(sequence))

    def read(self, sequence: int, *, is_last: bool) -> None:
        """Adds the findings of a file. Cuts the last file at its last good frame, and removes it if no group was ever
        written to it. Raises OSError."""
        fd = os.open(self._directory.file_path(sequence), os.O_RDWR | os.O_CLOEXEC)
        try:
            if is_last:
                _forget_cached(fd)
            size_bytes = os.fstat(fd).st_size
            good_end = self._read_open(fd, sequence, size_bytes, is_last=is_last)
        finally:
            os.close(fd)
        if is_last and good_end <= WAL_FILE_HEADER_SIZE and not self._cut_short:
            self._directory.file_path(sequence).unlink()  # created, but no group was ever written to the file
            self._directory.sync()
        else:  # a file without frames is kept, too, if its header proves that the previous file was cut short
            self.index.resize(sequence, good_end if is_last else size_bytes)
            self._cut_short = not is_last and self._report_cut_short(sequence, size_bytes)

    def _read_open(self, fd: int, sequence: int, size_bytes: int, *, is_last: bool) -> int:
        """Adds the frames of the file and returns the end of its good part, in bytes. Truncates the last file there."""
        path = self._directory.file_path(sequence)
        if not size_bytes:
            if not is_last:
                self.replay.damaged(sequence, 0, 0, "the file is empty", hides=self._hides(sequence))
            return 0
        declared = None if is_last else self._declared_size(sequence)
        if declared is not None and size_bytes > declared:
            log.warning("%s: %d bytes beyond what was written in it are ignored", path, size_bytes - declared)
            size_bytes = declared
        with _bytes_of(fd, size_bytes, str(path)) as (buffer, unreadable):
            good_end = self._read_frames(sequence, buffer, is_last=is_last, is_readable=not unreadable)
        if is_last and good_end < size_bytes:
            # Durable before anything else is written: bytes that came back after a power failure would be read as
            # frames by a later start, for which this file is not the last.
            os.ftruncate(fd, good_end)
            os.fsync(fd)
        return good_end

    def _declared_size(self, sequence: int) -> int | None:
        """Returns the size of file `sequence` as declared in the header of the next file; None if that declares none.

        Damage of the next header is not reported here but when that file is read.
        """
        try:
            fd = os.open(self._directory.file_path(sequence + 1), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            header = decode_wal_file_header(os.pread(fd, WAL_FILE_HEADER_SIZE, 0))
        except (FormatError, OSError):
            return None
        finally:
            os.close(fd)
        if header.wal_id != self._directory.wal_id or header.sequence != sequence + 1:
            return None
        return header.previous_size_bytes or None

    def _report_cut_short(self, sequence: int, size_bytes: int) -> bool:
        """True if the file was longer when it was closed, which is reported as damage. A file cut off between two
        frames looks sound by itself."""
        declared = self._declared_size(sequence)
        if declared is None or size_bytes >= declared:
            return False
        what = f"the file ends at byte {size_bytes}, the next one says that {declared} were written"
        log.error("%s: %s", self._directory.file_path(sequence), what)
        self.replay.damaged(sequence, size_bytes, declared - size_bytes, what, hides=self._hides(sequence))
        return True

    def _hides(self, sequence: int) -> bool:
        """True if damage in this file may concern ranges whose ends are not declared yet."""
        return sequence >= self._settled_before

    def _read_frames(self, sequence: int, buffer: FileBytes, *, is_last: bool, is_readable: bool) -> int:
        """Adds the frames of the file and returns the end of its good part, in bytes."""
        header_damage = self._check_header(sequence, buffer)
        if header_damage is not None and is_last and len(buffer) <= WAL_FILE_HEADER_SIZE:
            return 0  # a crash during creation: no group is written before the header is synced
        # A damaged header of a file with frames costs no frame: each frame has its own checksum and key.
        if header_damage is not None:
            other_file = header_damage.startswith(_OTHER_FILE) and self._hides(sequence)
            self.replay.damaged(sequence, 0, WAL_FILE_HEADER_SIZE, header_damage, hides=other_file)
        # Only the last file can have space ahead: a file is cut back before the next is created. If pages could not be
        # read, zeros stand in their place and prove nothing.
        is_plain = not is_last or not is_readable or header_damage is not None
        ahead_bytes = 0 if is_plain else decode_wal_file_header(buffer).ahead_bytes
        tail, written_end = self._read_items(sequence, buffer, ahead_bytes)
        if not tail:
            return written_end
        first = tail[0]
        assert isinstance(first, DamagedSpan), "a tail begins with damage"
        judged = judge_tail(buffer, first, ahead_bytes) if is_last else Tail.DAMAGED
        if judged is Tail.UNFINISHED:
            path = self._directory.file_path(sequence)
            log.warning("%s: unfinished write of %d bytes cut off at byte %d", path, written_end - first.at, first.at)
            return first.at
        if judged is Tail.TORN:
            self._report_torn(sequence, first, written_end)
            return _end_of_torn(tail, len(buffer))
        self._settle(sequence, buffer, tail)
        # At least a frame header stays, or the next start would take the frame for an unfinished write.
        return min(max(written_end, first.at + FRAME_HEADER_SIZE), len(buffer))

    def _read_items(self, sequence: int, buffer: FileBytes, ahead_bytes: int) -> tuple[list[ScannedItem], int]:
        """Adds the frames of the file; returns the tail and the end of the written part, in bytes.

        The tail begins with damage, and no frame proves it synced. A frame that begins a group proves that everything
        before the group was synced. A frame that continues a group was synced together with the frames before it, so it
        proves nothing. Groups are marked only if `ahead_bytes` is not 0.
        """
        tail: list[ScannedItem] = []
        frames: list[WalFrame] = []  # valid frames not added yet, without damage between them
        for item in scan_frames(buffer):
            if isinstance(item, SpaceAhead):
                if ahead_bytes:
                    self._add(buffer, sequence, frames)
                    return tail, item.at
                item = DamagedSpan(at=item.at, size_bytes=item.size_bytes, reason="zeros")
            if isinstance(item, DamagedSpan):
                self._add(buffer, sequence, frames)
                frames = []
                tail.append(item)
                continue
            if tail and ahead_bytes and item.continues:
                tail.append(item)
                continue
            if tail:
                self._settle(sequence, buffer, tail)
                tail = []
            frames.append(item)
            if len(frames) == _FRAMES_TOGETHER:
                self._add(buffer, sequence, frames)
                frames = []
        self._add(buffer, sequence, frames)
        return tail, len(buffer)

    def _settle(self, sequence: int, buffer: FileBytes, items: Sequence[ScannedItem]) -> None:
        """Reports the damaged spans among `items` and adds the frames, in order."""
        for is_damage, run in groupby(items, lambda item: isinstance(item, DamagedSpan)):
            if is_damage:
                self._report(sequence, [item for item in run if isinstance(item, DamagedSpan)])
            else:
                self._add(buffer, sequence, [item for item in run if isinstance(item, WalFrame)])

    def _check_header(self, sequence: int, buffer: FileBytes) -> str | None:
        """Returns the damage of the file header, None if it is sound. Raises WrongIdentity if a sound header names
        another log."""
        try:
            header = decode_wal_file_header(buffer)
        except FormatError as error:
            return error.what
        ours = self._directory.wal_id
        if header.wal_id != ours:
            path = self._directory.file_path(sequence)
            raise WrongIdentity(f"{path}: belongs to log {header.wal_id.hex()}, this is {ours.hex()}")
        return None if header.sequence == sequence else f"{_OTHER_FILE} {header.sequence}"

    def _add(self, buffer: FileBytes, sequence: int, frames: Sequence[WalFrame]) -> None:
        """Adds frames without damage between them; reports a frame that holds no valid batch as damage."""
        if not frames:
            return
        try:
            headers = read_batch_headers(buffer, [frame.batch_at for frame in frames])
        except FormatError as error:
            if len(frames) == 1:
                self._add_damaged(sequence, frames[0], error.what)
            else:  # bisect down to the bad frames, so that the good frames are still added many at a time
                middle = len(frames) // 2
                self._add(buffer, sequence, frames[:middle])
                self._add(buffer, sequence, frames[middle:])
            return
        for key, columns in frames_by_log(frames, headers):
            self.replay.add(key, sequence, columns)
            self.index.note(sequence, key, max(columns.ends()))

    def _add_damaged(self, sequence: int, frame: WalFrame, reason: str) -> None:
        self.replay.damaged(sequence, frame.at, frame.size_bytes, reason)
        key = RangeKey(frame.topic_id, frame.partition, frame.epoch)
        self.replay.lost(key, frame.base_offset, frame.record_count)

    def _report(self, sequence: int, spans: Sequence[DamagedSpan]) -> None:
        path = self._directory.file_path(sequence)
        for span in spans:
            log.error("%s: %d damaged bytes at byte %d: %s", path, span.size_bytes, span.at, span.reason)
            # If the damaged span and its frame differ in size, frames may be missing behind the span, and the ends of
            # their ranges with them.
            hides = span.lost is None or span.lost.size_bytes != span.size_bytes
            hides = hides and self._hides(sequence)
            self.replay.damaged(sequence, span.at, span.size_bytes, span.reason, hides=hides)
            if span.lost is not None:
                key = RangeKey(span.lost.topic_id, span.lost.partition, span.lost.epoch)
                self.replay.lost(key, span.lost.base_offset, span.lost.record_count)

    def _report_torn(self, sequence: int, first: DamagedSpan, end: int) -> None:
        """Reports the last write as torn: a power failure can leave its size but only some of its sectors.

        The bytes stay in the file, and every start reports them again until a session has been opened.
        """
        if self._hides(sequence):
            path = self._directory.file_path(sequence)
            left = end - first.at
            log.warning("%s: the last %d bytes, from byte %d on, look like a torn write: ignored", path, left, first.at)
            self.replay.torn()


def _forget_cached(fd: int) -> None:
    """Syncs the file and drops its pages from the cache, as far as the kernel takes advice, so that they are read from
    the disk. Raises OSError.

    A killed process may have written without syncing, so the sync comes first: retries are answered from the frames
    found here. After a failed fsync Linux takes pages for clean although they never reached the disk; a retry answered
    from such pages would acknowledge records that the next power failure undoes
    (https://wiki.postgresql.org/wiki/Fsync_Errors). Only the last file can have such pages: a file is created only
    after everything in the previous file is synced.
    """
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _bytes_of(fd: int, size_bytes: int, name: str) -> Iterator[tuple[FileBytes, Sequence[int]]]:
    """Yields the content of the file and the byte positions of unreadable pages.

    The file is mapped if all pages can be read. Otherwise the content is a copy with zeros in place of those pages,
    because access to an unreadable page of a mapping would kill the process (SIGBUS). The zeros make a torn tail at the
    end of the last file, and damage elsewhere.
    """
    unreadable = list(_unreadable(fd, size_bytes))
    if not unreadable:
        with mmap.mmap(fd, size_bytes, access=mmap.ACCESS_READ) as mapped:
            yield mapped, ()
        return
    log.error("%s: %d pages cannot be read, the first at byte %d", name, len(unreadable), unreadable[0])
    copy, holes = bytearray(size_bytes), set(unreadable)
    for at in range(0, size_bytes, _PAGE_BYTES):
        if at not in holes:
            part = os.pread(fd, min(_PAGE_BYTES, size_bytes - at), at)
            copy[at : at + len(part)] = part
    yield copy, unreadable


def _unreadable(fd: int, size_bytes: int) -> Iterator[int]:
    """Yields the byte positions of pages that cannot be read; all other pages are in the page cache afterwards."""
    for at in range(0, size_bytes, _TRY_BYTES):
        if not _can_read(fd, min(_TRY_BYTES, size_bytes - at), at):
            pages = range(at, min(at + _TRY_BYTES, size_bytes), _PAGE_BYTES)
            yield from (page for page in pages if not _can_read(fd, min(_PAGE_BYTES, size_bytes - page), page))


def _can_read(fd: int, size_bytes: int, at: int) -> bool:
    try:
        return len(os.pread(fd, size_bytes, at)) == size_bytes
    except OSError as error:
        log.error("reading %d bytes at byte %d failed: %s", size_bytes, at, error)
        return False


def _end_of_torn(tail: Sequence[ScannedItem], size_bytes: int) -> int:
    """Returns the byte at which a file with a torn tail ends from now on: before valid frames behind the torn frame.

    Such frames belong to the same group, which was not acknowledged, so their producers send them again. A later start,
    for which the file is no longer the last, would add them to the log a second time. The torn frame stays, so that the
    next start comes to the same conclusion.
    """
    first = tail[0]
    if not any(isinstance(item, WalFrame) for item in tail):
        return size_bytes
    lost = first.lost if isinstance(first, DamagedSpan) else None
    return min(first.at + (first.size_bytes if lost is None else lost.size_bytes), size_bytes)
