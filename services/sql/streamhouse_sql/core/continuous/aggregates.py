"""Aggregates that are kept up to date: each is split into parts that can be merged.

A part is computed over the rows of a micro-batch, and merged with the part that the state has. `FIRST` and `LAST` go by
event time; they, ARG_MIN and ARG_MAX take the row of the least input, partition and offset where rows are equal, so
that a result does not depend on how rows came in micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shproto.errors import InvalidStatement
from sqlglot import exp

from streamhouse_sql.core.continuous.model import INPUT, OFFSET, PARTITION, TIME, WEIGHT
from streamhouse_sql.core.continuous.names import written
from streamhouse_sql.core.dialect import Verbatim

# Other names of the same function.
_ALIASES = {
    "mean": "avg",
    "count_star": "count",
    "countif": "count_if",
    "first_value": "first",
    "last_value": "last",
    "min_by": "arg_min",
    "argmin": "arg_min",
    "max_by": "arg_max",
    "argmax": "arg_max",
    "approx_percentile": "approx_quantile",
    "var_samp": "variance",
    "stddev_samp": "stddev",
}
# Functions with the numbers of arguments that they take.
AGGREGATES: Mapping[str, tuple[int, ...]] = {
    "count": (0, 1),
    "count_if": (1,),
    "sum": (1,),
    "avg": (1,),
    "min": (1,),
    "max": (1,),
    "bool_and": (1,),
    "bool_or": (1,),
    "first": (1,),
    "last": (1,),
    "arg_min": (2,),
    "arg_max": (2,),
    "approx_count_distinct": (1,),
    "approx_quantile": (2,),
    "variance": (1,),
    "var_pop": (1,),
    "stddev": (1,),
    "stddev_pop": (1,),
}
# Those whose state DuckDB hands out and merges itself.
_STATES = {"avg", "approx_count_distinct", "approx_quantile", "variance", "var_pop", "stddev", "stddev_pop"}
# Of these a row can be taken away again.
RETRACTABLE = {"count", "sum", "avg", "min", "max", "bool_and", "bool_or"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """A call of an aggregate, its expressions resolved. `distinct`: of COUNT."""

    function: str
    arguments: tuple[str, ...]
    where: str
    distinct: bool

    @property
    def needs_values(self) -> bool:
        """True if a row can only be taken away where all values of the group are known."""
        return self.distinct or self.function in ("min", "max", "bool_and", "bool_or")

    @property
    def is_ordered(self) -> bool:
        """True for FIRST and LAST, which need the event time of each row."""
        return self.function in ("first", "last")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an aggregate. `partial`: expression over rows. `merge`: aggregate over partial values of `{}`. `both`:
    expression that merges two values, {o} of the state and {p} of the micro-batch, either of which may be NULL."""

    partial: str
    merge: str
    both: str


_SUM = "CASE WHEN {o} IS NULL THEN {p} WHEN {p} IS NULL THEN {o} ELSE {o} + {p} END"
_MIN = "CASE WHEN {o} IS NULL OR {p} < {o} THEN coalesce({p}, {o}) ELSE {o} END"
_MAX = "CASE WHEN {o} IS NULL OR {p} > {o} THEN coalesce({p}, {o}) ELSE {o} END"
_STATE = "CASE WHEN {o} IS NULL THEN {p} WHEN {p} IS NULL THEN {o} ELSE combine({o}, {p}) END"


def aggregate_of(node: exp.Expr) -> Aggregate | None:
    """Returns the aggregate that a resolved expression is, None if it is none. Raises InvalidStatement for a form that
    is not supported."""
    where = ""
    if isinstance(node, exp.Filter):
        condition = node.args["expression"]
        node, where = node.this, written(condition.this if isinstance(condition, exp.Where) else condition)
    if not isinstance(node, exp.Anonymous):
        return None
    name = _ALIASES.get(node.name.lower(), node.name.lower())
    if name not in AGGREGATES:
        return None
    arguments = list(node.expressions)
    distinct = False
    if len(arguments) == 1 and isinstance(arguments[0], exp.Distinct):
        distinct, arguments = True, list(arguments[0].expressions)
        if name in ("min", "max", "bool_and", "bool_or"):
            distinct = False  # it changes nothing
        elif name != "count" or len(arguments) != 1:
            raise InvalidStatement(
                f"{node.sql(Verbatim)} is not supported: DISTINCT is for COUNT of one expression", clause="DISTINCT"
            )
    if any(isinstance(argument, exp.Order) or argument.find(exp.Order) for argument in arguments):
        raise InvalidStatement(f"ORDER BY inside of {name} is not supported", clause="ORDER BY")
    if len(arguments) == 1 and isinstance(arguments[0], exp.Star) and name == "count":
        arguments = []
    if len(arguments) not in AGGREGATES[name]:
        raise InvalidStatement(
            f"{name} takes {' or '.join(map(str, AGGREGATES[name]))} arguments, {len(arguments)} are given", clause=name
        )
    if any(isinstance(argument, exp.Star) for argument in arguments):
        raise InvalidStatement(f"{name}(*) is not supported", clause=name)
    return Aggregate(
        function=name,
        arguments=tuple(written(argument) for argument in arguments),
        where=where,
        distinct=distinct,
    )


