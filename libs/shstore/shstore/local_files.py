"""System calls of LocalStore, blocking, with their errors translated into the port's."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, TypeVar

from shruntime.files import PRIVATE_FILE, unlock

from shstore.errors import (
    BodyTruncated,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreInvalid,
    StoreUnavailable,
)
from shstore.keys import is_key

Walk: TypeAlias = Iterator[tuple[str, os.stat_result]]
Result = TypeVar("Result")

IOV_MAX = 1024
"""Buffers per writev call (Linux UIO_MAXIOV)."""

READ_BYTES_MAX = 1 << 30
"""Linux transfers at most 2 GiB - 4 KiB per call; ask for less and loop."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNUSABLE = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.EOPNOTSUPP)


@contextmanager
def translating(action: str) -> Iterator[None]:
    """Turns an OSError into its StoreError; `action` names the call for the message."""
    try:
        yield
    except OSError as exc:
        raise store_error(action, exc) from exc


def translated(action: str, call: Callable[..., Result], *arguments: object) -> Result:
    """Returns `call(*arguments)`, with its OSErrors translated."""
    with translating(action):
        return call(*arguments)


def store_error(action: str, exc: OSError) -> StoreError:
    """Returns the StoreError for an OSError."""
    message = f"cannot {action}: {exc.strerror or exc} ({errno.errorcode.get(exc.errno or 0, exc.errno)})"
    if exc.errno in _FULL:
        return StoreUnavailable(f"{message}: the disk or quota is full, free some space")
    if exc.errno in _DENIED:
        return StoreDenied(message)
    if exc.errno in _UNUSABLE:
        return StoreInvalid(message)
    return StoreUnavailable(message)


class TempFile:
    """A file being written. Its lock marks the file as in use, also for `remove_leftovers` in other processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Self:
        while True:
            self.path = self._directory / f"{os.getpid()}-{uuid.uuid4().hex}"
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if self.status().st_nlink:
                return self
            os.close(self._fd)  # a clean-up took the file for a leftover before it was locked

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Removed while it is locked: a clean-up finds either a locked file or none. Closing is enough after that, since
        # no other process meets the lock of a file without a name in this directory.
        self.path.unlink(missing_ok=True)  # the object keeps its own link; after a replace none is left here
        os.close(self._fd)

    def write(self, views: Sequence[memoryview]) -> None:
        """Appends all of `views` and makes them durable."""
        pending = list(views)
        while pending:
            written = os.writev(self._fd, pending[:IOV_MAX])
            pending = _unwritten(pending, written)
        os.fsync(self._fd)

    def status(self) -> os.stat_result:
        """Returns size and times of the file."""
        return os.fstat(self._fd)


def _unwritten(views: list[memoryview], written_bytes: int) -> list[memoryview]:
    for index, view in enumerate(views):
        if written_bytes < len(view):
            return [view[written_bytes:], *views[index + 1 :]]
        written_bytes -= len(view)
    return []


def remove_leftovers(directory: Path) -> None:
    """Removes temporary files whose writer died; a locked file belongs to a living writer."""
    for path in directory.iterdir():
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its writer finished meanwhile
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)


class DirectoryLock:
    """Lock between putting names into directories and removing empty directories, also in other processes.

    The file at `path` holds a number that grows with each removal: the knowledge that a directory exists and is durable
    holds for one number only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def using(self) -> Iterator[int]:
        """Keeps every directory from being removed inside the `with` block. Yields the number."""
        with self._locked(fcntl.LOCK_SH) as fd:
            yield _number(fd)

    @contextmanager
    def removing(self) -> Iterator[None]:
        """Keeps names from being put into directories inside the `with` block."""
        with self._locked(fcntl.LOCK_EX) as fd:
            os.pwrite(fd, (_number(fd) + 1).to_bytes(8, "little"), 0)
            yield

    @contextmanager
    def _locked(self, kind: int) -> Iterator[int]:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        try:
            fcntl.flock(fd, kind)
            yield fd
        finally:
            unlock(fd)


def _number(fd: int) -> int:
    return int.from_bytes(os.pread(fd, 8, 0), "little")


def remove_empty(directory: Path, root: Path) -> None:
    """Removes `directory` and its parents below `root` as far as they are empty.

    Leaves a directory that cannot be removed: an empty directory only costs a listing some time.
    """
    while directory != root:
        try:
            directory.rmdir()
        except OSError:
            return
        directory = directory.parent


def is_empty(directory: Path) -> bool:
    """True if the directory exists and is empty."""
    try:
        with os.scandir(directory) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return False


@contextmanager
def opened(path: Path, key: str) -> Iterator[int]:
    """Yields a descriptor of the object's file. Raises ObjectMissing if the file is missing or not regular."""
    try:
        # Non-blocking, because opening a FIFO of that name would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise ObjectMissing(key) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ObjectMissing(key)
        yield fd
    finally:
        os.close(fd)


def read_exactly(fd: int, key: str, at: int, size_bytes: int) -> bytes:
    """Returns `size_bytes` bytes from `at`. Raises BodyTruncated if the file has shrunk meanwhile."""
    chunks: list[bytes] = []
    got = 0
    while got < size_bytes:
        chunk = os.pread(fd, min(size_bytes - got, READ_BYTES_MAX), at + got)
        if not chunk:
            raise BodyTruncated(key, expected_bytes=size_bytes, got_bytes=got)
        chunks.append(chunk)
        got += len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def walk(objects: Path, prefix: str, start_after: str) -> Walk:
    """Yields (key, status) of every object in ascending key order, entering only directories that can matter."""
    head, _, _ = prefix.rpartition("/")
    return _walk(objects / head, f"{head}/" if head else "", prefix, start_after)


def _walk(directory: Path, base: str, prefix: str, start_after: str) -> Walk:
    # A directory sorts as its name with '/', as its keys do: 'a-b' comes before 'a/b', 'a0' after.
    for name, entry in sorted(_entries(directory), key=lambda named: named[0]):
        key = base + name
        if name.endswith("/"):
            passed = key < start_after and not start_after.startswith(key)
            if not passed and (key.startswith(prefix) or prefix.startswith(key)):
                yield from _walk(Path(entry.path), key, prefix, start_after)
        elif key.startswith(prefix) and key > start_after and is_key(key):
            try:
                yield key, entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # deleted meanwhile


def _entries(directory: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield f"{entry.name}/", entry
                elif entry.is_file(follow_symlinks=False):
                    yield entry.name, entry
    except (FileNotFoundError, NotADirectoryError):
        return  # no object was put there yet
