"""Looking up a topic that is not led here: one question for many producers, and none of them waits for ever."""

import asyncio
from collections.abc import Collection
from typing import Any

import pytest
from shproto.errors import Unavailable
from shproto.keys import RangeKey
from shruntime.clock import ManualClock
from streamhouse_ingest.log.logs import Logs
from streamhouse_ingest.produce.topics import TopicLookup

pytestmark = pytest.mark.quick


class BrokenCoordinator:
    """Fails with something that is no answer, once it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.go_on = asyncio.Event()

    async def get_metadata(self, request: Any) -> Any:
        self.asked += 1
        await self.go_on.wait()
        raise ZeroDivisionError("a defect")


async def never(keys: Collection[RangeKey]) -> None:
    raise AssertionError("nothing to take in")


async def test_a_defect_of_the_first_asker_frees_the_others() -> None:
    coordinator = BrokenCoordinator()
    logs = Logs(memory_bytes_max=1 << 20, tail_cache_bytes=0, producers_max=1)
    lookup = TopicLookup(logs, coordinator, ManualClock(), "agent", never)  # type: ignore[arg-type]
    first = asyncio.create_task(lookup.find_leader("orders", 0))
    second = asyncio.create_task(lookup.find_leader("orders", 0))
    await asyncio.sleep(0)
    coordinator.go_on.set()
    with pytest.raises(ZeroDivisionError):
        await first
    with pytest.raises(Unavailable):
        await second
    assert coordinator.asked == 1
