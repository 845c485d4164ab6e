"""The file beside the log that says how far the agent has heard of the metadata's history.

Two slots, written in turn and in place: the one before stays whole whatever happens to a write, and a disk without a
byte left, which waits for the log to be trimmed, does not keep the note from being written.
"""

import json
import os
import struct
import zlib
from pathlib import Path

from shruntime import files

from streamhouse_ingest.ports import Seen, WalDirectoryError

SLOT_BYTES = 512
"""A sector: what disks write as a whole, or not."""

HISTORY_ID_BYTES_MAX = 64
_MAGIC = b"STRN"
_VERSION = 1
_SLOT = struct.Struct(f"<4sHHQQ{HISTORY_ID_BYTES_MAX}s")
_CRC = struct.Struct("<I")


class HistoryNote:
    """One file. Blocking; used by one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = 0

    def read(self) -> Seen:
        """What was noted last; nothing if there is no file. Raises WalDirectoryError for a damaged one, OSError."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Seen()
        try:
            content = os.pread(fd, 2 * SLOT_BYTES + 1, 0)
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
        """Reads a note of the first version, before there were slots; the next one is written as a new file in its
        place."""
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
        """Durably; on failure the last note stays. Raises OSError."""
        number = self._number + 1
        slot = _encode(number, seen)
        if self._number:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                files.write_at(fd, slot, number % 2 * SLOT_BYTES)
            finally:
                os.close(fd)
        else:
            content = slot if number % 2 == 0 else bytes(SLOT_BYTES) + slot
            files.write_bytes(self._path, content.ljust(2 * SLOT_BYTES, b"\0"))
        self._number = number


def _encode(number: int, seen: Seen) -> bytes:
    history_id = seen.history_id.encode()
    if len(history_id) > HISTORY_ID_BYTES_MAX:
        raise WalDirectoryError(f"history_id has {len(history_id)} bytes, the limit is {HISTORY_ID_BYTES_MAX}")
    body = _SLOT.pack(_MAGIC, _VERSION, len(history_id), number, seen.position, history_id)
    return (body + _CRC.pack(zlib.crc32(body))).ljust(SLOT_BYTES, b"\0")


def _decode(slot: bytes) -> tuple[int, Seen] | None:
    """The slot's number and what it says; None for one that was never, or not wholly, written."""
    body = slot[: _SLOT.size]
    if len(slot) != SLOT_BYTES or _CRC.unpack_from(slot, _SLOT.size) != (zlib.crc32(body),):
        return None
    magic, version, length, number, position, history_id = _SLOT.unpack(body)
    if magic != _MAGIC or version != _VERSION or length > HISTORY_ID_BYTES_MAX:
        return None
    return number, Seen(history_id[:length].decode(errors="replace"), position)
