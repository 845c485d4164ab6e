"""Tables declared for SQL, against a real PostgreSQL."""

import json
from typing import Any

import pytest
from shcluster.snapshot import SnapshotBuilder
from shproto.errors import (
    InvalidArgument,
    TableExists,
    UnknownTable,
)
from shproto.events import event_from_json
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.wiring import CoordinatorService

TEXT = "CREATE TABLE flights (carrier TEXT) WITH (topic='flights')"


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    return coordinator.api


async def check_projections(api: CoordinatorApi) -> None:
    parts = [part async for part in api.check_projections(pb.CheckProjectionsRequest())]
    assert not parts[-1].differences


async def create_table(api: CoordinatorApi, table: str = "flights", definition: str = TEXT) -> pb.SqlTableInfo:
    return await api.create_sql_table(pb.CreateSqlTableRequest(table=table, definition=definition))


async def test_a_table_is_declared_followed_and_dropped(api: CoordinatorApi, all_events: Any) -> None:
    made = await create_table(api)
    assert (made.table, made.definition) == ("flights", TEXT)
    with pytest.raises(TableExists) as exists:
        await create_table(api)
    assert exists.value.details == {"table": "flights"}
    builder = SnapshotBuilder()
    async for part in api.get_snapshot(pb.GetSnapshotRequest()):
        builder.add(part)
    assert builder.cluster.sql_tables["flights"].definition == TEXT
    (event,) = await all_events(api, "SqlTableCreated")
    assert json.loads(event.payload_json)["definition"] == TEXT
    dropped = await api.drop_sql_table(pb.DropSqlTableRequest(table="flights"))
    assert dropped.table_id == made.table_id
    with pytest.raises(UnknownTable):
        await api.drop_sql_table(pb.DropSqlTableRequest(table="flights"))
    for event in await all_events(api, "SqlTableDropped"):
        builder.cluster.position = event.position - 1
        builder.cluster.apply(event.position, event_from_json(event.type, event.payload_json))
    assert builder.cluster.sql_tables == {}
    await check_projections(api)


@pytest.mark.parametrize("table", ["", "Flights", "1a", "a b", "a" * 129, "a-b"])
async def test_a_table_with_an_illegal_name_is_refused(api: CoordinatorApi, table: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await create_table(api, table)
    assert refused.value.details["field"] == "table"


async def test_a_definition_has_a_limit(api: CoordinatorApi) -> None:
    with pytest.raises(InvalidArgument, match="definition"):
        await create_table(api, definition="x" * (256 * 1024 + 1))
