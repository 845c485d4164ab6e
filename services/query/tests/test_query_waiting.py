"""Long polls, takeovers, gaps, the race between an agent that gives up its tail and the event feed."""

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial

import pytest
from shcluster import agent_checks
from shformat import decode_batch
from shproto.acks import ACKS_DURABLE
from shproto.errors import DataLoss, InvalidArgument, OffsetBeyondEnd, ShuttingDown, Unavailable, UnknownTopic
from shproto.v1 import coordinator_pb2, ingest_pb2, query_pb2
from streamhouse_query.core.plain import plain_records
from streamhouse_query.wiring import QueryService

from services.query.tests.start_query import StartQuery
from services.query.tests.test_query_fetch import fetch, one_partition, read_all, settle_in
from tests.platform.read_world import RANGE_WIDTH, World, values_of
from tests.platform.virtual_time import virtual_time


@pytest.fixture(autouse=True)
async def no_time_passes() -> AsyncIterator[None]:
    """Waits take no time."""
    with virtual_time():
        yield


def values_in(response: query_pb2.FetchResponse) -> list[bytes | None]:
    return [value for batch in response.batches for value in decode_batch(batch).values.to_list()]


def later(service: QueryService, offset: int, **fields: object) -> "asyncio.Task[query_pb2.FetchResponse]":
    """It waits longer than a test may take: one that ends was woken."""
    return asyncio.create_task(fetch(service, offset, **{"max_wait_ms": 60_000, **fields}))


async def waiting(task: "asyncio.Task[query_pb2.FetchResponse]") -> None:
    """A little later it is still waiting."""
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done, task.result()


