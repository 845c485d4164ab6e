"""on_assigned, on_revoked and on_lost: when they are called, what works inside, what becomes of their failures."""

import asyncio
import contextlib

import pytest
from shproto.errors import IllegalGeneration, InvalidArgument, PollIntervalExceeded, UnknownMember
from streamhouse import Consumer, Producer, errors
from streamhouse.assignments import Assignments
from streamhouse.records import TopicPartition

PATIENCE_S = 60


async def until(check):
    async with asyncio.timeout(PATIENCE_S):
        while not check():
            await asyncio.sleep(0.01)


async def fill(address, count, topic="t", partitions=2):
    async with Producer(address) as producer:
        for partition in range(partitions):
            await producer.send_many(topic, [b"%d" % n for n in range(count)], partition=partition)


class Told:
    """Records the calls, in order; `also(kind, partitions)` is awaited in each call."""

    def __init__(self, also=None):
        self.calls = []
        self.also = also

    async def _told(self, kind, partitions):
        assert partitions == sorted(partitions) and all(isinstance(where, TopicPartition) for where in partitions)
        self.calls.append((kind, {where.partition for where in partitions}))
        if self.also is not None:
            await self.also(kind, partitions)

    async def on_assigned(self, partitions):
        await self._told("assigned", partitions)

    async def on_revoked(self, partitions):
        await self._told("revoked", partitions)

    async def on_lost(self, partitions):
        await self._told("lost", partitions)

    @property
    def both(self):
        return {"on_assigned": self.on_assigned, "on_revoked": self.on_revoked}

    @property
    def all(self):
        return self.both | {"on_lost": self.on_lost}


async def keep_reading(consumer, seen):
    async for record in consumer:
        seen.append(record)


