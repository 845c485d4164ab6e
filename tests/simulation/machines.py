"""The operating system around a simulated disk: stand-ins for the modules `os`, `fcntl` and `mmap`, and for pathlib, in
the write-ahead log's adapters. Only what those use is there."""

from __future__ import annotations

import errno
import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.simulation.disk import FORGOTTEN_SHARE, Entries, SimDisk, SimFile
from tests.simulation.loop import PROCESS, PowerCut, SimLoop


class SimPath:
    """Of the root of a disk, or of a file in it."""

    def __init__(self, disk: SimDisk, name: str = "") -> None:
        self.disk = disk
        self.name = name

    def __truediv__(self, name: str) -> SimPath:
        return SimPath(self.disk, name)

    def __str__(self) -> str:
        return f"/{self.disk.name}/{self.name}"

    @property
    def parent(self) -> SimPath:
        return SimPath(self.disk)

    def absolute(self) -> SimPath:
        return self

    def glob(self, pattern: str) -> Iterator[SimPath]:
        return iter([SimPath(self.disk, name) for name in self.disk.files if fnmatch.fnmatch(name, pattern)])

    def exists(self) -> bool:
        return self.name in self.disk.files

    def read_text(self) -> str:
        return self.disk.files[self.name].data.decode(errors="replace")

    def with_suffix(self, suffix: str) -> SimPath:
        return SimPath(self.disk, self.name.partition(".")[0] + suffix)

    def rename(self, target: SimPath) -> None:
        name, new = self.name, target.name

        def move(entries: Entries) -> None:
            if name in entries:
                entries[new] = entries.pop(name)

        _may_cut(self.disk)
        self.disk.change(move)

    def unlink(self, missing_ok: bool = False) -> None:
        if self.name not in self.disk.files and not missing_ok:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(self))
        _may_cut(self.disk)
        self.disk.change(lambda entries: entries.pop(self.name, None))


def _may_cut(disk: SimDisk) -> None:
    loop = PROCESS.get().loop
    if loop.in_executor and disk.step():
        raise PowerCut


@dataclass(frozen=True, slots=True)
class _Open:
    disk: SimDisk
    file: SimFile | None  # None: the directory


class Machines:
    """The module `os`, as far as the log uses it, over all machines' disks."""

    O_RDWR, O_CREAT, O_EXCL, O_CLOEXEC = os.O_RDWR, os.O_CREAT, os.O_EXCL, os.O_CLOEXEC
    O_RDONLY, O_DIRECTORY = os.O_RDONLY, os.O_DIRECTORY
    POSIX_FADV_DONTNEED = os.POSIX_FADV_DONTNEED

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self._open: dict[int, _Open] = {}
        self._next = 3

    # ---- files

    def open(self, path: SimPath, flags: int, mode: int = 0o777) -> int:
        disk = path.disk
        if not path.name:
            return self._add(_Open(disk, None))
        if flags & self.O_EXCL and path.name in disk.files:
            raise FileExistsError(errno.EEXIST, "file exists", str(path))
        if path.name not in disk.files:
            if not flags & self.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            _may_cut(disk)
            if disk.free_bytes == 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            new = SimFile()
            disk.change(lambda entries: entries.__setitem__(path.name, new))
        return self._add(_Open(disk, disk.files[path.name]))

    def _add(self, opened: _Open) -> int:
        self._next += 1
        self._open[self._next] = opened
        return self._next

    def close(self, fd: int) -> None:
        opened = self._open.pop(fd)
        if opened.file is not None:
            _unlock(opened.file, fd)

    def _file(self, fd: int) -> tuple[SimDisk, SimFile]:
        opened = self._open[fd]
        assert opened.file is not None, "a directory is not written to"
        return opened.disk, opened.file

    def pwrite(self, fd: int, data: bytes | memoryview, at: int) -> int:
        disk, file = self._file(fd)
        content = bytes(data)
        if self._loop.in_executor and disk.step():
            file.write(at, content[: disk.rng.randrange(len(content) + 1)])
            raise PowerCut
        growth = max(0, at + len(content) - len(file.data))  # what is written in place has its room
        written = len(content) - growth + disk.room_for(growth)
        if content and not written:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(at, content[:written])
        return written

    def pwritev(self, fd: int, parts: Sequence[bytes | memoryview], at: int) -> int:
        return self.pwrite(fd, b"".join(parts), at)

    def write(self, fd: int, data: bytes) -> int:
        return self.pwrite(fd, data, len(self._file(fd)[1].data))

    def pread(self, fd: int, size_bytes: int, at: int) -> bytes:
        return bytes(self._file(fd)[1].data[at : at + size_bytes])

    def ftruncate(self, fd: int, size_bytes: int) -> None:
        disk, file = self._file(fd)
        _may_cut(disk)
        if disk.free_bytes is not None:
            disk.free_bytes += max(0, len(file.data) - size_bytes)
        file.truncate(size_bytes)

    def posix_fallocate(self, fd: int, at: int, size_bytes: int) -> None:
        """Nothing stays of it: the file is removed at once."""
        disk, _ = self._file(fd)
        if disk.free_bytes is not None and disk.free_bytes < size_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")

    def fsync(self, fd: int) -> None:
        opened = self._open[fd]
        _may_cut(opened.disk)
        if opened.disk.fail_fsyncs and self._loop.in_executor:
            opened.disk.fail_fsyncs -= 1
            if opened.file is not None and opened.disk.rng.random() < FORGOTTEN_SHARE:
                opened.file.fail_sync()
            raise OSError(errno.EIO, "Input/output error")
        if opened.file is None:
            opened.disk.sync()
        else:
            opened.file.sync()

    fdatasync = fsync

    def posix_fadvise(self, fd: int, at: int, size_bytes: int, advice: int) -> None:
        assert advice == self.POSIX_FADV_DONTNEED
        self._file(fd)[1].drop_clean()

    def fstat(self, fd: int) -> Any:
        size_bytes = len(self._file(fd)[1].data)
        return type("stat", (), {"st_size": size_bytes})

    def getpid(self) -> int:
        return 1

    # ---- the other modules

    def flock(self, fd: int, operation: int) -> None:
        _, file = self._file(fd)
        if operation == FcntlModule.LOCK_UN:
            _unlock(file, fd)
            return
        if file.locked_by is not None and file.locked_by.alive:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        file.locked_by, file.lock_fd = PROCESS.get(), fd


def _unlock(file: SimFile, fd: int) -> None:
    if file.lock_fd == fd:
        file.locked_by, file.lock_fd = None, -1


class _Mapped(bytes):
    """A file as it was when it was mapped."""

    def __enter__(self) -> _Mapped:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to unmap."""


class MmapModule:
    """The module `mmap`."""

    ACCESS_READ = 1

    def __init__(self, machines: Machines) -> None:
        self._machines = machines

    def mmap(self, fd: int, size_bytes: int, access: int) -> _Mapped:
        return _Mapped(self._machines.pread(fd, size_bytes, 0))


class FcntlModule:
    """The module `fcntl`."""

    LOCK_EX, LOCK_NB, LOCK_UN = 2, 4, 8

    def __init__(self, machines: Machines) -> None:
        self.flock = machines.flock
