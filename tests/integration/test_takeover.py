"""An agent dies and another takes its partitions over: two ingest agents as processes, `kill -9`, and what becomes of
the records that only the dead one has.

Quotes guarantees G1 (nothing acknowledged is lost), G2 (an offset never changes its record), G3 (order, without
skipping an acknowledged record) and G4 (fenced where it matters).
"""

import asyncio
import json
import sys
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from streamhouse import Admin, Consumer, Producer, errors

from tests.integration.cluster import Cluster
from tests.integration.processes import free_ports

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STORED, IN_LOG_ONLY, AFTER = 10, 20, 5
PATIENCE_S = 60
"""Of every wait; nothing here depends on how long one takes."""


class Takeover:
    """A cluster of which the agent `victim` leads partition `number` of the topic."""

    def __init__(self, cluster: Cluster, metrics_url: str) -> None:
        self.cluster = cluster
        self.address = cluster.bootstrap
        self.metrics_url = metrics_url
        self.topic = f"orders-{uuid.uuid4().hex[:8]}"
        self.number = 0
        self.victim = ""
        self.acknowledged: dict[int, bytes] = {}

    async def create(self, **options: Any) -> None:
        async with Admin(self.address) as admin:
            await admin.create_topic(self.topic, partitions=2, **options)
            described = await until(
                lambda: admin.describe_topic(self.topic), lambda d: all(p.epoch for p in d.partitions)
            )
        self.victim = described.partitions[self.number].leader_agent_id
        assert {part.leader_agent_id for part in described.partitions} == {"ingest-1", "ingest-2"}

    async def produce(self, what: str, count: int, acks: Any) -> None:
        """Waits for the acknowledgements. Where there is no leader the producer tries on."""
        values = [f"{what} {n}".encode() for n in range(count)]
        async with Producer(self.address, acks=acks) as producer:
            sent = await (await producer.send_many(self.topic, values, partition=self.number))
        for offset, value in zip(sent.offsets.tolist(), values, strict=True):
            assert offset not in self.acknowledged, f"offset {offset} was acknowledged twice"
            self.acknowledged[offset] = value

    async def kill_and_go_on(self, acks: Any) -> None:
        """kill -9; returns once the other agent has acknowledged records."""
        self.cluster.services[self.victim].kill()
        started = time.monotonic()
        await self.produce("after", AFTER, acks)
        print(f"\nproduce resumed {time.monotonic() - started:.2f} s after kill -9 of {self.victim}")

    async def bring_back(self) -> None:
        self.cluster.services[self.victim].start()
        await self.cluster.services[self.victim].wait_serving(self.cluster.addresses[self.victim])

    async def unsettled(self) -> list[Any]:
        async with Admin(self.address) as admin:
            leases = (await admin.status()).leases
        return [
            owned
            for lease in leases
            if (lease.topic, lease.partition) == (self.topic, self.number)
            for owned in lease.unsettled
        ]

    async def cli(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "streamhouse_cli", *arguments, "--bootstrap", self.address]
        pipe = asyncio.subprocess.PIPE
        # With the variables of a service, so that the command knows the object store.
        environ = self.cluster.services["segmenter-1"].environ
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=environ)
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()

    async def gauge(self) -> float:
        """Of unsettled ranges, as a coordinator exports it."""
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(self.metrics_url, timeout=10).read().decode())
        lines = [line for line in text.splitlines() if line.startswith("streamhouse_coordinator_unsettled_ranges")]
        return float(lines[0].rsplit(" ", 1)[1]) if lines else -1.0


class Reading:
    """A consumer of the one partition, in a task of its own."""

    def __init__(self, takeover: Takeover, **options: Any) -> None:
        self.consumer = Consumer(takeover.address, assign=[(takeover.topic, takeover.number)], **options)
        self.records: dict[int, bytes | None] = {}
        self.reasons: list[str] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Reading":
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        async with self.consumer as consumer:
            last = -1
            async for record in consumer:
                assert record.offset > last, f"offset {record.offset} after {last}"
                last = record.offset
                self.records[record.offset] = record.value

    async def until(self, met: Callable[[], bool], what: str) -> None:
        """Fails with what the reader failed with."""
        assert self._task is not None
        async with asyncio.timeout(PATIENCE_S):
            while not met():
                self.reasons += [text for text in self.consumer.waiting.values() if text not in self.reasons]
                assert not self._task.done(), f"the reader ended before {what}: {self._task.exception()!r}"
                await asyncio.sleep(0.05)


async def until(ask: Callable[[], Any], met: Callable[[Any], bool]) -> Any:
    """The first answer that is met()."""
    async with asyncio.timeout(PATIENCE_S):
        while not met(answer := await ask()):
            await asyncio.sleep(0.1)
    return answer


