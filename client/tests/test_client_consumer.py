"""The consumer against a platform in memory, on a real gRPC server."""

import asyncio
import random
from contextlib import AsyncExitStack, aclosing
from datetime import UTC, datetime

import numpy as np
import pytest
from shformat import read_batch_header
from shproto.v1 import coordinator_pb2, query_pb2
from streamhouse import Admin, Consumer, OffsetAndMetadata, Producer, Record, errors
from streamhouse.consumer import POLL_CHECKS
from streamhouse.core.options import ConsumerOptions
from streamhouse.core.positions import Cursor, Position
from streamhouse.membership import Membership
from streamhouse.records import TopicPartition

from tests.platform.cluster import Cluster, QueryServer

# Until what must come is given up: no duration is what is tested, and the machine may be busy.
PATIENCE_S = 60


@pytest.fixture
async def narrow(tmp_path):
    """A cluster whose epochs have a thousand offsets each."""
    async with Cluster(tmp_path, range_width_offsets=1_000) as cluster:
        yield cluster


async def fill(platform, address, count, partitions=3, topic="t", acks="wal"):
    """`count` numbered records, keyed, with timestamps 0, 1, 2, ..."""
    if not platform.has_topic(topic):
        await platform.create_topic(topic, partitions)
    async with Producer(address, batch_bytes=1000, acks=acks) as producer:
        values = [b"%d" % n for n in range(count)]
        await producer.send_many(
            topic, values, keys=[b"k%d" % (n % 13) for n in range(count)], timestamps_ms=range(count)
        )


async def take(consumer, count):
    records = []
    async with asyncio.timeout(PATIENCE_S):
        async for record in consumer:
            records.append(record)
            if len(records) == count:
                break
    return records


def by_partition(records):
    rows: dict[int, list[Record]] = {}
    for record in records:
        rows.setdefault(record.partition, []).append(record)
    return rows


async def test_reads_every_record_once_and_in_order(platform, address):
    await fill(platform, address, 5000)
    async with Consumer(address, ["t"]) as consumer:
        records = await take(consumer, 5000)
    assert sorted(int(record.value) for record in records) == list(range(5000))
    for rows in by_partition(records).values():
        assert [row.offset for row in rows] == list(range(len(rows)))
        assert [int(row.value) for row in rows] == sorted(int(row.value) for row in rows)
    first = records[0]
    assert (first.topic, first.key, first.headers) == ("t", b"k%d" % (int(first.value) % 13), ())
    assert first.timestamp_ms == int(first.value)


def received(consumer, monkeypatch, measure):
    """Returns the list to which `measure(reader)` is added whenever a batch was received."""
    measured, accept = [], consumer._reader._accept

    def noted(cursor, encoded):
        accept(cursor, encoded)
        measured.append(measure(consumer._reader))

    monkeypatch.setattr(consumer._reader, "_accept", noted)
    return measured


async def test_records_without_bytes_fill_the_prefetch_too(platform, address, monkeypatch):
    """Null keys and values cost their offsets and timestamps all the same."""
    await platform.create_topic("t", 1)
    count, per_batch = 100_000, 1_000
    async with Producer(address, batch_bytes=per_batch * 32) as producer:
        await producer.send_many("t", [None] * count)
    consumer = Consumer(address, ["t"], fetch_bytes=1, prefetch_bytes_max=per_batch * 32, stop_at_end=True)
    ahead = received(consumer, monkeypatch, lambda reader: sum(len(portion.batch) for portion in reader._received))
    seen = 0
    async with consumer:
        await until(lambda: ahead)
        async for _ in consumer:
            seen += 1
            if seen % 100 == 0:
                await asyncio.sleep(0.001)  # a reader without a limit would run ahead
    assert seen == count
    assert per_batch <= max(ahead) <= 2 * per_batch


async def without_windows(requests, subscribe):
    """A query service of before there were windows."""

    async def known():
        async for request in requests:
            for position in request.positions:
                position.ClearField("window_bytes")
            if request.positions:
                yield request

    async with aclosing(subscribe(known())) as responses:
        async for response in responses:
            yield response


