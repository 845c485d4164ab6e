"""Numbered streams: SequencedWriter over the real cluster, with faults of the way to it."""

import asyncio
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from shcluster.peers import Peers
from shformat import BytesColumn, HeadersColumn, Records, decode_batch
from shproto.errors import (
    BatchTooLarge,
    InvalidArgument,
    NotLeader,
    Overloaded,
    ProducerFenced,
    SequenceGap,
    Unavailable,
    UnknownProducer,
    UnknownTopic,
)
from streamhouse import Admin, sync
from streamhouse.sequenced import SequencedProducer, SequencedWriter, new_producer_id, sequenced_writer

from tests.platform.cluster import Cluster

TIMESTAMP_MS = 1_700_000_000_000


@pytest.fixture
async def producer_id(platform: Cluster, address: str) -> int:
    await platform.create_topic("t")
    return await new_producer_id(address)


def numbers(first: int, stop: int) -> BytesColumn:
    return BytesColumn.from_list([b"%d" % number for number in range(first, stop)])


async def write(writer: SequencedWriter, first: int, stop: int) -> int:
    return await writer.write(first, numbers(first, stop), timestamps_ms=TIMESTAMP_MS)


async def there(platform: Cluster) -> list[int]:
    return [int(value or b"-1") for value in await platform.values()]


async def test_a_stream_is_written_on_by_the_next_epoch(platform: Cluster, address: str, producer_id: int) -> None:
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, acks="wal") as writer:
        assert (await writer.fence()).next_sequence == 0
        assert await write(writer, 0, 5) == 4
        assert await write(writer, 5, 9) == 8
        assert await write(writer, 3, 9) == 8, "what is there is not written again"
        assert await write(writer, 3, 5) == -1, "others follow it"
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=2) as successor:
        fence = await successor.fence()
        assert (fence.next_sequence, fence.last_record_count, fence.last_offset) == (9, 4, 8)
        await write(successor, 9, 10)
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1) as zombie:
        with pytest.raises(ProducerFenced):
            await write(zombie, 10, 11)
    assert await there(platform) == list(range(10))


async def test_large_writes_are_cut_and_sent_many_at_a_time(platform: Cluster, address: str, producer_id: int) -> None:
    values = BytesColumn.from_list([b"%d" % n + b" " * 3000 for n in range(300)])
    keys = BytesColumn.from_list([b"k"] * 300)
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, acks="wal") as writer:
        writer._batch_bytes = 10_000
        assert await writer.write(0, values, keys, timestamps_ms=TIMESTAMP_MS) == 299
    assert len(await platform.batches()) == 100, "3 records of 3 kB each"
    assert [int(value or b"-1") for value in await platform.values()] == list(range(300))


async def test_columns_of_arrow_arrays_are_written_as_they_are(
    platform: Cluster, address: str, producer_id: int
) -> None:
    count = 1_000
    values = pa.array([f"{number}" for number in range(count)])
    keys = pa.array([None if number % 3 else b"k" for number in range(count)])
    operations = [b"+I", b"-U", None, b""]
    op = BytesColumn.from_list([operations[number % 4] for number in range(count)])
    headers = HeadersColumn.of_columns([("op", op), ("n", BytesColumn.from_arrow(values))])
    stamps = np.arange(TIMESTAMP_MS, TIMESTAMP_MS + count)
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, acks="wal") as writer:
        writer._batch_bytes = 10_000  # some 80 records, each with the two headers
        await writer.write(
            0, BytesColumn.from_arrow(values), BytesColumn.from_arrow(keys), headers=headers, timestamps_ms=stamps
        )
    batches = await platform.batches()
    assert 10 < len(batches) < 20
    records = Records.concat(list(map(decode_batch, batches)))
    assert records.values.to_list() == [b"%d" % number for number in range(count)]
    assert records.keys.to_list() == keys.to_pylist()
    assert records.timestamps_ms.tolist() == stamps.tolist()
    assert records.headers is not None
    assert records.headers.to_list() == headers.to_list()


