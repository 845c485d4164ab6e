"""PostgreSQL's machine dies for good, and its standby is promoted: the whole platform as processes, writing all the
time.

Quotes what docs/guarantees.md says of an absent PostgreSQL (acks=wal goes on within the reserved range, acks=durable
waits, nothing changes hands) and G1, G2 and G8 across the failover: nothing is lost, given out or registered twice.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from shproto.errors import StreamHouseError, Unavailable
from shproto.rpc import Connection
from shproto.services import QueryClient
from shproto.v1 import query_pb2
from streamhouse import Admin, Producer
from streamhouse_coordinator.adapters import listener
from streamhouse_coordinator.adapters.postgres_connections import Listening

from tests.faults.proxy import Direction, FaultProxy
from tests.integration.cluster import Cluster
from tests.integration.reading import read_partition
from tests.integration.servers import Server
from tests.integration.standby import PostgresPair, postgres_pair

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

TTL_MS = 6_000
PATIENCE_S = 90
ACKS = {"fast": "wal", "safe": "durable"}
"""A topic of one partition for each."""


class Writer:
    """Sends one record after the other and remembers where each was acknowledged."""

    def __init__(self, address: str, topic: str) -> None:
        self._address, self._topic = address, topic
        self.acknowledged: dict[int, bytes | None] = {}
        self._stopping = False

    async def run(self) -> None:
        async with Producer(
            self._address, acks=ACKS[self._topic], linger_ms=0, delivery_timeout_ms=PATIENCE_S * 1000
        ) as producer:
            for n in count():
                if self._stopping:
                    return
                value = f"{self._topic} {n}".encode()
                offset = (await (await producer.send(self._topic, value=value))).offset
                assert offset not in self.acknowledged, f"{self._topic}: offset {offset} was given out again"
                self.acknowledged[offset] = value

    def stop(self) -> None:
        self._stopping = True

    async def progress(self, records: int) -> None:
        """Waits for so many more acknowledgements."""
        goal = len(self.acknowledged) + records
        await until(lambda: len(self.acknowledged) >= goal)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.05)


@pytest.fixture
def pair() -> Iterator[PostgresPair]:
    server = postgres_pair()
    yield server
    server.close()


@pytest.fixture
async def cluster(pair: PostgresPair, storage: dict[str, str], tmp_path: Path) -> AsyncIterator[Cluster]:
    common = storage | {
        **pair.settings,
        "STREAMHOUSE_PG_TIMEOUT_MS": "2000",
        "STREAMHOUSE_SESSION_TTL_MS": str(TTL_MS),
        "STREAMHOUSE_HEARTBEAT_INTERVAL_MS": "500",
        "STREAMHOUSE_SEAL_AGE_MS": "500",
    }
    whole = Cluster(common, tmp_path)
    try:
        await whole.start()
        yield whole
        await whole.stop()
    finally:
        whole.kill_all()


async def test_the_standby_takes_over_and_nothing_is_lost_or_registered_twice(
    pair: PostgresPair, cluster: Cluster
) -> None:
    async with Admin(cluster.bootstrap) as admin:
        for topic in ACKS:
            await admin.create_topic(topic, partitions=1)
    writers = {topic: Writer(cluster.bootstrap, topic) for topic in ACKS}
    await asyncio.to_thread(pair.attach_standby)
    async with asyncio.TaskGroup() as group:
        for writer in writers.values():
            group.create_task(writer.run())
        for writer in writers.values():
            await writer.progress(20)
        pair.kill()
        await _go_on_without(writers, TTL_MS * 2 / 1000)
        await asyncio.to_thread(pair.start)
        for writer in writers.values():
            await writer.progress(20)
            writer.stop()
    await _check(cluster, writers)


async def test_g8_a_standby_that_lagged_is_not_worked_on_and_nothing_is_deleted(
    pair: PostgresPair, cluster: Cluster
) -> None:
    """What was registered last is not in it, and new events soon stand where those were."""
    async with Admin(cluster.bootstrap) as admin:
        await admin.create_topic("safe", partitions=1)
        writer = Writer(cluster.bootstrap, "safe")
        writing = asyncio.create_task(writer.run())
        try:
            await writer.progress(10)
            await asyncio.to_thread(pair.attach_standby)
            await writer.progress(10)
            await asyncio.to_thread(pair.leave_standby_behind)
            await writer.progress(10)
            await asyncio.to_thread(pair.kill)
            await asyncio.to_thread(pair.start)
            await _until_missed(admin)
            place = ("--bootstrap", cluster.bootstrap, "--json")
            environ = cluster.services["segmenter-1"].environ
            for how in ("--dry-run", "--yes"):
                said = await _cli(environ, "sweep", how, *place)
                assert said.returncode == 1 and "was seen, and is not there any more" in said.stderr, said
            found = json.loads((await _cli(environ, "verify", "--grace-ms", "0", *place)).stdout)
            assert {"outdated", "unregistered"} <= {item["kind"] for item in found["findings"]}
            await _is_told_of_it(cluster)
            said = await _cli(environ, "status", "--bootstrap", cluster.bootstrap)
            assert "THE METADATA WENT BACK" in said.stdout and "partition settle" not in said.stdout, said
            async with Producer(cluster.bootstrap, acks="wal", delivery_timeout_ms=3_000) as producer:
                with pytest.raises(StreamHouseError):  # no agent leads on it
                    await (await producer.send("safe", value=b"more"))
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            cluster.kill_all()  # agents would wait for a session before they stop


async def _until_missed(admin: Admin) -> None:
    """It is known that events are missing, and agents' sessions are over."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(Unavailable):
                status = await admin.status()
                if status.missing_position and not any(session.role == "ingest" for session in status.sessions):
                    return
            await asyncio.sleep(0.2)


