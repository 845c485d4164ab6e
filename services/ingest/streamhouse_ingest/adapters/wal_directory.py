"""The directory of a write-ahead log: its lock, its identity, the notes beside its files.

Owns: the lock, the identity (agent id and wal_id), the notes. Does not own: the content of log files (wal.py).
Invariants: at most one process has the directory open. From `mark_used` on, which precedes the first log file, the
directory belongs to its agent id for good.
"""

import fcntl
import json
import logging
import os
import re
import uuid
from pathlib import Path

from shformat.wal import WAL_ID_SIZE
from shruntime import files

from streamhouse_ingest.adapters.wal_note import HistoryNote
from streamhouse_ingest.ports import NO_SPACE, Seen, WalDirectoryError, WalLocked, WrongIdentity

log = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"(\d{20})\.wal")
_IDENTITY_VERSION = 1
# Identity version of a directory that may hold files of version 3 (with space ahead). Releases of StreamHouse that
# cannot read such files refuse the directory, instead of taking the group marks for damage.
_IDENTITY_VERSION_AHEAD = 2
_PID_CHARS = 20
_SETTLED = "settled"
_UNSYNCED = "unsynced"
_HISTORY = "history"
_OPENING = "opening"
_ROOM = "room"
# An empty file that exists from before the identity is written until a session is open. An agent whose first start was
# refused, because its id is taken, has written nothing that would be lost if the directory went to another id.
_UNUSED = "unused"
_OPENING_VERSION = 1


class WalDirectory:
    """An opened, locked directory. Use `open`."""

    def __init__(self, path: Path, lock: int, agent_id: str, wal_id: bytes, version: int) -> None:
        self.path = path
        self._unused = (path / _UNUSED).exists()
        self.wal_id = wal_id
        self._agent_id = agent_id
        self._version = version
        self._lock = lock
        self._note = HistoryNote(path / _HISTORY)

    @classmethod
    def open(cls, path: Path, agent_id: str) -> "WalDirectory":
        """Returns the directory, locked.

        Creates a missing directory and its identity, accessible to this user only, and removes the access of other
        users to an existing directory. A directory in which no session was ever opened is given to `agent_id`; its
        wal_id stays. Raises WalDirectoryError (including WalLocked and WrongIdentity), OSError.
        """
        path = path.absolute()  # errors name the path, and their reader may be in another directory
        try:
            files.make_directory(path)
        except NotADirectoryError as error:
            raise WalDirectoryError(f"{error.filename}: not a directory") from error
        files.sync_directory(path)  # names left by a killed process are relied upon below, so they must be durable
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, files.PRIVATE_FILE)
        try:
            _lock(lock, path)
            (path / _ROOM).unlink(missing_ok=True)  # a file of full size, left by a process killed in has_space
            wal_id, version = _identity(path, agent_id)
            if not files.make_private(path):
                log.warning("%s holds records, is open to other users and belongs to one: `chmod 700` it", path)
            return cls(path, lock, agent_id, wal_id, version)
        except BaseException:
            files.unlock(lock)
            raise

    def file_path(self, sequence: int) -> Path:
        return self.path / f"{sequence:020d}.wal"

    def sequences(self) -> list[int]:
        """Returns the sequence numbers of the log files, ascending.

        Raises WalDirectoryError for a .wal file whose name is not a sequence number.
        """
        found = []
        for path in self.path.glob("*.wal"):
            match = _FILE_NAME.fullmatch(path.name)
            if match is None:
                raise WalDirectoryError(f"{path}: not a name of a write-ahead log file")
            found.append(int(match[1]))
        return sorted(found)

    def note_space_ahead(self) -> None:
        """Notes, durably, that the directory may hold files of version 3 from now on. Raises OSError."""
        if self._version < _IDENTITY_VERSION_AHEAD:
            _write_identity(self.path / "identity", self._agent_id, self.wal_id, _IDENTITY_VERSION_AHEAD)
            self._version = _IDENTITY_VERSION_AHEAD

    def mark_used(self) -> None:
        """Binds the directory to its agent id for good: from now on the coordinator may grant ranges to this log, and
        the log may hold records. Raises OSError."""
        if self._unused:
            (self.path / _UNUSED).unlink(missing_ok=True)
            self.sync()
            self._unused = False

    def settled_before(self) -> int:
        """Returns the file number below which the log is settled, 0 if none is noted.

        The ends of all ranges with frames in files below this number have been declared to the coordinator.
        """
        file = self.path / _SETTLED
        try:
            return int(file.read_text()) if file.exists() else 0
        except ValueError:
            return 0  # at worst, known damage is reported again

    def mark_settled(self, sequence: int) -> None:
        """Notes that ranges with frames in files below `sequence` are settled: the damage in those files has been
        reported to the coordinator. Raises OSError."""
        files.write_text(self.path / _SETTLED, f"{sequence}\n")
        (self.path / _OPENING).unlink(missing_ok=True)

    def opening_token(self, sequence: int, address: str, drawn: str) -> str:
        """Returns the session token noted by an agent at `address` when `sequence` was the next file, as now;
        otherwise notes `drawn` and returns it. Raises OSError."""
        file = self.path / _OPENING
        noted = _opening_of(file, sequence, address) if file.exists() else ""
        if not noted:
            # The key is named session_id because the id of a session was its secret when the format was fixed.
            content = {"version": _OPENING_VERSION, "sequence": sequence, "address": address, "session_id": drawn}
            files.write_text(file, json.dumps(content) + "\n")
        return noted or drawn

    def forget_files(self) -> None:
        """Forgets the notes that refer to file numbers; called when no log file is left. Raises OSError.

        Numbers begin anew then, and a note about an old file would be applied to a new file of the same number.
        """
        for file in (self.path / _SETTLED, self.path / _OPENING):
            if file.exists():
                file.unlink()
                self.sync()

    @property
    def unsynced(self) -> bool:
        """True if a power failure may have undone records that were acknowledged, and read by consumers."""
        return (self.path / _UNSYNCED).exists()

    def mark_unsynced(self, unsynced: bool) -> None:
        """Notes, or no longer notes, that acknowledged records may be unsynced, durably. Raises OSError."""
        if unsynced:
            files.write_text(self.path / _UNSYNCED, "")
        elif self.unsynced:
            (self.path / _UNSYNCED).unlink()
            self.sync()

    def history(self) -> Seen:
        """Returns the metadata history under which this log was written, and the last position seen in it.

        Raises WalDirectoryError if the note is damaged, OSError.
        """
        return self._note.read()

    def note_history(self, seen: Seen) -> None:
        """Notes the metadata history and the position seen, durably; history() must be called before. Raises
        WalDirectoryError if the history id is too long, OSError."""
        self._note.write(seen)

    def has_space(self, size_bytes: int) -> bool:
        """True if the disk, the quota and the process limits allow a file of `size_bytes`; creates and removes such a
        file to find out."""
        file = self.path / _ROOM
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, files.PRIVATE_FILE)
        except OSError:
            return False
        try:
            # Free space alone does not tell: a quota or a limit of file sizes may refuse the file all the same.
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError:
            return False
        finally:
            os.close(fd)
            file.unlink(missing_ok=True)
        return True

    def sync(self) -> None:
        """Makes creations and deletions in the directory durable. Raises OSError."""
        files.sync_directory(self.path)

    def close(self) -> None:
        files.unlock(self._lock)


