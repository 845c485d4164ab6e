"""Backups and restores of a real database, and what the coordinator says to those who knew the old one."""

import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from shformat import Records, SegmentBuilder, encode_batch
from shproto.errors import InvalidArgument, MetadataWentBack, UnknownProducer
from shproto.events import GroupDeleted
from shproto.v1 import coordinator_pb2 as pb
from shstore import MemoryStore
from streamhouse_coordinator import wiring
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.recovery import backup
from streamhouse_coordinator.recovery import backup_format as fmt
from streamhouse_coordinator.recovery.restore_plan import JUMP_EPOCHS, JUMP_OFFSETS, JUMP_PRODUCER_IDS, MISSING_REASON
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService

from services.coordinator.tests.running import running

pytestmark = pytest.mark.long

Fast = Callable[..., CoordinatorSettings]
OpenAgent = Callable[..., Awaitable[Any]]
PROJECTIONS = (t.TOPICS, t.PARTITIONS, t.RANGES, t.SEGMENTS, t.GROUPS)


def quiet(what: str, done: int, total: int) -> None:
    """No progress display."""


async def restore(dsn: str, store: MemoryStore, *, dry_run: bool = False, accept_holes: bool = False) -> Any:
    report, _ = await wiring.restore_backup(
        dsn, store, "latest", dry_run=dry_run, accept_holes=accept_holes, progress=quiet
    )
    return report


@asynccontextmanager
async def another_database(dsn: str) -> AsyncIterator[str]:
    """The DSN of an empty one on the same server."""
    name = f"other_{os.urandom(6).hex()}"
    here = dsn.split("?")[0].rsplit("/", 1)[1]
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
        yield dsn.replace(f"/{here}?", f"/{name}?")
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


async def rows_of(dsn: str) -> dict[str, Any]:
    connection = await asyncpg.connect(dsn)
    try:
        found = {item.name: await connection.fetch(f"SELECT * FROM {item.name}") for item in PROJECTIONS}
        return {name: sorted(map(tuple, rows)) for name, rows in found.items()}
    finally:
        await connection.close()


class Stored:
    """An agent whose segments really lie in a store."""

    def __init__(self, agent: Any, store: MemoryStore) -> None:
        self.agent, self.store = agent, store

    async def write(self, grant: pb.RangeGrant, base: int, end: int, *, registered: bool = True) -> None:
        batch = encode_batch(Records.from_lists([b"v"] * (end - base)), base_offset=base, epoch=grant.epoch)
        builder = SegmentBuilder(grant.topic_id, grant.partition, grant.epoch)
        builder.add(batch)
        built = builder.finish()
        name = f"{grant.topic}.{grant.topic_id.hex()[:8]}"
        key = f"data/{name}/{grant.partition}/{base:020d}-{grant.epoch}-{uuid.uuid4().hex}.seg"
        await self.store.put(key, built.parts)
        if registered:
            assert await self.agent.write(grant, base, end, object_key=key, size_bytes=built.info.size_bytes) == 1


@asynccontextmanager
async def platform(coordinator: CoordinatorService, open_agent: OpenAgent) -> AsyncIterator[Stored]:
    await coordinator.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    store = MemoryStore()
    yield Stored(await open_agent(coordinator.api, "a"), store)
    await store.close()


@pytest.mark.smoke
async def test_a_restored_database_knows_what_was_registered_after_the_backup(
    coordinator: CoordinatorService, open_agent: OpenAgent, dsn: str, fast: Fast
) -> None:
    async with platform(coordinator, open_agent) as stored, another_database(dsn) as fresh:
        grant = (await stored.agent.leads())[0]
        await stored.write(grant, 0, 10)
        manifest = await wiring.take_backup(dsn, stored.store)
        await stored.write(grant, 10, 30)
        await stored.write(grant, 40, 50, registered=False)
        planned = await restore(fresh, stored.store, dry_run=True)
        assert (planned.segments, planned.adopted_records, planned.stranded_segments) == (1, 20, 1)
        report = await restore(fresh, stored.store)
        assert (report.backup, report.segments, report.adopted_records) == (manifest.name, 1, 20)
        after = await rows_of(fresh)
        assert {row[4:6] for row in after["segments"]} == {(0, 10), (10, 30)}
        assert after["ranges"][0][5] == 30, "registered_end"
        # Nothing else is to look at tables while they are rebuilt: no sweep.
        settings = fast(fresh, session_sweep_interval_ms=150_000)
        async with running(settings) as restored:
            status = await restored.api.get_status(pb.GetStatusRequest())
            assert status.history_id == report.history_id and not status.sessions
            assert (await restored.api.init_producer(pb.InitProducerRequest())).producer_id > JUMP_PRODUCER_IDS
            other = await open_agent(restored.api, "b")
            new = (await other.leads())[0]
            assert new.epoch == 1 + JUMP_EPOCHS + 1 and new.start_offset > JUMP_OFFSETS
            # The projections are what the events say, those of the restore included.
            before = await rows_of(fresh)
            await restored.context.store.rebuild()
            assert await rows_of(fresh) == before


