"""Statements about continuous queries: all that is said is read, or refused by name."""

import pytest
from shproto.errors import InvalidStatement
from streamhouse_sql.core.continuous.statements import (
    AlterJob,
    ContinuousQuery,
    DropJob,
    ExplainContinuous,
    ShowJobs,
    parse_job_statement,
)

pytestmark = pytest.mark.quick


def query(text: str) -> ContinuousQuery:
    found = parse_job_statement(text)
    assert isinstance(found, ContinuousQuery)
    return found


def test_a_materialized_view_has_a_name_options_and_an_emit() -> None:
    found = query(
        "CREATE MATERIALIZED VIEW IF NOT EXISTS v WITH (state_ttl = '1 hour') AS SELECT a FROM t EMIT ON WINDOW CLOSE;"
    )
    assert (found.kind, found.name, found.target, found.if_not_exists) == ("view", "v", "", True)
    assert found.options == {"state_ttl": "1 hour"}
    assert found.emit == "on window close"
    assert found.tree.sql() == "SELECT a FROM t"


def test_a_sink_has_a_target() -> None:
    found = query('CREATE SINK s INTO "out.put" AS SELECT a FROM t EMIT CHANGES')
    assert (found.kind, found.name, found.target, found.emit) == ("sink", "s", "out.put", "changes")


def test_an_insert_may_name_the_columns_that_it_writes() -> None:
    found = query("insert into public.out (x, y) select a, b from t")
    assert (found.kind, found.name, found.target, found.columns) == ("insert", "", "out", ("x", "y"))
    assert query("INSERT INTO out (SELECT a FROM t)").columns == ()


def test_a_query_with_emit_is_live() -> None:
    found = query("WITH a AS (SELECT x FROM t) SELECT x FROM a\nEMIT CHANGES -- to look at\n;")
    assert (found.kind, found.name, found.emit) == ("live", "", "changes")
    assert found.tree.sql() == "WITH a AS (SELECT x FROM t) SELECT x FROM a"
    assert query("(SELECT x FROM t) emit on window close").emit == "on window close"
    explained = parse_job_statement("EXPLAIN SELECT x FROM t EMIT CHANGES")
    assert isinstance(explained, ExplainContinuous) and explained.query.kind == "live"


@pytest.mark.parametrize(
    "text",
    [
        "SELECT x FROM t",
        "SELECT emit FROM t",
        "SELECT x AS emit FROM t ORDER BY emit",
        "SELECT emit changes FROM t",
        "SELECT 'EMIT CHANGES'",
        'SELECT "EMIT" "CHANGES"',
        "EXPLAIN SELECT x FROM t WHERE emit > 1",
        "DESCRIBE SELECT x FROM t EMIT CHANGES",
    ],
)
def test_a_query_without_emit_is_bounded(text: str) -> None:
    assert parse_job_statement(text) is None


def test_a_live_query_has_no_limit() -> None:
    with pytest.raises(InvalidStatement, match="LIMIT is not supported behind EMIT CHANGES"):
        parse_job_statement("SELECT x FROM t EMIT CHANGES LIMIT 5")


def test_window_functions_are_windows() -> None:
    found = query(
        "CREATE MATERIALIZED VIEW v AS SELECT window_start, count(*) AS n "
        "FROM TUMBLE(TABLE t, DESCRIPTOR(ts), INTERVAL '1' MINUTE) GROUP BY window_start"
    )
    (window,) = found.windows.values()
    assert (window.function, window.table, window.sizes) == ("TUMBLE", "t", {"SIZE": 60_000_000})


def test_the_tables_of_windows_are_named() -> None:
    found = query(
        "INSERT INTO out WITH c AS (SELECT a FROM Prices) SELECT window_end, count(*) AS n FROM TUMBLE(TABLE "
        "(SELECT * FROM \"big orders\" JOIN x ON true), DESCRIPTOR(ts), INTERVAL '1' MINUTE), "
        "HOP(TABLE public.t, DESCRIPTOR(ts), INTERVAL '1' MINUTE, INTERVAL '1' MINUTE) GROUP BY window_end"
    )
    assert found.tables_named() == {"prices", "big orders", "x", "t"}