def _lock(lock: int, path: Path) -> None:
    try:
        # flock ends with its process, however that ends: no stale lock keeps an agent from its log after a kill.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        raise WalLocked(f"{path}: in use by another process (pid {holder or 'unknown'})") from error
    try:
        os.pwrite(lock, f"{os.getpid():<{_PID_CHARS}}\n".encode(), 0)
    except OSError as error:
        # The pid serves only the error message of a second process. An agent must start over its log on a full disk,
        # because room is made by registering and deleting the log.
        if error.errno not in NO_SPACE:
            raise


def _identity(path: Path, agent_id: str) -> tuple[bytes, int]:
    file = path / "identity"
    if not file.exists():
        if any(path.glob("*.wal")):
            raise WrongIdentity(
                f"{path}: there are log files but no identity file; restore it or use another directory"
            )
        wal_id = uuid.uuid4().bytes
        # Before the identity: a crash between the two leaves a directory without an owner, not one bound to an agent
        # that never wrote.
        if not _has_notes(path):
            files.write_text(path / _UNUSED, "")
        _write_identity(file, agent_id, wal_id, _IDENTITY_VERSION)
        return wal_id, _IDENTITY_VERSION
    try:
        content = json.loads(file.read_text())
        version, owner, wal_id = content["version"], content["agent_id"], bytes.fromhex(content["wal_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise WrongIdentity(f"{file}: not an identity file: {error!r}") from error
    if version not in (_IDENTITY_VERSION, _IDENTITY_VERSION_AHEAD) or len(wal_id) != WAL_ID_SIZE:
        known = f"{_IDENTITY_VERSION} to {_IDENTITY_VERSION_AHEAD} and {WAL_ID_SIZE}"
        raise WrongIdentity(f"{file}: version {version}, wal_id of {len(wal_id)} bytes; this agent knows {known}")
    if owner != agent_id:
        is_empty = not any(path.glob("*.wal")) and not _has_notes(path)
        if not is_empty or not (path / _UNUSED).exists():
            raise _of_another(path, owner, agent_id, is_empty)
        # The wal_id stays: if the coordinator did open a session for this wal_id, and only the answer was lost, that
        # session ends as superseded and the ranges granted to it end empty.
        _write_identity(file, agent_id, wal_id, version)
        log.info("%s is agent %r's now: %r was never let in with it", path, agent_id, owner)
    return wal_id, version


def _has_notes(path: Path) -> bool:
    """True if the directory holds notes about a log. Releases that do not know the file `unused` leave it behind, so
    `unused` alone does not prove that the log was never used."""
    return any((path / name).exists() for name in (_HISTORY, _SETTLED, _UNSYNCED, _OPENING))


def _of_another(path: Path, owner: str, agent_id: str, is_empty: bool) -> WrongIdentity:
    advice = f"set STREAMHOUSE_AGENT_ID to {owner}, or STREAMHOUSE_WAL_DIR to a directory of this agent's own"
    if is_empty:
        advice += f"; there are no records in this one: delete it if no agent {owner!r} is to be started over it again"
    return WrongIdentity(f"{path}: belongs to agent {owner!r}, this one is {agent_id!r}: {advice}")


def _opening_of(file: Path, sequence: int, address: str) -> str:
    """Returns the session token noted in `file` for this sequence and address; empty if the note is for others, or
    damaged."""
    try:
        content = json.loads(file.read_text())
        noted = content["version"], content["sequence"], content["address"]
        token = str(uuid.UUID(content["session_id"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""  # at worst, an empty range is reported as possibly lost
    return token if noted == (_OPENING_VERSION, sequence, address) else ""


def _write_identity(file: Path, agent_id: str, wal_id: bytes, version: int) -> None:
    content = json.dumps({"version": version, "agent_id": agent_id, "wal_id": wal_id.hex()})
    files.write_text(file, content + "\n")
