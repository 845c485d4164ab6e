"""Names and expressions of continuous queries: columns are looked up, functions checked, the time is the journal's.

An expression is written again from its tree under the names that columns have inside of a program. Every kind of node
is on a list here: one that is not, is refused by name, since its meaning may not survive the writing, as that of `~`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shproto.errors import InvalidStatement
from sqlglot import exp

from streamhouse_sql.core.binding import REFUSED_FUNCTIONS, REFUSED_PREFIXES
from streamhouse_sql.core.continuous.model import MARK, NOW_US
from streamhouse_sql.core.dialect import Verbatim

_ALLOWED = (
    exp.Add, exp.Alias, exp.And, exp.Anonymous, exp.Array, exp.AtTimeZone, exp.Between, exp.Boolean, exp.Bracket,
    exp.Case, exp.Cast, exp.Coalesce, exp.Column, exp.ColumnDef, exp.CurrentDate, exp.CurrentTimestamp, exp.DPipe,
    exp.DataType, exp.DataTypeParam, exp.Distinct, exp.Div, exp.Dot, exp.EQ, exp.Escape, exp.Extract, exp.Filter,
    exp.GT, exp.GTE, exp.ILike, exp.Identifier, exp.If, exp.In, exp.IntDiv, exp.Interval, exp.Is, exp.JSONExtract,
    exp.JSONExtractScalar, exp.LT, exp.LTE, exp.Lambda, exp.Like, exp.Literal, exp.Mod, exp.Mul, exp.NEQ, exp.Neg,
    exp.Not, exp.Null, exp.NullSafeEQ, exp.NullSafeNEQ, exp.Or, exp.Order, exp.Ordered, exp.Paren, exp.PropertyEQ,
    exp.Slice, exp.Star, exp.Struct, exp.Sub, exp.Substring, exp.Trim, exp.TryCast, exp.Tuple, exp.Var, exp.Where,
)  # fmt: skip
# A micro-batch that is run again has to give the same rows.
VOLATILE = {
    "random", "setseed", "uuid", "gen_random_uuid", "uuidv4", "uuidv7", "nextval", "currval", "setval", "current_query",
    "current_query_id", "current_connection_id", "current_transaction_id", "txid_current", "current_database",
    "current_schema", "current_schemas", "current_setting", "getvariable", "in_search_path", "sleep_ms", "stats",
    "vector_type", "version", "pg_backend_pid", "get_current_time", "current_localtime", "current_localtimestamp",
    "localtime", "localtimestamp", "current_time", "current_user", "current_role", "session_user",
}  # fmt: skip
_NOW = {"now", "current_timestamp", "transaction_timestamp", "get_current_timestamp"}
_TODAY = {"today", "current_date"}
# DuckDB's aggregates beside those that aggregates.py knows: their result cannot be kept up to date from row to row.
OTHER_AGGREGATES = {
    "any_value", "approx_top_k", "arbitrary", "arg_max_null", "arg_max_nulls_last", "arg_min_null",
    "arg_min_nulls_last", "array_agg", "bitstring_agg", "combine_aggr", "corr", "covar_pop", "covar_samp",
    "decimal_average", "entropy", "favg", "fsum", "group_concat", "histogram", "histogram_exact", "kahan_sum",
    "kurtosis", "kurtosis_pop", "list", "listagg", "lttb", "mad", "median", "mode", "percentile_cont",
    "percentile_disc", "product", "quantile", "quantile_cont", "quantile_disc", "regr_avgx", "regr_avgy", "regr_count",
    "regr_intercept", "regr_r2", "regr_slope", "regr_sxx", "regr_sxy", "regr_syy", "reservoir_quantile", "sem",
    "skewness", "string_agg", "sum_no_overflow", "sumkahan", "variant_group_object",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scope:
    """Columns that an expression may name. `tables`: (alias, {name in small letters: name inside of the program});
    `aliases`: of the SELECT's own columns, by name in small letters."""

    tables: Sequence[tuple[str, Mapping[str, str]]]
    aliases: Mapping[str, exp.Expr] = field(default_factory=dict)

    def inner(self, parts: Sequence[str]) -> tuple[str, Sequence[str]] | None:
        """Returns the column's name inside of the program and the fields behind it, None for an unknown name. Raises
        InvalidStatement for a name that more than one table has."""
        names = [part.lower() for part in parts]
        for alias, columns in self.tables:
            if len(names) > 1 and alias.lower() == names[0] and names[1] in columns:
                return columns[names[1]], parts[2:]
        found = [columns[names[0]] for _, columns in self.tables if names[0] in columns]
        if len(found) > 1:
            raise InvalidStatement(f"column {parts[0]} is ambiguous: more than one table has it", clause=parts[0])
        return (found[0], parts[1:]) if found else None

    def nearest(self, name: str) -> str:
        """Returns a hint with the nearest name, empty without one."""
        names = {inner.lower(): inner for _, columns in self.tables for inner in columns}
        names |= {alias: alias for alias in self.aliases}
        nearest = difflib.get_close_matches(name.lower(), list(names), 1)
        return f"; did you mean {nearest[0]!r}?" if nearest else ""


