"""Rows of PostgreSQL's catalogue: topics and declared tables are tables of the schema public. Pure.

A table that has no rows here is there, and empty: clients ask for indexes, constraints and triggers, and learn that
there are none.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamhouse_sql.core.columns import RECORD_COLUMNS
from streamhouse_sql.pgwire.core.catalogue_shape import TABLES, TYPES
from streamhouse_sql.pgwire.core.session import DATABASE, SERVER_VERSION
from streamhouse_sql.pgwire.core.types import column_type

OWNER = "streamhouse"
_DATABASE_OID, _OWNER_OID, _PUBLIC, _CATALOGUE, _INFORMATION = 5, 10, 2200, 11, 13_000
_HEAP, _DEFAULT_SPACE, _DEFAULT_COLLATION = 2, 1663, 100
_CLASS_OID = 1259
# Of topics: above all OIDs that PostgreSQL itself has.
_FIRST_OID = 1 << 20
# Columns of a record that are never null.
_NOT_NULL = {"_headers", "_partition", "_offset", "_timestamp"}

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationColumn:
    """A column of a topic or declared table. `type`: DuckDB's name of it."""

    name: str
    type: str
    comment: str = ""
    not_null: bool = False


@dataclass(frozen=True, slots=True)
class Relation:
    """A topic, or a declared table."""

    name: str
    columns: tuple[RelationColumn, ...]


