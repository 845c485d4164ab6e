"""Declared uploads and deletion in two phases against a real PostgreSQL: nothing is ever registered in an object that
may be gone (G8)."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import pytest
from shproto.errors import Fenced, InvalidArgument
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.adapters import migrate
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.wiring import CoordinatorService

pytestmark = pytest.mark.long

MakeSegment = Callable[..., types_pb2.SegmentRef]
REGISTERED, WITHDRAWN = pb.REGISTRATION_RESULT_REGISTERED, pb.REGISTRATION_RESULT_WITHDRAWN
HOUR_MS = 3_600_000


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    await coordinator.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    return coordinator.api


async def claim(api: CoordinatorApi, ttl_ms: int = 60_000) -> pb.ClaimBufferResponse:
    return await api.claim_buffer(pb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=ttl_ms))


async def declare(api: CoordinatorApi, claim_id: str, *keys: str) -> None:
    await api.declare_uploads(pb.DeclareUploadsRequest(claim_id=claim_id, object_keys=keys))


async def register(api: CoordinatorApi, buffer_id: str, *segments: types_pb2.SegmentRef) -> list[int]:
    return list(
        (await api.register_segments(pb.RegisterSegmentsRequest(buffer_id=buffer_id, segments=segments))).results
    )


async def begin(
    api: CoordinatorApi, *keys: str, grace_ms: int = 0, confirm_ms: int = 0, dry_run: bool = False
) -> list[str]:
    """The verdicts' names."""
    request = pb.BeginDeletionRequest(object_keys=keys, grace_ms=grace_ms, confirm_ms=confirm_ms, dry_run=dry_run)
    objects = (await api.begin_deletion(request)).objects
    assert [item.object_key for item in objects] == list(keys)
    return [pb.DeletionVerdict.Name(item.verdict).removeprefix("DELETION_VERDICT_") for item in objects]


async def pending(api: CoordinatorApi) -> list[str]:
    request = pb.ListDeletionsRequest(grace_ms=0, confirm_ms=0, limit=100)
    return list((await api.list_deletions(request)).object_keys)


async def announced(api: CoordinatorApi, agent: Any, make_segment: MakeSegment) -> tuple[str, types_pb2.SegmentRef]:
    """A sealed buffer and the segment to be made of it."""
    grant = (await agent.leads())[0]
    buffer_id = await agent.announce((grant, 0, 10))
    return buffer_id, make_segment(grant.topic_id, 0, 1, 0, 10, object_key="data/x")


async def test_a_registration_after_the_deletion_began_is_refused(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment
) -> None:
    """The race of a slow worker and the sweep: its object is being deleted while it registers. It builds again."""
    buffer_id, segment = await announced(api, await open_agent(api, "a"), make_segment)
    slow = await claim(api, ttl_ms=1)
    await declare(api, slow.claim_id, "data/x")
    assert await begin(api, "data/x", grace_ms=HOUR_MS) == ["DECLARED"], "young"
    await asyncio.sleep(0.01)  # the claim runs out by PostgreSQL's clock
    assert await begin(api, "data/x") == ["BEGUN"]
    assert await register(api, buffer_id, segment) == [WITHDRAWN]
    with pytest.raises(Fenced):
        await declare(api, slow.claim_id, "data/x")
    with pytest.raises(Fenced):
        await api.renew_claim(pb.RenewClaimRequest(claim_id=slow.claim_id, claim_ttl_ms=1000))
    await api.finish_deletion(pb.FinishDeletionRequest(object_keys=["data/x"]))
    assert await register(api, buffer_id, segment) == [WITHDRAWN]

    again = await claim(api)
    assert (again.buffer_id, again.attempt) == (buffer_id, 2)
    await declare(api, again.claim_id, "data/y")
    segment.object_key = "data/y"
    assert await register(api, buffer_id, segment) == [REGISTERED]
    assert await begin(api, "data/x", "data/y") == ["BEGUN", "REFERENCED"]
    assert await register(api, buffer_id, segment) == [REGISTERED], "asked again, after the intent was consumed"


async def test_what_was_not_declared_cannot_be_registered(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment
) -> None:
    buffer_id, segment = await announced(api, await open_agent(api, "a"), make_segment)
    assert await register(api, buffer_id, segment) == [WITHDRAWN]
    later = make_segment(segment.topic_id, 0, 1, 10, 20)
    assert await register(api, buffer_id, later) == [pb.REGISTRATION_RESULT_EARLY], "nothing became part of the log"


async def test_only_a_claim_declares(api: CoordinatorApi, open_agent: Any) -> None:
    with pytest.raises(Fenced):
        await declare(api, "no such claim", "data/x")
    with pytest.raises(InvalidArgument, match="object_keys"):
        await declare(api, "c")
    assert await begin(api, "data/x", confirm_ms=HOUR_MS) == ["NOTICED"]
    agent = await open_agent(api, "a")
    await agent.announce(((await agent.leads())[0], 0, 10))
    held = await claim(api)
    with pytest.raises(InvalidArgument, match="is being deleted"):
        await declare(api, held.claim_id, "data/x")


