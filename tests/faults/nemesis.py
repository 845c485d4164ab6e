"""What a fleet meets: each nemesis is an async context manager that does its worst on entry and undoes it on exit.

Owns: the registry of nemeses, and when which one has its turn. Does not own: what each does (nemeses/).
Everything random comes from the generator it is given, so that a seed gives the same faults at the same places.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from tests.faults.fleet import SESSION_TTL_S, Fleet

Nemesis = Callable[[Fleet, random.Random], AbstractAsyncContextManager[str]]

NEMESES: dict[str, Nemesis] = {}
HOLD_S: dict[str, tuple[float, float]] = {}
HOLD_DEFAULT_S = (1.0, 2 * SESSION_TTL_S)
"""How long a fault lasts: shorter and longer than a lease."""


class NotPossible(Exception):
    """This nemesis finds nothing to hit at the moment, or the machine does not allow it. Says why."""


def nemesis(
    name: str, hold_s: tuple[float, float] = HOLD_DEFAULT_S
) -> Callable[[Callable[[Fleet, random.Random], AsyncIterator[str]]], Nemesis]:
    """Registers a generator that yields once: what it did, for people."""

    def register(body: Callable[[Fleet, random.Random], AsyncIterator[str]]) -> Nemesis:
        NEMESES[name] = asynccontextmanager(body)
        HOLD_S[name] = hold_s
        return NEMESES[name]

    return register


@contextlib.contextmanager
def one_of(fleet: Fleet, rng: random.Random, candidates: Iterable[str]) -> Iterator[str]:
    """A target that no other fault is at, kept for this one."""
    free = [name for name in candidates if name not in fleet.busy]
    if not free:
        raise NotPossible("every target has a fault already")
    chosen = rng.choice(free)
    with all_of(fleet, [chosen]):
        yield chosen


@contextlib.contextmanager
def all_of(fleet: Fleet, names: Iterable[str]) -> Iterator[None]:
    wanted = set(names)
    if wanted & fleet.busy:
        raise NotPossible(f"{', '.join(sorted(wanted & fleet.busy))} has a fault already")
    fleet.busy |= wanted
    try:
        yield
    finally:
        fleet.busy -= wanted


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
    return rng.uniform(*HOLD_S[name])


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
