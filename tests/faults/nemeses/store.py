"""Nemeses of the object store."""

import random
from collections.abc import AsyncIterator

from tests.faults.fleet import Fleet
from tests.faults.nemeses.servers import outage
from tests.faults.nemesis import Deed, all_of, nemesis
from tests.faults.proxy import Answers, Direction


@nemesis("s3-away")
async def s3_away(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """Connections are refused. The objects stay: losing them is beyond what is promised."""
    async with outage(fleet, "s3", fleet.servers["s3"].stop, "refuses connections") as deed:
        yield deed


@nemesis("s3-faults")
async def s3_faults(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """The object store throttles, fails, loses answers, cuts bodies short, or takes seconds."""
    links = [name for name in fleet.links if name.endswith(">s3")]
    fault = rng.choice((Answers.SLOW_DOWN, Answers.ERROR, Answers.LOST, Answers.TRUNCATED, Answers.NORMAL))
    delay_ms = rng.randrange(500, 5000) if fault is Answers.NORMAL else 0
    with all_of(fleet, links):
        for name in links:
            fleet.links[name].answers = fault
            fleet.links[name].delay(Direction.DOWN, delay_ms)
        try:
            yield Deed(f"s3 answers {fault.value}, {delay_ms} ms late")
        finally:
            for name in links:
                await fleet.links[name].heal()
