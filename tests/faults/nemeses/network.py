"""Nemeses of links: silent, cut, slow."""

import asyncio
import random
from collections.abc import AsyncIterator

from tests.faults.fleet import AGENTS, COORDINATORS, QUERIES, SEGMENTERS, Fleet, postgres_links
from tests.faults.nemesis import all_of, nemesis, one_of
from tests.faults.proxy import BOTH, Direction

FLAKY_INTERVAL_S = (0.05, 0.5)


@nemesis("partition")
async def partition(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """One link is silent, both ways or one way only."""
    with one_of(fleet, rng, fleet.links) as name:
        ways = rng.choice((BOTH, BOTH, (Direction.UP,), (Direction.DOWN,)))
        fleet.links[name].hold(*ways)
        try:
            yield f"{name} holds {' and '.join(way.value for way in ways)}"
        finally:
            await fleet.links[name].heal()


@nemesis("isolate")
async def isolate(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    """All links of one process are silent: to it, from it, or both."""
    with one_of(fleet, rng, (*AGENTS, *QUERIES, *SEGMENTERS)) as name:
        outgoing = [link for link in fleet.links if link.startswith(f"{name}>")]
        incoming = [link for link in fleet.links if link.endswith(f">{name}")]
        chosen = rng.choice([links for links in (outgoing, incoming, outgoing + incoming) if links])
        with all_of(fleet, chosen):
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
    with all_of(fleet, links):
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

    with one_of(fleet, rng, fleet.links) as name:
        cutting = asyncio.create_task(cut_often(name))
        try:
            yield f"{name} is cut again and again"
        finally:
            cutting.cancel()
            await asyncio.gather(cutting, return_exceptions=True)


@nemesis("slow")
async def slow(fleet: Fleet, rng: random.Random) -> AsyncIterator[str]:
    with one_of(fleet, rng, fleet.links) as name:
        delays_ms = {way: rng.randrange(0, 800) for way in BOTH}
        for way, ms in delays_ms.items():
            fleet.links[name].delay(way, ms)
        try:
            yield f"{name} delays by {delays_ms[Direction.UP]} ms up, {delays_ms[Direction.DOWN]} ms down"
        finally:
            await fleet.links[name].heal()
