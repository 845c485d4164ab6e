"""Keys and values as objects: serializers of producers, deserializers of consumers, in both clients."""

import math
import threading

import pytest
import streamhouse.sync
from streamhouse import Admin, Consumer, Producer, errors, json_deserializer, json_serializer

JSON = {"key_serializer": str.encode, "value_serializer": json_serializer}
FROM_JSON = {"key_deserializer": bytes.decode, "value_deserializer": json_deserializer}
ORDERS = [{"id": n, "who": "Zoë"} for n in range(100)]


def refuse_13(value):
    if value == b"13":
        raise LookupError("unlucky")
    return int(value)


def test_json_of_equal_objects_is_equal_bytes():
    assert json_serializer({"b": [1, None], "a": "é"}) == json_serializer({"a": "é", "b": [1, None]})
    assert json_serializer({"b": [1, None], "a": "é"}) == '{"a":"é","b":[1,null]}'.encode()
    assert json_deserializer(json_serializer(ORDERS)) == ORDERS
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_serializer(math.nan)


async def test_objects_come_out_as_they_went_in(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address, **JSON) as producer:
        for order in ORDERS[:50]:
            await producer.send("t", order, key=order["who"])
        await producer.send_many("t", ORDERS[50:], keys=[order["who"] for order in ORDERS[50:]])
        await producer.send_and_wait("t", None, key="gone")
    async with Consumer(address, ["t"], stop_at_end=True, **FROM_JSON) as consumer:
        records = [record async for record in consumer]
        await consumer.seek("t", 0, 0)
        again = [await anext(consumer) for _ in records]
        await consumer.seek("t", 0, 0)
        raw = [value async for batch in consumer.batches() for value in batch.values.to_list()]
    assert [record.value for record in records] == [*ORDERS, None]
    assert [record.key for record in records] == ["Zoë"] * 100 + ["gone"]
    assert again == records
    assert raw == [*map(json_serializer, ORDERS), None]


def test_objects_come_out_as_they_went_in_without_async(server):
    server.create_topic("t", 1)
    threads = set()

    def serialize(item):
        threads.add(threading.current_thread())
        return json_serializer(item)

    def deserialize(data):
        threads.add(threading.current_thread())
        return json_deserializer(data)

    with streamhouse.sync.Producer(server.address, **(JSON | {"value_serializer": serialize})) as producer:
        for order in ORDERS[:50]:
            producer.send("t", order, key=order["who"])
        producer.send_many("t", ORDERS[50:], keys=[order["who"] for order in ORDERS[50:]])
        producer.send_and_wait("t", None, key="gone")
    with streamhouse.sync.Consumer(
        server.address, ["t"], stop_at_end=True, **(FROM_JSON | {"value_deserializer": deserialize})
    ) as consumer:
        records = list(consumer)
    assert [record.value for record in records] == [*ORDERS, None]
    assert [record.key for record in records] == ["Zoë"] * 100 + ["gone"]
    assert threads == {threading.current_thread()}, "the loop's thread would stand still for all clients"


async def test_equal_keys_go_to_the_partition_of_their_bytes(platform, address):
    await platform.create_topic("t", 7)
    async with Producer(address) as plain, Producer(address, key_serializer=json_serializer) as producer:
        for n in range(20):
            place = await producer.send_and_wait("t", b"v", key={"user": n})
            assert place.partition == (await plain.send_and_wait("t", b"v", key=b'{"user":%d}' % n)).partition


