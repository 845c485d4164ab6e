"""Memory, log and producers while the object store is away: `python -m bench.outage`.

One coordinator, agent, segmenter and query service as processes over an embedded PostgreSQL and an S3 server. Producers
write 100-byte records in batches of 100 KB as fast as they are taken (acks=wal). After a while the S3 server refuses
connections for some minutes: the agent's log fills up to its limit, then producers are refused (RESOURCE_EXHAUSTED) and
keep trying. Then S3 returns, everything drains, and every acknowledged record is read back and compared. Each second
the memory of each process and the fill of the agent are sampled; the largest values are compared with what the settings
allow. Fails when a limit is exceeded or a record is missing.
"""

import argparse
import asyncio
import itertools
import os
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from shproto.rpc import Connection
from shproto.services import IngestClient
from shproto.v1 import ingest_pb2
from shruntime.signals import restore_sigint
from shruntime.tasks import cancel_and_wait
from streamhouse import Admin, Consumer, Producer, SentRecords
from streamhouse.errors import StreamHouseError
from streamhouse_ingest.settings import IngestSettings
from streamhouse_segmenter.settings import SegmenterSettings

from bench.clusters import cluster_running, until
from bench.common import MIB, Wrong, console, load_average, print_table, run, usage, write_json
from bench.end_to_end import BATCH_BYTES, BATCH_RECORDS, RECORD_BYTES
from bench.loads.records import make_records
from tests.integration.cluster import Cluster

try:
    from tests.integration import servers
except ModuleNotFoundError as error:  # of the extra `test`, which `make demo` does not install
    raise SystemExit(f"error: {error.name} is not installed; `make setup` installs what runs the S3 server") from error

TOPIC = "outage"
PARTITIONS = 4
AGENT = "ingest-1"
SAMPLE_S = 1.0
RECOVERED_S = 20.0
"""Producers go on so long after S3 is back, so that drain and writes compete."""
DELIVERY_TIMEOUT_MS = 5_000
"""Of the producers: short, so that a full log is seen as failed sends; the default is two minutes."""


@dataclass(slots=True)
class Phase:
    """One stretch of the run. Rates follow from `acked_records` and `seconds`."""

    name: str
    seconds: float = 0.0
    acked_records: int = 0
    first_ack_s: float | None = None
    failed: Counter[str] = field(default_factory=Counter)
    began_s: float = field(default_factory=time.monotonic)

    def acked(self, record_count: int) -> None:
        if self.first_ack_s is None:
            self.first_ack_s = time.monotonic() - self.began_s
        self.acked_records += record_count


@dataclass(slots=True)
class Written:
    """Acknowledged runs of records per partition: base offset, count, index of the first in the values sent."""

    runs: dict[int, list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, sent: SentRecords, at: int) -> None:
        cuts = np.flatnonzero((np.diff(sent.offsets) != 1) | (np.diff(sent.partitions) != 0)) + 1
        for start, stop in itertools.pairwise([0, *cuts.tolist(), len(sent.offsets)]):
            self.runs[int(sent.partitions[start])].append((int(sent.offsets[start]), stop - start, at + start))


class Load:
    """Producers that write as fast as they are let."""

    def __init__(self, values: list[bytes], in_flight: int) -> None:
        self.written = Written()
        self.phase = Phase("")
        self._values = values
        self._in_flight = in_flight
        self._at = 0

    async def run(self, address: str, ending: asyncio.Event) -> None:
        async with (
            Producer(
                address, batch_bytes=BATCH_BYTES * 5 // 4, linger_ms=2, delivery_timeout_ms=DELIVERY_TIMEOUT_MS
            ) as producer,
            asyncio.TaskGroup() as group,
        ):
            for number in range(self._in_flight):
                group.create_task(self._write(producer, number % PARTITIONS, ending))

    async def _write(self, producer: Producer, partition: int, ending: asyncio.Event) -> None:
        while not ending.is_set():
            at = self._at
            self._at = (at + BATCH_RECORDS) % (len(self._values) - BATCH_RECORDS)
            try:
                batch = self._values[at : at + BATCH_RECORDS]
                self.written.add(await (await producer.send_many(TOPIC, batch, partition=partition)), at)
                self.phase.acked(BATCH_RECORDS)
            except StreamHouseError as error:
                self.phase.failed[error.reason] += 1


