"""Values in Protocol Buffers as Arrow columns, by ptars: a message's fields go into columns in Rust.

ptars says that one of the values is malformed, not which: the halves are tried on their own then. It may also end with
a panic of Rust, which is an exception here and no end of the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ptars
import pyarrow as pa
from google.protobuf import descriptor_pb2, descriptor_pool
from shproto.errors import InvalidStatement

from streamhouse_sql.core.protobuf_schema import Projection
from streamhouse_sql.core.shapes import Shape
from streamhouse_sql.maps import map_type, with_maps

# Arrow memory of values that are decoded in one call, at most: an item of a repeated message has two bytes, and as many
# columns as the table says.
EXPANDED_BYTES_MAX = 256 * 1024 * 1024
_VALUE_BYTES = 16  # of a value in a column, its offset and its bit of validity included
_ITEM_BYTES = 2

_CONFIG = ptars.PtarsConfig(timestamp_unit="us", duration_unit="us", time_unit="us", enum_repr="string")


class ProtobufDecoder:
    """Decoder of a schema. `schema`: of its columns, which have the names of the table's."""

    def __init__(self, projection: Projection, shapes: Sequence[Shape]) -> None:
        pool = descriptor_pool.DescriptorPool()
        files = descriptor_pb2.FileDescriptorSet.FromString(projection.descriptor_set)
        try:
            for name in _in_order({file.name: file for file in files.file}):
                pool.Add(name)
            descriptor = pool.FindMessageTypeByName(projection.message)
            self._handler = ptars.HandlerPool([descriptor.file], config=_CONFIG).get_for_message(descriptor)
            empty = self._handler.array_to_record_batch(pa.array([], pa.binary()))
        except Exception as error:
            raise InvalidStatement(f"descriptor is not valid: {error}", clause="descriptor") from error
        self._fields = [field for _, field in projection.names]
        self._shapes = shapes
        self._bytes_max = EXPANDED_BYTES_MAX
        if projection.items_width:
            self._bytes_max = EXPANDED_BYTES_MAX * _ITEM_BYTES // (_VALUE_BYTES * projection.items_width)
        self.schema = pa.schema(
            [
                pa.field(column, map_type(empty.schema.field(field).type, shape))
                for (column, field), shape in zip(projection.names, shapes, strict=True)
            ]
        )

    def decode(self, values: Any) -> tuple[Any, Any]:
        """Returns a table of the values' fields, and a numpy array that is True for values that are no messages of the
        schema. Fields of null and malformed values are of no meaning."""
        is_bad = np.zeros(len(values), bool)
        sizes = np.diff(np.frombuffer(values.buffers()[1], np.int32, len(values) + 1, values.offset * 4))
        is_bad[sizes > self._bytes_max] = True
        batches, places = [], []
        for start, end in self._parts(sizes):
            for first, last, batch in self._decoded(values, start, end):
                if batch is None:
                    is_bad[first:last] = True
                else:
                    columns = zip((batch.column(name) for name in self._fields), self._shapes, strict=True)
                    batches.append(
                        pa.RecordBatch.from_arrays([with_maps(*column) for column in columns], schema=self.schema)
                    )
                    places.append(np.arange(first, last))
        if not batches:
            return self.schema.empty_table().take(pa.nulls(len(values), pa.int64())), is_bad
        table = pa.Table.from_batches(batches)
        if table.num_rows < len(values):
            rows = np.zeros(len(values), np.int64)
            rows[np.concatenate(places)] = np.arange(table.num_rows)
            table = table.take(pa.array(rows, mask=is_bad))
        return table, is_bad

    def _parts(self, sizes: Any) -> Iterator[tuple[int, int]]:
        """Yields ranges of values that are decoded together; too large ones are in none."""
        start = 0
        if int(sizes.sum(dtype=np.int64)) <= self._bytes_max:
            yield 0, len(sizes)
            return
        for place in [*np.flatnonzero(sizes > self._bytes_max).tolist(), len(sizes)]:
            while start < place:
                bytes_to = np.cumsum(sizes[start:place], dtype=np.int64)
                count = max(1, int(np.searchsorted(bytes_to, self._bytes_max, side="right")))
                yield start, start + count
                start += count
            start = place + 1

    def _decoded(self, values: Any, start: int, end: int) -> Iterator[tuple[int, int, Any]]:
        """Yields (first, last, record batch) of the values in their order; None for one that is malformed."""
        ranges = [(start, end)]
        while ranges:
            start, end = ranges.pop()
            if start == end:
                continue
            try:
                batch = self._handler.array_to_record_batch(values.slice(start, end - start))
            except ValueError:
                batch = None
            except BaseException as error:
                if type(error).__name__ != "PanicException":
                    raise
                batch = None
            if batch is not None or end - start == 1:
                yield start, end, batch
            else:
                half = (start + end) // 2
                ranges += [(half, end), (start, half)]


def _in_order(files: dict[str, descriptor_pb2.FileDescriptorProto]) -> Iterator[descriptor_pb2.FileDescriptorProto]:
    """Yields the files, each behind those that it imports."""
    done: set[str] = set()
    for root in files:
        stack = [root]
        while stack:
            name = stack[-1]
            missing = [other for other in files[name].dependency if other in files and other not in done]
            if name in done or not missing:
                stack.pop()
                if name not in done:
                    done.add(name)
                    yield files[name]
            elif any(other in stack for other in missing):
                raise InvalidStatement("descriptor has files that import each other", clause="descriptor")
            else:
                stack += missing
