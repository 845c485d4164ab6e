"""Pipelines without state, and what holds for all of them: errors, restoring, determinism."""

import random
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from shproto.errors import DataLoss, InvalidArgument, InvalidStatement, StatementFailed, StatementLimit
from streamhouse_sql.adapters.duck import Duck, DuckLimits
from streamhouse_sql.core.continuous.names import OTHER_AGGREGATES, VOLATILE
from streamhouse_sql.pipeline import Pipeline
from streamhouse_sql.ports import Interrupted

from services.sql.tests.pipeline_world import (
    EPOCH_MS,
    MIB,
    NOW_US,
    Cut,
    Log,
    check,
    continuous,
    declared,
    in_order,
    open_pipeline,
    plan_of,
    random_cuts,
    run,
)

TABLES = declared(
    "CREATE TABLE orders (item VARCHAR, price DOUBLE, n INTEGER, tags VARCHAR[], ts TIMESTAMP, "
    "WATERMARK FOR ts AS ts - INTERVAL '5' SECOND) WITH (topic = 'orders')",
    "CREATE TABLE good_orders (item VARCHAR, n INTEGER) WITH (topic = 'orders', bad_rows = 'skip')",
    "CREATE TABLE returns (item VARCHAR, price DOUBLE) WITH (topic = 'returns')",
)


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    return tmp_path / "spill"


def orders(seed: int, count: int = 120) -> Log:
    rng = random.Random(seed)
    log = Log({"orders": 3, "returns": 1})
    for _ in range(count):
        topic = rng.choice(["orders", "orders", "returns"])
        log.add(
            topic,
            rng.randrange(log.partitions[topic]),
            {
                "item": rng.choice(["tea", "cup", "pot", None, "a 'b' \"c\""]),
                "price": rng.randrange(40) / 4,
                "n": rng.randrange(5),
                "tags": rng.choice([None, [], ["x"], ["x", None, "y"]]),
            },
            EPOCH_MS + rng.randrange(60_000),
            key=rng.choice([None, "a", "b"]),
        )
    return log


STATELESS = [
    "SELECT item, price * n AS amount FROM orders WHERE n > 1",
    "SELECT * FROM orders",
    "SELECT o.*, upper(item) AS up FROM orders AS o",
    "SELECT _key, _value ->> 'item' AS item, (_value ->> '$.n')::INTEGER AS n, _timestamp FROM orders WHERE n > 2",
    "SELECT _key, _value -> 'tags' AS tags FROM raw_orders",
    "SELECT item, u.tag FROM orders CROSS JOIN UNNEST(tags) AS u(tag) WHERE u.tag IS NOT NULL",
    "SELECT item, unnest(tags) AS tag FROM orders WHERE n < 3",
    "SELECT tag FROM raw_orders, UNNEST(CAST(_value -> 'tags' AS VARCHAR[])) AS u(tag)",
    "SELECT item, price FROM orders UNION ALL SELECT item, -price FROM returns WHERE price > 3",
    "WITH dear AS (SELECT * FROM orders WHERE price > 5) "
    "SELECT item FROM dear UNION ALL SELECT item FROM dear WHERE n = 1",
    "SELECT CASE WHEN n > 2 THEN 'many' ELSE 'few' END AS amount, n BETWEEN 1 AND 2 AS b, item IN ('tea') AS t "
    "FROM orders",
    "SELECT date_trunc('minute', _timestamp) AS m, list_transform(tags, lambda t: t || '!') AS loud FROM orders",
    "SELECT x.a + 1 AS b FROM (SELECT n AS a FROM orders WHERE item LIKE 't%') AS x WHERE x.a < 4",
]


def batch_of(sql: str) -> str:
    return sql.replace("raw_orders", '"orders "')


