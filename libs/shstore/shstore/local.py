"""A directory as object store: the embedded platform's, and good for one machine.

Objects lie under `objects/` by their key; `tmp/` holds files being written; `lock` keeps the removal of empty
directories and puts into them apart. All blocking calls run in threads. Invariants: an object appears under its key
complete and synced, or not at all; a key cannot also be the directory of another ('a' beside 'a/b').
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from shruntime.files import PRIVATE_DIRECTORY, make_directory, sync_directory

from shstore import local_files as files
from shstore.errors import KeyInvalid, KeysRefused, ObjectExists, ObjectMissing
from shstore.keys import check_key, check_prefix
from shstore.options import StoreOptions
from shstore.port import ObjectInfo
from shstore.ranges import byte_views, check_range, resolve_range

PAGE_KEYS = 1000
"""Keys listed per visit to a thread: as S3's pages, some milliseconds each."""


class LocalStore:
    """Store in the directory `settings.path`/`settings.prefix`, which is made if missing.

    Leftovers of writers that died are removed in `check()` or at the first put, whichever comes first. Several stores,
    in several processes, may share a directory.
    """

    def __init__(self, settings: StoreOptions) -> None:
        assert settings.kind == "local" and settings.path is not None
        self._get_bytes_max = settings.get_bytes_max
        root = settings.path / settings.prefix
        self._objects = root / "objects"
        self._temps = root / "tmp"
        self._lock = files.DirectoryLock(root / "lock")
        self._lock_number = -1
        self._durable_directories: set[Path] = set()
        self._prepared = False

    async def put(self, key: str, parts: Sequence[bytes | memoryview], *, if_absent: bool = True) -> ObjectInfo:
        check_key(key)
        views, _ = byte_views(parts)
        return await asyncio.to_thread(self._put, key, views, if_absent)

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        check_key(key)
        check_range(at, size_bytes)
        return await asyncio.to_thread(self._get, key, at, size_bytes)

    async def head(self, key: str) -> ObjectInfo:
        check_key(key)
        return await asyncio.to_thread(self._head, key)

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        walk = files.walk(self._objects, prefix, start_after)
        while page := await asyncio.to_thread(files.translated, f"list {prefix!r}", _page, walk):
            for key, status in page:
                yield _info(key, status)

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        await asyncio.to_thread(self._delete, list(keys))

    async def check(self) -> None:
        await asyncio.to_thread(files.translated, f"use the directory {self._objects.parent}", self._check)

    async def close(self) -> None:
        """Does nothing: no resource is held between calls."""

    # Below: blocking, run in a thread.

    def _prepare(self) -> None:
        if not self._prepared:
            for directory in (self._objects, self._temps):
                make_directory(directory)
            files.remove_leftovers(self._temps)
            self._prepared = True

    def _check(self) -> None:
        self._prepare()
        with files.TempFile(self._temps) as temp:
            temp.write([memoryview(b"probe")])
            # Hard links are what put-if-absent needs; not all file systems have them.
            probe = temp.path.with_suffix(".link")
            os.link(temp.path, probe)
            probe.unlink()

    def _put(self, key: str, views: Sequence[memoryview], if_absent: bool) -> ObjectInfo:
        with files.translating(f"put {key!r}"), self._prepared_for(), files.TempFile(self._temps) as temp:
            temp.write(views)
            with self._lock.using() as number:
                self._forget_before(number)
                self._publish(key, temp.path, if_absent)
            return _info(key, temp.status())

    @contextmanager
    def _prepared_for(self) -> Iterator[None]:
        try:
            self._prepare()
            yield
        except FileNotFoundError:
            # Another process removed a directory of ours: the next attempt makes it again.
            self._prepared = False
            self._durable_directories.clear()
            raise

    def _forget_before(self, number: int) -> None:
        """Forgets directories known to be durable: others may have removed them since and made them again."""
        if number != self._lock_number:
            self._durable_directories.clear()
            self._lock_number = number

    def _publish(self, key: str, temp: Path, if_absent: bool) -> None:
        target = self._objects / key
        self._make_directories(key, target.parent)
        try:
            if if_absent:
                # Fails if the name exists: put-if-absent without a race, between processes, too.
                os.link(temp, target)
            else:
                temp.replace(target)
        except (FileExistsError, IsADirectoryError):
            if target.is_dir():
                raise KeyInvalid(key, "is a directory of other keys in this local store") from None
            # A retry after a lost outcome takes "exists" for success: make the existing object durable, too.
            sync_directory(target.parent)
            raise ObjectExists(key) from None
        # Durable before `put` returns, because the segment may be registered from then on.
        sync_directory(target.parent)

    def _make_directories(self, key: str, directory: Path) -> None:
        """Makes and fsyncs each level once per process: another writer's mkdir may not be durable yet."""
        for level in reversed([directory, *directory.parents]):
            if level in self._durable_directories or not level.is_relative_to(self._objects):
                continue
            try:
                level.mkdir(PRIVATE_DIRECTORY, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise KeyInvalid(key, "lies below another object's key in this local store") from None
            sync_directory(level.parent)
            self._durable_directories.add(level)

    def _get(self, key: str, at: int, size_bytes: int | None) -> bytes:
        with files.translating(f"get {key!r}"), files.opened(self._objects / key, key) as fd:
            wanted = resolve_range(
                key,
                at=at,
                size_bytes=size_bytes,
                object_size_bytes=os.fstat(fd).st_size,
                get_bytes_max=self._get_bytes_max,
            )
            return files.read_exactly(fd, key, at, wanted)

    def _head(self, key: str) -> ObjectInfo:
        with files.translating(f"head {key!r}"):
            try:
                status = os.lstat(self._objects / key)
            except (FileNotFoundError, NotADirectoryError):
                raise ObjectMissing(key) from None
            if not stat.S_ISREG(status.st_mode):
                raise ObjectMissing(key)
            return _info(key, status)

    def _delete(self, keys: Sequence[str]) -> None:
        with files.translating(f"delete {len(keys)} objects"), self._prepared_for():
            with self._lock.using():
                emptied, refused = self._unlink(keys)
            # The exclusive lock holds up all puts, so it is taken only if there is a directory to remove.
            if empty := [directory for directory in emptied if files.is_empty(directory)]:
                with self._lock.removing():
                    for directory in empty:
                        files.remove_empty(directory, self._objects)
        if refused:
            first, error = next(iter(refused.items()))
            message = f"{len(refused)} objects were not deleted, the first {first!r}: {error}"
            raise KeysRefused(message, list(refused)) from error

    def _unlink(self, keys: Sequence[str]) -> tuple[set[Path], dict[str, PermissionError]]:
        """Deletes durably. Returns the directories of the objects, and the keys whose deletion is not permitted."""
        emptied: set[Path] = set()
        refused: dict[str, PermissionError] = {}
        for key in keys:
            path = self._objects / key
            try:
                path.unlink()
                emptied.add(path.parent)
            except PermissionError as error:
                refused[key] = error
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue  # no such object: the state that delete promises
        for directory in emptied:
            sync_directory(directory)
        return emptied, refused


def _page(walk: files.Walk) -> Sequence[tuple[str, os.stat_result]]:
    return [*islice(walk, PAGE_KEYS)]


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    modified_ms = status.st_mtime_ns // 1_000_000
    etag = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return ObjectInfo(key=key, size_bytes=status.st_size, modified_ms=modified_ms, etag=etag)
