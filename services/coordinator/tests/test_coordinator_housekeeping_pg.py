"""Retention, compaction, orphans and unclean recovery against a real PostgreSQL."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from shproto.errors import InvalidArgument, UnknownPartition, UnknownTopic
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.service import housekeeping
from streamhouse_coordinator.wiring import CoordinatorService

from services.coordinator.tests.running import PATIENCE_S, running

pytestmark = pytest.mark.long

MakeSegment = Callable[..., types_pb2.SegmentRef]
ChangeRows = Callable[..., Awaitable[object]]
REGISTERED, FENCED = 1, 3


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    return coordinator.api


async def fill(api: CoordinatorApi, agent: Any, spans: int, **changes: Any) -> pb.RangeGrant:
    grant = (await agent.leads())[0]
    for number in range(spans):
        assert await agent.write(grant, 10 * number, 10 * number + 10, **changes) == REGISTERED
    return grant


async def partition(api: CoordinatorApi) -> pb.PartitionInfo:
    return (await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))).partitions[0]


async def test_retention_by_size(api: CoordinatorApi, open_agent: Any) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2, retention_bytes=250))
    await fill(api, await open_agent(api, "a"), 5)
    done = await api.apply_retention(pb.ApplyRetentionRequest())
    assert (done.segments_removed, done.bytes_removed) == (2, 200)
    now = await partition(api)
    assert (now.log_start_offset, now.segment_count, now.size_bytes, now.record_count) == (20, 3, 300, 30)
    done = await api.apply_retention(pb.ApplyRetentionRequest())
    assert (done.segments_removed, done.bytes_removed) == (0, 0)


@pytest.mark.smoke
async def test_retention_by_time(api: CoordinatorApi, open_agent: Any) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1, retention_ms=3_600_000))
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    now_ms = int((await api.list_topics(pb.ListTopicsRequest())).topics[0].created_ms)
    for number, age_ms in enumerate((7_200_000, 3_700_000, 3_500_000, 9_999_999)):
        await agent.write(grant, number, number + 1, max_timestamp_ms=now_ms - age_ms)
    assert (await api.apply_retention(pb.ApplyRetentionRequest())).segments_removed == 2
    assert (await partition(api)).log_start_offset == 2, "only from the oldest on"


async def delete_before(api: CoordinatorApi, offset: int) -> tuple[int, int, int]:
    done = await api.delete_records(pb.DeleteRecordsRequest(topic="orders", before_offset=offset))
    return done.log_start_offset, done.segments_removed, done.bytes_removed


async def test_records_are_deleted_up_to_an_offset(api: CoordinatorApi, open_agent: Any, all_events: Any) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    await fill(api, await open_agent(api, "a"), 5)
    assert await delete_before(api, 25) == (25, 2, 200)
    now = await partition(api)
    assert (now.log_start_offset, now.segment_count) == (25, 3)
    assert await delete_before(api, 25) == await delete_before(api, 10) == (25, 0, 0), "it does not go back"
    assert len(await all_events(api, "LogStartMoved")) == 1
    assert await delete_before(api, 50) == (50, 3, 300)
    assert (await partition(api)).segment_count == 0
    parts = [part async for part in api.check_projections(pb.CheckProjectionsRequest())]
    assert not parts[-1].differences


async def test_records_that_only_a_log_has_are_not_deleted(api: CoordinatorApi, open_agent: Any) -> None:
    """Their segments would come below the start of the log, where nobody removes them."""
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    gone, other = await open_agent(api, "a"), await open_agent(api, "b")
    if not await gone.leads():
        gone, other = other, gone
    grant = await fill(api, gone, 2)
    with pytest.raises(InvalidArgument, match="before_offset is 21, must be 0 to 20"):
        await delete_before(api, 21)
    await gone.close()
    await other.write((await other.leads())[0], grant.limit_offset, grant.limit_offset + 10)
    with pytest.raises(InvalidArgument, match="must be 0 to 20"):
        await delete_before(api, grant.limit_offset + 5)
    assert (await partition(api)).log_start_offset == 0
    assert await delete_before(api, 20) == (20, 2, 200)


async def test_many_segments_are_deleted_in_several_transactions(
    dsn: str, fast: Callable[..., Any], open_agent: Any, all_events: Any
) -> None:
    async with running(fast(dsn, retention_batch=2)) as service:
        await service.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
        await fill(service.api, await open_agent(service.api, "a"), 6)
        assert await delete_before(service.api, 45) == (45, 4, 400)
        assert len(await all_events(service.api, "LogStartMoved")) == 3


async def test_records_of_what_is_not_there_are_not_deleted(api: CoordinatorApi) -> None:
    with pytest.raises(UnknownTopic):
        await delete_before(api, 0)
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    with pytest.raises(UnknownPartition):
        await api.delete_records(pb.DeleteRecordsRequest(topic="orders", partition=1))


async def test_topics_without_retention_keep_everything(api: CoordinatorApi, open_agent: Any) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    await fill(api, await open_agent(api, "a"), 3)
    assert (await api.apply_retention(pb.ApplyRetentionRequest())).segments_removed == 0


def ask(ttl_ms: int = 60_000) -> pb.ClaimCompactionRequest:
    return pb.ClaimCompactionRequest(
        worker_id="w", claim_ttl_ms=ttl_ms, small_bytes_max=101, target_bytes=10_000, segments_min=3
    )


async def merged(
    api: CoordinatorApi, claim: pb.ClaimCompactionResponse, make_segment: MakeSegment
) -> pb.RegisterCompactionRequest:
    """A request to register the merged segment, whose object is declared."""
    first, last = claim.segments[0], claim.segments[-1]
    ref = make_segment(first.topic_id, first.partition, last.epoch, first.base_offset, last.end_offset, size_bytes=300)
    await api.declare_uploads(pb.DeclareUploadsRequest(claim_id=claim.claim_id, object_keys=[ref.object_key]))
    ids = [item.segment_id for item in claim.segments]
    return pb.RegisterCompactionRequest(claim_id=claim.claim_id, replaced_segment_ids=ids, segment=ref)


@pytest.mark.smoke
async def test_compaction_replaces_a_run(api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment) -> None:
    """G8: every registered segment exists; what is replaced is not referred to any more."""
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    await fill(api, await open_agent(api, "a"), 4)
    claim = await api.claim_compaction(ask())
    assert claim.found and [item.base_offset for item in claim.segments] == [0, 10, 20, 30]
    assert claim.segments[0].topic == "orders" and claim.segments[0].object_key
    assert not (await api.claim_compaction(ask())).found, "the partition is taken"
    request = await merged(api, claim, make_segment)
    for _ in range(2):  # the second one as if the first answer had been lost
        assert (await api.register_compaction(request)).result == REGISTERED
    now = await partition(api)
    assert (now.segment_count, now.size_bytes, now.record_count, now.registered_end) == (1, 300, 40, 40)
    keys = [item.object_key for item in claim.segments] + [request.segment.object_key, "data/unknown"]
    unreferenced = await api.filter_unreferenced(pb.FilterUnreferencedRequest(object_keys=keys))
    assert list(unreferenced.object_keys) == [*keys[:4], "data/unknown"]
    assert not (await api.claim_compaction(ask())).found, "nothing small is left"


async def test_small_segments_behind_any_number_of_large_ones_are_found(
    api: CoordinatorApi, open_agent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first 10,000 segments of a partition were looked at: one of 640 GB was never compacted again."""
    monkeypatch.setattr(housekeeping, "COMPACTION_SEGMENTS", 5)
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    #        large ones                    small ones, two at a time    and three that are worth it, over two pages
    sizes = [*[200] * 12, *[100, 100, 200] * 3, 100, 100, 100]
    for at, size_bytes in enumerate(sizes):
        await agent.write(grant, 10 * at, 10 * at + 10, size_bytes=size_bytes)
    claim = await api.claim_compaction(ask())
    assert [item.base_offset for item in claim.segments] == [210, 220, 230]


