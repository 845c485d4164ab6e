"""Pipelines: a continuous query, one micro-batch after the other, in an instance of DuckDB of its own.

Owns: the instance that it is given, its state tables, the watermarks. Does not own: the log, the journal, checkpoints.
Invariants: a step is one transaction: one that fails has changed nothing. The same plan, state and steps give the same
rows in the same order: an instance has one thread, and time, idleness and bounds come from the caller. All calls block;
`interrupt`, `view_table` and `lookup` may be called from another thread while a step runs, and see the last one that
was committed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from shproto.errors import DataLoss, InvalidArgument, InvalidStatement, StatementFailed, StreamHouseError

from streamhouse_sql.arrow import schema_of
from streamhouse_sql.core.continuous.build import Options
from streamhouse_sql.core.continuous.compile import Compiled, compiled
from streamhouse_sql.core.continuous.model import (
    AFTER_US,
    BEFORE_US,
    COMPILER,
    NOW_US,
    OFFSET,
    PARTITION,
    JobInput,
    JobPlan,
    SourceProgram,
)
from streamhouse_sql.core.continuous.options import options_of
from streamhouse_sql.core.continuous.plan import planned
from streamhouse_sql.core.continuous.statements import ContinuousQuery
from streamhouse_sql.core.continuous.watermark import Watermarks, crossed
from streamhouse_sql.core.quoting import literal, quoted
from streamhouse_sql.core.tables import TableDefinition, record_columns_of
from streamhouse_sql.decoding import decode_table
from streamhouse_sql.ports import Interrupted, JobEngine

# Before any watermark: below every event time.
_NO_WATERMARK = -(1 << 62)
# The state beside the operators' tables.
META = "meta"
_META_SCHEMA = pa.schema([pa.field("name", pa.string()), pa.field("number", pa.int64()), pa.field("value", pa.int64())])
_PLACES = pa.schema([pa.field("topic", pa.string()), pa.field("partition", pa.int32()), pa.field("offset", pa.int64())])
_BAD = _PLACES.append(pa.field("reason", pa.string()))
# Places of late and bad rows that a step tells; it counts all of them.
PLACES_MAX = 10_000
# State whose rows are only ever added is put together again once it has so many more of them than after the last time.
COMPACTION_ROWS_MIN = 10_000
# Steps after which the state is measured again, and put together where it has grown: a statement costs 1-2 ms. Their
# number is part of the state, so that the same steps put the same rows together.
SIZES_STEPS = 16
_STEPS = "steps"
# A fraction of the time to live: state is forgotten so much later at most, and is not scanned in every step.
EXPIRY_PART = 16
_BAD_ROW = re.compile(r"(?P<topic>.*)/(?P<partition>\d+): the value at offset (?P<offset>\d+) ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Result of a micro-batch.

    `rows`: the output columns; of a changelog the first column is `_op` (-1: the row is no longer there, +1: it is
    new). `late`, `bad`: places of rows that were left out (topic, partition, offset, and of bad ones the reason), at
    most PLACES_MAX. `state_rows`: by table, `state_bytes`: memory of the instance, both
    as they were at most SIZES_STEPS steps ago.
    """

    rows: pa.Table
    watermark_us: int | None
    late_rows: int
    bad_rows: int
    late: pa.Table
    bad: pa.Table
    state_rows: Mapping[str, int]
    state_bytes: int


def plan_job(
    statement: ContinuousQuery,
    topics: Mapping[str, int],
    tables: Mapping[str, TableDefinition],
    new_engine: Callable[[], JobEngine],
) -> JobPlan:
    """Returns the plan of a continuous query. `topics`: number of partitions by name; `tables`: declared tables by name
    in small letters; `new_engine` opens an instance, in which the plan is tried over no rows, so that an error of names
    or types is one of the statement. Raises InvalidStatement, which names the clause that is wrong or not supported.
    Blocks."""
    options = options_of(statement)
    node = planned(statement, topics, tables)
    program = compiled(node, topics, options)
    engine = new_engine()
    plan = _plan_of(program, options, engine.version)
    trial = Pipeline(plan, engine)
    try:
        return replace(plan, output_columns=tuple(trial.output_columns()))
    finally:
        trial.close()


