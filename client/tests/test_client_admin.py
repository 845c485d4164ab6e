"""Admin answers, metadata, and the package's front door."""

import subprocess
import sys

import pytest
from shcluster.peers import Peers
from streamhouse import Admin, Consumer, Producer, errors
from streamhouse.metadata import MetadataCache


async def test_topics(address, platform):
    async with Admin(address) as admin:
        made = await admin.create_topic("t", partitions=3, retention_ms=1000, min_acks="durable")
        assert (made.topic, made.partitions, made.retention_ms, made.retention_bytes) == ("t", 3, 1000, None)
        assert made.min_acks == "durable"
        with pytest.raises(errors.TopicExists):
            await admin.create_topic("t")
        assert await admin.create_topic("t", partitions=5, if_not_exists=True) == made
        assert await admin.list_topics() == [made]
        described = await admin.describe_topic("t")
        assert described.topic == made
        assert [part.partition for part in described.partitions] == [0, 1, 2]
        assert described.partitions[0].ranges[0].status == "open"
        assert await admin.delete_topic("t") == made.topic_id
        with pytest.raises(errors.UnknownTopic):
            await admin.describe_topic("t")


@pytest.mark.parametrize(
    ("wrong", "limit"),
    [
        ({"partitions": -1}, "1 to 4294967295"),
        ({"partitions": 1 << 32}, "1 to 4294967295"),
        ({"partitions": "4"}, "1 to 4294967295"),
        ({"retention_ms": 1 << 63}, "0 to 9223372036854775807"),
        ({"retention_bytes": -(1 << 63) - 1}, "0 to 9223372036854775807"),
        ({"unclean_recovery_after_ms": 1 << 63}, "0 to 9223372036854775807"),
        ({"min_acks": "all"}, "none, wal, durable"),
    ],
)
async def test_what_no_message_can_carry_is_refused_with_its_name(address, platform, wrong, limit):
    (name, value), *_ = wrong.items()
    async with Admin(address) as admin:
        with pytest.raises(errors.InvalidArgument, match=f"{name} is {value!r}, must be .*{limit}"):
            await admin.create_topic("t", **wrong)


async def test_offsets_and_groups(address, platform):
    await platform.create_topic("t", 2)
    async with Producer(address) as producer:
        await producer.send_many("t", [b"a", b"b", b"c"], timestamps_ms=[10, 20, 30], partition=1)
    async with Admin(address) as admin:
        latest = await admin.offsets("t", "latest")
        assert {where: found.offset for where, found in latest.items()} == {("t", 0): 0, ("t", 1): 3}
        found = await admin.offsets("t", 15, partitions=[1])
        assert (found["t", 1].offset, found["t", 1].timestamp_ms) == (1, 20)
        with pytest.raises(errors.UnknownGroup):
            await admin.group_offsets("g")
        await admin.commit_group_offsets("g", {("t", 1): 2})
        (committed,) = await admin.group_offsets("g")
        assert (committed.topic, committed.partition, committed.offset) == ("t", 1, 2)
    async with Consumer(address, assign=[("t", 1)], group="g") as consumer:
        async for record in consumer:
            assert record.value == b"c"
            break


async def test_a_commit_names_the_topic_that_it_is_of(address, platform):
    await platform.create_topic("t", 2)
    await platform.create_topic("other", 1)
    async with Admin(address) as admin:
        ids = {"t": (await admin.describe_topic("t")).topic.topic_id}
        await admin.commit_group_offsets("g", {("t", 1): 2, ("other", 0): 7}, topic_ids=ids)
        assert [(item.topic, item.topic_id) for item in await admin.group_offsets("g") if item.topic == "t"] == [
            ("t", ids["t"])
        ]
        await admin.delete_topic("t")
        await platform.create_topic("t", 2)
        with pytest.raises(errors.UnknownTopic):
            await admin.commit_group_offsets("g", {("other", 0): 8, ("t", 1): 3}, topic_ids=ids)
        assert [(item.topic, item.offset) for item in await admin.group_offsets("g")] == [("other", 7)]
        await admin.commit_group_offsets("g", {("t", 1): 1})  # whichever there is
        with pytest.raises(errors.InvalidArgument, match="no topic id"):
            await admin.commit_group_offsets("g", {("t", 1): 3}, topic_ids={"t": "ab"})
        with pytest.raises(errors.InvalidArgument, match="names topic 'x'"):
            await admin.commit_group_offsets("g", {("t", 1): 3}, topic_ids={"x": ids["t"]})


