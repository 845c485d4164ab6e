"""Live queries: changes of a result as records come, until their client ends them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from shformat import Records
from shproto.errors import (
    InvalidArgument,
    InvalidStatement,
    Overloaded,
    ShuttingDown,
    StatementFailed,
    StatementTimeout,
    StreamHouseError,
    UnknownTopic,
)
from streamhouse_sql import live

from services.sql.tests.start_sql import Result, Sql, StartSql
from tests.platform.read_world import World

pytestmark = pytest.mark.timeout(60)

BY_CARRIER = "SELECT _value ->> '$.carrier' AS carrier, count(*) AS flights FROM t GROUP BY 1 EMIT CHANGES"
EVERYTHING = "SELECT _offset, _value ->> '$.carrier' AS carrier FROM t EMIT CHANGES"
SETTINGS = {"sql_gather_ms": 1, "sql_idle_after_ms": 50}
MINUTE_MS = 60_000


async def one_topic(platform: World, topic: str = "t", partitions: int = 1) -> None:
    await platform.create_topic(topic, partitions)
    if not platform.agents:
        await platform.start_agent("a")
    for number in range(partitions):
        await platform.grant("a", topic, number)


async def produce(platform: World, *carriers: str, partition: int = 0, first_ms: int = 0, step_ms: int = 0) -> None:
    values = [json.dumps({"carrier": carrier}).encode() for carrier in carriers]
    times = [first_ms + at * step_ms for at in range(len(values))]
    await platform.produce_records(Records.from_lists(values, timestamps_ms=times), "t", partition)


class Watched:
    """The result of a live query, as far as it has come."""

    def __init__(self, responses: Any) -> None:
        self._responses = responses
        self.result = Result()

    async def until(self, count: int) -> list[tuple[Any, ...]]:
        """Returns the changes once there are so many."""
        while self.result.schema is None or len(self.result.rows) < count:
            self.result.add(await anext(self._responses))
        return self.result.rows


@asynccontextmanager
async def watching(sql: Sql, text: str, timeout_ms: int = 0) -> AsyncIterator[Watched]:
    """Runs a live query, and ends it with the block."""
    async with aclosing(sql.responses(text, timeout_ms)) as responses:
        yield Watched(responses)


async def error_of(sql: Sql, text: str) -> StreamHouseError:
    """Returns the error that a live query ends with."""
    async with watching(sql, text) as watched:
        with pytest.raises(StreamHouseError) as caught:
            await watched.until(1_000_000)
    return caught.value


# ---- changes


async def test_changes_of_groups_come_as_records_do(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    await produce(platform, "UA", "AA", "UA")
    await platform.register("t", 0)
    sql = await start_sql(**SETTINGS)
    async with watching(sql, BY_CARRIER) as watched:
        assert sorted(await watched.until(2)) == [("+I", "AA", 1), ("+I", "UA", 2)]
        await produce(platform, "UA", "DL")
        assert (await watched.until(5))[2:] == [("+I", "DL", 1), ("-U", "UA", 2), ("+U", "UA", 3)]
        described = json.loads(watched.result.schema.metadata[live.METADATA])
        assert described == {"key_columns": ["carrier"], "is_changelog": True}
        assert watched.result.names == ["_op", "carrier", "flights"]
    assert sql.left() == []


async def test_rows_of_a_query_without_groups_are_inserts(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform, partitions=2)
    await produce(platform, "UA", partition=1)
    sql = await start_sql(**SETTINGS)
    async with watching(sql, EVERYTHING) as watched:
        assert await watched.until(1) == [("+I", 0, "UA")]
        await produce(platform, "AA", "DL")
        assert (await watched.until(3))[1:] == [("+I", 0, "AA"), ("+I", 1, "DL")]
        described = json.loads(watched.result.schema.metadata[live.METADATA])
        assert described == {"key_columns": [], "is_changelog": False}


async def test_a_group_that_has_no_rows_any_more_is_deleted(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    await produce(platform, "UA")
    sql = await start_sql(**SETTINGS)
    once = BY_CARRIER.replace("EMIT", "HAVING count(*) < 2 EMIT")
    async with watching(sql, once) as watched:
        assert await watched.until(1) == [("+I", "UA", 1)]
        await produce(platform, "UA")
        assert (await watched.until(2))[1:] == [("-D", "UA", 1)]


async def test_the_schema_comes_before_any_record(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    sql = await start_sql(**SETTINGS)
    async with watching(sql, BY_CARRIER) as watched:
        assert await watched.until(0) == []
        assert watched.result.names == ["_op", "carrier", "flights"]


async def test_windows_are_given_out_when_they_close(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    sql = await start_sql(**SETTINGS)
    await sql.run(
        "CREATE TABLE flights (carrier VARCHAR, at TIMESTAMPTZ METADATA FROM 'timestamp', WATERMARK FOR at AS at) "
        "WITH (topic = 't')"
    )
    closed = (
        "SELECT window_end, count(*) AS n FROM TUMBLE(TABLE flights, DESCRIPTOR(at), INTERVAL '1' MINUTE) "
        "GROUP BY window_start, window_end EMIT ON WINDOW CLOSE"
    )
    await produce(platform, "UA", "AA", "UA", step_ms=MINUTE_MS // 2)
    async with watching(sql, closed) as watched:
        ((kind, end, count),) = await watched.until(1)
        assert (kind, end.minute, count) == ("+I", 1, 2)
        await produce(platform, "UA", first_ms=3 * MINUTE_MS)
        assert [row[2] for row in await watched.until(2)] == [2, 1]


async def test_a_declared_table_that_came_a_moment_ago_is_known(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    await produce(platform, "UA")
    sql, other = await start_sql(**SETTINGS), await start_sql(**SETTINGS)
    await other.run("CREATE TABLE flights (carrier VARCHAR) WITH (topic = 't')")
    async with watching(sql, "SELECT carrier FROM flights EMIT CHANGES") as watched:
        assert await watched.until(1) == [("+I", "UA")]


async def test_explain_says_what_a_live_query_reads_and_keeps(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    sql = await start_sql()
    lines = [row[0] for row in (await sql.run(f"EXPLAIN {BY_CARRIER}")).rows]
    assert lines[0] == "live query" and any(line.startswith("state ") for line in lines)
    assert any("topic t" in line for line in lines) and sql.left() == []
    assert not any("WITH" in line for line in lines)


# ---- ends


async def test_nothing_is_left_when_the_client_goes_in_the_middle_of_a_step(
    platform: World, start_sql: StartSql
) -> None:
    await one_topic(platform)
    await produce(platform, *["UA"] * 1000)
    sql = await start_sql(**SETTINGS)
    # A thousand times a million values: longer than the test may take. In two steps: DuckDB heeds no interrupt while it
    # makes one list, and would make those of a thousand records at once.
    endless = (
        "SELECT count(*) AS n FROM (SELECT x, y FROM t, UNNEST(range(1000 + _offset)) AS u(x), "
        "UNNEST(range(1000 + _offset)) AS v(y)) WHERE (x * y) % 7 = 3 EMIT CHANGES"
    )
    task = asyncio.create_task(error_of(sql, endless))
    while not (runs := sql.service.live.runs) or min(run.steps for run in runs) < 2:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sql.left() == []


async def test_a_client_that_does_not_read_stops_the_reading(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    await produce(platform, *["UA"] * 10)
    sql = await start_sql(sql_gather_rows_max=1, **SETTINGS)
    async with watching(sql, EVERYTHING) as watched:
        await watched.until(1)
        (run,) = sql.service.live.runs
        await asyncio.sleep(0.2)  # more would be computed by now
        assert run.steps <= 1 + 1 + live.STEPS_AHEAD + 1
        assert len(await watched.until(10)) == 10


async def test_the_service_that_stops_ends_live_queries_with_the_reason(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    await produce(platform, "UA")
    sql = await start_sql(**SETTINGS)
    read = asyncio.create_task(error_of(sql, EVERYTHING))
    async with watching(sql, EVERYTHING) as unread:
        await unread.until(1)
        while len(sql.service.live.runs) < 2:
            await asyncio.sleep(0.001)
        await sql.service.close()
        assert sql.left() == []
        assert isinstance(await read, ShuttingDown)
        with pytest.raises(ShuttingDown):
            await unread.until(2)
    assert isinstance(await error_of(sql, EVERYTHING), ShuttingDown)


async def test_a_bad_record_ends_the_query_with_its_place(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    sql = await start_sql(**SETTINGS)
    await sql.run("CREATE TABLE numbers (n INTEGER) WITH (topic = 't')")
    await platform.produce_records(Records.from_lists([b'{"n": 1}', b'{"n": "x"}']), "t", 0)
    error = await error_of(sql, "SELECT sum(n) AS n FROM numbers EMIT CHANGES")
    assert isinstance(error, StatementFailed)
    assert (error.details["topic"], error.details["offset"]) == ("t", "1")
    assert sql.left() == []


async def test_a_topic_that_is_deleted_ends_the_query(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    await produce(platform, "UA")
    sql = await start_sql(**SETTINGS)
    async with watching(sql, EVERYTHING) as watched:
        await watched.until(1)
        await platform.delete_topic("t")
        with pytest.raises(UnknownTopic):
            await watched.until(2)


async def test_the_limit_of_time_holds_also_for_a_client_that_does_not_read(
    platform: World, start_sql: StartSql
) -> None:
    await one_topic(platform)
    sql = await start_sql(sql_live_timeout_ms=300, **SETTINGS)
    async with watching(sql, EVERYTHING, timeout_ms=200) as watched:
        with pytest.raises(StatementTimeout, match="ended after 200 ms"):
            await watched.until(0)  # on a slow machine it is over by now
            await asyncio.wait([run.task for run in sql.service.live.runs] or [asyncio.sleep(0)])
            await watched.until(1)
    assert isinstance(await error_of(sql, EVERYTHING), StatementTimeout)
    with pytest.raises(InvalidArgument, match="timeout_ms is 301, sql_live_timeout_ms is 300"):
        await sql.run(EVERYTHING, timeout_ms=301)


async def test_live_queries_have_a_limit_and_take_no_turns(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    sql = await start_sql(sql_live_statements_max=1, sql_statements_max=1, **SETTINGS)
    async with watching(sql, EVERYTHING) as watched:
        await watched.until(0)
        error = await error_of(sql, EVERYTHING)
        assert isinstance(error, Overloaded) and error.details["limit"] == "sql_live_statements_max"
        assert (await sql.run("SELECT 1")).value == 1
    async with watching(sql, EVERYTHING) as watched:
        await watched.until(0)


# ---- what is refused


async def test_a_live_query_over_a_view_does_not_read_the_topic_behind_it(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    sql = await start_sql(sql_job_stop_ms=0)  # the platform of this test takes no output of jobs
    await sql.run("CREATE MATERIALIZED VIEW seen AS SELECT _key AS k, count(*) AS n FROM t GROUP BY _key")
    error = await error_of(sql, "SELECT * FROM seen EMIT CHANGES")
    assert isinstance(error, InvalidStatement) and "seen is a view, and live queries over views" in str(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SELECT x FROM nowhere EMIT CHANGES", "there is no table or topic 'nowhere'"),
        ("SELECT _value AS _op FROM t EMIT CHANGES", "column _op is the kind of a change"),
        ("SELECT _offset FROM t ORDER BY 1 EMIT CHANGES", "ORDER BY"),
        ("SELECT _offset FROM t EMIT CHANGES LIMIT 5", "LIMIT is not supported behind EMIT CHANGES"),
        ("SELECT _offset FROM t EMIT ON WINDOW CLOSE", "EMIT ON WINDOW CLOSE"),
    ],
)
async def test_what_a_live_query_cannot_say(platform: World, start_sql: StartSql, text: str, said: str) -> None:
    await one_topic(platform)
    sql = await start_sql()
    error = await error_of(sql, text)
    assert isinstance(error, InvalidStatement) and said in str(error)
    assert sql.left() == []
