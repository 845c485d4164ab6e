"""Nemeses of the machine that a process runs on: its disk, its clock."""

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator

from tests.faults.fleet import AGENTS, SERVICES, SMALL_DISK_AGENT, Fleet
from tests.faults.nemesis import Deed, NotPossible, all_of, nemesis, one_of

CLOCK_SHIFT_S_MAX = 600


@nemesis("disk-full", hold_s=(2.0, 8.0))
async def disk_full(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """An agent's disk has no byte left."""
    if fleet.small_disk is None:
        raise NotPossible("this machine does not allow to mount a tmpfs")
    with all_of(fleet, [SMALL_DISK_AGENT]):
        filler = fleet.small_disk / "filler"
        try:
            await asyncio.to_thread(_fill, str(filler))
            yield Deed(f"the disk of {SMALL_DISK_AGENT} is full")
        finally:
            filler.unlink(missing_ok=True)


def _fill(path: str) -> None:
    file = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        for chunk in (1024 * 1024, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(file, b"\0" * chunk)
    finally:
        os.close(file)


@nemesis("fsync", hold_s=(2.0, 5.0))
async def fsync(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """fsync answers EIO: the agent must not trust its log any more, ends, and replays."""
    if fleet.library is None:
        raise NotPossible("no C compiler to build the shim with")
    with one_of(fleet, rng, AGENTS) as name:
        member = fleet.members[name]
        member.may_die = True
        member.control.fail_fsync(True)
        try:
            yield Deed(f"fsync fails for {name}")
        finally:
            member.control.fail_fsync(False)
            await fleet.until_serving(name)
            member.may_die = False


@nemesis("clock")
async def clock(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """The wall clock of one process is wrong by minutes."""
    if fleet.library is None:
        raise NotPossible("no C compiler to build the shim with")
    with one_of(fleet, rng, SERVICES) as name:
        shift_s = rng.choice((-1, 1)) * rng.randrange(10, CLOCK_SHIFT_S_MAX)
        fleet.members[name].control.shift_clock(shift_s * 1000)
        try:
            yield Deed(f"the clock of {name} is {shift_s:+} s off")
        finally:
            fleet.members[name].control.shift_clock(0)
