"""Ends of child processes, awaited on the event loop."""

from __future__ import annotations

import asyncio
import os
import subprocess


async def wait_for_end(process: subprocess.Popen[bytes]) -> None:
    """Waits for the end of the process and reaps the process. Takes no thread, which could not be cancelled."""
    if process.poll() is not None:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    pidfd = os.pidfd_open(process.pid)
    try:
        loop.add_reader(pidfd, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    process.wait()


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    """Returns the cause of the end, for a log line."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