async def test_status(address, platform):
    async with Admin(address) as admin:
        status = await admin.status()
    assert status.sessions[0].role == "ingest"
    assert status.events_position == platform.position


async def test_nobody_there():
    async with Admin("127.0.0.1:1", retry_timeout_ms=1) as admin:
        with pytest.raises(errors.Unavailable):
            await admin.list_topics()


async def test_the_next_coordinator_is_asked(address, platform):
    await platform.create_topic("t", 1)
    async with Admin(f"127.0.0.1:1,{address}") as admin:
        assert len(await admin.list_topics()) == 1


async def test_an_admin_that_is_closed_refuses_and_connects_no_more(address, platform):
    """A call after `close` made a connection that nobody closed."""
    await platform.create_topic("t", 1)
    admin = Admin(address)
    await admin.list_topics()
    await admin.close()
    for call in (admin.list_topics, lambda: admin.offsets("t", "latest"), admin.status):
        with pytest.raises(errors.InvalidArgument, match="closed"):
            await call()
    assert not admin._peers._connections


async def test_a_consumer_that_is_closed_commits_no_more(address, platform):
    await platform.create_topic("t", 1)
    consumer = Consumer(address, assign=[("t", 0)], group="g")
    await consumer.start()
    await consumer.close()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        await consumer.commit({("t", 0): 0})
    assert not consumer._peers._connections


async def test_metadata_is_fetched_once_and_anew_when_it_is_stale(address, platform):
    await platform.create_topic("t", 2)
    peers = Peers(address, 5000)
    metadata = MetadataCache(peers)
    assert (await metadata.topic("t")).leaders == [address, address]
    known = await metadata.topic("t")
    assert platform.faults.calls["get_metadata"] == 1
    await metadata.refresh("t", since_ms=known.fetched_ms - 1)
    assert platform.faults.calls["get_metadata"] == 1
    platform.advertise(leader="")
    await metadata.refresh("t", since_ms=known.fetched_ms)
    assert (await metadata.topic("t")).leaders == ["", ""]
    await platform.delete_topic("t")
    with pytest.raises(errors.UnknownTopic):
        await metadata.refresh("t")
    assert metadata.cached("t") is None
    await peers.close()


async def test_reading_goes_on_at_the_next_query_service(address, platform):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_many("t", [b"%d" % n for n in range(100)])
    platform.advertise(readers=["127.0.0.1:1", address])
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        assert len([record async for record in consumer]) == 100


async def test_more_partitions_than_one_subscription_takes(address, platform):
    await platform.create_topic("t", 600)
    async with Producer(address) as producer:
        for number in (0, 499, 500, 599):
            await producer.send("t", b"%d" % number, partition=number)
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        assert {int(record.value) async for record in consumer} == {0, 499, 500, 599}


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, streamhouse; print([name for name in ('grpc', 'numpy', 'pyarrow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_producers_and_consumers_come_without_what_only_services_need():
    code = (
        "import sys\nfrom streamhouse import Admin, Consumer, Producer\n"
        "print([name for name in ('pydantic', 'opentelemetry.sdk', 'shread', 'shstore') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_and_the_synchronous_client_come_with_the_package():
    """`except streamhouse.errors.NotLeader` raised AttributeError where nothing else had loaded the errors."""
    script = "import streamhouse; streamhouse.errors.NotLeader; streamhouse.sync.Producer"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_an_unknown_name_is_an_attribute_error():
    import streamhouse

    with pytest.raises(AttributeError):
        _ = streamhouse.Nothing
    assert "Producer" in dir(streamhouse)