async def stop(*tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_member_is_told_of_what_comes_and_goes(platform, address):
    await platform.create_topic("t", 2)
    first, second = Told(), Told()
    seen = []
    async with Consumer(address, ["t"], group="g", **first.both) as one:
        assert first.calls == [("assigned", {0, 1})], "before `start` returns"
        reading = asyncio.create_task(keep_reading(one, seen))
        async with Consumer(address, ["t"], group="g", **second.both) as other:
            assert await other.wait_for_assignment(PATIENCE_S * 1000)
            assert first.calls[1:] == [("revoked", {1})]
            assert second.calls == [("assigned", {1})]
        assert second.calls[1:] == [("revoked", {1})], "closing gives up what is there"
        await until(lambda: len(first.calls) == 3)
        await stop(reading)
    assert first.calls[2:] == [("assigned", {1}), ("revoked", {0, 1})]


async def test_nothing_is_handed_over_before_on_assigned_has_returned(platform, address):
    await platform.create_topic("t", 1)
    await fill(address, 5, partitions=1)
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def also(kind, partitions):
        entered.set()
        await go_on.wait()

    consumer = Consumer(address, ["t"], group="g", on_assigned=Told(also).on_assigned)
    reading = asyncio.create_task(anext(consumer))
    await entered.wait()
    assert consumer.assignment == {("t", 0)} and consumer.membership.state == "rebalancing"
    heartbeats = platform.faults.calls["heartbeat_group"]
    await until(lambda: platform.faults.calls["heartbeat_group"] > heartbeats + 5)
    assert not reading.done() and consumer.positions() == {("t", 0): 0}
    assert not consumer._reader.received_bytes, "nothing is fetched"
    go_on.set()
    assert (await reading).offset == 0
    await consumer.close()


async def test_positions_are_set_and_partitions_paused_in_on_assigned(platform, address):
    await platform.create_topic("t", 2)
    await fill(address, 10)
    consumers = []

    async def on_assigned(partitions):
        (consumer,) = consumers
        assert consumer.assignment == set(partitions)
        await consumer.seek("t", 0, 7)
        await consumer.seek_to_end([("t", 1)])
        consumer.pause([("t", 1)])
        assert await consumer.committed() == dict.fromkeys(partitions)
        assert (await consumer.lag())[TopicPartition("t", 0)].records == 3

    consumers.append(Consumer(address, ["t"], group="g", on_assigned=on_assigned))
    async with consumers[0] as consumer:
        assert [(await anext(consumer)).offset for _ in range(3)] == [7, 8, 9]
        assert consumer.positions() == {("t", 0): 10, ("t", 1): 10} and consumer.paused() == {("t", 1)}


async def test_what_is_revoked_is_committed_in_on_revoked(platform, address):
    """A sink that commits only what it has written: nobody reads a record of it again."""
    await platform.create_topic("t", 2)
    await fill(address, 10)
    consumers, written, buffer = [], [], []

    async def on_revoked(partitions):
        (consumer,) = consumers
        assert set(partitions) <= consumer.assignment
        written.extend(buffer)
        buffer.clear()
        await consumer.commit()

    consumers.append(Consumer(address, ["t"], group="g", auto_commit=False, on_revoked=on_revoked))
    async with consumers[0] as consumer:
        async for record in consumer:
            buffer.append(record)
            if len(buffer) == 20:
                break
        async with Consumer(address, ["t"], group="g", auto_commit=False) as other:
            reading = asyncio.create_task(anext(consumer))
            assert await other.wait_for_assignment(PATIENCE_S * 1000) == {("t", 1)}
            assert len(written) == 20 and platform.group("g").offsets == {("t", 0): 10, ("t", 1): 10}
            assert other.positions() == {("t", 1): 10}
            await stop(reading)


async def test_a_partition_stays_with_its_member_while_on_revoked_runs(platform, address):
    await platform.create_topic("t", 2)
    await fill(address, 3)
    entered, go_on = asyncio.Event(), asyncio.Event()
    consumers = []

    async def also(kind, partitions):
        if kind == "revoked" and not entered.is_set():
            entered.set()
            await go_on.wait()
            await consumers[0].commit(dict.fromkeys(partitions, 3))

    told = Told(also)
    seen = []
    consumers.append(Consumer(address, ["t"], group="g", auto_commit=False, **told.all))
    async with consumers[0] as consumer:
        reading = asyncio.create_task(keep_reading(consumer, seen))
        await until(lambda: len(seen) == 6)
        async with Consumer(address, ["t"], group="g") as other:
            await entered.wait()
            heartbeats = platform.faults.calls["heartbeat_group"]
            await until(lambda: platform.faults.calls["heartbeat_group"] > heartbeats + 10)
            assert not other.assignment and other.membership.state == "rebalancing"
            async with Consumer(address, ["t"], group="g"):  # and other generations come and go meanwhile
                await until(lambda: platform.group("g").generation == consumer.membership.generation)
            assert told.calls == [("assigned", {0, 1}), ("revoked", {1})]
            go_on.set()
            assert await other.wait_for_assignment(PATIENCE_S * 1000) == {("t", 1)}
            assert platform.group("g").offsets["t", 1] == 3
        await stop(reading)


async def test_a_record_in_hand_is_done_with_when_on_revoked_is_called(platform, address):
    """It is called by the task that asks for the next one, and not while it still works."""
    await platform.create_topic("t", 1)
    await fill(address, 3, partitions=1)
    told = Told()
    async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=3_600_000, **told.both) as consumer:
        assert (await anext(consumer)).offset == 0
        await platform.create_topic("u", 1)
        consumer._assignments.stop_reading()  # as the group would
        await asyncio.sleep(0.05)
        assert told.calls == [("assigned", {0})] and platform.group("g").offsets == {}
        asking = asyncio.create_task(anext(consumer))
        await until(lambda: ("revoked", {0}) in told.calls)
        assert platform.group("g").offsets == {("t", 0): 1}
        await stop(asking)


async def test_a_member_that_is_expelled_has_lost_its_partitions(platform, address):
    await platform.create_topic("t", 2)
    await fill(address, 3)
    refused = []
    consumers = []

    async def also(kind, partitions):
        if kind == "lost":
            await consumers[0].commit()  # there is nothing any more
            with pytest.raises(IllegalGeneration):
                await consumers[0].commit(dict.fromkeys(partitions, 1))
            refused.extend(partitions)

    told = Told(also)
    seen = []
    consumers.append(Consumer(address, ["t"], group="g", auto_commit=False, **told.all))
    async with consumers[0] as consumer:
        reading = asyncio.create_task(keep_reading(consumer, seen))
        await until(lambda: len(seen) == 6)
        await platform.expel("g")
        await until(lambda: len(told.calls) == 3)
        await stop(reading)
    assert told.calls == [("assigned", {0, 1}), ("lost", {0, 1}), ("assigned", {0, 1}), ("revoked", {0, 1})]
    assert len(refused) == 2


async def test_without_on_lost_on_revoked_is_called(platform, address):
    await platform.create_topic("t", 1)
    told = Told()
    async with Consumer(address, ["t"], group="g", **told.both) as consumer:
        reading = asyncio.create_task(anext(consumer))
        await platform.expel("g")
        await until(lambda: len(told.calls) == 3)
        await stop(reading)
    assert told.calls == [("assigned", {0}), ("revoked", {0}), ("assigned", {0}), ("revoked", {0})]


