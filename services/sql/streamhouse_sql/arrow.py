"""Records as Arrow columns, and results as Arrow IPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from shformat import BytesColumn, HeadersColumn, Records
from shproto.errors import StatementFailed

_HEADERS = pa.list_(pa.struct([pa.field("name", pa.string()), pa.field("value", pa.binary())]))
_TYPES = {
    "_key": pa.string(),
    "_value": pa.string(),
    "_headers": _HEADERS,
    "_partition": pa.int32(),
    "_offset": pa.int64(),
    "_timestamp": pa.timestamp("us", tz="UTC"),
    "_key_bytes": pa.binary(),
    "_value_bytes": pa.binary(),
}
# Limits of a TIMESTAMP in microseconds, as ms.
_TIMESTAMP_MS_MAX = (1 << 63) // 1000 - 1


def schema_of(columns: Sequence[str]) -> Any:
    """Returns the Arrow schema of a topic's columns."""
    return pa.schema([pa.field(name, _TYPES[name]) for name in columns])


def to_arrow(topic: str, partition: int, records: Records, columns: Sequence[str]) -> Any:
    """Returns these columns of the records as a `pyarrow.RecordBatch`. Raises StatementFailed, with the place, for a
    value that its type does not have."""
    arrays = [_array(topic, partition, records, name) for name in columns]
    return pa.RecordBatch.from_arrays(arrays, schema=schema_of(columns))


def _array(topic: str, partition: int, records: Records, name: str) -> Any:
    match name:
        case "_key":
            return _text(topic, partition, records, records.keys, name)
        case "_value":
            return _text(topic, partition, records, records.values, name)
        case "_key_bytes":
            return records.keys.to_arrow()
        case "_value_bytes":
            return records.values.to_arrow()
        case "_headers":
            return (records.headers or HeadersColumn.empty(len(records))).to_arrow(_HEADERS)
        case "_partition":
            return pa.array(np.full(len(records), partition, np.int32))
        case "_offset":
            return pa.array(records.offsets, pa.int64())
    return _timestamps(topic, partition, records)


def _text(topic: str, partition: int, records: Records, column: BytesColumn, name: str) -> Any:
    try:
        # The cast checks that the bytes are UTF-8; DuckDB must never see others.
        return column.to_arrow().cast(pa.string())
    except pa.ArrowInvalid:
        pass
    position = next(i for i, value in enumerate(column.to_list()) if value is not None and not _is_utf8(value))
    offset = int(records.offsets[position])
    raise StatementFailed(
        f"{topic}/{partition}: {name} of the record at offset {offset} is not UTF-8; {name}_bytes has its bytes",
        topic=topic,
        partition=partition,
        offset=offset,
    )


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _timestamps(topic: str, partition: int, records: Records) -> Any:
    times = records.timestamps_ms
    # Not by their absolute values: the least of int64 has none.
    too_large = np.flatnonzero((times > _TIMESTAMP_MS_MAX) | (times < -_TIMESTAMP_MS_MAX))
    if len(too_large):
        offset = int(records.offsets[too_large[0]])
        raise StatementFailed(
            f"{topic}/{partition}: the timestamp of the record at offset {offset} is "
            f"{int(records.timestamps_ms[too_large[0]])} ms, which a TIMESTAMP does not have",
            topic=topic,
            partition=partition,
            offset=offset,
        )
    return pa.array(records.timestamps_ms * 1000, pa.int64()).cast(_TYPES["_timestamp"])


def table_of(columns: dict[str, list[Any]], types: dict[str, Any] | None = None) -> Any:
    """Returns a small result, made of Python lists, as a `pyarrow.RecordBatch`."""
    return pa.RecordBatch.from_pydict(columns, schema=pa.schema(types) if types else None)


def to_stream(schema: Any, batches: Sequence[Any]) -> bytes:
    """Returns a whole Arrow IPC stream: schema, batches, end."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())
