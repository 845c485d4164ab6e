"""A partition's log: decide on a draft, apply after the write, seal, register, settle; against a simple model."""

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from shformat import ProducerStamp
from shproto.keys import RangeKey
from streamhouse_ingest.log.buffer import Buffer, WalPosition
from streamhouse_ingest.log.partition_log import BatchAppended, OffsetSpan, PartitionLog
from streamhouse_ingest.log.producers import DuplicateOf, OutOfSequence, ProducerTable, decode_snapshot
from streamhouse_ingest.produce.draft import Draft, NotLed, RangeExhausted

pytestmark = pytest.mark.quick

KEY = RangeKey(b"t" * 16, 3, 5)


def new_log(start: int = 100, limit: int = 10_000, before: PartitionLog | None = None) -> PartitionLog:
    """`before`: the log of the epoch before of the same partition."""
    key = KEY if before is None else before.key._replace(epoch=before.key.epoch + 1)
    producers = ProducerTable(100) if before is None else before.producers
    log = PartitionLog(key, "orders", start, limit, producers)
    log.leading = True
    return log


def append(log: PartitionLog, count: int, stamp: ProducerStamp | None = None, at: int = 0) -> int:
    decision = Draft(log).decide(count, stamp)
    assert isinstance(decision, BatchAppended)
    log.apply(decision, WalPosition(1, at, count * 10), b"x" * count * 10, now_ms=0)
    return decision.base_offset


def held(log: PartitionLog, offset: int, bytes_max: int = 10**9) -> list[int]:
    """Sizes of the batches that a read from `offset` on gives."""
    return [position.size_bytes for position, _ in log.read(offset, log.next_offset, bytes_max)]


def test_deciding_changes_nothing_and_counts_for_the_rest_of_the_group():
    log, stamp = new_log(), ProducerStamp(7, 0, 0)
    draft = Draft(log)
    assert draft.decide(5, stamp) == BatchAppended(100, 5, stamp)
    assert draft.decide(5, stamp) == DuplicateOf(100)
    assert draft.decide(5, ProducerStamp(7, 0, 6)) == OutOfSequence(5)
    assert draft.decide(2, None) == BatchAppended(105, 2, None)
    assert (log.next_offset, len(log.producers), log.open) == (100, 0, None)


def test_a_log_that_is_not_led_takes_nothing():
    log = new_log()
    log.leading = False
    assert Draft(log).decide(1, None) == NotLed()


def test_offsets_end_at_the_limit_until_it_is_extended():
    log = new_log(0, 100)
    append(log, 99)
    assert log.runs_low
    assert Draft(log).decide(2, None) == RangeExhausted(100)
    assert isinstance(Draft(log).decide(1, None), BatchAppended)
    log.extend(200)
    assert not log.runs_low
    assert isinstance(Draft(log).decide(2, None), BatchAppended)


def test_registration_in_the_middle_of_a_sealed_buffer_leaves_the_rest():
    log = new_log(0)
    for _ in range(4):
        append(log, 10)
    log.seal()
    assert [(b.base_offset, b.end_offset) for b in log.register(20)] == [(0, 20)]
    assert [(b.base_offset, b.end_offset) for b in log.sealed] == [(20, 40)]
    assert log.sealed[0].snapshot is not None
    with pytest.raises(ValueError, match="inside a batch"):
        log.register(35)


def test_registration_reaching_into_the_open_buffer_seals_it():
    log = new_log(0)
    append(log, 10)
    append(log, 10)
    assert [(b.base_offset, b.end_offset) for b in log.register(10)] == [(0, 10)]
    assert log.open is None
    assert [(b.base_offset, b.end_offset) for b in log.sealed] == [(10, 20)]


def test_settling_below_what_is_held_gives_the_rest_up():
    log = new_log(0)
    append(log, 10, ProducerStamp(7, 0, 0))
    append(log, 10, ProducerStamp(7, 0, 10))
    fenced = log.settle(10)
    assert [(b.base_offset, b.end_offset) for b in fenced] == [(10, 20)]
    assert (log.next_offset, log.leading) == (10, False)
    assert log.sealed[0].snapshot == log.producers.snapshot(10)
    assert log.producers.get(7).next_sequence == 10, "a retry of what was given up is no duplicate"