async def test_a_named_producer_of_before_a_restore_is_refused_until_it_is_deleted(
    coordinator: CoordinatorService, open_agent: OpenAgent, dsn: str, fast: Fast
) -> None:
    """A new id would know of no sequence, so its stream would begin at 0 and be written twice."""
    taken = await coordinator.api.init_producer(pb.InitProducerRequest(name="sink"))
    async with platform(coordinator, open_agent) as stored, another_database(dsn) as fresh:
        await wiring.take_backup(dsn, stored.store)
        await restore(fresh, stored.store)
        async with running(fast(fresh)) as restored:
            with pytest.raises(UnknownProducer, match="from before the metadata was restored") as refused:
                await restored.api.init_producer(pb.InitProducerRequest(name="sink"))
            assert refused.value.details["producer_id"] == str(taken.producer_id)
            other = await restored.api.init_producer(pb.InitProducerRequest(name="another"))
            assert (other.producer_id > JUMP_PRODUCER_IDS, other.producer_epoch) == (True, 1)
            await restored.api.delete_producer(pb.DeleteProducerRequest(name="sink"))
            anew = await restored.api.init_producer(pb.InitProducerRequest(name="sink"))
            assert (anew.producer_id > other.producer_id, anew.producer_epoch) == (True, 1)


async def test_a_topic_created_again_long_after_comes_back(
    coordinator: CoordinatorService, dsn: str, fast: Fast
) -> None:
    """Its name is free once the rows of the old one are gone, also where others came first among the same events."""
    api, store = coordinator.api, MemoryStore()
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    # So many events that the topic is there when the batch begins in which it goes and comes again.
    await coordinator.context.store.run(lambda tx: tx.append([GroupDeleted("gone")] * 1000))
    await api.create_topic(pb.CreateTopicRequest(topic="other", partitions=1))
    await api.delete_topic(pb.DeleteTopicRequest(topic="orders"))
    again = await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    await wiring.take_backup(dsn, store)
    async with another_database(dsn) as fresh:
        await restore(fresh, store)
        async with running(fast(fresh, session_sweep_interval_ms=150_000)) as restored:
            await restored.context.store.rebuild()
            found = await restored.api.list_topics(pb.ListTopicsRequest())
            assert {item.topic: item.partitions for item in found.topics} == {"orders": 2, "other": 1}
            assert again.topic_id in {item.topic_id for item in found.topics}
    await store.close()


async def test_holes_are_accepted_where_that_is_asked_for(
    coordinator: CoordinatorService, open_agent: OpenAgent, dsn: str
) -> None:
    async with platform(coordinator, open_agent) as stored, another_database(dsn) as fresh:
        grant = (await stored.agent.leads())[0]
        await wiring.take_backup(dsn, stored.store)
        await stored.write(grant, 0, 10)
        await stored.write(grant, 20, 30, registered=False)
        report = await restore(fresh, stored.store, accept_holes=True)
        assert (report.adopted_records, report.lost_spans) == (20, 1)
        found = {(row[4:6], row[13]) for row in (await rows_of(fresh))["segments"]}
        assert found == {((0, 10), ""), ((10, 20), MISSING_REASON), ((20, 30), "")}


