"""Calls that nobody answers are repeated for as long as the options say, refusals never, and one notice tells."""

import asyncio
import logging
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import grpc.aio
import pytest
import shproto.rpc
import streamhouse.retries
from shproto.errors import InvalidArgument, Overloaded, TopicExists, Unavailable
from shruntime.server import ServerLimits
from streamhouse import Admin, Consumer, Producer, sync
from streamhouse.retries import Retries

from client.tests.client_deadlines import let_delivery_timeout_pass, let_retry_timeout_pass
from tests.platform.cluster import Cluster

BOOTSTRAP = ["a:1", "b:2"]


def retries(timeout_ms: int = 60_000) -> Retries:
    return Retries("retry_timeout_ms", timeout_ms, BOOTSTRAP)


def unsent(message: str = "cannot connect to b:2: Connection refused") -> Unavailable:
    error = Unavailable(message, address="b:2")
    error.maybe_done = False
    return error


class Script:
    """Raises the errors given, one after the other, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


# ---- what is repeated


@pytest.mark.parametrize("error", [Unavailable("gone"), Overloaded("too many calls", retry_after_ms=1)])
async def test_a_call_is_repeated_until_it_is_answered(error):
    script = Script(error, error, error)
    assert await retries().run(script) == "answer"
    assert script.calls == 4


async def test_a_refusal_is_raised_at_once():
    script = Script(InvalidArgument("partitions is 0"))
    with pytest.raises(InvalidArgument):
        await retries().run(script)
    assert script.calls == 1


async def test_wrong_servers_are_not_waited_for():
    """A mistyped port: waiting a minute before saying so helps nobody."""
    error = unsent("a:1 is no gRPC server")
    error.permanent = True
    script = Script(error)
    with pytest.raises(Unavailable, match="a:1 is no gRPC server"):
        await retries().run(script)
    assert script.calls == 1


@pytest.mark.parametrize(("error", "again"), [(Unavailable("cut"), False), (unsent(), True), (Overloaded("x"), True)])
async def test_what_must_not_be_done_twice_is_repeated_only_if_nothing_was_done(error, again):
    script = Script(error)
    if again:
        assert await retries().run(script, repeatable=False) == "answer"
    else:
        with pytest.raises(Unavailable, match="cut"):
            await retries().run(script, repeatable=False)


async def test_the_error_at_the_end_names_the_addresses_the_option_and_the_last_cause():
    with pytest.raises(Unavailable) as caught:
        await retries(300).run(Script(*[unsent()] * 100))
    assert caught.value.message == (
        "no answer from a:1,b:2 within retry_timeout_ms = 300; last error: cannot connect to b:2: Connection refused"
    )
    assert not caught.value.maybe_done and caught.value.details == {"address": "b:2"}


async def test_a_call_that_hangs_ends_with_the_time():
    async def hang() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Unavailable, match="no answer from a:1,b:2 within retry_timeout_ms = 50"):
        await retries(50).run(hang)


async def test_a_timeout_of_the_call_itself_is_its_own_affair():
    with pytest.raises(TimeoutError, match="of the call"):
        await retries().run(Script(TimeoutError("of the call")))


async def test_there_is_one_notice_and_one_all_clear_however_many_calls_wait(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "streamhouse")
    monkeypatch.setattr(streamhouse.retries, "NOTICE_AFTER_MS", 0)
    waiting, failures = retries(), 0

    async def call() -> None:
        nonlocal failures
        failures += 1
        if failures <= 60:
            raise unsent()

    await asyncio.gather(*[waiting.run(call) for _ in range(20)])
    ours = [record for record in caplog.records if record.name == "streamhouse.retries"]
    assert [record.levelno for record in ours] == [logging.WARNING, logging.INFO]
    assert [record.getMessage() for record in ours] == [
        "no answer yet, trying again for retry_timeout_ms = 60000: cannot connect to b:2: Connection refused",
        "a:1,b:2 answers",
    ]


class AtOnce(asyncio.SelectorEventLoop):
    """Its clock jumps to the next timer when there is nothing else to do."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now_s = max(self.now_s, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def test_calls_that_wait_behind_others_that_are_answered_are_no_news(caplog):
    """Hundreds of CreateTopic at once, of which the coordinator takes ten a second. The others are told to come again,
    and must not come together: most would be refused together again."""
    caplog.set_level(logging.INFO, "streamhouse")
    waiting, taken_s = retries(), 0.0

    async def call() -> None:
        nonlocal taken_s
        now_s = asyncio.get_running_loop().time()
        if now_s < taken_s + 0.1:
            raise Overloaded("too many calls wait for the same lock; try again", retry_after_ms=1_000)
        taken_s = now_s

    async def all_calls() -> None:
        outcomes = await asyncio.gather(*[waiting.run(call) for _ in range(300)], return_exceptions=True)
        assert outcomes.count(None) > 200

    with asyncio.Runner(loop_factory=AtOnce) as runner:
        runner.run(all_calls())
    assert caplog.messages == []


