"""What producers and consumers count, in both clients."""

import asyncio
import dataclasses
import threading

import pytest
import streamhouse
import streamhouse.sync
from streamhouse import Consumer, Producer, errors
from streamhouse.background import BACKGROUND

VALUES = [b"%03d" % n for n in range(300)]


@pytest.mark.parametrize("module", [streamhouse, streamhouse.sync], ids=["async", "sync"])
async def test_before_the_first_use_all_is_zero(module):
    sent = dataclasses.asdict(module.Producer("127.0.0.1:1", buffer_bytes_max=1 << 20).metrics())
    assert {name for name, value in sent.items() if value} == {"buffer_bytes_max"}
    assert sent["buffer_bytes_max"] == 1 << 20
    read = dataclasses.asdict(module.Consumer("127.0.0.1:1", ["t"]).metrics())
    assert {name for name, value in read.items() if value} == {"prefetch_bytes_max"}


async def test_a_producer_counts_what_it_sends(platform, address):
    await platform.create_topic("t", 2)
    async with Producer(address, compression="none", linger_ms=60_000) as producer:
        for partition in range(2):
            await producer.send_many("t", VALUES, partition=partition)
        before = producer.metrics()
        assert (before.records_unacknowledged, before.records_sent, before.batches_sent) == (600, 0, 0)
        assert before.buffer_used_bytes == 600 * (3 + 32)
        await producer.flush()
        after = producer.metrics()
        assert (after.records_sent, after.records_acked, after.records_failed) == (600, 600, 0)
        assert (after.batches_sent, after.batches_retried) == (2, 0)
        assert 600 * 3 < after.bytes_sent < 600 * 3 + 20_000
        assert (after.records_unacknowledged, after.buffer_used_bytes) == (0, 0)


async def test_a_producer_counts_retries_and_failures(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_and_wait("t", b"v")
        platform.faults.fail("produce", errors.Overloaded("later", retry_after_ms=1), 1)
        await producer.send_and_wait("t", b"v")
        counts = producer.metrics()
        assert (counts.batches_sent, counts.batches_retried, counts.records_acked) == (2, 1, 2)
        platform.faults.fail("produce", errors.InvalidBatch("no"), 1)
        result = await producer.send_many("t", [b"v"] * 7)
        with pytest.raises(errors.InvalidBatch):
            await result
        counts = producer.metrics()
        assert (counts.records_sent, counts.records_acked, counts.records_failed) == (9, 2, 7)


def test_a_synchronous_producer_counts_what_is_staged_and_refused(server):
    server.create_topic("t", 1)
    seen = []
    with streamhouse.sync.Producer(server.address) as producer:
        producer.send_and_wait("t", b"v")
        free = threading.Event()
        BACKGROUND.loop.call_soon_threadsafe(free.wait)
        futures = [producer.send("t", b"v") for _ in range(5)]
        assert producer.metrics().records_unacknowledged == 5  # also while the loop's thread is busy

        async def refuse(*_args):
            raise errors.Overloaded("no room")

        producer._inner.append = refuse
        futures[-1].add_done_callback(lambda future: seen.append(producer.metrics()))
        free.set()
        assert isinstance(futures[-1].exception(10), errors.Overloaded)
        with pytest.raises(errors.Overloaded):
            producer.flush()
        counts = producer.metrics()
        assert (counts.records_sent, counts.records_acked, counts.records_failed) == (1, 1, 5)
        assert counts.records_unacknowledged == 0
    assert len(seen) == 1, "and in a callback"


async def test_a_consumer_counts_what_the_application_gets(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address, batch_bytes=2000) as producer:
        await producer.send_many("t", VALUES, keys=[b"k"] * 300)
    async with Consumer(address, ["t"], group="g", stop_at_end=True, auto_commit_interval_ms=3_600_000) as consumer:
        async for record in consumer:
            if record.offset == 99:
                break
        counts = consumer.metrics()
        assert (counts.records_read, counts.bytes_read) == (100, 400)
        assert counts.lag == {("t", 0): 200}
        assert (counts.commits, counts.commits_failed, counts.rebalances) == (0, 0, 1)
        assert 0 < counts.prefetch_used_bytes <= counts.prefetch_bytes_max
        await consumer.commit()
        async for _ in consumer.batches():
            pass
        counts = consumer.metrics()
        assert (counts.records_read, counts.bytes_read, counts.commits) == (300, 1200, 1)
        assert (counts.lag, counts.prefetch_used_bytes) == ({("t", 0): 0}, 0)
        await consumer.seek("t", 0, 290)
        assert [record.offset async for record in consumer] == list(range(290, 300))
        assert consumer.metrics().records_read == 310


async def test_every_turn_counts_once(platform, address, monkeypatch):
    """With partitions taking turns after every few records; each turn is counted when it ends."""
    monkeypatch.setattr("streamhouse.iteration.TURN_S", 1e-6)
    await platform.create_topic("t", 3)
    async with Producer(address, batch_bytes=1000) as producer:
        for partition in range(3):
            await producer.send_many("t", VALUES, partition=partition)
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        count = 0
        async for _ in consumer:
            count += 1
            assert consumer.metrics().records_read == count
    assert (count, consumer.metrics().bytes_read) == (900, 2700)


async def test_a_consumer_counts_refused_commits_and_what_was_lost(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_many("t", VALUES)
    async with Consumer(address, ["t"], group="g", auto_commit=False) as consumer:
        await anext(consumer)
        with pytest.raises(errors.StreamHouseError):
            await consumer.commit({("nope", 0): 5})
        assert (consumer.metrics().commits, consumer.metrics().commits_failed) == (0, 1)
        consumer._reader.drop(next(iter(consumer.assignment)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(consumer), 0.05)
        assert consumer.metrics().records_read == 1, "what was received of a lost partition was not handed over"


def test_a_synchronous_consumer_counts_from_any_thread(server):
    server.create_topic("t", 1)
    with streamhouse.sync.Producer(server.address) as producer:
        producer.send_many("t", VALUES)
    with streamhouse.sync.Consumer(server.address, ["t"], stop_at_end=True) as consumer:
        for count, _ in enumerate(consumer, 1):
            assert consumer.metrics().records_read == count
        seen = []
        thread = threading.Thread(target=lambda: seen.append(consumer.metrics()))
        thread.start()
        thread.join()
        assert (seen[0].records_read, seen[0].bytes_read) == (300, 900)