async def test_records_without_bytes_are_cut_into_batches_too(
    platform: Cluster, address: str, producer_id: int
) -> None:
    nulls = BytesColumn.nulls(70_000)
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, acks="wal") as writer:
        await writer.write(0, nulls, timestamps_ms=TIMESTAMP_MS)
    assert len(await platform.batches()) == 3, "32 bytes each count for"


@pytest.mark.parametrize("request_arrives", [True, False])
@pytest.mark.parametrize("after", [0, 1, 5, 9])
async def test_a_cut_stream_loses_and_doubles_nothing(
    platform: Cluster, address: str, producer_id: int, after: int, request_arrives: bool
) -> None:
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, acks="wal") as writer:
        writer._batch_bytes = 10
        await writer.fence()
        platform.faults.cut("produce", after, request_arrives=request_arrives)
        await write(writer, 0, 100)
        await write(writer, 100, 101)
    assert await there(platform) == list(range(101))


@pytest.mark.parametrize("error", [Overloaded("full", retry_after_ms=1), NotLeader("moved"), Unavailable("away")])
@pytest.mark.parametrize("method", ["produce", "fence_producer", "get_metadata"])
async def test_refusals_are_tried_again(
    platform: Cluster, address: str, producer_id: int, method: str, error: Exception
) -> None:
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, acks="wal") as writer:
        platform.faults.fail(method, error, 2)  # type: ignore[arg-type]
        assert await write(writer, 0, 5) == 4
    assert platform.faults.failing(method) == 0
    assert await there(platform) == list(range(5))


async def test_a_new_leader_is_fenced_before_it_gets_anything(
    platform: Cluster, address: str, producer_id: int
) -> None:
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, acks="wal") as writer:
        await write(writer, 0, 5)
        await platform.change_leader("t")
        await write(writer, 5, 9)
    assert await there(platform) == list(range(9))


async def test_a_gap_is_named_with_the_place_to_go_on(platform: Cluster, address: str, producer_id: int) -> None:
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, acks="wal") as writer:
        await write(writer, 0, 5)
        with pytest.raises(SequenceGap) as gap:
            await write(writer, 7, 9)
        assert gap.value.details["expected"] == "5"
        await write(writer, int(gap.value.details["expected"]), 9)
    assert await there(platform) == list(range(9))


async def test_what_cannot_be_written_is_an_error_at_once(platform: Cluster, address: str, producer_id: int) -> None:
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, acks="wal") as writer:
        with pytest.raises(InvalidArgument, match="keys has 1 entries for 2 values"):
            await writer.write(0, numbers(0, 2), numbers(0, 1), timestamps_ms=TIMESTAMP_MS)
        with pytest.raises(BatchTooLarge, match="sequence 1 has 17825824 bytes"):
            await writer.write(0, BytesColumn.from_list([b"0", bytes(17 << 20)]), timestamps_ms=TIMESTAMP_MS)
        with pytest.raises(InvalidArgument, match="timestamp"):
            await writer.write(0, numbers(0, 2), timestamps_ms=np.array([0, 1 << 60]))
        with pytest.raises(InvalidArgument, match="a record has 257 headers"):
            many = HeadersColumn.from_list([[("h", b"")], [("h", b"")] * 257])
            await writer.write(0, numbers(0, 2), headers=many, timestamps_ms=TIMESTAMP_MS)
        with pytest.raises(InvalidArgument, match="first_sequence is -1"):
            await write(writer, -1, 2)
        assert await there(platform) == [], "nothing is written of a call that cannot be done"
        await write(writer, 0, 2)
        await platform.recreate_topic("t", 1)
        with pytest.raises(UnknownTopic):
            for number in range(2, 10_000):  # until the agent has heard that the topic is gone
                await write(writer, number, number + 1)
    for wrong in (0, 17 << 20):
        with pytest.raises(InvalidArgument, match="batch_bytes"):
            SequencedWriter(Peers(address, 1000), "t", 0, producer_id=1, producer_epoch=1, batch_bytes=wrong)
    with pytest.raises(InvalidArgument, match="acks"):
        async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, acks="none"):
            pass