async def test_a_database_that_is_not_empty_is_refused(
    coordinator: CoordinatorService, open_agent: OpenAgent, dsn: str
) -> None:
    async with platform(coordinator, open_agent) as stored, another_database(dsn) as fresh:
        await wiring.take_backup(dsn, stored.store)
        with pytest.raises(InvalidArgument, match=r"not empty: .* rows in events"):
            await restore(dsn, stored.store)
        connection = await asyncpg.connect(fresh)
        await connection.execute("CREATE TABLE accounts (id int)")
        await connection.close()
        with pytest.raises(InvalidArgument, match="accounts"):
            await restore(fresh, stored.store)


async def test_a_damaged_backup_leaves_the_database_empty(
    coordinator: CoordinatorService, open_agent: OpenAgent, dsn: str
) -> None:
    async with platform(coordinator, open_agent) as stored, another_database(dsn) as fresh:
        manifest = await wiring.take_backup(dsn, stored.store)
        chunk = manifest.chunks[-1]
        body = await stored.store.get(chunk.key)
        await stored.store.put(chunk.key, [body[:-1] + bytes([body[-1] ^ 1])], if_absent=False)
        with pytest.raises(fmt.BackupDamaged, match="not the bytes"):
            await restore(fresh, stored.store)
        await stored.store.put(chunk.key, [body], if_absent=False)
        assert (await restore(fresh, stored.store)).events == manifest.position, "nothing had been written"


async def test_what_has_no_manifest_is_no_backup_and_old_ones_go(coordinator: CoordinatorService, dsn: str) -> None:
    store = MemoryStore()
    with pytest.raises(InvalidArgument, match="no backup"):
        await backup.read_manifest(store, "latest")
    await store.put("backup/20200101T000000Z-000000000001/events-000000.jsonl.gz", [b"cut off"])
    kept = await wiring.take_backup(dsn, store)
    await store.put(fmt.manifest_key("20200102T000000Z-000000000001"), [b"old"])
    listed = await backup.list_backups(store)
    assert listed.backups == ["20200102T000000Z-000000000001", kept.name]
    assert listed.half_made == ["20200101T000000Z-000000000001"]
    assert await wiring.prune_backups(store, 1) == ["20200102T000000Z-000000000001"], "a young half stays for now"
    assert await wiring.read_backups(store) == [kept]
    assert await backup.prune(store, 1, kept.created_ms + 2 * backup.HALF_MADE_MS) == listed.half_made


@pytest.mark.smoke
async def test_an_agent_brings_epochs_and_topics_that_only_its_log_knows(
    coordinator: CoordinatorService, open_agent: OpenAgent, dsn: str, fast: Fast
) -> None:
    async with platform(coordinator, open_agent) as stored, another_database(dsn) as fresh:
        grant = (await stored.agent.leads())[0]
        await wiring.take_backup(dsn, stored.store)
        await restore(fresh, stored.store)
        async with running(fast(fresh)) as restored:
            unknown = uuid.uuid4().bytes
            ends = [
                pb.WalEnd(topic_id=grant.topic_id, partition=0, epoch=1, first_offset=0, end_offset=7),
                pb.WalEnd(topic_id=grant.topic_id, partition=0, epoch=5, first_offset=2000, end_offset=2010),
                pb.WalEnd(topic_id=unknown, partition=1, epoch=2, first_offset=50, end_offset=60, topic="later"),
            ]
            request = pb.OpenSessionRequest(
                agent_id="a", role="ingest", address="127.0.0.1:1", wal_id=stored.agent.wal_id, wal_ends=ends
            )
            opened = await restored.api.open_session(request)
            resumed = [(g.topic, g.partition, g.epoch, g.registered_end, g.end_offset) for g in opened.resumed]
            assert sorted(resumed) == [("later", 1, 2, 50, 60), ("orders", 0, 1, 0, 7), ("orders", 0, 5, 2000, 2010)]
            topics = (await restored.api.list_topics(pb.ListTopicsRequest())).topics
            assert [(topic.topic, topic.partitions, topic.topic_id) for topic in topics if topic.topic == "later"] == [
                ("later", 2, unknown)
            ]
            # Another agent knows one more partition of it.
            more = [pb.WalEnd(topic_id=unknown, partition=3, epoch=1, first_offset=0, end_offset=5)]
            request = pb.OpenSessionRequest(
                agent_id="b", role="ingest", address="127.0.0.1:2", wal_id=uuid.uuid4().bytes, wal_ends=more
            )
            (found,) = (await restored.api.open_session(request)).resumed
            assert (found.topic, found.partition, found.epoch, found.end_offset) == ("later", 3, 1, 5)
            described = await restored.api.describe_topic(pb.DescribeTopicRequest(topic="later"))
            assert [item.partition for item in described.partitions] == [0, 1, 2, 3]
            waiting = await restored.api.complete_restore(pb.CompleteRestoreRequest(dry_run=True))
            assert {(item.topic, item.partition) for item in waiting.unrecovered_ranges} == {
                ("orders", 0), ("later", 0), ("later", 1), ("later", 2), ("later", 3),
            }  # fmt: skip
            await restored.api.complete_restore(pb.CompleteRestoreRequest())
            assert not (await restored.api.complete_restore(pb.CompleteRestoreRequest())).unrecovered_ranges
            before = await rows_of(fresh)
            await restored.context.store.rebuild()
            assert await rows_of(fresh) == before


