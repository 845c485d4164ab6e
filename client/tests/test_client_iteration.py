"""Handing over: who gets which record, in which order, and what counts as done with meanwhile; against a reader that is
given portions by hand."""

import asyncio
import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shformat import Records, encode_batch
from streamhouse.core.decoding import check_response
from streamhouse.core.in_flight import SWEEP_FIRST, InFlight
from streamhouse.core.options import ConsumerOptions
from streamhouse.core.positions import Cursor
from streamhouse.iteration import BURST_MAX, TURN_S, Iteration
from streamhouse.reader import Reader
from streamhouse.records import Record, RecordBatch, TopicPartition

pytestmark = pytest.mark.quick


class Hands:
    """An iteration over a reader without a stream, and a clock that only the application moves."""

    def __init__(self, partitions: int = 1, *, stop_at_end: bool = False) -> None:
        options = ConsumerOptions(stop_at_end=stop_at_end)
        self.reader = Reader(options, None, None, None, None)  # type: ignore[arg-type]
        self.received = []
        self.iteration = Iteration(  # type: ignore[arg-type]
            self.reader, None, options, lambda: False, self._more, received=self.received.append
        )
        self.now_s = 100.0
        self.iteration._clock = lambda: self.now_s
        self.iteration._turn_ends_s = self.now_s + TURN_S
        self.cursors = [Cursor.at(TopicPartition("t", number), 0) for number in range(partitions)]
        for cursor in self.cursors:
            self.reader.put(cursor)
        self.values = itertools.count()

    async def _more(self, worker: object) -> bool:
        found = await self.iteration.advance()
        self.iteration.in_flight.waited(worker)  # type: ignore[arg-type]
        return found

    def receive(self, partition: int, count: int, size_bytes: int = 10) -> None:
        """`count` records arrive in one batch."""
        cursor = self.cursors[partition]
        records = Records.from_lists([b"%d" % next(self.values) + bytes(size_bytes)] * count)
        batch = encode_batch(records, base_offset=cursor.fetch_offset, epoch=1)
        for encoded in check_response(cursor, [batch], cursor.fetch_offset + count):
            self.reader._accept(cursor, encoded)

    def worker(self, name: object = "a task"):
        return self.iteration.in_flight.worker(name)

    async def ask(self, name: object = "a task") -> Record:
        worker = self.worker(name)
        worker.held = None
        return await self.iteration.next(worker)

    async def ask_for_batch(self, name: object = "a task") -> RecordBatch:
        worker = self.worker(name)
        worker.held = None
        while (batch := self.iteration.take_batch(worker)) is None:
            assert await self._more(worker)
        return batch

    @property
    def has_records(self) -> bool:
        returned = any(cursor.live for cursor, _ in self.iteration.in_flight.returned)
        return returned or any(cursor.delivered < cursor.fetch_offset for cursor in self.cursors)

    def done_below(self, partition: int = 0) -> int:
        return self.iteration.in_flight.done_below(self.cursors[partition])


async def test_a_record_is_done_with_when_its_worker_asks_for_the_next_one():
    hands = Hands()
    hands.receive(0, 3)
    for offset in range(3):
        assert (await hands.ask()).offset == offset
        assert (hands.cursors[0].delivered, hands.done_below()) == (offset + 1, offset)
    hands.worker().held = None
    assert hands.done_below() == 3


async def test_what_another_worker_has_in_hand_is_not_done_with():
    hands = Hands()
    hands.receive(0, 100)
    assert (await hands.ask("slow")).offset == 0
    for offset in range(1, 100):
        assert (await hands.ask("quick")).offset == offset
    hands.worker("quick").held = None
    assert (hands.cursors[0].delivered, hands.done_below()) == (100, 0)
    hands.worker("slow").held = None
    assert hands.done_below() == 100


async def test_a_worker_that_asked_twice_before_it_got_anything_has_both_in_hand():
    hands = Hands()
    hands.receive(0, 4)
    worker = hands.worker()
    worker.held = None
    first, second = hands.iteration.next(worker), hands.iteration.next(worker)  # as `gather(anext(c), anext(c))` does
    assert [(await first).offset, (await second).offset] == [0, 1]
    assert hands.done_below() == 0
    assert (await hands.ask()).offset == 2
    assert hands.done_below() == 2


async def test_of_a_batch_in_hand_nothing_is_done_with():
    hands = Hands()
    hands.receive(0, 10)
    hands.receive(0, 10, size_bytes=100_000)
    assert (await hands.ask("another")).offset == 0
    assert (await hands.ask_for_batch()).offsets.tolist() == list(range(1, 10))
    assert (await hands.ask_for_batch("third")).offsets.tolist() == list(range(10, 20))
    hands.worker("another").held = None
    assert (hands.cursors[0].delivered, hands.done_below()) == (20, 1)
    hands.worker().held = None
    assert hands.done_below() == 10


