"""Lists of entries as maps: a key that comes twice has its last value, as engines have no key twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from streamhouse_sql.core.shapes import Shape


def has_map(shape: Shape) -> bool:
    """Returns True if there is a map anywhere in the type."""
    inner = [field for _, field in shape.fields] + ([shape.of] if shape.of is not None else [])
    return shape.kind == "map" or any(has_map(part) for part in inner)


def with_maps(array: Any, shape: Shape) -> Any:
    """Returns the array, no slice of another, with maps in the place of lists of entries (key, value), as its shape
    says where."""
    if not has_map(shape):
        return array
    if shape.kind == "struct":
        fields = [with_maps(array.field(i), field) for i, (_, field) in enumerate(shape.fields)]
        names = [array.type.field(i).name for i in range(len(fields))]
        return pa.StructArray.from_arrays(fields, names, mask=array.is_null())
    assert shape.of is not None, "a list or a map"
    if shape.kind == "list":
        return pa.ListArray.from_arrays(array.offsets, with_maps(array.values, shape.of), mask=array.is_null())
    values = with_maps(array.values.field(1), shape.of)
    mask = np.asarray(array.is_null()) if array.null_count else None
    return map_of(np.asarray(array.offsets), array.values.field(0), values, mask)


def map_of(offsets: Any, keys: Any, values: Any, is_null: Any) -> Any:
    """Returns maps of these entries, each of the entries between two of the offsets, a numpy array. `is_null`: of each
    map, or None."""
    kept = _last_of_each(offsets, keys)
    if len(kept) < len(keys):
        offsets = np.searchsorted(kept, offsets)
        keys, values = keys.take(pa.array(kept)), values.take(pa.array(kept))
    # The offset of a null map is NULL; the last one ends the others.
    mask = None if is_null is None else np.append(is_null, False)
    return pa.MapArray.from_arrays(pa.array(offsets, pa.int32(), mask=mask), keys, values)


def map_type(kind: Any, shape: Shape) -> Any:
    """Returns the type of `with_maps` for arrays of this type."""
    return with_maps(pa.array([], kind), shape).type


def _last_of_each(offsets: Any, keys: Any) -> Any:
    """Returns the places, ascending, of the entries that no later one of the same map has the key of."""
    codes = np.asarray(keys.dictionary_encode().indices).astype(np.int64)
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    entries = rows * (int(codes.max(initial=0)) + 1) + codes
    _, places = np.unique(entries[::-1], return_index=True)
    return np.sort(len(entries) - 1 - places)