@pytest.mark.parametrize("failing", ["assigned", "revoked", "lost"])
async def test_what_a_callback_raises_is_raised_by_reading_and_the_hand_over_goes_on(platform, address, failing):
    await platform.create_topic("t", 2)
    await fill(address, 5)

    async def also(kind, partitions):
        if kind == failing:
            told.also = None
            raise ZeroDivisionError(kind)

    told = Told(also)
    consumer = Consumer(address, ["t"], group="g", auto_commit=False, **told.all)
    if failing == "assigned":
        with pytest.raises(ZeroDivisionError):
            await anext(consumer)
        assert consumer.assignment == {("t", 0), ("t", 1)}
    assert len([await anext(consumer) for _ in range(10)]) == 10
    if failing == "lost":
        await platform.expel("g")
        with pytest.raises(ZeroDivisionError):
            await anext(consumer)
        assert len([await anext(consumer) for _ in range(10)]) == 10, "joined anew"
    if failing == "revoked":
        async with Consumer(address, ["t"], group="g") as other:
            with pytest.raises(ZeroDivisionError):
                await anext(consumer)
            assert await other.wait_for_assignment(PATIENCE_S * 1000) == {("t", 1)}
    assert consumer.membership.state != "out"
    await consumer.close()
    assert not platform.group("g").members


async def test_a_wait_that_is_cancelled_does_not_interrupt_a_callback(platform, address):
    await platform.create_topic("t", 1)
    await fill(address, 1, partitions=1)
    go_on, ended = asyncio.Event(), []

    async def on_assigned(partitions):
        await go_on.wait()
        ended.append(partitions)

    consumer = Consumer(address, ["t"], group="g", on_assigned=on_assigned)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(consumer), 0.1)
    assert not ended
    go_on.set()
    assert (await anext(consumer)).offset == 0 and len(ended) == 1
    await consumer.close()


async def test_a_poll_waits_for_a_callback_and_for_records_no_longer_than_it_may(platform, address):
    await platform.create_topic("t", 1)
    told = Told(lambda kind, partitions: asyncio.sleep(0.2))
    consumer = Consumer(address, ["t"], group="g", **told.both)
    assert (await consumer.poll(1) == {} and told.calls == [("assigned", {0})]) or await consumer.poll(1) == {}
    assert told.calls == [("assigned", {0})]
    await fill(address, 2, partitions=1)
    assert len((await consumer.poll(PATIENCE_S * 1000))["t", 0]) == 2
    await consumer.close()


async def test_other_tasks_read_on_while_one_is_inside_a_callback(platform, address):
    await platform.create_topic("t", 2)
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def on_revoked(partitions):
        entered.set()
        await go_on.wait()

    first, second = [], []
    async with Consumer(address, ["t"], group="g", on_revoked=on_revoked) as consumer:
        tasks = [asyncio.create_task(keep_reading(consumer, seen)) for seen in (first, second)]
        async with Consumer(address, ["t"], group="g"):
            await entered.wait()
            await fill(address, 5)
            await until(lambda: len(first + second) == 5)
            assert {record.partition for record in first + second} == {0}
            go_on.set()
            await until(lambda: consumer.assignment == {("t", 0)})
        await stop(*tasks)


async def test_a_callback_that_is_slower_than_the_poll_interval_loses_the_membership(platform, address):
    await platform.create_topic("t", 1)
    await fill(address, 1, partitions=1)
    go_on = asyncio.Event()

    async def also(kind, partitions):
        if kind == "assigned" and len(told.calls) == 1:
            await go_on.wait()

    told = Told(also)
    consumer = Consumer(address, ["t"], group="g", max_poll_interval_ms=200, **told.all)
    reading = asyncio.create_task(anext(consumer))
    await until(lambda: platform.group("g").members)
    await until(lambda: not platform.group("g").members)
    assert consumer.membership.state == "out" and not reading.done()
    go_on.set()
    with pytest.raises(PollIntervalExceeded):
        await reading
    assert (await asyncio.wait_for(anext(consumer), PATIENCE_S)).offset == 0
    await consumer.close()
    assert told.calls == [("assigned", {0}), ("lost", {0}), ("assigned", {0}), ("revoked", {0})]


