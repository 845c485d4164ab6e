"""A disk that forgets: files with what was written and what of that would survive a power cut.

A killed process loses nothing that was written (the page cache stays); a power cut keeps what was fsynced, and of the
rest what chance leaves: all, a prefix, a torn write, zeros, nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.simulation.loop import Process

SECTOR_BYTES = 512
FORGOTTEN_SHARE = 0.5
"""Of failed fsyncs: after these the kernel takes for clean what it could not write; else it is dirty still."""
FATES = ("nothing", "prefix", "some", "zeros", "sectors", "everything")
"""Of what was not synced. some: each write or not, whatever their order. zeros: the file has its new size, but from
some sector on not what was written. sectors: of what was written in place, each sector is new or old."""

Entries = dict[str, "SimFile"]


@dataclass(eq=False, kw_only=True)
class SimFile:
    """`data` is what reads see. `durable` is what a power cut leaves for certain, `writes` what came since: (at,
    bytes), or (size, None). After an fsync that failed there may be more in `data`: pages that count as clean.
    """

    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    writes: list[tuple[int, bytes | None]] = field(default_factory=list)
    locked_by: Process | None = None
    lock_fd: int = -1
    """Descriptor whose flock this is: no other releases it."""

    def write(self, at: int, data: bytes) -> None:
        _apply(self.data, at, data)
        self.writes.append((at, data))

    def truncate(self, size: int) -> None:
        _apply(self.data, size, None)
        self.writes.append((size, None))

    def sync(self) -> None:
        left = bytearray(self.durable)
        for at, data in self.writes:
            _apply(left, at, data)
        self.durable = bytes(left)
        self.writes.clear()

    def fail_sync(self) -> None:
        """As Linux does it: the pages are clean from now on, but never reached the disk."""
        self.writes.clear()

    def drop_clean(self) -> None:
        """Clean pages are read from the disk again. The file keeps its size: what is not there reads as zeros."""
        if not self.writes:
            self.data = bytearray(self.durable) + bytes(max(0, len(self.data) - len(self.durable)))

    def lose_power(self, rng: random.Random) -> None:
        """Leaves the durable bytes and some of what was written since."""
        left = bytearray(self.durable)
        fate = rng.choice(FATES)
        if fate != "nothing" and self.writes:
            kept = rng.randrange(len(self.writes) + 1) if fate == "prefix" else len(self.writes)
            for at, data in self.writes[:kept]:
                if fate != "some" or rng.random() < 0.5:
                    _apply(left, at, data)
            if fate == "prefix" and kept < len(self.writes):
                at, data = self.writes[kept]
                if data:
                    _apply(left, at, data[: rng.randrange(len(data))])
            if fate == "zeros":
                self._lose_sectors(left, rng)
            if fate == "sectors":
                self._keep_old_sectors(left, rng)
        self.data, self.durable = left, bytes(left)
        self.writes.clear()
        self.locked_by = None

    def _lose_sectors(self, left: bytearray, rng: random.Random) -> None:
        """None of what was durable is among them."""
        sector = rng.randrange(len(left) // SECTOR_BYTES + 1)
        for at in range(max(sector * SECTOR_BYTES, len(self.durable)), len(left)):
            left[at] = 0

    def _keep_old_sectors(self, left: bytearray, rng: random.Random) -> None:
        """What the file has grown by is there: its size comes after its content."""
        for at in range(0, min(len(left), len(self.durable)), SECTOR_BYTES):
            if rng.random() < 0.5:
                old = self.durable[at : min(at + SECTOR_BYTES, len(left))]
                left[at : at + len(old)] = old


def _apply(data: bytearray, at: int, new: bytes | None) -> None:
    if new is None:
        del data[at:]
        data.extend(bytes(at - len(data)))
        return
    data.extend(bytes(max(0, at - len(data))))
    data[at : at + len(new)] = new


@dataclass(eq=False, kw_only=True)
class SimDisk:
    """One machine's disk: one flat directory of files, which is all a log needs.

    free_bytes: None is enough. fail_fsyncs: so many of the next fsyncs fail. cut_after: the power fails at that
    operation from now on.
    """

    name: str
    rng: random.Random
    files: Entries = field(default_factory=dict)
    durable: Entries = field(default_factory=dict)
    changes: list[Callable[[Entries], object]] = field(default_factory=list)
    free_bytes: int | None = None
    fail_fsyncs: int = 0
    cut_after: int | None = None
    operations: int = 0

    def change(self, change: Callable[[Entries], object]) -> None:
        """Of the directory; durable with its next fsync."""
        change(self.files)
        self.changes.append(change)

    def sync(self) -> None:
        self.durable = dict(self.files)
        self.changes.clear()

    def lose_power(self) -> None:
        left = dict(self.durable)
        for change in self.changes[: self.rng.randrange(len(self.changes) + 1)]:
            change(left)
        self.files, self.durable = left, dict(left)
        self.changes.clear()
        self.cut_after = None
        for name in sorted(left):
            left[name].lose_power(self.rng)

    def killed(self, process: Process) -> None:
        """The process's locks end with it; what it wrote stays."""
        self.cut_after = None
        for file in self.files.values():
            if file.locked_by is process:
                file.locked_by = None

    def step(self) -> bool:
        """Counts an operation; whether the power fails now."""
        self.operations += 1
        if self.cut_after is None:
            return False
        self.cut_after -= 1
        return self.cut_after <= 0

    def room_for(self, size_bytes: int) -> int:
        """How many of these bytes still fit, which are taken."""
        if self.free_bytes is None:
            return size_bytes
        taken = min(size_bytes, self.free_bytes)
        self.free_bytes -= taken
        return taken