def test_what_a_finished_log_never_registered_is_forgotten():
    log = new_log(0)
    append(log, 10, ProducerStamp(7, 0, 0))
    append(log, 10, ProducerStamp(7, 0, 10))
    append(log, 5, ProducerStamp(8, 0, 0))
    log.seal()
    log.register(10)
    log.forget_unregistered()
    assert log.producers.get(7).next_sequence == 10
    assert log.producers.get(8) is None


def two_epochs_at_the_same_offsets() -> tuple[PartitionLog, PartitionLog]:
    """The older one was settled at 10 and its agent did not know: the next one began there, and both are in its log."""
    older = new_log(0)
    append(older, 10, ProducerStamp(7, 0, 0))
    append(older, 10, ProducerStamp(8, 0, 0))
    newer = new_log(10, before=older)
    append(newer, 10, ProducerStamp(9, 0, 0))
    return older, newer


@pytest.mark.parametrize("ends", [lambda older: older.settle(10), lambda older: older.forget_unregistered()])
def test_what_an_epoch_gives_up_leaves_what_the_next_one_wrote_at_the_same_offsets(ends):
    """G5: otherwise a retry of it is written once more."""
    older, newer = two_epochs_at_the_same_offsets()
    ends(older)
    assert Draft(newer).decide(10, ProducerStamp(9, 0, 0)) == DuplicateOf(10)
    assert isinstance(Draft(newer).decide(10, ProducerStamp(8, 0, 0)), BatchAppended), "it was given up"


def test_the_end_of_an_epoch_names_no_batch_of_an_older_one_at_its_offsets():
    """G1: the next leader would acknowledge a retry of it, and the records are nowhere."""
    _, newer = two_epochs_at_the_same_offsets()
    assert set(decode_snapshot(newer.tail_snapshot())) == {9}


def test_gaps_of_a_replay_are_lost_spans_until_registration_has_passed_them():
    log = PartitionLog(KEY, "", 10, 10, ProducerTable(10))
    first, second = Buffer(10, 0), Buffer(30, 0)
    first.append(5, WalPosition(1, 0, 50), None)
    second.append(5, WalPosition(1, 90, 50), None)
    log.restore([first, second], 35)
    log.name("orders", 0, 2)
    log.extend(1000)
    assert log.lost_spans() == [OffsetSpan(0, 10), OffsetSpan(15, 30)]
    log.settle(50)
    assert log.lost_spans() == [OffsetSpan(0, 10), OffsetSpan(15, 30), OffsetSpan(35, 50)]
    assert log.gap_at(16) == OffsetSpan(15, 30)
    assert log.gap_at(12) is None
    assert held(log, 12) == [50], "a read stops at the gap"
    assert held(log, 15) == []
    log.register(30)
    assert log.lost_spans() == [OffsetSpan(35, 50)]
    log.register(50)
    assert log.lost_spans() == []
    assert log.next_offset == 50


