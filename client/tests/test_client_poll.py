"""poll: records by partition, what has been received, within a time and up to a number."""

import asyncio
import random
import threading
import time
from collections import defaultdict

import pytest
from streamhouse import Consumer, Producer, errors
from streamhouse.sync import Consumer as SyncConsumer
from streamhouse.sync import Producer as SyncProducer

from client.tests.test_client_consumer import PATIENCE_S, fill, until
from client.tests.test_client_iteration import Hands

PATIENCE_MS = PATIENCE_S * 1000


async def test_polls_hand_over_every_record_once_by_partition_and_in_order(platform, address):
    await fill(platform, address, 5000)
    seen: defaultdict[int, list[int]] = defaultdict(list)
    async with Consumer(address, ["t"]) as consumer:
        while sum(map(len, seen.values())) < 5000:
            polled = await consumer.poll(PATIENCE_MS, max_records=70)
            assert 1 <= sum(map(len, polled.values())) <= 70
            for (topic, partition), records in polled.items():
                assert {(record.topic, record.partition) for record in records} == {(topic, partition)}
                seen[partition] += [record.offset for record in records]
        assert await consumer.poll(10) == {}
    for partition, offsets in seen.items():
        assert offsets == list(range(await platform.end("t", partition)))


async def test_of_columns_it_takes_as_many_batches_as_fit(platform, address):
    await fill(platform, address, 1000)
    async with Consumer(address, ["t"]) as consumer:
        await until(lambda: sum(cursor.fetch_offset for cursor in consumer._reader.cursors.values()) == 1000)
        polled = await consumer.poll_batches(max_records=999)
        assert sum(len(batch) for batches in polled.values() for batch in batches) == 999
        assert len(polled) == 3
        for where, batches in polled.items():
            offsets = [offset for batch in batches for offset in batch.offsets.tolist()]
            assert offsets == list(range(consumer.positions()[where]))
        (rest,) = (await consumer.poll_batches()).values()
        assert [len(batch) for batch in rest] == [1]


async def test_a_poll_ends_with_the_first_records_or_its_time(platform, address):
    await platform.create_topic("t", 1)
    async with Consumer(address, ["t"]) as consumer:
        assert await consumer.poll() == {}
        polling = asyncio.create_task(consumer.poll(PATIENCE_MS))
        async with Producer(address) as producer:
            await producer.send_many("t", [b"1", b"2"])
        assert [record.value for record in (await polling)["t", 0]] == [b"1", b"2"]


async def test_a_poll_that_waits_for_nothing_still_has_what_was_received(platform, address):
    """Also where the application took so long that the event loop is to run first."""
    await fill(platform, address, 100, partitions=1)
    async with Consumer(address, ["t"]) as consumer:
        await until(lambda: consumer._reader.has_portion)
        for _ in range(10):
            time.sleep(0.02)  # noqa: ASYNC251 - what a slow application does
            assert len((await consumer.poll(0, max_records=10))["t", 0]) == 10


async def test_what_was_polled_is_done_with_at_the_next_poll(platform, address):
    await fill(platform, address, 100, partitions=1)
    async with Consumer(address, ["t"], group="g", auto_commit=False) as consumer:
        await consumer.poll(PATIENCE_MS, max_records=10)
        await consumer._commits.commit_existing()  # as an automatic commit
        assert platform.group("g").offsets.get(("t", 0), 0) == 0
        await consumer.poll(PATIENCE_MS, max_records=10)
        await consumer._commits.commit_existing()
        assert platform.group("g").offsets == {("t", 0): 10}
        await consumer.commit()
        assert platform.group("g").offsets == {("t", 0): 20}


async def test_a_failure_behind_records_is_raised_by_the_next_poll(platform, address):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, ["t"]) as consumer:
        await until(lambda: consumer._reader.has_portion)
        consumer._reader.fail(errors.Internal("broken"), consumer._reader.cursors["t", 0])
        assert len((await consumer.poll())["t", 0]) == 10
        with pytest.raises(errors.Internal, match="broken"):
            await consumer.poll()
        assert await consumer.poll() == {}


