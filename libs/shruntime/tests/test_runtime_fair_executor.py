"""Long work beside an event loop: by turns, a few jobs at a time, with a limit on what waits."""

import asyncio
import threading

import pytest
from shruntime.fair_executor import FairExecutor, QueueFull

pytestmark = pytest.mark.quick


class Gate:
    """Jobs that begin, and end when they are let."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._open = threading.Semaphore(0)
        self._lock = threading.Lock()

    def job(self, name: str) -> str:
        with self._lock:
            self.begun.append(name)
        assert self._open.acquire(timeout=30)
        return name

    def let(self, count: int = 1) -> None:
        self._open.release(count)


async def until_begun(gate: Gate, count: int) -> None:
    async with asyncio.timeout(30):
        while len(gate.begun) < count:
            await asyncio.sleep(0.001)


async def test_jobs_of_one_key_do_not_hold_up_those_of_another() -> None:
    work, gate = FairExecutor(at_once_max=1, bytes_max=1000), Gate()
    calls = [asyncio.create_task(work.run("a", lambda n=n: gate.job(f"a{n}"), 10)) for n in range(3)]  # type: ignore[misc]
    await until_begun(gate, 1)
    calls.append(asyncio.create_task(work.run("b", lambda: gate.job("b0"), 10)))
    await asyncio.sleep(0)
    assert work.queued_bytes == 40
    gate.let(4)
    assert await asyncio.gather(*calls) == ["a0", "a1", "a2", "b0"]
    assert gate.begun == ["a0", "a1", "b0", "a2"], "the one that was next keeps its turn, then they alternate"
    assert work.queued_bytes == 0


async def test_so_many_jobs_run_at_once_and_in_other_threads() -> None:
    work, gate = FairExecutor(at_once_max=2, bytes_max=1000), Gate()
    calls = [asyncio.create_task(work.run(n, lambda: gate.job(threading.current_thread().name), 1)) for n in range(3)]
    await until_begun(gate, 2)
    await asyncio.sleep(0.01)
    assert len(gate.begun) == 2
    assert threading.current_thread().name not in gate.begun
    gate.let(3)
    await asyncio.gather(*calls)


async def test_what_waits_has_a_limit_that_one_job_of_any_size_may_exceed() -> None:
    work, gate = FairExecutor(at_once_max=1, bytes_max=100), Gate()
    first = asyncio.create_task(work.run("a", lambda: gate.job("large"), 500))
    await until_begun(gate, 1)
    with pytest.raises(QueueFull) as full:
        await work.run("b", lambda: gate.job("more"), 1)
    assert full.value.queued_bytes == 500
    gate.let()
    assert await first == "large"
    gate.let()
    assert await work.run("b", lambda: gate.job("later"), 1) == "later"


async def test_errors_are_raised_and_a_job_nobody_waits_for_is_not_begun() -> None:
    work, gate = FairExecutor(at_once_max=1, bytes_max=100), Gate()

    def fails() -> None:
        raise ValueError("no good")

    with pytest.raises(ValueError, match="no good"):
        await work.run("a", fails, 1)
    first = asyncio.create_task(work.run("a", lambda: gate.job("first"), 1))
    given_up = asyncio.create_task(work.run("a", lambda: gate.job("given up"), 1))
    last = asyncio.create_task(work.run("a", lambda: gate.job("last"), 1))
    await until_begun(gate, 1)
    given_up.cancel()
    gate.let(2)
    assert await asyncio.gather(first, last) == ["first", "last"]
    assert gate.begun == ["first", "last"]
    assert work.queued_bytes == 0
