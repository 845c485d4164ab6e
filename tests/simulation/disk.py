"""A disk that forgets: files with what was written and what of that would survive a power cut.

`Machines` stands in for the modules `os`, `fcntl`, `mmap` and `open` in the write-ahead log's adapters, `SimPath` for
pathlib; only what those use is there. A killed process loses nothing that was written (the page cache stays); a power
cut keeps what was fsynced, and of the rest what chance leaves: all, a prefix, a torn write, zeros, nothing.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.loop import PROCESS, PowerCut, Process, SimLoop

SECTOR_BYTES = 512
FORGOTTEN_SHARE = 0.5
"""Of failed fsyncs: after these the kernel takes for clean what it could not write; else it is dirty still."""
FATES = ("nothing", "prefix", "zeros", "everything")
"""Of what was not synced. zeros: the file has its new size, but from some sector on not what was written."""

Entries = dict[str, "SimFile"]


@dataclass(eq=False)
class SimFile:
    """`data` is what reads see. `durable` is what a power cut leaves for certain, `writes` what came since: (at,
    bytes), or (size, None). After an fsync that failed there may be more in `data`: pages that count as clean.
    """

    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    writes: list[tuple[int, bytes | None]] = field(default_factory=list)
    locked_by: Process | None = None

    def write(self, at: int, data: bytes) -> None:
        _apply(self.data, at, data)
        self.writes.append((at, data))

    def truncate(self, size: int) -> None:
        _apply(self.data, size, None)
        self.writes.append((size, None))

    def sync(self) -> None:
        left = bytearray(self.durable)
        for at, data in self.writes:
            _apply(left, at, data)
        self.durable = bytes(left)
        self.writes.clear()

    def fail_sync(self) -> None:
        """As Linux does it: the pages are clean from now on, but never reached the disk."""
        self.writes.clear()

    def drop_clean(self) -> None:
        """Clean pages are read from the disk again. The file keeps its size: what is not there reads as zeros."""
        if not self.writes:
            self.data = bytearray(self.durable) + bytes(max(0, len(self.data) - len(self.durable)))

    def lose_power(self, rng: random.Random) -> None:
        """Leaves the durable bytes and some of what was written since."""
        left = bytearray(self.durable)
        fate = rng.choice(FATES)
        if fate != "nothing" and self.writes:
            kept = rng.randrange(len(self.writes) + 1) if fate == "prefix" else len(self.writes)
            for at, data in self.writes[:kept]:
                _apply(left, at, data)
            if fate == "prefix" and kept < len(self.writes):
                at, data = self.writes[kept]
                if data:
                    _apply(left, at, data[: rng.randrange(len(data))])
            if fate == "zeros":
                self._lose_sectors(left, rng)
        self.data, self.durable = left, bytes(left)
        self.writes.clear()
        self.locked_by = None

    def _lose_sectors(self, left: bytearray, rng: random.Random) -> None:
        """None of what was durable is among them."""
        sector = rng.randrange(len(left) // SECTOR_BYTES + 1)
        for at in range(max(sector * SECTOR_BYTES, len(self.durable)), len(left)):
            left[at] = 0


def _apply(data: bytearray, at: int, new: bytes | None) -> None:
    if new is None:
        del data[at:]
        data.extend(bytes(at - len(data)))
        return
    data.extend(bytes(max(0, at - len(data))))
    data[at : at + len(new)] = new


@dataclass(eq=False)
class SimDisk:
    """One machine's disk: one flat directory of files, which is all a log needs.

    free_bytes: None is enough. fail_fsyncs: so many of the next fsyncs fail. cut_after: the power fails at that
    operation from now on.
    """

    name: str
    rng: random.Random
    files: Entries = field(default_factory=dict)
    durable: Entries = field(default_factory=dict)
    changes: list[Callable[[Entries], object]] = field(default_factory=list)
    free_bytes: int | None = None
    fail_fsyncs: int = 0
    cut_after: int | None = None
    operations: int = 0

    def change(self, change: Callable[[Entries], object]) -> None:
        """Of the directory; durable with its next fsync."""
        change(self.files)
        self.changes.append(change)

    def sync(self) -> None:
        self.durable = dict(self.files)
        self.changes.clear()

    def lose_power(self) -> None:
        left = dict(self.durable)
        for change in self.changes[: self.rng.randrange(len(self.changes) + 1)]:
            change(left)
        self.files, self.durable = left, dict(left)
        self.changes.clear()
        self.cut_after = None
        for name in sorted(left):
            left[name].lose_power(self.rng)

    def killed(self, process: Process) -> None:
        """The process's locks end with it; what it wrote stays."""
        self.cut_after = None
        for file in self.files.values():
            if file.locked_by is process:
                file.locked_by = None

    def step(self) -> bool:
        """Counts an operation; whether the power fails now."""
        self.operations += 1
        if self.cut_after is None:
            return False
        self.cut_after -= 1
        return self.cut_after <= 0

    def room_for(self, size_bytes: int) -> int:
        """How many of these bytes still fit, which are taken."""
        if self.free_bytes is None:
            return size_bytes
        taken = min(size_bytes, self.free_bytes)
        self.free_bytes -= taken
        return taken


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

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """The root is there."""

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
        self.flaws: list[str] = []

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
        if opened.file is not None and opened.file.locked_by is not None:
            opened.file.locked_by = None

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
        room = disk.room_for(len(content))
        if content and not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(at, content[:room])
        return room

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
        process = PROCESS.get()
        if file.locked_by is not None and file.locked_by.alive:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        file.locked_by = process

    def open_text(self, path: SimPath, mode: str) -> _Text:
        assert mode == "w"
        fd = self.open(path, self.O_RDWR | self.O_CREAT)
        self.ftruncate(fd, 0)
        return _Text(self, fd)


class _Text(io.StringIO):
    """What `open(path, "w")` gives."""

    def __init__(self, machines: Machines, fd: int) -> None:
        super().__init__()
        self._machines = machines
        self._fd = fd
        self._written = 0

    def fileno(self) -> int:
        return self._fd

    def flush(self) -> None:
        text = self.getvalue()[self._written :].encode()
        if text:
            self._machines.pwrite(self._fd, text, self._written)
            self._written += len(text)

    def close(self) -> None:
        if not self.closed:
            self.flush()
            self._machines.close(self._fd)
        super().close()


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

    LOCK_EX, LOCK_NB = 2, 4

    def __init__(self, machines: Machines) -> None:
        self.flock = machines.flock
