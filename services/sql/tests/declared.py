"""A declared table over values, without a platform: the rows that its SQL gives in an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from streamhouse_sql.adapters.duck import Duck, DuckLimits
from streamhouse_sql.arrow import schema_of
from streamhouse_sql.core.statement import CreateTable, parse
from streamhouse_sql.core.tables import (
    TableDefinition,
    decodes_in_arrow,
    needed_columns,
    record_columns_of,
    select_of,
)
from streamhouse_sql.decoding import decode_table, decoded_schema


def definition(text: str) -> TableDefinition:
    """Returns the definition of a CREATE TABLE."""
    statement = parse(text)
    assert isinstance(statement, CreateTable)
    return statement.definition


def records(
    values: Sequence[bytes | None],
    names: Sequence[str],
    *,
    keys: Sequence[bytes | None] | None = None,
    partitions: Sequence[int] | None = None,
) -> pa.RecordBatch:
    """Returns these columns of records, by default of partition 0. An offset is the record's place in the list."""
    keys = keys or [None] * len(values)
    columns: dict[str, Sequence[Any]] = {
        "_key": [None if key is None else key.decode() for key in keys],
        "_key_bytes": list(keys),
        "_partition": partitions or [0] * len(values),
        "_offset": list(range(len(values))),
        "_value_bytes": list(values),
    }
    if "_value" in names:
        columns["_value"] = [None if value is None else value.decode() for value in values]
    return pa.RecordBatch.from_pydict({name: columns[name] for name in names}, schema=schema_of(names))


def rows_of(
    table: TableDefinition,
    values: Sequence[bytes | None],
    *,
    keys: Sequence[bytes | None] | None = None,
    partitions: Sequence[int] | None = None,
    is_upsert: bool = True,
    threads: int = 1,
) -> list[tuple[Any, ...]]:
    """Returns (offset, column, …) of the table's rows over records with these values, by offset. Raises what the engine
    raises."""
    columns = needed_columns(table, None)
    scanned = record_columns_of(table, columns, ["_offset"])
    engine = Duck(
        DuckLimits(memory_bytes_max=1 << 30, temp_dir=Path("/nowhere"), temp_bytes_max=1 << 20, threads=threads)
    )
    try:
        scan = records(values, scanned, keys=keys, partitions=partitions)
        if decodes_in_arrow(table):
            schema = decoded_schema(table, scan.schema, columns)
            scan = decode_table(table, scan, columns)
            assert scan.schema == schema
            scan.validate(full=True)
        engine.add_table("scan", pa.Table.from_batches([scan]))
        query = select_of(table, "scan", columns, ["_offset"], is_upsert=is_upsert)
        _, batches = engine.result(f"SELECT * FROM ({query})", 2048)
        found = [row for batch in batches for row in zip(*(c.to_pylist() for c in batch.columns), strict=True)]
    finally:
        engine.close()
    return sorted(found, key=lambda row: row[0])
