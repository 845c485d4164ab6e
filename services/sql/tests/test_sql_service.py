"""Statements over a real coordinator, store, cache, format and DuckDB, and over agents that a test fills."""

import asyncio
import datetime
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from shformat import Records
from shproto.errors import (
    DataLoss,
    InvalidArgument,
    InvalidStatement,
    OffsetBelowStart,
    Overloaded,
    ShuttingDown,
    StatementFailed,
    StatementLimit,
    StatementTimeout,
    Unavailable,
    UnknownTopic,
)
from shstore import MemoryStore
from streamhouse_sql import service
from streamhouse_sql.ports import Interrupted

from services.sql.tests.start_sql import Result, Sql, StartSql
from tests.platform.read_world import World, values_of

pytestmark = pytest.mark.timeout(60)

# Computes for hours, and takes no memory.
ENDLESS = "SELECT count(*) FROM range(1000000000) AS a, range(1000000) AS b WHERE (a.range * b.range) % 7 = 3"
# Hundreds of megabytes, in more responses than anything between service and client holds.
LARGE = "SELECT range, range AS again FROM range(20000000)"


async def one_topic(platform: World, topic: str = "t", partitions: int = 1) -> None:
    await platform.create_topic(topic, partitions)
    if not platform.agents:
        await platform.start_agent("a")
    for number in range(partitions):
        await platform.grant("a", topic, number)


async def settled(platform: World, sql: Sql) -> None:
    """Returns once the service has seen every event."""
    while sql.engine.reads.index.cluster.position < platform.position:
        await asyncio.sleep(0)


