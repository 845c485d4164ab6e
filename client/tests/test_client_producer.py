"""The producer against a platform in memory, on a real gRPC server."""

import asyncio
import gc
import math
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from shformat import decode_batch
from shformat.murmur2 import partition_of
from shproto.v1 import types_pb2
from streamhouse import Producer, errors, partitioner
from streamhouse.core import partition_queue
from streamhouse.core.partition_queue import SMALL_IN_FLIGHT_MAX
from streamhouse.leader_connection import LeaderConnection
from streamhouse.metadata import MetadataCache
from streamhouse.partitioner import _partition_of_cached
from streamhouse.sender import Sender

from client.tests.client_deadlines import let_delivery_timeout_pass

# Until what must come is given up: no duration is what is tested, and the machine may be busy.
PATIENCE_S = 60


async def values_in(platform):
    return await platform.values("t")


def failing(error, times=1):
    """A platform that refuses batches."""
    return lambda platform: platform.faults.fail("produce", error, times)


def cut(after=0, *, request_arrives=True):
    """A platform that cuts a stream instead of answering a batch."""
    return lambda platform: platform.faults.cut("produce", after, request_arrives=request_arrives)


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def has_failed(producer):
    """Whether a try did, and none has succeeded since."""
    return any(queue.last_error is not None for queue in producer._accumulator.queues())


def calls_in_line(producer, topic="t"):
    line = producer._order.queues.get(topic)
    return 0 if line is None else len(line.waiting) + line.granted_count


async def test_send_resolves_with_the_right_offset(platform, address):
    await platform.create_topic("t", 4)
    async with Producer(address) as producer:
        futures = [await producer.send("t", b"v%d" % n, key=b"k%d" % (n % 7), timestamp_ms=n) for n in range(500)]
        metadata = [await future for future in futures]
    for n, sent in enumerate(metadata):
        assert sent.partition == partition_of(b"k%d" % (n % 7), 4)
        assert sent.timestamp_ms == n
        assert dict(await platform.records("t", sent.partition))[sent.offset] == b"v%d" % n


