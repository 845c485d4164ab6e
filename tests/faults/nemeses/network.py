"""Nemeses of links: silent, cut, slow."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable

from tests.faults.fleet import (
    AGENTS,
    CLIENTS,
    COORDINATORS,
    POSTGRES_PLACES,
    QUERIES,
    SEGMENTERS,
    Fleet,
)
from tests.faults.nemesis import LONG_HOLD_S, Deed, NotPossible, all_of, by_turns, nemesis, one_of
from tests.faults.proxy import BOTH, Direction

FLAKY_INTERVAL_S = (0.05, 0.5)
GROUPS: dict[str, tuple[str, ...]] = {
    "client": (CLIENTS,),
    "agent": AGENTS,
    "query": QUERIES,
    "segmenter": SEGMENTERS,
    "coordinator": COORDINATORS,
    "service": (*QUERIES, *SEGMENTERS),
    "postgres": POSTGRES_PLACES,
    "s3": ("s3",),
    "rabbitmq": ("rabbitmq",),
    "redis": ("redis",),
}
BLACK_HOLES = (
    ("client", "agent"),
    ("client", "query"),
    ("client", "coordinator"),
    ("agent", "coordinator"),
    ("query", "coordinator"),
    ("segmenter", "coordinator"),
    ("segmenter", "agent"),
    ("query", "agent"),
    ("service", "agent"),
    ("coordinator", "agent"),
    ("service", "s3"),
    ("coordinator", "postgres"),
    ("coordinator", "rabbitmq"),
    ("segmenter", "rabbitmq"),
    ("query", "redis"),
)
"""Who does not reach whom. "service" and agent: an agent that clients and coordinators reach, and no other service."""

ONE_OF = 0.6
"""How often a hole concerns one of several processes; else all."""

DIRECTIONS = (BOTH, (Direction.UP,), (Direction.DOWN,))


def hole_links(rng: random.Random, source: str, target: str) -> list[str]:
    """From one of the sources or all of them to one of the targets or all. The places of PostgreSQL count as one; so
    do the services that do not reach an agent."""
    sources, targets = GROUPS[source], GROUPS[target]
    if (source, target) != ("service", "agent") and rng.random() < ONE_OF:
        sources = (rng.choice(sources),)
    if target != "postgres" and rng.random() < ONE_OF:
        targets = (rng.choice(targets),)
    return [f"{one}>{other}" for one in sources for other in targets]


def black_hole(source: str, target: str) -> Callable[[Fleet, random.Random], AsyncIterator[Deed]]:
    name = f"black-hole-{source}-{target}"

    async def hold(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
        if target == "agent" and source != "client" and fleet.library is None:
            raise NotPossible("no C compiler: who calls an agent cannot be told apart")
        names = hole_links(rng, source, target)
        ways = by_turns(fleet, rng, name, DIRECTIONS)
        with all_of(fleet, names):
            links = [fleet.links[link] for link in names]
            before = {way: sum(link.held_bytes[way] for link in links) for way in ways}
            for link in links:
                link.hold(*ways)
            deed = Deed(f"{', '.join(names)}: nothing gets {' or '.join(way.value for way in ways)}")
            try:
                yield deed
            finally:
                for link in links:
                    await link.heal()
                held = [
                    f"{sum(link.held_bytes[way] for link in links) - before[way]} bytes {way.value}" for way in ways
                ]
                deed.effect = f"held {', '.join(held)}"

    hold.__doc__ = f"What {source} and {target} send each other vanishes, there, back, or both ways (in turns)."
    return hold


for _source, _target in BLACK_HOLES:
    nemesis(f"black-hole-{_source}-{_target}", LONG_HOLD_S)(black_hole(_source, _target))


@nemesis("isolate")
async def isolate(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """All links of one process are silent: to it, from it, or both."""
    with one_of(fleet, rng, (*AGENTS, *QUERIES, *SEGMENTERS)) as name:
        outgoing = [link for link in fleet.links if link.startswith(f"{name}>")]
        incoming = [link for link in fleet.links if link.endswith(f">{name}")]
        chosen = rng.choice([links for links in (outgoing, incoming, outgoing + incoming) if links])
        with all_of(fleet, chosen):
            for link in chosen:
                fleet.links[link].hold(*BOTH)
            try:
                yield Deed(f"isolated {name}: {', '.join(chosen)}")
            finally:
                for link in chosen:
                    await fleet.links[link].heal()


@nemesis("flaky")
async def flaky(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """Connections of one link are reset again and again."""

    async def cut_often(link: str) -> None:
        while True:
            await asyncio.sleep(rng.uniform(*FLAKY_INTERVAL_S))
            fleet.links[link].cut()

    with one_of(fleet, rng, fleet.links) as name:
        cutting = asyncio.create_task(cut_often(name))
        try:
            yield Deed(f"{name} is cut again and again")
        finally:
            cutting.cancel()
            await asyncio.gather(cutting, return_exceptions=True)


@nemesis("slow")
async def slow(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """One link delays by up to 800 ms each way."""
    with one_of(fleet, rng, fleet.links) as name:
        delays_ms = {way: rng.randrange(0, 800) for way in BOTH}
        for way, ms in delays_ms.items():
            fleet.links[name].delay(way, ms)
        try:
            yield Deed(f"{name} delays by {delays_ms[Direction.UP]} ms up, {delays_ms[Direction.DOWN]} ms down")
        finally:
            await fleet.links[name].heal()
