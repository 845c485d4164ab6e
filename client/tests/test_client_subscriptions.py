"""Topics that are subscribed to at run time, by name and by pattern, with a group and without."""

import asyncio
import re

import pytest
from streamhouse import Consumer, errors

from client.tests.test_client_callbacks import PATIENCE_S, Told, fill, keep_reading, stop, until

EVERY = {"topic_refresh_interval_ms": 20}


def topics_of(consumer):
    return {where.topic for where in consumer.assignment}


@pytest.mark.parametrize("group", [None, "g"])
@pytest.mark.parametrize("pattern", [{"topics": re.compile("orders-.*")}, {"pattern": "orders-.*"}])
async def test_topics_that_match_are_read_also_those_created_later(platform, address, group, pattern):
    for topic in ("orders-eu", "my-orders-eu", "orders"):
        await platform.create_topic(topic)
        await fill(address, 2, topic=topic, partitions=1)
    seen = []
    async with Consumer(address, **pattern, group=group, **EVERY) as consumer:
        assert topics_of(consumer) == {"orders-eu"}, "the whole name has to match"
        reading = asyncio.create_task(keep_reading(consumer, seen))
        await platform.create_topic("orders-us", 2)
        await fill(address, 2, topic="orders-us", partitions=2)
        await until(lambda: len(seen) == 6)
        await stop(reading)
        assert consumer.assignment == {("orders-eu", 0), ("orders-us", 0), ("orders-us", 1)}


@pytest.mark.parametrize("group", [None, "g"])
async def test_a_pattern_may_match_nothing_yet(platform, address, group):
    async with Consumer(address, pattern="later.*", group=group, **EVERY) as consumer:
        assert await consumer.poll(1) == {}
        reading = asyncio.create_task(anext(consumer))
        await platform.create_topic("later")
        await fill(address, 1, topic="later", partitions=1)
        assert (await asyncio.wait_for(reading, PATIENCE_S)).topic == "later"


@pytest.mark.parametrize("noticed_by", ["the list", "reading"])
@pytest.mark.parametrize("group", [None, "g"])
async def test_a_topic_that_is_deleted_leaves_and_the_others_are_read_on(platform, address, group, noticed_by):
    for topic in ("a1", "a2"):
        await platform.create_topic(topic)
        await fill(address, 2, topic=topic, partitions=1)
    seen = []
    every = EVERY if noticed_by == "the list" else {}
    async with Consumer(address, pattern="a.", group=group, **every) as consumer:
        reading = asyncio.create_task(keep_reading(consumer, seen))
        await until(lambda: len(seen) == 4)
        await platform.delete_topic("a1")
        await until(lambda: topics_of(consumer) == {"a2"})
        await fill(address, 3, topic="a2", partitions=1)
        await until(lambda: len(seen) == 7)
        assert not reading.done()
        await stop(reading)
    if group:
        assert {where: at for where, at in platform.group("g").offsets.items() if where[0] == "a2"} == {("a2", 0): 5}


@pytest.mark.parametrize("group", [None, "g"])
async def test_a_topic_that_is_created_again_is_read_from_its_start(platform, address, group):
    await platform.create_topic("a1")
    await fill(address, 5, topic="a1", partitions=1)
    seen = []
    told = Told()
    async with Consumer(address, pattern="a.", group=group, **told.all, **EVERY) as consumer:
        reading = asyncio.create_task(keep_reading(consumer, seen))
        await until(lambda: len(seen) == 5)
        await platform.recreate_topic("a1", partitions=1)
        await fill(address, 3, topic="a1", partitions=1)
        await until(lambda: len(seen) == 8)
        await stop(reading)
    assert [record.offset for record in seen] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert told.calls == [("assigned", {0}), ("lost", {0}), ("assigned", {0}), ("revoked", {0})]