async def test_send_and_wait_returns_the_place_of_the_record(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        assert await producer.send_and_wait("t", b"0", timestamp_ms=5) == ("t", 0, 0, 5)
        assert (await producer.send_and_wait("t", b"1", key=b"k", headers={"h": b""}, partition=0)).offset == 1
        platform.faults.fail("produce", errors.InvalidBatch("no"), 1)
        with pytest.raises(errors.InvalidBatch):
            await producer.send_and_wait("t", b"v")


async def test_order_within_a_partition_is_the_order_of_sending(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address, batch_bytes=400, linger_ms=1) as producer:
        for n in range(1000):
            await producer.send("t", b"%d" % n)
    assert await values_in(platform) == [b"%d" % n for n in range(1000)]
    assert platform.faults.calls["produce"] > 50


async def test_send_many_gives_partitions_and_offsets_in_the_order_given(platform, address):
    await platform.create_topic("t", 5)
    values = [b"value-%d" % n for n in range(20_000)]
    keys = [None if n % 11 == 0 else b"key-%d" % (n % 101) for n in range(20_000)]
    async with Producer(address, batch_bytes=8192) as producer:
        sent = await (await producer.send_many("t", values, keys=keys, timestamps_ms=list(range(20_000))))
    stored = {(p, offset): value for p in range(5) for offset, value in await platform.records("t", p)}
    assert [stored[p, o] for p, o in zip(sent.partitions.tolist(), sent.offsets.tolist(), strict=True)] == values
    for n in range(20_000):
        if keys[n] is not None:
            assert sent.partitions[n] == partition_of(keys[n], 5)
    for partition in range(5):
        assert (np.diff(sent.offsets[sent.partitions == partition]) > 0).all()


async def test_send_and_send_many_keep_their_order(platform, address):
    await platform.create_topic("t", 2)
    async with Producer(address, batch_bytes=2000) as producer:
        for n in range(0, 100, 10):
            await producer.send("t", b"%d" % n, partition=1)
            await producer.send_many("t", [b"%d" % m for m in range(n + 1, n + 10)], partition=1)
    assert await values_in(platform) == [b"%d" % n for n in range(100)]


async def test_large_keys_are_not_kept(platform, address):
    await platform.create_topic("t", 4)
    _partition_of_cached.cache_clear()
    async with Producer(address) as producer:
        for size in (10, 100_000):
            key = bytes(size)
            sent = await (await producer.send("t", b"v", key=key))
            assert sent.partition == partition_of(key, 4)
    assert _partition_of_cached.cache_info().currsize == 1


async def test_records_without_keys_stay_with_their_batch(platform, address):
    await platform.create_topic("t", 8)
    async with Producer(address, linger_ms=50) as producer:
        for n in range(100):
            await producer.send("t", b"%d" % n)
    assert platform.faults.calls["produce"] == 1


@pytest.mark.parametrize(("sticky_ms", "is_one"), [(60_000, True), (0, False)])
async def test_small_batches_without_keys_follow_each_other_to_a_partition(
    platform, address, monkeypatch, sticky_ms, is_one
):
    monkeypatch.setattr(partitioner, "STICKY_MS", sticky_ms)
    await platform.create_topic("t", 8)
    async with Producer(address, linger_ms=0) as producer:
        sent = [await producer.send_and_wait("t", b"v") for _ in range(20)]
    assert (len({metadata.partition for metadata in sent}) == 1) is is_one


@pytest.mark.parametrize(("acks", "unanswered"), [("wal", SMALL_IN_FLIGHT_MAX), ("durable", 5)])
async def test_records_gather_while_small_batches_are_unanswered(platform, address, monkeypatch, acks, unanswered):
    monkeypatch.setattr(partition_queue, "GROW_MS_MAX", 60_000)  # the machine may be busy
    await platform.create_topic("t", 1)
    async with Producer(address, linger_ms=0, acks=acks) as producer:
        await producer.send_and_wait("t", b"first")
        held = platform.faults.hold("produce")
        for _ in range(20):
            await producer.send("t", b"v")
            for _ in range(5):
                await asyncio.sleep(0)  # the linger timer's turn
        assert producer.metrics().batches_sent == 1 + unanswered
        held.set()
    assert platform.faults.calls["produce"] == 1 + unanswered + 1
    assert [len(decode_batch(r.batch).values) for r in platform.faults.requests["produce"]] == [1] * (
        1 + unanswered
    ) + [20 - unanswered]


SHORT_FAULTS = [failing(errors.NotLeader("not me")), cut(3)]
LONG_FAULTS = [
    failing(errors.NotLeader("not me"), 3),
    failing(errors.Overloaded("full", retry_after_ms=20), 2),
    cut(3, request_arrives=False),
    cut(),
    failing(errors.DurableTimeout("slow")),
    failing(errors.ShuttingDown("bye")),
]


@pytest.mark.parametrize(
    "fault", [*SHORT_FAULTS, *(pytest.param(fault, marks=pytest.mark.long) for fault in LONG_FAULTS)]
)
async def test_faults_neither_lose_nor_double_nor_reorder(platform, address, fault):
    await platform.create_topic("t", 2)
    async with Producer(address, batch_bytes=500, linger_ms=0) as producer:
        first = await producer.send("t", b"first", partition=0)
        await first
        fault(platform)
        futures = [await producer.send("t", b"%d" % n, partition=n % 2) for n in range(400)]
        metadata = await asyncio.gather(*futures)
    assert [value for _, value in await platform.records("t", 0)] == [b"first", *(b"%d" % n for n in range(0, 400, 2))]
    assert [value for _, value in await platform.records("t", 1)] == [b"%d" % n for n in range(1, 400, 2)]
    for n, sent in enumerate(metadata):
        assert dict(await platform.records("t", sent.partition))[sent.offset] == b"%d" % n


async def test_a_cut_after_the_write_is_deduplicated(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.cut("produce")
    async with Producer(address) as producer:
        sent = await (await producer.send("t", b"once"))
    assert sent.offset == 0
    assert await values_in(platform) == [b"once"]
    assert platform.faults.duplicates == 1


async def test_first_batches_refused_before_the_leader_knows_the_producer(platform, address):
    """A leader accepts any first sequence: nothing may be pipelined behind a batch that opens the history."""
    await platform.create_topic("t", 1)
    platform.faults.fail("produce", errors.Overloaded("full", retry_after_ms=20), 1)
    async with Producer(address, batch_bytes=100, linger_ms=0) as producer:
        for n in range(50):
            await producer.send("t", b"%d" % n)
    assert await values_in(platform) == [b"%d" % n for n in range(50)]


async def test_a_refused_batch_fails_alone(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address, batch_bytes=200, linger_ms=0) as producer:
        await (await producer.send("t", b"0"))
        platform.faults.fail("produce", errors.InvalidBatch("no"), 1)
        futures = [await producer.send("t", b"%d" % n) for n in range(1, 40)]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
    failed = [n for n, outcome in enumerate(outcomes, 1) if isinstance(outcome, errors.InvalidBatch)]
    assert failed and failed == list(range(1, 1 + len(failed)))
    assert await values_in(platform) == [b"0", *(b"%d" % n for n in range(1, 40) if n not in failed)]


async def test_a_gap_after_a_lost_history_starts_over_under_a_new_id(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await (await producer.send("t", b"0"))
        await (await producer.send("t", b"1"))
        platform.forget_batches("t", 0, from_offset=1)
        assert (await (await producer.send("t", b"2"))).offset == 2
    assert platform.faults.calls["init_producer"] == 2
    assert await values_in(platform) == [b"0", b"1", b"2"]


async def test_a_gap_after_an_unknown_outcome_fails_clearly(platform, address):
    """The earlier leader may have the batch: sending it under a new number could write it twice."""
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await (await producer.send("t", b"0"))
        await (await producer.send("t", b"1"))
        platform.forget_batches("t", 0, from_offset=1)
        platform.faults.cut("produce", request_arrives=False)
        future = await producer.send("t", b"2")
        with pytest.raises(errors.OutcomeUnknown, match=r"t/0: 1 records may or may not have been written") as caught:
            await future
        await (await producer.send("t", b"3"))
    assert caught.value.details == {"topic": "t", "partition": "0", "record_count": "1", "refusal": "SEQUENCE_GAP"}
    assert not caught.value.retriable
    assert await values_in(platform) == [b"0", b"1", b"3"]


async def test_delivery_timeout_fails_with_the_last_error(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.fail("produce", errors.NotLeader("not me"), 1_000_000)
    async with Producer(address, delivery_timeout_ms=300_000) as producer:
        future = await producer.send("t", b"v")
        await until(lambda: platform.faults.calls["produce"] > 1)
        let_delivery_timeout_pass(producer)
        with pytest.raises(errors.NotLeader, match="delivery_timeout_ms = 300000"):
            await future


async def test_delivery_timeout_while_nobody_leads(platform, address):
    await platform.create_topic("t", 1)
    platform.advertise(leader="")
    async with Producer(address) as producer:
        future = await producer.send("t", b"v")
        asked = platform.faults.calls["get_metadata"]
        await until(lambda: platform.faults.calls["get_metadata"] > asked)
        let_delivery_timeout_pass(producer)
        with pytest.raises(errors.NotLeader):
            await future
        platform.faults.mend("get_metadata")
        assert (await (await producer.send("t", b"w"))).offset == 0


async def test_delivery_timeout_while_the_leader_hangs(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.hang("produce")
    async with Producer(address) as producer:
        future = await producer.send("t", b"v")
        await until(lambda: platform.faults.calls["produce"] == 1)
        let_delivery_timeout_pass(producer)
        with pytest.raises(errors.Unavailable, match="delivery_timeout_ms"):
            await future


async def test_who_leads_is_asked_again_while_a_connection_to_a_leader_that_hangs_is_still_being_made(
    platform, address
):
    """A process that was stopped accepts connections and says nothing."""
    await platform.create_topic("t", 1)
    gave_up, connections = asyncio.Event(), []

    async def say_nothing(reader, writer):
        connections.append(writer)
        while await reader.read(1024):
            pass
        gave_up.set()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as mute, Producer(address) as producer:
        platform.advertise(leader=f"127.0.0.1:{mute.sockets[0].getsockname()[1]}")
        future = await producer.send("t", b"v")
        while platform.faults.calls["get_metadata"] < 2:
            await asyncio.sleep(0.01)
        assert not gave_up.is_set()
        platform.faults.mend("get_metadata")
        assert (await future).offset == 0
    for connection in connections:
        connection.close()  # gRPC itself would take five seconds to
    await gave_up.wait()


@pytest.mark.parametrize("fault", [None, failing(errors.NotLeader("not me")), failing(errors.InvalidBatch("no"))])
async def test_an_answer_after_the_delivery_timeout_changes_nothing(platform, address, fault):
    await platform.create_topic("t", 1)
    if fault is not None:
        fault(platform)
    held = platform.faults.hold("produce")
    async with Producer(address) as producer:
        future = await producer.send("t", b"late")
        await until(lambda: platform.faults.calls["produce"] == 1)
        let_delivery_timeout_pass(producer)
        with pytest.raises(errors.Unavailable, match="delivery_timeout_ms"):
            await future
        assert producer._pool.used_bytes == 0
        held.set()
        await (await producer.send("t", b"next"))  # behind the answer to the first
        assert isinstance(future.exception(), errors.Unavailable)
        assert producer._pool.used_bytes == 0
    assert await values_in(platform) == ([b"next"] if fault else [b"late", b"next"])


async def test_flush_raises_a_failure_nobody_saw(platform, address):
    await platform.create_topic("t", 1)
    producer = Producer(address)
    platform.faults.fail("produce", errors.InvalidBatch("no"), 1)
    await producer.send_many("t", [b"v"])
    with pytest.raises(errors.InvalidBatch):
        await producer.flush()
    await producer.close()


async def test_flush_raises_a_failure_that_came_behind_one_that_was_seen(platform, address):
    await platform.create_topic("t", 2)
    async with Producer(address) as producer:
        futures = []
        for partition in range(2):
            platform.faults.fail("produce", errors.InvalidBatch(f"no {partition}"), 1)
            futures.append(await producer.send("t", b"v", partition=partition))
            await until(futures[-1].done)
        with pytest.raises(errors.InvalidBatch, match="no 0"):
            await futures[0]
        with pytest.raises(errors.InvalidBatch, match="no 1"):
            await producer.flush()
        await producer.flush()


async def test_flush_waits_for_acknowledgement(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.delay("produce", 50)
    async with Producer(address, linger_ms=10_000) as producer:
        future = await producer.send("t", b"v")
        assert not future.done()
        await producer.flush()
        assert future.result().offset == 0


async def test_flush_gives_up_after_its_timeout_and_sending_goes_on(platform, address):
    await platform.create_topic("t", 1)
    held = platform.faults.hold("produce")
    async with Producer(address) as producer:
        futures = [await producer.send("t", b"%d" % n) for n in range(3)]
        with pytest.raises(TimeoutError, match=r"3 records are not acknowledged within timeout_s = 0\.01"):
            await producer.flush(0.01)
        with pytest.raises(TimeoutError, match=r"within timeout_s = 0$"):
            await producer.flush(0)
        held.set()
        await producer.flush(PATIENCE_S)
        assert [future.result().offset for future in futures] == [0, 1, 2]


async def test_close_gives_up_after_its_timeout(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.fail("produce", errors.Overloaded("full", retry_after_ms=20), 1_000_000)
    producer = Producer(address)
    future = await producer.send("t", b"v")
    await until(lambda: has_failed(producer))
    with pytest.raises(
        TimeoutError, match=r"1 record is not acknowledged within timeout_s = 0\.01; the last error: full"
    ):
        await producer.close(0.01)
    with pytest.raises(errors.Unavailable, match="closed"):
        await future
    assert producer.unacknowledged == 0
    await producer.close()


@pytest.mark.parametrize("timeout_s", [-1, math.nan, "5", True, timedelta(seconds=1)])
async def test_a_timeout_that_is_none_is_named(platform, address, timeout_s):
    producer = Producer(address)
    for call in (producer.flush, producer.close):
        with pytest.raises(errors.InvalidArgument, match="timeout_s is") as caught:
            await call(timeout_s)
        assert caught.value.details["field"] == "timeout_s"
    await producer.close()


async def test_a_close_without_a_flush_says_how_many_records_are_dropped(platform, address, caplog):
    await platform.create_topic("t", 1)
    platform.faults.hang("produce")
    producer = Producer(address)
    for _ in range(1_200):
        await producer.send("t", b"v")
    await producer.close(flush=False)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "the producer is closed without a flush: 1,200 records are not acknowledged"
    ]


# ---- futures


async def test_the_futures_of_send_are_asyncio_futures(platform, address):
    await platform.create_topic("t", 1)
    held = platform.faults.hold("produce")
    async with Producer(address) as producer:
        sent = [await producer.send("t", b"%d" % n) for n in range(3)]
        many = await producer.send_many("t", [b"3", b"4"])
        nothing = await producer.send_many("t", [])
        assert all(isinstance(future, asyncio.Future) for future in (*sent, many, nothing))
        called = []
        sent[0].add_done_callback(lambda future: called.append(future.result().offset))
        sent[1].add_done_callback(called.append)
        assert sent[1].remove_done_callback(called.append) == 1
        done, pending = await asyncio.wait([*sent, many, nothing], timeout=0.01)
        assert done == {nothing} and pending == {*sent, many}
        with pytest.raises(asyncio.InvalidStateError):
            sent[0].result()
        held.set()
        async with asyncio.timeout(PATIENCE_S):
            done, pending = await asyncio.wait([*sent, many, nothing], return_when=asyncio.ALL_COMPLETED)
            assert done == {*sent, many, nothing} and not pending
            assert [metadata.offset for metadata in await asyncio.gather(*sent)] == [0, 1, 2]
            assert sorted([(await future).offset for future in asyncio.as_completed(sent)]) == [0, 1, 2]
            assert (await asyncio.wait_for(many, PATIENCE_S)).offsets.tolist() == [3, 4]
            assert (await asyncio.shield(nothing)).offsets.tolist() == []
        assert called == [0]


async def test_a_wait_for_a_future_can_be_given_up(platform, address):
    await platform.create_topic("t", 1)
    held = platform.faults.hold("produce")
    async with Producer(address) as producer:
        given_up, cancelled, shielded = [await producer.send("t", b"v") for _ in range(3)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(given_up, 0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(shielded), 0.01)
        assert cancelled.cancel() and cancelled.cancelled() and cancelled.done()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        task = asyncio.create_task(asyncio.wait([shielded]))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        held.set()
        assert (await shielded).offset == 2
        assert not shielded.cancel() and not shielded.cancelled()
    assert len(await values_in(platform)) == 3, "cancelling recalls nothing"


async def test_a_failure_that_only_a_callback_saw_is_raised_by_flush(platform, address):
    """And asyncio logs nothing about it."""
    await platform.create_topic("t", 1)
    problems = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context["message"]))
    producer = Producer(address)
    platform.faults.fail("produce", errors.InvalidBatch("no"), 1)
    called = asyncio.Event()
    (await producer.send("t", b"v")).add_done_callback(lambda future: called.set())
    async with asyncio.timeout(PATIENCE_S):
        await called.wait()
    gc.collect()
    with pytest.raises(errors.InvalidBatch):
        await producer.close()
    assert problems == []


async def test_a_failure_is_seen_through_gather(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        platform.faults.fail("produce", errors.InvalidBatch("no"), 1)
        outcomes = await asyncio.gather(*[await producer.send("t", b"v") for _ in range(2)], return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [errors.InvalidBatch] * 2
        platform.faults.fail("produce", errors.InvalidBatch("no"), 1)
        with pytest.raises(errors.InvalidBatch):
            await asyncio.wait_for(await producer.send_many("t", [b"v"]), PATIENCE_S)


# ---- order of calls


async def calls_until(producer, opened):
    """Sends by a task of its own, one per turn of the event loop, until `opened` and some more: whatever there is
    between two turns of those that wait, one of these comes there."""
    sends = []
    more = 50
    async with asyncio.timeout(PATIENCE_S):
        while more:
            sends.append(asyncio.create_task(producer.send("t", b"%d" % len(sends))))
            await asyncio.sleep(0)
            more -= opened()
        await asyncio.gather(*sends)
    return [b"%d" % n for n in range(len(sends))]


async def test_sends_at_first_contact_keep_the_order_of_their_calls(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        expected = await calls_until(producer, lambda: producer.knows("t", None))
    assert await values_in(platform) == expected


async def test_sends_keep_the_order_of_their_calls_when_first_contact_fails_at_first(platform, address):
    """Each call tries again by itself, the later ones sooner: their waits have not grown yet."""
    await platform.create_topic("t", 1)
    platform.faults.fail("get_metadata", errors.Unavailable("no PostgreSQL"))
    async with Producer(address) as producer:
        early = []
        for n in range(20):
            early.append(asyncio.create_task(producer.send("t", b"early %d" % n)))
            await asyncio.sleep(0.01)
        platform.faults.mend("get_metadata")
        expected = await calls_until(producer, lambda: producer.knows("t", None))
        await asyncio.gather(*early)
    assert await values_in(platform) == [b"early %d" % n for n in range(20)] + expected


async def test_sends_after_a_failed_first_contact_keep_the_order_of_their_calls(platform, address):
    async with Producer(address) as producer:
        refused = [asyncio.create_task(producer.send("t", b"no topic")) for _ in range(3)]
        outcomes = await asyncio.gather(*refused, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [errors.UnknownTopic] * 3
        await platform.create_topic("t", 1)
        expected = await calls_until(producer, lambda: producer.knows("t", None))
    assert await values_in(platform) == expected


@pytest.mark.parametrize("known", [False, True])
async def test_send_and_send_many_in_several_tasks_keep_the_order_of_their_calls(platform, address, known):
    await platform.create_topic("t", 1)
    async with Producer(address, buffer_bytes_max=1_000, batch_bytes=500) as producer:
        if known:
            await producer.open_topic("t")
        calls = []
        for n in range(0, 600, 200):  # each in several parts
            calls.append(asyncio.create_task(producer.send_many("t", [b"%d" % m for m in range(n, n + 199)])))
            calls.append(asyncio.create_task(producer.send("t", b"%d" % (n + 199))))
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*calls)
    assert await values_in(platform) == [b"%d" % n for n in range(600)]


async def test_no_send_comes_before_those_that_get_room_at_this_moment(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address, batch_bytes=1_000, buffer_bytes_max=1_000) as producer:
        first = await producer.send("t", b"1" * 600)

        async def send_once_there_is_room():
            await first
            await producer.send("t", b"3")

        third = asyncio.create_task(send_once_there_is_room())
        await asyncio.sleep(0)
        second = asyncio.create_task(producer.send("t", b"2" * 600))
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(second, third)
    assert await values_in(platform) == [b"1" * 600, b"2" * 600, b"3"]


async def test_a_send_that_was_cancelled_or_refused_holds_up_no_other(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.fail("get_metadata", errors.Unavailable("no PostgreSQL"))
    async with Producer(address) as producer:
        sends = [asyncio.create_task(producer.send("t", b"%d" % n, partition=int(n == 5))) for n in range(10)]
        await asyncio.sleep(0)
        for n in (0, 3, 9):
            sends[n].cancel()
        platform.faults.mend("get_metadata")
        async with asyncio.timeout(PATIENCE_S):
            outcomes = await asyncio.gather(*sends, return_exceptions=True)
        assert isinstance(outcomes[5], errors.UnknownPartition)
        assert not producer._order.queues
    assert await values_in(platform) == [b"%d" % n for n in (1, 2, 4, 6, 7, 8)]


async def test_a_topic_that_cannot_be_opened_holds_up_no_other_topic(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.open_topic("t")
        platform.faults.fail("get_metadata", errors.Unavailable("no PostgreSQL"))
        other = asyncio.create_task(producer.send("other", b"v"))
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await (await producer.send("t", b"v"))
        assert not other.done()
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)


# ---- room


async def test_send_waits_for_room(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.delay("produce", 5)
    async with Producer(address, batch_bytes=1000, buffer_bytes_max=4000) as producer:
        for n in range(200):
            await producer.send("t", b"%03d" % n)
            assert producer._pool.used_bytes <= 4000
        await producer.send_many("t", [b"%03d" % n for n in range(200, 600)])
        assert producer._pool.used_bytes <= 4000
    assert await values_in(platform) == [b"%03d" % n for n in range(600)]
    assert producer._pool.used_bytes == 0


async def test_no_room_within_the_delivery_timeout(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.hang("produce")
    producer = Producer(address, batch_bytes=100, buffer_bytes_max=100, delivery_timeout_ms=3_000)
    await producer.open_topic("t")
    # The first has the room until it is given up, and one of those that wait from then on: too late for the other.
    sends = [producer.send("t", b"x" * 60) for _ in range(3)]
    first, *others = await asyncio.gather(*sends, return_exceptions=True)
    with pytest.raises(errors.Unavailable, match="delivery_timeout_ms"):
        await first
    refused = [outcome for outcome in others if isinstance(outcome, errors.Overloaded)]
    assert refused and "buffer_bytes_max = 100" in refused[0].message
    await producer.close(flush=False)


async def test_calls_that_wait_for_each_other_give_up_together(platform, address):
    await platform.create_topic("t", 1)
    producer = Producer(address, batch_bytes=100, buffer_bytes_max=100, delivery_timeout_ms=3_000)
    await producer.open_topic("t")
    assert producer._pool.try_take(100)  # for good
    sends = [producer.send("t", b"v") for _ in range(1_000)]
    async with asyncio.timeout(PATIENCE_S):  # one after the other they would take an hour
        outcomes = await asyncio.gather(*sends, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {errors.Overloaded}
    producer._sender.give_back(100)
    await (await producer.send("t", b"v"))
    await producer.close()


async def test_who_gives_up_waiting_for_room_lets_the_next_one_have_it(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.hang("produce")
    producer = Producer(address, batch_bytes=1_000, buffer_bytes_max=1_000)
    await producer.send("t", b"x" * 600)
    large, small = [asyncio.create_task(producer.send("t", b"x" * size)) for size in (600, 60)]
    await until(lambda: calls_in_line(producer) == 2)
    large.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await small
    assert large.cancelled()
    await producer.close(flush=False)
    assert producer._pool.used_bytes == 0


async def test_bad_arguments(platform, address):
    await platform.create_topic("t", 2)
    async with Producer(address) as producer:
        with pytest.raises(errors.UnknownTopic):
            await producer.send("nope", b"v")
        with pytest.raises(errors.UnknownPartition):
            await producer.send("t", b"v", partition=2)
        with pytest.raises(errors.BatchTooLarge):
            await producer.send("t", b"v" * (17 << 20))
        with pytest.raises(TypeError):
            await producer.send("t", "text")
        with pytest.raises(TypeError):
            await producer.send_many("t", [b"v", "text"])
        with pytest.raises(errors.InvalidArgument):
            await producer.send_many("t", [b"v"], keys=[])
        with pytest.raises(errors.InvalidArgument):
            await producer.send("t", b"v", timestamp_ms=1 << 63)
        with pytest.raises(TypeError):
            await producer.send("t", b"v", timestamp_ms=1.5)
        with pytest.raises(errors.InvalidArgument):
            await producer.send_many("t", [b"v"], timestamps_ms=[1 << 63])
        with pytest.raises(errors.InvalidArgument, match="topic is None, must be 1 to 249 characters"):
            await producer.send(None, b"v")
    assert await values_in(platform) == []
    with pytest.raises(errors.InvalidArgument, match="linger_ms"):
        Producer(address, linger_ms=-1)
    with pytest.raises(errors.InvalidArgument, match="bootstrap"):
        Producer("nowhere")


async def test_a_refused_record_takes_no_room(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address, batch_bytes=100, buffer_bytes_max=100, delivery_timeout_ms=60_000) as producer:
        for _ in range(3):
            with pytest.raises(errors.UnknownPartition):
                await producer.send("t", b"x" * 60, partition=1)
        assert producer._pool.used_bytes == 0


@pytest.mark.parametrize("many", [False, True])
async def test_nothing_is_taken_after_closing(platform, address, many):
    await platform.create_topic("t", 1)
    producer = Producer(address)
    await (await producer.send("t", b"before"))
    await producer.close()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        await (producer.send_many("t", [b"after"]) if many else producer.send("t", b"after"))


async def test_who_waits_for_room_while_the_producer_is_closed_is_told(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.hang("produce")
    producer = Producer(address, batch_bytes=100, buffer_bytes_max=100)
    first = await producer.send("t", b"x" * 60)
    waiting = [
        asyncio.create_task(producer.send("t", b"x" * 60)),
        asyncio.create_task(producer.send_many("t", [b"x" * 60])),
    ]
    await until(lambda: calls_in_line(producer) == 2)
    await producer.close(flush=False)
    with pytest.raises(errors.Unavailable, match="closed"):
        await first
    async with asyncio.timeout(PATIENCE_S):
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.InvalidArgument] * 2
    assert producer._pool.used_bytes == 0


async def test_a_list_of_headers_may_be_used_again(platform, address):
    await platform.create_topic("t", 1)
    headers = [("n", b"0")]
    async with Producer(address, linger_ms=1_000) as producer:
        for n in range(3):
            headers[0] = ("n", b"%d" % n)
            await producer.send("t", b"v", headers=headers)
            await producer.send_many("t", [b"v"], headers=[headers])
    (batch,) = await platform.batches("t", 0)
    assert decode_batch(batch).headers.to_list() == [[("n", b"%d" % (n // 2))] for n in range(6)]


async def test_what_the_application_may_still_change_is_taken_as_it_is_now(platform, address):
    await platform.create_topic("t", 1)
    data, headers = bytearray(b"1234"), {"a": bytearray(b"x"), "b": None}
    async with Producer(address, linger_ms=1_000) as producer:
        await producer.send("t", data, key=memoryview(data)[1:3], headers=headers)
        values = [memoryview(data)[::2], bytearray(b"v"), None]
        await producer.send_many("t", values, keys=[bytearray(b"k"), b"l", None], headers=[headers, [], {}])
        data[:] = b"----"
        headers["a"][:] = b"y"
        headers["c"] = b"z"
        values.clear()
    (batch,) = await platform.batches("t", 0)
    records = decode_batch(batch)
    assert records.values.to_list() == [b"1234", b"13", b"v", None]
    assert records.keys.to_list() == [b"23", b"k", b"l", None]
    assert records.headers.to_list() == [[("a", b"x"), ("b", None)], [("a", b"x"), ("b", None)], [], []]


async def test_datetimes_are_milliseconds_of_any_time_zone(platform, address):
    await platform.create_topic("t", 1)
    moment = datetime(2024, 2, 29, 12, 0, 0, 999_999, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    expected = 1_709_188_200_999
    async with Producer(address, linger_ms=60_000) as producer:  # one batch, however slow the machine is
        future = await producer.send("t", b"v", timestamp_ms=moment)
        await producer.send_many("t", [b"v"], timestamps_ms=moment)
        await producer.send_many("t", [b"v"] * 3, timestamps_ms=[moment, 7, datetime(1969, 12, 31, tzinfo=UTC)])
        await producer.send_many("t", [b"v"] * 2, timestamps_ms=np.array([1, 2]))
        await producer.flush()
        assert (await future).timestamp_ms == expected
    (batch,) = await platform.batches("t", 0)
    assert decode_batch(batch).timestamps_ms.tolist() == [expected, expected, expected, 7, -86_400_000, 1, 2]


NAIVE = datetime(2024, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "kind", "named"),
    [
        ({"value": "text"}, TypeError, r"value must be bytes, bytearray, memoryview or None, not 'text' \(str\)"),
        ({"key": 5}, TypeError, r"key must be bytes.* not 5 \(int\)"),
        ({"headers": {"a": "1"}}, TypeError, r"headers\['a'\] must be bytes.* not '1' \(str\)"),
        ({"headers": {5: b"1"}}, TypeError, r"headers must have names of text, not 5 \(int\)"),
        ({"headers": "ab"}, TypeError, r"headers must be a dict or a list of \(name, value\) pairs, not 'ab' \(str\)"),
        ({"headers": [("a",)]}, TypeError, r"headers must hold \(name, value\) pairs, not \('a',\)"),
        ({"headers": 5}, TypeError, r"headers must be a dict or .* not 5 \(int\)"),
        ({"headers": [("a", b"")] * 257}, errors.InvalidArgument, r"headers holds 257 headers, a record may have 256"),
        ({"headers": {"\ud800": b""}}, errors.InvalidArgument, r"headers has the name '\\ud800', which is no text"),
        ({"timestamp_ms": 1.5}, TypeError, r"timestamp_ms must be milliseconds since 1970 or a datetime, not 1\.5"),
        (
            {"timestamp_ms": -(1 << 63)},
            errors.InvalidArgument,
            r"timestamp_ms is -9223372036854775808, must be -62135596800000 to 253402300799999, the years 1 to 9999",
        ),
        ({"timestamp_ms": NAIVE}, errors.InvalidArgument, r"timestamp_ms is datetime.*without a time zone"),
        (
            {"partition": "0"},
            errors.InvalidArgument,
            r"partition is '0', must be a whole number \(int\), 0 to 4294967295",
        ),
        ({"partition": 1}, errors.UnknownPartition, r"topic 't' has partitions 0 to 0, not 1"),
        ({"value": bytearray(17 << 20)}, errors.BatchTooLarge, r"value has 17825792 bytes, a record may have 16711680"),
    ],
)
async def test_a_bad_record_is_named_with_field_limit_and_value(platform, address, arguments, kind, named):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        with pytest.raises(kind, match=named):
            await producer.send("t", **{"value": b"v"} | arguments)
    assert await values_in(platform) == []


@pytest.mark.parametrize(
    ("columns", "kind", "named"),
    [
        ({"values": "abc"}, TypeError, r"values must be a list, one entry per record, not 'abc' \(str\)"),
        ({"values": b"abc"}, TypeError, r"values must be a list.* not b'abc' \(bytes\)"),
        ({"values": iter([b"v"])}, TypeError, r"values must be a list.*\(list_iterator\)"),
        ({"values": 5}, TypeError, r"values must be a list.* not 5 \(int\)"),
        ({"values": [b"v", "w"]}, TypeError, r"values\[1\] must be bytes.* not 'w' \(str\)"),
        ({"keys": [b"k"]}, errors.InvalidArgument, r"keys has 1 entries for 2 values"),
        ({"keys": [b"k", 5]}, TypeError, r"keys\[1\] must be bytes.* not 5 \(int\)"),
        ({"headers": [("a", b"1"), ("b", b"2")]}, TypeError, r"headers\[0\] must hold \(name, value\) pairs, not 'a'"),
        ({"timestamps_ms": [1]}, errors.InvalidArgument, r"timestamps_ms has 1 entries for 2 values"),
        ({"timestamps_ms": [1, None]}, TypeError, r"timestamps_ms\[1\] must be milliseconds since 1970 or a datetime"),
        ({"timestamps_ms": [1, NAIVE]}, errors.InvalidArgument, r"timestamps_ms\[1\] is datetime.*without a time zone"),
        (
            {"timestamps_ms": [1, 1 << 63]},
            errors.InvalidArgument,
            r"timestamps_ms\[1\] is 9223372036854775808, must be",
        ),
        (
            {"timestamps_ms": [1, -(1 << 63)]},
            errors.InvalidArgument,
            r"timestamps_ms\[1\] is -9223372036854775808, must be -62135596800000 to 253402300799999",
        ),
        (
            {"timestamps_ms": np.array([253_402_300_800_000, 2])},
            errors.InvalidArgument,
            r"timestamps_ms\[0\] is 253402300800000, must be",
        ),
        ({"timestamps_ms": np.array([1.0, 2.0])}, TypeError, r"timestamps_ms\[0\] must be milliseconds"),
        (
            {"partition": 1.0},
            errors.InvalidArgument,
            r"partition is 1\.0, must be a whole number \(int\), 0 to 4294967295",
        ),
    ],
)
async def test_a_bad_list_of_records_is_named_with_field_and_position(platform, address, columns, kind, named):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        with pytest.raises(kind, match=named):
            await producer.send_many("t", **({"values": [b"v", b"w"]} | columns))
    assert await values_in(platform) == []


async def test_acks_below_the_topics_minimum(platform, address):
    await platform.create_topic("t", 1, min_acks=types_pb2.ACKS_DURABLE)
    async with Producer(address, acks="wal") as producer:
        with pytest.raises(errors.AcksTooWeak, match="acks durable at least, not wal"):
            await producer.send("t", b"v")


async def test_acks_none_has_no_offset(platform, address):
    await platform.create_topic("t", 1, min_acks=types_pb2.ACKS_NONE)
    async with Producer(address, acks="none") as producer:
        assert (await (await producer.send("t", b"v"))).offset == -1
        assert (await (await producer.send_many("t", [b"v", b"w"]))).offsets.tolist() == [-1, -1]


async def test_without_idempotence_order_still_holds(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.fail("produce", errors.Overloaded("full", retry_after_ms=20), 3)
    async with Producer(address, idempotent=False, batch_bytes=100, linger_ms=0) as producer:
        for n in range(100):
            await producer.send("t", b"%d" % n)
    assert await values_in(platform) == [b"%d" % n for n in range(100)]
    assert platform.faults.calls["init_producer"] == 0


async def test_nulls_headers_and_negative_timestamps_arrive(platform, address):
    from shformat import decode_batch

    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send("t", None, key=b"", headers=[("h", b"1"), ("h", None)], timestamp_ms=-5)
        await producer.send("t", b"", key=None)
        await producer.send_many("t", [b"a", None], keys=[None, b"k"], headers=[[], [("x", b"")]], timestamps_ms=9)
    records = decode_batch((await platform.batches("t", 0))[0])
    assert records.values.to_list() == [None, b"", b"a", None]
    assert records.keys.to_list() == [b"", None, None, b"k"]
    assert records.headers.to_list() == [[("h", b"1"), ("h", None)], [], [], [("x", b"")]]
    assert records.timestamps_ms.tolist()[0] == -5


async def test_a_topic_deleted_while_sending(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address, delivery_timeout_ms=20_000) as producer:
        await (await producer.send("t", b"v"))
        await platform.delete_topic("t")
        future = await producer.send("t", b"w")
        with pytest.raises(errors.UnknownTopic):
            await future


async def test_nothing_is_left_running(platform, address):
    await platform.create_topic("t", 2)
    before, problems = asyncio.all_tasks(), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context["message"]))
    async with Producer(address, batch_bytes=200, linger_ms=0) as producer:
        for fault in (cut(1), cut(), failing(errors.NotLeader("not me"))):
            fault(platform)
            futures = [await producer.send("t", b"%d" % n, partition=n % 2) for n in range(50)]
            await asyncio.gather(*futures)
        await platform.stop_listening()
        future = await producer.send("t", b"v")
        await until(lambda: has_failed(producer))
        await platform.listen_again()
        await future
    gc.collect()
    assert [problem for problem in problems if "destroyed" in problem] == []
    left = {task.get_coro().__qualname__ for task in asyncio.all_tasks() - before}
    owners = tuple(f"{kind.__name__}." for kind in (Sender, LeaderConnection, MetadataCache))  # a rename must not pass
    ours = {name for name in left if name.startswith((*owners, "_StreamRequestMixin."))}
    assert ours == set()


async def test_the_server_restarts(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address, linger_ms=0) as producer:
        await (await producer.send("t", b"0"))
        await platform.stop_listening()
        future = await producer.send("t", b"1")
        await until(lambda: has_failed(producer))
        await platform.listen_again()
        assert (await future).offset == 1
    assert await values_in(platform) == [b"0", b"1"]


async def test_a_cancelled_body_does_not_wait_for_a_flush(platform, address):
    await platform.create_topic("t", 1)
    platform.faults.hang("produce")

    async def work():
        async with Producer(address) as producer:
            await producer.send("t", b"v")
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await until(lambda: platform.faults.calls["produce"] == 1)
    task.cancel()
    async with asyncio.timeout(PATIENCE_S):  # a flush would take delivery_timeout_ms, twice as long
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def test_the_event_loop_has_its_turns_though_every_send_finds_room(platform, address):
    """Batches leave, and other tasks go on, while the application does nothing but `await send(...)`."""
    await platform.create_topic("t", 1)
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async with Producer(address) as producer:
        await (await producer.send("t", b"opens the topic"))
        ticker = asyncio.create_task(tick())
        first = await producer.send("t", b"x")
        for _ in range(500_000):
            if first.done():
                break
            await producer.send("t", b"x")
        assert first.done()
        assert ticks > 1
        ticker.cancel()


async def test_a_wait_for_less_than_a_tick_of_the_clock_lasts_a_tick(platform, address):
    """A rest of a back-off that rounding leaves is over by no clock's next reading: its timer fired again and again."""
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_and_wait("t", b"0")
        queue, sender = producer._accumulator.queue("t", 0), producer._sender
        now_ms = sender._now_ms()
        sender._retry_later(queue, 1e-10)
        assert queue.blocked_until_ms - now_ms >= 1
        assert sender._timers[queue].when() * 1000 > now_ms
        await producer.send_and_wait("t", b"1")
