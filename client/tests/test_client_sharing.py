"""One consumer, several tasks or threads: each record goes to one of them, and no commit passes one that is in hand."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import streamhouse
from streamhouse import Consumer, errors, sync
from streamhouse.sync import Producer

from client.tests.test_client_consumer import PATIENCE_S, fill, take, until
from tests.platform.cluster import ThreadedCluster

# ---- tasks


async def test_tasks_share_a_consumer(platform, address):
    """Each record is handed to one of them, and all of it is committed in the end."""
    await fill(platform, address, 2_000, partitions=2)
    seen: list[list[tuple[int, int]]] = [[], [], []]
    async with Consumer(address, ["t"], group="g", stop_at_end=True, auto_commit_interval_ms=10) as consumer:

        async def work(records):
            async for record in consumer:
                records.append((record.partition, record.offset))
                await asyncio.sleep(0)

        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*map(work, seen))
    everything = [(partition, n) for partition in (0, 1) for n in range(await platform.end("t", partition))]
    assert sorted(seen[0] + seen[1] + seen[2]) == everything, "each once"
    assert all(seen), "none was left out"
    assert sum(platform.group("g").offsets.values()) == 2_000


async def test_a_commit_does_not_pass_what_another_task_has_in_hand(platform, address, monkeypatch):
    await fill(platform, address, 100, partitions=1)
    go_on = asyncio.Event()
    async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=10) as consumer:
        rounds, commit = [], consumer._commits.commit_existing

        async def counted():
            await commit()
            rounds.append(dict(platform.group("g").offsets))

        monkeypatch.setattr(consumer._commits, "commit_existing", counted)

        async def slow():
            async for _ in consumer:
                await go_on.wait()

        slowly = asyncio.create_task(slow())
        await until(lambda: consumer.positions() == {("t", 0): 1})
        assert [record.offset for record in await take(consumer, 99)] == list(range(1, 100))
        await consumer.commit()  # what this task has in hand, and nothing that is the other's
        await until(lambda: platform.group("g").offsets == {("t", 0): 0})
        rounds.clear()
        await until(lambda: len(rounds) > 3)  # the first may have begun before
        assert all(offsets == {("t", 0): 0} for offsets in rounds)
        go_on.set()
        await until(lambda: platform.group("g").offsets == {("t", 0): 100})
        slowly.cancel()
        await asyncio.wait([slowly])


async def test_leaving_does_not_commit_what_a_task_had_in_hand_that_was_cancelled(platform, address):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, ["t"], group="g") as consumer:
        hanging = asyncio.create_task(_hang(consumer))
        await until(lambda: consumer.positions() == {("t", 0): 1})
        await take(consumer, 9)
        hanging.cancel()
        await asyncio.wait([hanging])
    assert platform.group("g").offsets == {("t", 0): 0}


async def _hang(consumer):
    async for _ in consumer:
        await asyncio.Event().wait()


async def test_a_task_that_failed_holds_the_group_there_and_is_named(platform, address, caplog):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=10) as consumer:

        async def fail():
            async for record in consumer:
                if record.offset == 3:
                    raise ValueError

        failing = asyncio.create_task(fail(), name="worker 7")
        await asyncio.wait([failing])
        await take(consumer, 6)
        await until(lambda: "t/0, offset 3, in hand" in caplog.text)
        assert "worker 7" in caplog.text
    assert isinstance(failing.exception(), ValueError)
    assert platform.group("g").offsets == {("t", 0): 3}
    assert caplog.text.count("in hand") == 1


async def test_a_task_for_each_record_leaves_nothing_behind(platform, address):
    """Whether it asks itself or is asked for, as `wait_for` does."""
    await fill(platform, address, 40, partitions=1)

    async def ask(consumer):
        return (await anext(consumer)).offset

    async with Consumer(address, ["t"], group="g", auto_commit_interval_ms=10) as consumer:
        offsets = [await asyncio.create_task(ask(consumer)) for _ in range(20)]
        offsets += [await asyncio.wait_for(ask(consumer), PATIENCE_S) for _ in range(10)]
        offsets += [(await asyncio.wait_for(anext(consumer), PATIENCE_S)).offset for _ in range(10)]
        assert offsets == list(range(40))
        await until(lambda: platform.group("g").offsets == {("t", 0): 39})
    assert platform.group("g").offsets == {("t", 0): 40}


async def test_tasks_share_batches(platform, address):
    await fill(platform, address, 3_000, partitions=3)
    offsets: list[tuple[int, int]] = []
    async with Consumer(address, ["t"], group="g", stop_at_end=True, fetch_bytes=2_000) as consumer:

        async def work():
            async for batch in consumer.batches():
                offsets.extend((batch.partition, offset) for offset in batch.offsets.tolist())
                await asyncio.sleep(0.001)

        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(work(), work(), work())
    assert len(offsets) == len(set(offsets)) == 3_000
    assert sum(platform.group("g").offsets.values()) == 3_000


async def test_batches_go_on_after_a_timeout(platform, address):
    await fill(platform, address, 10, partitions=1)
    async with Consumer(address, ["t"]) as consumer:
        batches = consumer.batches()
        assert len(await anext(batches)) == 10
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(batches), 0.01)
        await fill(platform, address, 5)
        batch = await asyncio.wait_for(anext(batches), PATIENCE_S)
        assert batch.offsets.tolist()[0] == 10
        await batches.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(batches)


async def test_batches_go_on_after_an_error(platform, address):
    await fill(platform, address, 10, partitions=1)
    platform.faults.fail_partition(errors.DataLoss("gone", topic="t", partition=0, base_offset=0, end_offset=5))
    async with Consumer(address, ["t"]) as consumer:
        batches = consumer.batches()
        with pytest.raises(errors.DataLoss):
            await anext(batches)
        assert len(await anext(batches)) == 10


# ---- threads


def write(server: ThreadedCluster, count: int, partitions: int) -> None:
    server.create_topic("t", partitions)
    with Producer(server.address, batch_bytes=20_000) as producer:
        producer.send_many("t", [b"%d" % n for n in range(count)], keys=[b"%d" % n for n in range(count)])


def in_threads(count: int, work: Callable[[], None]) -> None:
    """Returns when all have ended; raises what one of them did."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            raised.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "it waits for ever"
    if raised:
        raise raised[0]


