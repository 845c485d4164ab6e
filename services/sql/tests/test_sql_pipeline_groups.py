"""GROUP BY and windows, held against one query over the rows that were not late."""

import random
from pathlib import Path

import pytest
from shproto.errors import InvalidStatement

from services.sql.tests.pipeline_events import TABLES, ended, events, has_ended, session_has_ended
from services.sql.tests.pipeline_world import NOW_US, Cut, check, open_pipeline, plan_of, random_cuts, run

AGGREGATES = (
    "count(*) AS c, count(n) AS cn, sum(n) AS sn, sum(x) AS sx, sum(d) AS sd, avg(n) AS an, avg(x) AS ax, "
    "min(s) AS ms, max(s) AS xs, min(n) AS mn, max(x) AS mx, max(ts) AS mt, bool_and(ok) AS ba, "
    "bool_or(ok) AS bo, count(*) FILTER (WHERE n > 3) AS cf, sum(n) FILTER (WHERE ok) AS sf, "
    "avg(x) FILTER (WHERE n > 8) AS af, count_if(n > 2) AS ci, approx_count_distinct(s) AS ad2, min(DISTINCT n) AS dn"
)
DISTINCT = (
    "count(DISTINCT n) AS dn, count(DISTINCT s) AS ds, count(DISTINCT s) FILTER (WHERE ok) AS dso, "
    "count(DISTINCT s) FILTER (WHERE n > 4) AS dsn, count(*) AS c, sum(n) + count(DISTINCT n) AS mixed"
)
WINDOWS = {
    "tumble": "TUMBLE(TABLE events, DESCRIPTOR(ts), INTERVAL '10' SECOND)",
    "tumble with offset": "TUMBLE(TABLE events, DESCRIPTOR(ts), INTERVAL '7' SECOND, INTERVAL '3' SECOND)",
    "hop": "HOP(TABLE events, DESCRIPTOR(ts), INTERVAL '2' SECOND, INTERVAL '10' SECOND)",
    "hop with offset": (
        "HOP(TABLE events, DESCRIPTOR(ts), INTERVAL '3' SECOND, INTERVAL '9' SECOND, INTERVAL '1' SECOND)"
    ),
    "cumulate": "CUMULATE(TABLE events, DESCRIPTOR(ts), INTERVAL '5' SECOND, INTERVAL '20' SECOND)",
    "cumulate with offset": (
        "CUMULATE(TABLE events, DESCRIPTOR(ts), INTERVAL '2' SECOND, INTERVAL '6' SECOND, INTERVAL '1' SECOND)"
    ),
}
SESSION = "SESSION(TABLE events PARTITION BY k, DESCRIPTOR(ts), INTERVAL '1' SECOND)"
# Clauses of queries with windows; {} is the window function.
ON_CLOSE = [
    f"SELECT window_start, window_end, {AGGREGATES} FROM {{}} GROUP BY window_start, window_end",
    f"SELECT k, window_start, window_end, {AGGREGATES} FROM {{}} GROUP BY k, window_start, window_end",
    f"SELECT k, window_start AS ws, window_end, {DISTINCT} FROM {{}} GROUP BY ALL",
    "SELECT window_end, k AS name, n % 2 AS odd, count(*) AS c FROM {} WHERE n > 0 GROUP BY k, window_end, 3",
    "SELECT window_end, window_time, upper(k) AS u, sum(n) * 2 AS c FROM {} GROUP BY 1, 2, 3 HAVING count(*) > 2",
    "SELECT window_start, window_end, count(*) AS c FROM {} WHERE window_end > TIMESTAMP '2026-01-01 00:00:20' "
    "GROUP BY ALL",
]


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    return tmp_path / "spill"


def hold(sql: str, seed: int, spill: Path, *, kind: str = "SINK s INTO out", emit: str = "") -> None:
    """Holds a query against its batch query over random events, in random micro-batches."""
    rng = random.Random(seed)
    keys = rng.choice([1, 4, 20])
    log = events(seed, rng.choice([20, 100]), keys=keys, late=rng.choice([0, 0.1, 0.4]))
    cuts = ended(log, random_cuts(log, rng, rows_max=rng.choice([15, 30, 200])))
    closes = emit == " EMIT ON WINDOW CLOSE"
    over = session_has_ended if "SESSION" in sql else has_ended
    keep = over if closes else None
    check(f"CREATE {kind} AS {sql}{emit}", sql, log, TABLES, cuts, spill, rng, keep=keep)


