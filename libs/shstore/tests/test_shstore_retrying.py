"""Retries on a clock moved by hand, and the faults they are tested with."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shstore import (
    BodyTruncated,
    BucketMissing,
    Fault,
    FaultKind,
    FaultyStore,
    MemoryStore,
    ObjectExists,
    ObjectMissing,
    RandomFaults,
    RetryingStore,
    RetryPolicy,
    ScriptedFaults,
    StoreDenied,
    StoreInvalid,
    StoreUnavailable,
)

pytestmark = pytest.mark.quick

_WAITS = ["base_delay_ms", "throttled_base_delay_ms", "max_delay_ms", "throttled_max_delay_ms", "deadline_ms"]


class HandClock:
    """Seconds that pass only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


class LongestWaits(random.Random):
    """Draws the top of every range, so that the caps show."""

    def uniform(self, a: float, b: float) -> float:
        return b


def retrying(faults: ScriptedFaults, policy: RetryPolicy | None = None) -> tuple[RetryingStore, FaultyStore, HandClock]:
    clock = HandClock()
    faulty = FaultyStore(MemoryStore(), faults, sleep=clock.sleep)
    store = RetryingStore(faulty, policy, rng=LongestWaits(), monotonic=clock.monotonic, sleep=clock.sleep)
    return store, faulty, clock


async def test_waits_double_up_to_the_cap() -> None:
    policy = RetryPolicy(base_delay_ms=100, throttled_base_delay_ms=500, max_delay_ms=1_000)
    store, _, clock = retrying(ScriptedFaults([FaultKind.UNAVAILABLE] * 6), policy)
    await store.put("k", [b"x"])
    assert clock.slept == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


async def test_a_throttled_call_waits_longer() -> None:
    store, _, clock = retrying(ScriptedFaults([FaultKind.THROTTLED, FaultKind.UNAVAILABLE]))
    await store.check()
    assert clock.slept == [0.5, 0.2]


async def test_a_start_waits_for_the_store_beyond_every_deadline(caplog: pytest.LogCaptureFixture) -> None:
    faults = [FaultKind.UNAVAILABLE, FaultKind.TIMEOUT_NOT_DONE, FaultKind.THROTTLED, FaultKind.UNAVAILABLE]
    store, faulty, clock = retrying(ScriptedFaults(faults), RetryPolicy(base_delay_ms=1_000, deadline_ms=1))
    await store.wait_until_usable()
    assert len(faulty.injected) == 4
    assert sum(clock.slept) > 1
    said = [record.message for record in caplog.records]
    assert [message.startswith("waiting for the object store: ") for message in said] == [True] * 4


async def test_a_start_does_not_wait_for_what_an_operator_has_to_put_right() -> None:
    class Refusing(MemoryStore):
        async def check(self) -> None:
            raise error

    for error in (StoreDenied("wrong key"), BucketMissing("b", None)):
        with pytest.raises(type(error)):
            await RetryingStore(Refusing()).wait_until_usable()


async def test_a_start_says_that_the_store_is_silent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shstore.retrying.SILENCE_SAID_S", 0.001)

    class Silent(MemoryStore):
        async def check(self) -> None:
            while not caplog.records:
                await asyncio.sleep(0)

    await RetryingStore(Silent()).wait_until_usable()
    assert caplog.records[0].message == "waiting for the object store: it has not answered for 0.001 s"


@pytest.mark.parametrize(("kind", "within_s"), [(FaultKind.UNAVAILABLE, 2), (FaultKind.THROTTLED, 10)])
async def test_a_store_that_is_back_is_noticed(kind: FaultKind, within_s: int) -> None:
    """However long it was away; one that asked for less load is given more time."""
    store, faulty, clock = retrying(ScriptedFaults([kind] * 12))
    await store.check()
    assert len(faulty.injected) == 12
    assert clock.slept[-1] == max(clock.slept) == within_s


