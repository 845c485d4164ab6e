"""Events that nobody needs are pruned: what follows from them stays, whoever is behind hears of it, nothing grows."""

import asyncio
import hashlib
import json
import tarfile
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from shproto.errors import EventsPruned, MetadataWentBack
from shproto.v1 import coordinator_pb2 as pb
from shstore import MemoryStore
from streamhouse_coordinator.adapters import postgres_backup
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.feed import Feed
from streamhouse_coordinator.recovery import backup, restore
from streamhouse_coordinator.recovery import backup_format as fmt
from streamhouse_coordinator.service import pruning
from streamhouse_coordinator.service.common import Context
from streamhouse_coordinator.wiring import CoordinatorService, restore_backup, take_backup

from services.coordinator.tests.running import PATIENCE_S, running

pytestmark = pytest.mark.long

HOUR_MS = 3_600_000
ARCHIVES = sorted((Path(__file__).parents[3] / "tests" / "integration" / "data_directories").glob("*.tar.gz"))
# Everything that can go goes, at once; prune() is called by the tests.
AT_ONCE = {"events_retention_ms": 1_000, "events_kept_min": 1, "events_prune_interval_ms": 86_400_000}

Settings = Callable[..., Any]
ChangeRows = Callable[..., Any]


@pytest.fixture
async def service(dsn: str, fast: Settings) -> AsyncIterator[CoordinatorService]:
    async with running(fast(dsn, **AT_ONCE)) as started:
        yield started


def later(service: CoordinatorService, ms: int) -> Context:
    """The context of pruning as if `ms` had gone by. Rows stay as they are: coordinators compare what they read."""
    settings = service.context.settings
    shorter = {name: getattr(settings, name) - ms for name in ("events_retention_ms", "outbox_retention_ms")}
    return replace(service.context, settings=settings.model_copy(update=shorter))


@pytest.fixture
def prune() -> Callable[[CoordinatorService], Any]:
    """`await prune(service)`: as if events_retention_ms had gone by since the last event."""
    return lambda service: pruning.prune(later(service, HOUR_MS))


async def live_for_a_while(service: CoordinatorService, open_agent: Any, rounds: int = 3) -> Any:
    """Some of everything that becomes an event; returns the agent."""
    api = service.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=3))
    await api.create_topic(pb.CreateTopicRequest(topic="gone", partitions=1))
    agent = await open_agent(api, "a")
    for nth in range(rounds):
        for grant in (await agent.leads()).values():
            if grant.topic == "orders":
                await agent.write(grant, 10 * nth, 10 * nth + 10)
    await api.delete_topic(pb.DeleteTopicRequest(topic="gone"))
    member = await api.join_group(pb.JoinGroupRequest(group="g", topics=["orders"]))
    await api.leave_group(pb.LeaveGroupRequest(group="g", member_id=member.member_id))
    await api.join_group(pb.JoinGroupRequest(group="g", topics=["orders"]))
    return agent


async def projections(connection: asyncpg.Connection) -> dict[str, list[Any]]:
    found = {}
    for table in t.PROJECTIONS:
        rows = await connection.fetch(f"SELECT * FROM {table.name}")
        found[table.name] = sorted((tuple(row) for row in rows), key=repr)
    return found


@pytest.mark.smoke
async def test_projections_are_rebuilt_from_what_is_left(
    service: CoordinatorService, open_agent: Any, prune: Any, connection: asyncpg.Connection
) -> None:
    agent = await live_for_a_while(service, open_agent)
    head = (await service.api.get_head(pb.GetHeadRequest())).events_position
    assert await prune(service) == head - 1
    assert await connection.fetchval("SELECT count(*) FROM events") == 1
    for grant in (await agent.leads()).values():
        await agent.write(grant, 30, 40)
    before = await projections(connection)
    assert all(before[name] for name in ("segments", "ranges", "deleted_topics", "sessions", "groups"))
    await service.context.store.rebuild()
    assert await projections(connection) == before
    kept = await connection.fetchval("SELECT count(*) FROM events")
    assert kept > 1, "what was written meanwhile"
    assert await prune(service) == kept - 1
    await service.context.store.rebuild()
    assert await projections(connection) == before, "also when the bases have moved on"


