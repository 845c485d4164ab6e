"""A member of a group that stalls: its process is stopped past its session, and comes back.

Its partitions go to another member meanwhile, its commit is refused when it comes back, and it joins again: nothing is
skipped, and nothing that was committed is handed out again.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from streamhouse import Admin, Consumer, Producer
from streamhouse_cli.serve_process import ServeProcess

TOPIC, GROUP, RECORDS, SESSION_TIMEOUT_MS = "stall", "stall", 60, 1_500
DEADLINE_S = 60.0

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

# Takes a record, says so, and when told to go on commits it: a stop in between meets it at work.
WORKER = f"""
import json, sys
from streamhouse import errors
from streamhouse.sync import Consumer

def say(**words):
    print(json.dumps(words), flush=True)

options = dict(group="{GROUP}", auto_commit=False, session_timeout_ms={SESSION_TIMEOUT_MS})
with Consumer(sys.argv[1], ["{TOPIC}"], **options) as c:
    for record in c:
        say(took=record.offset)
        if not sys.stdin.readline():
            break
        try:
            c.commit({{(record.topic, record.partition): record.offset + 1}})
            say(committed=record.offset + 1)
        except errors.StreamHouseError as error:
            say(refused=error.reason)
"""


class Worker:
    """The member as a process; `hears` is the next thing it says."""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    async def hears(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self._process.stdout.readline), DEADLINE_S)
        assert line, "the worker ended"
        said: dict[str, Any] = json.loads(line)
        return said

    async def works(self) -> dict[str, Any]:
        """Lets it commit what it took; what came of that."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return await self.hears()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def serve(tmp_path: Path) -> Any:
    with ServeProcess(tmp_path / "data", tmp_path / "serve.log") as process:
        yield process


@contextlib.asynccontextmanager
async def working(address: str) -> AsyncIterator[Worker]:
    worker = Worker(address)
    try:
        yield worker
    finally:
        worker.close()


async def members(admin: Admin) -> int:
    return len((await admin.describe_group(GROUP)).members)


async def committed(admin: Admin) -> int:
    (found,) = await admin.group_offsets(GROUP)
    return found.offset


async def test_a_member_that_stalls_neither_loses_nor_repeats_what_was_committed(serve: ServeProcess) -> None:
    async with Admin(serve.address) as admin, Producer(serve.address) as producer:
        await admin.create_topic(TOPIC, 1)
        await producer.send_many(TOPIC, [b"%d" % n for n in range(RECORDS)])
        await producer.flush()
        async with working(serve.address) as worker:
            for offset in range(5):
                assert await worker.hears() == {"took": offset}
                assert await worker.works() == {"committed": offset + 1}
            assert await worker.hears() == {"took": 5}
            worker.signal(signal.SIGSTOP)
            async with asyncio.timeout(DEADLINE_S):
                while await members(admin):
                    await asyncio.sleep(0.1)
            taken = await other_member_reads_to(serve.address, 20)
            assert taken == list(range(5, 20)), "what the stalled one took and did not commit is the other's"
            worker.signal(signal.SIGCONT)
            assert "refused" in await worker.works()
            assert await committed(admin) == 20
            for offset in range(20, RECORDS):
                assert await worker.hears() == {"took": offset}
                assert await worker.works() == {"committed": offset + 1}
        assert await committed(admin) == RECORDS


async def other_member_reads_to(address: str, end: int) -> list[int]:
    taken: list[int] = []
    async with Consumer(address, [TOPIC], group=GROUP, auto_commit=False) as consumer:
        async with asyncio.timeout(DEADLINE_S):
            async for record in consumer:
                taken.append(record.offset)
                if record.offset == end - 1:
                    break
        await consumer.commit()
    return taken
