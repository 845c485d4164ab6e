"""The segmenter as it runs in one process: woken by the feed, found by the scan, finished at the stop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from shruntime.clock import SystemClock
from shstore import FaultyStore, MemoryStore
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_segmenter.wiring import SegmenterService, build

from services.segmenter.tests.segmenter_world import World, assert_all_stored, new_world
from tests.platform.held_store import HeldStore

NEVER_MS = 3_600_000


class Embedded:
    """A platform that runs, and a segmenter over it that is not started yet. `seal` comes with an event."""

    def __init__(self, world: World, store: Any, settings: dict[str, Any]) -> None:
        self.world = world
        self.coordinator = world.coordinator
        self.memory = world.objects
        self.store = world.objects if store is None else store(world.objects)
        self.service: SegmenterService = build(
            SegmenterSettings(worker_id="w1", early_retry_first_ms=1, **settings),
            world.coordinator,
            self.store,
            lambda address: world.agent,
        )

    async def seal(self, name: str, partition: int = 0) -> None:
        await self.world.seal(name, self.world.append(partition, [10]))

    async def until_pulled(self) -> None:
        while not self.world.agent.calls["pull_slice"]:
            await asyncio.sleep(0.001)

    async def drained(self) -> None:
        while self.world.waiting:
            await asyncio.sleep(0.005)
        await assert_all_stored(self.world, self.memory, self.world.held)


@pytest.fixture
async def embedded() -> AsyncIterator[Callable[..., Embedded]]:
    """`embedded(store=..., name=value, ...)`: an Embedded with these settings of its segmenter."""
    world = await new_world(clock=SystemClock())
    await world.start()
    yield lambda store=None, **settings: Embedded(world, store, settings)
    await world.stop()


async def test_an_event_of_the_feed_wakes_it(embedded: Callable[..., Embedded]) -> None:
    world = embedded(scan_interval_ms=NEVER_MS)
    await world.service.start()
    for number in range(3):
        await world.seal(f"b{number}")
        await world.drained()
    await world.service.stop()


async def test_the_scan_finds_what_no_event_told(embedded: Callable[..., Embedded]) -> None:
    world = embedded(scan_interval_ms=50)
    await world.service.start()
    await asyncio.sleep(0.01)
    await world.seal("b1")
    await world.drained()
    await world.service.stop()


async def test_it_survives_a_coordinator_that_is_away(embedded: Callable[..., Embedded]) -> None:
    world = embedded(scan_interval_ms=50)
    world.coordinator.down = True
    await world.service.start()
    await world.seal("b1")
    await asyncio.sleep(0.12)
    assert world.world.waiting == ["b1"]
    world.coordinator.down = False
    await world.drained()
    assert world.service.tasks.error is None
    await world.service.stop()


async def test_a_failed_buffer_is_tried_again_before_the_next_scan(embedded: Callable[..., Embedded]) -> None:
    """The back-off of the buffer counts, not the scan's interval."""
    faulty: list[FaultyStore] = []

    def wrap(memory: MemoryStore) -> FaultyStore:
        faulty.append(FaultyStore(memory))
        return faulty[0]

    world = embedded(store=wrap, scan_interval_ms=NEVER_MS, s3_attempts_deadline_ms=500, handover_retry_first_ms=20)
    faulty[0].down = True
    await world.seal("b1")
    await world.service.start()
    while not world.world.released:
        await asyncio.sleep(0.005)
    faulty[0].down = False
    await world.drained()
    await world.service.stop()


async def test_a_buffer_sealed_while_another_is_built_is_not_kept_waiting(embedded: Callable[..., Embedded]) -> None:
    def of_first(memory: MemoryStore) -> HeldStore:
        return HeldStore(memory, lambda key: "/0/" in key)

    world = embedded(store=of_first, scan_interval_ms=NEVER_MS, early_retry_max_ms=60_000)
    await world.seal("slow", partition=0)
    await world.service.start()
    await world.until_pulled()
    await world.seal("quick", partition=1)
    while world.world.waiting != ["slow"]:
        await asyncio.sleep(0.005)
    world.store.release()
    await world.drained()
    await world.service.stop()


async def test_a_stop_finishes_what_is_in_hand_and_claims_nothing_more(embedded: Callable[..., Embedded]) -> None:
    world = embedded(store=HeldStore, builds_in_flight_max=1)
    await world.seal("b1", partition=0)
    await world.seal("b2", partition=1)
    await world.service.start()
    await world.store.reached.wait()
    stopping = asyncio.create_task(world.service.stop())
    await asyncio.sleep(0.02)
    assert not stopping.done()
    world.store.release()
    await stopping
    assert world.world.waiting == ["b2"]
    assert [segment.partition for segment in world.world.of_partition(world.world.topic_id, 0)] == [0]


async def test_a_stop_does_not_wait_for_ever(embedded: Callable[..., Embedded]) -> None:
    world = embedded(store=HeldStore, shutdown_timeout_ms=20)
    await world.seal("b1")
    await world.service.start()
    await world.store.reached.wait()
    await world.service.stop()
    assert world.world.waiting == ["b1"]


async def test_housekeeping_runs_by_timer(embedded: Callable[..., Embedded]) -> None:
    world = embedded(
        retention_interval_ms=50, compaction_interval_ms=50, orphan_sweep_interval_ms=50, compaction_segments_min=3
    )
    for number in range(4):
        await world.seal(f"b{number}")
    await world.service.start()
    while len(world.world.segments) != 1 or world.coordinator.calls["apply_retention"] < 2:
        await asyncio.sleep(0.01)
    await world.drained()
    await world.service.stop()
