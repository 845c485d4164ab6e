"""Claim to registered, with every arrow cut: G1, G2 and G8 of ARCHITECTURE.md from the segmenter's side."""

import asyncio
import gc
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from shformat import encode_batch, stamp_batch
from shproto.errors import Fenced, Unavailable
from shproto.v1 import coordinator_pb2 as c
from shruntime.clock import SystemClock
from shstore import (
    FaultKind,
    FaultyStore,
    MemoryStore,
    RandomFaults,
    RetryingStore,
    RetryPolicy,
    ScriptedFaults,
    StoreDenied,
    StoreError,
    StoreInvalid,
    StoreUnavailable,
)
from streamhouse_segmenter.builder import BuiltObject
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.service import Segmenter
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_segmenter.store_probe import StoreProbe

from services.segmenter.tests.segmenter_world import World, new_world
from tests.platform.held_store import HeldStore
from tests.platform.log_agent import records_of

SETTINGS = SegmenterSettings(
    handover_retry_first_ms=1,
    handover_retry_max_ms=2,
    early_retry_first_ms=1,
    early_retry_max_ms=5,
    early_wait_ms_max=60_000,
    rpc_timeout_ms=30_000,
)


class Crash:
    """Stops a worker for ever at its n-th call to the outside, before or after the call took effect."""

    def __init__(self, at_call: int, *, after: bool) -> None:
        self.calls = 0
        self.reached = asyncio.Event()
        self._at_call = at_call
        self._after = after

    async def before(self) -> bool:
        """Whether this call is the one to be stopped after its effect."""
        if self.reached.is_set():
            await asyncio.Event().wait()
        self.calls += 1
        mine = self.calls == self._at_call
        if mine and not self._after:
            await self.stop()
        return mine

    async def stop(self) -> None:
        self.reached.set()
        await asyncio.Event().wait()


