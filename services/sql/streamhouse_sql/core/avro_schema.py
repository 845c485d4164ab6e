"""Avro schemas, and the part of one that a table declares.

Terms: a type is a node of the schema, a named one may be inside of itself. `min_bytes` is the least that a value of the
type takes; an array whose items may take none has no bound on their number, and is refused.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shproto.errors import InvalidStatement

from streamhouse_sql.core.shapes import Shape

OPTIONS = ("schema",)
PRIMITIVES = ("null", "boolean", "int", "long", "float", "double", "bytes", "string")
FIXED_SIZES = {"boolean": 1, "float": 4, "double": 8}
# Schema and values may be nested so deeply; a value that goes deeper is bad.
DEPTH_MAX = 64
FIXED_BYTES_MAX = 1 << 20
DECIMAL_DIGITS_MAX = 38


@dataclass(eq=False, slots=True, kw_only=True)
class AvroType:
    """A type. `parts`: a record's fields by name, the branches of a union, an array's items, key and value of a map's
    entry. `symbols`: of an enumeration. `size_bytes`: of fixed, and of others that have always the same."""

    kind: str
    name: str = ""
    logical: str = ""
    scale: int = 0
    size_bytes: int = 0
    symbols: tuple[str, ...] = ()
    parts: list[tuple[str, AvroType]] = field(default_factory=list)
    min_bytes: int = 1

    def describe(self) -> str:
        """Returns the type in words of a schema."""
        return self.name or self.kind


@dataclass(frozen=True, slots=True)
class AvroSchema:
    """Schema of a table's values: its JSON text."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A type of which values become a column. `type` is no union: where there is one around it, `branch` is its
    branch that is not NULL. `parts`: of the type's parts, in their order; None for a part that is skipped."""

    type: AvroType
    parts: tuple[Wanted | None, ...] = ()
    branch: int | None = None
    branches: int = 0


def avro_schema(given: dict[str, str]) -> AvroSchema:
    """Returns the schema of the options of WITH. Raises InvalidStatement."""
    if not given.get("schema"):
        raise InvalidStatement("format avro needs schema = '…', the schema's JSON", clause="schema")
    schema = AvroSchema(given["schema"])
    parsed(schema)
    return schema


def parsed(schema: AvroSchema) -> AvroType:
    """Returns the record that values are. Raises InvalidStatement."""
    try:
        tree = json.loads(schema.text)
    except (ValueError, RecursionError) as error:
        raise InvalidStatement(f"schema is no JSON: {error}", clause="schema") from error
    parser = _Parser()
    found = parser.type(tree, "", 0)
    for items in parser.items:
        if items.min_bytes == 0:
            raise InvalidStatement(
                f"schema: an array of {items.describe()} is not supported: its items have no bytes", clause="schema"
            )
    if found.kind != "record":
        raise InvalidStatement(f"schema is {found.describe()}, must be a record", clause="schema")
    return found


def wanted(schema: AvroSchema, columns: Sequence[tuple[str, Shape]]) -> tuple[Wanted, tuple[int, ...]]:
    """Returns the part of the schema for these columns, and for each column its place among the record's fields. Raises
    InvalidStatement for a column that the record does not have, or has in another shape."""
    record = parsed(schema)
    return _of_record(record, columns, "column ")


