"""The synchronous client, against a platform on an event loop of its own."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest
from streamhouse import errors
from streamhouse.background import BACKGROUND
from streamhouse.core.options import ConsumerKwargs, ConsumerOptions, ProducerKwargs, ProducerOptions
from streamhouse.records import OffsetAndMetadata, RecordBatch, TopicPartition
from streamhouse.sync import Admin, Consumer, Producer
from streamhouse.sync.producer import SLOT_BYTES, STAGED_SLOTS_MAX

PATIENCE_S = 30.0


def test_produce_and_consume(server):
    with Admin(server.address) as admin:
        assert admin.create_topic("t", partitions=2).partitions == 2
        assert admin.create_topic("t", partitions=3, if_not_exists=True).partitions == 2
        assert admin.alter_topic("t", retention_ms=9).retention_ms == 9
        assert [config.value for config in admin.topic_configs("t")] == [2, "wal", 9, None, None]
        assert admin.delete_records("t", 0, 0).log_start_offset == 0
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
    server.create_topic("t", 1)
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
        consumer.seek_to_beginning()
        assert next(consumer).offset == 0
        consumer.seek_to_end([("t", 0)])
        assert consumer.positions() == {("t", 0): 300}
        consumer.seek_to_timestamp(0)
        assert next(consumer).offset == 0
    with Consumer(server.address, ["t"], group="g", auto_commit=False) as consumer:
        assert consumer.committed() == {("t", 0): None}
        consumer.commit({("t", 0): OffsetAndMetadata(17, "note")})
        assert consumer.committed([("t", 0)]) == {("t", 0): (17, "note")}
    with Consumer(server.address, ["t"], start=-3, stop_at_end=True) as consumer:
        assert [record.offset for record in consumer] == [297, 298, 299]


def test_several_threads_share_a_producer(server):
    server.create_topic("t", 3)
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
        values = [value for _, value in server.records("t", partition)]
        for name in (b"w0", b"w1", b"w2", b"w3"):
            numbers = [int(value.split(b"-")[1]) for value in values if value.startswith(name)]
            assert numbers == list(range(partition, 1000, 3))


@pytest.mark.parametrize("as_batches", [False, True])
def test_an_interrupted_iteration_goes_on_where_it_was(server, monkeypatch, as_batches):
    """Ctrl-C, and what other signal handlers raise, may come between any two steps of it."""
    server.create_topic("t", 1)
    with Producer(server.address) as producer:
        producer.send_many("t", [b"%d" % n for n in range(100)])
    each = RecordBatch.__iter__

    def interrupted(batch):
        for record in each(batch):
            if record.offset == 40:
                monkeypatch.undo()
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(RecordBatch, "__iter__", interrupted)
    offsets = []
    with Consumer(server.address, ["t"], stop_at_end=True) as consumer:
        with pytest.raises(KeyboardInterrupt):
            offsets.extend(record.offset for record in consumer)
        if as_batches:
            offsets = [offset for batch in consumer.batches() for offset in batch.offsets.tolist()]
        else:
            offsets = [record.offset for record in consumer]
    assert offsets[-1] == 99 and offsets[0] <= 40 and len(offsets) == 100 - offsets[0]


def test_positions_can_be_asked_for_while_partitions_come_and_go(server):
    server.create_topic("t", 1)
    with Consumer(server.address, ["t"]) as consumer:
        cursors = consumer._inner._reader.cursors

        class Coming:
            """What the loop's thread does, in the very moment."""

            @property
            def delivered(self):
                cursors[TopicPartition("t", len(cursors))] = cursors["t", 0]
                return 7

        cursors[TopicPartition("t", 1)] = Coming()
        assert consumer.positions() == {("t", 0): 0, ("t", 1): 7}


def test_errors_reach_the_caller(server):
    server.create_topic("t", 1)
    with Producer(server.address) as producer:
        with pytest.raises(errors.UnknownTopic):
            producer.send("nope", b"v")
        with pytest.raises(errors.UnknownPartition):
            producer.send("t", b"v", partition=1)
        with pytest.raises(TypeError):
            producer.send("t", "text")
        server.faults.fail("produce", errors.InvalidBatch("no"), 1)
        assert isinstance(producer.send("t", b"v").exception(10), errors.InvalidBatch)
    producer = Producer(server.address)
    server.faults.fail("produce", errors.InvalidBatch("no"), 1)
    producer.send("t", b"v")
    with pytest.raises(errors.InvalidBatch):
        producer.flush()
    producer.close()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        producer.send("t", b"v")


