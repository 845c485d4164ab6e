"""Writes and reads the files of a write-ahead log. Blocking: a single thread appends, others may read.

Owns: the open file, its end, the state `broken`. Does not own: the directory and its notes (wal_directory.py), replay.
Invariants: a group of frames is written as a whole or not at all; after a failed write the file is cut back to its last
good byte. Unless the cause was a lack of space or descriptors, the log is broken from then on, as after a failed fsync:
the content of the disk is unknown, and a second fsync can report success for pages that never reached the disk
(https://lwn.net/Articles/752063/).

Small groups are written over zeros that were synced before: their fdatasync then has no size to journal, which takes a
third of the time. docs/decisions/0017-small-groups-overwrite-zeros.md says why a replay can tell such zeros, and
unfinished groups, from damage.
"""

import errno
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from shformat import WAL_FILE_HEADER_SIZE, FormatError, check_batch, encode_frame_header, encode_wal_file_header
from shruntime import files

from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.log.buffer import WalPosition
from streamhouse_ingest.ports import SCARCE, Frame, Seen, WalBroken, WalDamaged, WalFileGone, WalFull

_IOV_MAX = os.sysconf("SC_IOV_MAX")
# Batches this close together share a single read: a seek costs about as much as reading 32 KiB.
_READ_GAP_BYTES = 32 * 1024
_READ_SPAN_BYTES = 1024 * 1024
# Zeros for later groups are written only with groups of at most a quarter of the space ahead. Zeros double the bytes
# written, and larger groups wait for the bandwidth of the disk rather than for its journal.
_SMALL_GROUP_SHARE = 4


