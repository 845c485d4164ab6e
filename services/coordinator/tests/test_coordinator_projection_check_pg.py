"""Projections are compared with what the events give: damage in PostgreSQL's tables is found, and nothing else is."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from shproto.errors import Unavailable
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.service import pruning
from streamhouse_coordinator.wiring import CoordinatorService

from services.coordinator.tests.running import running

pytestmark = pytest.mark.long

ChangeRows = Callable[..., Any]


@pytest.fixture
async def service(dsn: str, fast: Callable[..., Any], open_agent: Any) -> AsyncIterator[CoordinatorService]:
    """With rows in every projection, half of which come from pruned events."""
    settings = fast(dsn, events_kept_min=1, events_prune_interval_ms=86_400_000)
    async with running(settings) as started:
        api = started.api
        await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
        agent = await open_agent(api, "a")
        leads = list((await agent.leads()).values())
        await api.create_topic(pb.CreateTopicRequest(topic="gone", partitions=1))
        for grant in leads:
            await agent.write(grant, 0, 10)
        await api.delete_topic(pb.DeleteTopicRequest(topic="gone"))
        await api.join_group(pb.JoinGroupRequest(group="g", topics=["orders"]))
        aged = settings.model_copy(update={"events_retention_ms": -1_000})
        assert await pruning.prune(replace(started.context, settings=aged)) > 5
        for grant in leads:
            await agent.write(grant, 10, 20)
        yield started


async def checked(service: CoordinatorService) -> pb.CheckProjectionsPart:
    parts = [part async for part in service.api.check_projections(pb.CheckProjectionsRequest())]
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    return parts[-1]


@pytest.mark.smoke
async def test_sound_metadata_has_no_difference(service: CoordinatorService, change_rows: ChangeRows) -> None:
    for _ in range(2):  # the second one finds nothing of the first in its way
        result = await checked(service)
        assert not result.differences and not result.differing_rows
        assert result.rows > 10 and result.events_done == result.events_total >= 2


@pytest.mark.parametrize(
    ("table", "damage"),
    [
        (t.TOPICS, "UPDATE topics SET retention_ms = 1"),
        (t.PARTITIONS, "UPDATE partitions SET log_start_offset = log_start_offset # 1 WHERE partition = 1"),
        (t.RANGES, "UPDATE ranges SET registered_end = registered_end # 4 WHERE partition = 0"),
        (t.RANGES, "DELETE FROM ranges WHERE partition = 0"),
        (t.SESSIONS, "UPDATE sessions SET address = '127.0.0.1:2' WHERE role = 'ingest'"),
        (t.SEGMENTS, "UPDATE segments SET size_bytes = size_bytes # 1024 WHERE base_offset = 0 AND partition = 0"),
        (t.SEGMENTS, "DELETE FROM segments WHERE base_offset = 10 AND partition = 1"),
        (t.SEGMENTS, "INSERT INTO segments SELECT 'x', topic_id, partition, epoch, 500, 501, record_count, object_key, "
         "object_at, size_bytes, raw_bytes, first_timestamp_ms, max_timestamp_ms, lost_reason FROM segments "
         "WHERE base_offset = 10 AND partition = 1"),
        (t.GROUPS, "UPDATE groups SET generation = generation + 1"),
        (t.GROUP_MEMBERS, "UPDATE group_members SET client_id = 'other'"),
        (t.DELETED_TOPICS, "DELETE FROM deleted_topics"),
        (t.base_of(t.SEGMENTS), "UPDATE base_segments SET end_offset = 11 WHERE partition = 0"),
    ],
    ids=lambda value: value.name if isinstance(value, t.Table) else value[:6].lower(),
)  # fmt: skip
async def test_each_changed_row_is_found(
    service: CoordinatorService, change_rows: ChangeRows, table: t.Table[Any], damage: str
) -> None:
    await change_rows(damage)
    result = await checked(service)
    names = {item.table for item in result.differences}
    assert names == {table.name.removeprefix("base_")}
    assert result.differing_rows == len(result.differences) >= 1
    found, expected = result.differences[0].found_json, result.differences[0].expected_json
    assert found != expected
    if damage.startswith("UPDATE"):
        is_there, is_due = json.loads(found), json.loads(expected)
        assert len({name for name in is_there if is_there[name] != is_due[name]}) == 1, "it says which column"
    else:
        assert (found == "") == damage.startswith("DELETE") and (expected == "") == damage.startswith("INSERT")


@pytest.mark.smoke
async def test_an_event_that_is_missing_is_found(service: CoordinatorService, change_rows: ChangeRows) -> None:
    last = (await service.api.get_head(pb.GetHeadRequest())).events_position
    await change_rows("DELETE FROM events WHERE position = $1", last - 1)
    differences = (await checked(service)).differences
    assert differences[0].table == "events"
    found, expected = json.loads(differences[0].found_json), json.loads(differences[0].expected_json)
    assert (found["events"], found["last"]) == (expected["events"] - 1, expected["last"])
    assert {item.table for item in differences[1:]} == {"segments", "ranges"} or len(differences) == 1


async def test_events_of_a_newer_version_are_not_taken_for_damage(
    service: CoordinatorService, change_rows: ChangeRows
) -> None:
    last = (await service.api.get_head(pb.GetHeadRequest())).events_position
    await change_rows("UPDATE events SET type = 'FromTheFuture' WHERE position = $1", last)
    with pytest.raises(Unavailable, match="FromTheFuture"):
        await checked(service)


async def test_what_commits_meanwhile_is_no_difference(service: CoordinatorService, fast: Callable[..., Any]) -> None:
    aged = service.settings.model_copy(update={"events_retention_ms": -1_000})
    context = replace(service.context, settings=aged)
    parts = service.api.check_projections(pb.CheckProjectionsRequest())
    first = await anext(aiter(parts))
    assert not first.done
    async with asyncio.timeout(60):
        await service.api.create_topic(pb.CreateTopicRequest(topic="later", partitions=3))
        assert await pruning.prune(context) > 2
    async for part in parts:
        assert not part.differences
    assert part.done and not (await checked(service)).differences
