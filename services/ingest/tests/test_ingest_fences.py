"""Producers that fence: the rules against a model, and FenceProducer over real logs and the real coordinator."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import Codec, ProducerStamp, Records, encode_batch
from shproto import errors
from shproto.keys import RangeKey
from shproto.v1 import ingest_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.core import tables as t
from streamhouse_ingest.adapters.wal import FileWal
from streamhouse_ingest.log.buffer import WalPosition
from streamhouse_ingest.log.fences import Fence, check_fenced, latest
from streamhouse_ingest.log.partition_log import BatchAppended, PartitionLog
from streamhouse_ingest.log.producers import (
    DuplicateOf,
    FencedBy,
    InSequence,
    NotFenced,
    OutOfSequence,
    ProducerState,
    ProducerTable,
    WrittenBatch,
    decode_snapshot,
    encode_snapshot,
)
from streamhouse_ingest.log.replay import FrameColumns, Replay
from streamhouse_ingest.produce.draft import Draft
from streamhouse_ingest.wiring import IngestService

from services.ingest.tests.ingest_agents import eventually, kill, started
from services.ingest.tests.ingest_world import World, new_world, segmenting
from tests.platform.disk import held_disk

WAL, DURABLE = types_pb2.ACKS_WAL, types_pb2.ACKS_DURABLE
PRODUCER = 7
FRAME_COLUMNS = (
    "base_offsets", "record_counts", "ats", "sizes_bytes", "producer_ids", "producer_epochs", "base_sequences",
)  # fmt: skip
STATE = ProducerState(1, (WrittenBatch(0, 10, 100), WrittenBatch(10, 5, 110)))
OPEN = Fence(2, is_open=True)


# ---- the rules


@pytest.mark.quick
def test_sequences_go_on_across_epochs() -> None:
    assert check_fenced(OPEN, STATE, ProducerStamp(PRODUCER, 2, 15), 3) == InSequence()
    assert check_fenced(OPEN, STATE, ProducerStamp(PRODUCER, 2, 0), 3) == OutOfSequence(15), "no restart at 0"
    assert check_fenced(OPEN, STATE, ProducerStamp(PRODUCER, 2, 10), 5) == DuplicateOf(110), "of the older epoch, too"


@pytest.mark.quick
def test_an_unknown_producer_begins_at_0_and_nowhere_else() -> None:
    assert check_fenced(OPEN, None, ProducerStamp(PRODUCER, 2, 0), 3) == InSequence()
    assert check_fenced(OPEN, None, ProducerStamp(PRODUCER, 2, 4), 3) == OutOfSequence(0)


@pytest.mark.quick
@pytest.mark.parametrize("fence", [None, Fence(1, is_open=True), Fence(2, is_open=False)])
def test_without_an_answered_fence_of_its_epoch_nothing_is_taken(fence: Fence | None) -> None:
    assert check_fenced(fence, STATE, ProducerStamp(PRODUCER, 2, 15), 3) == NotFenced()


@pytest.mark.quick
@pytest.mark.parametrize("is_open", [True, False])
def test_an_older_epoch_is_refused_as_soon_as_the_fence_is_raised(is_open: bool) -> None:
    assert check_fenced(Fence(2, is_open), STATE, ProducerStamp(PRODUCER, 1, 15), 3) == FencedBy(2)


def new_log(epoch: int, start_offset: int, producers_max: int = 10) -> PartitionLog:
    key = RangeKey(b"t" * 16, 0, epoch)
    log = PartitionLog(key, "orders", start_offset, 2**40, ProducerTable(producers_max))
    log.leading = True
    return log


actions = st.lists(
    st.one_of(
        st.tuples(st.just("fence"), st.integers(0, 1)),
        st.tuples(st.just("send"), st.integers(0, 1), st.integers(1, 4), st.booleans()),
        st.tuples(st.just("repeat"), st.integers(0, 1)),
        st.tuples(st.just("others"), st.integers(1, 4)),
        st.tuples(st.just("crash"), st.booleans()),
    ),
    max_size=40,
)


@pytest.mark.quick
@given(actions)
def test_two_epochs_write_one_stream_once_and_in_order_whatever_happens(steps: list[Any]) -> None:
    """Writer 0 is the zombie and writer 1 its successor; both make the same records. `send` with False gets no answer:
    the writer does not know if the batch was written. `crash` loses, or keeps, what is written and not answered."""
    log, epoch, newest = new_log(1, 0), 1, 0
    position = [0, 0]
    last: list[tuple[int, int] | None] = [None, None]
    written: list[int] = []  # sequences in the order of offsets, unanswered ones last
    unanswered = 0

    def append(writer: int, sequence: int, count: int, answered: bool) -> None:
        nonlocal unanswered
        stamp = ProducerStamp(PRODUCER, writer + 1, sequence)
        decision = Draft(log).decide(count, stamp, sequenced=True)
        if not isinstance(decision, BatchAppended):
            return
        log.apply(decision, WalPosition(1, 0, 1), None, 0)
        written.extend(range(sequence, sequence + count))
        unanswered = 0 if answered else unanswered + count
        if answered:
            position[writer] = sequence + count

    for step in steps:
        match step:
            case ("fence", writer):
                if writer + 1 < newest:
                    continue
                newest = writer + 1
                log.raise_fence(PRODUCER, newest)
                known = [WrittenBatch(0, len(written), 0)] if written else []
                log.know(PRODUCER, ProducerState(1, tuple(known)) if known else None)
                state = log.producers.get(PRODUCER)
                log.open_fence(PRODUCER)
                position[writer] = 0 if state is None else state.next_sequence
                assert position[writer] == len(written)
                unanswered = 0  # it is in the answer
            case ("send", writer, count, answered):
                append(writer, position[writer], count, answered)
                last[writer] = position[writer] - count if answered else position[writer], count
            case ("repeat", writer):
                if (sent := last[writer]) is not None and sent[0] >= 0:
                    append(writer, *sent, answered=False)
            case ("others", count):
                for other in range(100, 100 + 5 * count):
                    decision = Draft(log).decide(1, ProducerStamp(other, 0, 0))
                    if isinstance(decision, BatchAppended):
                        log.apply(decision, WalPosition(1, 0, 1), None, 0)
            case ("crash", kept):
                if not kept and unanswered:
                    del written[-unanswered:]
                unanswered, epoch = 0, epoch + 1
                log = new_log(epoch, log.next_offset)
        assert written == list(range(len(written)))


@pytest.mark.quick
def test_a_producer_that_fences_is_not_forgotten_for_others() -> None:
    table = ProducerTable(2)
    table.know(PRODUCER, STATE)
    for other in range(10, 20):
        table.put(other, ProducerState(0, (WrittenBatch(0, 1, other),)))
    assert table.get(PRODUCER) == STATE
    assert len(table) == 3
    replayed = ProducerTable(2)
    replayed.merge({PRODUCER: STATE, **{o: ProducerState(0, (WrittenBatch(0, 1, 200 + o),)) for o in range(10, 20)}})
    assert replayed.get(PRODUCER) == STATE
    assert len(replayed) == 3


@pytest.mark.quick
@given(
    st.lists(st.tuples(st.sampled_from([7, 8, 9]), st.integers(1, 3)), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(0, 59),
)
def test_every_buffer_of_a_replay_names_the_last_batch_before_its_end(
    batches: list[tuple[int, int]], buffer_frames: int, reported_before: int
) -> None:
    """7 and 8 fence, 9 does not. What lies before `reported_before` is registered, and known from the coordinator
    alone: a replay need not have it."""
    sequences, offset, ends = dict.fromkeys((7, 8, 9), 0), 0, []
    rows: list[tuple[int, ...]] = []
    for producer_id, count in batches:
        rows.append((offset, count, offset, 10, producer_id, int(producer_id != 9), sequences[producer_id]))
        sequences[producer_id] += count
        offset += count
        ends.append((offset, dict(sequences)))
    cut = min(reported_before, len(rows) - 1)
    replay = Replay(buffer_bytes_max=10 * buffer_frames)
    key = RangeKey(b"t" * 16, 0, 3)
    replay.add(key, 1, FrameColumns(**dict(zip(FRAME_COLUMNS, map(list, zip(*rows[cut:], strict=True)), strict=True))))
    found = replay.logs[key]
    log = PartitionLog(key, "orders", found.first_offset, 2**40, ProducerTable(10))
    log.restore(found.buffers, found.end_offset)
    log.producers.merge(replay.producers[key.partition_key])
    reported = {
        producer_id: ProducerState(1, (WrittenBatch(first, count, base),))
        for base, count, _, _, producer_id, epoch, first in rows[:cut]
        if epoch
    }
    log.producers.merge(reported)
    log.note_reported(reported)
    log.take_snapshots()
    at = dict(ends)
    for buffer in log.sealed:
        states = decode_snapshot(buffer.snapshot or b"")
        for producer_id in (7, 8):
            last = states[producer_id].next_sequence if producer_id in states else 0
            assert last == at[buffer.end_offset][producer_id]


@pytest.mark.quick
def test_damage_does_not_take_the_last_sequence_back() -> None:
    log = new_log(1, 0)
    log.raise_fence(PRODUCER, 1)
    log.know(PRODUCER, None)
    log.open_fence(PRODUCER)
    for sequence in range(3):
        decision = Draft(log).decide(1, ProducerStamp(PRODUCER, 1, sequence), sequenced=True)
        assert isinstance(decision, BatchAppended)
        log.apply(decision, WalPosition(1, sequence, 1), None, 0)
    buffer = log.seal()
    assert buffer is not None
    log.cut_out(buffer, [WalPosition(1, at, 1) for at in range(3)])
    state = log.producers.get(PRODUCER)
    assert state is not None
    assert state.next_sequence == 3, "a fence that answered -1 would have all written again"


@pytest.mark.quick
def test_of_many_states_the_one_that_goes_furthest_counts() -> None:
    assert latest([]) is None
    further = ProducerState(1, (WrittenBatch(15, 1, 7),))
    assert latest([further, STATE]) == further


# ---- agents


def stream(first: int, stop: int, epoch: int, **fields: Any) -> pb.ProduceRequest:
    """A batch of the records first..stop of the stream that all epochs make."""
    values = Records.from_lists([b"%d" % number for number in range(first, stop)], timestamps_ms=1000)
    batch = encode_batch(values, producer=ProducerStamp(PRODUCER, epoch, first))
    return pb.ProduceRequest(topic="orders", sequenced_batch=batch, **fields)


async def fence(service: IngestService, epoch: int, wait_ms: int = 60_000, **fields: Any) -> pb.FenceProducerResponse:
    return await service.api.fence_producer(
        pb.FenceProducerRequest(
            topic="orders", producer_id=PRODUCER, producer_epoch=epoch, max_wait_ms=wait_ms, **fields
        )
    )


def last_of(answer: pb.FenceProducerResponse) -> tuple[int, int, int]:
    assert answer.settled
    return answer.last_sequence, answer.last_record_count, answer.last_offset


NOTHING = (-1, 0, -1)


async def expire(world: World, *agent_ids: str) -> None:
    """Ends the sessions of these agents, in this order: those that go first are given nothing by the end of others."""
    for agent_id in agent_ids:
        for row in world.rows(t.SESSIONS):
            if row.agent_id == agent_id:
                await world.expire_session(row.session_id)


@contextlib.asynccontextmanager
async def running(directory: Path, world: World, agent_id: str = "a", **overrides: Any) -> AsyncIterator[IngestService]:
    """An agent that leads orders/0; killed at the end, not drained."""
    service = await started(directory, world.coordinator, agent_id=agent_id, **overrides)
    try:
        await eventually(lambda: service.agent.running().logs.led("orders", 0) is not None)
        yield service
    finally:
        await kill(service)


@pytest.fixture
async def orders(world: World) -> bytes:
    return await world.create_topic("orders")


@pytest.fixture
async def durable_orders(world: World) -> bytes:
    return await world.create_topic("orders", min_acks=DURABLE)


async def test_a_fence_answers_what_was_written_and_stops_older_epochs(
    tmp_path: Path, world: World, orders: bytes
) -> None:
    async with running(tmp_path, world) as service:
        with pytest.raises(errors.ProducerNotFenced):
            await service.api.produce(stream(0, 3, 1))
        assert last_of(await fence(service, 1)) == NOTHING
        assert (await service.api.produce(stream(0, 3, 1))).base_offset == 0
        assert (await service.api.produce(stream(3, 5, 1))).base_offset == 3
        assert last_of(await fence(service, 1)) == (4, 2, 4), "asked again it answers the same"
        assert last_of(await fence(service, 2)) == (4, 2, 4)
        for refused in (stream(5, 6, 1), stream(3, 5, 1)):
            with pytest.raises(errors.ProducerFenced):
                await service.api.produce(refused)
        with pytest.raises(errors.ProducerFenced):
            await fence(service, 1)
        with pytest.raises(errors.SequenceGap):
            await service.api.produce(stream(0, 4, 2))
        assert (await service.api.produce(stream(0, 3, 2))).duplicate, "what epoch 1 wrote"
        assert (await service.api.produce(stream(5, 9, 2))).base_offset == 5
        assert (await service.api.produce(stream(5, 9, 2))).duplicate


async def test_an_ordinary_batch_has_no_epoch_that_fences(tmp_path: Path, world: World, orders: bytes) -> None:
    """Before the first fence above all: it would be written by Kafka's rules, and the first fence answer that nothing
    is there."""

    async def refused(epoch: int) -> None:
        plain = pb.ProduceRequest(topic="orders", batch=stream(0, 3, epoch).sequenced_batch)
        with pytest.raises(errors.InvalidArgument, match=f"producer_epoch is {epoch}, must be 0") as caught:
            await service.api.produce(plain)
        assert caught.value.details["field"] == "producer_epoch"

    async with running(tmp_path, world) as service:
        await refused(1)
        assert last_of(await fence(service, 2)) == NOTHING
        assert (await service.api.produce(stream(0, 3, 2))).base_offset == 0, "the refused one has left nothing"
        await refused(1)
        await refused(2)


async def test_the_next_leader_takes_no_batch_of_a_fenced_producer_however_it_comes(
    tmp_path: Path, world: World, orders: bytes
) -> None:
    async with running(tmp_path, world) as service:
        await fence(service, 2)
    async with running(tmp_path, world) as service:
        for epoch, error in ((1, errors.ProducerFenced), (2, errors.ProducerNotFenced)):
            with pytest.raises(error):
                await service.api.produce(stream(0, 3, epoch))
        ordinary = pb.ProduceRequest(topic="orders", batch=stream(0, 3, 0).sequenced_batch)
        with pytest.raises(errors.ProducerFenced):
            await service.api.produce(ordinary)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"producer_id": 0}, "producer_id"),
        ({"producer_epoch": 0}, "producer_epoch"),
        ({"max_wait_ms": 600_001}, "max_wait_ms"),
        ({"topic_id": b"x"}, "topic_id"),
    ],
)
async def test_a_bad_fence_is_refused_by_field(
    tmp_path: Path, world: World, orders: bytes, fields: dict[str, Any], named: str
) -> None:
    values: dict[str, Any] = {"topic": "orders", "producer_id": 1, "producer_epoch": 1} | fields
    async with running(tmp_path, world) as service:
        with pytest.raises(errors.InvalidArgument) as refused:
            await service.api.fence_producer(pb.FenceProducerRequest(**values))
    assert refused.value.details["field"] == named
    assert not world.rows(t.PRODUCER_FENCES)


async def test_a_sequenced_batch_needs_a_producer_with_an_epoch(tmp_path: Path, world: World, orders: bytes) -> None:
    async with running(tmp_path, world) as service:
        for request in (stream(0, 1, 0), pb.ProduceRequest(topic="orders", sequenced_batch=encode_batch(
            Records.from_lists([b"x"], timestamps_ms=1000)
        ))):  # fmt: skip
            with pytest.raises(errors.InvalidArgument, match="sequenced_batch"):
                await service.api.produce(request)


async def test_the_number_of_producers_that_fence_has_a_limit(tmp_path: Path) -> None:
    async with new_world(producer_fences_per_partition_max=1) as world:
        await world.create_topic("orders")
        async with running(tmp_path, world) as service:
            await fence(service, 1)
            with pytest.raises(errors.Overloaded, match="producer_fences_per_partition_max is 1"):
                await service.api.fence_producer(
                    pb.FenceProducerRequest(topic="orders", producer_id=8, producer_epoch=1)
                )
            await fence(service, 2)


@pytest.mark.parametrize("acks", [WAL, DURABLE])
async def test_a_fence_holds_and_knows_after_a_crash_of_the_leader(
    tmp_path: Path, world: World, orders: bytes, acks: int
) -> None:
    async with running(tmp_path, world) as service:
        await fence(service, 1)
        await service.api.produce(stream(0, 3, 1))
        await service.api.produce(stream(3, 5, 1))
        await fence(service, 2)
    async with running(tmp_path, world) as service:
        with pytest.raises(errors.ProducerNotFenced):
            await service.api.produce(stream(5, 6, 2))
        with pytest.raises(errors.ProducerFenced):
            await fence(service, 1)
        async with segmenting(world, service):
            assert last_of(await fence(service, 2, acks=acks)) == (4, 2, 4)
        assert (await service.api.produce(stream(5, 6, 2))).base_offset == 5


async def test_a_fence_after_the_last_record_survives_a_graceful_handover(
    tmp_path: Path, world: World, orders: bytes
) -> None:
    service = await started(tmp_path / "a", world.coordinator, agent_id="a")
    await eventually(lambda: service.agent.running().logs.led("orders", 0) is not None)
    async with segmenting(world, service):
        await fence(service, 1)
        await service.api.produce(stream(0, 3, 1, acks=DURABLE))
        await fence(service, 2)
        await service.stop()
    async with running(tmp_path / "b", world, "b") as other:
        with pytest.raises(errors.ProducerFenced):
            await fence(other, 1)
        assert last_of(await fence(other, 2)) == (2, 3, 2)
        assert (await other.api.produce(stream(3, 4, 2))).base_offset == 3


async def test_where_a_takeover_hides_the_old_tail_a_fence_waits_for_it(
    tmp_path: Path, world: World, orders: bytes
) -> None:
    old = RangeKey(orders, 0, 1)
    async with running(tmp_path / "a", world) as service:
        await fence(service, 1)
        await service.api.produce(stream(0, 3, 1))
    await world.expire_all()
    async with running(tmp_path / "b", world, "b") as other:
        hidden = await fence(other, 2, wait_ms=0)
        assert (hidden.settled, hidden.last_sequence) == (False, -1)
        assert "epoch 1 of agent a is not settled" in hidden.waiting_reason
        with pytest.raises(errors.Unavailable, match="epoch 1 of agent a is not settled"):
            await fence(other, 2, wait_ms=20)
        with pytest.raises(errors.ProducerNotFenced):
            await other.api.produce(stream(0, 3, 2))
        waiting = asyncio.ensure_future(fence(other, 2))
        # Others write on, and their state is registered: it must not stand before that of the old range.
        await other.api.produce(
            pb.ProduceRequest(topic="orders", batch=encode_batch(Records.from_lists([b"o"], timestamps_ms=1)))
        )
        back = await started(tmp_path / "a", world.coordinator, agent_id="a")
        try:
            assert last_of(await waiting) == (2, 3, 2)
        finally:
            await kill(back)
        assert world.range(old).end_offset == 3
        assert (await other.api.produce(stream(3, 5, 2))).base_offset > 3
    # The next one still knows, although the old range's tail was never told to it and is not asked for again.
    await expire(world, "a", "b")
    async with running(tmp_path / "b", world, "b") as other:
        assert last_of(await fence(other, 3))[:2] == (4, 2)


async def test_what_a_fence_learned_of_a_hidden_tail_is_kept_when_its_leader_dies_at_once(
    tmp_path: Path, world: World, orders: bytes
) -> None:
    async with running(tmp_path / "a", world) as service:
        await fence(service, 1)
        await service.api.produce(stream(0, 3, 1))
    await world.expire_all()
    async with running(tmp_path / "b", world, "b") as other:
        back = await started(tmp_path / "a", world.coordinator, agent_id="a")
        await fence(other, 2)
        await kill(back)
    await expire(world, "a", "b")
    async with running(tmp_path / "b", world, "b") as other:
        assert last_of(await fence(other, 3)) == (2, 3, 2)


async def test_what_a_leader_heard_of_records_that_were_given_up_since_counts_for_nothing(
    tmp_path: Path, world: World, orders: bytes
) -> None:
    """The second leader is granted an announced state of the first, whose records are declared lost later; the states
    of its own buffers repeat it. A successor that believed it would leave those records out."""
    first = RangeKey(orders, 0, 1)
    async with running(tmp_path / "a", world, seal_age_ms=20) as service:
        await fence(service, 1)
        held = service.agent.running().logs.led("orders", 0)
        assert held is not None
        ends = lambda: {row.end_offset for row in world.rows(t.PRODUCER_SNAPSHOTS)}  # noqa: E731
        await service.api.produce(stream(0, 3, 1))
        await eventually(lambda: 3 in ends())
        assert await world.register(first, 0, 3)
        await eventually(lambda: held.log.registered_end == 3)
        await service.api.produce(stream(3, 5, 1))
        await eventually(lambda: 5 in ends())
    await expire(world, "a")
    other = await started(tmp_path / "b", world.coordinator, agent_id="b")
    await eventually(lambda: other.agent.running().logs.led("orders", 0) is not None)
    async with segmenting(world, other):
        batch = encode_batch(Records.from_lists([b"o"], timestamps_ms=1000), producer=ProducerStamp(8, 0, 0))
        await other.api.produce(pb.ProduceRequest(topic="orders", batch=batch, acks=DURABLE))
        repeated = [decode_snapshot(row.snapshot) for row in world.rows(t.PRODUCER_SNAPSHOTS) if row.epoch == 2]
        assert any(PRODUCER in states for states in repeated)
        await other.stop()
    await world.lose(first)
    async with running(tmp_path / "c", world, "c") as third:
        assert last_of(await fence(third, 2)) == (2, 3, 2)


async def test_in_a_durable_topic_a_takeover_answers_at_once_and_exactly(
    tmp_path: Path, world: World, durable_orders: bytes
) -> None:
    """Only what is registered counts: the rest was not acknowledged, and is given up at the takeover."""
    async with running(tmp_path / "a", world, seal_age_ms=600_000) as service:
        await fence(service, 1)
        async with segmenting(world, service):
            await service.api.produce(stream(0, 3, 1))
        lost = asyncio.ensure_future(service.api.produce(stream(3, 5, 1)))
        held = service.agent.running().logs.led("orders", 0)
        assert held is not None
        await eventually(lambda: held.log.next_offset == 5)
    with contextlib.suppress(errors.StreamHouseError, asyncio.CancelledError):
        lost.cancel()
        await lost
    await world.expire_all()
    async with running(tmp_path / "b", world, "b") as other:
        assert last_of(await fence(other, 2, wait_ms=0)) == (2, 3, 2)
        async with segmenting(world, other):
            assert (await other.api.produce(stream(3, 5, 2))).base_offset >= 3


async def test_in_a_durable_topic_a_fence_answers_only_what_is_registered(
    tmp_path: Path, world: World, durable_orders: bytes
) -> None:
    async with running(tmp_path, world, seal_age_ms=600_000, durable_linger_ms=10_000) as service:
        await fence(service, 1)
        written = asyncio.ensure_future(service.api.produce(stream(0, 3, 1)))
        held = service.agent.running().logs.led("orders", 0)
        assert held is not None
        await eventually(lambda: held.log.next_offset == 3)
        with pytest.raises(errors.Unavailable, match="not in the object store yet"):
            await fence(service, 2, wait_ms=20)
        async with segmenting(world, service):
            assert last_of(await fence(service, 2)) == (2, 3, 2)
            await written


@pytest.mark.parametrize("registered", range(6))
async def test_the_last_sequence_is_that_of_the_registered_end_after_a_replay_and_a_takeover(
    tmp_path: Path, world: World, durable_orders: bytes, registered: int
) -> None:
    """A replay makes several buffers of what was written, and the range may turn out to end behind any of them, while
    the last five batches of the producer all lie behind it."""
    key = RangeKey(durable_orders, 0, 1)
    body = b"x" * 30_000
    async with running(tmp_path / "a", world, seal_age_ms=600_000) as service:
        await fence(service, 1)
        for sequence in range(40):
            records = Records.from_lists([body + b"%d" % sequence], timestamps_ms=1000)
            batch = encode_batch(records, producer=ProducerStamp(PRODUCER, 1, sequence), codec=Codec.NONE)
            held = service.agent.running().logs.led("orders", 0)
            assert held is not None
            asked = asyncio.ensure_future(
                service.api.produce(pb.ProduceRequest(topic="orders", sequenced_batch=batch, acks=DURABLE))
            )
            await eventually(lambda end=sequence + 1, held=held: held.log.next_offset == end)
            asked.cancel()
    # The same agent comes back before it is missed: in a durable topic its open range settles where its log ends.
    async with running(tmp_path / "a", world, seal_bytes=200_000):
        await eventually(lambda: sum(len(b.slices) for b in world.buffers.values()) >= 6)
        assert all(len(b.slices) == 1 for b in world.buffers.values()), "registration may stop at any end"
        ends = sorted(part.end_offset for b in world.buffers.values() for part in b.slices)
        base = 0
        for end in ends[:registered]:
            assert await world.register(key, base, end)
            base = end
        states = {
            row.end_offset: decode_snapshot(row.snapshot)[PRODUCER].next_sequence
            for row in world.rows(t.PRODUCER_SNAPSHOTS)
            if row.epoch == 1 and row.end_offset in ends
        }
    assert all(states[end] == end for end in ends[max(0, registered - 1) :]), states


async def test_two_racing_fences_leave_the_newer_one(tmp_path: Path, world: World, orders: bytes) -> None:
    async with running(tmp_path, world) as service:
        held = world.coordinator.hold_answers("register_fence")
        older = asyncio.ensure_future(fence(service, 1))
        newer = asyncio.ensure_future(fence(service, 2))
        await eventually(lambda: len(held.requests) == 2)
        held.release()
        outcomes = await asyncio.gather(older, newer, return_exceptions=True)
        assert last_of(await fence(service, 2)) == NOTHING
        with pytest.raises(errors.ProducerFenced):
            await service.api.produce(stream(0, 1, 1))
    assert isinstance(outcomes[1], pb.FenceProducerResponse)
    assert isinstance(outcomes[0], pb.FenceProducerResponse | errors.ProducerFenced)


async def test_a_batch_in_flight_is_in_the_answer_or_refused(tmp_path: Path, world: World, orders: bytes) -> None:
    async with running(tmp_path, world) as service:
        await fence(service, 1)
        with held_disk(FileWal, "append") as disk:
            being_written = asyncio.ensure_future(service.api.produce(stream(0, 3, 1)))
            await eventually(disk.reached.is_set)
            fencing = asyncio.ensure_future(fence(service, 2))
            await eventually(lambda: held_fence(service) == 2)
            queued = asyncio.ensure_future(service.api.produce(stream(3, 5, 1)))
            await asyncio.sleep(0.01)
            assert not fencing.done()
        assert last_of(await fencing) == (2, 3, 2)
        assert (await being_written).base_offset == 0
        with pytest.raises(errors.ProducerFenced):
            await queued


def held_fence(service: IngestService) -> int:
    held = service.agent.running().logs.led("orders", 0)
    assert held is not None
    fenced = held.log.fences.get(PRODUCER)
    return 0 if fenced is None else fenced.producer_epoch


async def test_a_fence_is_not_answered_by_an_agent_that_does_not_lead_any_more(
    tmp_path: Path, world: World, orders: bytes
) -> None:
    async with running(tmp_path / "a", world) as service:
        await fence(service, 1)
        world.coordinator.feed_paused = True
        await world.expire_all()
        with pytest.raises(errors.NotLeader):
            await fence(service, 1)
        world.coordinator.feed_paused = False
        world.coordinator.wake()


async def test_a_state_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path, world: World, orders: bytes) -> None:
    async with running(tmp_path / "a", world) as service:
        await fence(service, 1)
        await service.api.produce(stream(0, 3, 1))
    newer = bytearray(encode_snapshot({PRODUCER: STATE}))
    newer[0] = 9
    async with running(tmp_path / "a", world) as service:
        await world.keep_snapshot(RangeKey(orders, 0, 1), 3, bytes(newer))
        with pytest.raises(errors.Unavailable, match="version 9"):
            await fence(service, 2)


async def test_idle_producers_that_fence_outlast_others_and_a_replay(
    tmp_path: Path, world: World, orders: bytes
) -> None:
    async with running(tmp_path, world, producers_per_partition_max=2) as service:
        await fence(service, 1)
        await service.api.produce(stream(0, 3, 1))
        for other in range(10, 20):
            records = Records.from_lists([b"o"], timestamps_ms=1000)
            batch = encode_batch(records, producer=ProducerStamp(other, 0, 0))
            await service.api.produce(pb.ProduceRequest(topic="orders", batch=batch))
        assert last_of(await fence(service, 1)) == (2, 3, 2)
    async with running(tmp_path, world, producers_per_partition_max=2) as service:
        assert last_of(await fence(service, 2)) == (2, 3, 2)