class FileWal:
    """Appending side of the log. Files before `next_sequence` are only deleted; the newest of them is synced and has
    `previous_size_bytes` (0 if no file precedes).

    ahead_bytes: limit of the zeros behind the last frame; 0 appends every group at the end of the file. A value above 0
    requires fsync_each, because the first frame of a group tells a replay that everything before the group is synced.

    Invariants: the file holds frames up to `active_bytes`, then zeros up to `_file_end`. With space ahead, the first
    byte of a group is written last: while that byte is zero, nothing behind it counts.
    """

    def __init__(
        self,
        directory: WalDirectory,
        next_sequence: int,
        *,
        file_bytes: int,
        fsync_each: bool,
        previous_size_bytes: int = 0,
        ahead_bytes: int = 0,
    ) -> None:
        assert fsync_each or not ahead_bytes, "without a sync nothing tells groups apart"
        self._directory = directory
        self._previous_size_bytes = previous_size_bytes
        self._first_sequence = next_sequence
        self._next_sequence = next_sequence
        self._file_bytes = file_bytes
        self._fsync_each = fsync_each
        self._ahead_bytes = ahead_bytes
        self._zeros = memoryview(bytes(ahead_bytes))
        self._has_no_room_ahead = False
        self._fd = -1
        self._file_end = 0
        self._dirty = False
        # Set while a note of settled ranges has failed: the next file is not created before the note succeeds.
        self._has_to_settle = False
        self._broken: Exception | None = None
        self.active: int | None = None
        self.active_bytes = 0

    @property
    def broken(self) -> bool:
        return self._broken is not None

    def append(self, frames: Sequence[Frame]) -> list[WalPosition]:
        """Writes the group, syncs it if the policy is `fsync_each`, and returns the position of each batch, in order.

        Raises WalFull if nothing of the group was kept, WalBroken if the state of the file is unknown.
        """
        if self._broken is not None:
            raise WalBroken("the write-ahead log is broken") from self._broken
        parts = _encode(frames, mark_group=self._ahead_bytes > 0)
        size_bytes = sum(map(len, parts))
        self._make_room(size_bytes)
        assert self.active is not None
        self._write(parts, size_bytes)
        positions = _positions(parts, self.active, self.active_bytes)
        if self._fsync_each:
            self._sync()
        # Moved last: after a failed write `_cut_back` still knows the end of the last whole group.
        self.active_bytes += size_bytes
        return positions

    def sync(self) -> None:
        """Makes all groups written so far durable (policy `interval`). Raises WalBroken."""
        # A broken log is not synced again: the kernel took the failed pages for clean, and a second call would report
        # success.
        if self._dirty and self._broken is None:
            self._sync()

    def has_space_for_file(self) -> bool:
        """True if the disk has room for another file of full size now."""
        return self._directory.has_space(self._file_bytes)

    def delete(self, sequence: int) -> None:
        """Removes a file that is not active, durably; ignores a file that does not exist. Raises OSError.

        Files are removed oldest first, and each removal is durable before the next begins: a power cut that brought
        back an older file but not a younger file would look like a missing file, which is damage.
        """
        self._directory.file_path(sequence).unlink(missing_ok=True)
        self._directory.sync()

    def mark_settled(self) -> None:
        """Notes that the findings of the replay, in files before the first file of this process, have been reported to
        the coordinator. Raises OSError.

        After a failure no file is created until the note succeeds, so that old damage never makes the ends of newly
        written ranges uncertain.
        """
        self._has_to_settle = True
        self._directory.mark_settled(self._first_sequence)
        self._directory.mark_unsynced(False)
        self._has_to_settle = False

    def opening_token(self, address: str, drawn: str) -> str:
        """Returns the session token noted by an earlier process at `address` if no file was created since; otherwise
        notes `drawn` and returns it. Raises OSError."""
        return self._directory.opening_token(self._first_sequence, address, drawn)

    def mark_used(self) -> None:
        """Binds the log to its agent id for good. Raises OSError."""
        self._directory.mark_used()

    def note_history(self, seen: Seen) -> None:
        """Stores the metadata history and the position seen in it beside the log, durably. Raises OSError."""
        self._directory.note_history(seen)

    def close(self) -> None:
        """Syncs the active file, cuts off the space ahead and closes the file. Raises WalBroken, OSError.

        OSError means that the file itself is synced and closed, but the note beside it could not be written.
        """
        if self._fd >= 0:
            try:
                self.sync()
                self._cut_off_space_ahead()
                self._previous_size_bytes = self.active_bytes
                if not self._fsync_each and self._broken is None:
                    self._directory.mark_unsynced(False)
            finally:
                os.close(self._fd)
                self._fd, self.active = -1, None

    def _make_room(self, size_bytes: int) -> None:
        # A group stays in one file, also a group larger than wal_file_bytes: a group is written as a whole or not at
        # all.
        if self.active is not None and self.active_bytes > WAL_FILE_HEADER_SIZE:
            if self.active_bytes + size_bytes <= self._file_bytes:
                return
            try:
                self.close()
            except OSError as error:  # the file is whole and closed; only the note beside it could not be written
                raise self._failure(error, self._directory.path) from error
        if self.active is None:
            self._create()

    def _create(self) -> None:
        sequence = self._next_sequence
        path = self._directory.file_path(sequence)
        header = encode_wal_file_header(self._directory.wal_id, sequence, self._previous_size_bytes, self._ahead_bytes)
        # The notes come before the file: a replay that finds the file must find what it has to assume about it.
        try:
            self._directory.mark_used()
            if self._has_to_settle:
                self.mark_settled()
            if not self._fsync_each:
                self._directory.mark_unsynced(True)
            if self._ahead_bytes:
                self._directory.note_space_ahead()
            # O_EXCL: a file that has this number already may hold acknowledged records.
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, files.PRIVATE_FILE)
            try:
                if os.write(fd, header) != len(header):
                    raise OSError(errno.ENOSPC, "short write of the file header")
                # Header and name are durable before the first group: a replay may then take a file that ends within its
                # header for a file without groups.
                os.fsync(fd)
                self._directory.sync()
            except OSError:
                # The next try uses the same number and must find no file.
                os.close(fd)
                path.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._failure(error, path) from error
        self._fd, self.active, self.active_bytes, self._file_end = fd, sequence, len(header), len(header)
        self._has_no_room_ahead = False
        self._next_sequence = sequence + 1

    def _write(self, parts: list[bytes], size_bytes: int) -> None:
        self._dirty = True
        try:
            if self._ahead_bytes:
                self._write_group_ahead(parts, size_bytes)
            else:
                self._write_parts(parts, self.active_bytes)
                self._file_end = self.active_bytes + size_bytes
        except OSError as error:
            # Whole frames of a group that was refused must not stay: a replay would count them, and their producers
            # send them again.
            self._cut_back()
            raise self._failure(error, self._directory.file_path(self._next_sequence - 1)) from error

    def _write_parts(self, parts: Sequence[bytes | memoryview], at: int) -> None:
        for chunk in _chunks(parts):
            at += _write_all(self._fd, chunk, at)

    def _write_group_ahead(self, parts: list[bytes], size_bytes: int) -> None:
        """Writes the group, its first byte last.

        A kill in the middle of a write leaves any part of the group before zeros, as damage could. While the first byte
        is missing a replay knows that the group was never finished, and a single byte is either written or not.
        """
        at = self.active_bytes
        end = at + size_bytes
        first = memoryview(parts[0])
        self._write_parts([first[1:], *parts[1:]], at + 1)
        if end > self._file_end:
            self._file_end = end
            if size_bytes * _SMALL_GROUP_SHARE <= self._ahead_bytes:
                self._write_zeros(end, min(at + self._ahead_bytes, self._file_bytes))
        _write_all(self._fd, [first[:1]], at)

    def _write_zeros(self, start: int, end: int) -> None:
        """Writes the space ahead, from the end of the file.

        If the disk has no room for zeros, groups are appended until the next file: the remaining room is for groups.
        """
        if end <= start or self._has_no_room_ahead:
            return
        try:
            _write_all(self._fd, [self._zeros[: end - start]], start)
            self._file_end = end
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            # Gives the zeros that did fit back to the groups.
            os.ftruncate(self._fd, start)
            self._has_no_room_ahead = True

    def _cut_off_space_ahead(self) -> None:
        """Makes the file end with its last frame, durably, so that the header of the next file can declare its size."""
        if self._broken is not None or self._file_end <= self.active_bytes:
            return
        try:
            os.ftruncate(self._fd, self.active_bytes)
            os.fsync(self._fd)
        except OSError as error:
            self._broken = error
            raise WalBroken(f"cannot cut the space ahead off: {error}") from error
        self._file_end = self.active_bytes

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._fd, self.active_bytes)
        except OSError as error:
            self._broken = error
            raise WalBroken(f"cannot cut the failed group off: {error}") from error
        self._file_end = self.active_bytes

    def _failure(self, error: OSError, path: Path) -> WalFull | WalBroken:
        if error.errno in SCARCE:
            return WalFull(f"{path}: {error.strerror}")
        self._broken = error
        return WalBroken(f"{path}: {error}")

    def _sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._broken = error
            raise WalBroken(f"fdatasync of {self._directory.file_path(self._next_sequence - 1)}: {error}") from error
        self._dirty = False