async def test_a_bounded_read_by_polls_knows_its_end(platform, address):
    await fill(platform, address, 100)
    consumer = Consumer(address, ["t"], stop_at_end=True)
    assert not consumer.at_end
    count = 0
    async with consumer:
        while not consumer.at_end:
            count += sum(map(len, (await consumer.poll(PATIENCE_MS, max_records=7)).values()))
        assert await consumer.poll(PATIENCE_MS) == {}
    assert count == 100
    with pytest.raises(errors.InvalidArgument, match="closed"):
        await consumer.poll()


async def test_arguments_out_of_their_limits_are_named_and_leave_the_record_in_hand(platform, address):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, ["t"], group="g", auto_commit=False) as consumer:
        await consumer.poll(PATIENCE_MS)
        for wrong in ({"timeout_ms": -1}, {"timeout_ms": 0.5}, {"max_records": 0}, {"max_records": None}):
            with pytest.raises(errors.InvalidArgument, match=next(iter(wrong))):
                consumer.poll(**wrong)
            with pytest.raises(errors.InvalidArgument, match=next(iter(wrong))):
                consumer.poll_batches(**wrong)
        await consumer._commits.commit_existing()
        assert platform.group("g").offsets.get(("t", 0), 0) == 0


@pytest.mark.parametrize("seed", range(30))
async def test_however_records_batches_and_polls_mix_each_record_comes_once(seed):
    chance = random.Random(seed)
    hands = Hands(2)
    for number in range(2):
        for _ in range(10):
            hands.receive(number, chance.randrange(1, 40))
    total = sum(cursor.fetch_offset for cursor in hands.cursors)
    expected = [0, 0]
    while sum(expected) < total:
        hands.now_s += chance.random() / 100
        name = chance.choice("ab")
        worker = hands.worker(name)
        what = chance.randrange(4)
        if what == 0:
            taken = [await hands.ask(name)]
        elif what == 1:
            taken = list(await hands.ask_for_batch(name))
        else:
            worker.held, taken, left = None, [], chance.randrange(1, 30)
            while left and hands.iteration.bring():
                if (batch := hands.iteration.take_batch(worker, left)) is not None:
                    taken += batch
                    left -= len(batch)
            if what == 3:
                hands.iteration.give_back(worker)  # as after Ctrl-C: all of it comes again
                continue
        for record in taken:
            assert record.offset == expected[record.partition]
            expected[record.partition] += 1
    assert not hands.iteration.bring()


def test_plain_code_polls(server):
    server.create_topic("t", 2)
    with SyncProducer(server.address) as producer:
        for partition in range(2):
            producer.send_many("t", [b"v"] * 1000, partition=partition)
    seen: defaultdict[int, list[int]] = defaultdict(list)
    with SyncConsumer(server.address, ["t"], group="g", stop_at_end=True) as consumer:
        while not consumer.at_end:
            for where, batches in consumer.poll_batches(PATIENCE_MS, max_records=300).items():
                seen[where.partition] += [offset for batch in batches for offset in batch.offsets.tolist()]
        assert consumer.poll(PATIENCE_MS) == {}
        consumer.commit()
    assert seen == {0: list(range(1000)), 1: list(range(1000))}
    assert server.group("g").offsets == {("t", 0): 1000, ("t", 1): 1000}
    with SyncConsumer(server.address, ["t"], start="latest") as consumer:
        assert consumer.poll() == consumer.poll(20) == {}
        assert consumer.wait_for_assignment(PATIENCE_MS) == {("t", 0), ("t", 1)}
        assert consumer.membership is None
    with pytest.raises(errors.InvalidArgument, match="closed"):
        consumer.poll()


def test_threads_that_poll_share_a_consumer(server):
    server.create_topic("t", 2)
    with SyncProducer(server.address) as producer:
        for partition in range(2):
            producer.send_many("t", [b"v"] * 5000, partition=partition)
    seen: list[tuple[int, int]] = []
    with SyncConsumer(server.address, ["t"], stop_at_end=True, fetch_bytes=20_000) as consumer:

        def work():
            while not consumer.at_end:
                for (_, partition), records in consumer.poll(100, max_records=50).items():
                    seen.extend((partition, record.offset) for record in records)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    assert len(seen) == len(set(seen)) == 10_000
