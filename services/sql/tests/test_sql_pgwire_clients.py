"""Clients that people use, on the wire protocol of a real SQL service: psycopg, asyncpg, psql."""

import asyncio
import datetime
import shutil
import uuid
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg.types import TypeInfo

from services.sql.tests.start_sql import Sql, StartSql
from tests.platform.read_world import World

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]

UTC = datetime.UTC
UUID = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")
ALL_TYPES = """SELECT true, 1::smallint, 2::int, 3::bigint, 1.5::float, 2.5::double, -123.45::decimal(10,2), 'x',
'\\x01ab'::blob, date '2026-01-02', time '01:02:03.5', timestamp '2026-01-02 03:04:05.25',
timestamptz '2026-01-02 03:04:05+00',
interval '26:03:04.5', uuid '01234567-89ab-cdef-0123-456789abcdef', [1, null, 3]::int[],
['a"', null]::varchar[], null"""
VALUES = (
    True, 1, 2, 3, 1.5, 2.5, Decimal("-123.45"), "x", b"\x01ab", datetime.date(2026, 1, 2),
    datetime.time(1, 2, 3, 500_000), datetime.datetime(2026, 1, 2, 3, 4, 5, 250_000),
    datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), datetime.timedelta(hours=26, minutes=3, seconds=4.5), UUID,
    [1, None, 3], ['a"', None], None,
)  # fmt: skip


@pytest.fixture
async def sql(platform: World, start_sql: StartSql) -> AsyncIterator[Sql]:
    """A service with a topic of ten records."""
    started = await start_sql(sql_pg_listen="127.0.0.1:0")
    await platform.create_topic("orders", 1)
    await platform.start_agent("a")
    await platform.grant("a", "orders", 0)
    await platform.produce([b'{"n":%d}' % number for number in range(10)], topic="orders")
    while started.engine.reads.index.cluster.position < platform.position:
        await asyncio.sleep(0)
    yield started
    server = started.parts._pg
    assert server is not None
    while server._tasks:
        await asyncio.sleep(0.001)


def at(sql: Sql) -> dict[str, Any]:
    host, _, port = sql.parts.pg_address.rpartition(":")
    return {"host": host, "port": int(port), "user": "me"}


async def psycopg_of(sql: Sql, **more: Any) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(**at(sql), dbname="streamhouse", **more)


async def asyncpg_of(sql: Sql) -> Any:
    return await asyncpg.connect(**at(sql), database="streamhouse")


# ---- psycopg


@pytest.mark.smoke
@pytest.mark.parametrize("binary", [False, True])
async def test_psycopg_reads_all_types(sql: Sql, binary: bool) -> None:
    async with await psycopg_of(sql) as connection:
        row = await (await connection.cursor(binary=binary).execute(ALL_TYPES)).fetchone()
        assert row == VALUES


@pytest.mark.smoke
@pytest.mark.parametrize("binary", [False, True])
async def test_psycopg_sends_all_types(sql: Sql, binary: bool) -> None:
    text = f"SELECT %{'b' if binary else 's'}"
    async with await psycopg_of(sql, autocommit=True) as connection:
        for value in (*VALUES[:-3], [1, 2, 3], 1 << 40, "it's", None):
            cursor = await connection.cursor(binary=binary).execute(text, (value,))
            assert await cursor.fetchone() == (value,)


async def test_psycopg_prepares_and_a_parameter_is_the_columns_type(sql: Sql) -> None:
    async with await psycopg_of(sql) as connection:
        for start in (0, 8):
            cursor = await connection.execute("SELECT _offset FROM orders WHERE _offset >= %s", (start,), prepare=True)
            assert await cursor.fetchall() == [(offset,) for offset in range(start, 10)]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("withhold", [False, True])
async def test_psycopg_has_cursors_of_the_server(sql: Sql, binary: bool, withhold: bool) -> None:
    async with (
        await psycopg_of(sql) as connection,
        connection.cursor("named", binary=binary, withhold=withhold) as cursor,
    ):
        await cursor.execute("SELECT i FROM range(1000) t(i) WHERE i >= %s", (5,))
        assert len(await cursor.fetchmany(10)) == 10
        assert await cursor.fetchone() == (15,)
        assert len(await cursor.fetchall()) == 984


async def test_psycopg_has_nested_transactions(sql: Sql) -> None:
    async with await psycopg_of(sql) as connection, connection.transaction():
        with pytest.raises(psycopg.errors.UndefinedColumn):
            async with connection.transaction():
                await connection.execute("SELECT nope")
        assert await (await connection.execute("SELECT 1")).fetchone() == (1,)