async def test_what_was_registered_and_is_in_no_object_is_registered_as_lost(
    coordinator: CoordinatorService, open_agent: OpenAgent, dsn: str, fast: Fast
) -> None:
    async with platform(coordinator, open_agent) as stored, another_database(dsn) as fresh:
        grant = (await stored.agent.leads())[0]
        await wiring.take_backup(dsn, stored.store)
        await stored.write(grant, 0, 10)
        await restore(fresh, stored.store)
        async with running(fast(fresh)) as restored:
            end = pb.WalEnd(topic_id=grant.topic_id, partition=0, epoch=1, first_offset=20, end_offset=25)
            request = pb.OpenSessionRequest(
                agent_id="a", role="ingest", address="127.0.0.1:1", wal_id=stored.agent.wal_id, wal_ends=[end]
            )
            (found,) = (await restored.api.open_session(request)).resumed
            assert (found.registered_end, found.end_offset) == (20, 25)
            spans = [(row[4:6], row[13]) for row in (await rows_of(fresh))["segments"]]
            assert ((10, 20), MISSING_REASON) in spans


async def test_lost_unrecovered_ranges_are_told_to_readers(
    coordinator: CoordinatorService, open_agent: OpenAgent, dsn: str, fast: Fast
) -> None:
    async with platform(coordinator, open_agent) as stored, another_database(dsn) as fresh:
        await wiring.take_backup(dsn, stored.store)
        await restore(fresh, stored.store)
        async with running(fast(fresh)) as restored:
            with pytest.raises(InvalidArgument, match="reason"):
                await restored.api.complete_restore(pb.CompleteRestoreRequest(reason="why"))
            answer = await restored.api.complete_restore(pb.CompleteRestoreRequest(lost=True, reason="burnt"))
            assert [(item.topic, item.range.status) for item in answer.unrecovered_ranges] == [("orders", "orphaned")]
            described = await restored.api.describe_topic(pb.DescribeTopicRequest(topic="orders"))
            assert [item.status for item in described.partitions[0].ranges if item.status == "lost"] == ["lost"]


async def test_an_agent_is_refused_by_metadata_that_went_back(
    coordinator: CoordinatorService, open_agent: OpenAgent, dsn: str, fast: Fast
) -> None:
    api = coordinator.api
    async with (
        platform(coordinator, open_agent) as stored,
        another_database(dsn) as fresh,
        another_database(dsn) as new,
    ):
        status = await api.get_status(pb.GetStatusRequest())
        await wiring.take_backup(dsn, stored.store)
        report = await restore(fresh, stored.store)

        def opening(history_id: str, position: int) -> pb.OpenSessionRequest:
            return pb.OpenSessionRequest(
                agent_id="a", role="ingest", wal_id=stored.agent.wal_id, history_id=history_id, seen_position=position
            )

        with pytest.raises(MetadataWentBack, match="older than what was seen"):
            await api.open_session(opening(status.history_id, status.events_position + 1))
        with pytest.raises(MetadataWentBack, match="does not go on"):
            await api.open_session(opening(report.history_id, 1))
        assert (
            await api.open_session(opening(status.history_id, status.events_position))
        ).history_id == status.history_id
        async with running(fast(fresh)) as restored:
            opened = await restored.api.open_session(opening(status.history_id, 10**9))
            assert opened.history_id == report.history_id and opened.producer_ids_from > JUMP_PRODUCER_IDS
        async with running(fast(new)) as empty:
            with pytest.raises(MetadataWentBack, match="streamhouse restore"):
                await empty.api.open_session(opening(status.history_id, 1))