async def test_the_deadline_ends_it() -> None:
    policy = RetryPolicy(base_delay_ms=1_000, throttled_max_delay_ms=4_000, deadline_ms=10_000)
    store, faulty, clock = retrying(ScriptedFaults([FaultKind.THROTTLED] * 50), policy)
    with pytest.raises(StoreUnavailable, match=r"could not get 'k' in 10000 ms.*throttled on get") as caught:
        await store.get("k")
    assert caught.value.throttled
    assert clock.now <= 10
    assert len(faulty.injected) == len(clock.slept) + 1


async def test_the_deadline_ends_an_attempt_that_hangs() -> None:
    class Hanging(MemoryStore):
        async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(StoreUnavailable, match="could not get 'k' in 20 ms"):
        await RetryingStore(Hanging(), RetryPolicy(deadline_ms=20)).get("k")


async def test_what_cannot_be_retried_is_raised_at_once() -> None:
    store, _, clock = retrying(ScriptedFaults([]))
    with pytest.raises(ObjectMissing):
        await store.get("k")
    await store.put("k", [b"x"])
    with pytest.raises(ObjectExists):
        await store.put("k", [b"x"])
    assert clock.slept == []


@pytest.mark.parametrize("kind", [FaultKind.TIMEOUT_DONE, FaultKind.LOST_REPLY])
async def test_a_put_whose_reply_was_lost_is_a_success(kind: FaultKind) -> None:
    store, faulty, _ = retrying(ScriptedFaults([kind]))
    info = await store.put("k", [b"mine", memoryview(b"!")])
    assert info == await faulty.head("k")
    assert await store.get("k") == b"mine!"


@pytest.mark.parametrize("other", [b"diff!", b"longer than mine", b""])
async def test_a_put_that_lost_to_other_bytes_is_not(other: bytes) -> None:
    store, faulty, _ = retrying(ScriptedFaults([None, FaultKind.TIMEOUT_NOT_DONE]))
    await faulty.put("k", [other])
    with pytest.raises(ObjectExists):
        await store.put("k", [b"mine!"])
    assert await store.get("k") == other


async def test_a_lost_reply_while_comparing_is_retried_too() -> None:
    script = [FaultKind.LOST_REPLY, None, FaultKind.UNAVAILABLE, None, None, FaultKind.TRUNCATED_BODY]
    store, faulty, _ = retrying(ScriptedFaults(script))
    assert (await store.put("k", [b"mine"])).size_bytes == 4
    assert len(faulty.injected) == 3


async def test_a_list_goes_on_where_it_broke() -> None:
    script = [Fault(FaultKind.UNAVAILABLE, after_items=3), Fault(FaultKind.UNAVAILABLE, after_items=2), None]
    store, faulty, _ = retrying(ScriptedFaults(script, operation="list"))
    keys = [f"k{number}" for number in range(9)]
    for key in keys:
        await store.put(key, [b"x"])
    assert [info.key async for info in store.list("k")] == keys
    assert len(faulty.injected) == 2


async def test_a_list_that_finds_nothing_is_an_answer() -> None:
    store, _, _ = retrying(ScriptedFaults([Fault(FaultKind.UNAVAILABLE)], operation="list"))
    listed = store.list("nothing")
    assert [info async for info in listed] == []
    assert store.trouble == "", "the store answered since it failed"


async def test_a_list_that_gets_on_is_not_given_up() -> None:
    """The deadline is over attempts without progress: a listing of millions may take long."""
    policy = RetryPolicy(base_delay_ms=3_000, max_delay_ms=3_000, deadline_ms=4_000)
    script = [Fault(FaultKind.UNAVAILABLE, after_items=1)] * 8
    store, _, clock = retrying(ScriptedFaults(script, operation="list"), policy)
    keys = [f"k{number}" for number in range(9)]
    for key in keys:
        await store.put(key, [b"x"])
    assert [info.key async for info in store.list("")] == keys
    assert clock.now == 24


@pytest.mark.parametrize("name", _WAITS)
def test_a_policy_names_its_bad_value(name: str) -> None:
    with pytest.raises(StoreInvalid, match=f"retry {name} is 0"):
        RetryPolicy(**{name: 0})


