"""Nemeses of the machine that a process runs on: its disk, its clock, its descriptors."""

import asyncio
import contextlib
import random
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.fleet import AGENTS, SERVICES, SMALL_DISK_AGENT, Fleet, in_thread
from tests.faults.nemesis import Deed, NotPossible, all_of, nemesis, one_of
from tests.integration import small_disk

CLOCK_SHIFTS_S = ((0.5, 10.0), (10.0, 600.0), (600.0, 3600.0))
"""A step by NTP; a wrong clock; one so wrong that S3 does not take its signatures (15 minutes)."""

POSTGRES_SHIFT_S = (1.0, 30.0)
"""Leases, claims and memberships run by PostgreSQL's clock. After a step back those that were renewed before it last
longer by as much, and the run waits for each that is to end."""

SWING_EVERY_S = (0.2, 1.5)

SPARE_DESCRIPTORS_MAX = 4
SILENT_CONNECTIONS = 1_200
"""More than a service may have descriptors (DESCRIPTORS_MAX)."""

SILENT_FROM = "127.0.0.2"
"""Another address than everybody else's: limits per address must not hit the wrong ones."""

NO_SHIM = "no C compiler to build the shim with"


@nemesis("disk-full", hold_s=(2.0, 8.0))
async def disk_full(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """An agent's disk has no byte left."""
    if fleet.small_disk is None:
        raise NotPossible("this machine does not allow to mount a tmpfs")
    with all_of(fleet, [SMALL_DISK_AGENT]):
        filler = fleet.small_disk / "filler"
        try:
            await in_thread(small_disk.fill, filler)
            yield Deed(f"the disk of {SMALL_DISK_AGENT} is full")
        finally:
            filler.unlink(missing_ok=True)


@nemesis("fsync", hold_s=(2.0, 5.0))
async def fsync(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """fsync answers EIO: the agent must not trust its log any more, ends, and replays."""
    if fleet.library is None:
        raise NotPossible(NO_SHIM)
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


# ---- clocks


def _any_shift_s(rng: random.Random) -> float:
    return round(rng.uniform(*rng.choice(CLOCK_SHIFTS_S)), 1)


@contextmanager
def _shifted(fleet: Fleet, rng: random.Random, shift_s: float) -> Iterator[Deed]:
    if fleet.library is None:
        raise NotPossible(NO_SHIM)
    with one_of(fleet, rng, SERVICES) as name:
        control = fleet.members[name].control
        control.shift_clock(int(shift_s * 1000))
        try:
            yield Deed(f"the wall clock of {name} jumps by {shift_s:+} s")
        finally:
            control.shift_clock(0)


@nemesis("clock-forwards")
async def clock_forwards(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """The wall clock of one process jumps forwards, and back in the end."""
    with _shifted(fleet, rng, _any_shift_s(rng)) as deed:
        yield deed


@nemesis("clock-backwards")
async def clock_backwards(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """The wall clock of one process jumps backwards, and forwards in the end."""
    with _shifted(fleet, rng, -_any_shift_s(rng)) as deed:
        yield deed


@nemesis("clock-swings")
async def clock_swings(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """The wall clock of one process jumps again and again, both ways."""
    if fleet.library is None:
        raise NotPossible(NO_SHIM)

    with one_of(fleet, rng, SERVICES) as name:
        control, shifts = fleet.members[name].control, list[float]()

        async def swing() -> None:
            while True:
                shifts.append(rng.choice((-1, 1)) * _any_shift_s(rng))
                control.shift_clock(int(shifts[-1] * 1000))
                await asyncio.sleep(rng.uniform(*SWING_EVERY_S))

        swinging = asyncio.create_task(swing())
        deed = Deed(f"the wall clock of {name} jumps to and fro")
        try:
            yield deed
        finally:
            swinging.cancel()
            await asyncio.wait([swinging])
            control.shift_clock(0)
            deed.effect = f"{len(shifts)} jumps, {min(shifts, default=0):+} to {max(shifts, default=0):+} s"


@nemesis("clock-postgres")
async def clock_postgres(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """PostgreSQL's clock jumps, by which leases, claims and memberships end."""
    if fleet.postgres_control is None:
        raise NotPossible(NO_SHIM)
    shift_s = round(rng.choice((-1, 1)) * rng.uniform(*POSTGRES_SHIFT_S), 1)
    with all_of(fleet, ["postgres-clock"]):
        fleet.postgres_control.shift_clock(int(shift_s * 1000))
        try:
            yield Deed(f"the wall clock of postgres jumps by {shift_s:+} s")
        finally:
            fleet.postgres_control.shift_clock(0)


# ---- descriptors


@nemesis("descriptors")
async def descriptors(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """A process can open nothing more: no connection, no file."""
    with one_of(fleet, rng, SERVICES) as name:
        pid = fleet.members[name].process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        spare = rng.randrange(SPARE_DESCRIPTORS_MAX + 1)
        limit = _limit_leaving(pid, spare)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
        try:
            yield Deed(f"{name} has {spare} descriptors left, the limit is {limit}")
        finally:
            with contextlib.suppress(ProcessLookupError):  # ended meanwhile: the supervisor has noted it
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def _limit_leaving(pid: int, spare: int) -> int:
    """The limit below which `spare` numbers are free. Raises NotPossible for a process that has ended."""
    try:
        used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    except FileNotFoundError as error:
        raise NotPossible("the process has ended") from error
    free = (number for number in range(len(used) + spare + 1) if number not in used)
    return [next(free) for _ in range(spare + 1)][-1]


@nemesis("silent-connections")
async def silent_connections(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """Somebody opens more connections than a service has descriptors, and says nothing."""
    with one_of(fleet, rng, SERVICES) as name:
        host, _, port = fleet.members[name].listen.rpartition(":")
        connections: list[socket.socket] = []
        deed = Deed(f"{SILENT_CONNECTIONS} silent connections to {name}")
        try:
            for _ in range(SILENT_CONNECTIONS):
                connections.append(_connect(host, int(port)))
                if len(connections) % 50 == 0:
                    await asyncio.sleep(0.01)  # the clients of the run live in this process
            yield deed
            deed.effect = f"{sum(map(_is_open, connections))} of them are open in the end"
        finally:
            for connection in connections:
                connection.close()


def _connect(host: str, port: int) -> socket.socket:
    """Begins to; whether it is taken is the service's affair."""
    made = socket.socket()
    made.setblocking(False)
    made.bind((SILENT_FROM, 0))
    made.connect_ex((host, port))
    return made


def _is_open(connection: socket.socket) -> bool:
    """True if it was taken and not closed by the other side."""
    try:
        connection.getpeername()
        return connection.recv(1024, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
