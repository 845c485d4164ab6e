"""Following the event feed: reconnects, resumes by position, takes a new snapshot when history changed; the session."""

import asyncio

import pytest
from shproto.acks import ACKS_DURABLE
from shproto.errors import Unavailable
from shproto.v1 import query_pb2
from streamhouse_coordinator.core.tables import SESSIONS
from streamhouse_coordinator.recovery import rollback_detection
from streamhouse_coordinator.recovery.histories import Head
from streamhouse_query.wiring import QueryService

from services.query.tests.start_query import StartQuery
from services.query.tests.test_query_fetch import fetch, one_partition, read_all, settle_in
from services.query.tests.test_query_lookups import latest
from tests.platform.read_world import World, values_of


async def eventually(condition: "object") -> None:
    assert callable(condition)
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def state_of(service: QueryService) -> object:
    """All that the index knows, comparable."""
    cluster = service.engine.reads.index.cluster
    return (
        cluster.position,
        {
            key: (item.log_start_offset, item.ranges, item.segments, item._bases, item.durable_only)
            for key, item in cluster.partitions.items()
        },
        cluster.topics,
        cluster.segment_count,
        {key: (value.segments, value.end) for key, value in cluster._objects.items()},
    )


async def test_feed_and_snapshot_lead_to_the_same_index(platform: World, start_query: StartQuery) -> None:
    service = await start_query()
    await platform.create_topic("orders", 2)
    await platform.create_topic("audit", 1, min_acks=ACKS_DURABLE)
    for agent in "ab":
        await platform.start_agent(agent)
    await platform.grant("a")
    await platform.grant("b", number=1)
    await platform.grant("a", "audit")
    await platform.add_partitions("orders", 3)
    await platform.grant("b", number=2)
    segments = []
    for turn in range(4):
        await platform.produce(values_of(10, turn * 10))
        segments.append(await platform.register())
    batches = platform.agents["a"].batches[platform.topic_id(), 0, 1]
    merged = await platform.store_segment("orders", 0, 1, batches[:2])
    await platform.compact(merged, segments[:2])
    await platform.retain_from(25)
    await platform.produce(values_of(3, 40))
    await platform.lose_span(43, "hole")
    await platform.orphan()
    await platform.settle(end=50)
    await platform.grant("b")
    await platform.orphan(number=1)
    await platform.delete_topic("audit")
    await settle_in(platform, service)
    fresh = await start_query(cache_dir=service.api._cache._directory / "fresh")  # type: ignore[attr-defined]
    await settle_in(platform, service)
    assert state_of(service) == state_of(fresh)
    assert service.api._counters.snapshots == 1