@asynccontextmanager
async def running(storage: dict[str, str], work_dir: Path) -> AsyncIterator[Takeover]:
    metrics = f"127.0.0.1:{free_ports(1)[0]}"
    common = {
        **storage,
        # What is not asked to be durable stays in the log for as long as a test takes.
        "STREAMHOUSE_SEAL_AGE_MS": "600000",
        "STREAMHOUSE_SCAN_INTERVAL_MS": "500",
    }
    cluster = Cluster(common, work_dir, {"coordinator": 1, "query": 1, "segmenter": 1})
    cluster.services["coordinator-1"].environ["STREAMHOUSE_PROMETHEUS_LISTEN"] = metrics
    try:
        await cluster.start()
        yield Takeover(cluster, f"http://{metrics}/metrics")
        await cluster.stop()
    finally:
        cluster.kill_all()


async def test_readers_wait_for_a_dead_agent_and_go_on_when_it_is_back(storage: dict[str, str], tmp_path: Path) -> None:
    async with running(storage, tmp_path) as takeover:
        await takeover.create()
        await takeover.produce("stored", STORED, "durable")
        await takeover.produce("in the log", IN_LOG_ONLY, "wal")
        await takeover.kill_and_go_on("wal")
        assert max(takeover.acknowledged) >= 2**30, "the new epoch starts behind all the old one may hold"
        async with Reading(takeover) as reading:
            await reading.until(lambda: bool(reading.reasons), "it was told why it waits")
            assert list(reading.records) == list(range(STORED))
            assert takeover.victim in reading.reasons[0] and "unsettled" in reading.reasons[0]
            (owned,) = await takeover.unsettled()
            assert (owned.status, owned.registered_end, owned.agent_id) == ("orphaned", STORED, takeover.victim)
            shown = await takeover.cli("status")
            assert f"readers of {takeover.topic}/0 wait at offset {STORED}" in shown and "orphaned since" in shown
            await until(takeover.gauge, lambda value: value == 1)
            await takeover.bring_back()
            await reading.until(lambda: len(reading.records) == len(takeover.acknowledged), "it had all records")
            assert reading.records == takeover.acknowledged
        await until(takeover.unsettled, lambda ranges: not ranges)
        await until(takeover.gauge, lambda value: value == 0)


async def test_readers_go_on_when_the_dead_agents_range_is_declared_lost(
    storage: dict[str, str], tmp_path: Path
) -> None:
    async with running(storage, tmp_path) as takeover:
        await takeover.create()
        await takeover.produce("stored", STORED, "durable")
        await takeover.produce("in the log", IN_LOG_ONLY, "wal")
        await takeover.kill_and_go_on("wal")
        kept = {at: value for at, value in takeover.acknowledged.items() if not STORED <= at < STORED + IN_LOG_ONLY}
        async with Reading(takeover, on_data_loss="skip") as reading:
            await reading.until(lambda: bool(reading.reasons), "it was told why it waits")
            settle = (
                "partition",
                "settle",
                takeover.topic,
                "0",
                "--lost",
                "--yes",
                "--reason",
                "the disk burnt",
                "--json",
            )
            (lost,) = json.loads(await takeover.cli(*settle))["ranges"]
            assert (lost["status"], lost["registered_end"], lost["agent_id"]) == ("lost", STORED, takeover.victim)
            await reading.until(lambda: len(reading.records) == len(kept), "it had what is left")
            assert reading.records == kept
        assert await takeover.unsettled() == []
        async with Consumer(takeover.address, assign=[(takeover.topic, 0)]) as consumer:
            with pytest.raises(errors.DataLoss, match="was declared lost"):
                async for _ in consumer:
                    pass
        await check_the_late_agent(takeover, kept)


async def check_the_late_agent(takeover: Takeover, kept: dict[int, bytes]) -> None:
    """G4: what it still has of the lost range is kept out; it says so, and works on."""
    await takeover.bring_back()
    log = takeover.cluster.services[takeover.victim]
    expected = f"declared lost at offset {STORED}: {IN_LOG_ONLY} records beyond"

    async def look() -> str:
        return log.log_tail()

    await until(look, lambda text: expected in text)
    await takeover.produce("late", AFTER, "durable")
    kept |= {at: value for at, value in takeover.acknowledged.items() if value.startswith(b"late")}
    async with Reading(takeover, on_data_loss="skip") as reading:
        await reading.until(lambda: len(reading.records) >= len(kept), "it had what is left")
        assert reading.records == kept
    async with Admin(takeover.address) as admin:
        described = await admin.describe_topic(takeover.topic)
    assert described.partitions[0].record_count == STORED + 2 * AFTER, "nothing of the lost range was registered"
    report = json.loads(await takeover.cli("verify", "--topic", takeover.topic, "--json"))
    assert report["findings"] == [] and report["records"] == STORED + 2 * AFTER, "what is declared lost is no gap"


async def test_a_durable_topic_does_not_wait(storage: dict[str, str], tmp_path: Path) -> None:
    async with running(storage, tmp_path) as takeover:
        await takeover.create(min_acks="durable")
        await takeover.produce("stored", STORED, "durable")
        async with Reading(takeover) as reading:
            await takeover.kill_and_go_on("durable")
            assert sorted(takeover.acknowledged) == list(range(STORED + AFTER)), "no gap: the end was known"
            await reading.until(lambda: len(reading.records) == len(takeover.acknowledged), "it had all records")
            assert reading.records == takeover.acknowledged
            assert not [reason for reason in reading.reasons if "unsettled" in reason]
        assert await takeover.unsettled() == []
