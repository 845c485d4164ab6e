"""The agent as a whole, over a real directory, with the real coordinator and a segmenter over stores in memory."""

import asyncio
import contextlib
import errno
import os
import resource
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import metrics
from shformat import (
    TIMESTAMP_MS_MAX,
    TIMESTAMP_MS_MIN,
    Codec,
    ProducerStamp,
    Records,
    decode_batch,
    encode_batch,
    stamp_batch,
    validate_new_batch,
)
from shproto import errors, events
from shproto.keys import RangeKey
from shproto.v1 import coordinator_pb2, types_pb2
from shproto.v1 import ingest_pb2 as pb
from shruntime.clock import ManualClock
from shruntime.settings import SettingsError
from shruntime.tasks import Tasks
from streamhouse_coordinator.core import tables as t
from streamhouse_ingest.adapters.wal import FileWal
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.log.buffer import WalPosition
from streamhouse_ingest.log.producers import (
    ProducerState,
    WrittenBatch,
    decode_snapshot,
    encode_snapshot,
)
from streamhouse_ingest.log.wal_index import WalIndex
from streamhouse_ingest.log.wal_space import WalSpace
from streamhouse_ingest.ports import Frame, LogFiles, WalBroken, WalDamaged, WalLocked
from streamhouse_ingest.produce import request_rules
from streamhouse_ingest.settings import IngestSettings
from streamhouse_ingest.wiring import IngestService, build

from services.ingest.tests.ingest_agents import eventually, flip_bit, kill, pull, settings, started, wal_files
from services.ingest.tests.ingest_world import World, new_world, segmenting
from tests.platform.disk import full_disk, held_disk
from tests.platform.log_agent import LogAgent
from tests.platform.platform import stored_records

WAL, DURABLE, NONE = types_pb2.ACKS_WAL, types_pb2.ACKS_DURABLE, types_pb2.ACKS_NONE


def batch(*values: bytes, timestamp_ms: int = 1000, stamp: ProducerStamp | None = None) -> bytes:
    return encode_batch(Records.from_lists(list(values), timestamps_ms=timestamp_ms), producer=stamp)


def request(
    *values: bytes,
    partition: int = 0,
    acks: int = 0,
    topic: str = "orders",
    stamp: ProducerStamp | None = None,
    timeout_ms: int = 0,
) -> pb.ProduceRequest:
    return pb.ProduceRequest(
        topic=topic,
        partition=partition,
        acks=acks,  # type: ignore[arg-type]
        batch=batch(*values, stamp=stamp),
        timeout_ms=timeout_ms,
    )


async def led(service: IngestService, topic: str = "orders", partition: int = 0) -> None:
    await eventually(lambda: service.agent.running().logs.led(topic, partition) is not None)


async def read(service: IngestService, topic_id: bytes, offset: int, **kwargs: int) -> pb.ReadTailResponse:
    return await service.api.read_tail(pb.ReadTailRequest(topic_id=topic_id, partition=0, offset=offset, **kwargs))


def values_of(response: pb.ReadTailResponse) -> list[bytes | None]:
    return [value for b in response.batches for value in decode_batch(b).values.to_list()]


@contextlib.asynccontextmanager
async def running(directory: Path, coordinator: Any, **overrides: object) -> AsyncIterator[IngestService]:
    """An agent that leads orders/0; killed at the end, not drained."""
    service = await started(directory, coordinator, **overrides)
    try:
        await led(service)
        yield service
    finally:
        await kill(service)


@pytest.fixture
async def orders(world: World) -> bytes:
    """The id of a topic at the real coordinator."""
    return await world.create_topic("orders", 2)


# ---- the way of a batch


async def test_a_batch_is_acknowledged_read_from_the_tail_sealed_registered_and_trimmed(
    tmp_path: Path, world: World, orders: bytes
):
    service = await started(tmp_path, world.coordinator)
    await led(service)
    first = await service.api.produce(request(b"a", b"b"))
    second = await service.api.produce(request(b"c"))
    assert (first.base_offset, first.record_count, second.base_offset, second.epoch) == (0, 2, 2, 1)
    tail = await read(service, orders, 1)
    assert values_of(tail) == [b"a", b"b", b"c"]
    assert (tail.high_watermark, tail.tail_start_offset) == (3, 0)
    async with segmenting(world, service):
        durable = await service.api.produce(request(b"d", acks=DURABLE))
        assert durable.base_offset == 3
        assert values_of(await read(service, orders, 0)) == [b"a", b"b", b"c", b"d"], "kept for readers"
        await service.stop()
    first_range = RangeKey(orders, 0, 1)
    assert await world.stored(first_range) == [(0, b"a"), (1, b"b"), (2, b"c"), (3, b"d")]
    assert len(world.segments_of(first_range)) == 1
    assert not wal_files(tmp_path)
    assert world.range(first_range).end_offset == 4
    with pytest.raises(errors.ShuttingDown):
        await service.api.produce(request(b"e"))


async def test_g1_after_a_crash_everything_acknowledged_is_there_at_its_offset(
    tmp_path: Path, world: World, orders: bytes
):
    first = RangeKey(orders, 0, 1)
    async with running(tmp_path, world.coordinator) as service:
        for i in range(10):
            assert (await service.api.produce(request(b"%d" % i, acks=WAL))).base_offset == i
    async with running(tmp_path, world.coordinator) as service:
        assert world.range(first).end_offset == 10
        answer = await service.api.produce(request(b"new"))
        assert (answer.base_offset, answer.epoch) == (10, 2)
        assert values_of(await read(service, orders, 4)) == [b"%d" % i for i in range(4, 10)]
        assert values_of(await read(service, orders, 10)) == [b"new"]
        async with segmenting(world, service):
            await eventually(lambda: world.range(first).registered_end == 10)
        assert await world.stored(first) == [(i, b"%d" % i) for i in range(10)]
        assert (await pull(service, (orders, 0, 2), 10, 11)).values.to_list() == [b"new"]


async def test_plain_records_are_encoded_by_the_server(tmp_path: Path, world: World, orders: bytes):
    plain = types_pb2.RecordList(
        records=[
            types_pb2.Record(key=b"k", value=b"v", timestamp_ms=5, headers=[types_pb2.Header(key="h", value=b"1")]),
            types_pb2.Record(value=b""),
            types_pb2.Record(key=b"gone", headers=[types_pb2.Header(key="null")]),
        ]
    )
    async with running(tmp_path, world.coordinator) as service:
        before = int(time.time() * 1000)
        answer = await service.api.produce(pb.ProduceRequest(topic="orders", records=plain))
        assert (answer.base_offset, answer.record_count) == (0, 3)
        (found,) = (await read(service, orders, 0)).batches
    records = decode_batch(found)
    assert records.values.to_list() == [b"v", b"", None]
    assert records.keys.to_list() == [b"k", None, b"gone"]
    assert records.headers is not None
    assert records.headers.to_list() == [[("h", b"1")], [], [("null", None)]]
    assert records.timestamps_ms[0] == 5
    assert before <= records.timestamps_ms[1] <= time.time() * 1000


def small_and_large() -> tuple[bytes, bytes]:
    """Two batches of less than 100 KB; the second unpacks to 20 MiB."""
    large = encode_batch(Records.from_lists([bytes(20 << 20)], timestamps_ms=0), codec=Codec.LZ4)
    assert len(large) < 100_000
    return batch(b"small"), large


