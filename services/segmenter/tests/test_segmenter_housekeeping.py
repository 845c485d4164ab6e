"""Compaction keeps every record; the orphan sweep deletes what is unreferenced and old, and nothing else (G8)."""

import asyncio
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from shproto.errors import Fenced, MetadataWentBack, Unavailable
from shproto.events import SegmentsCompacted
from shproto.v1 import coordinator_pb2 as c
from shruntime.clock import SystemClock
from shstore import (
    BucketMissing,
    FaultKind,
    FaultyStore,
    KeysRefused,
    MemoryStore,
    ScriptedFaults,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.messages import segment_of
from streamhouse_segmenter.core.history import MARK_KEY, HistoryMark
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.service import Segmenter
from streamhouse_segmenter.settings import SegmenterSettings

from services.segmenter.tests.segmenter_world import World, assert_all_stored

HOUR_MS = 3_600_000
SETTINGS = SegmenterSettings(
    compaction_segments_min=2,  # three of a size, or nearly, are merged
    compaction_small_bytes_max=1024 * 1024,
    handover_retry_first_ms=1,
    handover_retry_max_ms=2,
    orphan_confirm_ms=300_000,
)


class House(World):
    """A drained partition set, and time that is moved by hand for the sweep."""

    def __init__(self, **overrides: Any) -> None:
        super().__init__()
        self.settings = SETTINGS.model_copy(update=overrides)
        self.rng = random.Random(3)
        self.sweeping = self.segmenter(clock=self.clock)
        self.buffers = 0

    def segmenter(self, *, store: Any = None, clock: Any = None, **overrides: Any) -> Segmenter:
        ports = Ports(
            coordinator=self.coordinator,
            store=store or self.store,
            ingest_at=lambda address: self.agent,
            clock=clock or SystemClock(),
            rng=self.rng,
        )
        return Segmenter(ports, self.settings.model_copy(update=overrides), "w1")

    async def fill(self, buffers: int, partitions: int = 1) -> None:
        for _ in range(buffers):
            await self.seal_more(*(self.append(partition, [5, 7]) for partition in range(partitions)))
        await self.segmenter(builds_in_flight_max=1).drain()

    async def seal_more(self, *slices: c.BufferSlice) -> None:
        self.buffers += 1
        await self.seal(f"b{self.buffers}", *slices)

    async def hours_pass(self) -> None:
        """Claims run out, and the sweep deletes what looks like an orphan."""
        await self.expire_claims()
        self.clock.advance(2 * HOUR_MS)
        await sweep_until_confirmed(self)

    async def stored(self) -> set[str]:
        return set(await self.keys()) - {MARK_KEY}

    @property
    def registered(self) -> set[str]:
        return {segment.object_key for segment in self.segments.values()}

    async def check(self) -> None:
        await assert_all_stored(self, self.store, self.held)
        assert self.registered <= await self.stored()


async def new_house(**overrides: Any) -> House:
    house = House(**overrides)
    await house.open()
    return house


# ---- compaction


@pytest.mark.parametrize("partitions", [1, 3])
async def test_compaction_keeps_every_record_at_its_offset(partitions: int) -> None:
    house = await new_house()
    await house.fill(6, partitions)
    assert await house.segmenter().compact() == 6 * partitions
    assert len(house.segments) == partitions
    await house.check()
    [merged] = house.of_partition(house.topic_id, 0)
    assert (merged.base_offset, merged.end_offset, merged.record_count) == (0, 72, 72)
    assert merged.object_key.startswith("data/")


async def test_compaction_joins_epochs_over_the_gap_between_them() -> None:
    house = await new_house()
    await house.fill(3)
    for counts in ([4], [4]), ([4],):  # the epochs 2 and 3, where the ranges before end
        await house.expire_session(house.held.session.session_id)
        await house.held.open()
        for number in counts:
            await house.seal_more(house.append(0, number))
            await house.segmenter(builds_in_flight_max=1).drain()
    claim = house.coordinator.claim_compaction

    async def claim_all(request: c.ClaimCompactionRequest) -> c.ClaimCompactionResponse:
        answer = await claim(request)
        if answer.found:
            del answer.segments[:]
            answer.segments.extend(house.of_partition(house.topic_id, 0))
        return answer  # type: ignore[no-any-return]

    async def register(request: c.RegisterCompactionRequest) -> c.RegisterCompactionResponse:
        replaced = tuple(request.replaced_segment_ids)
        compacted = SegmentsCompacted(segment_of(request.segment), replaced)
        await house.service.context.store.run(lambda tx: tx.append([compacted]))
        return c.RegisterCompactionResponse(result=c.REGISTRATION_RESULT_REGISTERED)

    # The coordinator has nothing merged over a gap so far: a segmenter that is asked to must not lose a record.
    house.coordinator.claim_compaction, house.coordinator.register_compaction = claim_all, register
    assert await house.segmenter().compact() == 6
    [merged] = house.of_partition(house.topic_id, 0)
    assert (merged.epoch, merged.record_count, merged.end_offset) == (3, 48, (1 << 31) + 4)
    await house.check()


async def test_few_segments_are_left_alone() -> None:
    house = await new_house(compaction_segments_min=3)
    await house.fill(2)
    assert await house.segmenter().compact() == 0
    assert len(house.segments) == 2


async def test_a_claim_that_its_own_compaction_ended_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    house = await new_house()
    await house.fill(3)
    register, renew = house.coordinator.register_compaction, house.coordinator.renew_claim
    fenced = asyncio.Event()

    async def registered_late(request: c.RegisterCompactionRequest) -> c.RegisterCompactionResponse:
        answer = await register(request)
        await fenced.wait()
        await asyncio.sleep(0.02)  # on its way
        return answer  # type: ignore[no-any-return]

    async def renew_claim(request: c.RenewClaimRequest) -> c.RenewClaimResponse:
        try:
            return await renew(request)  # type: ignore[no-any-return]
        except Fenced:
            fenced.set()
            raise

    house.coordinator.register_compaction, house.coordinator.renew_claim = registered_late, renew_claim
    assert await house.segmenter(claim_ttl_ms=30).compact() == 3
    assert not [item.getMessage() for item in caplog.records if item.levelno >= logging.WARNING]
    await house.check()


@pytest.mark.parametrize("at", [70, -1, -40])
async def test_a_damaged_source_is_never_merged(at: int) -> None:
    """G6: in a block, in the footer, in the index: an error, and the segments stay what they are."""
    house = await new_house()
    await house.fill(3)
    victim = house.of_partition(house.topic_id, 0)[1]
    body = bytearray(await house.store.get(victim.object_key))
    body[at] ^= 1
    await house.store.put(victim.object_key, [bytes(body)], if_absent=False)
    before = dict(house.segments)
    assert await house.segmenter().compact() == 0
    assert house.segments == before
    [given_back] = [release for release in house.released if release.reason]
    assert given_back.retry_after_ms == SETTINGS.compaction_interval_ms


async def test_an_object_of_another_segment_is_never_merged() -> None:
    house = await new_house()
    await house.fill(3)
    first, second, _ = house.of_partition(house.topic_id, 0)
    await house.store.put(second.object_key, [await house.store.get(first.object_key)], if_absent=False)
    assert await house.segmenter().compact() == 0
    assert "of another segment" in house.released[-1].reason or len(house.segments) == 3


async def test_a_missing_source_is_an_error() -> None:
    house = await new_house()
    await house.fill(3)
    await house.store.delete([house.of_partition(house.topic_id, 0)[1].object_key])
    assert await house.segmenter().compact() == 0
    assert "no object with key" in house.released[-1].reason


async def test_a_store_that_fails_costs_a_retry() -> None:
    house = await new_house()
    await house.fill(3)
    faulty = FaultyStore(house.store, ScriptedFaults([None, FaultKind.UNAVAILABLE], operation="get"))
    assert await house.segmenter(store=faulty).compact() == 0
    await house.expire_claims()
    assert await house.segmenter(store=faulty).compact() == 3
    await house.check()


async def test_a_lost_answer_to_the_registration_of_a_compaction_is_asked_again() -> None:
    house = await new_house()
    await house.fill(3)
    house.coordinator.lose_answers("register_compaction", 2)
    assert await house.segmenter().compact() == 3
    assert house.coordinator.calls["register_compaction"] == 3
    await house.check()


async def test_a_compaction_that_retention_overtook_is_dropped() -> None:
    house = await new_house()
    await house.fill(3)
    claim = house.coordinator.claim_compaction

    async def claim_then_retire(request: c.ClaimCompactionRequest) -> c.ClaimCompactionResponse:
        answer = await claim(request)
        if len(house.segments) == 3:
            first = house.of_partition(house.topic_id, 0)[0]
            await house.coordinator.delete_records(
                c.DeleteRecordsRequest(topic="orders", partition=0, before_offset=first.end_offset)
            )
        return answer  # type: ignore[no-any-return]

    house.coordinator.claim_compaction = claim_then_retire
    assert await house.segmenter().compact() == 0
    assert len(house.segments) == 2


async def test_a_lost_compaction_claim_changes_nothing() -> None:
    house = await new_house()
    await house.fill(3)

    async def refuse(request: c.RegisterCompactionRequest) -> c.RegisterCompactionResponse:
        raise Fenced("the claim has run out")

    house.coordinator.register_compaction = refuse
    assert await house.segmenter().compact() == 0
    await house.check()


async def test_a_compaction_that_the_sweep_overtook_is_dropped() -> None:
    """G8: a worker that was stopped for hours must not put a swept object in the place of good segments."""
    house = await new_house()
    await house.fill(3)
    register = house.coordinator.register_compaction

    async def stop_for_hours_before(request: c.RegisterCompactionRequest) -> c.RegisterCompactionResponse:
        await house.hours_pass()
        return await register(request)

    house.coordinator.register_compaction = stop_for_hours_before
    assert await house.segmenter().compact() == 0
    assert len(house.segments) == 3
    await house.check()
    assert await house.stored() == house.registered


# ---- orphans


async def sweep_until_confirmed(house: House) -> Any:
    await house.sweeping.sweep_orphans()
    house.clock.advance(SETTINGS.orphan_confirm_ms)
    return await house.sweeping.sweep_orphans()


async def test_the_sweep_deletes_old_unreferenced_objects_and_nothing_else() -> None:
    """G8: every unregistered object goes after the grace period, and nothing else ever does."""
    house = await new_house()
    await house.fill(3, 2)
    for key in ("data/x/0/1-1-a.seg", "mixed/2024-01-01/b.seg", "other/c", "control/d"):
        await house.store.put(key, [b"left over"])
    house.clock.advance(HOUR_MS)
    await house.store.put("data/x/0/2-1-young.seg", [b"being registered"])
    report = await sweep_until_confirmed(house)
    assert (report.deleted, report.deleted_bytes) == (2, 18)
    assert await house.stored() == house.registered | {"other/c", "control/d", "data/x/0/2-1-young.seg"}
    await house.check()


async def test_replaced_objects_go_after_the_readers_had_time() -> None:
    house = await new_house()
    await house.fill(4)
    house.clock.advance(2 * HOUR_MS)
    await house.segmenter().compact()
    assert len(await house.stored()) == 5
    first = await house.sweeping.sweep_orphans()
    assert (first.deleted, first.waiting) == (0, 4)
    house.clock.advance(SETTINGS.orphan_confirm_ms)
    assert (await house.sweeping.sweep_orphans()).deleted == 4
    assert await house.stored() == house.registered
    await house.check()


async def test_a_dry_run_deletes_nothing() -> None:
    house = await new_house(orphan_dry_run=True)
    await house.store.put("data/x/0/1-1-a.seg", [b"left over"])
    house.clock.advance(HOUR_MS)
    report = await sweep_until_confirmed(house)
    assert (report.deleted, report.waiting) == (0, 1)
    assert await house.stored() == {"data/x/0/1-1-a.seg"}


async def test_a_registration_that_the_sweep_overtook_is_refused_and_built_again() -> None:
    """G8: a worker stopped between upload and registration finds its object deleted. No segment may refer to it."""
    house = await new_house()
    await house.seal("b1", house.append(0, [5, 7]))
    register = house.coordinator.register_segments
    swept: list[str] = []

    async def stop_for_hours_before(request: c.RegisterSegmentsRequest) -> c.RegisterSegmentsResponse:
        house.coordinator.register_segments = register
        swept.extend(await house.stored())
        await house.hours_pass()
        return await register(request)

    house.coordinator.register_segments = stop_for_hours_before
    report = await house.segmenter().drain()
    assert (report.failed, report.registered) == (1, 1)
    assert house.registrations == [c.REGISTRATION_RESULT_WITHDRAWN, c.REGISTRATION_RESULT_REGISTERED]
    await house.check()
    assert len(swept) == 1 and house.registered.isdisjoint(swept)


async def test_an_upload_under_way_is_left_alone() -> None:
    """However old its object is: as long as the claim is held, or the declaration is young."""
    house = await new_house()
    await house.seal("b1", house.append(0, [5, 7]))
    register = house.coordinator.register_segments

    async def be_slow(request: c.RegisterSegmentsRequest) -> c.RegisterSegmentsResponse:
        [claim] = house.rows(t.BUFFER_CLAIMS)
        renewal = c.RenewClaimRequest(claim_id=claim.claim_id, claim_ttl_ms=600_000)
        house.clock.advance(2 * HOUR_MS)
        await house.coordinator.renew_claim(renewal)  # as every few seconds
        assert (await sweep_until_confirmed(house)).in_upload == 1
        return await register(request)

    house.coordinator.register_segments = be_slow
    assert (await house.segmenter().drain()).registered == 1
    await house.check()


@pytest.mark.parametrize("step", ["delete", "finish_deletion"])
async def test_a_deletion_that_was_cut_off_is_repeated(step: str) -> None:
    house = await new_house()
    await house.store.put("data/x/0/1-1-a.seg", [b"left over"])
    house.clock.advance(HOUR_MS)
    await house.sweeping.sweep_orphans()
    house.clock.advance(SETTINGS.orphan_confirm_ms)
    finish, store = house.coordinator.finish_deletion, house.store

    async def crash(request: object) -> None:
        raise Unavailable("cut off")

    if step == "delete":
        faulty = FaultyStore(house.store, ScriptedFaults([FaultKind.UNAVAILABLE], operation="delete"))
        sweeping = house.segmenter(store=faulty, clock=house.clock)
    else:
        house.coordinator.finish_deletion, sweeping = crash, house.sweeping
    with pytest.raises((Unavailable, StoreUnavailable)):
        await sweeping.sweep_orphans()
    assert [row.begun_ms > 0 for row in house.rows(t.DELETIONS)] == [True]
    house.coordinator.finish_deletion, house.store = finish, store
    report = await house.segmenter(clock=house.clock).sweep_orphans()
    assert (report.deleted, report.cleared) == ((1, 0) if step == "delete" else (0, 1))
    assert house.rows(t.DELETIONS) == [] and await house.stored() == set()


async def test_an_upload_that_left_nothing_behind_is_cleared() -> None:
    house = await new_house()
    await house.seal("b1", house.append(0, [5, 7]))
    faulty = FaultyStore(house.store, ScriptedFaults([FaultKind.UNAVAILABLE], operation="put"))

    async def be_gone(request: c.ReleaseClaimRequest) -> c.ReleaseClaimResponse:
        return c.ReleaseClaimResponse()

    house.coordinator.release_claim = be_gone  # the worker tells nobody
    await house.segmenter(store=faulty).drain()
    assert len(house.rows(t.UPLOAD_INTENTS)) == 1
    await house.hours_pass()
    await house.sweeping.sweep_orphans()
    assert (house.rows(t.UPLOAD_INTENTS), house.rows(t.DELETIONS)) == ([], [])


class LockedStore(MemoryStore):
    """Does not let some keys go, as one with object locks."""

    def __init__(self, locked: set[str], **options: Any) -> None:
        super().__init__(**options)
        self.locked = locked
        self.deletes = 0

    async def delete(self, keys: Sequence[str]) -> None:
        self.deletes += 1
        await super().delete([key for key in keys if key not in self.locked])
        if refused := self.locked & set(keys):
            raise KeysRefused(f"AccessDenied: {min(refused)}", sorted(refused))


async def test_an_object_that_the_store_does_not_let_go_keeps_no_other() -> None:
    """One object under a lock held up the whole sweep, and every sweep after it."""
    house = await new_house()
    locked = {"data/x/0/500-1-a.seg", "mixed/2024-01-01/b.seg"}
    store = LockedStore(set(locked), now_ms=house.clock.wall_ms)
    house.store, house.sweeping = store, house.segmenter(store=store, clock=house.clock)
    for number in range(1100):
        await house.store.put(f"data/x/0/{number}-1-a.seg", [b"left over"])
    for key in ("mixed/2024-01-01/b.seg", "mixed/2024-01-02/c.seg"):
        await house.store.put(key, [b"left over"])
    house.clock.advance(2 * HOUR_MS)
    report = await sweep_until_confirmed(house)
    assert report.deleted == 1100
    assert await house.stored() == locked
    assert {row.object_key for row in house.rows(t.DELETIONS)} == locked, "tried again by the next sweep"
    assert store.deletes == 4, "one for each page, and one for deletions that were begun"
    store.locked.clear()
    assert (await house.sweeping.sweep_orphans()).deleted == 2
    assert not await house.stored()


async def test_a_store_that_lets_nothing_go_costs_a_request_and_a_line_for_each_page(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """S3 says of each key that the permission to delete is missing: each page took 2,000 requests and 1,000 lines."""
    house = await new_house()
    store = LockedStore({f"data/x/0/{number}-1-a.seg" for number in range(1100)}, now_ms=house.clock.wall_ms)
    house.store, house.sweeping = store, house.segmenter(store=store, clock=house.clock)
    for key in store.locked:
        await house.store.put(key, [b"left over"])
    house.clock.advance(2 * HOUR_MS)
    report = await sweep_until_confirmed(house)
    assert (report.deleted, report.waiting) == (0, 1100)
    lines = [line for line in caplog.messages if "the store does not delete" in line]
    assert store.deletes == len(lines) == 3, "two pages, and one of deletions that were begun"


@pytest.mark.parametrize("error", [StoreDenied("HTTP 403"), BucketMissing("b", None)])
async def test_a_store_that_refuses_the_call_is_asked_once(error: StoreError) -> None:
    house = await new_house()

    class ClosedStore(MemoryStore):
        deletes = 0

        async def delete(self, keys: Sequence[str]) -> None:
            self.deletes += 1
            raise error

    store = ClosedStore(now_ms=house.clock.wall_ms)
    house.store, house.sweeping = store, house.segmenter(store=store, clock=house.clock)
    for number in range(1100):
        await house.store.put(f"data/x/0/{number}-1-a.seg", [b"left over"])
    house.clock.advance(2 * HOUR_MS)
    with pytest.raises(type(error)):
        await sweep_until_confirmed(house)
    assert store.deletes == 1


async def test_several_sweepers_do_no_harm() -> None:
    house = await new_house()
    await house.fill(2)
    await house.store.put("data/x/0/1-1-a.seg", [b"left over"])
    house.clock.advance(HOUR_MS)
    others = [house.segmenter(clock=house.clock) for _ in range(3)]
    for _ in range(2):
        for other in others:
            await other.sweep_orphans()
        house.clock.advance(SETTINGS.orphan_confirm_ms)
    assert await house.stored() == house.registered


async def test_more_than_a_page_of_orphans_is_swept() -> None:
    house = await new_house()
    keys = [f"data/x/0/{number:020d}-1-a.seg" for number in range(2100)]
    for key in keys:
        await house.store.put(key, [b"x"])
    house.clock.advance(HOUR_MS)
    assert (await sweep_until_confirmed(house)).deleted == 2100
    assert await house.stored() == set()


async def test_a_sweep_after_a_restored_backup_is_refused() -> None:
    """What was registered since the backup looks like an orphan, and is not."""
    house = await new_house()
    await house.fill(3)
    backup = house.dump()
    await house.fill(3)
    await house.sweeping.mark_history()
    house.clock.advance(2 * HOUR_MS)
    before = await house.stored()

    house.restore(backup)  # from before the mark
    report = await sweep_until_confirmed(house)
    assert "is not there" in report.refused

    for number in range(20):  # the new history grows beyond the mark
        await house.create_topic(f"topic-{number}")
    await house.sweeping.mark_history()
    report = await sweep_until_confirmed(house)
    assert "is another one there" in report.refused
    await house.prune(house.position - 1)
    report = await sweep_until_confirmed(house)
    assert "was not marked in this history, which keeps no events of that age" in report.refused
    assert await house.stored() == before

    await house.store.delete([MARK_KEY])  # the operator has looked
    assert (await sweep_until_confirmed(house)).deleted == 3
    assert await house.stored() == house.registered


@pytest.mark.parametrize("swapped_at", [1, 2])
async def test_no_mark_is_taken_from_metadata_that_goes_back_while_it_is_taken(swapped_at: int) -> None:
    """The coordinator waits for PostgreSQL for some seconds: long enough to put an old dump in its place."""
    house = await new_house()
    await house.fill(3)
    backup = house.dump()
    await house.fill(3)
    await house.sweeping.mark_history()
    before = await house.stored()
    get_head, asked = house.coordinator.get_head, 0

    async def get_head_of_a_dump(request: c.GetHeadRequest) -> c.GetHeadResponse:
        nonlocal asked
        asked += 1
        if asked == swapped_at:
            house.restore(backup)
        return await get_head(request)

    house.coordinator.get_head = get_head_of_a_dump
    await house.sweeping.mark_history()
    house.clock.advance(2 * HOUR_MS)
    assert (await sweep_until_confirmed(house)).refused
    assert await house.stored() == before


async def test_a_sweep_that_the_coordinator_refuses_deletes_nothing() -> None:
    """It was told of what is missing by others; the mark is from before that."""
    house = await new_house()
    await house.fill(3)
    await house.sweeping.mark_history()
    await house.store.put("data/x/0/1-1-a.seg", [b"x"])
    before = await house.stored()

    async def begin_deletion(request: c.BeginDeletionRequest) -> c.BeginDeletionResponse:
        raise MetadataWentBack("the metadata went back: event 9 was seen, and is gone")

    sound = house.coordinator.get_head

    async def get_head(request: c.GetHeadRequest) -> c.GetHeadResponse:
        answer = await sound(request)
        answer.missing_position = 9
        return answer

    house.coordinator.begin_deletion = begin_deletion
    house.clock.advance(2 * HOUR_MS)
    report = await sweep_until_confirmed(house)
    assert "event 9 was seen" in report.refused and not report.deleted
    house.coordinator.get_head = get_head
    assert "event 9 of history" in (await sweep_until_confirmed(house)).refused
    assert await house.stored() == before


async def test_after_a_restore_sweeps_rest_and_marks_keep_that() -> None:
    house = await new_house()
    await house.fill(2)
    await house.sweeping.mark_history()
    mark, _ = HistoryMark.decode(await house.store.get(MARK_KEY))
    resting = replace(mark, sweep_from_ms=house.clock.wall_ms() + 10 * HOUR_MS)
    await house.store.put(MARK_KEY, [resting.encode()], if_absent=False)  # as a restore leaves it
    await house.store.put("data/x/0/1-1-a.seg", [b"left out"])
    house.clock.advance(2 * HOUR_MS)
    report = await sweep_until_confirmed(house)
    assert (report.deleted, report.resting_until_ms, report.refused) == (0, resting.sweep_from_ms, "")
    await house.fill(1)
    await house.sweeping.mark_history()
    mark, _ = HistoryMark.decode(await house.store.get(MARK_KEY))
    assert mark.position > resting.position and mark.sweep_from_ms == resting.sweep_from_ms
    house.clock.advance(10 * HOUR_MS)
    assert (await sweep_until_confirmed(house)).deleted == 1


async def test_a_mark_of_an_event_that_was_pruned_since_still_counts() -> None:
    """No segmenter ran for longer than events are kept."""
    house = await new_house()
    await house.fill(2)
    await house.sweeping.mark_history()
    await house.store.put("data/x/0/1-1-a.seg", [b"left over"])
    await house.fill(2)
    await house.prune(house.position - 1)
    house.clock.advance(2 * HOUR_MS)
    report = await sweep_until_confirmed(house)
    assert (report.refused, report.deleted) == ("", 1)


async def test_an_unreadable_mark_stops_the_sweep() -> None:
    """And nothing says that the metadata went back."""
    house = await new_house()
    await house.store.put(MARK_KEY, [b"nonsense"])
    refused = (await house.sweeping.sweep_orphans()).refused
    assert "is unreadable, read 3 times" in refused and "went back in time" not in refused
    await house.fill(1)
    await house.sweeping.mark_history()
    assert await house.store.get(MARK_KEY) == b"nonsense", "somebody has to look"


class DamagedReads(MemoryStore):
    """Damages the next reads of the mark, each at another place."""

    def __init__(self, now_ms: Any) -> None:
        super().__init__(now_ms=now_ms)
        self.damage: list[Callable[[bytes], bytes]] = []

    async def get(self, key: str, **options: Any) -> bytes:
        body = await super().get(key, **options)
        return self.damage.pop(0)(body) if key == MARK_KEY and self.damage else body


def _half(body: bytes) -> bytes:
    return body[: len(body) // 2]


def _later(body: bytes) -> bytes:
    """A digit of `sweep_from_ms` flipped."""
    return body.replace(b'"sweep_from_ms": 0', b'"sweep_from_ms": 8')


def _other_position(body: bytes) -> bytes:
    return body.replace(b'"position": ', b'"position": 9')


@pytest.mark.parametrize(
    ("damage", "is_old"),
    [
        *(([damage], is_old) for damage in (_half, _later, _other_position) for is_old in (False, True)),
        ([_half, _later], False),  # of one without a checksum two of three reads must agree
    ],
)
async def test_a_mark_that_is_damaged_on_its_way_is_read_again(
    damage: list[Callable[[bytes], bytes]], is_old: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """By a store that cuts bodies short, or flips bits: neither is metadata that went back, and nothing of it gets into
    the next mark."""
    house = await new_house()
    house.store = DamagedReads(house.clock.wall_ms)
    house.sweeping = house.segmenter(clock=house.clock)
    await house.fill(1)
    await house.sweeping.mark_history()
    if is_old:
        fields = json.loads(await house.store.get(MARK_KEY))
        del fields["crc32"]
        await house.store.put(MARK_KEY, [json.dumps(fields).encode()], if_absent=False)
    house.store.damage = [*damage]
    report = await house.sweeping.sweep_orphans()
    assert (report.refused, report.resting_until_ms) == ("", 0)
    await house.fill(1)
    house.store.damage = [*damage]
    await house.sweeping.mark_history()
    mark, is_checked = HistoryMark.decode(await house.store.get(MARK_KEY))
    assert (mark.position, mark.sweep_from_ms, is_checked) == (house.position, 0, True)
    assert not [item for item in caplog.records if item.levelno >= logging.WARNING]


async def test_the_mark_moves_on_with_the_history() -> None:
    house = House()
    await house.sweeping.mark_history()
    assert [info.key async for info in house.store.list("control/")] == []
    await house.open()
    await house.fill(1)
    await house.sweeping.mark_history()
    first = await house.store.get(MARK_KEY)
    await house.sweeping.mark_history()
    assert await house.store.get(MARK_KEY) == first
    await house.fill(1)
    await house.sweeping.mark_history()
    assert await house.store.get(MARK_KEY) != first
    assert (await house.sweeping.sweep_orphans()).refused == ""


async def test_errors_of_a_sweep_reach_the_caller() -> None:
    house = await new_house()
    await house.store.put("data/x/0/1-1-a.seg", [b"left over"])
    house.clock.advance(HOUR_MS)
    house.coordinator.down = True
    with pytest.raises(Unavailable):
        await house.sweeping.sweep_orphans()
    assert await house.stored() == {"data/x/0/1-1-a.seg"}
