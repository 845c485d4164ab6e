"""TOP-N, joins, and what is computed over their changes, held against one query over the rows that were not late."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shproto.errors import InvalidStatement

from services.sql.tests.pipeline_events import TABLES, ended, events, has_ended
from services.sql.tests.pipeline_world import Cut, Log, check, plan_of, random_cuts, run


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    return tmp_path / "spill"


def hold(
    sql: str,
    seed: int,
    spill: Path,
    *,
    batch: str = "",
    kind: str = "SINK s INTO out",
    emit: str = "",
    keep: Callable[[dict[str, Any], int], bool] | None = None,
    count: int = 60,
) -> None:
    """Holds a query against its batch query over random events, in random micro-batches."""
    rng = random.Random(seed)
    log = events(seed, count, keys=rng.choice([1, 3, 8]), late=rng.choice([0, 0.1, 0.3]))
    cuts = ended(log, random_cuts(log, rng, rows_max=rng.choice([20, 60])))
    check(f"CREATE {kind} AS {sql}{emit}", batch or sql, log, TABLES, cuts, spill, rng, keep=keep)


def top(
    order: str, limit: int, *, shown: str = "k, n, x, rn", by: str = "k", source: str = "events"
) -> tuple[str, str]:
    """Returns a top-n query, and its batch query with the ties as they are broken."""
    row = "row_number() OVER (PARTITION BY {by} ORDER BY {order}{ties})"
    sql = "SELECT {shown} FROM (SELECT *, " + row + " AS rn FROM {source}) WHERE rn <= {limit}"
    batch = (
        "SELECT {shown} FROM (SELECT *, " + row + " AS rn FROM (SELECT *, {place} FROM {source})) WHERE rn <= {limit}"
    )
    known = {"shown": shown, "by": by, "order": order, "limit": limit, "source": source}
    batch = batch.replace(
        "SELECT *, {place} FROM {source}", "SELECT k, n, x, s, ok, _partition AS p, _offset AS o FROM {source}"
    )
    return sql.format(ties="", **known), batch.format(ties=", p, o", **known)


TOPS = [
    top("n DESC", 3),
    top("n DESC NULLS FIRST, x", 2),
    top("x ASC", 1, shown="k, s, x"),
    top("n", 4, by="k, ok", shown="k, ok, n, s, rn"),
    top("n * 2 + 1", 3, by="upper(k)", shown="k, n, x"),
]


@pytest.mark.parametrize("at", [pytest.param(at, marks=pytest.mark.long if at in (0, 2) else ()) for at in range(5)])
def test_top_n(at: int, spill: Path) -> None:
    sql, batch = TOPS[at]
    hold(sql, 30 + at, spill, batch=batch)


@pytest.mark.parametrize(("order", "limit"), [("n DESC", 1), ("n", 1), ("n", 2)])
def test_qualify_keeps_the_first_or_the_last(order: str, limit: int, spill: Path) -> None:
    sql = f"SELECT k, n, s FROM events QUALIFY row_number() OVER (PARTITION BY k ORDER BY {order}) <= {limit}"
    batch = sql.replace(f"ORDER BY {order}", f"ORDER BY {order}, _partition, _offset")
    hold(sql, 40 + limit, spill, batch=batch)
    hold(sql, 40 + limit, spill, batch=batch, kind="MATERIALIZED VIEW v")


def test_deduplication_by_event_time(spill: Path) -> None:
    sql = "SELECT k, n, ts FROM events QUALIFY row_number() OVER (PARTITION BY k, n ORDER BY ts) = 1"
    hold(sql, 44, spill, batch=sql.replace("ORDER BY ts", "ORDER BY ts, _partition, _offset"))


def test_top_n_over_groups(spill: Path) -> None:
    inner = "SELECT k, n, count(*) AS c, sum(x) AS sx FROM events GROUP BY k, n"
    number = "row_number() OVER (PARTITION BY k ORDER BY c DESC, n)"
    sql = f"SELECT k, n, c, rn FROM (SELECT *, {number} AS rn FROM ({inner})) "
    hold(sql + "WHERE rn <= 2", 45, spill)
    hold(sql + "WHERE rn <= 2", 46, spill, kind="MATERIALIZED VIEW v")


HOP = "HOP(TABLE events, DESCRIPTOR(ts), INTERVAL '5' SECOND, INTERVAL '10' SECOND)"
COUNTS = f"SELECT k, window_start, window_end, count(*) AS c FROM {HOP} GROUP BY k, window_start, window_end"


@pytest.mark.parametrize("function", ["row_number", "rank", "dense_rank"])
def test_top_of_each_window_when_it_ends(function: str, spill: Path) -> None:
    over = "(PARTITION BY window_start, window_end ORDER BY c DESC, k)"
    if function != "row_number":
        over = "(PARTITION BY window_end ORDER BY c DESC)"
    sql = f"SELECT * FROM (SELECT *, {function}() OVER {over} AS rn FROM ({COUNTS})) WHERE rn <= 2"
    hold(sql, 47, spill, emit=" EMIT ON WINDOW CLOSE", keep=has_ended)


def test_groups_of_groups_of_a_window(spill: Path) -> None:
    sql = (
        f"SELECT window_end, max(c) AS most, count(DISTINCT c) AS d, count(*) AS n, avg(c) AS a FROM ({COUNTS}) "
        "GROUP BY window_end HAVING count(*) > 1"
    )
    hold(sql, 48, spill, emit=" EMIT ON WINDOW CLOSE", keep=has_ended)


def test_a_join_of_windows_when_they_end(spill: Path) -> None:
    sql = (
        f"WITH counts AS ({COUNTS}), most AS (SELECT window_end, max(c) AS m FROM counts GROUP BY window_end) "
        "SELECT counts.k, counts.c, counts.window_end FROM counts JOIN most "
        "ON counts.window_end = most.window_end AND counts.c = most.m"
    )
    hold(sql, 49, spill, emit=" EMIT ON WINDOW CLOSE", keep=has_ended)


# ---- joins

INTERVALS = [
    "e.k = p.k AND p.ts BETWEEN e.ts AND e.ts + INTERVAL '3' SECOND",
    "p.k = e.k AND e.ts >= p.ts - INTERVAL '2' SECOND AND e.ts < p.ts + INTERVAL '1' SECOND",
    "e.k = p.k AND e.n = p.price AND e.ts <= p.ts AND p.ts - INTERVAL '10' SECOND <= e.ts AND e.x > 0",
    "e.k = p.k AND e.ts = p.ts",
]


@pytest.mark.parametrize("on", INTERVALS)
def test_interval_joins(on: str, spill: Path) -> None:
    sql = f"SELECT e.k, e.n, p.price, p.ts AS at, e.s FROM events AS e JOIN prices AS p ON {on} WHERE p.price < 8"
    hold(sql, len(on), spill)


def test_the_state_of_an_interval_join_is_bounded(spill: Path) -> None:
    log = events(50, 150)
    sql = f"SELECT e.k, p.price FROM events AS e JOIN prices AS p ON {INTERVALS[0]}"
    plan = plan_of(f"CREATE SINK s INTO out AS {sql}", log, TABLES)
    assert [info.bound for info in plan.state] == ["interval"] * 2
    assert plan.warnings == ()
    assert plan.inputs[0].has_watermark and plan.inputs[1].has_watermark
    outcome = run(plan, log, ended(log, random_cuts(log, random.Random(0))), spill)
    state = outcome.pipeline.state()
    # Only the records behind all others are left.
    assert sum(state[info.table].num_rows for info in plan.state) <= 5
    outcome.pipeline.close()


@pytest.mark.parametrize("kind", ["JOIN", "LEFT JOIN"])
def test_temporal_joins(kind: str, spill: Path) -> None:
    sql = f"SELECT e.k, e.n, e.ts, p.price FROM events AS e {kind} prices FOR SYSTEM_TIME AS OF e.ts AS p ON e.k = p.k"
    batch = (
        f"SELECT e.k, e.n, e.ts, p.price FROM events AS e ASOF {kind} (SELECT k, ts, price FROM prices QUALIFY "
        "row_number() OVER (PARTITION BY k, ts ORDER BY _partition DESC, _offset DESC) = 1) AS p "
        "ON e.k = p.k AND e.ts >= p.ts"
    )
    # Rows of the last records wait: a version of the same time may come.
    hold(sql, 51, spill, batch=f"SELECT * FROM ({batch}) WHERE ts < TIMESTAMP '2026-01-01 23:00:00' OR ts IS NULL")


JOINS = [
    "SELECT e.k, e.n, p.price FROM events AS e JOIN prices AS p ON e.k = p.k AND e.n > p.price",
    "SELECT e.k, e.c, p.price FROM (SELECT k, count(*) AS c FROM events GROUP BY k) AS e JOIN prices AS p ON e.k = p.k",
    "SELECT e.k, e.c, p.m FROM (SELECT k, count(*) AS c FROM events GROUP BY k) AS e "
    "JOIN (SELECT k, max(price) AS m FROM prices GROUP BY k) AS p ON e.k = p.k",
    "SELECT e.k, p.k AS other, q.k AS third FROM (SELECT k, max(n) AS m FROM events GROUP BY k) AS e "
    "JOIN prices AS p ON e.m = p.price "
    "JOIN (SELECT k, min(n) AS l FROM events GROUP BY k) AS q ON q.l + 12 = p.price + e.m",
    "SELECT a.k, b.n FROM plain AS a JOIN plain AS b ON a.n = b.n AND a.k = b.k",
]


@pytest.mark.parametrize("sql", JOINS)
def test_joins_of_tables(sql: str, spill: Path) -> None:
    hold(sql, len(sql), spill, count=60)
    if sql == JOINS[2]:
        hold(sql, len(sql), spill, kind="MATERIALIZED VIEW v", count=60)


STARS = "SELECT w.k, price, n FROM (SELECT e.*, p.price FROM plain AS e JOIN prices AS p ON e.k = p.k) AS w"


def test_a_star_of_a_joined_table_has_the_tables_names(spill: Path) -> None:
    hold(STARS, 7, spill, count=40)


CHANGES = [
    "SELECT c, count(*) AS n, sum(s) AS s, avg(m) AS a FROM "
    "(SELECT k, count(*) AS c, sum(n) AS s, max(x) AS m FROM events GROUP BY k) GROUP BY c",
    "SELECT c, max(k) AS mk, min(s) AS ms, count(DISTINCT m) AS d, count(DISTINCT m) FILTER (WHERE s > 0) AS df, "
    "bool_or(s > 3) AS b, count(*) AS n FROM "
    "(SELECT k, count(*) AS c, sum(n) AS s, max(x) AS m FROM events GROUP BY k) GROUP BY c",
    "SELECT max(c) AS m, min(c) AS l, count(DISTINCT c) AS d FROM (SELECT k, count(*) AS c FROM events GROUP BY k)",
    "SELECT count(*) AS n, sum(c) FILTER (WHERE k > 'key0') AS s FROM (SELECT k, count(*) AS c FROM events GROUP BY k)",
    "SELECT e.k, count(*) AS n, sum(p.price) AS s FROM (SELECT k, max(n) AS m FROM events GROUP BY k) AS e "
    "JOIN prices AS p ON e.k = p.k GROUP BY e.k",
    "SELECT price % 3 AS p, avg(most) AS a FROM (SELECT p.price, e.k, max(e.n) AS most FROM events AS e "
    "JOIN prices AS p ON e.k = p.k AND p.ts BETWEEN e.ts AND e.ts + INTERVAL '5' SECOND GROUP BY p.price, e.k) "
    "GROUP BY p",
]


@pytest.mark.parametrize("sql", CHANGES)
def test_groups_over_changes(sql: str, spill: Path) -> None:
    hold(sql, len(sql), spill)
    if sql == CHANGES[0]:
        hold(sql, len(sql), spill, kind="MATERIALIZED VIEW v")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_many_random_inputs(seed: int, spill: Path) -> None:
    for sql in [*JOINS, *CHANGES]:
        hold(sql, 1000 + seed, spill, count=80)
    for sql, batch in TOPS:
        hold(sql, 2000 + seed, spill, batch=batch)
    for on in INTERVALS:
        hold(f"SELECT e.n, p.price FROM events AS e JOIN prices AS p ON {on}", 3000 + seed, spill)


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("SELECT e.k FROM events AS e LEFT JOIN prices AS p ON e.k = p.k", "LEFT"),
        ("SELECT e.k FROM events AS e FULL JOIN prices AS p ON e.k = p.k", "FULL"),
        ("SELECT e.k FROM events AS e ASOF JOIN prices AS p ON e.k = p.k AND e.ts >= p.ts", "ASOF"),
        ("SELECT e.k FROM events AS e SEMI JOIN prices AS p ON e.k = p.k", "SEMI"),
        ("SELECT e.k FROM events AS e CROSS JOIN prices AS p", "CROSS"),
        ("SELECT e.k FROM events AS e, prices AS p", "ON"),
        ("SELECT e.k FROM events AS e JOIN prices AS p USING (k)", "USING"),
        ("SELECT e.k FROM events AS e JOIN prices AS p ON e.n > p.price", "equality"),
        ("SELECT e.k FROM events AS e JOIN events AS e ON e.k = e.k", "names of their own"),
        ("SELECT k FROM events AS e JOIN prices AS p ON e.k = p.k", "ambiguous"),
        ("SELECT e.k FROM events AS e JOIN prices FOR SYSTEM_TIME AS OF p.ts AS p ON e.k = p.k", "AS OF"),
        ("SELECT e.k FROM events AS e JOIN plain FOR SYSTEM_TIME AS OF e.ts AS p ON e.k = p.k", "WATERMARK"),
        ("SELECT e.k FROM events AS e JOIN prices FOR SYSTEM_TIME AS OF e.ts AS p ON e.k = p.k AND p.price > 1", "ON"),
        ("SELECT c, last(k) AS m FROM (SELECT k, count(*) AS c FROM events GROUP BY k) GROUP BY c", "last over rows"),
        ("SELECT k, rank() OVER (PARTITION BY k ORDER BY n) AS r FROM events QUALIFY r <= 3", "rank"),
        ("SELECT * FROM (SELECT k, row_number() OVER (PARTITION BY k ORDER BY k) AS r FROM events)", "limit"),
        ("SELECT k FROM events QUALIFY row_number() OVER (PARTITION BY k) <= 3", "ORDER BY"),
        ("SELECT k FROM events QUALIFY sum(n) OVER (PARTITION BY k ORDER BY n) <= 3", "sum"),
        ("SELECT k FROM events QUALIFY row_number() OVER (PARTITION BY k ORDER BY n) > 3", "<= n"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(sql: str, named: str) -> None:
    with pytest.raises(InvalidStatement) as error:
        plan_of(f"CREATE SINK s INTO out AS {sql}", events(0, 0), TABLES)
    assert named.lower() in str(error.value).lower()


def test_state_ttl_without_such_state_is_refused() -> None:
    for sql in (
        "SELECT k FROM events",
        f"SELECT e.k FROM events AS e JOIN prices AS p ON {INTERVALS[0]}",
        f"{COUNTS} EMIT ON WINDOW CLOSE",
    ):
        with pytest.raises(InvalidStatement, match="state_ttl has no effect"):
            plan_of(f"CREATE MATERIALIZED VIEW v WITH (state_ttl = '1 hour') AS {sql}", events(0, 0), TABLES)
    with pytest.raises(InvalidStatement, match="must be a whole number"):
        plan_of("CREATE MATERIALIZED VIEW v WITH (state_ttl = 'soon') AS SELECT k FROM plain", events(0, 0), TABLES)


def test_a_join_of_tables_says_what_its_state_grows_with() -> None:
    text = f"CREATE MATERIALIZED VIEW v AS {JOINS[0]}"
    plan = plan_of(text, events(0, 0), TABLES)
    assert len(plan.warnings) == 3
    assert "rows of the left side, which nothing bounds" in plan.warnings[0]
    assert plan.operators[-1].startswith("join on")
    bounded = plan_of(text.replace(" AS ", " WITH (state_ttl = '1 hour') AS ", 1), events(0, 0), TABLES)
    assert bounded.warnings == ("the view keeps its whole result, which nothing bounds",)


def test_a_row_that_replaces_another_changes_a_sum_over_all_rows(spill: Path) -> None:
    log = Log({"events": 1})
    for _ in range(3):
        log.add("events", 0, {"k": "a", "n": 1})
    sql = "SELECT count(*) AS n, sum(c) AS s FROM (SELECT k, count(*) AS c FROM plain GROUP BY k)"
    cuts = [Cut({("events", 0): (at, at + 1)}) for at in range(3)]
    check(f"CREATE MATERIALIZED VIEW v AS {sql}", sql, log, TABLES, cuts, spill, random.Random(0))
