"""The PostgreSQL wire protocol over a real SQL service: sessions, both query protocols, limits, and clients that do
what no client should."""

import asyncio
import logging
import random
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from shproto.errors import ShuttingDown
from shruntime.server import ListenError
from shruntime.settings import SettingsError
from streamhouse_sql.core.parameters import Parameters
from streamhouse_sql.core.statement import Query
from streamhouse_sql.core.statement import parse as parse_statement
from streamhouse_sql.pg_listener import open_listener
from streamhouse_sql.settings import SqlSettings

from services.sql.tests.pg_client import (
    FLUSH,
    SYNC,
    TERMINATE,
    PgClient,
    bind,
    error_of,
    execute,
    message,
    parse,
    query,
    rows_of,
    startup,
    tags,
)
from services.sql.tests.start_sql import Sql, StartSql
from tests.platform.read_world import World

pytestmark = pytest.mark.timeout(120)

ANY = "127.0.0.1:0"
# Computes for hours, and takes no memory.
ENDLESS = "SELECT count(*) FROM range(1000000000) AS a, range(1000000) AS b WHERE (a.range * b.range) % 7 = 3"
# More than sockets and buffers hold.
LARGE = "SELECT range, range AS again FROM range(20000000)"


@pytest.fixture
async def sql(start_sql: StartSql) -> AsyncIterator[Sql]:
    started = await start_sql(sql_pg_listen=ANY)
    yield started
    await all_gone(started)


async def all_gone(sql: Sql) -> None:
    """Returns once no connection is left, nor anything of what it ran."""
    server = sql.parts._pg
    assert server is not None
    await until_true(lambda: not server._tasks and not server._keys)
    await until_true(lambda: not [left for left in sql.left() if "pgwire" not in left])