@pytest.mark.parametrize("windows_unknown", [False, True])
async def test_what_is_prefetched_is_bounded_by_what_it_takes_decoded(platform, address, windows_unknown, monkeypatch):
    """Of data that compresses well, four thousand times that is in one response. Also with a query service that knows
    nothing of windows."""
    await platform.create_topic("t", 2)
    if windows_unknown:
        platform.faults.wrap("subscribe", without_windows)
    mib = 1 << 20
    async with Producer(address) as producer:
        for partition in (0, 1):
            for _ in range(10):
                await producer.send_many("t", [bytes(mib // 4)] * 8, partition=partition)
    consumer = Consumer(address, ["t"], prefetch_bytes_max=4 * mib, stop_at_end=True)
    ahead = received(consumer, monkeypatch, lambda reader: reader._received_bytes)
    count = 0
    async with consumer:
        await until(lambda: ahead and max(ahead) > 2 * mib)
        async for record in consumer:
            count += len(record.value)
            await asyncio.sleep(0.001)  # a reader without a limit would run ahead
    assert count == 2 * 10 * 2 * mib
    assert max(ahead) <= 5 * mib


@pytest.mark.parametrize("same", [False, True])
async def test_a_new_record_of_a_quiet_partition_does_not_wait_behind_the_backlog_of_another(platform, address, same):
    """Nor behind what was fetched of it already."""
    await platform.create_topic("t", 2)
    async with Producer(address) as producer:
        for _ in range(30):
            await producer.send_many("t", [b"same" * 50 if same else random.randbytes(200)] * 2_000, partition=0)
        await producer.flush()
        async with Consumer(address, ["t"], prefetch_bytes_max=8 << 20) as consumer:
            behind, sent = 0, False
            async for record in consumer:
                if record.partition == 1:
                    break
                if sent:
                    behind += 1
                await asyncio.sleep(0.001)
                if not sent and record.offset == 50:
                    await until(lambda: consumer._reader._received_bytes > 2 << 20)
                    await (await producer.send("t", b"quiet", partition=1))
                    sent = True
    assert sent and behind < 1_000  # a few turns, on a slow machine; in the backlog there are 60,000


@pytest.mark.long
async def test_a_slow_application_reads_all_of_its_partitions(platform, address):
    await fill(platform, address, 20_000, partitions=6)
    seen = set()
    async with Consumer(address, ["t"]) as consumer:
        for _ in range(300):
            seen.add((await anext(consumer)).partition)
            await asyncio.sleep(0.001)
            if len(seen) == 6:
                break
    assert seen == set(range(6))


async def test_a_query_service_that_sends_beyond_a_window_is_borne(platform, address):
    platform.faults.wrap("subscribe", without_windows)
    await fill(platform, address, 5_000)
    async with Consumer(address, ["t"], prefetch_bytes_max=2_000, stop_at_end=True) as consumer:
        assert len([record async for record in consumer]) == 5_000


@pytest.mark.long
async def test_more_partitions_than_the_prefetch_has_room_for(platform, address):
    await fill(platform, address, 20_000, partitions=40)
    async with Consumer(address, ["t"], prefetch_bytes_max=10_000, fetch_bytes=500, stop_at_end=True) as consumer:
        records = [record async for record in consumer]
    assert sorted(int(record.value) for record in records) == list(range(20_000))


async def test_batches_are_columns(platform, address):
    await fill(platform, address, 2000)
    seen = 0
    async with Consumer(address, ["t"]) as consumer, aclosing(consumer.batches()) as batches:
        async for batch in batches:
            assert batch.offsets.tolist() == [record.offset for record in batch]
            table = batch.to_arrow()
            assert table.column("value").to_pylist() == batch.values.to_list()
            assert table.column("offset").to_pylist() == batch.offsets.tolist()
            assert table.column("key").to_pylist() == batch.keys.to_list()
            seen += len(batch)
            if seen == 2000:
                break


async def test_stop_at_end_ends_where_the_log_ended(platform, address):
    await fill(platform, address, 1000)
    await platform.create_topic("empty", 2)
    async with Consumer(address, ["t", "empty"], stop_at_end=True, fetch_bytes=500) as consumer:
        assert len([record async for record in consumer]) == 1000
        await fill(platform, address, 100)
        assert len([record async for record in consumer]) == 100
        assert [record async for record in consumer] == []


async def test_stop_at_end_does_not_read_beyond(platform, address):
    await fill(platform, address, 100, partitions=1)
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        records = []
        async for record in consumer:
            if not records:
                await fill(platform, address, 50)
            records.append(record)
        assert [record.offset for record in records] == list(range(100))
        assert consumer.positions() == {("t", 0): 100}


@pytest.mark.parametrize(
    ("start", "first"),
    [
        ("earliest", 0),
        (7, 7),
        (datetime.fromtimestamp(0.042, UTC), 42),
        ("latest", 100),
        (-5, 95),
        (-100, 0),
        (-101, 0),
    ],
)
async def test_where_it_starts(platform, address, start, first):
    await fill(platform, address, 100, partitions=1)
    async with Consumer(address, ["t"], start=start) as consumer:
        await fill(platform, address, 10)
        assert (await take(consumer, 1))[0].offset == first


@pytest.mark.parametrize(
    ("start", "end", "wanted"),
    [
        (10, 20, range(10, 20)),
        (0, 1, range(1)),
        (10, 10, []),
        ("earliest", datetime.fromtimestamp(0.03, UTC), range(30)),
        (datetime.fromtimestamp(0.02, UTC), datetime.fromtimestamp(0.03, UTC), range(20, 30)),
        (datetime.fromtimestamp(0.03, UTC), datetime.fromtimestamp(0.02, UTC), []),
        (-30, 80, range(70, 80)),
        (-10, 80, []),
        (90, datetime.fromtimestamp(5, UTC), range(90, 100)),
    ],
)
@pytest.mark.parametrize("stop_at_end", [False, True])
async def test_a_bounded_read_is_from_the_start_to_before_the_end(platform, address, start, end, wanted, stop_at_end):
    await fill(platform, address, 100, partitions=1)
    async with Consumer(address, ["t"], start=start, end=end, stop_at_end=stop_at_end) as consumer:
        async with asyncio.timeout(PATIENCE_S):
            assert [record.offset async for record in consumer] == list(wanted)
            assert consumer.at_end
            await fill(platform, address, 100)
            assert [record async for record in consumer] == [], "it stays the end"
            if wanted:
                await consumer.seek("t", 0, wanted[0])
                assert not consumer.at_end
                assert [record.offset async for record in consumer] == list(wanted)


async def test_an_end_beyond_the_log_is_waited_for_or_not_as_asked(platform, address):
    await fill(platform, address, 100, partitions=1)
    async with Consumer(address, ["t"], end=150, stop_at_end=True) as consumer:
        assert len([record async for record in consumer]) == 100
    async with Consumer(address, ["t"], end=150, group="g") as consumer:
        assert len(await take(consumer, 100)) == 100
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(consumer)
        await fill(platform, address, 100)
        assert [record.offset async for record in consumer] == list(range(100, 150))
    assert platform.group("g").offsets == {("t", 0): 150}


async def test_an_end_between_two_epochs_is_reached_with_the_last_record_before(narrow):
    await fill(narrow, narrow.address, 10, partitions=1)
    await narrow.change_leader("t")
    await fill(narrow, narrow.address, 10, partitions=1)
    for end, count in ((10, 10), (11, 10), (1000, 10), (1001, 11)):
        async with Consumer(narrow.address, ["t"], end=end) as consumer, asyncio.timeout(PATIENCE_S):
            assert len([record async for record in consumer]) == count


async def test_assign_and_seek(platform, address):
    await fill(platform, address, 1000)
    async with Consumer(address, assign=[("t", 1)]) as consumer:
        assert consumer.assignment == {("t", 1)}
        await take(consumer, 50)
        await consumer.seek("t", 1, 10)
        assert consumer.positions() == {("t", 1): 10}
        assert [record.offset for record in await take(consumer, 3)] == [10, 11, 12]
        await consumer.seek("t", 1, "earliest")
        assert (await take(consumer, 1))[0].offset == 0
        with pytest.raises(errors.InvalidArgument):
            await consumer.seek("t", 0, 0)


async def test_a_seek_takes_an_offset_of_a_batch_and_refuses_what_is_none(platform, address):
    """An offset of numpy was taken for a time in milliseconds: reading went on at the earliest record."""
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_many("t", [b"v"] * 100)
    async with Consumer(address, ["t"]) as consumer:
        batch = await anext(consumer.batches())
        await consumer.seek("t", 0, batch.offsets[42])
        assert consumer.positions() == {("t", 0): 42}
        assert (await take(consumer, 1))[0].offset == 42
        for wrong in (-1, 1.5, True, None, "end", 1 << 63):
            with pytest.raises(errors.InvalidArgument, match="offset is"):
                await consumer.seek("t", 0, wrong)
        with pytest.raises(errors.InvalidArgument, match="without a time zone"):
            await consumer.seek("t", 0, datetime(2020, 1, 1))
        assert consumer.positions() == {("t", 0): 43}


async def test_a_seek_moves_no_partition_of_a_topic_created_again_meanwhile(platform, address):
    """The offset found is one of the topic that is gone."""
    await fill(platform, address, 100, partitions=1)
    async with Consumer(address, ["t"]) as consumer:
        platform.faults.fail("lookup_offsets", errors.Overloaded("too many calls", retry_after_ms=1), 3)
        seeking = asyncio.create_task(consumer.seek("t", 0, "latest"))
        await until(lambda: platform.faults.failing("lookup_offsets") < 3)
        consumer._reader.put(Cursor.at(TopicPartition("t", 0), 0, topic_id=b"another"))
        with pytest.raises(errors.InvalidArgument, match="t/0 was taken away meanwhile"):
            await seeking
        assert consumer.positions() == {("t", 0): 0}


async def test_the_last_records_of_each_partition_are_counted_over_epochs(narrow):
    await narrow.create_topic("t", 2)
    for counts in ((10, 5), (0, 5)):
        async with Producer(narrow.address) as producer:
            for partition, count in enumerate(counts):
                await producer.send_many("t", [b"v"] * count, partition=partition)
        await narrow.change_leader("t")
    async with Consumer(narrow.address, ["t"], start=-7, stop_at_end=True) as consumer:
        rows = by_partition([record async for record in consumer])
    assert [[record.offset for record in rows[number]] for number in range(2)] == [
        list(range(3, 10)),
        [3, 4, *range(1000, 1005)],
    ]


async def test_seeking_to_the_ends_and_to_a_time(platform, address):
    await fill(platform, address, 1000)
    ends = {("t", number): await platform.end("t", number) for number in range(3)}
    consumer = Consumer(address, ["t"])
    await consumer.seek_to_end()  # starts it
    async with consumer:
        assert consumer.positions() == ends
        await consumer.seek_to_beginning([("t", 1)])
        assert consumer.positions() == {**ends, ("t", 1): 0}
        await consumer.seek_to_timestamp(500, [("t", 0), ("t", 1)])
        assert consumer.positions()["t", 2] == ends["t", 2]
        firsts = {record.partition: record.timestamp_ms for record in reversed(await take(consumer, 300))}
        await consumer.seek_to_timestamp(datetime.fromtimestamp(0.5, UTC))
        assert {*firsts} == {0, 1} and all(500 <= first < 540 for first in firsts.values())
        await consumer.seek_to_timestamp(1000)
        assert consumer.positions() == ends
        await consumer.seek_to_beginning()
        assert len(await take(consumer, 1000)) == 1000
        await consumer.seek_to_end([])
        for moment in (1.5, True, datetime(2020, 1, 1)):
            with pytest.raises(errors.InvalidArgument, match="timestamp_ms"):
                await consumer.seek_to_timestamp(moment)
        with pytest.raises(errors.InvalidArgument, match="t/3 is not assigned"):
            await consumer.seek_to_beginning([("t", 0), ("t", 3)])
        assert consumer.positions() == ends


async def test_records_then_batches_leave_nothing_out(platform, address):
    await fill(platform, address, 300, partitions=1)
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        offsets = [record.offset for record in await take(consumer, 10)]
        async for batch in consumer.batches():
            offsets += batch.offsets.tolist()
    assert offsets == list(range(300))


async def test_a_broken_stream_resumes_where_it_was(platform, address):
    await fill(platform, address, 3000)
    platform.faults.cut("subscribe", 2)
    async with Consumer(address, ["t"], fetch_bytes=2000, stop_at_end=True) as consumer:
        records = [record async for record in consumer]
    assert sorted(int(record.value) for record in records) == list(range(3000))
    assert platform.faults.calls["subscribe"] >= 2


async def test_consumers_spread_over_the_query_services_and_leave_those_that_end(platform, address):
    await fill(platform, address, 10, 1)
    async with QueryServer(platform) as other, AsyncExitStack() as consumers:
        reading = [await consumers.enter_async_context(Consumer(address, ["t"], start="earliest")) for _ in range(20)]
        for consumer in reading:
            assert len(await take(consumer, 10)) == 10
        assert platform.faults.calls["subscribe"] and other.faults.calls["subscribe"]
        assert platform.faults.calls["subscribe"] + other.faults.calls["subscribe"] == 20
        await other.stop()
        await fill(platform, address, 10, 1)
        for consumer in reading:
            assert len(await take(consumer, 10)) == 10


async def test_a_gap_between_epochs_is_stepped_over(platform, address):
    await fill(platform, address, 100, partitions=1)
    await platform.change_leader("t")
    await fill(platform, address, 50)
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        offsets = [record.offset async for record in consumer]
        assert offsets == [*range(100), *range(1 << 30, (1 << 30) + 50)]
        lag = (await consumer.lag())["t", 0]
        assert (lag.records, lag.exact) == (0, True)
        await consumer.seek("t", 0, 40)
        lag = (await consumer.lag())["t", 0]
        assert lag.records >= 110 and lag.records <= 150 and not lag.exact


async def test_a_skip_that_nobody_explains_is_an_error(platform, address):
    await fill(platform, address, 1000, partitions=1)
    second = (await platform.batches("t"))[1]

    def skip(request, response):
        response.batches[:] = [batch for batch in response.batches if batch != second]

    platform.faults.change("subscribe", skip)
    async with Consumer(address, ["t"]) as consumer:
        with pytest.raises(errors.DataLoss, match="without saying why"):
            await take(consumer, 1000)


async def test_offsets_that_go_back_are_an_error(platform, address):
    await fill(platform, address, 200, partitions=1)
    first = (await platform.batches("t"))[0]

    def go_back(request, response):
        response.batches[:] = [first, first]

    platform.faults.change("subscribe", go_back)
    async with Consumer(address, ["t"]) as consumer:
        with pytest.raises(errors.Internal, match="went back"):
            await take(consumer, 200)


async def test_damaged_bytes_are_data_loss(platform, address):
    await fill(platform, address, 200, partitions=1)

    def damage(request, response):
        response.batches[:] = [batch[:-1] + bytes([batch[-1] ^ 1]) for batch in response.batches]

    platform.faults.change("subscribe", damage)
    async with Consumer(address, ["t"]) as consumer:
        with pytest.raises(errors.DataLoss, match="t/0"):
            await take(consumer, 1)


async def test_data_loss_is_raised_or_skipped_as_asked(platform, address):
    await fill(platform, address, 300, partitions=1)
    end = read_batch_header((await platform.batches("t"))[0]).end_offset
    loss = errors.DataLoss("gone", topic="t", partition=0, base_offset=0, end_offset=end)
    platform.faults.fail_partition(loss)
    async with Consumer(address, ["t"]) as consumer:
        with pytest.raises(errors.DataLoss, match="gone"):
            await take(consumer, 1)
        assert (await take(consumer, 1))[0].offset == 0  # asked again
    platform.faults.fail_partition(loss)
    async with Consumer(address, ["t"], on_data_loss="skip") as consumer:
        assert (await take(consumer, 1))[0].offset == end


async def test_offsets_out_of_range(platform, address):
    await fill(platform, address, 300, partitions=1, acks="durable")
    await platform.delete_records("t", 0, 100)
    async with Consumer(address, ["t"], start=5) as consumer:
        with pytest.raises(errors.OffsetBelowStart):
            await take(consumer, 1)
    async with Consumer(address, ["t"], start=5, on_out_of_range="earliest") as consumer:
        assert (await take(consumer, 1))[0].offset == 100
    async with Consumer(address, ["t"], start=500) as consumer:
        with pytest.raises(errors.OffsetBeyondEnd):
            await take(consumer, 1)
    async with Consumer(address, ["t"], start=500, on_out_of_range="latest") as consumer:
        await asyncio.sleep(0.2)
        await fill(platform, address, 1)
        assert (await take(consumer, 1))[0].offset == 300


async def test_a_bounded_read_from_beyond_the_end_is_out_of_range_too(platform, address):
    await fill(platform, address, 300, partitions=1)
    async with Consumer(address, ["t"], start=500, stop_at_end=True) as consumer:
        with pytest.raises(errors.OffsetBeyondEnd):
            [record async for record in consumer]
        await consumer.seek("t", 0, 300)
        assert [record async for record in consumer] == []
        await consumer.seek("t", 0, 301)
        with pytest.raises(errors.OffsetBeyondEnd):
            [batch async for batch in consumer.batches()]
    async with Consumer(address, ["t"], start=500, stop_at_end=True, on_out_of_range="latest") as consumer:
        assert [record async for record in consumer] == []
        assert consumer.positions() == {("t", 0): 300}
    async with Consumer(address, ["t"], start=500, stop_at_end=True, on_out_of_range="earliest") as consumer:
        assert [record.offset async for record in consumer] == list(range(300))


@pytest.mark.parametrize("more", [0, 5])
async def test_an_end_that_was_out_of_date_does_not_refuse_a_bounded_read(platform, address, more):
    await fill(platform, address, 300, partitions=1)

    def behind(request, answer):
        """As by a query service that has yet to hear of the last records."""
        for lookup, found in zip(request.lookups, answer.offsets, strict=True):
            found.offset -= 100 if lookup.spec == query_pb2.OFFSET_SPEC_LATEST else 0

    platform.faults.change("lookup_offsets", behind)
    async with Consumer(address, ["t"], start=300 - more, stop_at_end=True) as consumer:
        assert [record async for record in consumer] == []
        assert consumer.positions() == {("t", 0): 300 - more}


async def test_headers_are_a_tuple_with_and_without_any(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send("t", b"bare batch", partition=0)
        await producer.flush()
        await producer.send("t", b"bare", partition=0)
        await producer.send("t", b"dressed", headers=[("a", b"1"), ("b", None)], partition=0)
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        assert [record.headers async for record in consumer] == [(), (), (("a", b"1"), ("b", None))]


def waiting_for(reason):
    def change(request, response):
        response.waiting_reason = reason

    return change


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("t/0 has no leader: epoch 1 ended at 0", "t/0 waits at offset 0: it has no leader: epoch 1 ended at 0"),
        ("t/0: epoch 1 of agent a is orphaned", "t/0 waits at offset 0: epoch 1 of agent a is orphaned"),
        ("epoch 1 is unsettled", "t/0 waits at offset 0: epoch 1 is unsettled"),
    ],
)
async def test_a_line_about_a_waiting_partition_names_it_once(platform, address, caplog, reason, line):
    await platform.create_topic("t", 1)
    platform.faults.change("subscribe", waiting_for(reason))
    async with Consumer(address, ["t"], start="earliest") as consumer:
        await until(lambda: consumer.waiting)
    assert line in caplog.messages


async def test_waiting_is_surfaced(platform, address):
    await fill(platform, address, 10, partitions=1)
    platform.faults.change("subscribe", waiting_for("epoch 1 is unsettled"))
    async with Consumer(address, ["t"]) as consumer:
        await take(consumer, 10)
        assert consumer.waiting == {("t", 0): "epoch 1 is unsettled"}
        platform.faults.mend("subscribe")
        await fill(platform, address, 1)
        await take(consumer, 1)
        assert consumer.waiting == {}


async def test_unknown_topic_and_bad_arguments(platform, address):
    with pytest.raises(errors.UnknownTopic):
        async with Consumer(address, ["nope"]):
            pass
    await platform.create_topic("t", 1)
    with pytest.raises(errors.UnknownPartition):
        async with Consumer(address, assign=[("t", 1)]):
            pass
    with pytest.raises(errors.InvalidArgument):
        Consumer(address, "t")
    with pytest.raises(errors.InvalidArgument, match="reads nothing"):
        await Consumer(address).start()
    with pytest.raises(errors.InvalidArgument, match="on_data_loss"):
        Consumer(address, ["t"], on_data_loss="shrug")
    async with Consumer(address, ["t"]) as consumer:
        with pytest.raises(errors.InvalidArgument):
            await consumer.commit()


@pytest.mark.long
@pytest.mark.parametrize("group", [None, "g"])
async def test_iterating_again_after_a_start_that_failed_or_was_cancelled(platform, address, group):
    await fill(platform, address, 10, partitions=1)
    consumer = Consumer(address, ["t"], group=group, retry_timeout_ms=5_000)
    platform.faults.fail("get_metadata", errors.Unavailable("no PostgreSQL"))
    with pytest.raises(errors.Unavailable):
        await anext(consumer)
    platform.faults.mend("get_metadata")
    starting = asyncio.create_task(consumer.start())
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert starting.cancelled()
    first, second = asyncio.create_task(consumer.start()), asyncio.create_task(consumer.start())
    await asyncio.gather(first, second)
    assert len(platform.group("g").members) == (group is not None)
    assert len(await take(consumer, 10)) == 10
    await consumer.close()
    assert platform.group("g").members == frozenset()
    with pytest.raises(StopAsyncIteration):
        await anext(consumer)


async def test_a_topic_deleted_while_reading(platform, address):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, ["t"]) as consumer:
        await take(consumer, 10)
        await platform.delete_topic("t")
        with pytest.raises(errors.UnknownTopic):
            await take(consumer, 1)


# ---- groups


@pytest.mark.parametrize("auto_commit", [False, True])
async def test_a_member_that_begins_at_the_end_has_begun_when_start_returns(platform, address, auto_commit):
    """And where that was is kept, for whoever reads the partition next: what comes now is the group's to read."""
    await fill(platform, address, 30, partitions=3)
    ends = {("t", number): await platform.end("t", number) for number in range(3)}
    async with Consumer(address, ["t"], group="g", start="latest", auto_commit=auto_commit) as consumer:
        assert platform.group("g").offsets == ends == consumer.positions()
        await fill(platform, address, 30)
        assert {record.offset - ends["t", record.partition] for record in await take(consumer, 30)} >= {0, 1}
    async with Consumer(address, ["t"], group="g", start="latest") as consumer:
        assert consumer.positions() == ({where: await platform.end(*where) for where in ends} if auto_commit else ends)


async def test_a_group_that_begins_before_the_end_keeps_where_that_was(platform, address):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, ["t"], group="g", start=-4, auto_commit=False):
        assert platform.group("g").offsets == {("t", 0): 6}


