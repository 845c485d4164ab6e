"""Declared tables: what CREATE TABLE takes and refuses, and the rows that values become."""

import json
from typing import Any

import pytest
from shproto.errors import InvalidStatement, StatementFailed, StreamHouseError, TableExists, UnknownTable
from streamhouse_sql.core.statement import CreateTable, DropTable, parse
from streamhouse_sql.core.tables import COLUMNS_MAX, TableDefinition

from services.sql.tests.start_sql import Sql, StartSql
from tests.platform.read_world import World

pytestmark = pytest.mark.timeout(60)


def define(text: str) -> TableDefinition:
    statement = parse(text)
    assert isinstance(statement, CreateTable)
    return statement.definition


def refused(text: str) -> str:
    with pytest.raises(InvalidStatement) as error:
        parse(text)
    return str(error.value)


# ---- what it takes


def test_a_definition_is_read_again_from_its_text() -> None:
    text = """
        CREATE TABLE IF NOT EXISTS Flights (
            carrier VARCHAR NOT NULL, delay INTEGER, "count" BIGINT, tags VARCHAR[],
            place STRUCT(lat DOUBLE, lon DOUBLE), price DECIMAL(10, 2),
            k VARCHAR METADATA FROM 'key', timestamp TIMESTAMPTZ METADATA,
            late AS delay > 15,
            WATERMARK FOR timestamp AS timestamp - INTERVAL '5' MINUTE
        ) WITH (topic = 'flights', format = 'json', bad_rows = 'skip')
    """
    first = define(text)
    again = define(first.text)
    assert again == first
    assert (first.name, first.topic, first.format, first.bad_rows) == ("Flights", "flights", "json", "skip")
    assert [column.name for column in first.columns] == [
        "carrier", "delay", "count", "tags", "place", "price", "k", "timestamp", "late"
    ]  # fmt: skip
    assert [column.is_field for column in first.columns] == [True] * 6 + [False] * 3
    assert first.columns[0].not_null and not first.columns[1].not_null
    assert first.watermark == ("timestamp", "timestamp - INTERVAL '5' MINUTE")


def test_create_source_is_create_table_and_options_have_defaults() -> None:
    found = define("CREATE SOURCE s (a INT) WITH (topic = 't')")
    assert (found.name, found.format, found.bad_rows) == ("s", "json", "fail")
    assert define("create source s (a INT) with (TOPIC = 't', Format = 'JSON')").format == "json"