def _encode(frames: Sequence[Frame], *, mark_group: bool) -> list[bytes]:
    """Returns frame headers and batches, alternating.

    mark_group: all frames but the first are marked as continuing the group.
    """
    parts: list[bytes] = []
    for frame in frames:
        topic_id, partition, epoch = frame.key
        place = (topic_id, partition, epoch, frame.base_offset, frame.record_count)
        parts.append(encode_frame_header(*place, frame.batch, continues=mark_group and bool(parts)))
        parts.append(frame.batch)
    return parts


def _chunks(parts: Sequence[bytes | memoryview]) -> list[Sequence[bytes | memoryview]]:
    # A system call takes IOV_MAX parts at most, and a group of small batches has more.
    return [parts[i : i + _IOV_MAX] for i in range(0, len(parts), _IOV_MAX)]


def _write_all(fd: int, parts: Sequence[bytes | memoryview], at: int) -> int:
    total = sum(map(len, parts))
    written = os.pwritev(fd, parts, at)
    while written < total:  # a short write: a signal arrived, or the disk is about to be full
        rest = memoryview(b"".join(parts))[written:]
        written += os.pwrite(fd, rest, at + written)
    return total


def _positions(parts: list[bytes], file: int, at: int) -> list[WalPosition]:
    positions = []
    for header, batch in zip(islice(parts, 0, None, 2), islice(parts, 1, None, 2), strict=True):
        at += len(header)
        positions.append(WalPosition(file, at, len(batch)))
        at += len(batch)
    return positions


