"""The directory of an embedded platform, held by a single process at a time and closed to other users."""

import fcntl
import logging
import os
from pathlib import Path

from shruntime import files

log = logging.getLogger(__name__)


OUR_NAMES = frozenset(("postgres", "objects", "wal", "cache", "sql", "lock"))
"""Our directories and our lock. Beside them lie files of PostgreSQL's, whose names begin with `postgres.`"""


class DataDirError(Exception):
    """The directory cannot be used: another process serves it, or it is not writable."""


class DataDir:
    """Paths below a directory, and the directory's lock, which ends with the process: a crash leaves no lock behind."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._lock = -1

    @property
    def postgres(self) -> Path:
        return self.path / "postgres"

    @property
    def objects(self) -> Path:
        return self.path / "objects"

    @property
    def wal(self) -> Path:
        return self.path / "wal"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def sql(self) -> Path:
        return self.path / "sql"

    def lock(self) -> None:
        """Makes the directory if missing, locks it for this process, and closes its files to other users as far as this
        user owns them.

        Raises DataDirError; for a locked directory the error names the process.
        """
        try:
            files.make_directory(self.path)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, files.PRIVATE_FILE)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise DataDirError(
                f"data directory {self.path} is already served by process {holder}; "
                "stop that one first, or choose another directory with --data-dir"
            ) from error
        except OSError as error:  # a file system without locks
            os.close(lock)
            raise self._unusable(error) from error
        self._lock = lock
        try:
            pid = str(os.getpid()).encode()
            # Over the old file first: truncating would free the block, and a full disk has no other.
            os.pwrite(lock, pid, 0)
            os.truncate(lock, len(pid))
            self._close_to_others()
        except OSError as error:
            self.unlock()
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> DataDirError:
        text = f"data directory {self.path} cannot be used: {error.strerror}"
        if error.errno in files.NO_SPACE:
            text += f"; its disk has {files.free_bytes(self.path):,} bytes left"
        return DataDirError(text)

    def _close_to_others(self) -> None:
        """Removes group's and others' permissions from files that earlier versions made readable by all.

        The directory itself may belong to others, as /srv or a volume: permissions of the directory change only if all
        contents are ours.
        """
        for made_by_us in (self.objects, self.wal, self.cache, self.path / "lock"):
            if made_by_us.exists():
                self._make_private(made_by_us)
        if all(_is_ours(entry.name) for entry in self.path.iterdir()):
            self._make_private(self.path)
        elif self.path.stat().st_mode & files.OTHERS:
            log.warning(
                "data directory %s is open to other users: `chmod 700` it unless other users need it", self.path
            )

    def _make_private(self, path: Path) -> None:
        if not files.make_private(path):
            log.warning(
                "%s is open to other users and its owner is another one: `chmod go= %s` as that user", path, path
            )

    def unlock(self) -> None:
        """Releases the lock if it is held."""
        if self._lock >= 0:
            # The file stays: were it removed, two processes could hold locks on two files of this name.
            files.unlock(self._lock)
            self._lock = -1


def _is_ours(name: str) -> bool:
    return name in OUR_NAMES or name.startswith("postgres.")
