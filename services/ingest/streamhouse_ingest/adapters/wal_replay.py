"""Reads all files of a write-ahead log back at start-up: memory-mapped, one pass, keeping positions only."""

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
from streamhouse_ingest.log.replay import Replay, runs_of
from streamhouse_ingest.log.wal_index import WalIndex
from streamhouse_ingest.log.wal_tail import Tail, judge_tail
from streamhouse_ingest.ports import WrongIdentity

log = logging.getLogger(__name__)

_OTHER_FILE = "the header says it is file"
# Files are tried for what cannot be read in steps of this many bytes, then page by page where one fails.
_TRY_BYTES = 1024 * 1024
_PAGE_BYTES = 4096

# So many frames are added together: enough that what this costs at once does not count, 2 MB of them.
_FRAMES_TOGETHER = 4096

FileBytes = mmap.mmap | bytearray
ScannedItem = WalFrame | DamagedSpan


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was found, the files it lies in, the sequence of the next file and the size of the one before that (0 where
    there is none)."""

    replay: Replay
    index: WalIndex
    next_sequence: int
    previous_size_bytes: int


def replay_directory(directory: WalDirectory, buffer_bytes_max: int) -> Replayed:
    """Reads every file. A torn tail of the last one is cut off; all other damage ends up in `replay.damage`.

    Raises WrongIdentity when a file belongs to another log, OSError.
    """
    sequences = directory.sequences()
    if not sequences:
        directory.forget_files()
    files = _Files(directory, buffer_bytes_max)
    for i, sequence in enumerate(sequences):
        for missing in range(sequences[i - 1] + 1 if i else sequence, sequence):
            files.missing(missing)
        files.read(sequence, is_last=sequence == sequences[-1])
    if directory.unsynced:
        log.warning("%s: it was not synced before every ack; offsets go on beyond the old ranges", directory.path)
        files.replay.torn()
    # The last file may just have been removed: a number left out would be a missing file at the next start.
    next_sequence = max(directory.sequences(), default=sequences[-1] - 1 if sequences else 0) + 1
    return Replayed(files.replay, files.index, next_sequence, files.index.size_of(next_sequence - 1))


class _Files:
    """The files in their order, and what they amount to so far."""

    def __init__(self, directory: WalDirectory, buffer_bytes_max: int) -> None:
        self._directory = directory
        self._settled_before = directory.settled_before()
        self._cut_short = False  # the file read last lacks an end that the next one knows of
        self.replay = Replay(buffer_bytes_max)
        self.index = WalIndex()

    def missing(self, sequence: int) -> None:
        path = self._directory.file_path(sequence)
        self.replay.damaged(sequence, 0, 0, f"{path} is missing", hides=self._hides(sequence))

    def read(self, sequence: int, *, is_last: bool) -> None:
        fd = os.open(self._directory.file_path(sequence), os.O_RDWR | os.O_CLOEXEC)
        try:
            if is_last:
                _forget_cached(fd)
            size_bytes = os.fstat(fd).st_size
            good_end = self._read_open(fd, sequence, size_bytes, is_last=is_last)
        finally:
            os.close(fd)
        if is_last and good_end <= WAL_FILE_HEADER_SIZE and not self._cut_short:
            self._directory.file_path(sequence).unlink()  # created, but no group was ever written to it
            self._directory.sync()
        else:  # kept without a frame, too, if it is the witness of what the file before lacks
            self.index.resize(sequence, good_end if is_last else size_bytes)
            self._cut_short = not is_last and self._report_cut_short(sequence, size_bytes)

    def _read_open(self, fd: int, sequence: int, size_bytes: int, *, is_last: bool) -> int:
        """Adds the file's frames; returns where its good part ends. A torn tail is cut off."""
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
            os.ftruncate(fd, good_end)
            os.fsync(fd)
        return good_end

    def _declared_size(self, sequence: int) -> int | None:
        """Of this file, by the header of the next one; None where that does not say. What is wrong with that one is
        said when it is read itself."""
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
        """Whether the file was longer once. Cut off between two frames it looks as sound as any."""
        declared = self._declared_size(sequence)
        if declared is None or size_bytes >= declared:
            return False
        what = f"the file ends at byte {size_bytes}, the next one says that {declared} were written"
        log.error("%s: %s", self._directory.file_path(sequence), what)
        self.replay.damaged(sequence, size_bytes, declared - size_bytes, what, hides=self._hides(sequence))
        return True

    def _hides(self, sequence: int) -> bool:
        """Whether damage in this file concerns ranges whose ends are not declared yet."""
        return sequence >= self._settled_before

    def _read_frames(self, sequence: int, buffer: FileBytes, *, is_last: bool, is_readable: bool) -> int:
        """Adds the file's frames; returns where its good part ends."""
        header_damage = self._check_header(sequence, buffer)
        if header_damage is not None and is_last and len(buffer) <= WAL_FILE_HEADER_SIZE:
            return 0  # only just created: nothing is written before the header is synced
        if header_damage is not None:
            other_file = header_damage.startswith(_OTHER_FILE) and self._hides(sequence)
            self.replay.damaged(sequence, 0, WAL_FILE_HEADER_SIZE, header_damage, hides=other_file)
        # Elsewhere there is no space ahead: a file is cut back before the next one is begun. Where the disk gives zeros
        # for what it cannot read, zeros prove nothing.
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
        # At least a frame's header stays, or the next start would take it for one that was cut off.
        return min(max(written_end, first.at + FRAME_HEADER_SIZE), len(buffer))

    def _read_items(self, sequence: int, buffer: FileBytes, ahead_bytes: int) -> tuple[list[ScannedItem], int]:
        """Adds the file's frames; returns the tail, which no frame proves synced, and where the written part ends.

        The tail begins with damage. A frame that continues a group was synced together with what lies before it in the
        group, so that it proves nothing; groups are marked where `ahead_bytes` is not 0.
        """
        tail: list[ScannedItem] = []
        frames: list[WalFrame] = []  # valid, not added yet: nothing damaged lies between them
        for item in scan_frames(buffer):
            if isinstance(item, SpaceAhead):
                if ahead_bytes:
                    self._add(buffer, sequence, frames)
                    return tail, item.at
                item = DamagedSpan(item.at, item.size_bytes, "zeros")
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
        """Reports the damage among the items and adds the frames, in their order."""
        for is_damage, run in groupby(items, lambda item: isinstance(item, DamagedSpan)):
            if is_damage:
                self._report(sequence, [item for item in run if isinstance(item, DamagedSpan)])
            else:
                self._add(buffer, sequence, [item for item in run if isinstance(item, WalFrame)])

    def _check_header(self, sequence: int, buffer: FileBytes) -> str | None:
        """What is wrong with the file's header. Raises WrongIdentity when it is sound and names another log."""
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
        """Adds frames between which nothing is damaged; those that hold no batch are damage themselves."""
        if not frames:
            return
        try:
            headers = read_batch_headers(buffer, [frame.batch_at for frame in frames])
        except FormatError as error:
            if len(frames) == 1:
                self._add_damaged(sequence, frames[0], error.what)
            else:  # halves, down to the bad ones: the others stay many
                middle = len(frames) // 2
                self._add(buffer, sequence, frames[:middle])
                self._add(buffer, sequence, frames[middle:])
            return
        for key, run in runs_of(frames, headers):
            self.replay.add(key, sequence, run)
            self.index.note(sequence, key, max(run.ends()))

    def _add_damaged(self, sequence: int, frame: WalFrame, reason: str) -> None:
        self.replay.damaged(sequence, frame.at, frame.size_bytes, reason)
        key = RangeKey(frame.topic_id, frame.partition, frame.epoch)
        self.replay.lost(key, frame.base_offset, frame.record_count)

    def _report(self, sequence: int, spans: Sequence[DamagedSpan]) -> None:
        path = self._directory.file_path(sequence)
        for span in spans:
            log.error("%s: %d damaged bytes at byte %d: %s", path, span.size_bytes, span.at, span.reason)
            # A span of another size than its frame's ends, or begins again, where nobody can say what followed.
            hides = span.lost is None or span.lost.size_bytes != span.size_bytes
            hides = hides and self._hides(sequence)
            self.replay.damaged(sequence, span.at, span.size_bytes, span.reason, hides=hides)
            if span.lost is not None:
                key = RangeKey(span.lost.topic_id, span.lost.partition, span.lost.epoch)
                self.replay.lost(key, span.lost.base_offset, span.lost.record_count)

    def _report_torn(self, sequence: int, first: DamagedSpan, end: int) -> None:
        """A power failure can leave the size of the last write and only some of its sectors. It stays in the file: it
        is looked at again at every start until a session has been opened."""
        if self._hides(sequence):
            path = self._directory.file_path(sequence)
            left = end - first.at
            log.warning("%s: the last %d bytes, from byte %d on, look like a torn write: ignored", path, left, first.at)
            self.replay.torn()