async def test_a_log_that_names_no_history_is_refused_where_it_has_more_than_was_granted(
    coordinator: CoordinatorService, open_agent: OpenAgent
) -> None:
    """Agents of a version that kept no note of it, and those whose note was deleted."""
    api = coordinator.api

    async def create(topic: str) -> bytes:
        return (await api.create_topic(pb.CreateTopicRequest(topic=topic, partitions=1))).topic_id

    orders, gone = await create("orders"), await create("gone")
    agent = await open_agent(api, "a")
    epochs = {grant.topic_id: grant.epoch for grant in await agent.grants()}
    await api.delete_topic(pb.DeleteTopicRequest(topic="gone"))
    known = {(topic_id, 0, epoch): 0 for topic_id, epoch in epochs.items()}
    assert {key[0] for key in known} == {orders, gone}
    await agent.open(known)  # what it holds of a deleted topic it is to drop
    before = (await api.get_head(pb.GetHeadRequest())).events_position
    for unknown in ((orders, 0, epochs[orders] + 7), (b"x" * 16, 0, 1)):
        with pytest.raises(MetadataWentBack, match="never granted"):
            await agent.open(known | {unknown: 10})
    assert (await api.get_head(pb.GetHeadRequest())).events_position == before, "nothing was settled or granted"


async def test_followers_are_cut_off_when_the_history_changes_under_them(
    coordinator: CoordinatorService, dsn: str
) -> None:
    api = coordinator.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    status = await api.get_status(pb.GetStatusRequest())
    with pytest.raises(MetadataWentBack):
        await anext(aiter(api.follow_events(pb.FollowEventsRequest(after_position=0, history_id="another"))))
    events = api.follow_events(pb.FollowEventsRequest(after_position=0, history_id=status.history_id))
    assert (await anext(events)).type == "TopicCreated"
    # As an old dump in the place of the database would look: another history, fewer events.
    connection = await asyncpg.connect(dsn)
    async with connection.transaction():
        await connection.execute("INSERT INTO histories VALUES (2, 'restored', 0, 0, 0)")
        await connection.execute("DELETE FROM events")
        await connection.execute("UPDATE event_position SET position = 0")
    await connection.close()
    with pytest.raises(MetadataWentBack, match="replaced"):
        await anext(events)


async def test_a_restored_job_is_lost_since_its_place_is_not_known(
    coordinator: CoordinatorService, open_agent: OpenAgent, dsn: str, fast: Fast
) -> None:
    """Started from the beginning it would write its output once more."""
    async with platform(coordinator, open_agent) as stored, another_database(dsn) as fresh:
        api = coordinator.api
        topic = (await api.list_topics(pb.ListTopicsRequest())).topics[0].topic
        made = await api.create_sql_job(
            pb.CreateSqlJobRequest(job="copy", kind="insert", statement="INSERT", output_topic=topic)
        )
        await wiring.take_backup(dsn, stored.store)
        await restore(fresh, stored.store)
        async with running(fast(fresh)) as restored:
            (job,) = (await restored.api.list_sql_jobs(pb.ListSqlJobsRequest())).jobs
            assert (job.job_id, job.state) == (made.job_id, "lost") and "restored" in job.reason
            with pytest.raises(InvalidArgument, match="restored"):
                await restored.api.alter_sql_job(pb.AlterSqlJobRequest(job="copy", state="running"))
            token = (
                await restored.api.open_session(pb.OpenSessionRequest(agent_id="w", role="sql", address="127.0.0.1:1"))
            ).session_token
            assert not (await restored.api.claim_sql_jobs(pb.ClaimSqlJobsRequest(session_token=token))).granted
            await restored.api.drop_sql_job(pb.DropSqlJobRequest(job="copy"))