def _plan_of(found: Compiled, options: Options, version: str) -> JobPlan:
    unbounded = [info for info in found.state if not info.is_bounded]
    warnings = [
        "the view keeps its whole result, which nothing bounds"
        if info.operator == "result"
        else f"{info.operator} keeps {info.holds}, which nothing bounds; WITH (state_ttl = '…') does"
        for info in unbounded
    ]
    return JobPlan(
        inputs=found.inputs,
        output_columns=tuple((name, "") for name in found.columns),
        key_columns=found.key,
        is_changelog=found.is_changelog,
        is_view=options.is_view,
        emit_on_close=options.emit_on_close,
        state=found.state,
        warnings=tuple(warnings),
        operators=found.operators,
        fingerprint=f"{found.fingerprint}-{COMPILER}-{version}",
        program=found.program,
    )


class Pipeline:
    """A continuous query that runs. Its caller steps through micro-batches, in one thread at a time. `engine`: an
    instance with one thread, which goes with the pipeline, also if this call fails."""

    def __init__(self, plan: JobPlan, engine: JobEngine) -> None:
        self._plan = plan
        self._program = plan.program
        self._inputs = {found.name: found for found in plan.inputs}
        self._engine = engine
        self._watermarks = Watermarks(
            {source.name: source.partitions for source in self._program.sources if source.watermark}
        )
        # Rows of states after they were last put together, and times of the last expiry: part of the state, since they
        # decide what the next step does.
        self._marks: dict[str, int] = {}
        self._empty = {name: _no_records(found) for name, found in self._inputs.items()}
        self._reader: JobEngine | None = None
        try:
            self._make_state()
        except BaseException:
            self._engine.close()
            raise
        self._state_rows = dict.fromkeys(self._program.states, 0)
        # True if the decoded inputs of the last step are still in their tables.
        self._has_rows = False
        # True while records may be readable in the place of those of the next step.
        self._is_read = False
        self._state_bytes = 0

    def _make_state(self) -> None:
        self._read({})
        numbers = _numbers(None, None, 0)
        for source in self._program.sources:
            if source.table:
                self._engine.run(f"CREATE OR REPLACE TEMP TABLE {source.table} AS {_with(source.decode, numbers)}")
        for op in self._program.ops:
            if op.at_start or op.guard is None:
                self._engine.run(_with(op.sql, numbers))
        self._none = self._engine.fetch(f"SELECT * FROM ({_with(self._program.output, numbers)}) LIMIT 0")

    def _read(self, inputs: Mapping[str, pa.Table]) -> None:
        """Makes the records of the inputs readable, those of binary formats decoded."""
        for source in self._program.sources:
            records = inputs.get(source.input, self._empty[source.input])
            if source.binary is not None:
                needed = record_columns_of(source.binary, source.fields, source.hidden)
                records = decode_table(source.binary, records.select(needed), source.fields)
            self._engine.add_table(source.raw, records)

    def output_columns(self) -> list[tuple[str, str]]:
        """Returns (name, DuckDB type) of the result's columns, without `_op`."""
        found = self._engine.columns(_with(self._program.output, _numbers(None, None, 0)))
        return found[1:] if self._plan.is_changelog else found

    # ---- steps

    def step(self, inputs: Mapping[str, pa.Table], *, idle: Collection[tuple[str, int]], now_us: int) -> Step:
        """Computes a micro-batch. `inputs`: records by input name, columns as JobInput.columns, sorted by partition and
        offset; an absent name stands for no records. `idle`: (input name, partition) that hold no watermark back.
        Returns the result's change.

        Raises StatementFailed, StatementLimit, DataLoss, Interrupted, after which the pipeline is as before the call.
        """
        self._check(inputs)
        if inputs or self._is_read:
            self._is_read = True
            self._read(inputs)
        has_rows = any(records.num_rows for records in inputs.values())
        try:
            self._engine.run("BEGIN")
            try:
                step, watermarks, marks, state_rows = self._computed(inputs, has_rows, idle, now_us)
                self._engine.run("COMMIT")
            except BaseException:
                self._engine.roll_back()
                raise
        except StatementFailed as error:
            raise _with_place(error) from error
        finally:
            # A late interrupt must not make a step fail that was committed; the next one tries again.
            with contextlib.suppress(StreamHouseError, Interrupted):
                if self._is_read:
                    self._read({})
                    self._is_read = False
        self._has_rows = has_rows
        self._watermarks, self._marks, self._state_rows = watermarks, marks, state_rows
        return step

    def _check(self, inputs: Mapping[str, pa.Table]) -> None:
        for name, records in inputs.items():
            found = self._inputs.get(name)
            if found is None:
                raise InvalidArgument(f"there is no input {name!r}", field="inputs", value=name)
            if tuple(records.column_names) != found.columns:
                raise InvalidArgument(
                    f"input {name} has columns {', '.join(records.column_names)}, needs {', '.join(found.columns)}",
                    field="inputs",
                    value=name,
                )

    def _computed(
        self, inputs: Mapping[str, pa.Table], has_rows: bool, idle: Collection[tuple[str, int]], now_us: int
    ) -> tuple[Step, Watermarks, dict[str, int], dict[str, int]]:
        before = self._watermarks.value
        seen: dict[tuple[str, int], int] = {}
        late: list[pa.Table] = []
        bad: list[pa.Table] = []
        numbers = _numbers(before, before, now_us)
        late_rows = bad_rows = 0
        for source in self._program.sources:
            if not source.table or not (has_rows or self._has_rows):
                continue  # the table is as empty as it was
            records = inputs.get(source.input)
            self._engine.run(f"CREATE OR REPLACE TEMP TABLE {source.table} AS {_with(source.decode, numbers)}")
            if records is None or not records.num_rows:
                continue
            if source.counts_bad_rows:
                count, places = self._bad(source, records.num_rows)
                bad_rows += count
                bad.append(places)
            if source.watermark:
                count, places = self._times(source, seen, before)
                late_rows += count
                late.append(places)
        resting = [
            (source.name, partition)
            for source in self._program.sources
            for name, partition in idle
            if name == source.input
        ]
        watermarks = self._watermarks.advanced(seen, resting)
        after = watermarks.value
        marks = dict(self._marks)
        rows: pa.Table | None = None
        state_rows = dict(self._state_rows)
        expired = self._expire(marks, now_us)
        if has_rows or after != before or expired:
            rows = self._run(_numbers(before, after, now_us), before, after)
            marks[_STEPS] = marks.get(_STEPS, 0) + 1
            if marks[_STEPS] % SIZES_STEPS == 1 or SIZES_STEPS == 1:
                state_rows, self._state_bytes = self._sizes()
                self._compact(marks, state_rows)
        if rows is None:
            rows = self._none
        step = Step(
            rows=rows,
            watermark_us=after,
            late_rows=late_rows,
            bad_rows=bad_rows,
            late=pa.concat_tables([_PLACES.empty_table(), *late]),
            bad=pa.concat_tables([_BAD.empty_table(), *bad]),
            state_rows=state_rows,
            state_bytes=self._state_bytes,
        )
        return step, watermarks, marks, state_rows

    def _run(self, numbers: Mapping[str, str], before: int | None, after: int | None) -> pa.Table | None:
        """Runs the program's statements. Returns the result's change, None for none."""

        def lets(guard: Any) -> bool:
            return guard is None or crossed(before, after, guard.step_us, guard.offset_us)

        filled = []
        for op in self._program.ops:
            if not op.at_start and lets(op.guard):
                self._engine.run(_with(op.sql, numbers))
                if op.fills:
                    filled.append(op.fills)
        rows = None
        if lets(self._program.output_guard):
            rows = self._engine.fetch(_with(self._program.output, numbers))
        for table in filled:
            self._engine.run(f"DELETE FROM {table}")
        return rows

    def _sizes(self) -> tuple[dict[str, int], int]:
        """Returns the rows of each state table, and the memory of the instance."""
        counts = "".join(f"(SELECT count(*) FROM {table}) AS {table}, " for table in self._program.states)
        memory = "(SELECT sum(memory_usage_bytes)::BIGINT FROM duckdb_memory()) AS memory"
        (row,) = self._engine.fetch(f"SELECT {counts}{memory}").to_pylist()
        size_bytes = row.pop("memory")
        return row, size_bytes

    def _bad(self, source: SourceProgram, records: int) -> tuple[int, pa.Table]:
        """Returns number and places of the records that the table's policy left out."""
        kept = int(
            self._engine.fetch(
                f"SELECT count(DISTINCT ({quoted(PARTITION)}, {quoted(OFFSET)})) AS n FROM {source.table}"
            )["n"][0].as_py()
        )
        if kept == records:
            return 0, _BAD.empty_table()
        places = self._engine.fetch(
            f'SELECT {literal(source.topic)} AS topic, "_partition" AS partition, "_offset" AS "offset", '
            f"'the value does not fit the columns of table {source.name}' AS reason FROM {source.raw} "
            f'ANTI JOIN {source.table} ON {quoted(PARTITION)} = "_partition" AND {quoted(OFFSET)} = "_offset" '
            f"ORDER BY ALL LIMIT {PLACES_MAX}"
        )
        return records - kept, places.cast(_BAD)

    def _times(
        self, source: SourceProgram, seen: dict[tuple[str, int], int], before: int | None
    ) -> tuple[int, pa.Table]:
        """Notes the watermarks that the rows give, and takes late rows away. Returns their number and places."""
        border = _NO_WATERMARK if before is None else before
        found = self._engine.fetch(
            f"SELECT {quoted(PARTITION)} AS p, max({source.watermark}) AS w, "
            f"count(*) FILTER (WHERE {source.time} < {border}) AS late FROM {source.table} GROUP BY p ORDER BY p"
        ).to_pylist()
        for row in found:
            if row["w"] is not None:
                seen[source.name, row["p"]] = row["w"]
        late = sum(row["late"] for row in found)
        if not late:
            return 0, _PLACES.empty_table()
        places = self._engine.fetch(
            f'SELECT {literal(source.topic)} AS topic, {quoted(PARTITION)} AS partition, {quoted(OFFSET)} AS "offset" '
            f"FROM {source.table} WHERE {source.time} < {border} ORDER BY ALL LIMIT {PLACES_MAX}"
        )
        self._engine.run(f"DELETE FROM {source.table} WHERE {source.time} < {border}")
        return late, places.cast(_PLACES)

    def _expire(self, marks: dict[str, int], now_us: int) -> bool:
        """Forgets state that was not changed for its time to live. Returns True if it looked."""
        looked = False
        for expiry in self._program.expiries:
            name = f"expired {expiry.table}"
            if now_us - marks.get(name, now_us - expiry.ttl_us) >= expiry.ttl_us // EXPIRY_PART:
                self._engine.run(f"DELETE FROM {expiry.table} WHERE {expiry.column} < {now_us - expiry.ttl_us}")
                for follow in expiry.follow:
                    self._engine.run(follow)
                marks[name] = now_us
                looked = True
        return looked

    def _compact(self, marks: dict[str, int], state_rows: dict[str, int]) -> None:
        """Puts the rows of states together that are only ever added."""
        for table, merged in self._program.compactions:
            name = f"compacted {table}"
            if state_rows[table] <= 2 * marks.get(name, 0) + COMPACTION_ROWS_MIN:
                continue
            self._engine.run(f"CREATE OR REPLACE TEMP TABLE compacted AS {merged}")
            self._engine.run(f"DELETE FROM {table}")
            self._engine.run(f"INSERT INTO {table} SELECT * FROM compacted")
            self._engine.run("DROP TABLE compacted")
            marks[name] = int(self._engine.fetch(f"SELECT count(*) AS n FROM {table}")["n"][0].as_py())
            state_rows[table] = marks[name]

    # ---- state

    def state(self) -> dict[str, pa.Table]:
        """Returns all that `restore` needs, by name of the state table."""
        found = {table: self._engine.fetch(f"SELECT * FROM {table}") for table in self._program.states}
        rows = [(f"watermark {source}", number, value) for source, number, value in self._watermarks.rows()]
        rows += [(name, 0, value) for name, value in sorted(self._marks.items())]
        columns = list(zip(*rows, strict=True))
        found[META] = pa.table([pa.array(column) for column in columns], names=_META_SCHEMA.names).cast(_META_SCHEMA)
        return found

    def restore(self, state: Mapping[str, pa.Table]) -> None:
        """Puts back what `state` returned, into a pipeline that has not stepped. Raises DataLoss, which names the
        table, for a state that is not of this plan; the pipeline has changed nothing then."""
        expected = {*self._program.states, META}
        if missing := sorted(expected - state.keys()):
            raise DataLoss(f"state table {missing[0]} is missing", table=missing[0])
        if unknown := sorted(state.keys() - expected):
            raise DataLoss(f"state table {unknown[0]} is not of this plan", table=unknown[0])
        rows_of_watermarks, marks = _meta(state[META])
        try:
            watermarks = self._watermarks.restored(rows_of_watermarks)
        except ValueError as error:
            raise DataLoss(f"state table {META}: {error}", table=META) from error
        rows: dict[str, int] = {}
        self._engine.run("BEGIN")
        try:
            for table in self._program.states:
                self._restore_table(table, state[table])
                rows[table] = state[table].num_rows
            self._engine.run("COMMIT")
        except BaseException:
            self._engine.roll_back()
            raise
        self._watermarks, self._marks, self._state_rows = watermarks, marks, rows

    def _restore_table(self, table: str, rows: pa.Table) -> None:
        wanted = self._engine.fetch(f"SELECT * FROM {table} LIMIT 0").schema
        if [field.name for field in wanted] != rows.column_names or [field.type for field in wanted] != [
            field.type for field in rows.schema
        ]:
            raise DataLoss(f"state table {table} has columns {rows.schema}, must have {wanted}", table=table)
        self._engine.add_table("restored", rows)
        try:
            self._engine.run(f"DELETE FROM {table}")
            self._engine.run(f"INSERT INTO {table} SELECT * FROM restored")
        except StreamHouseError as error:
            raise DataLoss(f"state table {table} cannot be restored: {error}", table=table) from error
        finally:
            self._engine.remove_table("restored")

    # ---- the view

    def view_table(self) -> pa.Table:
        """Returns the whole result of a view, as of the last step."""
        return self._second().fetch(self._view())

    def lookup(self, columns: Sequence[str], values: Sequence[object]) -> pa.Table:
        """Returns the rows of a view's result that have these values, as of the last step."""
        known = {name.lower(): name for name, _ in self._plan.output_columns}
        if not columns or len(columns) != len(values) or any(name.lower() not in known for name in columns):
            raise InvalidArgument(f"the view has no columns {', '.join(columns)}", field="columns", value=list(columns))
        where = " AND ".join(
            f"{quoted(known[name.lower()])} IS NOT DISTINCT FROM ${at}" for at, name in enumerate(columns, 1)
        )
        return self._second().fetch(f"SELECT * FROM ({self._view()}) WHERE {where}", values)

    def _view(self) -> str:
        if not self._program.view:
            raise InvalidStatement("the job keeps no result: it is no materialized view")
        return self._program.view

    def _second(self) -> JobEngine:
        if self._reader is None:
            self._reader = self._engine.cursor()
        return self._reader

    # ---- end

    def interrupt(self) -> None:
        """Ends the step that runs in another thread; it raises Interrupted there."""
        self._engine.interrupt()

    def close(self) -> None:
        """Gives memory and spill files back."""
        if self._reader is not None:
            self._reader.close()
        self._engine.close()


