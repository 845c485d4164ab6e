"""Reads a file, a pipe or a terminal in chunks, beside a running event loop."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

# One read: large enough that the work per chunk is small against the work per line, small enough to stay in cache.
CHUNK_BYTES = 1024 * 1024


@contextmanager
def open_input(path: str) -> Iterator[int]:
    """Yields the file descriptor of a file, or of stdin for `-`. Raises OSError."""
    if path == "-":
        if sys.stdin is None:  # started with `<&-`
            raise OSError("stdin is closed")
        yield sys.stdin.fileno()
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def read_chunks(descriptor: int, stop: asyncio.Event) -> AsyncIterator[bytes]:
    """Yields chunks, to the end or until `stop` is set. Waits for a pipe or terminal without blocking the event loop,
    and without a thread, which could not be interrupted; a regular file is always ready."""
    always_ready = is_regular(descriptor)
    while True:
        if not always_ready:
            await _readable(descriptor, stop)
        if stop.is_set():
            return
        chunk = _read(descriptor)
        if not chunk:
            return
        yield chunk


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, CHUNK_BYTES)
    except OSError as error:
        if descriptor != 0:
            raise
        raise OSError(error.errno, error.strerror, "stdin") from error  # open for writing only, or an error of a disk


async def _readable(descriptor: int, stop: asyncio.Event) -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:  # epoll refuses /dev/null and the like, which are always ready
        return
    waits = [asyncio.ensure_future(event.wait()) for event in (ready, stop)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(descriptor)
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)


def is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)