class FileBatchReader:
    """Reads batches back by position; checks the CRC of each."""

    def __init__(self, directory: WalDirectory) -> None:
        self._directory = directory

    def read(self, positions: Sequence[WalPosition]) -> list[bytes]:
        """Returns the batches at `positions`, in the same order.

        Raises WalDamaged (also if the disk answers EIO), WalFileGone, OSError.
        """
        batches: list[bytes] = []
        for span in _spans(positions):
            batches += self._read_span(span)
        return batches

    def find_damaged(self, positions: Sequence[WalPosition]) -> list[WalPosition]:
        """Returns the positions whose batches are damaged in two reads; the second is from the disk, as far as the
        kernel drops the pages from its cache. Raises WalFileGone, OSError."""
        damaged = []
        for span in _spans(positions):
            try:
                self._read_span(span)
            except WalDamaged:
                # Bits may have flipped in the page cache alone: the disk decides before a batch counts as lost.
                self._forget_cached(span)
                damaged += [position for position in span if not self._can_read(position)]
        return damaged

    def _can_read(self, position: WalPosition) -> bool:
        try:
            self._read_span([position])
        except WalDamaged:
            return False
        return True

    def _forget_cached(self, span: Sequence[WalPosition]) -> None:
        fd = self._open(span[0].file)
        try:
            size_bytes = span[-1].at + span[-1].size_bytes - span[0].at
            os.posix_fadvise(fd, span[0].at, size_bytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def _open(self, file: int) -> int:
        path = self._directory.file_path(file)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise WalFileGone(str(path)) from error

    def _read_span(self, span: list[WalPosition]) -> list[bytes]:
        start, end = span[0].at, span[-1].at + span[-1].size_bytes
        fd = self._open(span[0].file)
        try:
            data = os.pread(fd, end - start, start)
        except OSError as error:
            # Only EIO says that the bytes are lost. Any other error, such as a lack of descriptors, says nothing about
            # the batch.
            if error.errno != errno.EIO:
                raise
            data = None
        finally:
            os.close(fd)
        if data is not None:
            return [self._checked(data, start, position) for position in span]
        if len(span) > 1:  # each batch alone: a bad sector must cost only the batches that lie in it
            return [batch for position in span for batch in self._read_span([position])]
        raise WalDamaged(self._directory.file_path(span[0].file).name, span[0], "the disk does not give it back")

    def _checked(self, data: bytes, start: int, position: WalPosition) -> bytes:
        batch = data[position.at - start : position.at - start + position.size_bytes]
        try:
            header = check_batch(batch)
        except FormatError as error:
            raise WalDamaged(self._directory.file_path(position.file).name, position, error.what) from error
        # A valid batch of another size is not the batch that was acknowledged at this position.
        if header.size_bytes != position.size_bytes:
            reason = f"batch of {header.size_bytes} bytes where one of {position.size_bytes} was written"
            raise WalDamaged(self._directory.file_path(position.file).name, position, reason)
        return batch


def _spans(positions: Sequence[WalPosition]) -> list[list[WalPosition]]:
    """Returns `positions` grouped into spans, each short and dense enough for a single read."""
    spans: list[list[WalPosition]] = []
    for position in positions:
        if spans:
            first, last = spans[-1][0], spans[-1][-1]
            gap = position.at - (last.at + last.size_bytes)
            near = position.file == last.file and 0 <= gap <= _READ_GAP_BYTES
            if near and position.at + position.size_bytes - first.at <= _READ_SPAN_BYTES:
                spans[-1].append(position)
                continue
        spans.append([position])
    return spans