async def test_a_call_ends_with_its_time_and_says_why(platform: Cluster, address: str, producer_id: int) -> None:
    platform.faults.fail("fence_producer", Unavailable("t/0: epoch 1 of agent a is not settled"))
    async with sequenced_writer(address, "t", 0, producer_id=producer_id, producer_epoch=1, timeout_ms=200) as writer:
        with pytest.raises(Unavailable, match="agent a is not settled"):
            await writer.fence()


async def test_two_epochs_at_once_write_one_stream(platform: Cluster, address: str, producer_id: int) -> None:
    async def run(epoch: int) -> None:
        async with sequenced_writer(
            address, "t", 0, producer_id=producer_id, producer_epoch=epoch, acks="wal"
        ) as writer:
            try:
                number = (await writer.fence()).next_sequence
                while number < 200:
                    await write(writer, number, number + 3)
                    number += 3
            except ProducerFenced:
                assert epoch < 5

    await asyncio.gather(*(run(epoch) for epoch in range(1, 6)))
    found = await there(platform)
    assert found == list(range(len(found)))
    assert len(found) >= 200


async def test_who_takes_a_name_over_goes_on_where_the_zombie_was_stopped(platform: Cluster, address: str) -> None:
    await platform.create_topic("t")
    async with SequencedProducer(address, "sink/t", acks="wal") as zombie:
        old = zombie.writer("t", 0)
        assert (await old.fence()).next_sequence == 0
        await write(old, 0, 7)
        async with SequencedProducer(address, "sink/t", acks="wal") as successor:
            assert successor.producer_id == zombie.producer_id
            assert (zombie.producer_epoch, successor.producer_epoch) == (1, 2)
            await write(old, 7, 9)  # not fenced yet, so what it writes counts
            new = successor.writer("t", 0)
            fence = await new.fence()
            assert (fence.last_sequence, fence.last_offset) == (8, 8)
            with pytest.raises(ProducerFenced) as refused:
                await write(old, 9, 12)
            assert (refused.value.details["offered"], refused.value.details["held"]) == ("1", "2")
            with pytest.raises(ProducerFenced):
                await old.fence()
            await write(new, fence.next_sequence, 12)
    assert await there(platform) == list(range(12))


async def test_a_take_over_without_an_answer_is_repeated(platform: Cluster, address: str) -> None:
    platform.faults.fail("init_producer", Unavailable("away"), 2)
    async with SequencedProducer(address, "sink/t") as producer:
        assert producer.producer_epoch >= 1
    assert platform.faults.calls["init_producer"] == 3
    platform.faults.fail("init_producer", Unavailable("away"))
    with pytest.raises(Unavailable, match="timeout_ms = 50"):
        async with SequencedProducer(address, "sink/t", timeout_ms=50):
            pass


async def test_a_deleted_name_begins_anew(platform: Cluster, address: str) -> None:
    async with Admin(address) as admin, SequencedProducer(address, "sink/t") as first:
        assert await admin.delete_producer("sink/t") == first.producer_id
        with pytest.raises(UnknownProducer, match="no producer 'sink/t'"):
            await admin.delete_producer("sink/t")
        async with SequencedProducer(address, "sink/t") as second:
            assert second.producer_id != first.producer_id
            assert second.producer_epoch == 1


def test_the_synchronous_admin_deletes_a_name(server: Any) -> None:
    async def take_over() -> int:
        async with SequencedProducer(server.address, "sink/t") as producer:
            return producer.producer_id

    producer_id = asyncio.run(take_over())
    with sync.Admin(server.address) as admin:
        assert admin.delete_producer("sink/t") == producer_id


async def test_a_producer_is_entered_once_and_before_it_writes(address: str) -> None:
    producer = SequencedProducer(address, "sink/t")
    with pytest.raises(InvalidArgument, match="async with"):
        producer.writer("t", 0)
    async with producer:
        with pytest.raises(InvalidArgument, match="entered before"):
            async with producer:
                pass
    for name in ("", "x" * 300, "two\nlines"):
        with pytest.raises(InvalidArgument, match="name"):
            async with SequencedProducer(address, name):
                pass
