"""What a fleet meets: each nemesis is an async context manager that does its worst on entry and undoes it on exit.

Everything random comes from the generator it is given, so that a seed gives the same faults at the same places.
"""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from tests.faults.fleet import (
    AGENTS,
    COORDINATORS,
    QUERIES,
    SEGMENTERS,
    SERVICES,
    SESSION_TTL_S,
    SMALL_DISK_AGENT,
    Fleet,
    postgres_links,
)
from tests.faults.proxy import BOTH, Answers, Direction
from tests.integration.standby import PostgresPair

Nemesis = Callable[[Fleet, random.Random], AbstractAsyncContextManager[str]]

NEMESES: dict[str, Nemesis] = {}
# An agent is what holds acknowledged records: it is hit more often than the others.
TARGETS = (*AGENTS, *AGENTS, *SERVICES)
CLOCK_SHIFT_S_MAX = 600
FLAKY_INTERVAL_S = (0.05, 0.5)


class NotPossible(Exception):
    """This nemesis finds nothing to hit at the moment, or the machine does not allow it. Says why."""


def nemesis(
    name: str,
) -> Callable[[Callable[[Fleet, random.Random], AsyncIterator[str]]], Nemesis]:
    """Registers a generator that yields once: what it did, for people."""

    def register(body: Callable[[Fleet, random.Random], AsyncIterator[str]]) -> Nemesis:
        NEMESES[name] = asynccontextmanager(body)
        return NEMESES[name]

    return register


@contextlib.contextmanager
def _one_of(fleet: Fleet, rng: random.Random, candidates: Iterable[str]) -> Iterator[str]:
    """A target that no other fault is at, kept for this one."""
    free = [name for name in candidates if name not in fleet.busy]
    if not free:
        raise NotPossible("every target has a fault already")
    chosen = rng.choice(free)
    with _all_of(fleet, [chosen]):
        yield chosen


@contextlib.contextmanager
def _all_of(fleet: Fleet, names: Iterable[str]) -> Iterator[None]:
    wanted = set(names)
    if wanted & fleet.busy:
        raise NotPossible(f"{', '.join(sorted(wanted & fleet.busy))} has a fault already")
    fleet.busy |= wanted
    try:
        yield
    finally:
        fleet.busy -= wanted


# ---- processes