CASES = [(window, clause) for window in WINDOWS for clause in range(len(ON_CLOSE))]
# Each window and each clause once; the other combinations take a minute.
QUICK = set(zip(WINDOWS, range(len(ON_CLOSE)), strict=True))


@pytest.mark.parametrize(
    ("window", "clause"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.long) for case in CASES],
)
def test_windows_are_given_out_once_when_they_end(window: str, clause: int, spill: Path) -> None:
    hold(ON_CLOSE[clause].format(WINDOWS[window]), 100 + clause, spill, emit=" EMIT ON WINDOW CLOSE")


@pytest.mark.parametrize(
    ("window", "clause"),
    [
        pytest.param(window, clause, marks=() if (window, clause) in QUICK else pytest.mark.long)
        for window, clause in CASES
        if window in ("tumble", "hop with offset", "cumulate")
    ],
)
def test_windows_as_changes(window: str, clause: int, spill: Path) -> None:
    hold(ON_CLOSE[clause].format(WINDOWS[window]), 200 + clause, spill)


@pytest.mark.parametrize("window", ["tumble with offset", "cumulate"])
def test_rows_of_windows_without_groups(window: str, spill: Path) -> None:
    hold(f"SELECT k, n, window_start, window_end AS e, window_time FROM {WINDOWS[window]} WHERE n > 1", 6, spill)


@pytest.mark.parametrize("emit", [" EMIT ON WINDOW CLOSE", " EMIT CHANGES"])
@pytest.mark.parametrize(
    "sql",
    [
        f"SELECT k, window_start, window_end, {AGGREGATES} FROM {SESSION} GROUP BY k, window_start, window_end",
        f"SELECT window_end, k, sum(n) AS c FROM {SESSION} WHERE n > 3 GROUP BY 1, 2 HAVING count(*) > 1",
        "SELECT window_start, window_end, window_time, count(*) AS c "
        "FROM SESSION(TABLE events, DESCRIPTOR(ts), INTERVAL '200' MILLISECOND) GROUP BY ALL",
    ],
)
def test_sessions(sql: str, emit: str, spill: Path) -> None:
    for seed in (3,):
        if "WHERE" in sql:  # the sessions are those of all rows in a batch query, and of these here
            inner = SESSION.replace("TABLE events", "TABLE (SELECT * FROM events WHERE n > 3)")
            sql = sql.replace(SESSION, inner).replace(" WHERE n > 3 GROUP", " GROUP")
        hold(sql, seed, spill, emit=emit)


GROUPS = [
    f"SELECT k, {AGGREGATES} FROM events GROUP BY k",
    f"SELECT {AGGREGATES} FROM events",
    f"SELECT k, {DISTINCT} FROM events GROUP BY k",
    f"SELECT {DISTINCT} FROM events",
    "SELECT k, n % 3 AS m, max(x) AS mx FROM events WHERE ok GROUP BY k, m",
    "SELECT max(x) AS mx, count(*) AS c FROM events GROUP BY k HAVING count(*) > 3 AND max(x) < 15",
    "SELECT k, count(*) AS c FROM (SELECT k FROM events UNION ALL SELECT k FROM prices) AS u GROUP BY k",
    "SELECT upper(k) || '!' AS loud, sum(n) AS s FROM events GROUP BY k",
]


@pytest.mark.parametrize(
    "sql", [pytest.param(sql, marks=pytest.mark.long if sql in (GROUPS[1], GROUPS[3]) else ()) for sql in GROUPS]
)
def test_groups_as_changes(sql: str, spill: Path) -> None:
    hold(sql, len(sql), spill)


@pytest.mark.parametrize("sql", [GROUPS[5], ON_CLOSE[4].format(WINDOWS["hop"]), ON_CLOSE[2].format(WINDOWS["tumble"])])
def test_a_view_has_the_groups(sql: str, spill: Path) -> None:
    hold(sql, len(sql), spill, kind="MATERIALIZED VIEW v")


