"""The process that a command runs in: signals that end it, standard streams that are closed.

Owns: the handlers of SIGINT, SIGTERM and SIGHUP while a command runs. Does not own: the handlers of a service that
serves (shruntime.tasks, shruntime.supervisor), and those before the command begins (shruntime.signals).
Invariants: SIGTERM ends every command, also as process 1, for which the kernel has no default action. A terminal that
hangs up (SIGHUP) ends commands in the same way, unless the signal was ignored at the start (nohup); services survive.
A signal raises nothing in an import or while an event loop runs, as the exception could hit a callback of gRPC. The
second signal ends the process at once, also while the end asked for by the first waits for something. Files and
connections never get the numbers of the standard streams.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Coroutine
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TextIO, TypeVar

from shruntime import signals

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

# Commands that serve until they are stopped.
SERVICES = frozenset({"serve", "ingest", "segmenter", "query", "coordinator"})
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells report it
IMPORTS = "<frozen importlib._bootstrap>"
SHOW_CURSOR = b"\x1b[?25h"


class Termination:
    """Inside the block the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, or cancels the work of `run`; the
    second ends the process. `exit_code` tells which came first."""

    # The instance around the running command.
    current: Termination | None = None

    def __init__(self) -> None:
        self._number = 0  # of the first signal
        self._task: asyncio.Task[Any] | None = None  # the work of `run`
        self._is_running = False  # from the beginning of `run` to its end
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """Exit code of a command that a signal has ended, 128 + the number of the first signal."""
        return 128 + self._number if self._number else EXIT_INTERRUPTED

    def __enter__(self) -> Self:
        for number in signals.ENDING:
            if _may_handle(number):
                self._before[number] = signal.signal(number, self._on_signal)
        Termination.current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Termination.current = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self._number == number:
            return  # a shell passes on the signal that the kernel has sent already: no second request
        is_first, self._number = not self._number, self._number or number
        task = self._task
        if is_first and task is not None and not task.done():
            task.get_loop().call_soon_threadsafe(task.cancel)  # a plain cancel() would not wake the loop
        elif is_first and not self._is_running and not _is_importing(frame):
            raise KeyboardInterrupt
        else:
            end_at_once(self.exit_code)

    def run(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    ) -> T:
        """Runs `work()` in a new event loop, and returns the result. Raises KeyboardInterrupt if a signal has cancelled
        the work."""
        import asyncio

        async def begin() -> T:
            self._task = asyncio.current_task()
            return await work()

        # While the loop runs nothing may be raised: it could hit a callback of gRPC.
        self._is_running = True
        try:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                return runner.run(begin())
        except asyncio.CancelledError:
            if not self._number:
                raise
            raise KeyboardInterrupt from None
        finally:
            self._task, self._is_running = None, False


def run(
    work: Callable[[], Coroutine[Any, Any, T]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> T:
    """Runs the work of a command, the coroutine made by `work()`, in a new event loop, and returns the result.

    The first signal that ends commands cancels the work, and KeyboardInterrupt is raised once the work has ended; the
    second signal ends the process at once. `asyncio.run` would raise in the middle of the work instead."""
    assert Termination.current is not None, "commands are invoked by FriendlyGroup"
    return Termination.current.run(work, loop_factory)


def _may_handle(number: int) -> bool:
    """Returns False for a signal that was ignored at the start, and for a SIGHUP that a service survives."""
    return number == signal.SIGTERM or signal.getsignal(number) not in (signal.SIG_IGN, signals.let_pass)


def _is_importing(frame: FrameType | None) -> bool:
    """True if `frame` is inside an import: modules catch exceptions raised there, or stay half-initialised."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTS:
            return True
        frame = frame.f_back
    return False


def end_at_once(code: int) -> NoReturn:
    """Ends the process without unwinding; a terminal gets back the cursor that a progress bar has hidden."""
    if os.isatty(2) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        os.write(2, SHOW_CURSOR)
    signals.end_at_once(code)


class StopSignals:
    """Inside the block Ctrl-C, SIGTERM and SIGHUP ask for an end: the first signal sets `requested`, the second
    `forced`, the third ends the process."""

    def __init__(self) -> None:
        import asyncio

        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.number = 0  # of the first signal
        self._is_forced = False  # there was a second signal
        self._loop = asyncio.get_running_loop()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in signals.ENDING:
            if _may_handle(number):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, event = number, self.requested
        elif number == signal.SIGHUP:
            return  # passed on by a shell: no second request
        elif not self._is_forced:
            self._is_forced, event = True, self.forced
        else:
            end_at_once(128 + self.number)
        self._loop.call_soon_threadsafe(event.set)  # a plain set() would not wake the loop


def keep_standard_descriptors() -> None:
    """Opens /dev/null in place of closed standard streams (`>&-`): the first file opened would get the number, and
    output of libraries would go into a log file or a connection."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def is_terminal(stream: TextIO | None) -> bool:
    """True if `stream` is a terminal; False also for a stream that was closed when the process started."""
    return stream is not None and stream.isatty()


def reader_is_gone() -> bool:
    """True if stdout is a pipe or a connection whose other end is closed."""
    try:
        # A pipe without a reader reports an error without being asked for any event.
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        return False
    return bool(poll.poll(0))


def silence_stdout() -> None:
    """Points stdout to /dev/null, for a reader that has gone: the interpreter's last flush would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def run_until_stopped(work: asyncio.Task[None], stop: StopSignals, drain_s: float) -> bool:
    """Waits for `work`; returns True once `work` has ended. Returns False if `work` still runs `drain_s` seconds after
    the first signal, or at the second signal, and cancels `work`. Raises the error of `work`."""
    import asyncio

    requested, forced = (asyncio.ensure_future(event.wait()) for event in (stop.requested, stop.forced))
    try:
        await asyncio.wait([work, requested], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([work, forced], timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            await work
        return work.done()
    finally:
        for task in (work, requested, forced):
            task.cancel()
        await asyncio.wait([work, requested, forced])