NO_SEGMENT_KEYS = [
    "",
    "data/",
    "data//x",
    "/data/x",
    "data",
    "database/x",
    "other/x",
    "backup/20240101T000000Z-000000000001/manifest.json",
    "../../etc/passwd",
    "data/../backup/20240101T000000Z-000000000001/manifest.json",
    "mixed/./x",
    "/etc/passwd",
    "data/x\0y",
    "data/x\ny",
    "data/" + "x" * 256,
    "data/" + "x/" * 400 + "x",
]


@pytest.mark.parametrize("key", NO_SEGMENT_KEYS)
async def test_a_key_that_can_hold_no_segment_is_refused_before_anything_is_recorded(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment, dsn: str, key: str
) -> None:
    """A backup's manifest was deleted like an orphan; `../../etc/passwd` stopped every sweep at the store's refusal."""
    buffer_id, segment = await announced(api, await open_agent(api, "a"), make_segment)
    held = await claim(api)
    with pytest.raises(InvalidArgument, match="object key"):
        await api.begin_deletion(pb.BeginDeletionRequest(object_keys=["data/x", key]))
    with pytest.raises(InvalidArgument, match="object key"):
        await declare(api, held.claim_id, "data/x", key)
    segment.object_key = key
    with pytest.raises(InvalidArgument, match="object key"):
        await register(api, buffer_id, segment)
    request = pb.RegisterCompactionRequest(claim_id="c", replaced_segment_ids=["s"], segment=segment)
    with pytest.raises(InvalidArgument, match="object key"):
        await api.register_compaction(request)
    connection = await asyncpg.connect(dsn)
    try:
        for table in ("deletions", "upload_intents", "segments"):
            assert not await connection.fetch(f"SELECT 1 FROM {table}"), table
    finally:
        await connection.close()


async def test_rows_of_an_older_version_with_such_keys_stop_no_sweep(
    api: CoordinatorApi, change_rows: Callable[..., Awaitable[object]]
) -> None:
    assert await begin(api, "data/x", confirm_ms=HOUR_MS) == ["NOTICED"]
    foreign = [key for key in NO_SEGMENT_KEYS if "\0" not in key]
    for key in foreign:  # older than what is left of the log, and so told first
        await change_rows("INSERT INTO deletions VALUES ($1, 1, 2)", key)
    await change_rows("INSERT INTO upload_intents VALUES ('backup/y', 'c', '', 'w', 1)")
    request = pb.ListDeletionsRequest(grace_ms=0, confirm_ms=0, limit=5)
    assert list((await api.list_deletions(request)).object_keys) == ["data/x"]
    assert await begin(api, *await pending(api)) == ["BEGUN"]


@pytest.mark.smoke
async def test_an_upload_is_safe_while_its_claim_is_held(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment
) -> None:
    buffer_id, segment = await announced(api, await open_agent(api, "a"), make_segment)
    held = await claim(api)
    await declare(api, held.claim_id, "data/x")
    assert await begin(api, "data/x") == ["DECLARED"]
    assert await register(api, buffer_id, segment) == [REGISTERED]
    assert await begin(api, "data/x") == ["REFERENCED"]
    assert await pending(api) == [], "the completed buffer has consumed the intent"


async def test_the_rest_of_a_shared_object_is_safe_when_its_first_segments_are_gone(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment
) -> None:
    """One object, two topics: one segment is registered, its topic deleted; the other segment comes later."""
    await api.create_topic(pb.CreateTopicRequest(topic="other", partitions=1))
    agent = await open_agent(api, "a")
    grants = {grant.topic: grant for grant in await agent.grants() if grant.partition == 0}
    buffer_id = await agent.announce((grants["orders"], 0, 10), (grants["other"], 0, 10))
    held = await claim(api)
    await declare(api, held.claim_id, "mixed/x")
    first, second = (
        make_segment(grants[topic].topic_id, 0, grants[topic].epoch, 0, 10, object_key="mixed/x")
        for topic in ("orders", "other")
    )
    assert await register(api, buffer_id, first) == [REGISTERED]
    await api.delete_topic(pb.DeleteTopicRequest(topic="orders"))
    assert await begin(api, "mixed/x") == ["DECLARED"]
    assert await register(api, buffer_id, second) == [REGISTERED]
    assert await begin(api, "mixed/x") == ["REFERENCED"]