def test_a_view_over_windows_that_end(spill: Path) -> None:
    hold(ON_CLOSE[1].format(WINDOWS["hop"]), 5, spill, kind="MATERIALIZED VIEW v", emit=" EMIT ON WINDOW CLOSE")


@pytest.mark.parametrize(
    ("sql", "batch"),
    [
        (
            "SELECT k, first(n) AS f, last(n) AS l FROM events GROUP BY k",
            "SELECT k, first(n ORDER BY ts NULLS FIRST, _partition, _offset) AS f, "
            "last(n ORDER BY ts NULLS FIRST, _partition, _offset) AS l FROM events WHERE ts IS NOT NULL GROUP BY k",
        ),
        (
            "SELECT k, arg_max(s, n) AS a, arg_min(x, n) AS b, max_by(s, x) FILTER (WHERE ok) AS c "
            "FROM events GROUP BY k",
            "SELECT k, "
            "first(s ORDER BY n DESC, _partition, _offset) FILTER (WHERE s IS NOT NULL AND n IS NOT NULL) AS a, "
            "first(x ORDER BY n, _partition, _offset) FILTER (WHERE x IS NOT NULL AND n IS NOT NULL) AS b, "
            "first(s ORDER BY x DESC, _partition, _offset) FILTER (WHERE ok AND s IS NOT NULL AND x IS NOT NULL) AS c "
            "FROM events GROUP BY k",
        ),
    ],
)
def test_ties_are_broken_by_partition_and_offset(sql: str, batch: str, spill: Path) -> None:
    for seed in range(1):
        rng = random.Random(seed)
        log = events(seed, 80, keys=2)
        if "first" in sql:
            for records in log.records.values():
                records[:] = [record for record in records if '"ts": null' not in record["_value"]]
        check(f"CREATE SINK s INTO out AS {sql}", batch, log, TABLES, random_cuts(log, rng), spill, rng)


def test_an_approximate_quantile_is_near_the_exact_one(spill: Path) -> None:
    rng, log = random.Random(1), events(1, 400, keys=1)
    plan = plan_of("CREATE MATERIALIZED VIEW v AS SELECT approx_quantile(n, 0.5) AS m FROM events", log, TABLES)
    outcome = run(plan, log, random_cuts(log, rng), spill)
    again = run(plan, log, random_cuts(log, random.Random(1)), spill)
    assert 3 <= outcome.pipeline.view_table()["m"][0].as_py() <= 5
    assert outcome.pipeline.view_table()["m"] == again.pipeline.view_table()["m"]


def test_a_time_with_a_zone_keeps_it(spill: Path) -> None:
    sql = (
        "SELECT window_start, window_end, k, sum(n) AS s "
        "FROM HOP(TABLE zoned, DESCRIPTOR(at), INTERVAL '5' SECOND, INTERVAL '10' SECOND) GROUP BY ALL"
    )
    hold(sql, 9, spill, emit=" EMIT ON WINDOW CLOSE")


# ---- time


def test_an_idle_partition_holds_nothing_back_and_no_watermark_goes_back(spill: Path) -> None:
    log = events(0, 0)
    sql = f"SELECT window_start, window_end, count(*) AS c FROM {WINDOWS['tumble']} GROUP BY ALL EMIT ON WINDOW CLOSE"
    plan = plan_of(f"CREATE SINK s INTO out AS {sql}", log, TABLES)
    assert plan.inputs[0].has_watermark
    for at in (1, 15, 3, 16):
        log.add("events", 0, {"ts": f"2026-01-01 00:00:{at:02}"})
    log.add("events", 1, {"ts": "2026-01-01 00:00:00"})
    silent = [("events", 1), ("events", 2)]
    steps = run(
        plan,
        log,
        [
            Cut({("events", 0): (0, 2)}),
            Cut({}, (*silent,)),  # 1 and 2 have had no record
            Cut({}, (("events", 0), *silent)),  # all are idle: the watermark stays
            Cut({("events", 0): (2, 3), ("events", 1): (0, 1)}, (("events", 2),)),  # both late; 1 is far behind
            Cut({("events", 0): (3, 4)}, (*silent,)),
        ],
        spill,
    ).steps
    second = 1_000_000
    assert steps[0].watermark_us is None
    assert steps[0].rows.num_rows == 0
    assert steps[1].watermark_us == NOW_US + 13 * second
    assert steps[1].rows["c"].to_pylist() == [1]
    assert steps[2].watermark_us == steps[1].watermark_us
    assert steps[3].watermark_us == steps[2].watermark_us
    assert steps[3].late_rows == 2
    assert steps[3].late.to_pylist() == [
        {"topic": "events", "partition": 0, "offset": 2},
        {"topic": "events", "partition": 1, "offset": 0},
    ]
    assert steps[4].watermark_us == NOW_US + 14 * second