async def test_psycopg_has_pipelines_streams_and_types(sql: Sql) -> None:
    async with await psycopg_of(sql, autocommit=True) as connection:
        async with connection.pipeline():
            first, second = await connection.execute("SELECT 1"), await connection.execute("SELECT %s::int", (2,))
            assert [await first.fetchone(), await second.fetchone()] == [(1,), (2,)]
        assert len([row async for row in connection.cursor().stream("SELECT range FROM range(5000)")]) == 5000
        info = await TypeInfo.fetch(connection, "uuid")
        assert info is not None and (info.oid, info.array_oid) == (2950, 2951)


# ---- asyncpg


@pytest.mark.smoke
async def test_asyncpg_reads_all_types(sql: Sql) -> None:
    connection = await asyncpg_of(sql)
    assert tuple(await connection.fetchrow(ALL_TYPES)) == VALUES
    await connection.close()


async def test_asyncpg_sends_values_and_finds_their_types(sql: Sql) -> None:
    connection = await asyncpg_of(sql)
    text = (
        "SELECT $1::bigint, $2::text, $3::timestamptz, $4::int[], $5::uuid, $6::bool, $7::bytea, $8::interval, $9::date"
    )
    values = (41, "x", VALUES[12], [1, 2], UUID, True, b"xy", VALUES[13], VALUES[9])
    for _ in range(2):
        assert tuple(await connection.fetchrow(text, *values)) == values
    rows = await connection.fetch(
        "SELECT _offset FROM orders WHERE _offset >= $1 AND _partition = $2 LIMIT $3", 7, 0, 2
    )
    assert [row["_offset"] for row in rows] == [7, 8]
    await connection.close()


async def test_asyncpg_has_cursors_and_pools(sql: Sql) -> None:
    async with asyncpg.create_pool(**at(sql), database="streamhouse", min_size=1, max_size=1) as pool:
        for number in range(3):
            assert await pool.fetchval("SELECT $1::int", number) == number
        async with pool.acquire() as connection, connection.transaction():
            rows = [row[0] async for row in connection.cursor("SELECT i FROM range(200) t(i)", prefetch=37)]
        assert rows == list(range(200))


# ---- psql


async def psql(sql: Sql, *commands: str) -> str:
    place = at(sql)
    arguments = [part for command in commands for part in ("-c", command)]
    process = await asyncio.create_subprocess_exec(
        "psql", "-X", "-h", place["host"], "-p", str(place["port"]), "-U", "me", "-d", "streamhouse", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    return output.decode()


needs_psql = pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed (postgresql-client)")


@pytest.mark.smoke
@needs_psql
async def test_psql_describes_topics_and_tables(sql: Sql) -> None:
    await sql.run("CREATE TABLE numbers (n INT, s VARCHAR) WITH (topic = 'orders', format = 'json')")
    listed = await psql(sql, "\\dt")
    assert "public | numbers | table" in listed and "public | orders  | table" in listed
    described = await psql(sql, "\\d orders")
    assert 'Table "public.orders"' in described and "_timestamp   | timestamp with time zone" in described
    assert "n      | integer" in await psql(sql, "\\d numbers")
    assert 'Did not find any relation named "nothing"' in await psql(sql, "\\d nothing")
    assert "streamhouse" in await psql(sql, "\\l") and "public" in await psql(sql, "\\dn")


@needs_psql
@pytest.mark.parametrize(
    "command",
    [
        "\\d", "\\d+ orders", "\\d pg_class", "\\da", "\\dA", "\\db", "\\dC", "\\dconfig jit", "\\dD", "\\ddp", "\\dE",
        "\\des", "\\det", "\\df", "\\dF", "\\dg", "\\di", "\\dL", "\\dm", "\\dn+", "\\do", "\\dO", "\\dp", "\\dPt",
        "\\drds", "\\dRp", "\\dRs", "\\ds", "\\dt+", "\\dt *.*", "\\dT", "\\dT+ int4", "\\du", "\\dv", "\\dx", "\\dX",
        "\\dy", "\\l+", "\\z", "\\conninfo", "SHOW ALL", "SELECT version(), current_user, current_database()",
    ],
)  # fmt: skip
async def test_psql_has_its_commands(sql: Sql, command: str) -> None:
    assert "ERROR" not in (output := await psql(sql, command)), output


@needs_psql
async def test_psql_shows_where_a_statement_is_wrong(sql: Sql) -> None:
    assert (await psql(sql, "SELECT *\nFROM ordrs")).splitlines()[1:] == ["LINE 2: FROM ordrs", "             ^"]


@pytest.mark.smoke
@needs_psql
async def test_psql_reads_a_topic(sql: Sql) -> None:
    output = await psql(sql, "SELECT _offset, _value ->> '$.n' AS n FROM orders WHERE _offset >= 8")
    assert output.splitlines() == [" _offset | n ", "---------+---", "       8 | 8", "       9 | 9", "(2 rows)", ""]