def test_send_and_wait_returns_the_place_of_the_record(server):
    server.create_topic("t", 1)
    with Producer(server.address) as producer:
        assert producer.send_and_wait("t", b"0", timestamp_ms=5) == ("t", 0, 0, 5)
        assert producer.send_and_wait("t", b"1", key=b"k", headers={"h": b""}, partition=0).offset == 1
        server.faults.fail("produce", errors.InvalidBatch("no"), 1)
        with pytest.raises(errors.InvalidBatch):
            producer.send_and_wait("t", b"v")


@pytest.mark.parametrize("many", [False, True])
def test_done_callbacks_are_called_before_a_flush_returns(server, many):
    server.create_topic("t", 2)
    server.faults.delay("produce", 100)
    seen = []

    def on_done(future):
        seen.append((future.done(), future.exception(), threading.current_thread().name))

    with Producer(server.address) as producer:
        if many:
            sent = [producer.send_many("t", [b"%d" % n] * 10, partition=n) for n in range(2)]
        else:
            sent = [producer.send("t", b"%d" % n, partition=n % 2) for n in range(100)]
        for future in sent:
            future.add_done_callback(on_done)
        producer.flush()
        assert seen == [(True, None, "streamhouse")] * len(sent)
        sent[0].add_done_callback(on_done)  # done: at once, in this thread
        assert seen[len(sent) :] == [(True, None, threading.current_thread().name)]


def test_a_failure_that_a_done_callback_asked_for_is_not_raised_again(server):
    server.create_topic("t", 1)
    seen = []
    with Producer(server.address) as producer:
        producer.send_and_wait("t", b"v")
        server.faults.fail("produce", errors.InvalidBatch("no"), 1)
        server.faults.delay("produce", 100)
        producer.send("t", b"v").add_done_callback(lambda future: seen.append(future.exception()))
    assert [type(error) for error in seen] == [errors.InvalidBatch]


def test_done_callbacks_of_records_that_are_still_staged_or_refused(server):
    """While the loop's thread is busy, `send` returns before it has taken the record."""
    server.create_topic("t", 1)
    seen = []
    producer = Producer(server.address, batch_bytes=1_000)
    producer.send_and_wait("t", b"v")
    free = threading.Event()
    BACKGROUND.loop.call_soon_threadsafe(free.wait)
    taken, refused = producer.send("t", b"v"), producer.send("t", b"v")
    for future in (taken, refused):
        future.add_done_callback(lambda future: seen.append((future, future.exception())))
    append = producer._inner.append

    async def refuse_second(*arguments):
        if refused_next:
            raise errors.Overloaded("no room")
        refused_next.append(True)
        return await append(*arguments)

    refused_next = []
    producer._inner.append = refuse_second
    free.set()
    producer.close()
    assert [future for future, _ in seen] == [refused, taken]
    assert isinstance(seen[0][1], errors.Overloaded) and seen[1][1] is None


def test_an_exception_in_a_done_callback_is_logged_and_ends_nothing(server, caplog):
    server.create_topic("t", 1)
    seen = []
    with Producer(server.address) as producer:
        server.faults.delay("produce", 100)
        future = producer.send("t", b"v")
        for error in (ValueError("mine"), SystemExit(3)):

            def fail(future, error=error):
                raise error

            future.add_done_callback(fail)
        future.add_done_callback(lambda future: seen.append(future.result().offset))
        assert future.result(10).offset == 0
        assert producer.send_and_wait("t", b"v").offset == 1
    assert seen == [0]
    # Not what asyncio says of another test's server.
    ours = [record for record in caplog.records if record.name == "streamhouse.sync.producer"]
    assert [record.exc_info[0] for record in ours] == [ValueError, SystemExit]


def test_a_call_that_would_wait_in_a_done_callback_is_refused(server):
    server.create_topic("t", 1)
    seen = []

    def send_elsewhere(future):
        try:
            producer.send("other", b"v")
        except RuntimeError as error:
            seen.append(str(error))

    with Producer(server.address) as producer:
        server.faults.delay("produce", 100)
        producer.send("t", b"v").add_done_callback(send_elsewhere)
        producer.flush()
    assert len(seen) == 1 and "in callbacks" in seen[0]


def test_a_timeout_does_not_lose_the_record(server):
    server.create_topic("t", 1)
    server.faults.delay("produce", 300)
    with Producer(server.address) as producer:
        future = producer.send("t", b"v")
        with pytest.raises(TimeoutError):
            future.result(0.01)
        assert future.result(10).offset == 0


