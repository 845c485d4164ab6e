"""The directory of an embedded platform, held by one process at a time."""

import fcntl
import os
from pathlib import Path


class DataDirError(Exception):
    """The directory cannot be used: somebody else serves it, or it cannot be written."""


class DataDir:
    """Paths below one directory, and the lock on it. The lock goes with the process, so a crash never leaves it."""

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

    def lock(self) -> None:
        """Raises DataDirError when another process holds it, naming that process."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DataDirError(f"data directory {self.path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise DataDirError(
                f"data directory {self.path} is already served by process {holder}; "
                "stop that one first, or choose another directory with --data-dir"
            ) from error
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self._lock = lock

    def unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
