"""The synchronous client, against a fake on an event loop of its own."""

import asyncio
import threading

import pytest
from streamhouse import errors
from streamhouse.background import BACKGROUND
from streamhouse.core.options import ConsumerKwargs, ConsumerOptions, ProducerKwargs, ProducerOptions
from streamhouse.sync import Admin, Consumer, Producer

from client.tests.fake_streamhouse import FakeStreamHouse


@pytest.fixture
def server():
    """A fake that runs in another thread, as a server would."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make():
        fake = FakeStreamHouse()
        await fake.server.start()
        return fake

    fake = asyncio.run_coroutine_threadsafe(make(), loop).result()
    yield fake
    asyncio.run_coroutine_threadsafe(fake.server.stop(0), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_produce_and_consume(server):
    with Admin(server.address) as admin:
        assert admin.create_topic("t", partitions=2).partitions == 2
        assert [topic.topic for topic in admin.list_topics()] == ["t"]
    with Producer(server.address) as producer:
        first = producer.send("t", b"0", partition=1).result(10)
        assert (first.partition, first.offset) == (1, 0)
        futures = [producer.send("t", b"%d" % n, partition=1) for n in range(1, 500)]
        many = producer.send_many("t", [b"%d" % n for n in range(500, 1000)], partition=1)
        assert many.result(10).offsets.tolist() == list(range(500, 1000))
        assert [future.result(10).offset for future in futures] == list(range(1, 500))
    with Consumer(server.address, ["t"], group="g", stop_at_end=True) as consumer:
        values = [record.value for record in consumer]
        assert consumer.lag()["t", 1].records == 0
    assert values == [b"%d" % n for n in range(1000)]
    with Admin(server.address) as admin:
        assert {(o.partition, o.offset) for o in admin.group_offsets("g")} == {(0, 0), (1, 1000)}


def test_batches_after_a_break_go_on(server):
    server.add_topic("t", 1)
    with Producer(server.address) as producer:
        producer.send_many("t", [b"%d" % n for n in range(300)])
    with Consumer(server.address, ["t"], stop_at_end=True) as consumer:
        offsets = []
        for record in consumer:
            offsets.append(record.offset)
            if record.offset == 99:
                break
        for batch in consumer.batches():
            offsets += batch.offsets.tolist()
        assert offsets == list(range(300))
        consumer.seek("t", 0, 290)
        assert [record.offset for record in consumer] == list(range(290, 300))


def test_several_threads_share_a_producer(server):
    server.add_topic("t", 3)
    failures = []

    def work(producer, name):
        try:
            futures = [producer.send("t", b"%s-%d" % (name, n), partition=n % 3) for n in range(1000)]
            for n, future in enumerate(futures):
                assert future.result(20).partition == n % 3
        except Exception as error:  # noqa: BLE001 - reported by the test
            failures.append(error)

    with Producer(server.address, batch_bytes=2000) as producer:
        threads = [threading.Thread(target=work, args=(producer, b"w%d" % n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    for partition in range(3):
        values = [value for _, value in server.log("t", partition).records()]
        for name in (b"w0", b"w1", b"w2", b"w3"):
            numbers = [int(value.split(b"-")[1]) for value in values if value.startswith(name)]
            assert numbers == list(range(partition, 1000, 3))


def test_errors_reach_the_caller(server):
    server.add_topic("t", 1)
    with Producer(server.address) as producer:
        with pytest.raises(errors.UnknownTopic):
            producer.send("nope", b"v")
        with pytest.raises(errors.UnknownPartition):
            producer.send("t", b"v", partition=1)
        with pytest.raises(TypeError):
            producer.send("t", "text")
        server.faults.refuse_batch = errors.InvalidBatch("no")
        assert isinstance(producer.send("t", b"v").exception(10), errors.InvalidBatch)
    producer = Producer(server.address)
    server.faults.refuse_batch = errors.InvalidBatch("no")
    producer.send("t", b"v")
    with pytest.raises(errors.InvalidBatch):
        producer.flush()
    producer.close()


def test_a_timeout_does_not_lose_the_record(server):
    server.add_topic("t", 1)
    server.faults.answer_delay_ms = 300
    with Producer(server.address) as producer:
        future = producer.send("t", b"v")
        with pytest.raises(TimeoutError):
            future.result(0.01)
        assert future.result(10).offset == 0


def test_waiting_inside_the_loop_is_refused():
    async def work():
        BACKGROUND.run(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="wait for itself"):
        BACKGROUND.run(work())


def test_keyword_arguments_are_the_options():
    assert set(ProducerKwargs.__annotations__) == set(ProducerOptions.__slots__)
    assert set(ConsumerKwargs.__annotations__) == set(ConsumerOptions.__slots__)
