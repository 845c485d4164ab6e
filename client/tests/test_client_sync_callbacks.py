"""Callbacks and subscriptions of the consumer for plain code: in which thread, and what works inside."""

import re
import threading
import time

import pytest
from shproto.errors import InvalidArgument
from streamhouse.sync import Consumer, Producer

from client.tests import test_client_sharing
from client.tests.test_client_sharing import SDK, STEPPED, interrupt_at

PATIENCE_S = 60


def until(check):
    deadline_s = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline_s, "it does not come"
        time.sleep(0.01)


def fill(server, count, topic="t", partitions=2):
    with Producer(server.address) as producer:
        for partition in range(partitions):
            producer.send_many(topic, [b"%d" % n for n in range(count)], partition=partition)


class Told:
    def __init__(self):
        self.calls = []
        self.threads = set()

    def _told(self, kind, partitions):
        self.threads.add(threading.current_thread())
        self.calls.append((kind, {where.partition for where in partitions}))

    def on_assigned(self, partitions):
        self._told("assigned", partitions)

    def on_revoked(self, partitions):
        self._told("revoked", partitions)

    def on_lost(self, partitions):
        self._told("lost", partitions)

    @property
    def all(self):
        return {"on_assigned": self.on_assigned, "on_revoked": self.on_revoked, "on_lost": self.on_lost}


def test_callbacks_are_called_in_the_thread_that_asks(server):
    server.create_topic("t", 2)
    fill(server, 4)
    told = Told()
    consumer = Consumer(server.address, ["t"], group="g", **told.all)
    consumer.start()
    consumer.start()
    assert told.calls == [("assigned", {0, 1})]
    assert len([next(iter(consumer)) for _ in range(8)]) == 8
    with Consumer(server.address, ["t"], group="g") as other:
        assert consumer.poll(1) == {}
        until(lambda: consumer.poll(1) == {} and len(told.calls) == 2)
        assert other.wait_for_assignment(PATIENCE_S * 1000) == {("t", 1)}
        assert other.positions() == {("t", 1): 4}
    until(lambda: consumer.poll(1) == {} and len(told.calls) == 3)
    consumer.close(timeout_s=PATIENCE_S)
    assert told.calls == [("assigned", {0, 1}), ("revoked", {1}), ("assigned", {1}), ("revoked", {0, 1})]
    assert told.threads == {threading.current_thread()}
    assert not server.group("g").members


def test_the_consumer_can_be_used_inside_a_callback_but_not_read(server):
    server.create_topic("t", 2)
    fill(server, 10)
    refused = []

    def on_assigned(partitions):
        consumer.seek("t", 0, 8)
        consumer.pause([("t", 1)])
        assert consumer.assignment == set(partitions)
        assert consumer.committed() == dict.fromkeys(partitions)
        for call in (
            consumer.poll,
            lambda: next(consumer),
            consumer.close,
            consumer.start,
            consumer.unsubscribe,
            lambda: consumer.subscribe(["t"]),
        ):
            with pytest.raises(InvalidArgument, match="inside a callback"):
                call()
            refused.append(call)

    def on_revoked(partitions):
        consumer.commit(dict.fromkeys(partitions, 5))

    consumer = Consumer(
        server.address, ["t"], group="g", auto_commit=False, on_assigned=on_assigned, on_revoked=on_revoked
    )
    try:
        assert [next(consumer).offset, next(consumer).offset] == [8, 9]
        assert consumer.paused() == {("t", 1)}
    finally:
        consumer.close()
    assert len(refused) == 6
    assert server.group("g").offsets == {("t", 0): 5, ("t", 1): 5}


def test_a_record_that_has_failed_is_not_committed_in_on_revoked(server):
    server.create_topic("t", 1)
    fill(server, 5, partitions=1)
    consumer = Consumer(server.address, ["t"], group="g", auto_commit=False, on_revoked=lambda _: consumer.commit())
    with pytest.raises(ZeroDivisionError), consumer:
        for record in consumer:
            if record.offset == 2:
                raise ZeroDivisionError
    assert server.group("g").offsets == {("t", 0): 2}


def test_what_a_callback_raises_comes_from_the_read_and_the_hand_over_goes_on(server):
    server.create_topic("t", 1)
    fill(server, 2, partitions=1)
    failures = [ZeroDivisionError("assigned"), KeyboardInterrupt()]

    def on_assigned(partitions):
        if failures:
            raise failures.pop(0)

    consumer = Consumer(server.address, ["t"], group="g", auto_commit=False, on_assigned=on_assigned)
    with pytest.raises(ZeroDivisionError):
        next(consumer)
    assert [next(consumer).offset, next(consumer).offset] == [0, 1]
    server.expel("g")
    with pytest.raises(KeyboardInterrupt):
        next(consumer)
    assert next(consumer).offset == 0
    consumer.close()


