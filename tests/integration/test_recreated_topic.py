"""A topic that is deleted and created again under its name is another topic: nothing of the old one is ever shown, by
whatever cache, log or index still holds it, and positions of its readers do not count."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shproto.errors import UnknownGroup
from shproto.rpc import Connection
from shproto.services import CoordinatorClient, QueryClient
from shproto.v1 import coordinator_pb2
from shstore.open import configured_store
from shstore.settings import StoreSettings
from streamhouse import Admin, Consumer, Producer

from tests.integration.cluster import Cluster
from tests.integration.reading import read_partition, registered_ends

TOPIC, GROUP = "orders", "readers"
PARTITIONS, RECORDS = 2, 300
PATIENCE_S = 60

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture
async def cluster(storage, redis_server, tmp_path: Path) -> AsyncIterator[Cluster]:  # type: ignore[no-untyped-def]
    common = {
        **storage,
        **redis_server.settings,
        "STREAMHOUSE_SEAL_AGE_MS": "500",
        "STREAMHOUSE_ORPHAN_GRACE_MS": "1000",
        "STREAMHOUSE_ORPHAN_CONFIRM_MS": "500",
        "STREAMHOUSE_ORPHAN_SWEEP_INTERVAL_MS": "500",
    }
    cluster = Cluster(common, tmp_path, {"coordinator": 1, "ingest": 1, "query": 2, "segmenter": 1})
    try:
        await cluster.start()
        yield cluster
        assert set((await cluster.stop()).values()) == {0}
    finally:
        cluster.kill_all()


async def produce(producer: Producer, life: str) -> list[list[bytes]]:
    """Values by partition, in order, as large as those of every other life: stored ones, then some that may be only in
    the agent's log."""
    sent = []
    for partition in range(PARTITIONS):
        values = [f"{life} {partition} {number:06d}".encode() * 20 for number in range(RECORDS)]
        half = RECORDS // 2
        await (await producer.send_many(TOPIC, values[:half], partition=partition))
        sent.append(values)
    for partition in range(PARTITIONS):
        await (await producer.send_many(TOPIC, sent[partition][RECORDS // 2 :], partition=partition))
    return sent


async def shown(cluster: Cluster) -> list[list[list[bytes | None]]]:
    """What each query service gives of each partition."""
    found = []
    for name in ("query-1", "query-2"):
        query = QueryClient(Connection([cluster.addresses[name]]))
        try:
            contents = [await read_partition(query, TOPIC, partition) for partition in range(PARTITIONS)]
        finally:
            await query.close()
        assert all(part.offsets == list(range(len(part.offsets))) for part in contents), "offsets begin anew"
        found.append([part.values for part in contents])
    return found


async def follow(cluster: Cluster, count: int) -> list[bytes | None]:
    """What a new member of the group is given, from where the group stands; commits all of it."""
    values: list[bytes | None] = []
    async with Consumer(cluster.bootstrap, [TOPIC], group=GROUP, start="earliest") as consumer:
        async with asyncio.timeout(PATIENCE_S):
            async for batch in consumer.batches():
                values += batch.values.to_list()
                if len(values) >= count:
                    break
        await consumer.commit()
    return values


async def committed(coordinator: CoordinatorClient) -> list[int]:
    """The group's positions."""
    try:
        answer = await coordinator.fetch_offsets(coordinator_pb2.FetchOffsetsRequest(group=GROUP))
    except UnknownGroup:
        return []
    return [item.offset for item in answer.offsets if item.offset >= 0]


async def object_keys(coordinator: CoordinatorClient) -> set[str]:
    return {
        segment.object_key
        async for part in coordinator.get_snapshot(coordinator_pb2.GetSnapshotRequest())
        for item in part.partitions
        for segment in item.segments
    }


async def wait_until_registered(coordinator: CoordinatorClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await registered_ends(coordinator, TOPIC) != [RECORDS] * PARTITIONS:
            await asyncio.sleep(0.1)


async def wait_until_swept(storage: dict[str, str], keys: set[str]) -> None:
    """Until none of the objects is in the store."""
    environ = {name: value for name, value in storage.items() if name.startswith("STREAMHOUSE_S3_")}
    store = configured_store(StoreSettings.load(environ))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while keys & {info.key async for info in store.list("")}:
                await asyncio.sleep(0.2)
    finally:
        await store.close()


async def test_a_topic_created_again_never_shows_old_data(cluster: Cluster, storage: dict[str, str]) -> None:
    """Three lives under one name, the same producer, the same number and sizes of records; caches warm each time."""
    coordinator = CoordinatorClient(Connection(cluster.bootstrap.split(",")))
    try:
        async with Admin(cluster.bootstrap) as admin, Producer(cluster.bootstrap, acks="wal") as producer:
            for life in ("first", "other", "third"):
                await admin.create_topic(TOPIC, partitions=PARTITIONS)
                assert await committed(coordinator) == [], "the positions of the life before"
                sent = await produce(producer, life)
                assert await shown(cluster) == [sent, sent], "partly from the agent's log"
                assert sorted(filter(None, await follow(cluster, PARTITIONS * RECORDS))) == sorted(
                    itertools.chain(*sent)
                )
                if life != "other":  # the second life ends with records that only the log has
                    await wait_until_registered(coordinator)
                    for _ in range(2):
                        assert await shown(cluster) == [sent, sent], "from the store, then from the caches"
                assert await committed(coordinator) == [RECORDS] * PARTITIONS
                keys = await object_keys(coordinator)
                await admin.delete_topic(TOPIC)
                if life == "first":
                    await wait_until_swept(storage, keys)
    finally:
        await coordinator.close()


async def test_a_member_that_lives_through_it_starts_anew(cluster: Cluster) -> None:
    """The group assigns by name, so it may have nothing to tell the member, which goes on committing."""
    coordinator = CoordinatorClient(Connection(cluster.bootstrap.split(",")))
    values: list[bytes | None] = []

    async def take(consumer: Consumer, until: set[bytes]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            async for batch in consumer.batches():
                values.extend(batch.values.to_list())
                if until <= set(values):
                    break

    try:
        async with Admin(cluster.bootstrap) as admin, Producer(cluster.bootstrap, acks="wal") as producer:
            await admin.create_topic(TOPIC, partitions=PARTITIONS)
            first = await produce(producer, "first")
            async with Consumer(
                cluster.bootstrap, [TOPIC], group=GROUP, start="earliest", auto_commit_interval_ms=50
            ) as consumer:
                await take(consumer, set(itertools.chain(*first)))
                await admin.delete_topic(TOPIC)
                await admin.create_topic(TOPIC, partitions=PARTITIONS)
                other = await produce(producer, "other")
                values.clear()
                await take(consumer, set(itertools.chain(*other)))
                assert set(values) == set(itertools.chain(*other)), "all of it, and nothing of the first"
                await consumer.commit()
            assert await committed(coordinator) == [RECORDS] * PARTITIONS
            await admin.delete_topic(TOPIC)
    finally:
        await coordinator.close()
