"""A short mix of faults for every change, drawn from all by the seed; `make faults` runs longer ones.

Quotes guarantees G1 to G5 and G8: whatever happens to processes, network and servers, nothing acknowledged is lost or
rewritten, nobody reads out of order, retries are written once, registrations and objects match.
"""

import asyncio
import contextlib
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.faults.checker import check, explain
from tests.faults.connections import ports_reached
from tests.faults.fleet import Fleet, place_of
from tests.faults.history import read_history
from tests.faults.nemeses import chosen
from tests.faults.run import Run

SEED = int(os.environ.get("STREAMHOUSE_TEST_SEED", random.SystemRandom().randrange(2**32)))
SECONDS = 25.0

WATCH_INTERVAL_S = 1.0

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


async def test_a_short_mix_of_faults(tmp_path: Path) -> None:
    print(f"\nseed {SEED}: set STREAMHOUSE_TEST_SEED to meet the same faults again")
    run = Run(tmp_path, SEED, chosen("all"), SECONDS)
    async with watched(run.fleet) as past_proxies:
        await run.run()
    path = tmp_path / "history.jsonl"
    report = check(read_history(path))
    print("\n".join([f"faults: {', '.join(run.faults.done)}", *report.summary()]))
    assert not report.anomalies, "\n".join(explain(report.anomalies, path))
    assert not run.trouble
    assert report.complete
    assert run.faults.done
    assert report.acknowledged_records > 100, "too little was acknowledged to prove anything"
    assert not unused(run), "a fault of these links hits nothing"
    assert not past_proxies, "no fault can hit these connections"


def unused(run: Run) -> set[str]:
    """Kinds of links that nothing came through: who calls by them goes by another way."""
    carried = Counter[str]()
    for way, link in run.fleet.links.items():
        carried["{}>{}".format(*(name.rpartition("-")[0] or name for name in way.split(">")))] += sum(
            link.passed_bytes.values()
        )
    rare = {"coordinator>ingest"}  # asked only when an agent's stream broke
    return {kind for kind in carried if not carried[kind]} - rare


@asynccontextmanager
async def watched(fleet: Fleet) -> AsyncIterator[set[str]]:
    """Looks now and then for connections between two processes of the fleet that lead past the proxies; yields those
    found so far, as FROM>TO."""
    found: set[str] = set()

    async def watch() -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            found.update(past_proxies(fleet))

    watching = asyncio.create_task(watch(), name="watch connections")
    try:
        yield found
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


def past_proxies(fleet: Fleet) -> set[str]:
    places = {name: member.listen for name, member in fleet.members.items()}
    for name, server in fleet.servers.items():
        places |= {f"{name} {place}": place for place in place_of(server.url).split(",")}
    if fleet.store is not None and fleet.store.address:  # once it listens
        places["s3"] = fleet.store.address
    targets = {int(place.rpartition(":")[2]): name for name, place in places.items()}
    return {
        f"{name}>{targets[port]}"
        for name, member in fleet.members.items()
        if member.process.is_running()
        for port in ports_reached(member.process.pid) & targets.keys()
    }
