"""Three members of a group against `serve`, each a process with a sink that commits in on_revoked: they join and leave
one after the other, and one is stopped past its session.

Every record is written, by one member at a time, and once: only what the stopped member had written and not committed
may be written again.
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streamhouse.sync import Admin, Producer
from streamhouse_cli.serve_process import ServeProcess

TOPIC, GROUP, PARTITIONS, RECORDS, SESSION_TIMEOUT_MS = "orders", "sink", 6, 200, 2_000
DEADLINE_S = 120.0

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

# Writes what it has gathered as one line, and then commits it. Ends when it is told to.
WORKER = f"""
import json, sys, threading, time
from streamhouse import errors
from streamhouse.sync import Consumer

def say(**words):
    print(json.dumps(words | {{"at_s": time.monotonic()}}), flush=True)

buffer, ended = [], threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()

def flush(partitions=None):
    global buffer
    due = [r for r in buffer if partitions is None or (r.topic, r.partition) in partitions]
    buffer = [r for r in buffer if r not in due]
    if due:
        say(wrote=[(r.partition, r.offset) for r in due])
        consumer.commit({{(r.topic, r.partition): r.offset + 1 for r in due}})

def on_assigned(partitions):
    say(assigned=[where.partition for where in partitions])

def on_revoked(partitions):
    flush(partitions)
    say(revoked=[where.partition for where in partitions])

def on_lost(partitions):
    global buffer
    buffer = [r for r in buffer if (r.topic, r.partition) not in partitions]
    say(lost=[where.partition for where in partitions])

consumer = Consumer(
    sys.argv[1], ["{TOPIC}"], group="{GROUP}", auto_commit=False, session_timeout_ms={SESSION_TIMEOUT_MS},
    on_assigned=on_assigned, on_revoked=on_revoked, on_lost=on_lost,
)
with consumer:
    while not ended.is_set():
        try:
            for records in consumer.poll(50, max_records=20).values():
                buffer += records
            if len(buffer) >= 30:
                flush()
        except (errors.UnknownMember, errors.IllegalGeneration) as error:
            say(refused=error.reason)
"""


class Worker:
    """A member as a process; `said` is all that it has said so far."""

    def __init__(self, address: str) -> None:
        self.said: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(json.loads(line))

    @property
    def owns(self) -> set[int]:
        owned: set[int] = set()
        for said in list(self.said):
            owned |= set(said.get("assigned", ()))
            owned -= {*said.get("revoked", ()), *said.get("lost", ())}
        return owned

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def leave(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        assert self._process.wait(DEADLINE_S) == 0
        self._listener.join()

    def close(self) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServeProcess]:
    with ServeProcess(tmp_path / "data", tmp_path / "serve.log") as process:
        yield process


def until(check: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline_s, "it does not come"
        time.sleep(0.05)


def test_three_members_hand_over_without_a_record_left_out_or_written_twice(serve: ServeProcess) -> None:
    produced = 0
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(Admin(serve.address))
        producer = stack.enter_context(Producer(serve.address))
        admin.create_topic(TOPIC, PARTITIONS)

        def produce() -> None:
            nonlocal produced
            for partition in range(PARTITIONS):
                producer.send_many(TOPIC, [b"x"] * RECORDS, partition=partition)
            producer.flush()
            produced += RECORDS

        def member() -> Worker:
            worker = Worker(serve.address)
            stack.callback(worker.close)
            return worker

        def shared_by(*members: Worker) -> Callable[[], bool]:
            share = PARTITIONS // len(members)
            return lambda: all(len(worker.owns) == share for worker in members)

        first = member()
        produce()
        until(shared_by(first))
        second, third = member(), member()
        produce()
        until(shared_by(first, second, third))
        produce()
        second.leave()
        until(shared_by(first, third))
        produce()
        unclean = third.owns
        third.signal(signal.SIGSTOP)
        until(shared_by(first))
        produce()
        third.signal(signal.SIGCONT)
        until(lambda: any("lost" in said or "refused" in said for said in third.said))
        until(shared_by(first, third))
        produce()
        until(lambda: written(first, second, third).keys() >= expected(produced - 30))
        first.leave()
        until(shared_by(third))
        third.leave()
        times = written(first, second, third)
        assert times.keys() == expected(produced)
        twice = {partition for (partition, _), count in times.items() if count > 1}
        assert twice <= unclean, "handed over in order, and written twice"
        assert {item.offset for item in admin.group_offsets(GROUP)} == {produced}
        one_at_a_time([first, second, third], set(range(PARTITIONS)) - unclean)


def written(*members: Worker) -> Counter[tuple[int, int]]:
    """Returns how often each record was written, by partition and offset."""
    said = [words for worker in members for words in list(worker.said)]
    return Counter((partition, offset) for words in said for partition, offset in words.get("wrote", ()))


def expected(end: int) -> set[tuple[int, int]]:
    return {(partition, offset) for partition in range(PARTITIONS) for offset in range(end)}


def one_at_a_time(members: list[Worker], partitions: set[int]) -> None:
    """Checks that of each of the partitions a member was told only after the one before had given it up."""
    said = sorted((said["at_s"], number, said) for number, worker in enumerate(members) for said in worker.said)
    owners: dict[int, int] = {}
    for _, number, words in said:
        for partition in partitions.intersection(words.get("assigned", ())):
            assert partition not in owners, f"partition {partition} of member {owners[partition]} went to {number}"
            owners[partition] = number
        for partition in partitions.intersection(words.get("revoked", ())):
            assert owners.pop(partition) == number
    assert owners == {}
