"""Avro values as Arrow columns: numpy reads a field of all values at once, then the next field.

A value is a datum of the table's schema, without a container or a header. Each step works on a set of places,
ascending, one for each value (or item of a list) that is at this field; each place has its own end, and no byte behind
it counts. A value that does not hold is marked, and the others go on. Where fewer than VECTOR_MIN values have items
left, as with one long list, items are found by a loop over bytes, and still decoded together.

Memory is bounded by the bytes that were read: each value of a column takes a byte of them at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streamhouse_sql.core.avro_schema import DEPTH_MAX, AvroSchema, AvroType, Wanted, wanted
from streamhouse_sql.core.shapes import Shape
from streamhouse_sql.maps import map_of

# Below, a step over arrays costs more than a loop: about 20 us against 1 us for each item.
VECTOR_MIN = 16
# Behind the last value: the longest that is looked at before the end is checked.
_PADDING = bytes(16)
_VARINT_BYTES_MAX = 10
_FEW_ITEMS = 64

Places = NDArray[np.int64]
Flags = NDArray[np.bool_]
# Of 10^38, the first that a DECIMAL(38) does not have, the upper 64 bits.
_DECIMAL_HIGH_MAX = 10**38 >> 64
_TIMES = {
    "date": pa.date32(),
    "time-millis": pa.time32("ms"),
    "time-micros": pa.time64("us"),
}
_TIMESTAMPS = {"millis": 1000, "micros": 1, "nanos": -1000}


class AvroDecoder:
    """Decoder of a schema. `schema`: of its columns, which have the names of the table's."""

    def __init__(self, schema: AvroSchema, columns: Sequence[tuple[str, Shape]]) -> None:
        self._wanted, self._fields = wanted(schema, columns)
        places = [place for place, part in enumerate(self._wanted.parts) if part is not None]
        self._order = [places.index(place) for place in self._fields]
        self.schema = pa.schema(
            [
                pa.field(name, _type_of(part))
                for (name, _), place in zip(columns, self._fields, strict=True)
                if (part := self._wanted.parts[place]) is not None
            ]
        )

    def decode(self, values: Any) -> tuple[Any, Any]:
        """Returns a table of the values' fields, and a numpy array that is True for values that are none of the schema.
        Fields of null and bad values are of no meaning."""
        offsets = np.frombuffer(values.buffers()[1], np.int32, len(values) + 1, values.offset * 4).astype(np.int64)
        body = values.buffers()[2]
        data = np.frombuffer(
            (b"" if body is None else memoryview(body)[offsets[0] : offsets[-1]].tobytes()) + _PADDING, np.uint8
        )
        offsets -= offsets[0]
        reading = _Reading(data)
        at, is_good, columns = reading.record(self._wanted, offsets[:-1], offsets[1:], 0)
        is_good &= at == offsets[1:]
        table = pa.Table.from_arrays([columns[place] for place in self._order], schema=self.schema)
        return table, ~is_good