async def test_g7_what_unpacks_to_much_is_checked_beside_the_event_loop(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    """Decided by the size that its header declares, not by the one it comes in."""
    threads: dict[int, str] = {}

    def noted(checked: bytes) -> Any:
        threads[len(checked)] = threading.current_thread().name
        return validate_new_batch(checked)

    monkeypatch.setattr(request_rules, "validate_new_batch", noted)
    small, large = small_and_large()
    async with running(tmp_path, world.coordinator) as service:
        for sent in (small, large):
            await service.api.produce(pb.ProduceRequest(topic="orders", batch=sent))
    assert threads[len(small)] == threading.current_thread().name
    assert threads[len(large)] != threading.current_thread().name


async def test_g7_many_plain_bytes_are_encoded_beside_the_event_loop(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    threads: list[str] = []

    def noted(*args: Any, **options: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return encode_batch(*args, **options)

    monkeypatch.setattr(request_rules, "encode_batch", noted)
    async with running(tmp_path, world.coordinator) as service:
        for size in (10, 1 << 20):
            plain = types_pb2.RecordList(records=[types_pb2.Record(value=os.urandom(size))])
            await service.api.produce(pb.ProduceRequest(topic="orders", records=plain))
    assert [name == threading.current_thread().name for name in threads] == [True, False]


async def test_acks_none_is_answered_at_once_and_still_written(tmp_path: Path, world: World):
    orders = await world.create_topic("orders", 2, min_acks=NONE)
    async with running(tmp_path, world.coordinator) as service:
        assert (await service.api.produce(request(b"a", acks=NONE))).base_offset == -1
        found = await read(service, orders, 0, max_wait_ms=300_000)
        assert values_of(found) == [b"a"]


async def test_a_stream_answers_in_order_with_errors_in_their_place(tmp_path: Path, world: World, orders: bytes):
    async def requests() -> AsyncIterator[pb.ProduceRequest]:
        for i in range(200):
            if i == 50:
                yield pb.ProduceRequest(topic="orders", batch=b"nonsense")
            elif i == 60:
                yield request(b"x", partition=9)
            else:
                yield request(b"%d" % i, partition=i % 2)

    async with running(tmp_path, world.coordinator, stream_requests_in_flight_max=8) as service:
        await led(service, partition=1)
        answers = [answer async for answer in service.api.produce_stream(requests())]
    assert [a.error.reason for a in answers if a.HasField("error")] == ["INVALID_BATCH", "UNKNOWN_PARTITION"]
    assert answers[50].error.reason == "INVALID_BATCH"
    for partition in (0, 1):
        offsets = [a.base_offset for a in answers if a.partition == partition and not a.HasField("error")]
        assert offsets == list(range(len(offsets)))


async def test_a_stream_that_is_given_up_leaves_nothing_running(tmp_path: Path, world: World, orders: bytes):
    async def requests() -> AsyncIterator[pb.ProduceRequest]:
        while True:
            yield request(b"v")

    async with running(tmp_path, world.coordinator) as service:
        async with contextlib.aclosing(service.api.produce_stream(requests())) as stream:
            for _ in range(10):
                await anext(stream)
        assert not [task for task in asyncio.all_tasks() if "IngestApi._feed" in repr(task.get_coro())]


# ---- what is refused


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (pb.ProduceRequest(topic="nobody", batch=b"x"), errors.UnknownTopic),
        (pb.ProduceRequest(topic="", batch=b"x"), errors.InvalidArgument),
        (pb.ProduceRequest(topic="x" * 250, batch=b"x"), errors.InvalidArgument),
        (pb.ProduceRequest(topic="orders", partition=2, batch=b"x"), errors.UnknownPartition),
        (pb.ProduceRequest(topic="orders", batch=b""), errors.InvalidBatch),
        (pb.ProduceRequest(topic="orders", batch=batch(b"v")[:-1]), errors.InvalidBatch),
        (pb.ProduceRequest(topic="orders", batch=batch(b"v") * 2), errors.InvalidBatch),
        (
            pb.ProduceRequest(topic="orders", batch=b"X" + batch(b"v")[1:20] + b"ZZZZ" + batch(b"v")[24:]),
            errors.InvalidBatch,
        ),
        (pb.ProduceRequest(topic="orders", batch=bytes(3000)), errors.BatchTooLarge),
        (pb.ProduceRequest(topic="orders"), errors.InvalidArgument),
        (pb.ProduceRequest(topic="orders", records=types_pb2.RecordList()), errors.InvalidArgument),
        (pb.ProduceRequest(topic="orders", acks=NONE, batch=batch(b"v")), errors.AcksTooWeak),
        (pb.ProduceRequest(topic="orders", acks=17, batch=batch(b"v")), errors.InvalidArgument),  # type: ignore[arg-type]
        (pb.ProduceRequest(topic="orders", batch=batch(b"v", timestamp_ms=2**62)), errors.InvalidArgument),
        (pb.ProduceRequest(topic="orders", batch=batch(b"v", timestamp_ms=-(2**63))), errors.InvalidArgument),
        (
            pb.ProduceRequest(
                topic="orders",
                records=types_pb2.RecordList(records=[types_pb2.Record(value=b"v", timestamp_ms=-(2**63))]),
            ),
            errors.InvalidArgument,
        ),
        (
            pb.ProduceRequest(topic="orders", batch=batch(b"v", stamp=ProducerStamp(7, 0, 2**63 - 1))),
            errors.InvalidArgument,
        ),
    ],
)
async def test_bad_requests_are_refused_and_leave_nothing(
    tmp_path: Path, world: World, orders: bytes, bad: pb.ProduceRequest, kind: type
):
    async with running(tmp_path, world.coordinator, batch_bytes_max=2048) as service:
        with pytest.raises(kind) as caught:
            await service.api.produce(bad)
        assert caught.value.message
        assert (await read(service, orders, 0)).high_watermark == 0
        assert (await service.api.produce(request(b"good"))).base_offset == 0


async def test_timestamps_of_all_years_with_four_digits_are_taken(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator, timestamp_ahead_ms_max=1 << 50) as service:
        for timestamp_ms in (TIMESTAMP_MS_MIN, -1, 0, TIMESTAMP_MS_MAX):
            await service.api.produce(pb.ProduceRequest(topic="orders", batch=batch(b"v", timestamp_ms=timestamp_ms)))
        for timestamp_ms in (TIMESTAMP_MS_MIN - 1, TIMESTAMP_MS_MAX + 1):
            with pytest.raises(errors.InvalidArgument) as caught:
                request = pb.ProduceRequest(topic="orders", batch=batch(b"v", timestamp_ms=timestamp_ms))
                await service.api.produce(request)
            assert caught.value.details["field"] == "timestamp_ms"
            assert caught.value.details["value"] == str(timestamp_ms)
            assert caught.value.details["limit"] == f"{TIMESTAMP_MS_MIN}..{TIMESTAMP_MS_MAX}"


async def test_a_timestamp_too_far_ahead_is_named_as_the_application_names_it(
    tmp_path: Path, world: World, orders: bytes
):
    async with running(tmp_path, world.coordinator) as service:
        far = TIMESTAMP_MS_MAX
        with pytest.raises(errors.InvalidArgument, match=f"^timestamp_ms is {far}, at most") as caught:
            await service.api.produce(pb.ProduceRequest(topic="orders", batch=batch(b"v", timestamp_ms=far)))
        assert caught.value.details["field"] == "timestamp_ms"


async def test_a_batch_with_gaps_in_its_offsets_is_refused(tmp_path: Path, world: World, orders: bytes):
    gapped = encode_batch(Records.from_lists([b"a", b"b"], offsets=[0, 5]))
    async with running(tmp_path, world.coordinator) as service:
        with pytest.raises(errors.InvalidBatch, match="gaps"):
            await service.api.produce(pb.ProduceRequest(topic="orders", batch=gapped))


async def test_a_name_nobody_knows_is_asked_for_once_a_second(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator) as service:
        answers = await asyncio.gather(
            *(service.api.produce(request(b"v", topic="nobody")) for _ in range(50)), return_exceptions=True
        )
        assert all(isinstance(answer, errors.UnknownTopic) for answer in answers)
        assert world.coordinator.calls["get_metadata"] == 1


async def test_a_partition_led_elsewhere_says_so(tmp_path: Path, world: World):
    service = await started(tmp_path, world.coordinator)
    other = LogAgent(world.service.api, "agent-2")
    await other.open()
    await world.create_topic("orders", 2)
    (elsewhere,) = [row.partition for row in world.rows(t.RANGES) if row.agent_id == "agent-2"]
    await led(service, partition=1 - elsewhere)
    with pytest.raises(errors.NotLeader) as caught:
        await service.api.produce(request(b"v", partition=elsewhere))
    assert caught.value.details == {"topic": "orders", "partition": str(elsewhere), "outcome": errors.NOT_WRITTEN}
    await kill(service)


async def test_a_topic_just_created_is_found_before_its_event_arrives(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator) as service:
        world.coordinator.feed_paused = True
        await world.create_topic("late")
        assert (await service.api.produce(request(b"v", topic="late"))).base_offset == 0


async def test_g1_a_topic_created_again_takes_its_own_writes_before_the_agent_has_heard_of_it(
    tmp_path: Path, world: World, orders: bytes
):
    """Not into the log of the deleted one, which nobody will ever read; nor late batches for that one into the new."""
    old, new = request(b"old"), request(b"new")
    old.topic_id = orders
    async with running(tmp_path, world.coordinator) as service:
        await service.api.produce(old)
        await world.delete_topic("orders")
        new.topic_id = await world.create_topic("orders")
        async with asyncio.timeout(60):
            while True:  # as a producer does
                try:
                    assert (await service.api.produce(new)).base_offset == 0
                    break
                except errors.NotLeader as error:
                    assert error.details["outcome"] == errors.NOT_WRITTEN
                    await asyncio.sleep(0.05)
        assert values_of(await read(service, new.topic_id, 0)) == [b"new"]
        with pytest.raises(errors.NotLeader):
            await service.api.produce(old)
        new.topic_id = b"short"
        with pytest.raises(errors.InvalidArgument, match="topic_id"):
            await service.api.produce(new)


# ---- idempotent producers (G5)


async def test_g5_a_retry_gets_the_original_offset_also_after_a_crash(tmp_path: Path, world: World, orders: bytes):
    stamps = [ProducerStamp(7, 0, i * 2) for i in range(3)]
    async with running(tmp_path, world.coordinator) as service:
        for i, stamp in enumerate(stamps):
            assert (await service.api.produce(request(b"a", b"b", stamp=stamp))).base_offset == i * 2
        again = await service.api.produce(request(b"a", b"b", stamp=stamps[1]))
        assert (again.base_offset, again.duplicate) == (2, True)
    async with running(tmp_path, world.coordinator) as service:
        again = await service.api.produce(request(b"a", b"b", stamp=stamps[2]))
        assert (again.base_offset, again.duplicate) == (4, True)
        with pytest.raises(errors.SequenceGap) as caught:
            await service.api.produce(request(b"c", stamp=ProducerStamp(7, 0, 9)))
        assert caught.value.details["expected"] == "6"
        assert (await service.api.produce(request(b"c", stamp=ProducerStamp(7, 0, 6)))).base_offset == 6


async def test_g5_the_next_leader_knows_the_producers_from_the_snapshot(tmp_path: Path, world: World, orders: bytes):
    stamp = ProducerStamp(7, 0, 0)
    service = await started(tmp_path / "a", world.coordinator)
    await led(service)
    async with segmenting(world, service):
        assert (await service.api.produce(request(b"a", stamp=stamp))).base_offset == 0
        await service.stop()
    async with running(tmp_path / "b", world.coordinator, agent_id="agent-2") as other:
        again = await other.api.produce(request(b"a", stamp=stamp))
        assert (again.base_offset, again.duplicate, again.epoch) == (0, True, 2)
        durable = await other.api.produce(request(b"a", stamp=stamp, acks=DURABLE))
        assert durable.duplicate, "the original is registered"


@contextlib.asynccontextmanager
async def serving(directory: Path, world: World, **overrides: object) -> AsyncIterator[IngestService]:
    """An agent that leads both partitions, and whose buffers are registered; stopped at the end."""
    service = await started(directory, world.coordinator, **overrides)
    async with segmenting(world, service):
        for partition in range(2):
            await led(service, partition=partition)
        yield service
        await service.stop()


async def write_to_both(service: IngestService, producer_id: int) -> list[bool]:
    """One batch each; whether it was there already."""
    stamp = ProducerStamp(producer_id, 0, 0)
    return [(await service.api.produce(request(b"a", partition=n, stamp=stamp))).duplicate for n in range(2)]


def answer_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the coordinator's answers report the producers of one range at a time."""
    monkeypatch.setattr("streamhouse_coordinator.core.sessions.SNAPSHOTS_BYTES_MAX", 1)


async def test_g5_the_next_leader_knows_the_producers_that_do_not_fit_into_an_answer(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    async with serving(tmp_path / "a", world) as service:
        assert await write_to_both(service, 7) == [False, False]
    answer_in_pieces(monkeypatch)
    async with serving(tmp_path / "b", world, agent_id="agent-2") as other:
        assert await write_to_both(other, 7) == [True, True]
    assert any(grant.snapshot_omitted for answer in world.coordinator.answers["get_grants"] for grant in answer.grants)


def fail_get_grants(world: World, *failures: errors.StreamHouseError) -> list[errors.StreamHouseError]:
    """Has GetGrants first fail with each of these, and returns those that are left. SessionExpired ends the session."""
    left, get_grants = list(failures), world.coordinator.get_grants

    async def failing(asked: coordinator_pb2.GetGrantsRequest) -> coordinator_pb2.GetGrantsResponse:
        if left:
            failure = left.pop(0)
            if isinstance(failure, errors.SessionExpired):
                await world.expire_all()
            raise failure
        return await get_grants(asked)

    world.coordinator.get_grants = failing
    return left


@pytest.mark.parametrize(
    "failures",
    [
        [],
        [errors.Unavailable("not now"), errors.Internal("nor now")],
        [errors.SessionExpired("too late", session_id="")],
    ],
    ids=["in one go", "with failures", "too slow for its session"],
)
async def test_g5_who_comes_back_announces_what_also_says_of_producers_that_did_not_fit_into_an_answer(
    tmp_path: Path,
    world: World,
    orders: bytes,
    failures: list[errors.StreamHouseError],
    monkeypatch: pytest.MonkeyPatch,
):
    """Of these only the coordinator knows: they wrote before the agent led. Its announcement is all that the next
    leader hears of them."""
    async with serving(tmp_path / "a", world) as service:
        assert await write_to_both(service, 7) == [False, False]
    back = {"agent_id": "agent-2"}
    async with running(tmp_path / "b", world.coordinator, **back) as service:
        await led(service, partition=1)
        assert await write_to_both(service, 8) == [False, False]
    opened = len(world.coordinator.requests["open_session"])
    answer_in_pieces(monkeypatch)
    fail_get_grants(world, *failures)
    async with serving(tmp_path / "b", world, **back) as service:
        await eventually(lambda: not any(row.unfinished for row in world.rows(t.RANGES) if row.epoch == 2))
    expired = any(isinstance(failure, errors.SessionExpired) for failure in failures)
    requests = world.coordinator.requests["open_session"][opened:]
    sessions = [item for item in requests if item.role == "ingest"]
    assert len(sessions) == 1 + expired
    assert len({item.session_token for item in sessions}) == 1, "nothing was written in it"
    async with serving(tmp_path / "c", world, agent_id="agent-3") as other:
        assert await write_to_both(other, 8) == [True, True]
        assert await write_to_both(other, 7) == [True, True]


async def test_no_session_is_completed_over_a_log_that_failed(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    async with serving(tmp_path / "a", world) as service:
        assert await write_to_both(service, 7) == [False, False]
    back = {"agent_id": "agent-2"}
    async with running(tmp_path / "b", world.coordinator, **back) as service:
        await led(service, partition=1)
        assert await write_to_both(service, 8) == [False, False]
    answer_in_pieces(monkeypatch)
    left = fail_get_grants(world, *[errors.Unavailable("not now")] * 10_000)
    starting = asyncio.create_task(started(tmp_path / "b", world.coordinator, **back))
    await eventually(lambda: len(left) < 10_000)
    monkeypatch.setattr(FileWal, "broken", True)
    with pytest.raises(WalBroken):
        await starting
    assert not world.buffers


@pytest.mark.parametrize("stopped", [False, True])
async def test_g5_the_next_leader_knows_the_producers_of_what_was_neither_registered_nor_announced(
    tmp_path: Path, world: World, orders: bytes, stopped: bool
):
    """After a crash the ends are declared at the next start, from a replay; at a stop from memory."""
    stamps = [ProducerStamp(7, 0, i) for i in range(3)]
    first = RangeKey(orders, 0, 1)
    service = await started(tmp_path / "a", world.coordinator, shutdown_timeout_ms=10)
    await led(service)
    held = service.agent.running().logs.led("orders", 0)
    assert held is not None
    for stamp in stamps:
        await service.api.produce(request(b"a", stamp=stamp))
    assert await world.register(first, 0, 1, held.log.producers.snapshot(1))
    await eventually(lambda: held.log.registered_end == 1)
    if not stopped:
        await kill(service)
        service = await started(tmp_path / "a", world.coordinator)
    await (service.stop() if stopped else kill(service))
    settled = world.range(first)
    assert (settled.end_offset, settled.registered_end) == (3, 1)
    await world.expire_all()
    async with running(tmp_path / "b", world.coordinator, agent_id="agent-2") as other:
        for offset, stamp in enumerate(stamps):
            again = await other.api.produce(request(b"a", stamp=stamp))
            assert (again.base_offset, again.duplicate) == (offset, True)
        assert not (await other.api.produce(request(b"a", stamp=ProducerStamp(7, 0, 3)))).duplicate


@pytest.mark.usefixtures("no_time_passes")
async def test_g1_a_durable_retry_is_not_acknowledged_by_what_only_a_dead_agents_disk_has(
    tmp_path: Path, world: World, orders: bytes
):
    """The snapshot travels with the announcement, so the next leader knows batches that were never uploaded."""
    stamps = [ProducerStamp(7, 0, i) for i in range(2)]
    old = RangeKey(orders, 0, 1)
    async with running(tmp_path / "a", world.coordinator, seal_age_ms=20) as service:
        for stamp in stamps:
            await service.api.produce(request(b"a", stamp=stamp))
        await eventually(lambda: world.buffers)
        await eventually(lambda: sum(part.record_count for b in world.buffers.values() for part in b.slices) == 2)
    assert world.producers(old, 2) == {7}
    await world.expire_all()
    async with running(tmp_path / "b", world.coordinator, agent_id="agent-2") as other:
        retry = request(b"a", stamp=stamps[0], acks=DURABLE)
        with pytest.raises(errors.DurableTimeout):
            await other.api.produce(request(b"a", stamp=stamps[0], acks=DURABLE, timeout_ms=100))
        await world.register(old, 0, 1)
        found = await other.api.produce(retry)
        assert (found.duplicate, found.base_offset) == (True, 0)
        await world.lose(old)
        with pytest.raises(errors.DataLoss):
            await other.api.produce(request(b"a", stamp=stamps[1], acks=DURABLE))


async def test_retries_within_one_group_are_written_once(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator) as service:
        answers = await asyncio.gather(
            *(service.api.produce(request(b"a", stamp=ProducerStamp(7, 0, 0))) for _ in range(5))
        )
        assert [a.base_offset for a in answers] == [0] * 5
        assert sorted(a.duplicate for a in answers) == [False, True, True, True, True]


# ---- durable acks


@pytest.mark.usefixtures("no_time_passes")
async def test_a_durable_ack_in_vain_leaves_the_record_and_a_retry_finds_it(
    tmp_path: Path, world: World, orders: bytes
):
    stamp = ProducerStamp(7, 0, 0)
    async with running(tmp_path, world.coordinator) as service:
        with pytest.raises(errors.DurableTimeout):
            await service.api.produce(request(b"a", acks=DURABLE, stamp=stamp, timeout_ms=60))
        assert values_of(await read(service, orders, 0)) == [b"a"]
        async with segmenting(world, service):
            again = await service.api.produce(request(b"a", acks=DURABLE, stamp=stamp))
            assert (again.base_offset, again.duplicate) == (0, True)


async def test_g1_a_durable_ack_waits_for_the_registration_that_covers_its_offset(
    tmp_path: Path, world: World, orders: bytes
):
    """Not for any that comes: neither one below it, nor one of another partition."""
    async with running(tmp_path, world.coordinator, durable_linger_ms=10_000) as service:
        await led(service, partition=1)
        held = service.agent.running().logs.led("orders", 0)
        assert held is not None
        waiting = []
        for end in (1, 2, 3):
            waiting.append(asyncio.create_task(service.api.produce(request(b"a", acks=DURABLE))))
            await eventually(lambda end=end: held.log.next_offset == end)
        await service.api.produce(request(b"b", partition=1))
        other = service.agent.running().logs.led("orders", 1)
        assert other is not None
        await world.register(RangeKey(orders, 1, 1), 0, 1)
        await eventually(lambda: other.log.registered_end == 1)
        assert not [call for call in waiting if call.done()]
        await world.register(RangeKey(orders, 0, 1), 0, 2)
        assert [(await call).base_offset for call in waiting[:2]] == [0, 1]
        assert not waiting[2].done()
        await world.register(RangeKey(orders, 0, 1), 2, 3)
        assert (await waiting[2]).base_offset == 2


async def test_a_topic_that_wants_durable_gets_it_by_default(tmp_path: Path, world: World):
    orders = await world.create_topic("orders", min_acks=DURABLE)
    async with running(tmp_path, world.coordinator) as service:
        with pytest.raises(errors.AcksTooWeak):
            await service.api.produce(request(b"a", acks=WAL))
        async with segmenting(world, service):
            await asyncio.gather(*(service.api.produce(request(b"%d" % i)) for i in range(20)))
        assert len(world.segments_of(RangeKey(orders, 0, 1))) <= 2, "those that wait together share an object"


# ---- limits and disks (G7)


async def test_g7_a_full_log_pushes_back_and_takes_more_once_segments_are_registered(
    tmp_path: Path, world: World, orders: bytes
):
    limits = {"wal_file_bytes": 65536, "wal_bytes_max": 262144, "seal_bytes": 65536, "wal_group_bytes_max": 65536}
    async with running(tmp_path, world.coordinator, **limits) as service:
        taken = 0
        with pytest.raises(errors.Overloaded) as caught:
            for _ in range(100):
                await service.api.produce(request(os.urandom(10_000)))
                taken += 1
        assert caught.value.retry_after_ms > 0
        assert caught.value.details["limit"] == "wal_bytes_max"
        assert service.agent.running().opened.index.size_bytes <= 262144
        async with segmenting(world, service):
            await eventually(lambda: service.agent.running().opened.index.size_bytes < 140_000)
            assert (await service.api.produce(request(b"more"))).base_offset == taken


async def test_g7_a_log_full_of_one_file_takes_more_once_that_is_registered(
    tmp_path: Path, world: World, orders: bytes
):
    """A group may be larger than a file is to be: the open file is all of the log, and nothing but a write ends it."""
    limits = {"wal_file_bytes": 65536, "wal_bytes_max": 262144, "seal_bytes": 65536}
    async with running(tmp_path, world.coordinator, **limits) as service, segmenting(world, service):
        for n in range(5):
            answer = await service.api.produce(request(os.urandom(200_000), acks=DURABLE))
            assert answer.base_offset == n
            async with asyncio.timeout(30):  # files are deleted beside, in the log's own thread
                while service.agent.running().opened.index.size_bytes > 2 * 262144:
                    await asyncio.sleep(0.01)


async def test_g7_memory_stays_bounded_and_what_left_it_is_read_from_the_log(
    tmp_path: Path, world: World, orders: bytes
):
    async with running(tmp_path, world.coordinator, memory_bytes_max=1 << 20, tail_cache_bytes=0) as service:
        sent = [os.urandom(50_000) for _ in range(60)]
        for value in sent:
            await service.api.produce(request(value))
            assert service.agent.running().logs.memory_bytes <= 1 << 20
        got: list[bytes | None] = []
        while len(got) < 60:
            got += values_of(await read(service, orders, len(got), max_bytes=300_000))
        assert got == sent
        await eventually(lambda: world.buffers)
        async with segmenting(world, service):
            await eventually(lambda: world.range(RangeKey(orders, 0, 1)).registered_end > 0)
        stored = await world.stored(RangeKey(orders, 0, 1))
        assert stored == list(enumerate(sent))[: len(stored)] and stored
        assert service.agent.running().logs.memory_bytes >= 0


async def test_the_queue_has_a_limit(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator, queue_bytes_max=65536, batch_bytes_max=65536) as service:
        answers = await asyncio.gather(
            *(service.api.produce(request(os.urandom(20_000))) for _ in range(6)), return_exceptions=True
        )
        refused = [a for a in answers if isinstance(a, errors.Overloaded)]
        assert len(refused) == 3
        assert refused[0].details["limit"] == "queue_bytes_max"
        assert service.agent.running().writer.queue_bytes == 0


async def test_the_queue_of_batches_to_check_has_a_limit_of_its_own(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator, checks_queue_bytes_max=65536, batch_bytes_max=65536) as service:
        large = [request(os.urandom(20_000) + bytes(600_000)) for _ in range(8)]
        answers = await asyncio.gather(*map(service.api.produce, large), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, errors.Overloaded)]
        assert refused and len(refused) < 8
        assert {answer.details["limit"] for answer in refused} == {"checks_queue_bytes_max"}


async def test_a_full_disk_refuses_keeps_nothing_and_recovers(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator) as service:
        await service.api.produce(request(b"a", stamp=ProducerStamp(7, 0, 0)))
        with full_disk(service.agent.running().opened.wal.active_bytes + 1000), pytest.raises(errors.DiskFull):
            await service.api.produce(request(os.urandom(5000), stamp=ProducerStamp(7, 0, 1)))
        assert (await read(service, orders, 0)).high_watermark == 1
        answer = await service.api.produce(request(b"b", stamp=ProducerStamp(7, 0, 1)))
        assert (answer.base_offset, answer.duplicate) == (1, False)


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Whatever is opened meanwhile fails with EMFILE."""
    free = os.dup(0)
    os.close(free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("fsync", ["always", "interval"])
async def test_g7_no_descriptor_for_the_next_file_of_the_log_is_as_a_full_disk(
    tmp_path: Path, world: World, orders: bytes, fsync: str
):
    """Silent connections took them all: producers are pushed back, and the agent goes on when they end."""
    async with running(tmp_path, world.coordinator, wal_fsync=fsync, wal_file_bytes=64 * 1024) as service:
        values = [os.urandom(40_000) for _ in range(4)]
        await service.api.produce(request(values[0]))
        for value in values[1:]:  # each needs a file of its own
            with no_descriptor_left():
                for _ in range(2):
                    with pytest.raises(errors.DiskFull, match="Too many open files"):
                        await service.api.produce(request(value))
            await service.api.produce(request(value))
        assert values_of(await read(service, orders, 0)) == values
        assert not service.tasks.failed.is_set()


async def test_g7_no_descriptor_to_read_the_log_with_is_told_to_try_again(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator, memory_bytes_max=1 << 20, tail_cache_bytes=0) as service:
        for _ in range(30):
            await service.api.produce(request(os.urandom(100_000)))
        with no_descriptor_left(), pytest.raises(errors.Overloaded, match="Too many open files") as refused:
            await read(service, orders, 0)
        assert refused.value.retry_after_ms > 0
        assert (await read(service, orders, 0)).batches


async def beats(world: World, count: int = 5) -> None:
    """Returns after as many more heartbeats."""
    until = world.coordinator.calls["heartbeat"] + count
    await eventually(lambda: world.coordinator.calls["heartbeat"] >= until)


async def test_g7_a_log_without_room_is_told_once_until_a_whole_file_fits_again(tmp_path: Path):
    """So that others lead meanwhile. That small batches still fit does not count."""
    async with new_world(heartbeat_ms=10) as world:
        await world.create_topic("orders", 2)

        def reports() -> list[bool]:
            requests = world.coordinator.requests["heartbeat"]
            return [item.log_full for item in requests if item.HasField("log_full")]

        async with running(tmp_path, world.coordinator, wal_full_grace_ms=0, wal_file_bytes=64 * 1024) as service:
            await service.api.produce(request(b"a"))
            with full_disk(40_000):
                with pytest.raises(errors.DiskFull):
                    await service.api.produce(request(os.urandom(45_000)))
                await beats(world)
                await service.api.produce(request(b"b"))
                await beats(world)
                assert reports() == [True]
            await beats(world)
            assert reports() == [True, False]
            assert not (tmp_path / "room").exists()


async def test_a_log_that_is_full_for_less_than_the_grace_period_keeps_its_leaderships():
    class Disk:
        """As much of a log as counts here."""

        room = False

        def has_space_for_file(self) -> bool:
            return self.room

    clock, disk, tasks = ManualClock(0), Disk(), Tasks()
    with ThreadPoolExecutor(1) as thread:
        files = LogFiles(disk, WalIndex(), thread)  # type: ignore[arg-type]
        room = WalSpace(files, clock, tasks, grace_ms=10_000)

        async def is_full() -> bool:
            room.check()
            await asyncio.gather(*tasks._tasks)
            return room.is_full

        assert not await is_full(), "nothing has failed yet"
        room.note_full()
        clock.advance(9_999)
        room.note_full()
        assert not await is_full()
        clock.advance(1)
        assert await is_full()
        disk.room = True
        assert not await is_full()
        room.note_full()
        disk.room = False
        assert not await is_full(), "the grace period begins anew"


async def test_heartbeats_do_not_wait_for_a_disk_that_hangs(tmp_path: Path):
    """On a full one, while it is asked for room, and has a new position to save: the lease ended, though the
    coordinator could be reached."""
    async with new_world(heartbeat_ms=10) as world:
        await world.create_topic("orders", 2)
        async with running(tmp_path, world.coordinator, wal_full_grace_ms=0, wal_file_bytes=64 * 1024) as service:
            await service.api.produce(request(b"a"))
            with full_disk(40_000), held_disk(WalDirectory, "has_space") as held:
                with pytest.raises(errors.DiskFull):
                    await service.api.produce(request(os.urandom(45_000)))
                await eventually(held.reached.is_set)
                await world.create_topic("other")
                await eventually(lambda: service.agent.running().session._history.seen.position == world.position)
                await beats(world)
            await service.api.produce(request(b"b"))


async def test_a_failed_fsync_acknowledges_nothing_and_ends_the_agent(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with running(tmp_path, world.coordinator) as service:
        await service.api.produce(request(b"a"))
        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(errors.Unavailable):
            await service.api.produce(request(b"b"))
        await service.tasks.failed.wait()
        monkeypatch.undo()
        with pytest.raises(errors.Unavailable):
            await service.api.produce(request(b"c"))
        assert (await read(service, orders, 0)).high_watermark == 1


async def test_a_failed_log_leaves_its_ranges_to_the_next_replay(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    """What memory says of the end is less than what a replay finds: the group whose fsync failed."""
    service = await started(tmp_path, world.coordinator)
    await led(service)
    await service.api.produce(request(b"a"))

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(errors.Unavailable):
        await service.api.produce(request(b"b"))
    await service.tasks.failed.wait()
    await world.expire_all()
    running_ = service.agent.running()
    with pytest.raises(WalBroken):
        await running_.session.open("another")
    await service.stop()
    monkeypatch.undo()
    assert world.coordinator.calls["open_session"] == 1 and "close_session" not in world.coordinator.calls
    assert world.range(RangeKey(orders, 0, 1)).end_offset is None
    async with running(tmp_path, world.coordinator) as again:
        assert world.range(RangeKey(orders, 0, 1)).end_offset == 2
        assert values_of(await read(again, orders, 0)) == [b"a", b"b"]


@pytest.mark.usefixtures("no_time_passes")
async def test_an_agent_that_stops_opens_no_new_session(tmp_path: Path):
    async with new_world(heartbeat_ms=20) as world:
        await world.create_topic("orders")
        world.coordinator.slow_ms["close_session"] = 1_000  # some fifty heartbeats
        service = await started(tmp_path, world.coordinator)
        await led(service)
        await service.stop()
        assert world.coordinator.calls["open_session"] == 1 and not world.rows(t.SESSIONS)


@pytest.mark.parametrize("margin_ms", [20_000, 30_000, 40_000])
async def test_a_lease_that_would_end_before_its_next_heartbeat_is_refused(tmp_path: Path, margin_ms: int):
    said = rf"lease_margin_ms \({margin_ms}\) .* session_ttl_ms \(30000\) and heartbeat_interval_ms \(10000\)"
    async with new_world(session_ttl_ms=30_000) as world:
        with pytest.raises(errors.InvalidArgument, match=said) as caught:
            await started(tmp_path, world.coordinator, lease_margin_ms=margin_ms)
    assert (caught.value.details["limit"], caught.value.details["value"]) == ("19999", str(margin_ms))


def test_a_first_wait_above_the_longest_is_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"retry_first_ms \(50\) must not be above retry_max_ms \(40\)"):
        IngestSettings.load({}, wal_dir=str(tmp_path), retry_first_ms=50, retry_max_ms=40)


async def test_with_fsync_by_interval_acks_do_not_wait_for_it(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(fd), real(fd))[1])
    clock = ManualClock(1_000_000)
    async with running(
        tmp_path, world.coordinator, clock=clock, wal_fsync="interval", wal_fsync_interval_ms=30
    ) as service:
        await service.api.produce(request(b"a"))
        assert not synced
        clock.advance(30)
        await eventually(lambda: synced)
        for _ in range(5):
            clock.advance(30)
            await service.agent.running().writer.barrier()
        await asyncio.get_running_loop().run_in_executor(service.agent._thread, lambda: None)  # those before are done
        assert len(synced) == 1, "nothing new, nothing to sync"


# ---- sessions, leases, ranges


async def test_without_a_renewed_lease_nothing_is_acknowledged(tmp_path: Path):
    clock = ManualClock(1_000_000)
    async with new_world(session_ttl_ms=30_000) as world:
        orders = await world.create_topic("orders", 2)
        service = await started(tmp_path, world.coordinator, clock=clock)
        await led(service)
        await service.api.produce(request(b"a"))
        world.coordinator.down = True
        clock.advance(29_899)
        await service.api.produce(request(b"b"))
        clock.advance(1)
        with pytest.raises(errors.NotLeader):
            await service.api.produce(request(b"c"))
        assert (await read(service, orders, 0)).high_watermark == 2
        world.coordinator.down = False

        async def again() -> bool:
            clock.advance(100)
            try:
                return (await service.api.produce(request(b"c"))).base_offset == 2
            except errors.NotLeader:
                return False

        async with asyncio.timeout(60):
            while not await again():
                await asyncio.sleep(0.001)
        await kill(service)


async def beat(world: World, clock: ManualClock) -> None:
    """Moves the clock until a heartbeat is sent: one that failed is repeated within 20 ms, one that succeeded after 10
    s."""

    def sent() -> int:
        return world.coordinator.calls["heartbeat"] + world.coordinator.refused["heartbeat"]

    before = sent()
    async with asyncio.timeout(60):
        while sent() == before:
            clock.advance(5_000)
            await asyncio.sleep(0.001)


async def test_g7_without_postgresql_writes_go_on_to_the_end_of_the_reserved_range(tmp_path: Path):
    """Produce with acks=wal goes on while PostgreSQL is away, however long; at the end of the range it is pressed back,
    and goes on where it was as soon as the range can be extended."""
    width, ttl_ms, clock = 40, 30_000, ManualClock(1_000_000)
    async with new_world(range_width_offsets=width, session_ttl_ms=ttl_ms) as world:
        orders = await world.create_topic("orders")
        service = await started(tmp_path, world.coordinator, clock=clock)
        await led(service)
        world.coordinator.database_away = True
        for offset in range(width):
            await beat(world, clock)
            assert (await service.api.produce(request(b"v"))).base_offset == offset
        assert clock.now_ms > 1_000_000 + 5 * ttl_ms
        for _ in range(2):
            with pytest.raises(errors.Overloaded, match="offsets up to 40 are used up") as caught:
                await service.api.produce(request(b"w"))
            assert (caught.value.details["limit"], caught.value.details["value"]) == ("limit_offset", "40")
            assert caught.value.retry_after_ms > 0
        assert (await read(service, orders, 0)).high_watermark == width, "reads go on"
        world.coordinator.database_away = False
        while True:
            await beat(world, clock)
            with contextlib.suppress(errors.Overloaded):
                answer = await service.api.produce(request(b"w"))
                break
        assert (answer.base_offset, answer.epoch) == (width, 1)
        assert len(world.rows(t.RANGES)) == 1, "nobody took over, no offset was skipped"
        await kill(service)


async def test_g7_a_heartbeat_that_is_refused_after_it_renewed_the_lease_shortens_none(tmp_path: Path):
    ttl_ms, clock = 30_000, ManualClock(1_000_000)
    async with new_world(session_ttl_ms=ttl_ms) as world:
        await world.create_topic("orders")
        service = await started(tmp_path, world.coordinator, clock=clock)
        await led(service)
        heartbeat = world.coordinator.heartbeat

        async def busy(asked: coordinator_pb2.HeartbeatRequest) -> None:
            await heartbeat(asked)
            raise errors.Overloaded("too many calls at once", lease=errors.RENEWED)

        world.coordinator.heartbeat = busy
        for offset in range(20):
            await beat(world, clock)
            assert (await service.api.produce(request(b"v"))).base_offset == offset
        assert clock.now_ms > 1_000_000 + 3 * ttl_ms
        await kill(service)


async def test_a_lost_session_is_opened_anew_without_a_gap_in_the_offsets(tmp_path: Path):
    async with new_world(heartbeat_ms=20) as world:
        orders = await world.create_topic("orders")
        async with running(tmp_path, world.coordinator) as service:
            await service.api.produce(request(b"a"))
            await world.expire_all()
            await eventually(lambda: any(row.epoch == 2 for row in world.rows(t.RANGES)))
            await led(service)
            answer = await service.api.produce(request(b"b"))
            assert (answer.base_offset, answer.epoch) == (1, 2)
            assert values_of(await read(service, orders, 0)) == [b"a"]
            async with segmenting(world, service):
                await service.api.produce(request(b"c", acks=DURABLE))
                await eventually(lambda: len(world.segments) == 2)


async def test_a_move_seals_uploads_settles_and_the_next_epoch_begins_there(
    tmp_path: Path, world: World, orders: bytes
):
    first = RangeKey(orders, 0, 1)
    async with running(tmp_path, world.coordinator) as service:
        await service.api.produce(request(b"a", stamp=ProducerStamp(7, 0, 0)))
        await world.move(first)
        await eventually(lambda: world.buffers)
        assert (await service.api.produce(request(b"b"))).base_offset == 1, "writes go on while the rest is uploaded"
        async with segmenting(world, service):
            await eventually(lambda: any((row.partition, row.epoch) == (0, 2) for row in world.rows(t.RANGES)))
            row = world.range(first)
            assert (row.status, row.end_offset, row.registered_end) == (t.SETTLED, 2, 2)
            await led(service)
            again = await service.api.produce(request(b"a", stamp=ProducerStamp(7, 0, 0)))
            assert (again.duplicate, again.base_offset, again.epoch) == (True, 0, 2)
            assert (await service.api.produce(request(b"c"))).base_offset == 2


@pytest.mark.parametrize("moving_already", [False, True])
async def test_g1_an_agent_that_its_workers_cannot_reach_settles_where_it_ends_and_keeps_the_rest(
    tmp_path: Path, world: World, orders: bytes, moving_already: bool
):
    """Also in the middle of a move that waits for an upload which will not come."""
    first = RangeKey(orders, 0, 1)
    async with running(tmp_path, world.coordinator) as service:
        for offset, value in enumerate((b"a", b"b", b"c")):
            answer = await service.api.produce(request(value, stamp=ProducerStamp(7, 0, offset)))
            assert answer.base_offset == offset
        if moving_already:
            await world.move(first)
            await eventually(lambda: world.buffers)
        await world.cut_off(first)
        await eventually(lambda: world.range(first).status == t.SETTLED)
        row = world.range(first)
        assert (row.end_offset, row.registered_end) == (3, 0), "nothing is uploaded, and nothing given up"
        assert world.producers(first, 3) == {7}, "a retry is known to whoever goes on"
        assert values_of(await read(service, orders, 0)) == [b"a", b"b", b"c"], "for readers that reach it"
        async with segmenting(world, service):
            await eventually(lambda: world.range(first).registered_end == 3)


async def test_of_many_moves_a_few_refuse_writes_at_once_and_one_call_settles_them(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("streamhouse_ingest.leadership.transfers.TRANSFERS_AT_ONCE", 10)
    held = world.coordinator.hold("settle_ranges")
    many = await world.create_topic("many", 30)
    async with running(tmp_path, world.coordinator) as service:
        logs = service.agent.running().logs
        led_now = lambda: sum(logs.led("many", number) is not None for number in range(30))  # noqa: E731
        await eventually(lambda: led_now() == 30)
        for number in range(30):
            await world.move(RangeKey(many, number, 1))
        await eventually(lambda: held.requests and led_now() == 20)
        held.release()
        again = lambda: {row.partition for row in world.rows(t.RANGES) if row.topic_id == many.hex() and row.epoch == 2}  # noqa: E731
        await eventually(lambda: len(again()) == 30)
        calls = [len(asked.ends) for asked in held.requests]
        assert sum(calls) == 30 and len(calls) <= 6 and max(calls) <= 10


async def test_a_move_that_cannot_be_finished_goes_on_serving(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator, move_timeout_ms=30) as service:
        await world.move(RangeKey(orders, 0, 1))
        stop = asyncio.get_running_loop().time() + 0.4
        taken = 0
        while taken <= 3 or asyncio.get_running_loop().time() < stop:
            with contextlib.suppress(errors.NotLeader):
                await service.api.produce(request(b"v"))
                taken += 1
            await asyncio.sleep(0.005)
        assert (await read(service, orders, 0)).high_watermark == taken


async def test_g1_a_move_of_a_deleted_topic_ends_and_takes_no_write_for_the_next_one_of_that_name(
    tmp_path: Path, world: World, orders: bytes
):
    async with running(tmp_path, world.coordinator, move_timeout_ms=20) as service:
        await service.api.produce(request(b"old"))
        await world.move(RangeKey(orders, 0, 1))
        await eventually(lambda: world.buffers)
        await world.delete_topic("orders")
        again = await world.create_topic("orders", 2)
        logs = service.agent.running().logs
        await eventually(lambda: (held := logs.led("orders", 0)) is not None and held.log.key.topic_id == again)
        await eventually(lambda: not [task for task in asyncio.all_tasks() if task.get_name().startswith("move ")])
        await service.api.produce(request(b"new"))
        assert values_of(await read(service, again, 0)) == [b"new"]


async def test_g2_a_range_that_ends_with_the_session_ends_after_what_is_being_written(
    tmp_path: Path, world: World, orders: bytes
):
    """The agent stops because of an error: a group on its way to the disk may be read before the process ends."""
    service = await started(tmp_path, world.coordinator, shutdown_timeout_ms=10)
    await led(service)

    async def fail() -> None:
        raise errors.AgentIdTaken("taken", agent_id="agent-1")

    with held_disk(FileWal, "append") as held:
        producing = asyncio.create_task(service.api.produce(request(b"a")))
        await eventually(held.reached.is_set)
        service.tasks.spawn("fails", fail())
        await service.tasks.failed.wait()
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0.02)
    with pytest.raises(errors.NotLeader) as caught:
        await producing
    assert caught.value.details["outcome"] == errors.UNKNOWN, "it is written, but not acknowledged"
    with contextlib.suppress(errors.AgentIdTaken):
        await stopping
    assert world.range(RangeKey(orders, 0, 1)).end_offset == 1


async def test_a_defect_while_writing_leaves_nobody_waiting(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    def broken(self: FileWal, frames: Sequence[Frame]) -> list[WalPosition]:
        raise ValueError("a defect")

    async with running(tmp_path, world.coordinator) as service:
        monkeypatch.setattr(FileWal, "append", broken)
        with pytest.raises(errors.Unavailable, match="stopped while"):
            await service.api.produce(request(b"a", timeout_ms=60_000))
        await service.tasks.failed.wait()


async def test_a_range_that_runs_low_is_extended(tmp_path: Path):
    async with new_world(range_width_offsets=100) as world:
        await world.create_topic("orders")
        async with running(tmp_path, world.coordinator) as service:
            for i in range(30):
                async with asyncio.timeout(60):
                    while True:
                        try:
                            answer = await service.api.produce(request(*[b"v"] * 10))
                            break
                        except errors.Overloaded as error:
                            await asyncio.sleep(error.retry_after_ms / 1000)
                assert answer.base_offset == i * 10


async def test_a_deleted_topic_is_given_up_and_its_log_trimmed(tmp_path: Path, world: World, orders: bytes):
    limits = {"wal_file_bytes": 65536, "wal_bytes_max": 262144}
    async with running(tmp_path, world.coordinator, **limits) as service:
        for _ in range(20):
            await service.api.produce(request(os.urandom(10_000)))
        assert len(wal_files(tmp_path)) > 2
        waiting = asyncio.create_task(service.api.produce(request(b"v", acks=DURABLE)))
        await eventually(lambda: world.buffers)
        await world.delete_topic("orders")
        with pytest.raises(errors.NotLeader):
            await waiting
        await eventually(lambda: len(wal_files(tmp_path)) == 1)
        with pytest.raises(errors.UnknownTopic):
            await service.api.produce(request(b"v"))
        assert (await read(service, orders, 0)).not_held
        assert service.agent.running().logs.memory_bytes == 0


async def test_what_lies_beyond_a_settled_end_is_given_up(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator) as service:
        await service.api.produce(request(b"a"))
        waiting = asyncio.create_task(service.api.produce(request(b"b", acks=DURABLE)))
        await eventually(lambda: world.buffers)
        await world.settle(RangeKey(orders, 0, 1), 1)
        with pytest.raises(errors.NotLeader) as caught:
            await waiting
        assert caught.value.details["outcome"] == errors.UNKNOWN
        assert (await read(service, orders, 0)).high_watermark == 1


async def test_what_is_left_of_a_buffer_is_announced_when_a_part_was_registered_meanwhile(
    tmp_path: Path, world: World, orders: bytes
):
    """A segmenter may still hold what the session before announced; it would never be registered otherwise."""
    async with running(tmp_path, world.coordinator) as service:
        for value in (b"a", b"b"):
            await service.api.produce(request(value))
        agent = service.agent.running()
        held = agent.logs.get(RangeKey(orders, 0, 1))
        assert held is not None
        world.coordinator.down = True
        agent.sealer.seal_now([held])
        await eventually(lambda: world.coordinator.refused["announce_buffer"])
        agent.ranges.registered(held.log.key, 1)
        world.coordinator.down = False
        await eventually(lambda: world.buffers)
        (announced,) = world.buffers.values()
        assert [(item.base_offset, item.end_offset) for item in announced.slices] == [(1, 2)]


async def test_what_an_older_epoch_gave_up_is_in_no_snapshot_of_a_newer_one(tmp_path: Path, world: World):
    """G1: both wrote at 10, only the newer one's counts. Registered with the older one's producer, a retry of that
    would be acknowledged as a duplicate, and be nowhere."""
    orders = await world.create_topic("orders", 2)
    directory = WalDirectory.open(tmp_path, "agent-1")
    wal = FileWal(directory, 1, file_bytes=1 << 20, fsync_each=True)
    wal.append([frame(orders, epoch, base, producer) for epoch, base, producer in [(1, 0, 7), (1, 10, 8)]])
    wal.append([frame(orders, epoch, base, producer) for epoch, base, producer in [(2, 10, 9), (2, 20, 9)]])
    wal.close()
    directory.close()
    finished, settled = RangeKey(orders, 0, 1), RangeKey(orders, 0, 2)
    for key, start, end in ((finished, 0, 10), (settled, 10, 20)):
        granted = events.EpochGranted(
            topic_id=orders.hex(),
            topic="orders",
            partition=0,
            epoch=key.epoch,
            session_id="an earlier one",
            agent_id="agent-1",
            wal_id=directory.wal_id.hex(),
            start_offset=start,
            limit_offset=100,
        )
        await world.commit(granted)
        await world.settle(key, end)
    assert await world.register(finished, 0, 10, encode_snapshot({7: ProducerState(0, (WrittenBatch(0, 10, 0),))}))
    async with running(tmp_path, world.coordinator) as service:
        held = service.agent.running().logs.get(settled)
        assert held is not None
        (left,) = held.log.sealed
        assert (left.base_offset, left.end_offset) == (10, 20)
        assert left.snapshot is not None
        assert set(decode_snapshot(left.snapshot)) == {7, 9}


def frame(topic_id: bytes, epoch: int, base_offset: int, producer_id: int) -> Frame:
    """Ten records of a producer, of which it is the first or the second ten."""
    stamp = ProducerStamp(producer_id, 0, base_offset // 20 * 10)
    data = stamp_batch(batch(*[b"x"] * 10, stamp=stamp), base_offset, epoch)
    return Frame(key=RangeKey(topic_id, 0, epoch), base_offset=base_offset, record_count=10, batch=data)


async def test_what_was_declared_lost_is_dropped_and_said(
    tmp_path: Path,
    world: World,
    orders: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """An agent that comes back after an operator gave its range up: its records are kept out, and their room freed."""
    counted: list[int] = []
    first = RangeKey(orders, 0, 1)
    async with running(tmp_path, world.coordinator) as service:
        for value in (b"a", b"b", b"c"):
            await service.api.produce(request(value))
    await world.expire_all()
    await world.register(first, 0, 1)
    await world.lose(first)
    monkeypatch.setattr(metrics.NoOpCounter, "add", lambda self, amount, *args: counted.append(amount))
    monkeypatch.setattr(metrics, "get_meter", lambda name: metrics.NoOpMeter(name))
    async with running(tmp_path, world.coordinator) as service:
        assert 2 in counted
        assert "orders/0 epoch 1 was declared lost at offset 1: 2 records beyond" in caplog.text
        assert service.agent.running().logs.memory_bytes == 0
        assert (await read(service, orders, 0)).not_held
        assert (await service.api.produce(request(b"d"))).base_offset == world.range(first).limit_offset
    async with running(tmp_path, world.coordinator):
        assert caplog.text.count("declared lost") == 1, "its part of the log is gone"


async def test_the_coordinator_may_come_later(tmp_path: Path, world: World, orders: bytes):
    world.coordinator.down = True
    starting = asyncio.create_task(started(tmp_path, world.coordinator))
    await eventually(lambda: world.coordinator.refused["open_session"] >= 3)
    world.coordinator.down = False
    service = await starting
    await led(service)
    await kill(service)


async def test_a_directory_in_use_is_refused(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator):
        with pytest.raises(WalLocked):
            await started(tmp_path, world.coordinator)


async def test_an_agent_id_in_use_elsewhere_is_refused(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path / "a", world.coordinator):
        with pytest.raises(errors.AgentIdTaken):
            await started(tmp_path / "b", world.coordinator)


async def test_a_start_that_fails_after_its_session_was_opened_gives_the_id_back(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    """The id was taken until the session expired, over every other directory."""

    def fail(wal: FileWal) -> None:
        raise OSError(errno.EIO, "a disk that dies")

    with monkeypatch.context() as patch:
        patch.setattr(FileWal, "mark_used", fail)
        with pytest.raises(OSError, match="a disk that dies"):
            await started(tmp_path / "a", world.coordinator)
    assert not world.rows(t.SESSIONS)
    service = await started(tmp_path / "b", world.coordinator, shutdown_timeout_ms=1)
    await led(service)
    assert (await service.api.produce(request(b"v"))).epoch == 2
    await service.stop()
    async with running(tmp_path / "a", world.coordinator):
        nothing = "nothing was written there, and it can be opened again"
        assert world.range(RangeKey(orders, 0, 1)).end_offset == 0, nothing


async def test_before_start_the_api_says_so(tmp_path: Path, world: World):
    service = build(settings(tmp_path), world.coordinator)
    with pytest.raises(errors.Unavailable):
        await service.api.produce(request(b"a"))
    await service.stop()


# ---- sealed buffers


@pytest.mark.usefixtures("no_time_passes")
async def test_many_partitions_share_one_announcement(tmp_path: Path, world: World):
    await world.create_topic("orders", 20)
    async with running(tmp_path, world.coordinator, seal_age_ms=100) as service:
        await led(service, partition=19)
        await asyncio.gather(*(service.api.produce(request(b"v", partition=p)) for p in range(20)))
        await eventually(lambda: world.buffers)
        assert [len(b.slices) for b in world.buffers.values()] == [20]


async def test_an_announcement_is_repeated_until_it_is_heard(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator, seal_age_ms=20) as service:
        world.coordinator.down = True
        await service.api.produce(request(b"a"))
        await eventually(lambda: world.coordinator.refused["announce_buffer"] >= 3)
        world.coordinator.down = False
        await eventually(lambda: world.buffers)


@pytest.mark.usefixtures("no_time_passes")
async def test_what_is_left_of_a_buffer_registered_in_part_is_announced_anew(
    tmp_path: Path, world: World, orders: bytes
):
    key = RangeKey(orders, 0, 1)
    async with running(tmp_path, world.coordinator, seal_age_ms=50) as service:
        for i in range(4):
            await service.api.produce(request(b"%d" % i))
        await eventually(lambda: world.buffers)
        (old,) = world.buffers
        assert await world.register(key, 0, 3)
        await world.complete(old)
        await eventually(lambda: world.buffers)
        (new,) = world.buffers.values()
        assert new.buffer_id != old
        assert [(s.base_offset, s.end_offset) for s in new.slices] == [(3, 4)]
        assert (await pull(service, key, 3, 4)).values.to_list() == [b"3"]


async def test_a_slice_that_is_not_held_is_fenced(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator) as service:
        await service.api.produce(request(b"a", b"b"))
        for key, base, end in (
            ((orders, 0, 9), 0, 2),
            ((orders, 0, 1), 2, 4),
            ((orders, 0, 1), 1, 2),
            ((orders, 0, 1), 0, 1),
        ):
            with pytest.raises(errors.Fenced):
                await pull(service, key, base, end)


# ---- the tail


async def test_a_reader_at_the_high_watermark_is_woken_by_the_next_record(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator) as service:
        waiting = asyncio.create_task(read(service, orders, 0, max_wait_ms=300_000))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await service.api.produce(request(b"a"))
        assert values_of(await waiting) == [b"a"]
        late = await read(service, orders, 1, max_wait_ms=30)
        assert (values_of(late), late.high_watermark) == ([], 1)


async def test_a_tail_read_says_what_it_does_not_hold(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator, tail_cache_bytes=0, seal_age_ms=20) as service:
        assert (await read(service, b"?" * 16, 0)).not_held
        for value in (b"a", b"b"):
            await service.api.produce(request(value))
        assert (await read(service, orders, 3)).not_held
        async with segmenting(world, service):
            await eventually(lambda: service.agent.running().logs.memory_bytes == 0)
        below = await read(service, orders, 0)
        assert (values_of(below), below.tail_start_offset, below.high_watermark) == ([], 2, 2)


# ---- damage (G6)


def written_bytes(service: IngestService) -> int:
    """Size of the log file that is written, without the space ahead."""
    return service.agent.running().opened.wal.active_bytes


async def test_g6_a_damaged_frame_is_reported_lost_and_never_skipped(tmp_path: Path, world: World, orders: bytes):
    first = RangeKey(orders, 0, 1)
    async with running(tmp_path, world.coordinator) as service:
        for i in range(5):
            await service.api.produce(request(b"%d" % i * 100))
        middle = written_bytes(service) // 2
    (path,) = wal_files(tmp_path)
    flip_bit(path, middle)
    async with running(tmp_path, world.coordinator) as service:
        await eventually(lambda: world.lost(first) == [(2, 3)])
        assert values_of(await read(service, orders, 0)) == [b"0" * 100, b"1" * 100]
        with pytest.raises(errors.DataLoss) as caught:
            await read(service, orders, 2)
        assert (caught.value.details["base_offset"], caught.value.details["end_offset"]) == ("2", "3")
        async with segmenting(world, service):
            await eventually(lambda: world.range(first).registered_end == 5)
        assert [segment.base_offset for segment in world.segments_of(first)] == [0, 3]


async def test_g2_offsets_that_damage_may_hide_are_not_used_again_and_reported_as_possibly_lost(
    tmp_path: Path, world: World, orders: bytes, caplog: pytest.LogCaptureFixture
):
    async with running(tmp_path, world.coordinator) as service:
        await led(service, partition=1)
        await service.api.produce(request(b"first"))
        begin = written_bytes(service)
        await service.api.produce(request(b"acknowledged"))
        await service.api.produce(request(b"other", partition=1))
    flip_bit(wal_files(tmp_path)[0], begin)
    old = RangeKey(orders, 0, 1)
    limit = world.range(old).limit_offset
    async with running(tmp_path, world.coordinator) as service:
        await led(service, partition=1)
        assert world.range(old).end_offset == limit
        assert (await service.api.produce(request(b"next"))).base_offset == limit
        assert (await service.api.produce(request(b"next", partition=1))).base_offset == 1, "its last frame is sound"
        await eventually(lambda: world.lost(old) == [(1, limit)])
        assert "orders/0 epoch 1: offsets 1 to 1073741824: possibly lost: the write-ahead log is damaged" in caplog.text
        assert values_of(await read(service, orders, 0)) == [b"first"]
        with pytest.raises(errors.DataLoss):
            await read(service, orders, 1)
        async with segmenting(world, service):
            await eventually(lambda: world.range(old).registered_end == limit)
    async with running(tmp_path, world.coordinator) as service:
        assert (await service.api.produce(request(b"more"))).base_offset == limit + 1, "the damage is known by now"


async def test_g2_damage_after_the_log_was_given_away_is_as_new_as_any(tmp_path: Path, world: World, orders: bytes):
    """Damage once, everything registered, a stop that leaves no file; then damage again."""

    async def damaged_start() -> tuple[RangeKey, IngestService]:
        async with running(tmp_path, world.coordinator) as service:
            await service.api.produce(request(b"first"))
            begin = written_bytes(service)
            hidden = await service.api.produce(request(b"acknowledged"))
        flip_bit(wal_files(tmp_path)[0], begin)
        service = await started(tmp_path, world.coordinator)
        await led(service)
        return RangeKey(orders, 0, hidden.epoch), service

    old, service = await damaged_start()
    assert world.range(old).end_offset == world.range(old).limit_offset
    async with segmenting(world, service):
        await service.stop()
    assert not wal_files(tmp_path)
    old, service = await damaged_start()
    await kill(service)
    beyond = "else the offset of what was acknowledged is given out again"
    assert world.range(old).end_offset == world.range(old).limit_offset, beyond


async def test_g2_after_a_torn_write_offsets_go_on_beyond_the_limit(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator) as service:
        await service.api.produce(request(b"first"))
    path = wal_files(tmp_path)[0]
    path.write_bytes(path.read_bytes() + bytes(4096))
    old = RangeKey(orders, 0, 1)
    limit = world.range(old).limit_offset
    async with running(tmp_path, world.coordinator) as service:
        assert (world.range(old).end_offset, world.lost(old)) == (1, [])
        assert (await service.api.produce(request(b"next"))).base_offset == limit
    async with running(tmp_path, world.coordinator) as service:
        assert (await service.api.produce(request(b"more"))).base_offset == limit + 1


async def test_g2_what_a_power_failure_takes_back_of_a_log_that_was_not_synced_is_not_written_anew(
    tmp_path: Path, world: World, orders: bytes
):
    limits = {"wal_fsync": "interval", "wal_fsync_interval_ms": 60_000}
    async with running(tmp_path, world.coordinator, **limits) as service:
        await service.api.produce(request(b"kept"))
        kept = wal_files(tmp_path)[0].stat().st_size
        await service.api.produce(request(b"acknowledged and read, then gone"))
        assert values_of(await read(service, orders, 1)) == [b"acknowledged and read, then gone"]
    os.truncate(wal_files(tmp_path)[0], kept)
    limit = world.range(RangeKey(orders, 0, 1)).limit_offset
    async with running(tmp_path, world.coordinator) as service:  # as careful as before, whatever the policy is now
        assert (await service.api.produce(request(b"other"))).base_offset == limit
    for _ in range(2):
        service = await started(tmp_path, world.coordinator, **limits)
        await led(service)
        assert (await service.api.produce(request(b"on"))).base_offset > limit
        async with segmenting(world, service):
            await service.stop()
    async with running(tmp_path, world.coordinator) as service:
        assert (await service.api.produce(request(b"on"))).base_offset == limit + 3, "a log that was closed is whole"


SMALL_MEMORY = {"memory_bytes_max": 1 << 20, "tail_cache_bytes": 0, "durable_linger_ms": 10_000}
"""What is not sealed at once leaves memory when some 20 batches of 50 kB are there."""


def flip_in(path: Path, value: bytes) -> None:
    """A bit of what a record holds."""
    flip_bit(path, path.read_bytes().index(value) + len(value) // 2)


async def test_g6_a_batch_damaged_after_it_was_written_is_an_error_when_read_back(
    tmp_path: Path, world: World, orders: bytes
):
    """With its place; what comes before and after it is there."""
    values = [os.urandom(50_000) for _ in range(30)]
    async with running(tmp_path, world.coordinator, **SMALL_MEMORY) as service:
        for value in values:
            await service.api.produce(request(value))
        (path,) = wal_files(tmp_path)
        flip_in(path, values[3])
        assert values_of(await read(service, orders, 0)) == values[:3]
        with pytest.raises(errors.DataLoss) as caught:
            await read(service, orders, 3)
        assert (caught.value.details["base_offset"], caught.value.details["end_offset"]) == ("3", "4")
        assert values_of(await read(service, orders, 4))[:2] == values[4:6]


@pytest.mark.usefixtures("no_time_passes")
async def test_g6_damage_on_a_running_agents_disk_holds_up_nothing_but_what_it_hit(
    tmp_path: Path, world: World, orders: bytes
):
    """Of a buffer that is read from the log again for its hand-over the damaged batches are cut out and reported; the
    rest is registered, in order, and acknowledged. A durable ack of what was hit is refused."""
    values = [os.urandom(50_000) for _ in range(32)]
    hit = (0, 7, 8, 20, 31)
    stamps = [ProducerStamp(n + 1, 0, 0) for n in range(32)]
    async with running(tmp_path, world.coordinator, **SMALL_MEMORY) as service:
        durable: dict[int, asyncio.Task[pb.ProduceResponse]] = {}
        for n, value in enumerate(values):
            call = service.api.produce(request(value, acks=DURABLE if n in (7, 10) else WAL, stamp=stamps[n]))
            if n in (7, 10):
                durable[n] = asyncio.create_task(call)
                await eventually(lambda n=n: service.agent.running().logs.led("orders", 0).log.next_offset == n + 1)
            else:
                assert (await call).base_offset == n
        held = service.agent.running().logs.led("orders", 0)
        assert held is not None and held.log.open is not None
        for buffer in (*held.log.sealed, held.log.open):  # as when memory is full
            service.agent.running().logs.memory_bytes -= buffer.drop_batches()
        for n in hit:
            flip_in(wal_files(tmp_path)[0], values[n])
        service.agent.running().sealer.seal_now([held])
        async with segmenting(world, service):
            assert (await durable[10]).base_offset == 10
            with pytest.raises(errors.DataLoss) as caught:
                await durable[7]
            assert (caught.value.details["base_offset"], caught.value.details["end_offset"]) == ("7", "8")
            await eventually(lambda: held.log.registered_end == 32)
            again = await service.api.produce(request(values[7], acks=DURABLE, stamp=stamps[7]))
            assert (again.base_offset, again.duplicate) == (32, False), "a retry of what was lost is written anew"
        assert world.lost(RangeKey(orders, 0, 1)) == [(0, 1), (7, 9), (20, 21), (31, 32)]
        stored = await world.stored(RangeKey(orders, 0, 1))
        assert stored == [(n, value) for n, value in enumerate([*values, values[7]]) if n not in hit]
        await eventually(lambda: service.agent.running().logs.memory_bytes == 0)


async def test_g1_a_durable_retry_is_not_acknowledged_by_what_damage_took(tmp_path: Path, world: World, orders: bytes):
    """The coordinator was told of it when the range was settled, before the damage, and tells the next epoch."""
    value, stamp = os.urandom(2000), ProducerStamp(7, 0, 0)
    old = RangeKey(orders, 0, 1)
    async with running(tmp_path, world.coordinator) as service:
        await service.api.produce(request(value, stamp=stamp))
        await service.api.produce(request(b"another"))
    async with running(tmp_path, world.coordinator):
        assert (world.range(old).end_offset, world.range(old).registered_end) == (2, 0)
        assert world.producers(old, 2) == {7}
    flip_in(wal_files(tmp_path)[0], value)
    async with running(tmp_path, world.coordinator) as service:
        async with segmenting(world, service):
            await eventually(lambda: world.range(old).registered_end == 2)
            assert world.lost(old) == [(0, 1)]
            again = await service.api.produce(request(value, stamp=stamp, acks=DURABLE))
            assert not again.duplicate
        stored = [
            item for segment in world.of_partition(orders, 0) if not segment.lost_reason
            for item in await stored_records(world.objects, segment)
        ]  # fmt: skip
        assert stored == [(1, b"another"), (2, value)]


async def test_g1_a_durable_retry_elsewhere_is_told_what_damage_took(tmp_path: Path, world: World, orders: bytes):
    """Another agent was told of the producer, and registration has passed the batch: as a lost one."""
    value, stamp = os.urandom(2000), ProducerStamp(7, 0, 0)
    old = RangeKey(orders, 0, 1)
    async with running(tmp_path / "a", world.coordinator) as service:
        await service.api.produce(request(value, stamp=stamp))
        await service.api.produce(request(b"another"))
    async with running(tmp_path / "a", world.coordinator):
        """Declares where the range ends, and of which producers it is."""
    flip_in(wal_files(tmp_path / "a")[0], value)
    async with running(tmp_path / "a", world.coordinator) as service, segmenting(world, service):
        await eventually(lambda: world.range(old).registered_end == 2)
    await world.expire_all()
    async with running(tmp_path / "b", world.coordinator, agent_id="agent-2") as other:
        with pytest.raises(errors.DataLoss, match="offset 0 in epoch 1, and is lost"):
            await other.api.produce(request(value, stamp=stamp, acks=DURABLE))


async def test_g6_a_second_look_at_what_seems_damaged_takes_nothing_out_that_can_be_read(
    tmp_path: Path, world: World, orders: bytes, monkeypatch: pytest.MonkeyPatch
):
    values = [os.urandom(50_000) for _ in range(30)]
    async with running(tmp_path, world.coordinator, **SMALL_MEMORY) as service:
        for value in values:
            await service.api.produce(request(value))
        reader = service.agent.running().opened.reader
        read_batches, failures = reader.read, 1

        def fail_once(positions: Sequence[WalPosition]) -> list[bytes]:
            nonlocal failures
            failures -= 1
            if failures == 0:
                raise WalDamaged("file", positions[0], "a bit flipped in the page cache")
            return read_batches(positions)

        monkeypatch.setattr(reader, "read", fail_once)
        assert values_of(await read(service, orders, 0))[:5] == values[:5]
        assert service.agent.running().logs.led("orders", 0).log.lost_spans() == []


async def test_describe_shows_what_is_there(tmp_path: Path, world: World, orders: bytes):
    async with running(tmp_path, world.coordinator) as service:
        await service.api.produce(request(b"a", b"b"))
        found = await service.api.describe_agent(pb.DescribeAgentRequest())
        first = next(p for p in found.partitions if p.partition == 0)
        assert (found.agent_id, first.high_watermark, first.epoch) == ("agent-1", 2, 1)
        assert found.wal_bytes > found.unregistered_bytes > 0
        assert found.sealed_bytes == 0