def test_a_silence_after_answers_is_told_once(caplog):
    waiting, answers = retries(), True

    async def call() -> None:
        if not answers:
            raise unsent()

    async def fall_silent() -> None:
        nonlocal answers
        await waiting.run(call)
        answers = False
        calls = [asyncio.create_task(waiting.run(call)) for _ in range(100)]
        await asyncio.sleep(10)
        answers = True
        await asyncio.gather(*calls)

    with asyncio.Runner(loop_factory=AtOnce) as runner:
        runner.run(fall_silent())
    assert caplog.messages == [
        "no answer yet, trying again for retry_timeout_ms = 60000: cannot connect to b:2: Connection refused"
    ]


async def test_a_start_that_takes_too_long_names_the_option_the_time_and_the_last_cause(platform, address):
    await platform.create_topic("t", 2)
    platform.faults.fail("lookup_offsets", Unavailable("no leader answers"))
    consumer = Consumer(address, ["t"], group="g", start="latest", retry_timeout_ms=3_000)
    with pytest.raises(Unavailable) as caught:
        await consumer.start()
    assert caught.value.message.startswith("cannot start on t/0, t/1 within retry_timeout_ms = 3000; last error: ")
    await consumer.close()


async def test_a_short_absence_is_no_news(caplog):
    assert await retries().run(Script(unsent(), unsent())) == "answer"
    assert caplog.messages == []


# ---- first contact: nobody is there when the client begins


class LatePlatform(Cluster):
    """Begins to listen, on an address known before, once a client has failed to reach it."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            self.bootstrap = f"127.0.0.1:{held.getsockname()[1]}"
        super().__init__(directory, self.bootstrap)
        self.missed = threading.Event()

    async def begin_once_missed(self) -> None:
        while not self.missed.is_set():
            await asyncio.sleep(0.01)
        await self.start_services()
        await self.create_topic("t", 1)
        await self.server.start()


@pytest.fixture
async def late(monkeypatch, tmp_path):
    platform = LatePlatform(tmp_path)
    repeats = streamhouse.retries._may_repeat

    def noted(*arguments):
        platform.missed.set()
        return repeats(*arguments)

    monkeypatch.setattr(streamhouse.retries, "_may_repeat", noted)
    beginning = asyncio.create_task(platform.begin_once_missed())
    yield platform
    beginning.cancel()
    await asyncio.gather(beginning, return_exceptions=True)
    await platform.stop()


async def test_a_producer_waits_for_its_first_contact(late):
    async with Producer(late.bootstrap) as producer:
        metadata = await (await producer.send("t", b"x"))
    assert metadata.offset == 0 and late.missed.is_set()


async def test_a_consumer_waits_for_its_first_contact(late):
    async with Consumer(late.bootstrap, ["t"], group="g") as consumer:
        assert consumer.positions() or consumer.assignment == frozenset()
    assert late.missed.is_set() and late.faults.calls["join_group"] == 1


async def test_an_admin_waits_for_its_first_contact(late):
    async with Admin(late.bootstrap) as admin:
        assert [topic.topic for topic in await admin.list_topics()] == ["t"]
        with pytest.raises(TopicExists):
            await admin.create_topic("t")
    assert late.missed.is_set()


async def test_plain_code_waits_for_its_first_contact(late):
    def work() -> int:
        with sync.Producer(late.bootstrap) as producer:
            return producer.send("t", b"x").result(60).offset

    assert await asyncio.to_thread(work) == 0
    assert late.missed.is_set()


@pytest.mark.long
@pytest.mark.parametrize("command", ["topic list", "produce t --file /dev/null", "consume t"])
async def test_the_command_line_waits_for_its_first_contact(command, tmp_path):
    platform = LatePlatform(tmp_path)
    arguments = [*command.split(), "--bootstrap", platform.bootstrap, "--retry-timeout-ms", "60000"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "streamhouse_cli", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        notice = await process.stderr.readline()
        assert notice.startswith(b"no answer yet, trying again for retry_timeout_ms = 60000: cannot connect to "), (
            notice
        )
        platform.missed.set()
        await platform.begin_once_missed()
        _, said = await process.communicate()
        assert process.returncode == 0, said
        assert b"no answer yet" not in said
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await platform.stop()


async def test_a_consumer_that_is_asked_while_nobody_answers_waits(address, platform):
    await platform.create_topic("t", 1)
    async with Consumer(address, ["t"]) as consumer:
        platform.faults.fail("lookup_offsets", Overloaded("too many calls", retry_after_ms=1), 3)
        await consumer.seek("t", 0, "latest")
        platform.faults.fail("lookup_offsets", Overloaded("too many calls", retry_after_ms=1), 3)
        assert (await consumer.lag())["t", 0].records == 0
        assert platform.faults.failing("lookup_offsets") == 0


# ---- a server that is too busy


@pytest.mark.long
async def test_a_crowd_that_is_told_to_come_again_is_served_in_the_end(monkeypatch, tmp_path):
    """Those that have a stream and need a call to go on with it are not kept from it by the others' streams."""
    monkeypatch.setattr(shproto.rpc, "RETRY_AFTER_MS_MIN", 1)
    monkeypatch.setattr(shproto.rpc, "RETRY_AFTER_MS_MAX", 50)

    async def write(address: str) -> int:
        async with Producer(address) as producer:
            return (await (await producer.send("t", b"x"))).offset

    async with Cluster(tmp_path, limits=ServerLimits(calls_in_flight_max=5, streams_open_max=5)) as platform:
        await platform.create_topic("t", 1)
        platform.faults.delay("produce", 20)
        offsets = await asyncio.gather(*[write(platform.address) for _ in range(100)])
        assert sorted(offsets) == list(range(100))
        assert platform.server.calls.calls.refused + platform.server.calls.streams.refused > 0