class Crashing:
    """A port whose calls go through a Crash."""

    def __init__(self, port: Any, crash: Crash) -> None:
        self._port = port
        self._crash = crash

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)
        if name in ("pull_slice", "list", "follow_events"):
            return self._stream(method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            mine = await self._crash.before()
            result = await method(*args, **kwargs)
            if mine:
                await self._crash.stop()
            return result

        return call

    def _stream(self, method: Any) -> Any:
        async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            mine = await self._crash.before()
            async for item in method(*args, **kwargs):
                yield item
                if mine:
                    await self._crash.stop()

        return stream


def segmenter_of(
    world: World, name: str = "w1", *, store: Any = None, crash: Crash | None = None, **overrides: Any
) -> Segmenter:
    coordinator, agent = world.coordinator, world.agent
    store = world.store if store is None else store
    if crash is not None:
        coordinator, agent, store = (Crashing(port, crash) for port in (coordinator, agent, store))
    ports = Ports(
        coordinator=coordinator,
        store=store,
        ingest_at=lambda address: agent,
        clock=SystemClock(),
        rng=random.Random(name),
    )
    return Segmenter(ports, SETTINGS.model_copy(update=overrides), name)


@pytest.fixture
async def world() -> World:
    return await new_world()


async def fill(world: World) -> None:
    """Two partitions in one buffer, and a second buffer of the first partition."""
    first, other = world.append(0, [3, 200, 5]), world.append(1, [7])
    await world.seal("b1", first, other)
    await world.seal("b2", world.append(0, [4, 4]))


async def test_one_slice_becomes_a_data_object(world: World) -> None:
    await world.seal("b1", world.append(3, [10, 20]))
    report = await segmenter_of(world).drain()
    assert (report.registered, report.failed, report.claims_lost) == (1, 0, 0)
    await world.check()
    [key] = await world.keys()
    assert key.startswith(f"data/orders.{world.topic_id.hex()[:8]}/3/{0:020d}-1-")
    assert key.endswith(".seg")


async def test_small_slices_share_an_object(world: World) -> None:
    await fill(world)
    await segmenter_of(world).drain()
    await world.check()
    mixed = [key for key in await world.keys() if key.startswith("mixed/")]
    assert len(mixed) == 1
    shared = [s for s in world.segments.values() if s.object_key == mixed[0]]
    assert [s.object_at for s in shared] == [0, shared[0].size_bytes]


async def test_large_buffers_become_several_objects(world: World) -> None:
    slices = [world.append(partition, [2000]) for partition in range(4)]
    await world.seal("b1", *slices)
    await segmenter_of(world, segment_bytes_target=sum(s.size_bytes for s in slices) // 2 + 1).drain()
    await world.check()
    assert len(await world.keys()) == 2


async def crash_calls() -> int:
    world = await new_world()
    await fill(world)
    crash = Crash(-1, after=False)
    await segmenter_of(world, crash=crash, builds_in_flight_max=1).drain()
    return crash.calls


@pytest.mark.parametrize("after", [False, True])
async def test_a_crash_anywhere_leaves_one_cover_of_every_record(after: bool) -> None:
    """G1, G2, G8: cut between each pair of steps, then another worker; nothing lost, nothing twice, no dangling."""
    calls = await crash_calls()
    assert calls >= 12
    for at_call in range(1, calls + 1):
        world = await new_world()
        await fill(world)
        crash = Crash(at_call, after=after)
        dying = asyncio.create_task(segmenter_of(world, crash=crash, builds_in_flight_max=1).drain())
        reached = asyncio.create_task(crash.reached.wait())
        # The last calls may not come: how often it looks for more buffers depends on which is done first.
        await asyncio.wait((dying, reached), return_when=asyncio.FIRST_COMPLETED)
        for task in (dying, reached):
            task.cancel()
        await asyncio.gather(dying, reached, return_exceptions=True)
        await world.expire_claims()
        await segmenter_of(world, "w2").drain()
        await world.check()
        stored = set(await world.keys())
        registered = {segment.object_key for segment in world.segments.values()}
        assert registered <= stored, "a registered segment without its object"
        assert len(stored - registered) <= 2, "at most the object under way and the one that waited to register"


async def test_a_zombie_that_wakes_up_after_its_claim_was_taken_changes_nothing(world: World) -> None:
    """G4: the second worker registers, then the first one goes on with what it had built."""
    await world.seal("b1", world.append(0, [5]))
    store = HeldStore(world.store)
    zombie = asyncio.create_task(segmenter_of(world, store=store).drain())
    await store.reached.wait()
    await world.expire_claims()
    await segmenter_of(world, "w2").drain()
    store.release()
    report = await zombie
    assert world.registrations == [c.REGISTRATION_RESULT_REGISTERED, c.REGISTRATION_RESULT_COVERED]
    assert report.failed == 0
    await world.check()


async def test_a_claim_lost_in_the_middle_stops_the_work(world: World) -> None:
    await world.seal("b1", world.append(0, [5]))

    class HangingStore(MemoryStore):
        async def put(self, *args: Any, **kwargs: Any) -> Any:
            await world.expire_claims()
            await asyncio.Event().wait()

    report = await _first_report(world, HangingStore())
    assert report.claims_lost == 1
    await segmenter_of(world, "w2").drain()
    await world.check()


class Overtaken:
    """Registrations whose answer is not there before that of a renewal, which finds the claim ended."""

    def __init__(self, world: World, how: str) -> None:
        self._world = world
        self._register, self._renew = world.coordinator.register_segments, world.coordinator.renew_claim
        self._how = how
        self._calls = 0
        self._fenced = asyncio.Event()
        world.coordinator.register_segments = self.register_segments
        world.coordinator.renew_claim = self.renew_claim

    async def register_segments(self, request: c.RegisterSegmentsRequest) -> c.RegisterSegmentsResponse:
        self._calls += 1
        if self._calls > 1:
            return await self._register(request)
        if self._how == "lost":
            await self._world.expire_claims()
            await self._fenced.wait()
            return c.RegisterSegmentsResponse(results=[c.REGISTRATION_RESULT_EARLY for _ in request.segments])
        answer = await self._register(request)
        await self._fenced.wait()
        if self._how == "answer lost":
            raise Unavailable("the coordinator went away")
        return answer

    async def renew_claim(self, request: c.RenewClaimRequest) -> c.RenewClaimResponse:
        try:
            return await self._renew(request)
        except Fenced:
            self._fenced.set()
            raise


@pytest.mark.parametrize("how", ["answered", "answer lost"])
async def test_a_claim_that_its_own_registration_ended_is_not_lost(
    world: World, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    await world.seal("b1", world.append(0, [5]))
    Overtaken(world, how)
    report = await segmenter_of(world, claim_ttl_ms=30).drain()
    assert (report.registered, report.claims_lost, report.failed) == (1, 0, 0)
    assert "claim" not in "".join(item.getMessage() for item in caplog.records if item.levelno >= logging.WARNING)
    await world.check()


async def test_a_claim_that_is_lost_during_a_registration_is(world: World) -> None:
    await world.seal("b1", world.append(0, [5]))
    Overtaken(world, "lost")
    report = await segmenter_of(world, claim_ttl_ms=30).drain()
    assert (report.registered, report.claims_lost) == (1, 1), "the second time"
    await world.check()


async def _first_report(world: World, store: Any) -> Any:
    """Drains until the first buffer is over, claiming nothing after it."""
    worker = segmenter_of(world, store=store, claim_ttl_ms=30)
    draining = asyncio.create_task(worker.drain())
    while not world.agent.calls["pull_slice"]:
        await asyncio.sleep(0)
    worker.close()
    return await draining


async def test_buffers_out_of_order_wait_for_their_predecessor(world: World) -> None:
    """G3: a later span is EARLY until the earlier one is registered."""
    first, second = world.append(0, [50]), world.append(0, [50])
    await world.seal("b2", second)
    await world.seal("b1", first)
    await segmenter_of(world, builds_in_flight_max=1).drain()
    assert c.REGISTRATION_RESULT_EARLY in world.registrations
    await world.check()


async def test_g7_what_waits_for_its_predecessor_is_freed_once_it_is_uploaded(world: World) -> None:
    """Many buffers may wait: some KiB each, not the object that each of them became."""
    first, second = world.append(0, [4]), world.append(0, [5])
    await world.seal("b1", first)
    await world.seal("b2", second)
    world.hold_back("b1")
    draining = asyncio.create_task(segmenter_of(world).drain())
    while c.REGISTRATION_RESULT_EARLY not in world.registrations:
        await asyncio.sleep(0.001)
    gc.collect()
    assert not [kept for kept in gc.get_objects() if isinstance(kept, BuiltObject)]
    await world.expire_claims()
    await draining
    await segmenter_of(world).drain()
    await world.check()


async def test_an_early_segment_is_given_back_in_the_end(world: World) -> None:
    world.append(0, [50])
    await world.seal("b2", world.append(0, [50]))
    draining = asyncio.create_task(segmenter_of(world, early_wait_ms_max=20).drain())
    while not world.released:
        await asyncio.sleep(0.005)
    assert world.released[0].reason.startswith("early: ")
    assert world.released[0].retry_after_ms >= 1
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)


async def _one_failure(world: World, worker: Segmenter) -> c.ReleaseClaimRequest:
    """Drains until the buffer was given back once, which then cannot be claimed any more."""
    report = await worker.drain()
    assert report.failed == 1
    [given_back] = world.released
    assert report.retry_after_ms == given_back.retry_after_ms
    assert world.segments == {}
    await world.expire_claims()
    return given_back


def _drop_last(batches: list[bytes]) -> list[bytes]:
    return batches[:-1]


def _drop_middle(batches: list[bytes]) -> list[bytes]:
    return [batches[0], *batches[2:]]


def _repeat_first(batches: list[bytes]) -> list[bytes]:
    return [batches[0], *batches]


def _other_epoch(batches: list[bytes]) -> list[bytes]:
    return [stamp_batch(batches[0], 0, 9), *batches[1:]]


def _flip_a_bit(batches: list[bytes]) -> list[bytes]:
    damaged = bytearray(batches[1])
    damaged[-1] ^= 1
    return [batches[0], bytes(damaged), *batches[2:]]


def _too_many(batches: list[bytes]) -> list[bytes]:
    return [*batches, encode_batch(records_of(0, 30, 5), base_offset=30, epoch=1)]


def _nothing(batches: list[bytes]) -> list[bytes]:
    return []


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (_drop_last, "mismatch: orders/0 epoch 1 [0, 30): end offset is 20, expected 30"),
        (_drop_middle, "mismatch: orders/0 epoch 1 [0, 30): base offset is 20, expected 10"),
        (_repeat_first, "format: "),
        (_other_epoch, "format: batch epoch is 9"),
        (_flip_a_bit, "format: batch CRC"),
        (_too_many, "mismatch: orders/0 epoch 1 [0, 30): end offset is 35, expected 30"),
        (_nothing, "mismatch: orders/0 epoch 1 [0, 30): end offset is 0, expected 30"),
    ],
)
async def test_other_records_than_announced_are_never_registered(world: World, tamper: Any, reason: str) -> None:
    """G6: what the agent sends is held against what it announced; a difference is an error that says where."""
    await world.seal("b1", world.append(0, [10, 10, 10]))
    world.held.tamper = tamper
    given_back = await _one_failure(world, segmenter_of(world))
    assert given_back.reason.startswith(reason)
    assert await world.keys() == []
    world.held.tamper = lambda batches: batches
    await segmenter_of(world).drain()
    await world.check()


