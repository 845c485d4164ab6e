"""Paused partitions: nothing of them is handed over or fetched, nothing is lost, and nobody waits for them."""

import asyncio
import random
from collections import Counter

import pytest
from streamhouse import Consumer, Producer, errors
from streamhouse.sync import Consumer as SyncConsumer
from streamhouse.sync import Producer as SyncProducer

from client.tests.test_client_consumer import PATIENCE_S, by_partition, take
from client.tests.test_client_iteration import Hands


async def write(address, partition, count):
    async with Producer(address, batch_bytes=1000) as producer:
        await producer.send_many("t", [b"%d" % n for n in range(count)], partition=partition)


async def test_a_paused_partition_is_silent_and_goes_on_where_it_was(platform, address):
    await platform.create_topic("t", 2)
    await write(address, 0, 500)
    await write(address, 1, 500)
    async with Consumer(address, ["t"]) as consumer:
        before = await take(consumer, 100)
        consumer.pause([("t", 0)])
        assert consumer.paused() == {("t", 0)} < consumer.assignment
        position = consumer.positions()["t", 0]
        rest_of_1 = 500 - sum(record.partition == 1 for record in before)
        meanwhile = await take(consumer, rest_of_1)
        assert {record.partition for record in meanwhile} == {1}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(consumer)
        assert consumer.positions()["t", 0] == position
        consumer.resume([("t", 0)])
        assert consumer.paused() == set()
        after = await take(consumer, 500 - position)
    for rows in by_partition(before + meanwhile + after).values():
        assert [record.offset for record in rows] == list(range(500))


async def test_it_is_not_fetched_either(platform, address):
    await platform.create_topic("t", 2)
    async with Consumer(address, ["t"]) as consumer:
        consumer.pause([("t", 0)])
        await write(address, 1, 10)
        await take(consumer, 10)
        await write(address, 0, 10)
        await write(address, 1, 10)
        await take(consumer, 10)
        assert [cursor.fetch_offset for cursor in consumer._reader.cursors.values()] == [0, 20]
        consumer.resume([("t", 0)])
        assert len(await take(consumer, 10)) == 10


async def test_what_was_received_of_paused_partitions_takes_no_room_from_the_others(platform, address):
    """All the prefetch may hold is theirs; a partition that is read must not wait for it."""
    await platform.create_topic("t", 3)
    for partition in range(3):
        await write(address, partition, 2000)
    async with Consumer(address, ["t"], prefetch_bytes_max=20_000) as consumer:
        before = await take(consumer, 1)
        reader = consumer._reader
        async with asyncio.timeout(PATIENCE_S):
            while reader._received_bytes < 15_000:
                await asyncio.sleep(0.01)
        (first,) = {record.partition for record in before}
        others = [("t", number) for number in range(3) if number != first]
        consumer.pause(others)
        before += await take(consumer, 1_999)
        assert {record.partition for record in before} == {first}
        assert reader._received_bytes <= 20_000
        consumer.resume(others)
        after = await take(consumer, 4000)
    for rows in by_partition(before + after).values():
        assert [record.offset for record in rows] == list(range(2000))


async def test_a_seek_moves_a_paused_partition_and_leaves_it_paused(platform, address):
    await platform.create_topic("t", 1)
    await write(address, 0, 100)
    async with Consumer(address, ["t"]) as consumer:
        await take(consumer, 10)
        consumer.pause([("t", 0)])
        await consumer.seek("t", 0, 50)
        assert consumer.paused() == {("t", 0)}
        consumer.resume([("t", 0)])
        assert [record.offset for record in await take(consumer, 50)] == list(range(50, 100))


async def test_only_assigned_partitions_are_paused_and_resumed(platform, address):
    await platform.create_topic("t", 2)
    async with Consumer(address, ["t"]) as consumer:
        for call in (consumer.pause, consumer.resume):
            with pytest.raises(errors.InvalidArgument, match="t/2 is not assigned"):
                call([("t", 0), ("t", 2)])
            with pytest.raises(errors.InvalidArgument, match="partitions must be a list"):
                call(("t", 0))
        assert consumer.paused() == set()
        consumer.pause([("t", 0)])
        consumer.pause([("t", 0)])
        consumer.resume([("t", 1), ("t", 0)])
        assert consumer.paused() == set()