async def test_events_are_kept_for_as_long_as_is_set(
    dsn: str, fast: Settings, open_agent: Any, change_rows: ChangeRows, connection: asyncpg.Connection
) -> None:
    async with running(fast(dsn, events_retention_ms=600_000, events_kept_min=5)) as service:
        await live_for_a_while(service, open_agent)
        assert await pruning.prune(service.context) == 0, "none is old enough"
        await change_rows("UPDATE events SET created_ms = created_ms - 700000 WHERE position <= 4")
        assert await pruning.prune(service.context) == 4
        await pruning.prune(later(service, 700_000))
        assert await connection.fetchval("SELECT count(*) FROM events") == 5, "the newest stay whatever their age"


async def test_it_is_done_in_the_background(dsn: str, fast: Settings, connection: asyncpg.Connection) -> None:
    settings = fast(dsn, events_retention_ms=1_000, events_kept_min=1, events_prune_interval_ms=50)
    async with running(settings) as service:
        for number in range(5):
            await service.api.create_topic(pb.CreateTopicRequest(topic=f"t{number}", partitions=1))
        async with asyncio.timeout(PATIENCE_S):
            while await connection.fetchval("SELECT count(*) FROM events") > 1:
                await asyncio.sleep(0.05)


async def test_two_coordinators_prune_each_event_once(
    dsn: str, fast: Settings, open_agent: Any, connection: asyncpg.Connection
) -> None:
    async with running(fast(dsn, **AT_ONCE)) as one, running(fast(dsn, **AT_ONCE)) as two:
        await live_for_a_while(one, open_agent, rounds=20)
        head = (await one.api.get_head(pb.GetHeadRequest())).events_position
        counts = await asyncio.gather(
            *(pruning.prune(later(service, HOUR_MS)) for service in (one, two) for _ in range(4))
        )
        assert sum(counts) == head - 1
        before = await projections(connection)
        await one.context.store.rebuild()
        assert await projections(connection) == before


async def test_an_event_of_a_newer_version_is_kept_and_all_behind_it(
    service: CoordinatorService, open_agent: Any, prune: Any, change_rows: ChangeRows
) -> None:
    await live_for_a_while(service, open_agent)
    await change_rows("UPDATE events SET type = 'FromTheFuture' WHERE position = 6")
    assert await prune(service) == 5
    assert await prune(service) == 0


# ---- followers


async def test_a_follower_that_is_behind_is_told_to_start_over(
    service: CoordinatorService, open_agent: Any, prune: Any, all_events: Any
) -> None:
    await live_for_a_while(service, open_agent)
    head = (await service.api.get_head(pb.GetHeadRequest())).events_position
    async with asyncio.timeout(PATIENCE_S):
        while service.feed.position < head:
            await asyncio.sleep(0.01)
    service.feed._recent.clear()  # nothing of it is in memory, as after a restart
    await prune(service)
    with pytest.raises(EventsPruned) as caught:
        await anext(aiter(service.api.follow_events(pb.FollowEventsRequest(after_position=head - 2))))
    assert caught.value.details == {"after_position": str(head - 2), "pruned_position": str(head - 1)}
    (part, *_) = [part async for part in service.api.get_snapshot(pb.GetSnapshotRequest())]
    events = service.api.follow_events(pb.FollowEventsRequest(after_position=part.position))
    coming = asyncio.create_task(anext(events))
    await service.api.create_topic(pb.CreateTopicRequest(topic="later", partitions=1))
    async with asyncio.timeout(PATIENCE_S):
        assert (await coming).position == head + 1
    await events.aclose()