async def test_a_commit_in_on_revoked_of_a_member_that_was_expelled_meanwhile_is_refused(platform, address):
    """It has rejoined, and another member may have gone further in between."""
    await platform.create_topic("t", 2)
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def also(kind, partitions):
        if kind == "revoked" and not entered.is_set():
            entered.set()
            await go_on.wait()
            await consumer.commit(dict.fromkeys(partitions, 1))

    told = Told(also)
    async with Consumer(address, ["t"], group="g", auto_commit=False, **told.all) as consumer:
        reading = asyncio.create_task(anext(consumer))
        async with Consumer(address, ["t"], group="g", auto_commit=False):
            await entered.wait()
        joins = platform.faults.calls["join_group"]
        await platform.expel("g")
        await until(lambda: platform.faults.calls["join_group"] > joins)
        await until(lambda: consumer.membership.member_id)
        go_on.set()
        with pytest.raises((IllegalGeneration, UnknownMember)):
            await reading
        reading = asyncio.create_task(anext(consumer))
        await until(lambda: consumer.assignment == {("t", 0), ("t", 1)} and consumer.membership.state == "stable")
        await stop(reading)
    assert platform.group("g").offsets == {}
    assert told.calls[:3] == [("assigned", {0, 1}), ("revoked", {1}), ("lost", {0})]


async def test_reading_and_closing_are_refused_inside_a_callback(platform, address):
    await platform.create_topic("t", 1)
    refused = []

    async def on_assigned(partitions):
        for call in (
            lambda: anext(consumer),
            consumer.poll,
            consumer.close,
            consumer.start,
            consumer.unsubscribe,
            lambda: consumer.subscribe(["u"]),
        ):
            with pytest.raises(InvalidArgument, match="inside a callback"):
                await call()
            refused.append(call)
        tasks.append(asyncio.create_task(later()))

    async def later():
        await started.wait()
        return await anext(consumer)

    tasks, started = [], asyncio.Event()
    consumer = Consumer(address, ["t"], group="g", on_assigned=on_assigned)
    await consumer.start()
    assert len(refused) == 6
    await fill(address, 1, partitions=1)
    started.set()
    assert (await tasks[0]).offset == 0, "a task that it has started is no callback any more"
    await consumer.close()


async def test_a_deleted_topic_does_not_keep_others_from_being_committed_in_on_revoked(platform, address):
    for topic in ("t", "u"):
        await platform.create_topic(topic, 1)
        await fill(address, 3, topic=topic, partitions=1)
    consumers = []

    async def on_revoked(partitions):
        await consumers[0].commit()

    consumers.append(Consumer(address, ["t", "u"], group="g", auto_commit=False, on_revoked=on_revoked))
    async with consumers[0] as consumer:
        for _ in range(6):
            await anext(consumer)
        await platform.delete_topic("u")
    assert platform.group("g").offsets == {("t", 0): 3}


async def test_what_a_callback_raises_while_closing_is_raised_once_all_is_closed(platform, address, caplog):
    await platform.create_topic("t", 1)

    def on_revoked(partitions):
        raise ZeroDivisionError

    consumer = Consumer(address, ["t"], group="g", on_revoked=on_revoked)
    await consumer.start()
    with pytest.raises(ZeroDivisionError):
        await consumer.close()
    assert not platform.group("g").members
    with pytest.raises(KeyError):
        async with Consumer(address, ["t"], group="g", on_revoked=on_revoked):
            raise KeyError
    assert "a callback failed: ZeroDivisionError()" in caplog.text


@pytest.mark.parametrize("slow", ["a callback", "the last commit", "leaving"])
async def test_closing_takes_no_longer_than_it_may(platform, address, slow, monkeypatch):
    await platform.create_topic("t", 1)
    await fill(address, 1, partitions=1)
    cancelled = []

    async def on_revoked(partitions):
        if slow == "a callback":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(partitions)
                raise

    consumer = Consumer(address, ["t"], group="g", on_revoked=on_revoked)
    await anext(consumer)

    async def hang(*args):
        await asyncio.Event().wait()

    if slow == "the last commit":
        platform.faults.hang("commit_offsets")
    if slow == "leaving":
        monkeypatch.setattr(consumer._membership, "leave", hang)
    with pytest.raises(TimeoutError, match=r"not closed within timeout_s = 0\.1"):
        await consumer.close(0.1)
    assert bool(cancelled) == (slow == "a callback")
    assert platform.group("g").offsets == ({} if slow == "the last commit" else {("t", 0): 1})
    await consumer.close()
    with pytest.raises(InvalidArgument, match="closed"):
        await consumer.poll()
    with pytest.raises(InvalidArgument, match="timeout_s"):
        await Consumer(address, ["t"]).close(-1)