async def test_a_cut_feed_is_resumed_where_it_was(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    for turn in range(3):
        platform.coordinator.cut()
        await platform.produce(values_of(10, turn * 10))
        await platform.register()
        await eventually(lambda: service.engine.reads.index.cluster.position == platform.position)
    assert platform.coordinator.calls["get_snapshot"] == 1
    assert await read_all(service) == dict(enumerate(values_of(30)))


async def test_reads_go_on_while_no_coordinator_answers(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    await platform.register()
    service = await start_query()
    platform.coordinator.down = True
    platform.coordinator.wake()
    await platform.produce(values_of(10, 10))
    assert await read_all(service) == dict(enumerate(values_of(20)))
    await platform.register()
    await asyncio.sleep(0.2)
    platform.coordinator.down = False
    assert await read_all(service) == dict(enumerate(values_of(20)))


async def test_g3_readers_of_metadata_that_went_back_are_told_so(platform: World, start_query: StartQuery) -> None:
    """An old dump in its place: the coordinator knows fewer events than we do. What it knows is served, and nobody is
    sent back from where it ends, or told that there is no such topic: only a restore shows what there is."""
    await one_partition(platform)
    await platform.produce(values_of(10))
    service = await start_query()
    coordinator, dump = platform.coordinator, platform.dump()
    await platform.register()
    await settle_in(platform, service)
    platform.restore(dump)
    platform.agents["a"].held_from.update(dict.fromkeys(platform.agents["a"].held_from, 0))
    coordinator.cut()
    await eventually(lambda: coordinator.calls["get_snapshot"] == 2)
    await eventually(lambda: service.engine.reads.index.cluster.segment_count == 0)
    assert len((await fetch(service, 0)).batches) == 1
    for offset in (10, 12, 10**12):
        answer = await fetch(service, offset)
        assert answer.next_offset == offset
        assert "the metadata went back: event 5 was seen" in answer.waiting_reason
    await platform.register()  # soon there are as many events again
    await platform.produce(values_of(1, 10))
    await platform.register()
    await settle_in(platform, service)
    assert service.engine.reads.index.cluster.segment_count == 2
    assert "the metadata went back" in (await fetch(service, 11)).waiting_reason
    with pytest.raises(Unavailable, match="the metadata went back"):
        await latest(service)
    with pytest.raises(Unavailable, match="which went back"):
        await service.api.fetch(query_pb2.FetchRequest(topic="created later"))
    task = asyncio.create_task(fetch(service, 11, max_wait_ms=60_000))
    await asyncio.sleep(0.05)
    platform.begin_history("restored")
    coordinator.cut()
    await platform.produce(values_of(1, 11))
    assert (await task).next_offset == 12
    await eventually(lambda: service.engine.reads.index.cluster.missing_position == 0)
    assert not (await fetch(service, 12)).waiting_reason


async def test_g3_a_rollback_that_only_coordinators_have_seen_is_told(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The feed goes on meanwhile, and other events stand where the missing ones were."""
    monkeypatch.setattr("shcluster.follower.HEAD_INTERVAL_MS", 20)
    await one_partition(platform)
    await platform.produce(values_of(10))
    service = await start_query()
    waiting = asyncio.create_task(fetch(service, 10, max_wait_ms=60_000))
    await asyncio.sleep(0.05)
    seen = Head(history_id="memory", position=3)
    await rollback_detection.record(platform.service.context.store, seen, rollback_detection.COORDINATOR)
    await eventually(lambda: service.engine.reads.index.cluster.missing_position == 3)
    waiting.cancel()
    assert "event 3 was seen" in (await fetch(service, 10)).waiting_reason


async def test_another_history_of_the_same_length_is_loaded_anew(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    await settle_in(platform, service)
    coordinator = platform.coordinator
    assert (service.engine.reads.index.cluster.history_id, coordinator.calls["get_snapshot"]) == ("memory", 1)
    platform.begin_history("restored")
    coordinator.cut()
    await eventually(lambda: service.engine.reads.index.cluster.history_id == "restored")
    coordinator.cut()
    await platform.produce(values_of(10))
    await platform.register()
    await settle_in(platform, service)
    assert coordinator.calls["get_snapshot"] == 2
    assert await read_all(service) == dict(enumerate(values_of(10)))


async def test_an_event_that_does_not_fit_costs_a_snapshot(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    platform.append_row("RangeSettled", '{"topic_id": "x"}')
    await eventually(lambda: platform.coordinator.calls["get_snapshot"] == 2)
    del service.api._index.cluster.partitions[next(iter(service.api._index.cluster.partitions))].ranges[0]
    await platform.orphan()
    await eventually(lambda: platform.coordinator.calls["get_snapshot"] == 3)
    await settle_in(platform, service)
    assert service.engine.reads.index.find("orders", 0).ranges[0].status == "orphaned"


async def test_events_of_a_newer_version_are_passed_over(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    platform.append_row("SomethingNew", "{}")
    await platform.produce(values_of(10))
    await platform.register()
    await settle_in(platform, service)
    assert platform.coordinator.calls["get_snapshot"] == 1
    assert await read_all(service) == dict(enumerate(values_of(10)))


async def test_start_waits_for_a_coordinator(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce([b"x"])
    platform.coordinator.down = True
    starting = asyncio.create_task(start_query())
    done, _ = await asyncio.wait([starting], timeout=0.3)
    assert not done
    platform.coordinator.down = False
    service = await asyncio.wait_for(starting, 60)
    assert (await fetch(service, 0)).next_offset == 1


async def test_clients_find_the_service_and_an_expired_session_is_opened_again(
    platform: World, start_query: StartQuery
) -> None:
    service = await start_query()
    (session,) = platform.rows(SESSIONS)
    assert (session.role, session.address, session.agent_id) == ("query", "127.0.0.1:1", "query@127.0.0.1:1")
    await platform.expire_session(session.session_id)
    await eventually(lambda: bool(platform.rows(SESSIONS)))
    platform.coordinator.down = True
    await asyncio.sleep(0.1)
    platform.coordinator.down = False
    await asyncio.sleep(0.1)
    assert len(platform.rows(SESSIONS)) == 1
    await service.stop()
    assert not platform.rows(SESSIONS)


async def test_describe_query(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    await platform.register()
    service = await start_query(cache_bytes_max=2 << 20)
    await fetch(service, 0)
    await settle_in(platform, service)
    described = await service.api.describe_query(query_pb2.DescribeQueryRequest())
    assert described.segments_indexed == 1 and described.feed_position == platform.position
    assert described.cache_bytes_max == 2 << 20 and described.downloads == described.cache_misses == 1
