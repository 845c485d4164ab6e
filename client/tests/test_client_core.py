"""The client's decisions that need no server: cutting, room, positions, lag, options."""

from datetime import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import TIMESTAMP_MS_MAX, TIMESTAMP_MS_MIN, Codec, Records, decode_batch
from shproto.errors import DataLoss, Internal, InvalidArgument
from streamhouse.core.buffer_pool import BufferPool
from streamhouse.core.lag import Lag, lag_of
from streamhouse.core.options import (
    ConsumerOptions,
    ProducerOptions,
    partitions_of,
)
from streamhouse.core.positions import BatchSpan, Cursor, Portion, check_continuity, trim
from streamhouse.core.producer_batch import ProducerBatch
from streamhouse.core.record_checks import RecordColumns, check_record, cut
from streamhouse.records import RecordBatch, TopicPartition

pytestmark = pytest.mark.quick

WHERE = TopicPartition("t", 0)


# ---- cutting into batches


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 60), st.integers(0, 80))
def test_cut_covers_everything_within_the_limit(sizes, limit, begun):
    parts = list(cut(np.array(sizes, np.int64), limit, begun))
    assert [index for start, stop in parts for index in range(start, stop)] == list(range(len(sizes)))
    for number, (start, stop) in enumerate(parts):
        total = sum(sizes[start:stop])
        fits_behind = number == 0 and begun + total <= limit
        assert fits_behind or total <= limit or stop - start == 1
    if parts and begun + sizes[0] <= limit:
        start, stop = parts[0]
        assert begun + sum(sizes[start:stop]) <= limit


records = st.tuples(
    st.one_of(st.none(), st.binary(max_size=5)),
    st.one_of(st.none(), st.binary(max_size=5)),
    st.lists(st.tuples(st.text(max_size=3), st.one_of(st.none(), st.binary(max_size=3))), max_size=2),
    st.integers(TIMESTAMP_MS_MIN, TIMESTAMP_MS_MAX),
)