async def test_a_consumer_of_given_partitions_keeps_where_the_end_was_too(platform, address):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, assign=[("t", 0)], group="g", start="latest", auto_commit=False):
        assert platform.group("g").offsets == {("t", 0): 10}


async def test_a_member_that_cannot_find_out_where_to_begin_says_so(platform, address):
    await fill(platform, address, 10, partitions=1)
    platform.faults.fail("lookup_offsets", errors.Unavailable("no leader answers"))
    consumer = Consumer(address, ["t"], group="g", retry_timeout_ms=3_000)
    with pytest.raises(errors.Unavailable, match="no leader answers"):
        await consumer.start()
    platform.faults.mend("lookup_offsets")
    assert len(await take(consumer, 10)) == 10  # it has gone on trying
    await consumer.close()


async def test_a_last_commit_that_is_refused_is_raised(platform, address):
    await fill(platform, address, 10, partitions=1)
    with pytest.raises(errors.InvalidArgument, match="no room"):
        async with Consumer(address, ["t"], group="g") as consumer:
            await take(consumer, 10)
            platform.faults.fail("commit_offsets", errors.InvalidArgument("no room for it"), 1)
    assert platform.group("g").offsets == {}
    assert platform.group("g").members == frozenset(), "it has left all the same"


async def test_a_last_commit_that_is_refused_does_not_hide_what_went_wrong_before(platform, address, caplog):
    await fill(platform, address, 10, partitions=1)
    with pytest.raises(ValueError):
        async with Consumer(address, ["t"], group="g") as consumer:
            await take(consumer, 10)
            platform.faults.fail("commit_offsets", errors.InvalidArgument("no room"), 1)
            raise ValueError
    assert "the last commit failed, records will be read again: no room" in caplog.text