@pytest.mark.parametrize("form", ["async", "sync"])
async def test_a_serializer_that_fails_is_an_error_of_the_send(platform, address, server, form):
    class Plain:
        """The synchronous producer behind the names of the asynchronous one."""

        def __init__(self, **options):
            self.producer = streamhouse.sync.Producer(server.address, **options)

        async def send(self, *args, **kwargs):
            return self.producer.send(*args, **kwargs)

        async def send_many(self, *args, **kwargs):
            return self.producer.send_many(*args, **kwargs)

        async def close(self):
            self.producer.close()

    cluster = platform if form == "async" else server.awaited
    await cluster.create_topic("t", 1)
    producer = Producer(address, **JSON) if form == "async" else Plain(**JSON)
    with pytest.raises(
        errors.SerializationError, match="value_serializer failed on a record for topic 't': TypeE"
    ) as e:
        await producer.send("t", object(), key="k")
    assert isinstance(e.value.__cause__, TypeError) and e.value.details == {"field": "value", "topic": "t"}
    with pytest.raises(errors.SerializationError, match="key_serializer failed on a record") as e:
        await producer.send("t", 1, key=5)
    assert e.value.details["field"] == "key" and e.value.record is None
    with pytest.raises(errors.SerializationError, match="value_serializer failed on record 2 for") as e:
        await producer.send_many("t", [1, None, {1, 2}, 3])
    assert e.value.details == {"field": "value", "topic": "t", "position": "2"}
    with pytest.raises(TypeError, match="values must be a list"):
        await producer.send_many("t", "text")
    await producer.close()
    producer = (
        Producer(address, value_serializer=str) if form == "async" else Plain(value_serializer=str)
    )  # text, no bytes
    with pytest.raises(errors.SerializationError, match=r"value_serializer returned '5' \(str\) for a record"):
        await producer.send("t", 5)
    await producer.close()
    assert await cluster.records("t", 0) == []