def test_drop_table_is_read() -> None:
    assert parse("DROP TABLE t") == DropTable("t", False)
    assert parse("DROP TABLE IF EXISTS t;") == DropTable("t", True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CREATE TABLE t WITH (topic = 'x')", "CREATE TABLE needs columns"),
        ("CREATE TABLE t () WITH (topic = 'x')", ""),
        ("CREATE TABLE t (a INT)", "WITH needs the topic: WITH (topic = '…')"),
        ("CREATE TABLE t (a INT) WITH (topic = '')", "WITH needs the topic"),
        ("CREATE TABLE t (a INT) WITH (topic = 't', topics = 'u')", "WITH has no option 'topics'"),
        ("CREATE TABLE t (a INT) WITH (topic = 't', format = 'orc')", "format is 'orc', must be one of json, text"),
        ("CREATE TABLE t (a INT) WITH (topic = 't', bad_rows = 'x')", "bad_rows is 'x', must be one of fail, skip"),
        ("CREATE TABLE t (a INT) WITH (topic = 5)", "option topic must be a text"),
        ("CREATE TABLE t (a INT, A INT) WITH (topic = 't')", "column A is given twice"),
        ("CREATE TABLE t (_offset INT) WITH (topic = 't')", "has the name of a part of the record"),
        ("CREATE TABLE t (a) WITH (topic = 't')", "a is not supported in CREATE TABLE"),
        ('CREATE TABLE t ("a b" INT) WITH (topic = \'t\')', "column name 'a b' must be letters"),
        ('CREATE TABLE "a b" (a INT) WITH (topic = \'t\')', "table name 'a b' must be letters"),
        (f"CREATE TABLE {'t' * 129} (a INT) WITH (topic = 't')", "at most 128 characters"),
        ("CREATE TABLE x.t (a INT) WITH (topic = 't')", "there is no schema 'x'"),
        ("CREATE TABLE t (a INT PRIMARY KEY) WITH (topic = 't')", "PRIMARY KEY is not supported"),
        ("CREATE TABLE t (a INT, PRIMARY KEY (a)) WITH (topic = 't')", "PRIMARY KEY"),
        ("CREATE TABLE t (a INT DEFAULT 5) WITH (topic = 't')", "DEFAULT 5 is not supported"),
        ("CREATE TABLE t (a INT CHECK (a > 5)) WITH (topic = 't')", "not supported"),
        ("CREATE TABLE t (a INT METADATA FROM 'nope') WITH (topic = 't')", "METADATA has no 'nope'; it has key, "),
        ("CREATE TABLE t (k VARCHAR NOT NULL METADATA FROM 'key') WITH (topic = 't')", "column k: NOT NULL is"),
        ("CREATE TABLE t (a INT METADATA) WITH (topic = 't')", "METADATA has no 'a'"),
        ("CREATE OR REPLACE TABLE t (a INT) WITH (topic = 't')", "CREATE OR REPLACE TABLE is not supported"),
        ("CREATE TEMPORARY TABLE t (a INT) WITH (topic = 't')", "not supported"),
        ("CREATE TABLE t (a VARCHAR, b VARCHAR) WITH (topic = 't', format = 'text')", "exactly one column of the"),
        ("CREATE TABLE t (a INT) WITH (topic = 't', format = 'text')", "of type VARCHAR"),
        ("CREATE TABLE t (a TIMESTAMP, WATERMARK FOR b AS b) WITH (topic = 't')", "there is no such column"),
        ("CREATE TABLE t (a TIMESTAMP, WATERMARK FOR a AS now()) WITH (topic = 't')", "WATERMARK FOR a must be"),
        ("CREATE TABLE t (a TIMESTAMP, WATERMARK FOR a AS a, WATERMARK FOR a AS a) WITH (topic = 't')", "given twice"),
        ("DROP TABLE a, b", "DROP TABLE name is"),
        ("DROP VIEW a", "DROP TABLE name is"),
        ("DROP TABLE a CASCADE", "CASCADE is not supported in DROP TABLE"),
        ("CREATE TABLE t (" + ", ".join(f"c{i} INT" for i in range(COLUMNS_MAX + 1)) + ") WITH (topic = 't')",
         f"a table has {COLUMNS_MAX + 1} columns, at most {COLUMNS_MAX} are allowed"),
    ],
)  # fmt: skip
def test_a_clause_that_is_not_supported_is_refused_by_name(text: str, said: str) -> None:
    assert said in refused(text)


# ---- rows