async def test_a_last_commit_is_tried_again_where_that_may_help(platform, address):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, ["t"], group="g") as consumer:
        await take(consumer, 10)
        platform.faults.fail("commit_offsets", errors.Unavailable("a coordinator restarts"), 3)
    assert platform.group("g").offsets == {("t", 0): 10}


@pytest.mark.parametrize("request_arrives", [True, False])
async def test_a_last_commit_whose_call_is_cut_is_done_again(platform, address, request_arrives):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=3_600_000) as consumer:
        await take(consumer, 10)
        platform.faults.cut("commit_offsets", request_arrives=request_arrives)
    assert platform.group("g").offsets == {("t", 0): 10}
    first, again = platform.faults.requests["commit_offsets"]
    assert first == again


async def test_leaving_while_the_group_has_forgotten_what_was_done_is_an_error(platform, address):
    await fill(platform, address, 10, partitions=1)
    with pytest.raises(errors.UnknownMember, match="forgotten this consumer"):
        async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=60_000) as consumer:
            await take(consumer, 10)
            platform.faults.fail("join_group", errors.Unavailable("no PostgreSQL"))
            await platform.expel("g")
            await until(lambda: not consumer.assignment)


async def let_poll_interval_pass(consumer, share=1.0):
    """What its timer does within this share of the interval, now. A real interval short enough to wait for would pass,
    on a busy machine, while the test is about to ask for records."""
    for _ in range(round(POLL_CHECKS * share)):
        await consumer._check_polls()