@pytest.mark.parametrize("sql", STATELESS)
def test_a_query_without_state_gives_what_it_gives_over_all_rows(sql: str, spill: Path) -> None:
    rng = random.Random(sql)
    log = orders(len(sql))
    # A table hides the topic of its name: the topic's own columns are tested under another name.
    tables = TABLES if "raw_orders" not in sql else {}
    text = sql.replace("raw_orders", "orders")
    check(f"CREATE SINK s INTO out AS {text}", text, log, tables, random_cuts(log, rng), spill, rng)


def test_a_view_keeps_its_rows(spill: Path) -> None:
    rng, log = random.Random(1), orders(1)
    text = "SELECT item, n FROM orders WHERE n > 1"
    check(f"CREATE MATERIALIZED VIEW v AS {text}", text, log, TABLES, random_cuts(log, rng), spill, rng)
    plan = plan_of(f"CREATE MATERIALIZED VIEW v AS {text}", log, TABLES)
    assert [info.is_bounded for info in plan.state] == [False]
    assert plan.warnings
    outcome = run(plan, log, random_cuts(log, rng), spill)
    found = outcome.pipeline.lookup(["ITEM", "n"], ["tea", 2])
    assert {*found["item"].to_pylist()} == {"tea"}
    assert {*found["n"].to_pylist()} == {2}
    wanted = [row for row in in_order(outcome.pipeline.view_table()) if row == ("tea", 2)]
    assert in_order(found) == wanted
    with pytest.raises(InvalidArgument, match="no columns price"):
        outcome.pipeline.lookup(["price"], [1])
    outcome.pipeline.close()


def test_only_what_is_needed_is_read() -> None:
    log = orders(0, 0)
    plan = plan_of("INSERT INTO out SELECT _key FROM orders", log, {})
    (found,) = plan.inputs
    assert (found.name, found.topic, found.columns) == ("orders", "orders", ("_key", "_partition", "_offset"))
    plan = plan_of("INSERT INTO out SELECT item FROM orders", log, TABLES)
    assert plan.inputs[0].columns == ("_value", "_partition", "_offset")
    assert not plan.inputs[0].has_watermark


def test_insert_names_columns(spill: Path) -> None:
    log = orders(2)
    plan = plan_of("INSERT INTO out (what, many) SELECT item, n FROM orders", log, TABLES)
    assert plan.output_columns == (("what", "VARCHAR"), ("many", "INTEGER"))
    with pytest.raises(InvalidStatement, match="names 1 columns"):
        plan_of("INSERT INTO out (what) SELECT item, n FROM orders", log, TABLES)


def test_now_is_the_journals(spill: Path) -> None:
    log = orders(3, 5)
    plan = plan_of("INSERT INTO out SELECT now() AS a, current_timestamp AS b, today() AS c FROM orders", log, TABLES)
    assert [kind for _, kind in plan.output_columns] == ["TIMESTAMP WITH TIME ZONE"] * 2 + ["DATE"]
    cuts = [Cut(cut.ranges, (), NOW_US + 1) for cut in random_cuts(log, random.Random(0))]
    outcome = run(plan, log, cuts, spill)
    rows = pa.concat_tables(step.rows for step in outcome.steps)
    assert {*rows["a"].cast(pa.int64()).to_pylist(), *rows["b"].cast(pa.int64()).to_pylist()} == {NOW_US + 1}
    outcome.pipeline.close()


# ---- bad rows


def with_bad_rows() -> Log:
    log = Log({"orders": 2, "returns": 1})
    for value in ({"item": "tea", "n": 1}, "no JSON", {"item": "cup", "n": "many"}, {"item": "pot", "n": 2}):
        log.add("orders", 1, value)
    return log


