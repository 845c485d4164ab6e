"""The agent as a whole, over a real directory, with a coordinator and a segmenter in memory."""

import asyncio
import contextlib
from pathlib import Path

from ingest_standins import CoordinatorStandIn, SegmenterStandIn, eventually, kill, pull, started
from shformat import Records, decode_batch, encode_batch
from shproto.v1 import ingest_pb2 as pb
from shproto.v1 import types_pb2


def batch(*values: bytes, **kwargs: object) -> bytes:
    return encode_batch(Records.from_lists(list(values), timestamps_ms=1000), **kwargs)  # type: ignore[arg-type]


def request(*values: bytes, partition: int = 0, acks: int = 0, topic: str = "orders") -> pb.ProduceRequest:
    return pb.ProduceRequest(topic=topic, partition=partition, acks=acks, batch=batch(*values))  # type: ignore[arg-type]


async def led(service, topic: str = "orders", partition: int = 0) -> None:
    await eventually(lambda: service.agent.running().logs.led(topic, partition) is not None)


async def test_a_batch_is_acknowledged_read_from_the_tail_sealed_registered_and_trimmed(tmp_path: Path):
    coordinator = CoordinatorStandIn()
    topic_id = coordinator.create("orders")
    service = await started(tmp_path, coordinator)
    await led(service)
    first = await service.api.produce(request(b"a", b"b"))
    second = await service.api.produce(request(b"c"))
    assert (first.base_offset, first.record_count, second.base_offset, second.epoch) == (0, 2, 2, 1)
    tail = await service.api.read_tail(pb.ReadTailRequest(topic_id=topic_id, partition=0, offset=1))
    assert [decode_batch(b).values.to_list() for b in tail.batches] == [[b"a", b"b"], [b"c"]]
    assert tail.high_watermark == 3
    segmenter = SegmenterStandIn(coordinator, service)
    drain = asyncio.create_task(segmenter.run())
    durable = await service.api.produce(request(b"d", acks=types_pb2.ACKS_DURABLE))
    assert durable.base_offset == 3
    await service.stop()
    drain.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await drain
    assert [r.values.to_list() for r in segmenter.segments.values()] == [[b"a", b"b", b"c", b"d"]]
    assert not list(tmp_path.glob("*.wal"))
    assert coordinator.ranges[(topic_id, 0, 1)].end == 4


async def test_after_a_crash_everything_acknowledged_is_there_at_its_offset(tmp_path: Path):
    coordinator = CoordinatorStandIn()
    topic_id = coordinator.create("orders")
    service = await started(tmp_path, coordinator)
    await led(service)
    for i in range(10):
        answer = await service.api.produce(request(b"%d" % i, acks=types_pb2.ACKS_WAL))
        assert answer.base_offset == i
    await kill(service)
    service = await started(tmp_path, coordinator)
    await led(service)
    assert coordinator.ranges[(topic_id, 0, 1)].end == 10
    answer = await service.api.produce(request(b"new"))
    assert (answer.base_offset, answer.epoch) == (10, 2)
    segmenter = SegmenterStandIn(coordinator, service)
    await eventually(lambda: coordinator.buffers)
    await segmenter.drain()
    assert segmenter.segments[(topic_id, 0, 1, 0)].values.to_list() == [b"%d" % i for i in range(10)]
    assert (await pull(service, (topic_id, 0, 2), 10, 11)).values.to_list() == [b"new"]
    await service.stop()