async def test_an_application_that_hangs_gives_its_partitions_to_others(platform, address, caplog):
    await fill(platform, address, 100, partitions=2)
    async with (
        Consumer(address, ["t"], group="g", fetch_bytes=1) as hung,
        Consumer(address, ["t"], group="g") as other,
    ):
        await until(lambda: len(hung.assignment) == len(other.assignment) == 1)
        (mine,) = hung.assignment
        assert (await take(hung, 10))[-1].offset == 9  # and now it hangs
        await let_poll_interval_pass(hung, 1.1)  # the first check sees what was read
        await until(lambda: len(other.assignment) == 2)
        assert not hung.assignment
        assert platform.group("g").offsets[mine] == 9
        with pytest.raises(errors.PollIntervalExceeded, match="max_poll_interval_ms") as caught:
            await anext(hung)
        assert caught.value.details == {"group": "g", "max_poll_interval_ms": "300000"}
        assert len(platform.group("g").members) == 1, "it does not come back by itself"
        reading = asyncio.create_task(anext(hung))
        await until(lambda: len(platform.group("g").members) == 2)
        assert (await asyncio.wait_for(reading, PATIENCE_S)).partition in (0, 1)
    assert caplog.text.count("has asked for no record for 300000 ms") == 1


async def test_an_application_that_waits_for_records_does_not_hang(platform, address):
    await fill(platform, address, 1, partitions=1)
    async with Consumer(address, ["t"], group="g") as consumer:
        await take(consumer, 1)
        waiting = asyncio.create_task(anext(consumer))
        await until(lambda: consumer._iteration._waiting)
        await let_poll_interval_pass(consumer, 3)
        assert len(consumer.assignment) == 1
        await fill(platform, address, 1)
        assert (await waiting).offset == 1
        for _ in range(4):  # for longer than the interval in all
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(consumer), 0.02)
            await let_poll_interval_pass(consumer, 0.5)
        assert len(consumer.assignment) == 1


async def test_an_application_that_waits_for_its_start_does_not_hang(platform, address):
    await fill(platform, address, 1, partitions=1)
    platform.faults.fail("lookup_offsets", errors.Unavailable("no leader answers"))
    consumer = Consumer(address, ["t"], group="g", start="latest", max_poll_interval_ms=50)
    starting = asyncio.create_task(consumer.start())
    await until(lambda: platform.group("g").members)
    await asyncio.sleep(0.5)
    assert platform.group("g").members and not starting.done()
    platform.faults.mend("lookup_offsets")
    reading = asyncio.create_task(take(consumer, 1))
    await starting
    await fill(platform, address, 1)
    assert [record.offset for record in await reading] == [1]
    await consumer.close()


async def test_an_application_that_never_reads_hangs_too(platform, address):
    await platform.create_topic("t", 1)
    with pytest.raises(errors.PollIntervalExceeded):
        async with Consumer(address, ["t"], group="g", max_poll_interval_ms=50):
            await until(lambda: not platform.group("g").members)


async def test_an_outage_is_told_when_it_begins_and_when_it_is_over(platform, address, caplog):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=20) as consumer:
        await take(consumer, 5)
        platform.faults.fail("heartbeat_group", errors.Unavailable("no PostgreSQL"))
        platform.faults.fail("commit_offsets", errors.Unavailable("no PostgreSQL"), 5)
        beats = platform.faults.calls["heartbeat_group"]
        await until(lambda: platform.faults.calls["heartbeat_group"] > beats + 5)
        await until(lambda: not platform.faults.failing("commit_offsets"))
        platform.faults.mend("heartbeat_group")
        await until(lambda: "answered again" in caplog.text)
    assert caplog.text.count("heartbeats to group g fail") == 1
    assert caplog.text.count("auto commit failed") == 1


async def test_a_group_goes_on_where_it_committed(platform, address):
    await fill(platform, address, 200, partitions=1)
    async with Consumer(address, ["t"], group="g") as consumer:
        await take(consumer, 50)
    assert platform.group("g").offsets["t", 0] == 50
    assert platform.group("g").members == frozenset()
    async with Consumer(address, ["t"], group="g") as consumer:
        assert (await take(consumer, 1))[0].offset == 50


async def test_the_record_that_failed_is_not_committed(platform, address):
    await fill(platform, address, 200, partitions=1)
    with pytest.raises(ValueError):
        async with Consumer(address, ["t"], group="g") as consumer:
            async for record in consumer:
                if record.offset == 20:
                    raise ValueError("processing failed")
    assert platform.group("g").offsets["t", 0] == 20


async def test_auto_commit_leaves_out_what_is_being_processed(platform, address):
    await fill(platform, address, 200, partitions=1)
    async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=20) as consumer:
        await take(consumer, 11)
        await until(lambda: platform.group("g").offsets.get(("t", 0)) == 10)
        await asyncio.sleep(0.1)  # several more rounds of it
        assert platform.group("g").offsets["t", 0] == 10
        await consumer.commit()
        assert platform.group("g").offsets["t", 0] == 11
        await consumer.commit({("t", 0): 3})
        assert platform.group("g").offsets["t", 0] == 3


