"""Values of binary formats as Arrow columns, before the engine sees them: of bounded queries and continuous ones alike.

A value that is not of its table's format is marked, never raised: what becomes of it is the table's `bad_rows`, which
SQL carries out (core/tables.py). Decoders hold no state, and may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from shproto.errors import StatementLimit

from streamhouse_sql.avro import AvroDecoder
from streamhouse_sql.core.avro_schema import AvroSchema
from streamhouse_sql.core.protobuf_schema import project
from streamhouse_sql.core.tables import BAD, TableColumn, TableDefinition, checked_fields, field_of, shapes_of
from streamhouse_sql.protobuf import ProtobufDecoder

# Decoders that are kept: of the tables and sets of columns that statements ask for again.
DECODERS_MAX = 256
# Arrow memory of a batch of decoded values, whose bytes are some MiB.
DECODED_BYTES_MAX = 512 * 1024 * 1024


class Decoder(Protocol):
    """Decodes values. `schema`: of the fields, by column."""

    schema: Any

    def decode(self, values: Any) -> tuple[Any, Any]:
        """Returns a table of fields and an array that says which values are bad; fields of null values and bad ones are
        of no meaning."""


def decode_table(table: TableDefinition, raw: Any, columns: Sequence[TableColumn]) -> Any:
    """Returns the rows of `raw`, a `pyarrow.RecordBatch` or `Table` with the record columns of
    `tables.record_columns_of`, as a record batch that also has the fields of these columns (`tables.field_of`) and a
    column BAD. Fields of bad and of null values are NULL. Raises StatementLimit for a batch of too much memory."""
    batch = raw if isinstance(raw, pa.RecordBatch) else _combined(raw)
    fields = tuple(checked_fields(table, columns))
    if not fields:
        return batch
    values = batch.column("_value_bytes")
    decoded, is_bad = decoder_of(table, fields).decode(values)
    is_null = np.asarray(values.is_null()) if values.null_count else np.zeros(len(values), bool)
    is_bad = is_bad & ~is_null
    unset = is_bad | is_null
    if unset.any():
        decoded = decoded.take(pa.array(np.arange(len(values)), mask=unset))
    if decoded.nbytes > DECODED_BYTES_MAX:
        raise StatementLimit(
            f"{table.topic}: {len(values)} values of table {table.name} have {decoded.nbytes} bytes when decoded, "
            f"at most {DECODED_BYTES_MAX} are allowed",
            limit="DECODED_BYTES_MAX",
            value=decoded.nbytes,
        )
    arrays = [column.combine_chunks() for column in decoded.columns]
    schema = decoded_schema(table, batch.schema, columns)
    return pa.RecordBatch.from_arrays([*batch.columns, *arrays, pa.array(is_bad)], schema=schema)


def decoded_schema(table: TableDefinition, raw: Any, columns: Sequence[TableColumn]) -> Any:
    """Returns the schema of `decode_table` over record columns of the schema `raw`."""
    fields = tuple(checked_fields(table, columns))
    if not fields:
        return raw
    schema = decoder_of(table, fields).schema
    return pa.schema(
        [*raw, *(pa.field(field_of(name), schema.field(name).type) for name in schema.names), pa.field(BAD, pa.bool_())]
    )


@lru_cache(DECODERS_MAX)
def decoder_of(table: TableDefinition, fields: tuple[TableColumn, ...]) -> Decoder:
    """Returns the decoder of these fields. Raises InvalidStatement for a schema that is not valid."""
    assert table.schema is not None, "a binary format has a schema"
    shapes = shapes_of(fields)
    if isinstance(table.schema, AvroSchema):
        return AvroDecoder(table.schema, shapes)
    return ProtobufDecoder(project(table.schema, shapes), [shape for _, shape in shapes])


def _combined(table: Any) -> Any:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
