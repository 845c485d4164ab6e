"""Topics as a source of Spark, by its Python Data Source API: `spark.dataSource.register(StreamHouseSource)`.

A batch of Spark is a range of offsets of each partition. Spark keeps the ranges in its checkpoint and asks for the same
ones again after a failure, so that the records of a batch never change. Columns are those of Spark's Kafka source.
Needs the extra `spark`, and Java for Spark itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyspark.sql.datasource import DataSource, DataSourceReader, DataSourceStreamReader, InputPartition
from shproto.errors import InvalidArgument

SCHEMA = (
    "key BINARY, value BINARY, headers ARRAY<STRUCT<key: STRING, value: BINARY>>, topic STRING, partition INT, "
    "offset BIGINT, timestamp TIMESTAMP"
)
OPTIONS = ("bootstrap", "topic", "start")


class OffsetRange(InputPartition):  # type: ignore[misc]
    """Records of a partition from `start` to before `end`: a task of Spark."""

    def __init__(self, partition: int, start: int, end: int) -> None:
        self.partition = partition
        self.start = start
        self.end = end


class StreamHouseSource(DataSource):  # type: ignore[misc]
    """The source `streamhouse`. Options: `bootstrap`, as of the SDK; `topic`; `start`: where a new query begins,
    `earliest` (default) or `latest`. Raises InvalidArgument for others."""

    @classmethod
    def name(cls) -> str:
        """Returns the name of the format."""
        return "streamhouse"

    def schema(self) -> str:
        """Returns the columns."""
        return SCHEMA

    def reader(self, schema: Any) -> BatchReader:
        """Returns the reader of a bounded query, up to where the log ends when the query begins."""
        return BatchReader(self.options)

    def streamReader(self, schema: Any) -> StreamReader:
        """Returns the reader of a streaming query."""
        return StreamReader(self.options)


class _Reader:
    """Reads ranges of a topic."""

    def __init__(self, options: Mapping[str, str]) -> None:
        given = {name.lower(): value for name, value in options.items() if name.lower() != "path"}
        for name in given:
            if name not in OPTIONS:
                raise InvalidArgument(
                    f"source streamhouse has no option {name!r}; it has {', '.join(OPTIONS)}", field=name
                )
        for name in ("bootstrap", "topic"):
            if not given.get(name):
                raise InvalidArgument(f"source streamhouse needs the option {name}", field=name)
        self._bootstrap = given["bootstrap"]
        self._topic = given["topic"]
        self._start = given.get("start", "earliest")
        if self._start not in ("earliest", "latest"):
            raise InvalidArgument(
                f"option start is {self._start!r}, must be earliest or latest", field="start", value=self._start
            )

    def _offsets(self, at: Any) -> dict[int, int]:
        """Returns the offset at which each partition begins or ends."""
        from streamhouse.sync import Admin

        with Admin(self._bootstrap) as admin:
            return {where.partition: found.offset for where, found in admin.offsets(self._topic, at).items()}

    def _ranges(self, start: Mapping[int, int], end: Mapping[int, int]) -> Sequence[OffsetRange]:
        """Returns a task for each partition that has records."""
        ranges = [OffsetRange(partition, start.get(partition, 0), to) for partition, to in sorted(end.items())]
        return [part for part in ranges if part.start < part.end]

    def read(self, partition: OffsetRange) -> Iterator[Any]:
        """Yields the records of a range as `pyarrow.RecordBatch`es, in a process of Spark's. Raises OffsetBelowStart if
        the log does not have the range's beginning any more, DataLoss for records that were declared lost."""
        import pyarrow as pa

        from streamhouse.sync import Consumer

        where = (self._topic, partition.partition)
        # As Spark has it: it compares the names of inner fields, too.
        pair = pa.struct([pa.field("key", pa.string()), pa.field("value", pa.binary())])
        headers = pa.list_(pa.field("element", pair))
        with Consumer(self._bootstrap, assign=[where], start=partition.start, end=partition.end) as consumer:
            for batch in consumer.batches():
                found = batch.to_arrow()
                yield pa.RecordBatch.from_pydict(
                    {
                        "key": found.column("key"),
                        "value": found.column("value"),
                        "headers": found.column("headers").cast(headers),
                        "topic": pa.repeat(self._topic, len(batch)),
                        "partition": pa.repeat(pa.scalar(partition.partition, pa.int32()), len(batch)),
                        "offset": found.column("offset"),
                        "timestamp": found.column("timestamp").cast(pa.timestamp("us", "UTC")),
                    }
                )


class BatchReader(_Reader, DataSourceReader):  # type: ignore[misc]
    """Reads all records up to the end that the log has when a query begins."""

    def partitions(self) -> Sequence[OffsetRange]:
        """Returns the tasks of the query."""
        return self._ranges(self._offsets(self._start), self._offsets("latest"))


class StreamReader(_Reader, DataSourceStreamReader):  # type: ignore[misc]
    """Reads what was added since the last batch. Offsets are {partition: next offset}, kept by Spark as JSON."""

    def initialOffset(self) -> dict[str, int]:
        """Returns where a new query begins."""
        return {str(partition): offset for partition, offset in self._offsets(self._start).items()}

    def latestOffset(self) -> dict[str, int]:
        """Returns the ends of the partitions."""
        return {str(partition): offset for partition, offset in self._offsets("latest").items()}

    def partitions(self, start: Mapping[str, int], end: Mapping[str, int]) -> Sequence[OffsetRange]:
        """Returns the tasks of a batch. A partition that was added since begins at its first record."""
        return self._ranges(_by_number(start), _by_number(end))

    def commit(self, end: Mapping[str, int]) -> None:
        """Does nothing: Spark's checkpoint has the offsets."""


def _by_number(offsets: Mapping[str, int]) -> dict[int, int]:
    return {int(partition): offset for partition, offset in offsets.items()}