async def test_a_stream_that_falls_behind_ends_with_that(dsn: str, fast: Settings, open_agent: Any, prune: Any) -> None:
    async with running(fast(dsn, events_cached=2, events_batch=2, **AT_ONCE)) as service:
        await service.api.create_topic(pb.CreateTopicRequest(topic="first", partitions=1))
        stream = service.api.follow_events(pb.FollowEventsRequest(after_position=0))
        assert (await anext(stream)).position == 1
        await live_for_a_while(service, open_agent)
        await prune(service)
        with pytest.raises(EventsPruned):
            async with asyncio.timeout(PATIENCE_S):
                async for _ in stream:
                    """What it had read already."""


async def test_a_coordinator_that_was_away_for_longer_notes_no_fork(
    service: CoordinatorService, open_agent: Any, prune: Any, connection: asyncpg.Connection
) -> None:
    """It compares the last event that it read, which is not there: pruned is not the same as gone."""
    await service.api.create_topic(pb.CreateTopicRequest(topic="first", partitions=1))
    away = Feed(service.context.store, poll_interval_ms=20, batch=100, cached=100)
    reading = asyncio.create_task(away.run())
    async with asyncio.timeout(PATIENCE_S):
        while away.position < 1:
            await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.wait([reading])
    await live_for_a_while(service, open_agent)
    await prune(service)
    head = (await service.api.get_head(pb.GetHeadRequest())).events_position
    reading = asyncio.create_task(away.run())
    async with asyncio.timeout(PATIENCE_S):
        while away.position < head:
            await asyncio.sleep(0.01)
    assert await connection.fetchval("SELECT count(*) FROM forks") == 0
    stream = away.follow(head)
    coming = asyncio.create_task(anext(stream))
    await service.api.create_topic(pb.CreateTopicRequest(topic="later", partitions=1))
    async with asyncio.timeout(PATIENCE_S):
        assert (await coming).position == head + 1
    await stream.aclose()
    reading.cancel()
    await asyncio.wait([reading])


async def test_a_rollback_is_noticed_also_where_events_were_pruned(
    service: CoordinatorService, open_agent: Any, prune: Any, connection: asyncpg.Connection
) -> None:
    """The last event that a coordinator knows is always kept: another one in its place is a rollback."""
    await live_for_a_while(service, open_agent)
    await prune(service)
    head = (await service.api.get_head(pb.GetHeadRequest())).events_position
    async with asyncio.timeout(PATIENCE_S):
        while service.feed.position < head:
            await asyncio.sleep(0.01)
    await connection.execute("UPDATE events SET stream_id = 'topic/another' WHERE position = $1", head)
    await service.api.create_topic(pb.CreateTopicRequest(topic="later", partitions=1))
    async with asyncio.timeout(PATIENCE_S):
        while not await connection.fetchval("SELECT count(*) FROM forks"):
            await asyncio.sleep(0.05)


# ---- the outbox


def publishes(context: Context) -> Context:
    """The same for a coordinator that publishes to RabbitMQ."""
    return replace(context, settings=context.settings.model_copy(update={"amqp_url": "amqp://127.0.0.1:1"}))


async def test_events_wait_for_a_relay_that_is_there(dsn: str, fast: Settings, open_agent: Any) -> None:
    settings = fast(dsn, outbox_retention_ms=7_200_000, **AT_ONCE)
    async with running(settings) as service:
        store, published = service.context.store, list[int]()

        async def publish(rows: Any) -> None:
            published.extend(row.position for row in rows)

        await service.api.create_topic(pb.CreateTopicRequest(topic="first", partitions=1))
        assert await store.drain_outbox(publish, 100, claim_ms=600_000) == 1  # type: ignore[attr-defined]
        await live_for_a_while(service, open_agent)
        assert await pruning.prune(publishes(later(service, HOUR_MS))) == 1, "those that RabbitMQ has not got stay"
        assert await store.drain_outbox(publish, 2, claim_ms=600_000) == 2  # type: ignore[attr-defined]
        assert await pruning.prune(publishes(later(service, HOUR_MS))) == 2
        assert await pruning.prune(publishes(later(service, 3 * HOUR_MS))) > 2, "but not for ever"
        head = (await service.api.get_head(pb.GetHeadRequest())).events_position
        assert await store.drain_outbox(publish, 100, claim_ms=600_000) == 1  # type: ignore[attr-defined]
        assert published == [1, 2, 3, head], "it goes on with the oldest that is kept"


