"""Chunks of objects as files in a directory: kept over restarts, least recently used out first.

Owns: the files, and their order of use. Invariants: the files never exceed `bytes_max` together; a file is complete or
absent, as a chunk is written to another file that is renamed. Neither file nor directory is fsynced: every block is
checked against its CRC on use, and chunks lost in a power cut are fetched again. The modification time of a file is the
time of the last use.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from shruntime.files import PRIVATE_DIRECTORY, PRIVATE_FILE, make_private, unlock
from shruntime.tasks import run_to_end

from shread.chunk_reader import CacheDirError, ChunkId
from shread.core.lru import LruLimit
from shread.counters import Counters

log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{32}-[0-9]+")
_ANY_CHUNK_DIR = re.compile(r"chunks-[0-9]+")
# A complaint about a full disk is news, the next thousand within the minute are not.
_COMPLAIN_EVERY_S = 60.0


class DiskCache:
    """Keeps at most `bytes_max` bytes of chunks of `chunk_bytes` each below `directory`, for one process at a time."""

    def __init__(self, directory: Path, bytes_max: int, chunk_bytes: int, counters: Counters) -> None:
        self._directory = directory
        self._chunks = directory / f"chunks-{chunk_bytes}"
        self.chunk_bytes = chunk_bytes
        self._limit: LruLimit[str] = LruLimit(bytes_max)
        self._counters = counters
        self._lock = -1
        self._numbers = itertools.count()
        self._next_complaint_s = 0.0

    @property
    def size_bytes(self) -> int:
        return self._limit.size

    @property
    def bytes_max(self) -> int:
        return self._limit.size_max

    # ---- start and stop

    async def open(self) -> None:
        """Takes the directory and finds the chunks of an earlier run. Raises CacheDirError."""
        try:
            names = await run_to_end(self._open)
            surplus: list[str] = []
            for name, size_bytes in names:
                surplus += self._limit.admit(name, size_bytes)
            await run_to_end(self._unlink, surplus)
        except BaseException as error:  # also a cancellation: the thread has taken the lock by now
            self.close()
            if isinstance(error, OSError) and not isinstance(error, CacheDirError):
                raise CacheDirError(f"cache_dir {self._directory} cannot be used: {error.strerror}") from error
            raise

    def close(self) -> None:
        if self._lock >= 0:
            unlock(self._lock)
            self._lock = -1

    def _open(self) -> list[tuple[str, int]]:
        self._directory.mkdir(PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        self._lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheDirError(f"cache_dir {self._directory} is in use by another process") from error
        for path in self._directory.iterdir():
            if path != self._chunks and _ANY_CHUNK_DIR.fullmatch(path.name):
                shutil.rmtree(path)  # of another chunk size: useless now
        self._chunks.mkdir(PRIVATE_DIRECTORY, exist_ok=True)
        if not make_private(self._chunks):
            log.warning("%s holds records, is open to other users and belongs to one: delete it", self._chunks)
        # Oldest use first: eviction goes on where the earlier process stopped.
        return [(name, size_bytes) for _, name, size_bytes in sorted(self._scan())]

    def _scan(self) -> Iterator[tuple[int, str, int]]:
        """Yields (last use in ns, name, size in bytes) of each chunk; removes files that a crash left half written."""
        for folder in self._chunks.iterdir():
            for path in folder.iterdir():
                status = path.stat()
                if _NAME.fullmatch(path.name) and 0 < status.st_size <= self.chunk_bytes:
                    yield status.st_mtime_ns, path.name, status.st_size
                else:
                    path.unlink()

    # ---- used by the chunk reader

    def size_of(self, chunk: ChunkId) -> int:
        """Returns the bytes held of the chunk, 0 if absent. Counts as use."""
        name = _name_of(chunk)
        self._limit.touch(name)
        return self._limit.size_of(name)

    def read(self, chunk: ChunkId, at: int, size_bytes: int) -> bytes | None:
        """Returns bytes from `at` in the chunk, or None if the file is gone, shorter, or cannot be read. Blocking."""
        try:
            fd = os.open(self._path(_name_of(chunk)), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = os.pread(fd, size_bytes, at)
            # The order of use has to survive a restart.
            os.utime(fd)
        except OSError as error:
            log.warning("cached chunk %s cannot be read and is fetched again: %s", chunk, error)
            return None
        finally:
            os.close(fd)
        return found if len(found) == size_bytes else None

    async def write(self, chunk: ChunkId, content: bytes) -> None:
        """Keeps the chunk if the disk permits; a full or failing disk only costs the caching."""
        name = _name_of(chunk)
        gone = self._limit.admit(name, len(content))
        if name in gone:
            return
        try:
            await run_to_end(self._write, name, content, gone)
        except OSError as error:
            self._limit.drop(name)
            self._counters.cache_write_errors += 1
            self._complain(error)
        finally:
            # Evicted while it was being written; also where the writer was cancelled, whose thread has written it.
            if name not in self._limit:
                await run_to_end(self._unlink, [name])

    async def drop(self, chunk: ChunkId) -> None:
        """Forgets a chunk, e.g. a damaged one."""
        name = _name_of(chunk)
        self._limit.drop(name)
        await run_to_end(self._unlink, [name])

    def _write(self, name: str, content: bytes, gone: Sequence[str]) -> None:
        self._unlink(gone)
        path = self._path(name)
        # Two writes of a chunk may overlap, of different lengths: each has a file of its own until it is complete.
        unfinished = path.with_name(f"{name}.{next(self._numbers)}.tmp")
        try:
            path.parent.mkdir(
                PRIVATE_DIRECTORY, parents=True, exist_ok=True
            )  # the cache may be deleted, also while it is used
            unfinished.write_bytes(content)
            unfinished.rename(path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to report
                unfinished.unlink(missing_ok=True)
            raise

    def _unlink(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self._path(name).unlink(missing_ok=True)
            except OSError as error:
                log.warning("cached chunk %s cannot be removed: %s", name, error)

    def _path(self, name: str) -> Path:
        return self._chunks / name[:2] / name

    def _complain(self, error: OSError) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._next_complaint_s:
            self._next_complaint_s = now_s + _COMPLAIN_EVERY_S
            log.warning("the cache in %s cannot be written, reads go on without it: %s", self._directory, error)


def _name_of(chunk: ChunkId) -> str:
    return f"{hashlib.blake2b(chunk.object_key.encode(), digest_size=16).hexdigest()}-{chunk.number}"
