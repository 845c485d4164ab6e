"""Pipelines over random micro-batches, held against one query over all rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from streamhouse_sql.adapters.duck import Duck, DuckLimits
from streamhouse_sql.arrow import schema_of
from streamhouse_sql.core.binding import bind
from streamhouse_sql.core.columns import COLUMN_NAMES
from streamhouse_sql.core.continuous.model import JobPlan
from streamhouse_sql.core.continuous.statements import ContinuousQuery, parse_job_statement
from streamhouse_sql.core.statement import CreateTable, Query, parse
from streamhouse_sql.core.tables import TableDefinition
from streamhouse_sql.pipeline import Pipeline, Step, plan_job

MIB = 1024 * 1024
EPOCH_MS = 1_767_225_600_000  # 2026-01-01
NOW_US = EPOCH_MS * 1000
Place = tuple[str, int, int]


@dataclass
class Log:
    """Records by topic and partition, as dictionaries with `value` and `timestamp_ms`."""

    partitions: Mapping[str, int]
    records: dict[tuple[str, int], list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, topic: str, partition: int, value: Any, timestamp_ms: int = EPOCH_MS, key: str | None = None) -> None:
        """Appends a record; `value`: of JSON, or a text as it is."""
        text = value if value is None or isinstance(value, str) else json.dumps(value)
        self.records.setdefault((topic, partition), []).append(
            {
                "_key": key,
                "_value": text,
                "_value_bytes": None if text is None else text.encode(),
                "_timestamp": timestamp_ms * 1000,
            }
        )

    def table(self, topic: str, ranges: Mapping[int, tuple[int, int]], columns: Sequence[str]) -> pa.Table:
        """Returns the records of these offsets [from, to) by partition, in order."""
        rows = [
            {**record, "_partition": number, "_offset": first + at, "_headers": []}
            for number, (first, end) in sorted(ranges.items())
            for at, record in enumerate(self.records.get((topic, number), [])[first:end])
        ]
        return pa.Table.from_pylist(
            [{name: row.get(name) for name in columns} for row in rows], schema=schema_of(columns)
        )

    def end(self, topic: str, partition: int) -> int:
        """Returns the offset behind the partition's last record."""
        return len(self.records.get((topic, partition), []))


def declared(*texts: str) -> dict[str, TableDefinition]:
    """Returns the tables of CREATE TABLE statements, by name."""
    found = {}
    for text in texts:
        statement = parse(text)
        assert isinstance(statement, CreateTable)
        found[statement.definition.name.lower()] = statement.definition
    return found


def continuous(text: str) -> ContinuousQuery:
    """Returns the continuous query of a statement."""
    statement = parse_job_statement(text)
    assert isinstance(statement, ContinuousQuery)
    return statement


def plan_of(text: str, log: Log, tables: Mapping[str, TableDefinition]) -> JobPlan:
    """Returns the plan of a statement."""
    return plan_job(continuous(text), log.partitions, tables, partial(new_engine, Path("/nonexistent"), spill_bytes=0))


def open_pipeline(plan: JobPlan, spill: Path) -> Pipeline:
    """Returns a pipeline of the plan, without state."""
    return Pipeline(plan, new_engine(spill))


def new_engine(spill: Path, spill_bytes: int = 64 * MIB) -> Duck:
    """Returns an instance for a pipeline."""
    return Duck(DuckLimits(memory_bytes_max=256 * MIB, temp_dir=spill, temp_bytes_max=spill_bytes, threads=1))


@dataclass(frozen=True)
class Cut:
    """A micro-batch: offsets by (topic, partition), idle partitions and the time."""

    ranges: Mapping[tuple[str, int], tuple[int, int]]
    idle: tuple[tuple[str, int], ...] = ()
    now_us: int = NOW_US


def random_cuts(log: Log, rng: random.Random, *, rows_max: int = 30, idle: bool = True) -> list[Cut]:
    """Returns micro-batches of all records, partition by partition in order, and beside each other at random."""
    at = {(topic, number): 0 for topic, count in log.partitions.items() for number in range(count)}
    cuts: list[Cut] = []
    while any(at[place] < log.end(*place) for place in at):
        ranges = {}
        for place, first in at.items():
            end = min(log.end(*place), first + rng.choice([0, 0, 1, rng.randrange(rows_max + 1), rows_max]))
            if end > first:
                ranges[place] = (first, end)
                at[place] = end
        behind = tuple(place for place in at if at[place] >= log.end(*place)) if idle and rng.random() < 0.3 else ()
        cuts.append(Cut(ranges, behind, NOW_US + len(cuts) * 1_000_000))
    return cuts


@dataclass
class Outcome:
    """What the steps gave."""

    steps: list[Step]
    late: set[Place]
    pipeline: Pipeline

    @property
    def bytes(self) -> list[bytes]:
        """Values of each step, in order."""
        return [to_bytes(step.rows) for step in self.steps]

    @property
    def watermark_us(self) -> int:
        """The last watermark."""
        found = self.steps[-1].watermark_us
        assert found is not None
        return found


def to_bytes(rows: pa.Table) -> bytes:
    """Returns the values of a table in order. Not Arrow's buffers: these have bytes that no value uses."""
    return repr((rows.schema, [column.to_pylist() for column in rows.columns])).encode()