async def test_where_nobody_publishes_events_wait_for_nobody(
    service: CoordinatorService, open_agent: Any, prune: Any
) -> None:
    await live_for_a_while(service, open_agent)
    assert await prune(service) > 10
    assert (await service.api.get_status(pb.GetStatusRequest())).outbox_position == 0


# ---- what only events told


async def test_what_was_deleted_before_is_known(service: CoordinatorService, open_agent: Any, prune: Any) -> None:
    """A log without a note of its history that has records of a topic which was deleted: of this metadata, not of
    another one (and of one that it never knew: refused)."""
    created = await service.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    await service.api.delete_topic(pb.DeleteTopicRequest(topic="orders"))
    await service.api.create_topic(pb.CreateTopicRequest(topic="other", partitions=1))
    await prune(service)

    async def open_with(topic_id: bytes) -> None:
        end = pb.WalEnd(topic_id=topic_id, partition=0, epoch=1, end_offset=5)
        request = pb.OpenSessionRequest(
            agent_id="a", role="ingest", address="127.0.0.1:1", wal_id=uuid.uuid4().bytes, wal_ends=[end]
        )
        await service.api.open_session(request)

    await open_with(created.topic_id)
    with pytest.raises(MetadataWentBack):
        await open_with(uuid.uuid4().bytes)


async def test_since_when_a_range_has_no_leader_is_known(
    service: CoordinatorService, open_agent: Any, prune: Any, change_rows: ChangeRows
) -> None:
    request = pb.CreateTopicRequest(topic="orders", partitions=1, unclean_recovery_after_ms=600_000)
    await service.api.create_topic(request)
    agent = await open_agent(service.api, "a")
    await agent.write((await agent.leads())[0], 0, 5)
    await agent.close()
    described = await service.api.describe_topic(pb.DescribeTopicRequest(topic="orders"))
    (orphaned,) = described.partitions[0].ranges
    assert orphaned.status == "orphaned" and orphaned.orphaned_ms
    await service.api.create_topic(pb.CreateTopicRequest(topic="other", partitions=1))
    await prune(service)
    described = await service.api.describe_topic(pb.DescribeTopicRequest(topic="orders"))
    assert described.partitions[0].ranges[0] == orphaned
    await change_rows("UPDATE ranges SET orphaned_ms = orphaned_ms - 600000")
    async with asyncio.timeout(PATIENCE_S):
        while described.partitions[0].ranges[0].status != "lost":
            await asyncio.sleep(0.05)
            described = await service.api.describe_topic(pb.DescribeTopicRequest(topic="orders"))


async def test_a_buffer_that_is_announced_again_is_done_also_when_its_events_are_gone(
    service: CoordinatorService, open_agent: Any, prune: Any
) -> None:
    await service.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(service.api, "a")
    grant = (await agent.leads())[0]
    await agent.write(grant, 0, 10)
    await service.api.create_topic(pb.CreateTopicRequest(topic="other", partitions=1))
    await prune(service)
    await agent.announce((grant, 0, 10))
    assert (await service.api.get_status(pb.GetStatusRequest())).buffers_waiting == 0
    assert not (await service.api.claim_buffer(pb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=1000))).found