async def test_what_is_committed_can_be_asked_for(platform, address):
    await fill(platform, address, 90, partitions=3)
    await platform.create_topic("other", 1)
    async with Consumer(address, assign=[("t", 0), ("t", 1)], group="g", auto_commit=False) as consumer:
        assert await consumer.committed() == {("t", 0): None, ("t", 1): None}
        await consumer.commit({("t", 0): 7, ("t", 1): OffsetAndMetadata(5, "run 12"), ("t", 2): (3, "")})
        assert await consumer.committed() == {("t", 0): (7, ""), ("t", 1): (5, "run 12")}
        found = await consumer.committed([("t", 2), ("other", 0)])
        assert found == {("t", 2): OffsetAndMetadata(3), ("other", 0): None}
        await consumer.commit()
        assert await consumer.committed([("t", 1)]) == {("t", 1): (0, "")}, "a note belongs to its commit"
        with pytest.raises(errors.UnknownPartition, match="partitions 0 to 2, not 3"):
            await consumer.committed([("t", 3)])
        with pytest.raises(errors.UnknownTopic):
            await consumer.committed([("nope", 0)])
    async with Consumer(address, ["t"]) as consumer:
        with pytest.raises(errors.InvalidArgument, match="without a group"):
            await consumer.committed()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (-1, "offset is -1, must be 0 to"),
        (True, "offset is True"),
        (1.0, "offset is 1.0"),
        ((1, "x" * 4097), "metadata is .* at most 4096"),
        ((1, b"x"), "metadata is b'x'"),
        ((1, "x", 2), "offset is"),
    ],
)
async def test_a_position_that_cannot_be_committed_is_named(platform, address, given, named):
    await platform.create_topic("t", 2)
    async with Consumer(address, ["t"], group="g", auto_commit=False) as consumer:
        with pytest.raises(errors.InvalidArgument, match=named):
            await consumer.commit({("t", 0): 0, ("t", 1): given})
        assert platform.group("g").offsets == {}


SHAPE = "offsets must be {(topic, partition): offset}"
RECORD = Record("t", 0, 7, 1, None, None, ())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            RECORD,
            f"{SHAPE}, not {RECORD!r:.100}: behind a record, {{(record.topic, record.partition): record.offset + 1}}",
        ),
        ([("t", 0, 4)], f"{SHAPE}, not [('t', 0, 4)]"),
        (5, f"{SHAPE}, not 5"),
        ("t", f"{SHAPE}, not 't'"),
        ({"t": 4}, f"{SHAPE}, 't' is no (topic, partition)"),
        ({"t5": 4}, f"{SHAPE}, 't5' is no (topic, partition)"),
        ({("t", "0"): 4}, f"{SHAPE}, ('t', '0') is no (topic, partition)"),
        ({(0, "t"): 4}, f"{SHAPE}, (0, 't') is no (topic, partition)"),
        ({("t", -1): 4}, "partition is -1, must be 0 to 4294967295"),
    ],
)
async def test_offsets_of_another_shape_are_refused_with_the_one_wanted(platform, address, given, text):
    await platform.create_topic("t", 2)
    async with Consumer(address, ["t"], group="g", auto_commit=False) as consumer, Admin(address) as admin:
        for refused in (consumer.commit(given), admin.commit_group_offsets("h", given)):
            with pytest.raises(errors.InvalidArgument) as caught:
                await refused
            assert str(caught.value) == text
        assert platform.group("g").offsets == {}
        await consumer.commit({("t", np.int64(1)): np.int64(3)})
        assert await consumer.committed([("t", 1)]) == {("t", 1): (3, "")}


async def test_fractions_of_milliseconds_are_refused_as_no_whole_number(platform, address):
    await platform.create_topic("t", 1)
    async with Consumer(address, ["t"]) as consumer:
        with pytest.raises(errors.InvalidArgument) as caught:
            await consumer.poll(1.0)
        wanted = "must be a whole number of milliseconds (int)"
        assert str(caught.value) == f"timeout_ms is 1.0, {wanted}, 0 to 86400000"
        with pytest.raises(errors.InvalidArgument) as caught:
            await consumer.seek_to_timestamp(1796005434.75)
        limits = "-9223372036854775807 to 9223372036854775807"
        assert str(caught.value) == f"timestamp_ms is 1796005434.75, {wanted}, {limits}"


async def test_places_that_do_not_exist_are_refused_with_those_that_do(platform, address):
    await platform.create_topic("t", 1)
    async with Consumer(address, ["t"]) as consumer, Admin(address) as admin:
        for refused, text in (
            (
                consumer.seek("t", 0, "beginning"),
                "offset is 'beginning', must be earliest, latest, an offset or a datetime",
            ),
            (consumer.seek("t", 0, 1.5), "offset is 1.5, must be earliest, latest, an offset or a datetime"),
            (
                admin.offsets("t", "beginning"),
                "at is 'beginning', must be earliest, latest, milliseconds since 1970 or a datetime",
            ),
            (
                admin.reset_offsets("g", "beginning", topic="t"),
                "to is 'beginning', must be earliest, latest, an offset or a datetime",
            ),
        ):
            with pytest.raises(errors.InvalidArgument) as caught:
                await refused
            assert str(caught.value) == text


async def test_a_commit_by_name_is_of_the_topic_that_was_read(platform, address):
    """Also of a partition that somebody else reads."""
    await fill(platform, address, 20, partitions=2)
    async with Consumer(address, assign=[("t", 0)], group="g", auto_commit=False) as consumer:
        await take(consumer, 1)
        await consumer.commit({("t", 0): 1, ("t", 1): 2})
        (commit,) = platform.faults.answered["commit_offsets"]
        assert [item.topic_id for item in commit.offsets] == [platform.topic_id("t")] * 2
        await platform.recreate_topic("t", 2)
        for where in (("t", 0), ("t", 1)):
            with pytest.raises(errors.UnknownTopic):
                await consumer.commit({where: 5})
        assert platform.group("g").offsets == {}


async def test_without_auto_commit_nothing_is_committed(platform, address):
    await fill(platform, address, 20, partitions=1)
    async with Consumer(address, ["t"], group="g", auto_commit=False) as consumer:
        await take(consumer, 11)
    assert platform.faults.answered["commit_offsets"] == []


async def collect(consumer, seen, stop):
    async for record in consumer:
        seen.append((record.partition, record.offset))
        if stop.is_set():
            return
        await asyncio.sleep(0)


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_two_members_share_and_take_over(platform, address):
    await fill(platform, address, 400, partitions=4)
    seen_first, seen_second = [], []
    async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=20) as first:
        reading = asyncio.create_task(collect(first, seen_first, asyncio.Event()))
        await until(lambda: len(seen_first) == 400)
        assert len(first.assignment) == 4
        async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=20) as second:
            other = asyncio.create_task(collect(second, seen_second, asyncio.Event()))
            await until(lambda: len(first.assignment) == 2 and len(second.assignment) == 2)
            assert not first.assignment & second.assignment
            await fill(platform, address, 400)
            await until(lambda: len(seen_first) + len(seen_second) >= 800)
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)
        await until(lambda: len(first.assignment) == 4)
        await fill(platform, address, 400)
        await until(lambda: len(set(seen_first) | set(seen_second)) == 1200)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    # A clean hand-over reads nothing twice, except the one record each being processed when it was taken away.
    assert len(seen_first) + len(seen_second) <= 1200 + 4