class _Reading:
    """Bytes of a batch of values. Methods return, for places that they are given, the places behind these, and
    True for those that hold; a place that does not is behind its end, where nothing holds."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data = data
        self._bytes = data.tobytes()

    # ---- a type, of all places

    def value(self, kind: Wanted, at: Places, end: Places, depth: int) -> tuple[Places, Flags, Any]:
        """Reads values of a wanted type. Returns an array of them."""
        if kind.branch is None:
            return self._plain(kind, at, end, depth)
        at, is_good, branch = self._varint(at, end)
        is_good &= (branch >= 0) & (branch < kind.branches)
        there = is_good & (branch == kind.branch)
        if there.all():
            return self._plain(kind, at, end, depth)
        places = np.flatnonzero(there)
        at_there, good_there, array = self._plain(kind, at[places], end[places], depth)
        at, is_good = at.copy(), is_good.copy()
        at[places], is_good[places] = at_there, good_there
        index = np.zeros(len(at), np.int64)
        index[places] = np.arange(len(places))
        return _stopped(at, end, is_good), is_good, array.take(pa.array(index, mask=~there))

    def _plain(self, kind: Wanted, at: Places, end: Places, depth: int) -> tuple[Places, Flags, Any]:
        type_ = kind.type
        match type_.kind:
            case "int" | "long" | "enum":
                at, is_good, numbers = self._varint(at, end)
                is_good, array = _numbers(type_, numbers, is_good)
                return _stopped(at, end, is_good), is_good, array
            case "boolean" | "float" | "double":
                is_good = at + type_.size_bytes <= end
                raw = self._data[np.where(is_good, at, 0)[:, None] + np.arange(type_.size_bytes)]
                if type_.kind == "boolean":
                    is_good &= raw[:, 0] <= 1
                    array = pa.array(raw[:, 0] == 1)
                else:
                    array = pa.array(np.ascontiguousarray(raw).view("<f4" if type_.size_bytes == 4 else "<f8")[:, 0])
                return _stopped(at + type_.size_bytes, end, is_good), is_good, array
            case "bytes" | "string" | "fixed":
                start, stop, is_good = self._range(type_, at, end)
                is_good, array = self._texts(type_, start, stop, is_good)
                return _stopped(stop, end, is_good), is_good, array
            case "record":
                at, is_good, columns = self.record(kind, at, end, depth)
                names = [name for (name, _), part in zip(type_.parts, kind.parts, strict=True) if part is not None]
                return at, is_good, pa.StructArray.from_arrays(columns, names)
        return self._list(kind, at, end, depth)

    def record(self, kind: Wanted, at: Places, end: Places, depth: int) -> tuple[Places, Flags, list[Any]]:
        """Reads records. Returns an array for each wanted field."""
        if depth > DEPTH_MAX:
            none = np.zeros(len(at), bool)
            return end, none, [pa.nulls(len(at), _type_of(part)) for part in kind.parts if part is not None]
        is_good = np.ones(len(at), bool)
        columns = []
        for (_, type_), part in zip(kind.type.parts, kind.parts, strict=True):
            if part is None:
                at, is_good_here = self.skip(type_, at, end, depth + 1)
            else:
                at, is_good_here, column = self.value(part, at, end, depth + 1)
                columns.append(column)
            is_good &= is_good_here
        return _stopped(at, end, is_good), is_good, columns

    def skip(self, type_: AvroType, at: Places, end: Places, depth: int) -> tuple[Places, Flags]:
        """Reads values that are not wanted."""
        is_good = np.ones(len(at), bool)
        if len(at) == 0 or type_.kind == "null":
            return at, is_good
        if depth > DEPTH_MAX:
            return end, ~is_good
        match type_.kind:
            case "int" | "long" | "enum":
                at, is_good, numbers = self._varint(at, end)
                if type_.kind == "enum":
                    is_good &= (numbers >= 0) & (numbers < len(type_.symbols))
            case "boolean" | "float" | "double":
                at = at + type_.size_bytes
                is_good = at <= end
            case "bytes" | "string" | "fixed":
                _, at, is_good = self._range(type_, at, end)
            case "record":
                for _, part in type_.parts:
                    at, is_good_here = self.skip(part, at, end, depth + 1)
                    is_good &= is_good_here
            case "union":
                at, is_good, branch = self._varint(at, end)
                is_good &= (branch >= 0) & (branch < len(type_.parts))
                at = at.copy()
                for number, (_, part) in enumerate(type_.parts):
                    places = np.flatnonzero(is_good & (branch == number))
                    if len(places):
                        at[places], is_good[places] = self.skip(part, at[places], end[places], depth + 1)
            case _:
                at, is_good, _, _ = self._items(type_, at, end, depth)
        return _stopped(at, end, is_good), is_good

    # ---- parts of these

    def _varint(self, at: Places, end: Places) -> tuple[Places, Flags, Places]:
        """Reads numbers of a variable length, as zigzag."""
        found = self._data[at].astype(np.uint64)
        sizes = np.ones(len(at), np.int64)
        is_good = np.ones(len(at), bool)
        more = np.flatnonzero(found >= 128)
        if len(more):
            found &= np.uint64(127)
            for size in range(1, _VARINT_BYTES_MAX):
                part = self._data[at[more] + size].astype(np.uint64)
                found[more] |= (part & np.uint64(127)) << np.uint64(7 * size)
                sizes[more] = size + 1
                last = more
                more = more[part >= 128]
                if size == _VARINT_BYTES_MAX - 1:
                    is_good[last[part > 1]] = False  # more than 64 bits
                if len(more) == 0:
                    break
        behind = at + sizes
        is_good &= behind <= end
        numbers = (found >> np.uint64(1)).astype(np.int64) ^ -(found & np.uint64(1)).astype(np.int64)
        return _stopped(behind, end, is_good), is_good, numbers

    def _range(self, type_: AvroType, at: Places, end: Places) -> tuple[Places, Places, Flags]:
        """Reads lengths of texts. Returns where they begin and end."""
        if type_.kind == "fixed":
            stop = at + type_.size_bytes
            return at, np.minimum(stop, end), stop <= end
        at, is_good, lengths = self._varint(at, end)
        is_good &= (lengths >= 0) & (lengths <= end - at)
        return at, np.where(is_good, at + lengths, end), is_good

    def _texts(self, type_: AvroType, start: Places, stop: Places, is_good: Flags) -> tuple[Flags, Any]:
        if type_.logical == "decimal":
            return self._decimals(type_, start, stop, is_good)
        # Every second item of an array of all bytes; between them are the bytes of other fields.
        borders = np.empty(2 * len(start), np.int32)
        borders[0::2], borders[1::2] = np.where(is_good, start, stop), stop
        everything = pa.Array.from_buffers(
            pa.binary(), max(0, len(borders) - 1), [None, pa.py_buffer(borders), pa.py_buffer(self._data)]
        )
        array = everything.take(pa.array(np.arange(0, len(borders), 2)))
        if type_.kind != "string":
            return is_good, array
        try:
            return is_good, array.cast(pa.string())
        except pa.ArrowInvalid:
            is_text = is_utf8(array)
        array = array.take(pa.array(np.arange(len(array)), mask=~is_text)).cast(pa.string())
        return is_good & is_text, array

    def _decimals(self, type_: AvroType, start: Places, stop: Places, is_good: Flags) -> tuple[Flags, Any]:
        sizes = stop - start
        is_good = is_good & (sizes >= 1) & (sizes <= 16)
        start = np.where(is_good, start, 0)
        sizes = np.where(is_good, sizes, 1)
        places = start[:, None] + sizes[:, None] - 16 + np.arange(16)
        sign = np.where(self._data[start] >= 128, 255, 0).astype(np.uint8)
        digits = np.where(places >= start[:, None], self._data[np.maximum(places, 0)], sign[:, None])
        halves = np.ascontiguousarray(digits[:, ::-1]).view("<i8")
        is_good &= (halves[:, 1] < _DECIMAL_HIGH_MAX) & (halves[:, 1] > -_DECIMAL_HIGH_MAX)
        halves = np.ascontiguousarray(np.where(is_good[:, None], halves, 0))
        kind = pa.decimal128(38, type_.scale)
        return is_good, pa.Array.from_buffers(kind, len(start), [None, pa.py_buffer(halves)])

    # ---- lists and maps

    def _list(self, kind: Wanted, at: Places, end: Places, depth: int) -> tuple[Places, Flags, Any]:
        at, is_good, owners, starts = self._items(kind.type, at, end, depth)
        parts = []
        item_at, item_end = starts, end[owners]
        for part in kind.parts:
            assert part is not None, "items are wanted, and keys and values"
            item_at, is_good_here, array = self.value(part, item_at, item_end, depth + 1)
            is_good[owners[~is_good_here]] = False
            parts.append(array)
        offsets = np.zeros(len(at) + 1, np.int32)
        np.cumsum(np.bincount(owners, minlength=len(at)), out=offsets[1:])
        if kind.type.kind == "map":
            keys = parts[0].fill_null("")  # of bad values
            return _stopped(at, end, is_good), is_good, map_of(offsets, keys, parts[1], None)
        return _stopped(at, end, is_good), is_good, pa.ListArray.from_arrays(pa.array(offsets), parts[0])

    def _items(self, type_: AvroType, at: Places, end: Places, depth: int) -> tuple[Places, Flags, Places, Places]:
        """Finds the items of lists, which are in blocks, each with its number of items before it; a block of none is
        the last. Returns also, for each item of those that hold, the list and the place where it begins."""
        at = at.copy()
        is_good = np.ones(len(at), bool)
        left = np.zeros(len(at), np.int64)
        is_open = np.ones(len(at), bool)
        least = sum(part.min_bytes for _, part in type_.parts)
        owners: list[Places] = []
        starts: list[Places] = []
        while True:
            heads = np.flatnonzero(is_open & (left == 0))
            if len(heads):
                behind, is_good[heads], count = self._varint(at[heads], end[heads])
                sized = np.flatnonzero(is_good[heads] & (count < 0))
                if len(sized):  # the block's size in bytes follows, for readers that skip it
                    places = heads[sized]
                    behind[sized], is_good[places], _ = self._varint(behind[sized], end[places])
                count = np.where(count < 0, -np.maximum(count, -(1 << 62)), count)
                is_good[heads] &= count <= (end[heads] - behind) // least
                at[heads], left[heads] = behind, np.where(is_good[heads], count, 0)
                is_open[heads] &= is_good[heads] & (count > 0)
                continue
            places = np.flatnonzero(is_open)
            if len(places) == 0:
                break
            if len(places) < VECTOR_MIN:
                for place in places.tolist():
                    found = _Single(self._bytes, int(end[place])).items(type_, int(at[place]), int(left[place]), depth)
                    at[place], is_good[place] = found[0], found[0] >= 0
                    owners.append(np.full(len(found[1]), place))
                    starts.append(np.array(found[1], np.int64))
                break
            owners.append(places)
            starts.append(at[places])
            here, good_here = at[places], np.ones(len(places), bool)
            for _, part in type_.parts:
                here, is_good_part = self.skip(part, here, end[places], depth + 1)
                good_here &= is_good_part
            at[places], is_good[places] = here, good_here
            left[places] -= 1
            is_open[places] &= good_here
        owner = np.concatenate(owners) if owners else np.empty(0, np.int64)
        start = np.concatenate(starts) if starts else np.empty(0, np.int64)
        order = np.argsort(owner, kind="stable")
        owner, start = owner[order], start[order]
        kept = is_good[owner]
        return _stopped(at, end, is_good), is_good, owner[kept], start[kept]


class _Single:
    """A single value's bytes, up to `end`, read one after the other. Methods return the place behind; -1
    if it does not hold."""

    def __init__(self, data: bytes, end: int) -> None:
        self._data = data
        self._end = end

    def items(self, type_: AvroType, at: int, left: int, depth: int) -> tuple[int, list[int]]:
        """Reads the rest of a list: `left` items of a block, and the blocks behind it. Returns the place behind the
        list, and those of its items."""
        starts: list[int] = []
        while True:
            for _ in range(left):
                starts.append(at)
                for _, part in type_.parts:
                    at = self.skip(part, at, depth + 1)
                    if at < 0:
                        return -1, []
            at, left = self._varint(at)
            if at >= 0 and left < 0:
                at, _ = self._varint(at)
                left = -left
            if at < 0 or left > self._end - at:
                return -1, []
            if left == 0:
                return at, starts

    def skip(self, type_: AvroType, at: int, depth: int) -> int:
        if depth > DEPTH_MAX:
            return -1
        match type_.kind:
            case "null":
                return at
            case "int" | "long":
                return self._varint(at)[0]
            case "enum":
                at, number = self._varint(at)
                return at if 0 <= number < len(type_.symbols) else -1
            case "bytes" | "string":
                at, number = self._varint(at)
                return at + number if at >= 0 and 0 <= number <= self._end - at else -1
            case "boolean" | "float" | "double" | "fixed":
                return at + type_.size_bytes if at + type_.size_bytes <= self._end else -1
            case "record":
                for _, part in type_.parts:
                    at = self.skip(part, at, depth + 1)
                    if at < 0:
                        return -1
                return at
            case "union":
                at, number = self._varint(at)
                if at < 0 or not 0 <= number < len(type_.parts):
                    return -1
                return self.skip(type_.parts[number][1], at, depth + 1)
        return self.items(type_, at, 0, depth)[0]

    def _varint(self, at: int) -> tuple[int, int]:
        number = 0
        for size in range(_VARINT_BYTES_MAX):
            if at + size >= self._end:
                return -1, 0
            byte = self._data[at + size]
            number |= (byte & 127) << 7 * size
            if byte < 128:
                return (-1, 0) if number >> 64 else (at + size + 1, (number >> 1) ^ -(number & 1))
        return -1, 0


def _stopped(at: Places, end: Places, is_good: Flags) -> Places:
    """Returns the places, those that do not hold at their end."""
    return at if is_good.all() else np.where(is_good, at, end)


def _numbers(type_: AvroType, numbers: Places, is_good: Flags) -> tuple[Flags, Any]:
    """Returns an array of whole numbers, or of the times that they stand for."""
    if type_.kind == "enum":
        is_good = is_good & (numbers >= 0) & (numbers < len(type_.symbols))
        return is_good, pa.array(type_.symbols, pa.string()).take(pa.array(np.where(is_good, numbers, 0)))
    if type_.kind == "int":
        is_good = is_good & (numbers >= -(1 << 31)) & (numbers < 1 << 31)
        array = pa.array(np.where(is_good, numbers, 0).astype(np.int32))
        return is_good, array.view(_TIMES[type_.logical]) if type_.logical else array
    if not type_.logical:
        return is_good, pa.array(numbers)
    if type_.logical in _TIMES:
        return is_good, pa.array(numbers).view(_TIMES[type_.logical])
    factor = _TIMESTAMPS[type_.logical.rpartition("-")[2]]
    if factor > 1:
        is_good = is_good & (np.abs(numbers // factor) < (1 << 63) // (factor * factor))
        numbers = np.where(is_good, numbers, 0) * factor
    elif factor < 0:
        numbers = numbers // -factor
    return is_good, pa.array(numbers).view(_type_of(Wanted(type=type_)))


def _type_of(kind: Wanted) -> Any:
    """Returns the Arrow type of a wanted type's column."""
    type_ = kind.type
    if type_.logical in _TIMES:
        return _TIMES[type_.logical]
    if type_.logical == "decimal":
        return pa.decimal128(38, type_.scale)
    if type_.logical:
        return pa.timestamp("us", None if type_.logical.startswith("local-") else "UTC")
    plain = {
        "boolean": pa.bool_(), "int": pa.int32(), "long": pa.int64(), "float": pa.float32(), "double": pa.float64(),
        "bytes": pa.binary(), "fixed": pa.binary(), "string": pa.string(), "enum": pa.string(),
    }  # fmt: skip
    if type_.kind in plain:
        return plain[type_.kind]
    parts = [
        (name, _type_of(part)) for (name, _), part in zip(type_.parts, kind.parts, strict=True) if part is not None
    ]
    match type_.kind:
        case "record":
            return pa.struct([pa.field(name, part) for name, part in parts])
        case "array":
            return pa.list_(parts[0][1])
    return pa.map_(parts[0][1], parts[1][1])


def is_utf8(array: Any) -> Flags:
    """Returns, for each item of a binary array, True if it is UTF-8. Halves that are not are tried on their own, down
    to a few items: a cast that fails takes as long as a look at these."""
    found = np.ones(len(array), bool)
    ranges = [(0, len(array))]
    while ranges:
        start, end = ranges.pop()
        try:
            array.slice(start, end - start).cast(pa.string())
        except pa.ArrowInvalid:
            if end - start <= _FEW_ITEMS:
                found[start:end] = [item is None or _is_utf8(item) for item in array[start:end].to_pylist()]
            else:
                half = (start + end) // 2
                ranges += [(start, half), (half, end)]
    return found


def _is_utf8(item: bytes) -> bool:
    try:
        item.decode()
    except UnicodeDecodeError:
        return False
    return True
