"""Nemeses of processes: they die, hang, and are started again."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator

from tests.faults.fleet import AGENTS, SERVICES, SESSION_TTL_S, Fleet
from tests.faults.nemesis import Deed, all_of, nemesis, one_of

TARGETS = (*AGENTS, *AGENTS, *SERVICES)
"""An agent is what holds acknowledged records: it is hit more often than the others."""


@nemesis("kill", hold_s=(0.0, 2 * SESSION_TTL_S))
async def kill(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """A process dies at once, and comes back with its disk."""
    with one_of(fleet, rng, TARGETS) as name:
        await fleet.kill(name)
        try:
            yield Deed(f"kill -9 {name}")
        finally:
            await fleet.start_process(name)


@nemesis("kill-agents", hold_s=(0.0, SESSION_TTL_S))
async def kill_agents(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """All agents die at once: none can take over."""
    with all_of(fleet, AGENTS):
        for name in AGENTS:
            await fleet.kill(name)
        try:
            yield Deed("kill -9 of all agents")
        finally:
            await asyncio.gather(*(fleet.start_process(name) for name in AGENTS))


@nemesis("power", hold_s=(0.0, SESSION_TTL_S))
async def power(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """Every process of ours dies at once; they come back in any order."""
    order = rng.sample(SERVICES, len(SERVICES))
    with all_of(fleet, SERVICES):
        await asyncio.gather(*(fleet.kill(name) for name in order))
        try:
            yield Deed("kill -9 of everything")
        finally:
            await asyncio.gather(*(fleet.start_process(name) for name in order))


@nemesis("pause", hold_s=(0.5, 2.5 * SESSION_TTL_S))
async def pause(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """A process stands still (SIGSTOP) for less and more than a lease, and then believes that it still leads."""
    with one_of(fleet, rng, TARGETS) as name:
        fleet.send_signal(name, signal.SIGSTOP)
        try:
            yield Deed(f"SIGSTOP {name}")
        finally:
            fleet.send_signal(name, signal.SIGCONT)


@nemesis("restart", hold_s=(0.0, SESSION_TTL_S))
async def restart(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """A process drains (SIGTERM), and starts again."""
    with one_of(fleet, rng, TARGETS) as name:
        try:
            await fleet.stop_process(name)
            yield Deed(f"graceful restart of {name}")
        finally:
            await fleet.start_process(name)
