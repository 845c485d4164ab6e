"""The file beside the log that notes the metadata history and the last position the agent has seen in it.

Owns: the file and the number of its last write. Does not own: when to write (log/history.py).
Invariants: the file has two slots, written alternately and in place, so that the previous note stays whole if a write
fails. Writing in place also works on a full disk, which waits for the log to be trimmed, which waits for the note.
"""

import json
import os
import struct
import zlib
from pathlib import Path

from shruntime import files

from streamhouse_ingest.ports import Seen, WalDirectoryError

SLOT_BYTES = 512
"""Size of a sector, which a disk writes as a whole or not at all."""

HISTORY_ID_BYTES_MAX = 64
_MAGIC = b"STRN"
_VERSION = 1
_SLOT = struct.Struct(f"<4sHHQQ{HISTORY_ID_BYTES_MAX}s")
_CRC = struct.Struct("<I")


class HistoryNote:
    """The note file. Blocking; used by a single thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = 0

    def read(self) -> Seen:
        """Returns the last note; an empty Seen if the file does not exist.

        Raises WalDirectoryError if the file is damaged, OSError.
        """
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Seen()
        try:
            content = os.pread(fd, 2 * SLOT_BYTES + 1, 0)  # a byte more, to notice a file that is too long
        finally:
            os.close(fd)
        if content.startswith(b"{"):
            return self._read_json(content)
        slots = [_decode(content[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)]
        found = [slot for slot in slots if slot is not None]
        if len(content) != 2 * SLOT_BYTES or not found:
            raise self._damaged()
        self._number, seen = max(found, key=lambda slot: slot[0])
        return seen

    def _read_json(self, content: bytes) -> Seen:
        """Returns the note of a file of the first version, before slots; the next write replaces the whole file."""
        try:
            noted = json.loads(content)
            return Seen(str(noted["history_id"]), int(noted["position"]))
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error

    def _damaged(self) -> WalDirectoryError:
        return WalDirectoryError(
            f"{self._path}: not a note of a history. If the metadata is known to be the one this log goes with, "
            "delete the file"
        )

    def write(self, seen: Seen) -> None:
        """Writes the note, durably; on failure the previous note stays.

        Raises WalDirectoryError if the history id exceeds HISTORY_ID_BYTES_MAX, OSError.
        """
        number = self._number + 1
        slot = _encode(number, seen)
        if self._number:
            # The older slot is overwritten, in place: if this write tears, the newer note is still whole.
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                files.write_at(fd, slot, number % 2 * SLOT_BYTES)
            finally:
                os.close(fd)
        # No slot has been read: the file is missing, or of the first version, which this replaces.
        else:
            content = slot if number % 2 == 0 else bytes(SLOT_BYTES) + slot
            files.write_bytes(self._path, content.ljust(2 * SLOT_BYTES, b"\0"))
        # After the write: a write that failed is repeated in the same slot, never over the last good note.
        self._number = number


def _encode(number: int, seen: Seen) -> bytes:
    history_id = seen.history_id.encode()
    if len(history_id) > HISTORY_ID_BYTES_MAX:
        raise WalDirectoryError(f"history_id has {len(history_id)} bytes, the limit is {HISTORY_ID_BYTES_MAX}")
    body = _SLOT.pack(_MAGIC, _VERSION, len(history_id), number, seen.position, history_id)
    return (body + _CRC.pack(zlib.crc32(body))).ljust(SLOT_BYTES, b"\0")


def _decode(slot: bytes) -> tuple[int, Seen] | None:
    """Returns the number of the slot and its note; None if the slot was never written, or only in part."""
    body = slot[: _SLOT.size]
    if len(slot) != SLOT_BYTES or _CRC.unpack_from(slot, _SLOT.size) != (zlib.crc32(body),):
        return None
    magic, version, length, number, position, history_id = _SLOT.unpack(body)
    if magic != _MAGIC or version != _VERSION or length > HISTORY_ID_BYTES_MAX:
        return None
    return number, Seen(history_id[:length].decode(errors="replace"), position)
