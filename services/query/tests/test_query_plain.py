"""Records in the plain form: from which offset on, and how many."""

import pytest
from shformat import Records, encode_batch
from streamhouse_query.core.plain import RECORDS_MAX, plain_records


def batch(base_offset: int, count: int, epoch: int = 1) -> bytes:
    return encode_batch(Records.from_lists([b"v"] * count), base_offset=base_offset, epoch=epoch)


def test_plain_records_begin_at_the_offset_and_stop_at_the_limits() -> None:
    records = Records.from_lists(
        [b"a" * 10, None, b"", b"d" * 10],
        keys=[b"k", None, b"", b"kd"],
        timestamps_ms=[-1, 0, 1, 2],
        headers=[[("h", b"1"), ("n", None)], [], [], []],
    )
    batches = [encode_batch(records, base_offset=100, epoch=1), encode_batch(records, base_offset=104, epoch=1)]
    found, next_offset = plain_records(batches, 100, 108, 1_000)
    assert [record.offset for record in found] == list(range(100, 108)) and next_offset == 108
    first, second, third = found[:3]
    assert (first.key, first.value, first.timestamp_ms) == (b"k", b"a" * 10, -1)
    assert [(h.key, h.value, h.HasField("value")) for h in first.headers] == [("h", b"1", True), ("n", b"", False)]
    assert not second.HasField("key") and not second.HasField("value")
    assert third.HasField("key") and third.HasField("value") and third.value == b""
    assert plain_records(batches, 106, 108, 1_000)[0][0].offset == 106
    cut, next_offset = plain_records(batches, 101, 108, 1)
    assert [record.offset for record in cut] == [101, 102] and next_offset == 103, "12 bytes do not fit any more"
    one, next_offset = plain_records(batches, 103, 108, 1)
    assert [record.offset for record in one] == [103] and next_offset == 104
    many = encode_batch(Records.from_lists([b""] * (RECORDS_MAX + 5)), base_offset=0, epoch=1)
    found, next_offset = plain_records([many], 0, RECORDS_MAX + 5, 1 << 20)
    assert len(found) == next_offset == RECORDS_MAX


def test_plain_records_with_large_headers_stop_at_the_limit() -> None:
    """A batch may hold 64 MiB of them, which as one response would be too large to be sent, at every try."""
    headers = [[("h" * 50, b"v" * 50), ("n", None)]] * 100
    records = Records.from_lists([b"x"] * 100, headers=headers)
    batches = [encode_batch(records, base_offset=base, epoch=1) for base in (0, 100)]
    for offset in (0, 50, 93):
        found, next_offset = plain_records(batches, offset, 200, 1_000)
        assert [record.offset for record in found] == list(range(offset, next_offset))
        assert sum(len(h.key) + len(h.value) for record in found for h in record.headers) in range(1, 1_000)
    found, next_offset = plain_records(batches, 99, 200, 1)
    assert (len(found), next_offset) == (1, 100), "at least one"


@pytest.mark.parametrize("bytes_max", [1, 7, 50, 10_000])
def test_plain_records_reach_the_end_whatever_the_limit(bytes_max: int) -> None:
    batches = [batch(n * 10, 10) for n in range(5)]
    offset, seen = 0, []
    while offset < 50:
        found, next_offset = plain_records(
            [b for n, b in enumerate(batches) if (n + 1) * 10 > offset], offset, 50, bytes_max
        )
        seen += [record.offset for record in found]
        assert next_offset > offset
        offset = next_offset
    assert seen == list(range(50))