def _of_record(record: AvroType, fields: Sequence[tuple[str, Shape]], path: str) -> tuple[Wanted, tuple[int, ...]]:
    names = [name.lower() for name, _ in record.parts]
    parts: list[Wanted | None] = [None] * len(names)
    places = []
    for name, shape in fields:
        if name.lower() not in names:
            nearest = difflib.get_close_matches(name, [name for name, _ in record.parts], 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise InvalidStatement(f"{path}{name}: {record.describe()} has no field {name!r}{hint}", name=name)
        place = names.index(name.lower())
        parts[place] = _of_type(record.parts[place][1], shape, f"{path}{name}")
        places.append(place)
    return Wanted(type=record, parts=tuple(parts)), tuple(places)


def _of_type(kind: AvroType, shape: Shape, path: str) -> Wanted:
    branch, branches = None, 0
    if kind.kind == "union":
        values = [place for place, (_, part) in enumerate(kind.parts) if part.kind != "null"]
        if len(values) != 1:
            names = ", ".join(part.describe() for _, part in kind.parts)
            raise InvalidStatement(f"{path}: a union of {names} is not supported as a column", name=path)
        branch, branches = values[0], len(kind.parts)
        kind = kind.parts[branch][1]
    expected = {"record": "struct", "array": "list", "map": "map"}.get(kind.kind, "scalar")
    if kind.kind in ("null", "union"):
        raise InvalidStatement(f"{path}: {kind.kind} is not supported as a column", name=path)
    if shape.kind != expected:
        raise InvalidStatement(
            f"{path}: the column has {shape.describe()}, the schema {Shape(expected).describe()}", name=path
        )
    parts: tuple[Wanted | None, ...] = ()
    if shape.kind == "struct":
        # In the order of the schema; a cast to the column's type goes by name.
        parts = _of_record(kind, shape.fields, f"{path}.")[0].parts
    elif shape.of is not None:
        parts = tuple(
            _of_type(part, Shape("scalar") if name == "key" and shape.kind == "map" else shape.of, path)
            for name, part in kind.parts
        )
    return Wanted(type=kind, parts=parts, branch=branch, branches=branches)


class _Parser:
    """Reads a schema. `items`: types of the items of its arrays."""

    def __init__(self) -> None:
        self.items: list[AvroType] = []
        self._named: dict[str, AvroType] = {}

    def type(self, tree: Any, namespace: str, depth: int) -> AvroType:
        if depth > DEPTH_MAX:
            raise InvalidStatement(f"schema is nested more than {DEPTH_MAX} levels deep", clause="schema")
        if isinstance(tree, list):
            return self._union(tree, namespace, depth)
        if isinstance(tree, str):
            return self._by_name(tree, namespace)
        if not isinstance(tree, dict) or "type" not in tree:
            raise InvalidStatement(f"schema: {_short(tree)} is no type", clause="schema")
        kind = tree["type"]
        if not isinstance(kind, str):
            return self.type(kind, namespace, depth + 1)
        match kind:
            case "record" | "error":
                return self._record(tree, namespace, depth)
            case "enum":
                return self._enum(tree, namespace)
            case "fixed":
                return self._fixed(tree, namespace)
            case "array" | "map":
                return self._items(tree, namespace, depth)
        found = self._by_name(kind, namespace)
        return _logical(found, tree) if kind in PRIMITIVES else found

    def _by_name(self, name: str, namespace: str) -> AvroType:
        if name in PRIMITIVES:
            size_bytes = FIXED_SIZES.get(name, 0)
            return AvroType(kind=name, size_bytes=size_bytes, min_bytes=0 if name == "null" else size_bytes or 1)
        found = self._named.get(f"{namespace}.{name}" if namespace and "." not in name else name)
        if found is None and "." not in name:
            found = self._named.get(name)
        if found is None:
            raise InvalidStatement(f"schema: there is no type {name!r}", clause="schema")
        return found

    def _union(self, tree: list[Any], namespace: str, depth: int) -> AvroType:
        if not tree or any(isinstance(part, list) for part in tree):
            raise InvalidStatement("schema: a union needs types that are no unions", clause="schema")
        return AvroType(kind="union", parts=[("", self.type(part, namespace, depth + 1)) for part in tree])

    def _new(self, tree: dict[str, Any], namespace: str, kind: str) -> tuple[AvroType, str]:
        """Returns a new named type, and the namespace inside of it."""
        name = tree.get("name")
        if not isinstance(name, str) or not name:
            raise InvalidStatement(f"schema: {_short(tree)} has no name", clause="schema")
        given = tree.get("namespace")
        if "." in name:
            namespace, _, name = name.rpartition(".")
        elif isinstance(given, str):
            namespace = given
        full = f"{namespace}.{name}" if namespace else name
        if full in self._named or name in PRIMITIVES:
            raise InvalidStatement(f"schema: type {full!r} is defined twice", clause="schema")
        found = self._named[full] = AvroType(kind=kind, name=full)
        return found, namespace

    def _record(self, tree: dict[str, Any], namespace: str, depth: int) -> AvroType:
        found, inside = self._new(tree, namespace, "record")
        fields = tree.get("fields")
        if not isinstance(fields, list):
            raise InvalidStatement(f"schema: record {found.name} has no fields", clause="schema")
        found.min_bytes = 0  # of a record inside of itself, until its own fields are known
        for part in fields:
            if not isinstance(part, dict) or not isinstance(part.get("name"), str) or "type" not in part:
                raise InvalidStatement(f"schema: {_short(part)} is no field of {found.name}", clause="schema")
            if any(name.lower() == part["name"].lower() for name, _ in found.parts):
                raise InvalidStatement(f"schema: field {part['name']} of {found.name} is there twice", clause="schema")
            found.parts.append((part["name"], self.type(part["type"], inside, depth + 1)))
        found.min_bytes = sum(kind.min_bytes for _, kind in found.parts)
        return found

    def _enum(self, tree: dict[str, Any], namespace: str) -> AvroType:
        found, _ = self._new(tree, namespace, "enum")
        symbols = tree.get("symbols")
        if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols) or not symbols:
            raise InvalidStatement(f"schema: enum {found.name} has no symbols", clause="schema")
        found.symbols = tuple(symbols)
        return found

    def _fixed(self, tree: dict[str, Any], namespace: str) -> AvroType:
        found, _ = self._new(tree, namespace, "fixed")
        size_bytes = tree.get("size")
        if not isinstance(size_bytes, int) or not 1 <= size_bytes <= FIXED_BYTES_MAX:
            raise InvalidStatement(
                f"schema: size of {found.name} is {_short(size_bytes)}, must be 1 to {FIXED_BYTES_MAX}", clause="schema"
            )
        found.size_bytes = found.min_bytes = size_bytes
        return _logical(found, tree)

    def _items(self, tree: dict[str, Any], namespace: str, depth: int) -> AvroType:
        kind = tree["type"]
        part = "items" if kind == "array" else "values"
        if part not in tree:
            raise InvalidStatement(f"schema: a {kind} has no {part}", clause="schema")
        inner = self.type(tree[part], namespace, depth + 1)
        if kind == "map":
            return AvroType(kind="map", parts=[("key", AvroType(kind="string")), ("value", inner)])
        self.items.append(inner)
        return AvroType(kind="array", parts=[("item", inner)])


# Logical types by what they stand on; others are ignored, as Avro has it.
_LOGICAL = {
    "date": "int", "time-millis": "int", "time-micros": "long", "timestamp-millis": "long", "timestamp-micros": "long",
    "timestamp-nanos": "long", "local-timestamp-millis": "long", "local-timestamp-micros": "long",
    "local-timestamp-nanos": "long",
}  # fmt: skip


def _logical(kind: AvroType, tree: dict[str, Any]) -> AvroType:
    logical = tree.get("logicalType")
    if isinstance(logical, str) and _LOGICAL.get(logical) == kind.kind:
        kind.logical = logical
    elif logical == "decimal" and kind.kind in ("bytes", "fixed"):
        precision, scale = tree.get("precision"), tree.get("scale", 0)
        if (
            isinstance(precision, int)
            and isinstance(scale, int)
            and 1 <= precision <= DECIMAL_DIGITS_MAX
            and 0 <= scale <= precision
        ):
            kind.logical, kind.scale = "decimal", scale
    return kind


def _short(tree: Any) -> str:
    text = json.dumps(tree)
    return text if len(text) <= 60 else f"{text[:60]}…"