def test_a_bad_row_fails_the_step_with_its_place_and_changes_nothing(spill: Path) -> None:
    log = with_bad_rows()
    plan = plan_of("CREATE MATERIALIZED VIEW v AS SELECT item, n FROM orders", log, TABLES)
    pipeline = open_pipeline(plan, spill)
    columns = plan.inputs[0].columns
    pipeline.step({"orders": log.table("orders", {1: (0, 1)}, columns)}, idle=(), now_us=NOW_US)
    before = pipeline.state()
    with pytest.raises(StatementFailed) as error:
        pipeline.step({"orders": log.table("orders", {1: (1, 4)}, columns)}, idle=(), now_us=NOW_US)
    assert (error.value.details["topic"], error.value.details["partition"]) == ("orders", "1")
    assert error.value.details["offset"] == "1"
    assert pipeline.state() == before
    step = pipeline.step({"orders": log.table("orders", {1: (3, 4)}, columns)}, idle=(), now_us=NOW_US)
    assert step.rows.to_pylist() == [{"item": "pot", "n": 2}]
    pipeline.close()


def test_a_table_that_skips_bad_rows_tells_their_places(spill: Path) -> None:
    log = with_bad_rows()
    plan = plan_of("INSERT INTO out SELECT item FROM good_orders", log, TABLES)
    outcome = run(plan, log, [Cut({("orders", 1): (0, 4)})], spill)
    (step,) = outcome.steps
    assert step.rows["item"].to_pylist() == ["tea", "pot"]
    assert step.bad_rows == 2
    reason = "the value does not fit the columns of table good_orders"
    assert step.bad.to_pylist() == [
        {"topic": "orders", "partition": 1, "offset": offset, "reason": reason} for offset in (1, 2)
    ]
    outcome.pipeline.close()


# ---- restoring


def stateful(spill: Path) -> tuple[Any, dict[str, pa.Table]]:
    log = orders(5)
    plan = plan_of("CREATE MATERIALIZED VIEW v AS SELECT item, n FROM orders", log, TABLES)
    outcome = run(plan, log, random_cuts(log, random.Random(5)), spill)
    state = outcome.pipeline.state()
    outcome.pipeline.close()
    return plan, state


def test_a_state_of_another_plan_is_refused_with_the_tables_name(spill: Path) -> None:
    plan, state = stateful(spill)
    table = next(name for name in state if name != "meta")
    rows = state[table]
    broken: list[dict[str, Any]] = [
        {name: rows for name, rows in state.items() if name != table},
        {**state, "other": rows},
        {**state, table: rows.drop_columns(["n"])},
        {**state, table: rows.set_column(1, "n", rows["n"].cast(pa.string()))},
        {**state, "meta": rows},
    ]
    for wrong in broken:
        pipeline = open_pipeline(plan, spill)
        with pytest.raises(DataLoss, match=f"state table ({table}|other|meta)"):
            pipeline.restore(wrong)
        assert pipeline.view_table().num_rows == 0
        pipeline.restore(state)
        assert pipeline.view_table().num_rows == rows.num_rows
        pipeline.close()


def test_records_of_another_shape_are_refused(spill: Path) -> None:
    log = orders(0, 0)
    plan = plan_of("INSERT INTO out SELECT _key FROM orders", log, {})
    pipeline = open_pipeline(plan, spill)
    with pytest.raises(InvalidArgument, match="no input 'x'"):
        pipeline.step({"x": log.table("orders", {}, ["_key"])}, idle=(), now_us=NOW_US)
    with pytest.raises(InvalidArgument, match="input orders has columns _key"):
        pipeline.step({"orders": log.table("orders", {}, ["_key"])}, idle=(), now_us=NOW_US)
    pipeline.close()


def test_the_fingerprint_is_that_of_the_program() -> None:
    log = orders(0, 0)
    one = plan_of("INSERT INTO out SELECT item FROM orders WHERE n > 1", log, TABLES)
    assert one.fingerprint == plan_of("INSERT INTO out SELECT  item\nFROM orders WHERE n > 1", log, TABLES).fingerprint
    assert one.fingerprint != plan_of("INSERT INTO out SELECT item FROM orders WHERE n > 2", log, TABLES).fingerprint