class LogMachine(RuleBasedStateMachine):
    """The model: a list of batches with their offsets, and three numbers."""

    @initialize()
    def start(self) -> None:
        self.log = new_log(0, 1_000)
        self.batches: list[tuple[int, int, ProducerStamp | None]] = []
        self.sealed_end = 0
        self.registered_end = 0
        self.settled: int | None = None
        self.limit = 1_000

    @property
    def end(self) -> int:
        return self.batches[-1][0] + self.batches[-1][1] if self.batches else 0

    @rule(
        group=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2), st.booleans()), min_size=1, max_size=5),
        lands=st.booleans(),
    )
    def write_group(self, group: list[tuple[int, int, bool]], lands: bool) -> None:
        draft = Draft(self.log)
        model, applied = list(self.batches), []
        for count, producer_id, retry in group:
            stamp, expected = self._expect(model, count, producer_id, retry)
            decision = draft.decide(stamp[1], stamp[0])
            assert decision == expected
            if isinstance(decision, BatchAppended):
                model.append((decision.base_offset, decision.record_count, decision.stamp))
                applied.append(decision)
        if lands:  # else the write failed: nothing is applied, and nothing may have changed
            for event in applied:
                self.log.apply(event, WalPosition(1, 0, event.record_count), b"x" * event.record_count, 0)
            self.batches = model

    def _expect(self, model, count, producer_id, retry):  # type: ignore[no-untyped-def]
        own = [batch for batch in model if batch[2] is not None and batch[2].producer_id == producer_id]
        stamp = None
        if producer_id:
            sequence = own[-1][2].base_sequence + own[-1][1] if own else 0
            if retry and own:
                base, count, stamp = own[-1]
                return (stamp, count), NotLed() if self.settled is not None else DuplicateOf(base)
            stamp = ProducerStamp(producer_id, 0, sequence)
        end = model[-1][0] + model[-1][1] if model else 0
        if self.settled is not None:
            return (stamp, count), NotLed()
        if end + count > self.limit:
            return (stamp, count), RangeExhausted(self.limit)
        return (stamp, count), BatchAppended(end, count, stamp)

    @rule()
    def seal(self) -> None:
        buffer = self.log.seal()
        assert (buffer is None) == (self.sealed_end == self.end)
        self.sealed_end = self.end

    @precondition(lambda self: self.registered_end < self.sealed_end)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        ends = [
            base + count for base, count, _ in self.batches if self.registered_end < base + count <= self.sealed_end
        ]
        self.registered_end = data.draw(st.sampled_from(ends))
        self.log.register(self.registered_end)

    @rule()
    def extend(self) -> None:
        self.limit += 1_000
        self.log.extend(self.limit)

    @rule()
    def settle(self) -> None:
        if self.settled is None:
            assert self.log.settle(self.end) == []
            self.settled = self.sealed_end = self.end

    @invariant()
    def agrees(self) -> None:
        log = self.log
        assert (log.next_offset, log.registered_end) == (self.end, self.registered_end)
        assert log.lost_spans() == []
        for base, count, _ in self.batches:
            assert held(log, base)[0] == held(log, base + count - 1)[0] == count
        assert sum(held(log, 0)) == self.end
        unregistered = sum(count for base, count, _ in self.batches if base >= self.registered_end)
        assert log.unregistered_bytes == unregistered


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_g1_what_was_cut_out_is_forgotten_also_where_the_coordinator_has_told_of_it():
    """It was declared with the range's end, and came back with the grant of the next epoch."""
    log = new_log(start=0)
    append(log, 2, ProducerStamp(7, 0, 0))
    buffer = log.seal()
    assert buffer is not None
    log.producers.merge(decode_snapshot(log.tail_snapshot()))
    log.settle(2)
    log.cut_out(buffer, {WalPosition(1, 0, 20)})
    assert log.producers.get(7) is None, "a retry would be acknowledged as a duplicate of what is lost"


def test_batches_that_cannot_be_read_back_are_cut_out_and_forgotten():
    log = new_log(start=0)
    for n in range(6):
        append(log, 2, ProducerStamp(7 if n < 5 else 8, 0, 2 * n if n < 5 else 0), at=100 * n)
    buffer = log.seal()
    assert buffer is not None
    append(log, 2, at=600)
    later = log.seal()
    assert log.cut_out(buffer, {WalPosition(1, at, 20) for at in (100, 200, 500)}) == list(log.sealed)[:2]
    assert [(b.base_offset, b.end_offset, b.size_bytes) for b in log.sealed] == [(0, 2, 20), (6, 10, 40), (12, 14, 20)]
    assert log.sealed[2] is later
    assert log.lost_spans() == [OffsetSpan(2, 6), OffsetSpan(10, 12)]
    assert [log.is_damaged(offset) for offset in (1, 2, 5, 6, 9, 10, 11, 12)] == [0, 1, 1, 0, 0, 1, 1, 0]
    state = log.producers.get(7)
    assert state is not None and [batch.base_offset for batch in state.batches] == [0, 6, 8]
    assert log.producers.get(8) is None
    assert later is not None and later.snapshot == log.producers.snapshot(14), "nor is it in what is announced next"
    log.register(14)
    assert (log.lost_spans(), log.is_damaged(3)) == ([], True), "for whoever asks about it later"
    whole = Buffer(0, 0)
    whole.append(1, WalPosition(1, 0, 10), None)
    assert whole.cut_out({WalPosition(1, 0, 10)}) == []