@nemesis("kill")
async def kill(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """A process dies at once, and comes back with its disk."""
    with _one_of(fleet, rng, TARGETS) as name:
        await fleet.kill(name)
        try:
            yield f"kill -9 {name}"
        finally:
            await fleet.start_process(name)


@nemesis("kill-agents")
async def kill_agents(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """All agents at once: nobody can take over."""
    with _all_of(fleet, AGENTS):
        for name in AGENTS:
            await fleet.kill(name)
        try:
            yield "kill -9 of all agents"
        finally:
            await asyncio.gather(*(fleet.start_process(name) for name in AGENTS))


@nemesis("power")
async def power(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """Every process of ours at once; they come back in any order."""
    order = rng.sample(SERVICES, len(SERVICES))
    with _all_of(fleet, SERVICES):
        await asyncio.gather(*(fleet.kill(name) for name in order))
        try:
            yield "kill -9 of everything"
        finally:
            await asyncio.gather(*(fleet.start_process(name) for name in order))


@nemesis("pause")
async def pause(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """SIGSTOP; on its return the process believes that nothing happened. Held past the lease by `HOLD_S`."""
    with _one_of(fleet, rng, TARGETS) as name:
        fleet.send_signal(name, signal.SIGSTOP)
        try:
            yield f"SIGSTOP {name}"
        finally:
            fleet.send_signal(name, signal.SIGCONT)


@nemesis("restart")
async def restart(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """SIGTERM: the process drains, and starts again."""
    with _one_of(fleet, rng, TARGETS) as name:
        try:
            await fleet.stop_process(name)
            yield f"graceful restart of {name}"
        finally:
            await fleet.start_process(name)


# ---- the network


@nemesis("partition")
async def partition(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """One link is silent, both ways or one way only."""
    with _one_of(fleet, rng, fleet.links) as name:
        ways = rng.choice((BOTH, BOTH, (Direction.UP,), (Direction.DOWN,)))
        fleet.links[name].hold(*ways)
        try:
            yield f"{name} holds {' and '.join(way.value for way in ways)}"
        finally:
            await fleet.links[name].heal()


@nemesis("isolate")
async def isolate(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """All links of one process are silent: to it, from it, or both."""
    with _one_of(fleet, rng, (*AGENTS, *QUERIES, *SEGMENTERS)) as name:
        outgoing = [link for link in fleet.links if link.startswith(f"{name}>")]
        incoming = [link for link in fleet.links if link == f">{name}"]
        chosen = rng.choice([links for links in (outgoing, incoming, outgoing + incoming) if links])
        with _all_of(fleet, chosen):
            for link in chosen:
                fleet.links[link].hold(*BOTH)
            try:
                yield f"isolated {name}: {', '.join(chosen)}"
            finally:
                for link in chosen:
                    await fleet.links[link].heal()


@nemesis("postgres-partition")
async def postgres_partition(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """One or both coordinators do not reach PostgreSQL, or do not hear its answers."""
    names = rng.choice((COORDINATORS, COORDINATORS[:1], COORDINATORS[1:]))
    links = [link for name in names for link in postgres_links(name)]
    ways = rng.choice((BOTH, (Direction.DOWN,)))
    with _all_of(fleet, links):
        for link in links:
            fleet.links[link].hold(*ways)
        try:
            yield f"{', '.join(links)} hold {' and '.join(way.value for way in ways)}"
        finally:
            for link in links:
                await fleet.links[link].heal()


@nemesis("flaky")
async def flaky(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """Connections of one link are reset again and again."""

    async def cut_often(link: str) -> None:
        while True:
            await asyncio.sleep(rng.uniform(*FLAKY_INTERVAL_S))
            fleet.links[link].cut()

    with _one_of(fleet, rng, fleet.links) as name:
        cutting = asyncio.create_task(cut_often(name))
        try:
            yield f"{name} is cut again and again"
        finally:
            cutting.cancel()
            await asyncio.gather(cutting, return_exceptions=True)


@nemesis("slow")
async def slow(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    with _one_of(fleet, rng, fleet.links) as name:
        delays_ms = {way: rng.randrange(0, 800) for way in BOTH}
        for way, ms in delays_ms.items():
            fleet.links[name].delay(way, ms)
        try:
            yield f"{name} delays by {delays_ms[Direction.UP]} ms up, {delays_ms[Direction.DOWN]} ms down"
        finally:
            await fleet.links[name].heal()


# ---- servers


@asynccontextmanager
async def _outage(fleet: Fleet, name: str, stop: Callable[[], None], what: str) -> AsyncIterator[str]:
    with _all_of(fleet, [name]):
        await asyncio.to_thread(stop)
        try:
            yield f"{name} {what}"
        finally:
            await asyncio.to_thread(fleet.servers[name].start)


@nemesis("postgres-kill")
async def postgres_kill(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    async with _outage(fleet, "postgres", fleet.servers["postgres"].kill, "is killed") as what:
        yield what


@nemesis("postgres-restart")
async def postgres_restart(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    async with _outage(fleet, "postgres", fleet.servers["postgres"].stop, "is stopped") as what:
        yield what


@nemesis("postgres-failover")
async def postgres_failover(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """It gets a synchronous standby, and dies; the standby takes its place. The next time it is the other way round."""
    server = fleet.servers["postgres"]
    assert isinstance(server, PostgresPair)
    with _all_of(fleet, ["postgres"]):
        await asyncio.to_thread(server.attach_standby)
        server.kill()
        try:
            yield "postgres is killed, to be replaced by its standby"
        finally:
            await asyncio.to_thread(server.start)


@nemesis("s3-away")
async def s3_away(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """Connections are refused. The objects stay: losing them is beyond what is promised."""
    async with _outage(fleet, "s3", fleet.servers["s3"].stop, "refuses connections") as what:
        yield what


@nemesis("rabbitmq")
async def rabbitmq(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    server = fleet.servers["rabbitmq"]
    async with _outage(fleet, "rabbitmq", rng.choice((server.stop, server.kill)), "is away") as what:
        yield what


@nemesis("redis")
async def redis(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    server = fleet.servers["redis"]
    async with _outage(fleet, "redis", rng.choice((server.stop, server.kill)), "is away") as what:
        yield what


@nemesis("s3-faults")
async def s3_faults(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """The object store throttles, fails, loses answers, cuts bodies short, or takes seconds."""
    links = [name for name in fleet.links if name.endswith(">s3")]
    fault = rng.choice((Answers.SLOW_DOWN, Answers.ERROR, Answers.LOST, Answers.TRUNCATED, Answers.NORMAL))
    delay_ms = rng.randrange(500, 5000) if fault is Answers.NORMAL else 0
    with _all_of(fleet, links):
        for name in links:
            fleet.links[name].answers = fault
            fleet.links[name].delay(Direction.DOWN, delay_ms)
        try:
            yield f"s3 answers {fault.value}, {delay_ms} ms late"
        finally:
            for name in links:
                await fleet.links[name].heal()


# ---- disk and clock


@nemesis("disk-full")
async def disk_full(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """An agent's disk has no byte left."""
    if fleet.small_disk is None:
        raise NotPossible("this machine does not allow to mount a tmpfs")
    with _all_of(fleet, [SMALL_DISK_AGENT]):
        filler = fleet.small_disk / "filler"
        try:
            await asyncio.to_thread(_fill, str(filler))
            yield f"the disk of {SMALL_DISK_AGENT} is full"
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


@nemesis("fsync")
async def fsync(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """fsync answers EIO: the agent must not trust its log any more, ends, and replays."""
    if fleet.library is None:
        raise NotPossible("no C compiler to build the shim with")
    with _one_of(fleet, rng, AGENTS) as name:
        member = fleet.members[name]
        member.may_die = True
        member.control.fail_fsync(True)
        try:
            yield f"fsync fails for {name}"
        finally:
            member.control.fail_fsync(False)
            await fleet.until_serving(name)
            member.may_die = False


@nemesis("clock")
async def clock(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """The wall clock of one process is wrong by minutes."""
    if fleet.library is None:
        raise NotPossible("no C compiler to build the shim with")
    with _one_of(fleet, rng, SERVICES) as name:
        shift_s = rng.choice((-1, 1)) * rng.randrange(10, CLOCK_SHIFT_S_MAX)
        fleet.members[name].control.shift_clock(shift_s)
        try:
            yield f"the clock of {name} is {shift_s:+} s off"
        finally:
            fleet.members[name].control.shift_clock(0)


HOLD_S: dict[str, tuple[float, float]] = {
    "kill": (0.0, 2 * SESSION_TTL_S),
    "kill-agents": (0.0, SESSION_TTL_S),
    "power": (0.0, SESSION_TTL_S),
    "pause": (0.5, 2.5 * SESSION_TTL_S),
    "restart": (0.0, SESSION_TTL_S),
    "disk-full": (2.0, 8.0),
    "fsync": (2.0, 5.0),
}
HOLD_DEFAULT_S = (1.0, 2 * SESSION_TTL_S)
"""How long a fault lasts: shorter and longer than a lease."""

PAUSE_S = (0.5, 5.0)
"""Between two faults: some begin before the last one is digested."""

TWO_AT_ONCE = 0.3
"""Part of the time that a second fault of another kind begins with the first."""


Note = Callable[[str, str], None]


@dataclass
class Faults:
    """`done`: every one so far, by name. `at_work`: those that are on."""

    done: list[str] = field(default_factory=list)
    at_work: set[str] = field(default_factory=set)


async def torment(
    fleet: Fleet, rng: random.Random, names: list[str], seconds: float, note: Note, faults: Faults
) -> None:
    """Faults by the generator until the time is over; each is undone before the next, and all in the end.

    All names have their turn before one has another. `faults` says which; raises what undoing one fails with.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    bag: list[str] = []
    while loop.time() < end:
        if not bag:
            bag = rng.sample(names, len(names))
        now = [bag.pop() for _ in range(2 if len(bag) > 1 and rng.random() < TWO_AT_ONCE else 1)]
        plans = [(name, random.Random(rng.getrandbits(64)), _hold_s(rng, name)) for name in now]
        async with asyncio.TaskGroup() as group:
            for name, own, hold_s in plans:
                group.create_task(_once(fleet, own, name, min(hold_s, max(end - loop.time(), 1.0)), note, faults))
        await asyncio.sleep(rng.uniform(*PAUSE_S))


def _hold_s(rng: random.Random, name: str) -> float:
    return rng.uniform(*HOLD_S.get(name, HOLD_DEFAULT_S))


async def _once(fleet: Fleet, rng: random.Random, name: str, hold_s: float, note: Note, faults: Faults) -> None:
    try:
        async with NEMESES[name](fleet, rng) as what:
            note("nemesis", f"{name}: {what}, for {hold_s:.1f} s")
            faults.done.append(name)
            faults.at_work.add(name)
            await asyncio.sleep(hold_s)
        note("nemesis", f"{name}: over")
    except NotPossible as reason:
        note("nemesis", f"{name}: not now: {reason}")
    finally:
        faults.at_work.discard(name)


def chosen(text: str) -> list[str]:
    """Names from a list with commas, or `all`. Raises ValueError for one that nobody knows."""
    names = sorted(NEMESES) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in NEMESES]
    if unknown or not names:
        raise ValueError(f"unknown nemesis {', '.join(unknown) or text!r}; known: {', '.join(sorted(NEMESES))}, all")
    return names