async def until_true(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


class GatedStore(MemoryStore):
    """Holds reads of segments back while `gate` is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        return await super().get(key, at=at, size_bytes=size_bytes)


@pytest.fixture
def gated(platform: World) -> GatedStore:
    platform.store = GatedStore()
    return platform.store


@asynccontextmanager
async def running(task: asyncio.Task[Result]) -> AsyncIterator[asyncio.Task[Result]]:
    """Cancels the statement at the end of the block, if it still runs."""
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


# ---- what is read


async def test_segments_and_tails_of_all_partitions_are_read(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform, partitions=3)
    expected = []
    for number in range(3):
        values = values_of(300, 300 * number)
        await platform.produce(values[:100], "t", number)
        await platform.register("t", number)
        await platform.produce(values[100:150], "t", number)
        await platform.register("t", number)
        await platform.produce(values[150:], "t", number)
        expected += [(number, offset, (value or b"").decode()) for offset, value in enumerate(values)]
    sql = await start_sql()
    result = await sql.run("SELECT _partition, _offset, _value FROM t ORDER BY ALL")
    assert result.rows == expected
    assert result.stats.records_scanned == 900 and result.stats.bytes_scanned > 9_000
    assert (await sql.run("SELECT count(*) FROM t")).value == 900


async def test_the_parts_of_a_record_are_columns(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    headers = [[("h", b"1"), ("h", None)], []]
    records = Records.from_lists(
        [b'{"a": 1}', None], keys=[b"k", None], headers=headers, timestamps_ms=[1_767_225_600_123, 0]
    )
    await platform.produce_records(records, "t")
    sql = await start_sql()
    result = await sql.run("SELECT * FROM t ORDER BY _offset")
    assert result.names == [
        "_key", "_value", "_headers", "_partition", "_offset", "_timestamp", "_key_bytes", "_value_bytes"
    ]  # fmt: skip
    utc = datetime.UTC
    first = [{"name": "h", "value": b"1"}, {"name": "h", "value": None}]
    at = datetime.datetime(2026, 1, 1, 0, 0, 0, 123_000, utc)
    assert result.rows == [
        ("k", '{"a": 1}', first, 0, 0, at, b"k", b'{"a": 1}'),
        (None, None, [], 0, 1, datetime.datetime(1970, 1, 1, tzinfo=utc), None, None),
    ]
    described = await sql.run("DESCRIBE t")
    assert [row[:2] for row in described.rows][2:6] == [
        ("_headers", 'STRUCT("name" VARCHAR, "value" BLOB)[]'),
        ("_partition", "INTEGER"),
        ("_offset", "BIGINT"),
        ("_timestamp", "TIMESTAMP WITH TIME ZONE"),
    ]
    types = await sql.run("DESCRIBE SELECT * FROM t")
    assert [row[:2] for row in types.rows] == [row[:2] for row in described.rows]


async def test_a_key_with_a_dot_is_a_key(platform: World, start_sql: StartSql) -> None:
    """Written from its tree the statement read a, then b."""
    await one_topic(platform)
    await platform.produce([b'{"a.b": 1, "a": {"b": 2}}'], "t")
    sql = await start_sql()
    assert (await sql.run("SELECT _value ->> 'a.b', _value ->> '$.a.b' FROM t")).rows == [("1", "2")]


async def test_an_empty_topic_has_a_schema_and_no_rows(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform, partitions=2)
    sql = await start_sql()
    result = await sql.run("SELECT _key, _offset FROM t")
    assert result.names == ["_key", "_offset"] and result.rows == [] and result.responses == 1
    assert (await sql.run("SELECT count(*), max(_offset) FROM t")).rows == [(0, None)]


async def test_push_down_reads_less_and_finds_the_same(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform, partitions=4)
    for number in range(4):
        for turn in range(5):
            values = values_of(20, 20 * turn)
            await platform.produce(values, "t", number, timestamps_ms=[1_000_000 * turn + i for i in range(20)])
            if turn < 4:
                await platform.register("t", number)
    sql = await start_sql()
    for condition, scanned, count in [
        ("_partition = 2", 100, 100),
        ("_partition IN (1, 3) AND _offset >= 95", 10, 10),
        ("_offset < 3 AND _partition = 0", 3, 3),
        ("_offset BETWEEN 30 AND 50 AND _partition = 0", 21, 21),
        ("_timestamp >= to_timestamp(3000) AND _partition = 0", 100, 40),  # a function of a constant is none
        ("_timestamp >= TIMESTAMP '1970-01-01 00:50:00' AND _partition = 0", 40, 40),
        ("_partition = 9", 0, 0),
        ("_offset > 1000", 0, 0),
    ]:
        result = await sql.run(f"SELECT count(*) FROM t WHERE {condition}")
        assert (result.value, result.stats.records_scanned) == (count, scanned), condition


async def test_limit_without_an_order_stops_reading(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    for _ in range(40):
        await platform.produce([bytes(1 << 20)] * 2, "t")
        await platform.register("t")
    sql = await start_sql()
    result = await sql.run("SELECT _offset FROM t WHERE octet_length(_value_bytes) > 0 LIMIT 3")
    assert len(result.rows) == 3
    assert result.stats.records_scanned < 80, "80 MiB are ten steps, of which some are ahead"


async def test_the_ends_are_those_of_the_start_for_each_read_of_a_topic(
    platform: World, gated: GatedStore, start_sql: StartSql
) -> None:
    await one_topic(platform)
    await platform.produce(values_of(100), "t")
    await platform.register("t")
    await platform.produce(values_of(10, 100), "t")
    sql = await start_sql()
    gated.gate.clear()
    text = "SELECT (SELECT count(*) FROM t), (SELECT max(_offset) FROM t), (SELECT count(_value) FROM t AS x)"
    async with running(sql.start(text)) as task:
        await until_true(lambda: gated.waiting)
        await platform.produce(values_of(50, 110), "t")
        await platform.register("t")
        await platform.produce(values_of(50, 160), "t")
        await settled(platform, sql)
        gated.gate.set()
        assert (await task).rows == [(110, 109, 110)]
    assert (await sql.run("SELECT count(*) FROM t")).value == 210


async def test_a_topic_that_was_created_a_moment_ago_is_found(platform: World, start_sql: StartSql) -> None:
    sql = await start_sql()
    platform.coordinator.feed_paused = True
    await one_topic(platform, "fresh")
    await platform.produce([b"x"], "fresh")
    asked = sum(platform.coordinator.calls.values())
    async with running(sql.start("SELECT count(*) FROM fresh")) as task:
        await until_true(lambda: sum(platform.coordinator.calls.values()) > asked)
        platform.coordinator.feed_paused = False
        platform.coordinator.wake()
        assert (await task).value == 1


async def test_a_topic_that_is_deleted_meanwhile_ends_its_statements(
    platform: World, gated: GatedStore, start_sql: StartSql
) -> None:
    await one_topic(platform)
    for turn in range(2):
        await platform.produce(values_of(100, 100 * turn), "t")
        await platform.register("t")
    sql = await start_sql()
    gated.gate.clear()
    async with running(sql.start("SELECT count(*) FROM t")) as task:
        await until_true(lambda: gated.waiting)
        await platform.delete_topic("t")
        await settled(platform, sql)
        gated.gate.set()
        with pytest.raises(UnknownTopic, match="'t'"):
            await task
    with pytest.raises(InvalidStatement, match="there is no table or topic 't'"):
        await sql.run("SELECT count(*) FROM t")


# ---- what cannot be read


async def test_an_agent_that_is_away_is_waited_for_and_then_named(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    await platform.produce(values_of(10), "t")
    sql = await start_sql(sql_read_wait_ms=30)
    platform.agents["a"].down = True
    with pytest.raises(Unavailable) as error:
        await sql.run("SELECT count(*) FROM t")
    assert "t/0" in str(error.value)
    patient = await start_sql(sql_read_wait_ms=30_000)
    calls = platform.agents["a"].calls
    async with running(patient.start("SELECT count(*) FROM t")) as task:
        await until_true(lambda: platform.agents["a"].calls > calls)
        platform.agents["a"].down = False
        assert (await task).value == 10


async def test_records_that_cannot_be_read_any_more_are_unavailable_with_their_place(
    platform: World, gated: GatedStore, start_sql: StartSql
) -> None:
    """The end was known, and then the agent went away."""
    await one_topic(platform)
    await platform.produce(values_of(10), "t")
    await platform.register("t")
    await platform.produce(values_of(10, 10), "t")
    sql = await start_sql(sql_read_wait_ms=30)
    gated.gate.clear()
    async with running(sql.start("SELECT count(*) FROM t")) as task:
        await until_true(lambda: gated.waiting)
        platform.agents["a"].down = True
        gated.gate.set()
        with pytest.raises(Unavailable, match="t/0: offset 10 cannot be read now: "):
            await task


async def test_damage_is_an_error_with_its_place_and_harms_no_other_statement(
    platform: World, start_sql: StartSql
) -> None:
    await one_topic(platform, partitions=2)
    for number in range(2):
        await platform.produce(values_of(100), "t", number)
        segment = await platform.register("t", number)
    body = bytearray(await platform.store.get(segment.object_key))
    body[len(body) // 3] ^= 0x40
    await platform.store.put(segment.object_key, [bytes(body)], if_absent=False)
    sql = await start_sql()
    with pytest.raises(DataLoss, match="t/1"):
        await sql.run("SELECT count(*) FROM t")
    with pytest.raises(DataLoss, match="t/1"):
        await sql.run("SELECT a._key FROM t AS a JOIN t AS b USING (_offset) ORDER BY ALL")
    assert sql.left() == []
    assert (await sql.run("SELECT count(*) FROM t WHERE _partition = 0")).value == 100


async def test_records_that_retention_removes_meanwhile_are_an_error(
    platform: World, gated: GatedStore, start_sql: StartSql
) -> None:
    await one_topic(platform)
    for turn in range(3):
        await platform.produce(values_of(100, 100 * turn), "t")
        await platform.register("t")
    sql = await start_sql()
    gated.gate.clear()
    async with running(sql.start("SELECT count(*) FROM t")) as task:
        await until_true(lambda: gated.waiting)
        await platform.retain_from(200, "t")
        await settled(platform, sql)
        gated.gate.set()
        with pytest.raises(OffsetBelowStart, match="t/0"):
            await task
    assert (await sql.run("SELECT count(*), min(_offset) FROM t")).rows == [(100, 200)]


async def test_a_value_that_is_not_utf_8_is_an_error_with_its_offset(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    await platform.produce([b"a", b"\xff", b"b"], "t")
    sql = await start_sql()
    with pytest.raises(StatementFailed, match="t/0: _value of the record at offset 1 is not UTF-8") as error:
        await sql.run("SELECT _value FROM t")
    assert error.value.details == {"topic": "t", "partition": "0", "offset": "1"}
    assert (await sql.run("SELECT _value_bytes FROM t")).rows == [(b"a",), (b"\xff",), (b"b",)]
    assert (await sql.run("SELECT _value FROM t WHERE _offset <> 1 AND _offset < 1")).rows == [("a",)]


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("SELECT _valu FROM t", InvalidStatement, '"_value"'),
        ("SELECT x._tmestamp FROM t AS x", InvalidStatement, "table 'x' has no column '_tmestamp'; did you mean '_tim"),
        ("SELECT _key FROM t WHERE _partitio = 1", InvalidStatement, '"_partition"'),
        ("SELECT nofunction(_key) FROM t", InvalidStatement, "nofunction"),
        ("SELECT sum(_key) FROM t", InvalidStatement, "sum(VARCHAR)"),
        ("SELECT CAST(_value AS INTEGER) FROM t", StatementFailed, "'a'"),
        ("SELECT error('as told') FROM t", StatementFailed, "as told"),
    ],
)
async def test_an_error_of_the_query_is_told_in_words(
    platform: World, start_sql: StartSql, text: str, kind: type[Exception], said: str
) -> None:
    await one_topic(platform)
    await platform.produce([b"a"], "t")
    sql = await start_sql()
    with pytest.raises(kind) as error:
        await sql.run(text)
    assert said in str(error.value)
    assert "scan_" not in str(error.value) and "LINE" not in str(error.value)


# ---- turns, deadlines, ends


async def test_a_statement_ends_at_its_deadline_and_leaves_nothing(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform)
    sql = await start_sql(sql_statements_max=1)
    with pytest.raises(StatementTimeout, match="not done within 50 ms") as error:
        await sql.run(ENDLESS, timeout_ms=50)
    assert error.value.details == {"timeout_ms": "50"}
    assert sql.left() == []
    assert (await sql.run("SELECT 1")).value == 1


async def test_a_deadline_also_ends_the_wait_for_records(
    platform: World, gated: GatedStore, start_sql: StartSql
) -> None:
    await one_topic(platform)
    await platform.produce(values_of(10), "t")
    await platform.register("t")
    sql = await start_sql(sql_statements_max=1)
    gated.gate.clear()
    with pytest.raises(StatementTimeout):
        await sql.run("SELECT count(*) FROM t", timeout_ms=50)
    assert sql.left() == []
    platform.agents["a"].hangs = True
    with pytest.raises(StatementTimeout):
        await sql.run("SELECT count(*) FROM t", timeout_ms=50)
    platform.agents["a"].hangs = False
    gated.gate.set()
    assert (await sql.run("SELECT count(*) FROM t")).value == 10


async def test_a_statement_that_is_cancelled_leaves_nothing(
    platform: World, gated: GatedStore, start_sql: StartSql
) -> None:
    await one_topic(platform)
    await platform.produce(values_of(10), "t")
    await platform.register("t")
    sql = await start_sql(sql_statements_max=1)
    gated.gate.clear()
    for text, is_there in [
        (ENDLESS, lambda: any(run._thread is not None for run in sql.service.runs)),
        ("SELECT count(*) FROM t", lambda: gated.waiting),
    ]:
        task = sql.start(text)
        await until_true(is_there)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sql.left() == []
    gated.gate.set()
    assert (await sql.run("SELECT count(*) FROM t")).value == 10


async def test_a_client_that_goes_away_in_the_middle_leaves_nothing(platform: World, start_sql: StartSql) -> None:
    sql = await start_sql(sql_statements_max=1)
    responses = sql.responses(LARGE)
    await anext(responses)
    assert sql.left() != []
    await responses.aclose()
    assert sql.left() == []
    assert (await sql.run("SELECT 1")).value == 1


async def test_a_client_that_does_not_read_has_its_turn_until_its_deadline(
    platform: World, start_sql: StartSql
) -> None:
    sql = await start_sql(sql_statements_max=1)
    responses, timeout_ms = sql.responses(LARGE, timeout_ms=300), 300
    while True:  # a deadline behind the first response, however slow the machine is
        try:
            await anext(responses)
            break
        except StatementTimeout:
            timeout_ms *= 3
            responses = sql.responses(LARGE, timeout_ms=timeout_ms)
    assert (await sql.run("SELECT 1")).value == 1, "it waited for the turn"
    assert [name for name in sql.left() if not name.startswith("run ")] == [], "nothing but the client's own call"
    with pytest.raises(StatementTimeout):
        async for _ in responses:
            pass
    assert sql.left() == []


async def test_statements_beyond_the_queue_are_told_to_come_again(platform: World, start_sql: StartSql) -> None:
    sql = await start_sql(sql_statements_max=1, sql_statements_waiting_max=1)
    async with running(sql.start(ENDLESS)):
        await until_true(lambda: sql.service.runs)
        async with running(sql.start("SELECT 1")):
            await until_true(lambda: sql.service._waiting)
            with pytest.raises(Overloaded, match="1 statements run and 1 wait") as error:
                await sql.run("SELECT 1")
            assert error.value.retry_after_ms > 0
            assert error.value.details["limit"] == "sql_statements_waiting_max"
            with pytest.raises(Overloaded):
                await sql.run("EXPLAIN SELECT 1")
            assert (await sql.run("SHOW TABLES")).rows == [], "reads no records"


async def test_statements_have_their_turn_in_their_order(platform: World, start_sql: StartSql) -> None:
    sql = await start_sql(sql_statements_max=1)
    order: list[int] = []

    async def numbered(number: int) -> None:
        await sql.run(f"SELECT {number}")
        order.append(number)

    async with running(sql.start(ENDLESS)) as first:
        await until_true(lambda: sql.service.runs)
        others = []
        for number in range(5):
            others.append(asyncio.create_task(numbered(number)))
            await until_true(lambda count=number + 1: sql.service._waiting == count)
        first.cancel()
        await asyncio.gather(*others)
    assert order == [0, 1, 2, 3, 4]


async def test_a_statement_whose_turn_never_comes_says_so(platform: World, start_sql: StartSql) -> None:
    sql = await start_sql(sql_statements_max=1)
    async with running(sql.start(ENDLESS)):
        await until_true(lambda: sql.service.runs)
        with pytest.raises(StatementTimeout, match="other statements ran for all of its 30 ms"):
            await sql.run("SELECT 1", timeout_ms=30)
        assert sql.service._waiting == 0


async def test_statements_run_side_by_side(platform: World, gated: GatedStore, start_sql: StartSql) -> None:
    await one_topic(platform)
    await platform.produce(values_of(10), "t")
    await platform.register("t")
    sql = await start_sql(sql_statements_max=2)
    gated.gate.clear()
    async with running(sql.start("SELECT count(*) FROM t")) as slow:
        await until_true(lambda: gated.waiting)
        assert (await sql.run("SELECT 2")).value == 2
        gated.gate.set()
        assert (await slow).value == 10


async def test_a_stop_ends_statements_and_those_that_wait(
    platform: World, gated: GatedStore, start_sql: StartSql
) -> None:
    await one_topic(platform)
    await platform.produce(values_of(10), "t")
    await platform.register("t")
    sql = await start_sql(sql_statements_max=2)
    gated.gate.clear()
    tasks = [sql.start(ENDLESS), sql.start("SELECT count(*) FROM t"), sql.start("SELECT 1")]
    await until_true(lambda: gated.waiting and sql.service._waiting)
    await sql.parts.stop()
    gated.gate.set()
    for task in tasks:
        with pytest.raises(ShuttingDown):
            await task
    with pytest.raises(ShuttingDown):
        await sql.run("SELECT 1")
    assert sql.left() == []


# ---- limits


async def test_a_result_has_limits_of_rows_and_bytes(platform: World, start_sql: StartSql) -> None:
    sql = await start_sql(sql_result_rows_max=1_000)
    assert len((await sql.run("SELECT * FROM range(1000)")).rows) == 1_000
    with pytest.raises(StatementLimit, match="more than 1000 rows") as error:
        await sql.run("SELECT * FROM range(1001)")
    assert error.value.details["limit"] == "sql_result_rows_max"
    sql = await start_sql(sql_result_bytes_max=1 << 20)
    with pytest.raises(StatementLimit, match="more than 1048576 bytes") as error:
        await sql.run("SELECT * FROM range(1000000)")
    assert error.value.details["limit"] == "sql_result_bytes_max"
    assert sql.left() == []


async def test_a_large_result_comes_in_parts(platform: World, start_sql: StartSql) -> None:
    sql = await start_sql()
    result = await sql.run("SELECT range AS n, repeat('x', 100) AS x FROM range(200000)")
    assert result.responses > 4
    assert [row[0] for row in result.rows] == list(range(200_000))


async def test_rows_of_megabytes_come_one_by_one_and_a_row_beyond_a_message_is_an_error(
    platform: World, start_sql: StartSql
) -> None:
    sql = await start_sql(sql_memory_bytes_max=1 << 30)
    result = await sql.run("SELECT repeat('x', 30_000_000) AS x FROM range(3)")
    assert result.responses == 3 and [len(row[0]) for row in result.rows] == [30_000_000] * 3
    with pytest.raises(StatementLimit, match=r"a row of the result has 5[0-9]+ bytes, a message has room for"):
        await sql.run("SELECT repeat('x', 51_000_000) AS x")


async def test_a_statement_beyond_the_memory_limit_is_an_error(platform: World, start_sql: StartSql) -> None:
    sql = await start_sql(sql_memory_bytes_max=32 << 20, sql_temp_bytes_max=0)
    with pytest.raises(StatementLimit, match="sql_memory_bytes_max"):
        await sql.run("SELECT count(DISTINCT range) FROM range(10000000)")
    assert sql.left() == []
    assert (await sql.run("SELECT 1")).value == 1


async def test_a_statement_spills_and_takes_its_files_with_it(platform: World, start_sql: StartSql) -> None:
    sql = await start_sql(sql_memory_bytes_max=48 << 20, sql_threads=1)
    rows = "SELECT range AS n, repeat('x', 100) AS x FROM range(1000000)"
    text = f"SELECT count(*), sum(length(x)) FROM (SELECT * FROM ({rows}) ORDER BY hash(n))"
    assert (await sql.run(text)).rows == [(1_000_000, 100_000_000)]
    assert sql.left() == []


async def test_a_statement_and_its_time_are_checked_before_anything_is_done(
    platform: World, start_sql: StartSql
) -> None:
    sql = await start_sql(sql_statement_bytes_max=100, sql_timeout_ms=1_000)
    with pytest.raises(InvalidArgument, match="statement has 109 bytes, sql_statement_bytes_max is 100"):
        await sql.run(f"SELECT '{'ä' * 50}'")
    with pytest.raises(InvalidArgument, match="timeout_ms is 1001, sql_timeout_ms is 1000"):
        await sql.run("SELECT 1", timeout_ms=1_001)
    with pytest.raises(StatementTimeout, match="1000 ms"):
        await sql.run(ENDLESS)


# ---- statements about topics


async def test_show_tables_lists_topics(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform, "b", 3)
    await one_topic(platform, "a")
    sql = await start_sql()
    result = await sql.run("SHOW TABLES")
    assert result.names == ["name", "kind", "topic", "partitions"]
    assert result.rows == [("a", "topic", "a", 1), ("b", "topic", "b", 3)]


async def test_explain_says_what_is_read(platform: World, start_sql: StartSql) -> None:
    await one_topic(platform, partitions=2)
    for number in range(2):
        await platform.produce(values_of(100), "t", number)
    sql = await start_sql()
    result = await sql.run(
        "EXPLAIN SELECT count(_key) FROM t WHERE _partition = 1 AND _offset >= 40 AND _timestamp > '2026-01-01'"
    )
    lines = [row[0] for row in result.rows]
    assert lines[:4] == [
        "scan of topic t: 1 partition, at most 60 records",
        "  columns decoded: _key, _partition, _offset, _timestamp",
        "  segments and blocks that end before 2026-01-01 00:00:00.000 UTC are left out",
        "  partition 1: offsets 40 to 100",
    ]
    assert len(lines) > 4 and result.stats.records_scanned == 0


class StuckEngine:
    """An engine whose result comes once it is let go, and that heeds no interrupt, as some of DuckDB's functions."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.is_closed = False

    def result(self, sql: str, rows_max: int) -> Any:
        self.goes_on.wait()
        raise Interrupted

    def interrupt(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


async def test_a_statement_that_heeds_no_interrupt_holds_its_turn_and_not_its_caller(
    start_sql: StartSql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "END_WAIT_MS", 20)
    sql = await start_sql(sql_statements_max=1)
    stuck = StuckEngine()
    opened, sql.service.new_engine = sql.service.new_engine, lambda: stuck  # type: ignore[assignment]
    with pytest.raises(StatementTimeout):
        await sql.run("SELECT 1", timeout_ms=50)
    assert not stuck.is_closed
    sql.service.new_engine = opened
    waiting = sql.start("SELECT 1")
    stuck.goes_on.set()
    assert (await waiting).value == 1
    assert stuck.is_closed


async def test_a_service_stops_beside_a_statement_that_heeds_no_interrupt(
    start_sql: StartSql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ABANDON_MS", 20)
    monkeypatch.setattr(service, "END_WAIT_MS", 20)
    sql = await start_sql()
    stuck = StuckEngine()
    sql.service.new_engine = lambda: stuck  # type: ignore[assignment]
    task = sql.start("SELECT 1")
    await until_true(lambda: any(run._thread is not None for run in sql.service.runs))
    await sql.service.close()
    with pytest.raises(ShuttingDown):
        await task
    stuck.goes_on.set()
    await until_true(lambda: stuck.is_closed and sql.left() == [])
