"""Parts of a program while it is written: changes of relations, statements, state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from streamhouse_sql.core.continuous.model import WEIGHT, Expiry, Guard, Op, StateInfo
from streamhouse_sql.core.quoting import quoted

NOTHING_BOUNDS = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a compilation. `ttl_us`: 0 without. `is_view`: the result is kept. `renamed`: names of the columns."""

    emit_on_close: bool
    is_view: bool
    ttl_us: int
    renamed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """The change of a node's rows. `sql`: a SELECT of `columns`, the `hidden` ones, and the weight of a changelog.
    `key`: columns that identify a row, None if none do. `guard`: the change is empty in micro-batches that it does not
    let run. `sort`: columns that come first in the order of the result. `is_ordered`: rows come in the order of the
    records. `windows`: the window's name of columns that are of the window that has ended. `is_final`: all rows are of
    windows that have ended. `has_places`: the hidden place in the log is of one row only."""

    sql: str
    columns: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    is_changelog: bool = False
    key: tuple[str, ...] | None = None
    guard: Guard | None = None
    sort: tuple[str, ...] = ()
    is_ordered: bool = False
    windows: Mapping[str, str] = field(default_factory=dict)
    is_final: bool = False
    has_places: bool = False

    def all_columns(self) -> list[str]:
        """Returns the names of all columns, those of ours behind the node's."""
        return [*self.columns, *self.hidden, *((WEIGHT,) if self.is_changelog else ())]


@dataclass(slots=True, kw_only=True)
class Builder:
    """Collects the statements of a program, in order."""

    options: Options
    ops: list[Op] = field(default_factory=list)
    states: list[StateInfo] = field(default_factory=list)
    compactions: list[tuple[str, str]] = field(default_factory=list)
    expiries: list[Expiry] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    number: int = 0

    def new(self, kind: str) -> str:
        """Returns the name of a table."""
        self.number += 1
        return f"{kind}_{self.number - 1}"

    def make(self, table: str, sql: str, guard: Guard | None = None) -> None:
        """Makes a table of this micro-batch. With a guard it is made once, filled when the guard lets it, and emptied
        behind the micro-batch."""
        if guard is None:
            self.ops.append(Op(sql=f"CREATE OR REPLACE TEMP TABLE {table} AS {sql}"))
            return
        self.ops.append(Op(sql=f"CREATE TEMP TABLE {table} AS SELECT * FROM ({sql}) LIMIT 0", at_start=True))
        self.ops.append(Op(sql=f"INSERT INTO {table} {sql}", guard=guard, fills=table))

    def kept(self, relation: Relation) -> Relation:
        """Returns the same change, computed once in a micro-batch."""
        table = self.new("d")
        self.make(table, relation.sql, relation.guard)
        return replace(relation, sql=f"SELECT * FROM {table}")

    def state(self, sql: str, *, operator: str, holds: str, bound: str) -> str:
        """Makes a state table with the columns of a SELECT. Returns its name."""
        table = self.new("s")
        self.ops.append(Op(sql=f"CREATE TABLE {table} AS SELECT * FROM ({sql}) LIMIT 0", at_start=True))
        self.states.append(StateInfo(table=table, operator=operator, holds=holds, bound=bound))
        return table

    def do(self, sql: str, guard: Guard | None = None) -> None:
        """Adds a statement of each micro-batch."""
        # Without a guard it also runs over no rows when the pipeline is opened, and changes nothing there.
        self.ops.append(Op(sql=sql, guard=guard))

    def ttl_bound(self) -> str:
        """Returns what bounds state that is forgotten when it does not change."""
        return f"state_ttl of {duration(self.options.ttl_us)}" if self.options.ttl_us else NOTHING_BOUNDS


def duration(length_us: int) -> str:
    """Returns a length of time in words."""
    for name, unit_us in (
        ("day", 86_400_000_000),
        ("hour", 3_600_000_000),
        ("minute", 60_000_000),
        ("second", 1_000_000),
    ):
        if length_us % unit_us == 0:
            count = length_us // unit_us
            return f"{count} {name}" + ("s" if count != 1 else "")
    return f"{length_us / 1000:g} ms"


def same(left: str, right: str, columns: Sequence[str]) -> str:
    """Returns the condition that rows of two tables have the same values, NULLs included; true without columns."""
    return " AND ".join(f"{left}.{quoted(c)} IS NOT DISTINCT FROM {right}.{quoted(c)}" for c in columns) or "true"


def listed(columns: Sequence[str], table: str = "") -> str:
    """Returns columns as the terms of a SELECT."""
    return ", ".join((f"{table}." if table else "") + quoted(column) for column in columns)


def differences(before: str, after: str) -> str:
    """Returns the rows that are in one of two results and not in the other, each with its weight: -1 for one that was
    there before, 1 for one that is there now."""
    weight = quoted(WEIGHT)
    return (
        f"SELECT *, -1 AS {weight} FROM (({before}) EXCEPT ALL ({after})) UNION ALL "
        f"SELECT *, 1 AS {weight} FROM (({after}) EXCEPT ALL ({before}))"
    )


def kept_result(builder: Builder, change: Relation) -> str:
    """Keeps the result of a view that no other state has. Returns a SELECT of it."""
    shown = listed(change.columns)
    table = builder.new("s")
    weight = quoted(WEIGHT)
    if change.is_changelog and change.key is None:
        # Rows that are no longer there stay beside those that were, until both are put together.
        builder.ops.append(
            Op(sql=f"CREATE TABLE {table} AS SELECT {shown}, {weight} FROM ({change.sql}) LIMIT 0", at_start=True)
        )
        builder.do(f"INSERT INTO {table} SELECT {shown}, {weight} FROM ({change.sql})")
        total = (
            f"SELECT {shown}, sum({weight})::INTEGER AS {weight} FROM {table} GROUP BY {shown} "
            f"HAVING sum({weight}) <> 0"
        )
        builder.compactions.append((table, total))
        view = f"SELECT {shown} FROM (SELECT *, unnest(range({weight})) FROM ({total}))"
    else:
        builder.ops.append(Op(sql=f"CREATE TABLE {table} AS SELECT {shown} FROM ({change.sql}) LIMIT 0", at_start=True))
        new = ""
        if change.is_changelog and change.key is not None:
            gone = f"SELECT 1 FROM ({change.sql}) AS d WHERE d.{weight} < 0 AND {same('v', 'd', change.key)}"
            builder.do(f"DELETE FROM {table} AS v WHERE EXISTS ({gone})")
            new = f" WHERE {weight} > 0"
        builder.do(f"INSERT INTO {table} SELECT {shown} FROM ({change.sql}){new}", change.guard)
        view = f"SELECT {shown} FROM {table}"
    builder.states.append(StateInfo(table=table, operator="result", holds="the rows of the view", bound=NOTHING_BOUNDS))
    return view
