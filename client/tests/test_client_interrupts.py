"""KeyboardInterrupt may come between any two steps of the synchronous client: the loop's thread goes on anyway."""

import asyncio
import random
import subprocess
import sys
import textwrap
from itertools import repeat

import pytest
from streamhouse.background import BACKGROUND
from streamhouse.sync import Producer
from streamhouse.sync.producer import STAGED_SLOTS_MAX

pytestmark = pytest.mark.long

PATIENCE_S = 60


class InterruptAt:
    """Raises KeyboardInterrupt before the `step`-th instruction that this thread executes inside the block, in the
    client, in asyncio and in threading. `came` says if there were so many."""

    def __init__(self, step):
        self._left = step
        self.came = False

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind, error, trace):
        sys.settrace(None)
        return kind is KeyboardInterrupt and self.came

    def _trace(self, frame, event, arg):
        # What the collector calls may not raise; nor may the end of this block.
        if frame.f_code is self.__exit__.__func__.__code__ or frame.f_code.co_filename.endswith("_weakrefset.py"):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame, event, arg):
        if event == "opcode" and not self.came:
            self._left -= 1
            if self._left == 0:
                self.came = True
                raise KeyboardInterrupt
        return self._step


def interrupted_everywhere(work, check):
    """Interrupts `work` at every step in turn and calls `check` after each; returns how many steps there were."""
    step = 1
    while True:
        with InterruptAt(step) as interrupt:
            work()
        check()
        if not interrupt.came:
            return step
        step += 1


@pytest.fixture
def producer(server):
    server.create_topic("t", 1)
    with Producer(server.address, linger_ms=0) as producer:
        producer.send("t", b"first").result(PATIENCE_S)
        yield producer


@pytest.fixture
def goes_on(producer):
    """The loop's thread still runs, and takes and delivers records."""

    def check():
        BACKGROUND.run(asyncio.sleep(0), PATIENCE_S)
        assert producer.send("t", b"after").result(PATIENCE_S).offset > 0
        assert not producer._staged

    return check


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # interrupted before it was begun
def test_an_interrupted_send_leaves_the_loop_running(producer, goes_on):
    assert interrupted_everywhere(lambda: producer.send("t", b"v"), goes_on) > 100


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_an_interrupted_wait_for_room_leaves_the_loop_running(producer, goes_on):
    def send_behind_a_full_queue():
        producer._staged.extend(repeat(None, STAGED_SLOTS_MAX))
        producer.send("t", b"v")

    assert interrupted_everywhere(send_behind_a_full_queue, goes_on) > 100


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_an_interrupted_wait_for_an_outcome_leaves_the_loop_running(producer, goes_on):
    assert interrupted_everywhere(lambda: producer.send("t", b"v").result(PATIENCE_S), goes_on) > 200


@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_an_interrupted_flush_leaves_the_loop_running(producer, goes_on):
    assert interrupted_everywhere(producer.flush, goes_on) > 50


TIGHT_LOOP = """
    import faulthandler, os, random, signal, sys, threading, time
    from streamhouse.sync import Producer

    faulthandler.dump_traceback_later(240, exit=True)
    address, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng, futures, interrupts = random.Random(seed), [], 0
    armed = threading.Semaphore(0)

    def interrupt():
        while armed.acquire():
            time.sleep(rng.random() * 0.02)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    producer = Producer(address)
    producer.send("t", b"first").result()
    while interrupts < count:
        try:
            armed.release()
            while True:
                futures.append(producer.send("t", b"v"))
        except KeyboardInterrupt:
            interrupts += 1
    producer.close(120)
    assert all(future.done() and future.exception() is None for future in futures)
    print(interrupts, len(futures))
"""


def test_a_tight_loop_of_sends_survives_interrupts(server):
    server.create_topic("t", 2)
    seed = random.randrange(1 << 30)
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(TIGHT_LOOP), server.address, str(seed), "25"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S * 5)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    interrupts, sent = map(int, done.stdout.split())
    assert interrupts == 25
    # A record whose `send` was interrupted may be there without a future.
    stored = sum(len(server.records("t", partition)) for partition in range(2))
    assert sent < stored <= sent + 1 + interrupts