@given(failures=st.integers(1, 10_000), throttled=st.booleans())
def test_no_wait_is_over_the_cap(failures: int, throttled: bool) -> None:
    policy = RetryPolicy()
    max_ms = policy.throttled_max_delay_ms if throttled else policy.max_delay_ms
    assert 0 < policy.delay_cap_ms(failures, throttled=throttled) <= max_ms


@pytest.mark.parametrize("seed", range(20))
async def test_writers_behind_a_faulty_store_agree(seed: int) -> None:
    """Several writers put the same keys: each key has one winner, and it knows that it won."""
    rng = random.Random(seed)
    faulty = FaultyStore(MemoryStore(), RandomFaults(rng, dict.fromkeys(FaultKind, 0.08)))
    policy = RetryPolicy(base_delay_ms=1, throttled_base_delay_ms=1, max_delay_ms=1)
    store = RetryingStore(faulty, policy, rng=rng)
    won: dict[str, list[bytes]] = {}

    async def write(name: bytes) -> None:
        for number in range(10):
            try:
                await store.put(f"k{number}", [name])
                won.setdefault(f"k{number}", []).append(name)
            except ObjectExists:
                continue

    await asyncio.gather(*(write(name) for name in (b"one", b"two", b"three")))
    assert {kind for _, kind in faulty.injected}
    assert {info.key: [await store.get(info.key)] async for info in store.list("")} == won


async def test_faults_have_the_effect_they_name() -> None:
    inner = MemoryStore()
    expected = {
        FaultKind.UNAVAILABLE: False,
        FaultKind.THROTTLED: False,
        FaultKind.TIMEOUT_NOT_DONE: False,
        FaultKind.TRUNCATED_BODY: False,
        FaultKind.CONFLICT: False,
        FaultKind.TIMEOUT_DONE: True,
        FaultKind.LOST_REPLY: True,
    }
    for kind, done in expected.items():
        store = FaultyStore(inner, ScriptedFaults([kind]))
        with pytest.raises(StoreUnavailable) as caught:
            await store.put(kind, [b"x"])
        assert caught.value.throttled == (kind is FaultKind.THROTTLED)
        assert (kind in {info.key async for info in inner.list("")}) == done
    with pytest.raises(BodyTruncated, match="ended after 0 of 1 bytes"):
        await FaultyStore(inner, ScriptedFaults([FaultKind.TRUNCATED_BODY])).get("lost_reply")


async def test_latency_only_delays() -> None:
    clock = HandClock()
    store = FaultyStore(MemoryStore(), ScriptedFaults([Fault(FaultKind.LATENCY, 250)] * 3), sleep=clock.sleep)
    await store.put("k", [b"x"])
    assert await store.get("k") == b"x"
    assert [info.key async for info in store.list("")] == ["k"]
    assert clock.slept == [0.25, 0.25, 0.25]


async def test_down_fails_everything_until_it_is_up() -> None:
    store = FaultyStore(MemoryStore())
    await store.put("k", [b"x"])
    store.down = True
    for call in (store.get("k"), store.put("l", [b"x"]), store.head("k"), store.delete(["k"]), store.check()):
        with pytest.raises(StoreUnavailable, match="down"):
            await call
    store.down = False
    assert await store.get("k") == b"x"


async def test_a_script_that_cannot_happen_is_refused() -> None:
    for kind in (FaultKind.CONFLICT, FaultKind.LOST_REPLY, FaultKind.TIMEOUT_DONE):
        script = ScriptedFaults([kind])
        with pytest.raises(ValueError, match=f"a get cannot fail by {kind}"):
            await FaultyStore(MemoryStore(), script).get("k")
    with pytest.raises(ValueError, match="sum of at most 1"):
        RandomFaults(random.Random(1), {FaultKind.LATENCY: 0.7, FaultKind.CONFLICT: 0.4})


async def test_random_faults_follow_the_seed() -> None:
    async def run(seed: int) -> list[object]:
        rates = dict.fromkeys(FaultKind, 0.1)
        faults = RandomFaults(random.Random(seed), rates, latency_ms_max=0)
        return [faults.next("put") for _ in range(200)]

    assert await run(5) == await run(5) != await run(6)
    assert {fault.kind for fault in await run(5) if isinstance(fault, Fault)} == set(FaultKind)
