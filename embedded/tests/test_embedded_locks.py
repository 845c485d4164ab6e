"""Locks of directories end with their owner's `close`, also while another thread forks, and a cancelled start leaves no
thread behind that takes a lock or starts a process."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shread.adapters import disk_cache
from shread.adapters.disk_cache import DiskCache
from shread.chunk_reader import ChunkId
from shread.counters import Counters
from shstore.local_files import DirectoryLock
from streamhouse_embedded import postgres as postgres_module
from streamhouse_embedded.data_dir import DataDir
from streamhouse_embedded.postgres import EmbeddedPostgres, PostgresError
from streamhouse_ingest.adapters import wal_directory
from streamhouse_ingest.adapters.wal import FileWal
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.settings import IngestSettings
from streamhouse_ingest.wiring import build

from tests.platform.platform import Platform


@pytest.fixture
def fork() -> Iterator[Callable[[Path], None]]:
    """Starts a child that keeps copies of all our descriptors of a file, as every child does from fork to exec."""
    children: list[subprocess.Popen[bytes]] = []

    def start(path: Path) -> None:
        copies = tuple(int(fd.name) for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.samefile(path))
        assert copies, f"{path} is not open"
        children.append(subprocess.Popen(["sleep", "600"], pass_fds=copies))

    yield start
    for child in children:
        child.kill()
        child.wait()


def test_a_data_directory_is_free_once_unlocked(tmp_path: Path, fork: Callable[[Path], None]) -> None:
    first = DataDir(tmp_path)
    first.lock()
    fork(tmp_path / "lock")
    first.unlock()
    second = DataDir(tmp_path)
    second.lock()
    second.unlock()


def test_a_logs_directory_is_free_once_closed(tmp_path: Path, fork: Callable[[Path], None]) -> None:
    first = WalDirectory.open(tmp_path, "agent")
    fork(tmp_path / "lock")
    first.close()
    WalDirectory.open(tmp_path, "agent").close()


async def test_a_cache_directory_is_free_once_closed(tmp_path: Path, fork: Callable[[Path], None]) -> None:
    first = cache(tmp_path)
    await first.open()
    fork(tmp_path / "lock")
    first.close()
    second = cache(tmp_path)
    await second.open()
    second.close()


def test_directories_of_a_store_are_free_once_used(tmp_path: Path, fork: Callable[[Path], None]) -> None:
    path = tmp_path / "lock"
    with DirectoryLock(path).using():
        fork(path)
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_a_database_directory_is_free_after_a_failed_start(
    tmp_path: Path, fork: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_programs(explicit: Path | None) -> Path:
        fork(tmp_path / "pg.lock")
        raise PostgresError("no programs")

    monkeypatch.setattr(postgres_module, "find_bin_dir", no_programs)
    for _ in range(2):
        with pytest.raises(PostgresError, match="no programs"):
            await EmbeddedPostgres(tmp_path / "pg").start()


class Gate:
    """A blocking call that a test holds up in its thread."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self.entered = asyncio.Event()
        self.open = threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self.open.wait(60), "the test is over"
        return self._call(*arguments)

    async def cancel_within(self, task: asyncio.Task[Any]) -> None:
        """Cancels the task twice while its thread is held up; the task ends after its thread."""
        await self.entered.wait()
        try:
            for _ in range(2):
                task.cancel()
                await turns()
                assert not task.done(), "its thread still runs"
        finally:
            self.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.long
async def test_a_database_whose_start_is_cancelled_is_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that outlived its start would stop the processes of the next start, or start some beside those."""
    gate = Gate(postgres_module.RunAs.choose)
    monkeypatch.setattr(postgres_module.RunAs, "choose", gate)
    postgres = EmbeddedPostgres(tmp_path / "pg")
    await gate.cancel_within(asyncio.create_task(postgres.start()))
    monkeypatch.undo()
    await postgres.start()
    await postgres.stop()


async def test_a_cache_whose_start_is_cancelled_holds_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(fcntl.flock)
    monkeypatch.setattr(disk_cache.fcntl, "flock", gate)
    first = cache(tmp_path)
    await gate.cancel_within(asyncio.create_task(first.open()))
    monkeypatch.undo()
    second = cache(tmp_path)
    await second.open()
    second.close()


async def test_an_agent_whose_start_is_cancelled_holds_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(fcntl.flock)
    monkeypatch.setattr(wal_directory.fcntl, "flock", gate)
    agent = build(IngestSettings.load({}, wal_dir=str(tmp_path), agent_id="agent"), NoCoordinator())
    await gate.cancel_within(asyncio.create_task(agent.start("127.0.0.1:1")))
    monkeypatch.undo()
    with contextlib.closing(WalDirectory.open(tmp_path, "agent")):
        assert agent.tasks.error is None


@pytest.mark.parametrize("call", ["note_history", "mark_used"])
async def test_a_log_is_unlocked_behind_the_last_write_of_a_cancelled_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Another agent got the lock while the thread of the first still wrote."""
    gate = Gate(getattr(FileWal, call))
    monkeypatch.setattr(FileWal, call, lambda *arguments: gate(*arguments))
    agent = build(IngestSettings.load({}, wal_dir=str(tmp_path), agent_id="agent"), Platform().service.api)
    await gate.cancel_within(asyncio.create_task(agent.start("127.0.0.1:1")))
    monkeypatch.undo()
    with contextlib.closing(WalDirectory.open(tmp_path, "agent")):
        assert agent.tasks.error is None


async def test_a_log_is_unlocked_behind_the_last_write_of_a_cancelled_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = build(IngestSettings.load({}, wal_dir=str(tmp_path), agent_id="agent"), Platform().service.api)
    await agent.start("127.0.0.1:1")
    gate = Gate(FileWal.close)
    monkeypatch.setattr(FileWal, "close", lambda *arguments: gate(*arguments))
    await gate.cancel_within(asyncio.create_task(agent.stop()))
    monkeypatch.undo()
    with contextlib.closing(WalDirectory.open(tmp_path, "agent")):
        assert agent.tasks.error is None


@pytest.mark.parametrize("call", ["_write", "_unlink"])
async def test_a_cancelled_write_to_a_cache_ends_after_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The owner unlocks the directory once its downloads have ended, and another process takes it."""
    with contextlib.closing(cache(tmp_path)) as disk:
        await disk.open()
        gate = Gate(getattr(DiskCache, call))
        monkeypatch.setattr(DiskCache, call, lambda *arguments: gate(*arguments))
        chunk = ChunkId("object", 0)
        await gate.cancel_within(asyncio.create_task(disk.write(chunk, b"v") if call == "_write" else disk.drop(chunk)))


class NoCoordinator:
    """The agent is cancelled before it asks a coordinator."""


def cache(directory: Path) -> DiskCache:
    return DiskCache(directory, 1 << 20, 1 << 16, Counters())