def test_a_slow_callback_keeps_the_membership(server):
    server.create_topic("t", 1)
    entered, go_on = threading.Event(), threading.Event()

    def on_assigned(partitions):
        entered.set()
        assert go_on.wait(PATIENCE_S)

    consumer = Consumer(server.address, ["t"], group="g", on_assigned=on_assigned)
    starting = threading.Thread(target=consumer.start)
    starting.start()
    assert entered.wait(PATIENCE_S)
    before = server.faults.calls["heartbeat_group"]
    until(lambda: server.faults.calls["heartbeat_group"] > before + 5)
    assert consumer.membership.state == "rebalancing" and server.group("g").members
    go_on.set()
    starting.join()
    consumer.close()


def test_other_threads_read_on_while_one_is_inside_a_callback(server):
    server.create_topic("t", 2)
    entered, go_on, seen = threading.Event(), threading.Event(), []

    def on_revoked(partitions):
        entered.set()
        assert go_on.wait(PATIENCE_S)

    def read():
        for record in consumer:
            seen.append(record.partition)

    consumer = Consumer(server.address, ["t"], group="g", on_revoked=on_revoked)
    consumer.start()
    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    with Consumer(server.address, ["t"], group="g") as other:
        assert entered.wait(PATIENCE_S) and not other.assignment
        fill(server, 5)
        until(lambda: len(seen) == 5)
        go_on.set()
        other.wait_for_assignment(PATIENCE_S * 1000)
    consumer.close()
    for thread in threads:
        thread.join()
    assert seen[:5] == [0] * 5


def test_closing_waits_for_a_callback_in_another_thread(server):
    server.create_topic("t", 1)
    entered, go_on, told = threading.Event(), threading.Event(), Told()

    def on_assigned(partitions):
        entered.set()
        assert go_on.wait(PATIENCE_S)

    consumer = Consumer(server.address, ["t"], group="g", on_assigned=on_assigned, on_revoked=told.on_revoked)
    starting = threading.Thread(target=consumer.start)
    starting.start()
    assert entered.wait(PATIENCE_S)
    closing = threading.Thread(target=consumer.close)
    closing.start()
    until(lambda: consumer._inner._closed)
    assert told.calls == []
    go_on.set()
    closing.join()
    starting.join()
    assert told.calls == [("revoked", {0})]


def test_closing_is_over_when_its_time_is(server):
    server.create_topic("t", 1)
    consumer = Consumer(server.address, ["t"], group="g", on_revoked=lambda _: time.sleep(0.2))
    consumer.start()
    with pytest.raises(TimeoutError, match=r"timeout_s = 0\.1"):
        consumer.close(timeout_s=0.1)
    consumer.close()


def test_subscribing_by_names_and_patterns(server):
    for topic in ("t", "u"):
        server.create_topic(topic, 1)
        fill(server, 3, topic=topic, partitions=1)
    told = Told()
    with Consumer(server.address, ["t"], group="g", topic_refresh_interval_ms=20, **told.all) as consumer:
        assert next(consumer).topic == "t"
        consumer.subscribe(["u"])
        assert server.group("g").offsets["t", 0] == 1, "what the thread had in hand is done with"
        assert [next(consumer).topic for _ in range(3)] == ["u"] * 3
        consumer.subscribe(re.compile("[tuv]"))
        assert [next(consumer).topic for _ in range(2)] == ["t"] * 2
        server.create_topic("v", 1)
        fill(server, 1, topic="v", partitions=1)
        assert next(consumer).topic == "v"
        consumer.unsubscribe()
        assert not server.group("g").members and not consumer.assignment
        with pytest.raises(InvalidArgument, match="reads nothing"):
            next(consumer)
        consumer.subscribe(pattern="v")
        fill(server, 1, topic="v", partitions=1)
        assert next(consumer).offset == 1


def test_coroutine_functions_are_refused(server):
    async def on_assigned(partitions):
        pass

    with pytest.raises(InvalidArgument, match="plain functions"):
        Consumer(server.address, ["t"], on_assigned=on_assigned)
    with pytest.raises(InvalidArgument, match="plain functions"):
        Consumer(server.address, ["t"]).subscribe(["t"], on_lost=on_assigned)


@pytest.mark.parametrize("first", ["start", "poll"])
def test_an_interrupt_at_any_step_leaves_no_hand_over_behind(server, monkeypatch, first):
    """Ctrl-C may come between any two steps of a thread that is about to call, calls, or has called."""
    server.create_topic("t", 2)
    fill(server, 5)
    monkeypatch.setattr(test_client_sharing, "STEPPED", STEPPED | {str(SDK / "assignments.py")})
    step, was_reached = 0, True
    while was_reached:
        step += 1
        told: list[int] = []

        def on_assigned(partitions, told=told):
            told += [where.partition for where in partitions]

        consumer = Consumer(server.address, ["t"], stop_at_end=True, on_assigned=on_assigned)
        try:
            with interrupt_at(step) as reached:
                consumer.start() if first == "start" else consumer.poll(0, max_records=1)
            was_reached = False
        except KeyboardInterrupt:
            was_reached = reached()
        while not consumer.at_end:
            consumer.poll(PATIENCE_S * 1000)
        assert sorted(told) == [0, 1], f"step {step}"
        assert sum(consumer.positions().values()) == 10
        consumer.close()
    assert step > 15