async def test_small_segments_before_a_large_one_do_not_wait_for_more(api: CoordinatorApi, open_agent: Any) -> None:
    """The run is closed by a segment that is not among the small ones that are read."""
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    for at, size_bytes in enumerate([100, 10, 10]):
        await agent.write(grant, 10 * at, 10 * at + 10, size_bytes=size_bytes)
    assert not (await api.claim_compaction(ask())).found, "not three times as large as the largest"
    await agent.write(grant, 30, 40, size_bytes=200)
    claim = await api.claim_compaction(ask())
    assert [item.base_offset for item in claim.segments] == [0, 10, 20]


async def test_a_compaction_that_lost_a_segment_to_retention_is_fenced(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment
) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1, retention_bytes=250))
    await fill(api, await open_agent(api, "a"), 4)
    claim = await api.claim_compaction(ask())
    await api.apply_retention(pb.ApplyRetentionRequest())
    assert (await api.register_compaction(await merged(api, claim, make_segment))).result == FENCED
    assert (await partition(api)).segment_count == 3


async def test_two_compactions_of_the_same_run(
    two_coordinators: tuple[CoordinatorService, CoordinatorService],
    open_agent: Any,
    make_segment: MakeSegment,
    change_rows: ChangeRows,
) -> None:
    apis = [service.api for service in two_coordinators]
    await apis[0].create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    await fill(apis[0], await open_agent(apis[0], "a"), 4)
    claims = [item for item in await asyncio.gather(*(api.claim_compaction(ask()) for api in apis)) if item.found]
    assert len(claims) == 1
    requests = [await merged(apis[0], claims[0], make_segment)]
    await change_rows("UPDATE compaction_claims SET expires_ms = 1")
    second = await apis[1].claim_compaction(ask())
    assert second.found, "an expired claim is free"
    requests.append(await merged(apis[1], second, make_segment))
    results = await asyncio.gather(
        *(api.register_compaction(request) for api, request in zip(apis, requests, strict=True))
    )
    assert sorted(item.result for item in results) == [REGISTERED, FENCED]
    assert (await partition(apis[0])).record_count == 40


