"""The queries of Nexmark as jobs: micro-batches cut at random, rows out of order and late, held against one query over
all rows that were not late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from shproto.errors import InvalidStatement
from streamhouse_sql.arrow import schema_of
from streamhouse_sql.core.continuous.model import JobPlan
from streamhouse_sql.core.tables import TableDefinition
from streamhouse_sql.pipeline import plan_job

from bench.nexmark.generator import KINDS, Nexmark, json_values, side_input
from bench.nexmark.queries import NAMES, TOPICS, declarations, statement
from services.sql.tests.pipeline_world import NOW_US, continuous, declared, new_engine, open_pipeline
from tests.nexmark.reference import REFERENCE

PARTITIONS = {"person": 1, "auction": 2, "bid": 2, "side_input": 1}
DELAY_US = 4_000_000  # of the watermarks
NEVER_US = -(1 << 62)
# Queries that cannot be run yet, and the construct that their refusal names. One that is planned leaves this list.
REFUSED = {"q6": "avg OVER", "q13": "FOR SYSTEM_TIME AS OF"}
SUPPORTED = [name for name in NAMES if name not in REFUSED]


@dataclass(frozen=True)
class Stream:
    """Rows of a topic in the order of their arrival, with `_partition`, `_offset` and `_timestamp`, and as records."""

    rows: pa.Table
    raw: pa.Table


@cache
def streams(seed: int, events: int, rate: int) -> Mapping[str, Stream]:
    """Returns the topics. A row arrives up to three seconds after its time, one of a hundred much later."""
    generator = Nexmark(seed, rate)
    rng = np.random.default_rng([seed, 7])
    found = {}
    for kind in KINDS:
        rows = generator.table(kind, events)
        delay_ms = rng.integers(0, 3_000, rows.num_rows) + (rng.random(rows.num_rows) < 0.01) * 15_000
        found[kind] = arrived(kind, rows, rows["dateTime"].cast(pa.int64()).to_numpy() + delay_ms, rng)
    rows = side_input()
    found["side_input"] = arrived("side_input", rows, np.zeros(rows.num_rows, np.int64), rng)
    return found


def arrived(topic: str, rows: pa.Table, times_ms: np.ndarray, rng: np.random.Generator) -> Stream:
    """Returns the rows in the order of these times, each partition's beside the others'."""
    order = np.argsort(times_ms, kind="stable")
    rows, times_ms = rows.take(pa.array(order)), times_ms[order]
    partition = rng.integers(0, PARTITIONS[topic], rows.num_rows).astype(np.int32)
    offset = np.zeros(rows.num_rows, np.int64)
    for number in range(PARTITIONS[topic]):
        offset[partition == number] = np.arange((partition == number).sum())
    places = {
        "_partition": pa.array(partition),
        "_offset": pa.array(offset),
        "_timestamp": pa.array(times_ms * 1000, pa.timestamp("us", "UTC")),
    }
    values = json_values(rows)
    raw = pa.table({"_value": values.cast(pa.string()), "_value_bytes": values, **places})
    for name, column in places.items():
        rows = rows.append_column(name, column)
    return Stream(rows, raw.sort_by([("_partition", "ascending"), ("_offset", "ascending")]))


@cache
def tables() -> dict[str, TableDefinition]:
    return declared(*declarations())


def plan_of(name: str) -> JobPlan:
    text = continuous(statement(name))
    return plan_job(text, PARTITIONS, tables(), partial(new_engine, Path("/nonexistent"), spill_bytes=0))


def hold(name: str, seed: int, events: int, rate: int, steps: int, spill: Path) -> None:
    """Runs a query in about so many micro-batches, in the middle of which another pipeline takes over, and compares."""
    plan = plan_of(name)
    topics = streams(seed, events, rate)
    rng = np.random.default_rng([seed, 8])
    at = {(found.topic, number): 0 for found in plan.inputs for number in range(PARTITIONS[found.topic])}
    ends = {(topic, number): pc.sum(pc.equal(topics[topic].raw["_partition"], number)).as_py() for topic, number in at}
    kept = {found.topic: np.ones(topics[found.topic].raw.num_rows, bool) for found in plan.inputs}
    # By topic: event time by row, and the newest by partition.
    times = {found.topic: time_us(name, topics[found.topic].raw) for found in plan.inputs if found.has_watermark}
    newest = {place: NEVER_US for place in at if place[0] in times}
    watermark = NEVER_US
    got: list[pa.Table] = []
    pipeline = open_pipeline(plan, spill)
    number = 0
    try:
        while at != ends:
            if number == steps // 2:
                state = pipeline.state()
                pipeline.close()
                pipeline = open_pipeline(plan, spill)
                pipeline.restore(state)
            inputs: dict[str, list[pa.Table]] = {}
            late = 0
            for (topic, partition), first in at.items():
                share = rng.choice([0, 1, 1, 1, 2, 3]) / steps
                end = min(ends[topic, partition], first + int(ends[topic, partition] * share) + 1)
                at[topic, partition] = end
                begin = sum(ends[topic, before] for before in range(partition)) + first
                inputs.setdefault(topic, []).append(topics[topic].raw.slice(begin, end - first))
                if topic in times and end > first:
                    batch = times[topic][begin : begin + end - first]
                    kept[topic][begin : begin + end - first] = batch >= watermark
                    late += int((batch < watermark).sum())
                    newest[topic, partition] = max(newest[topic, partition], int(batch.max()))
            given = {
                found.name: pa.concat_tables(inputs[found.topic])
                .select(list(found.columns))
                .cast(schema_of(found.columns))
                for found in plan.inputs
            }
            step = pipeline.step(given, idle=(), now_us=NOW_US + number * 1_000_000)
            delay_us = 0 if name == "q12" else DELAY_US
            watermark = max(watermark, min(newest.values(), default=NEVER_US) - delay_us)
            assert step.late_rows == late
            assert (step.watermark_us or NEVER_US) == (watermark if watermark > NEVER_US + DELAY_US else NEVER_US)
            got.append(step.rows.append_column("step", pa.array(np.full(step.rows.num_rows, number))))
            number += 1
    finally:
        pipeline.close()
    compare(
        name, plan, pa.concat_tables(got), {topic: on_time(topics[topic], kept[topic]) for topic in kept}, watermark
    )


def time_us(name: str, raw: pa.Table) -> np.ndarray:
    """Returns the event time of each record, as the query has it."""
    if name == "q12":
        return raw["_timestamp"].cast(pa.int64()).to_numpy()
    text = pc.struct_field(pc.extract_regex(raw["_value"], r'"dateTime":"(?P<time>[^"]*)"'), "time")
    return text.cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()


def on_time(stream: Stream, kept: np.ndarray) -> pa.Table:
    """Returns the rows whose records are kept."""
    rows = stream.rows.sort_by([("_partition", "ascending"), ("_offset", "ascending")])
    return rows.filter(pa.array(kept))


def compare(name: str, plan: JobPlan, got: pa.Table, rows: Mapping[str, pa.Table], watermark_us: int) -> None:
    """Holds the sum of all changes against the reference. No step takes away what is not there."""
    names = ", ".join(f'"{column}"' for column, _ in plan.output_columns)
    weight = "_op" if plan.is_changelog else "1"
    wanted = REFERENCE[name].format(closed=f"make_timestamp({max(watermark_us, 0)})")
    with duckdb.connect() as con:
        con.execute("SET threads = 1; SET TimeZone = 'UTC'")
        for topic, table in rows.items():
            con.register(topic, table)
        con.register("got", got)
        con.execute(f"CREATE TABLE want AS SELECT * FROM ({wanted}) AS w({names})")
        con.execute(f"CREATE TABLE sums AS SELECT {names}, sum({weight}) AS n FROM got GROUP BY ALL HAVING n <> 0")
        con.execute(f"CREATE TABLE counts AS SELECT {names}, count(*) AS n FROM want GROUP BY ALL")
        extra = con.sql("FROM sums EXCEPT ALL FROM counts LIMIT 3").fetchall()
        missing = con.sql("FROM counts EXCEPT ALL FROM sums LIMIT 3").fetchall()
        assert (extra, missing) == ([], [])
        assert con.sql("SELECT count(*) > 0 FROM want").fetchall() == [(True,)], "nothing was compared"
        taken = con.sql(
            f"SELECT * FROM (SELECT {names}, sum({weight}) OVER (PARTITION BY {names} ORDER BY step) AS n FROM got) "
            "WHERE n < 0 LIMIT 3"
        ).fetchall()
        assert taken == [], "rows are taken away, and are not there"


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    return tmp_path / "spill"


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_query_gives_what_it_gives_over_all_rows(name: str, spill: Path) -> None:
    hold(name, seed=1, events=2_000, rate=25, steps=3, spill=spill)


@pytest.mark.long
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_query_over_many_events(name: str, seed: int, spill: Path) -> None:
    hold(name, seed=seed, events=200_000, rate=4_000, steps=20, spill=spill)


@pytest.mark.parametrize("name", REFUSED)
def test_a_query_that_cannot_be_run_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidStatement, match=REFUSED[name]):
        plan_of(name)


def test_each_query_is_there_and_has_a_reference() -> None:
    assert {path.stem for path in Path("bench/nexmark/queries").glob("*.sql")} == {*NAMES, "tables"}
    assert {*REFERENCE, "q6"} == {*NAMES}
    assert {*PARTITIONS} == {*TOPICS}