@pytest.mark.parametrize("group", [None, "g"])
async def test_subscribing_at_run_time_drops_what_was_received_of_topics_that_leave(platform, address, group):
    for topic in ("t", "u", "v"):
        await platform.create_topic(topic)
        await fill(address, 50, topic=topic, partitions=1)
    consumer = Consumer(address, group=group)
    await consumer.subscribe(["t", "u"])
    await consumer.start()
    assert topics_of(consumer) == {"t", "u"}
    first = await anext(consumer)
    await consumer.subscribe(["u", "v"])
    assert topics_of(consumer) <= {"u", "v"}
    records = [await anext(consumer) for _ in range(100 - (first.topic == "u"))]
    assert [record.offset for record in records if record.topic == "v"] == list(range(50))
    assert {record.topic for record in records} == {"u", "v"}
    await consumer.close()
    if group:
        committed = {"u": 50, "v": 50} | ({"t": 1} if first.topic == "t" else {})
        assert {topic: at for (topic, _), at in platform.group("g").offsets.items()} == committed


@pytest.mark.parametrize("group", [None, "g"])
async def test_what_leaves_is_told_in_the_call_and_positions_of_the_rest_stay(platform, address, group):
    for topic in ("t", "u"):
        await platform.create_topic(topic)
        await fill(address, 5, topic=topic, partitions=1)
    told, topics = Told(), []

    async def also(kind, partitions):
        topics.append((kind, {where.topic for where in partitions}))

    told.also = also
    async with Consumer(address, ["t", "u"], group=group, **told.both) as consumer:
        for _ in range(10):
            await anext(consumer)
        await consumer.subscribe(["u"])
        assert topics == [("assigned", {"t", "u"}), ("revoked", {"t"})]
        assert consumer.positions() == {("u", 0): 5}
        other = Told()
        await consumer.subscribe(re.compile("[tu]"), on_assigned=other.on_assigned)
        await until(lambda: topics_of(consumer) == {"t", "u"})
        assert (await anext(consumer)).topic == "t" if group is None else True
        assert other.calls == [("assigned", {0})] or group, "the new one is called"
    assert topics[-1] == ("revoked", {"t", "u"}), "and the others still are"


@pytest.mark.parametrize("group", [None, "g"])
async def test_unsubscribing_gives_up_everything_and_commits_what_is_done_with(platform, address, group):
    await platform.create_topic("t")
    await fill(address, 5, topic="t", partitions=1)
    told = Told()
    async with Consumer(address, ["t"], group=group, auto_commit_interval_ms=3_600_000, **told.all) as consumer:
        for _ in range(3):
            await anext(consumer)
        await consumer.unsubscribe()
        assert not consumer.assignment and told.calls == [("assigned", {0}), ("revoked", {0})]
        with pytest.raises(errors.InvalidArgument, match="reads nothing"):
            await consumer.poll()
        if group:
            assert platform.group("g").offsets == {("t", 0): 3} and not platform.group("g").members
            assert consumer.membership.state == "out"
        await consumer.subscribe(["t"])
        assert (await anext(consumer)).offset == (3 if group else 0)
    assert told.calls[2:] == [("assigned", {0}), ("revoked", {0})]


async def test_a_name_whose_topic_was_created_again_can_be_subscribed_to_again(platform, address):
    await platform.create_topic("t")
    await fill(address, 2, topic="t", partitions=1)
    async with Consumer(address, ["t"]) as consumer:
        assert [(await anext(consumer)).offset for _ in range(2)] == [0, 1]
        await platform.delete_topic("t")
        with pytest.raises(errors.UnknownTopic):
            await anext(consumer)
        await consumer.unsubscribe()
        with pytest.raises(errors.UnknownTopic):
            await consumer.subscribe(["t"])
        await platform.create_topic("t")
        await fill(address, 1, topic="t", partitions=1)
        await consumer.subscribe(["t"])
        assert (await anext(consumer)).offset == 0


