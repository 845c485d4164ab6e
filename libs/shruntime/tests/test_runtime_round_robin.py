"""Queues by key, taken from by turns."""

from collections import defaultdict, deque

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from shruntime.round_robin import RoundRobinQueue

pytestmark = pytest.mark.quick

KEYS = "abcd"
ANY_KEY = st.sampled_from(KEYS)
STEPS = st.lists(
    st.one_of(st.tuples(st.just("put"), ANY_KEY), st.just(("take", "")), st.tuples(st.just("drop"), ANY_KEY))
)


def test_keys_take_turns_and_keep_the_order_of_their_items() -> None:
    queue: RoundRobinQueue[str, int] = RoundRobinQueue()
    for number, key in enumerate("aaaabbc"):
        queue.put(key, number)
    assert list(queue) == [0, 1, 2, 3, 4, 5, 6]
    assert [queue.take() for _ in range(7)] == [("a", 0), ("b", 4), ("c", 6), ("a", 1), ("b", 5), ("a", 2), ("a", 3)]
    assert not queue
    with pytest.raises(LookupError):
        queue.take()


def test_what_is_put_back_comes_first_of_its_key_in_its_next_turn() -> None:
    queue: RoundRobinQueue[str, int] = RoundRobinQueue()
    for number, key in enumerate("aab"):
        queue.put(key, number)
    key, item = queue.take()
    queue.put_back(key, item)
    assert [queue.take() for _ in range(3)] == [("b", 2), ("a", 0), ("a", 1)]


@given(STEPS)
@example(
    [("put", key) for key in "acd"]
    + [("take", "")]
    + [("put", key) for key in "ab"]
    + [("take", "")] * 2
    + [("drop", "c"), ("drop", "d"), ("take", "")]
)
def test_against_a_model(steps: list[tuple[str, str]]) -> None:
    """Items of a key leave in order, none is lost, and no key has a second turn before another one that waits."""
    queue: RoundRobinQueue[str, int] = RoundRobinQueue()
    model: defaultdict[str, deque[int]] = defaultdict(deque)
    passed_over: defaultdict[str, int] = defaultdict(int)
    for number, (what, key) in enumerate(steps):
        if what == "put":
            queue.put(key, number)
            model[key].append(number)
        elif what == "drop":
            assert queue.drop(key) == list(model.pop(key, ()))
            passed_over[key] = 0
        elif any(model.values()):
            key, item = queue.take()
            assert item == model[key].popleft()
            passed_over[key] = 0
            for other in [other for other, items in model.items() if items and other != key]:
                passed_over[other] += 1
                assert passed_over[other] < len(KEYS), f"{other} waits while others go round"
        assert list(queue.of(key)) == list(model.get(key, ()))
        assert bool(queue) == any(model.values())
        assert sorted(queue) == sorted(item for items in model.values() for item in items)
