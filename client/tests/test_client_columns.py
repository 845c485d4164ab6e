"""Columns from Arrow to the topic: `send_columns` writes what `send_many` writes, and refuses what it refuses."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import BytesColumn, Codec, HeadersColumn, ProducerStamp, Records, decode_batch, encode_lists
from streamhouse import Consumer, Producer, errors, sync
from streamhouse.core.arrow_records import ArrowRecords
from streamhouse.core.producer_batch import ProducerBatch

from tests.platform.cluster import Cluster

COUNT = 5_000
VALUES = [None if n % 13 == 0 else b"value-%d" % n for n in range(COUNT)]
KEYS = [None if n % 11 == 0 else b"key-%d" % (n % 101) for n in range(COUNT)]
START_MS = 1_700_000_000_000


async def rows(platform: Cluster, partition: int) -> list[tuple[Any, ...]]:
    """Returns key, value, timestamp and headers of each record of a partition."""
    found: list[tuple[Any, ...]] = []
    for batch in await platform.batches("t", partition):
        records = decode_batch(batch)
        headers = records.headers or HeadersColumn.empty(len(records))
        found += zip(
            records.keys.to_list(),
            records.values.to_list(),
            records.timestamps_ms.tolist(),
            headers.to_list(),
            strict=True,
        )
    return found


async def test_columns_are_written_as_lists_are(platform: Cluster, address: str) -> None:
    await platform.create_topic("t", 5)
    parts = pa.array([b"%d" % (n % 7) for n in range(COUNT)])
    headers = {"source": b"test", "part": parts, "none": None}
    stamps = pa.array(range(START_MS * 1_000, (START_MS + COUNT) * 1_000, 1_000), pa.timestamp("us", "UTC"))
    values = pa.chunked_array([VALUES[:700], VALUES[700:]], pa.binary())
    async with Producer(address, batch_bytes=8192, idempotent=True) as producer:
        sent = await (
            await producer.send_columns("t", values, pa.array(KEYS, pa.string()), timestamps_ms=stamps, headers=headers)
        )
    written = [await rows(platform, partition) for partition in range(5)]
    # By where the answer says that they are: the order of records without a key is by batch.
    where = zip(sent.partitions.tolist(), sent.offsets.tolist(), strict=True)
    expected = [
        (KEYS[n], VALUES[n], START_MS + n, [("source", b"test"), ("part", b"%d" % (n % 7)), ("none", None)])
        for n in range(COUNT)
    ]
    assert [written[partition][offset] for partition, offset in where] == expected
    assert sum(map(len, written)) == COUNT
    keyed = np.array([key is not None for key in KEYS])
    async with Producer(address) as producer:
        again = await (await producer.send_many("t", VALUES, keys=KEYS))
    assert (again.partitions == sent.partitions)[keyed].all(), "the partitions are those of the keys"


async def test_columns_and_single_records_keep_their_order(platform: Cluster, address: str) -> None:
    await platform.create_topic("t", 1)
    async with Producer(address, batch_bytes=2_000, linger_ms=100) as producer:
        for n in range(0, 100, 10):
            await producer.send("t", b"%d" % n, key=b"k" if n % 20 else None)
            await producer.send_columns("t", pa.array([b"%d" % m for m in range(n + 1, n + 5)]))
            await producer.send_many("t", [b"%d" % m for m in range(n + 5, n + 10)], headers=[{"h": b""}] * 5)
    found = await rows(platform, 0)
    assert [value for _, value, _, _ in found] == [b"%d" % n for n in range(100)]
    assert [headers for _, _, _, headers in found] == [[("h", b"")] if n % 10 >= 5 else [] for n in range(100)]


async def test_what_a_consumer_reads_as_arrow_is_written_back_as_it_was(platform: Cluster, address: str) -> None:
    await platform.create_topic("t", 1)
    await platform.create_topic("copy", 1)
    async with Producer(address) as producer:
        await producer.send_many(
            "t", VALUES, keys=KEYS, headers=[{"n": b"%d" % n} if n % 2 else {} for n in range(COUNT)]
        )
        await producer.flush()
        async with Consumer(address, ["t"], stop_at_end=True) as consumer:
            async for batch in consumer.batches():
                table = batch.to_arrow()
                await producer.send_columns(
                    "copy",
                    table["value"],
                    table["key"],
                    headers=table["headers"],
                    timestamps_ms=table["timestamp"],
                    partition=0,
                )
    copy = [decode_batch(batch) for batch in await platform.batches("copy", 0)]
    records = Records.concat(copy)
    original = Records.concat([decode_batch(batch) for batch in await platform.batches("t", 0)])
    assert records.values.to_list() == VALUES
    assert records.keys.to_list() == KEYS
    assert records.timestamps_ms.tolist() == original.timestamps_ms.tolist()
    assert records.headers is not None
    assert original.headers is not None
    assert records.headers.to_list() == original.headers.to_list()


async def test_a_partitioner_of_the_application_chooses_for_columns_too(platform: Cluster, address: str) -> None:
    await platform.create_topic("t", 3)

    def by_last_digit(topic: str, key: bytes | None, partitions: int) -> int:
        return int(key or b"0") % partitions

    keys = pa.array([b"%d" % n for n in range(300)])
    async with Producer(address, partitioner=by_last_digit) as producer:
        sent = await (await producer.send_columns("t", keys, keys))
    assert sent.partitions.tolist() == [n % 3 for n in range(300)]


def test_the_synchronous_producer_sends_columns(server: Any) -> None:
    with sync.Admin(server.address) as admin:
        admin.create_topic("s", 2)
    with sync.Producer(server.address) as producer:
        sent = producer.send_columns("s", pa.array(VALUES), pa.array(KEYS), timestamps_ms=START_MS).result()
    assert len(sent.offsets) == COUNT
    assert sorted(set(sent.partitions.tolist())) == [0, 1]
    with sync.Producer(server.address, partitioner=lambda topic, key, partitions: 1) as producer:
        assert producer.send_columns("s", pa.array(VALUES)).result().partitions.tolist() == [1] * COUNT
    with pytest.raises(errors.InvalidArgument, match="closed"):
        producer.send_columns("s", pa.array(VALUES))


HEADERS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.binary())]))
BAD_NAME = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")]
)
TWO = pa.array([b"1", b"2"])


@pytest.mark.parametrize(
    ("kind", "match", "given"),
    [
        (TypeError, "values: an array of int64 has no bytes", {"values": pa.array([1])}),
        (TypeError, "values: a pyarrow Array", {"values": [b"1"]}),
        (TypeError, "keys: an array of bool", {"values": TWO, "keys": pa.array([True, False])}),
        (errors.InvalidArgument, "keys has 1 entries for 2 values", {"values": TWO, "keys": pa.array([b"k"])}),
        (errors.InvalidArgument, "timestamps_ms has 1 entries", {"values": TWO, "timestamps_ms": pa.array([1])}),
        (errors.InvalidArgument, "1 nulls", {"values": TWO, "timestamps_ms": pa.array([1, None])}),
        (errors.InvalidArgument, r"timestamps_ms\[1\] is", {"values": TWO, "timestamps_ms": pa.array([1, 1 << 60])}),
        (TypeError, "not of double", {"values": TWO, "timestamps_ms": pa.array([1.5, 2.5])}),
        (errors.InvalidArgument, r"headers\['h'\] has 1", {"values": TWO, "headers": {"h": pa.array([b"1"])}}),
        (TypeError, r"headers\['h'\]: a pyarrow", {"values": TWO, "headers": {"h": 5}}),
        (TypeError, "names of text", {"values": TWO, "headers": {b"h": b""}}),
        (errors.InvalidArgument, "is no text", {"values": TWO, "headers": {"\ud800": b""}}),
        (TypeError, "headers must be", {"values": TWO, "headers": [{"h": b""}] * 2}),
        (TypeError, "headers: headers must be a list", {"values": TWO, "headers": TWO}),
        (errors.InvalidArgument, "headers has 1 entries", {"values": TWO, "headers": pa.array([[]], HEADERS)}),
        (
            errors.InvalidArgument,
            "headers: ",
            {
                "values": pa.array([b"1"]),
                "headers": pa.ListArray.from_arrays(
                    pa.array([0, 1], pa.int32()),
                    pa.StructArray.from_arrays([BAD_NAME, pa.array([b""])], fields=list(HEADERS.value_type)),
                ),
            },
        ),
        (
            errors.InvalidArgument,
            r"headers\[1\] holds 257 headers",
            {"values": TWO, "headers": pa.array([[], [{"name": "h", "value": b""}] * 257], HEADERS)},
        ),
        (errors.BatchTooLarge, "record 1 has", {"values": pa.array([b"1", bytes(17 << 20)])}),
        (errors.UnknownPartition, "partitions 0 to 0", {"values": TWO, "partition": 1}),
    ],
)
async def test_what_cannot_be_sent_is_refused_by_name_and_nothing_is_sent(
    platform: Cluster, address: str, kind: type[Exception], match: str, given: dict[str, Any]
) -> None:
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        with pytest.raises(kind, match=match):
            await producer.send_columns("t", **given)
    assert await platform.batches() == []


async def test_a_producer_with_a_serializer_takes_no_columns(platform: Cluster, address: str) -> None:
    await platform.create_topic("t", 1)
    async with Producer(address, value_serializer=str.encode) as producer:
        with pytest.raises(errors.InvalidArgument, match="serializer"):
            await producer.send_columns("t", TWO)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_any_unit_are_rounded_down_to_milliseconds(unit: str) -> None:
    moments = [datetime(1969, 12, 31, 23, 59, 58, tzinfo=UTC), datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)]
    stamps = pa.array(moments, pa.timestamp(unit, "UTC"))
    found = ArrowRecords.of(TWO, None, stamps, None).records.timestamps_ms
    assert found.tolist() == [int(moment.timestamp() * 1000) for moment in moments]
    if unit in {"us", "ns"}:
        less = pa.array([-1], pa.timestamp(unit))
        assert ArrowRecords.of(TWO[:1], None, less, None).records.timestamps_ms.tolist() == [-1]


record = st.tuples(
    st.one_of(st.none(), st.binary(max_size=4)),
    st.one_of(st.none(), st.binary(max_size=4)),
    st.integers(0, 1 << 40),
    st.lists(st.tuples(st.text(max_size=2), st.one_of(st.none(), st.binary(max_size=2))), max_size=2),
)
calls = st.lists(
    st.tuples(st.sampled_from(["append", "extend", "columns"]), st.lists(record, min_size=1, max_size=4)),
    min_size=1,
    max_size=6,
)


@given(calls)
def test_a_batch_holds_its_records_in_order_however_they_came(calls: list[Any]) -> None:
    batch = ProducerBatch("t", 0, 0)
    batch.stamp = ProducerStamp(1, 0, 0)
    every: list[Any] = []
    for kind, some in calls:
        values, keys, stamps, headers = map(list, zip(*some, strict=True))
        first = len(every)
        every += some
        if kind == "append":
            positions = [batch.append(v, k, tuple(h), t, 1) for v, k, t, h in some]
            assert positions == list(range(first, len(every)))
        elif kind == "extend":
            has_headers = any(headers)
            assert batch.extend(values, keys, list(map(tuple, headers)) if has_headers else None, stamps, 1) == first
        else:
            columns = Records.from_lists(values, keys, stamps, headers)
            assert batch.extend_columns(columns, 1) == first
    values, keys, stamps, headers = map(list, zip(*every, strict=True))
    expected = encode_lists(values, keys, stamps, headers, codec=Codec.NONE, producer=batch.stamp)
    assert batch.encode(Codec.NONE) == expected
    batch.stamp = ProducerStamp(2, 0, 7)
    assert batch.encode(Codec.NONE) == encode_lists(
        values, keys, stamps, headers, codec=Codec.NONE, producer=batch.stamp
    )


@given(st.lists(record, min_size=1, max_size=12), st.data())
def test_picked_records_are_those_at_the_positions(some: list[Any], data: st.DataObject) -> None:
    values, keys, stamps, headers = map(list, zip(*some, strict=True))
    as_arrow = [[{"name": name, "value": value} for name, value in pairs] for pairs in headers]
    records = ArrowRecords.of(
        pa.array(values, pa.binary()), pa.array(keys, pa.binary()), np.array(stamps), pa.array(as_arrow, HEADERS)
    )
    chosen = sorted(data.draw(st.sets(st.integers(0, len(some) - 1), min_size=1)))
    picked = records.pick(np.array(chosen))
    assert picked.values.to_list() == [values[at] for at in chosen]
    assert picked.keys.to_list() == [keys[at] for at in chosen]
    assert picked.timestamps_ms.tolist() == [stamps[at] for at in chosen]
    assert (picked.headers or HeadersColumn.empty(len(chosen))).to_list() == [headers[at] for at in chosen]
    start, stop = min(chosen), max(chosen) + 1
    assert records.pick(range(start, stop)).values.to_list() == values[start:stop]
    column = records.key_column(start, stop)
    assert column is not None
    assert column.to_list() == keys[start:stop]
    assert isinstance(column, BytesColumn)
