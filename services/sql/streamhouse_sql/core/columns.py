"""Columns of a topic that was not declared as a table: the parts of a record, by name and SQL type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    """A column as `DESCRIBE` shows it. `type` is DuckDB's name of the type."""

    name: str
    type: str
    comment: str


RECORD_COLUMNS = (
    Column(
        "_key", "VARCHAR", "the record's key as text; NULL without a key. An error if it is not UTF-8: see _key_bytes"
    ),
    Column(
        "_value",
        "VARCHAR",
        "the record's value as text, for example JSON. An error if it is not UTF-8: see _value_bytes",
    ),
    Column(
        "_headers",
        'STRUCT("name" VARCHAR, "value" BLOB)[]',
        "the record's headers in their order; empty without headers",
    ),
    Column("_partition", "INTEGER", "partition of the topic; a predicate on it is pushed down"),
    Column("_offset", "BIGINT", "offset in the partition; a predicate on it is pushed down"),
    Column(
        "_timestamp",
        "TIMESTAMP WITH TIME ZONE",
        "the record's timestamp, shown in UTC; a lower bound on it is pushed down",
    ),
    Column("_key_bytes", "BLOB", "the record's key as it is"),
    Column("_value_bytes", "BLOB", "the record's value as it is"),
)
COLUMN_NAMES = tuple(column.name for column in RECORD_COLUMNS)