def _forget_cached(fd: int) -> None:
    """What is read from here on comes from the disk, as far as the kernel takes advice.

    A process that was killed may have written without syncing, so that comes first: retries are answered from what is
    found. After an fsync that failed Linux holds pages that it takes for clean although they never reached the disk;
    reading them back would acknowledge, to a retry, what the next power failure takes away
    (https://wiki.postgresql.org/wiki/Fsync_Errors). Only the last file can be one of such a failure: none is begun
    before everything in the one before is synced. Raises OSError.
    """
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _bytes_of(fd: int, size_bytes: int, name: str) -> Iterator[tuple[FileBytes, Sequence[int]]]:
    """Yields the file, mapped, and where the pages lie that the disk does not give back. If there are any, the file is
    a copy with zeros in their place (a mapped one would kill the process): at the end of the last file they make a torn
    tail, elsewhere damage."""
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
    """Where the pages begin that cannot be read. What can be is in the page cache afterwards."""
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
    """Returns where a file with a torn tail ends from now on: before valid frames that lie behind the torn one.

    They are of the same group, which was not acknowledged: their producers send them again. A later start, for which
    the file is not the last one, would add them to the log a second time. The torn frame stays, so that the next start
    comes to the same conclusion.
    """
    first = tail[0]
    if not any(isinstance(item, WalFrame) for item in tail):
        return size_bytes
    lost = first.lost if isinstance(first, DamagedSpan) else None
    return min(first.at + (first.size_bytes if lost is None else lost.size_bytes), size_bytes)