async def test_a_refused_subscription_changes_nothing(platform, address):
    await platform.create_topic("t")
    await fill(address, 2, topic="t", partitions=1)
    async with Consumer(address, ["t"], group="g") as consumer:
        for wanted, error in (
            ({"topics": ["t", "nope"]}, errors.UnknownTopic),
            ({"topics": []}, errors.InvalidArgument),
            ({"topics": "t"}, errors.InvalidArgument),
            ({"pattern": "("}, errors.InvalidArgument),
            ({"topics": ["t"], "pattern": "t"}, errors.InvalidArgument),
            ({"topics": re.compile(b"t")}, errors.InvalidArgument),
            ({"topics": ["t"], "on_lost": 1}, errors.InvalidArgument),
        ):
            with pytest.raises(error):
                await consumer.subscribe(**wanted)
        assert [(await anext(consumer)).offset for _ in range(2)] == [0, 1]
        assert platform.faults.calls["join_group"] == 1
    with pytest.raises(errors.InvalidArgument, match="closed"):
        await consumer.subscribe(["t"])
    given = Consumer(address, assign=[("t", 0)])
    with pytest.raises(errors.InvalidArgument, match="assign"):
        await given.subscribe(["t"])
    with pytest.raises(errors.InvalidArgument, match="assign"):
        await given.unsubscribe()
    with pytest.raises(errors.InvalidArgument, match="not both"):
        Consumer(address, pattern="t", assign=[("t", 0)])
    with pytest.raises(errors.InvalidArgument, match="topic_refresh_interval_ms"):
        Consumer(address, pattern="t", topic_refresh_interval_ms=1)


async def test_members_of_one_group_may_read_different_topics(platform, address):
    for topic in ("a", "b", "both"):
        await platform.create_topic(topic, 2)
    async with (
        Consumer(address, ["a", "both"], group="g") as first,
        Consumer(address, ["b", "both"], group="g") as second,
    ):
        await until(lambda: first.membership.state == second.membership.state == "stable")
        await until(lambda: len(first.assignment) == len(second.assignment) == 3)
        assert topics_of(first) == {"a", "both"} and topics_of(second) == {"b", "both"}
        reading = [asyncio.create_task(anext(consumer)) for consumer in (first, second)]
        await second.subscribe(["b"])
        await until(lambda: len(first.assignment) == 4 and len(second.assignment) == 2)
        assert topics_of(first) == {"a", "both"} and topics_of(second) == {"b"}
        await stop(*reading)


async def test_a_subscription_that_the_group_does_not_hear_of_is_asked_for_again(platform, address):
    for topic in ("t", "u"):
        await platform.create_topic(topic)
    async with Consumer(address, ["t"], group="g", retry_timeout_ms=3_000) as consumer:
        platform.faults.fail("join_group", errors.Unavailable("no PostgreSQL"))
        with pytest.raises(errors.Unavailable, match="retry_timeout_ms = 3000"):
            await consumer.subscribe(["u"])
        assert not consumer.assignment
        platform.faults.mend("join_group")
        await until(lambda: consumer.assignment == {("u", 0)})


async def test_closing_ends_a_subscription_that_waits_for_the_group(platform, address):
    for topic in ("t", "u"):
        await platform.create_topic(topic)
    async with Consumer(address, ["t"], group="g") as consumer:
        platform.faults.fail("join_group", errors.Unavailable("no PostgreSQL"))
        subscribing = asyncio.create_task(consumer.subscribe(["u"]))
        await until(lambda: not consumer.assignment)
        await asyncio.sleep(0.05)
    with pytest.raises(errors.InvalidArgument, match="closed"):
        await asyncio.wait_for(subscribing, PATIENCE_S)


async def test_a_member_that_refuses_what_it_is_given_does_not_ask_in_a_loop(platform, address):
    """Between giving up and leaving, or telling its new topics, the group gives it the same again."""
    await platform.create_topic("t", 1)
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def on_revoked(partitions):
        entered.set()
        await go_on.wait()

    async with Consumer(address, ["t"], group="g", on_revoked=on_revoked) as consumer:
        await platform.create_topic("u", 1)
        platform.faults.fail("lookup_offsets", errors.Unavailable("no leader answers"))
        subscribing = asyncio.create_task(consumer.subscribe(["t", "u"]))
        await until(lambda: ("u", 0) in consumer._assignments.owned)
        subscribing.cancel()
        leaving = asyncio.create_task(consumer.unsubscribe())
        await entered.wait()
        before = platform.faults.calls["heartbeat_group"]
        await asyncio.sleep(0.5)  # 50 ms between two heartbeats
        assert platform.faults.calls["heartbeat_group"] - before < 50
        go_on.set()
        await leaving
