"""Statements about jobs, through a whole SQL service over a cluster in memory."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shproto.errors import (
    InvalidStatement,
    JobExists,
    StreamHouseError,
    TopicExists,
    Unavailable,
    UnknownJob,
    UnknownTopic,
)
from streamhouse_sql.jobs.run import Equals

from services.sql.tests.job_world import JobWorld, by_number, job_world
from services.sql.tests.start_sql import Sql

TABLE = "CREATE TABLE flights (carrier VARCHAR, n BIGINT) WITH (topic = 'source')"
VIEW = "CREATE MATERIALIZED VIEW late AS SELECT carrier, n FROM flights WHERE n % 2 = 0"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[JobWorld]:
    async with job_world(tmp_path) as made:
        await made.cluster.create_topic("source", 2)
        await made.cluster.create_topic("out", 2)
        await made.produce("source", [{"carrier": "AA", "n": n} for n in range(20)])
        yield made


@pytest.fixture
async def sql(world: JobWorld) -> AsyncIterator[Sql]:
    async with world.sql() as started:
        await started.run(TABLE)
        yield started


async def until_rows(sql: Sql, text: str, count: int) -> list[tuple[object, ...]]:
    async with asyncio.timeout(60):
        while len(rows := (await sql.run(text)).rows) < count:
            await asyncio.sleep(0.01)
    return rows


async def test_insert_into_writes_a_topic_as_long_as_the_job_lives(world: JobWorld, sql: Sql) -> None:
    status = (await sql.run("INSERT INTO out SELECT n, carrier FROM flights WHERE n >= 10")).rows
    assert status[0] == ("INSERT 0 0",)
    name = str(status[1][0]).removeprefix("job ")
    await world.until(lambda: _has(world, "out", 10))
    assert sorted(by_number(await world.values("out"))) == list(range(10, 20))
    (job,) = (await sql.run("SHOW JOBS")).rows
    assert job[:4] == (name, "insert", "running", "out")
    assert (await sql.run("SHOW SINKS")).rows == []
    await sql.run(f"ALTER JOB {name} PAUSE")
    assert (await sql.run("SHOW JOBS")).rows[0][2] == "paused"
    await world.produce("source", [{"carrier": "BB", "n": 50}])
    await sql.run(f"ALTER JOB {name} RESUME")
    await world.until(lambda: _has(world, "out", 11))
    await sql.run(f"DROP JOB {name}")
    assert (await sql.run("SHOW JOBS")).rows == []
    assert sorted(by_number(await world.values("out"))) == [*range(10, 20), 50]


async def _has(world: JobWorld, topic: str, count: int) -> bool:
    return len(await world.values(topic)) >= count


async def test_a_refused_statement_starts_nothing(sql: Sql) -> None:
    refused: list[tuple[str, type[StreamHouseError]]] = [
        ("INSERT INTO nowhere SELECT n FROM flights", UnknownTopic),
        ("INSERT INTO source SELECT n FROM flights", InvalidStatement),
        ('INSERT INTO flights SELECT n FROM "out"', InvalidStatement),
        ("INSERT INTO out SELECT nn FROM flights", InvalidStatement),
        ("INSERT INTO out SELECT _value, n FROM flights", InvalidStatement),
        ("INSERT INTO out SELECT n, carrier AS _op FROM flights", InvalidStatement),
        ('CREATE SINK s INTO out AS SELECT n, carrier AS "_OP" FROM flights', InvalidStatement),
        ("CREATE MATERIALIZED VIEW v AS SELECT n AS _op, carrier FROM flights", InvalidStatement),
        ("CREATE MATERIALIZED VIEW out AS SELECT n FROM flights", TopicExists),
        ("CREATE OR REPLACE MATERIALIZED VIEW v AS SELECT n FROM flights", InvalidStatement),
        ("DROP MATERIALIZED VIEW nothing", UnknownJob),
        ("ALTER SINK nothing PAUSE", UnknownJob),
    ]
    for text, error in refused:
        with pytest.raises(error):
            await sql.run(text)
    assert (await sql.run("SHOW JOBS")).rows == []
    await sql.run("DROP MATERIALIZED VIEW IF EXISTS nothing")


async def test_a_sink_has_a_name_and_can_be_dropped_by_it(world: JobWorld, sql: Sql) -> None:
    await sql.run("CREATE SINK copies INTO out AS SELECT n FROM flights")
    with pytest.raises(JobExists):
        await sql.run("CREATE SINK copies INTO out AS SELECT n FROM flights")
    await sql.run("CREATE SINK IF NOT EXISTS copies INTO out AS SELECT n FROM flights")
    with pytest.raises(InvalidStatement, match="SINK"):
        await sql.run("DROP MATERIALIZED VIEW copies")
    await world.until(lambda: _has(world, "out", 20))
    await sql.run("DROP SINK copies")


async def test_a_job_whose_statement_names_a_column_as_the_sign_writes_it(world: JobWorld) -> None:
    """The statement is refused by now; jobs that were created before go on."""
    await world.start_worker()
    await world.create("INSERT INTO out SELECT n, carrier AS _op FROM flights", "out", definitions=[TABLE])
    values = await world.until_values("out", 20)
    assert sorted(value["n"] for value in values) == list(range(20))
    assert {value["_op"] for value in values} == {"AA"}
    assert {row["op"] for rows in await world.records("out") for row in rows} == {None}


async def test_a_job_keeps_its_tables_as_they_were(world: JobWorld, sql: Sql) -> None:
    await sql.run("CREATE SINK copies INTO out AS SELECT n FROM flights")
    await sql.run("DROP TABLE flights")
    await sql.run("ALTER SINK copies PAUSE")
    await sql.run("ALTER SINK copies RESUME")
    await world.until(lambda: _has(world, "out", 20))


async def test_explain_says_what_a_job_reads_and_keeps(sql: Sql) -> None:
    lines = [str(row[0]) for row in (await sql.run("EXPLAIN INSERT INTO out SELECT n FROM flights")).rows]
    assert lines[0].startswith("insert to topic out")
    assert any(line.startswith("input topic source") for line in lines)
    assert (await sql.run("SHOW JOBS")).rows == []


async def test_postgresql_clients_run_the_same_statements(world: JobWorld, sql: Sql) -> None:
    import psycopg

    host, _, port = sql.parts.pg_address.rpartition(":")
    connection = await psycopg.AsyncConnection.connect(
        host=host, port=int(port), dbname="streamhouse", user="x", autocommit=True
    )
    async with connection, connection.cursor() as cursor:
        await cursor.execute("CREATE SINK copies INTO out AS SELECT n FROM flights")
        assert cursor.statusmessage == "CREATE SINK"
        await cursor.execute("SHOW SINKS")
        rows = await cursor.fetchall()
        assert [row[:3] for row in rows] == [("copies", "sink", "running")]
        await cursor.execute("INSERT INTO out SELECT n FROM flights")
        assert cursor.statusmessage == "INSERT 0 0"
        await cursor.execute("DROP SINK copies")
        assert cursor.statusmessage == "DROP SINK"


async def test_a_view_is_a_table_and_a_topic(world: JobWorld, sql: Sql) -> None:
    await sql.run(VIEW)
    rows = await until_rows(sql, "SELECT carrier, n FROM late ORDER BY n", 10)
    assert rows == [("AA", n) for n in range(0, 20, 2)]
    assert (await sql.run("SELECT count(*) FROM late AS l JOIN flights AS f ON l.n = f.n")).value == 10
    assert (await sql.run("DESCRIBE late")).rows == [("carrier", "VARCHAR", ""), ("n", "BIGINT", "")]
    shown = (await sql.run("SHOW TABLES")).rows
    assert ("late", "view", "late", 2) in shown
    with pytest.raises(InvalidStatement, match="over views are not supported yet"):
        await sql.run("INSERT INTO out SELECT n FROM late")
    await world.until(lambda: _has(world, "late", 10))
    with pytest.raises(InvalidStatement, match="no_such"):
        await sql.run("SELECT no_such FROM late")
    await sql.run("DROP MATERIALIZED VIEW late")
    assert not world.cluster.has_topic("late")
    with pytest.raises(InvalidStatement, match="late"):
        await sql.run("SELECT * FROM late")
    await sql.run(VIEW)  # its name and its topic's are free again
    assert len(await until_rows(sql, "SELECT n FROM late", 10)) == 10


@pytest.mark.parametrize("clause", ["", "IF NOT EXISTS "])
async def test_a_view_whose_first_answer_was_lost_keeps_its_topic(world: JobWorld, sql: Sql, clause: str) -> None:
    world.coordinators["sql"].repeat("create_sql_job")
    await sql.run(VIEW.replace("VIEW late", f"VIEW {clause}late"))
    assert len(await until_rows(sql, "SELECT n FROM late", 10)) == 10
    await world.until(lambda: _has(world, "late", 10))
    assert (await sql.run("SHOW VIEWS")).rows[0][2] == "running"


async def test_an_insert_whose_first_answer_was_lost_is_one_job(world: JobWorld, sql: Sql) -> None:
    world.coordinators["sql"].repeat("create_sql_job")
    status = (await sql.run("INSERT INTO out SELECT n FROM flights")).rows
    assert [f"job {row[0]}" for row in (await sql.run("SHOW JOBS")).rows] == [status[1][0]]


async def test_a_view_that_another_has_made_meanwhile_leaves_no_topic(world: JobWorld, sql: Sql) -> None:
    """The name was free when the statement looked; the other's topic has another name."""
    held = world.coordinators["sql"].hold("create_sql_job")
    creating = asyncio.create_task(sql.run(VIEW))
    await world.until(lambda: held.requests)
    await world.create("SELECT n FROM flights", "out", name="late", kind="view")
    held.release()
    with pytest.raises(JobExists):
        await creating
    assert not world.cluster.has_topic("late")
    assert world.cluster.has_topic("out")