async def test_a_long_poll_is_woken_by_a_produce(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    task = later(service, 0)
    await waiting(task)
    await platform.produce([b"x"])
    response = await task
    assert values_in(response) == [b"x"]
    assert (response.next_offset, response.high_watermark) == (1, 1)


async def test_a_long_poll_returns_no_more_than_it_asked_for(platform: World, start_query: StartQuery) -> None:
    """The agent's answer is to all who wait at the offset, and may bring more than one of them takes."""
    await one_partition(platform)
    service = await start_query()
    read_tail, go_on = platform.agents["a"].read_tail, asyncio.Event()

    async def once_all_is_there(request: ingest_pb2.ReadTailRequest) -> ingest_pb2.ReadTailResponse:
        await go_on.wait()
        return await read_tail(request)

    platform.agents["a"].read_tail = once_all_is_there  # type: ignore[method-assign]
    small, large = later(service, 0, max_bytes=1_000), later(service, 0)
    await waiting(small)
    await platform.produce(values_of(100))
    for start in range(100, 500, 100):
        await platform.produce(values_of(100, start))
    go_on.set()
    assert values_in(await large) == values_of(500)
    got = await small
    assert len(got.batches) == 1 and values_in(got) == values_of(100) and got.next_offset == 100


async def test_a_long_poll_ends_in_time_and_does_not_spin(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    loop = asyncio.get_running_loop()
    before = loop.time()
    response = await fetch(service, 0, max_wait_ms=300)
    assert loop.time() - before > 0.25, "it answered before the wait was over"
    assert response.next_offset == 0 and not response.waiting_reason
    assert platform.agents["a"].calls <= 3


async def test_min_bytes_is_waited_for(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    service = await start_query()
    task = later(service, 0, min_bytes=1_000)
    await waiting(task)
    await platform.produce(values_of(100, 10))
    response = await task
    assert values_in(response) == values_of(110)
    assert sum(map(len, response.batches)) >= 1_000
    at_deadline = await fetch(service, 0, min_bytes=1 << 20, max_wait_ms=50)
    assert values_in(at_deadline) == values_of(110)


async def test_a_wait_without_a_leader_is_woken_by_the_grant(platform: World, start_query: StartQuery) -> None:
    await platform.create_topic()
    service = await start_query()
    assert "no leader" in (await fetch(service, 0)).waiting_reason
    task = later(service, 0)
    await waiting(task)
    await platform.start_agent("a")
    await platform.grant("a")
    await platform.produce([b"x"])
    assert values_in(await task) == [b"x"]


async def test_cancelling_a_long_poll_leaves_nothing_behind(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    await asyncio.sleep(0.05)  # until it follows the events
    tasks_before = len(asyncio.all_tasks())
    task = later(service, 0)
    await waiting(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(asyncio.all_tasks()) == tasks_before
    assert not service.engine.reads.index._watches


async def test_a_takeover_is_waited_for_with_a_reason_and_then_goes_on(
    platform: World, start_query: StartQuery
) -> None:
    """Readers reach the old registered_end and wait there until the old range is settled."""
    await one_partition(platform)
    await platform.produce(values_of(10))
    await platform.register()
    await platform.produce(values_of(5, 10))  # only in a's log
    service = await start_query()
    await platform.stop_agent("a")
    await platform.orphan()
    await platform.start_agent("b")
    await platform.grant("b")
    await platform.produce([b"after"])
    await settle_in(platform, service)

    first = await fetch(service, 0)
    assert values_in(first) == values_of(10)
    assert first.high_watermark >= first.next_offset == 10
    reason = (await fetch(service, 10)).waiting_reason
    for part in ("orders/0", "epoch 1", "agent a", "offset 10"):
        assert part in reason
    task = later(service, 10)
    await waiting(task)

    await platform.settle(epoch=1)  # a is back, replayed its log, uploads what is missing
    await platform.start_agent("a")
    await platform.register(epoch=1)
    response = await task
    assert values_in(response)[:5] == values_of(5, 10)
    assert await read_all(service) == dict(enumerate(values_of(15))) | {RANGE_WIDTH: b"after"}


async def test_a_gap_between_epochs_is_stepped_over(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    await platform.register()
    await platform.orphan()
    await platform.settle()
    await platform.grant("a", start=RANGE_WIDTH)
    await platform.produce([b"after"])
    service = await start_query()
    for offset in (10, 11, RANGE_WIDTH - 1, RANGE_WIDTH):
        response = await fetch(service, offset)
        assert values_in(response) == [b"after"]
        assert response.next_offset == RANGE_WIDTH + 1
    await platform.register()
    await settle_in(platform, service)
    assert await read_all(service) == dict(enumerate(values_of(10))) | {RANGE_WIDTH: b"after"}


async def test_the_tail_of_a_settled_range_is_served_by_who_has_it(platform: World, start_query: StartQuery) -> None:
    """Settled means that the end is declared: registration below it goes on."""
    await one_partition(platform)
    await platform.produce(values_of(10))
    await platform.settle()
    await platform.start_agent("b")
    await platform.grant("b")
    await platform.produce([b"next"])
    service = await start_query()
    assert await read_all(service) == dict(enumerate([*values_of(10), b"next"]))
    await platform.stop_agent("a")
    await settle_in(platform, service)
    assert "settled at 10" in (await fetch(service, 0)).waiting_reason


async def test_what_lies_beyond_a_settled_end_is_never_served(platform: World, start_query: StartQuery) -> None:
    """A zombie leader wrote on into its own range after that was settled: fenced, and never to be seen."""
    await one_partition(platform)
    await platform.produce(values_of(10))
    await platform.settle()
    await platform.produce(values_of(5, 10), epoch=1)
    await platform.start_agent("b")
    await platform.grant("b")
    await platform.produce([b"real"])
    service = await start_query()
    assert await read_all(service) == dict(enumerate([*values_of(10), b"real"]))


async def test_durable_topics_serve_only_what_is_registered(platform: World, start_query: StartQuery) -> None:
    """At a takeover the range is settled at registered_end at once, and the offsets beyond are used again (G2)."""
    await platform.create_topic(min_acks=ACKS_DURABLE)
    await platform.start_agent("a")
    await platform.grant("a")
    await platform.produce([b"not durable yet"])
    service = await start_query()
    task = later(service, 0)
    await waiting(task)
    assert not (await fetch(service, 0)).waiting_reason
    with pytest.raises(OffsetBeyondEnd):
        await fetch(service, 1)
    await platform.register()
    assert values_in(await task) == [b"not durable yet"]


async def test_an_agent_that_is_an_epoch_ahead_of_the_feed_is_no_damage(
    platform: World, start_query: StartQuery
) -> None:
    """Found by the fault tests: an agent that leads again at the end of its own range."""
    await one_partition(platform)
    await platform.produce(values_of(10))
    service = await start_query()
    platform.coordinator.feed_paused = True
    await platform.settle()
    await platform.grant("a")
    await platform.produce([b"more"])
    task = later(service, 10, max_wait_ms=0)
    await waiting(task)
    platform.coordinator.feed_paused = False
    platform.coordinator.wake()
    assert values_in(await task) == [b"more"]


async def test_a_tail_that_was_given_up_is_waited_for_in_the_feed(platform: World, start_query: StartQuery) -> None:
    """Never an error, never a skipped record, never an empty answer: even with max_wait_ms 0."""
    await one_partition(platform)
    await platform.produce(values_of(10))
    service = await start_query()
    platform.coordinator.feed_paused = True
    await platform.register()
    await platform.produce([b"more"])
    tasks = [later(service, offset, max_wait_ms=0) for offset in (0, 3)]
    for task in tasks:
        await waiting(task)
    platform.coordinator.feed_paused = False
    platform.coordinator.wake()
    for task in tasks:
        assert values_in(await task) == [*values_of(10), b"more"]
    platform.coordinator.feed_paused = True
    # The agent has even forgotten the range.
    await platform.settle()
    await platform.start_agent("b")
    await platform.grant("b")
    key = (platform.topic_id(), 0, 1)
    await platform.register(epoch=1)
    del platform.agents["a"].starts[key]
    task = later(service, 10, max_wait_ms=0)
    await waiting(task)
    platform.coordinator.feed_paused = False
    platform.coordinator.wake()
    assert values_in(await task) == [b"more"]


async def test_a_feed_that_stays_behind_is_said_so(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    service = await start_query(catch_up_ms=100)
    platform.coordinator.feed_paused = True
    await platform.register()
    response = await fetch(service, 0)
    assert response.next_offset == 0 and "event feed" in response.waiting_reason


async def test_beyond_the_end_is_not_said_while_a_newer_epoch_is_on_its_way(
    platform: World, start_query: StartQuery
) -> None:
    await one_partition(platform)
    service = await start_query()
    platform.coordinator.feed_paused = True
    await platform.orphan()
    await platform.settle()
    await platform.grant("a", start=RANGE_WIDTH)
    await platform.produce([b"new"])
    task = later(service, RANGE_WIDTH, max_wait_ms=0)
    await waiting(task)
    platform.coordinator.feed_paused = False
    platform.coordinator.wake()
    assert values_in(await task) == [b"new"]
    with pytest.raises(OffsetBeyondEnd):
        await fetch(service, RANGE_WIDTH + 2)


async def test_beyond_the_end_is_not_said_when_the_index_caught_up_while_the_coordinator_answered(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by simulation: compared with the index of then, the coordinator's answer proved what was planned before."""
    coordinator = platform.coordinator
    await platform.create_topic(min_acks=ACKS_DURABLE)
    await platform.start_agent("a")
    await platform.grant("a")
    await platform.produce(values_of(10))
    service = await start_query()
    describe_topic = coordinator.describe_topic

    async def slowly(request: coordinator_pb2.DescribeTopicRequest) -> coordinator_pb2.DescribeTopicResponse:
        answer = await describe_topic(request)
        coordinator.feed_paused = False
        coordinator.wake()
        await settle_in(platform, service)
        return answer

    monkeypatch.setattr(coordinator, "describe_topic", slowly)
    coordinator.feed_paused = True
    await platform.register()
    response = await fetch(service, 10)
    assert (response.next_offset, response.high_watermark) == (10, 10)


async def test_beyond_the_end_is_not_said_by_an_index_that_may_be_behind(
    platform: World, start_query: StartQuery
) -> None:
    """A consumer that is told so starts over: neither for want of events nor for want of a coordinator."""
    await platform.create_topic(min_acks=ACKS_DURABLE)
    await platform.start_agent("a")
    await platform.grant("a")
    await platform.produce(values_of(10))
    service = await start_query(catch_up_ms=100)
    platform.coordinator.feed_paused = True
    await platform.register()
    with pytest.raises(Unavailable, match="the index is behind"):
        await fetch(service, 10)
    platform.coordinator.down = True
    with pytest.raises(Unavailable, match="no coordinator says"):
        await fetch(service, 10)


async def test_an_agent_that_does_not_answer_is_named(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    service = await start_query()
    platform.agents["a"].down = True
    reason = (await fetch(service, 0)).waiting_reason
    assert "agent a at a:1 does not answer" in reason
    task = later(service, 0)
    await waiting(task)
    platform.agents["a"].down = False
    assert values_in(await task) == values_of(10)
    await platform.register()
    platform.agents["a"].down = True
    await settle_in(platform, service)
    assert values_in(await fetch(service, 0)) == values_of(10), "segments need no agent"


async def test_an_agent_that_hangs_is_told_at_the_end_of_a_wait(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That nothing is there is only known if the agent says so."""
    monkeypatch.setattr("shread.tail_polls.POLL_LATE_MS", 100)
    await one_partition(platform)
    service = await start_query()
    assert not (await fetch(service, 0, max_wait_ms=200)).waiting_reason
    platform.agents["a"].hangs = True
    for wait_ms in (50, 1_000):  # before the call is given up, and after
        reason = (await fetch(service, 0, max_wait_ms=wait_ms)).waiting_reason
        assert reason.startswith("orders/0: agent a at a:1 does not answer")
    platform.agents["a"].hangs = False
    assert not (await fetch(service, 0, max_wait_ms=200)).waiting_reason


async def test_many_plain_records_are_decoded_beside_the_event_loop(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(*args: object) -> object:
        threads.append(threading.current_thread().name)
        return plain_records(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("streamhouse_query.api.plain_records", noted)
    await one_partition(platform)
    await platform.produce([b"small"])
    await platform.produce([bytes(2 << 20)])
    service = await start_query()
    form = query_pb2.FETCH_FORMAT_RECORDS
    first = await fetch(service, 0, format=form, max_bytes=1)
    second = await fetch(service, 1, format=form)
    assert [len(first.records), len(second.records[0].value)] == [1, 2 << 20]
    assert [name == threading.current_thread().name for name in threads] == [True, False]


async def test_a_hanging_agent_is_left_when_the_index_changes(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    service = await start_query()
    platform.agents["a"].hangs = True
    task = later(service, 0)
    await waiting(task)
    await platform.register()
    platform.agents["a"].hangs = False
    assert values_in(await task) == values_of(10)


async def test_a_lost_span_is_data_loss_with_the_way_on(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    await platform.register()
    await platform.produce(values_of(5, 10))
    await platform.lose_span(15, "the log was damaged")
    await platform.produce(values_of(5, 15))
    await platform.register()
    service = await start_query()
    first = await fetch(service, 0)
    assert values_in(first) == values_of(10) and first.next_offset == 10
    for offset in (10, 14):
        with pytest.raises(DataLoss, match="the log was damaged") as error:
            await fetch(service, offset)
        details = error.value.details
        assert (details["base_offset"], details["end_offset"], details["next_offset"]) == ("10", "15", "15")
    assert values_in(await fetch(service, 15)) == values_of(5, 15)


async def test_a_range_that_was_given_up_is_data_loss_with_the_way_on(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    await platform.register()
    await platform.produce(values_of(5, 10))
    await platform.orphan()
    await platform.start_agent("b")
    await platform.grant("b")
    await platform.produce([b"after"])
    service = await start_query()
    await platform.stop_agent("a")
    await settle_in(platform, service)
    task = later(service, 12)
    await waiting(task)
    await platform.lose_range(RANGE_WIDTH, epoch=1)
    with pytest.raises(DataLoss, match="declared lost") as error:
        await task
    assert error.value.details["next_offset"] == str(RANGE_WIDTH)
    assert values_in(await fetch(service, RANGE_WIDTH)) == [b"after"]


async def test_a_topic_that_is_deleted_ends_its_waits(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    task = later(service, 0)
    await waiting(task)
    await platform.delete_topic("orders")
    with pytest.raises(UnknownTopic):
        await task


async def test_a_topic_created_again_is_another_topic(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce([b"old"])
    await platform.register()
    service = await start_query()
    await platform.delete_topic("orders")
    await platform.create_topic()
    await platform.grant("a")
    await platform.produce([b"new"])
    await settle_in(platform, service)
    assert values_in(await fetch(service, 0)) == [b"new"]


async def test_a_topic_that_the_feed_has_not_brought_yet_is_waited_for(
    platform: World, start_query: StartQuery
) -> None:
    service = await start_query()
    platform.coordinator.feed_paused = True
    await one_partition(platform)
    await platform.produce([b"x"])
    task = later(service, 0)
    await waiting(task)
    platform.coordinator.feed_paused = False
    platform.coordinator.wake()
    assert values_in(await task) == [b"x"]


async def test_stopping_ends_long_polls(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    task = later(service, 0)
    await waiting(task)
    await service.stop()
    with pytest.raises(ShuttingDown):
        await task
    with pytest.raises(ShuttingDown):
        await fetch(service, 0)


async def test_who_means_a_topic_created_again_is_never_shown_the_old_one(
    platform: World, start_query: StartQuery
) -> None:
    """The index still has the deleted topic under the name: better no answer than its records."""
    await one_partition(platform)
    old_id = platform.topic_id()
    await platform.produce(values_of(10))
    await platform.register()
    service = await start_query(catch_up_ms=100)
    assert values_in(await fetch(service, 0, topic_id=old_id)) == values_of(10)

    platform.coordinator.feed_paused = True
    await platform.delete_topic("orders")
    new_id = await platform.create_topic()
    await platform.grant("a")
    await platform.produce([b"new"])
    with pytest.raises(Unavailable, match="behind"):
        await fetch(service, 0, topic_id=new_id)
    position = query_pb2.FetchPosition(topic="orders", topic_id=new_id)
    async for response in service.api.subscribe(one(query_pb2.SubscribeRequest(positions=[position]))):
        assert (response.error.reason, list(response.batches)) == ("UNAVAILABLE", [])
        break
    with pytest.raises(Unavailable, match="behind"):
        await latest(service, new_id)

    platform.coordinator.feed_paused = False
    platform.coordinator.wake()
    assert values_in(await fetch(service, 0, topic_id=new_id)) == [b"new"]
    assert values_in(await fetch(service, 0)) == [b"new"]
    assert (await latest(service, new_id), await latest(service, b"")) == (1, 1)
    for ask in (partial(fetch, service, 0), partial(latest, service)):
        with pytest.raises(UnknownTopic, match="another one"):
            await ask(topic_id=old_id)
        with pytest.raises(InvalidArgument, match="topic_id"):
            await ask(topic_id=b"short")


async def one(request: query_pb2.SubscribeRequest) -> AsyncIterator[query_pb2.SubscribeRequest]:
    yield request


async def latest(service: QueryService, topic_id: bytes) -> int:
    lookup = query_pb2.OffsetLookup(topic="orders", spec=query_pb2.OFFSET_SPEC_LATEST, topic_id=topic_id)
    return (await service.api.lookup_offsets(query_pb2.LookupOffsetsRequest(lookups=[lookup]))).offsets[0].offset


# ---- agents that do not answer


@pytest.mark.parametrize("how", ["refuses", "is silent"])
async def test_heartbeats_say_which_leaders_do_not_answer(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Also where no reader has the patience to wait for the deadline of a call."""
    monkeypatch.setattr(agent_checks, "LATE_MS", 0)
    monkeypatch.setattr(agent_checks, "CHECK_TIMEOUT_MS", 50)
    await one_partition(platform)
    service = await start_query()
    agent = platform.agents["a"]
    await fetch(service, 0, max_wait_ms=50)
    assert not platform.reached, "nobody doubts anybody"
    agent.down, agent.hangs = how == "refuses", how == "is silent"
    await fetch(service, 0, max_wait_ms=50)
    await said_of_agents(platform, {"a": False})
    agent.down = agent.hangs = False
    await said_of_agents(platform, {"a": True})


async def said_of_agents(platform: World, said: dict[str, bool]) -> None:
    while platform.reached != said:
        await asyncio.sleep(0.01)