class Samples:
    """The largest values seen so far, by what they are of."""

    def __init__(self, cluster: Cluster) -> None:
        self.largest: dict[str, float] = {}
        self._cluster = cluster
        self._connection = Connection([cluster.addresses[AGENT]])

    async def run(self) -> None:
        try:
            while True:
                await self._sample()
                await asyncio.sleep(SAMPLE_S)
        finally:
            await self._connection.close()

    async def _sample(self) -> None:
        for name, process in self._cluster.services.items():
            self._note(f"{name} memory", usage(process.pid).private_mib)
        try:
            agent = await IngestClient(self._connection).describe_agent(ingest_pb2.DescribeAgentRequest())
        except StreamHouseError as error:
            console.print(f"  no sample of the agent: {error}")
            return
        self._note("log", agent.wal_bytes / MIB)
        self._note("batches in memory", agent.memory_bytes / MIB)

    def _note(self, name: str, value: float) -> None:
        self.largest[name] = max(self.largest.get(name, 0.0), value)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="S3 is away (%(default)s)")
    parser.add_argument("--warm-up-s", type=float, default=20, help="before that (%(default)s)")
    parser.add_argument("--wal-mib", type=int, default=2048, help="wal_bytes_max of the agent (%(default)s)")
    parser.add_argument("--in-flight", type=int, default=16, help="batches waiting for their ack (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where the data goes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if min(options.minutes, options.warm_up_s, options.wal_mib, options.in_flight) <= 0:
        parser.error("all numbers must be positive")
    return options


async def measure(options: argparse.Namespace) -> None:
    # The S3 server keeps large objects in files, not in memory.
    os.environ.setdefault("MOTO_S3_DEFAULT_KEY_BUFFER_SIZE", str(64 * 1024))
    s3 = await asyncio.to_thread(servers.s3_server)
    try:
        common = {**s3.settings, "STREAMHOUSE_WAL_BYTES_MAX": str(options.wal_mib * MIB)}
        replicas = {"coordinator": 1, "ingest": 1, "query": 1, "segmenter": 1}
        async with cluster_running(replicas, common, options.dir) as (cluster, _, _):
            figures = await outage(cluster, s3, options)
    finally:
        await asyncio.to_thread(s3.close)
    report(figures, options)


async def outage(cluster: Cluster, s3: servers.Server, options: argparse.Namespace) -> dict[str, Any]:
    values = make_records(RECORD_BYTES)
    load, ending, samples = Load(values, options.in_flight), asyncio.Event(), Samples(cluster)
    async with Admin(cluster.bootstrap) as admin:
        await admin.create_topic(TOPIC, partitions=PARTITIONS)
        at_rest = {name: usage(process.pid).private_mib for name, process in cluster.services.items()}
        sampling = asyncio.create_task(samples.run())
        writing = asyncio.create_task(load.run(cluster.bootstrap, ending))
        try:
            phases = [await phase(load, "before", options.warm_up_s, writing)]
            await asyncio.to_thread(s3.stop)
            phases.append(await phase(load, "away", options.minutes * 60, writing))
            await asyncio.to_thread(s3.start)
            phases.append(await phase(load, "back", RECOVERED_S, writing))
            ending.set()
            await writing
            drained_s = await drained(cluster.addresses[AGENT])
            began_s = time.monotonic()
            read = await read_back(cluster.bootstrap, load.written, values)
            read_s = time.monotonic() - began_s
        finally:
            await cancel_and_wait(writing, sampling)
    return {
        "phases": {item.name: shown(item) for item in phases},
        "at_rest_mib": at_rest,
        "largest_mib": samples.largest,
        "drained_s": drained_s,
        "read_back_records": read,
        "read_back_s": read_s,
    }


async def phase(load: Load, name: str, seconds: float, writing: asyncio.Task[None]) -> Phase:
    """Lets the load go on. Raises what ended it, should anything."""
    load.phase = Phase(name)
    done, _ = await asyncio.wait([writing], timeout=seconds)
    if done:
        writing.result()
    found = load.phase
    found.seconds = time.monotonic() - found.began_s
    first_ack = "none" if found.first_ack_s is None else f"after {found.first_ack_s:.1f} s"
    rate = found.acked_records * RECORD_BYTES / found.seconds / 1e6
    console.print(
        f"  {name}: {found.seconds:.0f} s, {rate:.1f} MB/s acknowledged, the first {first_ack}, "
        f"sends failed: {dict(found.failed)}, load {load_average():.1f}"
    )
    return found


async def drained(address: str) -> float:
    """Seconds until nothing waits to be registered. What is left in the agent's memory is sealed by its age."""
    began_s = time.monotonic()
    connection = Connection([address])

    async def look() -> int:
        agent = await IngestClient(connection).describe_agent(ingest_pb2.DescribeAgentRequest())
        return agent.unregistered_bytes

    try:
        await until(look, lambda size_bytes: size_bytes == 0, "everything is registered", interval_s=0.5)
    finally:
        await connection.close()
    return time.monotonic() - began_s


async def read_back(address: str, written: Written, values: list[bytes]) -> int:
    """Compares every acknowledged record with what is read, in runs. Raises Wrong."""
    data = b"".join(values)
    expected = {partition: iter(sorted(runs)) for partition, runs in written.runs.items()}
    waiting = {partition: next(runs) for partition, runs in expected.items()}
    found = 0
    async with Consumer(address, [TOPIC], start="earliest", stop_at_end=True) as consumer:
        async for batch in consumer.batches():
            first, last = int(batch.offsets[0]), int(batch.offsets[-1])
            while (run_ := waiting.get(batch.partition)) is not None and run_[0] <= last:
                base, count, at = run_
                skip = base - first
                take = min(count, last + 1 - base)
                if skip < 0:
                    raise Wrong(f"partition {batch.partition}: offset {base} was acknowledged and is not there")
                start, stop = skip * RECORD_BYTES, (skip + take) * RECORD_BYTES
                if bytes(batch.values.data[start:stop]) != data[at * RECORD_BYTES : (at + take) * RECORD_BYTES]:
                    raise Wrong(f"partition {batch.partition}: other records at offset {base} than were acknowledged")
                found += take
                if take < count:
                    waiting[batch.partition] = (base + take, count - take, at + take)
                    break
                rest = next(expected[batch.partition], None)
                if rest is None:
                    del waiting[batch.partition]
                else:
                    waiting[batch.partition] = rest
    if waiting:
        raise Wrong(f"not read to the end: {waiting}")
    return found


def shown(found: Phase) -> dict[str, Any]:
    return {
        "seconds": found.seconds,
        "acked_records": found.acked_records,
        "acked_mb_per_s": found.acked_records * RECORD_BYTES / found.seconds / 1e6,
        "first_ack_s": found.first_ack_s,
        "failed": dict(found.failed),
    }


def limits_mib(options: argparse.Namespace, at_rest: dict[str, float]) -> dict[str, float]:
    """What the settings allow. A process may take what it takes at rest, and its buffers."""
    agent, segmenter = IngestSettings.load({}), SegmenterSettings.load({})
    agent_bytes = agent.memory_bytes_max + agent.queue_bytes_max + agent.tail_cache_bytes + agent.wal_group_bytes_max
    segmenter_bytes = segmenter.builds_in_flight_max * segmenter.segment_build_bytes_max
    return {
        "log": options.wal_mib,
        "batches in memory": (agent.memory_bytes_max + agent.tail_cache_bytes) / MIB,
        f"{AGENT} memory": at_rest[AGENT] + agent_bytes / MIB,
        "segmenter-1 memory": at_rest["segmenter-1"] + segmenter_bytes / MIB,
    }


def report(figures: dict[str, Any], options: argparse.Namespace) -> None:
    limits = limits_mib(options, figures["at_rest_mib"])
    figures["limits_mib"] = limits
    rows = []
    for name, value in figures["largest_mib"].items():
        limit = f"{limits[name]:,.0f} MiB" if name in limits else ""
        rest = figures["at_rest_mib"].get(name.removesuffix(" memory"))
        rows.append((name, f"{rest:,.0f} MiB" if rest is not None else "", f"{value:,.0f} MiB", limit))
    print_table(f"S3 away for {options.minutes:g} minutes", ("", "at rest", "largest", "limit"), rows)
    console.print(
        f"drained {figures['drained_s']:.0f} s after the last write; {figures['read_back_records']:,} acknowledged "
        f"records read back and compared in {figures['read_back_s']:.0f} s"
    )
    write_json(options.json, vars(options), figures)
    over = [name for name, limit in limits.items() if figures["largest_mib"][name] > limit]
    if over:
        raise Wrong(f"beyond the limit: {', '.join(over)}")


def main() -> int:
    options = parse_options()
    return run(lambda: measure(options))


if __name__ == "__main__":
    restore_sigint()
    raise SystemExit(main())