async def test_a_drop_whose_first_answer_was_lost_deletes_the_topic(world: JobWorld, sql: Sql) -> None:
    await sql.run(VIEW)
    world.coordinators["sql"].repeat("drop_sql_job")
    await sql.run("DROP MATERIALIZED VIEW late")
    assert not world.cluster.has_topic("late")


async def test_a_view_is_asked_of_the_worker_that_holds_it(world: JobWorld, sql: Sql) -> None:
    await sql.run(VIEW)
    await until_rows(sql, "SELECT n FROM late", 10)
    async with world.sql("other") as other:
        assert not other.parts._worker.runs
        assert len(await until_rows(other, "SELECT n FROM late", 10)) == 10
        await sql.run("ALTER MATERIALIZED VIEW late PAUSE")
        with pytest.raises(InvalidStatement, match="paused"):
            await other.run("SELECT n FROM late")


async def test_a_view_is_looked_up_by_the_columns_of_a_where(world: JobWorld, sql: Sql) -> None:
    await sql.run(VIEW)
    await until_rows(sql, "SELECT n FROM late", 10)
    taken: list[dict[str, object]] = []
    (run,) = sql.parts._worker.runs.values()
    table = run.view_table

    async def view_table(equals: Equals = ()) -> object:
        taken.append(dict(equals))
        return await table(equals)

    run.view_table = view_table  # type: ignore[method-assign]
    async with world.sql("other") as other:
        for asked in (sql, other):
            taken.clear()
            assert (await asked.run("SELECT n, carrier FROM late WHERE n = 4 AND carrier = 'AA'")).rows == [(4, "AA")]
            assert (await asked.run("SELECT n FROM late AS l WHERE 6 = l.n")).rows == [(6,)]
            assert (await asked.run("SELECT n FROM late WHERE carrier = 'it''s'")).rows == []
            # An OR, another type: the query decides alone.
            assert (await asked.run("SELECT count(*) FROM late WHERE n = 4 OR n = 6")).value == 2
            assert (await asked.run("SELECT count(*) FROM late WHERE n = 4.0")).value == 1
            assert taken == [{"n": 4, "carrier": "AA"}, {"n": 6}, {"carrier": "it's"}, {}, {}]