async def test_a_member_without_partitions_waits_for_its_assignment(platform, address):
    await platform.create_topic("t", 1)
    second = Consumer(address, ["t"], group="g")
    assert second.membership == ("g", "", 0, "out")
    async with Consumer(address, ["t"], group="g") as first:
        assert await first.wait_for_assignment() == {("t", 0)}
        async with second:
            with pytest.raises(TimeoutError, match="no partition was assigned within timeout_ms = 20"):
                await second.wait_for_assignment(20)
            await until(lambda: second.membership.state == first.membership.state == "stable")
            member = second.membership
            assert platform.group("g").generation == member.generation == first.membership.generation
            assert set(platform.group("g").members) == {member.member_id, first.membership.member_id}
            waiting = asyncio.create_task(second.wait_for_assignment(PATIENCE_S * 1000))
            await first.close()
            assert first.membership == ("g", "", 0, "out")
            assert await waiting == second.assignment == {("t", 0)}
    assert second.membership.state == "out"
    with pytest.raises(errors.InvalidArgument, match="closed"):
        await second.wait_for_assignment()
    with pytest.raises(errors.InvalidArgument, match="timeout_ms is -1"):
        await second.wait_for_assignment(-1)


async def test_the_membership_tells_of_joining_and_of_partitions_to_come(platform, address):
    await platform.create_topic("t", 1)
    async with Consumer(address, ["t"]) as alone, Consumer(address, assign=[("t", 0)], group="h") as given:
        assert alone.membership is given.membership is None
        assert await alone.wait_for_assignment() == {("t", 0)}
    async with Consumer(address, ["t"], group="g") as consumer:
        assert consumer.membership.state == "stable"
        platform.faults.fail("lookup_offsets", errors.Unavailable("no leader answers"))
        await platform.expel("g")
        await until(lambda: consumer.membership.state == "rebalancing")
        assert consumer.assignment == set()
        platform.faults.fail("join_group", errors.Unavailable("no PostgreSQL"))
        await platform.expel("g")
        await until(lambda: consumer.membership == ("g", "", 0, "joining"))
        platform.faults.mend("join_group")
        platform.faults.mend("lookup_offsets")
        assert await consumer.wait_for_assignment() == {("t", 0)}
        await until(lambda: consumer.membership.state == "stable")


async def test_waiting_for_an_assignment_is_no_silence_and_raises_what_fails(platform, address):
    await platform.create_topic("t", 1)
    async with (
        Consumer(address, ["t"], group="g"),
        Consumer(address, ["t"], group="g", max_poll_interval_ms=100) as second,
    ):
        with pytest.raises(TimeoutError):
            await second.wait_for_assignment(500)
        assert second.membership.state == "stable"
        waiting = asyncio.create_task(second.wait_for_assignment())
        await until(lambda: second._starts == 1)
        second._reader.fail(errors.Internal("broken"))
        with pytest.raises(errors.Internal, match="broken"):
            await waiting


async def test_a_forgotten_member_joins_again(platform, address):
    await fill(platform, address, 100, partitions=2)
    async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=20) as consumer:
        await take(consumer, 100)
        await consumer.commit()
        await platform.expel("g")
        await until(lambda: platform.faults.calls["join_group"] == 2)
        await fill(platform, address, 20)
        records = await take(consumer, 20)
    assert len({(record.partition, record.offset) for record in records}) == 20


class LeavingIsToldFirst:
    """A coordinator that answers a member's waiting heartbeat before the member's leave."""

    def __init__(self):
        self.joined = 0
        self.left = asyncio.Event()

    async def join_group(self, request):
        self.joined += 1
        return coordinator_pb2.GroupAssignment(member_id=request.member_id, generation=1, heartbeat_interval_ms=1000)

    async def heartbeat_group(self, request):
        await self.left.wait()
        await asyncio.sleep(0)
        raise errors.UnknownMember(request.member_id)

    async def leave_group(self, request):
        self.left.set()
        await asyncio.sleep(0.02)
        return coordinator_pb2.LeaveGroupResponse()


class ReadsWhatItIsGiven:
    """A consumer that lets go of what it is not given any more at once."""

    def __init__(self, coordinator):
        self.owned = frozenset()
        self.lost = 0
        self.member = Membership(
            coordinator,
            ConsumerOptions(group="g"),
            ["t"],
            given=self._take,
            lost=self._lose,
            owned=lambda: self.owned,
            failed=lambda error: None,
        )

    def _take(self, partitions):
        self.owned = frozenset(partitions)

    def _lose(self):
        self.owned, self.lost = frozenset(), self.lost + 1


async def test_leaving_is_not_being_forgotten(caplog):
    coordinator = LeavingIsToldFirst()
    member = ReadsWhatItIsGiven(coordinator).member
    await member.join()
    beating = asyncio.create_task(member.run())
    await asyncio.sleep(0)
    await member.leave()
    await beating
    assert coordinator.joined == 1
    assert "forgotten" not in caplog.text


class ForgetsAtCommit:
    """A coordinator that forgets its member while that one's heartbeat is on its way."""

    def __init__(self):
        self.joined = []
        self.told = asyncio.Event()

    async def join_group(self, request):
        self.joined.append(request.member_id)
        assigned = [coordinator_pb2.TopicPartition(topic="t", partition=0)]
        return coordinator_pb2.GroupAssignment(
            member_id=request.member_id, generation=len(self.joined), assigned=assigned, heartbeat_interval_ms=1000
        )

    async def heartbeat_group(self, request):
        await self.told.wait()
        if request.member_id == self.joined[0]:
            raise errors.UnknownMember(request.member_id)
        await asyncio.Event().wait()

    async def commit_offsets(self, request):
        raise errors.UnknownMember(request.member_id)


async def test_a_refused_commit_is_enough_to_know_that_all_is_lost():
    coordinator = ForgetsAtCommit()
    consumer = ReadsWhatItIsGiven(coordinator)
    await consumer.member.join()
    beating = asyncio.create_task(consumer.member.run())
    await asyncio.sleep(0)
    with pytest.raises(errors.UnknownMember):
        await consumer.member.commit_through_rebalance({TopicPartition("t", 0): Position(1)})
    assert consumer.lost == 1 and not consumer.owned
    coordinator.told.set()
    await until(lambda: len(coordinator.joined) == 2 and consumer.owned == {("t", 0)})
    assert coordinator.joined[0] != coordinator.joined[1]
    beating.cancel()
    await asyncio.wait([beating])


