"""Types of PostgreSQL, and how DuckDB's types become them. Pure.

A type that PostgreSQL does not have goes to the client as the nearest: STRUCT, MAP and nested lists as json, unsigned
integers as the next larger one, ENUM and BIT as text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PgType:
    """A type. `size_bytes`: of a value in binary format, -1 if values differ. `duck`: the name of the DuckDB type that
    its values are computed with."""

    oid: int
    array_oid: int
    size_bytes: int
    name: str
    duck: str


def _type(oid: int, array_oid: int, size_bytes: int, name: str, duck: str) -> PgType:
    return PgType(oid=oid, array_oid=array_oid, size_bytes=size_bytes, name=name, duck=duck)


BOOL = _type(16, 1000, 1, "bool", "BOOLEAN")
BYTEA = _type(17, 1001, -1, "bytea", "BLOB")
INT8 = _type(20, 1016, 8, "int8", "BIGINT")
INT2 = _type(21, 1005, 2, "int2", "SMALLINT")
INT4 = _type(23, 1007, 4, "int4", "INTEGER")
TEXT = _type(25, 1009, -1, "text", "VARCHAR")
OID = _type(26, 1028, 4, "oid", "UINTEGER")
JSON = _type(114, 199, -1, "json", "JSON")
FLOAT4 = _type(700, 1021, 4, "float4", "FLOAT")
FLOAT8 = _type(701, 1022, 8, "float8", "DOUBLE")
VARCHAR = _type(1043, 1015, -1, "varchar", "VARCHAR")
BPCHAR = _type(1042, 1014, -1, "bpchar", "VARCHAR")
NAME = _type(19, 1003, -1, "name", "VARCHAR")
DATE = _type(1082, 1182, 4, "date", "DATE")
TIME = _type(1083, 1183, 8, "time", "TIME")
TIMESTAMP = _type(1114, 1115, 8, "timestamp", "TIMESTAMP")
TIMESTAMPTZ = _type(1184, 1185, 8, "timestamptz", "TIMESTAMP WITH TIME ZONE")
INTERVAL = _type(1186, 1187, 16, "interval", "INTERVAL")
NUMERIC = _type(1700, 1231, -1, "numeric", "DECIMAL")
UUID = _type(2950, 2951, 16, "uuid", "UUID")
JSONB = _type(3802, 3807, -1, "jsonb", "JSON")

ALL = (
    BOOL, BYTEA, INT8, INT2, INT4, TEXT, OID, JSON, FLOAT4, FLOAT8, VARCHAR, BPCHAR, NAME, DATE, TIME, TIMESTAMP,
    TIMESTAMPTZ, INTERVAL, NUMERIC, UUID, JSONB,
)  # fmt: skip
BY_OID = {kind.oid: (kind, False) for kind in ALL} | {kind.array_oid: (kind, True) for kind in ALL}
UNKNOWN_OID = 705

# DuckDB's type → PostgreSQL's, and the type that the column is cast to before it is handed over ("": nothing).
_SCALARS = {
    "BOOLEAN": (BOOL, ""),
    "TINYINT": (INT2, ""),
    "SMALLINT": (INT2, ""),
    "INTEGER": (INT4, ""),
    "BIGINT": (INT8, ""),
    "HUGEINT": (NUMERIC, ""),
    "UTINYINT": (INT2, ""),
    "USMALLINT": (INT4, ""),
    "UINTEGER": (INT8, ""),
    "UBIGINT": (NUMERIC, "DECIMAL(20,0)"),
    "FLOAT": (FLOAT4, ""),
    "DOUBLE": (FLOAT8, ""),
    "VARCHAR": (TEXT, ""),
    "BLOB": (BYTEA, ""),
    "DATE": (DATE, ""),
    "TIME": (TIME, ""),
    "TIMESTAMP": (TIMESTAMP, ""),
    "TIMESTAMP_S": (TIMESTAMP, "TIMESTAMP"),
    "TIMESTAMP_MS": (TIMESTAMP, "TIMESTAMP"),
    "TIMESTAMP_NS": (TIMESTAMP, "TIMESTAMP"),
    "TIMESTAMP WITH TIME ZONE": (TIMESTAMPTZ, ""),
    "INTERVAL": (INTERVAL, ""),
    "UUID": (UUID, ""),
    "JSON": (JSON, ""),
    '"NULL"': (TEXT, "VARCHAR"),
}
_LIST = re.compile(r"(.*)\[\d*\]$")


@dataclass(frozen=True, slots=True)
class ColumnType:
    """Type of a result's column. `cast`: the expression over `{}` by which DuckDB hands the column over."""

    type: PgType
    is_array: bool = False
    cast: str = "{}"

    @property
    def oid(self) -> int:
        return self.type.array_oid if self.is_array else self.type.oid

    @property
    def size_bytes(self) -> int:
        return -1 if self.is_array else self.type.size_bytes


def column_type(duck: str) -> ColumnType:
    """Returns how a column of DuckDB's type `duck` goes to a client."""
    if (scalar := _scalar(duck)) is not None:
        kind, cast = scalar
        return ColumnType(kind, False, f"CAST({{}} AS {cast})" if cast else "{}")
    listed = _LIST.match(duck)
    if listed and (element := _scalar(listed[1])) is not None:
        kind, cast = element
        # An ARRAY of a fixed length becomes a list, which Arrow has one form for.
        return ColumnType(kind, True, f"CAST({{}} AS {cast or listed[1]}[])")
    if listed or duck.startswith(("STRUCT(", "MAP(", "UNION(")):
        return ColumnType(JSON, False, "CAST(to_json({}) AS VARCHAR)")
    return ColumnType(TEXT, False, "CAST({} AS VARCHAR)")


def _scalar(duck: str) -> tuple[PgType, str] | None:
    if duck.startswith("DECIMAL("):
        return NUMERIC, ""
    if duck.startswith("ENUM("):
        return TEXT, "VARCHAR"
    return _SCALARS.get(duck)


def cast_of(duck: str) -> str:
    """Returns `ColumnType.cast` of DuckDB's type."""
    return column_type(duck).cast


def parameter_oid(duck: str) -> int:
    """Returns the OID of a parameter that the text gives DuckDB's type to; text where it gives none."""
    element = duck.removesuffix("[]")
    return column_type(duck.replace(element, _LONG_NAMES.get(element, element), 1)).oid if duck else TEXT.oid


# sqlglot's names of types.
_LONG_NAMES = {
    "TEXT": "VARCHAR", "INT": "INTEGER", "TIMESTAMPTZ": "TIMESTAMP WITH TIME ZONE", "REAL": "FLOAT",
    "DECIMAL": "DECIMAL(18,3)",
}  # fmt: skip