async def test_released_and_renewed_compaction_claims(
    api: CoordinatorApi, open_agent: Any, change_rows: ChangeRows
) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    await fill(api, await open_agent(api, "a"), 3)
    first = await api.claim_compaction(ask(60_000))
    await api.renew_claim(pb.RenewClaimRequest(claim_id=first.claim_id, claim_ttl_ms=600_000))
    await change_rows("UPDATE compaction_claims SET expires_ms = expires_ms - 120000")
    assert not (await api.claim_compaction(ask())).found
    await api.release_claim(pb.ReleaseClaimRequest(claim_id=first.claim_id, reason="S3 is away", retry_after_ms=60_000))
    assert not (await api.claim_compaction(ask())).found
    await change_rows("UPDATE compaction_claims SET expires_ms = 1")
    second = await api.claim_compaction(ask())
    await api.release_claim(pb.ReleaseClaimRequest(claim_id=second.claim_id))
    assert (await api.claim_compaction(ask())).found


async def test_unclean_recovery_gives_up_what_nobody_brings_back(
    coordinator: CoordinatorService, open_agent: Any, all_events: Any
) -> None:
    api = coordinator.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1, unclean_recovery_after_ms=300))
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    await agent.write(grant, 0, 10)
    await agent.close()
    async with asyncio.timeout(PATIENCE_S):
        while not (lost := await all_events(api, "RangeLost")):
            await asyncio.sleep(0.02)
    orphaned = (await all_events(api, "RangeOrphaned"))[0]
    # Of the decision, not of the row: the coordinator counts from there, and the row is written some ms later.
    assert lost[0].created_ms - json.loads(orphaned.payload_json)["orphaned_ms"] >= 300
    ranges = (await partition(api)).ranges
    assert [(item.status, item.registered_end, item.end_offset) for item in ranges] == [("lost", 10, 1024)]
    await agent.open({(grant.topic_id, 0, 1): 20})
    assert await agent.write(grant, 10, 20) == FENCED
    assert (await agent.leads())[0].start_offset == 1024
