"""What the held logs cost in memory, and who is told of what."""

from shproto.keys import RangeKey
from streamhouse_ingest.log.buffer import BATCH_OVERHEAD_BYTES, WalPosition
from streamhouse_ingest.log.logs import HeldLog, Logs
from streamhouse_ingest.log.partition_log import BatchAppended, PartitionLog
from streamhouse_ingest.log.producers import ProducerState, ProducerTable, WrittenBatch


def new_logs(memory_bytes_max: int = 10_000, tail_cache_bytes: int = 1_000) -> Logs:
    return Logs(memory_bytes_max=memory_bytes_max, tail_cache_bytes=tail_cache_bytes, producers_max=10)


def lead(logs: Logs, partition: int = 0, epoch: int = 1, start: int = 0) -> HeldLog:
    key = RangeKey(b"t" * 16, partition, epoch)
    held = logs.hold(PartitionLog(key, "orders", start, start + 10**9, logs.producers(key.partition_key)))
    logs.lead(held)
    return held


def append(logs: Logs, held: HeldLog, size_bytes: int = 100) -> None:
    event = BatchAppended(held.log.next_offset, 1, None)
    held.log.apply(event, WalPosition(1, 0, size_bytes), b"x" * size_bytes, 0)
    logs.count_batch(held, size_bytes)
    logs.trim()


def actual_bytes(logs: Logs) -> int:
    buffers = [b for held in logs for b in held.log._buffers()]
    return sum(b.memory_bytes + b.overhead_bytes + len(b.snapshot or b"") for b in buffers)


def test_what_is_counted_is_what_is_there():
    logs = new_logs()
    first, second = lead(logs), lead(logs, 1)
    for _ in range(30):
        append(logs, first)
        append(logs, second, 200)
    assert logs.memory_bytes == actual_bytes(logs) <= 10_000
    logs.seal(first)
    logs.register(first, 7)
    assert logs.memory_bytes == actual_bytes(logs)
    logs.settle(second, 20)
    assert logs.memory_bytes == actual_bytes(logs)
    logs.drop(first, "test")
    logs.drop(second, "test")
    assert (logs.memory_bytes, logs.open_bytes, len(logs.dirty)) == (0, 0, 0)


def test_registered_batches_stay_for_readers_within_the_tail_cache():
    logs = new_logs()
    held = lead(logs)
    for _ in range(20):
        append(logs, held)
        logs.seal(held)
    logs.register(held, 20)
    kept = sum(b.memory_bytes + b.overhead_bytes for b in held.log.tail)
    assert 0 < kept <= 1_000
    assert held.log.held_from == 20 - len(held.log.tail)


def test_a_registered_buffer_that_is_not_in_memory_is_not_kept_nor_what_came_before_it():
    logs = new_logs(memory_bytes_max=2_000, tail_cache_bytes=10_000)
    held = lead(logs)
    for _ in range(4):
        append(logs, held)
    logs.seal(held)
    held.log.sealed[0].drop_batches()
    logs.memory_bytes -= 400
    append(logs, held)
    logs.seal(held)
    logs.register(held, 5)
    assert held.log.held_from == 4
    assert logs.memory_bytes == actual_bytes(logs)


def test_memory_is_full_when_what_batches_cost_besides_their_bytes_fills_it():
    logs = new_logs(memory_bytes_max=1_000)
    held = lead(logs)
    for _ in range(1_000 // BATCH_OVERHEAD_BYTES):
        assert not logs.memory_full
        append(logs, held, 100)
    append(logs, held, 100)
    assert logs.memory_full
    logs.register(held, held.log.next_offset)
    assert not logs.memory_full


def test_g7_memory_that_is_just_used_up_is_not_full_for_ever():
    logs = new_logs(memory_bytes_max=1_024, tail_cache_bytes=1_024)
    held = lead(logs)
    for _ in range(8):
        append(logs, held, 128 - BATCH_OVERHEAD_BYTES)
    logs.seal(held)
    logs.register(held, held.log.next_offset)
    assert not logs.memory_full, "all is registered: nothing would ever change that"


def test_g7_what_sealed_buffers_say_of_their_producers_counts_and_goes_with_their_registration():
    """With many producers of little data this is most of what a buffer costs."""
    logs = new_logs(memory_bytes_max=10_000, tail_cache_bytes=10_000)
    held, other = lead(logs), lead(logs, 1)
    for producer_id in range(1, 11):
        held.log.producers.put(producer_id, ProducerState(0, (WrittenBatch(0, 1, 0, 1),)))
    snapshot_bytes = len(held.log.producers.snapshot(1))
    append(logs, other)
    for _ in range(10):
        append(logs, held)
        logs.seal(held)
    batches_bytes = 11 * (100 + BATCH_OVERHEAD_BYTES)
    assert logs.memory_bytes == actual_bytes(logs) == batches_bytes + 10 * snapshot_bytes
    logs.register(held, 5)
    assert logs.memory_bytes == actual_bytes(logs) == batches_bytes + 5 * snapshot_bytes
    logs.settle(held, 8)
    assert logs.memory_bytes == actual_bytes(logs)
    logs.drop(held, "test")
    assert logs.memory_bytes == actual_bytes(logs) == 100 + BATCH_OVERHEAD_BYTES


def test_a_newer_epoch_takes_the_name_and_the_older_one_does_not_take_it_away():
    logs = new_logs()
    old = lead(logs)
    new = lead(logs, epoch=2, start=100)
    logs.drop(old, "test")
    assert logs.led("orders", 0) is new
    assert logs.of_partition(b"t" * 16, 0) == [new]


async def test_g7_waits_that_were_given_up_do_not_pile_up():
    held = HeldLog(PartitionLog(RangeKey(b"t" * 16, 0, 1), "orders", 0, 1000, ProducerTable(10)))
    kept = held.wait_registered(500)
    for _ in range(1000):
        held.wait_registered(10).cancel()
    assert len(held._durable) <= 130
    held.log.register(500)
    held.release_registered()
    assert kept.result() is None


async def test_appends_are_told_to_all_subscribers_and_to_readers_that_wait():
    logs = new_logs()
    held, other = lead(logs), lead(logs, 1)
    told: list[tuple[str, HeldLog]] = []
    logs.subscribe(lambda held: told.append(("first", held)))
    logs.subscribe(lambda held: told.append(("second", held)))
    with held.changed() as change, other.changed() as nothing:
        logs.appended(held)
        assert change.done() and not nothing.done()
    assert told == [("first", held), ("second", held)]