# ---- limits


def test_a_step_that_is_interrupted_has_changed_nothing(spill: Path) -> None:
    log = Log({"orders": 1})
    for _ in range(3_000):
        log.add("orders", 0, {"item": "tea", "n": 1})
    text = (
        "SELECT a.item, sum(a.n * b.n) AS s FROM good_orders AS a JOIN good_orders AS b ON a.item = b.item GROUP BY 1"
    )
    plan = plan_of(f"CREATE MATERIALIZED VIEW v AS {text}", log, TABLES)
    pipeline = open_pipeline(plan, spill)
    columns = plan.inputs[0].columns
    first = {"orders": log.table("orders", {0: (0, 5)}, columns)}
    pipeline.step(first, idle=(), now_us=NOW_US)
    before = pipeline.state()
    done = threading.Event()

    def interrupt() -> None:  # one that comes between two statements is lost
        while not done.wait(0.002):
            pipeline.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(Interrupted):
            pipeline.step({"orders": log.table("orders", {0: (5, 3_000)}, columns)}, idle=(), now_us=NOW_US)
    finally:
        done.set()
        thread.join()
    assert pipeline.state() == before
    assert pipeline.view_table()["s"].to_pylist() == [25]
    pipeline.step({"orders": log.table("orders", {0: (5, 10)}, columns)}, idle=(), now_us=NOW_US)
    assert pipeline.view_table()["s"].to_pylist() == [100]
    pipeline.close()


def test_a_step_that_needs_too_much_memory_has_changed_nothing(spill: Path) -> None:
    log = Log({"orders": 1})
    for number in range(2_000):
        log.add("orders", 0, {"item": f"{number} " + "x" * 10_000, "n": 1})
    plan = plan_of(
        "CREATE MATERIALIZED VIEW v AS SELECT item, count(*) AS c FROM good_orders GROUP BY item", log, TABLES
    )
    engine = Duck(DuckLimits(memory_bytes_max=16 * MIB, temp_dir=spill, temp_bytes_max=0, threads=1))
    pipeline = Pipeline(plan, engine)
    columns = plan.inputs[0].columns
    pipeline.step({"orders": log.table("orders", {0: (0, 5)}, columns)}, idle=(), now_us=NOW_US)
    before = pipeline.state()
    with pytest.raises(StatementLimit):
        pipeline.step({"orders": log.table("orders", {0: (5, 2_000)}, columns)}, idle=(), now_us=NOW_US)
    assert pipeline.state() == before
    assert (
        pipeline.step({"orders": log.table("orders", {0: (5, 9)}, columns)}, idle=(), now_us=NOW_US).rows.num_rows == 4
    )
    pipeline.close()


