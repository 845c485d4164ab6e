"""Records as applications see them: a record read, the place of a record written, and many records as columns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from shformat import BytesColumn, Header, HeadersColumn, MissingExtra, Records
from shproto.keys import TopicPartition as TopicPartition

TRACEPARENT = "traceparent"  # W3C trace context, https://www.w3.org/TR/trace-context/
# Version 00: 2 + 32 + 16 + 2 hex digits and three dashes.
TRACEPARENT_BYTES = 55
_PROPAGATOR = TraceContextTextMapPropagator()


class Record(NamedTuple):
    """A record as read. `key` and `value` are bytes or None (null), or the objects that the consumer's deserializers
    returned (type checkers see bytes); `timestamp_ms` counts from 1970-01-01 UTC; `headers` are (name, value) pairs, a
    value may be None."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...]

    @property
    def trace_context(self) -> Context:
        """OpenTelemetry context in which the record was sent, for the application's own spans; empty if the record has
        no valid `traceparent` header."""
        for name, value in self.headers:
            if name == TRACEPARENT and value is not None and len(value) == TRACEPARENT_BYTES:
                return _PROPAGATOR.extract({TRACEPARENT: value.decode("latin-1")}, Context())
        return Context()


# Equal to `Record._make`, without a Python call: half the time of making a record, at up to a million a second.
_make_record: Callable[[tuple[Any, ...]], Record] = partial(tuple.__new__, Record)


class OffsetAndMetadata(NamedTuple):
    """A committed position of a group: the next offset to read, and a note of the application, at most 4,096
    characters."""

    offset: int
    metadata: str = ""


class MembershipState(NamedTuple):
    """State of a consumer in its group. `state`: "out" (not started, left, or silent for max_poll_interval_ms),
    "joining" (for the first time, or because the group has forgotten the member), "rebalancing" (assigned partitions
    are not read yet: another member still holds them, or their start position is being looked up) or "stable".
    `member_id` is empty for a consumer without one; `generation` counts the group's rebalances."""

    group: str
    member_id: str
    generation: int
    state: Literal["out", "joining", "rebalancing", "stable"]


class RecordMetadata(NamedTuple):
    """Place of a written record. `offset` is -1 with acks="none": no answer was awaited."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int


class RecordBatch:
    """Records of one partition as columns, in the order of their offsets; iterates as `Record`s.

    `offsets` and `timestamps` (milliseconds since 1970-01-01 UTC) are int64 arrays of shape (n,); `keys` and `values`
    are `BytesColumn`s (`.to_list()` for Python lists, `.data`/`.ends` for the bytes as they lie); `headers` is a
    `HeadersColumn`, or None if no record has headers.
    """

    __slots__ = ("partition", "records", "topic")

    def __init__(self, topic: str, partition: int, records: Records) -> None:
        self.topic = topic
        self.partition = partition
        self.records = records

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Offsets, int64 of shape (n,), ascending."""
        return self.records.offsets

    @property
    def timestamps(self) -> NDArray[np.int64]:
        """Timestamps in milliseconds since 1970-01-01 UTC, int64 of shape (n,)."""
        return self.records.timestamps_ms

    @property
    def keys(self) -> BytesColumn:
        """Keys; `.to_list()` gives bytes, or None for a null key."""
        return self.records.keys

    @property
    def values(self) -> BytesColumn:
        """Values; `.to_list()` gives bytes, or None for a null value."""
        return self.records.values

    @property
    def headers(self) -> HeadersColumn | None:
        """Headers of the records; None if no record has headers."""
        return self.records.headers

    @property
    def size_bytes(self) -> int:
        """Total bytes of keys, values and headers."""
        return self.records.size_bytes

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"RecordBatch({self.topic!r}, {self.partition}, {len(self)} records)"

    def __iter__(self) -> Iterator[Record]:
        """Returns an iterator of the records; Python lists of the columns are made once for the whole batch."""
        columns = self.records
        keys: Any = repeat(None) if columns.keys.all_null else columns.keys.to_list()
        headers: Any = repeat(()) if columns.headers is None else map(tuple, columns.headers.to_list())
        rows = zip(
            repeat(self.topic),
            repeat(self.partition),
            columns.offsets.tolist(),
            columns.timestamps_ms.tolist(),
            keys,
            columns.values.to_list(),
            headers,
            strict=False,  # `repeat` has no end
        )
        return map(_make_record, rows)

    def slice(self, start: int, stop: int) -> "RecordBatch":
        """Returns the records at positions start to stop of this batch, without a copy."""
        return RecordBatch(self.topic, self.partition, self.records.slice(start, stop))

    def to_arrow(self) -> Any:
        """Returns a `pyarrow.RecordBatch` with columns offset, timestamp (ms, UTC), key, value, headers; the bytes are
        not copied. Topic and partition are in the schema's metadata. Raises
        MissingExtra without pyarrow."""
        try:
            import pyarrow as pa
        except ModuleNotFoundError as error:
            raise MissingExtra("to_arrow()", "pyarrow", "arrow") from error

        schema = pa.schema(
            [
                pa.field("offset", pa.int64(), nullable=False),
                pa.field("timestamp", pa.timestamp("ms", tz="UTC"), nullable=False),
                pa.field("key", pa.binary()),
                pa.field("value", pa.binary()),
                pa.field("headers", headers_type(pa), nullable=False),
            ],
            metadata={"topic": self.topic, "partition": str(self.partition)},
        )
        timestamps = pa.array(self.timestamps, pa.int64()).cast(pa.timestamp("ms", tz="UTC"))
        headers = self.headers or HeadersColumn.empty(len(self))
        columns = [pa.array(self.offsets, pa.int64()), timestamps, self.keys.to_arrow(), self.values.to_arrow()]
        return pa.RecordBatch.from_arrays([*columns, headers.to_arrow(headers_type(pa))], schema=schema)


def records_of(batches: Mapping[TopicPartition, Sequence[RecordBatch]]) -> dict[TopicPartition, list[Record]]:
    """Returns the records of batches, by partition."""
    return {where: [record for batch in found for record in batch] for where, found in batches.items()}


def headers_type(pa: Any) -> Any:
    """Returns the Arrow type of a column of headers."""
    return pa.list_(pa.struct([pa.field("key", pa.string(), nullable=False), pa.field("value", pa.binary())]))
