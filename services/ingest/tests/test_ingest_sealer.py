"""Announcements that the coordinator can take, however much is sealed at once."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shproto.rpc import MESSAGE_BYTES_MAX
from shproto.v1 import coordinator_pb2 as pb
from shruntime.clock import ManualClock, SystemClock
from shruntime.tasks import Backoff
from streamhouse_ingest.log.buffer import Buffer, WalPosition
from streamhouse_ingest.log.logs import Logs
from streamhouse_ingest.log.partition_log import BatchAppended
from streamhouse_ingest.log.producers import ProducerTable
from streamhouse_ingest.log.session_id import CurrentSession
from streamhouse_ingest.metrics import IngestMetrics
from streamhouse_ingest.sealing.sealer import Sealer, overlapping
from streamhouse_ingest.sealing.sealing import SealLimits

from services.ingest.tests.test_ingest_logs import append, lead, new_logs

# As the coordinator has it: messages.SLICES_MAX.
SLICES_MAX = 100_000
# A thousand producers (producers_per_partition_max) with five batches each.
SNAPSHOT = bytes(5 + 1_000 * (13 + 5 * 20))


class _Announced:
    """Takes what is announced."""

    def __init__(self) -> None:
        self.requests: list[pb.AnnounceBufferRequest] = []

    async def announce_buffer(self, request: pb.AnnounceBufferRequest) -> pb.AnnounceBufferResponse:
        self.requests.append(request)
        return pb.AnnounceBufferResponse()


async def announced(logs: Logs, slices: int) -> list[pb.AnnounceBufferRequest]:
    """What a new session is told, until it is so many slices."""
    coordinator: Any = _Announced()
    holder = CurrentSession()
    holder.set("token", "session")
    limits = SealLimits(
        seal_bytes=1 << 26, seal_age_ms=10_000, durable_linger_ms=20, open_bytes_max=1 << 28, object_bytes_max=1 << 28
    )
    sealer = Sealer(logs, coordinator, holder, SystemClock(), limits, Backoff(1, 1), IngestMetrics(topics_max=1))
    sealer.restart()
    task = asyncio.create_task(sealer.announce())
    async with asyncio.timeout(60):
        while sum(len(request.slices) for request in coordinator.requests) < slices:
            await asyncio.sleep(0.001)
    task.cancel()
    return coordinator.requests


async def test_the_producers_of_many_partitions_are_announced_in_messages_that_can_be_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ProducerTable, "snapshot", lambda self, end_offset: SNAPSHOT)
    logs = new_logs(1 << 30)
    for partition in range(700):
        append(logs, lead(logs, partition))
    requests = await announced(logs, 700)
    assert [item.partition for request in requests for item in request.slices] == list(range(700))
    assert max(request.ByteSize() for request in requests) < MESSAGE_BYTES_MAX


@pytest.mark.long
async def test_many_small_buffers_are_announced_in_numbers_that_are_taken() -> None:
    """Sealed one by one while nothing could be uploaded, and announced anew together when the session was lost."""
    logs = new_logs(1 << 30)
    per_partition = SLICES_MAX // 1_000 + 1
    for partition in range(1_000):
        held = lead(logs, partition)
        for _ in range(per_partition):
            append(logs, held, 1)
            logs.seal(held)
    requests = await announced(logs, 1_000 * per_partition)
    assert max(len(request.slices) for request in requests) <= SLICES_MAX
    slices = [(item.partition, item.base_offset) for request in requests for item in request.slices]
    assert slices == [(partition, base) for partition in range(1_000) for base in range(per_partition)]


async def test_the_number_of_buffers_that_wait_for_registration_stays_small() -> None:
    """Ten minutes of durable writes, five a second, with a coordinator that registers one buffer in a second."""
    logs, clock = new_logs(1 << 30), ManualClock()
    held = lead(logs)
    coordinator: Any = _Announced()
    holder = CurrentSession()
    holder.set("token", "session")
    limits = SealLimits(
        seal_bytes=1 << 26, seal_age_ms=1_000, durable_linger_ms=20, open_bytes_max=1 << 28, object_bytes_max=1 << 28
    )
    sealer = Sealer(logs, coordinator, holder, clock, limits, Backoff(1, 1), IngestMetrics(topics_max=1))
    tasks = [asyncio.create_task(sealer.run()), asyncio.create_task(sealer.announce())]
    waiting, largest = 0, 0
    for now_ms in range(0, 600_000, 200):
        held.log.apply(BatchAppended(held.log.next_offset, 1, None), WalPosition(1, 0, 1), b"x", now_ms)
        logs.count_batch(held, 1)
        held.durable_since_ms = now_ms if held.durable_since_ms is None else held.durable_since_ms
        sealer.appended(held)
        clock.advance(200)
        for _ in range(10):
            await asyncio.sleep(0)
        if now_ms % 1_000 == 0 and waiting < len(coordinator.requests):
            done = coordinator.requests[waiting]
            waiting += 1
            logs.register(held, done.slices[0].end_offset)
            sealer.completed(done.buffer_id)
        largest = max(largest, len(coordinator.requests) - waiting)
    for task in tasks:
        task.cancel()
    assert 8 <= largest < 64, "without bound it would be 2,400"
    assert waiting > 500, "it is not slower than what registers"


class _Counted(Buffer):
    """Counts how often it is looked at."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "end_offset":
            _Counted.looks += 1
        return super().__getattribute__(name)


@given(st.lists(st.integers(1, 3), max_size=30), st.lists(st.integers(1, 3), max_size=30), st.integers(0, 9))
def test_what_is_left_of_an_announcement_is_found_in_one_walk(now: list[int], then: list[int], gap: int) -> None:
    """After a day without an object store there are thousands of both."""
    buffers, olds = _buffers(now, gap), _buffers(then, 0)
    _Counted.looks = 0
    found = list(overlapping(buffers, olds))
    assert _Counted.looks <= 3 * (len(buffers) + len(olds))
    assert found == [
        b for b in buffers if any(b.base_offset < o.end_offset and o.base_offset < b.end_offset for o in olds)
    ]


def _buffers(counts: list[int], base_offset: int) -> list[Buffer]:
    buffers = []
    for count in counts:
        buffers.append(_Counted(base_offset, 0))
        buffers[-1].append(count, WalPosition(1, 0, 1), None)
        base_offset += count
    return buffers
