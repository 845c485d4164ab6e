"""What becomes of records, and what is printed, when a script ends without closing its clients."""

import subprocess
import sys
import textwrap

import pytest
from shproto.errors import InvalidArgument, InvalidBatch
from streamhouse.sync import Producer

pytestmark = pytest.mark.long

PATIENCE_S = 120


def run(server, body, *, code=0):
    """Standard error of a script that knows `address` and both kinds of clients."""
    head = "import asyncio, sys, threading\nimport streamhouse\nfrom streamhouse import sync\naddress = sys.argv[1]\n"
    script = head + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script, server.address], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def values_in(server):
    return server.values("t")


@pytest.fixture
def topic(server):
    server.create_topic("t", 1)
    return server


NUMBERS = [b"%d" % n for n in range(1000)]


@pytest.mark.smoke
def test_a_script_that_ends_without_close_has_written_everything(topic):
    body = """
        producer = sync.Producer(address)
        for n in range(1000):
            producer.send("t", b"%d" % n)
    """
    assert run(topic, body) == ""
    assert values_in(topic) == NUMBERS


def test_so_has_one_whose_producer_is_out_of_sight(topic):
    body = """
        def work():
            sync.Producer(address, linger_ms=10_000).send_many("t", [b"%d" % n for n in range(1000)])
        work()
    """
    assert run(topic, body) == ""
    assert values_in(topic) == NUMBERS


def test_so_has_one_that_fails(topic):
    body = """
        producer = sync.Producer(address)
        for n in range(1000):
            producer.send("t", b"%d" % n)
        raise SystemExit(3)
    """
    assert run(topic, body, code=3) == ""
    assert values_in(topic) == NUMBERS


def test_what_cannot_be_written_is_counted_once_for_all_producers(topic):
    topic.faults.hang("produce")
    body = """
        producers = [sync.Producer(address, exit_timeout_ms=300) for _ in range(2)]
        for producer in producers:
            for n in range(600):
                producer.send("t", b"%d" % n)
    """
    assert run(topic, body) == (
        "the process ends, and its producer was not closed: 1,200 records are not acknowledged within "
        "exit_timeout_ms = 300. They are dropped\n"
    )


def test_so_is_what_did_not_even_find_room(topic):
    topic.faults.hang("produce")
    body = """
        producer = sync.Producer(address, batch_bytes=1_000, buffer_bytes_max=1_000, exit_timeout_ms=0)
        for n in range(600):
            producer.send("t", b"%d" % n)
    """
    assert "600 records are not acknowledged within exit_timeout_ms = 0" in run(topic, body)


def test_so_is_what_was_refused_and_nobody_has_asked_about(topic):
    topic.faults.fail("produce", InvalidBatch("no"))
    body = """
        producer = sync.Producer(address)
        assert producer.send("t", b"v").exception(60) is not None
        producer.send_many("t", [b"v"] * 7)
    """
    assert run(topic, body) == (
        "the process ends, and its producer was not closed: 7 records are not acknowledged within "
        "exit_timeout_ms = 5000; the last error: no. They are dropped\n"
    )


@pytest.mark.smoke
def test_a_limit_of_the_exit_that_is_none_is_named(server):
    for wrong in (-1, None, 1.5, "5"):
        with pytest.raises(InvalidArgument, match="exit_timeout_ms is"):
            Producer(server.address, exit_timeout_ms=wrong)


def test_a_thread_that_still_sends_is_told(topic):
    body = """
        import time
        producer, told = sync.Producer(address), []
        producer.send("t", b"first").result()

        def work():
            try:
                while True:
                    producer.send("t", b"v").result()
            except Exception as error:
                told.append(error)
                print(type(error).__name__, error, file=sys.stderr)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        import atexit
        atexit.register(lambda: thread.join(60))
        from streamhouse.background import BACKGROUND
        atexit.unregister(BACKGROUND.stop)
        atexit.register(BACKGROUND.stop)  # before the thread is waited for
    """
    assert run(topic, body) in (
        "InvalidArgument the producer is closed\n",
        "RuntimeError the client was stopped while this call waited\n",
    )


def test_a_coroutine_that_ends_without_close_says_what_is_lost(topic):
    """Nothing can be flushed: the event loop has ended."""
    topic.faults.hang("produce")
    body = """
        async def main():
            producer = streamhouse.Producer(address)
            for n in range(600):
                await producer.send("t", b"%d" % n)
        asyncio.run(main())
    """
    said = "the event loop ends, and its producer was not closed: 600 records are not acknowledged\n"
    assert run(topic, body) == said
    assert run(topic, body.replace("producer =", "global producer; producer =")) == said


def test_clients_that_are_not_closed_end_quietly(topic):
    """Streams are cut off in the middle, whatever they were doing."""
    body = """
        producer, consumer = sync.Producer(address), sync.Consumer(address, ["t"], group="g")
        producer.send("t", b"v").result()
        for record in consumer:
            break
        sync.Admin(address).list_topics()

        async def main():
            producer, consumer = streamhouse.Producer(address), streamhouse.Consumer(address, ["t"], group="h")
            await (await producer.send("t", b"w"))
            async for record in consumer:
                break
        asyncio.run(main())
    """
    assert run(topic, body) == ""


def test_many_event_loops_one_after_the_other_are_quiet(topic):
    body = """
        async def main():
            async with streamhouse.Producer(address) as producer:
                await (await producer.send("t", b"v"))
        for _ in range(20):
            asyncio.run(main())
    """
    assert run(topic, body) == ""


def test_a_producer_whose_close_has_failed_is_closed(topic):
    """The end of the process told of its records once more, and as if nobody had closed it."""
    topic.faults.hang("produce")
    body = """
        producer = sync.Producer(address)
        producer.send_many("t", [b"v"] * 5)
        try:
            producer.close(timeout_s=0.2)
        except TimeoutError as error:
            print(error, file=sys.stderr)
        from streamhouse.sync.producer import _UNCLOSED
        assert not _UNCLOSED
    """
    assert run(topic, body) == "5 records are not acknowledged within timeout_s = 0.2\n"


def test_a_consumer_whose_close_has_failed_is_closed(topic):
    """It was kept until the end of the process."""
    topic.faults.fail("commit_offsets", InvalidArgument("no"), 1)
    body = """
        from streamhouse.errors import InvalidArgument
        from streamhouse.sync.consumer import _UNCLOSED
        sync.Producer(address).send_and_wait("t", b"v")
        consumer = sync.Consumer(address, ["t"], group="g")
        next(iter(consumer))
        try:
            consumer.close()
        except InvalidArgument:
            assert not _UNCLOSED
        else:
            raise SystemExit(3)
    """
    run(topic, body)


def test_ctrl_c_while_the_end_is_waited_for_still_says_what_is_lost(topic):
    topic.faults.hang("produce")
    body = """
        import os, signal
        from streamhouse.background import BACKGROUND

        producer = sync.Producer(address, exit_timeout_ms=3_600_000)
        producer.send_many("t", [b"v"] * 5)

        def press_ctrl_c():
            timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
            timer.daemon = True
            timer.start()

        BACKGROUND._before_end.insert(0, press_ctrl_c)
    """
    assert run(topic, body) == (
        "the process ends, and its producer was not closed: 5 records are not acknowledged within "
        "exit_timeout_ms = 3600000. They are dropped\n"
    )