async def test_a_marked_event_is_known_for_ever(service: CoordinatorService, open_agent: Any, prune: Any) -> None:
    api = service.api
    assert not (await api.mark_history(pb.MarkHistoryRequest())).HasField("event")
    await live_for_a_while(service, open_agent)
    marked = (await api.mark_history(pb.MarkHistoryRequest())).event
    assert marked.position == (await api.get_head(pb.GetHeadRequest())).events_position
    await api.create_topic(pb.CreateTopicRequest(topic="later", partitions=1))
    await api.create_topic(pb.CreateTopicRequest(topic="latest", partitions=1))
    await prune(service)
    head = await api.get_head(pb.GetHeadRequest(event_position=marked.position))
    assert head.event == marked and head.pruned_position > marked.position and not marked.payload_json
    for unknown in (marked.position - 1, head.events_position + 1):
        assert not (await api.get_head(pb.GetHeadRequest(event_position=unknown))).HasField("event")
    kept = await api.get_head(pb.GetHeadRequest(event_position=head.events_position))
    assert kept.event.position == head.events_position and kept.event.type


# ---- backups


def quiet(what: str, done: int, total: int) -> None:
    """Nobody watches."""


async def test_a_backup_of_pruned_events_is_restored(
    service: CoordinatorService,
    open_agent: Any,
    prune: Any,
    dsn: str,
    new_database: Any,
    fast: Settings,
    connection: asyncpg.Connection,
) -> None:
    agent = await live_for_a_while(service, open_agent)
    await prune(service)
    for grant in (await agent.leads()).values():
        await agent.write(grant, 30, 40)
    store = MemoryStore()
    manifest = await take_backup(dsn, store)
    assert (manifest.version, manifest.pruned_position > 10) == (2, True)
    target = await new_database()
    report, last = await restore_backup(target, store, manifest.name, dry_run=False, accept_holes=True, progress=quiet)
    assert report.events == manifest.position - manifest.pruned_position
    async with running(fast(target, **AT_ONCE)) as restored:
        assert {topic.topic for topic in (await restored.api.list_topics(pb.ListTopicsRequest())).topics} == {"orders"}
        head = await restored.api.get_head(pb.GetHeadRequest(event_position=last.position))
        assert head.event.type == "HistoryBegan"
        there = await asyncpg.connect(target)
        before = await projections(there)
        assert before["deleted_topics"] == (await projections(connection))["deleted_topics"]
        await restored.context.store.rebuild()
        assert await projections(there) == before
        await there.close()


async def test_a_backup_of_before_is_restored(
    service: CoordinatorService, open_agent: Any, dsn: str, new_database: Any, fast: Settings
) -> None:
    """Version 1: all events, no bases."""
    await live_for_a_while(service, open_agent)
    store = MemoryStore()
    taken = await take_backup(dsn, store)
    chunks = tuple(chunk for chunk in taken.chunks if chunk.table not in fmt.BASES)
    old = json.loads(json.loads(fmt.encode_manifest(replace(taken, version=1, chunks=chunks)))["backup"])
    del old["pruned_position"]
    read = fmt.decode_manifest(fmt.manifest_key(taken.name), _signed(old))
    assert (read.version, read.pruned_position) == (1, 0)
    target = await new_database()
    async with postgres_backup.restore_transaction(target, commit=True) as tx:
        report = await restore.restore(
            tx, store, read, accept_holes=True, new_id=lambda: str(uuid.uuid4()), progress=quiet
        )
    assert report.events == taken.position
    async with running(fast(target, **AT_ONCE)) as restored:
        connection = await asyncpg.connect(target)
        before = await projections(connection)
        await restored.context.store.rebuild()
        assert await projections(connection) == before
        await connection.close()


def _signed(values: dict[str, Any]) -> bytes:
    body = json.dumps(values, separators=(",", ":"), sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "backup": body}).encode()


