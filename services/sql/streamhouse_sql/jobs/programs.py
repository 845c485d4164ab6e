"""Threads in which the programs of jobs run: interruptible, of a limited number, and lost if they heed no interrupt.

Owns: the slots of the threads, how many were lost. Does not own: the programs.
Invariants: at most `threads_max` calls run, besides lost ones. A call that waits for a slot can be cancelled at once;
one that runs has ended when `run` returns or raises, or was reported as lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from shproto.errors import StatementTimeout

from streamhouse_sql.threads import INTERRUPT_AGAIN_MS, in_daemon

log = logging.getLogger(__name__)
T = TypeVar("T")

# A call that goes on for this long although it is interrupted is lost: some functions of DuckDB heed no interrupt.
INTERRUPT_MS_MAX = 10_000


class Programs:
    """Runs calls in at most `threads_max` threads."""

    def __init__(self, threads_max: int, interrupt_ms_max: int = INTERRUPT_MS_MAX) -> None:
        self._slots = asyncio.Semaphore(threads_max)
        self._interrupt_ms_max = interrupt_ms_max
        self.lost = 0

    async def run(
        self, work: Callable[[], T], interrupt: Callable[[], None], on_lost: Callable[[], None], *, timeout_ms: int
    ) -> T:
        """Returns the result of `work`, run in a thread. A call that is cancelled, or runs for longer than
        `timeout_ms`, is interrupted and waited for, then raises StatementTimeout; the wait for a thread does not count.
        If it heeds no interrupt, calls `on_lost`: its thread goes on, and nothing that it uses may be closed."""
        async with self._slots:
            call = in_daemon(work, "job program")
            is_late = True
            try:
                await asyncio.wait((call,), timeout=timeout_ms / 1000)
                is_late = not call.done()
            finally:
                await self._end(call, interrupt, on_lost)
            if is_late:
                goes_on = "" if call.done() else f", and goes on although interrupted for {self._interrupt_ms_max} ms"
                raise StatementTimeout(
                    f"a micro-batch takes longer than {timeout_ms} ms (sql_job_step_timeout_ms){goes_on}",
                    timeout_ms=timeout_ms,
                )
            return call.result()

    async def _end(self, call: asyncio.Future[Any], interrupt: Callable[[], None], on_lost: Callable[[], None]) -> None:
        """Interrupts a call that runs until it has ended, or is lost. Cancellations are raised then."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._interrupt_ms_max / 1000
        is_cancelled = False
        while not call.done() and loop.time() < deadline_s:
            interrupt()
            try:
                await asyncio.wait((call,), timeout=INTERRUPT_AGAIN_MS / 1000)
            except asyncio.CancelledError:
                is_cancelled = True
        call.add_done_callback(lambda call: call.exception())  # seen: of a call that was ended it is only the interrupt
        if not call.done():
            self.lost += 1
            log.error("a program of a job heeds no interrupt: its thread is lost, the %dth", self.lost)
            on_lost()
        if is_cancelled:
            raise asyncio.CancelledError
