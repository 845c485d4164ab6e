"""Stages of partitions between being given and being given up, and the order of steps."""

import random

import pytest
from streamhouse.core.handover import HandOver, Kind
from streamhouse.records import TopicPartition

pytestmark = pytest.mark.quick

A, B, C = (TopicPartition("t", number) for number in range(3))
ALL = set(Kind)


def read(*partitions: TopicPartition) -> HandOver:
    """Returns a hand-over in which these are read."""
    hand_over = HandOver()
    hand_over.assign(partitions)
    hand_over.opened(partitions, announce=False)
    return hand_over


def test_what_is_given_is_read_once_the_application_was_told():
    hand_over = HandOver()
    assert hand_over.assign([A, B]).opening == {A, B}
    assert hand_over.next_step(ALL) is None and hand_over.is_settled
    hand_over.opened([A], announce=True)
    step = hand_over.next_step(ALL)
    assert (step.kind, step.partitions) == (Kind.ASSIGNED, {A})
    hand_over.begin(step)
    hand_over.opened([B], announce=True)
    assert hand_over.next_step(ALL) is None, "one step at a time"
    assert hand_over.finish(step).released == {A}
    assert hand_over.next_step(ALL).partitions == {B}


def test_what_is_taken_away_is_owned_until_the_application_has_given_it_up():
    hand_over = read(A, B)
    assert hand_over.assign([B, C]).revoked == {A}
    assert not hand_over.is_settled
    step = hand_over.next_step(ALL)
    assert (step.kind, step.partitions) == (Kind.REVOKED, {A})
    hand_over.begin(step)
    assert hand_over.owned == {A, B, C} and hand_over.is_revoking
    hand_over.finish(step)
    assert hand_over.owned == {B, C} and not hand_over.is_revoking


def test_what_comes_back_before_it_was_given_up_is_given_up_and_opened_again():
    hand_over = read(A)
    hand_over.assign([])
    assert hand_over.assign([A]).opening == set()
    step = hand_over.next_step(ALL)
    assert step.kind is Kind.REVOKED
    hand_over.begin(step)
    assert hand_over.finish(step).opening == {A}
    assert hand_over.owned == {A}


def test_what_the_application_was_never_told_of_is_not_revoked():
    hand_over = HandOver()
    hand_over.assign([A, B])
    hand_over.opened([A], announce=True)
    assert hand_over.assign([]).forgotten == {A, B}
    assert hand_over.next_step(ALL) is None and hand_over.owned == set()


def test_what_is_taken_away_while_the_application_is_being_told_of_it_is_revoked_afterwards():
    hand_over = HandOver()
    hand_over.assign([A])
    hand_over.opened([A], announce=True)
    step = hand_over.next_step(ALL)
    hand_over.begin(step)
    assert not hand_over.assign([]).forgotten and hand_over.owned == {A}
    changes = hand_over.finish(step)
    assert (changes.released, changes.revoked) == (set(), {A})
    assert hand_over.next_step(ALL).kind is Kind.REVOKED


def test_what_is_lost_is_owned_no_longer_and_comes_back_only_after_the_application_knows():
    hand_over = read(A, B)
    hand_over.assign([A])
    assert hand_over.lose().lost == {A, B}, "also what was to be revoked"
    assert hand_over.owned == set()
    assert hand_over.assign([A, C]).opening == {C}
    step = hand_over.next_step(ALL)
    assert (step.kind, step.partitions) == (Kind.LOST, {A, B})
    hand_over.begin(step)
    assert hand_over.finish(step).opening == {A}


def test_what_is_lost_while_it_is_given_up_is_not_told_of_twice():
    hand_over = read(A, B)
    hand_over.assign([B])
    step = hand_over.next_step(ALL)
    hand_over.begin(step)
    hand_over.lose()
    hand_over.assign([A])
    assert hand_over.owned == {A}
    assert hand_over.finish(step).opening == {A}
    assert hand_over.next_step(ALL).partitions == {B}


def test_a_topic_that_is_gone_is_lost_alone_and_opened_anew():
    hand_over = read(A, B)
    hand_over.lose([A])
    assert hand_over.owned == {A, B}, "the group gives its name still"
    step = hand_over.next_step(ALL)
    assert (step.kind, step.partitions) == (Kind.LOST, {A})
    hand_over.begin(step)
    assert hand_over.finish(step).opening == {A}


def test_steps_without_a_callback_do_not_wait_for_those_with_one():
    hand_over = read(A)
    hand_over.assign([])
    assert hand_over.next_step({Kind.ASSIGNED, Kind.LOST}) is None
    assert hand_over.next_step({Kind.REVOKED}) is not None


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("announce", [True, False])
def test_whatever_comes_assigned_and_gone_alternate_and_nothing_is_read_outside(announce: bool, seed: int):
    rng = random.Random(seed)
    hand_over, kinds = HandOver(), ALL if announce else ALL - {Kind.ASSIGNED}
    opening: set[TopicPartition] = set()
    reading: set[TopicPartition] = set()
    told: set[TopicPartition] = set()
    running = None

    def carry_out(changes):
        opening.difference_update(changes.forgotten)
        reading.difference_update(changes.revoked | changes.lost)
        assert not opening & changes.opening
        opening.update(changes.opening)
        reading.update(changes.released)

    for _ in range(500):
        act = rng.choice(["want", "open", "lose all", "lose", "begin", "begin", "finish", "finish"])
        some = {where for where in (A, B, C) if rng.random() < 0.5}
        if act == "want":
            carry_out(hand_over.assign(some))
        elif act == "open" and opening & some:
            opened = opening & some
            hand_over.opened(opened, announce=announce)
            opening -= opened
            if not announce:
                reading |= opened
                told |= opened
        elif act == "lose all":
            carry_out(hand_over.lose())
            assert hand_over.owned == set() or running is not None
        elif act == "lose":
            carry_out(hand_over.lose(some))
        elif act == "begin" and (step := hand_over.next_step(kinds)) is not None:
            running = step
            hand_over.begin(step)
            if step.kind is Kind.ASSIGNED:
                assert not told & step.partitions
                told |= step.partitions
            else:
                assert told >= step.partitions and not reading & step.partitions
        elif act == "finish" and running is not None:
            if running.kind is not Kind.ASSIGNED:
                told -= running.partitions
            carry_out(hand_over.finish(running))
            running = None
        assert reading <= told
        assert reading <= hand_over.owned, "somebody else may read it"
    # In the end all is handed over.
    carry_out(hand_over.assign([A]))
    if running is not None:
        if running.kind is not Kind.ASSIGNED:
            told -= running.partitions
        carry_out(hand_over.finish(running))
    for _ in range(10):
        hand_over.opened(opening, announce=announce)
        if not announce:
            reading |= opening
        opening.clear()
        step = hand_over.next_step(ALL)
        if step is not None:
            hand_over.begin(step)
            carry_out(hand_over.finish(step))
    assert reading == hand_over.owned == {A} and hand_over.is_settled