async def _is_told_of_it(cluster: Cluster) -> None:
    """G3: what lies behind the records that can be read is not known: a reader there is not told that it is the end."""
    query, offset = QueryClient(Connection([cluster.addresses["query-1"]])), 0
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                answer = await query.fetch(query_pb2.FetchRequest(topic="safe", offset=offset))
                if "the metadata went back" in answer.waiting_reason:
                    return
                offset = answer.next_offset
                await asyncio.sleep(0.05)
    finally:
        await query.close()


async def _go_on_without(writers: dict[str, Writer], seconds: float) -> None:
    """For longer than any lease: acks=wal all the time, acks=durable nothing but what was under way."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        await writers["fast"].progress(5)
    before = len(writers["safe"].acknowledged)
    await writers["fast"].progress(5)
    assert len(writers["safe"].acknowledged) == before


async def _check(cluster: Cluster, writers: dict[str, Writer]) -> None:
    connection = Connection([cluster.addresses["query-1"]])
    try:
        for topic, writer in writers.items():
            assert (await read_partition(QueryClient(connection), topic, 0)).at() == writer.acknowledged
    finally:
        await connection.close()
    async with Admin(cluster.bootstrap) as admin:
        for topic in ACKS:
            described = await admin.describe_topic(topic)
            assert [part.epoch for part in described.partitions] == [1], "nothing changed hands"
    assert (await _verify(cluster))["findings"] == []


async def _verify(cluster: Cluster) -> Any:
    environ = cluster.services["segmenter-1"].environ
    done = await _cli(environ, "verify", "--bootstrap", cluster.bootstrap, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


async def _cli(environ: Mapping[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "streamhouse_cli", *arguments]
    return await asyncio.to_thread(subprocess.run, command, env=dict(environ), capture_output=True, text=True)


class CountingListening(Listening):
    connects = 0

    async def connect(self) -> Any:
        self.connects += 1
        return await super().connect()


async def test_who_listens_notices_that_the_other_end_is_gone_without_a_word(
    postgres: Server, storage: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that dies closes no connection; through another, notifications are heard again."""
    monkeypatch.setattr(listener, "PROBE_S", 0.2)
    dsn = storage["STREAMHOUSE_PG_DSN"]
    place = urlsplit(dsn).netloc.rpartition("@")[2]
    proxy = FaultProxy("postgres", place)
    await proxy.start()
    connections = CountingListening(dsn.replace(place, proxy.address), timeout_ms=5_000, past_pooler=False)
    listening = asyncio.Event()
    heard = listener.Listener(
        connections.connect, events_changed=listening.set, group_changed=lambda _: None, buffer_sealed=lambda _: None
    )
    task = asyncio.create_task(heard.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await listening.wait()
            listening.clear()
            proxy.hold(*Direction)
            while connections.connects < 2:
                await asyncio.sleep(0.05)
            await proxy.heal()
            await listening.wait()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await proxy.stop()
