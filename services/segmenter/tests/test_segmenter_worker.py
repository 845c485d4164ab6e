"""The segmenter as it runs in one process: woken by the feed, found by the scan, finished at the stop."""

import asyncio
from typing import Any

from shstore import FaultyStore, MemoryStore
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_segmenter.wiring import SegmenterService, build

from services.segmenter.tests.segmenter_standins import TOPIC_ID, StandInAgent, StandInCoordinator, assert_all_stored

NEVER_MS = 3_600_000


class Embedded:
    def __init__(self, *, store: Any = None, **settings: Any) -> None:
        self.coordinator: Any = StandInCoordinator()
        self.agent: Any = StandInAgent()
        self.memory = MemoryStore()
        self.service: SegmenterService = build(
            SegmenterSettings(worker_id="w1", early_retry_first_ms=1, **settings),
            self.coordinator,
            self.memory if store is None else store(self.memory),
            lambda address: self.agent,
        )

    def seal(self, buffer_id: str, partition: int = 0) -> None:
        self.coordinator.announce(buffer_id, "agent:1", [self.agent.append(partition, [10])])

    async def drained(self) -> None:
        while self.coordinator.waiting:
            await asyncio.sleep(0.005)
        await assert_all_stored(self.coordinator, self.memory, self.agent)


async def test_an_event_of_the_feed_wakes_it() -> None:
    world = Embedded(scan_interval_ms=NEVER_MS)
    await world.service.start()
    for number in range(3):
        world.seal(f"b{number}")
        await world.coordinator.tell()
        await world.drained()
    await world.service.stop()


async def test_the_scan_finds_what_no_event_told() -> None:
    world = Embedded(scan_interval_ms=50)
    await world.service.start()
    await asyncio.sleep(0.01)
    world.seal("b1")
    await world.drained()
    await world.service.stop()


async def test_it_survives_a_coordinator_that_is_away() -> None:
    world = Embedded(scan_interval_ms=50)
    world.coordinator.down = True
    await world.service.start()
    world.seal("b1")
    await asyncio.sleep(0.12)
    assert world.coordinator.waiting == ["b1"]
    world.coordinator.down = False
    await world.drained()
    assert world.service.tasks.error is None
    await world.service.stop()


async def test_a_failed_buffer_is_tried_again_before_the_next_scan() -> None:
    """The back-off of the buffer counts, not the scan's interval."""
    faulty: list[FaultyStore] = []

    def wrap(memory: MemoryStore) -> FaultyStore:
        faulty.append(FaultyStore(memory))
        return faulty[0]

    world = Embedded(store=wrap, scan_interval_ms=NEVER_MS, s3_attempts_deadline_ms=1, handover_retry_first_ms=20)
    faulty[0].down = True
    world.seal("b1")
    await world.service.start()
    while not world.coordinator.released:
        await asyncio.sleep(0.005)
    faulty[0].down = False
    await world.drained()
    await world.service.stop()


async def test_a_buffer_sealed_while_another_is_built_is_not_kept_waiting() -> None:
    gate = asyncio.Event()

    class SlowFirst(MemoryStore):
        async def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
            if "/0/" in key:
                await gate.wait()
            return await world.memory.put(key, *args, **kwargs)

    world = Embedded(store=lambda memory: SlowFirst(), scan_interval_ms=NEVER_MS, early_retry_max_ms=60_000)
    world.seal("slow", partition=0)
    await world.service.start()
    while not world.agent.pulls:
        await asyncio.sleep(0.001)
    world.seal("quick", partition=1)
    await world.coordinator.tell()
    while world.coordinator.waiting != ["slow"]:
        await asyncio.sleep(0.005)
    gate.set()
    await world.drained()
    await world.service.stop()


async def test_a_stop_finishes_what_is_in_hand_and_claims_nothing_more() -> None:
    gate = asyncio.Event()

    class Gated(MemoryStore):
        async def put(self, *args: Any, **kwargs: Any) -> Any:
            await gate.wait()
            return await world.memory.put(*args, **kwargs)

    world = Embedded(store=lambda memory: Gated(), builds_in_flight_max=1)
    world.seal("b1", partition=0)
    world.seal("b2", partition=1)
    await world.service.start()
    while not world.agent.pulls:
        await asyncio.sleep(0.001)
    stopping = asyncio.create_task(world.service.stop())
    await asyncio.sleep(0.02)
    assert not stopping.done()
    gate.set()
    await stopping
    assert world.coordinator.waiting == ["b2"]
    assert [segment.partition for segment in world.coordinator.of_partition(TOPIC_ID, 0)] == [0]


async def test_a_stop_does_not_wait_for_ever() -> None:
    class Hanging(MemoryStore):
        async def put(self, *args: Any, **kwargs: Any) -> Any:
            await asyncio.Event().wait()

    world = Embedded(store=lambda memory: Hanging(), shutdown_timeout_ms=20)
    world.seal("b1")
    await world.service.start()
    while not world.agent.pulls:
        await asyncio.sleep(0.001)
    await world.service.stop()
    assert world.coordinator.waiting == ["b1"]


async def test_housekeeping_runs_by_timer() -> None:
    world = Embedded(
        retention_interval_ms=50, compaction_interval_ms=50, orphan_sweep_interval_ms=50, compaction_segments_min=3
    )
    for number in range(4):
        world.seal(f"b{number}")
    await world.service.start()
    while len(world.coordinator.segments) != 1 or world.coordinator.retention_calls < 2:
        await asyncio.sleep(0.01)
    await world.drained()
    await world.service.stop()