async def test_a_deserializer_that_fails_names_the_record_and_reading_goes_on_behind_it(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_many("t", [b"%d" % n for n in range(20)], keys=[b"k"] * 20)
    async with Consumer(address, ["t"], group="g", stop_at_end=True, value_deserializer=refuse_13) as consumer:
        values, found = [], None
        records = aiter(consumer)
        while True:
            try:
                values.append((await anext(records)).value)
            except errors.SerializationError as error:
                found = error
                await consumer._commits.commit_existing()  # as an automatic commit in this moment
                assert platform.group("g").offsets["t", 0] == 13
            except StopAsyncIteration:
                break
        assert values == [n for n in range(20) if n != 13]
        assert found.details == {"topic": "t", "partition": "0", "offset": "13", "field": "value"}
        assert "t/0: value_deserializer failed on the record at offset 13: LookupError: unlucky" in str(found)
        assert found.record[:3] == ("t", 0, 13) and found.record[4:6] == (b"k", b"13")
        assert isinstance(found.__cause__, LookupError)
    async with Admin(address) as admin:
        assert [offset.offset for offset in await admin.group_offsets("g")] == [20]


async def test_a_consumer_that_is_left_with_the_error_finds_the_record_again(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_many("t", [b"%d" % n for n in range(20)])
    for _ in range(2):
        with pytest.raises(errors.SerializationError) as raised:
            async with Consumer(address, ["t"], group="g", value_deserializer=refuse_13) as consumer:
                async for _ in consumer:
                    pass
        assert raised.value.details["offset"] == "13"


def test_a_deserializer_that_fails_without_async(server):
    server.create_topic("t", 1)
    with streamhouse.sync.Producer(server.address) as producer:
        producer.send_many("t", [b"%d" % n for n in range(20)])
    for _ in range(2):
        with (
            pytest.raises(errors.SerializationError) as raised,
            streamhouse.sync.Consumer(server.address, ["t"], group="g", value_deserializer=refuse_13) as consumer,
        ):
            list(consumer)
        assert raised.value.details["offset"] == "13"
    with streamhouse.sync.Consumer(
        server.address, ["t"], group="g", stop_at_end=True, value_deserializer=refuse_13
    ) as consumer:
        with pytest.raises(errors.SerializationError):
            next(consumer)
        assert [record.value for record in consumer] == list(range(14, 20))


def test_an_interrupt_in_a_deserializer_passes_over_no_record(server):
    """Ctrl-C is no failure of the deserializer: the record has not reached the application."""
    server.create_topic("t", 1)
    with streamhouse.sync.Producer(server.address) as producer:
        producer.send_many("t", [b"%d" % n for n in range(20)])
    interrupts = [KeyboardInterrupt]

    def interrupted(data):
        if data == b"13" and interrupts:
            raise interrupts.pop()
        return int(data)

    values = []
    with streamhouse.sync.Consumer(server.address, ["t"], stop_at_end=True, value_deserializer=interrupted) as consumer:
        with pytest.raises(KeyboardInterrupt):
            values.extend(record.value for record in consumer)
        values.extend(record.value for record in consumer)
    assert values == list(range(20))


@pytest.mark.parametrize("module", [streamhouse, streamhouse.sync], ids=["async", "sync"])
def test_what_cannot_be_called_is_refused(module):
    for option in ("key_serializer", "value_serializer"):
        with pytest.raises(errors.InvalidArgument, match=rf"{option} is 'json' \(str\), must be a callable"):
            module.Producer("127.0.0.1:1", **{option: "json"})
    for option in ("key_deserializer", "value_deserializer"):
        with pytest.raises(errors.InvalidArgument, match=rf"{option} is 'json' \(str\), must be a callable"):
            module.Consumer("127.0.0.1:1", ["t"], **{option: "json"})


class PlainConsumer:
    """The synchronous consumer behind the names of the asynchronous one."""

    def __init__(self, *args, **options):
        self.consumer = streamhouse.sync.Consumer(*args, **options)

    async def __aenter__(self):
        self.consumer.__enter__()
        return self

    async def __aexit__(self, *error):
        self.consumer.__exit__(*error)

    async def poll(self, *args):
        return self.consumer.poll(*args)

    async def commit(self):
        self.consumer.commit()


@pytest.mark.parametrize("form", ["async", "sync"])
async def test_poll_returns_what_comes_before_a_failure_and_raises_it_next(platform, server, form):
    cluster, kind = (platform, Consumer) if form == "async" else (server.awaited, PlainConsumer)
    await cluster.create_topic("t", 2)
    async with Producer(cluster.address, batch_bytes=300) as producer:  # several batches
        for partition in range(2):
            await producer.send_many("t", [b"%d" % n for n in range(20)], partition=partition)
    values, failed = {0: [], 1: []}, []
    async with kind(cluster.address, ["t"], group="g", auto_commit=False, value_deserializer=refuse_13) as consumer:
        while sum(map(len, values.values())) < 38:
            try:
                polled = await consumer.poll(30_000, 7)
            except errors.SerializationError as error:
                failed.append((error.record.partition, error.record.offset))
                await consumer.commit()
                assert cluster.group("g").offsets["t", error.record.partition] == 14
                continue
            assert 0 < sum(map(len, polled.values())) <= 7
            for where, records in polled.items():
                assert where == ("t", records[0].partition)
                values[where.partition] += [record.value for record in records]
            await consumer.commit()
            for partition, found in values.items():
                behind = 1 if (partition, 13) in failed and found[-1:] == [12] else 0
                assert cluster.group("g").offsets.get(("t", partition), 0) == (found[-1] + 1 if found else 0) + behind
    assert values == {partition: [n for n in range(20) if n != 13] for partition in range(2)}
    assert sorted(failed) == [(0, 13), (1, 13)]


async def test_a_failure_of_a_poll_is_raised_however_many_records_others_have(platform, address):
    await platform.create_topic("t", 2)
    async with Producer(address) as producer:
        await producer.send_and_wait("t", b"13", partition=0)
        await producer.send_many("t", [b"1"] * 100, partition=1)
    async with Consumer(address, ["t"], value_deserializer=refuse_13) as consumer:
        for _ in range(3):
            try:
                await consumer.poll(30_000, 10)
            except errors.SerializationError as error:
                assert error.record.partition == 0
                break
        else:
            pytest.fail("partition 0 stands still in silence")
