"""Parameters of a query: `$1`, `$2`, … with a type each, and the values that take their place.

A parameter's type is the one that the client declared, else the one that the text gives it: its cast, or the operand
that it is compared or computed with; else VARCHAR. Values reach DuckDB as values, never as text of the statement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import sqlglot
from shproto.errors import InvalidStatement
from sqlglot import exp
from sqlglot.tokenizer_core import TokenType

from streamhouse_sql.core.columns import RECORD_COLUMNS
from streamhouse_sql.core.statement import DIALECT

Value = object
# As many as the PostgreSQL protocol can count.
PARAMETERS_MAX = 65_535
_COLUMN_TYPES = {column.name: column.type for column in RECORD_COLUMNS}
_TWO_SIDED = (exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Mod)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Values by parameter number, with the DuckDB type of each."""

    types: Mapping[int, str] = field(default_factory=dict)
    values: Mapping[int, Value] = field(default_factory=dict)

    def named(self) -> dict[str, Value]:
        """Returns the values under the names that `typed` gives the parameters."""
        return {f"p{number}": value for number, value in self.values.items()}


def numbers(tree: exp.Expr) -> list[int]:
    """Returns the numbers of the tree's parameters, ascending. Raises InvalidStatement for a parameter without a number
    from 1 to PARAMETERS_MAX."""
    found = set()
    for node in tree.find_all(exp.Placeholder, exp.Parameter):
        name = str(node.this or "")
        if not isinstance(node, exp.Placeholder) or not name.isdigit() or not 1 <= int(name) <= PARAMETERS_MAX:
            raise InvalidStatement(
                f"parameters are written $1, $2, …, $65535; found {node.sql(DIALECT)}", clause=node.sql(DIALECT)
            )
        found.add(int(name))
    return sorted(found)


def inferred(tree: exp.Expr, columns: Mapping[str, str] = _COLUMN_TYPES) -> dict[int, str]:
    """Returns the DuckDB type of each parameter, by its number, as the text gives it; "" if the text gives none.
    `columns`: the types of columns that the query may name, by name in small letters."""
    types: dict[int, str] = dict.fromkeys(numbers(tree), "")
    for node in tree.find_all(exp.Placeholder):
        number = int(str(node.this))
        types[number] = types[number] or _type_at(node, columns)
    return types


def _type_at(node: exp.Expr, columns: Mapping[str, str]) -> str:
    """Returns the type that an expression has to have by the place where it stands."""
    parent, child = node.parent, node
    if isinstance(parent, exp.Paren | exp.Neg):
        return _type_at(parent, columns)
    if isinstance(parent, exp.Cast):
        return parent.to.sql(DIALECT) if parent.this is child else ""
    if isinstance(parent, exp.Limit | exp.Offset):
        return "BIGINT"
    if isinstance(parent, _TWO_SIDED):
        left, right = parent.args["this"], parent.args["expression"]
        return _type_of(right if left is child else left, columns)
    if isinstance(parent, exp.Between | exp.In):
        return _type_of(parent.this, columns) if parent.this is not child else ""
    return ""


def _type_of(node: exp.Expr, columns: Mapping[str, str]) -> str:
    """Returns the DuckDB type of a simple expression: a record's column, a cast, a literal; else ""."""
    if isinstance(node, exp.Paren | exp.Neg):
        return _type_of(node.this, columns)
    if isinstance(node, exp.Column):
        return columns.get(node.name.lower(), "")
    if isinstance(node, exp.Cast):
        return node.to.sql(DIALECT)
    if isinstance(node, exp.Literal) and not node.is_string:
        return "BIGINT" if node.name.isdigit() else "DOUBLE"
    return ""


def parameter_edits(text: str, types: Mapping[int, str]) -> list[tuple[int, int, str]]:
    """Returns (start, end, replacement) of each parameter of a text: `$1` becomes `CAST($p1 AS type)`."""
    if not types:
        return []
    tokens = sqlglot.tokenize(text, dialect=DIALECT)
    return [
        (sign.start, number.end + 1, f"CAST($p{number.text} AS {types.get(int(number.text)) or 'VARCHAR'})")
        for sign, number in pairwise(tokens)
        if sign.token_type == TokenType.PARAMETER and number.start == sign.end + 1 and number.text.isdigit()
    ]


def unnamed_columns(tree: exp.Query) -> list[bool]:
    """Returns for each column that a SELECT names True if it is an expression of parameters without a name."""
    columns = tree.expressions if isinstance(tree, exp.Select) else []
    return [not isinstance(node, exp.Alias) and node.find(exp.Placeholder) is not None for node in columns]


def tables_named(tree: exp.Expr) -> set[str]:
    """Returns the names of tables in a query, in small letters."""
    return {table.name.lower() for table in tree.find_all(exp.Table)}


def typed(tree: exp.Query, types: Mapping[int, str]) -> exp.Query:
    """Returns a copy of the tree in which each parameter `$1` is `CAST($p1 AS type)`."""

    def replace(node: exp.Expr) -> exp.Expr:
        if not isinstance(node, exp.Placeholder):
            return node
        number = int(str(node.this))
        to = exp.DataType.build(types.get(number) or "VARCHAR", dialect=DIALECT)
        return exp.Cast(this=exp.Placeholder(this=f"p{number}"), to=to)

    changed = tree.transform(replace)
    assert isinstance(changed, exp.Query)
    return changed


def with_values(node: exp.Expr, parameters: Parameters) -> exp.Expr:
    """Returns a copy of an expression with the values of its parameters as literals, NULL for those without. For
    push-down, which decides about the ranges that are read; the query that runs has the parameters."""

    def replace(part: exp.Expr) -> exp.Expr:
        if not isinstance(part, exp.Placeholder):
            return part
        value = parameters.values.get(int(str(part.this).removeprefix("p")))
        if value is None:
            return exp.null()
        return exp.convert(value) if isinstance(value, int) else exp.Literal.string(str(value))

    return node.transform(replace)
