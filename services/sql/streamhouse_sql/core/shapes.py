"""Types of columns as trees, so that a schema of nested values can be cut down to what a table declares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shproto.errors import InvalidStatement
from sqlglot import exp

DEPTH_MAX = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """A type: `kind` is scalar, list, map or struct. `of`: of a list's items or a map's values."""

    kind: str
    of: Shape | None = None
    fields: tuple[tuple[str, Shape], ...] = ()

    def describe(self) -> str:
        """Returns the kind in words of SQL."""
        return {"scalar": "a type without fields", "list": "a list", "map": "a MAP", "struct": "a STRUCT"}[self.kind]


SCALAR = Shape("scalar")


def shape_of(type_: str, depth: int = 0) -> Shape:
    """Returns the shape of a DuckDB type. Raises InvalidStatement for a type that is nested too deeply, or is no type
    that a schema may have."""
    return _shape(exp.DataType.build(type_, dialect="duckdb"), depth)


def _shape(kind: exp.DataType, depth: int) -> Shape:
    if depth > DEPTH_MAX:
        raise InvalidStatement(f"a type is nested more than {DEPTH_MAX} levels deep")
    match kind.this:
        case exp.DType.ARRAY | exp.DType.LIST if kind.expressions:
            return Shape("list", of=_shape(kind.expressions[0], depth + 1))
        case exp.DType.MAP if len(kind.expressions) == 2:
            return Shape("map", of=_shape(kind.expressions[1], depth + 1))
        case exp.DType.STRUCT:
            return Shape("struct", fields=tuple(_fields(kind, depth)))
    return SCALAR


def _fields(kind: exp.DataType, depth: int) -> Iterator[tuple[str, Shape]]:
    for field in kind.expressions:
        if not isinstance(field, exp.ColumnDef) or field.args.get("kind") is None:
            raise InvalidStatement(f"{kind.sql('duckdb')}: a field needs a name and a type")
        yield field.name, _shape(field.args["kind"], depth + 1)