# ---- the options name the time


async def test_the_producer_gives_up_with_its_own_option():
    async with Producer("127.0.0.1:1", delivery_timeout_ms=1_000) as producer:
        with pytest.raises(
            Unavailable, match=r"no answer from 127\.0\.0\.1:1 within delivery_timeout_ms = 1000; last error"
        ):
            await producer.send("t", b"x")


async def test_consumer_and_admin_give_up_with_their_own_option():
    with pytest.raises(Unavailable, match="within retry_timeout_ms = 1000; last error: cannot connect to"):
        await Consumer("127.0.0.1:1", ["t"], retry_timeout_ms=1_000).start()
    async with Admin("127.0.0.1:1", retry_timeout_ms=1_000) as admin:
        with pytest.raises(Unavailable, match="within retry_timeout_ms = 1000; last error: cannot connect to"):
            await admin.list_topics()


async def test_a_wrong_server_is_named_at_once():
    other = grpc.aio.server()
    port = other.add_insecure_port("127.0.0.1:0")
    await other.start()
    try:
        async with Admin(f"127.0.0.1:{port}") as admin:
            with pytest.raises(Unavailable, match=f"127.0.0.1:{port} is another server, or of another version"):
                await admin.list_topics()
    finally:
        await other.stop(None)


# ---- services whose advertised address does not work from here

ADVERTISED = r"cannot connect to no-such-host\.invalid:7070: .*STREAMHOUSE_ADVERTISE"


async def test_a_leader_out_of_reach_is_told_at_once_and_in_the_end(caplog, platform):
    await platform.create_topic("t", 1)
    platform.advertise(leader="no-such-host.invalid:7070")
    async with Producer(platform.address, delivery_timeout_ms=600_000) as producer:
        future = await producer.send("t", b"x")
        while not re.search(ADVERTISED, caplog.text):
            assert not future.done(), "the warning comes before the end"
            await asyncio.sleep(0.01)
        let_delivery_timeout_pass(producer)
        with pytest.raises(Unavailable, match=f"delivery_timeout_ms = 600000; last error: {ADVERTISED}"):
            await future


async def test_a_query_service_out_of_reach_is_told_at_once_and_in_the_end(caplog, platform):
    await platform.create_topic("t", 1)
    platform.advertise(readers=["no-such-host.invalid:7070"])
    async with Consumer(platform.address, ["t"], start=0, retry_timeout_ms=600_000) as consumer:
        reading = asyncio.create_task(anext(consumer))
        while not re.search(ADVERTISED, caplog.text):
            assert not reading.done(), "the warning comes before the end"
            await asyncio.sleep(0.01)
        let_retry_timeout_pass(consumer)
        with pytest.raises(Unavailable, match=ADVERTISED):
            await reading


async def test_calls_that_wait_for_an_answer_fail_when_their_client_is_closed(platform, address):
    """They ended as if somebody had cancelled their tasks."""
    await platform.create_topic("t", 1)
    platform.faults.hang("get_metadata")
    for client, calls in (
        (Producer(address), lambda client: [client.send("t", b"v"), client.send_many("t", [b"v"])]),
        (Consumer(address, ["t"]), lambda client: [client.start()]),
        (Admin(address), lambda client: [client.offsets("t", "latest")]),
    ):
        asked = platform.faults.calls["get_metadata"]
        tasks = [asyncio.create_task(call) for call in calls(client)]
        while platform.faults.calls["get_metadata"] == asked:
            await asyncio.sleep(0.01)
        await client.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * len(tasks)


async def test_streams_that_fail_together_leave_a_query_service_once(address):
    """A consumer of many partitions has several streams; each failure used to take the next service off the list."""
    consumer = Consumer(address, ["t"])  # not started: nothing else reads
    reader = consumer._reader
    reader._addresses.extend(["dead:1", "well:1"])
    await asyncio.gather(*[reader._stream_failed("dead:1", unsent()) for _ in range(8)])
    assert list(reader._addresses) == ["well:1"]
    await reader._stream_failed("", unsent())  # it was the coordinator that did not say where to read
    assert list(reader._addresses) == ["well:1"]
    await reader._stream_failed("well:1", unsent())
    assert list(reader._addresses) == []
    await consumer.close()
