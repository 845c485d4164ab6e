"""Rows of a result to records: JSON values and keys, and the kind of change as a header.

The value is a JSON object of the output columns, the key one of those that identify a row. A column `_value` or `_key`
is the record's own, as it is. Rows of a changelog have a header `op`: +I and -D insert and delete, -U and +U are the
row before and after an update; the value is the row in each case, so that readers can take it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from shformat import BytesColumn
from shformat.murmur2 import partitions_of

from streamhouse_sql.core.quoting import literal, quoted
from streamhouse_sql.ports import Engine

OP = "_op"
HEADER = "op"
_OPS = pa.array([b"+I", b"-U", b"+U", b"-D"], pa.binary())
_INSERT, _BEFORE, _AFTER, _DELETE = range(4)
KEY_COLUMNS, VALUE_COLUMNS = ("_key", "_key_bytes"), ("_value", "_value_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Records as Arrow arrays. `keys`, `ops` None: no record has one."""

    values: Any
    keys: Any
    ops: Any

    def __len__(self) -> int:
        return len(self.values)

    @property
    def size_bytes(self) -> int:
        """Bytes of all values and keys."""
        return int(self.values.nbytes) + (int(self.keys.nbytes) if self.keys is not None else 0)

    def take(self, rows: NDArray[np.int64]) -> Encoded:
        """Returns some of the records."""
        indices = pa.array(rows)
        return Encoded(
            values=self.values.take(indices),
            keys=None if self.keys is None else self.keys.take(indices),
            ops=None if self.ops is None else self.ops.take(indices),
        )

    def partitions(self, number: int, partitions: int) -> NDArray[np.int64]:
        """Returns the partition of each record, among so many: that of its key, as the SDK's producer chooses it;
        records without a key go to one partition after the other, by the `number` of the micro-batch."""
        without_key = number % partitions
        if self.keys is None:
            return np.full(len(self), without_key, np.int64)
        keys = BytesColumn.from_arrow(self.keys)
        chosen = partitions_of(keys, partitions)
        if keys.valid is not None:
            chosen[~keys.valid] = without_key
        return chosen


class Encoder:
    """Encodes results with these columns, in an instance of its own; of a changelog a first column is the sign. Its
    calls block."""

    def __init__(
        self, columns: Sequence[str], key_columns: Sequence[str], engine: Engine, *, is_changelog: bool
    ) -> None:
        self._engine = engine
        self._is_changelog = is_changelog
        value = next((name for name in columns if name in VALUE_COLUMNS), None)
        key = next((name for name in columns if name in KEY_COLUMNS), None)
        fields = [name for name in columns if name not in (value, key)]
        self._has_key = key is not None or bool(key_columns)
        written = quoted(value) if value is not None else json_of(fields)
        identity = quoted(key) if key is not None else json_of(key_columns)
        self._sql = f"SELECT {written} AS value" + (f", {identity} AS key" if self._has_key else "") + " FROM result"

    def encode(self, rows: Any) -> Encoded:
        """Returns the records of a `pyarrow.Table` of rows, in their order. Raises StatementFailed, StatementLimit."""
        self._engine.add_table("result", rows)
        schema, batches = self._engine.result(self._sql, max(1, rows.num_rows))
        table = pa.Table.from_batches(list(batches), schema=schema)
        keys = whole(table.column("key")) if self._has_key else None
        ops = None
        if self._is_changelog:
            ops = kinds_of_changes(rows.column(0).to_numpy(), keys)
        return Encoded(values=whole(table.column("value")), keys=keys, ops=ops)

    def close(self) -> None:
        """Gives the memory back."""
        self._engine.close()


def check_no_sign(columns: Sequence[str]) -> str:
    """Returns the reason for which a result cannot show its changes, by its columns; an empty text if it can."""
    if any(name.lower() == OP for name in columns):
        return f"column {OP} is the kind of a change: name yours another way, … AS name"
    return ""


def check_columns(columns: Sequence[str]) -> str:
    """Returns the reason for which a result's columns make no record, by their names; an empty text if they do."""
    if problem := check_no_sign(columns):
        return problem
    value = [name for name in columns if name in VALUE_COLUMNS]
    key = [name for name in columns if name in KEY_COLUMNS]
    if len(value) > 1 or len(key) > 1:
        return f"columns {', '.join(value if len(value) > 1 else key)} are the same part of a record"
    others = [name for name in columns if name not in (*value, *key)]
    if value and others:
        return f"column {value[0]} is the whole value of a record, so there is no place for {others[0]}"
    if not value and not others:
        return "a record needs a value: a column besides its key"
    return ""


def json_of(columns: Sequence[str]) -> str:
    """Returns the expression of a JSON object of these columns."""
    fields = ", ".join(f"{literal(name)}: {quoted(name)}" for name in columns)
    return f"CAST(to_json({{{fields}}}) AS VARCHAR)"


def whole(column: Any) -> Any:
    """Returns a chunked column as one array of binary values."""
    column = column.cast(pa.large_binary())
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.large_binary())


def kinds_of_changes(signs: NDArray[np.int8], keys: Any) -> Any:
    """Returns the kind of change of each row: +I, -U, +U or -D, as binary values. `keys`: of the rows, None without.
    Rows of a key stand together, the one before an update first."""
    kinds = np.where(signs > 0, _INSERT, _DELETE)
    if keys is not None and len(kinds) > 1:
        same = pc.equal(keys.slice(0, len(keys) - 1), keys.slice(1)).fill_null(False)
        is_update = np.asarray(same.to_numpy(zero_copy_only=False)) & (signs[:-1] < 0) & (signs[1:] > 0)
        kinds[:-1][is_update] = _BEFORE
        kinds[1:][is_update] = _AFTER
    return _OPS.take(pa.array(kinds))
