"""Signals of a process that starts: before its imports are done, nothing else handles them.

Owns: the handlers of SIGINT, SIGTERM and SIGHUP from the first line of a program until its command
(streamhouse_cli.process) or its service (tasks.py, supervisor.py) takes them over.
Invariants: a signal never shows a traceback, and never raises inside an import. SIGHUP never ends a service, and stays
ignored if it was ignored at the start (nohup); so does SIGINT (a background job of a shell). Nothing but the standard
library's smallest modules is imported here: what comes before the handlers is not covered by them.
"""

from __future__ import annotations

import atexit
import os
import signal
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping
    from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle_from_the_start(*, survives_hangups: bool) -> None:
    """Has SIGINT, SIGTERM and SIGHUP end this process at once and without a word, with the exit code that shells
    report; with `survives_hangups` SIGHUP passes without effect. Signals that were held back over `exec` come now."""
    for number in ENDING:
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    if survives_hangups:
        survive_hangups()
    atexit.register(_ignore_from_now_on)  # the first one registered is the last one called
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _ignore_from_now_on() -> None:
    """Ignores SIGINT, SIGTERM and SIGHUP in the interpreter's own end, which takes 100 to 300 ms: it first puts the
    kernel's defaults in the place of Python's handlers, so that a signal would take the place of the exit code. Threads
    have ended and all other exit handlers have run by then."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def hold_back() -> None:
    """Keeps SIGINT, SIGTERM and SIGHUP pending, also over an `exec`, which resets handlers: until the new program's
    `handle_from_the_start`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def survive_hangups() -> None:
    """Lets SIGHUP pass without effect until a Supervisor handles it: a reload during start-up must not kill. Changes
    nothing if SIGHUP is ignored."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, let_pass)


def take_back(loop: asyncio.AbstractEventLoop, handlers: Mapping[signal.Signals, Any]) -> None:
    """Replaces the event loop's handlers of signals, by number. Removing one leaves the kernel's or Python's default,
    which ends the process or raises wherever it is: no signal comes in between."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    for number, handler in handlers.items():
        loop.remove_signal_handler(number)
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def restore_sigint() -> None:
    """Restores Python's handler of SIGINT if this process was started with the signal ignored, as shell scripts start
    what runs in the background. Programs and tests call it before they start processes: a child inherits an ignored
    signal and can then not be stopped by it, but does not inherit a handler."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def let_pass(number: int, frame: FrameType | None) -> None:
    """Handler of a signal that has no effect; unlike SIG_IGN it is not handed down to other programs."""


def end_at_once(code: int) -> NoReturn:
    """Ends the process without unwinding: an exception raised by a signal may come out in a callback of a C extension,
    and gRPC's have crashed on it. Nothing is lost of stderr, which is flushed with every line."""
    os._exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    end_at_once(128 + number)
