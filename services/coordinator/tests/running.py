"""Coordinators that run for the length of a block, and what they do by themselves waited for."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService, build
from streamhouse_embedded.postgres import EmbeddedPostgres

PATIENCE_S = 60
"""Until something that must come is given up: no duration is tested by it, and the machine may be busy."""


@asynccontextmanager
async def running(settings: CoordinatorSettings) -> AsyncIterator[CoordinatorService]:
    service = build(settings)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Returns once the condition is met; raises TimeoutError after PATIENCE_S."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.02)


def children(pid: int) -> list[int]:
    """Returns the processes that this one has started and that run."""
    with open(f"/proc/{pid}/task/{pid}/children") as numbers:
        return [int(number) for number in numbers.read().split()]


@contextmanager
def frozen(postgres: EmbeddedPostgres) -> Iterator[None]:
    """Stops all processes of the server while the block runs. The first process is stopped first: it then starts no
    others."""
    first = postgres.pid
    assert first is not None
    stopped = [first]
    try:
        _stop(first)
        for pid in children(first):
            stopped.append(pid)
            _stop(pid)
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _stop(pid: int) -> None:
    """Returns once the process stands still, or has ended: a signal takes its time on a busy machine."""
    deadline_s = time.monotonic() + PATIENCE_S
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, signal.SIGSTOP)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZX":
            assert time.monotonic() < deadline_s, f"process {pid} does not stop"
            time.sleep(0.001)
