"""The system calls LocalStore is made of, blocking; and what their errors mean in the port's words."""

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

from shruntime.files import PRIVATE_FILE

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
    """Turn an OSError into the StoreError it means; `action` says what was being done."""
    try:
        yield
    except OSError as exc:
        raise store_error(action, exc) from exc


def translated(action: str, call: Callable[..., Result], *arguments: object) -> Result:
    """`call(*arguments)` with its OSErrors translated."""
    with translating(action):
        return call(*arguments)


def store_error(action: str, exc: OSError) -> StoreError:
    """The port's word for an OSError."""
    message = f"cannot {action}: {exc.strerror or exc} ({errno.errorcode.get(exc.errno or 0, exc.errno)})"
    if exc.errno in _FULL:
        return StoreUnavailable(f"{message}: the disk or quota is full, free some space")
    if exc.errno in _DENIED:
        return StoreDenied(message)
    if exc.errno in _UNUSABLE:
        return StoreInvalid(message)
    return StoreUnavailable(message)


class TempFile:
    """A file being written. Its lock tells `remove_leftovers`, also in other processes, that it is in use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Self:
        while True:
            self.path = self._directory / f"{os.getpid()}-{uuid.uuid4().hex}"
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if self.status().st_nlink:
                return self
            os.close(self._fd)  # a clean-up took it for a leftover before it was locked

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)  # the object keeps its own link; after a replace there is none
        os.close(self._fd)

    def write(self, views: Sequence[memoryview]) -> None:
        """Append all of `views` and make them durable."""
        pending = list(views)
        while pending:
            written = os.writev(self._fd, pending[:IOV_MAX])
            pending = _unwritten(pending, written)
        os.fsync(self._fd)

    def status(self) -> os.stat_result:
        """The file's size and times."""
        return os.fstat(self._fd)


def _unwritten(views: list[memoryview], written_bytes: int) -> list[memoryview]:
    for index, view in enumerate(views):
        if written_bytes < len(view):
            return [view[written_bytes:], *views[index + 1 :]]
        written_bytes -= len(view)
    return []


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files whose writer died; those that are locked belong to a living one."""
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
    """Between those who put names into directories and those who remove empty ones, also in other processes.

    The file at `path` holds a number that grows with each removal: who remembers of a directory that it is there, and
    durable, does so for one number only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def using(self) -> Iterator[int]:
        """No directory is removed meanwhile. Yields the number."""
        with self._locked(fcntl.LOCK_SH) as fd:
            yield _number(fd)

    @contextmanager
    def removing(self) -> Iterator[None]:
        """Nobody uses a directory meanwhile."""
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
            os.close(fd)


def _number(fd: int) -> int:
    return int.from_bytes(os.pread(fd, 8, 0), "little")


def remove_empty(directory: Path, root: Path) -> None:
    """Remove `directory` and those above it, below `root`, as far as they are empty. Leaves what cannot be removed: it
    costs a listing some time, no more."""
    while directory != root:
        try:
            directory.rmdir()
        except OSError:
            return
        directory = directory.parent


def is_empty(directory: Path) -> bool:
    """False also when it is not there."""
    try:
        with os.scandir(directory) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return False


@contextmanager
def opened(path: Path, key: str) -> Iterator[int]:
    """A descriptor of the object's file. Raises ObjectMissing if it is not there, or not a regular file."""
    try:
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
    """`size_bytes` bytes at `at`. Raises BodyTruncated if the file has shrunk meanwhile."""
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
    """(key, status) of every object in ascending key order, entering only directories that can matter."""
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
        return  # nothing was put there yet