def run(plan: JobPlan, log: Log, cuts: Sequence[Cut], spill: Path, *, restore_before: Collection[int] = ()) -> Outcome:
    """Steps through micro-batches; before those in `restore_before` a new pipeline takes over the state."""
    pipeline = open_pipeline(plan, spill)
    steps: list[Step] = []
    late: set[Place] = set()
    for number, cut in enumerate(cuts):
        if number in restore_before:
            state = pipeline.state()
            pipeline.close()
            pipeline = open_pipeline(plan, spill)
            pipeline.restore(state)
        inputs = {}
        for found in plan.inputs:
            ranges = {number: between for (topic, number), between in cut.ranges.items() if topic == found.topic}
            if ranges:
                inputs[found.name] = log.table(found.topic, ranges, found.columns)
        names = {found.topic: found.name for found in plan.inputs}
        idle = [(names[topic], number) for topic, number in cut.idle if topic in names]
        step = pipeline.step(inputs, idle=idle, now_us=cut.now_us)
        assert step.late.num_rows == step.late_rows
        late |= {(row["topic"], row["partition"], row["offset"]) for row in step.late.to_pylist()}
        steps.append(step)
    return Outcome(steps, late, pipeline)


def reference(
    sql: str, log: Log, tables: Mapping[str, TableDefinition], spill: Path, without: Collection[Place] = ()
) -> list[tuple[Any, ...]]:
    """Returns the rows of one bounded query over all records but those, sorted."""
    query = parse(sql)
    assert isinstance(query, Query)
    bound = bind(query, log.partitions, tables)
    duck = new_engine(spill)
    gone = set(without)
    try:
        for scan in bound.scans:
            ranges = {number: (0, log.end(scan.topic, number)) for number in range(log.partitions[scan.topic])}
            rows = log.table(scan.topic, ranges, [name for name in COLUMN_NAMES if name != "_key_bytes"])
            places = zip(rows["_partition"].to_pylist(), rows["_offset"].to_pylist(), strict=True)
            rows = rows.filter(pa.array([(scan.topic, *place) not in gone for place in places], pa.bool_()))
            duck.add_table(scan.name, rows)
        return in_order(duck.fetch(bound.sql))
    finally:
        duck.close()


def in_order(rows: pa.Table) -> list[tuple[Any, ...]]:
    """Returns rows as tuples, sorted."""
    return sorted(zip(*(column.to_pylist() for column in rows.columns), strict=True), key=_sortable)


def _sortable(row: tuple[Any, ...]) -> list[tuple[bool, str]]:
    return [(value is not None, repr(value)) for value in row]


def accumulated(outcome: Outcome, plan: JobPlan) -> list[tuple[Any, ...]]:
    """Returns the rows that the output stands for: all rows, or the changelog applied. A row that is taken away must
    have been there, and a key has one row at a time."""
    names = [name for name, _ in plan.output_columns]
    if not plan.is_changelog:
        return in_order(pa.concat_tables(step.rows for step in outcome.steps))
    there: dict[tuple[Any, ...], int] = {}
    for step in outcome.steps:
        assert step.rows.column_names == ["_op", *names]
        for op, *values in zip(*(column.to_pylist() for column in step.rows.columns), strict=True):
            row = tuple(map(_hashable, values))
            there[row] = there.get(row, 0) + op
            assert there[row] >= 0, f"{row} is taken away, and is not there"
        if plan.key_columns:
            places = [names.index(name) for name in plan.key_columns]
            keys = [tuple(row[at] for at in places) for row, count in there.items() for _ in range(count)]
            assert len(keys) == len(set(keys)), "a key with two rows"
    return sorted((row for row, count in there.items() for _ in range(count)), key=_sortable)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def check(
    statement: str,
    batch: str,
    log: Log,
    tables: Mapping[str, TableDefinition],
    cuts: Sequence[Cut],
    spill: Path,
    rng: random.Random,
    *,
    keep: Callable[[dict[str, Any], int], bool] | None = None,
) -> Outcome:
    """Holds a continuous query against a batch query over the rows that were not late, and against itself: run twice,
    and restored in between, it gives the same bytes. `keep`: rows of the batch query to compare with, given the last
    watermark in us, such as those of closed windows. Returns the outcome."""
    plan = plan_of(statement, log, tables)
    names = [name for name, _ in plan.output_columns]
    first = run(plan, log, cuts, spill)
    wanted = reference(batch, log, tables, spill, first.late)
    if keep is not None:
        wanted = [row for row in wanted if keep(dict(zip(names, row, strict=True)), first.watermark_us)]
    wanted = sorted((tuple(map(_hashable, row)) for row in wanted), key=_sortable)
    found = [tuple(map(_hashable, row)) for row in accumulated(first, plan)]
    assert found == wanted
    if plan.is_view:
        assert [tuple(map(_hashable, row)) for row in in_order(first.pipeline.view_table())] == wanted
    restore_before = rng.sample(range(1, len(cuts)), min(2, len(cuts) - 1)) if len(cuts) > 1 else []
    again = run(plan, log, cuts, spill, restore_before=restore_before)
    assert first.bytes == again.bytes
    assert [step.watermark_us for step in first.steps] == [step.watermark_us for step in again.steps]
    first.pipeline.close()
    again.pipeline.close()
    return first