def test_rows_of_one_micro_batch_are_judged_by_the_watermark_before_it(spill: Path) -> None:
    log = events(0, 0, partitions={"events": 1})
    sql = f"SELECT window_start, window_end, count(*) AS c FROM {WINDOWS['tumble']} GROUP BY ALL EMIT ON WINDOW CLOSE"
    plan = plan_of(f"CREATE SINK s INTO out AS {sql}", log, TABLES)
    for at in (50, 1, 47, 59):
        log.add("events", 0, {"ts": f"2026-01-01 00:00:{at:02}"})
    together = run(plan, log, [Cut({("events", 0): (0, 4)})], spill).steps
    assert together[0].late_rows == 0
    assert together[0].rows["c"].to_pylist() == [1, 1]
    apart = run(plan, log, [Cut({("events", 0): (at, at + 1)}) for at in range(4)], spill).steps
    assert [step.late_rows for step in apart] == [0, 1, 1, 0]


def test_a_step_that_failed_has_moved_no_watermark(spill: Path) -> None:
    log = events(0, 0, partitions={"events": 1})
    plan = plan_of(
        f"CREATE SINK s INTO out AS SELECT window_end, sum(1 // n) AS c FROM {WINDOWS['tumble']} "
        "GROUP BY window_end EMIT ON WINDOW CLOSE",
        log,
        TABLES,
    )
    for n in (1, 9_000_000_000):
        log.add("events", 0, {"ts": f"2026-01-01 00:00:{n % 60:02}", "n": n})
    log.add("events", 0, {"ts": "2026-01-01 00:00:50", "n": "many"})
    pipeline = open_pipeline(plan, spill)
    columns = plan.inputs[0].columns
    pipeline.step({"events": log.table("events", {0: (0, 2)}, columns)}, idle=(), now_us=NOW_US)
    before = pipeline.state()
    with pytest.raises(Exception, match="offset 2"):
        pipeline.step({"events": log.table("events", {0: (2, 3)}, columns)}, idle=(), now_us=NOW_US)
    assert pipeline.state() == before
    pipeline.close()


# ---- state


