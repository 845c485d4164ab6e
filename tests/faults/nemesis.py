"""What a fleet meets: each nemesis is an async context manager that does its worst on entry and undoes it on exit.

Owns: the registry of nemeses, and when which one has its turn. Does not own: what each does (nemeses/).
Everything random comes from the generator it is given, so that a seed gives the same faults at the same places.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from tests.faults.fleet import SESSION_TTL_S, Fleet
from tests.faults.history import BEGINS, OVER, SKIPPED, Fault, Recorder

ItemT = TypeVar("ItemT")


@dataclass
class Deed:
    """`text`: what a nemesis did, for people. `effect`: what came of it, known when it is over."""

    text: str
    effect: str = ""


Nemesis = Callable[[Fleet, random.Random], AbstractAsyncContextManager[Deed]]

NEMESES: dict[str, Nemesis] = {}
HOLD_S: dict[str, tuple[float, float]] = {}
HOLD_DEFAULT_S = (1.0, 2 * SESSION_TTL_S)
"""How long a fault lasts: shorter and longer than a lease."""

LONG_HOLD_S = (1.0, 4 * SESSION_TTL_S)
"""For what is met by time-outs, so that these add up: an address is tried and given up, then the next one."""

BEGIN_S_MAX = 120.0
"""A standby is copied from its primary first."""

HEAL_S_MAX = 300.0
"""A process that is started again may take SERVING_TIMEOUT_S, after its server was."""


class NotPossible(Exception):
    """This nemesis finds nothing to hit at the moment, or the machine does not allow it. Says why."""


class Busy(NotPossible):
    """What it would hit has another fault: its turn comes later."""


class NotHealed(Exception):
    """A nemesis was not undone in its time."""


def nemesis(
    name: str, hold_s: tuple[float, float] = HOLD_DEFAULT_S
) -> Callable[[Callable[[Fleet, random.Random], AsyncIterator[Deed]]], Nemesis]:
    """Registers a generator that yields once: what it did."""

    def register(body: Callable[[Fleet, random.Random], AsyncIterator[Deed]]) -> Nemesis:
        NEMESES[name] = asynccontextmanager(body)
        HOLD_S[name] = hold_s
        return NEMESES[name]

    return register


@contextlib.contextmanager
def one_of(fleet: Fleet, rng: random.Random, candidates: Iterable[str]) -> Iterator[str]:
    """A target that no other fault is at, kept for this one."""
    free = [name for name in candidates if name not in fleet.busy]
    if not free:
        raise Busy("every target has a fault already")
    chosen = rng.choice(free)
    with all_of(fleet, [chosen]):
        yield chosen


@contextlib.contextmanager
def all_of(fleet: Fleet, names: Iterable[str]) -> Iterator[None]:
    wanted = set(names)
    if wanted & fleet.busy:
        raise Busy(f"{', '.join(sorted(wanted & fleet.busy))} has a fault already")
    fleet.busy |= wanted
    try:
        yield
    finally:
        fleet.busy -= wanted


def by_turns(fleet: Fleet, rng: random.Random, name: str, options: Sequence[ItemT]) -> ItemT:
    """One of `options`; all have their turn under `name` before one has another."""
    left = fleet.turns.setdefault(name, [])
    if not left:
        left += rng.sample(range(len(options)), len(options))
    return options[left.pop()]


PAUSE_S = (0.5, 5.0)
"""Between two faults: some begin before the last one is digested."""

TWO_AT_ONCE = 0.3
"""Part of the time that a second fault of another kind begins with the first."""


@dataclass
class Faults:
    """`done`: every one so far, by name. `at_work`: those that are on. `impossible`: by name, why this machine or fleet
    does not allow it."""

    done: list[str] = field(default_factory=list)
    at_work: set[str] = field(default_factory=set)
    impossible: dict[str, str] = field(default_factory=dict)


async def torment(
    fleet: Fleet, rng: random.Random, names: list[str], seconds: float, recorder: Recorder, faults: Faults
) -> None:
    """Faults by the generator until the time is over; each is undone before the next, and all in the end.

    All names have their turn before one has another. `faults` says which; raises what undoing one fails with, NotHealed
    if it takes too long.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    bag: list[str] = []
    while loop.time() < end:
        if not bag:
            bag = rng.sample(names, len(names))
        now = [bag.pop() for _ in range(2 if len(bag) > 1 and rng.random() < TWO_AT_ONCE else 1)]
        plans = [(name, random.Random(rng.getrandbits(64)), rng.uniform(*HOLD_S[name])) for name in now]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_once(fleet, own, name, min(hold_s, max(end - loop.time(), 1.0)), recorder, faults))
                for name, own, hold_s in plans
            ]
        bag = [name for name, task in zip(now, tasks, strict=True) if not task.result()] + bag
        await asyncio.sleep(rng.uniform(*PAUSE_S))


async def _once(fleet: Fleet, rng: random.Random, name: str, hold_s: float, recorder: Recorder, faults: Faults) -> bool:
    """Returns False if it must have its turn another time."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        try:
            async with _within(BEGIN_S_MAX, f"{name} did not begin"):
                deed = await stack.enter_async_context(NEMESES[name](fleet, rng))
        except NotPossible as reason:
            recorder.fault(Fault(name, SKIPPED, str(reason)))
            if isinstance(reason, Busy):
                return False
            faults.impossible[name] = str(reason)
            return True
        recorder.fault(Fault(name, BEGINS, f"{deed.text}, for {hold_s:.1f} s"))
        faults.done.append(name)
        faults.at_work.add(name)
        await asyncio.sleep(hold_s)
        healing_since = loop.time()
        async with _within(HEAL_S_MAX, f"{name} was not undone"):
            await stack.aclose()
        faults.at_work.discard(name)
        recorder.fault(Fault(name, OVER, f"undone in {loop.time() - healing_since:.1f} s; {deed.effect}".rstrip("; ")))
    return True


@asynccontextmanager
async def _within(seconds: float, what: str) -> AsyncIterator[None]:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if limit.expired():
            raise NotHealed(f"{what} within {seconds} s") from error
        raise
