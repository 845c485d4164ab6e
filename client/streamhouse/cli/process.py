"""The process that a command runs in: signals that end it, standard streams that are closed.

Owns: the handlers of SIGTERM, SIGHUP and, for commands that drain, SIGINT, while a command runs. Services take them
over (shruntime.tasks, shruntime.supervisor).
Invariants: SIGTERM ends every command, also as process 1, for which the kernel has no default action. A terminal that
hangs up (SIGHUP) ends commands in the same way, unless the signal was ignored at the start (nohup). Files and
connections never get the numbers of the standard streams.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    import asyncio

EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells report it


class Termination:
    """Inside the block SIGTERM and SIGHUP do what Ctrl-C does; `exit_code` tells them apart afterwards."""

    def __init__(self) -> None:
        self.exit_code = EXIT_INTERRUPTED
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self.exit_code == 128 + number:
            return  # a shell passes on what the kernel has sent already: nobody is in a hurry
        self.exit_code = 128 + number
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # a shell has this process ignore Ctrl-C, which is no reason to ignore this one
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)  # while asyncio runs, its own: it cancels the command's task


class StopSignals:
    """Inside the block Ctrl-C, SIGTERM and SIGHUP ask for an end: the first sets `told`, the next `again`."""

    def __init__(self) -> None:
        import asyncio

        self.told = asyncio.Event()
        self.again = asyncio.Event()
        self.number = 0  # of the first signal
        self._loop = asyncio.get_running_loop()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._tell, number)  # wakes the loop, which else goes on waiting

    def _tell(self, number: int) -> None:
        if self.told.is_set() and number != signal.SIGHUP:  # which a shell passes on: nobody is in a hurry
            self.again.set()
        self.number = self.number or number
        self.told.set()


def keep_standard_descriptors() -> None:
    """Opens /dev/null where a standard stream is closed (`>&-`): what is opened first would get its number, and what
    libraries print would go into a log file or a connection."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def is_terminal(stream: TextIO | None) -> bool:
    """True if somebody watches `stream`; False also for one that was closed when the process started."""
    return stream is not None and stream.isatty()


def reader_is_gone() -> bool:
    """True if stdout is a pipe or a connection whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        return False
    return bool(poll.poll(0))


def silence_stdout() -> None:
    """After the reader of our output has gone: keeps the interpreter's last flush from failing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def run_until_told(work: asyncio.Task[None], stop: StopSignals, drain_s: float) -> bool:
    """Returns True once `work` has ended, False if it had not `drain_s` seconds after the first signal or at the second
    one: then it is cancelled. Raises what it raised."""
    import asyncio

    told, again = (asyncio.ensure_future(event.wait()) for event in (stop.told, stop.again))
    try:
        await asyncio.wait([work, told], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([work, again], timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            await work
        return work.done()
    finally:
        for task in (work, told, again):
            task.cancel()
        await asyncio.wait([work, told, again])
