"""The queue of a partition against a model of partition leaders: any faults, in any order."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shformat import Codec
from shproto import errors
from streamhouse.core.partition_queue import (
    GROW_MS_MAX,
    IN_FLIGHT_PER_PARTITION_MAX,
    QUIET_MS,
    Blocked,
    PartitionQueue,
)
from streamhouse.core.producer_batch import NEXT, BatchState, Outcome, ProducerBatch, outcome_of

pytestmark = pytest.mark.quick


class Batch(ProducerBatch):
    """A batch that the tests tell by its payload."""

    __slots__ = ("payload",)

    def __init__(self, payload, record_count, deadline_ms=1e9):
        super().__init__("t", 0, deadline_ms)
        self.payload = payload
        for _ in range(record_count):
            self.append(b"", None, (), 0, 0)


def queue_of(idempotent=True):
    return PartitionQueue("t", 0, idempotent=idempotent)


def add(queue, payload, record_count, deadline_ms=1e9):
    queue.open(Batch(payload, record_count, deadline_ms), 0, 0)
    queue.close_open()


class Leader:
    """The sequence rules of the real agent; `log` is what its readers see."""

    def __init__(self):
        self.log = []
        self.known = {}

    def append(self, batch):
        stamp = batch.stamp
        known = self.known.get(stamp.producer_id)
        if known:
            if (stamp.base_sequence, batch.record_count) in known[-5:]:
                return None
            if stamp.base_sequence != sum(known[-1]):
                return errors.SequenceGap("gap")
        self.known.setdefault(stamp.producer_id, []).append((stamp.base_sequence, batch.record_count))
        self.log.append(batch.payload)
        return None


def run(queue, leader, faults, expire_at=()):
    """Sends until the queue is idle; `faults` says what becomes of each try. Returns (acked, failed) payloads."""
    acked, failed, in_flight, ids, steps = [], [], [], iter(range(1, 10_000)), 0
    while not queue.is_idle:
        steps += 1
        if steps in expire_at:
            failed += [batch.payload for batch in queue.expire(steps)]
            continue
        if queue.is_ready:
            if queue.needs_producer_id:
                queue.identify(next(ids), 0)
            batch = queue.take(0)
            assert len(queue._in_flight) <= IN_FLIGHT_PER_PARTITION_MAX
            fault = next(faults, "ok")
            error = leader.append(batch) if fault in ("ok", "lost answer") else None
            refusal = {"refused": errors.Overloaded("full"), "fatal": errors.InvalidBatch("bad")}.get(fault, error)
            in_flight.append((batch, fault, refusal))
            if next(faults, "ok") == "ok" and fault not in ("lost answer", "not sent"):
                continue  # pipeline more before answering
        # A broken stream takes everything behind it along; a leader answers in order otherwise.
        broken = False
        for batch, fault, refusal in in_flight:
            broken = broken or fault in ("lost answer", "not sent")
            error = errors.Unavailable("cut") if broken else refusal
            if error is None:
                queue.acked(batch)
                if not batch.is_decided:
                    acked.append(batch.payload)
            elif not queue.answered(batch, error) and not batch.is_decided:
                failed.append(batch.payload)
        in_flight = []
        assert steps < 10_000
    return acked, failed


faults = st.lists(st.sampled_from(["ok", "ok", "ok", "refused", "lost answer", "not sent"]), max_size=60)


@given(faults, st.integers(1, 12))
def test_every_batch_once_and_in_order(plan, count):
    queue, leader = queue_of(), Leader()
    for number in range(count):
        add(queue, number, 1 + number % 3, 1e9)
    acked, failed = run(queue, leader, iter(plan))
    assert leader.log == acked == list(range(count))
    assert failed == []


@given(
    st.lists(st.sampled_from(["ok", "ok", "refused", "lost answer", "not sent", "fatal"]), max_size=60),
    st.integers(1, 12),
    st.sets(st.integers(1, 30)),
)
@settings(max_examples=300)
def test_failures_and_deadlines_never_double_or_reorder(plan, count, expire_at):
    queue, leader = queue_of(), Leader()
    for number in range(count):
        add(queue, number, 1, 3 * number)
    acked, failed = run(queue, leader, iter(plan), expire_at)
    assert leader.log == sorted(set(leader.log))
    assert acked == sorted(acked)
    assert set(acked) <= set(leader.log)
    assert sorted(acked + failed) == list(range(count))


@given(st.lists(st.sampled_from(["ok", "refused"]), max_size=30), st.integers(1, 8))
def test_without_idempotence_one_at_a_time(plan, count):
    queue, sent, plan = queue_of(idempotent=False), [], iter(plan)
    for number in range(count):
        add(queue, number, 1, 1e9)
    while not queue.is_idle:
        batch = queue.take(0)
        assert batch.stamp is None and not queue.is_ready
        if next(plan, "ok") == "ok":
            sent.append(batch.payload)
            queue.acked(batch)
        else:
            assert queue.answered(batch, errors.Overloaded("full"))
    assert sent == list(range(count))


def in_flight(queue, count):
    queue.identify(1, 0)
    add(queue, "opens", 1, 1e9)
    queue.acked(queue.take(0))
    for number in range(count):
        add(queue, number, 2, number)
    return [queue.take(0) for _ in range(count)]


def test_one_batch_alone_until_the_leader_is_known_to_remember():
    queue = queue_of()
    queue.identify(1, 0)
    for number in range(9):
        add(queue, number, 1, 1e9)
    first = queue.take(0)
    assert not queue.is_ready
    queue.acked(first)
    batches = [queue.take(0) for _ in range(IN_FLIGHT_PER_PARTITION_MAX)]
    assert not queue.is_ready
    for batch in batches:
        queue.acked(batch)
    queue.leader_confirmed = False
    queue.take(0)
    assert not queue.is_ready


def test_what_came_back_is_sent_again_under_the_same_numbers():
    queue = queue_of()
    batches = in_flight(queue, 3)
    stamps = [batch.stamp for batch in batches]
    assert queue.answered(batches[0], errors.Overloaded("full"))
    assert queue.answered(batches[1], errors.SequenceGap("echo"))
    assert not queue.is_ready
    assert queue.answered(batches[2], errors.SequenceGap("echo"))
    assert queue.take(0) is batches[0]
    queue.acked(batches[0])
    assert [queue.take(0), queue.take(0)] == batches[1:]
    assert [batch.stamp for batch in batches] == stamps


def test_a_batch_that_fails_leaves_a_hole_and_the_rest_starts_over():
    queue = queue_of()
    batches = in_flight(queue, 3)
    assert not queue.answered(batches[0], errors.InvalidBatch("bad"))
    assert queue.answered(batches[1], errors.SequenceGap("echo"))
    assert queue.answered(batches[2], errors.SequenceGap("echo"))
    assert queue.needs_producer_id
    queue.identify(2, 0)
    assert queue.take(0) is batches[1]
    assert (batches[1].stamp.producer_id, batches[1].stamp.base_sequence) == (2, 0)


def test_a_gap_after_an_unknown_outcome_is_not_renumbered():
    queue = queue_of()
    (batch,) = in_flight(queue, 1)
    assert queue.answered(batch, errors.Unavailable("cut"))
    assert queue.take(0) is batch
    gap = errors.SequenceGap("the new leader never had what came before")
    assert not Batch("never sent", 1).is_outcome_unknown(gap)
    assert not queue.answered(batch, gap)
    assert queue.is_idle
    assert batch.is_outcome_unknown(gap)
    assert not batch.is_outcome_unknown(errors.AcksTooWeak("says itself what is wrong"))


def test_a_retry_across_a_restore_fails_and_what_follows_gets_a_new_id():
    queue = queue_of()
    (batch,) = in_flight(queue, 1)
    add(queue, "next", 1, 1e9)
    assert queue.answered(batch, errors.Unavailable("PostgreSQL is gone"))
    assert queue.take(0) is batch
    assert not queue.answered(batch, errors.UnknownProducer("from before the restore")), "it may be written already"
    assert queue.needs_producer_id


def test_a_batch_that_expires_in_flight_keeps_its_place():
    queue = queue_of()
    batches = in_flight(queue, 2)
    assert queue.expire(0) == [batches[0]]
    add(queue, "next", 1, 1e9)
    assert not queue.is_ready
    queue.acked(batches[0])  # late, and good: no hole
    queue.acked(batches[1])
    assert queue.is_ready and not queue.needs_producer_id
    assert queue.expire(0) == []


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errors.Overloaded("x"), Outcome.NOT_WRITTEN),
        (errors.DiskFull("x"), Outcome.NOT_WRITTEN),
        (errors.UnknownTopic("x"), Outcome.NOT_WRITTEN),
        (errors.NotLeader("x"), Outcome.UNKNOWN),
        (errors.NotLeader("x", outcome="unknown"), Outcome.UNKNOWN),
        (errors.NotLeader("x", outcome="not_written"), Outcome.NOT_WRITTEN),
        (errors.ShuttingDown("x"), Outcome.UNKNOWN),
        (errors.DurableTimeout("x"), Outcome.UNKNOWN),
        (errors.SequenceGap("x"), Outcome.OUT_OF_SEQUENCE),
        (errors.ProducerFenced("x"), Outcome.OUT_OF_SEQUENCE),
        (errors.UnknownProducer("x"), Outcome.OUT_OF_SEQUENCE),
        (errors.InvalidBatch("x"), Outcome.FATAL),
        (errors.AcksTooWeak("x"), Outcome.FATAL),
    ],
)
def test_what_an_error_says_of_the_batch(error, outcome):
    assert outcome_of(error) is outcome


def test_an_old_ids_acknowledgement_does_not_vouch_for_a_new_one():
    """A leader that does not know a producer takes its batches at any number: a second one after refusing the first."""
    queue, leader = queue_of(), Leader()
    first, second = in_flight(queue, 2)
    for batch in (first, second):
        leader.append(batch)
    add(queue, "third", 1, 1e9)
    add(queue, "fourth", 1, 1e9)
    assert queue.expire(0) == [first]
    for batch in (first, second):  # both were written, the answers are lost
        queue.answered(batch, errors.Unavailable("cut"))
    assert queue.take(0) is second
    assert leader.append(second) is None
    queue.acked(second)
    assert queue.needs_producer_id
    queue.identify(2, 0)
    tries = [queue.take(0)]
    while queue.is_ready:
        tries.append(queue.take(0))
    answers = [errors.Overloaded("full"), *(leader.append(batch) for batch in tries[1:])]
    for batch, error in zip(tries, answers, strict=True):
        queue.acked(batch) if error is None else queue.answered(batch, error)
    for producer_id in range(3, 10):
        if queue.is_idle:
            break
        if queue.needs_producer_id:
            queue.identify(producer_id, 0)
        batch = queue.take(0)
        error = leader.append(batch)
        queue.acked(batch) if error is None else queue.answered(batch, error)
    assert leader.log == [0, 1, "third", "fourth"]


def test_batches_of_two_producer_ids_are_never_in_flight_together():
    """Their numbers do not hold them together: where the one is refused, the leader takes the other."""
    queue = queue_of()
    expired, refused, broken = in_flight(queue, 3)
    add(queue, "last", 1, 1e9)
    assert queue.expire(0) == [expired]
    queue.answered(expired, errors.Overloaded("full"))
    queue.answered(refused, errors.Overloaded("full"))
    queue.answered(broken, errors.Unavailable("cut"))
    leader = Leader()  # another one, after a takeover: it knows nothing
    queue.identify(2, 0)
    refusals = {broken: errors.Overloaded("full")}
    while not queue.is_idle:
        tries = [queue.take(0)]
        while queue.is_ready:
            tries.append(queue.take(0))
        answers = [refusals.pop(batch, None) or leader.append(batch) for batch in tries]
        for batch, error in zip(tries, answers, strict=True):
            queue.acked(batch) if error is None else queue.answered(batch, error)
    assert leader.log == [1, 2, "last"]


# ---- states, and what happens by itself


@pytest.mark.parametrize("state", BatchState)
def test_a_batch_changes_its_state_along_the_table_alone(state):
    for other in BatchState:
        batch = Batch("b", 1)
        batch.state = state
        if other in NEXT[state]:
            batch.move_to(other)
            assert batch.state is other
        else:
            with pytest.raises(AssertionError, match=f"{state.name} is never followed by {other.name}"):
                batch.move_to(other)
            assert batch.state is state


def test_a_batch_with_an_outcome_holds_no_records():
    queue = queue_of(idempotent=False)
    add(queue, "b", 3)
    batch, waited = queue.take(0), []
    assert batch.encode(Codec.NONE)
    batch.when_done(lambda: waited.append(batch.is_done))
    batch.resolve(7)
    assert (batch.base_offset, batch.record_count, waited) == (7, 3, [True])
    assert batch._encoded == b"" and batch._values == []


def test_an_open_batch_goes_after_its_linger_and_is_closed_once_it_has_grown_for_long():
    queue = queue_of(idempotent=False)
    assert queue.next_wake_ms() == math.inf and not queue.has_next
    queue.open(Batch("b", 1, deadline_ms=10_000), 100, 5)
    assert queue.next_wake_ms() == 105 and not queue.has_next
    assert queue.wake(104) == [] and not queue.has_next
    assert queue.wake(105) == [] and queue.has_next
    assert queue.next_wake_ms() == 105 + GROW_MS_MAX
    assert queue.wake(105 + GROW_MS_MAX) == [] and queue.open_batch is None and queue.has_next
    assert queue.next_wake_ms() == 10_000
    (expired,) = queue.wake(10_000)
    assert expired.state is BatchState.EXPIRED and queue.is_idle
    assert queue.next_wake_ms() == math.inf


def test_a_flush_ends_the_linger_of_the_open_batch_alone():
    queue = queue_of(idempotent=False)
    queue.flush()
    queue.open(Batch("a", 1), 0, 5)
    assert not queue.has_next
    queue.flush()
    assert queue.has_next
    queue.open(Batch("b", 1), 1, 5)
    assert queue.take(1).payload == "a" and not queue.has_next


def test_the_open_batch_grows_while_small_batches_are_unanswered():
    queue = PartitionQueue("t", 0, idempotent=True, small_in_flight_max=2)
    first = in_flight(queue, 2)[0]
    queue.open(Batch("b", 1), 0, 0)
    queue.flush()
    assert not queue.has_next
    queue.acked(first)
    assert queue.has_next


def test_a_blocked_queue_sends_nothing_until_its_time():
    queue = queue_of(idempotent=False)
    add(queue, "b", 1)
    for reason in (Blocked.METADATA, Blocked.PRODUCER_ID, Blocked.CLOSED):
        queue.block(reason)
        assert not queue.has_next and queue.next_wake_ms() == 1e9
    queue.block(Blocked.BACKOFF, 50)
    assert not queue.has_next and queue.next_wake_ms() == 50
    queue.wake(49)
    assert not queue.has_next
    queue.wake(50)
    assert queue.has_next and queue.blocked is None
    queue.block(Blocked.STREAM_FULL)
    assert queue.has_next, "its leader may be another one by now"


def test_a_queue_changes_its_stream_only_with_nothing_in_flight():
    queue = queue_of()
    assert queue.switch_to("a")
    batch = in_flight(queue, 1)[0]
    assert queue.leader_confirmed and not queue.switch_to("b") and queue.leader_confirmed
    queue.acked(batch)
    assert queue.switch_to("a") and queue.leader_confirmed
    assert queue.switch_to("b") and not queue.leader_confirmed


def test_after_a_long_silence_the_leader_has_to_confirm_again():
    queue = queue_of()
    queue.acked(in_flight(queue, 1)[0])
    for number in range(2):
        add(queue, number, 1)
    queue.take(QUIET_MS)
    assert queue.is_ready, "as long as it was not longer"
    for batch in (*queue._in_flight, queue.take(QUIET_MS)):
        queue.acked(batch)
    for number in range(2):
        add(queue, number, 1)
    queue.take(2 * QUIET_MS + 1)
    assert not queue.is_ready
