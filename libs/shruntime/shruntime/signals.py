"""Signals of a process that starts: before its imports are done, no other code handles them.

Owns: the handlers of SIGINT, SIGTERM and SIGHUP from the first line of a program until its command
(streamhouse_cli.process) or its service (tasks.py, supervisor.py) takes them over. Does not own: handlers of a running
service. Invariants: a signal never shows a traceback, and never raises inside an import. SIGHUP never ends a service,
and stays ignored if it was ignored at the start (nohup); so does SIGINT (a background job of a shell). Only the
standard library's smallest modules are imported here: imports before the handlers are not covered by them.
"""

from __future__ import annotations

import atexit
import os
import signal
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping
    from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle_from_the_start(*, survives_hangups: bool) -> None:
    """Makes SIGINT, SIGTERM and SIGHUP end this process at once and silently, with the exit code that shells report;
    with `survives_hangups` SIGHUP has no effect. Signals held back over `exec` arrive now."""
    for number in ENDING:
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    if survives_hangups:
        survive_hangups()
    atexit.register(_ignore_from_now_on)  # atexit calls the first registered handler last
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _ignore_from_now_on() -> None:
    """Ignores SIGINT, SIGTERM and SIGHUP in the interpreter's own end, which takes 100 to 300 ms: it first restores
    the kernel's defaults, so that a signal would replace the exit code. Threads have ended and all other exit
    handlers have run by then."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def hold_back() -> None:
    """Keeps SIGINT, SIGTERM and SIGHUP pending, also over an `exec`, which resets handlers: until the new program's
    `handle_from_the_start`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def survive_hangups() -> None:
    """Makes SIGHUP pass without effect until a Supervisor handles it: a reload during start-up must not kill.
    Changes nothing if SIGHUP is ignored."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, let_pass)


def take_back(loop: asyncio.AbstractEventLoop, handlers: Mapping[signal.Signals, Any]) -> None:
    """Replaces the event loop's handlers of signals, by number. Removing a handler leaves the kernel's or Python's
    default, which ends the process or raises anywhere: no signal arrives in between."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    for number, handler in handlers.items():
        loop.remove_signal_handler(number)
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def restore_sigint() -> None:
    """Restores Python's handler of SIGINT if this process was started with the signal ignored, as shell scripts start
    background jobs.

    Programs and tests call it before they start processes: a child inherits an ignored signal and cannot be stopped by
    it, but does not inherit a handler.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_until_sigterm(main: Callable[[], int]) -> int:
    """Runs `main`; returns its exit code, or that of SIGTERM, which ends it as Ctrl-C does.

    An event loop that runs in `main` ends its tasks first. An exception raised by the handler would instead pass
    through whatever runs at that moment: through a callback of gRPC's C core, which then crashes as the process ends.
    """
    has_come = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal has_come
        has_come = True
        signal.raise_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        code = main()
    except KeyboardInterrupt:
        if not has_come:
            raise
        code = 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 128 + signal.SIGTERM if has_come else code


def let_pass(number: int, frame: FrameType | None) -> None:
    """Handler of a signal without effect; unlike SIG_IGN it is not inherited by other programs."""


def end_at_once(code: int) -> NoReturn:
    """Ends the process without unwinding: an exception raised by a signal may surface in a callback of a C
    extension, and gRPC's have crashed on it. stderr loses nothing, as it is flushed with every line."""
    os._exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    end_at_once(128 + number)