async def test_a_view_survives_the_restart_of_its_service(world: JobWorld) -> None:
    async with world.sql("one") as sql:
        await sql.run(TABLE)
        await sql.run(VIEW)
        await until_rows(sql, "SELECT n FROM late", 10)
    await world.produce("source", [{"carrier": "BB", "n": 100}])
    async with world.sql("two") as sql:
        assert len(await until_rows(sql, "SELECT n FROM late", 11)) == 11
        (job,) = (await sql.run("SHOW VIEWS")).rows
        assert job[5] == 2, "another epoch"
    await world.until(lambda: _has(world, "late", 11))
    assert len(await world.values("late")) == 11


@pytest.mark.long  # a statement waits for sql_read_wait_ms, since the job may come back
async def test_a_worker_that_hears_no_coordinator_answers_for_no_view(world: JobWorld) -> None:
    async with world.sql(sql_view_stale_ms_max=1_000) as sql:
        await sql.run(TABLE)
        await sql.run(VIEW)
        await until_rows(sql, "SELECT n FROM late", 10)
        peer = sql.parts._worker._coordinator
        peer.down = True
        with pytest.raises(Unavailable, match="heard no coordinator"):
            async with asyncio.timeout(60):
                while True:
                    await sql.run("SELECT n FROM late")
        peer.down = False
