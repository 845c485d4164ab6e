"""A query of Nexmark in the engine alone: decoded record batches in memory, micro-batch by micro-batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from shruntime.memory import MIB
from streamhouse_sql.adapters.duck import Duck, DuckLimits
from streamhouse_sql.arrow import schema_of
from streamhouse_sql.core.continuous.model import JobPlan
from streamhouse_sql.core.continuous.statements import ContinuousQuery, parse_job_statement
from streamhouse_sql.core.statement import CreateTable, parse
from streamhouse_sql.core.tables import TableDefinition
from streamhouse_sql.pipeline import Pipeline, plan_job

from bench.nexmark.generator import KINDS, START_MS, Nexmark, json_values, side_input
from bench.nexmark.queries import TOPICS, declarations, statement

MEMORY_BYTES = 1024 * MIB
_SECOND_US = 1_000_000


def plan_of(name: str, spill: Path) -> JobPlan:
    """Returns the plan of a query over topics of one partition. Raises InvalidStatement if it cannot be run."""
    query = parse_job_statement(statement(name))
    assert isinstance(query, ContinuousQuery)
    tables: dict[str, TableDefinition] = {}
    for text in declarations():
        declared = parse(text)
        assert isinstance(declared, CreateTable)
        tables[declared.definition.name.lower()] = declared.definition
    return plan_job(query, dict.fromkeys(TOPICS, 1), tables, partial(_engine, spill))


def _engine(spill: Path) -> Duck:
    return Duck(DuckLimits(memory_bytes_max=MEMORY_BYTES, temp_dir=spill, temp_bytes_max=0, threads=1))


def records(nexmark: Nexmark, events: int) -> list[dict[str, pa.Table]]:
    """Returns the records of each micro-batch by topic: those of a block of events each."""
    blocks = [
        dict(zip(KINDS, tables, strict=True))
        for tables in zip(*(nexmark.blocks(kind, events) for kind in KINDS), strict=True)
    ]
    offsets = dict.fromkeys(TOPICS, 0)
    found = []
    for number, block in enumerate(blocks):
        rows = {**block, **({"side_input": side_input()} if number == 0 else {})}
        found.append({topic: _as_records(table, offsets[topic]) for topic, table in rows.items()})
        for topic, table in rows.items():
            offsets[topic] += table.num_rows
    return found


def _as_records(rows: pa.Table, first: int) -> pa.Table:
    """Returns the rows as JSON records, whose timestamp is the event's time."""
    values = json_values(rows)
    count = rows.num_rows
    times = rows["dateTime"].combine_chunks() if "dateTime" in rows.column_names else pa.array([START_MS] * count)
    columns = {
        "_value": values.cast(pa.string()),
        "_value_bytes": values,
        "_partition": pa.array([0] * count, pa.int32()),
        "_offset": pa.array(range(first, first + count), pa.int64()),
        "_timestamp": times.cast(pa.int64()).cast(pa.timestamp("ms", "UTC")).cast(pa.timestamp("us", "UTC")),
        "_key": pa.nulls(count, pa.string()),
    }
    return pa.table(columns)


@dataclass
class Figures:
    """CPU and elapsed seconds of all micro-batches, records read and rows given out, CPU seconds by statement."""

    cpu_s: float = 0.0
    seconds: float = 0.0
    records: int = 0
    rows: int = 0
    statements: dict[str, float] = field(default_factory=dict)

    def costliest(self, count: int) -> Iterator[tuple[str, float]]:
        """Yields statements and their CPU seconds, those that cost most first."""
        yield from sorted(self.statements.items(), key=lambda item: -item[1])[:count]


def run_query(name: str, blocks: Sequence[Mapping[str, pa.Table]], spill: Path, *, profile: bool = False) -> Figures:
    """Steps a pipeline through the micro-batches. With `profile` also measures each statement."""
    plan = plan_of(name, spill)
    figures = Figures()
    engine: Any = _engine(spill)
    if profile:
        engine = _Timed(engine, figures.statements)
    pipeline = Pipeline(plan, engine)
    try:
        for number, block in enumerate(blocks):
            inputs = {
                found.name: block[found.topic].select(list(found.columns)).cast(schema_of(found.columns))
                for found in plan.inputs
                if found.topic in block
            }
            cpu_s, began_s = time.process_time(), time.perf_counter()
            step = pipeline.step(inputs, idle=(), now_us=START_MS * 1_000 + number * _SECOND_US)
            figures.cpu_s += time.process_time() - cpu_s
            figures.seconds += time.perf_counter() - began_s
            figures.records += sum(table.num_rows for table in inputs.values())
            figures.rows += step.rows.num_rows
    finally:
        pipeline.close()
    return figures


class _Timed:
    """An engine that notes the CPU seconds of its statements."""

    def __init__(self, engine: Duck, statements: dict[str, float]) -> None:
        self._engine = engine
        self._statements = statements

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, sql: str, *arguments: Any) -> Any:
        return self._timed(self._engine.run, sql, *arguments)

    def fetch(self, sql: str, *arguments: Any) -> Any:
        return self._timed(self._engine.fetch, sql, *arguments)

    def _timed(self, call: Callable[..., Any], sql: str, *arguments: Any) -> Any:
        began_s = time.process_time()
        try:
            return call(sql, *arguments)
        finally:
            # Numbers of a micro-batch stand in its text.
            text = "".join(sign for sign in sql[:400] if not sign.isdigit())
            self._statements[text] = self._statements.get(text, 0.0) + time.process_time() - began_s
