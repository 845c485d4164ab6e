"""Lines of calls that wait for connections or for their turn with a lock: order, shares, limits, cancellation."""

import asyncio
from typing import Protocol

import pytest
from shproto.errors import Overloaded
from streamhouse_coordinator.adapters.wait_queues import Call, LockQueues, WaitingCalls, WaitQueue

pytestmark = pytest.mark.quick


class Takes(Protocol):
    async def __call__(self, call: Call) -> None: ...


class Visitors:
    """Calls by name that take a place of a line; `served` has those that got one, in that order."""

    def __init__(self, take: Takes) -> None:
        self._take = take
        self.served: list[str] = []
        self.calls: dict[str, Call] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str, urgent: bool = False) -> None:
        for name in names:
            self.calls[name] = Call(urgent=urgent)
            self.tasks[name] = asyncio.create_task(self._wait(name))
            await settle()

    async def _wait(self, name: str) -> None:
        await self._take(self.calls[name])
        self.served.append(name)


async def settle() -> None:
    """Lets every task run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


def line_of(places: int, client_places: int, *, waiting_max: int | None = None, total_max: int = 100) -> WaitQueue:
    return WaitQueue(WaitingCalls(total_max), places=places, client_places=client_places, waiting_max=waiting_max)


async def test_the_first_to_come_is_the_first_to_be_served() -> None:
    line = line_of(1, 1)
    visitors = Visitors(line.take)
    await visitors.come("a", "b", "c", "d")
    for name in "abc":
        line.give_back(visitors.calls[name])
        await settle()
    assert visitors.served == ["a", "b", "c", "d"]


async def test_clients_leave_places_to_the_platform() -> None:
    line = line_of(4, 2)
    visitors = Visitors(line.take)
    await visitors.come("a", "b", "c", "d")
    await visitors.come("lease", "sweep", urgent=True)
    assert visitors.served == ["a", "b", "lease", "sweep"]
    line.give_back(visitors.calls["lease"])
    await settle()
    assert "c" not in visitors.served, "the place of the platform stays free"
    line.give_back(visitors.calls["a"])
    await settle()
    assert visitors.served[-1] == "c"


async def test_the_platform_goes_first_and_never_keeps_all_clients_out() -> None:
    line = line_of(2, 1)
    visitors = Visitors(line.take)
    await visitors.come("p1", "p2", urgent=True)
    await visitors.come("a", "b")
    await visitors.come("p3", "p4", urgent=True)
    line.give_back(visitors.calls["p1"])  # no client is being served
    line.give_back(visitors.calls["p2"])
    await settle()
    assert visitors.served == ["p1", "p2", "a", "p3"]
    line.give_back(visitors.calls["p3"])
    await settle()
    assert visitors.served[-1] == "p4"


async def test_who_holds_what_the_platform_waits_for_is_served_as_the_platform_is() -> None:
    """An expired member's group is held by a client that waits behind others for a connection."""
    waiters = WaitingCalls(100)
    turns, line = LockQueues(waiters, 100), line_of(2, 1)
    await line.take(Call(urgent=False))
    visitors = Visitors(line.take)
    await visitors.come("first", "holder")
    await turns.take("group/g", visitors.calls["holder"])
    sweep = asyncio.create_task(turns.take("group/g", Call(urgent=True)))
    await settle()
    assert visitors.served == ["holder"] and not sweep.done()
    turns.give_back("group/g", visitors.calls["holder"])
    await sweep


async def test_turns_with_different_locks_do_not_wait_for_each_other() -> None:
    turns = LockQueues(WaitingCalls(100), 100)
    async with asyncio.timeout(60):
        await asyncio.gather(*(turns.take(f"group/{nth}", Call(urgent=False)) for nth in range(50)))


async def test_too_many_are_refused_with_a_hint() -> None:
    line = line_of(1, 1, waiting_max=2)
    visitors = Visitors(line.take)
    await visitors.come("a", "b", "c")
    with pytest.raises(Overloaded, match="the same lock") as caught:
        await line.take(Call(urgent=False))
    assert caught.value.retry_after_ms > 0 and caught.value.details["limit"] == "pg_lock_waiting_max (2)"
    await visitors.come("lease", urgent=True)
    line.give_back(visitors.calls["a"])
    await settle()
    assert visitors.served == ["a", "lease"]


async def test_too_many_in_all_lines_are_refused_until_some_have_left() -> None:
    waiters = WaitingCalls(2)
    turns = LockQueues(waiters, 100)
    for name in "xyz":
        await turns.take(name, Call(urgent=False))
    waiting = [asyncio.create_task(turns.take(name, Call(urgent=False))) for name in "xy"]
    await settle()
    with pytest.raises(Overloaded, match="too many calls wait") as caught:
        await turns.take("z", Call(urgent=False))
    assert caught.value.details["limit"] == "pg_waiting_max (2)"
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    waiting.append(asyncio.create_task(turns.take("z", Call(urgent=False))))
    await settle()
    assert not waiting[-1].done()
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


@pytest.mark.parametrize("at_the_same_time", [False, True])
async def test_those_that_are_cancelled_leave_the_line_and_no_place_is_lost(at_the_same_time: bool) -> None:
    """At the same time: the place was given to the call, and its task is cancelled before it has run."""
    turns = LockQueues(WaitingCalls(100), 100)
    holder = Call(urgent=False)
    await turns.take("cluster", holder)

    async def take(call: Call) -> None:
        await turns.take("cluster", call)

    visitors = Visitors(take)
    await visitors.come("a", "b", "c")
    if at_the_same_time:
        turns.give_back("cluster", holder)
    for name in "ab":
        visitors.tasks[name].cancel()
    if not at_the_same_time:
        turns.give_back("cluster", holder)
    await settle()
    assert visitors.served == ["c"]
    turns.give_back("cluster", visitors.calls["c"])
    assert len(turns) == 0, "nothing is left of a lock that nobody wants"