def test_state_of_windows_that_ended_is_gone(spill: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamhouse_sql.pipeline.SIZES_STEPS", 1)
    for emit in ("EMIT CHANGES", "EMIT ON WINDOW CLOSE"):
        for window in (WINDOWS["hop"], SESSION):
            log = events(3, 60)
            sql = f"SELECT k, window_start, window_end, count(*) AS c FROM {window} GROUP BY ALL {emit}"
            plan = plan_of(f"CREATE SINK s INTO out AS {sql}", log, TABLES)
            assert [info.bound for info in plan.state] == ["window"]
            assert plan.warnings == ()
            outcome = run(plan, log, ended(log, random_cuts(log, random.Random(0))), spill)
            assert any(sum(step.state_rows.values()) > 10 for step in outcome.steps)
            left = outcome.pipeline.state()
            assert sum(left[info.table].num_rows for info in plan.state) <= 15, "the window of the last records"


def test_a_group_that_does_not_change_is_forgotten_after_its_time_to_live(spill: Path) -> None:
    log = events(0, 0, partitions={"events": 1})
    text = "SELECT k, count(*) AS c, count(DISTINCT n) AS d FROM events GROUP BY k"
    unbounded = plan_of(f"CREATE MATERIALIZED VIEW v AS {text}", log, TABLES)
    assert "nothing bounds" in unbounded.warnings[0]
    plan = plan_of(f"CREATE MATERIALIZED VIEW v WITH (state_ttl = '1 minute') AS {text}", log, TABLES)
    assert {info.bound for info in plan.state} == {"state_ttl of 1 minute"}
    assert plan.warnings == ()
    for key in ("a", "b", "a"):
        log.add("events", 0, {"k": key, "n": 1})
    minute = 60_000_000
    cuts = [
        Cut({("events", 0): (0, 2)}, (), NOW_US),
        Cut({("events", 0): (2, 3)}, (), NOW_US + minute // 2),
        Cut({}, (), NOW_US + minute + minute // 8),
    ]
    outcome = run(plan, log, cuts, spill, restore_before=(1, 2))
    assert outcome.pipeline.view_table().to_pylist() == [{"k": "a", "c": 2, "d": 1}]
    assert outcome.steps[-1].rows.num_rows == 0, "what is forgotten is not taken away"
    left = outcome.pipeline.state()
    assert [left[info.table].num_rows for info in plan.state] == [1, 1]


def test_rows_of_slices_are_put_together(spill: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamhouse_sql.pipeline.COMPACTION_ROWS_MIN", 5)
    monkeypatch.setattr("streamhouse_sql.pipeline.SIZES_STEPS", 3)
    hold(ON_CLOSE[2].format(WINDOWS["hop"]), 11, spill, emit=" EMIT ON WINDOW CLOSE")


# ---- what is refused


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("SELECT k, n, count(*) AS c FROM events GROUP BY k", "column n must be in GROUP BY"),
        ("SELECT k FROM events WHERE count(*) > 1 GROUP BY k", "WHERE"),
        ("SELECT k, sum(count(*)) AS c FROM events GROUP BY k", "inside of an aggregate"),
        ("SELECT k, string_agg(s) AS c FROM events GROUP BY k", "string_agg"),
        ("SELECT k, sum(DISTINCT n) AS c FROM events GROUP BY k", "DISTINCT"),
        ("SELECT k, first(n ORDER BY x) AS c FROM events GROUP BY k", "ORDER BY"),
        ("SELECT k, count(*) AS c FROM events GROUP BY ROLLUP (k)", "ROLLUP"),
        ("SELECT k, count(*) AS c FROM events GROUP BY k EMIT ON WINDOW CLOSE", "EMIT ON WINDOW CLOSE"),
        ("SELECT k FROM events EMIT ON WINDOW CLOSE", "EMIT ON WINDOW CLOSE"),
        (f"SELECT k, count(*) AS c FROM {WINDOWS['tumble']} GROUP BY k EMIT ON WINDOW CLOSE", "window_start"),
        (
            "SELECT k FROM TUMBLE(TABLE plain, DESCRIPTOR(n), INTERVAL '1' SECOND) GROUP BY k",
            "watermark",
        ),
        (
            "SELECT k FROM TUMBLE(TABLE events, DESCRIPTOR(n), INTERVAL '1' SECOND) GROUP BY k",
            "watermark",
        ),
        (f"SELECT n, window_end, count(*) AS c FROM {SESSION} GROUP BY ALL", "PARTITION BY"),
        (f"SELECT k, count(*) AS c FROM {SESSION} GROUP BY k", "window_start"),
        (f"SELECT k, window_end, n FROM {SESSION}", "SESSION"),
        (f"SELECT k, window_end, count(DISTINCT n) AS c FROM {SESSION} GROUP BY ALL", "DISTINCT"),
        ("SELECT k, sum(n, x) AS c FROM events GROUP BY k", "sum takes 1"),
        ("SELECT k, count(*) AS c FROM events GROUP BY 4", "GROUP BY 4"),
        ("SELECT k, max(n, 3) AS c FROM events GROUP BY k", "max takes 1"),
        ("SELECT k, count(*) OVER (PARTITION BY k) AS c FROM events", "OVER"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(sql: str, named: str) -> None:
    with pytest.raises(InvalidStatement) as error:
        plan_of(f"CREATE SINK s INTO out AS {sql}", events(0, 0), TABLES)
    assert named.lower() in str(error.value).lower()