def test_jobs_are_dropped_altered_and_shown() -> None:
    assert parse_job_statement("DROP MATERIALIZED VIEW IF EXISTS v") == DropJob("view", "v", True)
    assert parse_job_statement("drop sink s;") == DropJob("sink", "s", False)
    assert parse_job_statement("ALTER JOB j PAUSE") == AlterJob("job", "j", "pause")
    assert parse_job_statement("ALTER MATERIALIZED VIEW v RESUME -- now") == AlterJob("view", "v", "resume")
    assert parse_job_statement("SHOW MATERIALIZED VIEWS") == ShowJobs("view")
    assert parse_job_statement("SHOW JOBS") == ShowJobs("job")
    assert isinstance(parse_job_statement("EXPLAIN CREATE SINK s INTO o AS SELECT a FROM t"), ExplainContinuous)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1",
        "SHOW TABLES",
        "CREATE TABLE t (a INTEGER) WITH (topic = 't')",
        "DROP TABLE t",
        "ALTER TABLE t ADD COLUMN a INTEGER",
        "EXPLAIN SELECT 1",
        "SELECT 'no end",
        "",
    ],
)
def test_other_statements_are_not_read(text: str) -> None:
    assert parse_job_statement(text) is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("CREATE OR REPLACE MATERIALIZED VIEW v AS SELECT a FROM t", "OR REPLACE"),
        ("CREATE MATERIALIZED VIEW v (a) AS SELECT a FROM t", "AS is expected"),
        ("CREATE MATERIALIZED VIEW v WITH (colour = 'red') AS SELECT a FROM t", "colour"),
        ("CREATE MATERIALIZED VIEW v WITH (state_ttl = 5) AS SELECT a FROM t", "state_ttl must be a text"),
        ("CREATE MATERIALIZED VIEW v WITH (state_ttl = '1 hour', state_ttl = '2 hour') AS SELECT a FROM t", "twice"),
        ('CREATE MATERIALIZED VIEW "v w" AS SELECT a FROM t', "v w"),
        ("CREATE MATERIALIZED VIEW v AS", "no query"),
        ("CREATE MATERIALIZED VIEW v", "AS is missing"),
        ("CREATE SINK s AS SELECT a FROM t", "INTO is expected"),
        ("CREATE SINK s INTO o FROM v", "AS is expected"),
        ("CREATE MATERIALIZED VIEW v AS SELECT a FROM t EMIT FINAL", "EMIT FINAL"),
        ("CREATE MATERIALIZED VIEW v AS SELECT a FROM t EMIT ON UPDATE", "EMIT ON UPDATE"),
        ("INSERT INTO o VALUES (1)", "VALUES"),
        ("INSERT INTO other.o SELECT a FROM t", "schema 'other'"),
        ("INSERT o SELECT a FROM t", "INTO is expected"),
        ("DROP SINK s CASCADE", "CASCADE"),
        ("ALTER SINK s STOP", "STOP"),
        ("SHOW JOBS LIKE 'a'", "LIKE"),
        ("CREATE MATERIALIZED VIEW v AS DELETE FROM t", "DELETE"),
        ("CREATE MATERIALIZED VIEW v AS SELECT a FROM t; DROP TABLE t", "2 statements"),
    ],
)
def test_what_is_not_supported_is_named(text: str, named: str) -> None:
    with pytest.raises(InvalidStatement) as error:
        parse_job_statement(text)
    assert named in str(error.value)


def test_an_error_has_its_place_in_the_whole_statement() -> None:
    with pytest.raises(InvalidStatement) as error:
        parse_job_statement("CREATE MATERIALIZED VIEW v AS\nSELECT a FRM t")
    assert "line 2, column 14" in str(error.value)
