"""The pure parts: LRU, read-ahead, breaker, tails of agents."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import Records, encode_batch, read_batch_header
from shread.core.breaker import CircuitBreaker
from shread.core.lru import LruLimit
from shread.core.readahead import READERS_MAX, ReadAhead
from shread.core.tail import Accepted, accept_batches

pytestmark = pytest.mark.quick


@given(st.integers(1, 50), st.lists(st.tuples(st.sampled_from("atd"), st.integers(0, 9), st.integers(0, 60))))
def test_lru_keeps_the_limit_and_the_most_recent(size_max: int, moves: list[tuple[str, int, int]]) -> None:
    lru: LruLimit[int] = LruLimit(size_max)
    model: dict[int, int] = {}  # in order of use
    for move, key, size in moves:
        if move == "t":
            assert lru.touch(key) == (key in model)
            if key in model:
                model[key] = model.pop(key)
        elif move == "d":
            assert lru.drop(key) == (model.pop(key, None) is not None)
        else:
            model.pop(key, None)
            expected = [key] if size > size_max else []
            if size <= size_max:
                while sum(model.values()) + size > size_max:
                    oldest = next(iter(model))
                    expected.append(oldest)
                    del model[oldest]
                model[key] = size
            assert lru.admit(key, size) == expected
        assert list(lru) == list(model) and lru.size == sum(model.values()) <= size_max


def test_readahead_grows_with_a_reader_and_forgets_those_that_jump() -> None:
    ahead = ReadAhead(8)
    key = ("t", 0)
    assert [ahead.observe(key, n, n + 1) for n in range(6)] == [0, 1, 2, 4, 8, 8]
    assert ahead.observe(key, 100, 101) == 0
    assert ahead.observe(("t", 1), 6, 7) == 0, "another partition"
    assert ahead.observe(key, 6, 7) == 8, "two readers do not disturb each other"
    for n in range(READERS_MAX):
        ahead.observe(key, 1_000 + 2 * n, 1_001 + 2 * n)
    assert ahead.observe(key, 7, 8) == 0
    assert len(ahead._expected) == READERS_MAX
    key = ("of one who reads for years", 0)
    ahead._expected[key, 0] = 1 << 40
    assert ahead.observe(key, 0, 1) == 8
    off = ReadAhead(0)
    assert [off.observe(key, n, n + 1) for n in range(4)] == [0, 0, 0, 0]


def test_breaker_opens_probes_and_closes() -> None:
    breaker = CircuitBreaker(failures_max=2, open_ms=100)
    assert breaker.allows(0) and not breaker.failed(0)
    breaker.succeeded()
    assert not breaker.failed(0) and breaker.failed(10)
    assert not breaker.allows(109)
    assert breaker.allows(110) and not breaker.allows(111), "one probe"
    assert not breaker.failed(120)
    assert not breaker.allows(219) and breaker.allows(220)
    breaker.succeeded()
    assert breaker.allows(220) and breaker.allows(220)


def batch(base_offset: int, count: int, epoch: int = 1) -> bytes:
    return encode_batch(Records.from_lists([b"v"] * count), base_offset=base_offset, epoch=epoch)


def test_a_tail_must_follow_on() -> None:
    good = [batch(10, 5), batch(15, 5)]
    decoded = [read_batch_header(data).decoded_bytes for data in good]
    whole = Accepted(batches=good, size_bytes=len(good[0]) + len(good[1]), decoded_bytes=sum(decoded), next_offset=20)
    assert accept_batches(good, 10, 1, None) == accept_batches(good, 13, 1, 20) == whole
    first = Accepted(batches=good[:1], size_bytes=len(good[0]), decoded_bytes=decoded[0], next_offset=15)
    assert accept_batches(good, 10, 1, 19) == first, "nothing beyond the settled end"
    assert accept_batches(good, 10, 1, None, bytes_max=1, decoded_bytes_max=0) == first, "one batch at least"
    assert accept_batches(good, 10, 1, None, decoded_bytes_max=sum(decoded) - 1) == first, (
        "the next is too large decoded"
    )
    assert accept_batches(good, 10, 1, None, decoded_bytes_max=sum(decoded)) == whole
    size_bytes = sum(map(len, good))
    assert accept_batches(good, 10, 1, None, bytes_max=size_bytes - 1) == first
    assert accept_batches(good, 10, 1, None, bytes_max=size_bytes) == whole
    assert accept_batches([], 10, 1, None) == Accepted(batches=[], size_bytes=0, decoded_bytes=0, next_offset=10)
    damaged = bytearray(good[0])
    damaged[-1] ^= 1
    for batches, offset in (
        ([bytes(damaged)], 10),
        (good, 9),  # begins later
        (good, 15),  # ends before
        ([good[0], batch(16, 5)], 10),  # a hole
        ([good[0], batch(14, 5)], 10),  # an overlap
        ([batch(10, 5, epoch=2)], 10),
        ([b"nonsense"], 10),
    ):
        assert isinstance(accept_batches(batches, offset, 1, None), str)
