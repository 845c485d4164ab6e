"""A run that is interrupted at any moment leaves nothing behind: no process, no directory, no mount."""

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fleet import Fleet, in_thread
from tests.faults.history import Recorder

PATIENCE_S = 90


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where servers make their directories; a short path, as sockets lie in it."""
    path = Path(tempfile.mkdtemp(prefix="sh-"))
    path.chmod(0o755)  # PostgreSQL may be another user
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    shutil.rmtree(path, ignore_errors=True)


async def test_a_thread_is_waited_for_before_a_cancellation_goes_on() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(PATIENCE_S)
        done.set()

    task = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


@pytest.mark.integration
@pytest.mark.timeout(300)
async def test_nothing_is_left_of_a_start_that_is_interrupted(tmp_path: Path, temporary: Path) -> None:
    recorder = Recorder(tmp_path / "history.jsonl")
    fleet = Fleet(tmp_path, recorder)
    starting = asyncio.create_task(fleet.start())
    async with asyncio.timeout(PATIENCE_S):
        while not left_in(temporary) and not starting.done():
            await asyncio.sleep(0.05)
    starting.cancel()
    assert isinstance(*await asyncio.gather(starting, return_exceptions=True), asyncio.CancelledError)
    await fleet.close()
    await asyncio.get_running_loop().shutdown_default_executor()
    recorder.close()
    assert not fleet.servers
    assert left_in(temporary) == []
    assert str(temporary) not in mounts()


def left_in(directory: Path) -> list[Path]:
    return list(directory.glob("streamhouse-*"))


def mounts() -> str:
    return Path("/proc/mounts").read_text()
