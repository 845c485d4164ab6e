"""Signals of programs: SIGTERM ends one as Ctrl-C does."""

import asyncio
import os
import signal

import pytest
from shruntime.signals import run_until_sigterm


def test_sigterm_ends_the_tasks_of_a_loop_and_is_the_exit_code() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended: list[str] = []

    async def work() -> None:
        try:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # the loop still runs
            ended.append("task")

    def main() -> int:
        asyncio.run(work())
        return 0

    assert run_until_sigterm(main) == 128 + signal.SIGTERM
    assert ended == ["task"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_is_the_exit_code_of_a_program_that_reports_its_interruption() -> None:
    def main() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except KeyboardInterrupt:
            return 130
        return 0

    assert run_until_sigterm(main) == 128 + signal.SIGTERM


def test_without_sigterm_the_program_has_its_own_code_and_interruption() -> None:
    assert run_until_sigterm(lambda: 3) == 3

    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_until_sigterm(interrupted)
