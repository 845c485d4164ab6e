"""Nemeses of the object store: it is away, refuses, loses answers, is late, and lies about what it holds."""

import random
from collections.abc import AsyncIterator, Callable, Sequence

from tests.faults.fleet import Fleet
from tests.faults.nemeses.servers import outage
from tests.faults.nemesis import Deed, all_of, by_turns, nemesis
from tests.faults.proxy import Direction
from tests.faults.store_proxy import StoreFault

LATE_S = (1.0, 8.0)
"""Less and more than the services wait for an answer (S3_READ_TIMEOUT_MS)."""

SHARE = (0.3, 1.0)
"""Of the requests that can meet the fault."""

FAULTS: dict[str, tuple[StoreFault, ...]] = {
    "s3-refuses": (StoreFault.SLOW_DOWN, StoreFault.ERROR, StoreFault.CONFLICT, StoreFault.DENIED),
    "s3-resets": (StoreFault.LOST, StoreFault.UNSENT),
    "s3-late": (StoreFault.LATE,),
    "s3-cut-bodies": (StoreFault.TRUNCATED, StoreFault.SHORT),
    "s3-bit-flips": (StoreFault.FLIPPED,),
    "s3-ignores-ranges": (StoreFault.WHOLE,),
    "s3-slow-bodies": (StoreFault.TRICKLE,),
    "s3-stale-listings": (StoreFault.STALE,),
}
"""Which requests meet what; those of a name have their turns."""

DOES = {
    "s3-refuses": "S3 answers 503, 500, 403, or 409 to conditional writes (in turns), and does nothing.",
    "s3-resets": "S3 resets the connection after the write took effect, or before the request arrives (in turns).",
    "s3-late": "S3 does it at once and answers 1-8 s later.",
    "s3-cut-bodies": "S3's answer ends in its middle, or is half of a body with headers that say so (in turns).",
    "s3-bit-flips": "S3 answers a read with one bit flipped.",
    "s3-ignores-ranges": "S3 answers with the whole object instead of the range that was asked for.",
    "s3-slow-bodies": "S3 takes 1-8 s for a body.",
    "s3-stale-listings": "S3 lists what was there up to a minute before.",
}


@nemesis("s3-away")
async def s3_away(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """S3 refuses connections. The objects stay: losing them is beyond what is promised."""
    async with outage(fleet, "s3", fleet.servers["s3"].stop, "refuses connections") as deed:
        yield deed


@nemesis("s3-slow")
async def s3_slow(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
    """S3 answers up to 5 s late, by the network."""
    links = [name for name in fleet.links if name.endswith(">s3")]
    delay_ms = rng.randrange(500, 5000)
    with all_of(fleet, links):
        for name in links:
            fleet.links[name].delay(Direction.DOWN, delay_ms)
        try:
            yield Deed(f"s3 answers {delay_ms} ms late")
        finally:
            for name in links:
                await fleet.links[name].heal()


def store_fault(name: str, faults: Sequence[StoreFault]) -> Callable[[Fleet, random.Random], AsyncIterator[Deed]]:
    async def lie(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
        store = fleet.store
        assert store is not None, "a fleet that runs has one"
        fault = by_turns(fleet, rng, name, faults)
        share, seconds = rng.uniform(*SHARE), rng.uniform(*LATE_S)
        with all_of(fleet, ["s3-answers"]):
            before = store.touched[fault]
            store.begin(fault, share=share, seconds=seconds, seed=rng.getrandbits(32))
            timed = f", {seconds:.1f} s each" if fault in (StoreFault.LATE, StoreFault.TRICKLE) else ""
            deed = Deed(f"{share:.0%} of the requests meet {fault.value}{timed}")
            try:
                yield deed
            finally:
                store.heal()
                deed.effect = f"{store.touched[fault] - before} requests hit"

    lie.__doc__ = DOES[name]
    return lie


for _name, _faults in FAULTS.items():
    nemesis(_name)(store_fault(_name, _faults))