async def test_tasks_that_returned_are_done_once_another_one_comes_and_others_never():
    """One that returned may have waited for its record on behalf of another task: it is that one's to process now."""
    hands = Hands()
    hands.receive(0, 10)

    async def ask():
        return await hands.ask(asyncio.current_task())

    async def fail():
        await ask()
        raise ValueError

    returned = asyncio.create_task(ask())
    await returned
    assert (hands.cursors[0].delivered, hands.done_below()) == (1, 0)
    await asyncio.create_task(ask())
    assert hands.done_below() == 1
    failed = asyncio.create_task(fail())
    await asyncio.wait([failed])
    for _ in range(5):
        await asyncio.create_task(ask())
    assert hands.done_below() == 2
    told = list(hands.iteration.in_flight.abandoned())
    assert [(worker.owner, offset) for worker, _, offset in told] == [(failed, 2)]
    assert list(hands.iteration.in_flight.abandoned()) == [], "once"
    hands.iteration.in_flight.finish_ended()
    assert hands.done_below() == 2
    assert isinstance(failed.exception(), ValueError)


async def test_tasks_that_ended_are_forgotten():
    hands = Hands()
    hands.receive(0, 1_000)
    for _ in range(1_000):
        await asyncio.create_task(hands.ask(object()))  # not known as tasks: they never end
    many = len(hands.iteration.in_flight._workers)
    hands = Hands()
    hands.receive(0, 1_000)

    async def ask():
        await hands.ask(asyncio.current_task())

    for _ in range(1_000):
        await asyncio.create_task(ask())
    assert many == 1_000 and len(hands.iteration.in_flight._workers) <= 2 * SWEEP_FIRST


async def test_an_iterator_that_outlives_its_task_is_still_accounted_for():
    in_flight = InFlight(lambda owner: True, lambda owner: True)
    worker = in_flight.worker("ended")
    for number in range(2 * SWEEP_FIRST):
        in_flight.worker(number)
    in_flight.waited(worker)
    cursor = Cursor.at(TopicPartition("t", 0), 0)
    worker.held = (cursor, Record("t", 0, 0, 0, None, b"", ()), None)
    cursor.delivered = 1
    assert in_flight.done_below(cursor) == 0


async def test_the_application_is_given_one_partition_for_a_turn_only():
    """However slow it is, and however much was received of one partition before anything of another came."""
    hands = Hands(3)
    for _ in range(20):
        hands.receive(0, 1_000)
    seen = []
    for number in range(30):
        if number == 10:
            hands.receive(1, 100)
            hands.receive(2, 100)
        seen.append((await hands.ask()).partition)
        hands.now_s += 2 * TURN_S
    assert seen[:10] == [0] * 10
    assert sorted(seen[11:14]) == sorted(seen[14:17]) == [0, 1, 2]


async def test_a_fast_application_stays_with_a_portion():
    hands = Hands(2)
    hands.receive(0, 1_000)
    hands.receive(1, 1_000)
    seen = []
    for _ in range(2_000):
        seen.append((await hands.ask()).partition)
        hands.now_s += TURN_S / 1e6
    assert len(list(itertools.groupby(seen))) == 2


@pytest.mark.parametrize("took_s", [TURN_S / 1_000, TURN_S / 2, 2 * TURN_S, 100 * TURN_S])
async def test_the_event_loop_has_its_turns_though_the_application_never_waits(took_s):
    """As often as every turn, but for the rest of a burst where the application becomes slow at once."""
    hands = Hands()
    hands.receive(0, 20_000)
    turns, longest = 0, 0.0
    before_s = hands.now_s

    async def count_turns():
        nonlocal turns, longest, before_s
        while True:
            turns += 1
            longest, before_s = max(longest, hands.now_s - before_s), hands.now_s
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    asks = max(500, int(5 * TURN_S / took_s))
    for _ in range(asks):
        await hands.ask()
        hands.now_s += took_s
    counting.cancel()
    assert longest <= TURN_S + max(took_s * 2, BURST_MAX * TURN_S / 1_000)
    assert turns >= min(asks, asks * took_s / TURN_S) / 2
    if took_s == 100 * TURN_S:
        assert turns > 4 * asks, "a loop that stood still for long has several at a time"


async def test_of_a_lost_partition_nothing_is_handed_over():
    hands = Hands(2)
    hands.receive(0, 100)
    hands.receive(1, 100)
    first = await hands.ask()
    hands.reader.drop(TopicPartition("t", first.partition))
    rest = [await hands.ask() for _ in range(100)]
    assert {record.partition for record in rest} == {1 - first.partition}
    hands.iteration._settle()
    assert hands.reader._received_bytes == 0


async def test_what_is_handed_over_makes_room():
    hands = Hands(2)
    for partition in (0, 1):
        for _ in range(3):
            hands.receive(partition, 500, size_bytes=1_000)
    assert hands.reader._received_bytes > 3_000_000
    for _ in range(3_000):
        await hands.ask()
        hands.now_s += TURN_S / 10
    hands.iteration._settle()
    assert hands.reader._received_bytes == 0 == sum(cursor.received_bytes for cursor in hands.cursors)