async def test_a_slice_beyond_the_memory_limit_is_refused(world: World) -> None:
    await world.seal("b1", world.append(0, [10, 10]))
    given_back = await _one_failure(world, segmenter_of(world, segment_build_bytes_max=300))
    assert "segment_build_bytes_max = 300" in given_back.reason


async def test_small_slices_that_are_too_much_for_one_build_become_several_objects() -> None:
    """However large an object may be otherwise; the buffer would fail at every try."""
    world = await new_world(partitions=40)
    slices = [world.append(partition, [30, 30]) for partition in range(40)]
    await world.seal("b1", *slices)
    limit = sum(slice_.size_bytes for slice_ in slices) // 2
    await segmenter_of(world, segment_build_bytes_max=limit, block_bytes_target=4096).drain()
    assert not world.released or not world.released[0].reason
    await world.check()


async def test_a_merge_is_no_larger_than_a_build_may_be(world: World) -> None:
    asked = []

    async def claim_compaction(request: c.ClaimCompactionRequest) -> c.ClaimCompactionResponse:
        asked.append(request.target_bytes)
        return c.ClaimCompactionResponse()

    world.coordinator.claim_compaction = claim_compaction
    await segmenter_of(world, compaction_target_bytes=512 << 20, segment_build_bytes_max=320 << 20).compact()
    assert asked == [320 << 20]