def has_aggregate(node: exp.Expr) -> bool:
    """True if an aggregate stands anywhere in the expression, other than with OVER."""
    return any(
        _ALIASES.get(call.name.lower(), call.name.lower()) in AGGREGATES and not isinstance(call.parent, exp.Window)
        for call in node.find_all(exp.Anonymous)
    )


def parts_of(call: Aggregate) -> Sequence[Part]:
    """Returns the parts of an aggregate over rows that are only ever added."""
    where = f" FILTER (WHERE {call.where})" if call.where else ""
    name, arguments = call.function, ", ".join(call.arguments)
    if name in ("count", "count_if"):
        return [Part(f"{name}({arguments or '*'}){where}::BIGINT", "sum({})::BIGINT", _SUM)]
    if name == "sum":
        return [Part(f"sum({arguments}){where}", "sum({})", _SUM)]
    if name in ("min", "bool_and"):
        return [Part(f"{name}({arguments}){where}", f"{name}({{}})", _MIN)]
    if name in ("max", "bool_or"):
        return [Part(f"{name}({arguments}){where}", f"{name}({{}})", _MAX)]
    if name in _STATES:
        return [Part(f"{name}({arguments}){where} EXPORT_STATE", "combine_aggr({})", _STATE)]
    place = f"'i': \"{INPUT}\", 'p': \"{PARTITION}\", 'o': \"{OFFSET}\""
    if name in ("first", "last"):
        order, least = f"{{'t': \"{TIME}\", {place}, 'x': {arguments}}}", name == "first"
        return [_extreme(order, where, least)]
    value, by = call.arguments
    known = f"({value}) IS NOT NULL AND ({by}) IS NOT NULL" + (f" AND ({call.where})" if call.where else "")
    where = f" FILTER (WHERE {known})"
    if name == "arg_max":
        place = f"'i': -\"{INPUT}\", 'p': -\"{PARTITION}\", 'o': -\"{OFFSET}\""
    return [_extreme(f"{{'y': {by}, {place}, 'x': {value}}}", where, name == "arg_min")]


def _extreme(order: str, where: str, least: bool) -> Part:
    name, both = ("min", _MIN) if least else ("max", _MAX)
    return Part(f"{name}({order}){where}", f"{name}({{}})", both)


def final_of(call: Aggregate, columns: Sequence[str]) -> str:
    """Returns the aggregate's value, as an expression over the columns of its parts."""
    if call.function == "count":
        return f"coalesce({columns[0]}, 0)"
    if call.function in _STATES:
        return f"finalize({columns[0]})"
    if call.function in ("first", "last", "arg_min", "arg_max"):
        return f"struct_extract({columns[0]}, 'x')"
    return columns[0]


# ---- over a changelog


def weighted_parts_of(call: Aggregate) -> Sequence[Part]:
    """Returns the parts of an aggregate over rows with weights, which may be taken away again. Raises
    InvalidStatement for an aggregate whose rows cannot be."""
    if call.needs_values:
        value = "count(*)" if call.distinct else f"{call.function}({call.arguments[0]})"
        # Replaced by what all values of the group give now; over rows it only has the type.
        return [Part(value, "any_value({})", "{p}")]
    if call.function not in RETRACTABLE:
        raise InvalidStatement(
            f"{call.function} over rows that may change is not supported; {', '.join(sorted(RETRACTABLE))} are",
            clause=call.function,
        )
    weight = f'"{WEIGHT}"'
    where = f" FILTER (WHERE {call.where})" if call.where else ""
    argument = call.arguments[0] if call.arguments else ""
    counted = f"CASE WHEN ({argument}) IS NULL THEN 0 ELSE {weight} END" if argument else weight
    count = Part(f"coalesce(sum({counted}){where}, 0)::BIGINT", "sum({})::BIGINT", _SUM)
    if call.function == "count":
        return [count]
    return [count, Part(f"sum(({argument}) * {weight}){where}", "sum({})", _SUM)]


def weighted_final_of(call: Aggregate, columns: Sequence[str]) -> str:
    """Returns the aggregate's value, as an expression over the columns of its weighted parts."""
    if call.function == "count":
        return f"coalesce({columns[0]}, 0)"
    if call.needs_values:
        return columns[0]
    value = f"CAST({columns[1]} AS DOUBLE) / {columns[0]}" if call.function == "avg" else columns[1]
    return f"CASE WHEN {columns[0]} > 0 THEN {value} END"
