"""Faults of the disk under a log: full, or held.

A full disk is the kernel's own refusal to let a file of this process grow beyond a size: no disk need be filled. A held
disk is a method of the log's adapter that waits in the log's thread, as a call into a disk that hangs does.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def full_disk(file_bytes_max: int) -> Iterator[None]:
    """No file of this process may grow beyond while the block runs: as a full disk, but with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_max, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class HeldDisk:
    """`reached`: a call waits. `release` lets it and all later ones through."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._released = threading.Event()

    def release(self) -> None:
        self._released.set()

    def wait(self) -> None:
        self.reached.set()
        self._released.wait()


@contextmanager
def held_disk(adapter: type, method: str) -> Iterator[HeldDisk]:
    """Holds the calls of a method of all logs that open with this adapter, until they are released or the block
    ends."""
    held, real = HeldDisk(), getattr(adapter, method)

    def wait(self: Any, *args: Any) -> Any:
        held.wait()
        return real(self, *args)

    setattr(adapter, method, wait)
    try:
        yield held
    finally:
        held.release()
        setattr(adapter, method, real)