async def test_a_bounded_read_does_not_end_before_what_is_paused(platform, address):
    await platform.create_topic("t", 2)
    await write(address, 0, 10)
    await write(address, 1, 10)
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        consumer.pause([("t", 0)])
        records = []

        async def read():
            async for record in consumer:
                records.append(record)

        reading = asyncio.create_task(read())
        async with asyncio.timeout(PATIENCE_S):
            while len(records) < 10:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert not reading.done()
            consumer.resume([("t", 0)])
            await reading
    assert Counter(record.partition for record in records) == {0: 10, 1: 10}


async def test_commits_keep_the_position_of_a_paused_partition(platform, address):
    await platform.create_topic("t", 1)
    await write(address, 0, 100)
    async with Consumer(address, ["t"], group="g", auto_commit=False) as consumer:
        await take(consumer, 10)
        consumer.pause([("t", 0)])
        await consumer.commit()
        assert platform.group("g").offsets == {("t", 0): 10}


async def test_a_partition_that_comes_back_is_not_paused(platform, address):
    await platform.create_topic("t", 1)
    await write(address, 0, 10)
    async with Consumer(address, ["t"], group="g") as consumer:
        consumer.pause([("t", 0)])
        await platform.expel("g")
        assert len(await take(consumer, 10)) == 10
        assert consumer.paused() == set()


@pytest.mark.parametrize("seed", range(30))
async def test_however_pauses_fall_records_come_once_and_in_order(seed):
    chance = random.Random(seed)
    hands = Hands(3)
    expected = [0, 0, 0]
    written = [0, 0, 0]
    for _ in range(300):
        number = chance.randrange(3)
        cursor = hands.cursors[number]
        what = chance.randrange(6)
        if what == 0 and (count := written[number] - cursor.fetch_offset + chance.randrange(1, 30)) > 0:
            hands.receive(number, count)
            written[number] += count
        elif what == 1:
            hands.reader.pause(cursor)
        elif what == 2:
            hands.reader.resume(cursor)
        elif what == 3:
            hands.reader._drop_set_aside()
        elif what == 4:
            hands.now_s += chance.random() / 50
        readable = [c for c in hands.cursors if not c.paused and c.delivered < c.fetch_offset]
        for _ in range(chance.randrange(8)):
            if not any(c.delivered < c.fetch_offset for c in readable):
                break
            if chance.random() < 0.1:
                batch = await hands.ask_for_batch()
                offsets, got = batch.offsets.tolist(), batch.partition
            else:
                record = await hands.ask()
                offsets, got = [record.offset], record.partition
            assert not hands.cursors[got].paused
            assert offsets == list(range(expected[got], expected[got] + len(offsets)))
            expected[got] += len(offsets)
    assert sum(expected) > 100


async def test_a_record_that_was_given_back_waits_while_its_partition_is_paused():
    hands = Hands(2)
    hands.receive(0, 3)
    await hands.ask()
    hands.iteration.give_back(hands.worker())  # as after Ctrl-C
    hands.reader.pause(hands.cursors[0])
    hands.receive(1, 1)
    assert (await hands.ask()).partition == 1
    hands.reader.resume(hands.cursors[0])
    assert [(await hands.ask()).offset for _ in range(3)] == [0, 1, 2]


def test_plain_code_pauses_and_resumes(server):
    server.create_topic("t", 2)
    with SyncProducer(server.address) as producer:
        for partition in range(2):
            producer.send_many("t", [b"v"] * 100, partition=partition)
    with SyncConsumer(server.address, ["t"]) as consumer:
        seen = [next(consumer)]
        consumer.pause([("t", seen[0].partition)])
        assert consumer.paused() == {("t", seen[0].partition)}
        others = [next(consumer) for _ in range(100)]
        assert {record.partition for record in others} == {1 - seen[0].partition}
        consumer.resume(list(consumer.paused()))
        seen += [next(consumer) for _ in range(99)]
        assert [record.offset for record in seen] == list(range(100))
