"""The write-ahead log's bytes: the header of a file, the frame around a batch, and the scan of a file.

Owns: the definition of a valid frame, and the search for the next frame after damage. Does not own: files, fsync, the
decision which damage may be cut off as a torn tail. docs/formats/wal.md draws both headers.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .batch_header import BATCH_HEADER_SIZE, Buffer
from .errors import FormatError
from .limits import DEFAULT_LIMITS, INT64_MAX, UINT32_MAX, FormatLimits

WAL_MAGIC = b"SHWL"
# Files without space ahead are still written as version 2, which earlier releases read.
WAL_VERSION = 3
WAL_ID_SIZE = 16
TOPIC_ID_SIZE = 16

# magic, version, flags or space ahead, wal id, sequence, since version 2: size of the previous file | crc of all that
_FILE_BODY = struct.Struct("<4sHH16sQQ")
_FILE = struct.Struct("<4sHH16sQQI")
_FILE_V1 = struct.Struct("<4sHH16sQI")
WAL_FILE_HEADER_SIZE = 44
WAL_FILE_HEADER_SIZE_V1 = 36
_FILE_HEADER_SIZES = {1: WAL_FILE_HEADER_SIZE_V1, 2: WAL_FILE_HEADER_SIZE, 3: WAL_FILE_HEADER_SIZE}
_VERSION_WITHOUT_AHEAD = 2
WAL_AHEAD_UNIT_BYTES = 4096
WAL_AHEAD_BYTES_MAX = 0xFFFF * WAL_AHEAD_UNIT_BYTES
assert _FILE.size == WAL_FILE_HEADER_SIZE == _FILE_BODY.size + 4
assert _FILE_V1.size == WAL_FILE_HEADER_SIZE_V1

# 0xF5 occurs in no UTF-8 text, so a search for the magic does not stop inside records that are text.
FRAME_MAGIC = b"\xf5SHF"
# Two CRCs, since a damaged batch behind an intact header still says which offsets are lost, and where to go on.
# magic, header crc | batch crc, frame size, topic id, partition, record count, epoch, base offset
_FRAME = struct.Struct("<4sIII16sIIQq")
_FRAME_LEAD = struct.Struct("<4sI")
_FRAME_BODY = struct.Struct("<II16sIIQq")
FRAME_HEADER_SIZE = 56
_FRAME_BODY_AT = 8
# Bit of the frame size, since version 3. Sizes have at most 25 bits.
_CONTINUES = 1 << 31
assert _FRAME.size == FRAME_HEADER_SIZE == _FRAME_BODY_AT + _FRAME_BODY.size
assert _FRAME_LEAD.size == _FRAME_BODY_AT

# Frames that fail may overlap only if forged frames were stored inside damaged ones. Beyond this many times the
# buffer's size such a frame is believed only if an intact header follows it: time stays linear.
_WASTED_CRC_FACTOR = 4

_PIECE_BYTES = 64 * 1024

_FIND_MAGIC = re.compile(re.escape(FRAME_MAGIC))
_NIL = bytes(TOPIC_ID_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class WalFileHeader:
    """Identity of a log (16 bytes, constant on a disk) and number of this file, counted up by the writer.

    previous_size_bytes: size of the file before this file when this file was begun; 0 for the first file and in version
    1, which has no such field. ahead_bytes: at most so many zeros lie behind the last frame while the file is written;
    0 in versions 1 and 2. size_bytes: of this header.
    """

    wal_id: bytes
    sequence: int
    previous_size_bytes: int = 0
    version: int = _VERSION_WITHOUT_AHEAD
    ahead_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        return _FILE_HEADER_SIZES[self.version]


class WalFrame(NamedTuple):
    """A frame whose checksums hold. Positions are bytes from the start of the scanned buffer; sizes in bytes.
    batch_crc is the header's. continues: the frame was written together with the one before, so it does not prove
    that one synced."""

    topic_id: bytes
    partition: int
    epoch: int
    base_offset: int
    record_count: int
    at: int
    size_bytes: int
    batch_at: int
    batch_size_bytes: int
    batch_crc: int
    continues: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedSpan:
    """Bytes that are not a valid frame. ``lost`` is set if the frame's own header is intact: it names the partition
    and the offsets that can no longer be read."""

    at: int
    size_bytes: int
    reason: str
    lost: WalFrame | None = None


@dataclass(frozen=True, slots=True)
class SpaceAhead:
    """Zeros at the end of a version 3 file, at most as many as its header allows, before any group was written
    there. In a file that is no longer written they are damage."""

    at: int
    size_bytes: int


# ---- file header


def encode_wal_file_header(wal_id: bytes, sequence: int, previous_size_bytes: int = 0, ahead_bytes: int = 0) -> bytes:
    """Returns the first WAL_FILE_HEADER_SIZE bytes of a file: version 2 without space ahead, else version 3, which
    declares `ahead_bytes` rounded up to whole units.

    wal_id: 16 non-zero bytes. sequence: a u63. previous_size_bytes: 0 or the size of a file with a header. ahead_bytes:
    0 to WAL_AHEAD_BYTES_MAX. Raises FormatError otherwise.
    """
    _check_id("wal id", wal_id, 8)
    _check_range("sequence", sequence, 0, INT64_MAX, 24)
    _check_previous(previous_size_bytes)
    _check_range("space ahead", ahead_bytes, 0, WAL_AHEAD_BYTES_MAX, 6)
    version = WAL_VERSION if ahead_bytes else _VERSION_WITHOUT_AHEAD
    units = -(-ahead_bytes // WAL_AHEAD_UNIT_BYTES)
    body = _FILE_BODY.pack(WAL_MAGIC, version, units, wal_id, sequence, previous_size_bytes)
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode_wal_file_header(buffer: Buffer) -> WalFileHeader:
    """Returns the header at the start of `buffer`, of version 1, 2 or 3. Raises FormatError."""
    if len(buffer) < WAL_FILE_HEADER_SIZE_V1:
        raise FormatError(f"WAL file header: {len(buffer)} of {WAL_FILE_HEADER_SIZE} bytes")
    # By the layout of version 1: later versions have these five fields at the same places.
    magic, version, flags, wal_id, sequence, _ = _FILE_V1.unpack_from(buffer)
    if magic != WAL_MAGIC:
        raise FormatError(f"WAL file magic is {magic!r}, expected {WAL_MAGIC!r}")
    if version not in _FILE_HEADER_SIZES:
        raise FormatError(f"WAL file version is {version}, this reader knows 1 to {WAL_VERSION}", 4)
    # Only the version is believed before the CRC, because it says where the CRC is.
    crc_at = _check_file_crc(buffer, _FILE_HEADER_SIZES[version])
    if version < WAL_VERSION and flags:
        raise FormatError(f"WAL file flags are {flags:#06x}, must be 0", 6)
    if version == WAL_VERSION and not flags:
        raise FormatError("WAL file declares no space ahead, version 3 has some", 6)
    _check_id("wal id", wal_id, 8)
    _check_range("sequence", sequence, 0, INT64_MAX, 24)
    previous_size_bytes = 0 if version == 1 else int.from_bytes(buffer[crc_at - 8 : crc_at], "little")
    _check_previous(previous_size_bytes)
    ahead_bytes = flags * WAL_AHEAD_UNIT_BYTES
    return WalFileHeader(
        wal_id=wal_id,
        sequence=sequence,
        previous_size_bytes=previous_size_bytes,
        version=version,
        ahead_bytes=ahead_bytes,
    )


def _check_file_crc(buffer: Buffer, size_bytes: int) -> int:
    """Returns the position of the CRC of a header of this size. Raises FormatError."""
    if len(buffer) < size_bytes:
        raise FormatError(f"WAL file header: {len(buffer)} of {size_bytes} bytes")
    at = size_bytes - 4
    computed, declared = zlib.crc32(memoryview(buffer)[:at]), int.from_bytes(buffer[at:size_bytes], "little")
    if computed != declared:
        raise FormatError(f"WAL file header CRC is {computed:#010x}, the header says {declared:#010x}", at)
    return at


def _check_previous(size_bytes: int) -> None:
    if size_bytes:
        _check_range("previous size", size_bytes, WAL_FILE_HEADER_SIZE_V1, INT64_MAX, 32)


def frames_start(buffer: Buffer, limits: FormatLimits = DEFAULT_LIMITS) -> int:
    """Returns the position of the first frame of a file.

    Frames begin behind the file's header. If that is damaged, they begin at an intact frame header behind the header of
    some version, else behind the header of the version that the file names, else behind that of the newest version.
    """
    try:
        return decode_wal_file_header(buffer).size_bytes
    except FormatError:
        with memoryview(buffer) as view:
            scan = _Scan(buffer, view, limits)
            sizes = _FILE_HEADER_SIZES.values()
            named = _FILE_HEADER_SIZES.get(int.from_bytes(view[4:6], "little"), WAL_FILE_HEADER_SIZE)
            return next((size for size in sizes if scan.is_header(size)), named)


# ---- frames


def encode_frame_header(
    topic_id: bytes,
    partition: int,
    epoch: int,
    base_offset: int,
    record_count: int,
    batch: Buffer,
    *,
    continues: bool = False,
) -> bytes:
    """Returns the FRAME_HEADER_SIZE bytes to be written right before `batch`; their CRCs cover both.

    topic_id: 16 bytes, not all zero. partition: u32. epoch: 1 to 2**63-1. continues: not the first frame of a group; in
    version 3 files only. Raises FormatError otherwise, for offsets that leave int64, and for a batch too short or too
    long to be valid.
    """
    _check_id("topic id", topic_id, 16)
    _check_range("partition", partition, 0, UINT32_MAX, 32)
    _check_range("record count", record_count, 1, UINT32_MAX, 36)
    _check_range("epoch", epoch, 1, INT64_MAX, 40)
    _check_range("base offset", base_offset, 0, INT64_MAX - record_count, 48)
    size_bytes = FRAME_HEADER_SIZE + len(batch)
    _check_range("frame size", size_bytes, FRAME_HEADER_SIZE + BATCH_HEADER_SIZE, _CONTINUES - 1, 12)
    size = size_bytes | _CONTINUES if continues else size_bytes
    body = _FRAME_BODY.pack(zlib.crc32(batch), size, topic_id, partition, record_count, epoch, base_offset)
    return _FRAME_LEAD.pack(FRAME_MAGIC, zlib.crc32(body)) + body


def scan_frames(
    buffer: Buffer, start: int | None = None, limits: FormatLimits = DEFAULT_LIMITS
) -> Iterator[WalFrame | DamagedSpan | SpaceAhead]:
    """Yields every valid frame of a file in order, and every damaged stretch between them, without a gap.

    Begins at `start`, by default frames_start(). In a file of version 3 the last item may be the space ahead. A damaged
    stretch ends at the next intact frame header, or at the end of the buffer; a frame with an intact header and a
    damaged batch is a stretch of its own. Never raises on content. A search compares header checksums only, so time
    stays linear in the size of the buffer, garbage or not.
    """
    with memoryview(buffer) as view:
        scan = _Scan(buffer, view, limits, _ahead_bytes(buffer))
        yield from scan.frames(frames_start(buffer, limits) if start is None else start)


def _ahead_bytes(buffer: Buffer) -> int:
    try:
        return decode_wal_file_header(buffer).ahead_bytes
    except FormatError:
        return 0


class _Scan:
    """A single pass over a buffer. Owns the budget of work that failed checks may still cost."""

    __slots__ = ("_ahead_at", "_batch_bytes_max", "_buffer", "_view", "_wasted_bytes_left")

    def __init__(self, buffer: Buffer, view: memoryview, limits: FormatLimits, ahead_bytes: int = 0) -> None:
        self._buffer = buffer
        self._view = view
        self._batch_bytes_max = limits.batch_bytes_max
        self._wasted_bytes_left = _WASTED_CRC_FACTOR * len(view)
        # The space ahead begins here or, behind a frame that ends in zeros, after that frame.
        self._ahead_at = _zeros_from(view, max(0, len(view) - ahead_bytes))

    def frames(self, start: int) -> Iterator[WalFrame | DamagedSpan | SpaceAhead]:
        at, size = start, len(self._view)
        while at < size:
            if at >= self._ahead_at:
                yield SpaceAhead(at, size - at)
                return
            frame = self._header_at(at)
            if isinstance(frame, str):
                span = DamagedSpan(at=at, size_bytes=self._next_header(at + 1) - at, reason=frame)
                yield span
                at += span.size_bytes
                continue
            reason = self._damage(frame)
            if reason is None:
                yield frame
                at += frame.size_bytes
            else:
                end = at + frame.size_bytes
                # A frame cut short and written over is shorter than it says. If its size is right, frames that a
                # producer stored in its records are skipped with it, and not taken for frames of the log.
                if not self._is_boundary(end):
                    end = self._next_header(at + 1)
                yield DamagedSpan(at=at, size_bytes=end - at, reason=reason, lost=frame)
                at = end

    def _header_at(self, at: int) -> WalFrame | str:
        """Returns the frame whose intact header is at `at`, its batch unread, or the reason why there is none."""
        view = self._view
        if len(view) - at < FRAME_HEADER_SIZE:
            return f"{len(view) - at} bytes, a frame header takes {FRAME_HEADER_SIZE}"
        fields = _FRAME.unpack_from(view, at)
        magic, header_crc, batch_crc, size_bytes, topic_id, partition, record_count, epoch, base_offset = fields
        continues = size_bytes >= _CONTINUES
        if continues:
            size_bytes -= _CONTINUES
        if magic != FRAME_MAGIC:
            return f"frame magic is {magic!r}, expected {FRAME_MAGIC!r}"
        batch_at = at + FRAME_HEADER_SIZE
        if zlib.crc32(view[at + _FRAME_BODY_AT : batch_at]) != header_crc:
            return "frame header CRC does not match"
        batch_size_bytes = size_bytes - FRAME_HEADER_SIZE
        # A right CRC does not make the header ours: records may hold forged frames. So each field is bounded.
        if not BATCH_HEADER_SIZE <= batch_size_bytes <= self._batch_bytes_max:
            return f"frame holds {batch_size_bytes} bytes, must be {BATCH_HEADER_SIZE} to {self._batch_bytes_max}"
        if (
            topic_id == _NIL
            or not record_count
            or not 1 <= epoch <= INT64_MAX
            or not 0 <= base_offset <= INT64_MAX - record_count
        ):
            return f"frame fields: epoch {epoch}, record count {record_count}, base offset {base_offset}"
        place = (topic_id, partition, epoch, base_offset, record_count, at)
        return WalFrame(*place, size_bytes, batch_at, batch_size_bytes, batch_crc, continues)

    def _damage(self, frame: WalFrame) -> str | None:
        """Returns the fault in the batch of a frame whose header is intact, or None."""
        view, end = self._view, frame.at + frame.size_bytes
        if end > len(view):
            return f"frame of {frame.size_bytes} bytes, {len(view) - frame.at} are there"
        if self._wasted_bytes_left <= 0 and not self._is_boundary(end):
            return "batch not checked: too many overlapping frames failed before it"
        computed = zlib.crc32(view[frame.batch_at : end])
        if computed == frame.batch_crc:
            return None
        self._wasted_bytes_left -= frame.size_bytes
        return f"batch CRC is {computed:#010x}, the frame says {frame.batch_crc:#010x}"

    def _is_boundary(self, at: int) -> bool:
        """True if the buffer, or its written part, ends at `at`, or if an intact header starts there."""
        return at == len(self._view) or self._ahead_at <= at < len(self._view) or self.is_header(at)

    def is_header(self, at: int) -> bool:
        """True if an intact frame header starts at `at`."""
        return at < len(self._view) and not isinstance(self._header_at(at), str)

    def _next_header(self, start: int) -> int:
        """Returns the position of the first intact header at or after `start`, or the end of the written part."""
        at = _find_magic(self._buffer, start)
        while at >= 0:
            if self.is_header(at):
                return at
            at = _find_magic(self._buffer, at + 1)
        return max(start, self._ahead_at)


def _zeros_from(view: memoryview, low: int) -> int:
    """Returns the position, at or after `low`, of the zeros that end the buffer."""
    end = len(view)
    while end > low:
        piece = bytes(view[max(low, end - _PIECE_BYTES) : end])
        kept = len(piece.rstrip(b"\0"))
        if kept:
            return end - len(piece) + kept
        end -= len(piece)
    return end


def _find_magic(buffer: Buffer, start: int) -> int:
    # A memoryview has no find(); a regular expression searches it without a copy.
    if not isinstance(buffer, memoryview):
        return buffer.find(FRAME_MAGIC, start)
    found = _FIND_MAGIC.search(buffer, start)
    return found.start() if found else -1


def _check_id(name: str, value: bytes, at: int) -> None:
    if len(value) != TOPIC_ID_SIZE or value == _NIL:
        raise FormatError(f"{name} is {value!r}, must be {TOPIC_ID_SIZE} bytes, not all zero", at)


def _check_range(name: str, value: int, low: int, high: int, at: int) -> None:
    if not low <= value <= high:
        raise FormatError(f"{name} is {value}, must be {low} to {high}", at)