class MovesOnDuringACommit:
    """A coordinator whose first answer to a commit takes so long that the partition goes to somebody else and comes
    back (or stays) meanwhile. `committed`: what it took."""

    def __init__(self, *, taken_away):
        self.taken_away = taken_away
        self.moves = asyncio.Event()
        self.committed = []
        self.commits = 0
        self.generation = 1

    def _answer(self, request, assigned=True):
        partitions = [coordinator_pb2.TopicPartition(topic="t", partition=0)] if assigned else []
        return coordinator_pb2.GroupAssignment(
            member_id=request.member_id, generation=self.generation, assigned=partitions, heartbeat_interval_ms=1000
        )

    async def join_group(self, request):
        return self._answer(request)

    async def heartbeat_group(self, request):
        await self.moves.wait()
        if self.generation == 3:
            self.moves.clear()
            await self.moves.wait()
        self.generation += 1
        return self._answer(request, assigned=self.generation == 3 or not self.taken_away)

    async def commit_offsets(self, request):
        self.commits += 1
        if self.commits == 1:
            self.moves.set()
            await until(lambda: not self.moves.is_set())  # the third generation is taken in
        if request.generation != self.generation:
            raise errors.IllegalGeneration("the group has moved on", generation=self.generation)
        self.committed += [item.offset for item in request.offsets]


@pytest.mark.parametrize("taken_away", [True, False])
async def test_a_commit_is_repeated_after_a_rebalance_only_where_nobody_else_was_between(taken_away):
    """Else it would take the group back behind what the other member had committed."""
    coordinator = MovesOnDuringACommit(taken_away=taken_away)
    consumer = ReadsWhatItIsGiven(coordinator)
    member = consumer.member
    await member.join()
    beating = asyncio.create_task(member.run())
    if taken_away:
        with pytest.raises(errors.IllegalGeneration):
            await member.commit_through_rebalance({TopicPartition("t", 0): Position(10)})
        assert coordinator.committed == []
    else:
        await member.commit_through_rebalance({TopicPartition("t", 0): Position(10)})
        assert coordinator.committed == [10]
    assert (member.generation, consumer.owned) == (3, {("t", 0)})
    await member.commit_through_rebalance({TopicPartition("t", 0): Position(60)})
    assert coordinator.committed[-1] == 60
    beating.cancel()
    await asyncio.wait([beating])


async def test_commit_of_a_partition_that_was_taken_away(platform, address):
    await fill(platform, address, 100, partitions=2)
    async with Consumer(address, ["t"], group="g", auto_commit=False) as first:
        await take(first, 100)
        async with Consumer(address, ["t"], group="g", auto_commit=False) as second:
            await until(lambda: len(first.assignment) == 1 and len(second.assignment) == 1)
            await first.commit()
            (foreign,) = second.assignment
            with pytest.raises(errors.IllegalGeneration):
                await first.commit({foreign: 1})


async def test_a_group_read_to_the_end(platform, address):
    await fill(platform, address, 500)
    async with Consumer(address, ["t"], group="g", stop_at_end=True) as consumer:
        assert len([record async for record in consumer]) == 500
    assert sum(platform.group("g").offsets.values()) == 500


async def test_a_forgotten_member_that_reads_to_the_end_does_not_take_losing_all_for_the_end(platform, address):
    await fill(platform, address, 500, partitions=1)
    async with Consumer(address, ["t"], group="g", stop_at_end=True, fetch_bytes=1) as consumer:
        await take(consumer, 10)
        await consumer.commit()
        await platform.expel("g")
        await until(lambda: not consumer.assignment)
        assert [record.offset async for record in consumer] == list(range(10, 500))


@pytest.mark.parametrize("noticed_by", ["reading", "a commit"])
async def test_a_member_starts_anew_on_a_topic_created_again_that_the_group_does_not_tell_it_of(
    platform, address, noticed_by
):
    """It owns the same partition, by its name, all the time; its old position is none in the new topic."""
    await fill(platform, address, 50, partitions=1)
    async with Consumer(address, ["t"], group="g", start="earliest", auto_commit=False) as consumer:
        await take(consumer, 50)
        await consumer.commit()
        assert platform.group("g").offsets == {("t", 0): 50}
        await fill(platform, address, 20, partitions=1)
        await take(consumer, 10)
        await platform.recreate_topic("t", 1)
        if noticed_by == "a commit":
            with pytest.raises(errors.UnknownTopic):
                await consumer.commit()
        await fill(platform, address, 80, partitions=1)
        records = [record async for record in until_offset(consumer, 79)]
        anew = next(n for n, record in enumerate(records) if record.offset == 0)
        assert [int(record.value) for record in records[anew:]] == list(range(80)), "from the start of the new topic"
        await consumer.commit()
    assert platform.group("g").offsets == {("t", 0): 80}
    ids = [commit.offsets[0].topic_id for commit in platform.faults.answered["commit_offsets"]]
    assert len(ids) == 2 and ids[1] == platform.topic_id("t") != ids[0]


async def until_offset(consumer, offset):
    async with asyncio.timeout(PATIENCE_S):
        async for record in consumer:
            yield record
            if record.offset == offset:
                break


@pytest.mark.parametrize("others", [[], ["u"]])
async def test_a_deleted_topic_does_not_hold_up_other_commits_nor_leaving(platform, address, others):
    topics = ["t", *others]
    for topic in topics:
        await fill(platform, address, 20, partitions=1, topic=topic)
    async with Consumer(address, topics, group="g", start="earliest", auto_commit_interval_ms=60_000) as consumer:
        await take(consumer, 20 * len(topics))
        await platform.recreate_topic("t", 1)
    assert platform.group("g").offsets == {(topic, 0): 20 for topic in others}
    assert not platform.group("g").members, "it has left"


async def test_the_last_commit_of_what_is_revoked_passes_no_record_that_was_not_handed_over(platform, address):
    """The application asks for its next record while that commit waits for another one."""
    await fill(platform, address, 100, partitions=1)
    offsets, third, go_on = [], asyncio.Event(), asyncio.Event()
    async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=3_600_000) as consumer:

        async def application():
            async for record in consumer:
                offsets.append(record.offset)
                if len(offsets) == 3:
                    third.set()
                    await go_on.wait()

        task = asyncio.create_task(application())
        async with asyncio.timeout(PATIENCE_S):
            await third.wait()
            async with consumer._commits._turn:
                consumer._assignments.stop_reading()
                await asyncio.sleep(0)
                go_on.set()
                while not consumer._iteration._waiting:
                    await asyncio.sleep(0)
            assert await consumer._assignments.wait_revoked()
        task.cancel()
    assert offsets == [0, 1, 2]
    assert platform.group("g").offsets["t", 0] == 3


class JoinsSlowly(LeavingIsToldFirst):
    """A coordinator that answers a join after a while, and remembers its members."""

    def __init__(self):
        super().__init__()
        self.members = set()
        self.go_on = asyncio.Event()

    async def join_group(self, request):
        await self.go_on.wait()
        self.members.add(request.member_id)
        return await super().join_group(request)

    async def leave_group(self, request):
        self.members.discard(request.member_id)
        return coordinator_pb2.LeaveGroupResponse()


async def test_a_member_that_leaves_while_it_joins_leaves_no_ghost_behind():
    """Until its session expired it would be given partitions."""
    coordinator = JoinsSlowly()
    member = ReadsWhatItIsGiven(coordinator).member
    joining = asyncio.create_task(member.run())
    await asyncio.sleep(0)
    leaving = asyncio.create_task(member.leave())
    await asyncio.sleep(0)
    coordinator.go_on.set()
    await asyncio.gather(joining, leaving)
    assert coordinator.joined == 1 and not coordinator.members