async def with_values(platform: World, start_sql: StartSql, *values: Any) -> Sql:
    """Starts a service over the topic `t` with these values: bytes, None, or JSON."""
    await platform.create_topic("t")
    await platform.start_agent("a")
    await platform.grant("a", "t")
    bodies = [value if value is None or isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    await platform.produce(bodies, "t", timestamps_ms=[1_000 * i for i in range(len(bodies))])
    return await start_sql()


async def test_fields_become_columns_with_types(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(
        platform, start_sql,
        {"s": "ä", "i": 5, "d": 1.5, "b": True, "l": [1, 2], "o": {"x": 1}, "t": "2026-01-01T10:00:00Z", "n": "12.50"},
        {"s": None, "extra": 1},
        {},
    )  # fmt: skip
    await sql.run(
        "CREATE TABLE x (s VARCHAR, i INTEGER, d DOUBLE, b BOOLEAN, l INTEGER[], o STRUCT(x INTEGER), "
        "t TIMESTAMP, n DECIMAL(10, 2), offset BIGINT METADATA, twice AS i * 2) WITH (topic = 't')"
    )
    result = await sql.run("SELECT s, i, d, b, l, o, t::VARCHAR, n::VARCHAR, twice FROM x ORDER BY _offset")
    assert result.rows == [
        ("ä", 5, 1.5, True, [1, 2], {"x": 1}, "2026-01-01 10:00:00", "12.50", 10),
        (None,) * 9,
        (None,) * 9,
    ]
    described = await sql.run("DESCRIBE x")
    assert [row[0] for row in described.rows] == ["s", "i", "d", "b", "l", "o", "t", "n", "offset", "twice"]
    assert (await sql.run("SELECT * FROM x")).names == [row[0] for row in described.rows]


async def test_a_null_value_is_a_row_of_nulls(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(platform, start_sql, {"a": 1}, None)
    await sql.run("CREATE TABLE x (a INTEGER) WITH (topic = 't')")
    assert (await sql.run("SELECT a, _offset FROM x ORDER BY _offset")).rows == [(1, 0), (None, 1)]
    await sql.run("CREATE TABLE y (a INTEGER NOT NULL) WITH (topic = 't', bad_rows = 'skip')")
    assert (await sql.run("SELECT a, _offset FROM y")).rows == [(1, 0)]


BAD = [
    b"no JSON",
    b"",
    b"[1]",
    b"5",
    b'"text"',
    b'{"a": "x"}',
    b'{"a": [1]}',
    b'{"a": 99999999999}',
    b'{"a": 1',
    b"null",
]


@pytest.mark.parametrize("bad", BAD)
async def test_a_value_that_does_not_fit_fails_or_is_left_out(platform: World, start_sql: StartSql, bad: bytes) -> None:
    sql = await with_values(platform, start_sql, {"a": 1}, bad, {"a": 3})
    await sql.run("CREATE TABLE f (a INTEGER) WITH (topic = 't')")
    with pytest.raises(StatementFailed, match="t/0: the value at offset 1 does not fit the columns of table f"):
        await sql.run("SELECT sum(a) FROM f")
    assert (await sql.run("SELECT a FROM f WHERE _offset = 2")).rows == [(3,)], "beside the bad one"
    await sql.run("CREATE TABLE s (a INTEGER) WITH (topic = 't', bad_rows = 'skip')")
    assert (await sql.run("SELECT a FROM s ORDER BY a")).rows == [(1,), (3,)]
    assert (await sql.run("SELECT count(*) FROM s")).value == 2, "count and rows are of the same records"


async def test_a_row_does_not_depend_on_the_columns_that_are_named(platform: World, start_sql: StartSql) -> None:
    """A field that is bad makes its row bad, also where a statement does not ask for the field."""
    sql = await with_values(platform, start_sql, {"a": 1, "b": 1}, {"a": 2, "b": "x"}, {"a": 3})
    await sql.run("CREATE TABLE s (a INTEGER, b INTEGER) WITH (topic = 't', bad_rows = 'skip')")
    both = (await sql.run("SELECT a, b FROM s ORDER BY a")).rows
    assert both == [(1, 1), (3, None)]
    assert (await sql.run("SELECT a FROM s ORDER BY a")).rows == [(1,), (3,)]
    assert (await sql.run("SELECT count(*) FROM s")).value == 2


async def test_push_down_holds_for_a_declared_table(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(platform, start_sql, *({"a": i} for i in range(10)))
    await sql.run("CREATE TABLE x (a INTEGER, at TIMESTAMPTZ METADATA FROM 'timestamp') WITH (topic = 't')")
    result = await sql.run("SELECT sum(a) FROM x WHERE _offset BETWEEN 3 AND 4")
    assert (result.value, result.stats.records_scanned) == (7, 2)
    assert (await sql.run("SELECT y.a FROM x AS y WHERE y._offset = 5 AND y._partition = 0")).rows == [(5,)]
    assert (await sql.run("SELECT count(*) FROM x JOIN t ON x._offset = t._offset")).value == 10


async def test_names_of_columns_are_suggested(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(platform, start_sql, {"carrier": "UA", "delay": 5})
    await sql.run("CREATE TABLE x (carrier VARCHAR, delay INTEGER) WITH (topic = 't')")
    with pytest.raises(InvalidStatement, match='"carrier"'):
        await sql.run("SELECT carier FROM x WHERE delay > 3")
    with pytest.raises(InvalidStatement, match="table 'y' has no column 'dlay'; did you mean 'delay'"):
        await sql.run("SELECT y.dlay FROM x AS y")


async def test_a_text_table_has_the_value_as_it_is(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(platform, start_sql, b"a line", b"", None, b'{"a": 1}')
    await sql.run(
        "CREATE TABLE lines (line VARCHAR, k VARCHAR METADATA FROM 'key') WITH (topic = 't', format = 'text')"
    )
    assert [row[0] for row in (await sql.run("SELECT line FROM lines ORDER BY _offset")).rows] == [
        "a line", "", None, '{"a": 1}'
    ]  # fmt: skip


async def test_a_text_table_may_leave_out_null_values(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(platform, start_sql, b"a line", None)
    await sql.run("CREATE TABLE s (line VARCHAR NOT NULL) WITH (topic = 't', format = 'text', bad_rows = 'skip')")
    assert (await sql.run("SELECT line FROM s")).rows == [("a line",)]
    assert (await sql.run("SELECT count(*) FROM s")).value == 1
    await sql.run("CREATE TABLE f (line VARCHAR NOT NULL) WITH (topic = 't', format = 'text')")
    with pytest.raises(StatementFailed, match="t/0: the value at offset 1"):
        await sql.run("SELECT line FROM f")


async def test_columns_of_odd_names(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(platform, start_sql, {"order": 1, "Select": 2, "a$b": 3, "_x": 4})
    await sql.run('CREATE TABLE x ("order" INTEGER, "Select" INTEGER, a$b INTEGER, _x INTEGER) WITH (topic = \'t\')')
    assert (await sql.run('SELECT "order", "Select", a$b, _x FROM x')).rows == [(1, 2, 3, 4)]


# ---- the catalogue


async def test_tables_are_there_for_all_and_gone_when_dropped(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(platform, start_sql, {"a": 1})
    other = await start_sql()
    await sql.run("CREATE TABLE Mine (a INTEGER) WITH (topic = 't')")
    assert (await sql.run("SELECT a FROM MINE")).value == 1
    assert (await other.run('SELECT a FROM "mine"')).value == 1, "another service asks for a name it does not know"
    with pytest.raises(TableExists):
        await sql.run("CREATE TABLE MINE (b INTEGER) WITH (topic = 't')")
    await sql.run("CREATE TABLE IF NOT EXISTS mine (b INTEGER) WITH (topic = 't')")
    assert [row[:2] for row in (await sql.run("SHOW TABLES")).rows] == [("mine", "table"), ("t", "topic")]
    await sql.run("DROP TABLE mine")
    with pytest.raises(UnknownTable):
        await sql.run("DROP TABLE mine")
    await sql.run("DROP TABLE IF EXISTS mine")
    with pytest.raises(InvalidStatement, match="there is no table or topic 'mine'"):
        await sql.run("SELECT a FROM mine")


async def test_a_table_needs_its_topic_and_types_that_there_are(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(platform, start_sql, {"a": 1})
    for text in (
        "CREATE TABLE x (a INTEGER) WITH (topic = 'nope')",
        "CREATE TABLE x (a NOTYPE) WITH (topic = 't')",
        "CREATE TABLE x (a INTEGER, b AS nofunction(a)) WITH (topic = 't')",
        "CREATE TABLE x (a INTEGER, b AS c + 1) WITH (topic = 't')",
    ):
        with pytest.raises(StreamHouseError) as error:
            await sql.run(text)
        assert isinstance(error.value, InvalidStatement), text
        assert [row[0] for row in (await sql.run("SHOW TABLES")).rows] == ["t"], "nothing was declared"


async def test_a_table_comes_before_a_topic_of_its_name(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(platform, start_sql, {"a": 1})
    await sql.run("CREATE TABLE t (a INTEGER) WITH (topic = 't')")
    assert (await sql.run("SELECT * FROM t")).names == ["a"]


async def test_a_table_whose_topic_was_deleted_says_so(platform: World, start_sql: StartSql) -> None:
    sql = await with_values(platform, start_sql, {"a": 1})
    await sql.run("CREATE TABLE x (a INTEGER) WITH (topic = 't')")
    await platform.delete_topic("t")
    with pytest.raises(StreamHouseError, match="'t'"):
        await sql.run("SELECT a FROM x")