# ---- what is refused


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("SELECT random() AS r FROM orders", "random"),
        ("SELECT item FROM orders WHERE uuid() IS NULL", "uuid"),
        ("SELECT current_setting('x') AS x FROM orders", "current_setting"),
        ("SELECT item FROM orders ORDER BY item", "ORDER BY"),
        ("SELECT item FROM orders LIMIT 3", "LIMIT"),
        ("SELECT DISTINCT item FROM orders", "DISTINCT"),
        ("SELECT item FROM orders UNION SELECT item FROM returns", "UNION"),
        ("SELECT item FROM orders EXCEPT SELECT item FROM returns", "EXCEPT"),
        ("SELECT item FROM orders WHERE n IN (SELECT 1)", "subquery"),
        ("SELECT item FROM orders WHERE EXISTS (SELECT 1)", "EXISTS"),
        ("SELECT item, lag(n) OVER (ORDER BY n) AS x FROM orders", "lag"),
        ("SELECT sum(n) OVER (ORDER BY n) + 1 AS x FROM orders", "OVER"),
        ("SELECT item ~ 'x' AS x FROM orders", "REGEXPLIKE"),
        ("SELECT string_agg(item) AS x FROM orders", "string_agg"),
        ("SELECT itm FROM orders", "did you mean 'item'"),
        ("SELECT item FROM ordrs", "did you mean 'orders'"),
        ("SELECT item FROM read_csv('x')", "READ_CSV"),
        ("SELECT getenv('x') AS x FROM orders", "getenv"),
        ("SELECT error('x') AS x FROM orders", "error"),
        ("SELECT n + 1 FROM orders", "needs a name"),
        ("SELECT item, n AS item FROM orders", "twice"),
        ("SELECT 1 AS one", "FROM"),
        ("SELECT item FROM orders TABLESAMPLE 10 PERCENT", "SAMPLE"),
        ("SELECT * EXCLUDE (n) FROM orders", "EXCLUDE"),
        ("SELECT item FROM orders WHERE n > (1 + 'x'::BLOB)", "+"),
        ("SELECT no_such(item) AS x FROM orders", "no_such"),
        ("WITH RECURSIVE r AS (SELECT 1 AS a) SELECT a FROM r", "RECURSIVE"),
        ("SELECT item FROM other.orders", "schema 'other'"),
        ("SELECT item FROM orders PIVOT (count(*) FOR n IN (1))", "PIVOT"),
        ("SELECT item FROM orders, LATERAL (SELECT 1 AS a) AS x", "LATERAL"),
        ("SELECT item FROM orders CROSS JOIN UNNEST(tags) AS tag", "UNNEST"),
        ("SELECT '\ue000now\ue000' AS x FROM orders", "U+E000"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(sql: str, named: str) -> None:
    with pytest.raises(InvalidStatement) as error:
        plan_of(f"INSERT INTO out {sql}", orders(0, 0), TABLES)
    assert named.lower() in str(error.value).lower()


def test_every_function_that_gives_another_value_each_time_is_refused(tmp_path: Path) -> None:
    duck = Duck(DuckLimits(memory_bytes_max=64 * MIB, temp_dir=tmp_path, temp_bytes_max=0, threads=1))
    rows = duck.fetch(
        "SELECT function_name AS name, bool_or(stability = 'VOLATILE') AS volatile, any_value(function_type) AS kind, "
        "bool_or(len(parameter_types) = 0) AS alone, bool_or(stability = 'CONSISTENT_WITHIN_QUERY') AS varies "
        "FROM duckdb_functions() WHERE function_type IN ('scalar', 'aggregate') GROUP BY ALL"
    ).to_pylist()
    duck.close()
    log = orders(0, 0)
    for row in rows:
        name = row["name"]
        if (
            not name.isidentifier()
            or row["kind"] != "scalar"
            or not (row["volatile"] or (row["varies"] and row["alone"]))
        ):
            continue
        if name in ("now", "today", "current_date", "get_current_timestamp", "transaction_timestamp"):
            continue
        with pytest.raises(InvalidStatement):
            plan_of(f"INSERT INTO out SELECT {name}() AS x FROM orders", log, TABLES)
    assert {row["name"] for row in rows if row["kind"] == "aggregate"} >= OTHER_AGGREGATES - {
        "percentile_cont",
        "percentile_disc",
    }
    assert "random" in VOLATILE


def test_a_statement_is_kept_as_text() -> None:
    text = "CREATE SINK s INTO out AS SELECT item FROM orders"
    assert continuous(text).text == text


def test_columns_that_only_a_star_names_are_not_decoded() -> None:
    log = orders(0, 0)
    plan = plan_of("INSERT INTO out SELECT item FROM (SELECT * FROM orders) AS o WHERE n > 1", log, TABLES)
    (source,) = plan.program.sources
    assert "price" not in source.decode
    assert "item" in source.decode
    plan = plan_of("INSERT INTO out SELECT _key FROM (SELECT * FROM raw) AS o", Log({"raw": 1}), {})
    assert plan.inputs[0].columns == ("_key", "_partition", "_offset")
