"""The directory of a write-ahead log: its lock, its identity, the notes beside its files.

Owns: the lock, the identity (agent id and wal_id), the notes. Does not own: the content of log files (wal.py).
Invariants: one process at a time has the directory open. From `mark_used` on, which comes before the first log file, it
belongs to its agent id for good.
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
# Of a directory that may hold files of version 3 (with space ahead). Versions of StreamHouse that cannot read those
# refuse the directory, instead of taking the marks of groups for damage.
_IDENTITY_VERSION_AHEAD = 2
_PID_CHARS = 20
_SETTLED = "settled"
_UNSYNCED = "unsynced"
_HISTORY = "history"
_OPENING = "opening"
_ROOM = "room"
# Empty; from before the identity is written until a session is open. An agent whose first start was refused, for an id
# that is taken, has put nothing into the directory that another id could lose.
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
        """Returns the directory, locked. Creates it and its identity when it is new, for this user alone; takes an
        older one away from other users. A directory in which no session was ever opened is given to `agent_id`, its
        wal_id stays. Raises WalDirectoryError (WalLocked, WrongIdentity among them), OSError."""
        path = path.absolute()  # errors name it, and the reader may be in another directory
        try:
            files.make_directory(path)
        except NotADirectoryError as error:
            raise WalDirectoryError(f"{error.filename}: not a directory") from error
        files.sync_directory(path)  # what a killed process left here is built upon: its names must be durable
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, files.PRIVATE_FILE)
        try:
            _lock(lock, path)
            (path / _ROOM).unlink(missing_ok=True)  # of a process that was killed in has_space: a file of full size
            wal_id, version = _identity(path, agent_id)
            if not files.make_private(path):
                log.warning("%s holds records, is open to other users and belongs to one: `chmod 700` it", path)
            return cls(path, lock, agent_id, wal_id, version)
        except BaseException:
            os.close(lock)
            raise

    def file_path(self, sequence: int) -> Path:
        return self.path / f"{sequence:020d}.wal"

    def sequences(self) -> list[int]:
        """Of the files there are, ascending. Raises WalDirectoryError for a .wal file whose name is not one of ours."""
        found = []
        for path in self.path.glob("*.wal"):
            match = _FILE_NAME.fullmatch(path.name)
            if match is None:
                raise WalDirectoryError(f"{path}: not a name of a write-ahead log file")
            found.append(int(match[1]))
        return sorted(found)

    def note_space_ahead(self) -> None:
        """Notes, durably, that files of version 3 may be in the directory from now on. Raises OSError."""
        if self._version < _IDENTITY_VERSION_AHEAD:
            _write_identity(self.path / "identity", self._agent_id, self.wal_id, _IDENTITY_VERSION_AHEAD)
            self._version = _IDENTITY_VERSION_AHEAD

    def mark_used(self) -> None:
        """Binds the directory to its agent id for good: from now on the coordinator may grant ranges to its log, and
        records may be in it. Raises OSError."""
        if self._unused:
            (self.path / _UNUSED).unlink(missing_ok=True)
            self.sync()
            self._unused = False

    def settled_before(self) -> int:
        """The ends of all ranges with frames in files below this number have been declared to the coordinator."""
        file = self.path / _SETTLED
        try:
            return int(file.read_text()) if file.exists() else 0
        except ValueError:
            return 0  # at worst a known damage is reported again

    def mark_settled(self, sequence: int) -> None:
        """Ranges with frames below this file are settled: what damage hides there has been told. Raises OSError."""
        files.write_text(self.path / _SETTLED, f"{sequence}\n")
        (self.path / _OPENING).unlink(missing_ok=True)

    def opening_token(self, sequence: int, address: str, drawn: str) -> str:
        """Returns the session's token noted when nothing had been written to file `sequence` either, by an agent at
        this address; else `drawn`, noted from now on. Raises OSError."""
        file = self.path / _OPENING
        noted = _opening_of(file, sequence, address) if file.exists() else ""
        if not noted:
            # The key is from when the session's id was its secret.
            content = {"version": _OPENING_VERSION, "sequence": sequence, "address": address, "session_id": drawn}
            files.write_text(file, json.dumps(content) + "\n")
        return noted or drawn

    def forget_files(self) -> None:
        """There are none, and their numbers begin anew: what is noted of a number would be taken for said of another
        file. Raises OSError."""
        for file in (self.path / _SETTLED, self.path / _OPENING):
            if file.exists():
                file.unlink()
                self.sync()

    @property
    def unsynced(self) -> bool:
        """Records may have been acknowledged, and read, that a power failure has taken back."""
        return (self.path / _UNSYNCED).exists()

    def mark_unsynced(self, unsynced: bool) -> None:
        """Raises OSError."""
        if unsynced:
            files.write_text(self.path / _UNSYNCED, "")
        elif self.unsynced:
            (self.path / _UNSYNCED).unlink()
            self.sync()

    def history(self) -> Seen:
        """Of the metadata that the log goes with. Raises WalDirectoryError for a file that says something else."""
        return self._note.read()

    def note_history(self, seen: Seen) -> None:
        """After history(). Raises OSError."""
        self._note.write(seen)

    def has_space(self, size_bytes: int) -> bool:
        """True if the disk, the quota and the process let a file of this size be made; asks by making one."""
        file = self.path / _ROOM
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, files.PRIVATE_FILE)
        except OSError:
            return False
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError:
            return False
        finally:
            os.close(fd)
            file.unlink(missing_ok=True)
        return True

    def sync(self) -> None:
        """Makes creations and deletions in the directory durable."""
        files.sync_directory(self.path)

    def close(self) -> None:
        os.close(self._lock)


def _lock(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        raise WalLocked(f"{path}: in use by another process (pid {holder or 'unknown'})") from error
    try:
        os.pwrite(lock, f"{os.getpid():<{_PID_CHARS}}\n".encode(), 0)
    except OSError as error:
        # Only the error of whoever comes second reads it. An agent must start over its log on a disk without a byte:
        # giving the log away is what makes room.
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
        # The wal_id stays: should the coordinator have opened a session of it after all, whose answer never came, then
        # it ends as superseded, and what was granted to it as empty.
        _write_identity(file, agent_id, wal_id, version)
        log.info("%s is agent %r's now: %r was never let in with it", path, agent_id, owner)
    return wal_id, version


def _has_notes(path: Path) -> bool:
    """True if the directory says something of a log. Versions that do not know the file `unused` leave it behind."""
    return any((path / name).exists() for name in (_HISTORY, _SETTLED, _UNSYNCED, _OPENING))


def _of_another(path: Path, owner: str, agent_id: str, is_empty: bool) -> WrongIdentity:
    advice = f"set STREAMHOUSE_AGENT_ID to {owner}, or STREAMHOUSE_WAL_DIR to a directory of this agent's own"
    if is_empty:
        advice += f"; there are no records in this one: delete it if no agent {owner!r} is to be started over it again"
    return WrongIdentity(f"{path}: belongs to agent {owner!r}, this one is {agent_id!r}: {advice}")


def _opening_of(file: Path, sequence: int, address: str) -> str:
    """Returns the session's token that the file notes for this; empty when it says something else."""
    try:
        content = json.loads(file.read_text())
        said = content["version"], content["sequence"], content["address"]
        token = str(uuid.UUID(content["session_id"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""  # at worst an empty range is reported as possibly lost
    return token if said == (_OPENING_VERSION, sequence, address) else ""


def _write_identity(file: Path, agent_id: str, wal_id: bytes, version: int) -> None:
    content = json.dumps({"version": version, "agent_id": agent_id, "wal_id": wal_id.hex()})
    files.write_text(file, content + "\n")