async def test_a_backup_that_lacks_an_event_behind_its_bases_is_damaged(
    service: CoordinatorService, open_agent: Any, prune: Any, dsn: str, new_database: Any
) -> None:
    await live_for_a_while(service, open_agent)
    await prune(service)
    store = MemoryStore()
    taken = await take_backup(dsn, store)
    torn = replace(taken, pruned_position=taken.pruned_position - 1)
    with pytest.raises(fmt.BackupDamaged, match="events are missing after position"):
        async with postgres_backup.restore_transaction(await new_database(), commit=True) as tx:
            await restore.restore(tx, store, torn, accept_holes=True, new_id=lambda: "x", progress=quiet)
    assert await backup.list_backups(store)


# ---- event logs of before


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.gz"))
async def test_event_logs_of_older_versions_are_read_and_pruned(
    archive: Path, dsn: str, fast: Settings, prune: Any, connection: asyncpg.Connection
) -> None:
    with tarfile.open(archive) as packed:
        member = packed.extractfile("database.sql")
        assert member is not None
        await connection.execute(member.read().decode())
    await connection.execute("SET search_path = public")
    await connection.execute("UPDATE session_leases SET expires_ms = $1", 2**62)  # nothing happens but what is tested
    types = [row["type"] for row in await connection.fetch("SELECT type FROM events")]
    assert {"BufferSealed", "SegmentRegistered", "BufferCompleted"} <= set(types)
    async with running(fast(dsn, **AT_ONCE)) as service:
        before = await projections(connection)
        assert before["segments"] and before["deleted_topics"]
        await service.context.store.rebuild()
        assert await projections(connection) == before
        head = (await service.api.get_head(pb.GetHeadRequest())).events_position
        assert await prune(service) == head - 1
        await service.context.store.rebuild()
        assert await projections(connection) == before
        marked = await service.api.get_head(pb.GetHeadRequest(event_position=head - 100))
        assert marked.event.position == head - 100, "the store may have a mark of it"


async def test_ranges_orphaned_before_keep_their_time_over_the_migration(
    dsn: str, fast: Settings, connection: asyncpg.Connection
) -> None:
    """Events of before do not say when: their rows do, and the migration reads that, as a rebuild does."""
    topic_id, agent, wal = "a" * 32, "agent", "b" * 32
    names = ("topic_id", "partition", "epoch", "start_offset", "limit_offset", "registered_end", "end_offset", "status")
    ranges = [{**dict(zip(names[2:], (1, 0, 100, 0, None, "orphaned"), strict=True)), "agent_id": agent, "wal_id": wal}]
    granted = {"topic_id": topic_id, "topic": "t", "partition": 0, "epoch": 1, "session_id": "s", "agent_id": agent,
               "wal_id": wal, "start_offset": 0, "limit_offset": 100}  # fmt: skip
    created = {"topic_id": topic_id, "topic": "t", "partitions": 1, "retention_ms": None, "retention_bytes": None,
               "min_acks": 2, "unclean_recovery_after_ms": None, "created_ms": 1}  # fmt: skip
    restored = {"topic_id": topic_id, "topic": "t", "partition": 0, "epoch": 1, "log_start_offset": 0,
                "ranges": ranges, "removed_epochs": [], "segments": [], "removed_segment_ids": []}  # fmt: skip
    log = [("TopicCreated", created), ("EpochGranted", granted), ("SessionClosed", None), ("RangeOrphaned", granted),
           ("PartitionRestored", restored)]  # fmt: skip
    async with running(fast(dsn, **AT_ONCE)) as service:
        """Makes the tables of today."""
    migration = "DELETE FROM migrations WHERE name = '0011_pruned_events'"
    undo = """DROP TABLE pruned_position, deleted_topics, history_marks, base_topics, base_partitions, base_ranges,
        base_sessions, base_cut_offs, base_segments, base_groups, base_group_members, base_deleted_topics;
        ALTER TABLE ranges DROP COLUMN orphaned_ms; ALTER TABLE outbox DROP COLUMN seen_ms;
        ALTER TABLE buffer_claims RENAME COLUMN sealed_ms TO sealed_position"""
    await connection.execute(f"{migration}; {undo}")
    await connection.execute("DELETE FROM events; UPDATE event_position SET position = 5")
    closed = {"session_id": "s", "agent_id": agent, "role": "ingest", "why": "closed"}
    for nth, (kind, payload) in enumerate(log, 1):
        text = json.dumps(payload or closed)
        insert = "INSERT INTO events VALUES ($1, $2, 1, $3, $4, '', $5)"
        await connection.execute(insert, nth, f"stream-{nth}", kind, text, 1000 * nth)
    await connection.execute("INSERT INTO topics VALUES ($1, 't', 1, NULL, NULL, 2, NULL, 1)", topic_id)
    await connection.execute("INSERT INTO partitions VALUES ($1, 0, 1, 0)", topic_id)
    insert = "INSERT INTO ranges VALUES ($1, 0, 1, 0, 100, 0, NULL, 'orphaned', '', $2, $3, false)"
    await connection.execute(insert, topic_id, agent, wal)
    async with running(fast(dsn, **AT_ONCE)) as service:
        before = await projections(connection)
        assert await connection.fetchval("SELECT orphaned_ms FROM ranges") == 5000
        await service.context.store.rebuild()
        assert await projections(connection) == before