async def test_workers_that_wait_for_the_end_hear_of_it_from_the_one_who_got_the_last_record():
    """Who does not ask again itself."""
    hands = Hands(stop_at_end=True)
    hands.cursors[0].end = 3
    waiting = [asyncio.create_task(hands.ask(name)) for name in "abc"]
    await asyncio.sleep(0)
    hands.receive(0, 3)
    assert sorted([record.offset for record in await asyncio.gather(*waiting)]) == [0, 1, 2]
    assert not await hands.iteration.advance()


async def test_an_end_that_moves_does_not_lose_what_lay_behind_it():
    hands = Hands(stop_at_end=True)
    (cursor,) = hands.cursors
    cursor.end = 5
    hands.receive(0, 10)
    assert [(await hands.ask()).offset for _ in range(5)] == list(range(5))
    worker = hands.worker()
    worker.held = None
    assert hands.iteration.take(worker) is None and not await hands.iteration.advance()
    assert (cursor.fetch_offset, cursor.wants_more, cursor.at_end, cursor.restarts) == (5, False, True, 1)
    hands.reader.set_end(cursor, 12)
    assert cursor.wants_more
    hands.receive(0, 10)
    assert [(await hands.ask()).offset for _ in range(7)] == list(range(5, 12))


# ---- any number of workers, in any order


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("receive"), st.integers(0, 2), st.integers(1, 40)),
        st.tuples(st.just("ask"), st.integers(0, 2), st.integers(1, 30)),
        st.tuples(st.just("ask for a batch"), st.integers(0, 2), st.just(1)),
        st.tuples(st.just("interrupted"), st.integers(0, 2), st.just(1)),
        st.tuples(st.just("time passes"), st.just(0), st.sampled_from([1, 10, 10_000])),
        st.tuples(st.just("seek"), st.integers(0, 2), st.just(1)),
    ),
    max_size=60,
)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_whoever_asks_each_record_goes_to_one_and_no_commit_passes_one_in_hand(steps):
    asyncio.run(_walk(steps))


async def _walk(steps):
    hands = Hands(3)
    handed: dict[Cursor, list[int]] = defaultdict(list)
    in_hand: dict[int, tuple[Cursor, int] | None] = {}

    def take(name, item):
        cursor = hands.cursors[item.partition]
        offsets = item.offsets.tolist() if isinstance(item, RecordBatch) else [item.offset]
        handed[cursor] += offsets
        in_hand[name] = (cursor, offsets[0])

    for what, number, count in steps:
        if what == "receive":
            hands.receive(number, count)
        elif what == "time passes":
            hands.now_s += count * TURN_S / 1_000
        elif what == "seek":
            old = hands.cursors[number]
            hands.cursors[number] = Cursor.at(old.where, 0)
            hands.reader.put(hands.cursors[number])
        for _ in range(count if what in ("ask", "ask for a batch", "interrupted") else 0):
            if not hands.has_records:
                break
            worker = hands.worker(number)
            worker.held = None
            in_hand[number] = None
            if what == "ask for a batch":
                take(number, await hands.ask_for_batch(number))
            elif what == "interrupted":
                await hands.ask(number)
                hands.iteration.give_back(worker)
            else:
                take(number, await hands.ask(number))
        for cursor in hands.cursors:
            held = [offset for item in in_hand.values() if item is not None for of, offset in [item] if of is cursor]
            back = [int(batch.offsets[0]) for of, batch in hands.iteration.in_flight.returned if of is cursor]
            assert hands.iteration.in_flight.done_below(cursor) == min([cursor.delivered, *held, *back])
    for offsets in handed.values():
        assert sorted(offsets) == sorted(set(offsets)), "to one only"
    # Whatever is left comes, and then everything has come.
    while hands.has_records:
        take("last", await hands.ask("last"))
        hands.now_s += TURN_S / 3
    for cursor in hands.cursors:
        assert sorted(handed[cursor]) == list(range(cursor.fetch_offset))
    assert hands.iteration.take(hands.worker()) is None  # the rest of a partition that was left goes as well
    hands.iteration._settle()
    assert hands.reader._received_bytes == 0


@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=5),
    st.integers(0, 100),
)
@settings(max_examples=50, deadline=None)
def test_a_slow_application_goes_round_the_partitions(sizes, seed):
    """Between two records of one partition comes one of every other that has any."""

    async def walk():
        hands = Hands(len(sizes))
        rng = np.random.default_rng(seed)
        left = [0] * len(sizes)
        for partition, batches in enumerate(sizes):
            for _ in range(batches):
                count = int(rng.integers(1, 20))
                hands.receive(partition, count, size_bytes=70_000 if seed % 2 else 10)
                left[partition] += count
        passed_over = [0] * len(sizes)
        while any(left):
            record = await hands.ask()
            hands.now_s += 2 * TURN_S
            left[record.partition] -= 1
            passed_over[record.partition] = 0
            for other, count in enumerate(left):
                if other != record.partition and count:
                    passed_over[other] += 1
                    assert passed_over[other] <= len(sizes)

    asyncio.run(walk())