def test_a_timeout_does_not_lose_what_another_thread_sent_meanwhile(server):
    """Who waits for a record hands over what is staged, of whomever, and may be cancelled while there is no room."""
    server.create_topic("t", 1)
    server.faults.delay("produce", 1_500)
    with Producer(server.address, batch_bytes=100, buffer_bytes_max=100) as producer:
        first = producer.send("t", b"1" * 60)
        while first._batch is None:
            time.sleep(0.01)
        busy = threading.Event()
        BACKGROUND.loop.call_soon_threadsafe(busy.wait)
        timed_out = []

        def wait():
            try:
                first.result(0.5)
            except TimeoutError as error:
                timed_out.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.1)  # now its wait is in the loop's queue, and before what comes next
        others = [producer.send("t", b"%d" % n * 60) for n in (2, 3)]
        busy.set()
        waiter.join()
        assert timed_out
        server.faults.delay("produce", 0)
        assert [future.result(30).offset for future in others] == [1, 2]
    assert [value[:1] for _, value in server.records("t", 0)] == [b"1", b"2", b"3"]


def test_records_on_their_way_to_the_loop_are_bounded_in_bytes(server):
    server.create_topic("t", 1)
    server.faults.delay("produce", 2_000)
    mib, count = 1 << 20, 64
    futures = []
    with Producer(server.address, buffer_bytes_max=mib) as producer:
        staged_bytes = []

        def work():
            for _ in range(count):
                futures.append(producer.send("t", bytes(mib)))
                records = [item[2] for item in producer._staged.copy() if item is not None]
                staged_bytes.append(sum(size_bytes for *_, size_bytes in records))

        worker = threading.Thread(target=work)
        worker.start()
        deadline_s = time.monotonic() + 30
        while not producer._waiting:
            assert time.monotonic() < deadline_s, "nothing holds it up"
            time.sleep(0.01)
        server.faults.delay("produce", 0)
        worker.join()
    limit = STAGED_SLOTS_MAX * SLOT_BYTES
    assert limit / 2 < max(staged_bytes) <= limit
    assert [future.result(0).offset for future in futures] == list(range(count))


@pytest.mark.long
def test_close_fails_all_records_that_wait_for_room_together(server):
    """delivery_timeout_ms counts from `send`: records behind a full buffer do not wait for it one after the other, an
    hour for these."""
    server.create_topic("t", 1)
    producer = Producer(server.address, batch_bytes=200, buffer_bytes_max=200, delivery_timeout_ms=5_000)
    producer.send("t", b"opens the topic").result(PATIENCE_S)
    server.faults.hang("produce")
    futures = [producer.send("t", bytes(150)) for _ in range(4_000)]
    failures = []

    def close():
        try:
            producer.close()
        except errors.StreamHouseError as error:
            failures.append(error)

    closer = threading.Thread(target=close, daemon=True)
    closer.start()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    assert "delivery_timeout_ms = 5000" in str(failures[0])
    assert all(future.done() for future in futures)
    kinds = {type(future.exception(0)) for future in futures}
    assert kinds <= {errors.Unavailable, errors.Overloaded}
    assert producer.metrics().records_failed == len(futures)


def test_records_that_a_close_with_a_timeout_gives_up_are_unavailable(server):
    server.create_topic("t", 1)
    producer = Producer(server.address, batch_bytes=200, buffer_bytes_max=200)
    producer.send("t", b"opens the topic").result(PATIENCE_S)
    server.faults.hang("produce")
    futures = [producer.send("t", bytes(150)) for _ in range(10)]
    with pytest.raises(TimeoutError, match="10 records are not acknowledged"):
        producer.close(timeout_s=0.05)
    assert {type(future.exception(0)) for future in futures} == {errors.Unavailable}


def test_waiting_inside_the_loop_is_refused():
    async def work():
        BACKGROUND.run(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="wait for itself"):
        BACKGROUND.run(work())


FORKS = """
import asyncio, os
from streamhouse.background import BACKGROUND
BACKGROUND.run(asyncio.sleep(0))
child = os.fork()
if child == 0:
    try:
        BACKGROUND.run(asyncio.sleep(0))
    except RuntimeError:
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
BACKGROUND.run(asyncio.sleep(0))
"""


def test_a_forked_child_is_told_that_it_cannot_use_the_client():
    """Where the parent has, gRPC's threads are missing in the child: calls would hang, past any deadline."""
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=60)


def test_keyword_arguments_are_the_options():
    assert set(ProducerKwargs.__annotations__) == set(ProducerOptions.__slots__)
    assert set(ConsumerKwargs.__annotations__) == set(ConsumerOptions.__slots__)