async def until_true(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def orders(platform: World, sql: Sql, *values: bytes) -> None:
    await platform.create_topic("orders", 1)
    await platform.start_agent("a")
    await platform.grant("a", "orders", 0)
    await platform.produce(values, topic="orders")
    while sql.engine.reads.index.cluster.position < platform.position:
        await asyncio.sleep(0)


# ---- sessions


async def test_a_session_begins_with_its_settings_and_a_key(sql: Sql) -> None:
    client = await PgClient.connect(sql, start=False)
    replies = await client.ask(startup(application_name="me"))
    assert replies[0].tag == "R" and replies[0].body == bytes(4)
    told = dict(reply.text.split("\0", 1) for reply in replies if reply.tag == "S")
    assert told["client_encoding"] == "UTF8" and told["TimeZone"] == "UTC" and told["application_name"] == "me"
    assert [len(reply.body) for reply in replies if reply.tag == "K"] == [8]
    assert replies[-1].body == b"I"
    await client.close()


async def test_encryption_is_declined_and_the_session_goes_on(sql: Sql) -> None:
    client = await PgClient.connect(sql, start=False)
    for code in (80877103, 80877104):
        client.send(struct.pack("!II", 8, code))
        assert await client.reader.readexactly(1) == b"N"
    assert tags(await client.ask(startup()))[-1] == "Z"
    await client.close()


async def test_a_newer_minor_version_is_negotiated_down(sql: Sql) -> None:
    client = await PgClient.connect(sql, start=False)
    newer = bytearray(startup(**{"_pq_.greeting": "1"}))
    newer[4:8] = struct.pack("!I", 3 << 16 | 2)
    replies = await client.ask(bytes(newer))
    assert replies[0].tag == "v" and replies[0].body == struct.pack("!ii", 0, 1) + b"_pq_.greeting\0"
    assert replies[-1].tag == "Z"
    await client.close()


async def test_another_database_is_refused_by_name(sql: Sql) -> None:
    client = await PgClient.connect(sql, start=False)
    error = error_of(await client.ask(startup(database="other")))
    assert error["C"] == "3D000" and "streamhouse" in error["H"]
    assert await client.rest() == b""


async def test_a_client_that_leaves_in_order_is_answered_by_the_end(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    client.send(TERMINATE)
    assert await client.rest() == b""


# ---- simple queries


async def test_a_query_reads_a_topic(platform: World, sql: Sql) -> None:
    await orders(platform, sql, b"one", b"two")
    client = await PgClient.connect(sql)
    replies = await client.ask(query("SELECT _offset, _value, _key FROM orders ORDER BY _offset DESC"))
    assert rows_of(replies) == [[b"1", b"two", None], [b"0", b"one", None]]
    assert tags(replies) == "TDDCZ" and replies[-2].text == "SELECT 2"
    await client.close()


async def test_statements_of_a_text_run_up_to_the_first_that_fails(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    replies = await client.ask(query("SELECT 1; SELECT nope; SELECT 3"))
    assert tags(replies) == "TDCEZ"
    assert (await client.ask(query(" ; ")))[0].tag == "I"
    await client.close()


async def test_an_error_has_its_place_in_the_whole_text(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    text = "SELECT 1;\nSELECT *\nFROM nothing"
    error = error_of(await client.ask(query(text)))
    assert error["C"] == "42P01" and int(error["P"]) == text.index("nothing") + 1
    error = error_of(await client.ask(query("SELECT 1; COPY x TO STDOUT")))
    assert error["C"] == "0A000" and int(error["P"]) == 11
    await client.close()


@pytest.mark.parametrize(
    ("text", "sqlstate"),
    [
        ("SELECT nope", "42703"),
        ("SELECT nothing(1)", "42883"),
        ("SELECT 1 +", "42601"),
        ("SELECT 'open", "42601"),
        ("SELECT CAST('x' AS INT)", "22P02"),
        ("DELETE FROM orders", "0A000"),
        ("SELECT count(*) AS n FROM orders EMIT CHANGES", "0A000"),
        ("SELECT $1", "42P02"),
        ("SELECT * FROM read_csv('/etc/passwd')", "0A000"),
        ("SELECT * FROM pg_class, read_text('/etc/passwd')", "0A000"),
        ("SELECT * FROM pg_class, duckdb_settings()", "0A000"),
        ("SELECT * FROM pg_catalog.no_such_table", "42P01"),
        ("SELECT current_setting('no_such_setting')", "42704"),
        ("SET enable_external_access = true", "42704"),
        ("COMMIT AND CHAIN", "0A000"),
    ],
)
async def test_errors_have_postgresqls_codes(sql: Sql, text: str, sqlstate: str) -> None:
    client = await PgClient.connect(sql)
    assert error_of(await client.ask(query(text)))["C"] == sqlstate
    assert rows_of(await client.ask(query("SELECT 1"))) == [[b"1"]]
    await client.close()


# ---- extended queries


async def test_a_portal_is_taken_in_parts(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    replies = await client.ask(
        parse("SELECT range FROM range(5)"), bind(), execute("", 2), execute("", 2), execute("", 2), SYNC
    )
    assert tags(replies) == "12DDsDDsDCZ" and replies[-2].text == "SELECT 1"
    await client.close()


async def test_a_portal_that_is_open_in_a_transaction_outlives_sync_and_no_other_does(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    await client.ask(query("BEGIN"))
    await client.ask(parse("SELECT range FROM range(100000)"), bind("p"), execute("p", 1), SYNC)
    assert tags(await client.ask(execute("p", 1), SYNC)) == "DsZ"
    await client.ask(query("COMMIT"))
    assert error_of(await client.ask(execute("p", 1), SYNC))["C"] == "34000"
    await client.ask(parse("SELECT range FROM range(100000)"), bind("p"), execute("p", 1), SYNC)
    assert error_of(await client.ask(execute("p", 1), SYNC))["C"] == "34000"
    await client.close()


async def test_an_error_skips_messages_up_to_sync(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    replies = await client.ask(parse("SELECT nope"), bind(), execute(), parse("SELECT 1"), SYNC)
    assert tags(replies) == "EZ"
    assert tags(await client.ask(parse("SELECT 1"), bind(), execute(), SYNC)) == "12DCZ"
    await client.close()


async def test_flush_sends_what_there_is(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    client.send(parse("SELECT 1"), FLUSH)
    assert (await client.reply()).tag == "1"
    assert tags(await client.ask(SYNC)) == "Z"
    await client.close()


async def test_what_is_prepared_is_described_and_forgotten(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    replies = await client.ask(parse("SELECT $1::int AS a", "s"), message(b"D", b"Ss\0"), SYNC)
    assert tags(replies) == "1tTZ" and replies[1].body == struct.pack("!HI", 1, 23)
    assert error_of(await client.ask(parse("SELECT 1", "s"), SYNC))["C"] == "42P05"
    assert error_of(await client.ask(bind("", "s"), SYNC))["C"] == "08P01"  # a value is missing
    assert tags(await client.ask(message(b"C", b"Ss\0"), message(b"C", b"Pnone\0"), SYNC)) == "33Z"
    assert error_of(await client.ask(message(b"D", b"Ss\0"), SYNC))["C"] == "26000"
    assert error_of(await client.ask(message(b"D", b"Pnone\0"), SYNC))["C"] == "34000"
    assert error_of(await client.ask(parse("SELECT 1; SELECT 2"), SYNC))["C"] == "42601"
    assert tags(await client.ask(parse(""), bind(), message(b"D", b"P\0"), execute(), SYNC)) == "12nIZ"
    await client.close()


async def test_a_value_of_a_parameter_is_pushed_down(platform: World, sql: Sql) -> None:
    await orders(platform, sql, *(b"%d" % number for number in range(100)))
    client = await PgClient.connect(sql)
    wanted = message(b"B", b"\0\0" + struct.pack("!HHi", 0, 1, 2) + b"98" + struct.pack("!H", 0))
    text = "SELECT _value FROM orders WHERE _offset >= $1"
    bound = await sql.service.bind(_query(text), Parameters({1: "BIGINT"}, {1: 98}))
    assert bound.scans[0].pushdown.offset_min == 98 and bound.values == {"p1": 98}
    replies = await client.ask(parse(text), wanted, execute(), SYNC)
    assert rows_of(replies) == [[b"98"], [b"99"]]
    await client.close()


def _query(text: str) -> Query:
    statement = parse_statement(text, parameters=True)
    assert isinstance(statement, Query)
    return statement


# ---- transactions and cursors


async def test_a_transaction_says_where_it_stands(sql: Sql) -> None:
    client = await PgClient.connect(sql)

    async def status(text: str) -> bytes:
        return (await client.ask(query(text)))[-1].body

    assert await status("BEGIN") == b"T"
    assert await status("SELECT 1") == b"T"
    assert await status("SELECT nope") == b"E"
    assert error_of(await client.ask(query("SELECT 1")))["C"] == "25P02"
    replies = await client.ask(query("COMMIT"))
    assert replies[0].text == "ROLLBACK" and replies[-1].body == b"I"
    replies = await client.ask(query("COMMIT"))
    assert tags(replies) == "NCZ" and replies[0].error["C"] == "25P01"
    await client.close()


async def test_a_cursor_is_fetched_moved_and_closed(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    assert error_of(await client.ask(query("DECLARE c CURSOR FOR SELECT 1")))["C"] == "25P01"
    await client.ask(query("BEGIN; DECLARE c CURSOR FOR SELECT range FROM range(10)"))
    assert rows_of(await client.ask(query("FETCH 2 FROM c"))) == [[b"0"], [b"1"]]
    assert (await client.ask(query("MOVE 3 FROM c")))[0].text == "MOVE 3"
    replies = await client.ask(query("FETCH ALL FROM c"))
    assert [row[0] for row in rows_of(replies)] == [b"5", b"6", b"7", b"8", b"9"] and replies[-2].text == "FETCH 5"
    assert (await client.ask(query("FETCH c")))[-2].text == "FETCH 0"
    assert (await client.ask(query("CLOSE c")))[0].text == "CLOSE CURSOR"
    assert error_of(await client.ask(query("FETCH c")))["C"] == "34000"
    await client.close()


async def test_a_cursor_with_hold_outlives_its_transaction_and_others_do_not(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    text = "BEGIN; DECLARE a CURSOR WITH HOLD FOR SELECT range FROM range(3); DECLARE b CURSOR FOR SELECT 1; COMMIT"
    await client.ask(query(text))
    assert rows_of(await client.ask(query("FETCH ALL FROM a"))) == [[b"0"], [b"1"], [b"2"]]
    assert error_of(await client.ask(query("FETCH b")))["C"] == "34000"
    await client.ask(query("CLOSE ALL"))
    await client.close()


# ---- limits


async def test_a_statement_is_cancelled_by_its_key_and_by_no_other(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    client.send(query(ENDLESS))
    await until_true(lambda: sql.service.runs)
    for key in (client.key[:4] + b"none", client.key):
        other = await PgClient.connect(sql, start=False)
        other.send(struct.pack("!II", 16, 80877102) + key)
        assert await other.rest() == b""
        if key != client.key:
            await asyncio.sleep(0)
            assert sql.service.runs
    assert error_of(await client.until_ready())["C"] == "57014"
    assert rows_of(await client.ask(query("SELECT 1"))) == [[b"1"]]
    await client.close()


async def test_a_cancel_that_comes_too_late_is_not_meant_for_the_next_statement(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    await client.ask(query("SELECT 1"))
    other = await PgClient.connect(sql, start=False)
    other.send(struct.pack("!II", 16, 80877102) + client.key)
    await other.rest()
    assert rows_of(await client.ask(query("SELECT 2"))) == [[b"2"]]
    await client.close()


async def test_statement_timeout_ends_a_statement(sql: Sql) -> None:
    client = await PgClient.connect(sql)
    await client.ask(query("SET statement_timeout = '100ms'"))
    assert error_of(await client.ask(query(ENDLESS)))["C"] == "57014"
    await client.ask(query("BEGIN; SET LOCAL statement_timeout = '1h'; COMMIT; RESET statement_timeout"))
    await client.close()


async def test_a_client_that_dies_while_its_statement_computes_gives_the_turn_back(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_statements_max=1)
    client = await PgClient.connect(sql)
    client.send(query(ENDLESS))
    await until_true(lambda: sql.service.runs)
    await client.close()
    await until_true(lambda: not sql.service.runs)
    assert (await sql.run("SELECT 1")).value == 1
    await all_gone(sql)


async def test_a_client_that_dies_amid_a_result_gives_the_turn_back(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_statements_max=1)
    client = await PgClient.connect(sql)
    client.send(query(LARGE))
    assert (await client.reply()).tag == "T" and (await client.reply()).tag == "D"
    await client.close()
    assert (await sql.run("SELECT 1")).value == 1
    await all_gone(sql)


async def test_a_client_that_takes_nothing_holds_no_turn_beyond_the_deadline(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_statements_max=1, sql_timeout_ms=500)
    client = await PgClient.connect(sql)
    client.send(query(LARGE))
    await until_true(lambda: sql.service.runs)
    await until_true(lambda: not sql.service.runs)
    assert (await sql.run("SELECT 1")).value == 1
    await client.close()
    await all_gone(sql)


async def test_a_suspended_portal_holds_no_turn_beyond_the_deadline(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_statements_max=1, sql_timeout_ms=500)
    client = await PgClient.connect(sql)
    await client.ask(query("BEGIN"))
    await client.ask(parse(LARGE), bind("p"), execute("p", 1), SYNC)
    await until_true(lambda: not sql.service._slots.locked())
    assert (await sql.run("SELECT 1")).value == 1
    replies = await client.ask(execute("p", 100_000), SYNC)
    assert error_of(replies)["C"] == "57014" and replies[-1].body == b"E"
    await client.close()
    await all_gone(sql)


async def test_a_short_result_holds_no_turn_while_its_client_takes_it(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_statements_max=1)
    client = await PgClient.connect(sql)
    await client.ask(query("BEGIN"))
    assert tags(await client.ask(parse("SELECT range FROM range(100)"), bind("p"), execute("p", 1), SYNC)) == "12DsZ"
    assert (await sql.run("SELECT 1")).value == 1
    await client.close()
    await all_gone(sql)


async def test_the_session_beyond_the_limit_is_told_so(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_pg_connections_max=1)
    first = await PgClient.connect(sql)
    second = await PgClient.connect(sql, start=False)
    error = error_of(await second.ask(startup()))
    assert error["C"] == "53300" and "sql_pg_connections_max is 1" in error["M"]
    assert await second.rest() == b""
    await first.close()
    await all_gone(sql)
    third = await PgClient.connect(sql)
    await third.close()
    await all_gone(sql)


async def test_statements_and_portals_of_a_session_have_a_limit(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_pg_statements_max=2)
    client = await PgClient.connect(sql)
    await client.ask(query("BEGIN"))
    assert tags(await client.ask(parse("SELECT 1", "a"), parse("SELECT 1", "b"), SYNC)) == "11Z"
    assert "sql_pg_statements_max" in error_of(await client.ask(parse("SELECT 1", "c"), SYNC))["M"]
    await client.ask(query("ROLLBACK; BEGIN"))
    assert tags(await client.ask(bind("a", "a"), bind("b", "a"), SYNC)) == "22Z"
    assert "sql_pg_statements_max" in error_of(await client.ask(bind("c", "a"), SYNC))["M"]
    await client.ask(query("ROLLBACK; BEGIN"))
    await client.ask(query("DECLARE a CURSOR FOR SELECT 1; DECLARE b CURSOR FOR SELECT 1"))
    error = error_of(await client.ask(query("DECLARE c CURSOR FOR SELECT 1")))
    assert error["C"] == "53400"
    await client.close()
    await all_gone(sql)


async def test_the_unnamed_statement_and_portal_are_replaced_and_not_counted(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_pg_statements_max=1)
    client = await PgClient.connect(sql)
    await client.ask(query("BEGIN"))
    for _ in range(3):
        assert tags(await client.ask(parse("SELECT range FROM range(9)"), bind(), execute("", 1), SYNC)) == "12DsZ"
    await client.close()
    await all_gone(sql)


async def test_a_message_has_a_limit(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_pg_message_bytes_max=1024)
    client = await PgClient.connect(sql)
    error = error_of(await client.ask(query("SELECT " + "1 + " * 300 + "1")))
    assert error["C"] == "08P01" and error["S"] == "FATAL" and "sql_pg_message_bytes_max" in error["M"]
    assert await client.rest() == b""
    await all_gone(sql)


async def test_a_statement_has_a_limit(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_statement_bytes_max=16)
    client = await PgClient.connect(sql)
    for asked in ((query("SELECT 1111111111"),), (parse("SELECT 1111111111"), SYNC)):
        error = error_of(await client.ask(*asked))
        assert error["C"] == "54000" and "sql_statement_bytes_max is 16" in error["M"]
    await client.close()
    await all_gone(sql)


async def test_messages_that_wait_are_taken_no_faster_than_they_are_answered(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_pg_message_bytes_max=4096)
    client = await PgClient.connect(sql)
    client.send(query(ENDLESS), SYNC * 20_000)
    await until_true(lambda: sql.service.runs)
    server = sql.parts._pg
    assert server is not None
    (key,) = server._keys.values()
    await until_true(lambda: key.connection._ahead_bytes > 4096)
    for _ in range(100):
        await asyncio.sleep(0)
    assert key.connection._messages.qsize() < 14_000  # one read of the socket, not all that was sent
    await client.close()
    await all_gone(sql)


async def test_a_client_that_does_not_start_is_closed(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_pg_startup_timeout_ms=50)
    silent = await PgClient.connect(sql, start=False)
    assert b"sql_pg_startup_timeout_ms" in await silent.rest()
    await all_gone(sql)


async def test_a_client_that_is_idle_is_closed(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY, sql_pg_idle_timeout_ms=50)
    client = await PgClient.connect(sql)
    error = error_of([await client.reply()])
    assert error["C"] == "57P05" and "sql_pg_idle_timeout_ms" in error["M"]
    assert await client.rest() == b""
    await all_gone(sql)


async def test_a_service_that_stops_tells_its_clients(start_sql: StartSql) -> None:
    sql = await start_sql(sql_pg_listen=ANY)
    idle, busy = await PgClient.connect(sql), await PgClient.connect(sql)
    busy.send(query(ENDLESS))
    await until_true(lambda: sql.service.runs)
    await sql.parts.stop()
    assert b"57P01" in await idle.rest()
    assert b"57P01" in await busy.rest()
    with pytest.raises(OSError):
        await PgClient.connect(sql)
    with pytest.raises(ShuttingDown):
        await sql.run("SELECT 1")


# ---- clients that are none


@pytest.mark.parametrize("seed", range(20))
async def test_any_bytes_end_in_an_error_or_the_end(sql: Sql, seed: int) -> None:
    """Before and after startup: nothing of such a client is left, and others are served."""
    dice = random.Random(seed)
    messages = [
        query("SELECT 1"),
        parse("SELECT $1::int", "s"),
        bind("", "s"),
        execute(),
        SYNC,
        query(ENDLESS),
        startup(),
    ]
    for is_started in (False, True):
        client = await PgClient.connect(sql, start=is_started)
        data = b"".join(dice.choice([*messages, dice.randbytes(dice.randrange(40))]) for _ in range(6))
        data = data[: dice.randrange(len(data) + 1)]
        client.send(data)
        if dice.random() < 0.5:
            client.writer.write_eof()
            await client.rest()
        await client.close()
    await all_gone(sql)
    honest = await PgClient.connect(sql)
    assert rows_of(await honest.ask(query("SELECT 1"))) == [[b"1"]]
    await honest.close()


@pytest.mark.parametrize("tag", [b"F", b"d", b"c", b"f", b"p"])
async def test_messages_that_are_not_spoken_are_refused_and_the_session_goes_on(sql: Sql, tag: bytes) -> None:
    client = await PgClient.connect(sql)
    assert error_of(await client.ask(message(tag, b"x"), SYNC))["C"] == "0A000"
    assert rows_of(await client.ask(query("SELECT 1"))) == [[b"1"]]
    await client.close()


# ---- where it listens


@pytest.mark.parametrize("listen", ["0.0.0.0:5433", "192.168.1.1:1", "[::]:5433", "example.com:5433", "5433", ":5433"])
def test_an_address_that_others_reach_is_refused(listen: str) -> None:
    with pytest.raises(SettingsError, match="sql_pg_listen"):
        SqlSettings.load({}, sql_pg_listen=listen)


@pytest.mark.parametrize("listen", ["", "127.0.0.1:0", "127.0.0.2:5433", "[::1]:5433", "localhost:5433"])
def test_an_address_of_the_machine_itself_is_taken(listen: str) -> None:
    assert SqlSettings.load({}, sql_pg_listen=listen).sql_pg_listen == listen


async def test_a_port_that_somebody_chose_and_that_is_taken_is_an_error(sql: Sql, start_sql: StartSql) -> None:
    with pytest.raises(ListenError, match="sql_pg_listen"):
        await start_sql(sql_pg_listen=sql.parts.pg_address)


def test_a_default_port_that_is_taken_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = SqlSettings.load({}, sql_pg_listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ListenError, match="already in use"):
            open_listener(settings)
        default = settings.model_copy()
        default.model_fields_set.discard("sql_pg_listen")
        with caplog.at_level(logging.WARNING):
            assert open_listener(default) is None
    assert "STREAMHOUSE_SQL_PG_LISTEN" in caplog.text
