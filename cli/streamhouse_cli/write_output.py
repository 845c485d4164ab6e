"""Writes to stdout beside a running event loop."""

from __future__ import annotations

import os
import select

# A pipe that polls as writable takes this many bytes without blocking (PIPE_BUF, on Linux).
PIECE_BYTES = 4096


class Output:
    """Writes to a file descriptor. A slow reader makes only the caller wait, not the event loop: group heartbeats and
    downloads go on while `less` shows the first page."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    async def write(self, data: bytes) -> None:
        """Writes all of `data`. Raises BrokenPipeError once the reader has gone, and OSError that names stdout for
        other errors, such as a full disk."""
        view = memoryview(data)
        while view:
            if not self._poll.poll(0):
                await self._writable()
            try:
                written = os.write(self._descriptor, view[:PIECE_BYTES])
            except BrokenPipeError:
                raise
            except OSError as error:
                raise OSError(error.errno, error.strerror, "stdout") from error
            view = view[written:]

    async def _writable(self) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_writer(self._descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(self._descriptor)
