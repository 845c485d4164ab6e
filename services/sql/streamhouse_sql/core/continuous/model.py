"""Plans of continuous queries, as the worker and EXPLAIN see them, and the programs that a pipeline runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamhouse_sql.core.tables import TableColumn, TableDefinition

# Columns of ours beside those of a relation; no column of a user's can have such a name.
WEIGHT = "#w"  # +1: the row is new, -1: it is no longer there
PARTITION = "#p"
OFFSET = "#o"
INPUT = "#i"
TIME = "#t"  # event time in us, for FIRST and LAST
# Names in the text of programs, in place of which each micro-batch has its numbers. The signs are of no use elsewhere:
# statements with them are refused.
MARK = "\ue000"
NOW_US = f"{MARK}now{MARK}"
BEFORE_US = f"{MARK}before{MARK}"  # the watermark before the micro-batch
AFTER_US = f"{MARK}after{MARK}"  # and after it
# Version of the compiler: programs of different versions may give different rows for the same text.
COMPILER = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInput:
    """A topic that a job reads. `columns`: the parts of the record that it needs."""

    name: str
    topic: str
    columns: tuple[str, ...]
    has_watermark: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StateInfo:
    """State of an operator. `bound`: what bounds it; empty if nothing does. `grows_with`: what it has a row for."""

    table: str
    operator: str
    holds: str
    bound: str

    @property
    def is_bounded(self) -> bool:
        """True if time bounds the state, not only the number of distinct keys."""
        return bool(self.bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Condition of a statement: the watermark reaches the next multiple of a step."""

    step_us: int
    offset_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """A statement of a program. `at_start`: it runs once, to make a table; else in each micro-batch, if its guard
    lets it. `clears`: the table of this micro-batch that it fills, which is empty where it does not run."""

    sql: str
    at_start: bool = False
    guard: Guard | None = None
    fills: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceProgram:
    """Decoding of an input for a table. `decode`: a SELECT over `raw`, the records; None of its rows is left out but
    bad ones. `table`: the table of this micro-batch it is put into, empty if it is part of other statements.
    `watermark`: expression of the watermark that a row gives, `time`: of its event time; both in us, empty without.
    `binary`: the table whose `fields` are decoded before the engine sees them, beside the record's `hidden` parts."""

    name: str
    input: str
    raw: str
    topic: str
    decode: str
    table: str = ""
    watermark: str = ""
    time: str = ""
    counts_bad_rows: bool = False
    partitions: int = 0
    binary: TableDefinition | None = None
    fields: tuple[TableColumn, ...] = ()
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Expiry:
    """State that is forgotten after a time without a change. `column`: when a row changed last, in us. `follow`:
    statements that forget what belongs to it."""

    table: str
    column: str
    ttl_us: int
    follow: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Statements of a micro-batch, in order. `output`: a SELECT of the result's change. `states`: the tables that a
    checkpoint has. `view`: a SELECT of the whole result, empty if none is kept. `compactions`: see pipeline.py."""

    sources: tuple[SourceProgram, ...]
    ops: tuple[Op, ...]
    output: str
    output_guard: Guard | None
    states: tuple[str, ...]
    view: str
    expiries: tuple[Expiry, ...] = ()
    compactions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """A continuous query, ready to run.

    `output_columns`: (name, DuckDB type). `key_columns`: those of the result that identify a row; () without. `bounds`
    of the state are for EXPLAIN and warnings. `fingerprint` changes where the same input could give other rows.
    """

    inputs: tuple[JobInput, ...]
    output_columns: tuple[tuple[str, str], ...]
    key_columns: tuple[str, ...]
    is_changelog: bool
    is_view: bool
    emit_on_close: bool
    state: tuple[StateInfo, ...]
    warnings: tuple[str, ...]
    operators: tuple[str, ...]
    fingerprint: str
    program: Program = field(repr=False)
