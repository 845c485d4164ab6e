"""The application's partitioner, in both clients."""

import threading

import pytest
import streamhouse.sync
from streamhouse import Producer, errors


class Plain:
    """The synchronous producer behind the names of the asynchronous one."""

    def __init__(self, address, **options):
        self.inner = streamhouse.sync.Producer(address, **options)

    async def send(self, *args, **kwargs):
        return self.inner.send(*args, **kwargs)

    async def send_and_wait(self, *args, **kwargs):
        return self.inner.send_and_wait(*args, **kwargs)

    async def send_many(self, *args, **kwargs):
        return self.inner.send_many(*args, **kwargs)

    async def close(self):
        self.inner.close()


@pytest.fixture(params=["async", "sync"])
def made(request, platform, server):
    """The cluster and the class of producers."""
    return (platform, Producer) if request.param == "async" else (server.awaited, Plain)


async def values_of(cluster, partition):
    return [value for _, value in await cluster.records("t", partition)]


async def test_every_record_goes_where_the_partitioner_says(made):
    cluster, kind = made
    await cluster.create_topic("t", 4)
    asked, threads = [], set()

    def by_number(topic, key, partitions):
        asked.append((topic, key, partitions))
        threads.add(threading.current_thread())
        return int(key) % 3 + 1

    producer = kind(cluster.address, partitioner=by_number, key_serializer=lambda key: b"%d" % key)
    for n in range(10):
        await producer.send("t", b"%d" % n, key=n)
    await producer.send_many("t", [b"%d" % n for n in range(10, 20)], keys=range(10, 20))
    assert (await producer.send_and_wait("t", b"0", key=7, partition=0)).partition == 0
    await producer.close()
    for partition in range(4):
        wanted = [b"%d" % n for n in range(20) if n % 3 + 1 == partition] or [b"0"]
        assert await values_of(cluster, partition) == wanted
    assert asked == [("t", b"%d" % n, 4) for n in range(20)], "once per record, in order; not if a partition is named"
    assert threads == {threading.current_thread()}


async def test_none_leaves_the_choice_to_the_usual_rules(made):
    cluster, kind = made
    await cluster.create_topic("t", 5)
    plain = kind(cluster.address)
    producer = kind(cluster.address, partitioner=lambda topic, key, partitions: 0 if key == b"vip" else None)
    keys = [b"vip", b"a", b"b", b"vip", b"c", None, b"d"] * 3
    places = [(await producer.send_and_wait("t", b"v", key=key)).partition for key in keys]
    usual = [(await plain.send_and_wait("t", b"v", key=key)).partition for key in keys]
    together = await producer.send_many("t", [b"v"] * len(keys), keys=keys)
    sent = together.result(10) if kind is Plain else await together
    for found in (places, sent.partitions.tolist()):
        for key, partition, elsewhere in zip(keys, found, usual, strict=True):
            assert key is None or partition == (0 if key == b"vip" else elsewhere)
    await producer.close()
    await plain.close()


@pytest.mark.parametrize(
    ("returned", "kind_of_error", "text"),
    [
        (2, errors.UnknownPartition, "the partitioner returned 2, topic 't' has partitions 0 to 1"),
        (-1, errors.UnknownPartition, "the partitioner returned -1"),
        ("0", TypeError, r"the partitioner returned '0' \(str\), must return a partition's number or None"),
        (LookupError("no such region"), LookupError, "no such region"),
    ],
)
async def test_a_partitioner_that_fails_is_an_error_of_the_send_and_keeps_no_room(made, returned, kind_of_error, text):
    cluster, kind = made
    await cluster.create_topic("t", 2)

    def partitioner(topic, key, partitions):
        if key != b"bad":
            return 0
        if isinstance(returned, Exception):
            raise returned
        return returned

    producer = kind(cluster.address, partitioner=partitioner)
    for _ in range(2):  # at first contact, and once the topic is known
        with pytest.raises(kind_of_error, match=text):
            await producer.send("t", b"v", key=b"bad")
        with pytest.raises(kind_of_error, match=text):
            await producer.send_many("t", [b"v", b"v"], keys=[b"good", b"bad"])
    inner = producer.inner._inner if kind is Plain else producer
    assert inner._pool.used_bytes == 0
    assert (await producer.send_and_wait("t", b"after", key=b"good")).offset == 0
    await producer.close()
    assert await values_of(cluster, 0) == [b"after"] and await values_of(cluster, 1) == []


async def test_sends_of_several_tasks_at_first_contact_keep_their_order(platform, address):
    import asyncio

    await platform.create_topic("t", 2)
    async with Producer(address, partitioner=lambda topic, key, partitions: 1) as producer:
        await asyncio.gather(*(producer.send("t", b"%d" % n) for n in range(50)))
    assert await values_of(platform, 1) == [b"%d" % n for n in range(50)]


@pytest.mark.parametrize("module", [streamhouse, streamhouse.sync], ids=["async", "sync"])
def test_kafkas_names_of_partitioners_are_refused(module):
    with pytest.raises(errors.InvalidArgument, match=r"partitioner is 'murmur2_random' \(str\), must be a callable"):
        module.Producer("127.0.0.1:1", partitioner="murmur2_random")