@pytest.mark.long
@given(st.lists(st.lists(records, min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_gathering_one_by_one_or_many_is_the_same(groups, data):
    one, many, expected = ProducerBatch("t", 0, 0.0), ProducerBatch("t", 0, 0.0), []
    for group in groups:
        for value, key, headers, timestamp_ms in group:
            one.append(*check_record(value, key, headers, timestamp_ms))
        values, keys, headers, timestamps = (list(column) for column in zip(*group, strict=True))
        checked = RecordColumns.of(
            values, keys if any(k is not None for k in keys) else None, timestamps, headers if any(headers) else None
        )
        many.extend(*checked.pick(np.arange(len(group))), int(checked.sizes.sum()))
        expected += group
    assert one.size_bytes == many.size_bytes
    for batch in (one, many):
        columns = decode_batch(batch.encode(Codec.NONE))
        assert columns.values.to_list() == [value for value, _, _, _ in expected]
        assert columns.keys.to_list() == [key for _, key, _, _ in expected]
        assert columns.timestamps_ms.tolist() == [timestamp_ms for _, _, _, timestamp_ms in expected]
        found = columns.headers.to_list() if columns.headers is not None else [[] for _ in expected]
        assert found == [headers for _, _, headers, _ in expected]


# ---- room


def test_room_is_given_in_the_order_asked():
    pool = BufferPool(100)
    assert pool.try_take(80)
    assert not pool.try_take(30)
    pool.enqueue("big", 90)
    pool.enqueue("small", 10)
    assert not pool.try_take(5), "somebody waits already"
    assert pool.admit() == []
    pool.give_back(80)
    assert pool.admit() == ["big", "small"]
    assert pool.used_bytes == 100


def test_one_larger_than_the_room_is_let_in_alone():
    pool = BufferPool(100)
    assert pool.try_take(500)
    pool.enqueue("next", 1)
    assert pool.admit() == []
    pool.give_back(500)
    assert pool.admit() == ["next"]


def test_who_gave_up_waiting_is_passed_over():
    pool = BufferPool(10)
    assert pool.try_take(10)
    pool.enqueue("a", 10)
    pool.enqueue("b", 10)
    assert pool.leave("a")
    pool.give_back(10)
    assert pool.admit() == ["b"]
    assert not pool.leave("b")


# ---- positions


def spans(*rows):
    return [BatchSpan(*row) for row in rows]


@pytest.mark.parametrize(
    ("offset", "epoch", "batches", "next_offset"),
    [
        (0, 0, [(0, 10, 1), (10, 20, 1)], 20),
        (5, 0, [(0, 10, 1)], 10),  # a block begins before what was asked for
        (10, 1, [(10, 20, 1), (100, 110, 2)], 110),  # the next epoch's range begins further on
        (10, 1, [(100, 110, 2)], 110),
        (10, 0, [(100, 110, 2)], 110),  # started inside a gap
        (10, 1, [], 100),
        (10, 1, [], 10),
        (0, 1, [(0, 10, 1)], 100),
    ],
)
def test_what_follows_on(offset, epoch, batches, next_offset):
    cursor = Cursor.at(WHERE, offset)
    cursor.last_epoch = epoch
    check_continuity(cursor, spans(*batches), next_offset)


@pytest.mark.parametrize(
    ("offset", "epoch", "batches", "next_offset", "error"),
    [
        (0, 0, [(0, 10, 1), (11, 20, 1)], 20, DataLoss),
        (5, 1, [(6, 10, 1)], 10, DataLoss),
        (10, 0, [(0, 10, 1)], 10, Internal),  # nothing of what was asked for
        (0, 0, [(0, 10, 1), (5, 15, 1)], 15, Internal),
        (0, 0, [(0, 10, 1), (0, 10, 1)], 10, Internal),
        (0, 0, [(0, 10, 1)], 9, Internal),
        (10, 1, [], 9, Internal),
        (10, 2, [(10, 20, 1)], 20, Internal),  # an older epoch after a newer one
    ],
)
def test_what_does_not_follow_on(offset, epoch, batches, next_offset, error):
    cursor = Cursor.at(WHERE, offset)
    cursor.last_epoch = epoch
    with pytest.raises(error):
        check_continuity(cursor, spans(*batches), next_offset)


def portion_of(count, cursor, end=None):
    batch = RecordBatch(*cursor.where, Records.from_lists([b"%d" % n for n in range(count)]))
    return Portion(cursor=cursor, batch=batch, end_offset=count if end is None else end)


def test_rows_go_on_where_the_cursor_is_and_the_last_one_comes_alone():
    cursor = Cursor.at(WHERE, 0)
    portion = portion_of(5, cursor, end=10)
    rows, is_last = portion.rows(2)
    assert (rows.offsets.tolist(), is_last) == ([0, 1], False)
    cursor.delivered = 1
    rows, is_last = portion.rows(100)
    assert (rows.offsets.tolist(), is_last) == ([1, 2, 3], False)
    cursor.delivered = 4
    rows, is_last = portion.rows(100)
    assert (rows.offsets.tolist(), is_last) == ([4], True)
    cursor.delivered = 5
    assert portion.rows(100) == (None, False)
    assert portion.rest() is None


def test_rows_are_bounded_in_bytes():
    batch = RecordBatch(*WHERE, Records.from_lists([bytes(100_000)] * 10))
    rows, is_last = Portion(cursor=Cursor.at(WHERE, 0), batch=batch, end_offset=10).rows(256)
    assert (len(rows), is_last) == (2, False)


def test_nothing_is_handed_over_once_the_partition_is_lost():
    cursor = Cursor.at(WHERE, 0)
    portion = portion_of(3, cursor)
    cursor.live = False
    assert portion.rows(100) == (None, False)
    assert portion.rest() is None


def test_the_rest_of_a_portion_and_its_cut():
    cursor = Cursor.at(WHERE, 0)
    portion = portion_of(10, cursor)
    cursor.delivered = 2
    assert portion.rest().offsets.tolist() == list(range(2, 10))
    records = portion.batch.records
    portion.cut_at(4)
    assert (portion.end_offset, portion.batch.offsets.tolist()) == (4, [0, 1, 2, 3])
    portion.cut_at(0)
    assert portion.batch is None
    assert trim(records, 7).offsets.tolist() == [7, 8, 9]


# ---- lag


@pytest.mark.parametrize(
    ("position", "lag"),
    [
        (1100, Lag(50, True)),  # in the newest epoch: no gaps ahead
        (1150, Lag(0, True)),
        (90, Lag(150, False)),  # 100 in the old epoch and 50 in the newest, at most
        (0, Lag(150, False)),
    ],
)
def test_lag_counts_records(position, lag):
    assert lag_of(position, 0, 1150, newest_start=1100, newest_registered_end=1100, stored=100) == lag


def test_lag_of_a_single_epoch_is_exact():
    assert lag_of(0, 10, 100, newest_start=0, newest_registered_end=50, stored=40) == Lag(90, True)


# ---- options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"session_timeout_ms": 1}, "session_timeout_ms is 1, must be 100 to 3600000"),
        ({"session_timeout_ms": 3_600_001}, "session_timeout_ms is 3600001, must be 100 to 3600000"),
        ({"session_timeout_ms": -1}, "session_timeout_ms is -1, must be"),
        ({"group": ""}, "group is '', must be 1 to 249 characters"),
        ({"group": "g" * 250}, "group is .*, must be 1 to 249"),
        ({"group": "a\0b"}, "group is .*NUL"),
        ({"group": b"g"}, "group is b'g'"),
        ({"client_id": "c" * 250}, "client_id is .*, must be 0 to 249"),
        ({"auto_commit": "no"}, "auto_commit is 'no', must be True or False"),
        ({"stop_at_end": 1}, "stop_at_end is 1"),
        ({"end": -1}, "end is -1, must be 0 to"),
        ({"end": "latest"}, "end is 'latest', must be an offset or a datetime"),
        ({"end": datetime(2020, 1, 1)}, "end is .* without a time zone"),
        ({"end": 7, "start": 8}, "end is 7, must not be below start, 8"),
        ({"start": True}, "start is True"),
        ({"start": -(2**63)}, "start is -9223372036854775808, must be -9223372036854775807 to"),
        (
            {"start": "newest"},
            r"start is 'newest', must be earliest, latest, an offset, -N \(the last N records\) or a datetime$",
        ),
        ({"fetch_bytes": 0}, "fetch_bytes is 0, must be 1 to 33554432"),
        ({"fetch_bytes": 1.5}, r"fetch_bytes is 1.5, must be a whole number of bytes \(int\), 1 to 33554432$"),
        ({"prefetch_bytes_max": 0}, "prefetch_bytes_max is 0"),
        ({"auto_commit_interval_ms": 9}, "auto_commit_interval_ms is 9, must be 10 to"),
        ({"request_timeout_ms": 0}, "request_timeout_ms is 0, must be 1 to"),
        ({"retry_timeout_ms": 0}, "retry_timeout_ms is 0, must be 1 to"),
    ],
)
def test_a_consumers_option_out_of_its_limits_is_named(options, named):
    with pytest.raises(InvalidArgument, match=named) as caught:
        ConsumerOptions(**options)
    assert caught.value.details["field"] == next(iter(options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"acks": "all"}, "acks is 'all', must be one of none, wal, durable"),
        ({"compression": "snappy"}, "compression is 'snappy', must be one of lz4, zstd, gzip, none"),
        ({"linger_ms": True}, r"linger_ms is True, must be a whole number of milliseconds \(int\), 0 to 60000$"),
        ({"batch_bytes": 0}, "batch_bytes is 0"),
        ({"max_in_flight": 1025}, "max_in_flight is 1025, must be 1 to 1024"),
        ({"buffer_bytes_max": 1}, "buffer_bytes_max is 1, must be 1048576 to"),
        ({"idempotent": None}, "idempotent is None"),
        ({"client_id": None}, "client_id is None"),
        ({"delivery_timeout_ms": 0}, "delivery_timeout_ms is 0"),
        ({"request_timeout_ms": "10"}, "request_timeout_ms is '10'"),
    ],
)
def test_a_producers_option_out_of_its_limits_is_named(options, named):
    with pytest.raises(InvalidArgument, match=named) as caught:
        ProducerOptions(**options)
    assert caught.value.details["field"] == next(iter(options))


def test_what_to_read_is_named_in_full():
    assert partitions_of([("t", 1), ["t", np.int64(0)], ("t", 1)]) == [("t", 1), ("t", 0)]
    for wrong in (["t"], [("t",)], [("t", "0")], [(0, "t")], [None]):
        with pytest.raises(InvalidArgument, match=r"list of \(topic, partition\)"):
            partitions_of(wrong)