def resolved(node: exp.Expr, scope: Scope) -> exp.Expr:
    """Returns a copy of an expression with names of the program, checked. Raises InvalidStatement."""
    return _resolved(node, scope, ())


def written(node: exp.Expr) -> str:
    """Returns a resolved expression as DuckDB's SQL."""
    return node.sql(Verbatim)


def _resolved(node: exp.Expr, scope: Scope, within: tuple[str, ...]) -> exp.Expr:
    lambdas = {
        name.name.lower() for found in node.find_all(exp.Lambda) for name in found.expressions
    }  # parameters, which are no columns

    def replace(part: exp.Expr) -> exp.Expr:
        if isinstance(part, exp.Column):
            return _column(part, scope, within, lambdas)
        if isinstance(part, exp.CurrentTimestamp):
            return _now()
        if isinstance(part, exp.CurrentDate):
            return exp.cast(_now(), "DATE")
        if isinstance(part, exp.Anonymous):
            return _function(part)
        _check(part)
        return part

    return node.transform(replace)


def _column(node: exp.Column, scope: Scope, within: tuple[str, ...], lambdas: set[str]) -> exp.Expr:
    parts = [part.name for part in node.parts]
    if isinstance(node.this, exp.Star):
        raise InvalidStatement(f"{node.sql(Verbatim)} is not supported in this place", clause="*")
    if parts[0].lower() in lambdas:
        return node
    found = scope.inner(parts)
    if found is None and len(parts) == 1 and not node.this.quoted and parts[0].lower() in _NOW:
        return _now()  # current_timestamp, which is written without parentheses
    if found is None and parts[0].lower() in scope.aliases:
        alias = parts[0].lower()
        if alias in within:
            raise InvalidStatement(f"column {parts[0]} is defined by itself", clause=parts[0])
        inner: exp.Expr = exp.Paren(this=_resolved(scope.aliases[alias], scope, (*within, alias)))
        return _with_fields(inner, parts[1:])
    if found is None:
        name = ".".join(parts)
        at = _at(node.parts[0])
        place = f"line {at['line']}, column {at['column']}: " if at else ""
        raise InvalidStatement(f"{place}there is no column {name!r}{scope.nearest(parts[-1])}", clause=name, **at)
    column = exp.Column(this=exp.to_identifier(found[0], quoted=True))
    return _with_fields(column, found[1])


def _with_fields(node: exp.Expr, fields: Sequence[str]) -> exp.Expr:
    for name in fields:
        node = exp.Dot(this=node, expression=exp.to_identifier(name, quoted=True))
    return node


def _at(node: exp.Expr) -> dict[str, int]:
    line, end = node.meta.get("line"), node.meta.get("col")
    if not isinstance(line, int) or not isinstance(end, int):
        return {}
    return {"line": line, "column": max(1, end - (node.meta.get("end", 0) - node.meta.get("start", 0)))}


def _now() -> exp.Expr:
    return exp.Anonymous(this="make_timestamptz", expressions=[exp.Var(this=NOW_US)])


def _function(node: exp.Anonymous) -> exp.Expr:
    name = node.name.lower()
    if name in _NOW:
        return _now()
    if name in _TODAY:
        return exp.cast(_now(), "DATE")
    if name in VOLATILE:
        raise InvalidStatement(
            f"{name}() is not supported in a continuous query: a micro-batch that is run again must give the same rows",
            clause=name,
        )
    if name in REFUSED_FUNCTIONS or name.startswith(REFUSED_PREFIXES) or name == "error":
        raise InvalidStatement(f"the function {name} is not supported", clause=name)
    if name in OTHER_AGGREGATES:
        raise InvalidStatement(f"the aggregate {name} is not supported in a continuous query", clause=name)
    return node


def _check(node: exp.Expr) -> None:
    if isinstance(node, exp.Window):
        raise InvalidStatement(
            "OVER is supported for row_number() in a top-n only: … QUALIFY row_number() OVER (PARTITION BY … ORDER BY "
            "…) <= n",
            clause="OVER",
        )
    if isinstance(node, exp.Query):
        raise InvalidStatement("a subquery is not supported in this place of a continuous query", clause="subquery")
    if isinstance(node, exp.DataType) and node.this == exp.DType.VARIANT:
        raise InvalidStatement("the type VARIANT is not supported", clause="VARIANT")
    if not isinstance(node, _ALLOWED):
        shown = node.sql(Verbatim)[:100]
        raise InvalidStatement(
            f"{shown} ({node.key.upper()}) is not supported in a continuous query", clause=node.key.upper()
        )


def check_marks(text: str) -> None:
    """Refuses a statement with the sign that programs have for their own numbers."""
    if MARK in text:
        raise InvalidStatement(f"the sign U+{ord(MARK):04X} is not supported in a statement")


def conjuncts(condition: exp.Expr | None) -> Iterator[exp.Expr]:
    """Yields the parts of a condition that all have to be true."""
    parts = [condition] if condition is not None else []
    while parts:
        part = parts.pop(0)
        if isinstance(part, exp.Paren):
            parts.insert(0, part.this)
        elif isinstance(part, exp.And):
            parts[:0] = [part.args["this"], part.args["expression"]]
        else:
            yield part