# ---- a soak


@pytest.fixture
async def wide(dsn: str, fast: Settings) -> AsyncIterator[CoordinatorService]:
    """Its ranges hold all that is written."""
    async with running(fast(dsn, range_width_offsets=1_000_000, **AT_ONCE)) as started:
        yield started


@pytest.mark.long
async def test_a_platform_that_goes_on_and_on_keeps_as_many_rows_as_before(
    wide: CoordinatorService,
    open_agent: Any,
    prune: Any,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Records come in and go with retention, groups commit, sweeps delete, marks are made. An hour passes per round for
    events. What grows with time would show in the counts of rows: docs/tables.md says what may."""
    monkeypatch.setattr(pruning, "MARKS_KEPT", 5)
    api = wide.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2, retention_bytes=2_000))
    agent = await open_agent(api, "a")
    member = await api.join_group(pb.JoinGroupRequest(group="g", topics=["orders"]))
    end = 0

    async def round_of_work() -> None:
        nonlocal end
        for _ in range(4):
            for grant in (await agent.leads()).values():
                assert await agent.write(grant, end, end + 10, snapshot=b"p") == pb.REGISTRATION_RESULT_REGISTERED
            end += 10
        commits = [pb.OffsetCommit(topic="orders", partition=p, offset=end) for p in range(2)]
        await api.commit_offsets(
            pb.CommitOffsetsRequest(
                group="g", member_id=member.member_id, generation=member.generation, offsets=commits
            )
        )
        await api.apply_retention(pb.ApplyRetentionRequest())
        listed = await connection.fetch("SELECT object_key FROM upload_intents")
        keys = [row["object_key"] for row in listed]
        begun = await api.begin_deletion(pb.BeginDeletionRequest(object_keys=keys, grace_ms=0, confirm_ms=0))
        gone = [item.object_key for item in begun.objects if item.verdict == pb.DELETION_VERDICT_BEGUN]
        await api.finish_deletion(pb.FinishDeletionRequest(object_keys=gone))
        await api.mark_history(pb.MarkHistoryRequest())
        await prune(wide)

    async def rows() -> dict[str, int]:
        tables = [*t.PROJECTIONS, *map(t.base_of, t.PROJECTIONS), *t.STATE, t.EVENTS]
        return {table.name: await connection.fetchval(f"SELECT count(*) FROM {table.name}") for table in tables}

    for _ in range(6):
        await round_of_work()
    before = await rows()
    for _ in range(12):
        await round_of_work()
    after = await rows()
    assert before[t.SEGMENTS.name] and before[t.base_of(t.SEGMENTS).name]
    assert {name: count for name, count in after.items() if count > before[name]} == {}
    assert after[t.EVENTS.name] == 1
