"""Which address is asked next: only the one that failed is left, and it is avoided for seconds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shproto.addresses import AVOIDED_MS, AddressOrder

pytestmark = pytest.mark.quick


def test_the_first_address_comes_first_and_the_others_follow() -> None:
    order = AddressOrder(3)
    assert order.ordered(0) == [0, 1, 2]
    assert order.ordered(0, without=[1]) == [0, 2]


def test_any_address_may_come_first() -> None:
    order = AddressOrder(3, first=2)
    assert order.ordered(0) == [2, 0, 1]
    order.failed(2, now_ms=0)
    assert order.ordered(0) == [0, 1, 2]


def test_calls_that_fail_together_at_one_address_leave_it_once() -> None:
    order = AddressOrder(2)
    for _ in range(8):
        order.failed(0, now_ms=1_000)
    assert order.current == 1


def test_a_late_failure_of_an_address_that_was_left_moves_nothing() -> None:
    order = AddressOrder(3)
    order.failed(0, now_ms=0)
    order.answered(1)
    order.failed(0, now_ms=10)
    assert order.current == 1


def test_an_address_that_failed_comes_last_until_that_is_forgotten() -> None:
    order = AddressOrder(3)
    order.failed(0, now_ms=0)
    order.failed(1, now_ms=10)
    assert order.ordered(20) == [2, 0, 1]  # the longest ago first
    assert order.ordered(AVOIDED_MS + 5) == [2, 0, 1]
    assert order.ordered(AVOIDED_MS + 10) == [2, 0, 1]
    order.failed(2, now_ms=AVOIDED_MS + 10)
    assert order.current == 0


def test_an_address_that_answers_is_not_avoided_any_more() -> None:
    order = AddressOrder(3)
    order.failed(0, now_ms=0)
    order.failed(1, now_ms=0)
    order.answered(0)
    order.failed(2, now_ms=1)
    assert order.ordered(2) == [0, 1, 2]


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3_000))))
def test_whatever_happens_every_address_is_tried_and_the_current_one_moves_only_when_it_fails(
    count: int, happenings: list[tuple[bool, int, int]]
) -> None:
    order, now_ms = AddressOrder(count), 0
    for fails, which, later_ms in happenings:
        which, now_ms = which % count, now_ms + later_ms
        before = order.current
        if fails:
            order.failed(which, now_ms)
        else:
            order.answered(which)
        if not fails or which != before:
            assert order.current == before
        assert sorted(order.ordered(now_ms)) == list(range(count))
