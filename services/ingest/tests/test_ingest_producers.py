"""Sequences of idempotent producers, and the snapshot that carries them to the next leader."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import ProducerStamp
from streamhouse_ingest.log.producers import (
    BATCHES_REMEMBERED,
    DuplicateOf,
    FencedBy,
    InSequence,
    OutOfSequence,
    ProducerState,
    ProducerTable,
    SnapshotError,
    WrittenBatch,
    after_write,
    check_sequence,
    decode_snapshot,
    encode_snapshot,
)

pytestmark = pytest.mark.quick


def written(count: int, *, epoch: int = 0, size: int = 10) -> ProducerState:
    state = None
    for i in range(count):
        state = after_write(state, ProducerStamp(7, epoch, i * size), size, 1000 + i * size, 0)
    assert state is not None
    return state


def test_the_next_sequence_is_in_order_and_above_it_is_a_gap():
    state = written(3)
    assert check_sequence(state, ProducerStamp(7, 0, 30), 5) == InSequence()
    assert check_sequence(state, ProducerStamp(7, 0, 31), 5) == OutOfSequence(30)


def test_each_of_the_last_batches_is_a_duplicate_at_its_first_offset_and_older_ones_are_refused():
    state = written(8)
    for i in range(8 - BATCHES_REMEMBERED, 8):
        assert check_sequence(state, ProducerStamp(7, 0, i * 10), 10) == DuplicateOf(1000 + i * 10)
    assert check_sequence(state, ProducerStamp(7, 0, 20), 10) == OutOfSequence(80)
    assert check_sequence(state, ProducerStamp(7, 0, 70), 9) == OutOfSequence(80), "same start, another batch"


def test_a_newer_producer_epoch_starts_at_zero_and_fences_the_older_one():
    state = written(2)
    assert check_sequence(state, ProducerStamp(7, 1, 0), 10) == InSequence()
    assert check_sequence(state, ProducerStamp(7, 1, 20), 10) == OutOfSequence(0)
    newer = after_write(state, ProducerStamp(7, 1, 0), 10, 2000, 3)
    assert newer.batches == (WrittenBatch(0, 10, 2000, 3),)
    assert check_sequence(newer, ProducerStamp(7, 0, 20), 10) == FencedBy(1)


def test_a_producer_without_state_is_accepted_at_any_sequence():
    assert check_sequence(None, ProducerStamp(7, 3, 12345), 10) == InSequence()


def test_the_producer_that_wrote_longest_ago_is_forgotten_beyond_the_limit():
    table = ProducerTable(2)
    for producer_id in (1, 2, 1, 3):
        table.put(producer_id, written(1))
    assert [table.get(i) is not None for i in (1, 2, 3)] == [True, False, True]


def test_a_merge_keeps_the_newer_batches_of_both_sides():
    table = ProducerTable(10)
    table.put(7, written(6))
    table.put(8, written(1, epoch=2))
    early = ProducerState(0, written(6).batches[:2])
    table.merge({7: early, 8: written(1, epoch=1), 9: written(1)})
    assert table.get(7) == written(6)
    assert table.get(8) == written(1, epoch=2)
    assert table.get(9) == written(1)


batches = st.lists(
    st.builds(
        WrittenBatch, st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1), st.just(0)
    ),
    min_size=1,
    max_size=BATCHES_REMEMBERED,
).map(tuple)
states = st.dictionaries(
    st.integers(1, 2**63 - 1), st.builds(ProducerState, st.integers(0, 2**32 - 1), batches), max_size=5
)


@given(states)
def test_a_snapshot_comes_back_as_it_was(found):
    assert decode_snapshot(encode_snapshot(found)) == found


@given(states.filter(bool), st.data())
def test_a_cut_snapshot_is_refused(found, data):
    whole = encode_snapshot(found)
    cut = whole[: data.draw(st.integers(1, len(whole) - 1))]
    with pytest.raises(SnapshotError):
        decode_snapshot(cut)


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_give_states_or_a_snapshot_error(data):
    try:
        decode_snapshot(data)
    except SnapshotError as error:
        assert str(error).startswith("producer snapshot")


def test_snapshots_one_after_the_other_are_merged():
    table = ProducerTable(10)
    table.put(7, written(3))
    table.put(8, ProducerState(0, (WrittenBatch(0, 10, 1030),)))
    parts = table.snapshot(1010) + table.snapshot_of(0, 1010, 2000)
    assert decode_snapshot(parts) == decode_snapshot(table.snapshot(2000)) != decode_snapshot(table.snapshot(1010))
    newer = encode_snapshot({7: ProducerState(1, (WrittenBatch(0, 10, 2000),))})
    assert decode_snapshot(parts + newer)[7].producer_epoch == 1


def test_a_snapshot_holds_only_what_lies_below_its_offset():
    table = ProducerTable(10)
    table.put(7, written(3))
    assert decode_snapshot(table.snapshot(1010)) == {7: ProducerState(0, written(1).batches)}
    assert table.snapshot(1000) == b""
