"""Directories and names that survive a power cut, and that other users of the machine cannot read.

A new name is durable when the directory that holds it has been fsynced; the fsync of a file does not promise its name.
Every directory that StreamHouse makes and every rename it relies on goes through this module. All functions block and
raise OSError.
"""

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path

PRIVATE_DIRECTORY = 0o700
PRIVATE_FILE = 0o600
OTHERS = 0o077
"""The permission bits of group and others."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""A full disk, or a user's share of it."""

_NOT_SYNCABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP)
"""Answers to an fsync of a directory in which this user can have made nothing, or whose file system has no fsync."""


def make_directory(path: Path) -> None:
    """Makes `path` and its missing parents for this user alone, and makes all their names durable.

    Existing parents are fsynced as well: the process that made them may have been killed before it could do so.
    """
    path = path.absolute()
    for level in reversed([path, *path.parents]):
        try:
            level.mkdir(PRIVATE_DIRECTORY, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(level)) from None
    for level in path.parents:
        try:
            sync_directory(level)
        except OSError as error:
            if error.errno not in _NOT_SYNCABLE:
                raise


def sync_directory(path: Path) -> None:
    """Makes new, renamed and removed names in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Renames a file or directory whose content is durable; returns once it is durable under its new name."""
    source.rename(target)
    sync_directory(target.parent)


def write_text(path: Path, content: str) -> None:
    """Replaces the file's content durably; a crash leaves this content or the previous."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file's content durably; a crash, or an error, leaves this content or the previous."""
    temporary = path.with_suffix(".new")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        os.ftruncate(fd, 0)
        write_at(fd, content, 0)
    except OSError:
        temporary.unlink(
            missing_ok=True
        )  # on a full disk; a partial file may be taken for a whole one, and needs the room
        raise
    finally:
        os.close(fd)
    rename(temporary, path)


def write_at(fd: int, data: bytes, at: int) -> None:
    """Writes all of `data` at byte `at`, durably."""
    written = 0
    while written < len(data):
        # A full disk takes a part first, and says that it is full at the next try.
        written += os.pwrite(fd, data[written:], at + written)
    os.fsync(fd)


def unlock(fd: int) -> None:
    """Releases the flock on `fd`, then closes `fd`.

    Closing alone releases nothing while a child that another thread has just forked holds its copy of `fd`, up to its
    exec: the lock belongs to what all copies share. The end of a process, kill -9 included, closes all copies.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def free_bytes(path: Path) -> int:
    """Returns the bytes free for us on the file system of `path`, or of its nearest parent that exists."""
    existing = next(level for level in (path.absolute(), *path.absolute().parents) if level.exists())
    return shutil.disk_usage(existing).free


def make_private(path: Path) -> bool:
    """Removes group's and others' permissions from `path`. Returns False if they stay, for want of ownership."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & OTHERS:
        return True
    try:
        path.chmod(mode & ~OTHERS)
    except PermissionError:
        return False
    return True