TOPIC_COLUMNS = tuple(
    RelationColumn(name=column.name, type=column.type, comment=column.comment, not_null=column.name in _NOT_NULL)
    for column in RECORD_COLUMNS
)
Relations = Sequence[Relation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A table of the catalogue. `columns`: names and types, which are those of PostgreSQL, `[]` for arrays."""

    schema: str
    name: str
    oid: int
    kind: str
    columns: tuple[tuple[str, str], ...]


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().replace("\n  ", " ").split("\n")]


def _shape(words: Sequence[str]) -> Shape:
    schema, _, name = words[0].partition(".")
    columns = tuple((column, kind) for column, _, kind in (word.partition(":") for word in words[3:]))
    return Shape(schema=schema, name=name, oid=int(words[1]), kind=words[2], columns=columns)


SHAPES = {(shape.schema, shape.name): shape for shape in map(_shape, _lines(TABLES))}

# Tables and views; functions left out.
_RELATIONS = [shape for shape in SHAPES.values() if shape.kind in ("r", "v")]


def relation_oids(relations: Relations) -> list[tuple[int, Relation]]:
    """Returns an OID with each relation, the same in every process as long as no two names' checksums collide."""
    taken: dict[int, Relation] = {}
    for relation in sorted(relations, key=lambda item: item.name):
        oid = max(_FIRST_OID, zlib.crc32(relation.name.encode()) & 0x7FFFFFFF)
        while oid in taken:
            oid = max(_FIRST_OID, (oid + 1) & 0x7FFFFFFF)
        taken[oid] = relation
    return list(taken.items())


def depends_on_relations(shape: Shape) -> bool:
    """Returns True for a table whose rows change with topics and declared tables."""
    return shape.name in _OF_RELATIONS


def rows_of(shape: Shape, relations: Relations) -> list[Row]:
    """Returns the rows of a table."""
    if shape.name in _OF_RELATIONS:
        return list(_OF_RELATIONS[shape.name](relation_oids(relations)))
    return list(_FIXED.get(shape.name, ()))


def filled(shape: Shape, rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Returns the columns of a table; fields that a row does not have are false, zero or null."""
    defaults: dict[str, Any] = {"bool": False, "int2": 0, "int4": 0, "int8": 0, "oid": 0, "float4": 0.0, "float8": 0.0}
    return {name: [row.get(name, defaults.get(kind)) for row in rows] for name, kind in shape.columns}


# ---- topics and declared tables


_Oids = Sequence[tuple[int, Relation]]


def _classes(oids: _Oids) -> Iterable[Row]:
    common = {"relowner": _OWNER_OID, "relpersistence": "p", "relispopulated": True, "relreplident": "n"}
    common |= {"reltuples": -1.0, "relam": _HEAP, "relacl": [f"=r/{OWNER}"]}
    for oid, relation in oids:
        yield common | {
            "oid": oid, "relname": relation.name, "relnamespace": _PUBLIC, "relkind": "r",
            "relnatts": len(relation.columns), "relfilenode": oid,
        }  # fmt: skip
    for shape in _RELATIONS:
        namespace = _CATALOGUE if shape.schema == "pg_catalog" else _INFORMATION
        yield common | {
            "oid": shape.oid, "relname": shape.name, "relnamespace": namespace, "relkind": shape.kind,
            "relnatts": len(shape.columns),
        }  # fmt: skip


def _attributes(oids: _Oids) -> Iterable[Row]:
    for oid, relation in oids:
        for at, column in enumerate(relation.columns, 1):
            kind = column_type(column.type)
            yield _attribute(oid, at, column.name, kind.oid, column.not_null)
    for shape in _RELATIONS:
        for at, (name, type_name) in enumerate(shape.columns, 1):
            yield _attribute(shape.oid, at, name, _TYPE_OIDS[_catalogue_type(type_name)], False)


def _catalogue_type(name: str) -> str:
    return f"_{name[:-2]}" if name.endswith("[]") else name


def _attribute(oid: int, at: int, name: str, type_oid: int, not_null: bool) -> Row:
    kind = _TYPES_BY_OID[type_oid]
    return {
        "attrelid": oid, "attname": name, "atttypid": type_oid, "attnum": at, "attlen": kind["typlen"],
        "atttypmod": -1, "attcacheoff": -1, "attbyval": kind["typbyval"], "attalign": kind["typalign"],
        "attstorage": kind["typstorage"], "attcompression": "", "attnotnull": not_null, "attidentity": "",
        "attgenerated": "", "attislocal": True, "attstattarget": -1, "attcollation": kind["typcollation"],
        "attndims": int(name.endswith("[]")),
    }  # fmt: skip


def _descriptions(oids: _Oids) -> Iterable[Row]:
    for oid, relation in oids:
        for at, column in enumerate(relation.columns, 1):
            if column.comment:
                yield {"objoid": oid, "classoid": _CLASS_OID, "objsubid": at, "description": column.comment}


def _pg_tables(oids: _Oids) -> Iterable[Row]:
    return ({"schemaname": "public", "tablename": relation.name, "tableowner": OWNER} for _, relation in oids)


def _information_tables(oids: _Oids) -> Iterable[Row]:
    common = {"table_catalog": DATABASE, "is_insertable_into": "NO", "is_typed": "NO"}
    for _, relation in oids:
        yield common | {"table_schema": "public", "table_name": relation.name, "table_type": "BASE TABLE"}
    for shape in _RELATIONS:
        kind = "BASE TABLE" if shape.kind == "r" else "VIEW"
        yield common | {"table_schema": shape.schema, "table_name": shape.name, "table_type": kind}


def _information_columns(oids: _Oids) -> Iterable[Row]:
    for _, relation in oids:
        for at, column in enumerate(relation.columns, 1):
            kind = _TYPES_BY_OID[column_type(column.type).oid]
            yield {
                "table_catalog": DATABASE, "table_schema": "public", "table_name": relation.name,
                "column_name": column.name, "ordinal_position": at, "is_nullable": "NO" if column.not_null else "YES",
                "data_type": kind["shown"], "udt_catalog": DATABASE, "udt_schema": "pg_catalog",
                "udt_name": kind["typname"], "dtd_identifier": str(at), "is_self_referencing": "NO",
                "is_identity": "NO", "is_generated": "NEVER", "is_updatable": "NO",
                "numeric_precision": _PRECISION.get(kind["typname"]),
                "numeric_precision_radix": 2 if kind["typname"] in _PRECISION else None,
                "numeric_scale": 0 if kind["typname"] in _PRECISION else None,
                "datetime_precision": 6 if kind["typname"] == "timestamptz" else None,
                "interval_precision": None, "character_maximum_length": None, "character_octet_length": None,
                "maximum_cardinality": None,
            }  # fmt: skip


_PRECISION = {"int4": 32, "int8": 64}


def _privileges(oids: _Oids) -> Iterable[Row]:
    for _, relation in oids:
        yield {
            "grantor": OWNER, "grantee": "PUBLIC", "table_catalog": DATABASE, "table_schema": "public",
            "table_name": relation.name, "privilege_type": "SELECT", "is_grantable": "NO", "with_hierarchy": "YES",
        }  # fmt: skip


_OF_RELATIONS = {
    "pg_class": _classes,
    "pg_attribute": _attributes,
    "pg_description": _descriptions,
    "pg_tables": _pg_tables,
    "tables": _information_tables,
    "columns": _information_columns,
    "table_privileges": _privileges,
    "role_table_grants": _privileges,
}

# ---- rows that are always the same


def _type(words: Sequence[str]) -> dict[str, Any]:
    numbers = {"typlen": 2, "typelem": 7, "typarray": 8, "typcollation": 15}
    texts = {
        "typname": 1, "typtype": 4, "typcategory": 5, "typinput": 9, "typoutput": 10, "typreceive": 11, "typsend": 12,
        "typalign": 13, "typstorage": 14,
    }  # fmt: skip
    return {
        "oid": int(words[0]),
        **{name: int(words[at]) for name, at in numbers.items()},
        **{name: words[at] for name, at in texts.items()},
        "typbyval": words[3] == "t",
        "typispreferred": words[6] == "t",
        "shown": words[16].replace("_", " ").strip('"') if words[16] != '"char"' else '"char"',
        "typnamespace": _CATALOGUE,
        "typowner": _OWNER_OID,
        "typisdefined": True,
        "typdelim": ",",
        "typmodin": "-",
        "typmodout": "-",
        "typanalyze": "-",
        "typsubscript": "array_subscript_handler" if words[9] == "array_in" else "-",
        "typtypmod": -1,
    }


_TYPE_ROWS = [_type(words) for words in _lines(TYPES)]
_TYPES_BY_OID = {row["oid"]: row for row in _TYPE_ROWS}
_TYPE_OIDS = {row["typname"]: row["oid"] for row in _TYPE_ROWS}
SHOWN_TYPES = [(row["oid"], row["shown"]) for row in _TYPE_ROWS]

# Reserved words of DuckDB that standard SQL does not have.
_KEYWORDS = ("anti", "asof", "describe", "glob", "pivot", "positional", "qualify", "semi", "summarize", "unpivot")
_NAMESPACES = {"pg_catalog": _CATALOGUE, "public": _PUBLIC, "information_schema": _INFORMATION}
_FIXED: dict[str, Sequence[Row]] = {
    "pg_type": _TYPE_ROWS,
    "pg_namespace": [{"oid": oid, "nspname": name, "nspowner": _OWNER_OID} for name, oid in _NAMESPACES.items()],
    "schemata": [
        {"catalog_name": DATABASE, "schema_name": name, "schema_owner": OWNER} for name in _NAMESPACES
    ],
    "pg_database": [
        {
            "oid": _DATABASE_OID, "datname": DATABASE, "datdba": _OWNER_OID, "encoding": 6, "datlocprovider": "c",
            "datallowconn": True, "datconnlimit": -1, "dattablespace": _DEFAULT_SPACE, "datcollate": "C",
            "datctype": "C",
        }
    ],
    "pg_tablespace": [{"oid": _DEFAULT_SPACE, "spcname": "pg_default", "spcowner": _OWNER_OID}],
    "pg_am": [{"oid": _HEAP, "amname": "heap", "amhandler": "heap_tableam_handler", "amtype": "t"}],
    "pg_collation": [
        {
            "oid": _DEFAULT_COLLATION, "collname": "default", "collnamespace": _CATALOGUE, "collowner": _OWNER_OID,
            "collprovider": "d", "collisdeterministic": True, "collencoding": -1,
        }
    ],
    "pg_language": [{"oid": 14, "lanname": "sql", "lanowner": _OWNER_OID, "lanpltrusted": True}],
    "pg_get_keywords": [{"word": word, "catcode": "R", "catdesc": "reserved"} for word in _KEYWORDS],
    "information_schema_catalog_name": [{"catalog_name": DATABASE}],
}  # fmt: skip
VERSION = f"PostgreSQL {SERVER_VERSION} (StreamHouse)"


def session_rows(
    name: str, user: str, settings: Mapping[str, str], cursors: Sequence[str], statements: Sequence[str]
) -> list[Row] | None:
    """Returns the rows of a table that a session sees its own of; None for other tables."""
    match name:
        case "pg_settings":
            return [
                {"name": key, "setting": value, "context": "user", "vartype": "string", "source": "session"}
                for key, value in settings.items()
            ]
        case "pg_cursors":
            return [{"name": cursor, "statement": "", "is_holdable": False} for cursor in cursors]
        case "pg_prepared_statements":
            return [{"name": statement, "statement": "", "from_sql": False} for statement in statements if statement]
        case "pg_roles":
            roles = dict.fromkeys((OWNER, user))
            return [
                {
                    "oid": _OWNER_OID + at, "rolname": role, "rolsuper": False, "rolinherit": True,
                    "rolcanlogin": True, "rolconnlimit": -1,
                }
                for at, role in enumerate(roles)
            ]  # fmt: skip
        case "pg_user":
            return [
                {"usename": role, "usesysid": _OWNER_OID + at} for at, role in enumerate(dict.fromkeys((OWNER, user)))
            ]
        case "enabled_roles":
            return [{"role_name": user}]
    return None
