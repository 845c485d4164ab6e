"""Threads of programs: who waits for one is not late, and who is cancelled leaves none at work."""

import asyncio
import threading

import pytest
from shproto.errors import StatementTimeout
from streamhouse_sql.jobs.programs import Programs

LONG_MS = 600_000


def nothing() -> None: ...


async def test_the_wait_for_a_thread_is_not_time_of_the_micro_batch() -> None:
    programs, go_on = Programs(1), threading.Event()
    first = asyncio.create_task(programs.run(go_on.wait, nothing, nothing, timeout_ms=LONG_MS))
    second = asyncio.create_task(programs.run(lambda: 2, nothing, nothing, timeout_ms=1_000))
    given_up = asyncio.create_task(programs.run(lambda: 3, nothing, nothing, timeout_ms=LONG_MS))
    await asyncio.wait((first, second), timeout=1.2)
    assert not second.done()
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    go_on.set()
    assert await first and await second == 2


async def test_a_call_that_is_cancelled_twice_has_ended_when_its_caller_goes_on() -> None:
    programs, go_on = Programs(1), threading.Event()
    interrupts = asyncio.Queue[None]()
    call = asyncio.create_task(
        programs.run(go_on.wait, lambda: interrupts.put_nowait(None), nothing, timeout_ms=LONG_MS)
    )
    await asyncio.sleep(0)
    for _ in range(3):
        call.cancel()
        await interrupts.get()
        assert not call.done(), "the thread is at work"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_late_call_is_interrupted() -> None:
    programs, interrupted = Programs(1), threading.Event()
    with pytest.raises(StatementTimeout, match=r"step_timeout_ms\)$"):
        await programs.run(interrupted.wait, interrupted.set, nothing, timeout_ms=1)
    assert programs.lost == 0


async def test_a_call_that_heeds_no_interrupt_is_lost_and_others_go_on() -> None:
    programs, go_on, lost = Programs(1, interrupt_ms_max=10), threading.Event(), asyncio.Event()
    with pytest.raises(StatementTimeout, match="goes on although"):
        await programs.run(go_on.wait, nothing, lost.set, timeout_ms=1)
    assert lost.is_set() and programs.lost == 1
    assert await programs.run(lambda: 2, nothing, nothing, timeout_ms=LONG_MS) == 2
    go_on.set()