@pytest.mark.parametrize("name", ["on_assigned", "on_revoked"])
async def test_a_callback_that_swallows_its_cancellation_does_not_hold_up_closing(platform, address, name, caplog):
    await platform.create_topic("t", 1)
    is_free, cancellations = asyncio.Event(), 0

    async def stubborn(partitions):
        nonlocal cancellations
        while not is_free.is_set():
            try:
                await is_free.wait()
            except asyncio.CancelledError:
                cancellations += 1

    consumer = Consumer(address, ["t"], group="g", **{name: stubborn})
    reading = asyncio.create_task(anext(consumer))
    await until(lambda: consumer._assignments.is_busy or (name == "on_revoked" and consumer.assignment))
    try:
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(TimeoutError, match=r"not closed within timeout_s = 0\.1"):
                await consumer.close(0.1)
    finally:
        is_free.set()
    assert cancellations == 1 and not consumer._assignments.is_inside
    assert [message for message in caplog.messages if "cancelled" in message] == [
        f"closing: {name} was cancelled and goes on all the same: nothing waits for it any longer"
    ]
    await asyncio.wait([reading])
    assert isinstance(reading.exception(), StopAsyncIteration | InvalidArgument)


@pytest.mark.parametrize("ask", ["poll", "iterate"])
async def test_a_close_that_cancels_a_callback_does_not_cancel_who_waits_for_it(platform, address, ask):
    await platform.create_topic("t", 1)

    async def on_assigned(partitions):
        await asyncio.Event().wait()

    consumer = Consumer(address, ["t"], group="g", on_assigned=on_assigned)
    asking = asyncio.create_task(consumer.poll(60_000) if ask == "poll" else anext(consumer))
    await until(lambda: consumer._assignments.is_busy)
    with pytest.raises(TimeoutError, match="not closed within"):
        await consumer.close(0.1)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.wait([asking])
    assert not asking.cancelled()
    error = asking.exception()
    assert isinstance(error, StopAsyncIteration | InvalidArgument) or (error is None and asking.result() == {})


async def test_a_close_that_is_cancelled_does_not_wait_for_a_callback_that_swallows_it(platform, address):
    await platform.create_topic("t", 1)
    is_free, begun = asyncio.Event(), asyncio.Event()

    async def on_revoked(partitions):
        begun.set()
        while not is_free.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await is_free.wait()

    consumer = Consumer(address, ["t"], group="g", on_revoked=on_revoked)
    await consumer.start()
    closing = asyncio.create_task(consumer.close())
    await begun.wait()
    closing.cancel()
    done, _ = await asyncio.wait([closing], timeout=PATIENCE_S)
    is_free.set()
    assert done and closing.cancelled()


async def test_what_is_no_callback_is_refused(address):
    with pytest.raises(errors.InvalidArgument, match="on_lost is 3"):
        Consumer(address, ["t"], on_lost=3)
    with pytest.raises(errors.InvalidArgument, match="assign"):
        Consumer(address, assign=[("t", 0)], on_assigned=print)


async def test_several_tasks_that_wait_leave_the_event_loop_its_turns(platform, address, monkeypatch):
    """One calls the callback; the others neither call it nor ask again and again whether it is due."""
    await platform.create_topic("t", 1)
    await fill(address, 5, partitions=1)
    asked, call_due = [], Assignments.call_due

    async def counted(assignments):
        asked.append(assignments)
        await call_due(assignments)

    monkeypatch.setattr(Assignments, "call_due", counted)
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def also(kind, partitions):
        entered.set()
        await go_on.wait()

    told = Told(also)
    async with Consumer(address, ["t"], group="g") as first:
        second = Consumer(address, ["t"], group="g", **told.both)
        await second.start()
        assert not second.assignment, "the first member has it"
        waiting = [asyncio.create_task(second.wait_for_assignment(PATIENCE_S * 1000)) for _ in range(3)]
        await first.close()
        async with asyncio.timeout(PATIENCE_S):
            await entered.wait()
        before = len(asked)
        await asyncio.sleep(0.3)
        assert len(asked) <= before + len(waiting), "each was woken once at most"
        go_on.set()
        assert await asyncio.gather(*waiting) == [{("t", 0)}] * 3
        assert told.calls == [("assigned", {0})]
        await second.close()