@pytest.mark.parametrize("as_batches", [False, True])
def test_threads_share_a_consumer(server, as_batches):
    write(server, 20_000, 4)
    seen: list[tuple[int, int]] = []
    with sync.Consumer(
        server.address, ["t"], group="g", stop_at_end=True, auto_commit_interval_ms=10, fetch_bytes=20_000
    ) as consumer:

        def read() -> None:
            if as_batches:
                for batch in consumer.batches():
                    seen.extend((batch.partition, offset) for offset in batch.offsets.tolist())
            else:
                seen.extend((record.partition, record.offset) for record in consumer)

        in_threads(3, read)
        consumer.commit()
    assert len(seen) == len(set(seen)) == 20_000
    assert sum(server.group("g").offsets.values()) == 20_000


def test_a_commit_does_not_pass_what_another_thread_has_in_hand(server):
    write(server, 100, 1)
    took, go_on = threading.Event(), threading.Event()
    with sync.Consumer(server.address, ["t"], group="g", auto_commit=False, stop_at_end=True) as consumer:

        def slow() -> None:
            next(consumer)
            took.set()
            assert go_on.wait(PATIENCE_S)
            next(consumer, None)

        thread = threading.Thread(target=slow, daemon=True)
        thread.start()
        assert took.wait(PATIENCE_S)
        assert [record.offset for record in consumer] == list(range(1, 100))
        consumer.commit()
        assert server.group("g").offsets == {("t", 0): 0}
        go_on.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        consumer.commit()
        assert server.group("g").offsets == {("t", 0): 100}


def test_threads_that_wait_are_given_what_comes(server):
    """Each of them has waited before anything was there, and none asks twice."""
    server.create_topic("t", 1)
    seen: list[int] = []
    with sync.Consumer(server.address, ["t"]) as consumer:
        threads = [threading.Thread(target=lambda: seen.append(next(consumer).offset), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        with Producer(server.address) as producer:
            producer.send_many("t", [b"1", b"2", b"3"])
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    assert sorted(seen) == [0, 1, 2]


# ---- at the end of the process

ENDS = """
import sys, threading, time
from streamhouse.sync import Consumer
consumer = Consumer(sys.argv[1], ["t"], group="g", auto_commit_interval_ms=60_000)
for record in consumer:
    if record.offset == 4:
        break
for _ in range(3):
    threading.Thread(target=lambda: [None for _ in consumer], daemon=True).start()
while consumer.positions()["t", 0] < 10:
    time.sleep(0.01)
time.sleep(0.1)
print("done")
"""


def test_a_script_that_does_not_close_its_consumer_ends_without_a_word(server):
    """And its group knows. Three threads still wait for records then."""
    write(server, 10, 1)
    ended = subprocess.run(
        [sys.executable, "-c", ENDS, server.address], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert (ended.stdout, ended.stderr) == ("done\n", "")
    assert server.group("g").members == frozenset()
    assert server.group("g").offsets == {("t", 0): 4}, "what the main thread had in hand it has not done with"


# ---- Ctrl-C, which comes between any two steps

SDK = Path(streamhouse.__file__).parent
STEPPED = {str(SDK / name) for name in ("iteration.py", "core/in_flight.py", "core/positions.py", "sync/consumer.py")}


@contextmanager
def interrupt_at(step: int) -> Iterator[Callable[[], bool]]:
    """Raises KeyboardInterrupt at this step of handing over, and tells whether it came to that. Steps are where Python
    looks for signals: when a function begins, and after a call."""
    count = 0

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        code = frame.f_code
        if code.co_filename in STEPPED and code.co_name != "_give_back" and event in ("call", "c_return"):
            count += 1
            if count == step:
                raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        yield lambda: count >= step
    finally:
        sys.setprofile(None)


@pytest.mark.long  # every step of the code in turn: a sweep
@pytest.mark.parametrize("form", ["records", "batches", "poll"])
def test_an_interrupt_at_any_step_passes_over_no_record(server, form):
    write(server, 60, 2)
    step, was_reached = 0, True
    while was_reached:
        step += 1 if step < 100 else 5
        offsets: list[tuple[int, int]] = []
        with sync.Consumer(server.address, ["t"], stop_at_end=True) as consumer:

            def read(consumer: sync.Consumer = consumer, offsets: list[tuple[int, int]] = offsets) -> None:
                if form == "batches":
                    for batch in consumer.batches():
                        offsets.extend((batch.partition, offset) for offset in batch.offsets.tolist())
                elif form == "poll":
                    while not consumer.at_end:
                        for (_, partition), records in consumer.poll(1_000, max_records=7).items():
                            offsets.extend((partition, record.offset) for record in records)
                else:
                    for record in consumer:
                        offsets.append((record.partition, record.offset))

            try:
                with interrupt_at(step) as reached:
                    read()
                was_reached = False
            except KeyboardInterrupt:
                was_reached = reached()
            read()
        assert len(set(offsets)) == 60, f"step {step}"
        assert len(offsets) <= 60, f"step {step}: each once, for what did not reach the application was not handed over"
    assert step > 50
