"""Locks of simulated files, as Linux has them: a lock belongs to the descriptor that took it."""

import random
from collections.abc import Iterator

import pytest

from tests.simulation.disk import SimDisk
from tests.simulation.loop import Process, SimLoop
from tests.simulation.machines import FcntlModule, Machines, SimPath

EXCLUSIVE = FcntlModule.LOCK_EX | FcntlModule.LOCK_NB


class Files:
    """A lock file on one disk, and two processes that open it."""

    def __init__(self) -> None:
        self.loop = SimLoop(random.Random(0))
        self.machines = Machines(self.loop)
        self.first, self.second = Process(self.loop, "first"), Process(self.loop, "second")
        self.disk = SimDisk(name="disk", rng=random.Random(0))

    def open(self, process: Process) -> int:
        fd: int = process.call(self.machines.open, SimPath(self.disk, "lock"), Machines.O_RDWR | Machines.O_CREAT)
        return fd

    def lock(self, process: Process, fd: int) -> None:
        process.call(self.machines.flock, fd, EXCLUSIVE)

    def refuses(self, process: Process) -> bool:
        """Returns True if another descriptor of the process does not get the lock."""
        fd = self.open(process)
        try:
            self.lock(process, fd)
        except BlockingIOError:
            return True
        finally:
            process.call(self.machines.close, fd)
        return False


@pytest.fixture
def files() -> Iterator[Files]:
    files = Files()
    yield files
    files.loop.close()


@pytest.mark.parametrize("release", ["unlock", "close"])
def test_only_the_descriptor_that_took_a_lock_releases_it(files: Files, release: str) -> None:
    """A process that was refused the lock released it from the process that had it."""
    held = files.open(files.first)
    files.lock(files.first, held)
    for process in (files.first, files.second):
        assert files.refuses(process)
        other = files.open(process)
        if release == "unlock":
            process.call(files.machines.flock, other, FcntlModule.LOCK_UN)
        process.call(files.machines.close, other)
        assert files.refuses(files.first) and files.refuses(files.second)
    files.first.call(files.machines.flock, held, FcntlModule.LOCK_UN)
    assert not files.refuses(files.second)


def test_a_lock_ends_with_its_process(files: Files) -> None:
    files.lock(files.first, files.open(files.first))
    files.first.die()
    files.disk.killed(files.first)
    assert not files.refuses(files.second)