@pytest.mark.smoke
async def test_readers_have_their_time(api: CoordinatorApi) -> None:
    assert await begin(api, "data/x", confirm_ms=HOUR_MS) == ["NOTICED"]
    assert await begin(api, "data/x", confirm_ms=HOUR_MS) == ["NOTICED"]
    assert await pending(api) == ["data/x"]
    assert await begin(api, "data/x") == ["BEGUN"]
    assert await begin(api, "data/x", confirm_ms=HOUR_MS) == ["BEGUN"], "begun stays begun"
    await api.finish_deletion(pb.FinishDeletionRequest(object_keys=["data/x"]))
    assert await pending(api) == []


async def test_a_dry_run_changes_nothing(api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment) -> None:
    buffer_id, segment = await announced(api, await open_agent(api, "a"), make_segment)
    gone = await claim(api)
    await declare(api, gone.claim_id, "data/x")
    await api.release_claim(pb.ReleaseClaimRequest(claim_id=gone.claim_id, reason="the store is away"))
    assert await begin(api, "data/x", "data/z", dry_run=True) == ["BEGUN", "BEGUN"]
    assert await pending(api) == ["data/x"], "the failed upload; nothing was noted"
    assert await register(api, buffer_id, segment) == [REGISTERED]


async def test_a_failed_upload_is_found_without_a_listing(api: CoordinatorApi, open_agent: Any) -> None:
    agent = await open_agent(api, "a")
    await agent.announce(((await agent.leads())[0], 0, 10))
    failed = await claim(api)
    await declare(api, failed.claim_id, "data/x")
    request = pb.ListDeletionsRequest(grace_ms=HOUR_MS, confirm_ms=HOUR_MS, limit=10)
    assert not (await api.list_deletions(request)).object_keys
    assert await pending(api) == ["data/x"]
    answer = await api.begin_deletion(pb.BeginDeletionRequest(object_keys=["data/x"], confirm_ms=HOUR_MS))
    assert (answer.objects[0].worker_id, answer.objects[0].verdict) == ("w", pb.DELETION_VERDICT_DECLARED)
    assert 0 < answer.objects[0].declared_ms <= answer.now_ms


async def test_deletions_of_adopted_objects_end(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment, dsn: str
) -> None:
    """A restored database may know an object again that an older one was about to delete."""
    buffer_id, segment = await announced(api, await open_agent(api, "a"), make_segment)
    held = await claim(api)
    await declare(api, held.claim_id, "data/x")
    assert await register(api, buffer_id, segment) == [REGISTERED]
    connection = await asyncpg.connect(dsn)
    await connection.execute("INSERT INTO deletions (object_key, noticed_ms, begun_ms) VALUES ('data/x', 1, 1)")
    await connection.close()
    assert await pending(api) == ["data/x"]
    assert await begin(api, "data/x") == ["REFERENCED"]
    assert await pending(api) == []


@pytest.mark.parametrize("round_", range(8))
async def test_registration_and_deletion_at_the_same_time(
    two_coordinators: tuple[CoordinatorService, CoordinatorService],
    open_agent: Any,
    make_segment: MakeSegment,
    round_: int,
) -> None:
    """Whoever comes second loses; never both."""
    one, two = (service.api for service in two_coordinators)
    await one.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    agent = await open_agent(one, "a")
    grant = (await agent.leads())[0]
    outcomes = set()
    for number in range(10):
        buffer_id = await agent.announce((grant, 10 * number, 10 * number + 10))
        slow = await claim(one, ttl_ms=1)
        key = f"data/{number}"
        await declare(one, slow.claim_id, key)
        await asyncio.sleep(0.003 if round_ % 2 else 0.002)
        segment = make_segment(grant.topic_id, 0, 1, 10 * number, 10 * number + 10, object_key=key)
        calls: Sequence[Any] = [register(one, buffer_id, segment), begin(two, key)]
        if round_ % 2:
            results, verdicts = await asyncio.gather(*calls)
        else:
            verdicts, results = await asyncio.gather(*reversed(calls))
        assert (results[0], verdicts[0]) in ((REGISTERED, "REFERENCED"), (WITHDRAWN, "BEGUN"))
        outcomes.add(results[0])
        if results == [WITHDRAWN]:
            again = await claim(one)
            await declare(one, again.claim_id, key + "-again")
            segment.object_key = key + "-again"
            assert await register(one, buffer_id, segment) == [REGISTERED]
    assert outcomes


async def test_migrations_land_in_either_order(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that got a later migration first gets the earlier one with the next start."""
    every = migrate.available()
    names = list(every)
    assert names == sorted(names)
    first = [name for name in names if name != "0007_log_full"]
    connection = await asyncpg.connect(dsn)
    try:
        monkeypatch.setattr(migrate, "available", lambda: {name: every[name] for name in first})
        monkeypatch.setattr(migrate, "_must_have_tables", lambda connection: asyncio.sleep(0))
        assert await migrate.migrate(connection) == first
        monkeypatch.undo()
        assert await migrate.migrate(connection) == ["0007_log_full"]
        assert await migrate.migrate(connection) == []
    finally:
        await connection.close()