def _numbers(before: int | None, after: int | None, now_us: int) -> dict[str, str]:
    """Returns the numbers of a micro-batch by their names in programs."""
    return {
        NOW_US: str(now_us),
        BEFORE_US: str(_NO_WATERMARK if before is None else before),
        AFTER_US: str(_NO_WATERMARK if after is None else after),
    }


def _with(sql: str, numbers: Mapping[str, str]) -> str:
    for name, number in numbers.items():
        sql = sql.replace(name, number)
    return sql


def _no_records(found: JobInput) -> pa.Table:
    return schema_of(found.columns).empty_table()


def _with_place(error: StatementFailed) -> StatementFailed:
    """Returns the error with topic, partition and offset of a bad row as details."""
    place = _BAD_ROW.match(str(error))
    if place is None:
        return error
    return StatementFailed(
        str(error), topic=place["topic"], partition=int(place["partition"]), offset=int(place["offset"])
    )


def _meta(rows: pa.Table) -> tuple[list[tuple[str, int, int | None]], dict[str, int]]:
    if rows.schema != _META_SCHEMA:
        raise DataLoss(f"state table {META} has columns {rows.schema}, must have {_META_SCHEMA}", table=META)
    watermarks: list[tuple[str, int, int | None]] = []
    marks: dict[str, int] = {}
    for row in rows.to_pylist():
        name, number, value = row["name"], row["number"], row["value"]
        if name is None or number is None:
            raise DataLoss(f"state table {META} has a row without a name", table=META)
        if name.startswith("watermark "):
            watermarks.append((name.removeprefix("watermark "), number, value))
        elif value is None:
            raise DataLoss(f"state table {META}: {name} has no value", table=META)
        else:
            marks[name] = value
    return watermarks, marks
