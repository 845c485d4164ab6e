"""How fast an agent takes in its write-ahead log at start-up: `python -m bench.replay`.

The log of an agent that leads 16 partitions is filled up to 1 GiB by the agent's own writer, synced group by group:
100-byte records of idempotent producers, once in batches of about 100 KB and once of about 10 KB (before LZ4). There is
no segmenter, so all of it stays. Measured then, with the log's files dropped from the page cache each time:

  replay    the agent's own code that reads the files, checks every frame and builds its state, alone
  serving   from the start of the agent's process to a health check that says SERVING
"""

import argparse
import asyncio
import gc
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shformat import ProducerStamp, Records, encode_batch, stamp_batch
from shproto.keys import RangeKey
from shruntime.signals import restore_sigint
from streamhouse import Admin
from streamhouse_ingest.ports import Frame
from streamhouse_ingest.settings import IngestSettings
from streamhouse_ingest.wiring import open_log

from bench.clusters import cluster_running, until
from bench.common import MIB, Wrong, console, load_average, print_table, run, usage, write_json
from bench.loads.records import make_records
from tests.integration.cluster import Cluster
from tests.integration.processes import is_serving

TOPIC = "replay"
AGENT = "ingest-1"
PARTITIONS = 16
RECORD_BYTES = 100
FIRST_MS = 1_700_000_000_000
GROUP_BYTES = 8 * MIB
POLL_S = 0.01


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the log (%(default)s)")
    parser.add_argument("--batch-kb", type=int, nargs="+", default=[100, 10], help="of records (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="replays of each log, of which medians are shown")
    parser.add_argument("--dir", type=Path, help="where the log goes; the disk under it is what is measured")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.mib < 1 or options.runs < 1 or min(options.batch_kb) < 1:
        parser.error("--mib, --runs and --batch-kb must be positive")
    return options


async def measure(options: argparse.Namespace) -> None:
    values = make_records(RECORD_BYTES)
    figures = [await measure_one(options, values, batch_kb) for batch_kb in options.batch_kb]
    rows = [
        (
            f"{found['batch_kb']} KB",
            f"{found['frames']:,}",
            f"{found['wal_bytes'] / MIB:,.0f} MiB",
            f"{found['replay_s']:.2f} s",
            f"{found['replay_mb_per_s']:,.0f} MB/s",
            f"{found['replay_mb_per_cpu_s']:,.0f} MB/s",
            f"{found['serving_s']:.2f} s",
            f"{found['memory_mib']:.0f} MiB",
        )
        for found in figures
    ]
    columns = ("batches", "frames", "log", "replay", "", "of its CPU time", "process start to serving", "memory then")
    print_table(f"start-up over a log, median of {options.runs}; goal > 200 MB/s", columns, rows)
    write_json(options.json, vars(options), {str(found["batch_kb"]): found for found in figures})


async def measure_one(options: argparse.Namespace, values: list[bytes], batch_kb: int) -> dict[str, Any]:
    common = {"STREAMHOUSE_SEAL_AGE_MS": "3600000"}
    replicas = {"coordinator": 1, "ingest": 1, "query": 0, "segmenter": 0}
    async with cluster_running(replicas, common, options.dir) as (cluster, _, _):
        agent = cluster.services[AGENT]
        folder = Path(agent.environ["STREAMHOUSE_WAL_DIR"])
        async with Admin(cluster.bootstrap) as admin:
            await admin.create_topic(TOPIC, partitions=PARTITIONS)
            led = await until(
                lambda: admin.describe_topic(TOPIC), lambda found: all(part.epoch for part in found.partitions), "led"
            )
        agent.kill()
        keys = [RangeKey(bytes.fromhex(led.topic.topic_id), part.partition, part.epoch) for part in led.partitions]
        records = await asyncio.to_thread(fill, keys, values, batch_kb, options.mib * MIB, folder)
        replays = [await asyncio.to_thread(replay, folder, records) for _ in range(options.runs)]
        starts_s = []
        for _ in range(options.runs):
            starts_s.append(await start_s(cluster, folder))
            memory_mib = usage(agent.pid).private_mib
            agent.kill()
    seconds, cpu_s = (statistics.median(found[at] for found in replays) for at in (0, 1))
    _, _, frame_count, wal_bytes = replays[0]
    return {
        "batch_kb": batch_kb,
        "frames": frame_count,
        "wal_bytes": wal_bytes,
        "replay_s": seconds,
        "replay_mb_per_s": wal_bytes / seconds / 1e6,
        "replay_mb_per_cpu_s": wal_bytes / cpu_s / 1e6,
        "serving_s": statistics.median(starts_s),
        "every_replay_s": [found[0] for found in replays],
        "every_serving_s": starts_s,
        "memory_mib": memory_mib,
    }


def fill(keys: Sequence[RangeKey], values: list[bytes], batch_kb: int, size_bytes: int, folder: Path) -> int:
    """Writes until the log has that size; returns how many records these are."""
    began_s = time.monotonic()
    opened = open_log(IngestSettings.load({}, wal_dir=str(folder), agent_id=AGENT))
    ends = dict.fromkeys(keys, 0)
    group: list[Frame] = []
    written, group_bytes = 0, 0
    for frame in frames(keys, values, batch_kb * 1000 // RECORD_BYTES, ends):
        group.append(frame)
        group_bytes += len(frame.batch)
        if group_bytes >= GROUP_BYTES or written + group_bytes >= size_bytes:
            opened.wal.append(group)
            written, group, group_bytes = written + group_bytes, [], 0
            if written >= size_bytes:
                break
    opened.wal.close()
    opened.unlock()
    seconds = time.monotonic() - began_s
    console.print(f"wrote {log_bytes(folder) / MIB:,.0f} MiB in batches of {batch_kb} KB in {seconds:.0f} s")
    return sum(ends.values())


def frames(keys: Sequence[RangeKey], values: list[bytes], count: int, ends: dict[RangeKey, int]) -> Iterator[Frame]:
    """Batches of `count` records, a partition after the other; notes in `ends` up to where each goes."""
    for number in itertools.count():
        key = keys[number % len(keys)]
        at = number * count % (len(values) - count)
        now_ms = FIRST_MS + number
        records = Records.from_lists(values[at : at + count], None, range(now_ms, now_ms + count))
        stamp = ProducerStamp(key.partition + 1, 0, ends[key])
        batch = stamp_batch(encode_batch(records, producer=stamp), ends[key], key.epoch)
        base_offset, ends[key] = ends[key], ends[key] + count
        yield Frame(key=key, base_offset=base_offset, record_count=count, batch=batch)


def log_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.wal"))


def drop_from_cache(folder: Path) -> None:
    """The files' pages, as after a restart of the machine; needs no rights but those to read them."""
    for path in folder.glob("*.wal"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # only clean pages can be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def replay(folder: Path, records: int) -> tuple[float, float, int, int]:
    """Seconds, seconds of CPU, frames and bytes. Raises Wrong unless all records are found."""
    drop_from_cache(folder)
    wal_bytes = log_bytes(folder)
    settings = IngestSettings.load({}, wal_dir=str(folder), agent_id=AGENT)
    gc.collect()
    began_s, began_cpu_s = time.perf_counter(), time.thread_time()
    opened = open_log(settings)
    seconds, cpu_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
    opened.unlock()
    logs = opened.replay.logs.values()
    found = sum(buffer.record_count for log in logs for buffer in log.buffers)
    if found != records or opened.replay.damage:
        raise Wrong(f"{records} records were written, a replay found {found}; damage: {opened.replay.damage}")
    return seconds, cpu_s, sum(len(buffer) for log in logs for buffer in log.buffers), wal_bytes


async def start_s(cluster: Cluster, folder: Path) -> float:
    """Seconds from the start of the process until it serves."""
    await asyncio.to_thread(drop_from_cache, folder)
    agent, address = cluster.services[AGENT], cluster.addresses[AGENT]
    began_s = time.perf_counter()
    agent.start()
    while not await is_serving(address):
        if not agent.is_running():
            raise Wrong(f"the agent ended:\n{agent.log_tail()}")
        await asyncio.sleep(POLL_S)
    seconds = time.perf_counter() - began_s
    console.print(f"  serving after {seconds:.2f} s, load {load_average():.1f}")
    return seconds


def main() -> int:
    options = parse_options()
    return run(lambda: measure(options))


if __name__ == "__main__":
    restore_sigint()
    raise SystemExit(main())
