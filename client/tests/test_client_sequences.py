"""The lane against a model of partition leaders: any faults, in any order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shproto import errors
from streamhouse.core.sequences import IN_FLIGHT_PER_PARTITION_MAX, Lane, Outgoing, Verdict, in_doubt, verdict_of

pytestmark = pytest.mark.quick


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


def run(lane, leader, faults, expire_at=()):
    """Sends until the lane is idle; `faults` says what becomes of each try. Returns (acked, failed) payloads."""
    acked, failed, in_flight, ids, steps = [], [], [], iter(range(1, 10_000)), 0
    while not lane.idle:
        steps += 1
        if steps in expire_at:
            failed += [batch.payload for batch in lane.expire(steps)]
            continue
        if lane.ready:
            if lane.needs_identity:
                lane.identify(next(ids), 0)
            batch = lane.take()
            assert lane.in_flight_count <= IN_FLIGHT_PER_PARTITION_MAX
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
                lane.acked(batch)
                if not batch.expired:
                    acked.append(batch.payload)
            elif not lane.answered(batch, error) and not batch.expired:
                failed.append(batch.payload)
        in_flight = []
        assert steps < 10_000
    return acked, failed


faults = st.lists(st.sampled_from(["ok", "ok", "ok", "refused", "lost answer", "not sent"]), max_size=60)


@given(faults, st.integers(1, 12))
def test_every_batch_once_and_in_order(plan, count):
    lane, leader = Lane(idempotent=True), Leader()
    for number in range(count):
        lane.append(Outgoing(number, 1 + number % 3, deadline_ms=1e9))
    acked, failed = run(lane, leader, iter(plan))
    assert leader.log == acked == list(range(count))
    assert failed == []


@given(
    st.lists(st.sampled_from(["ok", "ok", "refused", "lost answer", "not sent", "fatal"]), max_size=60),
    st.integers(1, 12),
    st.sets(st.integers(1, 30)),
)
@settings(max_examples=300)
def test_failures_and_deadlines_never_double_or_reorder(plan, count, expire_at):
    lane, leader = Lane(idempotent=True), Leader()
    for number in range(count):
        lane.append(Outgoing(number, 1, deadline_ms=3 * number))
    acked, failed = run(lane, leader, iter(plan), expire_at)
    assert leader.log == sorted(set(leader.log))
    assert acked == sorted(acked)
    assert set(acked) <= set(leader.log)
    assert sorted(acked + failed) == list(range(count))


@given(st.lists(st.sampled_from(["ok", "refused"]), max_size=30), st.integers(1, 8))
def test_without_idempotence_one_at_a_time(plan, count):
    lane, sent, plan = Lane(idempotent=False), [], iter(plan)
    for number in range(count):
        lane.append(Outgoing(number, 1, deadline_ms=1e9))
    while not lane.idle:
        batch = lane.take()
        assert batch.stamp is None and not lane.ready
        if next(plan, "ok") == "ok":
            sent.append(batch.payload)
            lane.acked(batch)
        else:
            assert lane.answered(batch, errors.Overloaded("full"))
    assert sent == list(range(count))


def in_flight(lane, count):
    lane.identify(1, 0)
    lane.append(Outgoing("opens", 1, 1e9))
    lane.acked(lane.take())
    for number in range(count):
        lane.append(Outgoing(number, 2, deadline_ms=number))
    return [lane.take() for _ in range(count)]


def test_one_batch_alone_until_the_leader_is_known_to_remember():
    lane = Lane(idempotent=True)
    lane.identify(1, 0)
    for number in range(9):
        lane.append(Outgoing(number, 1, 1e9))
    first = lane.take()
    assert not lane.ready
    lane.acked(first)
    batches = [lane.take() for _ in range(IN_FLIGHT_PER_PARTITION_MAX)]
    assert not lane.ready
    for batch in batches:
        lane.acked(batch)
    lane.doubt()
    lane.take()
    assert not lane.ready


def test_what_came_back_is_sent_again_under_the_same_numbers():
    lane = Lane(idempotent=True)
    batches = in_flight(lane, 3)
    stamps = [batch.stamp for batch in batches]
    assert lane.answered(batches[0], errors.Overloaded("full"))
    assert lane.answered(batches[1], errors.SequenceGap("echo"))
    assert not lane.ready
    assert lane.answered(batches[2], errors.SequenceGap("echo"))
    assert lane.take() is batches[0]
    lane.acked(batches[0])
    assert [lane.take(), lane.take()] == batches[1:]
    assert [batch.stamp for batch in batches] == stamps


def test_a_batch_that_fails_leaves_a_hole_and_the_rest_starts_over():
    lane = Lane(idempotent=True)
    batches = in_flight(lane, 3)
    assert not lane.answered(batches[0], errors.InvalidBatch("bad"))
    assert lane.answered(batches[1], errors.SequenceGap("echo"))
    assert lane.answered(batches[2], errors.SequenceGap("echo"))
    assert lane.needs_identity
    lane.identify(2, 0)
    assert lane.take() is batches[1]
    assert (batches[1].stamp.producer_id, batches[1].stamp.base_sequence) == (2, 0)


def test_a_gap_after_an_unknown_outcome_is_not_renumbered():
    lane = Lane(idempotent=True)
    (batch,) = in_flight(lane, 1)
    assert lane.answered(batch, errors.Unavailable("cut"))
    assert lane.take() is batch
    gap = errors.SequenceGap("the new leader never had what came before")
    assert not in_doubt(Outgoing("never sent", 1, 1e9), gap)
    assert not lane.answered(batch, gap)
    assert lane.idle
    assert in_doubt(batch, gap)
    assert not in_doubt(batch, errors.AcksTooWeak("says itself what is wrong"))


def test_a_retry_across_a_restore_fails_and_what_follows_gets_a_new_id():
    lane = Lane(idempotent=True)
    (batch,) = in_flight(lane, 1)
    lane.append(Outgoing("next", 1, 1e9))
    assert lane.answered(batch, errors.Unavailable("PostgreSQL is gone"))
    assert lane.take() is batch
    assert not lane.answered(batch, errors.UnknownProducer("from before the restore")), "it may be written already"
    assert lane.needs_identity


def test_a_batch_that_expires_in_flight_keeps_its_place():
    lane = Lane(idempotent=True)
    batches = in_flight(lane, 2)
    assert lane.expire(0) == [batches[0]]
    lane.append(Outgoing("next", 1, 1e9))
    assert not lane.ready
    lane.acked(batches[0])  # late, and good: no hole
    lane.acked(batches[1])
    assert lane.ready and not lane.needs_identity
    assert lane.expire(0) == []


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (errors.Overloaded("x"), Verdict.REFUSED),
        (errors.DiskFull("x"), Verdict.REFUSED),
        (errors.UnknownTopic("x"), Verdict.REFUSED),
        (errors.NotLeader("x"), Verdict.UNKNOWN),
        (errors.NotLeader("x", outcome="unknown"), Verdict.UNKNOWN),
        (errors.NotLeader("x", outcome="not_written"), Verdict.REFUSED),
        (errors.ShuttingDown("x"), Verdict.UNKNOWN),
        (errors.DurableTimeout("x"), Verdict.UNKNOWN),
        (errors.SequenceGap("x"), Verdict.OUT_OF_SEQUENCE),
        (errors.ProducerFenced("x"), Verdict.OUT_OF_SEQUENCE),
        (errors.UnknownProducer("x"), Verdict.OUT_OF_SEQUENCE),
        (errors.InvalidBatch("x"), Verdict.FATAL),
        (errors.AcksTooWeak("x"), Verdict.FATAL),
    ],
)
def test_what_an_error_says_of_the_batch(error, verdict):
    assert verdict_of(error) is verdict


def test_an_old_ids_acknowledgement_does_not_vouch_for_a_new_one():
    """A leader that does not know a producer takes its batches at any number: a second one after refusing the first."""
    lane, leader = Lane(idempotent=True), Leader()
    first, second = in_flight(lane, 2)
    for batch in (first, second):
        leader.append(batch)
    lane.append(Outgoing("third", 1, 1e9))
    lane.append(Outgoing("fourth", 1, 1e9))
    assert lane.expire(0) == [first]
    for batch in (first, second):  # both were written, the answers are lost
        lane.answered(batch, errors.Unavailable("cut"))
    assert lane.take() is second
    assert leader.append(second) is None
    lane.acked(second)
    assert lane.needs_identity
    lane.identify(2, 0)
    tries = [lane.take()]
    while lane.ready:
        tries.append(lane.take())
    answers = [errors.Overloaded("full"), *(leader.append(batch) for batch in tries[1:])]
    for batch, error in zip(tries, answers, strict=True):
        lane.acked(batch) if error is None else lane.answered(batch, error)
    for producer_id in range(3, 10):
        if lane.idle:
            break
        if lane.needs_identity:
            lane.identify(producer_id, 0)
        batch = lane.take()
        error = leader.append(batch)
        lane.acked(batch) if error is None else lane.answered(batch, error)
    assert leader.log == [0, 1, "third", "fourth"]


def test_batches_of_two_producer_ids_are_never_in_flight_together():
    """Their numbers do not hold them together: where the one is refused, the leader takes the other."""
    lane = Lane(idempotent=True)
    expired, refused, broken = in_flight(lane, 3)
    lane.append(Outgoing("last", 1, 1e9))
    assert lane.expire(0) == [expired]
    lane.answered(expired, errors.Overloaded("full"))
    lane.answered(refused, errors.Overloaded("full"))
    lane.answered(broken, errors.Unavailable("cut"))
    leader = Leader()  # another one, after a takeover: it knows nothing
    lane.identify(2, 0)
    refusals = {broken: errors.Overloaded("full")}
    while not lane.idle:
        tries = [lane.take()]
        while lane.ready:
            tries.append(lane.take())
        answers = [refusals.pop(batch, None) or leader.append(batch) for batch in tries]
        for batch, error in zip(tries, answers, strict=True):
            lane.acked(batch) if error is None else lane.answered(batch, error)
    assert leader.log == [1, 2, "last"]