async def test_an_agent_that_is_away_costs_a_retry(world: World) -> None:
    await world.seal("b1", world.append(0, [10]))
    world.agent.down = True
    assert (await _one_failure(world, segmenter_of(world))).reason == "peer: the agent is down"
    world.agent.down = False
    await segmenter_of(world).drain()
    await world.check()


async def test_an_agent_that_hangs_costs_a_retry(world: World) -> None:
    await world.seal("b1", world.append(0, [10]))
    honest = world.agent.pull_slice

    async def hang(request: Any) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    world.agent.pull_slice = hang
    given_back = await _one_failure(world, segmenter_of(world, rpc_timeout_ms=20))
    assert given_back.reason == "peer: no answer from agent:1 within 20 ms"
    world.agent.pull_slice = honest
    await segmenter_of(world).drain()
    await world.check()


async def test_a_store_that_is_down_costs_a_retry(world: World) -> None:
    """G7: the buffer stays with the agent, and goes up when the store is back."""
    await world.seal("b1", world.append(0, [10]))
    faulty = FaultyStore(world.store)
    faulty.down = True
    assert (await _one_failure(world, segmenter_of(world, store=faulty))).reason.startswith("store: ")
    await segmenter_of(world).drain()
    await world.check()


@pytest.mark.parametrize("error", [StoreInvalid("InvalidPart"), StoreDenied("AccessDenied")])
async def test_what_the_store_refuses_is_no_failure_that_passes(
    world: World, error: StoreError, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said as an error, under a name of its own, and not hammered on."""
    await world.seal("b1", world.append(0, [10]))

    class Refusing(MemoryStore):
        async def put(self, *args: Any, **kwargs: Any) -> Any:
            raise error

    given_back = await _one_failure(world, segmenter_of(world, store=Refusing(), handover_refused_retry_ms=12_345))
    assert given_back.reason == f"refused: {error}"
    assert given_back.retry_after_ms == 12_345
    assert [record.levelname for record in caplog.records if "given back" in record.message] == ["ERROR"]
    await segmenter_of(world).drain()
    await world.check()


async def test_g7_what_could_not_be_uploaded_is_freed_at_once(world: World) -> None:
    """A full garbage collection may be minutes away, and a store that is down fails every few seconds."""
    await world.seal("b1", world.append(0, [10]))
    faulty = FaultyStore(world.store)
    faulty.down = True
    gc.collect()
    gc.disable()
    try:
        await _one_failure(world, segmenter_of(world, store=faulty))
        assert not [kept for kept in gc.get_objects() if isinstance(kept, BuiltObject)]
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [FaultKind.TIMEOUT_DONE, FaultKind.LOST_REPLY, FaultKind.TIMEOUT_NOT_DONE])
async def test_an_upload_of_unknown_outcome_is_repeated_safely(world: World, kind: FaultKind) -> None:
    await world.seal("b1", world.append(0, [10]))
    faulty = FaultyStore(world.store, ScriptedFaults([kind, kind], operation="put"))
    retrying = RetryingStore(faulty, RetryPolicy(base_delay_ms=1, deadline_ms=60_000))
    report = await segmenter_of(world, store=retrying).drain()
    assert report.registered == 1
    assert len(await world.keys()) == 1
    await world.check()


@pytest.mark.parametrize("seed", range(20))
async def test_random_store_faults_and_parallel_workers_lose_nothing(seed: int) -> None:
    world = await new_world(clock=SystemClock())
    rng = random.Random(seed)
    for number in range(12):
        slices = [world.append(p, [rng.randint(1, 40)]) for p in rng.sample(range(4), rng.randint(1, 4))]
        await world.seal(f"b{number}", *slices)
    rates = {FaultKind.UNAVAILABLE: 0.2, FaultKind.TIMEOUT_DONE: 0.2, FaultKind.TIMEOUT_NOT_DONE: 0.1}
    faulty = FaultyStore(world.store, RandomFaults(rng, rates))
    workers = [segmenter_of(world, f"w{number}", store=faulty) for number in range(3)]
    while world.waiting:
        await asyncio.gather(*(worker.drain() for worker in workers))
    await world.check()


async def test_a_fenced_range_drops_the_segment_and_ends_the_buffer(world: World) -> None:
    await world.seal("b1", world.append(0, [10]))
    declare = world.coordinator.declare_uploads

    async def delete_the_topic_before(request: c.DeclareUploadsRequest) -> c.DeclareUploadsResponse:
        await world.delete_topic()
        return await declare(request)

    world.coordinator.declare_uploads = delete_the_topic_before
    report = await segmenter_of(world).drain()
    assert report.registered == 1
    assert world.segments == {}
    assert world.waiting == []


async def test_a_lost_answer_to_the_registration_is_asked_again(world: World) -> None:
    await world.seal("b1", world.append(0, [10]))
    world.coordinator.lose_answers("register_segments", 3)
    report = await segmenter_of(world).drain()
    assert report.registered == 1
    assert world.coordinator.calls["register_segments"] == 4
    assert len(world.segments) == 1
    await world.check()


async def test_nothing_is_uploaded_before_it_is_declared(world: World) -> None:
    """G8: with an answer that is lost, and asked for again."""
    await world.seal("b1", world.append(0, [10]))
    declare = world.coordinator.declare_uploads
    world.coordinator.lose_answers("declare_uploads")

    async def with_nothing_stored(request: c.DeclareUploadsRequest) -> c.DeclareUploadsResponse:
        assert await world.keys() == []
        return await declare(request)

    world.coordinator.declare_uploads = with_nothing_stored
    assert (await segmenter_of(world).drain()).registered == 1
    assert world.coordinator.calls["declare_uploads"] == 2
    await world.check()


async def test_a_claim_that_was_lost_before_the_upload_uploads_nothing(world: World) -> None:
    await world.seal("b1", world.append(0, [10]))
    declare = world.coordinator.declare_uploads

    async def too_late(request: c.DeclareUploadsRequest) -> c.DeclareUploadsResponse:
        await world.expire_claims()
        world.coordinator.declare_uploads = declare
        return await declare(request)

    world.coordinator.declare_uploads = too_late
    report = await segmenter_of(world).drain()
    assert (report.claims_lost, report.registered) == (1, 1)
    await world.check()
    assert len([info async for info in world.store.list("")]) == 1


async def test_the_build_limit_holds_for_all_callers_together(world: World) -> None:
    for number in range(6):
        await world.seal(f"b{number}", world.append(number, [10]))
    building = peak = 0

    class Counting(MemoryStore):
        async def put(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal building, peak
            building += 1
            peak = max(peak, building)
            await asyncio.sleep(0.002)
            building -= 1
            return await world.store.put(*args, **kwargs)

    worker = segmenter_of(world, store=Counting(), builds_in_flight_max=2)
    await asyncio.gather(worker.drain(), worker.drain(), worker.drain())
    assert peak == 2
    await world.check()


async def test_after_an_outage_the_oldest_buffers_go_up_first(world: World) -> None:
    """Younger ones could not be registered before them, and the agent's log gives back its space from the front."""
    for number in range(6):
        await world.seal(f"b{number}", world.append(0, [10]))
    faulty = FaultyStore(world.store)
    faulty.down = True
    worker = segmenter_of(world, store=faulty, builds_in_flight_max=1)
    for _ in range(3):
        report = await worker.drain()
        assert report.retry_after_ms is not None
    await world.expire_claims()
    faulty.down = False
    report = await worker.drain()
    assert (report.registered, report.retry_after_ms) == (6, None)
    assert [world.attempts[f"b{number}"] for number in range(6)] == [2, 1, 1, 1, 1, 1]
    assert c.REGISTRATION_RESULT_EARLY not in world.registrations
    await world.check()


async def test_a_buffer_that_the_store_refuses_holds_up_no_other(world: World) -> None:
    for number in range(4):
        await world.seal(f"b{number}", world.append(number, [10]))

    class Picky(MemoryStore):
        async def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
            if "/0/" in key:
                raise StoreUnavailable("not this one")
            return await world.store.put(key, *args, **kwargs)

    report = await segmenter_of(world, store=Picky(), builds_in_flight_max=1).drain()
    assert (report.failed, report.registered) == (1, 3)
    assert world.waiting == ["b0"]


async def test_a_store_that_is_away_is_asked_by_one_caller_until_it_answers() -> None:
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asked: list[str] = []

    class Silent(MemoryStore):
        async def check(self) -> None:
            asked.append("check")
            await answer

    probe, closing = StoreProbe(Silent()), asyncio.Event()
    assert await probe.wait_until_available(closing)
    assert asked == []
    probe.note_failure()
    asking = asyncio.create_task(probe.wait_until_available(closing))
    while not asked:
        await asyncio.sleep(0)
    assert not await probe.wait_until_available(closing)
    assert asked == ["check"]
    answer.set_result(None)
    assert await asking
    assert not probe.is_needed


async def test_an_end_does_not_wait_for_the_store() -> None:
    class Silent(MemoryStore):
        async def check(self) -> None:
            await asyncio.Event().wait()

    probe, closing = StoreProbe(Silent()), asyncio.Event()
    probe.note_failure()
    asking = asyncio.create_task(probe.wait_until_available(closing))
    await asyncio.sleep(0)
    closing.set()
    assert not await asking
    assert probe.is_needed
